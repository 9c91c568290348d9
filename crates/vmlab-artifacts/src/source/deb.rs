//! Debian packages: an `ar` archive of `debian-binary`, `control.tar.*` and `data.tar.*` (deb(5)).
//!
//! They are read here and not by dpkg, so that a `.deb` can be used on hosts that have no dpkg.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crate::cache::Flaw;
use crate::{KernelError, Progress};

#[cfg(test)]
mod tests;

/// Most bytes that one package may unpack to. The largest kernel packages have 0.7 GB; one that
/// was built with debug information has 5 GB.
const MAX_UNPACKED: u64 = 16 << 30;

/// What is being done when a file of a package cannot be written.
const WRITE: &str = "unpack the package into";

/// Most bytes of a control file; real ones have a few thousand.
const MAX_CONTROL: u64 = 1 << 20;

/// What a package says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Control {
    pub(crate) package: String,
    pub(crate) version: String,
    pub(crate) architecture: String,
    pub(crate) depends: Vec<String>,
}

/// The fields of one stanza in the format of deb-control(5), names in lower case.
pub(crate) fn stanza_fields(stanza: &str) -> BTreeMap<String, String> {
    let mut fields: BTreeMap<String, String> = BTreeMap::new();
    let mut last: Option<String> = None;
    for line in stanza.lines().filter(|line| !line.starts_with('#')) {
        if line.starts_with([' ', '\t']) {
            if let Some(value) = last.as_ref().and_then(|name| fields.get_mut(name)) {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            let name = name.to_ascii_lowercase();
            fields.insert(name.clone(), value.trim().to_owned());
            last = Some(name);
        }
    }
    fields
}

/// The names in a `Depends` field that are such parts, as `linux-modules-7.2.13-amd64` is of a kernel.
pub(crate) fn depends_on(depends: &str, is_part: fn(&str) -> bool) -> Vec<String> {
    depends
        .split([',', '|'])
        .filter_map(|term| term.split([' ', '(', ':', '\n']).find(|word| !word.is_empty()))
        .filter(|name| is_part(name))
        .map(str::to_owned)
        .collect()
}

/// Whether a package of this name holds a part of one kernel: its name goes on with a version.
pub(crate) fn is_kernel_part(name: &str) -> bool {
    ["linux-image-", "linux-binary-", "linux-modules-", "linux-modules-extra-", "linux-base-"]
        .iter()
        .filter_map(|prefix| name.strip_prefix(prefix))
        .any(begins_with_version)
}

/// Whether a package of this name holds a part of what modules for one kernel are built against.
pub(crate) fn is_header_part(name: &str) -> bool {
    ["linux-headers-", "linux-kbuild-"]
        .iter()
        .filter_map(|prefix| name.strip_prefix(prefix))
        .any(begins_with_version)
}

fn begins_with_version(rest: &str) -> bool {
    rest.starts_with(|c: char| c.is_ascii_digit())
}

/// Reads a package's control file.
pub(crate) fn control(path: &Path) -> Result<Control, KernelError> {
    let mut text = None;
    each_file(path, "control.tar", |name, file| {
        if name == Path::new("control") {
            let mut bytes = Vec::new();
            file.take(MAX_CONTROL).read_to_end(&mut bytes)?;
            text = Some(String::from_utf8_lossy(&bytes).into_owned());
        }
        Ok(())
    })?;
    let fields = stanza_fields(&text.unwrap_or_default());
    let field = |name: &str| match fields.get(name) {
        Some(value) if !value.is_empty() => Ok(value.clone()),
        _ => Err(bad(path, format!("its control file has no {name} field"))),
    };
    Ok(Control {
        package: field("package")?,
        version: field("version")?,
        architecture: field("architecture")?,
        depends: fields
            .get("depends")
            .map(|text| depends_on(text, is_kernel_part))
            .unwrap_or_default(),
    })
}

/// Unpacks what a kernel needs of a package, in one layout for all packages:
/// `boot/vmlinuz-RELEASE`, `boot/config-RELEASE` and `lib/modules/RELEASE/`.
pub(crate) fn unpack(path: &Path, dest: &Path, progress: &dyn Progress) -> Result<(), KernelError> {
    let mut left = MAX_UNPACKED;
    let mut done = 0;
    each_file(path, "data.tar", |name, file| {
        let Some(place) = placed(name) else { return Ok(()) };
        let place = dest.join(place);
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut out = OpenOptions::new().write(true).create_new(true).open(&place)?;
        let copied = io::copy(&mut file.take(left + 1), &mut out)?;
        left = left.checked_sub(copied).ok_or_else(|| {
            io::Error::other(format!("it unpacks to more than {MAX_UNPACKED} bytes"))
        })?;
        done += copied;
        progress.download(done, None);
        out.flush()
    })
    .map_err(|error| match error {
        // The package was read well; it is the place that has a problem.
        KernelError::Io { doing: WRITE, source, .. } => KernelError::cache_io(WRITE, dest, source),
        error => error,
    })
}

/// Where a file of a package goes; none for a file that a kernel does not need.
fn placed(name: &Path) -> Option<PathBuf> {
    let parts: Vec<&std::ffi::OsStr> = name.iter().collect();
    let parts = parts.strip_prefix(&["usr".as_ref()]).unwrap_or(&parts);
    match parts {
        [boot, file] if *boot == "boot" => {
            let wanted: [&[u8]; 4] = [b"vmlinuz-", b"vmlinux-", b"Image-", b"config-"];
            let keep = wanted.iter().any(|prefix| file.as_bytes().starts_with(prefix));
            keep.then(|| Path::new("boot").join(file))
        }
        [lib, modules, release, rest @ ..] if *lib == "lib" && *modules == "modules" => {
            let suffixed = |prefix: &str| {
                let mut file = std::ffi::OsString::from(prefix);
                file.push(release);
                Path::new("boot").join(file)
            };
            match rest {
                [] => None,
                [file] if *file == "vmlinuz" => Some(suffixed("vmlinuz-")),
                [file] if *file == "config" => Some(suffixed("config-")),
                [file] if *file == "System.map" => None,
                _ => Some(
                    Path::new("lib/modules").join(release).join(rest.iter().collect::<PathBuf>()),
                ),
            }
        }
        _ => None,
    }
}

/// Unpacks the headers in a package as they are: files and links below `usr/src` and `usr/lib`.
pub(crate) fn unpack_headers(
    path: &Path,
    dest: &Path,
    progress: &dyn Progress,
) -> Result<(), KernelError> {
    let mut left = MAX_UNPACKED;
    each_entry(path, "data.tar", |name, entry| {
        let kind = entry.header().entry_type();
        let theirs = name.starts_with("usr/src") || name.starts_with("usr/lib");
        if !theirs || !(kind.is_file() || kind.is_symlink()) {
            return Ok(());
        }
        left = left.checked_sub(entry.size()).ok_or_else(|| {
            io::Error::other(format!("it unpacks to more than {MAX_UNPACKED} bytes"))
        })?;
        progress.download(MAX_UNPACKED - left, None);
        // It leaves out what links would lead out of the directory.
        entry.unpack_in(dest).map(drop)
    })
}

/// Calls `each` for the regular files of one of a package's two tar archives.
fn each_file(
    path: &Path,
    archive: &str,
    mut each: impl FnMut(&Path, &mut dyn Read) -> io::Result<()>,
) -> Result<(), KernelError> {
    each_entry(path, archive, |name, entry| match entry.header().entry_type().is_file() {
        true => each(name, entry),
        false => Ok(()),
    })
}

type Entry<'archive, 'file> = tar::Entry<'archive, Box<dyn Read + 'file>>;

/// Calls `each` for all that is in one of a package's two tar archives.
fn each_entry(
    path: &Path,
    archive: &str,
    mut each: impl FnMut(&Path, &mut Entry<'_, '_>) -> io::Result<()>,
) -> Result<(), KernelError> {
    let file = File::open(path).map_err(|e| KernelError::io("open the package", path, e))?;
    let mut outer = ar::Archive::new(BufReader::new(file));
    while let Some(member) = outer.next_entry() {
        let member = member.map_err(|e| bad(path, e))?;
        let name = String::from_utf8_lossy(member.header().identifier()).into_owned();
        let Some(suffix) = name.trim_end_matches('/').strip_prefix(archive) else { continue };
        let stream: Box<dyn Read + '_> = match suffix {
            "" => Box::new(member),
            ".gz" => Box::new(flate2::read::GzDecoder::new(member)),
            ".xz" => Box::new(liblzma::read::XzDecoder::new(member)),
            ".zst" => Box::new(zstd::stream::read::Decoder::new(member).map_err(|e| bad(path, e))?),
            other => {
                return Err(bad(
                    path,
                    format!("its {archive} is packed as `{other}`, not gz, xz or zst"),
                ));
            }
        };
        let mut inner = tar::Archive::new(stream);
        for entry in inner.entries().map_err(|e| bad(path, e))? {
            let mut entry = entry.map_err(|e| bad(path, e))?;
            let name = entry.path().map_err(|e| bad(path, e))?.into_owned();
            let name: PathBuf =
                name.components().filter(|part| *part != Component::CurDir).collect();
            if !name.components().all(|part| matches!(part, Component::Normal(_))) {
                return Err(bad(path, format!("its file {} leads out of it", name.display())));
            }
            each(&name, &mut entry).map_err(|error| match error.kind() {
                io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::ReadOnlyFilesystem => KernelError::io(WRITE, path, error),
                _ => bad(path, error),
            })?;
        }
        return Ok(());
    }
    Err(bad(path, format!("it has no {archive}")))
}

fn bad(path: &Path, source: impl Into<Flaw>) -> KernelError {
    KernelError::BadDeb { path: path.to_owned(), source: source.into() }
}
