//! Where things are in a guest's memory and I/O space, and which interrupts they have.
//!
//! Memory begins at address 0, and goes on above 4 GiB where there is more than fits below the hole for devices.

use std::ops::Range;

/// The global descriptor table that the kernel is entered with.
pub const GDT: u64 = 0x500;
/// The page that a kernel is told by how it was started (`struct boot_params`).
pub const BOOT_PARAMS: u64 = 0x7000;
/// Page tables: the root, then one page of third level, then its four pages of second level, which map the first
/// 4 GiB.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The end of memory that a PC has below its first megabyte; what is behind is firmware's.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;

/// The ACPI tables, the root pointer first. They are where a PC's firmware has them.
pub const ACPI: Range<u64> = 0xe_0000..0xf_f000;
/// The page with the number of this generation of the VM ([`VMGENID_LEN`] bytes), which changes when it goes on
/// from a snapshot.
pub const VMGENID: u64 = 0xf_f000;
/// Bytes of that number.
pub const VMGENID_LEN: usize = 16;

/// Where memory goes on behind the first megabyte.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// What has devices in it instead of memory.
pub const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;

/// The registers of virtio devices: [`SLOT_SIZE`] bytes for each slot.
pub const SLOTS: u64 = 0xd000_0000;
/// Bytes of a slot's registers.
pub const SLOT_SIZE: u64 = 0x1000;
/// The most slots.
pub const MAX_SLOTS: usize = 32;

/// The I/O APIC's registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs' registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs for itself on Intel processors.
pub const KVM_TSS: usize = 0xfffb_d000;

/// The port of the first serial line's registers, of which there are eight.
pub const COM1: u16 = 0x3f8;
/// The same of the second.
pub const COM2: u16 = 0x2f8;
/// ACPI's sleep control register, of one byte.
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI's sleep status register, of one byte.
pub const SLEEP_STATUS: u16 = 0x601;
/// ACPI's reset register, of one byte.
pub const RESET: u16 = 0x602;
/// What is written to that.
pub const RESET_VALUE: u8 = 1;
/// The state that ACPI's `_S5` names, which is written to the sleep control register to power the VM off.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// The port of pvpanic (`docs/specs/pvpanic.rst` of QEMU), of one byte.
pub const PVPANIC: u16 = 0x505;

/// Interrupts of the I/O APIC. All are edges. Several slots can share one, as they share what raises it.
pub mod gsi {
    /// The second serial line.
    pub const COM2: u32 = 3;
    /// The first serial line.
    pub const COM1: u32 = 4;
    /// The number of the VM's generation has changed.
    pub const VMGENID: u32 = 8;
    /// The power button.
    pub const POWER_BUTTON: u32 = 9;
    /// Those of virtio slots, in their order. Beyond them it begins anew.
    pub const SLOTS: [u32; 17] = [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
    /// How many inputs the I/O APIC has.
    pub const INPUTS: u32 = 24;
}

/// Where a slot's registers are.
pub const fn slot_address(slot: usize) -> u64 {
    SLOTS + slot as u64 * SLOT_SIZE
}

/// The interrupt of a slot.
pub const fn slot_gsi(slot: usize) -> u32 {
    gsi::SLOTS[slot % gsi::SLOTS.len()]
}

/// Where so much memory is.
pub fn memory(size: u64) -> Vec<Range<u64>> {
    let below = size.min(HOLE.start);
    let mut ranges = vec![0..below];
    if size > below {
        ranges.push(HOLE.end..HOLE.end + (size - below));
    }
    ranges
}

/// Where the memory of each of so many NUMA nodes is: equal parts, in order.
pub fn node_memory(size: u64, nodes: u32) -> Vec<Vec<Range<u64>>> {
    let part = size / u64::from(nodes.max(1));
    let addresses = |from: u64, to: u64| -> Vec<Range<u64>> {
        let below = from.min(HOLE.start)..to.min(HOLE.start);
        let moved = |offset: u64| HOLE.end + offset.saturating_sub(HOLE.start);
        let above = moved(from)..moved(to);
        [below, above].into_iter().filter(|range| !range.is_empty()).collect()
    };
    (0..u64::from(nodes)).map(|node| addresses(node * part, (node + 1) * part)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_leaves_the_hole_out() {
        assert_eq!(memory(GIB), [0..GIB]);
        assert_eq!(memory(3 * GIB), [0..3 * GIB]);
        assert_eq!(memory(5 * GIB), [0..3 * GIB, 4 * GIB..6 * GIB]);
    }

    #[test]
    fn a_node_may_be_on_both_sides_of_the_hole() {
        assert_eq!(node_memory(GIB, 1), [vec![0..GIB]]);
        assert_eq!(
            node_memory(8 * GIB, 2),
            [vec![0..3 * GIB, 4 * GIB..5 * GIB], vec![5 * GIB..9 * GIB]]
        );
        assert_eq!(node_memory(6 * GIB, 2), [vec![0..3 * GIB], vec![4 * GIB..7 * GIB]]);
    }

    #[test]
    fn every_slot_has_a_place_and_an_interrupt_of_its_own_kind() {
        assert!(slot_address(MAX_SLOTS) <= u64::from(IO_APIC));
        let taken = [gsi::COM1, gsi::COM2, gsi::VMGENID, gsi::POWER_BUTTON];
        for slot in 0..MAX_SLOTS {
            assert!(slot_gsi(slot) < gsi::INPUTS && !taken.contains(&slot_gsi(slot)));
        }
    }
}
