//! The device: its three queues.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFlags, epoll};
use rustix::net::SocketAddrUnix;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::muxer::Muxer;
use super::packet::{HEADER, Header, MAX_PAYLOAD, TRANSPORT_RESET};
use crate::device::{Device, DeviceStateError, QueueKind};
use crate::event::Event;
use crate::queue::{QueueError, Turn, VirtQueue, lock};
use crate::sandbox::{self, Work};
use crate::workers::wait_for;

/// The size of all rings, as of other monitors.
const RING: u16 = 256;

/// The queues: packets for the guest, packets of it, and events.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// The lowest context that a guest can have: those below are of the kernel's own making, and the host.
const FIRST_CID: u64 = 3;

/// What a device keeps for somebody else.
pub type Kept = Box<dyn Any + Send + Sync>;

/// A virtio-vsock device.
pub struct Vsock {
    cid: u64,
    muxer: Mutex<Muxer>,
    /// Readable when there may be packets for the guest.
    epoll: Arc<OwnedFd>,
    /// Makes it so.
    wake: Event,
    /// What the guest sent last.
    payload: Mutex<Box<[u8]>>,
    /// Signalled: the guest has yet to be told that all connections are over.
    reset: Event,
    sandbox: bool,
    /// The last one to go.
    _kept: Option<Kept>,
}

/// There can be no such device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The context is none of a guest's.
    #[error("a guest's context (CID) is a number from {FIRST_CID} to 4294967294, not {0}")]
    Cid(u64),
    /// The sockets' paths.
    #[error("the path {} is too long for the sockets of a guest", .0.display())]
    TooLong(PathBuf),
    /// The socket for programs of the host.
    #[error("no socket for connections to a guest can be made at {}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Descriptors.
    #[error("there are no descriptors for the sockets of a guest")]
    Resources(#[source] io::Error),
}

impl Vsock {
    /// A device of a guest with this context, whose sockets on the host are `base` and, for each port, `base` with
    /// `_PORT`. They should be in a directory that is this guest's alone. The first one is removed with the device.
    ///
    /// # Errors
    /// The context is none of a guest's, or the socket cannot be made: there may be one.
    pub fn new(cid: u64, base: &Path) -> Result<Self, OpenError> {
        if !(FIRST_CID..u64::from(u32::MAX)).contains(&cid) {
            return Err(OpenError::Cid(cid));
        }
        let mut longest = base.as_os_str().to_owned();
        longest.push(format!("_{}", u32::MAX));
        SocketAddrUnix::new(Path::new(&longest))
            .map_err(|_| OpenError::TooLong(base.to_owned()))?;
        let resources = |error: rustix::io::Errno| OpenError::Resources(error.into());
        let event = || Event::new().map_err(OpenError::Resources);
        let (wake, reset) = (event()?, event()?);
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).map_err(resources)?);
        let woken = wake.try_clone().map_err(OpenError::Resources)?;
        let muxer = Muxer::new(cid, base, Arc::clone(&epoll), woken)
            .map_err(|source| OpenError::Listen { path: base.to_owned(), source })?;
        let payload = Mutex::new(vec![0; MAX_PAYLOAD].into());
        Ok(Self {
            cid,
            muxer: Mutex::new(muxer),
            epoll,
            wake,
            payload,
            reset,
            sandbox: true,
            _kept: None,
        })
    }

    /// Sets whether its threads keep no rights but those that they need, as they do unless set.
    #[must_use]
    pub fn sandbox(self, sandbox: bool) -> Self {
        Self { sandbox, ..self }
    }

    /// Keeps something as long as the device and its sockets are there, such as a lock on their directory.
    #[must_use]
    pub fn keeping(self, kept: Kept) -> Self {
        Self { _kept: Some(kept), ..self }
    }

    /// Ends all connections, and has the guest told, as where it goes on from a snapshot. It then asks for its context
    /// anew.
    pub fn end_connections(&self) {
        lock(&self.muxer).reset();
        self.reset.signal();
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        lock(&self.muxer).connections()
    }

    /// Gives the guest packets until it has no buffers or the queue stops. A buffer is taken only once there is a packet
    /// for it, so none is in hand while this waits.
    fn receive(&self, queue: &VirtQueue) -> Result<(), QueueError> {
        while !queue.stopped() && queue.has_request()? {
            if !lock(&self.muxer).stage() {
                if !wait_for(self.epoll.as_fd(), PollFlags::IN) {
                    return Ok(());
                }
                continue;
            }
            // Taken anew each time, for it may get other regions while packets keep coming.
            let memory = queue.memory();
            // Requests that were there may all have been malformed.
            let Some(mut chain) = queue.pop(&memory)? else { continue };
            let written = lock(&self.muxer).give(&mut chain);
            queue.complete(&memory, chain.head(), written as u32)?;
        }
        Ok(())
    }

    /// Takes the guest's packets. Nothing here waits for a program of the host.
    fn transmit(&self, queue: &VirtQueue) -> Result<(), QueueError> {
        let buffer = &mut *lock(&self.payload);
        loop {
            // Taken anew each time, as above.
            let memory = queue.memory();
            let Some(chain) = queue.pop(&memory)? else { return Ok(()) };
            let mut header = [0; HEADER];
            let whole = chain.read(0, &mut header) == HEADER;
            let header = Header::parse(&header);
            let room = buffer.get_mut(..header.length as usize);
            let payload = room.and_then(|room| {
                let there = chain.read(HEADER, room) == room.len();
                there.then_some(&*room)
            });
            queue.complete(&memory, chain.head(), 0)?;
            if whole {
                let mut muxer = lock(&self.muxer);
                muxer.packet(&header, payload);
                if muxer.has_work() {
                    self.wake.signal();
                }
            }
        }
    }

    /// Tells the guest that all connections are over, when they are.
    fn tell(&self, queue: &VirtQueue) -> Result<(), QueueError> {
        while !queue.stopped() && queue.has_request()? {
            if !wait_for(self.reset.as_fd(), PollFlags::IN) {
                return Ok(());
            }
            let memory = queue.memory();
            let Some(mut chain) = queue.pop(&memory)? else { continue };
            let written = chain.write(0, &TRANSPORT_RESET.to_le_bytes());
            if written == size_of_val(&TRANSPORT_RESET) {
                // However often it was reset since the last time.
                self.reset.clear();
            }
            queue.complete(&memory, chain.head(), written as u32)?;
        }
        Ok(())
    }
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queues(&self) -> Vec<QueueKind> {
        vec![QueueKind { max_size: RING, workers: 1 }; 3]
    }

    fn config(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn provides_config(&self) -> bool {
        true
    }

    fn prepare_thread(&self) -> io::Result<()> {
        if self.sandbox { sandbox::enter(Work::Connections) } else { Ok(()) }
    }

    fn process(&self, index: usize, queue: &VirtQueue, _: &mut Turn<'_>) -> Result<(), QueueError> {
        match index {
            RECEIVE => self.receive(queue),
            TRANSMIT => self.transmit(queue),
            _ => self.tell(queue),
        }
    }

    /// A driver that begins knows of no connection.
    fn reset(&self) {
        lock(&self.muxer).reset();
        self.reset.clear();
    }

    /// Connections do not go on: what is at their other ends is no part of the guest's state.
    fn restore(&self, state: &[u8]) -> Result<(), DeviceStateError> {
        self.check(state)?;
        self.end_connections();
        Ok(())
    }
}
