//! VMs run by KVM inside this process, and the proof that KVM can run them ([`probe`]).
//!
//! The monitor knows no kernels' packages, images or agents: it is given a kernel, memory and virtio devices.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges of memory are meant")]
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

pub mod arm64;
mod error;
#[cfg(target_arch = "x86_64")]
mod event;
mod format;
mod gate;
mod kick;
#[cfg(target_arch = "x86_64")]
mod long_mode;
pub mod memory;
pub mod probe;
pub mod topology;
pub mod working_set;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;

pub use error::Error;
pub use gate::End;
