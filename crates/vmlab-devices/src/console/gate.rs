//! What a thread waits for that another one says.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::PollFlags;

use crate::event::Event;
use crate::workers::wait_for;

/// Open or closed. Whoever changes it holds a lock that all who change it hold.
pub(super) struct Gate {
    open: AtomicBool,
    /// Readable as long as it is open.
    event: Event,
}

impl Gate {
    /// A closed one.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { open: AtomicBool::new(false), event: Event::new()? })
    }

    pub(super) fn set(&self, open: bool) {
        if self.open.swap(open, Ordering::AcqRel) == open {
            return;
        }
        if open {
            self.event.signal();
        } else {
            self.event.clear();
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Waits until it is open. Returns whether it was: not if the queue of the thread is stopped before.
    pub(super) fn wait(&self) -> bool {
        self.is_open() || wait_for(self.event.as_fd(), PollFlags::IN)
    }
}
