//! The protocol between vmlab on the host and its agent in the guest.
//!
//! It runs over any reliable, ordered byte channel: a virtio-serial port, a serial line, vsock. Each
//! side first sends a [`Preamble`], the guest before the host, because a serial line echoes what comes
//! before the agent has opened it; then both send frames. A frame belongs to a stream: stream 0
//! carries [messages](message), every other stream carries the bytes of one standard stream of one
//! process, under [credit](flow): a sender sends no more than the receiver has said it has room for,
//! so neither side ever buffers without bound and one stalled stream does not hold up the others.
//!
//! The crate does no I/O and starts no thread. It knows bytes and state; the two ends do the rest.

pub mod flow;
pub mod frame;
pub mod message;
pub mod observation;
mod preamble;
pub mod tree;

pub use flow::{FlowError, ReceiveWindow, STREAM_WINDOW, SendWindow};
pub use frame::{Decoder, Frame, FrameError, FrameHeader, FrameKind, StreamId};
pub use message::{GuestMessage, HostMessage, MessageError, ProcessId};
pub use preamble::{PROTOCOL_VERSION, Preamble, PreambleError};
