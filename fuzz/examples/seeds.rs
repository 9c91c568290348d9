//! Writes the inputs to begin with: `cargo run --example seeds -- corpus`.

use std::path::PathBuf;
use std::{env, fs, io};

use vmlab_fuse::abi::{Opcode, OpenIn};
use vmlab_fuse::testing::{RawRequest, samples};
use vmlab_fuzz::ring::{self, Act};
use vmlab_fuzz::{Request, boot, input, mmio};
use vmlab_vmm::x86_64::fuzzing;

/// Flags of descriptors: `VRING_DESC_F_*`.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Where a seed's tables, requests and replies are.
const INDIRECT_TABLE: u16 = ring::BUFFERS;
const REQUEST: u16 = ring::BUFFERS + 0x1000;
/// The reply's second half is in the other region of memory.
const REPLY: u16 = ring::REGIONS[0] as u16 - 0x400;

fn seed(how: u8, requests: &[RawRequest]) -> Vec<u8> {
    let requests: Vec<Request> =
        requests.iter().map(|one| Request { bytes: one.to_vec(), room: 1024 }).collect();
    [&[how, 13], &input(&requests)[..]].concat()
}

/// Makes nodes 2, 3, 4, 5 and handles 1, 2, 3, for the samples are about these.
fn known(names: [&str; 4], open: Opcode) -> Vec<RawRequest> {
    let mut requests: Vec<RawRequest> =
        names.iter().map(|name| RawRequest::new(Opcode::Lookup).string(name)).collect();
    // `O_RDWR` for a file.
    let flags = if open == Opcode::Open { 2 } else { 0 };
    let open = RawRequest::new(open).node(2).with(&OpenIn { flags, open_flags: 0 });
    requests.extend(vec![open; 3]);
    requests
}

/// `struct virtq_desc`.
fn descriptor(address: u16, length: usize, flags: u16, next: u16) -> Vec<u8> {
    let (address, length) = (u64::from(address).to_le_bytes(), (length as u32).to_le_bytes());
    [&address[..], &length, &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

/// Requests one after the other in a ring, each behind a kick.
fn ring_seed(how: u8, requests: &[RawRequest], indirect: bool) -> Vec<u8> {
    let table = if indirect { INDIRECT_TABLE } else { ring::TABLE };
    let mut out = vec![how, 0];
    let mut act = |act: Act<'_>| out.extend(ring::input([act]));
    for (index, request) in (0_u16..).zip(requests) {
        let bytes = request.to_vec();
        let (head, rest) = bytes.split_at(bytes.len().min(40));
        let parts = [
            descriptor(REQUEST, head.len(), NEXT, 1),
            descriptor(REQUEST + 40, rest.len().max(1), NEXT, 2),
            descriptor(REPLY, 0x800, WRITE, 0),
        ];
        act(Act::Write(REQUEST, &bytes));
        act(Act::Write(table, &parts.concat()));
        if indirect {
            act(Act::Write(ring::TABLE, &descriptor(table, parts.concat().len(), INDIRECT, 0)));
        }
        act(Act::Write(ring::AVAILABLE + 2, &(index + 1).to_le_bytes()));
        act(Act::Write(ring::AVAILABLE + 4 + 2 * (index % ring::SIZE), &[0, 0]));
        act(Act::Kick(0));
    }
    out
}

/// A request of a disk: `VIRTIO_BLK_T_*`, its first sector, its data, and the room for what it gives.
type BlkRequest = (u32, u64, Vec<u8>, usize);

/// A range of a DISCARD or WRITE_ZEROES.
fn blk_range(first: u64, count: u32, flags: u32) -> Vec<u8> {
    [&first.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn blk_requests() -> Vec<BlkRequest> {
    let ranges = [blk_range(16, 8, 0), blk_range(40, 8, 0)].concat();
    vec![
        (1, 0, vec![b'w'; 4096], 0),
        (0, 0, Vec::new(), 4096),
        (1, 120, vec![b'x'; 512], 0),
        (4, 0, Vec::new(), 0),
        (11, 0, ranges.clone(), 0),
        (13, 0, ranges, 0),
        (13, 0, blk_range(8, 16, 1), 0),
        (8, 0, Vec::new(), 20),
        (0, 8, Vec::new(), 8192),
        (1, 16, vec![b'y'; 8192], 0),
        (4, 0, Vec::new(), 0),
    ]
}

/// Requests of a disk, each behind a kick, or all behind one.
fn blk_seed(how: u8, requests: &[BlkRequest], at_once: bool) -> Vec<u8> {
    const HEADERS: u16 = ring::BUFFERS;
    const STATUS: u16 = ring::BUFFERS + 0x800;
    const DATA: u16 = ring::BUFFERS + 0x1000;
    let mut out = vec![how];
    let mut act = |act: Act<'_>| out.extend(ring::input([act]));
    for (index, (kind, first, data, room)) in (0_u16..).zip(requests) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &first.to_le_bytes()].concat();
        let place = HEADERS + 16 * index;
        // With all at once, each has descriptors of its own.
        let slot = if at_once { 3 * (index % 5) } else { 0 };
        let mut table = descriptor(place, 16, NEXT, slot + 1);
        if data.len() + room > 0 {
            let flags = if *room > 0 { WRITE | NEXT } else { NEXT };
            table.extend(descriptor(DATA, data.len() + room, flags, slot + 2));
        }
        table.extend(descriptor(STATUS, 1, WRITE, 0));
        act(Act::Write(place, &header));
        act(Act::Write(DATA, data));
        act(Act::Write(ring::TABLE + 16 * slot, &table));
        act(Act::Write(ring::AVAILABLE + 4 + 2 * (index % ring::SIZE), &slot.to_le_bytes()));
        act(Act::Write(ring::AVAILABLE + 2, &(index + 1).to_le_bytes()));
        if !at_once || index % 5 == 4 {
            act(Act::Kick(0));
        }
    }
    out
}

/// `struct virtio_console_control`.
fn console_message(port: u32, event: u16, value: u16) -> Vec<u8> {
    [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// A driver's set-up of two ports, and bytes both ways.
fn console_seed(how: u8) -> Vec<u8> {
    /// Behind the rings of six queues.
    const DATA: u16 = 0x6000;
    let mut out = vec![how, 0];
    let mut next = [0u16; 6];
    let mut ask = |queue: u16, bytes: &[u8], flags: u16, len: usize| {
        let (base, index) = (0x1000 * queue, &mut next[usize::from(queue)]);
        let at = DATA + 0x400 * queue;
        let head = descriptor(at, len, flags, 0);
        let place = base + ring::AVAILABLE + 4 + 2 * (*index % ring::SIZE);
        *index += 1;
        out.extend(ring::input([
            Act::Write(at, bytes),
            Act::Write(base + ring::TABLE, &head),
            Act::Write(place, &[0, 0]),
            Act::Write(base + ring::AVAILABLE + 2, &index.to_le_bytes()),
            Act::Kick(queue as u8),
        ]));
    };
    // DEVICE_READY, PORT_READY of both, PORT_OPEN.
    for (port, event) in [(0, 0), (0, 3), (1, 3), (0, 6), (1, 6)] {
        ask(3, &console_message(port, event, 1), 0, 8);
        ask(2, &[], WRITE, 64);
        ask(2, &[], WRITE, 64);
    }
    for queue in [0, 4] {
        ask(queue, &[], WRITE, 100);
        ask(queue + 1, b"from the guest", 0, 14);
    }
    ask(3, &console_message(1, 6, 0), 0, 8);
    ask(4, &[], WRITE, 100);
    out
}

/// Frames from the stream for a guest that has room for some, or as many of the guest.
fn net_seed(how: u8) -> Vec<u8> {
    const HEADER: usize = 12;
    let frames = [60, 14, 1514, 13];
    let frame = |len: usize| vec![len as u8; len];
    let stream: Vec<u8> = frames
        .iter()
        .flat_map(|len| [&(*len as u32).to_be_bytes()[..], &frame(*len)].concat())
        .collect();
    let flags = if how & 2 == 0 { WRITE } else { 0 };
    let mut out = [&[how][..], &(stream.len() as u16).to_le_bytes(), &stream].concat();
    for (index, len) in (0_u16..).zip(frames) {
        let at = ring::BUFFERS + 0x800 * index;
        out.extend(ring::input([
            Act::Write(at + HEADER as u16, &frame(len)),
            Act::Write(ring::TABLE + 16 * index, &descriptor(at, HEADER + len, flags, 0)),
            Act::Write(ring::AVAILABLE + 4 + 2 * index, &index.to_le_bytes()),
            Act::Write(ring::AVAILABLE + 2, &(index + 1).to_le_bytes()),
            Act::Kick(0),
        ]));
    }
    out
}

/// Connections both ways, with data and all ways to end one.
fn vsock_seed(how: u8) -> Vec<u8> {
    // What a guest says of its credit, and 64 bytes.
    let guest = |op, host, guest, flags| [op, host, guest, flags, 64, 0, 255, 0];
    let program = |what: u8, guest, len| [0x80 | what, 0, guest, 0, len, 0, 0, 0];
    let mut acts = vec![
        guest(1, 1, 1, 0),
        program(1, 0, 0),
        guest(5, 1, 1, 0),
        program(5, 0, 100),
        program(6, 0, 64),
        guest(7, 1, 1, 0),
        guest(6, 1, 1, 0),
        // A program that connects, which gets the first of the ports for that.
        program(0, 0, 0),
        program(3, 0, 0),
        program(4, 2, 0),
        guest(2, 0x80, 2, 0),
        program(6, 0, 64),
        guest(5, 0x80, 2, 0),
    ];
    acts.push([0x87, 0, 0, how, 0, 0, 0, 0]);
    acts.extend([guest(4, 1, 1, 1 + how % 3), guest(5, 1, 1, 0), guest(4, 1, 1, 3)]);
    acts.extend([program(2, 0, 0), guest(3, 0x80, 2, 0), guest(5, 0x80, 2, 0)]);
    [&[how][..], &acts.concat()].concat()
}

/// The set-up of a device, requests for all of its queues, a move to another one, a reset, and the set-up again.
fn mmio_seed(how: u8) -> Vec<u8> {
    use mmio::Act;
    let queues = if how & 1 == 0 { 1 } else { 6 };
    let mut acts = Vec::new();
    for round in 0..2 {
        acts.extend(mmio::set_up(queues));
        for queue in 0..queues {
            let base = mmio::base(queue);
            let flags = if queue % 2 == 0 { WRITE } else { 0 };
            acts.extend([
                Act::Memory(base, descriptor(0x7000, 64, flags, 0)),
                Act::Memory(base + ring::AVAILABLE + 2, vec![1, 0]),
                Act::Write(mmio::NOTIFY, u32::from(queue).to_le_bytes().to_vec()),
            ]);
        }
        acts.push(if round == 0 { Act::Move } else { Act::Read(0x60, 4) });
    }
    [&[how][..], &mmio::input(&acts)].concat()
}

fn main() -> io::Result<()> {
    let corpus = env::args_os().nth(1).map(PathBuf::from).ok_or(io::ErrorKind::InvalidInput)?;
    let samples = samples();
    let dir = corpus.join("fuse_request");
    fs::create_dir_all(&dir)?;
    for (number, sample) in samples.chunks(1).enumerate() {
        // Read-only and not, with INIT and without, SETXATTR of both layouts.
        for how in 0..8 {
            fs::write(dir.join(format!("one-{number}-{how}")), seed(how, sample))?;
        }
    }
    fs::write(dir.join("all"), seed(2, &samples))?;

    let dir = corpus.join("fuse_passthrough");
    fs::create_dir_all(&dir)?;
    let samples = &samples[1..];
    for (what, names, open) in [
        ("file", ["file", "dir", "link", "other"], Opcode::Open),
        ("dir", ["dir", "other", "link", "file"], Opcode::OpenDir),
    ] {
        for how in [0, 1, 8, 16] {
            let known = known(names, open);
            for (number, sample) in samples.iter().enumerate() {
                let requests = [&known[..], std::slice::from_ref(sample)].concat();
                fs::write(dir.join(format!("{what}-{number}-{how}")), seed(how, &requests))?;
            }
            let all = [&known[..], samples].concat();
            fs::write(dir.join(format!("{what}-all-{how}")), seed(how, &all))?;
        }
    }

    let dir = corpus.join("virtqueue");
    fs::create_dir_all(&dir)?;
    for (number, sample) in samples.chunks(1).enumerate() {
        for how in [0, 1, 8] {
            fs::write(dir.join(format!("one-{number}-{how}")), ring_seed(how, sample, false))?;
        }
        fs::write(dir.join(format!("indirect-{number}")), ring_seed(1, sample, true))?;
    }
    fs::write(dir.join("all"), ring_seed(0, samples, false))?;

    let dir = corpus.join("blk");
    fs::create_dir_all(&dir)?;
    let requests = blk_requests();
    // All that a disk can be, without rules for faults and with them.
    for how in (0..16).flat_map(|how| [0, 1, 3, 4, 7].map(|more| how | more << 4)) {
        fs::write(dir.join(format!("all-{how}")), blk_seed(how, &requests, false))?;
        fs::write(dir.join(format!("at-once-{how}")), blk_seed(how, &requests, true))?;
    }
    for (number, request) in requests.chunks(1).enumerate() {
        fs::write(dir.join(format!("one-{number}")), blk_seed(4, request, false))?;
    }

    for (what, seed) in [("net", net_seed as fn(u8) -> Vec<u8>), ("vsock", vsock_seed)] {
        let dir = corpus.join(what);
        fs::create_dir_all(&dir)?;
        for how in 0..6 {
            fs::write(dir.join(format!("all-{how}")), seed(how))?;
        }
    }

    let dir = corpus.join("console");
    fs::create_dir_all(&dir)?;
    for how in 0..8 {
        fs::write(dir.join(format!("all-{how}")), console_seed(how))?;
    }

    let dir = corpus.join("mmio");
    fs::create_dir_all(&dir)?;
    for how in 0..4 {
        fs::write(dir.join(format!("all-{how}")), mmio_seed(how))?;
    }

    let dir = corpus.join("boot_header");
    fs::create_dir_all(&dir)?;
    for (name, image) in [("elf", boot::elf()), ("bzimage", boot::bzimage())] {
        for (number, how) in [[0, 0, 0], [1, 0, 2], [0, 8, 255]].iter().enumerate() {
            fs::write(dir.join(format!("{name}-{number}")), [&how[..], &image].concat())?;
        }
    }

    let dir = corpus.join("vm_state");
    fs::create_dir_all(&dir)?;
    let state = fuzzing::sample_state();
    fs::write(dir.join("whole"), [&[1], &state[..]].concat())?;
    fs::write(dir.join("body"), [&[0], &state[12..]].concat())?;
    Ok(())
}
