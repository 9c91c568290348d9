//! Runs anything in a fresh virtual machine, under any Linux kernel.

pub mod config;
mod host;
pub mod hypervisor;
pub mod units;
