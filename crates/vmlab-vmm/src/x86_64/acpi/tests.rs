use std::collections::BTreeMap;
use std::ops::Range;

use super::*;
use crate::x86_64::layout::{ACPI, HOLE, MAX_SLOTS, gsi};

const ONE: Topology = Topology { nodes: 1, llcs: 1, cores: 1, threads: 1 };
const EVERY_LEVEL: Topology = Topology { nodes: 2, llcs: 2, cores: 2, threads: 2 };
const UNEVEN: Topology = Topology { nodes: 3, llcs: 3, cores: 3, threads: 1 };
/// 300 CPUs, whose APIC ids go beyond a byte.
const WIDE: Topology = Topology { nodes: 5, llcs: 3, cores: 5, threads: 4 };

fn machine(topology: Topology) -> Machine {
    let memory = 1200 << 20;
    Machine { topology, memory, slots: MAX_SLOTS, com2: true, vmgenid: true }
}

fn number(bytes: &[u8], offset: usize, len: usize) -> u64 {
    let bytes = bytes[offset..offset + len].iter().rev();
    bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The tables as a kernel finds them that knows nothing but where the root pointer is, and where each is.
fn walk(blob: &[u8]) -> BTreeMap<String, (u64, &[u8])> {
    let valid = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0;
    let table = |address: u64| {
        assert!(ACPI.contains(&address) && address.is_multiple_of(16), "{address:#x}");
        let bytes = &blob[(address - ACPI.start) as usize..];
        let bytes = &bytes[..number(bytes, 4, 4) as usize];
        assert!(valid(bytes), "the checksum of the table at {address:#x}");
        let signature = String::from_utf8(bytes[..4].to_vec()).unwrap();
        (signature, (address, bytes))
    };

    assert_eq!(&blob[..8], b"RSD PTR ");
    assert_eq!(blob[15], 2, "ACPI 2.0 or later");
    assert!(valid(&blob[..20]) && valid(&blob[..36]));
    assert_eq!(number(blob, 20, 4), 36);
    assert_eq!(number(blob, 16, 4), 0, "there is no root table of 32 bits");
    let (signature, (_, root)) = table(number(blob, 24, 8));
    assert_eq!(signature, "XSDT");

    let entries = root[36..].chunks(8).map(|entry| table(number(entry, 0, 8)));
    let mut found: BTreeMap<_, _> = entries.collect();
    assert_eq!(found.len(), (root.len() - 36) / 8, "every table is there once");
    let (_, fadt) = found["FACP"];
    assert_eq!(number(fadt, 40, 4), 0, "the devices' address has 64 bits only");
    found.extend([table(number(fadt, 140, 8))]);
    found
}

/// The entries of a table that begin with their type and length.
fn entries(table: &[u8], header: usize) -> Vec<(u8, &[u8])> {
    let mut rest = &table[header..];
    let mut found = Vec::new();
    while let [kind, len, ..] = *rest {
        let (entry, after) = rest.split_at(usize::from(len));
        found.push((kind, entry));
        rest = after;
    }
    assert!(rest.is_empty());
    found
}

#[test]
fn the_root_leads_to_every_table() {
    let signatures = |topology| {
        let blob = tables(&machine(topology)).unwrap();
        walk(&blob).into_keys().collect::<Vec<_>>()
    };
    assert_eq!(signatures(ONE), ["APIC", "DSDT", "FACP"]);
    assert_eq!(signatures(EVERY_LEVEL), ["APIC", "DSDT", "FACP", "SLIT", "SRAT"]);
    assert_eq!(signatures(WIDE), ["APIC", "DSDT", "FACP", "SLIT", "SRAT"]);
}

#[test]
fn tables_do_not_overlap() {
    let blob = tables(&machine(EVERY_LEVEL)).unwrap();
    let places = walk(&blob).into_values().map(|(at, bytes)| at..at + bytes.len() as u64);
    let mut places: Vec<_> = places.chain([ACPI.start..ACPI.start + 36]).collect();
    places.sort_by_key(|place| place.start);
    assert!(places.windows(2).all(|pair| pair[0].end <= pair[1].start));
}

#[test]
fn hardware_is_reduced() {
    let blob = tables(&machine(ONE)).unwrap();
    let (_, fadt) = walk(&blob)["FACP"];
    assert!(fadt[8] >= 5 && fadt.len() == 276);
    let flags = number(fadt, 112, 4);
    assert_eq!(flags, 1 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20);
    assert_eq!(number(fadt, 109, 2), 1 << 2 | 1 << 4 | 1 << 5);
    // Neither a fixed interrupt nor a fixed register.
    assert!(fadt[46..109].iter().all(|byte| *byte == 0));
    assert!(fadt[148..244].iter().all(|byte| *byte == 0));
    // Registers: an I/O port, 8 bits wide, read and written as bytes.
    let register = |offset: usize| {
        assert_eq!(fadt[offset..offset + 4], [1, 8, 0, 1]);
        number(fadt, offset + 4, 8) as u16
    };
    assert_eq!((register(116), fadt[128]), (layout::RESET, layout::RESET_VALUE));
    assert_eq!(register(244), layout::SLEEP_CONTROL);
    assert_eq!(register(256), layout::SLEEP_STATUS);
}

#[test]
fn all_cpus_are_enabled() {
    for topology in [ONE, EVERY_LEVEL, UNEVEN, WIDE] {
        let blob = tables(&machine(topology)).unwrap();
        let (_, madt) = walk(&blob)["APIC"];
        assert_eq!(number(madt, 36, 4), u64::from(layout::LOCAL_APIC));
        assert_eq!(number(madt, 40, 4), 0, "there is no PIC");
        let mut cpus = Vec::new();
        let mut io_apics = 0;
        let mut nmis = Vec::new();
        for (kind, entry) in entries(madt, 44) {
            match kind {
                0 => {
                    assert_eq!((entry.len(), number(entry, 4, 4)), (8, 1));
                    cpus.push((u32::from(entry[2]), u32::from(entry[3])));
                    assert!(entry[3] < 255, "that one is for all");
                }
                1 => {
                    assert_eq!((entry.len(), entry[2], number(entry, 8, 4)), (12, 0, 0));
                    assert_eq!(number(entry, 4, 4), u64::from(layout::IO_APIC));
                    io_apics += 1;
                }
                4 => {
                    assert_eq!(entry, [4, 6, 255, 0, 0, 1]);
                    nmis.push(kind);
                }
                9 => {
                    assert_eq!((entry.len(), number(entry, 8, 4)), (16, 1));
                    let id = number(entry, 4, 4) as u32;
                    assert!(id >= 255);
                    cpus.push((number(entry, 12, 4) as u32, id));
                }
                10 => {
                    assert_eq!(entry, [10, 12, 0, 0, 255, 255, 255, 255, 1, 0, 0, 0]);
                    nmis.push(kind);
                }
                _ => panic!("an entry of type {kind}"),
            }
        }
        let expected = (0..topology.cpus()).map(|cpu| (cpu, topology.apic_id(cpu)));
        assert_eq!(cpus, expected.collect::<Vec<_>>());
        assert_eq!(io_apics, 1);
        assert_eq!(nmis, if topology == WIDE { &[4, 10][..] } else { &[4] });
    }
}

#[test]
fn nodes_have_their_cpus_and_all_of_memory() {
    for (topology, memory) in
        [(EVERY_LEVEL, 1 << 30), (EVERY_LEVEL, 9 << 30), (UNEVEN, 9 << 30), (WIDE, 10 << 30)]
    {
        let blob = tables(&Machine { memory, ..machine(topology) }).unwrap();
        let found = walk(&blob);
        let (_, srat) = found["SRAT"];
        assert_eq!(number(srat, 36, 4), 1);
        assert!(srat[40..48].iter().all(|byte| *byte == 0));
        let mut cpus = Vec::new();
        let mut ranges: Vec<(u64, Range<u64>)> = Vec::new();
        for (kind, entry) in entries(srat, 48) {
            match kind {
                0 => {
                    assert_eq!((entry.len(), number(entry, 4, 4)), (16, 1));
                    let node = u64::from(entry[2]) | number(entry, 9, 3) << 8;
                    cpus.push((node, u64::from(entry[3])));
                }
                1 => {
                    assert_eq!((entry.len(), number(entry, 28, 4)), (40, 1));
                    let base = number(entry, 8, 8);
                    ranges.push((number(entry, 2, 4), base..base + number(entry, 16, 8)));
                }
                2 => {
                    assert_eq!((entry.len(), number(entry, 12, 4)), (24, 1));
                    cpus.push((number(entry, 4, 4), number(entry, 8, 4)));
                }
                _ => panic!("an entry of type {kind}"),
            }
        }
        let of = |cpu| (u64::from(topology.node_of(cpu)), u64::from(topology.apic_id(cpu)));
        assert_eq!(cpus, (0..topology.cpus()).map(of).collect::<Vec<_>>());

        // Put together, the nodes' ranges are the memory, and each node has as much as the others.
        let mut whole: Vec<Range<u64>> = Vec::new();
        let mut of_node = vec![0; topology.nodes as usize];
        for (node, range) in ranges {
            of_node[node as usize] += range.end - range.start;
            assert!(range.end <= HOLE.start || range.start >= HOLE.end);
            match whole.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => whole.push(range),
            }
        }
        assert_eq!(whole, layout::memory(memory));
        assert!(of_node.iter().all(|size| *size == memory / u64::from(topology.nodes)));

        let (_, slit) = found["SLIT"];
        let nodes = topology.nodes as usize;
        assert_eq!((number(slit, 36, 8) as usize, slit.len()), (nodes, 44 + nodes * nodes));
        for (at, distance) in slit[44..].iter().enumerate() {
            assert_eq!(*distance, if at / nodes == at % nodes { 10 } else { 20 });
        }
    }
}

/// How often bytes are in a table.
fn count(table: &[u8], bytes: &[u8]) -> usize {
    table.windows(bytes.len()).filter(|window| *window == bytes).count()
}

#[test]
fn devices_are_those_asked_for() {
    for (slots, com2, vmgenid) in [(0, false, false), (7, true, false), (MAX_SLOTS, false, true)] {
        let blob = tables(&Machine { slots, com2, vmgenid, ..machine(EVERY_LEVEL) }).unwrap();
        let (_, dsdt) = walk(&blob)["DSDT"];
        assert_eq!(count(dsdt, b"LNRO0005"), slots);
        assert_eq!(count(dsdt, b"ACPI0007"), 16);
        // An EISA name, whose five-bit letters are followed by four digits (ACPI 6.5, section 19.3.4).
        assert_eq!(count(dsdt, &[0x41, 0xd0, 0x05, 0x01]), 1 + usize::from(com2));
        assert_eq!(count(dsdt, b"VM_GEN_COUNTER"), usize::from(vmgenid));
        assert_eq!(count(dsdt, b"QEMU0001"), 1);
        // An extended interrupt: a consumer's, edge, active high and, but for serial lines, shared.
        for gsi in 0..gsi::INPUTS {
            let of_slots = (0..slots).filter(|slot| layout::slot_gsi(*slot) == gsi).count();
            let shared = of_slots
                + usize::from(gsi == gsi::POWER_BUTTON)
                + usize::from(gsi == gsi::VMGENID && vmgenid);
            let own = gsi == gsi::COM1 || gsi == gsi::COM2 && com2;
            let descriptor = |flags| [0x89, 6, 0, flags, 1, gsi as u8, 0, 0, 0];
            assert_eq!(count(dsdt, &descriptor(0b1011)), shared, "{gsi}");
            assert_eq!(count(dsdt, &descriptor(0b0011)), usize::from(own), "{gsi}");
        }
        for slot in 0..MAX_SLOTS {
            let mut range = vec![0x86, 9, 0, 1];
            range.extend((layout::slot_address(slot) as u32).to_le_bytes());
            range.extend((layout::SLOT_SIZE as u32).to_le_bytes());
            assert_eq!(count(dsdt, &range), usize::from(slot < slots));
        }
    }
}

#[test]
fn there_is_room_for_255_cpus_and_all_slots() {
    let len = |topology| tables(&machine(topology)).unwrap().len();
    let flat = len(Topology { nodes: 1, llcs: 1, cores: 255, threads: 1 });
    let deep = len(Topology { nodes: 15, llcs: 17, cores: 1, threads: 1 });
    let room = (ACPI.end - ACPI.start) as usize;
    assert!(flat < deep && deep < room / 2, "{flat} and {deep} of {room} bytes");
}

#[test]
fn what_there_is_no_room_for_is_refused() {
    let crowd = Topology { nodes: 1, llcs: 1, cores: 4096, threads: 1 };
    let refusal = tables(&machine(crowd)).unwrap_err();
    assert!(matches!(refusal, Error::Room { cpus: 4096, nodes: 1, .. }), "{refusal}");
    let slots = MAX_SLOTS + 1;
    assert_eq!(tables(&Machine { slots, ..machine(ONE) }), Err(Error::Slots(slots)));
    let memory = (1 << 30) + 4096;
    let machine = Machine { memory, ..machine(EVERY_LEVEL) };
    assert_eq!(tables(&machine), Err(Error::Memory { memory, nodes: 2 }));
}
