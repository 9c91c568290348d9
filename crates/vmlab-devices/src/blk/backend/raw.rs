//! A file or block device of the host, sector for sector.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fdatasync, fstatfs, seek};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use super::{Backend, Buffers, Sectors};
use crate::blk::config::SECTOR;
use crate::transfer::{may_wait, moved, transfer};

/// How much is written at once where a file has no other way to zeroes.
const ZEROES: usize = 64 << 10;

/// The back end of raw files. Where the last sector of a file is not whole, its rest reads as zeroes.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    capacity: u64,
    /// Whether nobody reads it after the guest.
    scratch: bool,
    /// What has a read fail that would wait for a disk. Files in memory know no such flag, and never do.
    at_once: libc::c_int,
}

fn at_once(file: &File) -> libc::c_int {
    match fstatfs(file) {
        Ok(filesystem) if filesystem.f_type == libc::TMPFS_MAGIC => 0,
        _ => libc::RWF_NOWAIT,
    }
}

impl RawFile {
    /// All of a file or block device, which is open for what the guest may do.
    ///
    /// # Errors
    /// Its length cannot be found out.
    pub fn new(file: File) -> io::Result<Self> {
        let bytes = seek(&file, SeekFrom::End(0))?;
        Ok(Self::with_capacity(file, bytes.div_ceil(SECTOR)))
    }

    /// The first sectors of a file, whatever its length.
    pub(super) fn with_capacity(file: File, capacity: u64) -> Self {
        let at_once = at_once(&file);
        Self { file, capacity, scratch: false, at_once }
    }

    /// Says that nobody will read it after the guest, so that a flush waits for no disk of the host.
    pub(in crate::blk) fn scratch(mut self) -> Self {
        self.scratch = true;
        self
    }

    /// Reads without waiting for a disk, if `flags` say so.
    fn read_with(
        &self,
        sectors: Sectors,
        room: &Buffers<'_>,
        flags: libc::c_int,
    ) -> io::Result<()> {
        let (done, end) = transfer(room.slices(), sectors.bytes().start, |iov, offset| {
            let (fd, count) = (self.file.as_raw_fd(), iov.len() as libc::c_int);
            // SAFETY: the buffers are mapped guest memory, which `room` keeps borrowed and of which this
            // process makes no Rust references; the kernel writes inside of them only.
            moved(unsafe { libc::preadv2(fd, iov.as_ptr(), count, offset, flags) })
        });
        end?;
        // The file ends here.
        room.clear(done);
        Ok(())
    }

    fn fallocate(&self, sectors: Sectors, flags: FallocateFlags) -> io::Result<bool> {
        let bytes = sectors.bytes();
        if bytes.is_empty() {
            return Ok(true);
        }
        let flags = flags | FallocateFlags::KEEP_SIZE;
        loop {
            return match fallocate(&self.file, flags, bytes.start, bytes.end - bytes.start) {
                Ok(()) => Ok(true),
                Err(Errno::INTR) => continue,
                // Filesystems and block devices say it in different ways.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(false),
                Err(error) => Err(error.into()),
            };
        }
    }
}

impl Backend for RawFile {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn read(&self, sectors: Sectors, room: &Buffers<'_>) -> io::Result<()> {
        self.read_with(sectors, room, 0)
    }

    fn read_at_once(&self, sectors: Sectors, room: &Buffers<'_>) -> Option<io::Result<()>> {
        match self.read_with(sectors, room, self.at_once) {
            Err(error) if may_wait(&error) => None,
            read => Some(read),
        }
    }

    fn write(&self, sectors: Sectors, data: &Buffers<'_>) -> io::Result<()> {
        write_slices(&self.file, sectors.bytes().start, data.slices(), data.len())
    }

    fn writes_may_wait(&self) -> bool {
        false
    }

    fn flush(&self) -> io::Result<()> {
        match self.scratch {
            true => Ok(()),
            false => Ok(fdatasync(&self.file)?),
        }
    }

    fn discard(&self, sectors: Sectors) -> io::Result<()> {
        // A file that cannot give anything back keeps it.
        self.fallocate(sectors, FallocateFlags::PUNCH_HOLE).map(drop)
    }

    fn write_zeroes(&self, sectors: Sectors, unmap: bool) -> io::Result<()> {
        let flags = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        if self.fallocate(sectors, flags)? {
            return Ok(());
        }
        let mut zeroes = [0; ZEROES];
        let room = Buffers::from_bytes(&mut zeroes);
        let bytes = sectors.bytes();
        for at in bytes.clone().step_by(ZEROES) {
            let part = room.part(0, usize::try_from(bytes.end - at).unwrap_or(ZEROES));
            write_slices(&self.file, at, part.slices(), part.len())?;
        }
        Ok(())
    }
}

/// Writes `len` bytes of memory to a place in a file.
fn write_slices<'m>(
    file: &File,
    at: u64,
    slices: impl Iterator<Item = VolatileSlice<'m>>,
    len: usize,
) -> io::Result<()> {
    let (done, end) = transfer(slices, at, |iov, offset| {
        let (fd, count) = (file.as_raw_fd(), iov.len() as libc::c_int);
        // SAFETY: the buffers are mapped memory that the slices keep borrowed; the kernel only reads from
        // them, and copes with a guest that writes to them at the same time.
        moved(unsafe { libc::pwritev2(fd, iov.as_ptr(), count, offset, 0) })
    });
    end?;
    if done < len { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    /// Sectors of a disk that certainly has them.
    pub(crate) fn sectors(first: u64, count: u64) -> Sectors {
        Sectors::within(first, count, 1 << 40).unwrap()
    }

    pub(crate) fn read(backend: &dyn Backend, at: Sectors) -> Vec<u8> {
        let mut bytes = vec![0xee; at.count() as usize * 512];
        backend.read(at, &Buffers::from_bytes(&mut bytes)).unwrap();
        bytes
    }

    pub(crate) fn write(backend: &dyn Backend, at: Sectors, byte: u8) {
        let mut bytes = vec![byte; at.count() as usize * 512];
        backend.write(at, &Buffers::from_bytes(&mut bytes)).unwrap();
    }

    fn raw(len: u64) -> RawFile {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        RawFile::new(file).unwrap()
    }

    #[test]
    fn what_is_written_is_read_and_what_is_discarded_is_zero() {
        let disk = raw(1 << 20);
        assert_eq!(disk.capacity(), 2048);
        write(&disk, sectors(0, 2048), 7);
        disk.flush().unwrap();
        let before = disk.file.metadata().unwrap().blocks();
        disk.discard(sectors(0, 1024)).unwrap();
        assert!(disk.file.metadata().unwrap().blocks() <= before - 1000);
        disk.write_zeroes(sectors(1025, 2), false).unwrap();
        disk.write_zeroes(sectors(1028, 1), true).unwrap();
        disk.write_zeroes(sectors(1030, 0), true).unwrap();
        let content = read(&disk, sectors(0, 2048));
        let sector = |number: usize| content[number * 512..][..512].to_vec();
        for (number, byte) in [
            (0, 0),
            (1023, 0),
            (1024, 7),
            (1025, 0),
            (1026, 0),
            (1027, 7),
            (1028, 0),
            (1029, 7),
            (2047, 7),
        ] {
            assert_eq!(sector(number), [byte; 512], "{number}");
        }
    }

    #[test]
    fn a_file_in_memory_is_read_at_once() {
        use rustix::fs::{MemfdFlags, memfd_create};
        let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(4096).unwrap();
        let disk = RawFile::new(file).unwrap();
        write(&disk, sectors(1, 1), 7);
        let mut bytes = [0xee; 1024];
        disk.read_at_once(sectors(1, 2), &Buffers::from_bytes(&mut bytes)).unwrap().unwrap();
        assert_eq!(bytes, *[[7; 512], [0; 512]].concat());
    }

    #[test]
    fn a_sector_that_is_not_whole_ends_in_zeroes() {
        let disk = raw(0);
        assert_eq!(disk.capacity(), 0);
        let file = tempfile::tempfile().unwrap();
        rustix::io::write(&file, &[5; 700]).unwrap();
        let disk = RawFile::new(file).unwrap();
        assert_eq!(disk.capacity(), 2);
        let content = read(&disk, sectors(0, 2));
        assert_eq!((&content[..700], &content[700..]), (&[5; 700][..], &[0; 324][..]));
    }

    #[test]
    fn zeroes_are_written_where_there_is_no_other_way() {
        // Pipes and such cannot be disks; a memfd has no ZERO_RANGE.
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(400 << 10).unwrap();
        let disk = RawFile::new(file).unwrap();
        write(&disk, sectors(0, 800), 9);
        disk.write_zeroes(sectors(1, 500), false).unwrap();
        let content = read(&disk, sectors(0, 800));
        assert_eq!(content[..512], [9; 512]);
        assert!(content[512..501 * 512].iter().all(|byte| *byte == 0));
        assert!(content[501 * 512..].iter().all(|byte| *byte == 9));
    }
}
