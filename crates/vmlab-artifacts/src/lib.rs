//! What a VM boots from: kernels, their modules, initramfs images, and the caches they live in.

mod arch;

pub use arch::Arch;
