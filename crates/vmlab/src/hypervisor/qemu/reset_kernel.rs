//! The kernel that QEMU is given for a VM that goes on from a snapshot.
//!
//! Such a VM needs none. But on a board without a reset register, a guest that resets itself jumps into the
//! firmware, which enters the kernel that QEMU names, and would halt for ever if there were none. What is in
//! memory there is the guest's own kernel, which has run: entered a second time, it faults beyond telling,
//! as in a VM that booted, and so the machine is reset. The kernel given here has no content but where that
//! is; the real one would be read as a whole at each start.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};

/// Lengths of an ELF header and of a program header of 64 bits, in bytes.
const HEADER: u16 = 64;
const PROGRAM_HEADER: u16 = 56;

/// `XEN_ELFNOTE_PHYS32_ENTRY` of xen/interface/elfnote.h: the note by which a kernel is entered directly.
const PHYS32_ENTRY: u32 = 18;

/// Code that is never run: QEMU wants a segment.
pub(super) const NO_CODE: [u8; 4] = [0xf4; 4];

/// A kernel that is entered at this address, where its code is, in a file in memory.
pub(super) fn file(entry: u32, code: &[u8]) -> io::Result<Arc<File>> {
    let mut file = File::from(memfd_create("vmlab-reset", MemfdFlags::CLOEXEC)?);
    file.write_all(&image(entry, code))?;
    Ok(Arc::new(file))
}

/// An ELF file of 64 bits with one segment of code and one note.
fn image(entry: u32, code: &[u8]) -> Vec<u8> {
    let note: Vec<u8> = [4, 4, PHYS32_ENTRY]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .chain(*b"Xen\0")
        .chain(entry.to_le_bytes())
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
    longs(&mut image, &[u64::from(entry), u64::from(HEADER), 0]);
    words(&mut image, &[0]);
    halves(&mut image, &[HEADER, PROGRAM_HEADER, 2, 0, 0, 0]);
    let mut segment = |kind: u32, at: u64, address: u64, length: u64| {
        // Readable and executable.
        words(&mut image, &[kind, 5]);
        longs(&mut image, &[at, address, address, length, length, 4]);
    };
    // PT_LOAD and PT_NOTE.
    segment(1, code_at, u64::from(entry), code.len() as u64);
    segment(4, note_at, 0, note.len() as u64);
    image.extend(note);
    image.extend(code);
    image
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmlab_artifacts::boot_image::pvh_entry;

    #[test]
    fn it_can_be_entered_directly() {
        let image = image(0x123_4560, &NO_CODE);
        assert_eq!(pvh_entry(&image), Some(0x123_4560));
        assert!(image.ends_with(&NO_CODE));
    }
}
