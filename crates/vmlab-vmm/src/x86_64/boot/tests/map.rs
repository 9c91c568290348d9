//! The map of memory.

use super::super::params::memory_map;
use super::*;

const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// The map as it was written for so much memory: begins, ends and kinds.
fn written(size: u64) -> Vec<(u64, u64, u32)> {
    let memory = memory(size);
    let map = memory_map(&memory);
    map.iter().map(|entry| (entry.addr, entry.addr + entry.size, entry.r#type)).collect()
}

#[test]
fn all_memory_is_told_but_what_is_firmwares() {
    let low = [(0, 0x9_fc00, RAM), (0x9_fc00, MIB, RESERVED)];
    let with = |more: &[(u64, u64, u32)]| [&low[..], more].concat();
    assert_eq!(written(64 * MIB), with(&[(MIB, 64 * MIB, RAM)]));
    assert_eq!(written(3 * GIB), with(&[(MIB, 3 * GIB, RAM)]));
    let both = |end| with(&[(MIB, 3 * GIB, RAM), (4 * GIB, end, RAM)]);
    assert_eq!(written(3 * GIB + 4096), both(4 * GIB + 4096));
    assert_eq!(written(64 * GIB), both(65 * GIB));
    // There is nothing to load a kernel to, and yet nothing that would be told wrongly.
    assert_eq!(written(MIB), low);
}

#[test]
fn no_part_of_the_map_is_on_another() {
    for size in [4096, MIB, MIB + 4096, 64 * MIB, 3 * GIB - 4096, 3 * GIB + 4096, 100 * GIB] {
        let map = written(size);
        assert!(map.iter().all(|(start, end, _)| start < end), "{map:x?}");
        assert!(map.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{map:x?}");
        // No device is where memory is.
        let hole = layout::HOLE;
        assert!(map.iter().all(|(start, end, _)| *end <= hole.start || *start >= hole.end));
        let high: u64 = map[2..].iter().map(|(start, end, _)| end - start).sum();
        assert_eq!(high, size.saturating_sub(MIB));
    }
}

#[test]
fn what_the_monitor_writes_is_in_the_low_memory_and_apart() {
    let tables = layout::PAGE_TABLES..layout::PAGE_TABLES + 6 * 4096;
    let params = layout::BOOT_PARAMS..layout::BOOT_PARAMS + 4096;
    let line = layout::COMMAND_LINE..layout::LOW_MEMORY_END;
    let vmgenid = layout::VMGENID..layout::VMGENID + 4096;
    let all = [layout::GDT..layout::GDT + 48, params, tables, line, layout::ACPI, vmgenid];
    assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start), "{all:x?}");
    assert!(all[5].end <= layout::HIGH_MEMORY);
    // Kernels look at firmware's for nothing but the tables.
    assert!(all[4].start >= layout::LOW_MEMORY_END);
}
