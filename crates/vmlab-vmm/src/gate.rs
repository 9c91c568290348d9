//! What tells the threads of processors to run, to pause and to end.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmlab_devices::Event;

/// Why a VM has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum End {
    /// The guest has powered it off.
    PowerOff,
    /// The guest has reset it.
    Reset,
    /// A fault while handling a fault while handling a fault.
    TripleFault,
    /// The guest's kernel has said that it panicked, and then ended the VM in whatever way.
    Panic,
    /// KVM could not go on with a processor, with what is known of it.
    InternalError(String),
    /// The monitor could not go on.
    Failed(String),
    /// Whoever has the VM has ended it.
    Stopped,
}

/// Where all processors of a VM wait while they may not run.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Readable as long as threads are to come here, for those that wait for something else.
    awaited: Event,
}

#[derive(Debug)]
struct State {
    running: bool,
    end: Option<End>,
    /// How many processors' threads are inside, and how many of them wait here.
    threads: usize,
    parked: usize,
}

impl Gate {
    /// A gate that is closed, for so many threads.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub(crate) fn new(threads: usize) -> io::Result<Self> {
        let state = State { running: false, end: None, threads, parked: 0 };
        let awaited = Event::new()?;
        awaited.signal();
        Ok(Self { state: Mutex::new(state), changed: Condvar::new(), awaited })
    }

    /// What is readable as long as threads are to come here.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub(crate) fn awaited(&self) -> io::Result<Event> {
        self.awaited.try_clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the calling thread's processor may run (true), or the VM has ended.
    pub(crate) fn pass(&self) -> bool {
        let mut state = self.lock();
        if state.end.is_none() && !state.running {
            state.parked += 1;
            self.changed.notify_all();
            while state.end.is_none() && !state.running {
                state = self.wait(state);
            }
            state.parked -= 1;
        }
        state.end.is_none()
    }

    /// Lets all go on. False when the VM has ended.
    pub(crate) fn open(&self) -> bool {
        let mut state = self.lock();
        state.running = true;
        if state.end.is_none() {
            self.awaited.clear();
        }
        self.changed.notify_all();
        state.end.is_none()
    }

    /// Has all come here. `kick` makes them leave their guests.
    pub(crate) fn close(&self, kick: impl FnOnce()) {
        self.lock().running = false;
        kick();
        let mut state = self.lock();
        if !state.running {
            // Later than the kick, after which nothing but what was begun is done.
            self.awaited.signal();
            self.changed.notify_all();
        }
        while state.end.is_none() && !state.running && state.parked < state.threads {
            state = self.wait(state);
        }
    }

    /// Waits for something else than this, unless all are to come here. Whoever brings it about [tells](Self::tell).
    pub(crate) fn wait_for<T>(&self, something: impl Fn() -> Option<T>) -> Option<T> {
        let mut state = self.lock();
        loop {
            let found = something();
            if found.is_some() || !state.running || state.end.is_some() {
                return found;
            }
            state = self.wait(state);
        }
    }

    /// Has those look again who wait for something else.
    pub(crate) fn tell(&self) {
        // None of them is between looking and waiting.
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Whether they may run now.
    pub(crate) fn is_open(&self) -> bool {
        let state = self.lock();
        state.running && state.end.is_none()
    }

    /// Ends the VM for this reason, unless it has ended before.
    pub(crate) fn end(&self, end: End) {
        let mut state = self.lock();
        state.end.get_or_insert(end);
        self.awaited.signal();
        drop(state);
        self.changed.notify_all();
    }

    /// Why the VM has ended, if it has.
    pub(crate) fn ended(&self) -> Option<End> {
        self.lock().end.clone()
    }

    /// Waits for the end of the VM, until the deadline.
    pub(crate) fn wait_ended(&self, deadline: Option<Instant>) -> Option<End> {
        let mut state = self.lock();
        loop {
            if let Some(end) = &state.end {
                return Some(end.clone());
            }
            state = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
                None => self.wait(state),
                Some(left) if left.is_zero() => return None,
                Some(left) => {
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    #[test]
    fn all_stop_and_go_on_together() {
        const THREADS: usize = 3;
        let gate = Arc::new(Gate::new(THREADS).unwrap());
        let passed = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                let (gate, passed) = (Arc::clone(&gate), Arc::clone(&passed));
                thread::spawn(move || {
                    while gate.pass() {
                        passed.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                    }
                })
            })
            .collect();
        for _ in 0..100 {
            assert!(gate.open());
            let seen = passed.load(Ordering::SeqCst);
            while passed.load(Ordering::SeqCst) == seen {
                thread::yield_now();
            }
            gate.close(|| {});
            let seen = passed.load(Ordering::SeqCst);
            thread::sleep(Duration::from_micros(100));
            assert_eq!(passed.load(Ordering::SeqCst), seen, "one runs while all are stopped");
        }
        gate.end(End::Reset);
        gate.end(End::Stopped);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(gate.wait_ended(None), Some(End::Reset), "the first reason counts");
        assert!(!gate.open());
    }

    #[test]
    fn the_end_is_waited_for_until_the_deadline() {
        let gate = Gate::new(0).unwrap();
        let soon = Instant::now() + Duration::from_millis(20);
        assert_eq!(gate.wait_ended(Some(soon)), None);
        assert!(Instant::now() >= soon);
    }
}
