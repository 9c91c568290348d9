//! Descriptor chains, checked whole before anything is done with them.

use virtio_queue::DescriptorChain;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// The most bytes of one chain. The longest request is a READ or WRITE of 1 MiB with its headers, so twice
/// that is generous, and what a request in progress can pin down is bounded.
pub const MAX_GATHERED: u64 = 2 << 20;

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It loops, or leads out of the table of descriptors.
    #[error("a descriptor chain does not end inside its table")]
    Endless,
    /// A buffer has no bytes, or the chain no buffers.
    #[error("a descriptor chain has an empty buffer or none")]
    Empty,
    /// The guest would have the device read after it has begun to write.
    #[error("a descriptor chain has a readable buffer behind a writable one")]
    Order,
    /// A buffer is not inside of the guest's memory with all of its bytes.
    #[error("a descriptor's buffer is not in the guest's memory")]
    Outside,
    /// It is longer than [`MAX_GATHERED`].
    #[error("a descriptor chain is longer than {MAX_GATHERED} bytes")]
    TooLong,
}

/// A request of a guest: bytes to read, then room to write. All of it is in the guest's memory, and the
/// guest may change it at any time.
#[derive(Debug)]
pub struct Chain<'m> {
    head: u16,
    readable: Part<'m>,
    writable: Part<'m>,
    /// The last byte that there is room for, also where the chain is too long to be gathered.
    last: Option<VolatileSlice<'m>>,
}

/// The buffers of one direction, in order.
#[derive(Debug, Default)]
pub(crate) struct Part<'m> {
    pub(crate) slices: Vec<VolatileSlice<'m>>,
    pub(crate) len: usize,
}

impl<'m> Chain<'m> {
    /// Follows a chain to its end. `limit` is the most descriptors that it may have. Of one that is nothing but
    /// too long, the error has the beginning.
    pub(crate) fn gather(
        descriptors: DescriptorChain<&'m GuestMemoryMmap>,
        memory: &'m GuestMemoryMmap,
        limit: u16,
    ) -> Result<Self, (ChainError, Option<Self>)> {
        let head = descriptors.head_index();
        let (readable, writable) = Default::default();
        let mut chain = Self { head, readable, writable, last: None };
        // The iterator just stops where a chain is broken, so the end has to be seen. An indirect table can
        // be longer than the ring; no guest's driver makes use of that.
        let (mut ended, mut writes, mut too_long) = (false, false, false);
        for descriptor in descriptors.take(usize::from(limit)) {
            let (at, len) = (descriptor.addr(), descriptor.len());
            if len == 0 {
                return Err((ChainError::Empty, None));
            }
            if writes && !descriptor.is_write_only() {
                return Err((ChainError::Order, None));
            }
            writes = descriptor.is_write_only();
            let gathered = chain.readable.len as u64 + chain.writable.len as u64;
            too_long |= gathered + u64::from(len) > MAX_GATHERED;
            if too_long {
                if !memory.check_range(at, len as usize) {
                    return Err((ChainError::Outside, None));
                }
            } else {
                let part = if writes { &mut chain.writable } else { &mut chain.readable };
                for slice in memory.get_slices(at, len as usize) {
                    part.slices.push(slice.map_err(|_| (ChainError::Outside, None))?);
                }
                part.len += len as usize;
            }
            if writes {
                let end = at.checked_add(u64::from(len) - 1);
                chain.last = end.and_then(|end| memory.get_slice(end, 1).ok());
            }
            ended = !descriptor.has_next();
        }
        match (ended, too_long) {
            (false, _) => Err((ChainError::Endless, None)),
            (true, true) => Err((ChainError::TooLong, Some(chain))),
            (true, false) => Ok(chain),
        }
    }

    /// The number of its first descriptor, which is the chain's name.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// How many bytes there are to read.
    pub fn readable(&self) -> usize {
        self.readable.len
    }

    /// How many bytes there is room for.
    pub fn writable(&self) -> usize {
        self.writable.len
    }

    /// Copies bytes of the request from `at` on. Returns how many there were.
    pub fn read(&self, at: usize, buffer: &mut [u8]) -> usize {
        self.readable.read(at, buffer)
    }

    /// Copies bytes to the room at `at`. Returns how many had room.
    pub fn write(&mut self, at: usize, bytes: &[u8]) -> usize {
        self.writable.write(at, bytes)
    }

    /// Writes the last byte that there is room for. Returns whether there is one.
    pub(crate) fn write_last(&mut self, byte: u8) -> bool {
        let Some(last) = &self.last else { return false };
        last.copy_from(&[byte]);
        true
    }

    pub(crate) fn parts(&mut self) -> (&Part<'m>, &mut Part<'m>) {
        (&self.readable, &mut self.writable)
    }
}

impl<'m> Part<'m> {
    /// The buffers that hold `count` bytes from `at` on, or as many as there are.
    pub(crate) fn range(
        &self,
        at: usize,
        count: usize,
    ) -> impl Iterator<Item = VolatileSlice<'m>> + '_ {
        let mut skip = at;
        let mut left = count.min(self.len.saturating_sub(at));
        self.slices.iter().filter_map(move |slice| {
            let from = skip.min(slice.len());
            skip -= from;
            let length = left.min(slice.len() - from);
            left -= length;
            if length == 0 { None } else { slice.subslice(from, length).ok() }
        })
    }

    pub(crate) fn read(&self, at: usize, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.range(at, buffer.len()) {
            done += slice.copy_to(&mut buffer[done..]);
        }
        done
    }

    pub(crate) fn write(&self, at: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.range(at, bytes.len()) {
            slice.copy_from(&bytes[done..done + slice.len()]);
            done += slice.len();
        }
        done
    }
}
