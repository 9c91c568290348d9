//! A kernel's module tree, `lib/modules/RELEASE`: which modules there are, what they need, and the
//! order to load them in.

mod build_tree;
mod depmod;
mod index;
mod order;
pub(crate) mod place;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub use build_tree::tree_from_build;
pub(crate) use build_tree::{BUILTIN_LISTS, BuiltModules};
pub use depmod::depmod;

use crate::compress::{self, CompressError, Compression, Limit};
use crate::kconfig::Tristate;
use index::Index;

/// The largest module that is read, in bytes, compressed or not. With debugging information the
/// largest ones have some 100 MiB.
const MODULE_LEN_MAX: usize = 512 << 20;

/// Why something about modules did not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModulesError {
    /// There is no such module tree, or it cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The tree has no index of its modules.
    #[error(
        "{} has no modules.dep; run `depmod -b {} {}` to make it",
        dir.display(), base.display(), release
    )]
    NotIndexed {
        /// The tree.
        dir: PathBuf,
        /// What to give to depmod as its base directory.
        base: PathBuf,
        /// The tree's release.
        release: String,
    },
    /// The tree lacks the list of what is built into the kernel, without which everything that is
    /// built in would seem to be absent.
    #[error(
        "{} has no modules.builtin, so it is not the whole tree; Debian's kernels from 7.x on have \
         that file in the package linux-base-{}", dir.display(), release
    )]
    NoBuiltinList {
        /// The tree.
        dir: PathBuf,
        /// The tree's release.
        release: String,
    },
    /// An index file is larger than any real one, or is not text.
    #[error("{} is damaged: {reason}; run depmod again", path.display())]
    BadIndex {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A module is neither in the tree nor built into the kernel.
    #[error("kernel {release} has no module {module}, neither in {} nor built in", dir.display())]
    NotFound {
        /// The module.
        module: String,
        /// The kernel's release.
        release: String,
        /// The tree.
        dir: PathBuf,
    },
    /// The index says that a module needs another one, which it does not list.
    #[error(
        "module {module} of {} needs {needed}, which modules.dep does not list; run depmod again",
        dir.display()
    )]
    MissingDependency {
        /// The module that needs another one.
        module: String,
        /// The other one, as the index names it.
        needed: String,
        /// The tree.
        dir: PathBuf,
    },
    /// A module cannot be decompressed.
    #[error("cannot decompress the module {}", path.display())]
    Decompress {
        /// The module.
        path: PathBuf,
        /// What the decoder said.
        #[source]
        source: CompressError,
    },
    /// A file is no kernel module.
    #[error("{} is no kernel module: {found}", path.display())]
    NotAModule {
        /// The file.
        path: PathBuf,
        /// What was found instead.
        found: String,
    },
    /// depmod is not installed.
    #[error("depmod was not found; it comes with the package kmod (`apt-get install kmod`)")]
    NoDepmod,
    /// depmod failed.
    #[error("depmod failed for {release} in {} ({status}): {message}", base.display())]
    Depmod {
        /// The base directory that it was given.
        base: PathBuf,
        /// The release that it was given.
        release: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The end of what it printed.
        message: String,
    },
    /// depmod passed over all modules.
    #[error(
        "depmod found none of the modules in {}; see `depmod --version` for whether it can read the \
         format that they are compressed in", dir.display()
    )]
    NothingIndexed {
        /// The tree.
        dir: PathBuf,
    },
    /// depmod could not be run at all.
    #[error("cannot run {}", program.display())]
    RunDepmod {
        /// The program.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A release is empty or no single file name.
    #[error("{release:?} cannot be a kernel release")]
    BadRelease {
        /// The release.
        release: String,
    },
    /// A kernel build directory has no modules in it.
    #[error(
        "the kernel build in {} has no {missing}; build the modules there (`make modules`)",
        dir.display()
    )]
    NotBuilt {
        /// The build directory.
        dir: PathBuf,
        /// The file that is missing.
        missing: String,
    },
    /// A file of the new tree cannot be made.
    #[error("cannot create {}", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A module in a tree.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModuleRef {
    /// The name that the kernel knows it by, with `_` and never `-`.
    pub name: String,
    /// Its file, compressed or not.
    pub path: PathBuf,
    /// It is here because of a soft dependency, or of something that only such a one needs: the
    /// kernel may refuse it (a driver for CPU features that are not there) without harm.
    pub optional: bool,
    /// Modules of one wave need nothing of each other and may be loaded at once, after all waves with
    /// lower numbers.
    pub wave: usize,
}

/// A kernel's modules, by the index files that depmod and the kernel's build made.
#[derive(Debug, Clone)]
pub struct ModuleTree {
    dir: PathBuf,
    release: String,
    index: Index,
}

/// The name that the kernel knows a module by: `-` and `_` are one in module names.
pub fn normalize(name: &str) -> String {
    name.replace('-', "_")
}

impl ModuleTree {
    /// Opens `…/lib/modules/RELEASE` and reads its index.
    pub fn open(dir: &Path) -> Result<ModuleTree, ModulesError> {
        let bad_release = || ModulesError::BadRelease { release: dir.display().to_string() };
        let release = dir.file_name().and_then(|n| n.to_str()).ok_or_else(bad_release)?.to_owned();
        let index = Index::read(dir, &release)?;
        Ok(ModuleTree { dir: dir.to_owned(), release, index })
    }

    /// The files that [`open`](ModuleTree::open) reads, as far as they are there.
    pub fn index_files(dir: &Path) -> impl Iterator<Item = PathBuf> {
        index::FILES.iter().map(|name| dir.join(name))
    }

    /// The tree's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The release of the kernel that the modules are for: the directory's name.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Whether the kernel has the module, by its name or an exact alias.
    pub fn availability(&self, module: &str) -> Tristate {
        let name = normalize(module);
        if !self.index.resolve(&name).is_empty() {
            Tristate::Module
        } else if self.index.is_builtin(&name) {
            Tristate::BuiltIn
        } else {
            Tristate::Absent
        }
    }

    /// The module's file. `None` for modules that are built in or absent.
    pub fn path(&self, module: &str) -> Option<PathBuf> {
        self.index.modules.get(&normalize(module)).map(|entry| self.dir.join(&entry.path))
    }

    /// The names of all modules that are files, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let mut names: Vec<_> = self.index.modules.keys().map(String::as_str).collect();
        names.sort_unstable();
        names.into_iter()
    }

    /// The modules to load for `wanted`, each once and after all that it needs; what is built in is
    /// left out. Names may be exact aliases, like `fs-9p`.
    ///
    /// Soft dependencies are included where the tree has them, as modprobe does.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<ModuleRef>, ModulesError> {
        let mut roots = Vec::new();
        for module in wanted {
            let found = self.index.resolve(&normalize(module));
            if found.is_empty() && self.availability(module) == Tristate::Absent {
                return Err(ModulesError::NotFound {
                    module: (*module).to_owned(),
                    release: self.release.clone(),
                    dir: self.dir.clone(),
                });
            }
            roots.extend(found);
        }
        let order = order::load_order(&self.index, &roots).map_err(|missing| {
            ModulesError::MissingDependency {
                module: missing.module,
                needed: missing.needed,
                dir: self.dir.clone(),
            }
        })?;
        let modules = order.into_iter().map(|step| ModuleRef {
            path: self.dir.join(&self.index.modules[step.name].path),
            name: step.name.to_owned(),
            optional: step.optional,
            wave: step.wave,
        });
        Ok(modules.collect())
    }

    /// Reads a module and decompresses it. The result is an ELF file, by its magic bytes.
    pub fn read(&self, module: &ModuleRef) -> Result<Vec<u8>, ModulesError> {
        read_module(&module.path)
    }
}

/// Reads a module's file, compressed or not, and decompresses it. The result is an ELF file, by its
/// magic bytes.
pub fn read_module(path: &Path) -> Result<Vec<u8>, ModulesError> {
    let content = read_capped(path, MODULE_LEN_MAX)?;
    let content = match Compression::sniff(&content) {
        Some(format) => compress::decompress(format, &content, Limit::max(MODULE_LEN_MAX))
            .map_err(|source| ModulesError::Decompress { path: path.to_owned(), source })?,
        None => content,
    };
    if content.starts_with(&object::elf::ELFMAG) {
        return Ok(content);
    }
    let found = match content.len() {
        0 => "it is empty".to_owned(),
        _ => format!("it starts with the bytes {:02x?}", &content[..content.len().min(4)]),
    };
    Err(ModulesError::NotAModule { path: path.to_owned(), found })
}

/// Reads a file of at most `max` bytes.
fn read_capped(path: &Path, max: usize) -> Result<Vec<u8>, ModulesError> {
    let read = || {
        let mut content = Vec::new();
        let file = File::open(path)?;
        let len = file.metadata()?.len().min(max as u64) as usize;
        content.try_reserve_exact(len + 1).map_err(|_| io::ErrorKind::OutOfMemory)?;
        file.take(max as u64 + 1).read_to_end(&mut content)?;
        if content.len() > max {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(content)
    };
    read().map_err(|source| ModulesError::Read { path: path.to_owned(), source })
}
