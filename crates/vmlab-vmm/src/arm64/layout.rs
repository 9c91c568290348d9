//! Where things are in an arm64 guest's memory, and which interrupts they have.
//!
//! Devices are in the first GiB, and memory goes from there on up without a hole.

use std::ops::Range;

/// Where memory begins.
pub const MEMORY: u64 = 0x4000_0000;

/// The registers of the interrupt controller's distributor.
pub const GIC_DISTRIBUTOR: u64 = 0x0800_0000;
/// Bytes of these (`KVM_VGIC_V3_DIST_SIZE`).
pub const GIC_DISTRIBUTOR_SIZE: u64 = 0x1_0000;

/// The registers of the first serial line.
pub const UART1: u64 = 0x0900_0000;
/// The same of the second.
pub const UART2: u64 = 0x0900_1000;
/// Bytes of these registers.
pub const UART_SIZE: u64 = 8;

/// The registers of virtio devices: [`SLOT_SIZE`] bytes for each slot.
pub const SLOTS: u64 = 0x0a00_0000;
/// Bytes of a slot's registers.
pub const SLOT_SIZE: u64 = 0x1000;
/// The most slots.
pub const MAX_SLOTS: usize = 32;

/// The registers of the interrupt controller's redistributors, [`GIC_REDISTRIBUTOR_SIZE`] bytes for each CPU.
pub const GIC_REDISTRIBUTORS: u64 = 0x1000_0000;
/// Bytes of those of a CPU: a page of 64 KiB for itself and one for its own interrupts
/// (`KVM_VGIC_V3_REDIST_SIZE`).
pub const GIC_REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
/// The most CPUs: as many as KVM's interrupt controller has redistributors for.
pub const MAX_CPUS: u32 = 512;

/// Shared peripheral interrupts, from 0 on. KVM routes the GSI of a number to the interrupt of the same number.
pub mod spi {
    /// The first serial line.
    pub const UART1: u32 = 0;
    /// The second serial line.
    pub const UART2: u32 = 1;
    /// The first of the virtio slots, which have one each.
    pub const SLOTS: u32 = 16;
    /// How many there are.
    pub const COUNT: u32 = 64;
}

/// Private peripheral interrupts, from 0 on: those of the timers, as Arm's Base System Architecture has them.
pub mod ppi {
    /// The hypervisor's timer.
    pub const TIMER_HYPERVISOR: u32 = 10;
    /// The virtual timer.
    pub const TIMER_VIRTUAL: u32 = 11;
    /// The secure physical timer.
    pub const TIMER_SECURE: u32 = 13;
    /// The physical timer.
    pub const TIMER_PHYSICAL: u32 = 14;
}

/// Where a slot's registers are.
pub const fn slot_address(slot: usize) -> u64 {
    SLOTS + slot as u64 * SLOT_SIZE
}

/// The interrupt of a slot.
pub const fn slot_spi(slot: usize) -> u32 {
    spi::SLOTS + slot as u32
}

/// Where so much memory is; `None` where no address is high enough for it.
pub const fn memory(size: u64) -> Option<Range<u64>> {
    match MEMORY.checked_add(size) {
        Some(end) => Some(MEMORY..end),
        None => None,
    }
}

/// Where the memory of each of so many NUMA nodes is: equal parts, in order. What cannot be divided is the last
/// one's.
pub fn node_memory(memory: Range<u64>, nodes: u32) -> Vec<Range<u64>> {
    let nodes = u64::from(nodes.max(1));
    let part = memory.end.saturating_sub(memory.start) / nodes;
    let start = |node| memory.start + node * part;
    let end = |node| if node + 1 == nodes { memory.end } else { start(node + 1) };
    (0..nodes).map(|node| start(node)..end(node)).collect()
}

/// How many bits the addresses of so much memory have. KVM has to be asked for more than
/// [`DEFAULT_ADDRESS_BITS`] when the VM is made.
pub const fn address_bits(memory: &Range<u64>) -> u32 {
    u64::BITS - memory.end.saturating_sub(1).leading_zeros()
}

/// How many bits a VM's addresses have unless KVM is asked for another number.
pub const DEFAULT_ADDRESS_BITS: u32 = 40;

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn nothing_overlaps() {
        let sized = |start: u64, size: u64| start..start + size;
        let redistributors = u64::from(MAX_CPUS) * GIC_REDISTRIBUTOR_SIZE;
        let places = [
            sized(GIC_DISTRIBUTOR, GIC_DISTRIBUTOR_SIZE),
            sized(UART1, UART_SIZE),
            sized(UART2, UART_SIZE),
            SLOTS..slot_address(MAX_SLOTS),
            sized(GIC_REDISTRIBUTORS, redistributors),
            memory(GIB).unwrap(),
        ];
        assert!(places.windows(2).all(|pair| pair[0].end <= pair[1].start), "{places:x?}");
    }

    #[test]
    fn every_slot_has_an_interrupt_of_its_own() {
        assert!(slot_spi(0) > spi::UART2);
        assert!(slot_spi(MAX_SLOTS - 1) < spi::COUNT);
    }

    #[test]
    fn nodes_have_all_of_the_memory() {
        let four = memory(4 * GIB).unwrap();
        assert_eq!(node_memory(four.clone(), 2), [GIB..3 * GIB, 3 * GIB..5 * GIB]);
        let parts = node_memory(four.clone(), 3);
        assert_eq!((parts[0].start, parts[2].end), (four.start, four.end));
        assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert_eq!(node_memory(four.clone(), 1), [four]);
    }

    #[test]
    fn too_much_memory_has_no_place() {
        assert_eq!(memory(u64::MAX), None);
        let bits = |size| address_bits(&memory(size).unwrap());
        assert_eq!((bits(GIB), bits(2 * GIB)), (31, 32));
        assert_eq!(bits(1023 * GIB), DEFAULT_ADDRESS_BITS);
        assert_eq!(bits(1024 * GIB), DEFAULT_ADDRESS_BITS + 1);
    }
}
