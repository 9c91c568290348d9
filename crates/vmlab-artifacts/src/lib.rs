//! What a VM boots from: kernels, their modules, initramfs images, and the caches they live in.

mod arch;
pub mod base64;
pub mod boot_image;
pub mod cache;
mod child;
pub mod compress;
mod error;
pub mod features;
pub mod firmware;
mod host;
pub mod image;
pub mod image_build;
pub mod initramfs;
pub mod kconfig;
mod kernel;
mod kinds;
pub mod module_build;
pub mod modules;
mod progress;
pub mod seed;
mod source;
pub mod spec;
mod store;
#[cfg(test)]
mod test_support;
mod version;

pub use arch::Arch;
pub use cache::{Cache, CacheEntry, CacheError, ContentKey, Digest, Manifest};
pub use child::dies_with_us;
pub use error::KernelError;
pub use features::{Availability, Feature, Features};
pub use host::{SYSTEM_DIRS, find_program};
pub use image::{DiskImage, ImageError, ImageFormat};
pub use kernel::{ConfigSource, Kernel, Origin};
pub use kinds::{Bound, KINDS, Kind};
pub use progress::{Progress, Silent};
pub use spec::{Distro, DistroSpec, KernelSpec, Select, SpecError, nearest};
pub use store::{BuildTree, KernelStore, StoredKernel};
