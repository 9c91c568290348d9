//! What the CPUID instruction tells the guest, CPU by CPU: what KVM supports, and where the CPU is in the
//! [`Topology`] of the guest.
//!
//! KVM leaves topology to its user (Linux 6.2 on gives zeros, those before give the host's). The readers in mind are
//! `arch/x86/kernel/cpu/{topology*,cacheinfo,amd,intel}.c` of Linux 6.1 and 6.12, which differ: what both need is told.
//!
//! Untouched are the features, but for those of [`Options`] and five-level paging, the performance counters (leaf
//! 0xA and AMD's), which tests of perf want, and KVM's own leaves from 0x4000_0000 on. The frequency of the TSC need
//! not be told in leaf 0x15: kvmclock tells it, and a timer that goes by TSC deadlines needs no other frequency.

mod caches;
mod leaves;
#[cfg(test)]
mod tests;

use kvm_bindings::CpuId;

use leaves::Leaves;

use crate::topology::Topology;

/// Vendor, and the highest basic leaf.
const BASIC: u32 = 0;
/// Family, model, APIC id and the first features.
const FEATURES: u32 = 1;
/// More features.
const MORE_FEATURES: u32 = 7;
/// Topology by levels: thread and core.
const LEVELS: u32 = 0xb;
/// The same with more kinds of levels, which only Intel has.
const MORE_LEVELS: u32 = 0x1f;
/// The highest extended leaf.
const EXTENDED: u32 = 0x8000_0000;
/// Features of AMD.
const AMD_FEATURES: u32 = 0x8000_0001;
/// How many threads a package of AMD has.
const AMD_SIZES: u32 = 0x8000_0008;
/// Where a CPU of AMD is.
const AMD_TOPOLOGY: u32 = 0x8000_001e;
/// [`LEVELS`] as AMD's newest processors have it. It is taken away, so that there is one description.
const AMD_LEVELS: u32 = 0x8000_0026;

/// [`FEATURES`], ECX: the timer of the local APIC can be given a deadline.
const TSC_DEADLINE: u32 = 1 << 24;
/// [`FEATURES`], ECX: this is a virtual machine.
const HYPERVISOR: u32 = 1 << 31;
/// [`FEATURES`], EDX: there are several logical processors in a package.
const HTT: u32 = 1 << 28;
/// [`MORE_FEATURES`], ECX: page tables may have five levels.
const LA57: u32 = 1 << 16;
/// [`MORE_FEATURES`], ECX and EDX: shadow stacks and branch tracking. Where a shadow stack is, a snapshot would have
/// to save beside the processor's registers.
const SHSTK: u32 = 1 << 7;
const IBT: u32 = 1 << 20;
/// [`AMD_FEATURES`], ECX: if [`HTT`] is set, it is about cores.
const CMP_LEGACY: u32 = 1 << 1;
/// [`AMD_FEATURES`], ECX: the leaves of AMD for caches and topology are there.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// Of what kind a level is (Intel SDM, volume 2A, CPUID leaf 0x1F).
mod level {
    pub(super) const THREAD: u32 = 1;
    pub(super) const CORE: u32 = 2;
    pub(super) const DIE: u32 = 5;
}

/// From this family on, Linux knows CPUs of AMD that share a last-level cache by that cache's leaf. Before, it
/// takes a node of the processor for it (`cacheinfo_amd_init_llc_id`).
const FIRST_ZEN_FAMILY: u32 = 0x17;

/// What is not KVM's to say in the set that it supports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// KVM's local APIC takes TSC deadlines: `KVM_CAP_TSC_DEADLINE_TIMER` says so, where `KVM_GET_SUPPORTED_CPUID`
    /// of many kernels does not.
    pub tsc_deadline: bool,
}

/// Why there is no set.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// KVM would not take it.
    #[error("a CPU would have {0} CPUID entries, but KVM takes {max}", max = kvm_bindings::KVM_MAX_CPUID_ENTRIES)]
    TooMany(usize),
}

/// How the processor's maker describes topology.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Maker {
    /// AMD, and Hygon after it. On processors of Hygon, and of AMD's family 0x17 up to model 0x1F, Linux takes 8
    /// APIC ids each for those that share a last-level cache, whatever the leaves say.
    Amd {
        /// The family, to which the extended one is added.
        family: u32,
    },
    /// Intel, and others after it.
    Intel,
}

impl Maker {
    fn of(leaves: &Leaves) -> Self {
        let [_, ebx, ecx, edx] = leaves.get(BASIC, 0);
        let name = [ebx, edx, ecx].map(u32::to_le_bytes).concat();
        let [signature, ..] = leaves.get(FEATURES, 0);
        match name.as_slice() {
            b"AuthenticAMD" | b"HygonGenuine" => Self::Amd { family: family(signature) },
            _ => Self::Intel,
        }
    }
}

/// The family in a processor's signature (AMD64 APM, volume 3, section E.3.2).
const fn family(signature: u32) -> u32 {
    match signature >> 8 & 0xf {
        0xf => 0xf + (signature >> 20 & 0xff),
        base => base,
    }
}

/// The entries for one CPU, made of those that KVM supports. Made of what this gives they are the same again.
pub fn for_vcpu(
    supported: &CpuId,
    topology: Topology,
    cpu: u32,
    options: Options,
) -> Result<CpuId, Error> {
    let mut leaves = Leaves::new(supported);
    let maker = Maker::of(&leaves);
    features(&mut leaves, topology, cpu, maker, options);
    match maker {
        Maker::Amd { family } => {
            amd(&mut leaves, topology, cpu, family);
            levels(&mut leaves, LEVELS, topology, cpu, false);
            leaves.remove(MORE_LEVELS);
        }
        Maker::Intel => {
            caches::intel(&mut leaves, topology);
            levels(&mut leaves, LEVELS, topology, cpu, false);
            if topology.llcs > 1 || leaves.last(BASIC) >= MORE_LEVELS {
                levels(&mut leaves, MORE_LEVELS, topology, cpu, topology.llcs > 1);
            }
        }
    }
    leaves.finish()
}

fn features(leaves: &mut Leaves, topology: Topology, cpu: u32, maker: Maker, options: Options) {
    let together = topology.cpus_of_node();
    let count = match maker {
        Maker::Amd { .. } => together,
        Maker::Intel => 1 << topology.shifts().node,
    };
    let entry = leaves.entry(FEATURES, 0);
    entry.ebx = entry.ebx & 0xffff | count.min(0xff) << 16 | (topology.apic_id(cpu) & 0xff) << 24;
    entry.ecx |= HYPERVISOR;
    if options.tsc_deadline {
        entry.ecx |= TSC_DEADLINE;
    }
    set(&mut entry.edx, HTT, together > 1);
    for entry in leaves.all(MORE_FEATURES).filter(|entry| entry.index == 0) {
        entry.ecx &= !(LA57 | SHSTK);
        entry.edx &= !IBT;
    }
}

/// Where a CPU is, level by level. Each says how many CPUs are in one of its kind, and how many bits of an APIC id
/// are below the number of the next.
fn levels(leaves: &mut Leaves, leaf: u32, topology: Topology, cpu: u32, dies: bool) {
    let shifts = topology.shifts();
    let of_core = topology.threads;
    let of_die = of_core * topology.cores;
    let of_node = topology.cpus_of_node();
    let found = if dies {
        vec![
            (level::THREAD, shifts.core, of_core),
            (level::CORE, shifts.llc, of_die),
            (level::DIE, shifts.node, of_node),
        ]
    } else {
        vec![(level::THREAD, shifts.core, of_core), (level::CORE, shifts.node, of_node)]
    };
    let id = topology.apic_id(cpu);
    let registers =
        (0..).zip(found).map(|(at, (kind, shift, count))| [shift, count, at | kind << 8, id]);
    leaves.replace(leaf, registers);
    leaves.reach(BASIC, leaf);
}

/// What AMD tells in leaves of its own.
fn amd(leaves: &mut Leaves, topology: Topology, cpu: u32, family: u32) {
    let (id, shifts) = (topology.apic_id(cpu), topology.shifts());
    let together = topology.cpus_of_node();
    if leaves.last(EXTENDED) >= AMD_FEATURES {
        set(&mut leaves.entry(AMD_FEATURES, 0).ecx, CMP_LEGACY, together > 1);
    }
    if leaves.last(EXTENDED) >= AMD_SIZES {
        // What else there is tells how wide a counter is.
        let entry = leaves.entry(AMD_SIZES, 0);
        entry.ecx = entry.ecx & !0xf0ff | (together - 1).min(0xff) | (shifts.node & 0xf) << 12;
    }
    leaves.remove(AMD_LEVELS);

    let [_, _, features, _] = leaves.get(AMD_FEATURES, 0);
    if features & TOPOLOGY_EXTENSIONS == 0 && topology.cpus() == 1 {
        return;
    }
    leaves.entry(AMD_FEATURES, 0).ecx |= TOPOLOGY_EXTENSIONS;
    leaves.reach(EXTENDED, AMD_TOPOLOGY);
    caches::amd(leaves, topology);
    let (node, nodes) = if family < FIRST_ZEN_FAMILY {
        (id_of_llc(topology, cpu), topology.llcs)
    } else {
        (topology.node_of(cpu), 1)
    };
    let core = (id & ((1 << shifts.node) - 1)) >> shifts.core;
    let ebx = core & 0xff | (topology.threads - 1).min(0xff) << 8;
    let ecx = node & 0xff | (nodes - 1).min(7) << 8;
    leaves.replace(AMD_TOPOLOGY, [[id, ebx, ecx, 0]]);
}

/// The number of a CPU's last-level cache among those of the machine.
fn id_of_llc(topology: Topology, cpu: u32) -> u32 {
    cpu / (topology.cores * topology.threads)
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}
