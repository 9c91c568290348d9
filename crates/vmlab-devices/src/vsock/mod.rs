//! virtio-vsock: streams between a guest and programs of the host, which have Unix sockets instead.
//!
//! ```text
//! guest: connect(CID 2, port P) ── Vsock ── connects to the socket BASE_P, where a program of the host listens
//! guest: listen(port P) ────────── Vsock ── listens on the socket BASE: a program connects, writes "CONNECT P\n",
//!                                           reads "OK PORT\n" with the port that it got, and talks to the guest
//! ```
//!
//! The sockets are in a directory of one VM, so a guest reaches no socket of another one, and whoever may use the
//! directory may talk to the guest. That is how Firecracker does it, and programs for it work here.
//!
//! Connections are not in snapshots: a guest that goes on from one is told that all of them are over.

mod connection;
mod device;
mod muxer;
mod packet;

pub use connection::MAX_BUFFERED;
pub use device::{Kept, OpenError, Vsock};
pub use muxer::MAX_CONNECTIONS;
pub use packet::MAX_PAYLOAD;
