//! virtio-blk: a disk for the guest (virtio 1.2, 5.2).
//!
//! The front end ([`Blk`]) knows the device, a [`Backend`] what becomes of its sectors. Back ends stack: a file, in
//! front of it what records, breaks or slows down what the guest does.
//!
//! There are no writes that are durable on their own (FUA) in virtio-blk: a guest that wants one writes and
//! flushes.

pub mod backend;
mod config;
pub mod crash;
mod device;
mod options;
mod request;

use std::fs::File;
use std::io;

pub use backend::{Backend, Buffers, FaultRule, Limit, Sectors, Throttle};
pub use config::{BlockSize, QUEUE_SIZE, SECTOR};
pub use device::{Blk, MAX_QUEUES, OpenError, Source};
pub use options::{Options, ParseError};

/// Locks a disk's file as a VM does that writes to it, for as long as this description of it is open. Returns whether no
/// other VM uses it.
///
/// # Errors
/// The system call's.
pub fn lock_to_write(file: &File) -> io::Result<bool> {
    backend::lock(file, true)
}
