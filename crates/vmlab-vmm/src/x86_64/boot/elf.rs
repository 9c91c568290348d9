//! Kernels as ELF files, `vmlinux`: their segments go to the physical addresses that they name.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::mem::{offset_of, size_of};
use std::os::unix::fs::FileExt;

use libc::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, EM_X86_64, Elf64_Ehdr, Elf64_Phdr, PT_LOAD,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::layout;
use super::BootError;
use super::kernel::KernelError;

/// What the file begins with.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

/// The most program headers that are believed. Kernels have five.
const MAX_HEADERS: u16 = 64;

/// A part of the file that goes to memory.
struct Segment {
    offset: u64,
    at: u64,
    /// Bytes that the file has of it. The others are zero, as all memory is.
    in_file: u64,
    end: u64,
}

/// Puts a kernel into memory below `end_of_memory`. Returns where it is entered, and the end of what it takes.
///
/// Whatever is below [`layout::HIGH_MEMORY`] is the monitor's, and no segment may be there.
pub(super) fn load(
    memory: &GuestMemoryMmap,
    image: &mut File,
    end_of_memory: u64,
) -> Result<(u64, u64), BootError> {
    let length = image.metadata().map_err(KernelError::Read)?.len();
    let (entry, mut segments) = read_headers(image, length, end_of_memory)?;
    segments.sort_by_key(|segment| segment.at);
    if segments.windows(2).any(|pair| pair[0].end > pair[1].at) {
        return Err(wrong("two of its segments are at the same place").into());
    }
    let has_entry = |segment: &Segment| (segment.at..segment.at + segment.in_file).contains(&entry);
    if !segments.iter().any(has_entry) {
        return Err(wrong("it is to be entered where nothing of it is").into());
    }
    for segment in &segments {
        image.seek(SeekFrom::Start(segment.offset)).map_err(KernelError::Read)?;
        let count = usize::try_from(segment.in_file).map_err(|_| wrong("it is too large"))?;
        memory.read_exact_volatile_from(GuestAddress(segment.at), image, count)?;
    }
    Ok((entry, segments.last().map_or(0, |last| last.end)))
}

/// Whether a file has code for this architecture.
pub(super) fn check(image: &File) -> Result<(), KernelError> {
    read_header(image).map(drop)
}

fn read_header(image: &File) -> Result<[u8; size_of::<Elf64_Ehdr>()], KernelError> {
    let header: [u8; size_of::<Elf64_Ehdr>()] = read(image, 0)?;
    if header[EI_CLASS] != ELFCLASS64 || header[EI_DATA] != ELFDATA2LSB {
        return Err(wrong("it is not one for 64-bit processors of this byte order"));
    }
    if u16::from_le_bytes(field(&header, offset_of!(Elf64_Ehdr, e_machine))) != EM_X86_64 {
        return Err(wrong("it is for another architecture"));
    }
    Ok(header)
}

/// The entry and the segments, each of them within the file and within memory.
fn read_headers(
    image: &File,
    length: u64,
    end_of_memory: u64,
) -> Result<(u64, Vec<Segment>), BootError> {
    let header = read_header(image)?;
    let entry = u64::from_le_bytes(field(&header, offset_of!(Elf64_Ehdr, e_entry)));
    let table = u64::from_le_bytes(field(&header, offset_of!(Elf64_Ehdr, e_phoff)));
    let size = u16::from_le_bytes(field(&header, offset_of!(Elf64_Ehdr, e_phentsize)));
    let count = u16::from_le_bytes(field(&header, offset_of!(Elf64_Ehdr, e_phnum)));
    if usize::from(size) != size_of::<Elf64_Phdr>() || count > MAX_HEADERS {
        return Err(wrong("its program headers have another size, or are too many").into());
    }
    let mut segments = Vec::new();
    for index in 0..count {
        let at = table.checked_add(u64::from(index) * u64::from(size));
        let header: [u8; size_of::<Elf64_Phdr>()] = read(image, at.ok_or_else(|| wrong(CUT_OFF))?)?;
        if u32::from_le_bytes(field(&header, offset_of!(Elf64_Phdr, p_type))) != PT_LOAD {
            continue;
        }
        let number = |at| u64::from_le_bytes(field(&header, at));
        let (offset, at) =
            (number(offset_of!(Elf64_Phdr, p_offset)), number(offset_of!(Elf64_Phdr, p_paddr)));
        let in_file = number(offset_of!(Elf64_Phdr, p_filesz));
        let in_memory = number(offset_of!(Elf64_Phdr, p_memsz));
        if in_memory == 0 && in_file == 0 {
            continue;
        }
        if in_file > in_memory {
            return Err(wrong("the file has more of a segment than memory").into());
        }
        if offset.checked_add(in_file).is_none_or(|end| end > length) {
            return Err(wrong(CUT_OFF).into());
        }
        if at < layout::HIGH_MEMORY {
            return Err(wrong("it is to be where what it is told is").into());
        }
        let end = at.checked_add(in_memory).filter(|end| *end <= end_of_memory);
        let end =
            end.ok_or(BootError::NoRoom { what: "a segment of the kernel", size: in_memory })?;
        segments.push(Segment { offset, at, in_file, end });
    }
    Ok((entry, segments))
}

const CUT_OFF: &str = "it is cut off";

fn wrong(what: &'static str) -> KernelError {
    KernelError::Elf(what)
}

fn read<const LENGTH: usize>(image: &File, at: u64) -> Result<[u8; LENGTH], KernelError> {
    let mut bytes = [0; LENGTH];
    image.read_exact_at(&mut bytes, at).map_err(|error| match error.kind() {
        // An offset that no file can have is one behind its end, too.
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => wrong(CUT_OFF),
        _ => KernelError::Read(error),
    })?;
    Ok(bytes)
}

/// The bytes of a field that is within a header.
fn field<const LENGTH: usize>(header: &[u8], at: usize) -> [u8; LENGTH] {
    header[at..].first_chunk().copied().unwrap_or([0; LENGTH])
}
