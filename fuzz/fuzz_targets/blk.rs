//! What a guest writes to a ring, its descriptors and its buffers, before a disk with all that can be in front of
//! one; and a log of it that is then read back.
#![no_main]

use std::fs::File;
use std::io::Read;

use libfuzzer_sys::fuzz_target;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmlab_devices::blk::crash::Log;
use vmlab_devices::blk::{Blk, BlockSize, Options, Source};
use vmlab_fuzz::ring::{REGIONS, play, queue};

/// The bytes of the disk.
const DISK: usize = 64 << 10;

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
    let queue = queue(&memory, how & 1 != 0, 0);

    let (file, log) = (disk(), tempfile::NamedTempFile::new().expect("a file"));
    let own = file.try_clone().expect("a descriptor");
    let rules = ["tear:write:nth=3", "corrupt:read:p=0.1", "fail:discard:p=0.1"];
    let options = Options {
        faults: rules
            .iter()
            .filter_map(|rule| rule.parse().ok())
            .take((how >> 4 & 3).into())
            .collect(),
        record: (how & 8 != 0).then(|| log.path().to_owned()),
        block_size: if how & 2 != 0 { BlockSize::B4096 } else { BlockSize::B512 },
        ..Options::default()
    };
    let kept = how & 4 != 0;
    let source = match (kept, how & 0x40 != 0) {
        (true, false) => Source::Kept(own),
        (true, true) => Source::Scratch(own),
        (false, false) => Source::ReadOnly(own),
        (false, true) => Source::Discarded(own),
    };
    let device = Blk::open(source, "serial", &options).expect("a disk");

    play(data, &memory, &device, (0, &queue));
    let content = read(&file);
    assert_eq!(content.len(), DISK, "the disk has another length");
    if !kept {
        assert!(
            content.iter().all(|byte| *byte == b'd'),
            "a disk was written to that is only read"
        );
    }
    if options.record.is_some() {
        let log = Log::open(log.path()).expect("the log can be read");
        for entry in log.entries() {
            log.data(entry).expect("the data of an entry");
        }
    }
});
