//! A file or a tree of files as a stream of records, in the order of a walk: a directory, all that is in it,
//! its end.
//!
//! A record is its kind (a byte), the length of its payload (`u32`, little-endian) and the payload:
//!
//! | kind | payload |
//! |---|---|
//! | 1 directory, 2 file | mode (`u32`), mtime (seconds `i64`, nanoseconds `u32`), name |
//! | 3 symbolic link | mode, mtime, length of the name (`u16`), name, target |
//! | 4 data | bytes of the file that was begun |
//! | 5 hole | length (`u64`) of zeros that take no space |
//! | 6 end | of the file or directory that was begun last |
//! | 7 done | nothing follows |
//! | 8 failed | what was being done (`u8`), error number (`i32`), path |
//!
//! The first entry is what was asked for, and has no name: its receiver knows one.

use thiserror::Error;

/// The longest name of an entry, in bytes: `NAME_MAX` of `linux/limits.h`.
pub const MAX_NAME: usize = 255;

/// The longest target of a symbolic link, in bytes: `PATH_MAX` less the NUL at its end.
pub const MAX_TARGET: usize = 4095;

/// The most bytes of a file in one record, so that a receiver needs no more memory.
pub const MAX_DATA: usize = 64 * 1024;

/// The longest path in a failure, in bytes. A longer one is cut.
pub const MAX_PATH: usize = 4096;

/// How deep directories may be in each other: both ends hold a descriptor for each.
pub const MAX_DEPTH: usize = 512;

const META: usize = 16;
const FAILED_HEAD: usize = 5;

/// What is known of an entry beside its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits, as of `st_mode`.
    pub mode: u32,
    /// Time of its last change, in seconds since 1970.
    pub mtime_s: i64,
    /// The nanoseconds of that, below a milliard.
    pub mtime_ns: u32,
}

/// One record. The root's name is empty, all others are names of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record<'a> {
    /// A directory begins.
    Dir(Meta, &'a [u8]),
    /// A file begins.
    File(Meta, &'a [u8]),
    /// A symbolic link.
    Symlink {
        /// Its time.
        meta: Meta,
        /// Its name.
        name: &'a [u8],
        /// Where it leads, whatever that is.
        target: &'a [u8],
    },
    /// Bytes of the file.
    Data(&'a [u8]),
    /// So many zeros in the file, which take no space.
    Hole(u64),
    /// The file or directory that was begun last is at its end.
    End,
    /// All was sent, or received.
    Done,
    /// It ends here, by a failure of who sends this.
    Failed {
        /// What was being done.
        doing: Doing,
        /// The error number; 0 where there is none.
        errno: i32,
        /// With which file.
        path: &'a [u8],
    },
}

macro_rules! doings {
    ($($name:ident = $number:literal, $words:literal;)*) => {
        /// What could not be done.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Doing {
            $(#[doc = concat!("To ", $words, ".")] $name = $number,)*
        }

        impl Doing {
            fn of(number: u8) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// In words, as after “cannot”.
            pub fn words(self) -> &'static str {
                match self {
                    $(Self::$name => $words,)*
                }
            }
        }
    };
}

doings! {
    Open = 0, "open";
    Read = 1, "read";
    Create = 2, "create";
    Write = 3, "write";
    Attributes = 4, "set mode and times of";
    Pipe = 5, "copy the named pipe";
    Socket = 6, "copy the socket";
    BlockDevice = 7, "copy the block device";
    CharacterDevice = 8, "copy the character device";
    Deep = 9, "go so deep as";
    Receive = 10, "receive";
}

/// Bytes that are no tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TreeError {
    /// An unknown kind of record.
    #[error("a record of the unknown kind {0}")]
    Kind(u8),
    /// A record that is longer or shorter than its kind can be.
    #[error("a record of kind {0} with {1} bytes")]
    Length(u8, u32),
    /// A name that is none of one file in one directory.
    #[error("an entry with a name that is none")]
    Name,
    /// A symbolic link that leads nowhere, or has a NUL in it.
    #[error("a symbolic link with a target that is none")]
    Target,
    /// A time that is none.
    #[error("a time with {0} nanoseconds")]
    Time(u32),
    /// A failure that is not known.
    #[error("a failure of the unknown kind {0}")]
    Doing(u8),
    /// A record where it cannot be.
    #[error("a record in the wrong place")]
    Order,
    /// Directories in each other beyond the limit.
    #[error("more than {MAX_DEPTH} directories in each other")]
    Depth,
    /// A file that is longer than files can be.
    #[error("a file that is longer than files can be")]
    TooLong,
}

/// What is in front of each record's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    kind: u8,
    len: u32,
}

impl RecordHeader {
    /// Its length in bytes.
    pub const LEN: usize = 5;

    /// Reads one, and sees that its payload is no longer than the longest of its kind.
    ///
    /// # Errors
    /// When there is no such kind, or no such record of it.
    pub fn decode(bytes: [u8; Self::LEN]) -> Result<Self, TreeError> {
        let [kind, len @ ..] = bytes;
        let len = u32::from_le_bytes(len);
        let (least, most) = match kind {
            1 | 2 => (META, META + MAX_NAME),
            3 => (META + 2, META + 2 + MAX_NAME + MAX_TARGET),
            4 => (1, MAX_DATA),
            5 => (8, 8),
            6 | 7 => (0, 0),
            8 => (FAILED_HEAD, FAILED_HEAD + MAX_PATH),
            _ => return Err(TreeError::Kind(kind)),
        };
        match (least..=most).contains(&(len as usize)) {
            true => Ok(Self { kind, len }),
            false => Err(TreeError::Length(kind, len)),
        }
    }

    /// The length of the payload in bytes.
    pub fn payload_len(self) -> usize {
        self.len as usize
    }
}

fn parts<const N: usize>(bytes: &[u8], error: TreeError) -> Result<([u8; N], &[u8]), TreeError> {
    bytes.split_first_chunk().map(|(part, rest)| (*part, rest)).ok_or(error)
}

impl<'a> Record<'a> {
    /// Reads a record's payload.
    ///
    /// # Errors
    /// When the bytes are no such record: names are those of one file in one directory, or empty.
    pub fn decode(header: RecordHeader, payload: &'a [u8]) -> Result<Self, TreeError> {
        let RecordHeader { kind, len } = header;
        let wrong = TreeError::Length(kind, len);
        if payload.len() != header.payload_len() {
            return Err(wrong);
        }
        Ok(match kind {
            1 | 2 => {
                let (meta, name) = Meta::decode(payload, wrong)?;
                let name = checked_name(name)?;
                if kind == 1 { Self::Dir(meta, name) } else { Self::File(meta, name) }
            }
            3 => {
                let (meta, rest) = Meta::decode(payload, wrong)?;
                let (len, rest) = parts(rest, wrong)?;
                let (name, target) =
                    rest.split_at_checked(u16::from_le_bytes(len).into()).ok_or(wrong)?;
                if target.is_empty() || target.len() > MAX_TARGET || target.contains(&0) {
                    return Err(TreeError::Target);
                }
                Self::Symlink { meta, name: checked_name(name)?, target }
            }
            4 => Self::Data(payload),
            5 => Self::Hole(u64::from_le_bytes(parts(payload, wrong)?.0)),
            6 => Self::End,
            7 => Self::Done,
            8 => {
                let ([doing], rest) = parts(payload, wrong)?;
                let (errno, path) = parts(rest, wrong)?;
                let doing = Doing::of(doing).ok_or(TreeError::Doing(doing))?;
                Self::Failed { doing, errno: i32::from_le_bytes(errno), path }
            }
            _ => return Err(TreeError::Kind(kind)),
        })
    }

    /// Appends the record, header and payload. What is longer than a record can be is cut.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let at = out.len();
        out.extend_from_slice(&[0; RecordHeader::LEN]);
        let kind = match *self {
            Self::Dir(meta, name) => {
                meta.encode(out);
                out.extend_from_slice(cut(name, MAX_NAME));
                1
            }
            Self::File(meta, name) => {
                meta.encode(out);
                out.extend_from_slice(cut(name, MAX_NAME));
                2
            }
            Self::Symlink { meta, name, target } => {
                meta.encode(out);
                let name = cut(name, MAX_NAME);
                out.extend_from_slice(&(name.len() as u16).to_le_bytes());
                out.extend_from_slice(name);
                out.extend_from_slice(cut(target, MAX_TARGET));
                3
            }
            Self::Data(bytes) => {
                out.extend_from_slice(cut(bytes, MAX_DATA));
                4
            }
            Self::Hole(len) => {
                out.extend_from_slice(&len.to_le_bytes());
                5
            }
            Self::End => 6,
            Self::Done => 7,
            Self::Failed { doing, errno, path } => {
                out.push(doing as u8);
                out.extend_from_slice(&errno.to_le_bytes());
                out.extend_from_slice(cut(path, MAX_PATH));
                8
            }
        };
        let len = (out.len() - at - RecordHeader::LEN) as u32;
        out[at] = kind;
        out[at + 1..at + RecordHeader::LEN].copy_from_slice(&len.to_le_bytes());
    }
}

fn cut(bytes: &[u8], most: usize) -> &[u8] {
    &bytes[..bytes.len().min(most)]
}

/// A name that leads nowhere but into the directory that it is in; or none at all.
fn checked_name(name: &[u8]) -> Result<&[u8], TreeError> {
    let leads_elsewhere = name == b"." || name == b".." || name.contains(&b'/');
    match leads_elsewhere || name.contains(&0) || name.len() > MAX_NAME {
        true => Err(TreeError::Name),
        false => Ok(name),
    }
}

impl Meta {
    fn decode(bytes: &[u8], wrong: TreeError) -> Result<(Self, &[u8]), TreeError> {
        let (mode, rest) = parts(bytes, wrong)?;
        let (seconds, rest) = parts(rest, wrong)?;
        let (nanoseconds, rest) = parts(rest, wrong)?;
        let mtime_ns = u32::from_le_bytes(nanoseconds);
        // Some of those above have a meaning of their own for utimensat(2).
        if mtime_ns >= 1_000_000_000 {
            return Err(TreeError::Time(mtime_ns));
        }
        let mode = u32::from_le_bytes(mode);
        Ok((Self { mode, mtime_s: i64::from_le_bytes(seconds), mtime_ns }, rest))
    }

    fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.mode.to_le_bytes());
        out.extend_from_slice(&self.mtime_s.to_le_bytes());
        out.extend_from_slice(&self.mtime_ns.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const META: Meta = Meta { mode: 0o754, mtime_s: -5, mtime_ns: 999_999_999 };

    fn decoded(bytes: &[u8]) -> Result<Record<'_>, TreeError> {
        let (header, payload) = bytes.split_first_chunk().unwrap();
        Record::decode(RecordHeader::decode(*header)?, payload)
    }

    #[test]
    fn records_come_back_as_they_were() {
        let records = [
            Record::Dir(META, b""),
            Record::File(META, b"a\xff\n"),
            Record::Symlink { meta: META, name: b"l", target: b"../../x" },
            Record::Data(&[7; MAX_DATA]),
            Record::Hole(u64::MAX),
            Record::End,
            Record::Done,
            Record::Failed { doing: Doing::Write, errno: 28, path: b"/x" },
        ];
        for record in records {
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            assert_eq!(decoded(&bytes), Ok(record));
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in [&b".."[..], b".", b"/", b"a/b", b"../x", b"a\0b", &[b'x'; 256]] {
            let mut bytes = vec![2, 0, 0, 0, 0];
            META.encode(&mut bytes);
            bytes.extend_from_slice(name);
            let len = bytes.len() as u32 - 5;
            bytes[1..5].copy_from_slice(&len.to_le_bytes());
            let error = decoded(&bytes).unwrap_err();
            assert!(matches!(error, TreeError::Name | TreeError::Length(..)), "{name:?}: {error}");
        }
    }

    #[test]
    fn records_are_no_longer_than_their_kind() {
        for kind in 0..=u8::MAX {
            let header = RecordHeader::decode([kind, 0xff, 0xff, 0xff, 0xff]);
            assert!(header.is_err(), "{kind}");
        }
        assert_eq!(RecordHeader::decode([4, 0, 0, 0, 0]), Err(TreeError::Length(4, 0)));
        let mut omit = vec![2, 17, 0, 0, 0];
        Meta { mtime_ns: 0x3fff_fffe, ..META }.encode(&mut omit);
        omit.push(b'x');
        assert_eq!(decoded(&omit), Err(TreeError::Time(0x3fff_fffe)));
    }

    proptest! {
        #[test]
        fn what_can_be_read_is_written_as_the_same(
            kind in 0..10_u8,
            payload in proptest::collection::vec(any::<u8>(), 0..600),
        ) {
            let mut bytes = vec![kind];
            bytes.extend((payload.len() as u32).to_le_bytes());
            bytes.extend(payload);
            if let Ok(record) = decoded(&bytes) {
                let mut again = Vec::new();
                record.encode(&mut again);
                prop_assert_eq!(again, bytes);
            }
        }
    }
}
