//! Vectored reads and writes of files, in as many system calls as they need.

use std::io;

use vm_memory::VolatileSlice;

/// The most buffers of one system call: `IOV_MAX` of `linux/uio.h`, UIO_MAXIOV.
const MAX_BUFFERS: usize = libc::UIO_MAXIOV as usize;

/// Moves bytes between buffers and a place in a file, until one of them ends. A call may move less than that:
/// the next one tells whether it was the end or an error.
///
/// Returns how many were moved, and with what it ended.
pub(crate) fn transfer<'m>(
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
pub(crate) fn may_wait(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EOPNOTSUPP))
}

/// What a system call says that it has moved.
pub(crate) fn moved(result: isize) -> io::Result<usize> {
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
}
