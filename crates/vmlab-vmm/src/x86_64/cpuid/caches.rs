//! The leaves that describe caches, entry by entry: leaf 4 of Intel and 0x8000_001D of AMD, which are alike.

use super::leaves::Leaves;
use crate::topology::Topology;

/// Caches, Intel's way.
const INTEL: u32 = 4;
/// Caches, AMD's way.
const AMD: u32 = 0x8000_001d;
/// The second and third level of caches, AMD's older way. Linux looks there whether there is a third.
const AMD_LARGE: u32 = 0x8000_0006;

/// The level of caches that a group of cores shares, and those beyond it.
const SHARED_LEVEL: u32 = 3;

/// Bytes of a line of the caches that are made up.
const LINE: u32 = 64;

/// A cache that is made up.
struct Cache {
    /// 1 is for data, 2 for instructions and 3 for both.
    kind: u32,
    level: u32,
    ways: u32,
    sets: u32,
}

/// What a processor has of which KVM tells no caches: 32 KiB for data and as much for code, and 512 KiB behind them.
const OF_CORE: [Cache; 3] = [
    Cache { kind: 1, level: 1, ways: 8, sets: 64 },
    Cache { kind: 2, level: 1, ways: 8, sets: 64 },
    Cache { kind: 3, level: 2, ways: 8, sets: 1024 },
];

/// What cores share where KVM tells of no such cache: 16 MiB.
const SHARED: Cache = Cache { kind: 3, level: SHARED_LEVEL, ways: 16, sets: 16384 };

impl Cache {
    /// The registers, but for those who share it (Intel SDM, volume 2A, CPUID leaf 4).
    fn registers(&self) -> [u32; 4] {
        const SELF_INITIALIZING: u32 = 1 << 8;
        let eax = self.kind | self.level << 5 | SELF_INITIALIZING;
        [eax, (LINE - 1) | (self.ways - 1) << 22, self.sets - 1, 0]
    }

    /// The register that describes it in [`AMD_LARGE`] (AMD64 APM, volume 3, CPUID Fn8000_0006): its size in units
    /// of 512 KiB, 8 for 16 ways, and one line per tag.
    fn large(&self) -> u32 {
        const SIXTEEN_WAYS: u32 = 8;
        let size = LINE * self.ways * self.sets;
        (size / (512 << 10)) << 18 | SIXTEEN_WAYS << 12 | 1 << 8 | LINE
    }
}

/// Says who shares caches, and how many cores a package has room for.
pub(super) fn intel(leaves: &mut Leaves, topology: Topology) {
    make_up(leaves, INTEL, topology);
    let shifts = topology.shifts();
    let cores = ((1 << (shifts.node - shifts.core)) - 1).min(0x3f);
    for entry in leaves.all(INTEL).filter(|entry| entry.eax & 0x1f != 0) {
        entry.eax = entry.eax & !(0xfff << 14) & !(0x3f << 26)
            | sharing(topology, entry.eax) << 14
            | cores << 26;
    }
}

/// Says who shares caches.
pub(super) fn amd(leaves: &mut Leaves, topology: Topology) {
    make_up(leaves, AMD, topology);
    for entry in leaves.all(AMD).filter(|entry| entry.eax & 0x1f != 0) {
        entry.eax = entry.eax & !(0xfff << 14) | sharing(topology, entry.eax) << 14;
    }
    let [.., large] = leaves.get(AMD_LARGE, 0);
    if large == 0 && topology.cpus() > 1 {
        leaves.entry(AMD_LARGE, 0).edx = SHARED.large();
    }
}

/// How many APIC ids those who share a cache have room for, less one.
fn sharing(topology: Topology, eax: u32) -> u32 {
    let shifts = topology.shifts();
    let shift = if eax >> 5 & 7 < SHARED_LEVEL { shifts.core } else { shifts.llc };
    ((1 << shift) - 1).min(0xfff)
}

/// Describes caches where a leaf does not, so that CPUs can be seen to share one. A CPU alone has nobody to share
/// with.
fn make_up(leaves: &mut Leaves, leaf: u32, topology: Topology) {
    let described = |leaves: &Leaves, index: &u32| leaves.get(leaf, *index)[0] & 0x1f != 0;
    let count = (0..).take_while(|index| described(leaves, index)).count() as u32;
    let shared = (0..count).any(|index| leaves.get(leaf, index)[0] >> 5 & 7 >= SHARED_LEVEL);
    if shared || topology.cpus() == 1 {
        return;
    }
    let own = if count == 0 { &OF_CORE[..] } else { &[] };
    let made_up: Vec<_> = own.iter().chain([&SHARED]).map(Cache::registers).collect();
    for (index, registers) in (count..).zip(made_up) {
        leaves.put(leaf, index, registers);
    }
    leaves.reach(leaf & 0x8000_0000, leaf);
}
