//! Virtio devices that know neither a hypervisor nor how they are attached to one.
//!
//! ```text
//! transport (vhost-user; mmio)               rings, memory, interrupts, worker threads
//!     VirtQueue, Chain
//! Device (blk, console, fs, net, rng, vsock) requests of a guest
//! ```
//!
//! Beside that, [`net`] has what carries frames from one guest to others.
//!
//! A transport makes a [`VirtQueue`] of each ring and lets [`Workers`] call the device for it. Everything
//! that a guest writes is checked on the way: a device sees whole, valid chains only.

pub mod blk;
mod chain;
pub mod console;
mod device;
mod event;
pub mod fs;
pub mod net;
mod queue;
pub mod rng;
pub mod sandbox;
pub mod sparse;
mod transfer;
pub mod transport;
pub mod vsock;
mod workers;

pub use chain::{Chain, ChainError, MAX_GATHERED};
pub use device::{Device, DeviceStateError, Interrupt, QueueKind, offered_features};
pub use event::Event;
pub use queue::{Guest, QueueError, Turn, VirtQueue};
pub use workers::{Fault, OnFault, Workers, bear_file_limits};
