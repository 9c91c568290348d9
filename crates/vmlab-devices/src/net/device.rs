//! The device: its two queues, and the headers of frames in them.

use std::io;
use std::mem::offset_of;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::PollFlags;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, virtio_net_config, virtio_net_hdr_v1,
};

use super::backend::{Backend, Received, Sent};
use super::frame::{MAX_FRAME, MIN_FRAME, MacAddress};
use crate::device::{Device, QueueKind};
use crate::queue::{QueueError, Turn, VirtQueue, lock};
use crate::sandbox::{self, Work};
use crate::workers::{wait_for, wait_for_stop};

/// The size of both rings, as of other monitors.
const RING: u16 = 256;

/// The queue of frames for the guest; the other one has those of the guest.
const RECEIVE: usize = 0;

/// The bytes before each frame. Without offloads, nothing in them says anything, except as below.
const HEADER: usize = size_of::<virtio_net_hdr_v1>();

/// A virtio-net device.
pub struct Net {
    backend: Box<dyn Backend>,
    address: MacAddress,
    mtu: Option<u16>,
    receive: Mutex<Receive>,
    transmit: Mutex<Box<[u8]>>,
    counters: Counters,
    sandbox: bool,
}

/// What became of frames, since the device is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames that the guest got.
    pub received: u64,
    /// Frames for the guest that it had too little room for, or that were longer than any.
    pub dropped: u64,
    /// Frames that the guest sent.
    pub sent: u64,
    /// What the guest sent and was no frame: too short or too long.
    pub refused: u64,
    /// Frames of the guest that the host's side had no room for.
    pub lost: u64,
}

#[derive(Debug, Default)]
struct Counters {
    received: AtomicU64,
    dropped: AtomicU64,
    sent: AtomicU64,
    refused: AtomicU64,
    lost: AtomicU64,
}

/// Frames on their way to the guest.
struct Receive {
    buffer: Box<[u8]>,
    /// There is a frame of so many bytes for which the guest gave no buffer yet.
    held: Option<usize>,
}

impl Net {
    /// A network interface with this address. Guests are told an MTU if there is one.
    pub fn new(backend: Box<dyn Backend>, address: MacAddress, mtu: Option<u16>) -> Self {
        // One byte more than a frame, to tell longer ones.
        let room = || vec![0; MAX_FRAME + 1].into();
        let receive = Mutex::new(Receive { buffer: room(), held: None });
        let (transmit, counters) = (Mutex::new(room()), Counters::default());
        Self { backend, address, mtu, receive, transmit, counters, sandbox: true }
    }

    /// Sets whether its threads keep no rights but those that they need, as they do unless set.
    #[must_use]
    pub fn sandbox(self, sandbox: bool) -> Self {
        Self { sandbox, ..self }
    }

    /// What became of frames.
    pub fn traffic(&self) -> Traffic {
        let Counters { received, dropped, sent, refused, lost } = &self.counters;
        let [received, dropped, sent, refused, lost] =
            [received, dropped, sent, refused, lost].map(|counter| counter.load(Ordering::Relaxed));
        Traffic { received, dropped, sent, refused, lost }
    }

    /// Gives the guest frames until it has no buffers or the queue stops. A buffer is taken only once there is a frame
    /// for it, so none is in hand while this waits.
    fn receive(&self, queue: &VirtQueue) -> Result<(), QueueError> {
        let Receive { buffer, held } = &mut *lock(&self.receive);
        while !queue.stopped() && queue.has_request()? {
            let length = match *held {
                Some(length) => length,
                None => match self.backend.receive(buffer) {
                    Received::Frame(length) => length,
                    Received::Nothing if wait_for(self.backend.socket(), PollFlags::IN) => continue,
                    Received::Nothing => return Ok(()),
                    Received::Gone => {
                        wait_for_stop();
                        return Ok(());
                    }
                },
            };
            *held = Some(length);
            // Taken anew each time, for it may get other regions while frames keep coming.
            let memory = queue.memory();
            // Requests that were there may all have been malformed.
            let Some(mut chain) = queue.pop(&memory)? else { continue };
            *held = None;
            let fits = length <= MAX_FRAME && chain.writable() >= HEADER + length;
            let written = if fits {
                // Nothing but the number of buffers, which is 1 (virtio 1.2, 5.1.6.4.1).
                let mut header = [0; HEADER];
                header[offset_of!(virtio_net_hdr_v1, num_buffers)] = 1;
                chain.write(0, &header) + chain.write(HEADER, &buffer[..length])
            } else {
                // Guests take a buffer without anything in it for a frame that was lost.
                0
            };
            count(if fits { &self.counters.received } else { &self.counters.dropped });
            queue.complete(&memory, chain.head(), written as u32)?;
        }
        Ok(())
    }

    /// Sends the guest's frames. Each is copied and its buffers given back before it is sent, so that none are in hand
    /// while this waits.
    fn transmit(&self, queue: &VirtQueue) -> Result<(), QueueError> {
        let buffer = &mut *lock(&self.transmit);
        while self.flush() {
            // Taken anew each time, as above.
            let memory = queue.memory();
            let Some(chain) = queue.pop(&memory)? else { return Ok(()) };
            let length = chain.read(HEADER, buffer);
            queue.complete(&memory, chain.head(), 0)?;
            if !(MIN_FRAME..=MAX_FRAME).contains(&length) {
                count(&self.counters.refused);
                continue;
            }
            match self.backend.send(&buffer[..length]) {
                Sent::Whole | Sent::Partly => count(&self.counters.sent),
                Sent::Lost => count(&self.counters.lost),
            }
        }
        Ok(())
    }

    /// Waits until nothing is left of the frame before. False when the queue is to stop before that.
    fn flush(&self) -> bool {
        while self.backend.flush() == Sent::Partly {
            if !wait_for(self.backend.socket(), PollFlags::OUT) {
                return false;
            }
        }
        true
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Device for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queues(&self) -> Vec<QueueKind> {
        vec![QueueKind { max_size: RING, workers: 1 }; 2]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC | u64::from(self.mtu.is_some()) << VIRTIO_NET_F_MTU
    }

    fn config(&self) -> Vec<u8> {
        // What belongs to features that are not offered stays zero.
        let mut space = vec![0; offset_of!(virtio_net_config, mtu) + size_of::<u16>()];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(offset_of!(virtio_net_config, mac), &self.address.0);
        put(offset_of!(virtio_net_config, mtu), &self.mtu.unwrap_or_default().to_le_bytes());
        space
    }

    fn provides_config(&self) -> bool {
        true
    }

    fn prepare_thread(&self) -> io::Result<()> {
        if self.sandbox { sandbox::enter(Work::Frames) } else { Ok(()) }
    }

    fn process(&self, index: usize, queue: &VirtQueue, _: &mut Turn<'_>) -> Result<(), QueueError> {
        if index == RECEIVE { self.receive(queue) } else { self.transmit(queue) }
    }
}
