//! What a device's threads tell its driver, without the lock of the registers: whoever holds that may be
//! waiting for these threads to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use crate::device::Interrupt;
use crate::transport::mmio::page::Page;
use crate::transport::mmio::register;

/// The interrupt of a device, and the registers with its reason, the status, and how often the configuration has
/// changed.
pub(super) struct Line {
    interrupt: Arc<dyn Interrupt>,
    page: Page,
    broken: AtomicU64,
}

impl Line {
    pub(super) fn new(interrupt: Arc<dyn Interrupt>, page: Page) -> Self {
        Self { interrupt, page, broken: AtomicU64::default() }
    }

    /// The guest's handler looks for the reason first, so that it must be there before the interrupt.
    fn raise(&self, reason: u32) {
        self.page.add(register::INTERRUPT_STATUS, reason);
        self.fire();
    }

    fn fire(&self) {
        self.interrupt.signal();
    }

    pub(super) fn reasons(&self) -> u32 {
        self.page.get(register::INTERRUPT_STATUS)
    }

    pub(super) fn acknowledge(&self, reasons: u32) {
        self.page.remove(register::INTERRUPT_STATUS, reasons);
    }

    pub(super) fn generation(&self) -> u32 {
        self.page.get(register::CONFIG_GENERATION)
    }

    /// A driver that is not done with its set-up reads the configuration later in any case.
    pub(super) fn config_changed(&self) {
        let generation = self.generation().wrapping_add(1);
        self.page.set(register::CONFIG_GENERATION, generation);
        if self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.page.get(register::STATUS)
    }

    pub(super) fn has(&self, bits: u32) -> bool {
        self.status() & bits == bits
    }

    pub(super) fn add_status(&self, bits: u32) {
        self.page.add(register::STATUS, bits);
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
        self.page.set(register::STATUS, 0);
        self.page.set(register::INTERRUPT_STATUS, 0);
    }

    /// Takes over what another one had. Interrupts that were on their way when it was asked may have been lost
    /// with it, and one too many does no harm.
    pub(super) fn restore(&self, status: u32, reasons: u32, generation: u32) {
        self.page.set(register::STATUS, status);
        self.page.set(register::CONFIG_GENERATION, generation);
        self.page.set(register::INTERRUPT_STATUS, reasons);
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
