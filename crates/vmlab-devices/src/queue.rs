//! A ring that several threads serve at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};

use crate::chain::{Chain, ChainError};
use crate::device::Interrupt;

/// The memory of a guest as it is at one moment; chains borrow from it.
pub type Guest = GuestMemoryLoadGuard<GuestMemoryMmap>;

/// A ring is not one any more: its indices or addresses make no sense.
#[derive(Debug, thiserror::Error)]
#[error("the guest's driver has broken a queue")]
pub struct QueueError(#[from] virtio_queue::Error);

/// A queue as devices see it.
pub struct VirtQueue {
    queue: Mutex<Queue>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    interrupt: Arc<dyn Interrupt>,
    stopped: AtomicBool,
    malformed: Mutex<(u64, Option<ChainError>)>,
}

impl VirtQueue {
    /// A queue that is set up, and what makes the guest look at it.
    pub fn new(
        queue: Queue,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        let queue = Mutex::new(queue);
        let stopped = AtomicBool::new(false);
        Self { queue, memory, interrupt, stopped, malformed: Mutex::default() }
    }

    /// The ring itself, for the transport to set it up.
    pub fn ring(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }

    /// The guest's memory, to take chains from.
    pub fn memory(&self) -> Guest {
        self.memory.memory()
    }

    /// The next request. One that is malformed is given back at once, with nothing written to it: whoever
    /// made it has to cope.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn pop<'m>(&self, memory: &'m Guest) -> Result<Option<Chain<'m>>, QueueError> {
        self.pop_or(memory, |_| 0)
    }

    /// The next request. The beginning of one that is well-formed but too long goes to `refuse`, which can
    /// write an error to it and gives back how many bytes it wrote.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn pop_or<'m>(
        &self,
        memory: &'m Guest,
        refuse: impl Fn(&mut Chain<'m>) -> u32,
    ) -> Result<Option<Chain<'m>>, QueueError> {
        while !self.stopped() {
            let (next, limit) = {
                let mut ring = self.ring();
                let next = ring.iter(&**memory)?.next();
                (next, ring.size())
            };
            let Some(descriptors) = next else { return Ok(None) };
            let head = descriptors.head_index();
            match Chain::gather(descriptors, memory, limit) {
                Ok(chain) => return Ok(Some(chain)),
                Err((error, beginning)) => {
                    {
                        let mut seen = lock(&self.malformed);
                        *seen = (seen.0 + 1, Some(error));
                    }
                    let written = beginning.map_or(0, |mut chain| refuse(&mut chain));
                    self.complete(memory, head, written)?;
                }
            }
        }
        Ok(None)
    }

    /// Whether a request is waiting, without taking it.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn has_request(&self) -> Result<bool, QueueError> {
        let ring = self.ring();
        let available = ring.avail_idx(&*self.memory(), Ordering::Acquire)?;
        Ok(available.0 != ring.next_avail())
    }

    /// Gives a request back, with so many bytes written to it, and interrupts the guest if it wants that.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn complete(&self, memory: &Guest, head: u16, written: u32) -> Result<(), QueueError> {
        let signal = {
            let mut ring = self.ring();
            ring.add_used(&**memory, head, written)?;
            ring.needs_notification(&**memory)?
        };
        if signal {
            self.interrupt.signal();
        }
        Ok(())
    }

    /// The next request as of [`pop`](Self::pop), which stays in its place until [`finish`](Self::finish): a queue that
    /// is stopped before goes on with it. This is for queues that one thread serves.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn peek<'m>(&self, memory: &'m Guest) -> Result<Option<Chain<'m>>, QueueError> {
        let next = self.pop(memory)?;
        if next.is_some() {
            self.ring().go_to_previous_position();
        }
        Ok(next)
    }

    /// Gives a request back that was [peeked](Self::peek) at, with so many bytes written to it.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn finish(&self, memory: &Guest, head: u16, written: u32) -> Result<(), QueueError> {
        {
            let mut ring = self.ring();
            let next = ring.next_avail().wrapping_add(1);
            ring.set_next_avail(next);
        }
        self.complete(memory, head, written)
    }

    /// How many malformed requests there were, and what was wrong with the last one.
    pub fn malformed(&self) -> (u64, Option<ChainError>) {
        *lock(&self.malformed)
    }

    /// Whether there are to be no more requests.
    pub fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    pub(crate) fn set_stopped(&self, stopped: bool) {
        self.stopped.store(stopped, Ordering::Release);
    }

    /// Asks the guest for no kicks.
    pub(crate) fn mute(&self) -> Result<(), QueueError> {
        Ok(self.ring().disable_notification(&*self.memory())?)
    }

    /// Asks the guest for kicks. Returns whether a request has come before that.
    pub(crate) fn listen(&self) -> Result<bool, QueueError> {
        Ok(self.ring().enable_notification(&*self.memory())?)
    }
}

/// The right of one thread to take requests from a queue.
#[derive(Debug)]
pub struct Turn<'t>(Option<MutexGuard<'t, ()>>);

impl<'t> Turn<'t> {
    /// Waits for the turn.
    pub fn take(mutex: &'t Mutex<()>) -> Self {
        Self(Some(lock(mutex)))
    }

    /// Lets another thread take the next requests, because this one may be busy for long.
    /// [`Device::process`](crate::Device::process) takes no more requests after that.
    pub fn hand_over(&mut self) {
        self.0 = None;
    }

    /// Whether this thread still has the turn.
    pub fn held(&self) -> bool {
        self.0.is_some()
    }
}

/// Locks what no panic leaves half-changed: numbers are changed last.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
