//! What a device is to a transport, and what a transport is to a device.

use std::io;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::queue::{QueueError, Turn, VirtQueue};

/// One of a device's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueKind {
    /// The most descriptors of its ring, a power of two.
    pub max_size: u16,
    /// How many threads serve it at once, at least one.
    pub workers: usize,
}

/// A device cannot go on with what is said to be its state.
#[derive(Debug, thiserror::Error)]
#[error("a virtio device (kind {device}) cannot go on with a state: {reason}")]
pub struct DeviceStateError {
    /// `VIRTIO_ID_*`.
    pub device: u32,
    /// Why not.
    pub reason: &'static str,
}

/// A virtio device.
pub trait Device: Send + Sync {
    /// The number of its kind: `VIRTIO_ID_*` of `linux/virtio_ids.h`.
    fn id(&self) -> u32;

    /// Its queues, always the same.
    fn queues(&self) -> Vec<QueueKind>;

    /// The features of its kind; those of rings are the transport's ([`offered_features`]).
    fn features(&self) -> u64 {
        0
    }

    /// Its configuration space. A guest cannot write to it. A transport may look at it only when it begins, at a reset,
    /// and when it is told of a change.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Whether a monitor takes the configuration space from the device. Those that make it themselves, as QEMU
    /// does for virtio-fs, warn of a device that has one for them.
    fn provides_config(&self) -> bool {
        false
    }

    /// Called by each thread before it serves a queue, to give up rights that serving does not need.
    ///
    /// # Errors
    /// None of the queue's requests is served then, and the owner of the device is told.
    fn prepare_thread(&self) -> io::Result<()> {
        Ok(())
    }

    /// Serves requests of a queue until there are no more or the turn was handed over. Threads of
    /// different queues call it at once, and those of one queue whose turns have been handed over.
    ///
    /// # Errors
    /// The queue is beyond use. Whatever is wrong with one request is told to the guest, not here.
    fn process(
        &self,
        index: usize,
        queue: &VirtQueue,
        turn: &mut Turn<'_>,
    ) -> Result<(), QueueError>;

    /// Forgets what the driver has told it. Called when the driver resets the device, while no queue is served.
    fn reset(&self) {}

    /// What another device of this kind needs to go on in its place, other than its queues and memory. Called
    /// while no queue is served.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Whether [`restore`](Self::restore) would take a state. Changes nothing, and can be called at any time.
    ///
    /// # Errors
    /// Why it would not. What a snapshot says is not to be trusted.
    fn check(&self, state: &[u8]) -> Result<(), DeviceStateError> {
        let error = DeviceStateError { device: self.id(), reason: "such devices have none" };
        if state.is_empty() { Ok(()) } else { Err(error) }
    }

    /// Goes on with what [`save`](Self::save) gave. Called while no queue is served.
    ///
    /// # Errors
    /// As of [`check`](Self::check), and nothing has changed.
    fn restore(&self, state: &[u8]) -> Result<(), DeviceStateError> {
        self.check(state)
    }
}

/// How a device makes the guest look at a queue.
pub trait Interrupt: Send + Sync {
    /// Interrupts the guest.
    fn signal(&self);
}

/// What a transport offers for a device: its features and those of every ring here.
pub fn offered_features(device: &dyn Device) -> u64 {
    let ring = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC];
    ring.iter().fold(device.features(), |features, bit| features | 1 << bit)
}
