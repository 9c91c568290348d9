//! A disk through chains of a guest. Numbers are those of virtio 1.2, 5.2.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};
use vmlab_devices::blk::{Blk, BlockSize, OpenError, Options, Source};
use vmlab_devices::{Device, MAX_GATHERED};

#[path = "common/driver.rs"]
#[allow(dead_code, reason = "not every test uses all of it")]
mod driver;

use driver::{BUFFERS, Driver, INDIRECT, MEMORY, NEXT, WRITE};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What is in a status before there is one.
const NONE: u8 = 0xee;

/// Where requests have their parts.
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x1000;
const DATA: u64 = BUFFERS + 0x2000;

/// Sectors of the disks here.
const CAPACITY: u64 = 2048;

struct Guest {
    driver: Driver,
    device: Blk,
    file: File,
}

fn disk() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(CAPACITY * 512).unwrap();
    for sector in 0..CAPACITY {
        file.write_all_at(&[sector as u8; 512], sector * 512).unwrap();
    }
    file
}

fn guest(source: impl Fn(File) -> Source, options: &Options) -> Guest {
    let file = disk();
    let device = Blk::open(source(file.try_clone().unwrap()), "serial-1", options).unwrap();
    Guest { driver: Driver::new(), device, file }
}

fn kept() -> Guest {
    guest(Source::Kept, &Options::default())
}

impl Guest {
    fn header(&self, kind: u32, sector: u64) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.driver.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
        self.driver.memory.write_obj(NONE, GuestAddress(STATUS)).unwrap();
    }

    /// Has the request at descriptor 0 served. Returns its status and the used length.
    fn serve(&self) -> (u8, u32) {
        let before = self.driver.number(driver::USED + 2);
        self.driver.offer(0);
        driver::process(&self.device, 0, &self.driver.queue).unwrap();
        let used = self.driver.used();
        assert_eq!(used.len(), usize::from(before) + 1);
        assert_eq!(used.last().unwrap().0, 0);
        (self.driver.bytes(STATUS, 1)[0], used.last().unwrap().1)
    }

    /// Has a request with these buffers of data, one of each length, served.
    fn ask(&self, kind: u32, sector: u64, writable: bool, lens: &[u32]) -> (u8, u32) {
        self.header(kind, sector);
        self.driver.describe(0, (HEADER, 16, NEXT, 1));
        let (mut index, mut at) = (1, DATA);
        for len in lens {
            let flags = NEXT | if writable { WRITE } else { 0 };
            self.driver.describe(index, (at, *len, flags, index + 1));
            index += 1;
            at += u64::from(*len);
        }
        self.driver.describe(index, (STATUS, 1, WRITE, 0));
        self.serve()
    }

    fn data(&self, bytes: &[u8]) {
        self.driver.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
    }

    /// Asks for ranges: first sector, sectors, flags.
    fn ranges(&self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let bytes = |(first, count, flags): &(u64, u32, u32)| {
            [&first.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        self.data(&ranges.iter().flat_map(bytes).collect::<Vec<u8>>());
        let (status, used) = self.ask(kind, 0, false, &[16 * ranges.len() as u32]);
        assert_eq!(used, 1);
        status
    }

    fn sector(&self, number: u64) -> [u8; 512] {
        let mut sector = [0; 512];
        self.file.read_exact_at(&mut sector, number * 512).unwrap();
        sector
    }

    fn assert_unchanged(&self) {
        for number in 0..CAPACITY {
            assert_eq!(self.sector(number), [number as u8; 512], "{number}");
        }
    }
}

fn ranges_of(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks(512).map(|sector| sector[0]).collect()
}

#[test]
fn sectors_are_read_and_written_in_pieces_of_any_length() {
    let guest = kept();
    assert_eq!(guest.ask(IN, 5, true, &[512, 1024]), (OK, 1537));
    assert_eq!(ranges_of(&guest.driver.bytes(DATA, 1536)), [5, 6, 7]);
    // No piece is a whole sector.
    assert_eq!(guest.ask(IN, 1023, true, &[100, 1, 411, 512]), (OK, 1025));
    let content = guest.driver.bytes(DATA, 1024);
    assert_eq!((&content[..512], &content[512..]), (&[255; 512][..], &[0; 512][..]));
    guest.data(&[0x77; 1024]);
    assert_eq!(guest.ask(OUT, CAPACITY - 2, false, &[1000, 24]), (OK, 1));
    assert_eq!(guest.sector(CAPACITY - 3), [(CAPACITY - 3) as u8; 512]);
    assert_eq!(guest.sector(CAPACITY - 2), [0x77; 512]);
    assert_eq!(guest.sector(CAPACITY - 1), [0x77; 512]);
    assert_eq!(guest.ask(FLUSH, 0, false, &[]), (OK, 1));
}

#[test]
fn a_long_request_is_served_whole() {
    let guest = kept();
    let len = 1 << 20;
    assert_eq!(guest.ask(IN, 0, true, &[len]), (OK, len + 1));
    let sectors: Vec<u8> = (0..CAPACITY).map(|sector| sector as u8).collect();
    assert_eq!(ranges_of(&guest.driver.bytes(DATA, len as usize)), sectors);
    guest.data(&vec![3; len as usize]);
    assert_eq!(guest.ask(OUT, 0, false, &[len / 2, len / 2]), (OK, 1));
    assert_eq!((guest.sector(0), guest.sector(CAPACITY - 1)), ([3; 512], [3; 512]));
}

#[test]
fn the_status_may_share_a_buffer_with_data() {
    let guest = kept();
    guest.header(IN, 9);
    guest.driver.describe(0, (HEADER, 16, NEXT, 1));
    guest.driver.describe(1, (STATUS - 512, 513, WRITE, 0));
    assert_eq!(guest.serve(), (OK, 513));
    assert_eq!(guest.driver.bytes(STATUS - 512, 512), [9; 512]);
    // One of two bytes leaves a byte of data too much.
    guest.driver.describe(0, (HEADER, 16, NEXT, 1));
    guest.driver.describe(1, (DATA, 512, WRITE | NEXT, 2));
    guest.driver.describe(2, (STATUS - 1, 2, WRITE, 0));
    guest.header(IN, 9);
    assert_eq!(guest.serve(), (IOERR, 1));
    guest.driver.describe(1, (DATA, 512, NEXT, 2));
    guest.header(OUT, 9);
    assert_eq!(guest.serve(), (IOERR, 1));
    guest.assert_unchanged();
}

#[test]
fn a_header_may_be_in_pieces() {
    let guest = kept();
    guest.header(IN, 9);
    guest.driver.describe(0, (HEADER, 3, NEXT, 1));
    guest.driver.describe(1, (HEADER + 3, 13, NEXT, 2));
    guest.driver.describe(2, (DATA, 512, WRITE | NEXT, 3));
    guest.driver.describe(3, (STATUS, 1, WRITE, 0));
    assert_eq!(guest.serve(), (OK, 513));
    assert_eq!(guest.driver.bytes(DATA, 512), [9; 512]);
    // One that is not whole.
    guest.driver.describe(0, (HEADER, 15, NEXT, 2));
    guest.header(IN, 9);
    assert_eq!(guest.serve(), (IOERR, 1));
}

#[test]
fn an_indirect_table_is_followed() {
    let guest = kept();
    let table = BUFFERS + 0x8000;
    guest.header(OUT, 4);
    guest.data(&[0xab; 512]);
    guest.driver.describe(0, (table, 48, INDIRECT, 0));
    guest.driver.describe_at(table, 0, (HEADER, 16, NEXT, 1));
    guest.driver.describe_at(table, 1, (DATA, 512, NEXT, 2));
    guest.driver.describe_at(table, 2, (STATUS, 1, WRITE, 0));
    assert_eq!(guest.serve(), (OK, 1));
    assert_eq!(guest.sector(4), [0xab; 512]);
}

#[test]
fn the_serial_number_is_padded() {
    let guest = kept();
    guest.data(&[0xff; 20]);
    assert_eq!(guest.ask(GET_ID, 0, true, &[20]), (OK, 21));
    assert_eq!(guest.driver.bytes(DATA, 20), *b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(guest.ask(GET_ID, 0, true, &[19]), (IOERR, 1));
    let long = "0123456789012345678901";
    let device = Blk::open(Source::Kept(disk()), long, &Options::default()).unwrap();
    let guest = Guest { device, ..guest };
    assert_eq!(guest.ask(GET_ID, 0, true, &[20]), (OK, 21));
    assert_eq!(guest.driver.bytes(DATA, 20), long.as_bytes()[..20]);
}

#[test]
fn what_is_outside_of_the_disk_fails() {
    let guest = kept();
    guest.data(&[0; 1024]);
    for (sector, len) in [
        (CAPACITY, 512),
        (CAPACITY - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX - 1, 1024),
        (1 << 55, 512),
        ((1 << 55) + 1, 1024),
        (1 << 63, 512),
    ] {
        assert_eq!(guest.ask(IN, sector, true, &[len]), (IOERR, 1), "{sector:x} {len}");
        assert_eq!(guest.ask(OUT, sector, false, &[len]), (IOERR, 1), "{sector:x} {len}");
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(guest.ranges(kind, &[(sector, len / 512, 0)]), IOERR, "{sector:x} {len}");
        }
    }
    guest.assert_unchanged();
}

#[test]
fn data_is_whole_sectors() {
    let guest = kept();
    for lens in [&[1][..], &[511], &[513], &[512, 1]] {
        assert_eq!(guest.ask(IN, 0, true, lens), (IOERR, 1), "{lens:?}");
        assert_eq!(guest.ask(OUT, 0, false, lens), (IOERR, 1), "{lens:?}");
    }
    // Nothing is done, and well.
    assert_eq!(guest.ask(IN, 0, true, &[]), (OK, 1));
    assert_eq!(guest.ask(OUT, CAPACITY, false, &[]), (OK, 1));
    assert_eq!(guest.ask(OUT, CAPACITY + 1, false, &[]), (IOERR, 1));
    guest.assert_unchanged();
}

#[test]
fn data_of_the_wrong_direction_fails() {
    let guest = kept();
    assert_eq!(guest.ask(IN, 0, false, &[512]), (IOERR, 1));
    assert_eq!(guest.ask(OUT, 0, true, &[512]), (IOERR, 1));
    assert_eq!(guest.ask(GET_ID, 0, false, &[20]), (IOERR, 1));
    assert_eq!(guest.ask(DISCARD, 0, true, &[16]), (IOERR, 1));
    assert_eq!(guest.ask(FLUSH, 0, false, &[512]), (IOERR, 1));
    guest.assert_unchanged();
}

#[test]
fn a_request_without_a_status_is_not_served() {
    let guest = kept();
    guest.header(OUT, 0);
    guest.data(&[0xcc; 512]);
    guest.driver.describe(0, (HEADER, 16, NEXT, 1));
    guest.driver.describe(1, (DATA, 512, 0, 0));
    assert_eq!(guest.serve(), (NONE, 0));
    guest.driver.describe(0, (HEADER, 16, 0, 0));
    guest.header(FLUSH, 0);
    assert_eq!(guest.serve(), (NONE, 0));
    // Without a header there is a place for an error.
    guest.driver.describe(0, (STATUS, 1, WRITE, 0));
    assert_eq!(guest.serve(), (IOERR, 1));
    guest.assert_unchanged();
}

#[test]
fn huge_and_misplaced_buffers_fail() {
    let guest = kept();
    let half = (MAX_GATHERED / 2) as u32;
    guest.header(IN, 0);
    guest.driver.describe(0, (HEADER, 16, NEXT, 1));
    guest.driver.describe(1, (DATA, half, WRITE | NEXT, 2));
    guest.driver.describe(2, (DATA, half, WRITE | NEXT, 3));
    guest.driver.describe(3, (STATUS, 1, WRITE, 0));
    // A guest must not take what was in the status before for its own.
    assert_eq!(guest.serve(), (IOERR, 1));
    // Whoever writes too much.
    guest.header(OUT, 0);
    guest.driver.describe(1, (DATA, half, NEXT, 2));
    guest.driver.describe(2, (DATA, half, NEXT, 3));
    assert_eq!(guest.serve(), (IOERR, 1));
    guest.header(IN, 0);
    guest.driver.describe(1, (MEMORY - 256, 512, WRITE | NEXT, 3));
    assert_eq!(guest.serve(), (NONE, 0));
    guest.header(OUT, 0);
    guest.driver.describe(1, (DATA, u32::MAX, NEXT, 3));
    assert_eq!(guest.serve(), (NONE, 0));
    guest.assert_unchanged();
}

#[test]
fn ranges_are_given_back_or_zero() {
    let guest = kept();
    assert_eq!(guest.ranges(DISCARD, &[(8, 8, 0), (32, 16, 0)]), OK);
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(100, 3, 0), (200, 1, 1)]), OK);
    let zero = |n| (8..16).contains(&n) || (32..48).contains(&n) || (100..103).contains(&n);
    for number in 0..CAPACITY {
        let byte = if zero(number) || number == 200 { 0 } else { number as u8 };
        assert_eq!(guest.sector(number), [byte; 512], "{number}");
    }
    assert_eq!(guest.ranges(DISCARD, &[(0, 0, 0)]), OK);
}

#[test]
fn ranges_are_checked_before_any_is_zero() {
    let guest = kept();
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(guest.ranges(kind, &[(0, 1, 0), (CAPACITY, 1, 0)]), IOERR);
        assert_eq!(guest.ranges(kind, &[(0, 1, 0), (0, 1, 2)]), UNSUPP);
        assert_eq!(guest.ranges(kind, &[(0, 2_097_153, 0)]), IOERR);
        assert_eq!(guest.ranges(kind, &[(0, 1, 0); 33]), IOERR);
        assert_eq!(guest.ask(kind, 0, false, &[]), (IOERR, 1));
        assert_eq!(guest.ask(kind, 0, false, &[17]), (IOERR, 1));
    }
    assert_eq!(guest.ranges(DISCARD, &[(0, 1, 0), (0, 1, 1)]), UNSUPP);
    guest.assert_unchanged();
}

#[test]
fn unknown_requests_are_unsupported() {
    let guest = kept();
    for kind in [2, 3, 5, 9, 10, 12, 14, 15, 16, 0x8000_0000, u32::MAX] {
        assert_eq!(guest.ask(kind, 0, false, &[512]), (UNSUPP, 1), "{kind}");
    }
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let guest = guest(Source::ReadOnly, &Options::default());
    assert_eq!(guest.device.features() & 1 << 5, 1 << 5, "VIRTIO_BLK_F_RO");
    assert_eq!(guest.device.features() & (1 << 13 | 1 << 14), 0, "discard, write zeroes");
    assert_eq!(guest.ask(OUT, 0, false, &[512]), (IOERR, 1));
    assert_eq!(guest.ranges(DISCARD, &[(1, 1, 0)]), IOERR);
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(1, 1, 0)]), IOERR);
    assert_eq!(guest.ask(FLUSH, 0, false, &[]), (OK, 1));
    assert_eq!(guest.ask(IN, 3, true, &[512]), (OK, 513));
    assert_eq!(guest.driver.bytes(DATA, 512), [3; 512]);
    guest.assert_unchanged();
}

#[test]
fn what_is_discarded_is_seen_by_the_guest_alone() {
    let guest = guest(Source::Discarded, &Options::default());
    guest.data(&[0x99; 1024]);
    assert_eq!(guest.ask(OUT, 7, false, &[1024]), (OK, 1));
    assert_eq!(guest.ranges(DISCARD, &[(8, 2, 0)]), OK);
    assert_eq!(guest.ask(IN, 6, true, &[2560]), (OK, 2561));
    assert_eq!(ranges_of(&guest.driver.bytes(DATA, 2560)), [6, 0x99, 0, 0, 10]);
    guest.assert_unchanged();
}

#[test]
fn blocks_are_whole() {
    let options = Options { block_size: BlockSize::B4096, ..Options::default() };
    let guest = guest(Source::Kept, &options);
    assert_eq!(guest.device.config()[20..24], 4096u32.to_le_bytes());
    for (sector, len) in [(0, 512), (1, 4096), (8, 4096 + 512)] {
        assert_eq!(guest.ask(IN, sector, true, &[len]), (IOERR, 1), "{sector} {len}");
    }
    assert_eq!(guest.ranges(DISCARD, &[(4, 8, 0)]), IOERR);
    assert_eq!(guest.ask(IN, 8, true, &[8192]), (OK, 8193));
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096 + 512).unwrap();
    let error = Blk::open(Source::Kept(file), "", &options).err().unwrap();
    assert!(matches!(error, OpenError::Blocks { bytes: 4608, block: 4096 }), "{error}");
}

#[test]
fn queues_are_as_many_as_asked_for() {
    let options = |queues| Options { queues, ..Options::default() };
    let device = Blk::open(Source::Kept(disk()), "", &options(3)).unwrap();
    assert_eq!(device.queues().len(), 3);
    assert_eq!(device.config()[34..36], [3, 0]);
    assert_eq!(device.config()[..8], CAPACITY.to_le_bytes());
    for bad in [0, 17] {
        let error = Blk::open(Source::Kept(disk()), "", &options(bad)).err().unwrap();
        assert!(error.to_string().contains("from 1 to 16"), "{error}");
    }
}

#[test]
fn an_error_of_the_file_is_one_of_the_request() {
    // Open for reading alone, though the device does not know.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [6; 1024]).unwrap();
    let file = File::open(&path).unwrap();
    let device =
        Blk::open(Source::Kept(file.try_clone().unwrap()), "", &Options::default()).unwrap();
    let guest = Guest { driver: Driver::new(), device, file };
    guest.data(&[0; 512]);
    assert_eq!(guest.ask(OUT, 0, false, &[512]), (IOERR, 1));
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(0, 1, 0)]), IOERR);
    assert_eq!(guest.ask(IN, 0, true, &[512]), (OK, 513));
    assert_eq!(std::fs::read(&path).unwrap(), [6; 1024]);
}

/// The next one of a row of random numbers: xorshift.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn requests_at_random_get_a_status_and_stay_on_the_disk() {
    let rules = ["tear:write:p=0.2", "corrupt:read:p=0.2", "fail:discard:p=0.2"];
    let faults = rules.map(|rule| rule.parse().unwrap()).to_vec();
    let log = tempfile::NamedTempFile::new().unwrap();
    let record = Some(log.path().to_owned());
    let guest = guest(Source::Kept, &Options { faults, record, ..Options::default() });
    let kinds = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 7];
    let (mut state, mut seen) = (1, [0; 3]);
    for _ in 0..1500 {
        let mut below = |end: u64| next(&mut state) % end;
        let kind = kinds[below(kinds.len() as u64) as usize];
        let sector = if below(8) == 0 { below(u64::MAX) } else { below(CAPACITY + 2) };
        let of_data = [below(CAPACITY), below(20), below(4)];
        guest.data(
            &[of_data[0].to_le_bytes(), (of_data[1] | (of_data[2] / 3) << 32).to_le_bytes()]
                .concat(),
        );
        let lens: Vec<u32> = (0..below(4))
            .map(|_| match below(4) {
                0 => 1 + below(1000) as u32,
                1 => 16 * (1 + below(3) as u32),
                2 => 20,
                _ => 512 * (1 + below(16) as u32),
            })
            .collect();
        let (status, used) = guest.ask(kind, sector, matches!(kind, IN | GET_ID), &lens);
        let written = if status == OK && kind == IN { lens.iter().sum() } else { 0 };
        let written = if status == OK && kind == GET_ID { 20 } else { written };
        assert_eq!(used, written + 1, "{kind} {sector:x} {lens:?}");
        seen[usize::from(status)] += 1;
        if kind == 7 {
            assert_eq!(status, UNSUPP);
        }
    }
    assert!(seen.iter().all(|count| *count > 50), "{seen:?}");
    assert_eq!(guest.file.metadata().unwrap().len(), CAPACITY * 512);
    assert!(vmlab_devices::blk::crash::Log::open(log.path()).unwrap().entries().len() > 50);
}
