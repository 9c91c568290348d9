//! What a guest writes to a ring, its descriptors and its buffers, before a disk with all that can be in front of
//! one; and a log of it that is then read back.
#![no_main]

use std::fs::File;
use std::io::Read;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmlab_devices::blk::crash::Log;
use vmlab_devices::blk::{Blk, BlockSize, Options, Source};
use vmlab_devices::{Device, Interrupt, Turn, VirtQueue};
use vmlab_fuzz::ring::{AVAILABLE, Act, REGIONS, SIZE, TABLE, USED, acts};

/// The bytes of the disk.
const DISK: usize = 64 << 10;

struct Interrupts;

impl Interrupt for Interrupts {
    fn signal(&self) {}
}

fn disk() -> File {
    let file = tempfile::tempfile().expect("a file");
    std::os::unix::fs::FileExt::write_all_at(&file, &[b'd'; DISK], 0).expect("room");
    file
}

fn read(mut file: &File) -> Vec<u8> {
    let mut content = Vec::new();
    std::io::Seek::rewind(&mut file).expect("a file");
    file.read_to_end(&mut content).expect("a file");
    content
}

fuzz_target!(|data: &[u8]| {
    let Some((&[how], data)) = data.split_first_chunk() else { return };
    let total = REGIONS.iter().sum();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), total)]).expect("memory");
    let mut queue = Queue::new(SIZE).expect("a power of two");
    for (set, at) in [
        (Queue::try_set_desc_table_address as fn(&mut _, _) -> _, TABLE),
        (Queue::try_set_avail_ring_address, AVAILABLE),
        (Queue::try_set_used_ring_address, USED),
    ] {
        set(&mut queue, GuestAddress(at.into())).expect("an aligned address");
    }
    queue.set_event_idx(how & 1 != 0);
    queue.set_ready(true);
    let shared = GuestMemoryAtomic::new(memory.clone());
    let queue = VirtQueue::new(queue, shared, Arc::new(Interrupts));

    let (file, log) = (disk(), tempfile::NamedTempFile::new().expect("a file"));
    let own = file.try_clone().expect("a descriptor");
    let rules = ["tear:write:nth=3", "corrupt:read:p=0.1", "fail:discard:p=0.1"];
    let options = Options {
        faults: rules.iter().filter_map(|rule| rule.parse().ok()).take((how >> 4).into()).collect(),
        record: (how & 8 != 0).then(|| log.path().to_owned()),
        block_size: if how & 2 != 0 { BlockSize::B4096 } else { BlockSize::B512 },
        ..Options::default()
    };
    let kept = how & 4 != 0;
    let source = if kept { Source::Kept(own) } else { Source::ReadOnly(own) };
    let device = Blk::open(source, "serial", &options).expect("a disk");

    let mutex = Mutex::new(());
    let serve = || loop {
        let mut turn = Turn::take(&mutex);
        if device.process(0, &queue, &mut turn).is_err() {
            return false;
        }
        // One that hands its turn over may leave requests behind.
        if turn.held() {
            return true;
        }
    };
    let mut works = true;
    for act in acts(data) {
        match act {
            Act::Write(address, bytes) => {
                // What is outside of memory is left out, as is the rest of what leads out of it.
                let _ = memory.write(bytes, GuestAddress(address.into()));
            }
            Act::Kick => works = serve(),
        }
        if !works {
            break;
        }
    }
    works = works && serve();
    let ring = queue.ring();
    if works {
        assert_eq!(ring.next_used(), ring.next_avail(), "a request that was not given back");
    }
    let content = read(&file);
    assert_eq!(content.len(), DISK, "the disk has another length");
    if !kept {
        assert!(content.iter().all(|byte| *byte == b'd'), "a read-only disk was written to");
    }
    if options.record.is_some() {
        let log = Log::open(log.path()).expect("the log can be read");
        for entry in log.entries() {
            log.data(entry).expect("the data of an entry");
        }
    }
});
