//! What a VM boots from: kernels, their modules, initramfs images, and the caches they live in.

mod arch;
pub mod boot_image;
pub mod compress;
pub mod initramfs;
pub mod kconfig;
pub mod modules;

pub use arch::Arch;
