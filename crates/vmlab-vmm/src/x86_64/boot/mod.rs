//! A kernel in a guest's memory, as Linux's 64-bit boot protocol has it (`Documentation/arch/x86/boot.rst`).

mod elf;
mod kernel;
mod params;
mod tables;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::layout;
pub use kernel::{KernelError, check};
pub(super) use tables::enter_long_mode;

/// The files that a guest boots from.
#[derive(Debug)]
pub struct Kernel {
    /// A `vmlinux` or a `bzImage`.
    pub image: File,
    /// What the kernel unpacks to its first root.
    pub initrd: Option<File>,
    /// Its arguments, without a NUL.
    pub command_line: String,
}

/// Why a kernel cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The image.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initial RAM filesystem.
    #[error("the initial RAM filesystem cannot be read")]
    Initrd(#[source] io::Error),
    /// There is no room.
    #[error("{what} of {size} bytes does not fit into the guest's memory")]
    NoRoom {
        /// What it is.
        what: &'static str,
        /// How large it is.
        size: u64,
    },
    /// The command line is too long.
    #[error("the kernel's command line has {length} bytes, and its kernel takes {most}")]
    CommandLine {
        /// Its length.
        length: usize,
        /// The longest that there may be.
        most: usize,
    },
    /// The kernel would take the command line's beginning for all of it.
    #[error("the kernel's command line has a NUL in it, where it would end")]
    Nul,
    /// A part of the guest's memory that should be there is not.
    #[error("the guest's memory cannot be written")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Where the processor enters a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its first instruction.
    pub(super) instruction: u64,
}

/// Puts a kernel and all that it is told into memory, which is zero. The ACPI tables are somebody else's to write.
pub(super) fn load(memory: &GuestMemoryMmap, mut boot: Kernel) -> Result<Entry, BootError> {
    let end_of_memory = low_memory_end(memory);
    let loaded = kernel::load(memory, &mut boot.image, end_of_memory)?;
    let most = loaded.most_command_line();
    let line = boot.command_line.as_bytes();
    if line.len() > most {
        return Err(BootError::CommandLine { length: line.len(), most });
    }
    if line.contains(&0) {
        return Err(BootError::Nul);
    }
    memory.write_slice(line, GuestAddress(layout::COMMAND_LINE))?;
    memory.write_obj(0u8, GuestAddress(layout::COMMAND_LINE + line.len() as u64))?;
    let initrd = boot.initrd.as_mut().map(|file| loaded.place_initrd(memory, file, end_of_memory));
    let initrd = initrd.transpose()?;
    let params = params::boot_params(&loaded, initrd, memory);
    memory.write_obj(params, GuestAddress(layout::BOOT_PARAMS))?;
    tables::write(memory)?;
    Ok(Entry { instruction: loaded.entry })
}

/// The end of memory below the hole.
fn low_memory_end(memory: &GuestMemoryMmap) -> u64 {
    use vm_memory::GuestMemoryRegion;
    let ends = memory.iter().map(|region| region.start_addr().0 + region.len());
    ends.filter(|end| *end <= layout::HOLE.start).max().unwrap_or(0)
}
