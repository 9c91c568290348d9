//! Why a module cannot be built.

use std::io;
use std::path::{Path, PathBuf};

use crate::cache::CacheError;

/// A module cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModuleBuildError {
    /// There is nothing to build in the directory.
    #[error(
        "{} has no Kbuild and no Makefile; a module needs one of them with a line such as `obj-m := mymod.o`",
        dir.display()
    )]
    NoMakefile {
        /// The directory.
        dir: PathBuf,
    },
    /// There is more in the directory than sources of modules.
    #[error(
        "{} has more than {limit}, which are copied for each build; give the directory that has only the module's \
         sources", dir.display()
    )]
    TooMuch {
        /// The directory.
        dir: PathBuf,
        /// Such as `5000 files`.
        limit: String,
    },
    /// Programs are missing on this host.
    #[error(
        "a module cannot be built without {program}; install it with `sudo apt-get install {package}`"
    )]
    Tool {
        /// The program.
        program: String,
        /// Debian's package that has it.
        package: String,
    },
    /// The build failed.
    #[error("{} does not build in {}:\n{words}", dir.display(), tree.display())]
    Failed {
        /// The sources.
        dir: PathBuf,
        /// The build tree.
        tree: PathBuf,
        /// What the compiler and `make` said.
        words: String,
    },
    /// The build ended well and made nothing.
    #[error(
        "building {} made no module: its Makefile has no `obj-m`, or none for this kernel", dir.display()
    )]
    NoModules {
        /// The sources.
        dir: PathBuf,
    },
    /// Files were changed all the time.
    #[error("the files in {} are being changed, so that they cannot be built", dir.display())]
    Changed {
        /// The directory.
        dir: PathBuf,
    },
    /// What was built is no module.
    #[error("{} is no module", path.display())]
    NoModule {
        /// The file.
        path: PathBuf,
    },
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
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

impl ModuleBuildError {
    pub(super) fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { doing, path: path.to_owned(), source }
    }
}
