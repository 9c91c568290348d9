//! What carries a device's frames on the host's side.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, send, sendmsg};

use super::frame::MAX_FRAME;
use crate::queue::lock;

/// What came for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// A frame of so many bytes. It is cut off where the buffer ends.
    Frame(usize),
    /// Nothing, as long as the socket is not readable.
    Nothing,
    /// The other end is gone.
    Gone,
}

/// What became of a frame of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Whole,
    /// It was lost.
    Lost,
    /// The rest of it is kept, and goes with [`Backend::flush`] once the socket is writable.
    Partly,
}

/// The host's side of a network interface. One thread receives and one sends, at once; neither call waits.
pub trait Backend: Send + Sync {
    /// What to wait with for frames, and for room.
    fn socket(&self) -> BorrowedFd<'_>;

    /// Takes the next frame.
    fn receive(&self, buffer: &mut [u8]) -> Received;

    /// Sends a frame of [`MIN_FRAME`](super::MIN_FRAME) to [`MAX_FRAME`] bytes. Nothing must be kept of the one before.
    fn send(&self, frame: &[u8]) -> Sent;

    /// Sends what was kept of a frame. It says [`Sent::Whole`] where nothing was.
    fn flush(&self) -> Sent {
        Sent::Whole
    }
}

/// A datagram socket, one frame a datagram: a port of a [`Switch`](super::Switch). What it has no room for is lost, as
/// on a wire.
#[derive(Debug)]
pub struct Datagrams(OwnedFd);

impl Datagrams {
    /// A connected socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }
}

impl Backend for Datagrams {
    fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn receive(&self, buffer: &mut [u8]) -> Received {
        match take(&self.0, buffer) {
            Ok(length) => Received::Frame(length),
            Err(Errno::AGAIN) => Received::Nothing,
            Err(_) => Received::Gone,
        }
    }

    fn send(&self, frame: &[u8]) -> Sent {
        loop {
            return match send(&self.0, frame, SEND) {
                Ok(_) => Sent::Whole,
                Err(Errno::INTR) => continue,
                Err(_) => Sent::Lost,
            };
        }
    }
}

/// A stream socket on which each frame follows its length, a big-endian number of 32 bits: what passt and QEMU's
/// `-netdev stream` speak.
#[derive(Debug)]
pub struct Stream {
    socket: OwnedFd,
    incoming: Mutex<Incoming>,
    /// What is left of a frame of the guest: without it, the other end would take the next one for its rest.
    kept: Mutex<Vec<u8>>,
}

/// Before each frame.
const LENGTH: usize = size_of::<u32>();

/// Bytes that came, of which those from `begin` to `end` are not used yet.
#[derive(Debug)]
struct Incoming {
    /// Room for the longest frame at least: then one that is not whole leaves room for more of it.
    bytes: Box<[u8]>,
    begin: usize,
    end: usize,
}

impl Stream {
    /// A connected socket.
    pub fn new(socket: OwnedFd) -> Self {
        let bytes = vec![0; LENGTH + MAX_FRAME].into();
        let incoming = Mutex::new(Incoming { bytes, begin: 0, end: 0 });
        Self { socket, incoming, kept: Mutex::default() }
    }
}

impl Backend for Stream {
    fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn receive(&self, buffer: &mut [u8]) -> Received {
        let mut incoming = lock(&self.incoming);
        loop {
            match incoming.next(buffer) {
                Ok(Some(length)) => return Received::Frame(length),
                Ok(None) => {}
                Err(TooLong) => return Received::Gone,
            }
            match incoming.fill(&self.socket) {
                Ok(0) => return Received::Gone,
                Ok(_) => {}
                Err(Errno::AGAIN) => return Received::Nothing,
                Err(_) => return Received::Gone,
            }
        }
    }

    fn send(&self, frame: &[u8]) -> Sent {
        let length = (frame.len() as u32).to_be_bytes();
        match write(&self.socket, &[IoSlice::new(&length), IoSlice::new(frame)]) {
            Ok(sent) if sent == LENGTH + frame.len() => Sent::Whole,
            Ok(sent) => {
                let mut kept = lock(&self.kept);
                kept.clear();
                kept.extend_from_slice(length.get(sent..).unwrap_or_default());
                kept.extend_from_slice(&frame[sent.saturating_sub(LENGTH)..]);
                Sent::Partly
            }
            Err(_) => Sent::Lost,
        }
    }

    fn flush(&self) -> Sent {
        let mut kept = lock(&self.kept);
        while !kept.is_empty() {
            match write(&self.socket, &[IoSlice::new(&kept)]) {
                Ok(0) => return Sent::Partly,
                Ok(sent) => drop(kept.drain(..sent)),
                Err(_) => {
                    kept.clear();
                    return Sent::Lost;
                }
            }
        }
        Sent::Whole
    }
}

/// A frame's length is beyond all frames: nobody knows where the next one begins.
struct TooLong;

impl Incoming {
    /// Takes a whole frame, if there is one.
    fn next(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, TooLong> {
        loop {
            let there = &self.bytes[self.begin..self.end];
            let Some((length, rest)) = there.split_first_chunk() else { return Ok(None) };
            let length = u32::from_be_bytes(*length) as usize;
            if length > MAX_FRAME {
                return Err(TooLong);
            }
            let Some(frame) = rest.get(..length) else { return Ok(None) };
            let taken = length.min(buffer.len());
            buffer[..taken].copy_from_slice(&frame[..taken]);
            self.begin += LENGTH + length;
            if length > 0 {
                return Ok(Some(taken));
            }
        }
    }

    /// Reads more, when there is no whole frame. Returns how much; nothing is the end.
    fn fill(&mut self, socket: &OwnedFd) -> Result<usize, Errno> {
        self.bytes.copy_within(self.begin..self.end, 0);
        (self.begin, self.end) = (0, self.end - self.begin);
        let count = take(socket, &mut self.bytes[self.end..])?;
        self.end += count;
        Ok(count)
    }
}

/// A guest must not end this process by a signal.
const SEND: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);

/// Reads what is there.
fn take(socket: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    loop {
        match recv(socket, &mut *buffer, RecvFlags::DONTWAIT) {
            Err(Errno::INTR) => {}
            result => return result.map(|(length, _)| length),
        }
    }
}

/// Writes as much as there is room for.
fn write(socket: &OwnedFd, parts: &[IoSlice<'_>]) -> Result<usize, Errno> {
    loop {
        match sendmsg(socket, parts, &mut SendAncillaryBuffer::default(), SEND) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(0),
            result => return result,
        }
    }
}
