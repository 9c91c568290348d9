//! What a guest writes to a ring, its descriptors and its buffers, before a virtio-fs device.
#![no_main]

use std::alloc::{Layout, alloc_zeroed};
use std::ptr;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmlab_devices::fs::{Fs, Server};
use vmlab_fuse::testing::{Answers, Fake, init};
use vmlab_fuzz::ring::{REGIONS, play, queue};

/// Before, between and behind the regions of memory.
const GUARD: usize = 0x1000;

const TOTAL: usize = GUARD + REGIONS[0] + GUARD + REGIONS[1] + GUARD;

/// What is in the guards.
const UNTOUCHED: u8 = 0xa5;

/// Memory for the guest, with guards, the same in all runs.
struct Block(*mut u8);

// SAFETY: the block is never freed, and only the one thread that runs the target reaches into it.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

static BLOCK: OnceLock<Block> = OnceLock::new();

impl Block {
    fn get() -> &'static Self {
        BLOCK.get_or_init(|| {
            let layout = Layout::from_size_align(TOTAL, GUARD).expect("a layout");
            // SAFETY: the layout is not empty.
            Self(unsafe { alloc_zeroed(layout) })
        })
    }

    fn guards() -> [usize; 3] {
        [0, GUARD + REGIONS[0], TOTAL - GUARD]
    }

    /// The guest's memory, all zero, its two regions without a gap for the guest.
    fn guest(&self) -> GuestMemoryMmap {
        // SAFETY: so many bytes are there, and no slice of an earlier run is left.
        unsafe { ptr::write_bytes(self.0, UNTOUCHED, TOTAL) };
        let mut guest = 0;
        let region = |place: usize| {
            let at = Self::guards()[place] + GUARD;
            // SAFETY: the range is inside of the block, which outlives every region.
            let region = unsafe {
                let start = self.0.add(at);
                ptr::write_bytes(start, 0, REGIONS[place]);
                MmapRegion::build_raw(start, REGIONS[place], 0, 0).expect("an aligned region")
            };
            let region = GuestRegionMmap::new(region, GuestAddress(guest)).expect("an address");
            guest += region.len();
            region
        };
        GuestMemoryMmap::from_regions([0, 1].map(region).into()).expect("two regions")
    }

    fn is_untouched(&self) -> bool {
        Self::guards().iter().all(|guard| {
            // SAFETY: the guard is inside of the block, and nothing writes to it at this time.
            let bytes = unsafe { std::slice::from_raw_parts(self.0.add(*guard), GUARD) };
            bytes.iter().all(|byte| *byte == UNTOUCHED)
        })
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&[how, next], data)) = data.split_first_chunk() else { return };
    let memory = Block::get().guest();
    // Rings wrap around.
    let begin = if how & 2 != 0 { u16::MAX - u16::from(next % 8) } else { 0 };
    let queue = queue(&memory, how & 1 != 0, begin);
    let answers = Answers { read_only: how & 4 != 0, ..Default::default() };
    let fake = Fake::new(answers, &[b'x'; 0x6000]).expect("a file in memory");
    let device = Fs::new(Server::new(fake), "tag", 1);
    assert_eq!(init(u64::MAX).serve(device.server(), 64).map(|reply| reply.error), Some(0));

    play(data, &memory, &device, (usize::from(how & 8 != 0), &queue));
    assert!(Block::get().is_untouched(), "written outside of the guest's memory");
    let size = device.server().filesystem().content().map_or(0, |content| content.len());
    assert!(size <= REGIONS[0] + REGIONS[1], "{size} bytes were written to a file");
});
