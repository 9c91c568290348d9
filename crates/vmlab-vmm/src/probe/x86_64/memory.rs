//! The guest's memory: an anonymous mapping.

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::io;
use std::ptr::NonNull;

/// Zeroed memory at a fixed host address, unmapped when dropped.
pub(super) struct Memory {
    start: NonNull<c_void>,
    size: usize,
}

impl Memory {
    /// Maps `size` bytes, a multiple of the page size.
    pub(super) fn new(size: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: with a null hint and no MAP_FIXED, no existing mapping is touched.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), size, protection, MapFlags::PRIVATE) }?;
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, size })
    }

    /// The address for KVM.
    pub(super) fn host_address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// The content. Not to be held while a vCPU runs, which changes it.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `new` mapped `size` zeroed, writable bytes, which only this value refers to, and
        // the exclusive borrow of it lasts as long as the slice.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.size) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: this is the mapping of `new`, and no slice of it outlives the value.
        let result = unsafe { munmap(self.start.as_ptr(), self.size) };
        debug_assert!(result.is_ok(), "munmap of our own mapping: {result:?}");
    }
}
