//! The device: which queues there are, and who serves which request.

use std::io;
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vmlab_fuse::abi::{self, Opcode};
use vmlab_fuse::{FileSystem, Passthrough, Server};

use crate::chain::Chain;
use crate::device::{Device, QueueKind};
use crate::fs::buffers::{Reply, Request};
use crate::queue::{QueueError, Turn, VirtQueue};

/// The most bytes of a tag: `struct virtio_fs_config` in `linux/virtio_fs.h`.
pub const MAX_TAG: usize = 36;

/// The size of every ring. A request of 1 MiB in pages of 4 KiB has 256 buffers and its headers, and a guest
/// asks for no more at once than the ring could hold without indirect tables.
const RING: u16 = 1024;

/// How many requests of one queue can be in progress at once. One that waits for a disk or a network leaves
/// the others free.
const WORKERS: usize = 4;

/// A virtio-fs device.
#[derive(Debug)]
pub struct Fs<F> {
    server: Server<F>,
    tag: [u8; MAX_TAG],
    request_queues: u32,
}

impl<F: FileSystem> Fs<F> {
    /// A device that the guest mounts by this tag; what is longer than [`MAX_TAG`] is cut off. It has one
    /// high-priority queue and so many for requests.
    pub fn new(server: Server<F>, tag: &str, request_queues: u32) -> Self {
        let mut field = [0; MAX_TAG];
        for (to, from) in field.iter_mut().zip(tag.bytes()) {
            *to = from;
        }
        Self { server, tag: field, request_queues: request_queues.max(1) }
    }

    /// The server.
    pub fn server(&self) -> &Server<F> {
        &self.server
    }
}

impl Fs<Passthrough> {
    /// The same device for another guest, which goes on where this one is: see [`Passthrough::duplicate`].
    ///
    /// # Errors
    /// There are no more descriptors.
    pub fn duplicate(&self, durable: Arc<AtomicBool>) -> io::Result<Self> {
        let fs = self.server.filesystem().duplicate(durable)?;
        let server = self.server.continued(fs);
        Ok(Self { server, tag: self.tag, request_queues: self.request_queues })
    }
}

impl<F: FileSystem> Device for Fs<F> {
    fn id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queues(&self) -> Vec<QueueKind> {
        let high_priority = QueueKind { max_size: RING, workers: 1 };
        let requests = QueueKind { max_size: RING, workers: WORKERS };
        let requests = (0..self.request_queues).map(|_| requests);
        std::iter::once(high_priority).chain(requests).collect()
    }

    fn config(&self) -> Vec<u8> {
        [&self.tag[..], &self.request_queues.to_le_bytes()].concat()
    }

    fn prepare_thread(&self) -> io::Result<()> {
        self.server.filesystem().prepare_thread()
    }

    fn process(&self, _: usize, queue: &VirtQueue, turn: &mut Turn<'_>) -> Result<(), QueueError> {
        // A kernel takes a reply without a header for success.
        let refuse = |chain: &mut Chain<'_>| {
            let (request, room) = chain.parts();
            let mut reply = Reply { room, before_waiting: &mut || {} };
            self.server.refuse(&Request(request), &mut reply) as u32
        };
        loop {
            // Taken anew each time, for it may get other regions while requests keep coming.
            let memory = queue.memory();
            let Some(mut chain) = queue.pop_or(&memory, refuse)? else { return Ok(()) };
            if may_take_long(&chain) {
                turn.hand_over();
            }
            let head = chain.head();
            let (request, room) = chain.parts();
            let mut reply = Reply { room, before_waiting: &mut || turn.hand_over() };
            let written = self.server.serve(&Request(request), &mut reply);
            queue.complete(&memory, head, written as u32)?;
            if !turn.held() {
                return Ok(());
            }
        }
    }
}

/// The most bytes that are read or written by the thread that takes the next request as well. To copy them
/// takes less time than to wake another thread.
const INLINE: u32 = 32 << 10;

/// Whether a request may wait for a disk. Those that need names and attributes alone come in great numbers
/// and are answered faster than another thread wakes up; so are short reads, which do not wait before
/// they have handed over the turn, and short writes, which go to the host's page cache.
fn may_take_long(request: &Chain<'_>) -> bool {
    match opcode(request) {
        Some(Opcode::Read) => {
            argument(request, offset_of!(abi::ReadIn, size)).is_none_or(|size| size > INLINE)
        }
        Some(Opcode::Write) => {
            let size = argument(request, offset_of!(abi::WriteIn, size));
            let flags = argument(request, offset_of!(abi::WriteIn, flags));
            let synchronous = |flags| flags & libc::O_DSYNC.cast_unsigned() != 0;
            size.is_none_or(|size| size > INLINE) || flags.is_none_or(synchronous)
        }
        opcode => matches!(
            opcode,
            Some(
                Opcode::Fsync
                    | Opcode::FsyncDir
                    | Opcode::SyncFs
                    | Opcode::Flush
                    | Opcode::Fallocate
                    | Opcode::CopyFileRange
            )
        ),
    }
}

fn opcode(request: &Chain<'_>) -> Option<Opcode> {
    number(request, offset_of!(abi::InHeader, opcode)).and_then(Opcode::of)
}

/// A number of a request's arguments, which begin behind its header.
fn argument(request: &Chain<'_>, at: usize) -> Option<u32> {
    number(request, size_of::<abi::InHeader>() + at)
}

fn number(request: &Chain<'_>, at: usize) -> Option<u32> {
    let mut bytes = [0; size_of::<u32>()];
    (request.read(at, &mut bytes) == bytes.len()).then(|| u32::from_le_bytes(bytes))
}
