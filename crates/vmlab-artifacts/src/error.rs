//! Why a kernel cannot be had.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::boot_image::BootImageError;
use crate::cache::{CacheError, Flaw};
use crate::spec::{Distro, SpecError};

/// A kernel cannot be found, fetched or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The text is no kernel spec.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// There is nothing at the path.
    #[error("there is no kernel at {}: no such file or directory", path.display())]
    NoSuchPath {
        /// The path.
        path: PathBuf,
    },
    /// The file is no kernel that can be booted.
    #[error(transparent)]
    BadImage(#[from] BootImageError),
    /// The directory is neither a build tree nor an unpacked package.
    #[error(
        "there is no kernel in {}: a build tree has arch/*/boot/bzImage or Image (was it built?), \
         an unpacked package has boot/vmlinuz-* or usr/lib/modules/*/vmlinuz",
        path.display()
    )]
    NoKernelInDir {
        /// The directory.
        path: PathBuf,
    },
    /// The directory is a kernel's source or build tree without a boot image.
    #[error(
        "the kernel in {} is not built: there is no {}; run `make` there, or give the directory that \
         `make O=` wrote to{}", path.display(), image.display(), vmlinux_hint(vmlinux)
    )]
    NotBuilt {
        /// The tree.
        path: PathBuf,
        /// Where the boot image would be.
        image: PathBuf,
        /// The uncompressed kernel, where that was built.
        vmlinux: Option<PathBuf>,
    },
    /// The directory or package has several kernels.
    #[error("{} has several kernels, name one of them: {}", path.display(), list(found))]
    Ambiguous {
        /// The directory or package.
        path: PathBuf,
        /// The boot images.
        found: Vec<String>,
    },
    /// The release is not installed.
    #[error(
        "no kernel {release} is installed here (there is no {}); {}{}",
        image.display(), installed_list(installed), suggestion.as_ref().map_or(String::new(), |s| format!("; did you mean {s}?"))
    )]
    NotInstalled {
        /// The release.
        release: String,
        /// The file that was looked for.
        image: PathBuf,
        /// The releases that are installed.
        installed: Vec<String>,
        /// A spec that may have been meant.
        suggestion: Option<String>,
    },
    /// A file of an installed kernel may not be read by this user.
    #[error(
        "{} cannot be read by this user; allow it with `sudo chmod a+r {}`, or use a kernel of \
         the store, such as `-k debian:stable`", path.display(), path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// An installed module tree has no index.
    #[error(
        "the module tree {} has no modules.dep; make one with `sudo depmod {release}`", tree.display()
    )]
    NoModulesDep {
        /// The module tree.
        tree: PathBuf,
        /// Its release.
        release: String,
    },
    /// Module lists cannot be made for a module tree.
    #[error("cannot index the modules in {}", tree.display())]
    Modules {
        /// The module tree.
        tree: PathBuf,
        /// What is wrong with it.
        source: Flaw,
    },
    /// The file is no Debian package, or a damaged one.
    #[error("{} is no Debian package that can be unpacked", path.display())]
    BadDeb {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Flaw,
    },
    /// The package has no kernel in it.
    #[error(
        "{} has no kernel in it; packages with kernels are named linux-image-VERSION",
        path.display()
    )]
    NoKernelInDeb {
        /// The package.
        path: PathBuf,
    },
    /// Other packages of the same kernel are wanted beside this one.
    #[error(
        "{} holds only a part of a kernel; put the others into the same directory: {} \
         (`apt-get download` fetches them)", path.display(), list(missing)
    )]
    MissingParts {
        /// The package.
        path: PathBuf,
        /// The file names of the others.
        missing: Vec<String>,
    },
    /// This host has no apt.
    #[error(
        "cannot run `{program}`, which fetches {distro}'s kernels; on a host without apt, give \
         the path of a .deb or of a boot image instead"
    )]
    NoApt {
        /// The program.
        program: String,
        /// Whose kernel was wanted.
        distro: Distro,
        /// What the operating system said.
        source: io::Error,
    },
    /// No apt source of this host belongs to the distribution.
    #[error(
        "this host's apt has no source of {distro}'s packages, so {distro}'s kernels cannot be \
         fetched and checked; add one under {}/ with the distribution's keyring as its Signed-By{}", sources.display(), keyring_hint(*distro)
    )]
    NoSource {
        /// Whose kernel was wanted.
        distro: Distro,
        /// The directory for apt sources.
        sources: PathBuf,
    },
    /// The archive has no such suite.
    #[error("{distro}'s archive has no suite `{suite}`{}; apt says: {words}", did_you_mean(*distro, nearest))]
    NoSuite {
        /// Whose archive.
        distro: Distro,
        /// The suite.
        suite: String,
        /// A suite with nearly this name.
        nearest: Option<String>,
        /// What apt said.
        words: String,
    },
    /// apt failed.
    #[error("apt cannot {doing}; it says: {words}{}", disk_hint(words))]
    Apt {
        /// What was being done, an infinitive.
        doing: String,
        /// What apt said.
        words: String,
    },
    /// No package fits.
    #[error("no package fits {spec}: {searched}{}", closest(available))]
    NoMatch {
        /// The spec.
        spec: String,
        /// Where was looked.
        searched: String,
        /// Kernels that there are, as specs.
        available: Vec<String>,
    },
    /// The store has no kernel that fits, and nothing may be fetched.
    #[error("{spec} is not in the store; fetch it with `vmlab kernel pull {spec}`{}", stored(have))]
    NotInStore {
        /// The spec.
        spec: String,
        /// What the store has.
        have: Vec<String>,
    },
    /// Only a distribution's kernel or a `.deb` can be pulled.
    #[error(
        "{spec} is a kernel of this host: there is nothing to fetch; `vmlab kernel pull` takes specs such as debian:6.12, and .deb files"
    )]
    NotPullable {
        /// The spec.
        spec: String,
    },
    /// The distribution has no headers for this release.
    #[error(
        "there are no headers for {release} in {from}, so that no module can be built for it; where a newer \
         kernel has taken its place, `vmlab kernel pull` fetches that"
    )]
    NoHeaders {
        /// The release.
        release: String,
        /// Where they were looked for.
        from: String,
    },
    /// It is not known where a kernel has its build tree.
    #[error("no module can be built for {spec}: {why}")]
    NoBuildTree {
        /// The kernel.
        spec: String,
        /// Why not, and what to do.
        why: String,
    },
    /// Several store entries have this name.
    #[error("`{name}` names several kernels of the store, name one of them: {}", list(entries))]
    SeveralEntries {
        /// What was asked for.
        name: String,
        /// The entries.
        entries: Vec<String>,
    },
    /// No store entry has this name.
    #[error("there is no kernel `{name}` in the store{}", stored(have))]
    NoEntry {
        /// What was asked for.
        name: String,
        /// The entries.
        have: Vec<String>,
    },
    /// A file operation failed, outside of the cache.
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

impl KernelError {
    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> KernelError {
        KernelError::Io { doing, path: path.to_owned(), source }
    }

    /// An operation below the cache's root, for which there is advice.
    pub(crate) fn cache_io(doing: &'static str, path: &Path, source: io::Error) -> KernelError {
        KernelError::Cache(CacheError::io(doing, path, source))
    }
}

/// How many names a message lists before it stops.
const MAX_LISTED: usize = 12;

fn list(names: &[String]) -> String {
    let more = names.len().saturating_sub(MAX_LISTED);
    let mut text = names[..names.len() - more].join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

fn vmlinux_hint(vmlinux: &Option<PathBuf>) -> String {
    let hint = |path: &PathBuf| format!("; `-k {}` boots what was built of it", path.display());
    vmlinux.as_ref().map_or(String::new(), hint)
}

fn closest(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("; there is {}", list(names)) }
}

fn stored(names: &[String]) -> String {
    match names {
        [] => "; the store is empty".to_owned(),
        _ => format!("; the store has {}", list(names)),
    }
}

/// apt works in the cache directory, and cannot know what moves it.
fn disk_hint(words: &str) -> String {
    match words.contains("No space left on device") || words.contains("enough free space") {
        true => crate::cache::advice(&io::Error::from(io::ErrorKind::StorageFull)),
        false => String::new(),
    }
}

fn installed_list(names: &[String]) -> String {
    if names.is_empty() {
        "no kernel is installed at all".to_owned()
    } else {
        format!("installed: {}", list(names))
    }
}

fn did_you_mean(distro: Distro, suite: &Option<String>) -> impl fmt::Display {
    suite.as_ref().map_or(String::new(), |suite| format!(" (did you mean {distro}:{suite}?)"))
}

fn keyring_hint(distro: Distro) -> &'static str {
    match distro {
        Distro::Debian => " (package debian-archive-keyring)",
        Distro::Ubuntu => " (package ubuntu-keyring)",
    }
}
