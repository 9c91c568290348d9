//! The proof on x86_64: one vCPU in long mode.

mod guest;
mod memory;

use super::verdict::{GuestStop, KvmProof, KvmUnusable};
use crate::kick::Kick;
use crate::long_mode::{self, RFLAGS_RESERVED, Tables};
use guest::{Feature, ROUTINES, Routine};
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use memory::Memory;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

/// How often the loop is timed. The shortest time counts, since a busy host can only lengthen one.
const LOOP_ATTEMPTS: u32 = 5;

/// The longest time for [`guest::LOOP_ITERATIONS`], with one entry and one exit.
///
/// It is 5 million instructions a second. A processor needs some microseconds; a KVM that is
/// itself nested in an emulated machine, below 0.2 ms; the emulations that this guards against, 6 ms
/// and more.
const LOOP_LIMIT: Duration = Duration::from_millis(2);

/// Capabilities without which no guest can be run, under their names in linux/kvm.h.
const CAPABILITIES: [(Cap, &str); 5] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Where KVM may put three pages of its own, which Intel processors need: below the BIOS, where
/// no memory is.
const TSS_ADDRESS: usize = 0xfffb_d000;

// Control register bits: Intel SDM volume 3, 2.5. Those of 64-bit mode are set by it.
const CR0_MP: u64 = 1 << 1;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;

/// Sets the guest up, runs it and judges it, naming each step as it begins.
pub(super) fn prove(kick: &Kick, step: &dyn Fn(&'static str)) -> Result<KvmProof, KvmUnusable> {
    let started = Instant::now();
    let (took, instructions, xsetbv_lost) = {
        step("set up a guest");
        let mut guest = Guest::new(kick)?;
        // First what ends at once where it fails; it also warms the guest up for the timed loop.
        let instructions = guest.check_instructions(step)?;
        step("run a timed loop");
        let took = guest.time_loop().and_then(judge_speed)?;
        (took, instructions, guest.xsetbv_lost)
    };
    // The guest is gone, and what taking it down cost is counted.
    Ok(KvmProof {
        iterations: guest::LOOP_ITERATIONS,
        took,
        instructions,
        xsetbv_lost,
        total: started.elapsed(),
    })
}

pub(super) fn open() -> Result<Kvm, KvmUnusable> {
    let kvm = Kvm::new().map_err(|error| KvmUnusable::from_open(error.into()))?;
    let version = kvm.get_api_version();
    match u32::try_from(version) {
        Ok(KVM_API_VERSION) => Ok(kvm),
        _ => Err(KvmUnusable::WrongApiVersion(version)),
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmUnusable> {
    kvm.create_vm().map_err(|error| KvmUnusable::from_create_vm(error.into()))
}

/// A VM without anything in it.
pub(super) fn make_vm() -> Result<VmFd, KvmUnusable> {
    create_vm(&open()?)
}

/// A VM with one vCPU and the code of the proof.
struct Guest<'a> {
    kick: &'a Kick,
    cpuid: CpuId,
    /// As [`KvmProof::xsetbv_lost`].
    xsetbv_lost: bool,
    // Dropped in this order: the memory outlives those that use it.
    vcpu: VcpuFd,
    _vm: VmFd,
    memory: Memory,
}

/// Puts the step into an error of `kvm-ioctls`.
fn failed(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmUnusable {
    move |error| KvmUnusable::CannotRun { step, source: error.into() }
}

impl<'a> Guest<'a> {
    fn new(kick: &'a Kick) -> Result<Self, KvmUnusable> {
        let kvm = open()?;
        for (capability, name) in CAPABILITIES {
            if !kvm.check_extension(capability) {
                return Err(KvmUnusable::MissingCapability(name));
            }
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("tell which processor features it supports"))?;
        let vm = create_vm(&kvm)?;
        vm.set_tss_address(TSS_ADDRESS).map_err(failed("place the task state segment"))?;

        let no_memory = |source| KvmUnusable::CannotRun { step: "get guest memory", source };
        let mut memory = Memory::new(guest::MEMORY_SIZE).map_err(no_memory)?;
        guest::load(memory.bytes());
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: guest::MEMORY_SIZE as u64,
            userspace_addr: memory.host_address(),
        };
        // SAFETY: the region is exactly the mapping of `memory`, which the struct drops after the
        // VM and the vCPU, and which the host touches only while the vCPU does not run.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("take guest memory"))?;

        let vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("set the vCPU's CPUID"))?;
        let mut sregs = vcpu.get_sregs().map_err(failed("read the vCPU's registers"))?;
        enter_long_mode(&mut sregs, has(&cpuid, guest::XSAVE));
        vcpu.set_sregs(&sregs).map_err(failed("put the vCPU into long mode"))?;
        // SAFETY: the descriptor belongs to `vcpu`, which is open during the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        kick.unblock_while_running(fd)
            .map_err(|source| KvmUnusable::CannotRun { step: "set a signal mask", source })?;
        Ok(Self { kick, cpuid, xsetbv_lost: false, vcpu, _vm: vm, memory })
    }

    /// The shortest time that the loop took.
    fn time_loop(&mut self) -> Result<Duration, KvmUnusable> {
        let mut best = Duration::MAX;
        for _ in 0..LOOP_ATTEMPTS {
            best = best.min(self.run(guest::LOOP)?);
        }
        Ok(best)
    }

    /// Runs every other routine that this processor has, and says which these were.
    fn check_instructions(
        &mut self,
        step: &dyn Fn(&'static str),
    ) -> Result<Vec<&'static str>, KvmUnusable> {
        let mut checked = Vec::new();
        for (index, Routine { instruction, feature, .. }) in ROUTINES.iter().enumerate() {
            if index != guest::LOOP && feature.is_none_or(|feature| has(&self.cpuid, feature)) {
                step(instruction);
                self.run(index)?;
                if index == guest::XSETBV {
                    self.xsetbv_lost = self.restore_xcr0()?;
                }
                if !(index == guest::XSETBV && self.xsetbv_lost) {
                    checked.push(*instruction);
                }
            }
        }
        Ok(checked)
    }

    /// Gives the guest the XCR0 that it has set itself, if KVM does not know it, and says so.
    fn restore_xcr0(&mut self) -> Result<bool, KvmUnusable> {
        let mut xcrs = self.vcpu.get_xcrs().map_err(failed("read the vCPU's XCR0"))?;
        let lost = xcrs.xcrs[0].value != guest::XCR0;
        if lost {
            xcrs.nr_xcrs = 1;
            // The first extended control register is XCR0.
            xcrs.xcrs[0].xcr = 0;
            xcrs.xcrs[0].value = guest::XCR0;
            self.vcpu.set_xcrs(&xcrs).map_err(failed("set the vCPU's XCR0"))?;
        }
        Ok(lost)
    }

    /// Runs one routine to its end, compares its results, and returns the time in `KVM_RUN`.
    fn run(&mut self, index: usize) -> Result<Duration, KvmUnusable> {
        let routine = &ROUTINES[index];
        guest::clear_results(self.memory.bytes());
        let regs = kvm_regs {
            rip: guest::address_of(index),
            rsp: guest::STACK_TOP,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).map_err(failed("set the vCPU's registers"))?;
        let started = Instant::now();
        let stop = self.enter(routine.instruction)?;
        let took = started.elapsed();
        let stop = match stop {
            Some(stop) => Some(stop),
            None => self.judge_halt(index)?,
        };
        match stop {
            None => Ok(took),
            Some(stop) => {
                Err(KvmUnusable::CannotEmulate { instruction: routine.instruction, stop })
            }
        }
    }

    /// Runs the vCPU until it halts (`None`) or stops for a reason that it should not have.
    fn enter(&mut self, step: &'static str) -> Result<Option<GuestStop>, KvmUnusable> {
        let stop = loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(None),
                Ok(VcpuExit::Shutdown) => break GuestStop::TripleFault,
                Ok(VcpuExit::FailEntry(reason, _)) => break GuestStop::FailEntry { reason },
                Ok(VcpuExit::InternalError) => {
                    let exit = &self.vcpu.get_kvm_run().__bindgen_anon_1;
                    // SAFETY: with this exit reason KVM has filled in this member of the union,
                    // which is made of integers.
                    let suberror = unsafe { exit.internal.suberror };
                    break GuestStop::InternalError { suberror };
                }
                // A signal: the kick, or one that is not for us.
                Ok(VcpuExit::Intr) if !self.kick.is_sent() => {}
                Err(error) if error.errno() == libc::EINTR && !self.kick.is_sent() => {}
                Ok(VcpuExit::Intr) => return Err(cut_off(step)),
                Err(error) if error.errno() == libc::EINTR => return Err(cut_off(step)),
                Ok(other) => break GuestStop::OtherExit { exit: format!("{other:?}") },
                Err(error) => return Err(failed("run guest code")(error)),
            }
        };
        Ok(Some(stop))
    }

    /// Whether the halted guest did so at its end and with the right values (`None`), or how not.
    fn judge_halt(&mut self, index: usize) -> Result<Option<GuestStop>, KvmUnusable> {
        let rip = self.vcpu.get_regs().map_err(failed("read the vCPU's registers"))?.rip;
        Ok(judge(index, rip, guest::results(self.memory.bytes())))
    }
}

/// The verdict on a loop that took so long.
fn judge_speed(took: Duration) -> Result<Duration, KvmUnusable> {
    if took <= LOOP_LIMIT {
        return Ok(took);
    }
    Err(KvmUnusable::TooSlow { iterations: guest::LOOP_ITERATIONS, took, limit: LOOP_LIMIT })
}

/// The verdict on a guest that halted before `rip` with these values; `None` is a good one.
fn judge(index: usize, rip: u64, found: [u64; 3]) -> Option<GuestStop> {
    let expected = ROUTINES[index].expected;
    if let Some(vector) = guest::exception_at(rip) {
        Some(GuestStop::Exception { vector })
    } else if rip != guest::end_of(index) {
        Some(GuestStop::StrayHalt { rip })
    } else if found != expected {
        Some(GuestStop::WrongResult { expected: expected.to_vec(), found: found.to_vec() })
    } else {
        None
    }
}

/// The verdict on a guest that the kick has stopped; the waiting thread knows the time.
fn cut_off(step: &'static str) -> KvmUnusable {
    KvmUnusable::Hung { step, after: Duration::ZERO, left_behind: false }
}

/// Whether KVM says that guests have this feature.
fn has(cpuid: &CpuId, feature: Feature) -> bool {
    cpuid.as_slice().iter().any(|entry| match feature {
        Feature::Leaf1Ecx(bit) => entry.function == 1 && entry.ecx & 1 << bit != 0,
        Feature::Leaf7Ebx(bit) => {
            entry.function == 7 && entry.index == 0 && entry.ebx & 1 << bit != 0
        }
    })
}

/// Puts 64-bit mode with the guest's own tables into the special registers.
fn enter_long_mode(sregs: &mut kvm_sregs, xsave: bool) {
    let tables = Tables {
        selectors: [guest::CODE_SELECTOR, guest::DATA_SELECTOR, guest::TSS_SELECTOR],
        task: (guest::TSS, guest::TSS_LIMIT),
        gdt: (guest::GDT, guest::GDT_LIMIT),
        idt: (guest::IDT, guest::IDT_LIMIT),
        pages: guest::PML4,
    };
    long_mode::enter(sregs, &tables);
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
    sregs.cr0 |= CR0_MP | CR0_NE | CR0_WP;
    sregs.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT | if xsave { CR4_OSXSAVE } else { 0 };
}

#[cfg(test)]
mod tests;
