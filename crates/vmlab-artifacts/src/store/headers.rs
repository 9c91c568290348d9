//! What modules are built against: a build tree of the user's, or the distribution's headers, which are fetched into the
//! cache.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::KernelStore;
use super::entry::{self, Entry, sanitise};
use crate::cache::{Flaw, Leases, Manifest};
use crate::progress::waiting;
use crate::source::{apt, deb};
use crate::{Bound, DistroSpec, Kernel, KernelError, Kind, Origin, Progress, Select};

const HEADERS: &str = "headers";

/// The kind of unpacked headers, for whoever looks after the cache.
pub(crate) const KIND: Kind = Kind { name: HEADERS, bound: Bound::None, verify };

/// Where packages have headers.
const SOURCES: &str = "usr/src";

/// Describes an entry, and is written last.
const DESCRIPTION: &str = "headers.json";

/// What every build reads.
const KEY_FILES: [&str; 3] = ["Makefile", ".config", "Module.symvers"];

/// Where `make -C` builds modules for a kernel.
#[derive(Debug, Clone)]
pub struct BuildTree {
    /// The directory.
    pub dir: PathBuf,
    /// The directories that the kernel's sources and headers are in, of which their names do not begin.
    pub sources: Vec<PathBuf>,
    /// Changes when the tree does.
    pub key: String,
    /// The distribution's headers in the cache, which must not be deleted while they are used.
    pub leases: Leases,
}

#[derive(Debug, Serialize, Deserialize)]
struct Headers {
    /// Where the build tree is in the entry.
    tree: PathBuf,
    /// All trees in it: of one architecture, and what they have in common.
    sources: Vec<PathBuf>,
    key_files: Manifest,
}

impl Headers {
    fn read(dir: &Path) -> Result<Self, Flaw> {
        Ok(serde_json::from_slice(&fs::read(dir.join(DESCRIPTION))?)?)
    }
}

fn verify(dir: &Path) -> Result<(), Flaw> {
    Ok(Headers::read(dir)?.key_files.check(dir)?)
}

impl KernelStore {
    /// Where modules for a kernel are built. The headers of a distribution's kernel are fetched unless they are in the
    /// cache.
    ///
    /// # Errors
    /// [`KernelError::NoHeaders`] and [`KernelError::NoBuildTree`].
    pub fn build_tree(
        &self,
        kernel: &Kernel,
        progress: &dyn Progress,
    ) -> Result<BuildTree, KernelError> {
        match &kernel.origin {
            Origin::BuildTree { path } => of_user(kernel, path),
            Origin::Package { entry, package, version, suites } => {
                let described = Entry::read(&self.cache.root().join(super::KERNELS).join(entry))?;
                let (Some(distro), Some(suite)) = (described.distro, suites.first()) else {
                    let why = format!("it is not known where {package} came from; {GIVE_A_TREE}");
                    return Err(none(kernel, why));
                };
                let select = Select::Suite(suite.clone());
                let arch = Some(kernel.arch);
                let spec = DistroSpec { distro, select, flavour: None, arch };
                self.headers(&spec, &kernel.release, version, progress)
            }
            Origin::Installed | Origin::File { .. } | Origin::Unpacked { .. } => {
                let link = kernel.modules.as_ref().map(|tree| tree.join("build"));
                match link.as_ref().and_then(|link| link.canonicalize().ok()) {
                    Some(dir) => of_user(kernel, &dir),
                    None => {
                        let package = format!("linux-headers-{}", kernel.release);
                        let why = format!(
                            "its modules have no link `build` to a tree; install {package}, or {GIVE_A_TREE}"
                        );
                        Err(none(kernel, why))
                    }
                }
            }
        }
    }

    fn headers(
        &self,
        spec: &DistroSpec,
        release: &str,
        version: &str,
        progress: &dyn Progress,
    ) -> Result<BuildTree, KernelError> {
        let key = sanitise(&format!("{release}_{version}_{}", spec.arch().debian()));
        let build = |dir: &Path| {
            let parts = apt::find_headers(self.cache.root(), spec, (release, version), progress)?;
            entry::fetch(dir, &parts, deb::unpack_headers, progress)?;
            finish(dir, &Path::new(SOURCES).join(&parts.first().name))
        };
        let on_wait = waiting(progress, "fetching the same headers");
        let (entry, lease) =
            self.cache.get_or_build_leased(HEADERS, &key, verify, build, on_wait)?;
        let headers = Headers::read(&entry).map_err(|flaw| {
            let path = entry.join(DESCRIPTION);
            KernelError::cache_io("read", &path, std::io::Error::other(flaw))
        })?;
        let leases = Leases::default();
        leases.add(lease);
        let sources = headers.sources.iter().map(|top| entry.join(top)).collect();
        Ok(BuildTree { dir: entry.join(headers.tree), sources, key, leases })
    }
}

const GIVE_A_TREE: &str = "give the directory in which it was built as the kernel";

fn none(kernel: &Kernel, why: String) -> KernelError {
    KernelError::NoBuildTree { spec: kernel.spec.clone(), why }
}

/// A tree that is not in the cache, and may change at any time.
fn of_user(kernel: &Kernel, dir: &Path) -> Result<BuildTree, KernelError> {
    let mut key = format!("{}", dir.display());
    for name in KEY_FILES {
        let path = dir.join(name);
        let meta = match path.metadata() {
            Ok(meta) => meta,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let dir = dir.display();
                let why = format!("there is no {name} in {dir}; run `make modules` there");
                return Err(none(kernel, why));
            }
            Err(e) => return Err(KernelError::io("look at", &path, e)),
        };
        let changed = meta.modified().map_err(|e| KernelError::io("look at", &path, e))?;
        key.push_str(&format!(" {name} {} {changed:?}", meta.len()));
    }
    // One that was configured in a directory of its own has a link to the other.
    let source = dir.join("source").canonicalize().ok();
    let sources = [dir.to_owned()].into_iter().chain(source).collect();
    Ok(BuildTree { dir: dir.to_owned(), sources, key, leases: Leases::default() })
}

/// Makes unpacked headers work where they are, and describes them.
fn finish(dir: &Path, tree: &Path) -> Result<(), KernelError> {
    let makefile = dir.join(tree).join("Makefile");
    let text = fs::read_to_string(&makefile)
        .map_err(|e| KernelError::cache_io("read the headers' Makefile,", &makefile, e))?;
    fs::write(&makefile, relative(&text))
        .map_err(|e| KernelError::cache_io("write the headers' Makefile,", &makefile, e))?;
    let size = |name: &str| {
        let path = tree.join(name);
        let meta = dir.join(&path).metadata();
        let meta = meta.map_err(|e| KernelError::cache_io("find", &dir.join(&path), e))?;
        Ok((path, meta.len()))
    };
    let files = KEY_FILES.iter().map(|name| size(name)).collect::<Result<_, KernelError>>()?;
    let top = Path::new(SOURCES);
    let list = || -> std::io::Result<Vec<PathBuf>> {
        fs::read_dir(dir.join(top))?.map(|item| Ok(top.join(item?.file_name()))).collect()
    };
    let sources = list().map_err(|e| KernelError::cache_io("list", &dir.join(top), e))?;
    let headers = Headers { tree: tree.to_owned(), sources, key_files: Manifest { files } };
    entry::write_json(dir, DESCRIPTION, &headers)
}

/// A Makefile of Debian's, which names itself and that of the common headers where they are when they are installed. Both are
/// in the same directory.
fn relative(makefile: &str) -> String {
    makefile.replace("/usr/src/", "$(dir $(lastword $(MAKEFILE_LIST)))../")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn included_headers_are_found_beside_the_tree() {
        assert_eq!(
            relative("include /usr/src/linux-headers-6.1.0-57-common/Makefile\n"),
            "include $(dir $(lastword $(MAKEFILE_LIST)))../linux-headers-6.1.0-57-common/Makefile\n"
        );
        assert_eq!(
            relative("KBUILD_OUTPUT=/usr/src/linux-headers-7.2.13+deb14-amd64\n"),
            "KBUILD_OUTPUT=$(dir $(lastword $(MAKEFILE_LIST)))../linux-headers-7.2.13+deb14-amd64\n"
        );
    }
}
