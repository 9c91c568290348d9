//! Disk images: what a file that is said to be one really is, and the disk in it.
//!
//! A format is told by magic bytes and given to QEMU by name. An image may name other files, which QEMU
//! then opens: only such as are beside it are allowed, since an image from elsewhere must not make QEMU
//! read any other file of this host, and only where its name says its format, since a guest that may write
//! to a raw disk can make an image of some other format of it.

pub(crate) mod numbers;
mod probe;
mod references;
#[cfg(test)]
mod tests;
mod unpack;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::boot_image::found;
use crate::cache::{Cache, CacheError, Lease};
use crate::compress::Compression;
use crate::progress::Progress;

use numbers::read_at;
use probe::Found;
pub(crate) use unpack::KIND;

/// A format of disk images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageFormat {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's own (`docs/interop/qcow2.txt`).
    Qcow2,
    /// VMware's, in one file or a descriptor with extents beside it.
    Vmdk,
    /// VirtualBox's.
    Vdi,
}

impl ImageFormat {
    /// The name by which QEMU knows it.
    pub const fn name(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Vmdk => "vmdk",
            ImageFormat::Vdi => "vdi",
        }
    }
}

impl std::fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// An image that QEMU can open.
#[derive(Debug)]
pub struct DiskImage {
    /// The file, absolute: the one that was asked for, or what was unpacked from it.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Keeps what was unpacked in the cache for as long as it is there.
    pub lease: Option<Lease>,
}

/// What can be given instead of a wrong file.
const USABLE: &str = "give a raw, qcow2, vmdk or vdi image, which may be compressed (.zst, .xz, .gz, .bz2) \
                      or in a tar archive (.ova)";

/// Why a file is no image that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// It is something else.
    #[error("{} is {what}, not a disk image: {advice}", path.display())]
    NotADisk {
        /// The file.
        path: PathBuf,
        /// What it is, a noun with its article.
        what: String,
        /// What to do.
        advice: String,
    },
    /// A part of it is missing.
    #[error(
        "the {format} image {} is truncated: it reaches to byte {need}, and the file has {have}; \
         was it copied or downloaded to the end?", path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: ImageFormat,
        /// How many bytes the file would need to have, at least.
        need: u64,
        /// How many bytes it has.
        have: u64,
    },
    /// It names a file that it may not name.
    #[error(
        "the image {} has `{name}` as its {role}, {why}; an image may only use plain files beside it, since one \
         from elsewhere could make QEMU read any file of this host; if you trust it, \
         `qemu-img convert -O qcow2 {} OUT` makes one that needs no other file", path.display(), path.display()
    )]
    Reference {
        /// The image.
        path: PathBuf,
        /// What the other file is for it.
        role: &'static str,
        /// The other file's name.
        name: String,
        /// What is wrong with it, a clause.
        why: String,
    },
    /// It has a feature that is not supported, or is damaged.
    #[error("the {format} image {} cannot be used: {why}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: ImageFormat,
        /// Why, a sentence.
        why: String,
    },
    /// An archive has several disks.
    #[error("{} has several disks; unpack it and name one of them: {}", path.display(), disks.join(", "))]
    Several {
        /// The archive.
        path: PathBuf,
        /// Their names in it.
        disks: Vec<String>,
    },
    /// An archive has no disk.
    #[error("{} has no disk image in it; it has {}", path.display(), list(files))]
    NoDisk {
        /// The archive.
        path: PathBuf,
        /// What it has.
        files: Vec<String>,
    },
    /// An archive's description of a machine cannot be read.
    #[error("the description `{name}` in {} cannot be used: {why}", path.display())]
    Ovf {
        /// The archive.
        path: PathBuf,
        /// The description's name in it.
        name: String,
        /// Why.
        why: String,
    },
    /// A compressed file or archive cannot be unpacked.
    #[error("{} cannot be unpacked: it is damaged or incomplete", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        source: io::Error,
    },
    /// What is in a compressed file is larger than allowed.
    #[error("{} holds an image of more than {} GiB, which is not unpacked; unpack it yourself", path.display(), limit >> 30)]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A file operation failed.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was being done, an infinitive.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl ImageError {
    fn io(doing: &'static str, path: &Path, source: io::Error) -> ImageError {
        ImageError::Io { doing, path: path.to_owned(), source }
    }

    fn not_a_disk(path: &Path, what: impl Into<String>, advice: Option<&str>) -> ImageError {
        let advice = advice.unwrap_or(USABLE).to_owned();
        ImageError::NotADisk { path: path.to_owned(), what: what.into(), advice }
    }
}

/// Opens a disk image. What is compressed or in an archive is unpacked once, into the cache.
///
/// # Errors
/// [`ImageError`] names the file, what it seems to be, and what can be used.
pub fn open(cache: &Cache, path: &Path, progress: &dyn Progress) -> Result<DiskImage, ImageError> {
    let io = |source| ImageError::io("open the disk image", path, source);
    let path = &std::path::absolute(path).map_err(io)?;
    let file_type = std::fs::metadata(path).map_err(io)?.file_type();
    if !file_type.is_file() {
        return Err(ImageError::not_a_disk(path, found::file_type(file_type), None));
    }
    let (head, len) = read_head(path).map_err(io)?;
    match probe::find(&head, Some(len)) {
        Found::Disk(format) => {
            check(path, format, Siblings::of(path, format))?;
            Ok(DiskImage { path: path.clone(), format, lease: None })
        }
        Found::Compressed(_) | Found::Tar => unpack::unpacked(cache, path, progress),
        Found::Other { what, advice } => Err(ImageError::not_a_disk(path, what, advice)),
    }
}

/// Opens a disk that may have anything on it: a file of no other format is its bytes as they are.
///
/// # Errors
/// As for [`open`].
pub fn open_data(path: &Path) -> Result<DiskImage, ImageError> {
    let io = |source| ImageError::io("open the disk", path, source);
    let path = &std::path::absolute(path).map_err(io)?;
    let file_type = std::fs::metadata(path).map_err(io)?.file_type();
    if !file_type.is_file() && !file_type.is_block_device() {
        return Err(ImageError::not_a_disk(path, found::file_type(file_type), None));
    }
    let (head, len) = read_head(path).map_err(io)?;
    let format = match probe::find(&head, Some(len)) {
        Found::Disk(format) if file_type.is_file() => format,
        Found::Other { what, advice: Some(probe::CONVERT) } => {
            return Err(ImageError::not_a_disk(path, what, Some(probe::CONVERT)));
        }
        _ => ImageFormat::Raw,
    };
    if format != ImageFormat::Raw {
        check(path, format, Siblings::of(path, format))?;
    }
    Ok(DiskImage { path: path.clone(), format, lease: None })
}

/// Whether a file is a qcow2 image.
pub(crate) fn is_qcow2(file: &File) -> bool {
    let head = read_at(file, 0, 8).unwrap_or_default();
    matches!(probe::find(&head, None), Found::Disk(ImageFormat::Qcow2))
}

/// Whether an image may name files beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Siblings {
    Allowed,
    /// There are none that belong to it.
    None,
}

impl Siblings {
    /// A guest that writes to a raw disk can make an image of another format of it. So only a file whose name
    /// says its format may have others beside it.
    fn of(path: &Path, format: ImageFormat) -> Self {
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        match ending.eq_ignore_ascii_case(format.name()) {
            true => Siblings::Allowed,
            false => Siblings::None,
        }
    }
}

/// Checks what can be told without reading all of an image: that it is whole, and what it names.
fn check(path: &Path, format: ImageFormat, siblings: Siblings) -> Result<(), ImageError> {
    let io = |source| ImageError::io("read the disk image", path, source);
    let file = File::open(path).map_err(io)?;
    let have = file.metadata().map_err(io)?.len();
    references::check(path, format, siblings)?;
    match probe::needed(&file, format).map_err(io)? {
        Some(need) if need > have => {
            Err(ImageError::Truncated { path: path.to_owned(), format, need, have })
        }
        _ => Ok(()),
    }
}

/// The beginning of a file, and its length.
fn read_head(path: &Path) -> io::Result<(Vec<u8>, u64)> {
    let file = File::open(path)?;
    let head = read_at(&file, 0, probe::HEAD_LEN)?;
    Ok((head, file.metadata()?.len()))
}

/// As many names as a message has room for.
const LISTED: usize = 8;

fn list(names: &[String]) -> String {
    match names.len() {
        0 => "no files at all".to_owned(),
        len if len > LISTED => format!("{} and {} more", names[..LISTED].join(", "), len - LISTED),
        _ => names.join(", "),
    }
}
