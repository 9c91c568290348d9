//! The files that an image makes QEMU open.
//!
//! What is allowed: a backing file, a parent or an extent with a plain name, which is a regular file
//! in the directory of the image, and fulfils the same conditions itself. What is not: paths, absolute or
//! not, symbolic links, QEMU's protocols and `json:` names, external data files of qcow2, encryption.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::numbers::{be32, be64, le32, le64, read_at};
use super::probe::{self, Found};
use super::{ImageError, ImageFormat, Siblings, read_head};

/// How many images may stand behind each other.
const DEPTH_MAX: usize = 16;

/// Bits of a qcow2 header's incompatible features: an external data file; others that QEMU 7.2 knows
/// are a dirty or corrupt image, compression, and extended L2 entries.
const EXTERNAL_DATA: u64 = 1 << 2;

/// Header extensions of qcow2: the end, the backing file's format, and the name of the data file.
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// QEMU takes no longer names of backing files.
const NAME_MAX: u64 = 1023;

/// The longest descriptor of a vmdk image; QEMU reads no more.
const DESCRIPTOR_MAX: u64 = 1 << 20;

/// Where QEMU looks for a parent's name in a sparse vmdk image, whatever its header says: so many
/// bytes from the start of the descriptor.
const PARENT_SEARCHED: u64 = 20 * 512;

const BACKING: &str = "backing file";
const PARENT: &str = "parent";
const EXTENT: &str = "extent";

/// Checks an image and all that stand behind it.
pub(super) fn check(
    path: &Path,
    format: ImageFormat,
    siblings: Siblings,
) -> Result<(), ImageError> {
    Checker { siblings, seen: Vec::new() }.image(path, format)
}

struct Checker {
    siblings: Siblings,
    seen: Vec<PathBuf>,
}

impl Checker {
    fn image(&mut self, path: &Path, format: ImageFormat) -> Result<(), ImageError> {
        if self.seen.len() >= DEPTH_MAX {
            let why = format!("more than {DEPTH_MAX} images belong together, or one to itself");
            return Err(unusable(path, format, why));
        }
        self.seen.push(path.to_owned());
        let io = |source| ImageError::io("read the disk image", path, source);
        let file = File::open(path).map_err(io)?;
        match format {
            ImageFormat::Raw => Ok(()),
            ImageFormat::Qcow2 => {
                let header = qcow2(&file).map_err(io)?;
                self.qcow2(path, header.map_err(|why| unusable(path, format, why))?)
            }
            ImageFormat::Vmdk => self.vmdk(path, &file),
            ImageFormat::Vdi => vdi(&file).map_err(io)?.map_err(|why| unusable(path, format, why)),
        }
    }

    fn qcow2(&mut self, path: &Path, header: Qcow2) -> Result<(), ImageError> {
        if let Some(name) = header.data_file {
            let why = "which is never opened".to_owned();
            return Err(refused(path, "external data file", &name, why));
        }
        let Some(backing) = header.backing else { return Ok(()) };
        let beside = self.beside(path, BACKING, &backing)?;
        match header.backing_format.as_deref() {
            // QEMU takes it for what the header says, whatever it is.
            Some("raw") => Ok(()),
            Some("qcow2") => self.image(&beside, ImageFormat::Qcow2),
            Some("vmdk") => self.image(&beside, ImageFormat::Vmdk),
            Some("vdi") => self.image(&beside, ImageFormat::Vdi),
            Some(other) => {
                let why = format!("said to be of the format `{other}`, which is not supported");
                Err(refused(path, BACKING, &backing, why))
            }
            // It tells the format by the content then, and so does this.
            None => self.found(path, BACKING, &backing, &beside),
        }
    }

    fn vmdk(&mut self, path: &Path, file: &File) -> Result<(), ImageError> {
        let io = |source| ImageError::io("read the disk image", path, source);
        let unusable = |why: &str| unusable(path, ImageFormat::Vmdk, why.to_owned());
        let head = read_at(file, 0, 512).map_err(io)?;
        let sparse = head.starts_with(b"KDMV");
        let (descriptor, opens_extents) = match sparse {
            true => {
                let header = || Some((le64(&head, 12)?, le64(&head, 28)?, le64(&head, 36)?));
                let (capacity, at, len) = header().ok_or_else(|| unusable("its header is cut"))?;
                let len = len.saturating_mul(512).clamp(PARENT_SEARCHED, DESCRIPTOR_MAX);
                // A parent is looked for there, wherever the header has its descriptor.
                if at > 1 {
                    return Err(unusable("its descriptor is not where it belongs"));
                }
                let at = at.saturating_mul(512);
                // Without a descriptor there is the header in its place.
                let text = read_at(file, at, len as usize).map_err(io)?;
                // A sparse image of no size is taken for what its descriptor says.
                (text, capacity == 0)
            }
            false => (read_at(file, 0, DESCRIPTOR_MAX as usize).map_err(io)?, true),
        };
        let malformed =
            |why: Malformed| refused(path, why.role, &why.text, "whose name is malformed".into());
        let mut references = parents(&descriptor).map_err(malformed)?;
        if sparse {
            let searched = read_at(file, 512, PARENT_SEARCHED as usize).map_err(io)?;
            references.extend(parents(&searched).map_err(malformed)?);
        }
        if opens_extents {
            references.extend(extents(&descriptor).map_err(malformed)?);
        }
        for (role, name) in references {
            let beside = self.beside(path, role, &name)?;
            self.extent(role, &beside)?;
        }
        Ok(())
    }

    /// An extent that is sparse is an image again; QEMU says which is, and what it begins with does. A parent
    /// is taken for an image of the same format, whatever it is.
    fn extent(&mut self, role: &'static str, beside: &Path) -> Result<(), ImageError> {
        let io = |source| ImageError::io("read the disk image", beside, source);
        let is_image = role == PARENT || read_head(beside).map_err(io)?.0.starts_with(b"KDMV");
        if is_image { self.image(beside, ImageFormat::Vmdk) } else { Ok(()) }
    }

    /// Another image, of whatever format it is.
    fn found(
        &mut self,
        path: &Path,
        role: &'static str,
        name: &str,
        beside: &Path,
    ) -> Result<(), ImageError> {
        let io = |source| ImageError::io("read the disk image", beside, source);
        let (head, len) = read_head(beside).map_err(io)?;
        match probe::find(&head, Some(len)) {
            Found::Disk(format) => self.image(beside, format),
            Found::Other { what, .. } => Err(refused(path, role, name, format!("which is {what}"))),
            _ => Err(refused(path, role, name, "which is compressed or an archive".to_owned())),
        }
    }

    /// The path of a file with a plain name, beside the image.
    fn beside(&self, path: &Path, role: &'static str, name: &str) -> Result<PathBuf, ImageError> {
        let refuse = |why: &str| refused(path, role, name, why.to_owned());
        // A colon makes a protocol of what is before it: json:, nbd:, file:, fat:.
        let plain = !name.is_empty()
            && !matches!(name, "." | "..")
            && !name.contains(['/', ':', '\\'])
            && !name.chars().any(char::is_control);
        if !plain {
            return Err(refuse("which is no plain file name"));
        }
        let beside = match (self.siblings, path.parent()) {
            (Siblings::Allowed, Some(dir)) => dir.join(name),
            _ => {
                return Err(refuse(
                    "which only an image with a name that ends in its format may have",
                ));
            }
        };
        match fs::symlink_metadata(&beside) {
            Ok(meta) if meta.is_file() => Ok(beside),
            Ok(meta) if meta.is_symlink() => Err(refuse("which is a symbolic link")),
            Ok(_) => Err(refuse("which is no regular file")),
            Err(error) => Err(refuse(&format!("which is not beside it ({error})"))),
        }
    }
}

fn refused(path: &Path, role: &'static str, name: &str, why: String) -> ImageError {
    ImageError::Reference { path: path.to_owned(), role, name: name.to_owned(), why }
}

fn unusable(path: &Path, format: ImageFormat, why: String) -> ImageError {
    ImageError::Unusable { path: path.to_owned(), format, why }
}

/// What a qcow2 header says of other files.
#[derive(Debug, Default)]
struct Qcow2 {
    backing: Option<String>,
    backing_format: Option<String>,
    data_file: Option<String>,
}

fn qcow2(file: &File) -> io::Result<Result<Qcow2, String>> {
    // Extensions and the backing file's name are in the first cluster, of 2 MiB at most.
    let cut = || "its header is cut".to_owned();
    let head = read_at(file, 0, 104)?;
    let header = || {
        let version = be32(&head, 4)?;
        let bits = be32(&head, 20)?;
        let (features, len) = match version {
            2 => (0, 72),
            _ => (be64(&head, 72)?, be32(&head, 100)?),
        };
        Some((be64(&head, 8)?, be32(&head, 16)?, bits, be32(&head, 32)?, features, len))
    };
    let Some((backing_at, backing_len, bits, encryption, features, len)) = header() else {
        return Ok(Err(cut()));
    };
    if !(9..=21).contains(&bits) {
        return Ok(Err(format!("its clusters cannot have 2^{bits} bytes")));
    }
    if encryption != 0 {
        return Ok(Err("it is encrypted".to_owned()));
    }
    let cluster = read_at(file, 0, 1 << bits)?;
    let mut found = Qcow2::default();
    let mut at = len as usize;
    // Without an end mark they end with the cluster, or where the name begins.
    while let (Some(kind), Some(len)) = (be32(&cluster, at), be32(&cluster, at + 4)) {
        let past_name = backing_at != 0 && at as u64 >= backing_at;
        if kind == EXTENSION_END || past_name {
            break;
        }
        let Some(data) = cluster.get(at + 8..).and_then(|rest| rest.get(..len as usize)) else {
            return Ok(Err("a header extension reaches beyond the first cluster".to_owned()));
        };
        let text = || String::from_utf8_lossy(data).trim_end_matches('\0').to_owned();
        match kind {
            EXTENSION_BACKING_FORMAT => found.backing_format = Some(text()),
            EXTENSION_DATA_FILE => found.data_file = Some(text()),
            _ => {}
        }
        at += 8 + data.len().next_multiple_of(8);
    }
    if features & EXTERNAL_DATA != 0 {
        found.data_file.get_or_insert_with(|| "(unnamed)".to_owned());
    }
    if backing_at != 0 && backing_len != 0 {
        if u64::from(backing_len) > NAME_MAX {
            return Ok(Err("its backing file's name is too long".to_owned()));
        }
        let name = read_at(file, backing_at, backing_len as usize)?;
        if name.len() < backing_len as usize {
            return Ok(Err(cut()));
        }
        // What is no text is no plain name.
        found.backing = Some(String::from_utf8(name).unwrap_or_else(|_| "\0".to_owned()));
    }
    Ok(Ok(found))
}

/// Images of the types that QEMU reads, dynamic and static, name no others.
fn vdi(file: &File) -> io::Result<Result<(), String>> {
    let head = read_at(file, 0, 512)?;
    Ok(match le32(&head, 0x4c) {
        Some(1 | 2) => Ok(()),
        Some(4) => Err("it is a difference to another image".to_owned()),
        _ => Err("its type is unknown".to_owned()),
    })
}

/// A reference whose name cannot be told.
struct Malformed {
    role: &'static str,
    text: String,
}

/// A name of a file and what it is for.
type Reference = (&'static str, String);

/// The parents in a descriptor.
fn parents(descriptor: &[u8]) -> Result<Vec<Reference>, Malformed> {
    const HINT: &str = "parentFileNameHint";
    let text = String::from_utf8_lossy(descriptor);
    let name = |at: usize| {
        let rest = &text[at + HINT.len()..];
        match rest.strip_prefix("=\"").and_then(|rest| rest.split_once('"')) {
            Some((name, _)) => Ok((PARENT, name.to_owned())),
            None => Err(Malformed { role: PARENT, text: rest.chars().take(40).collect() }),
        }
    };
    text.match_indices(HINT).map(|(at, _)| name(at)).collect()
}

/// The extents in a descriptor. QEMU's parser goes by words here and by lines there, so each quoted string
/// counts that is not the value of some key, and none may go on to the next line.
fn extents(descriptor: &[u8]) -> Result<Vec<Reference>, Malformed> {
    let text = String::from_utf8_lossy(descriptor);
    let mut references = Vec::new();
    for line in text.split(['\n', '\r']) {
        let mut rest = line;
        while let Some((before, after)) = rest.split_once('"') {
            let Some((quoted, next)) = after.split_once('"') else {
                // QEMU ends a name at a line's end, too.
                let text = after.chars().take(40).collect();
                return Err(Malformed { role: EXTENT, text });
            };
            if !before.trim_end().ends_with('=') {
                references.push((EXTENT, quoted.to_owned()));
            }
            rest = next;
        }
    }
    Ok(references)
}
