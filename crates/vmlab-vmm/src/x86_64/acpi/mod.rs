//! The ACPI tables that tell a kernel which machine it is on.
//!
//! The machine is one of hardware-reduced ACPI (ACPI 6.5, section 4.1): it has no system control interrupt, no power
//! management timer and no fixed events. Linux then uses neither PIC nor PIT, and takes every interrupt's trigger
//! and polarity from the device's own description, so no interrupt source is overridden.
//!
//! Such a machine Linux restarts through EFI (`efi_reboot_required`) and, having none, through a BIOS, which is not
//! there either. Only `reboot=acpi` on its command line makes it use the reset register.

mod dsdt;
mod fixed;
mod numa;
#[cfg(test)]
mod tests;

use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::layout;
use crate::topology::Topology;

/// Who made the tables, as their headers say it.
const OEM: [u8; 6] = *b"VMLAB ";
/// The name of this set of tables.
const OEM_TABLE: [u8; 8] = *b"VMLABPC ";
/// The version of this set.
const OEM_REVISION: u32 = 1;

/// Bytes of the header that every table but the root pointer begins with (ACPI 6.5, section 5.2.6).
const HEADER_LEN: u32 = 36;
/// What the tables' addresses are multiples of. The root pointer's must be of 16.
const ALIGNMENT: usize = 16;

/// APIC ids from this one on need the tables' wider entries (ACPI 6.5, section 5.2.12.12).
const FIRST_WIDE_ID: u32 = 255;

/// What the tables tell of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// The CPUs, all of them present and enabled.
    pub topology: Topology,
    /// Bytes of memory.
    pub memory: u64,
    /// How many virtio slots are announced, the first ones; [`layout::MAX_SLOTS`] at most.
    pub slots: usize,
    /// Whether there is a second serial line.
    pub com2: bool,
    /// Whether the page [`layout::VMGENID`] has the number of the VM's generation in it.
    pub vmgenid: bool,
}

/// Why there are no tables.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There are no addresses for so many.
    #[error("{0} virtio slots were asked for, but there is room for {max}", max = layout::MAX_SLOTS)]
    Slots(usize),
    /// A page cannot be in two nodes.
    #[error(
        "{memory} bytes of memory are not a multiple of 4096 bytes for each of {nodes} NUMA nodes"
    )]
    Memory {
        /// Bytes of memory.
        memory: u64,
        /// Among how many nodes it was to be parted.
        nodes: u32,
    },
    /// There are too many CPUs or nodes.
    #[error(
        "the ACPI tables of {cpus} CPUs in {nodes} NUMA nodes need {len} bytes, but there is room for {room}"
    )]
    Room {
        /// How many CPUs there are.
        cpus: u32,
        /// How many nodes.
        nodes: u32,
        /// Bytes of the tables.
        len: usize,
        /// Bytes of [`layout::ACPI`].
        room: usize,
    },
}

/// Everything that is to be in guest memory from [`layout::ACPI`]'s start on. It begins with the root pointer.
pub fn tables(machine: &Machine) -> Result<Vec<u8>, Error> {
    let Machine { topology, memory, slots, .. } = *machine;
    if slots > layout::MAX_SLOTS {
        return Err(Error::Slots(slots));
    }
    if !memory.is_multiple_of(u64::from(topology.nodes) * 4096) {
        return Err(Error::Memory { memory, nodes: topology.nodes });
    }

    let mut blob = Blob::new();
    let dsdt = blob.add(&dsdt::dsdt(machine));
    let mut root = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    root.add_entry(blob.add(&fixed::fadt(dsdt)));
    root.add_entry(blob.add(&fixed::madt(topology)));
    if topology.nodes > 1 {
        root.add_entry(blob.add(&numa::srat(topology, memory)));
        root.add_entry(blob.add(&numa::slit(topology.nodes)));
    }
    let root = blob.add(&root);

    let tables = blob.finish(root);
    let room = (layout::ACPI.end - layout::ACPI.start) as usize;
    if tables.len() > room {
        let (cpus, nodes) = (topology.cpus(), topology.nodes);
        return Err(Error::Room { cpus, nodes, len: tables.len(), room });
    }
    Ok(tables)
}

/// Tables one after the other, with room for the root pointer in front.
struct Blob(Vec<u8>);

impl Blob {
    fn new() -> Self {
        Self(vec![0; Rsdp::len()])
    }

    /// Appends a table, and says at which address it is.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
        let address = layout::ACPI.start + self.0.len() as u64;
        table.to_aml_bytes(&mut self.0);
        address
    }

    fn finish(mut self, root: u64) -> Vec<u8> {
        let mut pointer = Vec::with_capacity(Rsdp::len());
        Rsdp::new(OEM, root).to_aml_bytes(&mut pointer);
        self.0[..pointer.len()].copy_from_slice(&pointer);
        self.0
    }
}

/// A table of a kind that the crate has no type for.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(*signature, HEADER_LEN, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table
}

/// Appends an entry of a table: its type, its length, which is found out, and what it has besides.
fn entry(body: &mut Vec<u8>, kind: u8, fields: impl FnOnce(&mut Vec<u8>)) {
    let start = body.len();
    body.byte(kind);
    body.byte(0);
    fields(body);
    body[start + 1] = (body.len() - start) as u8;
}
