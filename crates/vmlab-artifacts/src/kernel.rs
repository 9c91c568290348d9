//! A kernel that was found: boot image, release, configuration and module tree as one thing.

use std::path::PathBuf;

use serde::Serialize;

use crate::cache::Leases;
use crate::features::{Features, ModuleNames};
use crate::kconfig::KernelConfig;
use crate::{Arch, KernelError};

/// A resolved kernel. All paths are absolute, and the files at them were checked.
#[derive(Debug, Clone, Serialize)]
pub struct Kernel {
    /// The spec that it was resolved from.
    pub spec: String,
    /// What `uname -r` will print; empty for an image that does not say.
    pub release: String,
    /// The architecture of the boot image, by its content.
    pub arch: Arch,
    /// The version string in the image: release, builder, build number and date.
    pub version_string: Option<String>,
    /// The bzImage, vmlinux or Image.
    pub boot_image: PathBuf,
    /// The configuration that it was built with.
    #[serde(skip)]
    pub config: Option<KernelConfig>,
    /// Where the configuration was found.
    pub config_source: Option<ConfigSource>,
    /// The module tree, `.../lib/modules/RELEASE`; it has a `modules.dep`.
    pub modules: Option<PathBuf>,
    /// Why there is no module tree, where there could be one: what is to be done about it.
    pub no_modules: Option<String>,
    /// Where the kernel came from.
    pub origin: Origin,
    /// What of it is in the cache, and must not be deleted while it is used.
    #[serde(skip)]
    pub leases: Leases,
}

/// Where a kernel's configuration was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ConfigSource {
    /// A file: of /boot, of a package, or of a build tree.
    File(PathBuf),
    /// In the boot image itself (CONFIG_IKCONFIG).
    BootImage,
}

/// Where a kernel came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Origin {
    /// A plain file.
    File {
        /// The file.
        path: PathBuf,
    },
    /// Installed on this host.
    Installed,
    /// A kernel build tree.
    BuildTree {
        /// Its top directory.
        path: PathBuf,
    },
    /// An unpacked package.
    Unpacked {
        /// Its top directory.
        path: PathBuf,
    },
    /// A package in the store.
    Package {
        /// The key of the store entry.
        entry: String,
        /// The package, `linux-image-6.12.117+deb12-amd64`.
        package: String,
        /// The package's version, `6.12.117-1~deb12u1`.
        version: String,
        /// The suites in which it was found; none for a `.deb` that was given by its path.
        suites: Vec<String>,
    },
}

impl Kernel {
    /// What this kernel has built in, as a module, or not at all.
    ///
    /// # Errors
    /// [`KernelError::Io`] when the lists of the module tree cannot be read.
    pub fn features(&self) -> Result<Features, KernelError> {
        Ok(Features::of(self.config.as_ref(), self.module_names()?.as_ref()))
    }

    /// The names of its modules; none when there is no module tree.
    ///
    /// # Errors
    /// [`KernelError::Io`] when the lists of the module tree cannot be read.
    pub fn module_names(&self) -> Result<Option<ModuleNames>, KernelError> {
        let Some(tree) = &self.modules else { return Ok(None) };
        let names = ModuleNames::read(tree);
        names.map(Some).map_err(|e| KernelError::io("read the module lists of", tree, e))
    }
}
