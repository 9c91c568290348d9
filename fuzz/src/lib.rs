//! What fuzz targets share.

pub mod boot;

/// A request of a guest, and the room that it gives for the reply.
#[derive(Debug)]
pub struct Request {
    /// The request, with its header.
    pub bytes: Vec<u8>,
    /// The room, in bytes.
    pub room: usize,
}

/// More requests than this show nothing new.
const MAX_REQUESTS: usize = 64;

/// Takes the input apart: for each request, two bytes of room (the highest bit: the length in the request's
/// header stays as it is), two of the request's length, the request.
pub fn requests(mut data: &[u8]) -> Vec<Request> {
    let mut requests = Vec::new();
    while let Some((&[a, b, c, d], rest)) = data.split_first_chunk() {
        if requests.len() == MAX_REQUESTS {
            break;
        }
        let (room, length) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        let (bytes, rest) = rest.split_at(rest.len().min(length.into()));
        let mut bytes = bytes.to_vec();
        let length = bytes.len() as u32;
        if room & 0x8000 == 0
            && let Some(len) = bytes.first_chunk_mut()
        {
            *len = length.to_ne_bytes();
        }
        requests.push(Request { bytes, room: usize::from(room & 0x7fff) });
        data = rest;
    }
    requests
}

/// The other way round.
pub fn input(requests: &[Request]) -> Vec<u8> {
    let mut out = Vec::new();
    for Request { bytes, room } in requests {
        out.extend_from_slice(&(*room as u16 & 0x7fff).to_le_bytes());
        out.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
        out.extend_from_slice(bytes);
    }
    out
}

pub mod mmio;

/// The rings of the guests of `virtqueue`, `blk`, `net`, `vsock` and `console`, and what they do with them.
pub mod ring {
    use std::sync::{Arc, Mutex};

    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
    use vmlab_devices::{Device, Interrupt, Turn, VirtQueue};

    /// The descriptors of a ring, a power of two.
    pub const SIZE: u16 = 16;
    /// The table of descriptors.
    pub const TABLE: u16 = 0;
    /// The ring of the driver.
    pub const AVAILABLE: u16 = 0x400;
    /// The ring of the device.
    pub const USED: u16 = 0x800;
    /// Free from here on.
    pub const BUFFERS: u16 = 0x1000;
    /// The bytes of the two regions of memory, one behind the other.
    pub const REGIONS: [usize; 2] = [0x8000, 0x4000];

    /// What the guest does.
    #[derive(Debug)]
    pub enum Act<'a> {
        /// Writes bytes to an address.
        Write(u16, &'a [u8]),
        /// Kicks the device, by one of its queues.
        Kick(u8),
    }

    /// More acts than this show nothing new.
    const MAX_ACTS: usize = 256;

    const KICK: u8 = 0x80;

    /// Takes the input apart: a byte with the highest bit is a kick of the queue that the others say; else follow two bytes of an address, one of
    /// a length, and so many bytes.
    pub fn acts(mut data: &[u8]) -> impl Iterator<Item = Act<'_>> {
        let next = move || {
            let (&what, rest) = data.split_first()?;
            data = rest;
            if what & KICK != 0 {
                return Some(Act::Kick(what & !KICK));
            }
            let (&[a, b, length], rest) = data.split_first_chunk()?;
            let (bytes, rest) = rest.split_at(rest.len().min(length.into()));
            data = rest;
            Some(Act::Write(u16::from_le_bytes([a, b]), bytes))
        };
        std::iter::from_fn(next).take(MAX_ACTS)
    }

    struct Interrupts;

    impl Interrupt for Interrupts {
        fn signal(&self) {}
    }

    /// A ring that is set up, with or without event indices, whose indices begin here.
    pub fn queue(memory: &GuestMemoryMmap, event_idx: bool, begin: u16) -> VirtQueue {
        queue_at(memory, event_idx, begin, 0)
    }

    /// The same behind a number of bytes.
    pub fn queue_at(memory: &GuestMemoryMmap, event_idx: bool, begin: u16, base: u16) -> VirtQueue {
        let mut queue = Queue::new(SIZE).expect("a power of two");
        for (set, at) in [
            (Queue::try_set_desc_table_address as fn(&mut _, _) -> _, TABLE),
            (Queue::try_set_avail_ring_address, AVAILABLE),
            (Queue::try_set_used_ring_address, USED),
        ] {
            set(&mut queue, GuestAddress((base + at).into())).expect("an aligned address");
        }
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue.set_next_avail(begin);
        queue.set_next_used(begin);
        let place = GuestAddress(u64::from(base + AVAILABLE) + 2);
        memory.write_obj(begin, place).expect("in memory");
        VirtQueue::new(queue, GuestMemoryAtomic::new(memory.clone()), Arc::new(Interrupts))
    }

    /// Does to a device's queue what the input says, and has all requests served. Each has to be given back, unless
    /// the ring breaks.
    pub fn play(
        data: &[u8],
        memory: &GuestMemoryMmap,
        device: &dyn Device,
        (index, queue): (usize, &VirtQueue),
    ) {
        let mutex = Mutex::new(());
        let serve = || loop {
            let mut turn = Turn::take(&mutex);
            if device.process(index, queue, &mut turn).is_err() {
                return false;
            }
            // One that hands its turn over may leave requests behind.
            if turn.held() {
                return true;
            }
        };
        let works = acts(data).all(|act| match act {
            Act::Write(address, bytes) => {
                // What is outside of memory is left out, as is the rest of what leads out of it.
                let _ = memory.write(bytes, GuestAddress(address.into()));
                true
            }
            Act::Kick(_) => serve(),
        });
        if works && serve() {
            let ring = queue.ring();
            assert_eq!(ring.next_used(), ring.next_avail(), "a request that was not given back");
        }
    }

    /// The other way round.
    pub fn input<'a>(acts: impl IntoIterator<Item = Act<'a>>) -> Vec<u8> {
        let mut out = Vec::new();
        for act in acts {
            match act {
                Act::Kick(queue) => out.push(KICK | queue),
                Act::Write(mut address, bytes) => {
                    for piece in bytes.chunks(usize::from(u8::MAX)) {
                        out.push(0);
                        out.extend(address.to_le_bytes());
                        out.push(piece.len() as u8);
                        out.extend(piece);
                        address += piece.len() as u16;
                    }
                }
            }
        }
        out
    }
}
