//! A request's bytes and a reply's room in the guest's memory. Data goes straight between there and files.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vmlab_fuse::{ReplyBytes, RequestBytes, WriteAt};

use crate::chain::Part;
use crate::transfer::{may_wait, moved, transfer};

/// What the guest asks.
pub(super) struct Request<'a, 'm>(pub(super) &'a Part<'m>);

/// Where the reply goes.
pub(super) struct Reply<'a, 'm> {
    pub(super) room: &'a mut Part<'m>,
    /// Called before a file's content is waited for.
    pub(super) before_waiting: &'a mut dyn FnMut(),
}

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
        let (done, end) = transfer(self.0.range(at, count), offset, |iov, offset| {
            let (fd, count) = (file.as_raw_fd(), iov.len() as libc::c_int);
            // SAFETY: the buffers are mapped guest memory, which the `Part` keeps borrowed; the kernel
            // only reads from them, and copes with a guest that writes to them at the same time.
            moved(unsafe { libc::pwritev2(fd, iov.as_ptr(), count, offset, flags) })
        });
        // What was written is written: the guest meets the error when it goes on.
        if done == 0 { end.map(|()| 0) } else { Ok(done) }
    }
}

impl ReplyBytes for Reply<'_, '_> {
    fn capacity(&self) -> usize {
        self.room.len
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.room.write(at, bytes);
    }

    fn read_from(
        &mut self,
        at: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        count: usize,
    ) -> io::Result<usize> {
        let mut flags = libc::RWF_NOWAIT;
        let (done, end) = transfer(self.room.range(at, count), offset, |iov, offset| {
            loop {
                let (fd, count) = (file.as_raw_fd(), iov.len() as libc::c_int);
                // SAFETY: the buffers are mapped guest memory, which the `Part` keeps borrowed and of which
                // this process makes no Rust references; the kernel writes inside of them only.
                let result = unsafe { libc::preadv2(fd, iov.as_ptr(), count, offset, flags) };
                match moved(result) {
                    // It would have to wait, or the filesystem cannot tell.
                    Err(error) if flags != 0 && may_wait(&error) => {
                        flags = 0;
                        (self.before_waiting)();
                    }
                    other => return other,
                }
            }
        });
        end.map(|()| done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::VolatileSlice;

    /// Reads from a file into pieces of 7 bytes. Returns what was read, and how often it was to be waited.
    fn read(file: &std::fs::File, count: usize) -> (Vec<u8>, u32) {
        use std::os::fd::AsFd;
        let mut bytes = vec![0; count];
        let slices = bytes.chunks_mut(7).map(VolatileSlice::from).collect();
        let mut waits = 0;
        let mut reply =
            Reply { room: &mut Part { slices, len: count }, before_waiting: &mut || waits += 1 };
        let done = reply.read_from(0, file.as_fd(), 0, count).unwrap();
        bytes.truncate(done);
        (bytes, waits)
    }

    #[test]
    fn others_are_let_through_before_a_read_waits() {
        // Files of /proc have no page cache, so that no read of them is sure not to wait.
        let version = std::fs::read("/proc/version").unwrap();
        let (content, waits) = read(&std::fs::File::open("/proc/version").unwrap(), version.len());
        assert_eq!((content, waits), (version, 1));
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, &[7; 3000]).unwrap();
        let (content, waits) = read(&file, 4000);
        assert_eq!(content, [7; 3000]);
        // Whether a filesystem can tell that it need not wait is its own affair.
        assert!(waits <= 1, "{waits}");
    }
}
