//! Copies of disks that a VM has for itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{OFlags, ioctl_ficlone};
use serde::Serialize;
use vmlab_devices::{blk, sparse};

use crate::Error;
use crate::config::{DiskDevice, DiskWrites};

/// More than this many bytes are not copied unless that is asked for: the copy would take longer than most
/// runs, and an overlay takes nothing.
const AUTO_COPY_MAX: u64 = 256 * 1024 * 1024;

/// How a VM gets a disk of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CloneMode {
    /// The first of the others that works. A copy is made of no more than 256 MiB.
    #[default]
    Auto,
    /// A file that shares its blocks with the first one: `FICLONE`, which Btrfs, XFS and others have.
    Reflink,
    /// A copy of the data, without the holes.
    Copy,
    /// A layer over the file, of the hypervisor's own.
    Overlay,
}

impl CloneMode {
    const NAMES: [(&str, Self); 4] = [
        ("auto", Self::Auto),
        ("reflink", Self::Reflink),
        ("copy", Self::Copy),
        ("overlay", Self::Overlay),
    ];
}

impl FromStr for CloneMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::NAMES.iter().find(|(name, _)| *name == text);
        found.map(|(_, mode)| *mode).ok_or_else(|| {
            format!("`{text}` is no way to clone; there are auto, reflink, copy and overlay")
        })
    }
}

/// Copies that have no names. They are there as long as this is.
#[derive(Debug, Default)]
pub(crate) struct OwnDisks {
    #[allow(dead_code, reason = "they are open as long as it is there")]
    files: Vec<File>,
    kept: Vec<PathBuf>,
}

impl OwnDisks {
    /// Takes those away that were to be kept: of a VM that has not come up, there is nothing in them.
    pub(crate) fn keep_none(&self) {
        for path in &self.kept {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Makes the copies of all disks that the VM is to have for itself, and names them in their configurations.
///
/// # Errors
/// One cannot be made.
pub(crate) fn give_each_its_own(disks: &mut [DiskDevice]) -> Result<OwnDisks, Error> {
    let mut own = OwnDisks::default();
    for disk in disks {
        let DiskWrites::Cloned(mode) = disk.writes else { continue };
        let made = cloned(disk, mode).inspect_err(|_| own.keep_none())?;
        match made {
            Some(file) => {
                own.kept.extend(disk.keep.clone());
                disk.path = match &disk.keep {
                    Some(path) => path.clone(),
                    None => unnamed_path(&file),
                };
                own.files.push(file);
            }
            None => disk.writes = DiskWrites::Discarded,
        }
    }
    Ok(own)
}

/// A copy of the disk's file; `None` where it is to have a layer over it.
fn cloned(disk: &DiskDevice, mode: CloneMode) -> Result<Option<File>, Error> {
    let failed = |what: &'static str, hint: &'static str, source: io::Error| Error::Io {
        what,
        path: disk.path.clone(),
        source,
        hint,
    };
    if mode == CloneMode::Overlay {
        return Ok(None);
    }
    let from = File::open(&disk.path).map_err(|e| failed("open the disk", "", e))?;
    if !from.metadata().map_err(|e| failed("look at", "", e))?.is_file() {
        if mode == CloneMode::Auto && disk.keep.is_none() {
            return Ok(None);
        }
        let why = io::Error::other("it is a block device");
        return Err(failed("copy", "; clone=overlay does without a copy", why));
    }
    let file = match &disk.keep {
        Some(path) => named(path).map_err(|source| Error::Io {
            what: "make the disk",
            path: path.clone(),
            source,
            hint: "",
        }),
        None => unnamed(&disk.path).map_err(|e| failed("make a copy beside", "", e)),
    }?;
    let wanted = mode == CloneMode::Copy || disk.keep.is_some();
    let made = match mode {
        CloneMode::Copy => copy(&from, &file).map(|()| true),
        CloneMode::Reflink => ioctl_ficlone(&file, &from).map(|()| true).map_err(Into::into),
        _ if ioctl_ficlone(&file, &from).is_ok() => Ok(true),
        _ if !wanted && sparse::data(&from).map_err(|e| failed("read", "", e))? > AUTO_COPY_MAX => {
            Ok(false)
        }
        _ => match copy(&from, &file) {
            // The layer takes what is written only, and may be on another disk.
            Err(error) if !wanted && is_full(&error) => Ok(false),
            copied => copied.map(|()| true),
        },
    };
    match made {
        Ok(own) => Ok(own.then_some(file)),
        Err(error) => {
            if let Some(path) = &disk.keep {
                // It is not what somebody wanted to keep.
                let _ = std::fs::remove_file(path);
            }
            Err(match mode {
                CloneMode::Reflink => {
                    let hint = "; its file system cannot share blocks, or the copy is on another \
                                one: clone=auto does without";
                    failed("share the blocks of", hint, error)
                }
                _ => failed("copy", "; clone=overlay takes no space at first", error),
            })
        }
    }
}

/// What a disk of the VM's own has on it at one moment, to be brought back later.
#[derive(Debug)]
pub(crate) struct SavedDisk {
    path: PathBuf,
    content: File,
}

impl SavedDisk {
    /// Saves what is in the file of a disk that nobody writes to.
    pub(crate) fn of(path: &Path) -> Result<Self, Error> {
        let save = || {
            let content = unnamed(&std::fs::canonicalize(path).unwrap_or_else(|_| path.into()))?;
            replicate(&File::open(path)?, &content)?;
            Ok(Self { path: path.to_owned(), content })
        };
        save().map_err(|source| Error::Io {
            what: "save what is on the disk",
            path: path.to_owned(),
            source,
            hint: "",
        })
    }

    /// Brings it back.
    pub(crate) fn restore(&self) -> Result<(), Error> {
        let restore = || {
            let to = OpenOptions::new().read(true).write(true).open(&self.path)?;
            if !blk::lock_to_write(&to)? {
                return Err(io::Error::other("another VM uses it"));
            }
            // What is a hole in what was saved has to be one again.
            to.set_len(0)?;
            replicate(&self.content, &to)
        };
        restore().map_err(|source| Error::Io {
            what: "bring back what was on the disk",
            path: self.path.clone(),
            source,
            hint: "",
        })
    }
}

/// Shares a file's blocks with an empty one, or copies its data.
fn replicate(from: &File, to: &File) -> io::Result<()> {
    ioctl_ficlone(to, from).or_else(|_| copy(from, to))
}

fn copy(from: &File, to: &File) -> io::Result<()> {
    to.set_len(from.metadata()?.len())?;
    sparse::copy(from, to)
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Where another process finds a file that has no other name, for as long as it is open.
pub(super) fn unnamed_path(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

fn named(path: &Path) -> io::Result<File> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent)?;
    }
    // What was kept of an earlier run stays.
    OpenOptions::new().read(true).write(true).create_new(true).open(path)
}

/// A file without a name on the filesystem of another.
fn unnamed(beside: &Path) -> io::Result<File> {
    let parent = beside.parent().filter(|parent| !parent.as_os_str().is_empty());
    let dir = parent.unwrap_or(Path::new("."));
    let flags = OFlags::TMPFILE.bits() as i32;
    let open = |dir: &Path| {
        OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags).open(dir)
    };
    open(dir).or_else(|_| open(&std::env::temp_dir())).or_else(|_| open(Path::new("/var/tmp")))
}
