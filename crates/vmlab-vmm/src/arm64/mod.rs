//! What an arm64 guest is told of its machine, and where its kernel goes.
//!
//! None of this asks KVM for anything, so it is compiled and tested on every architecture; only the numbers that
//! kvm-bindings has for arm64 alone (`gic::attributes`) are compiled there alone.

pub mod fdt;
pub mod gic;
pub mod image;
pub mod layout;
