//! The byte channel to the host: preambles, frames in, frames out.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use vmlab_wire::frame::MAX_DATA;
use vmlab_wire::{
    Decoder, Frame, FrameHeader, FrameKind, GuestMessage, Preamble, StreamId, message,
};

/// Bytes read from the channel at once. A virtio port gives a page at most, a socket more.
const READ_SIZE: usize = 64 * 1024;

/// No more output is collected while as many bytes wait to be written.
const OUTBOX_LIMIT: usize = 512 * 1024;

/// Why the channel cannot be used any further.
#[derive(Debug)]
pub(crate) enum ChannelError {
    /// The host has gone.
    HungUp,
    /// The host sent something that makes no sense, or the device failed.
    Broken(String),
}

/// What a read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// Something.
    Bytes,
    /// Nothing for now.
    Nothing,
}

/// Bytes and frames from the host.
pub(crate) struct Inbox {
    preamble: Vec<u8>,
    decoder: Decoder,
    buffer: Box<[u8]>,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            preamble: Vec::with_capacity(Preamble::LEN),
            decoder: Decoder::new(),
            buffer: vec![0; READ_SIZE].into_boxed_slice(),
        }
    }

    /// Reads once from the channel.
    pub(crate) fn receive(&mut self, fd: &OwnedFd) -> Result<Received, ChannelError> {
        let missing = Preamble::LEN - self.preamble.len();
        let greeted = missing == 0;
        let want = if greeted { READ_SIZE } else { missing };
        match rustix::io::read(fd, &mut self.buffer[..want]) {
            // A virtio port reads as empty until the host has opened its end.
            Ok(0) if !greeted && self.preamble.is_empty() => Ok(Received::Nothing),
            Ok(0) => Err(ChannelError::HungUp),
            Ok(count) if greeted => {
                self.decoder.push(&self.buffer[..count]);
                Ok(Received::Bytes)
            }
            Ok(count) => {
                self.preamble.extend_from_slice(&self.buffer[..count]);
                if let Ok(bytes) = <[u8; Preamble::LEN]>::try_from(self.preamble.as_slice()) {
                    Preamble::check(bytes).map_err(|e| ChannelError::Broken(e.to_string()))?;
                }
                Ok(Received::Bytes)
            }
            Err(Errno::AGAIN) => Ok(Received::Nothing),
            Err(Errno::INTR) => Ok(Received::Bytes),
            Err(Errno::CONNRESET | Errno::PIPE | Errno::NODEV) => Err(ChannelError::HungUp),
            Err(e) => Err(ChannelError::Broken(format!("reading from the channel: {e}"))),
        }
    }

    /// The next whole frame.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Frame<'_>>, ChannelError> {
        self.decoder.next_frame().map_err(|e| ChannelError::Broken(e.to_string()))
    }
}

/// Bytes for the host that the channel has not taken yet.
pub(crate) struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
}

impl Outbox {
    /// An outbox that begins with the preamble.
    pub(crate) fn new() -> Self {
        Self { bytes: Preamble::OURS.encode().to_vec(), sent: 0 }
    }

    /// Whether more output may be collected.
    pub(crate) fn has_room(&self) -> bool {
        self.bytes.len() - self.sent < OUTBOX_LIMIT
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// Adds a message.
    pub(crate) fn message(&mut self, message: &GuestMessage) {
        // The agent's own messages are far below the limit, or are cut by whoever makes them.
        if let Err(e) = message::encode(message, &mut self.bytes) {
            crate::kmsg::error(&format!("a message could not be sent: {e}"));
        }
    }

    /// Adds a frame without payload.
    pub(crate) fn empty(&mut self, stream: StreamId, kind: FrameKind) {
        vmlab_wire::frame::put_empty(&mut self.bytes, stream, kind);
    }

    /// Grants credit to a stream.
    pub(crate) fn credit(&mut self, stream: StreamId, bytes: u32) {
        vmlab_wire::frame::put_credit(&mut self.bytes, stream, bytes);
    }

    /// Reads at most `limit` bytes from `fd` into a data frame of its own. Without a byte there is no
    /// frame.
    pub(crate) fn data_from(
        &mut self,
        stream: StreamId,
        fd: &OwnedFd,
        limit: usize,
    ) -> Result<usize, Errno> {
        let limit = limit.min(MAX_DATA);
        self.compact();
        let start = self.bytes.len();
        self.bytes.reserve(FrameHeader::LEN + limit);
        self.bytes.extend_from_slice(&[0; FrameHeader::LEN]);
        let room = &mut self.bytes.spare_capacity_mut()[..limit];
        let count = match rustix::io::read(fd, room) {
            Ok((filled, _)) => filled.len(),
            Err(e) => {
                self.bytes.truncate(start);
                return Err(e);
            }
        };
        if count == 0 {
            self.bytes.truncate(start);
            return Ok(0);
        }
        let header = FrameHeader { stream, kind: FrameKind::Data, len: count as u32 };
        self.bytes[start..].copy_from_slice(&header.encode());
        // SAFETY: the read initialised `count` bytes right behind the header, within the capacity.
        unsafe { self.bytes.set_len(start + FrameHeader::LEN + count) };
        Ok(count)
    }

    /// Writes until everything is gone (true) or the channel takes no more (false).
    pub(crate) fn flush(&mut self, fd: &OwnedFd) -> Result<bool, ChannelError> {
        while self.sent < self.bytes.len() {
            match rustix::io::write(fd, &self.bytes[self.sent..]) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(false),
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NODEV) => {
                    return Err(ChannelError::HungUp);
                }
                Err(e) => {
                    return Err(ChannelError::Broken(format!("writing to the channel: {e}")));
                }
            }
        }
        self.bytes.clear();
        self.sent = 0;
        Ok(true)
    }

    fn compact(&mut self) {
        if self.sent > 0 {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}
