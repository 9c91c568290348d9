//! What a snapshot keeps of a device.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::device::{Device, DeviceStateError};

/// The registers of a device, and what it keeps itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// `VIRTIO_ID_*`.
    pub device_id: u32,
    /// `VIRTIO_CONFIG_S_*`.
    pub status: u32,
    /// Which word of the offered features is read.
    pub device_features_select: u32,
    /// Which word of the accepted features is written.
    pub driver_features_select: u32,
    /// What the driver has accepted.
    pub driver_features: u64,
    /// Which queue the queue registers are about.
    pub queue_select: u32,
    /// `VIRTIO_MMIO_INT_*`.
    pub interrupt_status: u32,
    /// How often the configuration has changed.
    pub config_generation: u32,
    /// Each queue.
    pub queues: Vec<QueueState>,
    /// What [`Device::save`] gave.
    pub device: Vec<u8>,
}

/// A queue, as the driver has set it up, and where it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Its descriptors.
    pub size: u16,
    /// Whether it may be used.
    pub ready: bool,
    /// The guest's address of its table of descriptors.
    pub descriptors: u64,
    /// That of the ring of the driver.
    pub available: u64,
    /// That of the ring of the device.
    pub used: u64,
    /// The index of the next request, which the guest does not see.
    pub next_available: u16,
    /// The index of the next one that is given back.
    pub next_used: u16,
}

/// Why a device cannot go on with a state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// It is that of a device of another kind.
    #[error(
        "the state is that of a virtio device of kind {state}, and this one is of kind {device}"
    )]
    Kind {
        /// What the state says.
        state: u32,
        /// What the device is.
        device: u32,
    },
    /// It has another number of queues.
    #[error("the state has {state} queues, and the virtio device {device}")]
    Queues {
        /// What the state says.
        state: usize,
        /// What the device has.
        device: usize,
    },
    /// The device has changed.
    #[error(
        "the driver has accepted the features {accepted:#x} of a virtio device that offers {offered:#x}"
    )]
    Features {
        /// By the driver.
        accepted: u64,
        /// By the device.
        offered: u64,
    },
    /// No device has such registers.
    #[error("the state of a virtio device has a {register} register of {value:#x}")]
    Register {
        /// Which one.
        register: &'static str,
        /// What it would be.
        value: u32,
    },
    /// A queue that is too long, or not in memory.
    #[error("queue {0} of the state of a virtio device is not in the guest's memory, or too long")]
    Queue(usize),
    /// What the device keeps itself.
    #[error(transparent)]
    Device(#[from] DeviceStateError),
    /// Its threads.
    #[error("the threads of a virtio device cannot be started")]
    Threads(#[source] std::io::Error),
}

/// All bits that a status can have.
const STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_NEEDS_RESET
    | VIRTIO_CONFIG_S_FAILED;

/// Whether a driver may accept just these features of those offered.
pub(super) fn acceptable(accepted: u64, offered: u64) -> bool {
    accepted & !offered == 0 && accepted & 1 << VIRTIO_F_VERSION_1 != 0
}

impl QueueState {
    /// A queue that is not set up.
    pub(super) fn new(max_size: u16) -> Self {
        Self { size: max_size, ..Self::default() }
    }

    /// The ring, if all of it is in memory.
    pub(super) fn ring(&self, max_size: u16, memory: &GuestMemoryMmap) -> Option<Queue> {
        let mut ring = Queue::new(max_size).ok()?;
        ring.try_set_size(self.size).ok()?;
        ring.try_set_desc_table_address(GuestAddress(self.descriptors)).ok()?;
        ring.try_set_avail_ring_address(GuestAddress(self.available)).ok()?;
        ring.try_set_used_ring_address(GuestAddress(self.used)).ok()?;
        ring.set_next_avail(self.next_available);
        ring.set_next_used(self.next_used);
        ring.set_ready(true);
        // A driver's ring at 0 is none to `Queue::iter`.
        (self.available != 0 && ring.is_valid(memory)).then_some(ring)
    }
}

impl MmioState {
    /// Whether a device can go on with this. Indices of queues can be any: a guest that changes its rings
    /// makes them so.
    pub(super) fn check(
        &self,
        device: &dyn Device,
        offered: u64,
        memory: &GuestMemoryMmap,
    ) -> Result<(), StateError> {
        let (id, kinds) = (device.id(), device.queues());
        if self.device_id != id {
            return Err(StateError::Kind { state: self.device_id, device: id });
        }
        if self.queues.len() != kinds.len() {
            return Err(StateError::Queues { state: self.queues.len(), device: kinds.len() });
        }
        let has = |bits| self.status & bits == bits;
        let negotiated = has(VIRTIO_CONFIG_S_FEATURES_OK);
        let early = has(VIRTIO_CONFIG_S_DRIVER_OK) && !negotiated;
        if self.status & !STATUS != 0 || early {
            return Err(StateError::Register { register: "status", value: self.status });
        }
        let reasons = self.interrupt_status;
        if reasons & !(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG) != 0 {
            return Err(StateError::Register { register: "interrupt", value: reasons });
        }
        // Before that, a driver may have written anything.
        if negotiated && !acceptable(self.driver_features, offered) {
            return Err(StateError::Features { accepted: self.driver_features, offered });
        }
        for (index, (queue, kind)) in self.queues.iter().zip(kinds).enumerate() {
            let sized = queue.size.is_power_of_two() && queue.size <= kind.max_size;
            let placed = || negotiated && queue.ring(kind.max_size, memory).is_some();
            if !sized || queue.ready && !placed() {
                return Err(StateError::Queue(index));
            }
        }
        Ok(device.check(&self.device)?)
    }
}
