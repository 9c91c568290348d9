//! The thread that starts and ends devices, as guests ask for.
//!
//! A processor's thread has given up all rights but those that running a guest takes, and so would the threads that
//! it starts. Devices' threads need other rights, so this one starts them.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread::{self, JoinHandle};

type Job = Box<dyn FnOnce() + Send>;

/// The thread.
#[derive(Debug)]
pub(super) struct Control {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    pub(super) fn new() -> io::Result<Self> {
        let (jobs, todo) = channel::<Job>();
        let work = move || {
            for job in todo {
                // Whoever waits for it is told.
                let _ = catch_unwind(AssertUnwindSafe(job));
            }
        };
        let thread = thread::Builder::new().name("devices".into()).spawn(work)?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Has something done there, and waits until it is. False when it panicked.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let (done, wait) = sync_channel::<()>(1);
        let job = Box::new(move || {
            job();
            // Nobody but the one below waits for it.
            let _ = done.send(());
        });
        self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok()) && wait.recv().is_ok()
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_and_ends_nothing() {
        let control = Control::new().unwrap();
        assert!(control.run(|| ()));
        assert!(!control.run(|| panic!("as a device might")));
        assert!(control.run(|| ()));
    }
}
