//! What a filesystem is populated with.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use vmlab_artifacts::{Cache, ContentKey};

use crate::Error;

/// The most files of a directory: each is read, and a directory that has more is rather an image.
const MAX_FILES: usize = 200_000;

fn unreadable(path: &Path, source: io::Error) -> Error {
    Error::Io { what: "read the content of a disk", path: path.to_owned(), source, hint: "" }
}

/// Adds all of it to a key: the archive, or each file of the directory with its name, owner, permissions,
/// time and content.
pub(super) fn key(key: ContentKey, cache: &Cache, root: &Path) -> Result<ContentKey, Error> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| unreadable(&path, source)
    };
    if !fs::metadata(root).map_err(failed(root))?.is_dir() {
        return key.known_file(cache, "archive", root).map_err(failed(root));
    }
    let mut key = key;
    let mut todo = vec![PathBuf::new()];
    let mut files = 0;
    while let Some(relative) = todo.pop() {
        let dir = root.join(&relative);
        let mut names = Vec::new();
        for item in fs::read_dir(&dir).map_err(failed(&dir))? {
            names.push(item.map_err(failed(&dir))?.file_name());
        }
        names.sort();
        for name in names {
            files += 1;
            if files > MAX_FILES {
                let why = format!("it has more than {MAX_FILES} files");
                return Err(unreadable(root, io::Error::other(why)));
            }
            let relative = relative.join(name);
            let path = root.join(&relative);
            let meta = fs::symlink_metadata(&path).map_err(failed(&path))?;
            let about = format!(
                "{:o} {}:{} {}.{} {}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.mtime(),
                meta.mtime_nsec(),
                meta.rdev()
            );
            key = key.field("name", relative.as_os_str().as_bytes()).field("about", about);
            if meta.is_symlink() {
                let target = fs::read_link(&path).map_err(failed(&path))?;
                key = key.field("link", target.as_os_str().as_bytes());
            } else if meta.is_file() {
                key = key.known_file(cache, "file", &path).map_err(failed(&path))?;
            } else if meta.is_dir() {
                todo.push(relative);
            }
        }
    }
    Ok(key)
}

/// Whether it is a tar archive, for which it is enough that it is no directory: tar says the rest.
pub(super) fn is_archive(path: &Path) -> bool {
    !path.is_dir()
}

/// How tar is to unpack an archive of this name.
pub(super) fn decompressor(path: &Path) -> Option<&'static str> {
    match path.extension().and_then(OsStr::to_str) {
        Some("gz" | "tgz") => Some("--gzip"),
        Some("xz" | "txz") => Some("--xz"),
        Some("zst") => Some("--zstd"),
        Some("bz2") => Some("--bzip2"),
        _ => None,
    }
}
