//! The threads that serve a queue.

use std::any::Any;
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::device::Device;
use crate::event::Event;
use crate::queue::{QueueError, Turn, VirtQueue};

/// Why a queue is not served any more.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The guest's driver.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// Its threads are not there at all.
    #[error("the threads of a queue could not be started")]
    Start(#[source] io::Error),
    /// A thread could not give up rights that it must not have.
    #[error("a thread of the device could not be prepared")]
    Prepare(#[source] io::Error),
    /// Waiting failed.
    #[error("a thread of the device could not wait for requests")]
    Wait(#[source] io::Error),
    /// A mistake in the device.
    #[error("a thread of the device panicked: {0}")]
    Panic(String),
}

/// Who is told of a fault: the queue's index and what it is. Called by the thread that has it. Several threads may
/// find that the guest has broken their queue, and the first one tells.
pub type OnFault = Arc<dyn Fn(usize, Fault) + Send + Sync>;

/// The threads that serve one queue. They wait for its kicks in turn: whoever has the turn takes requests,
/// and hands it over when one may take long. Without such requests one thread does all the work, and none
/// is woken for nothing.
pub struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    device: Arc<dyn Device>,
    index: usize,
    queue: Arc<VirtQueue>,
    kick: Event,
    /// Readable for good once the threads are to end.
    stop: Event,
    turn: Mutex<()>,
    faulty: AtomicBool,
}

impl Workers {
    /// Starts to serve a queue whose kicks come by an eventfd.
    ///
    /// # Errors
    /// There are no more threads or descriptors.
    pub fn start(
        device: Arc<dyn Device>,
        index: usize,
        queue: Arc<VirtQueue>,
        kick: OwnedFd,
        on_fault: &OnFault,
    ) -> io::Result<Self> {
        let count = device.queues().get(index).map_or(1, |queue| queue.workers);
        let stop = Event::new()?;
        // A kick that another thread has taken in the meantime must not block this one.
        rustix::io::ioctl_fionbio(&kick, true)?;
        queue.set_stopped(false);
        let (turn, faulty) = Default::default();
        let shared =
            Arc::new(Shared { device, index, queue, kick: kick.into(), stop, turn, faulty });
        let mut workers = Self { shared: shared.clone(), threads: Vec::new() };
        for number in 0..count {
            let (shared, on_fault) = (shared.clone(), on_fault.clone());
            let name = format!("virtio{}-{index}.{number}", shared.device.id());
            let work = move || shared.run(&on_fault);
            workers.threads.push(thread::Builder::new().name(name).spawn(work)?);
        }
        Ok(workers)
    }

    /// Tells the threads to end, and does not wait for that.
    pub(crate) fn end(&self) {
        self.shared.end();
    }

    /// Ends the threads. When it returns, no request is being served. Those that slept, to take their time, were
    /// woken.
    pub fn stop(self) {}
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.end();
        for thread in self.threads.drain(..) {
            // Whatever it ended with has been reported.
            let _ = thread.join();
        }
    }
}

thread_local! {
    /// What this thread serves.
    static SERVED: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
}

/// Lets the calling thread sleep, for a request that is to take its time. If it serves a queue, it is woken when that
/// is stopped, for whoever stops a queue waits for its requests.
pub(crate) fn sleep_until(end: Instant) {
    let left = || end.saturating_duration_since(Instant::now());
    SERVED.with_borrow(|served| {
        let Some(shared) = served else { return thread::sleep(left()) };
        let mut stop = [PollFd::new(&shared.stop, PollFlags::IN)];
        while !left().is_zero() {
            // A time that is beyond the kernel's is none.
            let timeout = Timespec::try_from(left()).ok();
            match poll(&mut stop, timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                // An error is none that is known.
                Ok(_) | Err(_) => return,
            }
        }
    });
}

/// Waits until a descriptor is ready for what `flags` say, or has an end or an error. False when the queue that the
/// calling thread serves is to stop. A thread that serves none does not wait: what is not ready will not be.
pub(crate) fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags) -> bool {
    SERVED.with_borrow(|served| {
        let mut fds = vec![PollFd::from_borrowed_fd(fd, flags)];
        fds.extend(served.as_ref().map(|shared| PollFd::new(&shared.stop, PollFlags::IN)));
        let timeout = served.is_none().then(Timespec::default);
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return false,
                Ok(_) => return fds.get(1).is_none_or(|stop| stop.revents().is_empty()),
                Err(Errno::INTR) => {}
                // An error is none that is known.
                Err(_) => return false,
            }
        }
    })
}

/// Waits until the queue that the calling thread serves is to stop: a device that returns with requests left is called
/// again at once. A thread that serves none does not wait.
pub(crate) fn wait_for_stop() {
    if let Some(shared) = SERVED.with_borrow(Option::clone) {
        wait_for(shared.stop.as_fd(), PollFlags::IN);
    }
}

impl Shared {
    fn end(&self) {
        self.queue.set_stopped(true);
        self.stop.signal();
    }

    fn run(self: Arc<Self>, on_fault: &OnFault) {
        SERVED.set(Some(Arc::clone(&self)));
        let fault = match catch_unwind(AssertUnwindSafe(|| self.serve())) {
            Ok(Ok(())) => return,
            Ok(Err(fault)) => fault,
            Err(panic) => Fault::Panic(message(&*panic)),
        };
        self.end();
        let first = !self.faulty.swap(true, Ordering::Relaxed);
        if first || !matches!(fault, Fault::Queue(_)) {
            on_fault(self.index, fault);
        }
    }

    fn serve(&self) -> Result<(), Fault> {
        bear_file_limits().map_err(Fault::Prepare)?;
        self.device.prepare_thread().map_err(Fault::Prepare)?;
        while !self.queue.stopped() {
            let mut turn = Turn::take(&self.turn);
            // Requests may be waiting whose kick was taken by the one who had the turn before.
            while turn.held() && !self.queue.stopped() {
                self.queue.mute()?;
                self.device.process(self.index, &self.queue, &mut turn)?;
                if turn.held() && !self.queue.listen()? {
                    self.wait().map_err(Fault::Wait)?;
                }
            }
        }
        Ok(())
    }

    fn wait(&self) -> io::Result<()> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.kick.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {
                self.kick.clear();
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Makes a write of the calling thread beyond the process's limit of file sizes (`RLIMIT_FSIZE`) fail with
/// `EFBIG` alone: whoever drives the thread from a guest must not end the process. The signal that comes with
/// the error is for the thread, so that it can be blocked there, and no child inherits anything.
///
/// # Errors
/// None that is known.
pub fn bear_file_limits() -> io::Result<()> {
    // SAFETY: an array of integers, for which zeroes are a value.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a live signal set.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: `set` was just initialised, and the signal is one.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGXFSZ) };
    // SAFETY: `set` is initialised, and the old one is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}
