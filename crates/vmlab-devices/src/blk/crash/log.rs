//! The log of a disk's changes.
//!
//! All numbers are little-endian. A log begins with 32 bytes:
//!
//! | bytes | |
//! |---|---|
//! | 0-7 | `VMLABLOG` |
//! | 8-11 | version, 1 |
//! | 12-15 | bytes of a sector, 512 |
//! | 16-23 | sectors of the disk |
//! | 24-31 | 0 |
//!
//! Records follow, in the order in which the guest was told that the requests were done, each with 24 bytes:
//!
//! | bytes | |
//! |---|---|
//! | 0-3 | what it is: 1 a write, 2 a discard, 3 a write of zeroes, 4 a flush |
//! | 4-7 | 0 |
//! | 8-15 | the first sector; of a flush, how many of the records before it were done when it began |
//! | 16-23 | sectors; of a flush, 0 |
//!
//! and, of a write, its data. A record that is not whole was being written when the process ended, and is none.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::blk::backend::Sectors;
use crate::blk::config::SECTOR;
use crate::chain::MAX_GATHERED;

pub(in crate::blk) const MAGIC: &[u8; 8] = b"VMLABLOG";
const VERSION: u32 = 1;
const LOG_HEADER: usize = 32;
const RECORD_HEADER: usize = 24;

const WRITE: u32 = 1;
const DISCARD: u32 = 2;
const ZEROES: u32 = 3;
const FLUSH: u32 = 4;

/// The most sectors of one write: what one request can have. More in a log is no write of ours.
const MAX_WRITE: u64 = MAX_GATHERED / SECTOR;

/// What a guest did to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Sectors got new data.
    Write(Sectors),
    /// Sectors were given back, and read as zeroes.
    Discard(Sectors),
    /// Sectors read as zeroes.
    Zeroes(Sectors),
    /// What was done before is durable.
    Flush {
        /// How many records of the log that is. Later ones, though before the flush, came while it was going on.
        covers: u64,
    },
}

impl Change {
    /// The sectors that it is about.
    pub fn sectors(&self) -> Option<Sectors> {
        match *self {
            Self::Write(sectors) | Self::Discard(sectors) | Self::Zeroes(sectors) => Some(sectors),
            Self::Flush { .. } => None,
        }
    }
}

/// A record of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What was done.
    pub change: Change,
    /// Where in the log a write's data begins.
    data: u64,
}

#[cfg(test)]
impl From<Change> for Entry {
    fn from(change: Change) -> Self {
        Self { change, data: 0 }
    }
}

/// A file that is no log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// It cannot be read.
    #[error("the log of a disk cannot be read")]
    Read(#[source] io::Error),
    /// It does not begin as one.
    #[error("this is no log of a disk, as vmlab records them")]
    NotALog,
    /// It is of another version.
    #[error("the log of a disk has version {0}, and this vmlab reads version {VERSION}")]
    Version(u32),
    /// There is something in it that is no record.
    #[error("the log of a disk is damaged at byte {at}")]
    Damaged {
        /// Where the record begins.
        at: u64,
    },
}

/// A log, read but for the data in it.
#[derive(Debug)]
pub struct Log {
    file: File,
    capacity: u64,
    entries: Vec<Entry>,
}

impl Log {
    /// Reads a log. The disk may still be in use: what is there by now is read.
    ///
    /// # Errors
    /// It is none, or damaged.
    pub fn open(path: &Path) -> Result<Self, LogError> {
        let file = File::open(path).map_err(LogError::Read)?;
        let length = file.metadata().map_err(LogError::Read)?.len();
        let mut reader = BufReader::new(&file);
        let mut header = [0; LOG_HEADER];
        match reader.read_exact(&mut header) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(LogError::NotALog);
            }
            read => read.map_err(LogError::Read)?,
        }
        if !header.starts_with(MAGIC) {
            return Err(LogError::NotALog);
        }
        match (int(&header, 8), int(&header, 12)) {
            (VERSION, sector) if u64::from(sector) == SECTOR => {}
            (VERSION, _) => return Err(LogError::NotALog),
            (version, _) => return Err(LogError::Version(version)),
        }
        let capacity = long(&header, 16);
        // One that no file could have is not of a disk.
        Sectors::within(0, capacity, capacity).ok_or(LogError::NotALog)?;
        let mut entries = Vec::new();
        let mut at = LOG_HEADER as u64;
        loop {
            let data = at + RECORD_HEADER as u64;
            if data > length {
                break;
            }
            let mut record = [0; RECORD_HEADER];
            reader.read_exact(&mut record).map_err(LogError::Read)?;
            let before = entries.len() as u64;
            let change = change(&record, capacity, before).ok_or(LogError::Damaged { at })?;
            let bytes = match change {
                Change::Write(sectors) => sectors.count() * SECTOR,
                _ => 0,
            };
            if data + bytes > length {
                break;
            }
            reader.seek_relative(bytes as i64).map_err(LogError::Read)?;
            entries.push(Entry { change, data });
            at = data + bytes;
        }
        drop(reader);
        Ok(Self { file, capacity, entries })
    }

    /// How many sectors the disk has.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// What was done to it, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The data of a write, 2 MiB at most; of anything else there is none.
    ///
    /// # Errors
    /// The log cannot be read any more.
    pub fn data(&self, entry: &Entry) -> io::Result<Vec<u8>> {
        let Change::Write(sectors) = entry.change else { return Ok(Vec::new()) };
        let len = usize::try_from(sectors.count() * SECTOR).map_err(io::Error::other)?;
        let mut data = vec![0; len];
        self.file.read_exact_at(&mut data, entry.data)?;
        Ok(data)
    }
}

/// The beginning of a log for a disk of so many sectors.
pub(in crate::blk) fn log_header(capacity: u64) -> Vec<u8> {
    let (version, sector) = (VERSION.to_le_bytes(), (SECTOR as u32).to_le_bytes());
    [&MAGIC[..], &version, &sector, &capacity.to_le_bytes(), &[0; 8]].concat()
}

/// A record without its data.
pub(in crate::blk) fn record_header(change: Change) -> Vec<u8> {
    let (kind, first, count) = match change {
        Change::Write(sectors) => (WRITE, sectors.first(), sectors.count()),
        Change::Discard(sectors) => (DISCARD, sectors.first(), sectors.count()),
        Change::Zeroes(sectors) => (ZEROES, sectors.first(), sectors.count()),
        Change::Flush { covers } => (FLUSH, covers, 0),
    };
    [&kind.to_le_bytes()[..], &[0; 4], &first.to_le_bytes(), &count.to_le_bytes()].concat()
}

/// What a record says, of a disk of so many sectors and with so many records before it.
fn change(record: &[u8; RECORD_HEADER], capacity: u64, before: u64) -> Option<Change> {
    let (kind, first, count) = (int(record, 0), long(record, 8), long(record, 16));
    if int(record, 4) != 0 {
        return None;
    }
    let sectors = || Sectors::within(first, count, capacity);
    match kind {
        WRITE if count <= MAX_WRITE => sectors().map(Change::Write),
        DISCARD => sectors().map(Change::Discard),
        ZEROES => sectors().map(Change::Zeroes),
        FLUSH if count == 0 && first <= before => Some(Change::Flush { covers: first }),
        _ => None,
    }
}

fn int(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the documentation above has it.
    fn bytes() -> Vec<u8> {
        let mut log = b"VMLABLOG\x01\0\0\0\0\x02\0\0\x64\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
        for (record, data) in [
            ([1u64, 98, 2], &[7; 1024][..]),
            ([2, 0, 100], &[]),
            ([4, 1, 0], &[]),
            ([3, 5, 1], &[]),
            ([1, 0, 1], &[8; 512]),
        ] {
            log.extend(record.iter().flat_map(|number| number.to_le_bytes()));
            log.extend(data);
        }
        log
    }

    fn read(bytes: &[u8]) -> Result<Log, LogError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        Log::open(file.path())
    }

    #[test]
    fn a_log_is_read_as_it_is_documented() {
        let log = read(&bytes()).unwrap();
        let at = |first, count| Sectors::within(first, count, 100).unwrap();
        let changes: Vec<Change> = log.entries().iter().map(|entry| entry.change).collect();
        assert_eq!(
            changes,
            [
                Change::Write(at(98, 2)),
                Change::Discard(at(0, 100)),
                Change::Flush { covers: 1 },
                Change::Zeroes(at(5, 1)),
                Change::Write(at(0, 1)),
            ]
        );
        assert_eq!(log.capacity(), 100);
        assert_eq!(log.data(&log.entries()[0]).unwrap(), [7; 1024]);
        assert_eq!(log.data(&log.entries()[4]).unwrap(), [8; 512]);
        assert!(log.data(&log.entries()[1]).unwrap().is_empty());
        // It is written in the same way.
        let mut written = log_header(100);
        for entry in log.entries() {
            written.extend(record_header(entry.change));
            written.extend(log.data(entry).unwrap());
        }
        assert_eq!(written, bytes());
    }

    #[test]
    fn what_was_not_wholly_written_is_left_out() {
        let whole = bytes();
        for (length, count) in [(32, 0), (40, 0), (56, 0), (1079, 0), (1080, 1), (1104, 2)] {
            assert_eq!(read(&whole[..length]).unwrap().entries().len(), count, "{length}");
        }
        for length in 0..32 {
            assert!(matches!(read(&whole[..length]), Err(LogError::NotALog)), "{length}");
        }
    }

    #[test]
    fn what_is_damaged_is_refused() {
        let change = |at: usize, byte: u8| {
            let mut bytes = bytes();
            bytes[at] = byte;
            read(&bytes).err()
        };
        assert!(matches!(change(0, b'v'), Some(LogError::NotALog)));
        assert!(matches!(change(8, 2), Some(LogError::Version(2))));
        assert!(matches!(change(13, 16), Some(LogError::NotALog)));
        for (at, byte) in [(32, 5), (36, 1), (40, 99), (48, 3), (52, 1), (47, 1)] {
            let error = change(at, byte);
            assert!(matches!(error, Some(LogError::Damaged { at: 32 })), "{at}: {error:?}");
        }
        // A flush of what is yet to come.
        assert!(matches!(change(1104 + 8, 3), Some(LogError::Damaged { at: 1104 })));
    }
}
