//! A guest's driver of any device behind the registers of virtio-mmio, as wrong as a test wants it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmlab_devices::transport::mmio::{Mmio, Page, register};
use vmlab_devices::{Device, Event, OnFault};

#[allow(unused_imports, reason = "not every test uses all of it")]
pub(crate) use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
};
#[allow(unused_imports, reason = "not every test uses all of it")]
pub(crate) use virtio_bindings::virtio_ring::{
    VRING_DESC_F_NEXT as NEXT, VRING_DESC_F_WRITE as WRITE,
};

/// The guest has this many bytes from address 0 on.
pub(crate) const MEMORY: u64 = 8 << 20;
/// The descriptors of each ring.
pub(crate) const SIZE: u16 = 16;
/// Free for buffers from here on.
pub(crate) const BUFFERS: u64 = 0x10_0000;

/// Far longer than anything here takes.
const PATIENCE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// Where a queue has its descriptors; its other two parts are behind them.
pub(crate) fn table(queue: u32) -> u64 {
    0x1000 * (1 + u64::from(queue))
}

pub(crate) fn available(queue: u32) -> u64 {
    table(queue) + 0x400
}

pub(crate) fn used(queue: u32) -> u64 {
    table(queue) + 0x800
}

/// Where a driver is in its rings.
#[derive(Clone, Default)]
struct Place {
    descriptor: u16,
    seen: u16,
}

pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) mmio: Mmio,
    pub(crate) faults: Arc<Mutex<VecDeque<(usize, String)>>>,
    interrupt: OwnedFd,
    places: RefCell<Vec<Place>>,
}

impl Guest {
    pub(crate) fn new(device: Arc<dyn Device>) -> Self {
        let range = (GuestAddress(0), MEMORY as usize);
        Self::with(GuestMemoryMmap::from_ranges(&[range]).unwrap(), device)
    }

    pub(crate) fn with(memory: GuestMemoryMmap, device: Arc<dyn Device>) -> Self {
        Self::with_page(memory, Page::alone().unwrap(), device)
    }

    /// A guest whose device has its registers on this page.
    pub(crate) fn on(page: Page, device: Arc<dyn Device>) -> Self {
        let range = (GuestAddress(0), MEMORY as usize);
        Self::with_page(GuestMemoryMmap::from_ranges(&[range]).unwrap(), page, device)
    }

    pub(crate) fn with_page(memory: GuestMemoryMmap, page: Page, device: Arc<dyn Device>) -> Self {
        let faults: Arc<Mutex<VecDeque<_>>> = Arc::default();
        let on_fault: OnFault = {
            let faults = faults.clone();
            Arc::new(move |queue, fault| {
                faults.lock().unwrap().push_back((queue, fault.to_string()));
            })
        };
        let interrupt = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let places = RefCell::new(vec![Place::default(); device.queues().len()]);
        let shared = GuestMemoryAtomic::new(memory.clone());
        let line = Arc::new(Event::from(interrupt.try_clone().unwrap()));
        let mmio = Mmio::new(device, shared, line, page, on_fault).unwrap();
        Self { memory, mmio, faults, interrupt, places }
    }

    /// The same guest before another device, as after a snapshot.
    pub(crate) fn moved_to(&self, device: Arc<dyn Device>) -> Self {
        let other = Self::with(self.memory.clone(), device);
        other.places.replace(self.places.borrow().clone());
        other
    }

    pub(crate) fn get(&self, register: u32) -> u32 {
        let mut word = [0xee; 4];
        self.mmio.read(register.into(), &mut word);
        u32::from_le_bytes(word)
    }

    pub(crate) fn set(&self, register: u32, value: u32) {
        self.mmio.write(register.into(), &value.to_le_bytes());
    }

    /// Adds bits to the status, as drivers do. Returns what it is then.
    pub(crate) fn add_status(&self, bits: u32) -> u32 {
        self.set(register::STATUS, self.get(register::STATUS) | bits);
        self.get(register::STATUS)
    }

    pub(crate) fn offered(&self) -> u64 {
        let word = |select| {
            self.set(register::DEVICE_FEATURES_SEL, select);
            u64::from(self.get(register::DEVICE_FEATURES))
        };
        word(0) | word(1) << 32
    }

    pub(crate) fn accept(&self, features: u64) {
        for (select, word) in [(1, (features >> 32) as u32), (0, features as u32)] {
            self.set(register::DRIVER_FEATURES_SEL, select);
            self.set(register::DRIVER_FEATURES, word);
        }
    }

    /// Everything up to the queues.
    pub(crate) fn negotiate(&self) {
        self.set(register::STATUS, 0);
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        self.accept(self.offered());
        assert_eq!(self.add_status(FEATURES_OK), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    /// Says where a queue is, with its rings empty.
    pub(crate) fn place(&self, queue: u32) {
        self.memory.write_slice(&[0; 0x1000], GuestAddress(table(queue))).unwrap();
        self.places.borrow_mut()[queue as usize] = Place::default();
        self.set(register::QUEUE_SEL, queue);
        self.set(register::QUEUE_NUM, SIZE.into());
        for (low, high, address) in [
            (register::QUEUE_DESC_LOW, register::QUEUE_DESC_HIGH, table(queue)),
            (register::QUEUE_AVAIL_LOW, register::QUEUE_AVAIL_HIGH, available(queue)),
            (register::QUEUE_USED_LOW, register::QUEUE_USED_HIGH, used(queue)),
        ] {
            self.set(low, address as u32);
            self.set(high, (address >> 32) as u32);
        }
    }

    /// Makes the queue ready that has been placed last. Returns whether it is.
    pub(crate) fn ready(&self) -> bool {
        self.set(register::QUEUE_READY, 1);
        self.get(register::QUEUE_READY) == 1
    }

    /// The whole set-up.
    pub(crate) fn start(&self) {
        self.negotiate();
        let queues = self.mmio.kicks().count() as u32;
        for queue in 0..queues {
            self.place(queue);
            assert!(self.ready());
        }
        assert_ne!(self.add_status(DRIVER_OK) & DRIVER_OK, 0);
    }

    /// Makes a chain of buffers (address, length, flags but NEXT) available. Returns its name.
    pub(crate) fn offer(&self, queue: u32, buffers: &[(u64, u32, u32)]) -> u16 {
        let place = &mut self.places.borrow_mut()[queue as usize];
        let head = place.descriptor;
        for (number, (address, len, flags)) in buffers.iter().enumerate() {
            let index = place.descriptor;
            place.descriptor = (index + 1) % SIZE;
            let last = number + 1 == buffers.len();
            let flags = (flags | if last { 0 } else { NEXT }) as u16;
            let mut bytes = [&address.to_le_bytes()[..], &len.to_le_bytes()].concat();
            bytes.extend([flags.to_le_bytes(), place.descriptor.to_le_bytes()].concat());
            let at = table(queue) + 16 * u64::from(index);
            self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        }
        let next = self.number(available(queue) + 2);
        self.set_number(available(queue) + 4 + 2 * u64::from(next % SIZE), head);
        self.set_number(available(queue) + 2, next.wrapping_add(1));
        head
    }

    pub(crate) fn kick(&self, queue: u32) {
        self.set(register::QUEUE_NOTIFY, queue);
    }

    /// The next chain that the device has given back, if there is one: its name, and how much was written to it.
    pub(crate) fn take(&self, queue: u32) -> Option<(u16, u32)> {
        let place = &mut self.places.borrow_mut()[queue as usize];
        if self.number(used(queue) + 2) == place.seen {
            return None;
        }
        let at = used(queue) + 4 + 8 * u64::from(place.seen % SIZE);
        place.seen = place.seen.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        Some((head as u16, self.memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    /// As [`take`](Self::take), which waits for it.
    pub(crate) fn wait(&self, queue: u32) -> (u16, u32) {
        loop {
            // The event index asks for an interrupt with the next one.
            let seen = self.places.borrow()[queue as usize].seen;
            self.set_number(available(queue) + 4 + 2 * u64::from(SIZE), seen);
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            if let Some(used) = self.take(queue) {
                return used;
            }
            self.interrupted();
        }
    }

    /// Waits for an interrupt. Returns its reasons, which are acknowledged.
    pub(crate) fn interrupted(&self) -> u32 {
        let mut fds = [PollFd::from_borrowed_fd(self.interrupt.as_fd(), PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&PATIENCE)).unwrap(), 1, "no interrupt");
        self.interrupts();
        let reasons = self.get(register::INTERRUPT_STATUS);
        self.set(register::INTERRUPT_ACK, reasons);
        reasons
    }

    /// How many interrupts there were since the last one that was seen.
    pub(crate) fn interrupts(&self) -> u64 {
        let mut count = [0; 8];
        let read = rustix::io::read(&self.interrupt, &mut count);
        read.map_or(0, |_| u64::from_ne_bytes(count))
    }

    pub(crate) fn number(&self, at: u64) -> u16 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub(crate) fn set_number(&self, at: u64, number: u16) {
        self.memory.write_obj(number, GuestAddress(at)).unwrap();
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }
}
