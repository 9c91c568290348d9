//! Which node CPUs and memory are in (SRAT), and how far the nodes are from each other (SLIT).

use acpi_tables::sdt::Sdt;
use acpi_tables::slit::SLIT;
use acpi_tables::srat::MemoryAffinity;
use acpi_tables::{Aml, AmlSink};

use super::{FIRST_WIDE_ID, OEM, OEM_REVISION, OEM_TABLE, entry, table};
use crate::topology::Topology;
use crate::x86_64::layout;

/// The version of the SRAT since ACPI 4.0. From 2 on a node's number has 32 bits.
const SRAT_REVISION: u8 = 3;
/// An entry for a CPU.
const LOCAL_APIC: u8 = 0;
/// An entry for a CPU whose id does not fit a byte.
const LOCAL_X2APIC: u8 = 2;
/// The entry is to be used.
const ENABLED: u32 = 1;

/// From one node to another. To itself it is 10.
const DISTANCE: u8 = 20;

/// Where CPUs and memory are.
pub(super) fn srat(topology: Topology, memory: u64) -> Sdt {
    let mut body = Vec::new();
    // One reserved number that must be 1, and eight bytes of them that must be 0.
    body.dword(1);
    body.qword(0);
    for cpu in 0..topology.cpus() {
        affinity(&mut body, topology.node_of(cpu), topology.apic_id(cpu));
    }
    for (node, ranges) in (0..).zip(layout::node_memory(memory, topology.nodes)) {
        for range in ranges {
            let memory = MemoryAffinity::new(node, range.start, range.end - range.start);
            memory.enabled().to_aml_bytes(&mut body);
        }
    }
    table(b"SRAT", SRAT_REVISION, &body)
}

/// Appends an entry that puts a CPU into a node.
fn affinity(body: &mut Vec<u8>, node: u32, id: u32) {
    if id < FIRST_WIDE_ID {
        let [low, high @ ..] = node.to_le_bytes();
        entry(body, LOCAL_APIC, |fields| {
            fields.byte(low);
            fields.byte(id as u8);
            fields.dword(ENABLED);
            // The id of a local SAPIC, of which a PC has none.
            fields.byte(0);
            fields.vec(&high);
            fields.dword(0);
        });
    } else {
        entry(body, LOCAL_X2APIC, |fields| {
            fields.word(0);
            fields.dword(node);
            fields.dword(id);
            fields.dword(ENABLED);
            fields.dword(0);
            fields.dword(0);
        });
    }
}

/// How far each node is from each.
pub(super) fn slit(nodes: u32) -> SLIT {
    let mut slit = SLIT::new(OEM, OEM_TABLE, OEM_REVISION, nodes);
    for from in 0..nodes as usize {
        for to in 0..from {
            slit.set_distance(from, to, DISTANCE);
        }
    }
    slit
}
