//! Runs anything in a fresh virtual machine, under any Linux kernel.
//!
//! ```no_run
//! use vmlab::Vm;
//!
//! let vm = Vm::builder().kernel("debian:6.12").start()?;
//! let output = vm.exec(["uname", "-r"])?;
//! assert!(output.status.success());
//! println!("{}", output.stdout_text());
//! vm.shutdown()?;
//! # Ok::<(), vmlab::Error>(())
//! ```
//!
//! The guest has the host's own root, with a writable layer in its memory over it, the working
//! directory of the caller, writable, and the caller's environment. Commands run as root unless told
//! otherwise. No root is needed on the host, no KVM, and nothing is left behind.

mod accel;
mod boot;
pub mod budget;
mod builder;
pub mod cache;
pub mod config;
mod debug_info;
pub mod disk;
pub mod doctor;
mod error;
pub mod events;
mod group;
pub mod guest;
pub mod hypervisor;
mod identity;
mod image;
pub mod kept;
pub mod lan;
pub mod module;
pub mod prelude;
mod prepared;
mod random;
pub mod report;
pub mod results;
mod rootfs;
pub mod runner;
mod runs;
mod sandbox;
mod share;
pub mod snapshot;
mod start;
mod sync;
pub mod targets;
pub mod testing;
pub mod timings;
mod tsc;
pub mod units;
mod vm;
pub mod vsock;
mod ways_in;

pub use accel::AccelChoice;
pub use builder::{BOOT_TIME, IMAGE_BOOT_TIME, RootMode, VmBuilder};
pub use debug_info::DebugInfo;
pub use disk::Disk;
pub use error::{EmulatorFault, Error, ErrorClass, Evidence, FailedStart};
pub use group::Group;
pub use guest::{
    Child, Command, Environment, ExitStatus, GuestUser, KernelLog, LogLevel, Output, Stdio,
};
pub use image::Image;
pub use lan::{Lan, LanError};
pub use module::ModuleSpec;
pub use prepared::PreparedVm;
pub use runs::RunDir;
pub use share::{Share, ShareVia};
pub use snapshot::SnapshotMode;
pub use vm::{Vm, VmSnapshot};
pub use vmlab_artifacts as artifacts;
pub use vmlab_devices::blk;
pub use vmlab_macros::test;
