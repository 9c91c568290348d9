//! The registers of a virtual processor: as they are when a kernel is entered, and saved and set.

use std::mem::size_of;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    CpuId, KVM_MAX_MSR_ENTRIES, KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_FORMAT_VMX,
    KVM_STATE_NESTED_GIF_SET, KVM_STATE_NESTED_GUEST_MODE, Msrs, Xsave, kvm_debugregs, kvm_fpu,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::boot::enter_long_mode;
use super::layout;
use crate::error::{Error, kvm};
use crate::long_mode::RFLAGS_RESERVED;

// Numbers of MSRs: Linux's arch/x86/include/asm/msr-index.h.
const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Fast string instructions.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// Memory is cached, all of it.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Makes a processor what it is after power-on, with this CPUID.
pub(super) fn power_on(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), Error> {
    vcpu.set_cpuid2(cpuid).map_err(kvm("set a processor's CPUID"))?;
    let mut msrs = Vec::new();
    for (index, data) in
        [(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK)]
    {
        msrs.push(kvm_msr_entry { index, data, ..Default::default() });
    }
    set_msrs(vcpu, &msrs)
}

/// Has the first processor enter a kernel.
pub(super) fn enter(vcpu: &VcpuFd, instruction: u64) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(kvm("read a processor's registers"))?;
    enter_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(kvm("put a processor into 64-bit mode"))?;
    let regs = kvm_regs {
        rip: instruction,
        rsi: layout::BOOT_PARAMS,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("set a processor's registers"))?;
    // As `finit` leaves it, and with no exceptions of SSE.
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(kvm("set a processor's floating-point registers"))
}

/// A processor's registers.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct CpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    extended: Extended,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    run: kvm_mp_state,
    events: kvm_vcpu_events,
    tsc_khz: Option<u32>,
    msrs: Vec<(u32, u64)>,
    /// What it is as a host of guests of its own, where it is one.
    nested: Option<KvmNestedStateBuffer>,
}

/// The MSRs that this KVM can save.
pub(super) fn msrs(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let list = kvm.get_msr_index_list().map_err(self::kvm("tell which MSRs it can save"))?;
    Ok(list.as_slice().to_vec())
}

/// How many words of extended registers the processors of a VM have beyond those that all have; `None` where KVM knows
/// of no others (before Linux 5.17).
pub(super) fn more_registers(vm: &VmFd) -> Option<usize> {
    let said = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    let more = |said: usize| said.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    (said > 0).then(|| more(said))
}

impl CpuState {
    /// Reads them. The processor must not run, and has finished what it had begun.
    pub(super) fn read(vcpu: &VcpuFd, msrs: &[u32], more: Option<usize>) -> Result<Self, Error> {
        Ok(Self {
            // First, since it settles what is pending for the others.
            run: vcpu.get_mp_state().map_err(kvm("read a processor's state"))?,
            regs: vcpu.get_regs().map_err(kvm("read a processor's registers"))?,
            sregs: vcpu.get_sregs().map_err(kvm("read a processor's special registers"))?,
            extended: Extended::read(vcpu, more)?,
            xcrs: vcpu.get_xcrs().map_err(kvm("read a processor's control registers"))?,
            debug: vcpu.get_debug_regs().map_err(kvm("read a processor's debug registers"))?,
            lapic: vcpu.get_lapic().map_err(kvm("read a local APIC"))?,
            tsc_khz: vcpu.get_tsc_khz().ok(),
            msrs: get_msrs(vcpu, msrs)?,
            nested: nested(vcpu)?,
            events: vcpu.get_vcpu_events().map_err(kvm("read a processor's events"))?,
        })
    }

    /// Sets them. The processor has its CPUID already.
    pub(super) fn write(&self, vcpu: &VcpuFd, more: Option<usize>) -> Result<(), Error> {
        if let Some(khz) = self.tsc_khz.filter(|khz| vcpu.get_tsc_khz().ok() != Some(*khz)) {
            // On hardware that cannot scale it, the guest would lose its time.
            vcpu.set_tsc_khz(khz).map_err(kvm("set the frequency of a processor's counter"))?;
        }
        vcpu.set_mp_state(self.run).map_err(kvm("set a processor's state"))?;
        vcpu.set_sregs(&self.sregs).map_err(kvm("set a processor's special registers"))?;
        vcpu.set_regs(&self.regs).map_err(kvm("set a processor's registers"))?;
        // What of them there is depends on the control registers.
        vcpu.set_xcrs(&self.xcrs).map_err(kvm("set a processor's control registers"))?;
        self.extended.write(vcpu, more)?;
        vcpu.set_debug_regs(&self.debug).map_err(kvm("set a processor's debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(kvm("set a local APIC"))?;
        let entry =
            |(index, data): &(u32, u64)| kvm_msr_entry { index: *index, data: *data, reserved: 0 };
        // The counter comes first: when the local APIC's timer is due is told in its terms.
        let first = |(index, _): &&(u32, u64)| *index == MSR_IA32_TSC;
        let last = |(index, _): &&(u32, u64)| *index == MSR_IA32_TSC_DEADLINE;
        let between = |msr: &&(u32, u64)| !first(msr) && !last(msr);
        let all = self.msrs.iter();
        let ordered = all.clone().filter(first).chain(all.clone().filter(between));
        let ordered: Vec<_> = ordered.chain(all.filter(last)).map(entry).collect();
        set_msrs(vcpu, &ordered)?;
        if let Some(nested) = &self.nested {
            vcpu.set_nested_state(nested).map_err(kvm("set what a processor is as a host"))?;
        }
        vcpu.set_vcpu_events(&self.events).map_err(kvm("set a processor's events"))
    }
}

/// What a processor is as a host; `None` where it is none, as after power-on.
fn nested(vcpu: &VcpuFd) -> Result<Option<KvmNestedStateBuffer>, Error> {
    let mut state = KvmNestedStateBuffer::empty();
    match vcpu.nested_state(&mut state) {
        Ok(_) => {}
        // A KVM that lets no guest be a host.
        Err(error) if matches!(error.errno(), libc::EINVAL | libc::ENOTTY) => return Ok(None),
        Err(error) => return Err(kvm("read what a processor is as a host")(error)),
    }
    let has = |flag: u32| u32::from(state.flags) & flag != 0;
    let hosts = match u32::from(state.format) {
        KVM_STATE_NESTED_FORMAT_VMX => {
            // SAFETY: KVM has filled in the member of this format, which is made of integers.
            unsafe { state.hdr.vmx.vmxon_pa != u64::MAX }
        }
        KVM_STATE_NESTED_FORMAT_SVM => !has(KVM_STATE_NESTED_GIF_SET),
        _ => true,
    };
    Ok((hosts || has(KVM_STATE_NESTED_GUEST_MODE)).then_some(state))
}

fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Error> {
    for part in entries.chunks(KVM_MAX_MSR_ENTRIES) {
        let msrs = Msrs::from_entries(part);
        let msrs = msrs.map_err(|_| Error::State("it has too many MSRs".to_owned()))?;
        let done = vcpu.set_msrs(&msrs).map_err(kvm("set a processor's MSRs"))?;
        if let Some(refused) = part.get(done) {
            let (index, data) = (refused.index, refused.data);
            return Err(Error::State(format!("KVM refuses {data:#x} for the MSR {index:#x}")));
        }
    }
    Ok(())
}

fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
    let mut found = Vec::new();
    let mut left = indices;
    while !left.is_empty() {
        let part = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
        let entry = |index: &u32| kvm_msr_entry { index: *index, ..Default::default() };
        let entries: Vec<_> = part.iter().map(entry).collect();
        let msrs = Msrs::from_entries(&entries);
        let mut msrs = msrs.map_err(|_| Error::State("it has too many MSRs".to_owned()))?;
        let done = vcpu.get_msrs(&mut msrs).map_err(kvm("read a processor's MSRs"))?;
        let read = &msrs.as_slice()[..done.min(part.len())];
        found.extend(read.iter().map(|entry| (entry.index, entry.data)));
        // KVM lists some that this processor does not have, and stops at the first.
        left = &left[(done + usize::from(done < part.len())).min(left.len())..];
    }
    Ok(found)
}

/// The extended registers: what all processors have, and what some have besides.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Extended {
    region: kvm_xsave,
    more: Vec<u32>,
}

impl Extended {
    /// Reads them, of which there are so many words behind the region.
    fn read(vcpu: &VcpuFd, more: Option<usize>) -> Result<Self, Error> {
        const READ: &str = "read a processor's extended registers";
        let Some(more) = more else {
            let region = vcpu.get_xsave().map_err(kvm(READ))?;
            return Ok(Self { region, more: Vec::new() });
        };
        let mut xsave = empty(more)?;
        // SAFETY: there is room for as much as KVM has said that it writes, and no process of vmlab enables more
        // of the processor's registers after it was asked.
        unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(kvm(READ))?;
        let region = xsave.as_fam_struct_ref().xsave.region;
        let region = kvm_xsave { region, ..Default::default() };
        Ok(Self { region, more: xsave.as_slice().to_vec() })
    }

    fn write(&self, vcpu: &VcpuFd, more: Option<usize>) -> Result<(), Error> {
        let more = more.unwrap_or(0);
        if self.more.len() != more {
            return Err(Error::State("its processors have other registers".to_owned()));
        }
        let mut xsave = empty(more)?;
        // SAFETY: the length is not changed.
        unsafe { xsave.as_mut_fam_struct() }.xsave.region = self.region.region;
        xsave.as_mut_slice().copy_from_slice(&self.more);
        // SAFETY: there is as much as KVM has said that it reads.
        unsafe { vcpu.set_xsave2(&xsave) }.map_err(kvm("set a processor's extended registers"))
    }
}

fn empty(more: usize) -> Result<Xsave, Error> {
    Xsave::new(more).map_err(|_| Error::State("it has too many extended registers".to_owned()))
}

impl std::fmt::Debug for CpuState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CpuState").field("regs", &self.regs).finish_non_exhaustive()
    }
}
