//! Copies files and trees of files by way of a byte stream: [`send`] at one end, [`receive`] at the other.
//! The host and the agent in the guest use the same code.
//!
//! The stream's format is [`vmlab_wire::tree`]. Neither end needs more memory for a large file or tree than
//! for a small one, and what a sender says is never trusted: a receiver works with one name in one directory
//! that it has opened itself, and follows no link.

mod receive;
mod send;
mod stream;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use thiserror::Error;
pub use vmlab_wire::tree::Doing;
use vmlab_wire::tree::{Record, TreeError};

pub use receive::{answer, receive};
pub use send::send;
pub use stream::outcome;

/// Why something was not copied. What was copied before stays.
#[derive(Debug, Error)]
pub enum CopyError {
    /// A file of this end.
    #[error("cannot {} {}", doing.words(), path.display())]
    Here {
        /// What was being done.
        doing: Doing,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file of the other end.
    #[error("the other end cannot {} {}", doing.words(), path.display())]
    There {
        /// What was being done.
        doing: Doing,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The stream ended too early or failed.
    #[error("the stream of a copy broke")]
    Stream(#[source] io::Error),
    /// The other end sent what is no copy.
    #[error("the other end sent what is no copy")]
    Malformed(#[from] TreeError),
}

impl CopyError {
    fn here(doing: Doing, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Here { doing, path: path.to_owned(), source: source.into() }
    }

    fn there(doing: Doing, errno: i32, path: &[u8]) -> Self {
        let path = PathBuf::from(OsString::from_vec(path.to_owned()));
        let source = match errno {
            1.. => io::Error::from_raw_os_error(errno),
            _ => io::Error::other(why(doing)),
        };
        Self::There { doing, path, source }
    }

    /// Puts what the other end has to know of a failure of this one into a record.
    fn with_record(&self, tell: impl FnOnce(&Record<'_>)) {
        match self {
            Self::Here { doing, path, source } => {
                let errno = source.raw_os_error().unwrap_or(0);
                tell(&Record::Failed { doing: *doing, errno, path: path.as_os_str().as_bytes() });
            }
            Self::Malformed(_) => {
                tell(&Record::Failed { doing: Doing::Receive, errno: 0, path: b"" });
            }
            Self::There { .. } | Self::Stream(_) => {}
        }
    }
}

/// What to say of failures that have no error number.
fn why(doing: Doing) -> &'static str {
    match doing {
        Doing::Pipe | Doing::Socket | Doing::BlockDevice | Doing::CharacterDevice => {
            "only files, directories and symbolic links can be copied"
        }
        Doing::Deep => "there are too many directories in each other",
        Doing::Receive => "what was sent is no copy",
        _ => "for no known reason",
    }
}

/// The name that a copy of this has in a directory; `None` where only what is in it is meant, as by `dir/.`.
pub fn own_name(source: &Path) -> Option<&OsStr> {
    let bytes = source.as_os_str().as_bytes();
    let trimmed = bytes.iter().rposition(|&byte| byte != b'/').map_or(&b""[..], |at| &bytes[..=at]);
    let last = trimmed.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    (!last.is_empty() && last != b"." && last != b"..").then(|| OsStr::from_bytes(last))
}

#[cfg(test)]
mod tests;
