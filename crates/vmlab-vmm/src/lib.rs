//! VMs run by KVM inside this process, and the proof that KVM can run them ([`probe`]).
//!
//! The monitor knows no kernels' packages, images or agents: it is given a kernel, memory and virtio devices.

pub mod arm64;
pub mod probe;
pub mod topology;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;
