//! Requests and replies in plain bytes.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::io::ReadWriteFlags;

use crate::filesystem::{Result, WriteAt};
use crate::request::{ReplyBytes, RequestBytes};

/// Writes bytes to a file.
///
/// # Errors
/// Those of pwritev2(2).
pub fn write_at(file: BorrowedFd<'_>, bytes: &[u8], to: WriteAt) -> Result<usize> {
    let (offset, flags) = match to {
        WriteAt::Offset(offset) => (offset, ReadWriteFlags::empty()),
        WriteAt::End => (0, ReadWriteFlags::APPEND),
    };
    rustix::io::pwritev2(file, &[io::IoSlice::new(bytes)], offset, flags)
}

/// Bytes in pieces of any sizes, as a guest scatters them in its memory: a request, or the room of a reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pieces(Vec<Vec<u8>>);

impl Pieces {
    /// Bytes in pieces of `size`; in one if that is 0.
    pub fn new(bytes: &[u8], size: usize) -> Self {
        match size {
            0 => Self(vec![bytes.to_vec()]),
            size => Self(bytes.chunks(size).map(<[u8]>::to_vec).collect()),
        }
    }

    /// All of the bytes.
    pub fn concat(&self) -> Vec<u8> {
        self.0.concat()
    }

    fn count(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }

    /// The parts of the pieces that make up `count` bytes from `at` on, as far as there are so many.
    fn parts(&self, mut at: usize, mut count: usize) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(move |piece| {
            let from = at.min(piece.len());
            let length = count.min(piece.len() - from);
            at -= from;
            count -= length;
            &piece[from..from + length]
        })
    }

    fn parts_mut(&mut self, mut at: usize, mut count: usize) -> impl Iterator<Item = &mut [u8]> {
        self.0.iter_mut().map(move |piece| {
            let from = at.min(piece.len());
            let length = count.min(piece.len() - from);
            at -= from;
            count -= length;
            &mut piece[from..from + length]
        })
    }
}

impl RequestBytes for Pieces {
    fn len(&self) -> usize {
        self.count()
    }

    fn read(&self, at: usize, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for part in self.parts(at, buffer.len()) {
            buffer[done..done + part.len()].copy_from_slice(part);
            done += part.len();
        }
        done
    }

    fn write_to(
        &self,
        at: usize,
        file: BorrowedFd<'_>,
        to: WriteAt,
        count: usize,
    ) -> io::Result<usize> {
        let mut done = 0;
        for part in self.parts(at, count).filter(|part| !part.is_empty()) {
            match write_at(file, part, to.after(done)) {
                Ok(written) => done += written,
                Err(error) if done == 0 => return Err(error.into()),
                Err(_) => break,
            }
        }
        Ok(done)
    }
}

impl ReplyBytes for Pieces {
    fn capacity(&self) -> usize {
        self.count()
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        let mut done = 0;
        for part in self.parts_mut(at, bytes.len()) {
            part.copy_from_slice(&bytes[done..done + part.len()]);
            done += part.len();
        }
    }

    fn read_from(
        &mut self,
        at: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        count: usize,
    ) -> io::Result<usize> {
        let mut done = 0;
        for part in self.parts_mut(at, count) {
            let mut filled = 0;
            while filled < part.len() {
                match rustix::io::pread(file, &mut part[filled..], offset + (done + filled) as u64)?
                {
                    0 => return Ok(done + filled),
                    read => filled += read,
                }
            }
            done += filled;
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn pieces_are_as_good_as_one() {
        let bytes: Vec<u8> = (0..=99).collect();
        for size in [0, 1, 3, 7, 50, 99, 100, 200] {
            let pieces = Pieces::new(&bytes, size);
            assert_eq!(pieces.len(), 100);
            for at in [0, 1, 6, 7, 49, 50, 98, 99, 100, 1000] {
                let mut buffer = [0xaa; 20];
                let read = pieces.read(at, &mut buffer);
                assert_eq!(read, 20.min(100_usize.saturating_sub(at)), "{size} {at}");
                assert_eq!(buffer[..read], bytes[at.min(100)..][..read]);

                let mut room = Pieces::new(&[0; 100], size);
                room.write(at, &bytes[..20]);
                let mut wanted = [0; 100];
                wanted[at.min(100)..][..read].copy_from_slice(&bytes[..read]);
                assert_eq!(room.concat(), wanted);
            }
        }
    }

    #[test]
    fn files_are_read_and_written_in_pieces() {
        let bytes: Vec<u8> = (0..=99).collect();
        for size in [0, 1, 3, 30, 100] {
            let file = tempfile::tempfile().unwrap();
            let request = Pieces::new(&bytes, size);
            assert_eq!(request.write_to(10, file.as_fd(), WriteAt::Offset(5), 80).unwrap(), 80);
            assert_eq!(file.metadata().unwrap().len(), 85);
            let mut room = Pieces::new(&[0; 100], size);
            // It ends before the room does.
            assert_eq!(room.read_from(10, file.as_fd(), 5, 90).unwrap(), 80, "{size}");
            assert_eq!(room.concat()[10..90], bytes[10..90]);
            assert_eq!(room.concat()[90..], [0; 10]);
            assert_eq!(room.read_from(0, file.as_fd(), 5, 7).unwrap(), 7);
            assert_eq!(room.concat()[..10], [10, 11, 12, 13, 14, 15, 16, 0, 0, 0]);
        }
    }
}
