//! What the processor is in when a kernel is entered: 64-bit mode, with all of the first 4 GiB where it is.

use kvm_bindings::{kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::super::layout;

/// `__BOOT_CS` and `__BOOT_DS`, and a task state that the processor must have.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Descriptors as above: Intel SDM volume 3, 3.4.5. The first two are empty, as is what follows the task state,
/// which has 16 bytes.
const DESCRIPTORS: [u64; 6] =
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0];

/// Bits of paging entries: Intel SDM volume 3, 4.5.
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;

const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;
/// The GiB that are mapped.
const MAPPED: u64 = 4;

// Bits of control registers: Intel SDM volume 3, 2.5, and 2.2.1 for EFER.
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Writes the descriptors and page tables.
pub(super) fn write(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at));
    for (at, descriptor) in (layout::GDT..).step_by(8).zip(DESCRIPTORS) {
        put(at, descriptor)?;
    }
    // What no entry below maps is not mapped, whatever was there.
    memory.write_slice(&[0; 2 * PAGE as usize], GuestAddress(layout::PAGE_TABLES))?;
    let third = layout::PAGE_TABLES + PAGE;
    let second = third + PAGE;
    put(layout::PAGE_TABLES, third | PRESENT | WRITABLE)?;
    for gib in 0..MAPPED {
        put(third + gib * 8, (second + gib * PAGE) | PRESENT | WRITABLE)?;
    }
    for page in 0..MAPPED * ENTRIES {
        put(second + page * 8, (page * LARGE_PAGE) | PRESENT | WRITABLE | LARGE)?;
    }
    Ok(())
}

/// Has the processor in 64-bit mode with these tables.
pub(in super::super) fn enter_long_mode(sregs: &mut kvm_sregs) {
    // Types: 11 is executable and readable, 3 is writable data, each accessed.
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: DATA, type_: 3, db: 1, ..flat };
    sregs.cs = kvm_segment { selector: CODE, type_: 11, l: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // Type 11 of a system segment is a busy 64-bit task state.
    sregs.tr =
        kvm_segment { selector: TASK, limit: 0x67, type_: 11, present: 1, ..Default::default() };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (DESCRIPTORS.len() * 8 - 1) as u16;
    // There are no interrupts before the kernel has its own table.
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}
