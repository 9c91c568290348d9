//! What a kernel is told: `struct boot_params` (`Documentation/arch/x86/zero-page.rst`).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::super::layout;
use super::kernel::{COMMAND_LINE_MAX, Header, Loaded};

/// A boot loader without a number.
const LOADER: u8 = 0xff;

/// What an image's first sector ends with, and what its header begins with, for a kernel that has neither.
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = 0x5372_6448;
const VERSION: u16 = 0x020f;
const ALIGNMENT: u32 = 0x100_0000;

/// Kinds of memory.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// All of it, for a loaded kernel. `initrd` is where its initial RAM filesystem is, and how long.
pub(super) fn boot_params(
    loaded: &Loaded,
    initrd: Option<(u32, u32)>,
    memory: &GuestMemoryMmap,
) -> boot_params {
    let mut params = boot_params { acpi_rsdp_addr: layout::ACPI.start, ..Default::default() };
    match loaded.header {
        Some(Header { fields, more }) => (params.hdr, params._pad7) = (fields, more),
        None => {
            params.hdr = setup_header {
                boot_flag: BOOT_FLAG,
                header: MAGIC,
                version: VERSION,
                kernel_alignment: ALIGNMENT,
                cmdline_size: COMMAND_LINE_MAX as u32,
                ..Default::default()
            }
        }
    }
    params.hdr.type_of_loader = LOADER;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = initrd.unwrap_or_default();
    let map = memory_map(memory);
    params.e820_entries = map.len() as u8;
    for (entry, found) in params.e820_table.iter_mut().zip(map) {
        *entry = found;
    }
    params
}

/// The map of memory: what a PC has, and what is above its first megabyte.
pub(super) fn memory_map(memory: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    let entry = |addr: u64, end: u64, r#type| boot_e820_entry { addr, size: end - addr, r#type };
    let mut map = vec![
        entry(0, layout::LOW_MEMORY_END, E820_RAM),
        entry(layout::LOW_MEMORY_END, layout::HIGH_MEMORY, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_MEMORY);
        let end = region.start_addr().0 + region.len();
        if start < end {
            map.push(entry(start, end, E820_RAM));
        }
    }
    map
}
