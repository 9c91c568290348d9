//! Uncompressed kernels as ELF files: `vmlinux`.

use object::elf::{self, FileHeader64};
use object::endian::Endianness;
use object::read::ReadRef;
use object::read::elf::{FileHeader, ProgramHeader};

use super::{BootFormat, Defect, Header, Payload};
use crate::Arch;

/// The ELF note that gives the PVH entry point, and its owner
/// (`include/xen/interface/elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const XEN_NOTE_OWNER: &[u8] = b"Xen";

/// The largest segment of notes that is read, in bytes. Kernels have some hundred.
const NOTES_LEN_MAX: u64 = 1 << 20;

/// Kernels are linked into the upper half of the address space, programs are not.
const UPPER_HALF: u64 = 1 << 63;

/// The lengths of the 64-bit ELF header and of one program header.
const HEADER_LEN: u64 = size_of::<FileHeader64<Endianness>>() as u64;

/// Validates a `vmlinux`.
pub(super) fn parse<'data, R: ReadRef<'data>>(data: R) -> Result<Header, Defect> {
    let have = data.len().unwrap_or(0);
    let ident = data.read_bytes_at(0, have.min(HEADER_LEN)).unwrap_or(&[]);
    let machine = machine_name(ident);
    match ident.get(4).copied().map(elf::FileClass) {
        Some(elf::ELFCLASS32) => {
            return Err(Defect::NotAKernel(format!("a 32-bit ELF file for {machine}")));
        }
        Some(elf::ELFCLASS64) | None => {}
        Some(other) => {
            return Err(Defect::BadField { field: "EI_CLASS", value: u64::from(other.0) });
        }
    }
    if have < HEADER_LEN {
        return Err(Defect::Truncated { part: "the ELF header", need: HEADER_LEN, have });
    }
    let bad = |field, value: u64| Defect::BadField { field, value };
    let header = FileHeader64::<Endianness>::parse(data)
        .map_err(|_| bad("EI_DATA or EI_VERSION", u64::from(ident[5])))?;
    let endian = header.endian().map_err(|_| bad("EI_DATA", u64::from(ident[5])))?;

    let arch = match (header.e_machine(endian), endian) {
        (elf::EM_X86_64, Endianness::Little) => Arch::X86_64,
        (elf::EM_AARCH64, Endianness::Little) => Arch::Aarch64,
        _ => return Err(Defect::NotAKernel(format!("an ELF file for {machine}"))),
    };
    match header.e_type(endian) {
        elf::ET_EXEC | elf::ET_DYN => {}
        elf::ET_REL => return Err(Defect::NotAKernel("an object file or kernel module".into())),
        elf::ET_CORE => return Err(Defect::NotAKernel("a core dump".into())),
        other => return Err(bad("e_type", u64::from(other.0))),
    }

    let table_end = u64::from(header.e_phnum(endian)) * u64::from(header.e_phentsize(endian))
        + header.e_phoff(endian).min(u64::from(u32::MAX) << 16);
    if table_end > have {
        return Err(Defect::Truncated { part: "the program header table", need: table_end, have });
    }
    let segments = header
        .program_headers(endian, data)
        .map_err(|_| bad("e_phoff or e_phentsize", header.e_phoff(endian)))?;
    if segments.iter().any(|s| s.p_type(endian) == elf::PT_INTERP) {
        return Err(Defect::NotAKernel("an ordinary program".into()));
    }
    let loaded = || segments.iter().filter(|s| s.p_type(endian) == elf::PT_LOAD);
    for segment in loaded() {
        let need = segment.p_offset(endian).saturating_add(segment.p_filesz(endian));
        if need > have {
            return Err(Defect::Truncated { part: "a segment to load", need, have });
        }
    }

    let pvh_entry = if arch == Arch::X86_64 { pvh_entry(segments, endian, data) } else { None };
    if pvh_entry.is_none() && !loaded().any(|s| s.p_vaddr(endian) >= UPPER_HALF) {
        return Err(Defect::NotAKernel("an ordinary program".into()));
    }
    Ok(Header {
        arch,
        format: BootFormat::Elf,
        version: None,
        pvh_entry,
        payload: Payload::Plain,
        banner_range: Some(0..have),
    })
}

/// The PVH entry point by the kernel's Xen note: an address of 4 or 8 bytes below 4 GiB.
fn pvh_entry<'data, R: ReadRef<'data>>(
    segments: &[elf::ProgramHeader64<Endianness>],
    endian: Endianness,
    data: R,
) -> Option<u32> {
    for segment in segments {
        if segment.p_type(endian) != elf::PT_NOTE || segment.p_filesz(endian) > NOTES_LEN_MAX {
            continue;
        }
        let Ok(Some(mut notes)) = segment.notes(endian, data) else { continue };
        while let Ok(Some(note)) = notes.next() {
            if note.name() != XEN_NOTE_OWNER || note.n_type(endian).0 != XEN_ELFNOTE_PHYS32_ENTRY {
                continue;
            }
            let address = match *note.desc() {
                [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => u32::from_le_bytes([a, b, c, d]),
                _ => continue,
            };
            return Some(address);
        }
    }
    None
}

/// What the file says that it is for, in words. `head` is the beginning of the file.
fn machine_name(head: &[u8]) -> String {
    let Some(&[low, high]) = head.get(18..20) else { return "an unknown machine".to_owned() };
    let big_endian = head[5] == elf::ELFDATA2MSB.0;
    let machine =
        if big_endian { u16::from_be_bytes([low, high]) } else { u16::from_le_bytes([low, high]) };
    let name = match elf::Machine(machine) {
        elf::EM_386 => "32-bit x86",
        elf::EM_X86_64 => "x86_64",
        elf::EM_ARM => "32-bit ARM",
        elf::EM_AARCH64 => "aarch64",
        elf::EM_RISCV => "RISC-V",
        elf::EM_PPC => "32-bit PowerPC",
        elf::EM_PPC64 => "64-bit PowerPC",
        elf::EM_S390 => "s390",
        elf::EM_MIPS => "MIPS",
        elf::EM_LOONGARCH => "LoongArch",
        elf::EM_SPARCV9 => "SPARC",
        _ => return format!("machine {machine}"),
    };
    if big_endian { format!("big-endian {name}") } else { name.to_owned() }
}
