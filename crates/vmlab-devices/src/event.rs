//! Eventfds: what threads wake each other by, and KVM guests and devices.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use crate::device::Interrupt;

/// A descriptor that is readable once it was signalled, until it is cleared.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// One that is not readable yet.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Makes it readable, or has KVM do what it is for.
    pub fn signal(&self) {
        // It fails only where 2^64 signals are pending, and then it is readable.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes it not readable, until the next signal.
    pub fn clear(&self) {
        // It fails where there was none.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    /// Another descriptor of it.
    ///
    /// # Errors
    /// There are no more.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}

impl Interrupt for Event {
    fn signal(&self) {
        Self::signal(self);
    }
}

/// An eventfd that somebody else has made.
impl From<OwnedFd> for Event {
    fn from(eventfd: OwnedFd) -> Self {
        Self(eventfd)
    }
}

impl From<Event> for OwnedFd {
    fn from(event: Event) -> Self {
        event.0
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
