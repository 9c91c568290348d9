//! Kernels that are made here, and what is in memory when they are entered, at the places that the kernel's own
//! documentation names (`Documentation/arch/x86/boot.rst` and `zero-page.rst`) and not by the types that wrote it.

mod bzimage;
mod cpu;
mod elf;
mod map;

use std::fs::File;
use std::io::Write;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, Entry, Kernel, layout, load};
use crate::memory::{Backing, map};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Fields of `struct boot_params`.
const RAMDISK_IMAGE: u64 = 0x218;
const RAMDISK_SIZE: u64 = 0x21c;

fn memory(size: u64) -> GuestMemoryMmap {
    map(&layout::memory(size), &Backing::Anonymous).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let memfd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(memfd);
    file.write_all(bytes).unwrap();
    file
}

/// A file of zeros.
fn zeros(length: u64) -> File {
    let file = file(&[]);
    file.set_len(length).unwrap();
    file
}

fn kernel(image: &[u8]) -> Kernel {
    Kernel { image: file(image), initrd: None, command_line: String::new() }
}

fn bytes<const LENGTH: usize>(memory: &GuestMemoryMmap, at: u64) -> [u8; LENGTH] {
    let mut bytes = [0; LENGTH];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

/// A field of `struct boot_params` with 32 bits.
fn param(memory: &GuestMemoryMmap, at: u64) -> u32 {
    u32::from_le_bytes(bytes(memory, layout::BOOT_PARAMS + at))
}

fn put(image: &mut [u8], at: usize, value: &[u8]) {
    image[at..at + value.len()].copy_from_slice(value);
}

/// The segment of memory that an initial RAM filesystem was put to.
fn initrd(memory: &GuestMemoryMmap) -> std::ops::Range<u64> {
    let start = u64::from(param(memory, RAMDISK_IMAGE));
    start..start + u64::from(param(memory, RAMDISK_SIZE))
}

#[test]
fn what_is_no_kernel_is_refused() {
    let wrong = [&b""[..], b"\x7f", b"\x7fEL", b"MZ", &[0; 4096], &[0xff; 4096]];
    for image in wrong {
        let error = load(&memory(64 * MIB), kernel(image)).unwrap_err();
        assert!(matches!(error, BootError::Kernel(super::KernelError::Unknown)), "{error}");
    }
}
