//! The guest's side of a ring, as wrong as a test wants it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmlab_devices::{Device, Interrupt, QueueError, Turn, VirtQueue};

#[allow(unused_imports, reason = "not every test uses all of it")]
pub(crate) use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT as INDIRECT, VRING_DESC_F_NEXT as NEXT, VRING_DESC_F_WRITE as WRITE,
};

/// The guest has this many bytes from address 0 on.
pub(crate) const MEMORY: u64 = 8 << 20;
pub(crate) const SIZE: u16 = 8;
pub(crate) const TABLE: u64 = 0x1000;
pub(crate) const AVAILABLE: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;
/// Free for buffers from here on.
pub(crate) const BUFFERS: u64 = 0x10_000;

#[derive(Default)]
pub(crate) struct Interrupts(AtomicU64);

impl Interrupt for Interrupts {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

pub(crate) struct Driver {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) queue: Arc<VirtQueue>,
    interrupts: Arc<Interrupts>,
}

impl Driver {
    pub(crate) fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY).unwrap();
        let range = (GuestAddress(0), MEMORY as usize, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        let interrupts = Arc::new(Interrupts::default());
        let shared = GuestMemoryAtomic::new(memory.clone());
        let queue = Arc::new(VirtQueue::new(queue, shared, interrupts.clone()));
        Self { memory, queue, interrupts }
    }

    /// Writes a descriptor: `struct virtq_desc`.
    pub(crate) fn describe_at(&self, table: u64, index: u16, of: (u64, u32, u32, u16)) {
        let (address, len, flags, next) = of;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&(flags as u16).to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(table).unchecked_add(u64::from(index) * 16);
        self.memory.write_slice(&bytes, at).unwrap();
    }

    pub(crate) fn describe(&self, index: u16, of: (u64, u32, u32, u16)) {
        self.describe_at(TABLE, index, of);
    }

    /// Makes a chain available.
    pub(crate) fn offer(&self, head: u16) {
        let next = self.number(AVAILABLE + 2);
        self.set(AVAILABLE + 4 + 2 * u64::from(next % SIZE), head);
        self.set(AVAILABLE + 2, next.wrapping_add(1));
    }

    /// The used ring from its beginning: heads and lengths.
    pub(crate) fn used(&self) -> Vec<(u32, u32)> {
        let element = |place: u16| {
            let at = USED + 4 + 8 * u64::from(place % SIZE);
            (
                self.memory.read_obj(GuestAddress(at)).unwrap(),
                self.memory.read_obj(GuestAddress(at + 4)).unwrap(),
            )
        };
        (0..self.number(USED + 2)).map(element).collect()
    }

    pub(crate) fn number(&self, at: u64) -> u16 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub(crate) fn set(&self, at: u64, number: u16) {
        self.memory.write_obj(number, GuestAddress(at)).unwrap();
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub(crate) fn interrupts(&self) -> u64 {
        self.interrupts.0.load(Ordering::SeqCst)
    }
}

/// Has a device serve a queue, by a thread that has given up what those do that serve one.
pub(crate) fn process(
    device: &dyn Device,
    index: usize,
    queue: &VirtQueue,
) -> Result<(), QueueError> {
    let serve = || {
        device.prepare_thread().unwrap();
        let mutex = Mutex::new(());
        device.process(index, queue, &mut Turn::take(&mutex))
    };
    std::thread::scope(|scope| scope.spawn(serve).join().unwrap())
}
