//! Compressed images and archives, unpacked once into the cache.
//!
//! ```text
//! unpacked-images/KEY/disk         the image, sparse
//! unpacked-images/KEY/image.json   its format, length and SHA-256
//! ```

mod ovf;

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::probe::{self, Found};
use super::{DiskImage, ImageError, ImageFormat, Siblings, check, read_head};
use crate::cache::{Cache, CacheError, ContentKey, Digest, Flaw};
use crate::compress::Compression;
use crate::kinds::{Bound, Kind};
use crate::progress::Progress;

const NAME: &str = "unpacked-images";

/// As much as is kept of unpacked images, in bytes on disk. They are unpacked again in a minute.
const KEPT: u64 = 40 << 30;

pub(crate) const KIND: Kind = Kind { name: NAME, bound: Bound::Bytes(KEPT), verify: verify_all };

const DISK: &str = "disk";
const RECORD: &str = "image.json";

/// The largest image that is unpacked, holes included: a few bytes can be compressed zeros without end.
const CONTENT_MAX: u64 = 256 << 30;

/// How often something compressed, or an archive, may be in another.
const LAYERS_MAX: usize = 4;

/// The memory that liblzma may use for its dictionary; `xz -9` has one of 64 MiB.
const XZ_MEMORY_MAX: u64 = 1 << 30;

/// The largest description of a machine that is read, in bytes. They have some ten thousand.
const OVF_MAX: u64 = 4 << 20;

/// What is written, or is a hole, at once.
const BLOCK: usize = 64 << 10;

#[derive(Serialize, Deserialize)]
struct Record {
    format: ImageFormat,
    len: u64,
    sha256: Digest,
}

fn record(entry: &Path) -> Result<Record, Flaw> {
    let record: Record = serde_json::from_slice(&fs::read(entry.join(RECORD))?)?;
    let len = fs::symlink_metadata(entry.join(DISK))?.len();
    match len == record.len {
        true => Ok(record),
        false => Err(format!("the image has {len} bytes instead of {}", record.len).into()),
    }
}

fn verify_all(entry: &Path) -> Result<(), Flaw> {
    match Digest::of_file(&entry.join(DISK))? == record(entry)?.sha256 {
        true => Ok(()),
        false => Err("the image has changed since it was unpacked".into()),
    }
}

/// The image in a compressed file or an archive.
pub(super) fn unpacked(
    cache: &Cache,
    path: &Path,
    progress: &dyn Progress,
) -> Result<DiskImage, ImageError> {
    let digest = cache.digest(path).map_err(|e| ImageError::io("read the disk image", path, e))?;
    let key = ContentKey::new("unpacked-image-1").field("content", digest).finish();
    let built = Cell::new(false);
    let build = |dir: &Path| {
        built.set(true);
        progress.phase("unpack the disk image");
        build(path, dir)
    };
    let verify = |entry: &Path| record(entry).map(drop);
    let on_wait = |_| progress.note("another process unpacks the same disk image");
    let (entry, lease) = cache.get_or_build_leased(NAME, &key, verify, build, on_wait)?;
    if built.get() {
        cache.prune_to_size(NAME, KEPT)?;
    }
    let record = record(&entry).map_err(|source| CacheError::BuiltBad {
        kind: NAME.to_owned(),
        key,
        source,
    })?;
    Ok(DiskImage { path: entry.join(DISK), format: record.format, lease: Some(lease) })
}

fn build(path: &Path, dir: &Path) -> Result<(), ImageError> {
    let file = File::open(path).map_err(|e| ImageError::io("open the disk image", path, e))?;
    let disk = dir.join(DISK);
    let (len, sha256) = Source { path, disk: &disk }.unpack(Box::new(file), 0)?;
    let (head, _) =
        read_head(&disk).map_err(|e| ImageError::io("read the unpacked image", &disk, e))?;
    let Found::Disk(format) = probe::find(&head, Some(len)) else {
        // It was one when it was written.
        return Err(damaged(path, io::ErrorKind::InvalidData.into()));
    };
    // The user knows the file that was given, and no other.
    check(&disk, format, Siblings::None).map_err(|error| renamed(error, path))?;
    let record = serde_json::to_vec(&Record { format, len, sha256 })
        .map_err(|e| ImageError::io("write the record of", &disk, e.into()))?;
    let place = dir.join(RECORD);
    fs::write(&place, record).map_err(|e| CacheError::io("write", &place, e).into())
}

fn damaged(path: &Path, source: io::Error) -> ImageError {
    ImageError::Damaged { path: path.to_owned(), source }
}

fn renamed(mut error: ImageError, name: &Path) -> ImageError {
    match &mut error {
        ImageError::Truncated { path, .. }
        | ImageError::Reference { path, .. }
        | ImageError::Unusable { path, .. } => *path = name.to_owned(),
        _ => {}
    }
    error
}

/// What is unpacked, and where to.
struct Source<'a> {
    path: &'a Path,
    disk: &'a Path,
}

type Unpacked = (u64, Digest);

impl Source<'_> {
    /// Writes the disk that a stream is or has in it.
    fn unpack(&self, stream: Box<dyn Read + '_>, layer: usize) -> Result<Unpacked, ImageError> {
        let (head, stream) = peek(stream).map_err(|e| damaged(self.path, e))?;
        match probe::find(&head, None) {
            Found::Disk(_) => self.write(stream),
            Found::Compressed(_) | Found::Tar if layer == LAYERS_MAX => {
                let what = format!("compressed or an archive {LAYERS_MAX} times over");
                Err(ImageError::not_a_disk(self.path, what, None))
            }
            Found::Compressed(compression) => {
                let decoder = decoder(compression, stream).map_err(|e| damaged(self.path, e))?;
                self.unpack(decoder, layer + 1)
            }
            Found::Tar => self.unpack_archive(stream, layer + 1),
            Found::Other { what, advice } => {
                let what = format!("{what} (compressed)");
                Err(ImageError::not_a_disk(self.path, what, advice))
            }
        }
    }

    /// Writes the one disk of an archive. A description of a machine, which comes first in an OVA, says
    /// which it is; otherwise it is known by its content.
    fn unpack_archive(
        &self,
        stream: Box<dyn Read + '_>,
        layer: usize,
    ) -> Result<Unpacked, ImageError> {
        let damaged = |e| damaged(self.path, e);
        let mut archive = tar::Archive::new(stream);
        let (mut files, mut disks) = (Vec::new(), Vec::new());
        let (mut wanted, mut unpacked) = (None, None);
        for entry in archive.entries().map_err(damaged)? {
            let mut entry = entry.map_err(damaged)?;
            let kind = entry.header().entry_type();
            if !matches!(
                kind,
                tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse
            ) {
                continue;
            }
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let name = name.trim_start_matches("./").to_owned();
            files.push(name.clone());
            if is_pax_sparse(&mut entry).map_err(damaged)? {
                let what = "a sparse archive of a form that is not supported";
                let advice = "pack it anew by `tar --format=gnu`";
                return Err(ImageError::not_a_disk(self.path, what, Some(advice)));
            }
            if name.to_ascii_lowercase().ends_with(".ovf") {
                wanted = Some(self.described(&name, entry)?);
                continue;
            }
            let (head, content) = peek(Box::new(entry)).map_err(damaged)?;
            let is_disk = match &wanted {
                Some(wanted) => *wanted == name,
                None => matches!(
                    probe::find(&head, None),
                    Found::Disk(_) | Found::Compressed(_) | Found::Tar
                ),
            };
            if is_disk {
                disks.push(name);
                if unpacked.is_none() {
                    unpacked = Some(self.unpack(content, layer)?);
                }
            }
        }
        match unpacked {
            _ if disks.len() > 1 => Err(ImageError::Several { path: self.path.to_owned(), disks }),
            Some(unpacked) => Ok(unpacked),
            None => Err(ImageError::NoDisk { path: self.path.to_owned(), files }),
        }
    }

    /// The file name of the one disk of a described machine.
    fn described(&self, name: &str, content: impl Read) -> Result<String, ImageError> {
        let ovf = |why: String| ImageError::Ovf {
            path: self.path.to_owned(),
            name: name.to_owned(),
            why,
        };
        let mut text = String::new();
        content
            .take(OVF_MAX)
            .read_to_string(&mut text)
            .map_err(|e| ovf(format!("it is no text ({e})")))?;
        let mut disks = ovf::disks(&text).map_err(ovf)?;
        match (disks.pop(), disks.is_empty()) {
            (Some(disk), true) => Ok(disk),
            (None, _) => Err(ovf("the machine has no disk with content".to_owned())),
            (Some(last), false) => {
                disks.push(last);
                Err(ImageError::Several { path: self.path.to_owned(), disks })
            }
        }
    }

    /// Writes a disk, with holes where it has zeros.
    fn write(&self, mut stream: impl Read) -> Result<Unpacked, ImageError> {
        let io = |e| ImageError::from(CacheError::io("write the unpacked image", self.disk, e));
        // An archive that has several disks is found out at the second one, after the first was written.
        let disk = File::create(self.disk).map_err(io)?;
        let mut hash = Sha256::new();
        let mut block = vec![0; BLOCK];
        let mut len = 0;
        loop {
            let mut have = 0;
            while have < BLOCK {
                match stream.read(&mut block[have..]) {
                    Ok(0) => break,
                    Ok(count) => have += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(damaged(self.path, error)),
                }
            }
            let block = &block[..have];
            if block.is_empty() {
                break;
            }
            if len + have as u64 > CONTENT_MAX {
                return Err(ImageError::TooLarge {
                    path: self.path.to_owned(),
                    limit: CONTENT_MAX,
                });
            }
            hash.update(block);
            if block.iter().any(|&byte| byte != 0) {
                disk.write_all_at(block, len).map_err(io)?;
            }
            len += have as u64;
        }
        disk.set_len(len).map_err(io)?;
        Ok((len, Digest::from_hash(hash)))
    }
}

/// Whether a file's holes are told in a way that the archive's reader does not know (GNU's forms for
/// pax archives).
fn is_pax_sparse(entry: &mut tar::Entry<'_, impl Read>) -> io::Result<bool> {
    let Some(extensions) = entry.pax_extensions()? else { return Ok(false) };
    for extension in extensions {
        if extension?.key_bytes().starts_with(b"GNU.sparse.") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The beginning of a stream, and all of it.
fn peek<'a>(mut stream: Box<dyn Read + 'a>) -> io::Result<(Vec<u8>, Box<dyn Read + 'a>)> {
    let mut head = Vec::new();
    stream.by_ref().take(probe::HEAD_LEN as u64).read_to_end(&mut head)?;
    let all = Cursor::new(head.clone()).chain(stream);
    Ok((head, Box::new(all)))
}

/// What is compressed in a stream, or in several of them in a row.
fn decoder<'a>(
    compression: Compression,
    stream: Box<dyn Read + 'a>,
) -> io::Result<Box<dyn Read + 'a>> {
    let stream: Box<dyn BufRead + 'a> = Box::new(BufReader::with_capacity(BLOCK, stream));
    Ok(match compression {
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(stream)),
        Compression::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(stream)),
        Compression::Xz => {
            let flags = liblzma::stream::CONCATENATED;
            let decoder = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_MAX, flags)
                .map_err(io::Error::other)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(stream, decoder))
        }
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(stream)?),
        Compression::Lzma | Compression::Lz4Legacy | Compression::Lzop => {
            return Err(io::ErrorKind::Unsupported.into());
        }
    })
}
