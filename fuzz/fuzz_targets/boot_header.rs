//! A kernel, as it is put into a guest's memory: neither it nor its initial RAM filesystem is where the monitor has
//! its own tables, whatever its headers say.
//!
//! The input: two bytes of the length of an initial RAM filesystem, in pages (with none there is none), one of the
//! command line's length, and the image.
#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::io::{Seek, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmlab_vmm::memory::{Backing, map};
use vmlab_vmm::x86_64::boot::Kernel;
use vmlab_vmm::x86_64::{fuzzing, layout};

const MEMORY: u64 = 32 << 20;
const PAGE: u64 = 4096;
const LOW: usize = layout::HIGH_MEMORY as usize;

/// What low memory has where nothing is written.
static UNTOUCHED: [u8; LOW] = [0xa5; LOW];
/// What initial RAM filesystems begin and end with.
const MARK: u8 = 0x5a;

/// Fields of `struct boot_params`: `Documentation/arch/x86/zero-page.rst`.
const E820_ENTRIES: usize = 0x1e8;
const SENTINEL: usize = 0x1ef;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const INIT_SIZE: usize = 0x260;
const PREF_ADDRESS: usize = 0x258;
const E820_TABLE: usize = 0x2d0;

struct Fixture {
    memory: GuestMemoryMmap,
    image: File,
    initrd: File,
    /// Low memory with a kernel that is what it should be.
    reference: Vec<u8>,
}

thread_local! {
    static FIXTURE: RefCell<Fixture> = RefCell::new(Fixture::new());
}

fn file() -> File {
    tempfile::tempfile_in("/dev/shm").expect("a file")
}

impl Fixture {
    fn new() -> Self {
        let memory = map(&layout::memory(MEMORY), &Backing::Anonymous).expect("memory");
        let (image, initrd) = (file(), file());
        let mut fixture = Self { memory, image, initrd, reference: Vec::new() };
        let (loaded, low) = fixture.load(&vmlab_fuzz::boot::elf(), 0, 0);
        assert!(loaded.is_some(), "the reference is no kernel");
        fixture.reference = low;
        fixture
    }

    /// Loads an image, and gives its entry, if it has one, and low memory.
    fn load(&mut self, image: &[u8], pages: u64, line: usize) -> (Option<u64>, Vec<u8>) {
        self.memory.write_slice(&UNTOUCHED, GuestAddress(0)).expect("in memory");
        self.image.set_len(0).expect("truncated");
        self.image.rewind().expect("rewound");
        self.image.write_all(image).expect("written");
        self.initrd.set_len(0).expect("truncated");
        self.initrd.set_len(pages * PAGE).expect("extended");
        if let Some(last) = (pages * PAGE).checked_sub(1) {
            for at in [0, last] {
                self.initrd.write_all_at(&[MARK], at).expect("written");
            }
        }
        let clone = |file: &File| file.try_clone().expect("a descriptor");
        let kernel = Kernel {
            image: clone(&self.image),
            initrd: (pages > 0).then(|| clone(&self.initrd)),
            command_line: "x".repeat(line),
        };
        let loaded = fuzzing::load(&self.memory, kernel).ok();
        let mut low = vec![0; LOW];
        self.memory.read_slice(&mut low, GuestAddress(0)).expect("in memory");
        (loaded, low)
    }
}

/// As a whole: byte by byte, with each comparison recorded, it would take most of the time.
fn untouched(bytes: &[u8]) -> bool {
    *bytes == UNTOUCHED[..bytes.len()]
}

fn place(start: u64, length: usize) -> Range<usize> {
    start as usize..start as usize + length
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")).into()
}

fuzz_target!(|data: &[u8]| {
    let Some((&[low, high, line], image)) = data.split_first_chunk() else { return };
    let (pages, line) = (u64::from(u16::from_le_bytes([low, high])), usize::from(line) * 16);
    FIXTURE.with_borrow_mut(|fixture| {
        let (loaded, low) = fixture.load(image, pages, line);
        let gdt = place(layout::GDT, 48);
        let params = place(layout::BOOT_PARAMS, PAGE as usize);
        let tables = place(layout::PAGE_TABLES, 6 * PAGE as usize);
        let command_line = place(layout::COMMAND_LINE, line + 1);
        let mut nothing = 0;
        for written in [&gdt, &params, &tables, &command_line] {
            assert!(untouched(&low[nothing..written.start]));
            nothing = written.end;
        }
        assert!(untouched(&low[nothing..]));
        let Some(entry) = loaded else { return };

        assert!((layout::HIGH_MEMORY..MEMORY).contains(&entry), "entered at {entry:#x}");
        assert_eq!(low[gdt.clone()], fixture.reference[gdt]);
        assert_eq!(low[tables.clone()], fixture.reference[tables]);
        assert!(low[command_line.clone()][..line].iter().all(|byte| *byte == b'x'));
        assert_eq!(low[command_line.end - 1], 0);
        let (params, expected) = (&low[params.clone()], &fixture.reference[params]);
        assert_eq!(params[SENTINEL], 0);
        assert_eq!(number(params, CMD_LINE_PTR), layout::COMMAND_LINE);
        assert_eq!(params[E820_ENTRIES], expected[E820_ENTRIES]);
        assert_eq!(params[E820_TABLE..], expected[E820_TABLE..]);

        let start = number(params, RAMDISK_IMAGE);
        let initrd = start..start + number(params, RAMDISK_SIZE);
        assert_eq!(initrd.end - initrd.start, pages * PAGE);
        if pages > 0 {
            assert!(initrd.start >= layout::HIGH_MEMORY && initrd.end <= MEMORY, "{initrd:x?}");
            for at in [initrd.start, initrd.end - 1] {
                let found: u8 = fixture.memory.read_obj(GuestAddress(at)).expect("in memory");
                assert_eq!(found, MARK);
            }
            assert!(!initrd.contains(&entry));
            if !image.starts_with(b"\x7fELF") {
                let at = number(params, PREF_ADDRESS) | number(params, PREF_ADDRESS + 4) << 32;
                assert!(initrd.start >= at + number(params, INIT_SIZE), "{initrd:x?}");
            }
        }
    });
});
