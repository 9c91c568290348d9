//! What becomes of a disk's sectors.

mod faults;
mod lock;
mod overlay;
mod raw;
mod record;
mod throttle;

use std::io;
use std::ops::Range;

use vm_memory::VolatileSlice;

use crate::blk::config::SECTOR;
use crate::chain::Part;

pub(super) use faults::random;
pub use faults::{FaultKind, FaultRule, Faulty, Operation, When};
pub(super) use lock::lock;
pub use overlay::Overlay;
pub use raw::RawFile;
pub use record::Recorded;
pub use throttle::{Limit, Throttle, Throttled};

/// Sectors of a disk, all of which it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sectors {
    first: u64,
    count: u64,
}

impl Sectors {
    /// So many sectors from `first` on, if a disk of `capacity` sectors has them all and their place in bytes
    /// is one that files have.
    pub fn within(first: u64, count: u64, capacity: u64) -> Option<Self> {
        let end = first.checked_add(count)?;
        let bytes = end.checked_mul(SECTOR)?;
        (end <= capacity && i64::try_from(bytes).is_ok()).then_some(Self { first, count })
    }

    /// The first one.
    pub fn first(self) -> u64 {
        self.first
    }

    /// How many they are.
    pub fn count(self) -> u64 {
        self.count
    }

    /// The first one behind them.
    pub fn end(self) -> u64 {
        self.first + self.count
    }

    /// Their bytes on the disk.
    pub fn bytes(self) -> Range<u64> {
        self.first * SECTOR..self.end() * SECTOR
    }

    /// Some of them: `count` from the one of number `skip` on, or as many as there are.
    pub fn part(self, skip: u64, count: u64) -> Self {
        let skip = skip.min(self.count);
        Self { first: self.first + skip, count: count.min(self.count - skip) }
    }
}

/// Memory of a guest for the data of a request, in pieces. The guest may change it at any time.
#[derive(Debug, Default)]
pub struct Buffers<'m>(Part<'m>);

impl<'m> Buffers<'m> {
    pub(super) fn of(part: &Part<'m>, at: usize, len: usize) -> Self {
        let slices: Vec<_> = part.range(at, len).collect();
        let len = slices.iter().map(VolatileSlice::len).sum();
        Self(Part { slices, len })
    }

    /// Memory of this process, as if it were a guest's.
    pub fn from_bytes(bytes: &'m mut [u8]) -> Self {
        let len = bytes.len();
        Self(Part { slices: vec![VolatileSlice::from(bytes)], len })
    }

    /// The bytes of all of it.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether that is none.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// A part of it: `len` bytes from `at` on, or as many as there are.
    pub fn part(&self, at: usize, len: usize) -> Self {
        Self::of(&self.0, at, len)
    }

    /// A copy of what is in it.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.0.read(0, &mut bytes);
        bytes
    }

    /// Copies bytes to the place `at` in it. Returns how many had room.
    pub fn fill(&self, at: usize, bytes: &[u8]) -> usize {
        self.0.write(at, bytes)
    }

    /// Fills it with zeroes from `at` on.
    pub(super) fn clear(&self, at: usize) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut done = at;
        while done < self.len() {
            done += self.fill(done, &ZEROES[..ZEROES.len().min(self.len() - done)]);
        }
    }

    pub(super) fn slices(&self) -> impl Iterator<Item = VolatileSlice<'m>> + '_ {
        self.0.slices.iter().copied()
    }
}

/// Where the sectors of a disk are. Threads of all queues call it at once, also for the same sectors, of which
/// the guest then gets what it deserves. Sectors are those of the disk ([`Sectors::within`] its capacity), and
/// buffers have exactly their bytes.
///
/// What a call has done when it returns is seen by all later ones. It is durable once a [`flush`](Self::flush) that
/// began after it has returned. An error is told to the guest as VIRTIO_BLK_S_IOERR, and nothing is known of the
/// sectors then.
pub trait Backend: Send + Sync {
    /// How many sectors there are, always the same.
    fn capacity(&self) -> u64;

    /// Reads sectors into a guest's memory.
    ///
    /// # Errors
    /// They cannot be read.
    fn read(&self, sectors: Sectors, room: &Buffers<'_>) -> io::Result<()>;

    /// The same if it need not wait; `None` if it might. Nothing is changed then but the room.
    fn read_at_once(&self, sectors: Sectors, room: &Buffers<'_>) -> Option<io::Result<()>> {
        let _ = (sectors, room);
        None
    }

    /// Writes sectors from a guest's memory.
    ///
    /// # Errors
    /// They cannot be written.
    fn write(&self, sectors: Sectors, data: &Buffers<'_>) -> io::Result<()>;

    /// Whether even short writes may take long, so that others should not wait for them.
    fn writes_may_wait(&self) -> bool {
        true
    }

    /// Makes durable all that was done before.
    ///
    /// # Errors
    /// Nobody knows what is durable.
    fn flush(&self) -> io::Result<()>;

    /// Gives back what stores these sectors. They read as zeroes then, or as they did.
    ///
    /// # Errors
    /// That failed.
    fn discard(&self, sectors: Sectors) -> io::Result<()>;

    /// Makes sectors read as zeroes, and gives back what stores them if `unmap` says so.
    ///
    /// # Errors
    /// They cannot be written.
    fn write_zeroes(&self, sectors: Sectors, unmap: bool) -> io::Result<()>;
}

impl<B: Backend + ?Sized> Backend for Box<B> {
    fn capacity(&self) -> u64 {
        (**self).capacity()
    }

    fn read(&self, sectors: Sectors, room: &Buffers<'_>) -> io::Result<()> {
        (**self).read(sectors, room)
    }

    fn read_at_once(&self, sectors: Sectors, room: &Buffers<'_>) -> Option<io::Result<()>> {
        (**self).read_at_once(sectors, room)
    }

    fn write(&self, sectors: Sectors, data: &Buffers<'_>) -> io::Result<()> {
        (**self).write(sectors, data)
    }

    fn writes_may_wait(&self) -> bool {
        (**self).writes_may_wait()
    }

    fn flush(&self) -> io::Result<()> {
        (**self).flush()
    }

    fn discard(&self, sectors: Sectors) -> io::Result<()> {
        (**self).discard(sectors)
    }

    fn write_zeroes(&self, sectors: Sectors, unmap: bool) -> io::Result<()> {
        (**self).write_zeroes(sectors, unmap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_are_on_the_disk_to_the_last_one() {
        for (first, count) in [(0, 8), (7, 1), (8, 0), (3, 4)] {
            let sectors = Sectors::within(first, count, 8).unwrap();
            assert_eq!(sectors.bytes(), first * 512..(first + count) * 512);
        }
        for (first, count) in [(0, 9), (8, 1), (9, 0), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, 0)]
        {
            assert_eq!(Sectors::within(first, count, 8), None, "{first} {count}");
        }
        // A file's places end earlier than numbers do.
        assert_eq!(Sectors::within(1 << 55, 0, u64::MAX), None);
        assert_eq!(Sectors::within((1 << 54) - 1, 1, u64::MAX), None);
    }

    #[test]
    fn parts_stay_inside() {
        let sectors = Sectors::within(10, 5, 100).unwrap();
        let part = |skip, count| {
            let part = sectors.part(skip, count);
            (part.first(), part.count())
        };
        assert_eq!(part(0, 5), (10, 5));
        assert_eq!(part(2, 9), (12, 3));
        assert_eq!(part(7, 1), (15, 0));
    }
}
