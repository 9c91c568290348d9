//! The end that has the files.

use std::ffi::{CStr, OsStr};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;
use vmlab_wire::tree::{Doing, MAX_DATA, MAX_DEPTH, Meta, Record};

use crate::stream::Writer;
use crate::{CopyError, why};

/// Sends a file or a whole tree. The path itself may be or lead over symbolic links, which are followed;
/// those in a tree are sent as what they are.
///
/// A file is sent as long as it was when it was opened, or as far as it can be read; one that says it is
/// empty, as those of `/proc` do, is read to its end.
///
/// # Errors
/// When something cannot be read or is no file, directory or symbolic link, which the other end is told; or
/// when that reads no more.
pub fn send(source: &Path, stream: impl Write) -> Result<(), CopyError> {
    let mut sender = Sender { out: Writer::new(stream), path: source.to_owned() };
    let sent = sender.tree().and_then(|()| sender.out.put(&Record::Done));
    if let Err(error) = &sent {
        // A stream that is gone has an end that knows of its own failure.
        error.with_record(|record| _ = sender.out.put(record));
    }
    let flushed = sender.out.flush();
    sent.and(flushed)
}

struct Sender<W: Write> {
    out: Writer<W>,
    /// What is being sent, for errors.
    path: PathBuf,
}

impl<W: Write> Sender<W> {
    fn failed(&self, doing: Doing, errno: Errno) -> CopyError {
        CopyError::here(doing, &self.path, errno)
    }

    fn refused(&self, doing: Doing) -> CopyError {
        CopyError::here(doing, &self.path, std::io::Error::other(why(doing)))
    }

    fn tree(&mut self) -> Result<(), CopyError> {
        let root = self.path.clone();
        let mut directories: Vec<Dir> = Vec::new();
        let stat = rustix::fs::stat(&root).map_err(|e| self.failed(Doing::Open, e))?;
        directories.extend(self.entry(CWD, root.as_os_str(), b"", &stat, OFlags::empty())?);
        while let Some(directory) = directories.last_mut() {
            let Some(entry) = directory.read() else {
                self.out.put(&Record::End)?;
                directories.pop();
                self.path.pop();
                continue;
            };
            let entry = entry.map_err(|e| self.failed(Doing::Read, e))?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.path.push(OsStr::from_bytes(name.to_bytes()));
            let parent = directory.fd().map_err(|e| self.failed(Doing::Read, e))?;
            match self.child(parent, name)? {
                Some(_) if directories.len() >= MAX_DEPTH => return Err(self.refused(Doing::Deep)),
                Some(directory) => directories.push(directory),
                None => _ = self.path.pop(),
            }
        }
        Ok(())
    }

    fn child(&mut self, parent: BorrowedFd<'_>, name: &CStr) -> Result<Option<Dir>, CopyError> {
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| self.failed(Doing::Open, e))?;
        let os_name = OsStr::from_bytes(name.to_bytes());
        if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            let target = rustix::fs::readlinkat(parent, name, Vec::new())
                .map_err(|e| self.failed(Doing::Read, e))?;
            let (meta, name, target) = (meta(&stat), name.to_bytes(), target.to_bytes());
            self.out.put(&Record::Symlink { meta, name, target })?;
            return Ok(None);
        }
        self.entry(parent, os_name, name.to_bytes(), &stat, OFlags::NOFOLLOW)
    }

    /// Sends a file, or the beginning of a directory, which is then to be read.
    fn entry(
        &mut self,
        parent: BorrowedFd<'_>,
        file: &OsStr,
        name: &[u8],
        stat: &Stat,
        flags: OFlags,
    ) -> Result<Option<Dir>, CopyError> {
        // Opening what is neither can wait for ever or change something.
        self.check_kind(stat)?;
        let flags = flags | OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(parent, file, flags, Mode::empty())
            .map_err(|e| self.failed(Doing::Open, e))?;
        // It may have become another one meanwhile.
        let stat = rustix::fs::fstat(&opened).map_err(|e| self.failed(Doing::Open, e))?;
        self.check_kind(&stat)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            self.out.put(&Record::Dir(meta(&stat), name))?;
            return Dir::new(opened).map(Some).map_err(|e| self.failed(Doing::Read, e));
        }
        self.out.put(&Record::File(meta(&stat), name))?;
        self.content(&opened, stat.st_size as u64)?;
        self.out.put(&Record::End)?;
        Ok(None)
    }

    fn check_kind(&self, stat: &Stat) -> Result<(), CopyError> {
        Err(self.refused(match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile | FileType::Directory => return Ok(()),
            FileType::Fifo => Doing::Pipe,
            FileType::Socket => Doing::Socket,
            FileType::BlockDevice => Doing::BlockDevice,
            _ => Doing::CharacterDevice,
        }))
    }

    fn content(&mut self, file: &OwnedFd, size: u64) -> Result<(), CopyError> {
        if size == 0 {
            return self.data(file, 0, u64::MAX).map(drop);
        }
        let mut position = 0;
        while position < size {
            let data = match rustix::fs::seek(file, SeekFrom::Data(position)) {
                Ok(at) => at.min(size),
                Err(Errno::NXIO) => size,
                // Not all filesystems know of holes.
                Err(_) => position,
            };
            if data > position {
                self.out.put(&Record::Hole(data - position))?;
                position = data;
                continue;
            }
            let end = rustix::fs::seek(file, SeekFrom::Hole(data)).unwrap_or(size).min(size);
            let end = if end > data { end } else { size };
            position = self.data(file, data, end)?;
            if position < end {
                // It has become shorter.
                break;
            }
        }
        Ok(())
    }

    /// Sends what is between two positions, and says how far it came.
    fn data(&mut self, file: &OwnedFd, mut from: u64, to: u64) -> Result<u64, CopyError> {
        let mut buffer = vec![0; MAX_DATA];
        while from < to {
            let wanted = usize::try_from(to - from).map_or(MAX_DATA, |left| left.min(MAX_DATA));
            match rustix::io::pread(file.as_fd(), &mut buffer[..wanted], from) {
                Ok(0) => break,
                Ok(count) => {
                    self.out.put(&Record::Data(&buffer[..count]))?;
                    from += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.failed(Doing::Read, e)),
            }
        }
        Ok(from)
    }
}

fn meta(stat: &Stat) -> Meta {
    Meta {
        mode: stat.st_mode & 0o7777,
        mtime_s: stat.st_mtime,
        // Below a milliard, whatever its type.
        mtime_ns: stat.st_mtime_nsec as u32,
    }
}
