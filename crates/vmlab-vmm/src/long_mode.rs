//! Putting a virtual processor into 64-bit mode, with tables that are in its guest's memory.

use kvm_bindings::{kvm_segment, kvm_sregs};

// Control register bits: Intel SDM volume 3, 2.5, and 2.2.1 for EFER.
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// The bit of RFLAGS that is always set.
pub(crate) const RFLAGS_RESERVED: u64 = 1 << 1;

/// Bits of paging entries: Intel SDM volume 3, 4.5.
pub(crate) const PRESENT: u64 = 1 << 0;
/// See [`PRESENT`].
pub(crate) const WRITABLE: u64 = 1 << 1;
/// See [`PRESENT`].
pub(crate) const LARGE_PAGE: u64 = 1 << 7;

/// Where the tables are, as addresses and limits, and what is where in the descriptor table.
pub(crate) struct Tables {
    /// Selectors of the descriptors for code, for data, and for a task state.
    pub(crate) selectors: [u16; 3],
    /// The task state: a processor in long mode must have one.
    pub(crate) task: (u64, u32),
    /// The global descriptor table.
    pub(crate) gdt: (u64, u16),
    /// The interrupt descriptor table.
    pub(crate) idt: (u64, u16),
    /// The root of the page tables.
    pub(crate) pages: u64,
}

/// Has the processor in 64-bit mode with these tables.
pub(crate) fn enter(sregs: &mut kvm_sregs, tables: &Tables) {
    let [code, data, task] = tables.selectors;
    // Types: 11 is executable and readable, 3 is writable data, each accessed.
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: data, type_: 3, db: 1, ..flat };
    sregs.cs = kvm_segment { selector: code, type_: 11, l: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    let (base, limit) = tables.task;
    // Type 11 of a system segment is a busy 64-bit task state segment.
    sregs.tr =
        kvm_segment { selector: task, base, limit, type_: 11, present: 1, ..Default::default() };
    (sregs.gdt.base, sregs.gdt.limit) = tables.gdt;
    (sregs.idt.base, sregs.idt.limit) = tables.idt;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = tables.pages;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}
