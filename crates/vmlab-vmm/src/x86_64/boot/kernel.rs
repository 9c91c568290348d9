//! Kernel images: where their code goes, and where it is entered.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::mem::size_of;
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::super::layout;
use super::{BootError, elf};

/// Where an image has its setup header.
const HEADER: usize = 0x1f1;

/// How much longer than its known fields a header may be: as much as `struct boot_params` has room for.
const MORE: usize = 0x290 - HEADER - size_of::<setup_header>();

/// Where the header's own jump is, whose distance says how long it is.
const JUMP: usize = 0x201;

/// `HdrS`.
const MAGIC: u32 = 0x5372_6448;

/// The first version of the protocol that says whether a kernel has a 64-bit entry.
const VERSION_XLOADFLAGS: u16 = 0x020c;

/// `XLF_KERNEL_64`: there is an entry for 64-bit mode, at [`ENTRY_64`] from the beginning.
const XLF_KERNEL_64: u16 = 1 << 0;
const ENTRY_64: u64 = 0x200;

/// The bytes of a sector.
const SECTOR: u64 = 512;

/// How many setup sectors an image has that says nothing.
const SETUP_SECTORS: u8 = 4;

/// What kernels align themselves to, if they do not say.
const ALIGNMENT: u64 = 0x20_0000;

/// The highest address of an initial RAM filesystem, where a kernel does not say: what 32-bit code can reach.
const INITRD_MAX: u32 = 0x7fff_ffff;

/// The longest command line, where a kernel does not say: x86's `COMMAND_LINE_SIZE` less its NUL.
pub(super) const COMMAND_LINE_MAX: usize = 2047;

const PAGE: u64 = 4096;

/// Why an image is no kernel that can be started.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It cannot be read.
    #[error("the kernel cannot be read")]
    Read(#[source] io::Error),
    /// It is neither of the known kinds.
    #[error("the kernel is neither a 64-bit ELF file nor a bzImage")]
    Unknown,
    /// An ELF file with something wrong.
    #[error("the kernel's ELF file cannot be loaded: {0}")]
    Elf(&'static str),
    /// An image from before there was a 64-bit entry.
    #[error(
        "the kernel speaks version {}.{} of the boot protocol, and its 64-bit entry needs 2.12",
        version >> 8, version & 0xff
    )]
    Version {
        /// Its version.
        version: u16,
    },
    /// An image for 32-bit processors.
    #[error("the kernel has no 64-bit entry: is it one for 32-bit processors?")]
    No64,
    /// The header contradicts itself.
    #[error("the kernel's setup header makes no sense: {0}")]
    Header(&'static str),
}

/// A kernel that is in memory.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Its first instruction.
    pub(super) entry: u64,
    /// The end of what it uses before it looks at the memory map.
    end: u64,
    /// What its image says, where it is a bzImage.
    pub(super) header: Option<Header>,
}

/// Puts a kernel into memory below `end_of_memory`.
pub(super) fn load(
    memory: &GuestMemoryMmap,
    image: &mut File,
    end_of_memory: u64,
) -> Result<Loaded, BootError> {
    if !is_elf(image)? {
        return load_bzimage(memory, image, end_of_memory);
    }
    let (entry, end) = elf::load(memory, image, end_of_memory)?;
    Ok(Loaded { entry, end, header: None })
}

/// Whether an image is a kernel that can be started, as far as can be told without a VM.
///
/// # Errors
/// Why not.
pub fn check(image: &File) -> Result<(), KernelError> {
    match is_elf(image)? {
        true => elf::check(image),
        false => read_header(image).map(drop),
    }
}

fn is_elf(image: &File) -> Result<bool, KernelError> {
    let mut start = elf::MAGIC;
    image.read_exact_at(&mut start, 0).map_err(unknown_if_short)?;
    Ok(start == elf::MAGIC)
}

/// Whatever is too short for a header is no kernel.
fn unknown_if_short(error: io::Error) -> KernelError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => KernelError::Unknown,
        _ => KernelError::Read(error),
    }
}

/// The setup header of an image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    /// The fields that are known.
    pub(super) fields: setup_header,
    /// What later kernels have behind them.
    pub(super) more: [u8; MORE],
}

/// Reads the setup header of a bzImage, as much as it has of it.
fn read_header(image: &File) -> Result<Header, KernelError> {
    const KNOWN: usize = size_of::<setup_header>();
    let mut head = [0; HEADER + KNOWN + MORE];
    image.read_exact_at(&mut head, 0).map_err(unknown_if_short)?;
    // The header ends where its jump goes to. What is behind is code.
    let end = JUMP + 1 + usize::from(head[JUMP]);
    if end < head.len() {
        head[end..].fill(0);
    }
    let (known, behind) = head[HEADER..].split_at(KNOWN);
    let mut header = Header { fields: setup_header::default(), more: [0; MORE] };
    header.fields.as_mut_slice().copy_from_slice(known);
    header.more.copy_from_slice(behind);
    let setup_header { header: magic, version, xloadflags, .. } = header.fields;
    if magic != MAGIC {
        return Err(KernelError::Unknown);
    }
    if version < VERSION_XLOADFLAGS {
        return Err(KernelError::Version { version });
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::No64);
    }
    Ok(header)
}

fn load_bzimage(
    memory: &GuestMemoryMmap,
    image: &mut File,
    end_of_memory: u64,
) -> Result<Loaded, BootError> {
    let read = read_header(image)?;
    let header = read.fields;
    let sectors = match header.setup_sects {
        0 => SETUP_SECTORS,
        sectors => sectors,
    };
    let from = (u64::from(sectors) + 1) * SECTOR;
    let length = image.metadata().map_err(KernelError::Read)?.len();
    let size = length.checked_sub(from).filter(|size| *size > ENTRY_64);
    let size = size.ok_or(KernelError::Header("its code is behind its end"))?;
    // Where it wants to be, it need not move.
    let at = header.pref_address;
    let alignment = u64::from(header.kernel_alignment);
    if at < layout::HIGH_MEMORY || (alignment.is_power_of_two() && at % alignment != 0) {
        return Err(KernelError::Header("it is to be loaded where it cannot be").into());
    }
    let needs = size.max(u64::from(header.init_size));
    let end = at.checked_add(needs).filter(|end| *end <= end_of_memory);
    let end = end.ok_or(BootError::NoRoom { what: "the kernel", size: needs })?;
    image.seek(SeekFrom::Start(from)).map_err(KernelError::Read)?;
    let size = usize::try_from(size).map_err(|_| KernelError::Header("it is too large"))?;
    memory.read_exact_volatile_from(GuestAddress(at), image, size)?;
    Ok(Loaded { entry: at + ENTRY_64, end, header: Some(read) })
}

impl Loaded {
    /// The longest command line, in bytes.
    pub(super) fn most_command_line(&self) -> usize {
        let said = self.header.map_or(0, |header| header.fields.cmdline_size as usize);
        let room = (layout::LOW_MEMORY_END - layout::COMMAND_LINE - 1) as usize;
        if said == 0 { COMMAND_LINE_MAX } else { said.min(room) }
    }

    /// Reads an initial RAM filesystem to the highest place that the kernel can reach. Returns where it is and how
    /// long.
    pub(super) fn place_initrd(
        &self,
        memory: &GuestMemoryMmap,
        file: &mut File,
        end_of_memory: u64,
    ) -> Result<(u32, u32), BootError> {
        let size = file.metadata().map_err(BootError::Initrd)?.len();
        let no_room = || BootError::NoRoom { what: "the initial RAM filesystem", size };
        let highest = match self.header.map_or(0, |header| header.fields.initrd_addr_max) {
            0 => INITRD_MAX,
            highest => highest,
        };
        let end = end_of_memory.min(u64::from(highest) + 1);
        let at = end.checked_sub(size).ok_or_else(no_room)? & !(PAGE - 1);
        // A kernel that unpacks itself may choose another place, which it looks for behind this end.
        if at < self.end.next_multiple_of(ALIGNMENT) {
            return Err(no_room());
        }
        file.rewind().map_err(BootError::Initrd)?;
        let length = usize::try_from(size).map_err(|_| no_room())?;
        memory.read_exact_volatile_from(GuestAddress(at), file, length)?;
        let narrow = |number: u64| u32::try_from(number).map_err(|_| no_room());
        Ok((narrow(at)?, narrow(size)?))
    }
}
