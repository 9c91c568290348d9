//! A filesystem through chains of a guest.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

use std::fs;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};
use vmlab_devices::fs::Fs;
use vmlab_devices::{ChainError, Device, MAX_GATHERED, OnFault, Workers};
use vmlab_fuse::Server;
use vmlab_fuse::abi::Opcode;

#[path = "common/driver.rs"]
#[allow(dead_code, reason = "not every test uses all of it")]
mod driver;
#[path = "common/flat.rs"]
mod flat;

use driver::{BUFFERS, Driver, NEXT, WRITE};

/// Where replies go.
const REPLY: u64 = BUFFERS + 0x10_0000;
/// `struct fuse_in_header`, `struct fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;

struct Guest {
    driver: Driver,
    device: Arc<dyn Device>,
}

impl Guest {
    fn new(dir: &std::path::Path) -> Self {
        let device = Fs::new(Server::new(flat::Flat::new(dir)), "root", 1);
        let guest = Self { driver: Driver::new(), device: Arc::new(device) };
        let init = [7u32, 31, 1 << 17, 0].map(u32::to_le_bytes).concat();
        let reply = guest.ask(Opcode::Init, 1, &init, 64);
        assert_eq!(reply[..4], 7u32.to_le_bytes(), "the major version");
        guest
    }

    /// Writes a request to `place`, in buffers of which none is where another ends. It has two
    /// descriptors for what is read and three for what is written, from `first` on.
    fn prepare(&self, first: u16, place: u64, opcode: Opcode, node: u64, args: &[u8], room: usize) {
        let mut header = Vec::new();
        header.extend((IN_HEADER as u32 + args.len() as u32).to_le_bytes());
        header.extend((opcode as u32).to_le_bytes());
        header.extend(u64::from(first).to_le_bytes());
        header.extend(node.to_le_bytes());
        header.resize(IN_HEADER, 0);
        let driver = &self.driver;
        driver.memory.write_slice(&header, GuestAddress(place)).unwrap();
        driver.memory.write_slice(args, GuestAddress(place + 0x1000)).unwrap();
        let (len, reply) = (args.len() as u32, REPLY + place - BUFFERS);
        driver.describe(first, (place, IN_HEADER as u32, NEXT, first + 1));
        driver.describe(first + 1, (place + 0x1000, len, NEXT, first + 2));
        let room = room as u32;
        let parts = [OUT_HEADER as u32, room / 3, room - room / 3];
        for (part, len) in (0..).zip(parts) {
            let next = if part < 2 { NEXT } else { 0 };
            let at = reply + 0x11000 * u64::from(part);
            driver.describe(first + 2 + part, (at, len, WRITE | next, first + 3 + part));
        }
    }

    /// The reply's bytes: its header and what is behind it.
    fn reply(&self, place: u64, room: usize) -> (Vec<u8>, Vec<u8>) {
        let at = REPLY + place - BUFFERS;
        let mut rest = self.driver.bytes(at + 0x11000, room / 3);
        rest.extend(self.driver.bytes(at + 0x22000, room - room / 3));
        (self.driver.bytes(at, OUT_HEADER), rest)
    }

    fn ask(&self, opcode: Opcode, node: u64, args: &[u8], room: usize) -> Vec<u8> {
        let before = self.driver.used().len();
        self.prepare(0, BUFFERS, opcode, node, args, room);
        self.driver.offer(0);
        driver::process(&*self.device, 1, &self.driver.queue).unwrap();
        let (header, mut rest) = self.reply(BUFFERS, room);
        let length = u32::from_le_bytes(header[..4].try_into().unwrap());
        assert_eq!(self.driver.used()[before], (0, length), "the used length is the reply's");
        assert_eq!(header[4..8], [0; 4], "an error");
        rest.truncate(length as usize - OUT_HEADER);
        rest
    }
}

#[test]
fn attributes_come_through_a_chain() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new(dir.path());
    let reply = guest.ask(Opcode::GetAttr, 1, &[0; 16], 200);
    assert_eq!(reply.len(), 104, "struct fuse_attr_out");
    // `mode` is the tenth field of `struct fuse_attr`, which begins at 16.
    let mode = u32::from_le_bytes(reply[76..80].try_into().unwrap());
    assert_eq!(mode & 0o170_000, 0o040_000, "{mode:o}");
}

#[test]
fn data_goes_through_scattered_buffers_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..100_000u32).map(|place| (place % 251) as u8).collect();
    fs::write(dir.path().join("file"), &content).unwrap();
    let guest = Guest::new(dir.path());
    let entry = guest.ask(Opcode::Lookup, 1, b"file\0", 200);
    let node = u64::from_le_bytes(entry[..8].try_into().unwrap());

    let mut read = [0; 40];
    read[8..16].copy_from_slice(&7u64.to_le_bytes());
    read[16..20].copy_from_slice(&99_000u32.to_le_bytes());
    assert_eq!(guest.ask(Opcode::Read, node, &read, 99_000), content[7..99_007]);
    // At the end of the file there is less.
    read[8..16].copy_from_slice(&99_990u64.to_le_bytes());
    assert_eq!(guest.ask(Opcode::Read, node, &read, 99_000), content[99_990..]);

    let mut write = vec![0; 40];
    write[8..16].copy_from_slice(&5u64.to_le_bytes());
    write[16..20].copy_from_slice(&3000u32.to_le_bytes());
    write.extend(std::iter::repeat_n(b'x', 3000));
    let reply = guest.ask(Opcode::Write, node, &write, 64);
    assert_eq!(reply[..4], 3000u32.to_le_bytes());
    let after = fs::read(dir.path().join("file")).unwrap();
    assert_eq!(after[..5], content[..5]);
    assert!(after[5..3005].iter().all(|byte| *byte == b'x'));
    assert_eq!(after[3005..], content[3005..]);
}

#[test]
fn a_read_with_more_room_than_can_be_gathered_gets_an_error() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), vec![b'x'; 3 << 20]).unwrap();
    let guest = Guest::new(dir.path());
    let entry = guest.ask(Opcode::Lookup, 1, b"file\0", 200);
    let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
    // As a kernel with pages of 16 KiB may ask.
    for size in [(1 << 20) + 1, MAX_GATHERED as u32, 4 << 20] {
        let mut read = [0; 40];
        read[16..20].copy_from_slice(&size.to_le_bytes());
        let driver = &guest.driver;
        guest.prepare(0, BUFFERS, Opcode::Read, node, &read, 3);
        driver.describe(3, (REPLY + 0x11000, size / 2, WRITE | NEXT, 4));
        driver.describe(4, (REPLY + 0x11000 + u64::from(size / 2), size - size / 2, WRITE, 0));
        let before = driver.used().len();
        driver.offer(0);
        driver::process(&*guest.device, 1, &driver.queue).unwrap();
        assert_eq!(driver.used()[before], (0, OUT_HEADER as u32), "{size}");
        let (header, _) = guest.reply(BUFFERS, 0);
        let error = i32::from_le_bytes(header[4..8].try_into().unwrap());
        assert_eq!((error, header[0]), (-libc::EINVAL, OUT_HEADER as u8), "{size}");
        assert!(!driver.bytes(REPLY + 0x11000, 64).contains(&b'x'), "{size}");
    }
    assert_eq!(guest.driver.queue.malformed(), (2, Some(ChainError::TooLong)));
}

#[test]
fn others_do_not_wait_for_one_that_takes_long() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new(dir.path());
    let kick = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let on_fault: OnFault = Arc::new(|queue, fault| panic!("queue {queue}: {fault}"));
    let done = guest.driver.used().len();
    // The ring has no room for more descriptors than these.
    let fsync = BUFFERS + 0x4000;
    let driver = &guest.driver;
    guest.prepare(0, fsync, Opcode::Fsync, 1, &[0; 16], 64);
    let forget = [&56u32.to_le_bytes()[..], &2u32.to_le_bytes(), &[0; 48]].concat();
    driver.memory.write_slice(&forget, GuestAddress(BUFFERS)).unwrap();
    driver.describe(6, (BUFFERS, 48, 0, 0));
    driver.offer(0);
    driver.offer(6);
    let queue = driver.queue.clone();
    let kicks = kick.try_clone().unwrap();
    let start = Instant::now();
    let workers = Workers::start(guest.device.clone(), 1, queue, kicks, &on_fault).unwrap();
    while driver.used().len() < done + 2 {
        assert!(start.elapsed() < flat::FSYNC_TIME * 20);
        std::thread::yield_now();
    }
    workers.stop();
    let used = driver.used();
    assert_eq!(used[done], (6, 0), "the short one first");
    assert_eq!(used[done + 1].0, 0);
}
