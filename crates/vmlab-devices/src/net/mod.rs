//! Ethernet: the interface of a guest, and what is behind it: other guests by a learning switch in this process, or
//! what the host can reach, by the program passt.
//!
//! ```text
//! Net (virtio-net) ── Datagrams ── a Switch's port
//! Net (virtio-net) ── Stream ── passt
//! ```
//!
//! The switch:
//!
//! ```text
//! device of a VM ── datagram socket ── Port ┐
//! device of a VM ── datagram socket ── Port ┼── Switch: one thread
//! device of a VM ── datagram socket ── Port ┘
//! ```
//!
//! The switch knows no hypervisor. One datagram is one frame, from the destination's address to the end of the
//! payload, without preamble and check sequence: what QEMU's `-netdev dgram` and `-netdev socket` send. The host
//! has no interface on it, so nothing of the host can be reached, and no rights are needed.

mod backend;
mod device;
mod frame;
mod passt;
mod switch;
mod table;

pub use backend::{Backend, Datagrams, Received, Sent, Stream};
pub use device::{Net, Traffic};
pub use frame::{MAX_FRAME, MIN_FRAME, MacAddress};
pub use passt::{Passt, StartError};
pub use switch::{Counters, MAX_QUEUED, Port, Switch};
pub use table::MAX_LEARNED;
