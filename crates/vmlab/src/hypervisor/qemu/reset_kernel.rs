//! A kernel that does nothing but reset the machine.
//!
//! On a board without a reset register, a guest that resets itself may jump into the firmware, which then
//! starts the kernel that QEMU was given. A VM that goes on from a snapshot needs none, but a firmware
//! without one would halt for ever.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};

/// Where it is loaded.
const ADDRESS: u32 = 0x10_0000;

/// Lengths of an ELF header and of a program header of 64 bits, in bytes.
const HEADER: u16 = 64;
const PROGRAM_HEADER: u16 = 56;

/// `XEN_ELFNOTE_PHYS32_ENTRY` of xen/interface/elfnote.h: the note by which a kernel is entered directly.
const PHYS32_ENTRY: u32 = 18;

/// `lidt` of a table without entries, `int3`: a fault that cannot be told, and so a reset. The table's
/// description, six zeros, comes after the eight bytes of code.
const CODE: [u8; 14] = {
    let [a, b, c, d] = (ADDRESS + 8).to_le_bytes();
    [0x0f, 0x01, 0x1d, a, b, c, d, 0xcc, 0, 0, 0, 0, 0, 0]
};

/// The kernel, in memory.
pub(super) fn file() -> io::Result<Arc<File>> {
    let mut file = File::from(memfd_create("vmlab-reset", MemfdFlags::CLOEXEC)?);
    file.write_all(&image())?;
    Ok(Arc::new(file))
}

/// An ELF file of 64 bits with one segment of code and one note.
fn image() -> Vec<u8> {
    let note: Vec<u8> = [4, 4, PHYS32_ENTRY]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .chain(*b"Xen\0")
        .chain(ADDRESS.to_le_bytes())
        .collect();
    let note_at = u64::from(HEADER + 2 * PROGRAM_HEADER);
    let code_at = note_at + note.len() as u64;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    let halves = |image: &mut Vec<u8>, values: &[u16]| {
        image.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    };
    let words = |image: &mut Vec<u8>, values: &[u32]| {
        image.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    };
    let longs = |image: &mut Vec<u8>, values: &[u64]| {
        image.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    };
    // ET_EXEC, EM_X86_64, version 1; entry, program headers behind this one, no sections.
    halves(&mut image, &[2, 62]);
    words(&mut image, &[1]);
    longs(&mut image, &[u64::from(ADDRESS), u64::from(HEADER), 0]);
    words(&mut image, &[0]);
    halves(&mut image, &[HEADER, PROGRAM_HEADER, 2, 0, 0, 0]);
    let mut segment = |kind: u32, at: u64, address: u64, length: u64| {
        // Readable and executable.
        words(&mut image, &[kind, 5]);
        longs(&mut image, &[at, address, address, length, length, 4]);
    };
    // PT_LOAD and PT_NOTE.
    segment(1, code_at, u64::from(ADDRESS), CODE.len() as u64);
    segment(4, note_at, 0, note.len() as u64);
    image.extend(note);
    image.extend(CODE);
    image
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmlab_artifacts::boot_image::pvh_entry;

    #[test]
    fn it_can_be_entered_directly() {
        let image = image();
        assert_eq!(pvh_entry(&image), Some(ADDRESS));
        assert!(image.ends_with(&CODE));
    }
}
