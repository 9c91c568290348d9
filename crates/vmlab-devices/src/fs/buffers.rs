//! A request's bytes and a reply's room in the guest's memory. Data goes straight between there and files.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vmlab_fuse::{ReplyBytes, RequestBytes, WriteAt};

use crate::chain::Part;

/// What the guest asks.
pub(super) struct Request<'a, 'm>(pub(super) &'a Part<'m>);

/// Where the reply goes.
pub(super) struct Reply<'a, 'm>(pub(super) &'a mut Part<'m>);

/// The most buffers of one system call: `IOV_MAX` of `linux/uio.h`, UIO_MAXIOV.
const MAX_BUFFERS: usize = libc::UIO_MAXIOV as usize;

impl RequestBytes for Request<'_, '_> {
    fn len(&self) -> usize {
        self.0.len
    }

    fn read(&self, at: usize, buffer: &mut [u8]) -> usize {
        self.0.read(at, buffer)
    }

    fn write_to(
        &self,
        at: usize,
        file: BorrowedFd<'_>,
        to: WriteAt,
        count: usize,
    ) -> io::Result<usize> {
        let (offset, flags) = match to {
            WriteAt::Offset(offset) => (offset, 0),
            WriteAt::End => (0, libc::RWF_APPEND),
        };
        transfer(self.0.range(at, count), offset, |iov, count, offset| {
            // SAFETY: the buffers are mapped guest memory, which the `Part` keeps borrowed; the kernel
            // only reads from them, and copes with a guest that writes to them at the same time.
            unsafe { libc::pwritev2(file.as_raw_fd(), iov, count, offset, flags) }
        })
    }
}

impl ReplyBytes for Reply<'_, '_> {
    fn capacity(&self) -> usize {
        self.0.len
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.0.write(at, bytes);
    }

    fn read_from(
        &mut self,
        at: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        count: usize,
    ) -> io::Result<usize> {
        transfer(self.0.range(at, count), offset, |iov, count, offset| {
            // SAFETY: the buffers are mapped guest memory, which the `Part` keeps borrowed and of which
            // this process makes no Rust references; the kernel writes inside of them only.
            unsafe { libc::preadv(file.as_raw_fd(), iov, count, offset) }
        })
    }
}

/// Moves bytes between buffers and a place in a file, until one of them ends.
fn transfer<'m>(
    mut slices: impl Iterator<Item = VolatileSlice<'m>>,
    offset: u64,
    mut call: impl FnMut(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> io::Result<usize> {
    let mut done = 0;
    loop {
        let iov: Vec<libc::iovec> = slices.by_ref().take(MAX_BUFFERS).map(iovec).collect();
        let wanted: usize = iov.iter().map(|buffer| buffer.iov_len).sum();
        if wanted == 0 {
            return Ok(done);
        }
        let place = offset.checked_add(done as u64).and_then(|place| i64::try_from(place).ok());
        let place = place.ok_or(io::ErrorKind::InvalidInput)?;
        let moved = loop {
            match usize::try_from(call(iov.as_ptr(), iov.len() as libc::c_int, place)) {
                Ok(moved) => break moved,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return if done == 0 { Err(error) } else { Ok(done) };
                    }
                }
            }
        };
        done += moved;
        if moved < wanted {
            return Ok(done);
        }
    }
}

fn iovec(slice: VolatileSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}
