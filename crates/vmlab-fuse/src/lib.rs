//! A FUSE server that knows nothing of how requests reach it, and a filesystem for it that passes a host
//! directory through.
//!
//! ```text
//! transport (virtio, a test, a fuzzer)
//!     RequestBytes, ReplyBytes
//! Server         validates the request, calls the filesystem, writes the reply
//!     FileSystem
//! Passthrough    a host directory; nothing outside of it can be reached
//! ```
//!
//! Requests come from a guest's kernel, which the guest's root controls: nothing in them is believed.

pub mod abi;
mod directory;
mod filesystem;
mod passthrough;
mod request;
pub mod sandbox;
mod server;
#[cfg(any(test, feature = "test-transport"))]
pub mod testing;
mod types;

pub use directory::DirSink;
pub use filesystem::{
    Attributes, Changes, Creation, DataIn, DataOut, Entry, FileSystem, Opened, Result, SetTime,
    WriteAt, XattrReply,
};
pub use passthrough::{CachePolicy, MAX_HANDLES, MAX_INODES, Passthrough, PassthroughConfig};
pub use request::{ReplyBytes, RequestBytes};
pub use sandbox::{Landlock, Restrictions};
pub use server::{MAX_ARGUMENTS, MAX_PAGES, MAX_WRITE, Server};
pub use types::{Caller, Handle, MAX_NAME, Name, NodeId};
