//! The queues of a device: set up by its driver, and served when it says so.

use std::io;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use crate::device::{Device, QueueKind};
use crate::event::Event;
use crate::queue::VirtQueue;
use crate::transport::mmio::line::Line;
use crate::transport::mmio::register;
use crate::transport::mmio::state::QueueState;
use crate::workers::{OnFault, Workers};

/// All of them, by their index.
pub(super) struct Queues(Vec<Slot>);

struct Slot {
    max_size: u16,
    /// The indices are those of `running`, if there is one.
    state: QueueState,
    running: Option<(Arc<VirtQueue>, Workers)>,
}

/// What a driver says of a queue.
#[derive(Debug, Clone, Copy)]
pub(super) enum Setting {
    Size,
    /// An address, of which it says one half.
    Address(fn(&mut QueueState) -> &mut u64, Half),
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Half {
    Low,
    High,
}

impl Setting {
    /// What a register is about.
    pub(super) fn of(register: u32) -> Option<Self> {
        Some(match register {
            register::QUEUE_NUM => Self::Size,
            register::QUEUE_DESC_LOW => Self::Address(|queue| &mut queue.descriptors, Half::Low),
            register::QUEUE_DESC_HIGH => Self::Address(|queue| &mut queue.descriptors, Half::High),
            register::QUEUE_AVAIL_LOW => Self::Address(|queue| &mut queue.available, Half::Low),
            register::QUEUE_AVAIL_HIGH => Self::Address(|queue| &mut queue.available, Half::High),
            register::QUEUE_USED_LOW => Self::Address(|queue| &mut queue.used, Half::Low),
            register::QUEUE_USED_HIGH => Self::Address(|queue| &mut queue.used, Half::High),
            _ => return None,
        })
    }
}

impl Queues {
    /// Queues that are not set up.
    pub(super) fn new(kinds: &[QueueKind]) -> io::Result<Self> {
        let slot = |kind: &QueueKind| {
            // Only a mistake of a device is refused here.
            Queue::new(kind.max_size).map_err(io::Error::other)?;
            let (max_size, state) = (kind.max_size, QueueState::new(kind.max_size));
            Ok(Slot { max_size, state, running: None })
        };
        kinds.iter().map(slot).collect::<io::Result<_>>().map(Self)
    }

    fn get(&self, index: u32) -> Option<&Slot> {
        self.0.get(usize::try_from(index).ok()?)
    }

    fn get_mut(&mut self, index: u32) -> Option<&mut Slot> {
        self.0.get_mut(usize::try_from(index).ok()?)
    }

    /// The most descriptors of a queue, none for what is no queue.
    pub(super) fn max_size(&self, index: u32) -> u16 {
        self.get(index).map_or(0, |slot| slot.max_size)
    }

    pub(super) fn ready(&self, index: u32) -> bool {
        self.get(index).is_some_and(|slot| slot.state.ready)
    }

    /// Sets up a queue. One that is ready stays as it is, and so does a size for a value that is none.
    pub(super) fn set(&mut self, index: u32, setting: Setting, value: u32) {
        let Some(slot) = self.get_mut(index).filter(|slot| !slot.state.ready) else { return };
        match setting {
            Setting::Size => match u16::try_from(value) {
                Ok(size) if size.is_power_of_two() && size <= slot.max_size => {
                    slot.state.size = size;
                }
                _ => {}
            },
            Setting::Address(of, half) => {
                let (address, shift) = match half {
                    Half::Low => (of(&mut slot.state), 0),
                    Half::High => (of(&mut slot.state), 32),
                };
                *address = *address & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
            }
        }
    }

    /// Lets a queue begin, if all of it is in memory.
    pub(super) fn make_ready(&mut self, index: u32, memory: &GuestMemoryMmap) {
        if let Some(slot) = self.get_mut(index).filter(|slot| !slot.state.ready) {
            slot.state.next_available = 0;
            slot.state.next_used = 0;
            slot.state.ready = slot.state.ring(slot.max_size, memory).is_some();
        }
    }

    /// Ends the use of a queue. Its requests in progress have ended then.
    pub(super) fn take_out(&mut self, index: u32) {
        if let Some(slot) = self.get_mut(index) {
            slot.stop();
            slot.state.ready = false;
        }
    }

    /// Starts the threads of a queue that is ready.
    pub(super) fn start(
        &mut self,
        index: usize,
        kick: &Event,
        event_idx: bool,
        of: (&Arc<dyn Device>, &GuestMemoryAtomic<GuestMemoryMmap>, &Arc<Line>, &OnFault),
    ) -> io::Result<()> {
        let (device, memory, line, on_fault) = of;
        let idle = |slot: &&mut Slot| slot.state.ready && slot.running.is_none();
        let Some(slot) = self.0.get_mut(index).filter(idle) else { return Ok(()) };
        let ring = slot.state.ring(slot.max_size, &memory.memory());
        let gone = || io::Error::other("a queue is not in the guest's memory any more");
        let mut ring = ring.ok_or_else(gone)?;
        ring.set_event_idx(event_idx);
        let queue = Arc::new(VirtQueue::new(ring, memory.clone(), line.clone()));
        let kick = kick.try_clone()?.into();
        let workers = Workers::start(device.clone(), index, queue.clone(), kick, on_fault)?;
        slot.running = Some((queue, workers));
        Ok(())
    }

    /// Ends all threads.
    pub(super) fn stop(&mut self) {
        // All are told before the first is waited for.
        for (_, workers) in self.0.iter().filter_map(|slot| slot.running.as_ref()) {
            workers.end();
        }
        self.0.iter_mut().for_each(Slot::stop);
    }

    /// Ends all threads, and forgets what the driver has said.
    pub(super) fn reset(&mut self) {
        self.stop();
        for slot in &mut self.0 {
            slot.state = QueueState::new(slot.max_size);
        }
    }

    pub(super) fn states(&self) -> Vec<QueueState> {
        self.0.iter().map(Slot::state).collect()
    }

    /// Takes over states that have been checked.
    pub(super) fn restore(&mut self, states: &[QueueState]) {
        for (slot, state) in self.0.iter_mut().zip(states) {
            slot.state = *state;
        }
    }
}

impl Slot {
    fn state(&self) -> QueueState {
        let Some((queue, _)) = &self.running else { return self.state };
        let ring = queue.ring();
        QueueState { next_available: ring.next_avail(), next_used: ring.next_used(), ..self.state }
    }

    fn stop(&mut self) {
        if let Some((queue, workers)) = self.running.take() {
            workers.stop();
            let ring = queue.ring();
            self.state.next_available = ring.next_avail();
            self.state.next_used = ring.next_used();
        }
    }
}
