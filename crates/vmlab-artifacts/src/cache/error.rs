//! What can go wrong with the cache itself.

use std::io;
use std::path::{Path, PathBuf};

use super::{CACHE_DIR_ENV, Flaw, MAX_KEY};

/// The cache cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// No variable says where the cache is.
    #[error(
        "cannot tell where the cache is: none of {CACHE_DIR_ENV}, XDG_CACHE_HOME and HOME is set; \
         set {CACHE_DIR_ENV} to a writable directory"
    )]
    NoHome,
    /// A file operation failed.
    #[error("cannot {doing} {}{}", path.display(), advice(source))]
    Io {
        /// What was being done, an infinitive.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// What was just built is not what it should be.
    #[error("the cache entry {kind}/{key} was built and then failed its check")]
    BuiltBad {
        /// Its kind.
        kind: String,
        /// Its key.
        key: String,
        /// What is wrong with it.
        source: Flaw,
    },
    /// What should be deleted is in use.
    #[error("{} is in use by a VM; end that first", path.display())]
    InUse {
        /// The entry.
        path: PathBuf,
    },
    /// Another process builds it for longer than this one can wait.
    #[error("another process holds {} for longer than this one has time", path.display())]
    Busy {
        /// Its lock.
        path: PathBuf,
    },
    /// A kind or key that cannot be a file name.
    #[error(
        "`{name}` cannot be a cache {what}: 1 to {MAX_KEY} letters, digits or ._+~-:@,=, and no dot in front"
    )]
    BadName {
        /// `kind` or `key`.
        what: &'static str,
        /// The name.
        name: String,
    },
}

impl CacheError {
    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> CacheError {
        CacheError::Io { doing, path: path.to_owned(), source }
    }
}

/// What a user can do about a failed file operation.
pub(crate) fn advice(error: &io::Error) -> String {
    let what = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space (`vmlab kernel rm` removes kernels), or set it to a directory with more"
        }
        io::ErrorKind::PermissionDenied => "make it writable for this user, or set it elsewhere",
        io::ErrorKind::ReadOnlyFilesystem
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::NotFound
        | io::ErrorKind::AlreadyExists => "set it to a directory that can be written to",
        _ => return String::new(),
    };
    format!(" ({CACHE_DIR_ENV} says where the cache is: {what})")
}
