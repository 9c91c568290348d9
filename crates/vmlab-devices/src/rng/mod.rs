//! virtio-rng: random numbers of the host for the guest.

use std::io;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::chain::Chain;
use crate::device::{Device, QueueKind};
use crate::queue::{QueueError, Turn, VirtQueue};
use crate::sandbox::{self, Work};

/// The most bytes for one request. Kernels ask for 64 at a time; a request for more gets less, which the
/// specification allows, and no guest keeps the host busy with one request.
pub const MAX_REQUEST: usize = 64 * 1024;

/// The size of its ring, as of other monitors.
const RING: u16 = 256;

/// The device.
#[derive(Debug)]
pub struct Rng {
    sandbox: bool,
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

impl Rng {
    /// A device.
    pub fn new() -> Self {
        Self { sandbox: true }
    }

    /// Sets whether its threads keep no rights but those that they need, as they do unless set.
    #[must_use]
    pub fn sandbox(self, sandbox: bool) -> Self {
        Self { sandbox }
    }
}

impl Device for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queues(&self) -> Vec<QueueKind> {
        vec![QueueKind { max_size: RING, workers: 1 }]
    }

    fn prepare_thread(&self) -> io::Result<()> {
        if self.sandbox { sandbox::enter(Work::Random) } else { Ok(()) }
    }

    fn process(&self, _: usize, queue: &VirtQueue, _: &mut Turn<'_>) -> Result<(), QueueError> {
        loop {
            // Taken anew each time, for it may get other regions while requests keep coming.
            let memory = queue.memory();
            let Some(mut chain) = queue.pop(&memory)? else { return Ok(()) };
            let written = fill(&mut chain);
            queue.complete(&memory, chain.head(), written as u32)?;
        }
    }
}

/// Fills a request's room with random bytes. Returns how many.
fn fill(chain: &mut Chain<'_>) -> usize {
    let wanted = chain.writable().min(MAX_REQUEST);
    let mut buffer = [0; 256];
    let mut done = 0;
    while done < wanted {
        let part = (wanted - done).min(buffer.len());
        // The kernel's generator fails only before it has been seeded, and up to 256 bytes come at once.
        let flags = rustix::rand::GetRandomFlags::empty();
        match rustix::rand::getrandom(&mut buffer[..part], flags) {
            Ok(count) if count > 0 => done += chain.write(done, &buffer[..count]),
            _ => break,
        }
    }
    done
}
