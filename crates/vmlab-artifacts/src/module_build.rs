//! Modules that are built from sources outside of the kernel's tree, as Kbuild does with `M=`.
//!
//! Sources are copied into a directory of the cache for each build tree and built there, so that the user's
//! directory stays clean, builds for several kernels can run side by side, and `make` builds only what has
//! changed. What comes out is an entry of the cache under the content of all that it was made of.

mod error;
mod info;
mod make;
mod sources;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use error::ModuleBuildError;
use info::ModuleInfo;
use make::{Log, Toolchain};
pub use sources::{ModuleSource, SourceState};

use crate::cache::{Flaw, Lease, Manifest};
use crate::progress::waiting;
use crate::{Bound, BuildTree, Cache, ContentKey, Kind, Progress};

const MODULES: &str = "modules";

/// How often a build begins anew since files were saved meanwhile.
const TRIES: u32 = 5;

/// How many builds are kept; each has as many files as modules, and debug information in them.
const KEPT: usize = 256;

/// The kind of built modules, for whoever looks after the cache.
pub(crate) const KIND: Kind = Kind { name: MODULES, bound: Bound::Entries(KEPT), verify };

/// Describes an entry, and is written last.
const DESCRIPTION: &str = "modules.json";

/// What `make` said, in an entry.
const LOG: &str = "build.log";

/// What was built for one kernel.
#[derive(Debug)]
pub struct ModuleBuild {
    /// The modules, those first that others need.
    pub modules: Vec<BuiltModule>,
    /// The compiler's and modpost's warnings, as they were written.
    pub warnings: Vec<String>,
    /// The directory that the modules are in.
    pub dir: PathBuf,
    /// All that `make` said.
    pub log: PathBuf,
    /// Whether they were built now, and not by an earlier call.
    pub fresh: bool,
    /// Keeps the entry in the cache.
    _lease: Lease,
}

/// A module that was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuiltModule {
    /// Its name, as the kernel lists it.
    pub name: String,
    /// The file, with its debug information. Relative to the entry where it is kept.
    pub path: PathBuf,
    /// The modules that it needs, as the kernel lists them.
    pub depends: Vec<String>,
    /// The kernel's functions that it calls.
    pub imports: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Description {
    modules: Vec<BuiltModule>,
    warnings: Vec<String>,
    files: Manifest,
}

impl Description {
    fn read(dir: &Path) -> Result<Self, Flaw> {
        Ok(serde_json::from_slice(&fs::read(dir.join(DESCRIPTION))?)?)
    }
}

fn verify(dir: &Path) -> Result<(), Flaw> {
    Ok(Description::read(dir)?.files.check(dir)?)
}

impl ModuleBuild {
    /// The modules of the kernel that have to be there before these, in no order.
    pub fn needs(&self) -> Vec<&str> {
        let own = |name: &str| self.modules.iter().any(|module| module.name == name);
        let all = self.modules.iter().flat_map(|module| &module.depends).map(String::as_str);
        let mut needs: Vec<&str> = all.filter(|name| !own(name)).collect();
        needs.sort_unstable();
        needs.dedup();
        needs
    }
}

/// Builds the modules of a directory in a kernel's build tree, unless that was done before.
///
/// # Errors
/// [`ModuleBuildError::Failed`] has what the compiler said.
pub fn build(
    cache: &Cache,
    source: &ModuleSource,
    tree: &BuildTree,
    progress: &dyn Progress,
) -> Result<ModuleBuild, ModuleBuildError> {
    for _ in 0..TRIES {
        match build_once(cache, source, tree, progress) {
            Err(ModuleBuildError::Changed { .. }) => {}
            outcome => return outcome,
        }
    }
    Err(ModuleBuildError::Changed { dir: source.dir().to_owned() })
}

fn build_once(
    cache: &Cache,
    source: &ModuleSource,
    tree: &BuildTree,
    progress: &dyn Progress,
) -> Result<ModuleBuild, ModuleBuildError> {
    let toolchain = Toolchain::of(&tree.dir)?;
    let mut files = Vec::new();
    let mut key = ContentKey::new("module-build-1")
        .field("dir", source.dir().as_os_str().as_encoded_bytes())
        .field("tree", &tree.key)
        .field("toolchain", toolchain.key(cache)?);
    for file in source.files()? {
        let path = source.dir().join(&file);
        let digest = cache.digest(&path).map_err(|e| ModuleBuildError::io("read", &path, e))?;
        key = key.field("name", file.as_os_str().as_encoded_bytes()).field("file", digest);
        files.push((file, digest));
    }
    let key = key.finish();
    let mut fresh = false;
    let make = |entry: &Path| -> Result<(), ModuleBuildError> {
        fresh = true;
        progress.phase("build the module");
        let work = make::Work::open(cache, source, tree)?;
        work.take(source, &files)?;
        let log = work.make(source, tree, &toolchain)?;
        describe(entry, &work.collect(source, entry)?, &log)
    };
    let on_wait = waiting(progress, "building the same module");
    let (dir, lease) = cache.get_or_build_unflushed(MODULES, &key, verify, make, on_wait, None)?;
    let read = Description::read(&dir);
    let Description { mut modules, warnings, .. } = read.map_err(|flaw| {
        ModuleBuildError::io("read", &dir.join(DESCRIPTION), std::io::Error::other(flaw))
    })?;
    for module in &mut modules {
        module.path = dir.join(&module.path);
    }
    Ok(ModuleBuild { modules, warnings, log: dir.join(LOG), dir, fresh, _lease: lease })
}

/// Describes the modules that are in an entry.
fn describe(entry: &Path, files: &[PathBuf], log: &Log) -> Result<(), ModuleBuildError> {
    let mut modules = Vec::new();
    for file in files {
        let path = entry.join(file);
        let content = fs::read(&path).map_err(|e| ModuleBuildError::io("read", &path, e))?;
        let info = ModuleInfo::read(&content)
            .ok_or_else(|| ModuleBuildError::NoModule { path: path.clone() })?;
        let ModuleInfo { name, depends, imports } = info;
        modules.push(BuiltModule { name, path: file.clone(), depends, imports });
    }
    let write = |name: &str, content: &[u8]| {
        let path = entry.join(name);
        fs::write(&path, content).map_err(|e| ModuleBuildError::io("write", &path, e))
    };
    write(LOG, log.text.as_bytes())?;
    let files = Manifest::of(entry).map_err(|e| ModuleBuildError::io("list", entry, e))?;
    let modules = info::in_order(modules);
    let description = Description { modules, warnings: log.warnings.clone(), files };
    let json = serde_json::to_vec(&description).map_err(std::io::Error::from);
    write(DESCRIPTION, &json.map_err(|e| ModuleBuildError::io("describe", entry, e))?)
}
