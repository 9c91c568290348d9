//! Boot images: what a file that is said to be a kernel really is, and the uncompressed kernel in it.
//!
//! A file is judged by its magic bytes and its header before any VM starts, so that a wrong file is
//! an error that names what was found, and not a guest that stays silent.

mod arm64;
mod banner;
mod bzimage;
mod elf;
pub(crate) mod found;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use object::read::{ReadCache, ReadRef};
use serde::{Deserialize, Serialize};

use crate::Arch;
use crate::compress::{self, CompressError, Compression, Limit};

pub use banner::find as linux_banner;

/// The largest kernel that is decompressed, in bytes. Distribution kernels have 30 to 90 MiB.
pub const KERNEL_LEN_MAX: usize = 1 << 30;

/// The largest compressed payload that is read into memory, in bytes.
const PAYLOAD_LEN_MAX: u64 = 512 << 20;

/// How much of a compressed file is read to learn what is in it.
const HEAD_LEN: u64 = 64 << 10;

/// The three kinds of boot image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootFormat {
    /// x86: real-mode setup code, a decompressor and a compressed `vmlinux`
    /// (`Documentation/arch/x86/boot.rst`).
    BzImage,
    /// An uncompressed kernel as an ELF file, `vmlinux`.
    Elf,
    /// arm64: `Image`, or `Image.gz` (`Documentation/arch/arm64/booting.rst`).
    Arm64Image,
}

impl std::fmt::Display for BootFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            BootFormat::BzImage => "bzImage",
            BootFormat::Elf => "vmlinux (ELF)",
            BootFormat::Arm64Image => "arm64 Image",
        })
    }
}

/// What is wrong with a file that should be a boot image. Completes the sentence
/// "it cannot be booted: …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Defect {
    /// It is something else. Holds a noun with its article, as in "a gzip stream".
    #[error("it is {0}, not a kernel")]
    NotAKernel(String),
    /// It is a kernel, but not all of it.
    #[error("it is truncated: {part} reaches to byte {need}, and the file has {have}")]
    Truncated {
        /// The part that is not complete.
        part: &'static str,
        /// How many bytes the file would need to have.
        need: u64,
        /// How many bytes it has.
        have: u64,
    },
    /// A kernel for a processor that vmlab does not run. Holds the machine's name.
    #[error("it is a kernel for {0}; kernels for x86_64 and aarch64 can be booted")]
    ForeignMachine(String),
    /// A bzImage of before Linux 2.6.22.
    #[error("its boot protocol is version {}.{:02}, and 2.06 is the oldest that works", .0 >> 8, .0 & 0xff)]
    OldBootProtocol(u16),
    /// A header field holds a value that no kernel has.
    #[error("its header is damaged: {field} is {value:#x}")]
    BadField {
        /// The field, by its name in the format's documentation.
        field: &'static str,
        /// The value found.
        value: u64,
    },
    /// What is compressed is in an unknown format, or the header does not say where it is. Holds
    /// what is known of it.
    #[error("it is in no known compression format ({0})")]
    UnknownPayload(String),
    /// The decompressed kernel has another length than the image declares.
    #[error("its kernel decompresses to {got} bytes, and {declared} are declared")]
    PayloadLength {
        /// The declared length.
        declared: u64,
        /// The length of what came out.
        got: u64,
    },
}

/// Why a boot image could not be opened or extracted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootImageError {
    /// The file cannot be opened or read.
    #[error("cannot read the kernel {}{}", path.display(), permission_hint(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is no boot image that works.
    #[error(
        "the kernel {} cannot be booted: {defect}; give a bzImage, a vmlinux (64-bit ELF) or an arm64 Image",
        path.display()
    )]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        defect: Defect,
    },
    /// The kernel inside the image cannot be decompressed.
    #[error("cannot decompress the kernel in {}{}", path.display(), damage_hint(source))]
    Decompress {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        #[source]
        source: CompressError,
    },
    /// What was decompressed from the image is no kernel.
    #[error("what is compressed in {} cannot be booted: {defect}", path.display())]
    InvalidPayload {
        /// The file.
        path: PathBuf,
        /// What is wrong with the decompressed kernel.
        defect: Defect,
    },
}

/// Where the kernel stands in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Payload {
    /// The file is the kernel.
    Plain,
    /// A part of the file is a compressed kernel.
    Compressed {
        range: Range<u64>,
        compression: Compression,
        /// The stream's last four bytes hold the content's length, and belong to the stream only
        /// in the case of gzip.
        has_length: bool,
    },
    /// A part of the file is a kernel in a format that is unknown. Holds what is known of it.
    Unknown(String),
}

/// What the header of a boot image says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Header {
    arch: Arch,
    format: BootFormat,
    version: Option<String>,
    pvh_entry: Option<u32>,
    payload: Payload,
    /// Where in the file the version string may be, if the header does not have it.
    banner_range: Option<Range<u64>>,
}

/// A file that was recognised as a kernel, with what its header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootImage {
    path: PathBuf,
    len: u64,
    header: Header,
}

impl BootImage {
    /// Opens a file and validates its magic bytes and header.
    ///
    /// The content is not decompressed, so that damage further inside is found by
    /// [`BootImage::extract`] only.
    pub fn open(path: &Path) -> Result<BootImage, BootImageError> {
        let (file, mut image) = BootImage::open_header(path)?;
        if let (None, Some(range)) = (&image.header.version, &image.header.banner_range) {
            image.header.version = banner::find_in_file(&file, range.clone())
                .map_err(|source| BootImageError::Io { path: path.to_owned(), source })?;
        }
        Ok(image)
    }

    /// As [`BootImage::open`], but a `vmlinux` or `Image`, whose header does not have the version string,
    /// is not searched for it: that means to read most of it.
    pub fn open_unversioned(path: &Path) -> Result<BootImage, BootImageError> {
        BootImage::open_header(path).map(|(_, image)| image)
    }

    fn open_header(path: &Path) -> Result<(File, BootImage), BootImageError> {
        let io_error = |source| BootImageError::Io { path: path.to_owned(), source };
        let invalid = |defect| BootImageError::Invalid { path: path.to_owned(), defect };

        // Opening a FIFO would wait for a writer, so the kind of file is looked at before.
        let file_type = std::fs::metadata(path).map_err(io_error)?.file_type();
        if !file_type.is_file() {
            return Err(invalid(Defect::NotAKernel(found::file_type(file_type))));
        }
        let file = File::open(path).map_err(io_error)?;
        let len = file.metadata().map_err(io_error)?.len();
        // The reader below cannot say why it failed; a file that cannot be read at all fails here.
        file.read_at(&mut [0], 0).map_err(io_error)?;
        let header = parse(&ReadCache::new(&file)).map_err(invalid)?;
        Ok((file, BootImage { path: path.to_owned(), len, header }))
    }

    /// The architecture that the kernel is for.
    ///
    /// For a bzImage with a boot protocol before 2.12 (Linux 3.8), which does not say so, x86_64 is
    /// assumed, and [`BootImage::extract`] finds out.
    pub fn arch(&self) -> Arch {
        self.header.arch
    }

    /// The kind of boot image.
    pub fn format(&self) -> BootFormat {
        self.header.format
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length in bytes, at least 1.
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// The kernel's release, builder and build, like
    /// `6.12.1 (user@host) #1 SMP PREEMPT_DYNAMIC Fri Nov 20 15:51:15 UTC 2026`.
    ///
    /// A bzImage has it in its header; a `vmlinux` or `Image` is searched for it. `None` where there
    /// is none, and for an `Image.gz`.
    pub fn version_string(&self) -> Option<&str> {
        self.header.version.as_deref()
    }

    /// The kernel's release as `uname -r` prints it: the first word of the version string.
    pub fn release(&self) -> Option<&str> {
        self.version_string()?.split_ascii_whitespace().next()
    }

    /// How the kernel inside is compressed. `None` where the file itself is the kernel, or the
    /// format is unknown.
    pub fn compression(&self) -> Option<Compression> {
        match self.header.payload {
            Payload::Compressed { compression, .. } => Some(compression),
            Payload::Plain | Payload::Unknown(_) => None,
        }
    }

    /// The physical address of the PVH entry point of a `vmlinux`, from its Xen ELF note. `None`
    /// for other formats; see [`pvh_entry`] for the kernel inside them.
    pub fn pvh_entry(&self) -> Option<u32> {
        self.header.pvh_entry
    }

    /// Decompresses the kernel in the image: the `vmlinux` of a bzImage, the `Image` of an
    /// `Image.gz`. `None` where the file itself is the uncompressed kernel.
    ///
    /// The result has passed the same validation as a file of its format.
    pub fn extract(&self) -> Result<Option<Vec<u8>>, BootImageError> {
        let invalid = |defect| BootImageError::InvalidPayload { path: self.path.clone(), defect };
        let (range, compression, has_length) = match &self.header.payload {
            Payload::Plain => return Ok(None),
            Payload::Unknown(what) => return Err(invalid(Defect::UnknownPayload(what.clone()))),
            Payload::Compressed { range, compression, has_length } => {
                (range, *compression, *has_length)
            }
        };
        let len = range.end - range.start;
        if len > PAYLOAD_LEN_MAX {
            return Err(invalid(Defect::BadField { field: "payload_length", value: len }));
        }
        let mut stream = vec![0; len as usize];
        File::open(&self.path)
            .and_then(|file| file.read_exact_at(&mut stream, range.start))
            .map_err(|source| BootImageError::Io { path: self.path.clone(), source })?;
        let kernel = decompress_payload(&stream, compression, has_length).map_err(|error| {
            let path = self.path.clone();
            match error {
                PayloadError::Decompress(source) => BootImageError::Decompress { path, source },
                PayloadError::Defect(defect) => BootImageError::InvalidPayload { path, defect },
            }
        })?;
        let inner = parse(kernel.as_slice()).and_then(|inner| match inner.payload {
            Payload::Plain if inner.arch == self.header.arch => Ok(()),
            Payload::Plain => Err(Defect::ForeignMachine(inner.arch.to_string())),
            _ => Err(Defect::NotAKernel("another compressed kernel".to_owned())),
        });
        inner.map(|()| Some(kernel)).map_err(invalid)
    }
}

/// The physical address of the PVH entry point of an uncompressed x86 kernel (an ELF file), if it
/// has one: the ELF note `XEN_ELFNOTE_PHYS32_ENTRY`.
pub fn pvh_entry(vmlinux: &[u8]) -> Option<u32> {
    elf::parse(vmlinux).ok()?.pvh_entry
}

/// Some distributions make kernels readable for root only, which surprises everybody else.
fn permission_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; make it readable (`sudo chmod a+r`) or copy it",
        _ => "",
    }
}

fn damage_hint(error: &CompressError) -> &'static str {
    match error {
        CompressError::OutOfMemory { .. } => "",
        _ => "; the file is damaged, fetch or build it again",
    }
}

enum PayloadError {
    Decompress(CompressError),
    Defect(Defect),
}

/// Decompresses a kernel, checking the length that the kernel's build appends to the stream.
fn decompress_payload(
    stream: &[u8],
    compression: Compression,
    has_length: bool,
) -> Result<Vec<u8>, PayloadError> {
    let split = stream.len().saturating_sub(4);
    let declared = match stream[split..].try_into() {
        Ok(bytes) if has_length => Some(u32::from_le_bytes(bytes) as usize),
        _ => None,
    };
    if let Some(declared) = declared.filter(|&declared| declared > KERNEL_LEN_MAX) {
        let value = declared as u64;
        return Err(PayloadError::Defect(Defect::BadField {
            field: "the payload's length",
            value,
        }));
    }
    // The length is a part of the gzip format; with the others the kernel's build appends it.
    let stream = match compression {
        Compression::Gzip => stream,
        _ if has_length => &stream[..split],
        _ => stream,
    };
    let limit = Limit { max: KERNEL_LEN_MAX, expected: declared };
    let kernel =
        compress::decompress(compression, stream, limit).map_err(PayloadError::Decompress)?;
    match declared {
        Some(declared) if declared != kernel.len() => {
            Err(PayloadError::Defect(Defect::PayloadLength {
                declared: declared as u64,
                got: kernel.len() as u64,
            }))
        }
        _ => Ok(kernel),
    }
}

/// Recognises a boot image and validates its header.
fn parse<'data, R: ReadRef<'data>>(data: R) -> Result<Header, Defect> {
    let len = data.len().unwrap_or(0);
    let head = data.read_bytes_at(0, len.min(HEAD_LEN)).unwrap_or(&[]);
    if head.starts_with(&object::elf::ELFMAG) {
        elf::parse(data)
    } else if bzimage::is_magic(head) {
        bzimage::parse(data, head, len)
    } else if arm64::is_magic(head) {
        arm64::parse(head, len)
    } else if Compression::sniff(head) == Some(Compression::Gzip) {
        arm64::parse_gzip(head, len)
    } else {
        Err(Defect::NotAKernel(found::describe(head, len)))
    }
}
