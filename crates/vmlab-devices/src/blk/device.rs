//! The device: its queues, and who serves which request.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::blk::backend::{Backend, Buffers, Overlay, RawFile, lock};
use crate::blk::config::{Geometry, QUEUE_SIZE};
use crate::blk::options::Options;
use crate::blk::request::{HEADER, Limits, Refusal, Request, SERIAL, STATUS};
use crate::chain::Chain;
use crate::device::{Device, QueueKind};
use crate::queue::{QueueError, Turn, VirtQueue};
use crate::sandbox::{self, Work};

/// The most queues. More of them than a guest has CPUs are of no use, and each has threads.
pub const MAX_QUEUES: u16 = 16;

/// How many requests of one queue can be in progress at once. One that waits for a disk leaves the others free.
const WORKERS: usize = 4;

/// The most bytes that are read or written by the thread that takes the next request as well. To copy them
/// takes less time than to wake another thread.
const INLINE: usize = 32 << 10;

/// A virtio-blk device.
pub struct Blk {
    backend: Box<dyn Backend>,
    limits: Limits,
    serial: [u8; SERIAL],
    queues: u16,
    sandbox: bool,
}

/// Where the content of a disk is, and what becomes of what is written to it.
#[derive(Debug)]
pub enum Source {
    /// A file that is open for reading alone: the guest's writes are refused.
    ReadOnly(File),
    /// A file that is written to.
    Kept(File),
    /// The same for one that nobody will read after the guest: its flushes wait for no disk of the host.
    Scratch(File),
    /// A file that is read; what is written is gone with the device.
    Discarded(File),
}

/// A disk that cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Its file.
    #[error("the length of the disk's file cannot be found out")]
    Length(#[source] io::Error),
    /// Its file again.
    #[error("the disk's file cannot be locked")]
    Lock(#[source] io::Error),
    /// Somebody else writes to the file, or would see what is written to it.
    #[error(
        "the disk is in use: another VM has a lock on its file, and one of the two writes to it"
    )]
    InUse,
    /// Its file and its block size.
    #[error(
        "the disk has {bytes} bytes, which are not whole blocks of {block}; use a block size that divides them"
    )]
    Blocks {
        /// Its length.
        bytes: u64,
        /// The size of its blocks.
        block: u32,
    },
    /// No place for what the guest writes.
    #[error("no file can be made in TMPDIR (or else /var/tmp) for what is written to the disk")]
    Overlay(#[source] io::Error),
    /// No log of its changes.
    #[error("the disk cannot be recorded to {}", path.display())]
    Record {
        /// The log.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Options that make no sense.
    #[error("a disk has from 1 to {MAX_QUEUES} queues, not {0}")]
    Queues(u16),
}

impl Blk {
    /// A disk with this back end and serial number, of which what is longer than 20 bytes is cut off. `options` say
    /// how many queues it has, and of which size its blocks are.
    ///
    /// # Errors
    /// It does not consist of such blocks, or has no or too many queues.
    pub fn new(
        backend: Box<dyn Backend>,
        serial: &str,
        read_only: bool,
        options: &Options,
    ) -> Result<Self, OpenError> {
        let (block, queues) = (options.block_size, options.queues);
        let capacity = backend.capacity();
        if !capacity.is_multiple_of(block.sectors()) {
            let bytes = capacity.saturating_mul(crate::blk::SECTOR);
            return Err(OpenError::Blocks { bytes, block: block.bytes() });
        }
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(OpenError::Queues(queues));
        }
        let mut field = [0; SERIAL];
        for (to, from) in field.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let limits = Limits { capacity, block, read_only };
        Ok(Self { backend, limits, serial: field, queues, sandbox: true })
    }

    /// A disk of a file, which is locked as QEMU would, with all that `options` ask for in front of it.
    ///
    /// # Errors
    /// The file is no such disk, or what the options need cannot be made.
    pub fn open(source: Source, serial: &str, options: &Options) -> Result<Self, OpenError> {
        let read_only = matches!(source, Source::ReadOnly(_));
        let (Source::ReadOnly(file)
        | Source::Kept(file)
        | Source::Scratch(file)
        | Source::Discarded(file)) = &source;
        if !lock(file, matches!(source, Source::Kept(_) | Source::Scratch(_)))
            .map_err(OpenError::Lock)?
        {
            return Err(OpenError::InUse);
        }
        let raw = |file| RawFile::new(file).map_err(OpenError::Length);
        let backend: Box<dyn Backend> = match source {
            Source::ReadOnly(file) | Source::Kept(file) => Box::new(raw(file)?),
            Source::Scratch(file) => Box::new(raw(file)?.scratch()),
            Source::Discarded(file) => {
                Box::new(Overlay::new(raw(file)?).map_err(OpenError::Overlay)?)
            }
        };
        Self::new(options.stack(backend)?, serial, read_only, options)
    }

    /// Sets whether its threads keep no rights but those that they need, as they do unless set.
    #[must_use]
    pub fn sandbox(self, sandbox: bool) -> Self {
        Self { sandbox, ..self }
    }

    /// Serves a request. Returns how many bytes were written to its room before the status.
    fn serve(
        &self,
        request: Result<Request, Refusal>,
        chain: &mut Chain<'_>,
    ) -> Result<usize, Refusal> {
        let room = chain.writable().saturating_sub(STATUS);
        let failed = |_: io::Error| Refusal::Bad;
        let backend = &self.backend;
        match request? {
            Request::Read(sectors) => {
                let room_of = Buffers::of(chain.parts().1, 0, room);
                backend.read(sectors, &room_of).map_err(failed)?;
                Ok(room)
            }
            Request::Write(sectors) => {
                let data = Buffers::of(chain.parts().0, HEADER, usize::MAX);
                backend.write(sectors, &data).map_err(failed)?;
                Ok(0)
            }
            Request::Flush => backend.flush().map_err(failed).map(|()| 0),
            Request::Discard(ranges) => {
                let mut ranges = ranges.into_iter();
                ranges.try_for_each(|sectors| backend.discard(sectors)).map_err(failed)?;
                Ok(0)
            }
            Request::WriteZeroes(ranges) => {
                let zero = |(sectors, unmap)| backend.write_zeroes(sectors, unmap);
                ranges.into_iter().try_for_each(zero).map_err(failed)?;
                Ok(0)
            }
            Request::GetId => Ok(chain.write(0, &self.serial)),
        }
    }

    /// Serves a read that need not wait.
    fn serve_at_once(
        &self,
        request: &Result<Request, Refusal>,
        chain: &mut Chain<'_>,
    ) -> Option<Result<usize, Refusal>> {
        let Ok(Request::Read(sectors)) = *request else { return None };
        let room = chain.writable().saturating_sub(STATUS);
        if room > INLINE {
            return None;
        }
        let read = self.backend.read_at_once(sectors, &Buffers::of(chain.parts().1, 0, room))?;
        Some(read.map(|()| room).map_err(|_| Refusal::Bad))
    }

    /// Whether others should not wait for a request.
    fn may_take_long(&self, request: &Result<Request, Refusal>, chain: &Chain<'_>) -> bool {
        match request {
            Err(_) | Ok(Request::GetId) => false,
            Ok(Request::Write(_)) => chain.readable() > INLINE || self.backend.writes_may_wait(),
            Ok(_) => true,
        }
    }
}

impl Device for Blk {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queues(&self) -> Vec<QueueKind> {
        vec![QueueKind { max_size: QUEUE_SIZE, workers: WORKERS }; self.queues.into()]
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        let writable = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
        let read_only = [VIRTIO_BLK_F_RO];
        let more = if self.limits.read_only { &read_only[..] } else { &writable[..] };
        always.iter().chain(more).fold(0, |features, bit| features | 1 << bit)
    }

    fn config(&self) -> Vec<u8> {
        let Limits { capacity, block, .. } = self.limits;
        Geometry { capacity, block, queues: self.queues }.space()
    }

    fn provides_config(&self) -> bool {
        true
    }

    fn prepare_thread(&self) -> io::Result<()> {
        if self.sandbox { sandbox::enter(Work::Disk) } else { Ok(()) }
    }

    fn process(&self, _: usize, queue: &VirtQueue, turn: &mut Turn<'_>) -> Result<(), QueueError> {
        // A kernel takes the status that was there before for the request's own.
        let refuse = |chain: &mut Chain<'_>| u32::from(chain.write_last(VIRTIO_BLK_S_IOERR as u8));
        loop {
            // Taken anew each time, for it may get other regions while requests keep coming.
            let memory = queue.memory();
            let Some(mut chain) = queue.pop_or(&memory, refuse)? else { return Ok(()) };
            let request = Request::of(&chain, self.limits);
            let result = match self.serve_at_once(&request, &mut chain) {
                Some(result) => result,
                None => {
                    if self.may_take_long(&request, &chain) {
                        turn.hand_over();
                    }
                    self.serve(request, &mut chain)
                }
            };
            let (status, written) = match result {
                Ok(written) => (VIRTIO_BLK_S_OK, written),
                Err(Refusal::Bad) => (VIRTIO_BLK_S_IOERR, 0),
                Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            };
            // Without room for a status, nobody can be told.
            let written = match chain.write_last(status as u8) {
                true => written + STATUS,
                false => 0,
            };
            queue.complete(&memory, chain.head(), written as u32)?;
            if !turn.held() {
                return Ok(());
            }
        }
    }
}
