//! What a thread waits for that another one says.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFlags, eventfd};

use crate::workers::wait_for;

/// Open or closed. Whoever changes it holds a lock that all who change it hold.
pub(super) struct Gate {
    open: AtomicBool,
    /// Readable as long as it is open.
    event: OwnedFd,
}

impl Gate {
    /// A closed one.
    pub(super) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { open: AtomicBool::new(false), event })
    }

    pub(super) fn set(&self, open: bool) {
        if self.open.swap(open, Ordering::AcqRel) == open {
            return;
        }
        // Neither fails: the counter goes from 0 to 1 and back.
        let _ = if open {
            rustix::io::write(&self.event, &1u64.to_ne_bytes())
        } else {
            rustix::io::read(&self.event, &mut [0; 8])
        };
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Waits until it is open. Returns whether it was: not if the queue of the thread is stopped before.
    pub(super) fn wait(&self) -> bool {
        self.is_open() || wait_for(self.event.as_fd(), PollFlags::IN)
    }
}
