//! A request's bytes and a reply's room in the guest's memory. Data goes straight between there and files.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vmlab_fuse::{ReplyBytes, RequestBytes, WriteAt};

use crate::chain::Part;

/// What the guest asks.
pub(super) struct Request<'a, 'm>(pub(super) &'a Part<'m>);

/// Where the reply goes.
pub(super) struct Reply<'a, 'm> {
    pub(super) room: &'a mut Part<'m>,
    /// Called before a file's content is waited for.
    pub(super) before_waiting: &'a mut dyn FnMut(),
}

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

/// Moves bytes between buffers and a place in a file, until one of them ends. A call may move less than that:
/// the next one tells whether it was the end or an error.
///
/// Returns how many were moved, and with what it ended.
fn transfer<'m>(
    slices: impl Iterator<Item = VolatileSlice<'m>>,
    offset: u64,
    mut call: impl FnMut(&[libc::iovec], libc::off_t) -> io::Result<usize>,
) -> (usize, io::Result<()>) {
    let mut done = 0;
    let mut left = slices.map(iovec).peekable();
    while left.peek().is_some() {
        let mut iov: Vec<libc::iovec> = left.by_ref().take(MAX_BUFFERS).collect();
        let mut first = 0;
        while first < iov.len() {
            let place = offset.checked_add(done as u64).and_then(|place| i64::try_from(place).ok());
            let Some(place) = place else { return (done, Err(io::ErrorKind::InvalidInput.into())) };
            match call(&iov[first..], place) {
                Ok(0) => return (done, Ok(())),
                Ok(moved) => {
                    done += moved;
                    first += advance(&mut iov[first..], moved);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (done, Err(error)),
            }
        }
    }
    (done, Ok(()))
}

/// Whether a read that must not wait failed because of that.
fn may_wait(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EOPNOTSUPP))
}

/// What a system call says that it has moved.
fn moved(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Takes `count` bytes from the beginning of buffers. Returns how many of them are used up.
fn advance(buffers: &mut [libc::iovec], mut count: usize) -> usize {
    for (used, buffer) in buffers.iter_mut().enumerate() {
        if count < buffer.iov_len {
            buffer.iov_base = buffer.iov_base.wrapping_byte_add(count);
            buffer.iov_len -= count;
            return used;
        }
        count -= buffer.iov_len;
    }
    buffers.len()
}

fn iovec(slice: VolatileSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a call does: moves at most so many bytes, or fails with this error.
    type Step = Result<usize, i32>;

    const SIZES: [usize; 4] = [3, 1, 5, 1];

    /// Fills buffers of some sizes from `0, 1, 2, …` step by step, as a file's offset is at 100.
    fn fill(steps: &[Step]) -> (usize, Option<i32>, Vec<u8>) {
        let mut bytes = [0xee; 10];
        let mut rest = &mut bytes[..];
        let mut slices = Vec::new();
        for size in SIZES {
            let (one, more) = rest.split_at_mut(size);
            slices.push(VolatileSlice::from(one));
            rest = more;
        }
        let mut steps = steps.iter();
        let (done, end) = transfer(slices.into_iter(), 100, |iov, offset| {
            let most = steps.next().unwrap().map_err(io::Error::from_raw_os_error)?;
            let mut moved = 0;
            for buffer in iov {
                let count = buffer.iov_len.min(most - moved);
                // SAFETY: it is a part of `bytes`, which nothing else uses until `transfer` returns.
                let room = unsafe { std::slice::from_raw_parts_mut(buffer.iov_base.cast(), count) };
                for byte in room {
                    *byte = (offset - 100) as u8 + moved as u8;
                    moved += 1;
                }
            }
            Ok(moved)
        });
        assert!(steps.next().is_none(), "fewer calls than that");
        (done, end.err().and_then(|error| error.raw_os_error()), bytes.to_vec())
    }

    #[test]
    fn what_comes_in_parts_is_put_together() {
        let whole: Vec<u8> = (0..10).collect();
        assert_eq!(fill(&[Ok(10)]), (10, None, whole.clone()));
        for parts in [vec![3, 7], vec![1; 10], vec![4, 5, 1], vec![2, 2, 2, 2, 2], vec![9, 1]] {
            let steps: Vec<Step> = parts.into_iter().map(Ok).collect();
            assert_eq!(fill(&steps), (10, None, whole.clone()), "{steps:?}");
        }
        let interrupted = [Err(libc::EINTR), Ok(4), Err(libc::EINTR), Ok(6)];
        assert_eq!(fill(&interrupted), (10, None, whole));
    }

    #[test]
    fn more_buffers_than_one_call_takes() {
        let mut bytes = vec![0; 2 * MAX_BUFFERS + 7];
        let slices = bytes.chunks_mut(1).map(VolatileSlice::from);
        let mut calls = Vec::new();
        let (done, end) = transfer(slices, 5, |iov, offset| {
            calls.push((iov.len(), offset));
            // One buffer less than there are.
            Ok(iov.len().min(MAX_BUFFERS - 1))
        });
        end.unwrap();
        assert_eq!(done, 2 * MAX_BUFFERS + 7);
        let most = MAX_BUFFERS as i64;
        let wanted = [(MAX_BUFFERS, 5), (1, most + 4), (MAX_BUFFERS, most + 5), (1, 2 * most + 4)];
        assert_eq!(calls[..4], wanted);
        assert_eq!(calls[4..], [(7, 2 * most + 5)]);
    }

    #[test]
    fn only_nothing_is_the_end() {
        let (done, error, bytes) = fill(&[Ok(4), Ok(2), Ok(0)]);
        assert_eq!(
            (done, error, &bytes[..]),
            (6, None, &[0, 1, 2, 3, 4, 5, 238, 238, 238, 238][..])
        );
        assert_eq!(fill(&[Ok(0)]).0, 0);
        let (done, error, _) = fill(&[Ok(4), Err(libc::EIO)]);
        assert_eq!((done, error), (4, Some(libc::EIO)));
    }

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
