//! Why an image cannot be built.

use std::io;
use std::path::{Path, PathBuf};

use super::grub::GrubError;
use super::recipe::RecipeError;
use crate::cache::CacheError;
use crate::{Arch, KernelError};

/// An image cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageBuildError {
    /// The recipe makes no sense.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Images of this architecture are not built.
    #[error("images are built for x86-64 so far, not for {0}")]
    Arch(Arch),
    /// Programs are missing on this host.
    #[error(
        "an image cannot be built without {}; install {} with `sudo apt-get install {}`",
        programs.join(", "), if packages.len() == 1 { "it" } else { "them" }, packages.join(" ")
    )]
    Tools {
        /// The programs.
        programs: Vec<String>,
        /// Debian's packages that have them.
        packages: Vec<String>,
    },
    /// This user may not have a range of user numbers, in which files of other users could be.
    #[error(
        "a user without a range of numbers in {file} cannot make a system's files; get one with \
         `sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`, or build \
         the image as root"
    )]
    NoSubordinateIds {
        /// The user's name or number.
        user: String,
        /// The file that has none.
        file: &'static str,
    },
    /// The archive cannot be asked.
    #[error("the package lists for {recipe} cannot be had")]
    Archive {
        /// What was to be built.
        recipe: String,
        /// What the archive's side said.
        source: Box<KernelError>,
    },
    /// A program failed.
    #[error("{program} failed while it was to {doing} ({status}); it says: {words}")]
    Program {
        /// The program.
        program: &'static str,
        /// What was being done, an infinitive.
        doing: String,
        /// How it ended.
        status: String,
        /// The last of what it said.
        words: String,
    },
    /// GRUB's images of this suite cannot be used.
    #[error("GRUB of this suite cannot be put on the disk")]
    Grub(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The system left no room.
    #[error("the disk of {} MiB has no room for the partitions", .0 >> 20)]
    NoRoom(u64),
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
}

impl From<GrubError> for ImageBuildError {
    fn from(error: GrubError) -> Self {
        ImageBuildError::Grub(Box::new(error))
    }
}

impl ImageBuildError {
    pub(super) fn io(doing: &'static str, path: &Path, source: io::Error) -> ImageBuildError {
        ImageBuildError::Io { doing, path: path.to_owned(), source }
    }

    /// An operation below the cache's root, for which there is advice.
    pub(super) fn cache_io(doing: &'static str, path: &Path, source: io::Error) -> ImageBuildError {
        ImageBuildError::Cache(CacheError::io(doing, path, source))
    }
}
