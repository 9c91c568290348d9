//! What the processor is in when a kernel is entered: 64-bit mode, with all of the first 4 GiB where it is.

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::super::layout;
use crate::long_mode::{self, LARGE_PAGE, PRESENT, Tables, WRITABLE};

/// `__BOOT_CS` and `__BOOT_DS`, and a task state that the processor must have.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
const TASK_LIMIT: u32 = 0x67;

/// Descriptors as above: Intel SDM volume 3, 3.4.5. The first two are empty, as is what follows the task state,
/// which has 16 bytes.
const DESCRIPTORS: [u64; 6] =
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0];

const PAGE: u64 = 4096;
const LARGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;
/// The GiB that are mapped.
const MAPPED: u64 = 4;

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
        put(second + page * 8, (page * LARGE) | PRESENT | WRITABLE | LARGE_PAGE)?;
    }
    Ok(())
}

/// Has the processor in 64-bit mode with these tables.
pub(in super::super) fn enter_long_mode(sregs: &mut kvm_sregs) {
    let tables = Tables {
        selectors: [CODE, DATA, TASK],
        task: (0, TASK_LIMIT),
        gdt: (layout::GDT, (DESCRIPTORS.len() * 8 - 1) as u16),
        // There are no interrupts before the kernel has its own table.
        idt: (0, 0),
        pages: layout::PAGE_TABLES,
    };
    long_mode::enter(sregs, &tables);
}
