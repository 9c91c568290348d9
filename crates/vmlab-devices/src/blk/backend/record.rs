//! A disk whose changes are written down.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FlockOperation, flock};

use super::{Backend, Buffers, Sectors};
use crate::blk::crash::{Change, MAGIC, log_header, record_header};

/// Writes each change that the disk below has done to a log ([`Log`](crate::blk::crash::Log)), before the guest hears
/// of it. The data is what the disk got, whatever the guest does to its memory meanwhile.
pub struct Recorded<B> {
    below: B,
    log: Mutex<Writer>,
}

struct Writer {
    file: File,
    /// Where the next record goes. What is behind it is of one that could not be written.
    end: u64,
    records: u64,
}

impl<B: Backend> Recorded<B> {
    /// A disk whose log is a file at `path`, private to the user and written anew. It is nobody else's as long as
    /// this is there.
    ///
    /// # Errors
    /// The file cannot be written, is the log of another disk that is in use, or has something else in it, which is
    /// not written over.
    pub fn create(below: B, path: &Path) -> io::Result<Self> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => io::Error::other("another disk is recorded to it"),
            error => error.into(),
        })?;
        let header = log_header(below.capacity());
        let mut begin = vec![0; MAGIC.len()];
        if file.metadata()?.len() > 0
            && (file.read_exact_at(&mut begin, 0).is_err() || begin != MAGIC[..])
        {
            return Err(io::Error::other("it is no log of a disk, and is not written over"));
        }
        file.set_len(0)?;
        file.write_all_at(&header, 0)?;
        let log = Mutex::new(Writer { file, end: header.len() as u64, records: 0 });
        Ok(Self { below, log })
    }

    fn log(&self) -> MutexGuard<'_, Writer> {
        // Its numbers are changed last.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writer {
    fn append(&mut self, change: Change, data: &[u8]) -> io::Result<()> {
        let record = [&record_header(change)[..], data].concat();
        self.file.write_all_at(&record, self.end)?;
        self.end += record.len() as u64;
        self.records += 1;
        Ok(())
    }
}

impl<B: Backend> Backend for Recorded<B> {
    fn capacity(&self) -> u64 {
        self.below.capacity()
    }

    fn read(&self, sectors: Sectors, room: &Buffers<'_>) -> io::Result<()> {
        self.below.read(sectors, room)
    }

    fn read_at_once(&self, sectors: Sectors, room: &Buffers<'_>) -> Option<io::Result<()>> {
        self.below.read_at_once(sectors, room)
    }

    fn write(&self, sectors: Sectors, data: &Buffers<'_>) -> io::Result<()> {
        let mut bytes = data.to_vec();
        self.below.write(sectors, &Buffers::from_bytes(&mut bytes))?;
        self.log().append(Change::Write(sectors), &bytes)
    }

    fn flush(&self) -> io::Result<()> {
        // What comes while it goes on need not be durable.
        let covers = self.log().records;
        self.below.flush()?;
        self.log().append(Change::Flush { covers }, &[])
    }

    fn discard(&self, sectors: Sectors) -> io::Result<()> {
        self.below.discard(sectors)?;
        self.log().append(Change::Discard(sectors), &[])
    }

    fn write_zeroes(&self, sectors: Sectors, unmap: bool) -> io::Result<()> {
        self.below.write_zeroes(sectors, unmap)?;
        self.log().append(Change::Zeroes(sectors), &[])
    }
}
