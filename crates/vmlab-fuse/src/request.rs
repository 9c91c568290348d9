//! What a transport gives the server, and how requests are read.

use std::ffi::CStr;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use zerocopy::FromBytes;

use crate::filesystem::WriteAt;
use crate::types::Name;

/// The bytes of a request, wherever they are. They may change while they are read, for the guest can
/// write to them: what was checked has to be copied first.
pub trait RequestBytes {
    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the bytes from `at` on. Returns how many there were, at most `buffer.len()`.
    fn read(&self, at: usize, buffer: &mut [u8]) -> usize;

    /// Writes `count` bytes from `at` on to a file, as pwritev2(2) does, but all of them unless there is an
    /// error.
    ///
    /// # Errors
    /// Those of pwritev2(2), before anything was written.
    fn write_to(
        &self,
        at: usize,
        file: BorrowedFd<'_>,
        to: WriteAt,
        count: usize,
    ) -> io::Result<usize>;
}

/// Room for a reply. Whatever the server writes stays inside.
pub trait ReplyBytes {
    /// How many bytes there is room for.
    fn capacity(&self) -> usize;

    /// Copies bytes to `at`; what has no room is left out.
    fn write(&mut self, at: usize, bytes: &[u8]);

    /// Fills the room from `at` on, `count` bytes at most, from a place in a file, as pread(2) does. There are
    /// fewer only where the file ends: a kernel believes that it ends where a reply does.
    ///
    /// # Errors
    /// Those of pread(2), also after something was read.
    fn read_from(
        &mut self,
        at: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        count: usize,
    ) -> io::Result<usize>;
}

/// The arguments of a request, taken from their beginning.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arguments<'a>(pub(crate) &'a [u8]);

impl<'a> Arguments<'a> {
    /// A structure of the protocol.
    pub(crate) fn take<T: FromBytes>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = rest;
        Ok(value)
    }

    /// A string that ends with a zero.
    pub(crate) fn string(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = &self.0[text.count_bytes() + 1..];
        Ok(text)
    }

    /// The name of a file.
    pub(crate) fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::new(self.string()?)
    }

    /// So many bytes.
    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }
}
