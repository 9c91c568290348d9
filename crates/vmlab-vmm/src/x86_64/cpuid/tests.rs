use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::*;

const OPTIONS: Options = Options { tsc_deadline: true };
const ONE: Topology = Topology { nodes: 1, llcs: 1, cores: 1, threads: 1 };
const EVERY_LEVEL: Topology = Topology { nodes: 2, llcs: 2, cores: 2, threads: 2 };

/// Leaves that are about topology, and so differ for one CPU as well.
const ABOUT_TOPOLOGY: [u32; 6] = [1, 4, 0xb, 0x8000_0008, 0x8000_001d, 0x8000_001e];

/// A set of entries: leaf, index, and the four registers. Leaves that occur twice are told apart by their index.
fn set_of(rows: &[(u32, u32, [u32; 4])]) -> CpuId {
    let indexed = |leaf| rows.iter().filter(|row| row.0 == leaf).count() > 1;
    let entry = |&(function, index, [eax, ebx, ecx, edx]): &(u32, u32, [u32; 4])| {
        let flags = if indexed(function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
    };
    CpuId::from_entries(&rows.iter().map(entry).collect::<Vec<_>>()).unwrap()
}

/// A server of Intel (family 6, model 0x55), of which KVM gives the caches as the host shares them.
fn intel() -> CpuId {
    set_of(&[
        (0, 0, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        (1, 0, [0x0005_0657, 0x1240_0800, 0xfffa_3203, 0x0f8b_fbff]),
        (2, 0, [0x7603_6301, 0x00f0_b5ff, 0, 0x00c3_0000]),
        (4, 0, [0x7c00_4121, 0x01c0_003f, 0x3f, 0]),
        (4, 1, [0x7c00_4122, 0x01c0_003f, 0x3f, 0]),
        (4, 2, [0x7c00_4143, 0x03c0_003f, 0x3ff, 0]),
        (4, 3, [0x7c0f_c163, 0x0280_003f, 0xdfff, 4]),
        (4, 4, [0, 0, 0, 0]),
        (6, 0, [4, 0, 0, 0]),
        (7, 0, [0, 0xd19f_47ab, 0x0001_0808, 0xac00_0400]),
        (0xa, 0, [0x0730_0404, 0, 0, 0x603]),
        (0xb, 0, [0, 0, 0, 0]),
        (0xd, 0, [0x2ff, 0x240, 0xa80, 0]),
        (0xd, 1, [0xf, 0x240, 0, 0]),
        (0x15, 0, [2, 0xd8, 0, 0]),
        (0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        (0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        (0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        (0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        (0x8000_0006, 0, [0, 0, 0x0100_6040, 0]),
        (0x8000_0008, 0, [0x302e, 0x0111_d000, 0, 0]),
    ])
}

/// A server of AMD (family 0x19, model 1). KVM gives how many threads the host's package has.
fn amd() -> CpuId {
    set_of(&[
        (0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        (1, 0, [0x00a0_0f11, 0x0a80_0800, 0xfef8_3203, 0x078b_fbff]),
        (6, 0, [4, 0, 0, 0]),
        (7, 0, [0, 0x219c_95a9, 0x0040_069c, 0x10]),
        (0xb, 0, [0, 0, 0, 0]),
        (0xd, 0, [0x207, 0x240, 0x988, 0]),
        (0xd, 1, [0xf, 0x240, 0x1800, 0]),
        (0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        (0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        (0x8000_0000, 0, [0x8000_0021, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        (0x8000_0001, 0, [0x00a0_0f11, 0x4000_0000, 0x0440_03f1, 0x2fd3_fbff]),
        (0x8000_0006, 0, [0x4800_6400, 0x6800_4200, 0x0200_6140, 0x0200_9140]),
        (0x8000_0008, 0, [0x3030, 0x191e_d205, 0x607f, 0]),
        (0x8000_001d, 0, [0x0000_4121, 0x01c0_003f, 0x3f, 0]),
        (0x8000_001d, 1, [0x0000_4122, 0x01c0_003f, 0x3f, 0]),
        (0x8000_001d, 2, [0x0000_4143, 0x01c0_003f, 0x3ff, 2]),
        (0x8000_001d, 3, [0x0003_c163, 0x03c0_003f, 0x7fff, 1]),
        (0x8000_001d, 4, [0, 0, 0, 0]),
        (0x8000_001e, 0, [0, 0, 0, 0]),
        (0x8000_0021, 0, [0x45, 0, 0, 0]),
    ])
}

/// What KVM gives in a guest of QEMU's TCG with `-cpu max` (QEMU 7.2): a processor of AMD that is older than AMD's
/// leaves for caches and topology, and has none.
fn emulated() -> CpuId {
    set_of(&[
        (0, 0, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        (1, 0, [0x0006_0fb1, 0x0204_0800, 0xfed8_320b, 0x0fcb_fbfd]),
        (4, 0, [0, 0, 0, 0]),
        (7, 0, [0, 0x01d8_43a9, 0x0001_021c, 0]),
        (0xb, 0, [0, 0, 0, 0]),
        (0x8000_0000, 0, [0x8000_000a, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        (0x8000_0001, 0, [0x0006_0fb1, 0, 0x77, 0xedd3_fbfd]),
        (0x8000_0006, 0, [0, 0x4200_4200, 0x0200_8140, 0x0080_8140]),
        (0x8000_0008, 0, [0x3028, 0, 0x2003, 0]),
        (0x8000_000a, 0, [1, 8, 0, 0]),
    ])
}

/// A processor of Intel of which a host in between tells no caches.
fn bare() -> CpuId {
    set_of(&[
        (0, 0, [4, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        (1, 0, [0x0002_06c1, 0x0002_0800, 0x8000_2201, 0x078b_fbfd]),
        (0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
    ])
}

fn hosts() -> [CpuId; 4] {
    [intel(), amd(), emulated(), bare()]
}

/// A few of each level, also such as do not fill their bits.
fn topologies() -> Vec<Topology> {
    let mut found = Vec::new();
    for (nodes, llcs) in [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 3), (1, 8)] {
        for (cores, threads) in [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (5, 1), (4, 3)] {
            found.push(Topology { nodes, llcs, cores, threads });
        }
    }
    found.push(Topology { nodes: 5, llcs: 3, cores: 5, threads: 4 });
    found
}

/// A CPU that has a set of entries.
struct Cpu(CpuId);

impl Cpu {
    fn new(host: &CpuId, topology: Topology, cpu: u32) -> Self {
        Self(for_vcpu(host, topology, cpu, OPTIONS).unwrap())
    }

    fn find(&self, leaf: u32, index: u32) -> Option<[u32; 4]> {
        let mut entries = self.0.as_slice().iter();
        let entry = entries.find(|entry| {
            let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            entry.function == leaf && (!indexed || entry.index == index)
        })?;
        Some([entry.eax, entry.ebx, entry.ecx, entry.edx])
    }

    /// The instruction, as KVM does it for guests (`kvm_cpuid`).
    fn id(&self, leaf: u32, index: u32) -> [u32; 4] {
        if let Some(found) = self.find(leaf, index) {
            return found;
        }
        let [last, ..] = self.find(leaf & 0x8000_0000, 0).unwrap();
        if leaf > last && !self.is_amd() {
            // Beyond its range Intel answers as for the last basic leaf.
            let [last, ..] = self.find(0, 0).unwrap();
            return self.find(last, index).unwrap_or_default();
        }
        match (leaf, self.find(leaf, 1)) {
            (0xb | 0x1f, Some([.., id])) => [0, 0, index & 0xff, id],
            _ => [0; 4],
        }
    }

    fn is_amd(&self) -> bool {
        self.find(0, 0).unwrap()[2] == u32::from_le_bytes(*b"cAMD")
    }

    fn has_topology_extensions(&self) -> bool {
        self.id(0x8000_0001, 0)[2] & 1 << 22 != 0
    }

    /// The shifts of levels by their kind, and the CPU's APIC id, as `topology_ext.c` of Linux 6.12 reads them.
    fn levels(&self) -> ([Option<u32>; 7], u32) {
        let [last, ..] = self.id(0, 0);
        let is_there = |leaf: &u32| last >= *leaf && self.id(*leaf, 0)[1] != 0;
        let leaf = [0x1f, 0xb].into_iter().find(is_there).unwrap();
        let mut shifts = [None; 7];
        let mut id = None;
        for index in 0.. {
            let [shift, count, kind, own] = self.id(leaf, index);
            assert_eq!(kind & 0xff, index);
            let kind = kind >> 8 & 0xff;
            if kind == 0 || count & 0xffff == 0 {
                break;
            }
            assert_eq!(*id.get_or_insert(own), own);
            assert!(count <= 1 << shift, "there are no more than have room");
            shifts[kind as usize] = Some(shift & 0x1f);
        }
        (shifts, id.unwrap())
    }

    /// Levels and kinds of caches with how many share them, as `cacheinfo.c` reads them.
    fn caches(&self) -> Vec<(u32, u32, u32)> {
        let leaf = if self.is_amd() { 0x8000_001d } else { 4 };
        let entries =
            (0..).map(|index| self.id(leaf, index)).take_while(|entry| entry[0] & 0x1f != 0);
        entries.map(|[eax, ..]| (eax >> 5 & 7, eax & 0x1f, (eax >> 14 & 0xfff) + 1)).collect()
    }

    /// Bits of APIC ids of those who share a cache.
    fn shared_bits(&self, level: u32) -> u32 {
        let caches = self.caches();
        let (.., sharing) = caches.iter().find(|cache| cache.0 == level).unwrap();
        sharing.next_power_of_two().trailing_zeros()
    }

    /// The number of the package, of the last-level cache and of the core, all of them in the whole machine.
    fn place(&self) -> (u32, u32, u32) {
        let (shifts, id) = self.levels();
        let top = shifts.iter().rev().find_map(|shift| *shift).unwrap();
        let core = id >> shifts[1].unwrap();
        let [signature, ..] = self.id(1, 0);
        let llc = if self.is_amd() && (signature >> 8 & 0xf) + (signature >> 20 & 0xff) < 0x17 {
            let [.., node, _] = self.id(0x8000_001e, 0);
            node & 0xff
        } else {
            id >> self.shared_bits(3)
        };
        (id >> top, llc, core)
    }
}

#[test]
fn the_topology_is_read_again() {
    for host in hosts() {
        for topology in topologies().into_iter().filter(|topology| topology.cpus() > 1) {
            let cpus = 0..topology.cpus();
            let places: Vec<_> =
                cpus.clone().map(|cpu| Cpu::new(&host, topology, cpu).place()).collect();
            let of = |cpu: u32| {
                let core = cpu / topology.threads;
                (topology.node_of(cpu), core / topology.cores, core)
            };
            // Numbers may be others, but who is together is the same.
            for (one, place) in cpus.clone().zip(&places) {
                for (other, other_place) in cpus.clone().zip(&places) {
                    let (one, other) = (of(one), of(other));
                    assert_eq!(place.0 == other_place.0, one.0 == other.0, "{topology:?}");
                    assert_eq!(place.1 == other_place.1, one.1 == other.1, "{topology:?}");
                    assert_eq!(place.2 == other_place.2, one.2 == other.2, "{topology:?}");
                }
            }
        }
    }
}

#[test]
fn caches_are_shared_by_threads_or_by_groups_of_cores() {
    for host in hosts() {
        for topology in topologies().into_iter().filter(|topology| topology.cpus() > 1) {
            let cpu = Cpu::new(&host, topology, topology.cpus() - 1);
            let shifts = topology.shifts();
            let caches = cpu.caches();
            let kinds: Vec<_> = caches.iter().map(|cache| (cache.0, cache.1)).collect();
            assert_eq!(kinds, [(1, 1), (1, 2), (2, 3), (3, 3)], "Linux wants the third to be last");
            for (level, _, sharing) in caches {
                let shift = if level == 3 { shifts.llc } else { shifts.core };
                assert_eq!(sharing, 1 << shift);
            }
        }
    }
}

#[test]
fn every_leaf_has_the_same_id() {
    for host in hosts() {
        for topology in topologies() {
            for number in 0..topology.cpus() {
                let cpu = Cpu::new(&host, topology, number);
                let id = topology.apic_id(number);
                assert_eq!(cpu.levels().1, id);
                assert_eq!(cpu.id(1, 0)[1] >> 24, id & 0xff);
                assert_eq!(cpu.id(1, 0)[1] & 0xffff, 0x800, "8 times 8 bytes are flushed");
                if cpu.is_amd() && cpu.has_topology_extensions() {
                    let [eax, ebx, ecx, edx] = cpu.id(0x8000_001e, 0);
                    assert_eq!((eax, edx), (id, 0));
                    assert_eq!(ebx >> 8 & 0xff, topology.threads - 1);
                    assert!(ecx >> 8 & 7 < topology.llcs);
                }
            }
        }
    }
}

#[test]
fn dies_are_told_where_groups_of_cores_are_several() {
    let several = Cpu::new(&intel(), EVERY_LEVEL, 13);
    assert_eq!(several.levels(), ([None, Some(1), Some(2), None, None, Some(3), None], 13));
    assert_eq!(several.id(0xb, 1), [3, 8, 0x201, 13], "those who know no dies find the package");
    let one = Topology { llcs: 1, ..EVERY_LEVEL };
    let one = Cpu::new(&intel(), one, 5);
    assert_eq!(one.levels(), ([None, Some(1), Some(2), None, None, None, None], 5));
    assert_eq!(one.id(0, 0)[0], 0x16);
}

#[test]
fn packages_are_counted() {
    let [.., edx] = Cpu::new(&intel(), EVERY_LEVEL, 0).id(1, 0);
    assert_ne!(edx & 1 << 28, 0);
    let uneven = Topology { nodes: 1, llcs: 1, cores: 3, threads: 2 };
    assert_eq!(Cpu::new(&intel(), uneven, 0).id(1, 0)[1] >> 16 & 0xff, 8);
    assert_eq!(Cpu::new(&intel(), uneven, 0).id(4, 0)[0] >> 26, 3, "four cores have room");
    let cpu = Cpu::new(&amd(), uneven, 0);
    assert_eq!(cpu.id(1, 0)[1] >> 16 & 0xff, 6);
    assert_eq!(cpu.id(0x8000_0008, 0), [0x3030, 0x191e_d205, 0x3005, 0]);
    assert_eq!(cpu.id(0x8000_0001, 0)[2] & 2, 2);
    let many = Topology { nodes: 1, llcs: 1, cores: 300, threads: 1 };
    assert_eq!(Cpu::new(&amd(), many, 0).id(1, 0)[1] >> 16 & 0xff, 0xff);
    assert_eq!(Cpu::new(&amd(), many, 0).id(0x8000_0008, 0)[2], 0x90ff);
}

#[test]
fn old_processors_of_amd_have_a_node_for_each_cache() {
    let cpu = Cpu::new(&emulated(), EVERY_LEVEL, 13);
    assert_eq!(cpu.id(0x8000_0000, 0)[0], 0x8000_001e);
    assert_eq!(cpu.id(0x8000_001e, 0), [13, 0x102, 0x103, 0]);
    assert_eq!(cpu.id(0x8000_0006, 0)[3], 0x0080_8140, "as it was");
    let cpu = Cpu::new(&amd(), EVERY_LEVEL, 13);
    assert_eq!(cpu.id(0x8000_001e, 0), [13, 0x102, 1, 0]);
}

#[test]
fn a_third_level_is_made_up_alike_in_both_leaves_of_amd() {
    let host = emulated();
    let rows: Vec<_> =
        host.as_slice().iter().filter(|entry| entry.function != 0x8000_0006).copied().collect();
    let cpu = Cpu::new(&CpuId::from_entries(&rows).unwrap(), EVERY_LEVEL, 0);
    let [_, ebx, ecx, _] = cpu.id(0x8000_001d, 3);
    let size = (ebx & 0xfff) + 1;
    let size = size * ((ebx >> 22) + 1) * (ecx + 1);
    let [.., large] = cpu.id(0x8000_0006, 0);
    assert_eq!((size, (large >> 18) * (512 << 10)), (16 << 20, 16 << 20));
}

#[test]
fn one_cpu_is_as_kvm_has_it() {
    for host in hosts() {
        let cpu = Cpu::new(&host, ONE, 0);
        let others = |set: &CpuId| -> Vec<_> {
            let entries = set.as_slice().iter();
            let others = entries.filter(|entry| !ABOUT_TOPOLOGY.contains(&entry.function));
            others.map(|entry| (entry.function, entry.index, entry.ebx, entry.edx)).collect()
        };
        assert_eq!(others(&cpu.0), others(&host));
        assert_eq!(cpu.id(1, 0)[1] & !0xffff, 1 << 16, "one CPU, with the id 0");
        assert_eq!(cpu.id(1, 0)[3] & 1 << 28, 0);
        assert!(cpu.caches().iter().all(|(_, _, sharing)| *sharing == 1));
    }
    assert!(!Cpu::new(&emulated(), ONE, 0).has_topology_extensions());
    assert_eq!(Cpu::new(&emulated(), ONE, 0).id(0x8000_0000, 0)[0], 0x8000_000a);
}

#[test]
fn features_are_kvms_but_for_a_few() {
    for host in hosts() {
        let before = Cpu(host.clone());
        let cpu = Cpu::new(&host, EVERY_LEVEL, 3);
        let without = for_vcpu(&host, EVERY_LEVEL, 3, Options { tsc_deadline: false }).unwrap();
        let [.., was, _] = before.id(1, 0);
        assert_eq!(cpu.id(1, 0)[2], was | 1 << 31 | 1 << 24);
        assert_eq!(Cpu(without).id(1, 0)[2], was | 1 << 31);
        let [eax, ebx, ecx, edx] = before.find(7, 0).unwrap_or_default();
        // Five levels of page tables, shadow stacks, branch tracking.
        assert_eq!(cpu.id(7, 0), [eax, ebx, ecx & !(1 << 16 | 1 << 7), edx & !(1 << 20)]);
        for leaf in [0xa, 0x15, 0x4000_0000, 0x4000_0001, 0x8000_0021] {
            assert_eq!(cpu.find(leaf, 0), before.find(leaf, 0));
        }
    }
}

#[test]
fn what_was_made_is_made_again() {
    for host in hosts() {
        for topology in topologies() {
            for cpu in [0, topology.cpus() - 1] {
                let once = Cpu::new(&host, topology, cpu).0;
                assert_eq!(Cpu::new(&once, topology, cpu).0.as_slice(), once.as_slice());
                // Whose entries they are made of makes no difference, as all are made anew.
                let other = Cpu::new(&host, topology, 0).0;
                assert_eq!(Cpu::new(&other, topology, cpu).0.as_slice(), once.as_slice());
            }
        }
    }
}

#[test]
fn makers_are_told_apart() {
    let maker = |set: &CpuId| Maker::of(&Leaves::new(set));
    assert_eq!(maker(&intel()), Maker::Intel);
    assert_eq!(maker(&amd()), Maker::Amd { family: 0x19 });
    assert_eq!(maker(&emulated()), Maker::Amd { family: 0xf });
    let hygon =
        [(0, 0, [0xd, 0x6f67_7948, 0x656e_6975, 0x6e65_476e]), (1, 0, [0x0090_0f02, 0, 0, 0])];
    assert_eq!(maker(&set_of(&hygon)), Maker::Amd { family: 0x18 });
    assert_eq!(maker(&set_of(&[])), Maker::Intel);
}
