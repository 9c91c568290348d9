//! Descriptors that carry a number: what interrupts guests and wakes threads.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
#[cfg(target_arch = "x86_64")]
use vmm_sys_util::eventfd::EventFd;

/// An eventfd.
#[derive(Debug)]
pub(crate) struct Event(OwnedFd);

impl Event {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Makes it readable, or has KVM do what it is for.
    pub(crate) fn signal(&self) {
        // It cannot fail: the counter is far from its end.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes it not readable, until the next signal.
    pub(crate) fn clear(&self) {
        let mut count = [0; 8];
        // There may have been none.
        let _ = rustix::io::read(&self.0, &mut count);
    }

    /// Another descriptor for it.
    pub(crate) fn again(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An eventfd as KVM's interface wants it: a descriptor of its own.
#[cfg(target_arch = "x86_64")]
pub(crate) fn for_kvm(fd: BorrowedFd<'_>) -> io::Result<EventFd> {
    use std::os::fd::{FromRawFd, IntoRawFd};
    let fd = fd.try_clone_to_owned()?.into_raw_fd();
    // SAFETY: the descriptor was made just now and belongs to nobody else.
    Ok(unsafe { EventFd::from_raw_fd(fd) })
}
