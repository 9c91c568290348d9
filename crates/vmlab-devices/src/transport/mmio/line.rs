//! What a device's threads tell its driver, without the lock of the registers: whoever holds that may be
//! waiting for these threads to end.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use crate::device::Interrupt;
use crate::event::Event;

/// The interrupt of a device, its reason, and the status register.
pub(super) struct Line {
    interrupt: Event,
    reasons: AtomicU32,
    generation: AtomicU32,
    status: AtomicU32,
    broken: AtomicU64,
}

impl Line {
    pub(super) fn new(interrupt: OwnedFd) -> Self {
        let (reasons, generation, status, broken) = Default::default();
        Self { interrupt: interrupt.into(), reasons, generation, status, broken }
    }

    /// The guest's handler looks for the reason first, so that it must be there before the interrupt.
    fn raise(&self, reason: u32) {
        self.reasons.fetch_or(reason, Ordering::SeqCst);
        self.fire();
    }

    fn fire(&self) {
        self.interrupt.signal();
    }

    pub(super) fn reasons(&self) -> u32 {
        self.reasons.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, reasons: u32) {
        self.reasons.fetch_and(!reasons, Ordering::SeqCst);
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// A driver that is not done with its set-up reads the configuration later in any case.
    pub(super) fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn has(&self, bits: u32) -> bool {
        self.status() & bits == bits
    }

    pub(super) fn add_status(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    /// Tells the driver that only a reset helps: virtio 1.2, 2.1.2.
    pub(super) fn needs_reset(&self) {
        self.add_status(VIRTIO_CONFIG_S_NEEDS_RESET);
        if self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// Counts a queue that its driver has broken.
    pub(super) fn count_broken(&self) {
        self.broken.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn broken(&self) -> u64 {
        self.broken.load(Ordering::Relaxed)
    }

    /// As after a reset. The generation goes on, for a driver may have read half of the configuration.
    pub(super) fn clear(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.reasons.store(0, Ordering::SeqCst);
    }

    /// Takes over what another one had. Interrupts that were on their way when it was asked may have been lost
    /// with it, and one too many does no harm.
    pub(super) fn restore(&self, status: u32, reasons: u32, generation: u32) {
        self.status.store(status, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
        self.reasons.store(reasons, Ordering::SeqCst);
        if reasons != 0 {
            self.fire();
        }
    }
}

impl Interrupt for Line {
    fn signal(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }
}
