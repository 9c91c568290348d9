//! The store of kernels, and the one way from a spec to a kernel.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{self, AtomicU64};

use serde::Serialize;

use crate::cache::{Flaw, Leases};
use crate::progress::waiting;
use crate::source::{apt, deb, local};
use crate::{
    Arch, Bound, Cache, CacheError, ContentKey, Distro, DistroSpec, Kernel, KernelError,
    KernelSpec, Kind, Origin, Progress, Select, Silent, version,
};

mod entry;
mod headers;

use entry::Entry;
pub use headers::BuildTree;
pub(crate) use headers::KIND as HEADERS_KIND;

/// The cache kind of kernels.
const KERNELS: &str = "kernels";

/// It, for whoever looks after the cache.
pub(crate) const KIND: Kind = Kind { name: KERNELS, bound: Bound::None, verify: entry::verify_all };

/// Finds kernels, and keeps those that were fetched.
#[derive(Debug, Clone)]
pub struct KernelStore {
    cache: Cache,
}

/// What the store knows of one of its kernels without opening it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoredKernel {
    /// The key of the store entry.
    pub key: String,
    /// What `uname -r` prints.
    pub release: String,
    /// Debian's or Ubuntu's; none for a `.deb` that was given by its path.
    pub distro: Option<Distro>,
    /// `cloud`, `rt`; none for the generic one.
    pub flavour: Option<String>,
    /// The architecture.
    pub arch: Arch,
    /// The package that it came in.
    pub package: String,
    /// The package's version.
    pub version: String,
    /// The names of the suite in which it was found.
    pub suites: Vec<String>,
    /// Bytes of its files.
    pub bytes: u64,
    /// Whether the entry is whole. One that is not is fetched anew when it is wanted.
    pub valid: bool,
}

impl KernelStore {
    /// A store in this cache.
    pub fn open(cache: Cache) -> KernelStore {
        KernelStore { cache }
    }

    /// The cache that the store is in.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The kernel for a spec; fetches it where the store has none.
    ///
    /// A version is answered by the newest kernel of the store that fits, a suite by the kernel
    /// that was its newest when it was last asked; [`pull`](KernelStore::pull) asks anew.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn resolve(
        &self,
        spec: &KernelSpec,
        progress: &dyn Progress,
    ) -> Result<Kernel, KernelError> {
        match spec {
            KernelSpec::Host => {
                local::installed(&self.cache, Path::new("/"), &running_release(), true)
            }
            KernelSpec::Installed(release) => {
                let running = *release == running_release();
                local::installed(&self.cache, Path::new("/"), release, running)
            }
            KernelSpec::Path(path) if is_deb(path) => self.import_deb(spec, path, progress),
            KernelSpec::Path(path) => local::at_path(&self.cache, spec.to_string(), path),
            KernelSpec::Distro(distro) => match self.stored(distro)? {
                Some(kernel) => Ok(kernel),
                None => self.fetch(distro, false, progress),
            },
        }
    }

    /// The kernel for a run that names none.
    ///
    /// The running release if its files can be read, else the newest of the store, else the
    /// distribution's newest, which is fetched. A note says which, and why not the one before.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn resolve_default(&self, progress: &dyn Progress) -> Result<Kernel, KernelError> {
        self.resolve_default_for(&|_| Ok(()), progress)
    }

    /// As [`resolve_default`](KernelStore::resolve_default), of the kernels for which `fits` has no
    /// objection. What is fetched is used in any case, for there is no other.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn resolve_default_for(
        &self,
        fits: &dyn Fn(&Kernel) -> Result<(), String>,
        progress: &dyn Progress,
    ) -> Result<Kernel, KernelError> {
        let release = running_release();
        let running = local::installed(&self.cache, Path::new("/"), &release, true);
        self.default_of(&release, running, fits, progress)
    }

    /// The default where this is what became of the running release.
    fn default_of(
        &self,
        release: &str,
        running: Result<Kernel, KernelError>,
        fits: &dyn Fn(&Kernel) -> Result<(), String>,
        progress: &dyn Progress,
    ) -> Result<Kernel, KernelError> {
        let running = running.map(|kernel| fits(&kernel).map(|()| kernel));
        let why_not = match running {
            Ok(Ok(kernel)) => {
                progress.note(&format!("no kernel was named: using the running one, {release}"));
                return Ok(kernel);
            }
            Ok(Err(why)) => format!("the running one cannot be used, because {why}"),
            Err(KernelError::NotInstalled { .. }) => {
                format!("the files of the running one ({release}) are not here")
            }
            Err(error) => format!("the running one ({release}) cannot be used, because {error}"),
        };
        let mut empty = true;
        for stored in self.described()?.into_iter().rev().filter(|k| k.arch == Arch::HOST) {
            if !self.is_whole(&stored.key, entry::verify)? {
                continue;
            }
            empty = false;
            let kernel = self.open_entry(&stored.key, stored.key.clone())?;
            match fits(&kernel) {
                Ok(()) => {
                    progress.note(&format!(
                        "no kernel was named, and {why_not}: using {} of the store",
                        stored.release
                    ));
                    return Ok(kernel);
                }
                Err(why) => progress.note(&format!("passing over {}: {why}", stored.key)),
            }
        }
        let spec = apt::host_suite(self.cache.root(), progress)?;
        let of_store = if empty { "the store is empty" } else { "none of the store fits" };
        progress.note(&format!("no kernel was named, {why_not}, and {of_store}: fetching {spec}"));
        self.fetch(&spec, false, progress)
    }

    /// The kernel for a spec, without network: only what is on this host or in the store.
    ///
    /// # Errors
    /// [`KernelError::NotInStore`], and as [`resolve`](KernelStore::resolve).
    pub fn inspect(&self, spec: &KernelSpec) -> Result<Kernel, KernelError> {
        let KernelSpec::Distro(distro) = spec else { return self.resolve(spec, &Silent) };
        match self.stored(distro)? {
            Some(kernel) => Ok(kernel),
            None => Err(KernelError::NotInStore { spec: spec.to_string(), have: self.releases()? }),
        }
    }

    /// Asks the distribution anew and fetches the newest kernel that fits; takes a `.deb` into the
    /// store, and notes as what.
    ///
    /// # Errors
    /// [`KernelError::NotPullable`] for a kernel of this host, and as
    /// [`resolve`](KernelStore::resolve).
    pub fn pull(&self, spec: &KernelSpec, progress: &dyn Progress) -> Result<Kernel, KernelError> {
        match spec {
            KernelSpec::Distro(spec) => self.fetch(spec, true, progress),
            KernelSpec::Path(path) if is_deb(path) => {
                let kernel = self.import_deb(spec, path, progress)?;
                if let Origin::Package { entry, package, version, .. } = &kernel.origin {
                    progress.note(&format!("stored {package} {version} as {entry}"));
                }
                Ok(kernel)
            }
            _ => Err(KernelError::NotPullable { spec: spec.to_string() }),
        }
    }

    /// The kernels of the store, the newest last.
    ///
    /// # Errors
    /// [`KernelError::Cache`] when the store cannot be read.
    pub fn list(&self) -> Result<Vec<StoredKernel>, KernelError> {
        let mut kernels = self.described()?;
        for kernel in &mut kernels {
            kernel.valid = self.is_whole(&kernel.key, entry::verify_all)?;
        }
        Ok(kernels)
    }

    /// The kernels of the store, the newest last; whether they are whole was not looked at.
    fn described(&self) -> Result<Vec<StoredKernel>, KernelError> {
        let mut kernels = Vec::new();
        for item in self.cache.entries(KERNELS)? {
            let Ok(entry) = Entry::read(&item.path) else { continue };
            kernels.push(StoredKernel {
                key: item.key,
                release: entry.release,
                distro: entry.distro,
                flavour: entry.flavour,
                arch: entry.arch,
                package: entry.package,
                version: entry.version,
                suites: entry.suites,
                bytes: entry.bytes,
                valid: false,
            });
        }
        kernels.sort_by(order);
        Ok(kernels)
    }

    /// The newest kernel of the store that passes `wanted` and is whole.
    fn newest(
        &self,
        wanted: impl Fn(&StoredKernel) -> bool,
    ) -> Result<Option<StoredKernel>, KernelError> {
        for kernel in self.described()?.into_iter().rev().filter(|kernel| wanted(kernel)) {
            if self.is_whole(&kernel.key, entry::verify)? {
                return Ok(Some(kernel));
            }
        }
        Ok(None)
    }

    fn is_whole(
        &self,
        key: &str,
        verify: fn(&Path) -> Result<(), Flaw>,
    ) -> Result<bool, KernelError> {
        // A mark that names the entry can be damaged as any file, so a bad key is no error.
        match self.cache.lookup(KERNELS, key, verify) {
            Ok(found) => Ok(found.is_some()),
            Err(CacheError::BadName { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a kernel, named by its key, package, release or spec; gives back its key.
    ///
    /// # Errors
    /// [`KernelError::NoEntry`] and [`KernelError::SeveralEntries`].
    pub fn remove(&self, name: &str) -> Result<String, KernelError> {
        let all = self.described()?;
        let spec = match name.parse() {
            Ok(KernelSpec::Distro(spec)) => Some(spec),
            _ => None,
        };
        let named = |k: &&StoredKernel| {
            k.key == name
                || k.package == name
                || k.release == name
                || spec.as_ref().is_some_and(|spec| match &spec.select {
                    Select::Version(_) => fits(k, spec),
                    Select::Suite(suite) => k.suites.contains(suite) && same_kind(k, spec),
                })
        };
        let found: Vec<String> = all.iter().filter(named).map(|k| k.key.clone()).collect();
        match found.as_slice() {
            [key] => {
                self.cache.remove(KERNELS, key)?;
                Ok(key.clone())
            }
            // An entry without a readable description is no kernel any more, but it takes space.
            [] if self.cache.entries(KERNELS)?.iter().any(|item| item.key == name) => {
                self.cache.remove(KERNELS, name)?;
                Ok(name.to_owned())
            }
            [] => Err(KernelError::NoEntry { name: name.to_owned(), have: self.releases()? }),
            _ => Err(KernelError::SeveralEntries { name: name.to_owned(), entries: found }),
        }
    }

    fn releases(&self) -> Result<Vec<String>, KernelError> {
        Ok(self.described()?.into_iter().map(|kernel| kernel.release).collect())
    }

    /// The answer of the store to a distribution's spec.
    fn stored(&self, spec: &DistroSpec) -> Result<Option<Kernel>, KernelError> {
        let key = match &spec.select {
            Select::Version(_) => {
                self.newest(|kernel| fits(kernel, spec))?.map(|kernel| kernel.key)
            }
            Select::Suite(_) => match fs::read_to_string(self.suite_mark(spec)) {
                Ok(key) if self.is_whole(&key, entry::verify)? => Some(key),
                _ => None,
            },
        };
        key.map(|key| self.open_entry(&key, spec.to_string())).transpose()
    }

    /// The file that names the entry which was a suite's newest when it was last asked.
    fn suite_mark(&self, spec: &DistroSpec) -> PathBuf {
        let flavour = spec.flavour.as_deref().unwrap_or("generic");
        let name = format!("{}-{}-{flavour}-{}", spec.distro, spec.select, spec.arch().debian());
        self.cache.root().join(KERNELS).join(".suites").join(name)
    }

    fn mark_suite(&self, spec: &DistroSpec, key: &str) -> Result<(), KernelError> {
        let mark = self.suite_mark(spec);
        // Not with_extension, which would cut a suite's name at a dot that is in it.
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let count = COUNTER.fetch_add(1, atomic::Ordering::Relaxed);
        let mut temporary = mark.clone().into_os_string();
        temporary.push(format!(".new.{}.{count}", std::process::id()));
        fs::create_dir_all(mark.parent().unwrap_or(&mark))
            .and_then(|()| fs::write(&temporary, key))
            .and_then(|()| fs::rename(&temporary, &mark))
            .map_err(|e| KernelError::cache_io("note the suite's newest kernel in", &mark, e))
    }

    /// Finds, downloads and unpacks a distribution's kernel.
    fn fetch(
        &self,
        spec: &DistroSpec,
        fresh: bool,
        progress: &dyn Progress,
    ) -> Result<Kernel, KernelError> {
        let found = apt::find(self.cache.root(), spec, fresh, progress)?;
        let image = &found.candidate.image;
        let mut key = format!("{}_{}_{}", image.name, image.version, spec.arch().debian());
        let flavour = spec.flavour.clone();
        if apt::wanted_flavour(spec) != flavour.as_deref() {
            // Ubuntu's `virtual` is the generic image with fewer modules.
            key.push_str(&format!("_{}", flavour.as_deref().unwrap_or_default()));
        }
        let key = entry::sanitise(&key);
        self.build_entry(&key, progress, |dir| {
            entry::fetch(dir, &found.parts, deb::unpack, progress)?;
            entry::finish(
                dir,
                &image.name,
                |entry| {
                    entry.distro = Some(spec.distro);
                    entry.flavour = flavour;
                    entry.package.clone_from(&image.name);
                    entry.version.clone_from(&image.version);
                    entry.suites = found.suites.clone();
                },
                progress,
            )
        })?;
        if let Select::Suite(_) = spec.select {
            self.mark_suite(spec, &key)?;
        }
        self.open_entry(&key, spec.to_string())
    }

    /// Unpacks a `.deb`, with the parts of the same kernel that lie beside it.
    fn import_deb(
        &self,
        spec: &KernelSpec,
        path: &Path,
        progress: &dyn Progress,
    ) -> Result<Kernel, KernelError> {
        let path = std::path::absolute(path).map_err(|e| KernelError::io("find", path, e))?;
        if !path.exists() {
            return Err(KernelError::NoSuchPath { path });
        }
        let control = deb::control(&path)?;
        let debs = entry::with_siblings(&path, &control)?;
        let mut key = ContentKey::new("deb-1");
        for deb in &debs {
            key = key.file("deb", deb).map_err(|e| KernelError::io("read the package", deb, e))?;
        }
        let key = format!("deb-{}", &key.finish()[..32]);
        self.build_entry(&key, progress, |dir| {
            entry::unpack(dir, &debs, deb::unpack, progress)?;
            if local::images_in(dir).is_empty() {
                return Err(KernelError::NoKernelInDeb { path: path.clone() });
            }
            entry::finish(
                dir,
                &path.display().to_string(),
                |entry| {
                    entry.package.clone_from(&control.package);
                    entry.version.clone_from(&control.version);
                },
                progress,
            )
        })?;
        self.open_entry(&key, spec.to_string())
    }

    fn build_entry(
        &self,
        key: &str,
        progress: &dyn Progress,
        build: impl FnOnce(&Path) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let on_wait = waiting(progress, "fetching the same kernel");
        self.cache.get_or_build_noting(KERNELS, key, entry::verify, build, on_wait)?;
        Ok(())
    }

    /// The kernel of an entry that was verified.
    fn open_entry(&self, key: &str, spec: String) -> Result<Kernel, KernelError> {
        let dir = self.cache.root().join(KERNELS).join(key);
        let leases = Leases::default();
        // One that was removed since it was verified is noticed when it is read.
        if let Some(lease) = self.cache.lease(KERNELS, key)? {
            leases.add(lease);
        }
        let entry = Entry::read(&dir)?;
        let existing = |path: PathBuf| path.exists().then_some(path);
        let parts = local::Parts {
            image: dir.join(&entry.image),
            config: existing(dir.join("boot").join(format!("config-{}", entry.release))),
            modules: existing(dir.join("lib/modules").join(&entry.release)),
            no_modules: None,
            release: Some(entry.release),
            origin: Origin::Package {
                entry: key.to_owned(),
                package: entry.package,
                version: entry.version,
                suites: entry.suites,
            },
            leases,
        };
        local::assemble(&self.cache, spec, parts)
    }
}

/// By version of the kernel; where that is the same, the flavour that has the most in it comes last, as the
/// one to prefer.
fn order(a: &StoredKernel, b: &StoredKernel) -> Ordering {
    let without_cloud = |kernel: &StoredKernel| kernel.release.replace("-cloud-", "-");
    let (plain_a, plain_b) = (without_cloud(a), without_cloud(b));
    version::compare(&plain_a, &plain_b)
        .then_with(|| (a.release == plain_a).cmp(&(b.release == plain_b)))
        .then_with(|| a.key.cmp(&b.key))
}

fn same_kind(kernel: &StoredKernel, spec: &DistroSpec) -> bool {
    kernel.distro == Some(spec.distro)
        && kernel.arch == spec.arch()
        && kernel.flavour == spec.flavour
}

/// Whether a stored kernel has the version that a spec asks for.
fn fits(kernel: &StoredKernel, spec: &DistroSpec) -> bool {
    match &spec.select {
        Select::Version(prefix) => {
            same_kind(kernel, spec) && apt::version_fits(&kernel.release, &kernel.version, prefix)
        }
        Select::Suite(_) => false,
    }
}

fn is_deb(path: &Path) -> bool {
    path.extension().is_some_and(|ext| ext == "deb") && !path.is_dir()
}

fn running_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;
