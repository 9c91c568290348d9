//! The thread that starts and ends devices, as guests ask for.
//!
//! A processor's thread has given up all rights but those that running a guest takes, and so would the threads that
//! it starts. Devices' threads need other rights, so this one starts them.

use std::io;
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
        let work = move || todo.iter().for_each(|job| job());
        let thread = thread::Builder::new().name("devices".into()).spawn(work)?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Has something done there, and waits until it is.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        let (done, wait) = sync_channel::<()>(1);
        let job = Box::new(move || {
            job();
            drop(done);
        });
        if self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok()) {
            // It ends with an error, since nothing is sent: the other end is gone when the job is done.
            let _ = wait.recv();
        }
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
