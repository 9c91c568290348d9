//! Devices for a monitor that has their registers in the guest's physical memory: virtio-mmio, version 2
//! (virtio 1.2, 4.2). It knows no hypervisor: what is written comes by [`Mmio::write`], what is read is on a
//! [`Page`], kicks come by eventfds.

mod line;
mod page;
mod queues;
mod state;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use crate::device::{Device, Interrupt, offered_features};
use crate::event::Event;
use crate::workers::{Fault, OnFault};
use line::Line;
pub use page::Page;
use queues::{Queues, Setting};
pub use state::{MmioState, QueueState, StateError};

/// Offsets of registers, as of `linux/virtio_mmio.h`.
pub mod register {
    pub use virtio_bindings::virtio_mmio::{
        VIRTIO_MMIO_CONFIG as CONFIG, VIRTIO_MMIO_CONFIG_GENERATION as CONFIG_GENERATION,
        VIRTIO_MMIO_DEVICE_FEATURES as DEVICE_FEATURES,
        VIRTIO_MMIO_DEVICE_FEATURES_SEL as DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID as DEVICE_ID,
        VIRTIO_MMIO_DRIVER_FEATURES as DRIVER_FEATURES,
        VIRTIO_MMIO_DRIVER_FEATURES_SEL as DRIVER_FEATURES_SEL,
        VIRTIO_MMIO_INTERRUPT_ACK as INTERRUPT_ACK,
        VIRTIO_MMIO_INTERRUPT_STATUS as INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE as MAGIC_VALUE,
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH as QUEUE_AVAIL_HIGH,
        VIRTIO_MMIO_QUEUE_AVAIL_LOW as QUEUE_AVAIL_LOW,
        VIRTIO_MMIO_QUEUE_DESC_HIGH as QUEUE_DESC_HIGH,
        VIRTIO_MMIO_QUEUE_DESC_LOW as QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY as QUEUE_NOTIFY,
        VIRTIO_MMIO_QUEUE_NUM as QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX as QUEUE_NUM_MAX,
        VIRTIO_MMIO_QUEUE_READY as QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL as QUEUE_SEL,
        VIRTIO_MMIO_QUEUE_USED_HIGH as QUEUE_USED_HIGH,
        VIRTIO_MMIO_QUEUE_USED_LOW as QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH as SHM_BASE_HIGH,
        VIRTIO_MMIO_SHM_BASE_LOW as SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH as SHM_LEN_HIGH,
        VIRTIO_MMIO_SHM_LEN_LOW as SHM_LEN_LOW, VIRTIO_MMIO_STATUS as STATUS,
        VIRTIO_MMIO_VENDOR_ID as VENDOR_ID, VIRTIO_MMIO_VERSION as VERSION,
    };
}

/// The bits of the status that are a driver's to set.
const DRIVERS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// One device and its registers. All methods can be called from any thread. Those that end threads of the device
/// ([`quiesce`](Self::quiesce), [`restore`](Self::restore), a reset by [`write`](Self::write)) wait for its
/// requests in progress; such threads themselves must not call them, nor `on_fault`.
pub struct Mmio {
    device: Arc<dyn Device>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    offered: u64,
    on_fault: OnFault,
    page: Page,
    line: Arc<Line>,
    kicks: Vec<Event>,
    registers: Mutex<Registers>,
}

struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Queues,
    /// No threads are to be started.
    quiet: bool,
}

impl Mmio {
    /// A device that its driver has yet to find.
    ///
    /// `interrupt` is how the guest is interrupted. `page` shows its registers, and has to be no other device's until
    /// this one is gone. `on_fault` is told when a queue is served no more. If that is due to the guest
    /// ([`Fault::Queue`]), the guest has been told, and can go on with a reset: there is nothing to do.
    ///
    /// # Errors
    /// There are no more descriptors, or the device's queues are no queues.
    pub fn new(
        device: Arc<dyn Device>,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        interrupt: Arc<dyn Interrupt>,
        page: Page,
        on_fault: OnFault,
    ) -> io::Result<Self> {
        let kinds = device.queues();
        let line = Arc::new(Line::new(interrupt, page.clone()));
        let kicks = kinds.iter().map(|_| Event::new()).collect::<io::Result<_>>()?;
        let on_fault: OnFault = {
            let line = line.clone();
            Arc::new(move |queue, fault| {
                if matches!(fault, Fault::Queue(_)) {
                    line.count_broken();
                }
                // Nobody serves the queue any more, whatever the reason.
                line.needs_reset();
                on_fault(queue, fault);
            })
        };
        let registers = Registers {
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: Queues::new(&kinds)?,
            quiet: false,
        };
        let offered = offered_features(&*device);
        page.begin(device.id(), &device.config());
        let registers = Mutex::new(registers);
        let mmio = Self { device, memory, offered, on_fault, page, line, kicks, registers };
        mmio.show(&mmio.lock());
        Ok(mmio)
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// One eventfd per queue, which stands for a write of the queue's index to [`register::QUEUE_NOTIFY`].
    pub fn kicks(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.kicks.iter().map(AsFd::as_fd)
    }

    /// How many queues the guest's driver has broken.
    pub fn broken(&self) -> u64 {
        self.line.broken()
    }

    /// Tells the driver that the device's configuration space has changed.
    pub fn config_changed(&self) {
        let _registers = self.lock();
        self.page.configure(&self.device.config());
        self.line.config_changed();
    }

    /// Serves a read of the guest. Whatever is no register reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(at) = u32::try_from(offset) else { return };
        // Those before the configuration space all have 32 bits.
        if at >= register::CONFIG || word_at(offset).is_some() && data.len() == size_of::<u32>() {
            self.page.read(at, data);
        }
    }

    /// Serves a write of the guest. Whatever is no register, or cannot be written to now, stays as it is.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let (Some(register), Ok(word)) = (word_at(offset), data.try_into()) else { return };
        let value = u32::from_le_bytes(word);
        match register {
            register::QUEUE_NOTIFY => self.kick(value),
            register::INTERRUPT_ACK => self.line.acknowledge(value),
            register::STATUS => {
                // They are told when nothing is locked.
                let fault = self.write_status(value);
                if let Some((queue, fault)) = fault {
                    (self.on_fault)(queue, fault);
                }
            }
            _ => self.write_register(register, value),
        }
    }

    /// Ends all threads. When it returns, no request is in progress, and none will be until
    /// [`resume`](Self::resume) or [`restore`](Self::restore). Registers stay as they are.
    pub fn quiesce(&self) {
        let mut registers = self.lock();
        registers.quiet = true;
        registers.queues.stop();
    }

    /// Goes on after [`quiesce`](Self::quiesce).
    ///
    /// # Errors
    /// There are no more threads or descriptors. No request is served.
    pub fn resume(&self) -> io::Result<()> {
        let mut registers = self.lock();
        registers.quiet = false;
        self.start(&mut registers).map_err(|(_, error)| {
            registers.quiet = true;
            registers.queues.stop();
            error
        })
    }

    /// What a snapshot has to keep. It is of use only when the device is [quiet](Self::quiesce).
    pub fn state(&self) -> MmioState {
        let registers = self.lock();
        MmioState {
            device_id: self.device.id(),
            status: self.line.status(),
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            driver_features: registers.driver_features,
            queue_select: registers.queue_select,
            interrupt_status: self.line.reasons(),
            config_generation: self.line.generation(),
            queues: registers.queues.states(),
            device: self.device.save(),
        }
    }

    /// Whether this device can go on with a state. Nothing is changed.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check(&self, state: &MmioState) -> Result<(), StateError> {
        state.check(&*self.device, self.offered, &self.memory.memory())
    }

    /// Goes on with a state: its queues are served as they were. The guest's memory has to be as it was, too.
    /// Where the state has an interrupt that is not acknowledged, the guest is interrupted once more.
    ///
    /// # Errors
    /// It cannot ([`check`](Self::check)), and nothing was changed; or its threads could not be started, and the
    /// device is of no use.
    pub fn restore(&self, state: &MmioState) -> Result<(), StateError> {
        let mut registers = self.lock();
        self.check(state)?;
        registers.queues.stop();
        self.device.restore(&state.device)?;
        registers.device_features_select = state.device_features_select;
        registers.driver_features_select = state.driver_features_select;
        registers.driver_features = state.driver_features;
        registers.queue_select = state.queue_select;
        registers.queues.restore(&state.queues);
        registers.quiet = false;
        self.page.configure(&self.device.config());
        self.show(&registers);
        self.line.restore(state.status, state.interrupt_status, state.config_generation);
        self.start(&mut registers).map_err(|(_, error)| StateError::Threads(error))
    }

    /// Locks what no panic leaves half-changed.
    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kick(&self, queue: u32) {
        if let Some(kick) = usize::try_from(queue).ok().and_then(|queue| self.kicks.get(queue)) {
            kick.signal();
        }
    }

    /// Shows what depends on what is selected.
    fn show(&self, registers: &Registers) {
        let features = match registers.device_features_select {
            0 => self.offered as u32,
            1 => (self.offered >> 32) as u32,
            _ => 0,
        };
        let (queues, queue) = (&registers.queues, registers.queue_select);
        self.page.set(register::DEVICE_FEATURES, features);
        self.page.set(register::QUEUE_NUM_MAX, queues.max_size(queue).into());
        self.page.set(register::QUEUE_READY, queues.ready(queue).into());
    }

    fn write_register(&self, register: u32, value: u32) {
        let mut registers = self.lock();
        self.change(&mut registers, register, value);
        self.show(&registers);
    }

    fn change(&self, registers: &mut Registers, register: u32, value: u32) {
        match register {
            register::DEVICE_FEATURES_SEL => registers.device_features_select = value,
            register::DRIVER_FEATURES_SEL => registers.driver_features_select = value,
            register::QUEUE_SEL => registers.queue_select = value,
            register::DRIVER_FEATURES => {
                let shift = match registers.driver_features_select {
                    _ if self.line.has(VIRTIO_CONFIG_S_FEATURES_OK) => return,
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                let word = u64::from(u32::MAX) << shift;
                let others = registers.driver_features & !word;
                registers.driver_features = others | u64::from(value) << shift;
            }
            register::QUEUE_READY => self.write_ready(registers, value),
            _ => {
                let Some(setting) = Setting::of(register) else { return };
                if self.sets_up_queues() {
                    registers.queues.set(registers.queue_select, setting, value);
                }
            }
        }
    }

    /// Whether the driver is where it sets up its queues: virtio 1.2, 3.1.1.
    fn sets_up_queues(&self) -> bool {
        let later = VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FAILED;
        self.line.has(VIRTIO_CONFIG_S_FEATURES_OK) && self.line.status() & later == 0
    }

    /// A queue can be taken out of use at any time, and is set up once until a reset.
    fn write_ready(&self, registers: &mut Registers, value: u32) {
        match value {
            0 => registers.queues.take_out(registers.queue_select),
            1 if self.sets_up_queues() => {
                registers.queues.make_ready(registers.queue_select, &self.memory.memory());
            }
            _ => {}
        }
    }

    /// A write of the status. Returns what went wrong with starting the device.
    fn write_status(&self, value: u32) -> Option<(usize, Fault)> {
        let mut registers = self.lock();
        if value == 0 {
            self.reset(&mut registers);
            return None;
        }
        // Bits that are missing stay: only a reset takes them away.
        let before = self.line.status();
        let mut status = before | value & DRIVERS;
        let has = |status: u32, bits: u32| status & bits == bits;
        let known = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        let agreed = has(before, VIRTIO_CONFIG_S_FEATURES_OK)
            || has(status, known) && state::acceptable(registers.driver_features, self.offered);
        if !agreed {
            status &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if !has(status, VIRTIO_CONFIG_S_FEATURES_OK) || has(status, VIRTIO_CONFIG_S_FAILED) {
            status &= !VIRTIO_CONFIG_S_DRIVER_OK | before;
        }
        self.line.add_status(status);
        let starts = has(status & !before, VIRTIO_CONFIG_S_DRIVER_OK);
        let started = if starts { self.start(&mut registers) } else { Ok(()) };
        started.err().map(|(queue, error)| (queue, Fault::Start(error)))
    }

    /// Waits for requests in progress.
    fn reset(&self, registers: &mut Registers) {
        registers.queues.reset();
        registers.device_features_select = 0;
        registers.driver_features_select = 0;
        registers.driver_features = 0;
        registers.queue_select = 0;
        self.device.reset();
        self.line.clear();
        self.page.configure(&self.device.config());
        self.show(registers);
    }

    /// Starts the threads of all queues that are ready, if the driver is, too. The error has the queue.
    fn start(&self, registers: &mut Registers) -> Result<(), (usize, io::Error)> {
        if registers.quiet || !self.line.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            return Ok(());
        }
        let event_idx = registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for (index, kick) in self.kicks.iter().enumerate() {
            let of = (&self.device, &self.memory, &self.line, &self.on_fault);
            let started = registers.queues.start(index, kick, event_idx, of);
            started.map_err(|error| (index, error))?;
        }
        Ok(())
    }
}

/// The register at an offset before the configuration space, whose registers all have 32 bits.
fn word_at(offset: u64) -> Option<u32> {
    let offset = u32::try_from(offset).ok()?;
    (offset < register::CONFIG && offset.is_multiple_of(4)).then_some(offset)
}
