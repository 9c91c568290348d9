//! The store of kernels, and the one way from a spec to a kernel.

use crate::{Cache, Kernel, KernelError, KernelSpec, Progress};

/// Finds kernels, and keeps those that were fetched.
#[derive(Debug, Clone)]
pub struct KernelStore {
    cache: Cache,
}

impl KernelStore {
    /// A store in this cache.
    pub fn open(cache: Cache) -> KernelStore {
        KernelStore { cache }
    }

    /// The kernel for a spec; fetches it where the store has none.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn resolve(
        &self,
        spec: &KernelSpec,
        progress: &dyn Progress,
    ) -> Result<Kernel, KernelError> {
        let _ = (spec, progress, &self.cache);
        unimplemented!()
    }

    /// The kernel for a run without `-k`.
    ///
    /// The running release if its files can be read, else the newest of the store, else the
    /// distribution's newest, which is fetched; a note says which.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn resolve_default(&self, progress: &dyn Progress) -> Result<Kernel, KernelError> {
        let _ = progress;
        unimplemented!()
    }

    /// The kernel for a spec, without network: only what is on this host or in the store.
    ///
    /// # Errors
    /// [`KernelError::NotInStore`], and as [`resolve`](KernelStore::resolve).
    pub fn inspect(&self, spec: &KernelSpec) -> Result<Kernel, KernelError> {
        let _ = spec;
        unimplemented!()
    }

    /// Asks the distribution anew and fetches the newest kernel that fits.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn pull(&self, spec: &KernelSpec, progress: &dyn Progress) -> Result<Kernel, KernelError> {
        let _ = (spec, progress);
        unimplemented!()
    }

    /// The kernels of the store, newest last.
    ///
    /// # Errors
    /// [`KernelError::Cache`] when the store cannot be read.
    pub fn list(&self) -> Result<Vec<StoredKernel>, KernelError> {
        unimplemented!()
    }

    /// Removes a kernel, named by its key, package, release or spec; gives back its key.
    ///
    /// # Errors
    /// [`KernelError::NoEntry`] and [`KernelError::SeveralEntries`].
    pub fn remove(&self, name: &str) -> Result<String, KernelError> {
        let _ = name;
        unimplemented!()
    }
}

/// What the store knows of one of its kernels without opening it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct StoredKernel {
    /// The key of the store entry.
    pub key: String,
    /// What `uname -r` prints.
    pub release: String,
    /// Debian's or Ubuntu's, where that is known.
    pub distro: Option<crate::Distro>,
    /// `cloud`, `rt`; none for the generic one.
    pub flavour: Option<String>,
    /// The architecture.
    pub arch: crate::Arch,
    /// The package that it came in.
    pub package: String,
    /// The package's version.
    pub version: String,
    /// The suites in which it was found.
    pub suites: Vec<String>,
    /// Bytes on disk.
    pub bytes: u64,
    /// Whether the entry is whole.
    pub valid: bool,
}
