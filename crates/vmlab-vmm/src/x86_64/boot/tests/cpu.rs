//! The processor's tables, as a processor reads them (Intel SDM volume 3).

use kvm_bindings::{kvm_segment, kvm_sregs};

use super::super::{enter_long_mode, tables};
use super::*;

fn entered() -> (GuestMemoryMmap, kvm_sregs) {
    let memory = memory(2 * MIB);
    // What was there before is no part of the tables.
    let at = GuestAddress(layout::PAGE_TABLES);
    memory.write_slice(&[0xff; 6 * 4096], at).unwrap();
    tables::write(&memory).unwrap();
    let mut sregs = kvm_sregs::default();
    enter_long_mode(&mut sregs);
    (memory, sregs)
}

/// The present entries of a table.
fn entries(memory: &GuestMemoryMmap, table: u64) -> Vec<(u64, u64)> {
    let entries =
        (0..512).map(|index| (index, u64::from_le_bytes(bytes(memory, table + index * 8))));
    entries.filter(|(_, entry)| entry & 1 != 0).collect()
}

/// The pages that are mapped: from where, to where, and how large they are.
fn mapped(memory: &GuestMemoryMmap, root: u64) -> Vec<(u64, u64, u64)> {
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let mut found = Vec::new();
    let mut tables = vec![(root, 0, 39)];
    while let Some((table, from, shift)) = tables.pop() {
        for (index, entry) in entries(memory, table) {
            assert_eq!(entry & 2, 2, "{entry:#x} cannot be written");
            assert_eq!(entry & !ADDRESS & !0x83, 0, "{entry:#x} has other bits");
            let from = from + (index << shift);
            let large = entry & 0x80 != 0;
            assert!(!large || shift == 21, "{entry:#x} is large at a level that need not have it");
            if large || shift == 12 {
                found.push((from, entry & ADDRESS, 1 << shift));
            } else {
                assert!(entry & ADDRESS < layout::LOW_MEMORY_END, "a table is outside of memory");
                tables.push((entry & ADDRESS, from, shift - 9));
            }
        }
    }
    found.sort_unstable();
    found
}

#[test]
fn the_first_four_gib_are_where_they_are_and_nothing_else_is() {
    let (memory, sregs) = entered();
    let mapped = mapped(&memory, sregs.cr3);
    let mut next = 0;
    for (from, to, size) in mapped {
        assert_eq!((from, to), (next, next));
        assert_eq!(to % size, 0);
        next += size;
    }
    assert_eq!(next, 4 * GIB);
}

#[test]
fn the_processor_is_in_64_bit_mode() {
    let (_, sregs) = entered();
    // Protection, paging, extended addresses; long mode, enabled and active; and no other feature.
    assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x8000_0011, 0x20, 0x500));
    assert_eq!((sregs.idt.base, sregs.idt.limit), (0, 0));
}

/// A descriptor's fields, by SDM volume 3, figure 3-8: base, limit with its granularity, type, S, DPL, P, AVL, L, D.
#[derive(Debug, PartialEq, Eq)]
struct Fields {
    base: u64,
    limit: u64,
    kind: u64,
    code_or_data: u64,
    dpl: u64,
    present: u64,
    long: u64,
    default: u64,
    granular: u64,
}

fn read(memory: &GuestMemoryMmap, sregs: &kvm_sregs, selector: u16) -> Fields {
    assert_eq!(selector & 7, 0, "of the global table, with all rights");
    let (index, limit) = (u64::from(selector), u64::from(sregs.gdt.limit));
    assert!(index + 7 <= limit, "behind the table's end");
    let raw = u64::from_le_bytes(bytes(memory, sregs.gdt.base + index));
    let bits = |from: u32, count: u32| raw >> from & ((1 << count) - 1);
    let granular = bits(55, 1);
    let limit = bits(0, 16) | bits(48, 4) << 16;
    Fields {
        base: bits(16, 24) | bits(56, 8) << 24,
        limit: if granular == 1 { limit << 12 | 0xfff } else { limit },
        kind: bits(40, 4),
        code_or_data: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        long: bits(53, 1),
        default: bits(54, 1),
        granular,
    }
}

fn of_register(register: &kvm_segment) -> Fields {
    assert_eq!(register.unusable, 0);
    Fields {
        base: register.base,
        limit: register.limit.into(),
        kind: register.type_.into(),
        code_or_data: register.s.into(),
        dpl: register.dpl.into(),
        present: register.present.into(),
        long: register.l.into(),
        default: register.db.into(),
        granular: register.g.into(),
    }
}

#[test]
fn segment_registers_are_as_their_descriptors_say() {
    let (memory, sregs) = entered();
    let data = [sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss];
    // `__BOOT_CS` and `__BOOT_DS`.
    assert_eq!(sregs.cs.selector, 0x10);
    assert!(data.iter().all(|register| register.selector == 0x18));
    for register in data.iter().chain([&sregs.cs, &sregs.tr]) {
        let found = read(&memory, &sregs, register.selector);
        assert_eq!(found, of_register(register), "{:#x}", register.selector);
        assert_eq!((found.present, found.dpl, found.base), (1, 0, 0));
    }
    let code = read(&memory, &sregs, 0x10);
    assert_eq!((code.kind, code.code_or_data, code.long, code.default), (0b1011, 1, 1, 0));
    let data = read(&memory, &sregs, 0x18);
    assert_eq!((data.kind, data.code_or_data, data.limit), (0b0011, 1, 0xffff_ffff));
    // A busy 64-bit task state, whose descriptor has 16 bytes.
    let task = read(&memory, &sregs, sregs.tr.selector);
    assert_eq!((task.kind, task.code_or_data, task.limit), (0b1011, 0, 0x67));
    let upper = u64::from(sregs.tr.selector) + 8;
    assert!(upper + 7 <= u64::from(sregs.gdt.limit));
    assert_eq!(bytes(&memory, sregs.gdt.base + upper), [0; 8]);
    // The first is none.
    assert_eq!(bytes(&memory, sregs.gdt.base), [0; 8]);
}
