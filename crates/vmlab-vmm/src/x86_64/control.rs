//! The thread that starts and ends devices, as guests ask for.
//!
//! A processor's thread has given up all rights but those that running a guest takes, and so would the threads that
//! it starts. Devices' threads need other rights, so this one starts them. It waits for those that end, too, however
//! long the host takes for what they are in the midst of; processors can be stopped meanwhile.

use std::cell::RefCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};

use crate::gate::Gate;

type Job = Box<dyn FnOnce() + Send>;

/// The thread.
#[derive(Debug)]
pub(super) struct Control {
    gate: Arc<Gate>,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// Something that was to be done has panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Panicked;

/// What has become of a job.
#[derive(Debug, Default)]
struct Progress(AtomicU8);

impl Progress {
    const DONE: u8 = 1;
    const PANICKED: u8 = 2;

    fn get(&self) -> Option<Result<(), Panicked>> {
        match self.0.load(Ordering::Acquire) {
            Self::DONE => Some(Ok(())),
            Self::PANICKED => Some(Err(Panicked)),
            _ => None,
        }
    }
}

thread_local! {
    /// What the calling processor has asked for and not waited for to the end.
    static LEFT: RefCell<Vec<Arc<Progress>>> = const { RefCell::new(Vec::new()) };
}

impl Control {
    /// For the processors that wait at this gate.
    pub(super) fn new(gate: Arc<Gate>) -> io::Result<Self> {
        let (jobs, todo) = channel::<Job>();
        let work = move || todo.into_iter().for_each(|job| job());
        let thread = thread::Builder::new().name("devices".into()).spawn(work)?;
        Ok(Self { gate, jobs: Some(jobs), thread: Some(thread) })
    }

    /// Has something done there for the calling processor, and waits until it is done or the processor is to stop. Before
    /// that runs its guest again, it has to [settle](Self::settle).
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) -> Result<(), Panicked> {
        let progress = Arc::new(Progress::default());
        let (told, gate) = (Arc::clone(&progress), Arc::clone(&self.gate));
        let job = Box::new(move || {
            let done = catch_unwind(AssertUnwindSafe(job)).is_ok();
            told.0.store(if done { Progress::DONE } else { Progress::PANICKED }, Ordering::Release);
            gate.tell();
        });
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        sent.then_some(()).ok_or(Panicked)?;
        LEFT.with_borrow_mut(|left| left.push(progress));
        self.settle().map(drop)
    }

    /// Waits until all is done that any processor has asked for so far.
    pub(super) fn drain(&self) {
        let (done, wait) = channel();
        let job = Box::new(move || drop::<Sender<()>>(done));
        if self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok()) {
            // It is told by the end of the other side.
            let _ = wait.recv();
        }
    }

    /// Waits until all is done that the calling processor has asked for (true), or it is to stop.
    pub(super) fn settle(&self) -> Result<bool, Panicked> {
        LEFT.with_borrow_mut(|left| {
            while let Some(progress) = left.first() {
                match self.gate.wait_for(|| progress.get()) {
                    Some(done) => done?,
                    None => return Ok(false),
                }
                left.remove(0);
            }
            Ok(true)
        })
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
    use std::sync::mpsc::{RecvTimeoutError, sync_channel};
    use std::time::Duration;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn control() -> (Control, Arc<Gate>) {
        let gate = Arc::new(Gate::new(1).unwrap());
        gate.open();
        (Control::new(Arc::clone(&gate)).unwrap(), gate)
    }

    #[test]
    fn a_panic_is_told_and_ends_nothing() {
        // Each as a processor of its own.
        let (control, _gate) = control();
        let run = |job: fn()| thread::scope(|s| s.spawn(|| control.run(job)).join().unwrap());
        assert_eq!(run(|| ()), Ok(()));
        assert_eq!(run(|| panic!("as a device might")), Err(Panicked));
        assert_eq!(run(|| ()), Ok(()));
    }

    #[test]
    fn a_processor_stops_while_it_waits_and_does_not_go_on_before_it_is_done() {
        let (control, gate) = control();
        let (release, hangs) = sync_channel::<()>(0);
        let (tell, told) = channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                control.run(move || hangs.recv().unwrap()).unwrap();
                tell.send(control.settle()).unwrap();
                // The end of the pause.
                while gate.pass() && !control.settle().unwrap() {}
                tell.send(control.settle()).unwrap();
            });
            gate.close(|| ());
            assert_eq!(told.recv_timeout(PATIENCE), Ok(Ok(false)));
            let (drained, is_drained) = channel();
            let control = &control;
            scope.spawn(move || {
                control.drain();
                drained.send(()).unwrap();
            });
            gate.open();
            let goes_on = told.recv_timeout(Duration::from_millis(50));
            assert_eq!(goes_on, Err(RecvTimeoutError::Timeout));
            assert!(is_drained.try_recv().is_err());
            release.send(()).unwrap();
            assert_eq!(is_drained.recv_timeout(PATIENCE), Ok(()));
            assert_eq!(told.recv_timeout(PATIENCE), Ok(Ok(true)));
        });
    }
}
