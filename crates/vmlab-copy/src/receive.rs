//! The end that gets the files. Nothing that comes is a path: each entry is one name in a directory that was
//! opened here, and no link is followed.

use std::ffi::{CString, OsStr};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, SeekFrom, Timespec, Timestamps, UTIME_OMIT,
};
use rustix::io::Errno;
use vmlab_wire::tree::{Doing, MAX_DATA, MAX_DEPTH, Meta, Record, TreeError};

use crate::CopyError;
use crate::stream::{Records, Writer};

/// The mode bits that files get: who owns a copy is another one, so that set-user-ID bits would be wrong.
const FILE_BITS: u32 = 0o777;

/// Of directories, the sticky bit is one for all users alike.
const DIR_BITS: u32 = 0o1777;

/// How often a name for something that takes another's place is looked for.
const TRIES: u32 = 100;

/// Receives what [`send`](crate::send) sends.
///
/// Where `target` is a directory or leads to one, the copy is put into it under `name`; without a name, what
/// is sent has to be a directory, and goes into that one. Otherwise the copy becomes `target`, whose parent
/// has to exist. Directories that exist are filled, files and links that exist are replaced, and neither
/// becomes the other.
///
/// # Errors
/// When something cannot be written, the other end fails, or what comes is no copy. A file that was being
/// written is removed; what was finished before stays.
pub fn receive(stream: impl Read, target: &Path, name: Option<&OsStr>) -> Result<(), CopyError> {
    let mut receiver = Receiver { records: Records::new(stream), path: target.to_owned() };
    let root = Root::find(target, name)?;
    if let (Root::In(..), Some(name)) = (&root, name)
        && root.is_inside()
    {
        receiver.path.push(name);
    }
    receiver.tree(&root)
}

/// Tells a sender how [`receive`] ended.
///
/// # Errors
/// When the stream fails.
pub fn answer(received: &Result<(), CopyError>, stream: impl Write) -> Result<(), CopyError> {
    let mut out = Writer::new(stream);
    match received {
        Ok(()) => out.put(&Record::Done)?,
        Err(error) => error.with_record(|record| _ = out.put(record)),
    }
    out.flush()
}

/// Where the first entry goes.
enum Root {
    /// Into a directory, under a name; whether that is in the directory that was asked for.
    In(OwnedFd, CString, bool),
    /// It is this directory.
    Is(OwnedFd),
}

impl Root {
    fn find(target: &Path, name: Option<&OsStr>) -> Result<Self, CopyError> {
        let failed = |path: &Path, errno| CopyError::here(Doing::Open, path, errno);
        let no_name = |_| failed(target, Errno::INVAL);
        match open_dir(CWD, target.as_os_str(), OFlags::PATH) {
            Ok(directory) => match name {
                Some(name) => {
                    Ok(Self::In(directory, CString::new(name.as_bytes()).map_err(no_name)?, true))
                }
                None => Ok(Self::Is(directory)),
            },
            Err(Errno::NOENT | Errno::NOTDIR) => {
                let leaf = target.file_name().ok_or_else(|| failed(target, Errno::NOENT))?;
                let parent = match target.parent() {
                    Some(parent) if !parent.as_os_str().is_empty() => parent,
                    _ => Path::new("."),
                };
                let directory = open_dir(CWD, parent.as_os_str(), OFlags::PATH)
                    .map_err(|errno| failed(parent, errno))?;
                let leaf = CString::new(leaf.as_bytes()).map_err(no_name)?;
                Ok(Self::In(directory, leaf, false))
            }
            Err(errno) => Err(failed(target, errno)),
        }
    }

    fn is_inside(&self) -> bool {
        matches!(self, Self::In(_, _, true))
    }
}

fn open_dir(
    at: BorrowedFd<'_>,
    path: impl rustix::path::Arg,
    how: OFlags,
) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(at, path, how | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// A directory that is being filled, and what it is to be at its end, if it was made here.
struct Filling {
    directory: OwnedFd,
    made: Option<Meta>,
}

struct Receiver<R> {
    records: Records<R>,
    /// What is being received, for errors.
    path: PathBuf,
}

/// What a record means for the walk. The names are taken out of the records' buffer.
enum Step {
    Dir(Meta, CString),
    File(Meta, CString),
    Symlink(Meta, CString, CString),
    End,
    Done,
}

impl<R: Read> Receiver<R> {
    fn failed(&self, doing: Doing, errno: Errno) -> CopyError {
        CopyError::here(doing, &self.path, errno)
    }

    fn step(&mut self) -> Result<Step, CopyError> {
        let name = |name: &[u8]| CString::new(name).map_err(|_| TreeError::Name);
        Ok(match self.records.next()? {
            Record::Dir(meta, bytes) => Step::Dir(meta, name(bytes)?),
            Record::File(meta, bytes) => Step::File(meta, name(bytes)?),
            Record::Symlink { meta, name: bytes, target } => {
                Step::Symlink(meta, name(bytes)?, name(target)?)
            }
            Record::End => Step::End,
            Record::Done => Step::Done,
            _ => return Err(TreeError::Order.into()),
        })
    }

    fn tree(&mut self, root: &Root) -> Result<(), CopyError> {
        let mut filling: Vec<Filling> = Vec::new();
        match (self.step()?, root) {
            (Step::Dir(_, name), Root::Is(directory)) if name.is_empty() => {
                let directory = directory
                    .try_clone()
                    .map_err(|e| CopyError::here(Doing::Open, &self.path, e))?;
                filling.push(Filling { directory, made: None });
            }
            (Step::Dir(meta, name), Root::In(parent, leaf, _)) if name.is_empty() => {
                filling.push(self.directory(parent.as_fd(), leaf, meta)?);
            }
            (Step::File(meta, name), Root::In(parent, leaf, _)) if name.is_empty() => {
                self.file(parent.as_fd(), leaf, meta)?;
            }
            (Step::File(_, name), Root::Is(_)) if name.is_empty() => {
                return Err(self.failed(Doing::Create, Errno::ISDIR));
            }
            // A link in the place of what was asked for would lead the next copy elsewhere.
            _ => return Err(TreeError::Order.into()),
        }
        while let Some(Filling { directory, .. }) = filling.last() {
            let parent = directory.as_fd();
            match self.step()? {
                Step::Dir(_, name) | Step::File(_, name) | Step::Symlink(_, name, _)
                    if name.is_empty() =>
                {
                    return Err(TreeError::Name.into());
                }
                Step::Dir(meta, name) => {
                    if filling.len() >= MAX_DEPTH {
                        return Err(TreeError::Depth.into());
                    }
                    self.enter(&name);
                    let below = self.directory(parent, &name, meta)?;
                    filling.push(below);
                }
                Step::File(meta, name) => {
                    self.enter(&name);
                    self.file(parent, &name, meta)?;
                    self.path.pop();
                }
                Step::Symlink(meta, name, target) => {
                    self.enter(&name);
                    self.symlink(parent, &name, &target, meta)?;
                    self.path.pop();
                }
                Step::End => {
                    if let Some(Filling { directory, made: Some(meta) }) = filling.pop() {
                        self.set_attributes(&directory, meta, DIR_BITS)?;
                    }
                    self.path.pop();
                }
                Step::Done => return Err(TreeError::Order.into()),
            }
        }
        match self.step()? {
            Step::Done => Ok(()),
            _ => Err(TreeError::Order.into()),
        }
    }

    fn enter(&mut self, name: &CString) {
        self.path.push(OsStr::from_bytes(name.as_bytes()));
    }

    fn directory(
        &self,
        parent: BorrowedFd<'_>,
        name: &CString,
        meta: Meta,
    ) -> Result<Filling, CopyError> {
        let failed = |errno| self.failed(Doing::Create, errno);
        // Its own mode may forbid to fill it.
        match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
            Ok(()) => {
                let directory = open_dir(parent, name, OFlags::NOFOLLOW | OFlags::RDONLY);
                Ok(Filling { directory: directory.map_err(failed)?, made: Some(meta) })
            }
            Err(Errno::EXIST) => {
                let directory = open_dir(parent, name, OFlags::NOFOLLOW | OFlags::PATH);
                Ok(Filling { directory: directory.map_err(failed)?, made: None })
            }
            Err(errno) => Err(failed(errno)),
        }
    }

    fn file(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CString,
        meta: Meta,
    ) -> Result<(), CopyError> {
        let create = |name: &CString| {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            rustix::fs::openat(parent, name, flags | OFlags::NOFOLLOW, Mode::RUSR | Mode::WUSR)
        };
        let (place, file) =
            made(parent, name, create).map_err(|errno| self.failed(Doing::Create, errno))?;
        let finished = self.content(&file, meta).and_then(|()| match place.take(parent, name) {
            // A filesystem is mounted on that very file, as in containers and guests on some of /etc.
            Err(Errno::BUSY) => {
                self.overwrite(parent, name, &file, meta)?;
                place.remove(parent, name);
                Ok(())
            }
            taken => taken.map_err(|errno| self.failed(Doing::Create, errno)),
        });
        if finished.is_err() {
            place.remove(parent, name);
        }
        finished
    }

    /// Puts a file's content into another one, which cannot be replaced.
    fn overwrite(
        &self,
        parent: BorrowedFd<'_>,
        name: &CString,
        content: &OwnedFd,
        meta: Meta,
    ) -> Result<(), CopyError> {
        let failed = |errno| self.failed(Doing::Write, errno);
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(failed)?;
        let stat = rustix::fs::fstat(&file).map_err(failed)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(failed(Errno::BUSY));
        }
        rustix::fs::ftruncate(&file, 0).map_err(failed)?;
        let mut buffer = vec![0; MAX_DATA];
        let mut at = 0;
        loop {
            match rustix::io::pread(content, &mut buffer, at) {
                Ok(0) => break,
                Ok(count) => {
                    write_all(&file, &buffer[..count]).map_err(failed)?;
                    at += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        self.set_attributes(&file, meta, FILE_BITS)
    }

    fn content(&mut self, file: &OwnedFd, meta: Meta) -> Result<(), CopyError> {
        let mut length: u64 = 0;
        let longer = |length: u64, by: u64| {
            let sum = length.checked_add(by).filter(|sum| i64::try_from(*sum).is_ok());
            sum.ok_or(CopyError::Malformed(TreeError::TooLong))
        };
        loop {
            match self.records.next()? {
                Record::Data(bytes) => {
                    length = longer(length, bytes.len() as u64)?;
                    write_all(file, bytes)
                        .map_err(|e| CopyError::here(Doing::Write, &self.path, e))?;
                }
                Record::Hole(by) => {
                    length = longer(length, by)?;
                    rustix::fs::seek(file, SeekFrom::Start(length))
                        .map_err(|e| self.failed(Doing::Write, e))?;
                }
                Record::End => break,
                _ => return Err(TreeError::Order.into()),
            }
        }
        // A hole at the end is not written.
        rustix::fs::ftruncate(file, length).map_err(|e| self.failed(Doing::Write, e))?;
        self.set_attributes(file, meta, FILE_BITS)
    }

    fn symlink(
        &self,
        parent: BorrowedFd<'_>,
        name: &CString,
        target: &CString,
        meta: Meta,
    ) -> Result<(), CopyError> {
        let create = |name: &CString| rustix::fs::symlinkat(target, parent, name);
        let (place, ()) =
            made(parent, name, create).map_err(|errno| self.failed(Doing::Create, errno))?;
        let at = place.name(name);
        rustix::fs::utimensat(parent, at, &times(meta), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| self.failed(Doing::Attributes, errno))
            .and_then(|()| {
                place.take(parent, name).map_err(|errno| self.failed(Doing::Create, errno))
            })
            .inspect_err(|_| place.remove(parent, name))
    }

    fn set_attributes(&self, file: &OwnedFd, meta: Meta, bits: u32) -> Result<(), CopyError> {
        rustix::fs::fchmod(file, Mode::from_raw_mode(meta.mode & bits))
            .and_then(|()| rustix::fs::futimens(file, &times(meta)))
            .map_err(|errno| self.failed(Doing::Attributes, errno))
    }
}

fn write_all(file: &OwnedFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(file, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn times(meta: Meta) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: meta.mtime_s, tv_nsec: meta.mtime_ns.into() },
    }
}

/// Where something is made: at once where it belongs, or beside what it will replace.
enum Place {
    Own,
    Beside(CString),
}

/// Makes something new, whatever is in its place.
fn made<T>(
    parent: BorrowedFd<'_>,
    name: &CString,
    create: impl Fn(&CString) -> rustix::io::Result<T>,
) -> rustix::io::Result<(Place, T)> {
    match create(name) {
        Err(Errno::EXIST) => {}
        other => return other.map(|made| (Place::Own, made)),
    }
    // Told now, and not when all is there.
    let there = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(there.st_mode) == FileType::Directory {
        return Err(Errno::ISDIR);
    }
    let process = rustix::process::getpid().as_raw_nonzero();
    for number in 0..TRIES {
        let beside = CString::new(format!(".vmlab-copy-{process}-{number}")).unwrap_or_default();
        match create(&beside) {
            Err(Errno::EXIST) => {}
            other => return other.map(|made| (Place::Beside(beside), made)),
        }
    }
    Err(Errno::EXIST)
}

impl Place {
    fn name<'a>(&'a self, own: &'a CString) -> &'a CString {
        match self {
            Self::Own => own,
            Self::Beside(name) => name,
        }
    }

    /// Puts it where it belongs.
    fn take(&self, parent: BorrowedFd<'_>, own: &CString) -> rustix::io::Result<()> {
        match self {
            Self::Own => Ok(()),
            Self::Beside(name) => rustix::fs::renameat(parent, name, parent, own),
        }
    }

    /// Removes what is only half there.
    fn remove(&self, parent: BorrowedFd<'_>, own: &CString) {
        // The failure that led here is the one to tell.
        let _ = rustix::fs::unlinkat(parent, self.name(own), AtFlags::empty());
    }
}
