//! The files of an entry with their sizes: a check that costs one `stat` a file.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The regular files below a directory, by relative path, with their sizes in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Manifest {
    /// Path, relative to the directory, to size.
    pub files: BTreeMap<PathBuf, u64>,
}

/// A directory that differs from its manifest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// A file is gone or cannot be looked at.
    #[error("cannot look at {}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file has another size than it was recorded with.
    #[error("{} has {found} bytes instead of {wanted}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// As recorded, in bytes.
        wanted: u64,
        /// As it is, in bytes.
        found: u64,
    },
    /// A path that leads out of the directory, or no regular file.
    #[error("{} is no regular file of the entry", path.display())]
    Odd {
        /// The path.
        path: PathBuf,
    },
}

impl Manifest {
    /// Records all regular files below `dir`.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn of(dir: &Path) -> io::Result<Manifest> {
        let mut files = BTreeMap::new();
        let mut todo = vec![PathBuf::new()];
        while let Some(relative) = todo.pop() {
            for item in fs::read_dir(dir.join(&relative))? {
                let item = item?;
                let path = relative.join(item.file_name());
                let kind = item.file_type()?;
                if kind.is_dir() {
                    todo.push(path);
                } else if kind.is_file() {
                    files.insert(path, item.metadata()?.len());
                }
            }
        }
        Ok(Manifest { files })
    }

    /// Compares the recorded files with those below `dir`; files that are not recorded are ignored.
    ///
    /// # Errors
    /// The first difference.
    pub fn check(&self, dir: &Path) -> Result<(), ManifestError> {
        for (relative, wanted) in &self.files {
            let normal = |part| matches!(part, std::path::Component::Normal(_));
            let path = dir.join(relative);
            if !relative.components().all(normal) {
                return Err(ManifestError::Odd { path });
            }
            let meta = fs::symlink_metadata(&path)
                .map_err(|source| ManifestError::Missing { path: path.clone(), source })?;
            if !meta.is_file() {
                return Err(ManifestError::Odd { path });
            }
            if meta.len() != *wanted {
                return Err(ManifestError::Size { path, wanted: *wanted, found: meta.len() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_every_difference() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/c"), "123").unwrap();
        let manifest = Manifest::of(dir.path()).unwrap();
        assert_eq!(manifest.files, BTreeMap::from([(PathBuf::from("a/b/c"), 3)]));
        manifest.check(dir.path()).unwrap();

        fs::write(dir.path().join("a/b/c"), "12").unwrap();
        assert!(matches!(manifest.check(dir.path()), Err(ManifestError::Size { found: 2, .. })));
        fs::remove_file(dir.path().join("a/b/c")).unwrap();
        assert!(matches!(manifest.check(dir.path()), Err(ManifestError::Missing { .. })));
        std::os::unix::fs::symlink("b", dir.path().join("a/b/c")).unwrap();
        assert!(matches!(manifest.check(dir.path()), Err(ManifestError::Odd { .. })));

        let outside = Manifest { files: BTreeMap::from([(PathBuf::from("../x"), 3)]) };
        assert!(matches!(outside.check(dir.path()), Err(ManifestError::Odd { .. })));
    }
}
