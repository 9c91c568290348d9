//! What is in a store entry: `boot/`, `lib/modules/RELEASE/`, `files.json` and `entry.json`.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::boot_image::BootImage;
use crate::cache::{Flaw, Manifest};
use crate::source::deb::{self, Control};
use crate::source::{apt, local};
use crate::{Arch, ContentKey, Distro, KernelError, Progress, modules};

/// Raised when the layout changes; entries of other formats are fetched anew.
const FORMAT: u32 = 1;

const ENTRY: &str = "entry.json";

/// All files but these two, with their sizes: thousands of modules, which only a listing checks.
const FILES: &str = "files.json";

/// Longest key before it is cut and hashed.
const MAX_KEY: usize = 150;

/// The description of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) format: u32,
    pub(super) distro: Option<Distro>,
    pub(super) flavour: Option<String>,
    pub(super) arch: Arch,
    pub(super) release: String,
    pub(super) package: String,
    pub(super) version: String,
    pub(super) suites: Vec<String>,
    /// The boot image, relative to the entry.
    pub(super) image: PathBuf,
    /// Bytes of all files.
    pub(super) bytes: u64,
    /// The files that every run depends on, with their sizes: all but the modules themselves.
    pub(super) key_files: Manifest,
}

impl Entry {
    pub(super) fn read(dir: &Path) -> Result<Entry, KernelError> {
        let path = dir.join(ENTRY);
        let fail =
            |e| KernelError::cache_io("read the description of the stored kernel,", &path, e);
        let bytes = fs::read(&path).map_err(fail)?;
        serde_json::from_slice(&bytes).map_err(|e| fail(e.into()))
    }
}

/// Checks what every run depends on: the format, the sizes of the key files, and the boot image's
/// header. A module that is damaged is noticed when it is read.
pub(super) fn verify(dir: &Path) -> Result<(), Flaw> {
    let entry: Entry = serde_json::from_slice(&fs::read(dir.join(ENTRY))?)?;
    if entry.format != FORMAT {
        return Err(format!("it has format {} instead of {FORMAT}", entry.format).into());
    }
    if !entry.key_files.files.contains_key(&entry.image) {
        return Err("its boot image is not among its files".into());
    }
    entry.key_files.check(dir)?;
    BootImage::open_unversioned(&dir.join(&entry.image))?;
    Ok(())
}

/// Checks an entry as [`verify`] does, and the size of every file.
pub(super) fn verify_all(dir: &Path) -> Result<(), Flaw> {
    verify(dir)?;
    let files: Manifest = serde_json::from_slice(&fs::read(dir.join(FILES))?)?;
    Ok(files.check(dir)?)
}

/// Takes out of a package what belongs into a directory.
type Unpack = fn(&Path, &Path, &dyn Progress) -> Result<(), KernelError>;

/// Downloads packages and unpacks them over each other.
pub(super) fn fetch(
    dir: &Path,
    parts: &apt::Parts,
    unpack_one: Unpack,
    progress: &dyn Progress,
) -> Result<(), KernelError> {
    let debs_dir = dir.join("debs");
    fs::create_dir(&debs_dir).map_err(|e| KernelError::cache_io("make", &debs_dir, e))?;
    let debs = parts.download(&debs_dir, progress)?;
    unpack(dir, &debs, unpack_one, progress)?;
    fs::remove_dir_all(&debs_dir).map_err(|e| KernelError::cache_io("remove", &debs_dir, e))
}

/// Unpacks packages over each other.
pub(super) fn unpack(
    dir: &Path,
    debs: &[PathBuf],
    unpack_one: Unpack,
    progress: &dyn Progress,
) -> Result<(), KernelError> {
    for deb in debs {
        let name = deb.file_name().unwrap_or_default().to_string_lossy();
        progress.phase(&format!("unpack {name}"));
        unpack_one(deb, dir, progress)?;
    }
    Ok(())
}

/// Indexes the modules of an unpacked kernel and writes the description.
pub(super) fn finish(
    dir: &Path,
    source: &str,
    describe: impl FnOnce(&mut Entry),
    progress: &dyn Progress,
) -> Result<(), KernelError> {
    let mut images = local::images_in(dir);
    let (release, image) = match images.len() {
        1 => images.remove(0),
        0 => return Err(KernelError::NoKernelInDeb { path: source.into() }),
        _ => {
            let found = images.into_iter().map(|(release, _)| release).collect();
            return Err(KernelError::Ambiguous { path: source.into(), found });
        }
    };
    let opened = local::open_image(&image)?;
    let tree = dir.join("lib/modules").join(&release);
    if tree.is_dir() {
        progress.phase("index the modules");
        modules::depmod(dir, &release).map_err(|e| local::modules_error(&tree, e))?;
    }
    let files = Manifest::of(dir).map_err(|e| KernelError::cache_io("list", dir, e))?;
    let mut entry = Entry {
        format: FORMAT,
        distro: None,
        flavour: None,
        arch: opened.arch(),
        release,
        package: String::new(),
        version: String::new(),
        suites: Vec::new(),
        image: image.strip_prefix(dir).unwrap_or(&image).to_owned(),
        bytes: files.files.values().sum(),
        key_files: Manifest {
            files: files
                .files
                .iter()
                .filter(|(path, _)| !modules::place::is_module(path))
                .map(|(path, size)| (path.clone(), *size))
                .collect(),
        },
    };
    describe(&mut entry);
    // The description comes last: an entry without it is none.
    write_json(dir, FILES, &files)?;
    write_json(dir, ENTRY, &entry)
}

pub(super) fn write_json(
    dir: &Path,
    name: &str,
    value: &impl Serialize,
) -> Result<(), KernelError> {
    let path = dir.join(name);
    serde_json::to_vec(value)
        .map_err(std::io::Error::from)
        .and_then(|json| fs::write(&path, json))
        .map_err(|e| KernelError::cache_io("describe what was fetched in", &path, e))
}

/// A `.deb` and the packages beside it that hold other parts of its kernel.
///
/// # Errors
/// [`KernelError::MissingParts`] when one that it depends on is not there.
pub(super) fn with_siblings(path: &Path, control: &Control) -> Result<Vec<PathBuf>, KernelError> {
    let mut debs = vec![path.to_owned()];
    let mut missing = Vec::new();
    let mut todo: Vec<(String, bool)> =
        control.depends.iter().map(|name| (name.clone(), true)).collect();
    let mut seen = vec![control.package.clone()];
    // Not every image depends on the modules that there are for it, so their names are tried, too.
    if let Some(release) = ["linux-image-", "linux-binary-"]
        .iter()
        .find_map(|prefix| control.package.strip_prefix(prefix))
    {
        let parts = ["base", "binary", "modules", "modules-extra"];
        todo.extend(parts.iter().map(|part| (format!("linux-{part}-{release}"), false)));
    }
    let mut next = 0;
    while let Some((name, needed)) = todo.get(next).cloned() {
        next += 1;
        if seen.contains(&name) {
            continue;
        }
        let file = format!("{name}_{}_{}.deb", control.version, control.architecture);
        let sibling = path.with_file_name(&file);
        seen.push(name);
        if sibling.exists() {
            todo.extend(deb::control(&sibling)?.depends.into_iter().map(|name| (name, true)));
            debs.push(sibling);
        } else if needed {
            missing.push(file);
        }
    }
    debs[1..].sort();
    match missing.is_empty() {
        true => Ok(debs),
        false => Err(KernelError::MissingParts { path: path.to_owned(), missing }),
    }
}

/// A key made fit for a file name.
pub(super) fn sanitise(key: &str) -> String {
    let legal = |c: char| c.is_ascii_alphanumeric() || "._+~-".contains(c);
    let clean: String = key.chars().map(|c| if legal(c) { c } else { '-' }).collect();
    if clean.len() <= MAX_KEY {
        return clean;
    }
    let hash = ContentKey::new("long-key").field("key", key).finish();
    format!("{}-{}", &clean[..MAX_KEY - 33], &hash[..32])
}
