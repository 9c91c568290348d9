//! A disk whose changes are gone with it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, open, unlinkat};
use rustix::io::Errno;

use super::{Backend, Buffers, RawFile, Sectors};
use crate::blk::config::SECTOR;

/// Puts what the guest writes into a file without a name, above another disk that is only read. A sector is
/// wholly in the one or in the other, so that none has to be copied up.
pub struct Overlay<B> {
    below: B,
    own: RawFile,
    /// A bit for each sector that is in `own`. Untouched pages of it cost nothing.
    written: Vec<AtomicU64>,
}

impl<B: Backend> Overlay<B> {
    /// An overlay whose sectors go to a file in `TMPDIR`, or else in `/var/tmp`, which often has more room than
    /// `/tmp`.
    ///
    /// # Errors
    /// No file can be made there.
    pub fn new(below: B) -> io::Result<Self> {
        let dir = std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty());
        Self::with_file(below, unnamed(&dir.map_or_else(|| "/var/tmp".into(), PathBuf::from))?)
    }

    /// The same with an empty file, open to be read and written.
    ///
    /// # Errors
    /// It cannot be as long as the disk.
    pub fn with_file(below: B, file: File) -> io::Result<Self> {
        let capacity = below.capacity();
        file.set_len(capacity.checked_mul(SECTOR).ok_or(io::ErrorKind::InvalidInput)?)?;
        let words = usize::try_from(capacity.div_ceil(64)).map_err(io::Error::other)?;
        let written = std::iter::repeat_with(AtomicU64::default).take(words).collect();
        Ok(Self { below, own: RawFile::with_capacity(file, capacity), written })
    }

    fn is_own(&self, sector: u64) -> bool {
        let word = self.written.get((sector / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) & 1 << (sector % 64) != 0)
    }

    /// Notes that sectors are here. Whoever sees that sees what was written to them before.
    fn take(&self, sectors: Sectors) {
        let mut sector = sectors.first();
        while sector < sectors.end() {
            let place = sector % 64;
            let count = (64 - place).min(sectors.end() - sector);
            let bits = (u64::MAX >> (64 - count)) << place;
            if let Some(word) = self.written.get((sector / 64) as usize) {
                word.fetch_or(bits, Ordering::Release);
            }
            sector += count;
        }
    }

    /// Calls `read` for each run of sectors that are at one place, with the bytes before it, until it fails.
    fn runs(
        &self,
        sectors: Sectors,
        mut read: impl FnMut(bool, Sectors, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut skip = 0;
        while skip < sectors.count() {
            let own = self.is_own(sectors.first() + skip);
            let more = (skip + 1..sectors.count())
                .take_while(|more| self.is_own(sectors.first() + more) == own)
                .count() as u64;
            let at = usize::try_from(skip * SECTOR).map_err(io::Error::other)?;
            read(own, sectors.part(skip, 1 + more), at)?;
            skip += 1 + more;
        }
        Ok(())
    }
}

impl<B: Backend> Backend for Overlay<B> {
    fn capacity(&self) -> u64 {
        self.below.capacity()
    }

    fn read(&self, sectors: Sectors, room: &Buffers<'_>) -> io::Result<()> {
        self.runs(sectors, |own, run, at| {
            let part = room.part(at, (run.count() * SECTOR) as usize);
            if own { self.own.read(run, &part) } else { self.below.read(run, &part) }
        })
    }

    fn read_at_once(&self, sectors: Sectors, room: &Buffers<'_>) -> Option<io::Result<()>> {
        let mut waits = false;
        let read = self.runs(sectors, |own, run, at| {
            let part = room.part(at, (run.count() * SECTOR) as usize);
            let read = match own {
                true => self.own.read_at_once(run, &part),
                false => self.below.read_at_once(run, &part),
            };
            waits |= read.is_none();
            read.unwrap_or_else(|| Err(io::ErrorKind::WouldBlock.into()))
        });
        (!waits).then_some(read)
    }

    fn write(&self, sectors: Sectors, data: &Buffers<'_>) -> io::Result<()> {
        self.own.write(sectors, data)?;
        self.take(sectors);
        Ok(())
    }

    fn writes_may_wait(&self) -> bool {
        false
    }

    fn flush(&self) -> io::Result<()> {
        // Nobody will find any of it after the host went down.
        Ok(())
    }

    fn discard(&self, sectors: Sectors) -> io::Result<()> {
        self.write_zeroes(sectors, true)
    }

    fn write_zeroes(&self, sectors: Sectors, unmap: bool) -> io::Result<()> {
        self.own.write_zeroes(sectors, unmap)?;
        self.take(sectors);
        Ok(())
    }
}

/// A file in a directory that nothing has a name for.
fn unnamed(dir: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    match open(dir, flags | OFlags::TMPFILE, mode) {
        Ok(file) => return Ok(file.into()),
        // Some filesystems have no such files.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {}
        Err(error) => return Err(error.into()),
    }
    let mut random = [0; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let path = dir.join(format!(".vmlab-disk-{:032x}", u128::from_ne_bytes(random)));
    let file = open(&path, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode)?;
    unlinkat(CWD, &path, AtFlags::empty())?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::super::raw::tests::{read, sectors, write};
    use super::*;

    #[test]
    fn changes_are_seen_and_leave_what_is_below() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(300 * 512).unwrap();
        let below = RawFile::new(file.try_clone().unwrap()).unwrap();
        write(&below, sectors(0, 300), 1);
        let dir = tempfile::tempdir().unwrap();
        let disk = Overlay::with_file(below, unnamed(dir.path()).unwrap()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(disk.capacity(), 300);
        let mut wanted = vec![1; 300];
        let mut check = |changed: std::ops::Range<usize>, byte| {
            wanted[changed].fill(byte);
            let content: Vec<u8> =
                wanted.iter().flat_map(|byte| std::iter::repeat_n(*byte, 512)).collect();
            assert_eq!(read(&disk, sectors(0, 300)), content);
            let mut at_once = vec![0; 300 * 512];
            if let Some(read) =
                disk.read_at_once(sectors(0, 300), &Buffers::from_bytes(&mut at_once))
            {
                read.unwrap();
                assert!(at_once == content);
            }
        };
        check(0..0, 0);
        write(&disk, sectors(63, 2), 2);
        check(63..65, 2);
        write(&disk, sectors(0, 1), 3);
        check(0..1, 3);
        write(&disk, sectors(100, 190), 4);
        check(100..290, 4);
        disk.discard(sectors(150, 80)).unwrap();
        check(150..230, 0);
        disk.write_zeroes(sectors(64, 1), false).unwrap();
        check(64..65, 0);
        disk.discard(sectors(299, 1)).unwrap();
        check(299..300, 0);
        write(&disk, sectors(200, 1), 5);
        check(200..201, 5);
        disk.flush().unwrap();
        let below = RawFile::new(file).unwrap();
        assert!(read(&below, sectors(0, 300)).iter().all(|byte| *byte == 1));
    }
}
