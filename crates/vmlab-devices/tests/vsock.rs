//! Streams between a guest and the host, behind virtio-mmio. Numbers are those of virtio 1.2, 5.10.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmlab_devices::Device;
use vmlab_devices::vsock::{MAX_BUFFERED, MAX_CONNECTIONS, MAX_PAYLOAD, OpenError, Vsock};

#[path = "common/guest.rs"]
#[allow(dead_code, unused_imports, reason = "not every test uses all of it")]
mod guest;

use guest::{BUFFERS, Guest, WRITE};

const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;

const CID: u64 = 42;
const HOST: u64 = 2;
const STREAM: u16 = 1;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
/// No more of receiving, of sending.
const RCV: u32 = 1;
const SEND: u32 = 2;

const HEADER: usize = 44;
/// The guest's buffers for packets, about as Linux has them.
const ROOM: u32 = 4096;
const PACKET: u64 = BUFFERS + 0x10_0000;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// Time in which what must not happen would.
const A_WHILE: Duration = Duration::from_millis(50);

/// A packet, host port and guest port instead of source and destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packet {
    host: u32,
    guest: u32,
    op: u16,
    flags: u32,
    room: u32,
    forwarded: u32,
}

impl Packet {
    fn new(op: u16, host: u32, guest: u32) -> Self {
        Self { host, guest, op, flags: 0, room: 1 << 20, forwarded: 0 }
    }

    fn bytes(&self, source: u64, destination: u64, kind: u16, data: &[u8]) -> Vec<u8> {
        let mut bytes = [source.to_le_bytes(), destination.to_le_bytes()].concat();
        bytes.extend([self.guest, self.host, data.len() as u32].map(u32::to_le_bytes).concat());
        bytes.extend([kind, self.op].map(u16::to_le_bytes).concat());
        bytes.extend([self.flags, self.room, self.forwarded].map(u32::to_le_bytes).concat());
        [&bytes, data].concat()
    }

    fn parse(bytes: &[u8]) -> (Self, u16, Vec<u8>) {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let short = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        assert_eq!(long(8), CID);
        assert_eq!(word(24) as usize, bytes.len() - HEADER);
        let packet = Self {
            host: word(16),
            guest: word(20),
            op: short(30),
            flags: word(32),
            room: word(36),
            forwarded: word(40),
        };
        (packet, short(28), bytes[HEADER..].to_vec())
    }
}

struct Vm {
    guest: Guest,
    device: Arc<Vsock>,
    dir: TempDir,
    /// Where each buffer for packets is, by its name in the ring.
    rooms: RefCell<HashMap<u16, (u64, u32)>>,
}

fn device() -> (Arc<Vsock>, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (Arc::new(Vsock::new(CID, &dir.path().join("vsock")).unwrap()), dir)
}

fn vm() -> Vm {
    vm_with(&[ROOM; 8])
}

fn vm_with(rooms: &[u32]) -> Vm {
    let (device, dir) = device();
    let guest = Guest::new(device.clone());
    guest.start();
    let vm = Vm { guest, device, dir, rooms: RefCell::default() };
    for (number, room) in (0..).zip(rooms) {
        vm.room(BUFFERS + 0x1_0000 * number, *room);
    }
    vm
}

impl Vm {
    fn room(&self, at: u64, len: u32) {
        let head = self.guest.offer(RX, &[(at, len, WRITE)]);
        self.rooms.borrow_mut().insert(head, (at, len));
        self.guest.kick(RX);
    }

    fn base(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("vsock_{port}"))).unwrap()
    }

    /// Has these bytes sent, in buffers of some lengths.
    fn send_bytes(&self, bytes: &[u8]) {
        self.guest.put(PACKET, bytes);
        let (first, rest) = (bytes.len().min(HEADER) as u32, bytes.len().saturating_sub(HEADER));
        let mut buffers = vec![(PACKET, first, 0)];
        if rest > 0 {
            buffers.push((PACKET + HEADER as u64, rest as u32, 0));
        }
        let head = self.guest.offer(TX, &buffers);
        self.guest.kick(TX);
        assert_eq!(self.guest.wait(TX), (head, 0));
    }

    fn send(&self, packet: Packet, data: &[u8]) {
        self.send_bytes(&packet.bytes(CID, HOST, STREAM, data));
    }

    /// Waits for the next packet, of any kind.
    fn receive_any(&self) -> (u64, u16, Packet, Vec<u8>) {
        let (head, len) = self.guest.wait(RX);
        let (at, room) = self.rooms.borrow_mut().remove(&head).unwrap();
        let bytes = self.guest.bytes(at, len as usize);
        self.room(at, room);
        let (packet, kind, data) = Packet::parse(&bytes);
        (u64::from_le_bytes(bytes[..8].try_into().unwrap()), kind, packet, data)
    }

    /// The last packet that is there, if there is one.
    fn last(&self) -> Option<Packet> {
        let mut last = None;
        while let Some((head, len)) = self.guest.take(RX) {
            let (at, room) = self.rooms.borrow_mut().remove(&head).unwrap();
            last = Some(Packet::parse(&self.guest.bytes(at, len as usize)).0);
            self.room(at, room);
        }
        last
    }

    fn receive(&self) -> (Packet, Vec<u8>) {
        let (source, kind, packet, data) = self.receive_any();
        assert_eq!((source, kind), (HOST, STREAM));
        (packet, data)
    }

    /// Waits for a packet of this connection that says this and has no data. Returns its flags.
    fn expect(&self, op: u16, host: u32, guest: u32) -> u32 {
        let (packet, data) = self.receive();
        assert_eq!((packet.op, packet.host, packet.guest), (op, host, guest), "{packet:?}");
        assert!(data.is_empty());
        packet.flags
    }

    /// Waits until the guest knows that the program is gone. It may be told of its two halves one by one.
    fn expect_end(&self, host: u32, guest: u32) {
        let mut flags = 0;
        while flags != RCV | SEND {
            flags |= self.expect(SHUTDOWN, host, guest);
        }
    }

    fn expect_data(&self, wanted: &[u8]) {
        let mut all = Vec::new();
        while all.len() < wanted.len() {
            let (packet, data) = self.receive();
            assert_eq!((packet.op, packet.room), (RW, MAX_BUFFERED as u32));
            all.extend(data);
        }
        assert!(all == wanted, "other data");
    }

    fn expect_nothing(&self) {
        std::thread::sleep(A_WHILE);
        assert_eq!(self.guest.take(RX), None);
    }

    /// Connects the guest to a program that listens.
    fn connect(&self, listener: &UnixListener, host: u32, guest: u32) -> UnixStream {
        self.send(Packet::new(REQUEST, host, guest), &[]);
        let stream = patient(listener.accept().unwrap().0);
        self.expect(RESPONSE, host, guest);
        stream
    }

    /// Connects a program to the guest up to the guest's answer. Returns the host's port.
    fn ask(&self, port: u32) -> (UnixStream, u32) {
        let mut stream = patient(UnixStream::connect(self.base()).unwrap());
        writeln!(stream, "CONNECT {port}").unwrap();
        let (packet, _) = self.receive();
        assert_eq!((packet.op, packet.guest), (REQUEST, port));
        (stream, packet.host)
    }
}

fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn read(mut stream: &UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn at_end(mut stream: &UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(count) => count == 0,
        // There may have been something that nobody will read.
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

fn wait(done: impl Fn() -> bool, what: &str) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

/// Nothing goes round in circles.
fn expect_rest() {
    let used = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    };
    let before = used();
    // On a busy machine, one that does gets a part of the time.
    std::thread::sleep(4 * A_WHILE);
    assert!(used() - before < A_WHILE / 5, "a queue is served without rest");
}

fn noise(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

#[test]
fn devices_are_of_guests() {
    let (device, dir) = device();
    assert_eq!((device.id(), device.features()), (19, 0));
    assert_eq!(device.config(), CID.to_le_bytes());
    let path = dir.path().join("vsock");
    let again = Vsock::new(CID, &path).map(drop);
    assert!(matches!(again, Err(OpenError::Listen { .. })), "{again:?}");
    assert!(path.exists(), "the socket of another one");
    drop(device);
    assert!(!path.exists());
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        let error = Vsock::new(cid, &path).map(drop);
        assert!(matches!(error, Err(OpenError::Cid(of)) if of == cid), "{error:?}");
    }
    let long = dir.path().join("v".repeat(100));
    assert!(matches!(Vsock::new(CID, &long).map(drop), Err(OpenError::TooLong(_))));
}

#[test]
fn a_guest_talks_to_a_program() {
    let vm = vm();
    let listener = vm.listen(80);
    let mut stream = vm.connect(&listener, 80, 1000);
    vm.send(Packet::new(RW, 80, 1000), b"from the guest");
    assert_eq!(read(&stream, 14), b"from the guest");
    stream.write_all(b"from the host").unwrap();
    vm.expect_data(b"from the host");
    // Another one of the same program.
    let other = vm.connect(&listener, 80, 1001);
    vm.send(Packet::new(RW, 80, 1001), b"other");
    assert_eq!(read(&other, 5), b"other");
    assert_eq!(vm.device.connections(), 2);
    vm.send(Packet::new(RST, 80, 1000), &[]);
    assert!(at_end(&stream));
    // Reset once, nobody knows it.
    vm.send(Packet::new(RW, 80, 1000), b"more");
    vm.expect(RST, 80, 1000);
    assert_eq!(vm.device.connections(), 1);
}

#[test]
fn data_comes_in_as_many_buffers_as_it_needs() {
    for rooms in [&[ROOM; 8][..], &[45, 46, 100, 4096, 60, 70, 80, 45], &[70_000, 44, 45, 43, 1]] {
        let vm = vm_with(&rooms[..rooms.len().min(4)]);
        for (number, room) in (4..).zip(rooms.iter().skip(4)) {
            vm.room(BUFFERS + 0x2_0000 * number, *room);
        }
        let listener = vm.listen(1);
        vm.send(Packet::new(REQUEST, 1, 2), &[]);
        let mut stream = patient(listener.accept().unwrap().0);
        let data = noise(5000);
        stream.write_all(&data).unwrap();
        let (mut all, mut responses) = (Vec::new(), 0);
        while all.len() < data.len() {
            let (head, len) = vm.guest.wait(RX);
            let (at, room) = vm.rooms.borrow_mut().remove(&head).unwrap();
            let bytes = vm.guest.bytes(at, len as usize);
            vm.room(at, room);
            // One that is too small comes back empty, and loses nothing.
            if len == 0 {
                assert!(room <= HEADER as u32);
                continue;
            }
            let (packet, _, data) = Packet::parse(&bytes);
            responses += u32::from(packet.op == RESPONSE);
            all.extend(data);
        }
        assert!(all == data && responses == 1);
    }
}

#[test]
fn what_belongs_to_nothing_is_reset() {
    let vm = vm();
    // Nobody listens.
    vm.send(Packet::new(REQUEST, 80, 1000), &[]);
    vm.expect(RST, 80, 1000);
    for op in [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, 0xffff] {
        vm.send(Packet::new(op, 80, 1000), b"x");
        vm.expect(RST, 80, 1000);
    }
    // An answer to that would be one too many.
    vm.send(Packet::new(RST, 80, 1000), &[]);
    // Somebody else's packets: there is nobody to be told.
    let listener = vm.listen(80);
    for source in [0, HOST, CID + 1, CID + (1 << 32)] {
        vm.send_bytes(&Packet::new(REQUEST, 80, 1000).bytes(source, HOST, STREAM, &[]));
    }
    // No header.
    for len in [1, HEADER - 1] {
        vm.send_bytes(&vec![0; len]);
    }
    let none = vm.guest.offer(TX, &[(PACKET, 64, WRITE)]);
    vm.guest.kick(TX);
    assert_eq!(vm.guest.wait(TX), (none, 0));
    vm.expect_nothing();
    // Other guests, and other kinds of sockets.
    vm.send_bytes(&Packet::new(REQUEST, 80, 1000).bytes(CID, CID + 1, STREAM, &[]));
    let (source, kind, packet, _) = vm.receive_any();
    assert_eq!((source, kind, packet.op), (CID + 1, STREAM, RST));
    vm.send_bytes(&Packet::new(REQUEST, 80, 1000).bytes(CID, HOST, 2, &[]));
    let (source, kind, packet, _) = vm.receive_any();
    assert_eq!((source, kind, packet.op), (HOST, 2, RST));
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn what_does_not_belong_to_a_connection_ends_it() {
    let vm = vm();
    let listener = vm.listen(80);
    let longer = |op| {
        let mut bytes = Packet::new(op, 80, 1).bytes(CID, HOST, STREAM, b"data");
        bytes[24] += 1;
        bytes
    };
    let whole = |op| Packet::new(op, 80, 1).bytes(CID, HOST, STREAM, &[]);
    let huge = Packet::new(RW, 80, 1).bytes(CID, HOST, STREAM, &vec![0; MAX_PAYLOAD + 1]);
    let mut endless = whole(RW);
    endless[24..28].fill(0xff);
    for bytes in [whole(REQUEST), whole(RESPONSE), whole(99), longer(RW), huge, endless] {
        let stream = vm.connect(&listener, 80, 1);
        vm.send_bytes(&bytes);
        vm.expect(RST, 80, 1);
        assert!(at_end(&stream));
    }
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn a_program_talks_to_a_guest() {
    let vm = vm();
    let (stream, host) = vm.ask(1234);
    vm.send(Packet::new(RESPONSE, host, 1234), &[]);
    let answer = format!("OK {host}\n");
    assert_eq!(read(&stream, answer.len()), answer.as_bytes());
    (&stream).write_all(b"to the guest").unwrap();
    vm.expect_data(b"to the guest");
    vm.send(Packet::new(RW, host, 1234), b"to the host");
    assert_eq!(read(&stream, 11), b"to the host");

    // One that does not wait for the answer, and has a port of its own.
    let mut hasty = patient(UnixStream::connect(vm.base()).unwrap());
    for part in ["CONN", "ECT 12", "34\nat", " once"] {
        hasty.write_all(part.as_bytes()).unwrap();
        std::thread::sleep(A_WHILE / 10);
    }
    let (packet, _) = vm.receive();
    assert!(packet.op == REQUEST && packet.host != host);
    vm.send(Packet::new(RESPONSE, packet.host, 1234), &[]);
    vm.expect_data(b"at once");

    // Refused.
    let (refused, port) = vm.ask(99);
    vm.send(Packet::new(RST, port, 99), &[]);
    assert!(at_end(&refused));
    // Data before an answer.
    let (early, port) = vm.ask(99);
    vm.send(Packet::new(RW, port, 99), b"x");
    vm.expect(RST, port, 99);
    assert!(at_end(&early));
    // A program that gives up.
    let (impatient, port) = vm.ask(99);
    drop(impatient);
    vm.expect(RST, port, 99);
    assert_eq!(vm.device.connections(), 2);
}

#[test]
fn programs_that_name_no_port_are_sent_away() {
    let vm = vm();
    let long = "CONNECT 00000000000000000000000000000000000001\n";
    for line in ["CONNECT x\n", "CONNECT\n", "\n", "connect 1\n", "CONNECT 4294967296\n", long] {
        let mut stream = patient(UnixStream::connect(vm.base()).unwrap());
        stream.write_all(line.as_bytes()).unwrap();
        assert!(at_end(&stream), "{line:?}");
    }
    let silent = UnixStream::connect(vm.base()).unwrap();
    wait(|| vm.device.connections() == 1, "nobody is there");
    drop(silent);
    wait(|| vm.device.connections() == 0, "somebody is there");
    vm.expect_nothing();
}

#[test]
fn a_guest_sends_no_more_than_it_may() {
    let vm = vm();
    let listener = vm.listen(80);
    let stream = vm.connect(&listener, 80, 1);
    // The kernel's socket takes some, and then the device up to its limit. The guest is told of what it took.
    let chunk = noise(MAX_PAYLOAD);
    let (mut sent, mut forwarded) = (0, 0);
    loop {
        while MAX_BUFFERED - (sent - forwarded) >= chunk.len() {
            vm.send(Packet::new(RW, 80, 1), &chunk);
            sent += chunk.len();
        }
        std::thread::sleep(A_WHILE);
        let Some(packet) = vm.last() else { break };
        assert_eq!((packet.op, packet.room), (CREDIT_UPDATE, MAX_BUFFERED as u32));
        forwarded = packet.forwarded as usize;
    }
    assert!(sent > MAX_BUFFERED && forwarded < sent);
    // It is told when there is room again, without a question.
    assert!(read(&stream, sent).chunks(chunk.len()).all(|part| part == chunk));
    while forwarded < sent - MAX_BUFFERED / 4 {
        let (packet, _) = vm.receive();
        assert_eq!(packet.op, CREDIT_UPDATE);
        forwarded = packet.forwarded as usize;
    }
    vm.send(Packet::new(CREDIT_REQUEST, 80, 1), &[]);
    while forwarded < sent {
        forwarded = vm.receive().0.forwarded as usize;
    }

    // One that sends more is in the wrong.
    let begin = Instant::now();
    while vm.last().is_none_or(|packet| packet.op != RST) {
        vm.send(Packet::new(RW, 80, 1), &chunk);
        assert!(begin.elapsed() < PATIENCE, "a guest may send what it likes");
    }
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn a_guest_gets_no_more_than_it_has_room_for() {
    let vm = vm();
    let listener = vm.listen(80);
    vm.send(Packet { room: 100, ..Packet::new(REQUEST, 80, 1) }, &[]);
    let mut stream = listener.accept().unwrap().0;
    vm.expect(RESPONSE, 80, 1);
    let data = noise(1000);
    stream.write_all(&data).unwrap();
    vm.expect_data(&data[..100]);
    vm.expect(CREDIT_REQUEST, 80, 1);
    vm.expect_nothing();
    let update = |room, forwarded| {
        vm.send(Packet { room, forwarded, ..Packet::new(CREDIT_UPDATE, 80, 1) }, &[]);
    };
    update(100, 50);
    vm.expect_data(&data[100..150]);
    vm.expect(CREDIT_REQUEST, 80, 1);
    // More than it got, or less room than it had: then there is none.
    for (room, forwarded) in [(100, 151), (0, 150), (20, 100), (100, u32::MAX)] {
        update(room, forwarded);
        vm.expect(CREDIT_REQUEST, 80, 1);
        vm.expect_nothing();
    }
    update(u32::MAX, 150);
    vm.expect_data(&data[150..]);
}

#[test]
fn halves_are_shut_one_by_one() {
    let vm = vm();
    let listener = vm.listen(80);
    let shut = |port, flags| {
        vm.send(Packet { flags, ..Packet::new(SHUTDOWN, 80, port) }, &[]);
    };
    // The guest says all that it has to say, and hears the rest.
    let mut stream = vm.connect(&listener, 80, 1);
    vm.send(Packet::new(RW, 80, 1), b"last");
    shut(1, SEND);
    assert_eq!(read(&stream, 4), b"last");
    assert!(at_end(&stream));
    expect_rest();
    stream.write_all(b"answer").unwrap();
    vm.expect_data(b"answer");
    drop(stream);
    vm.expect_end(80, 1);
    vm.send(Packet::new(RST, 80, 1), &[]);

    // So does the program.
    let mut stream = vm.connect(&listener, 80, 2);
    stream.write_all(b"last").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    vm.expect_data(b"last");
    assert_eq!(vm.expect(SHUTDOWN, 80, 2), SEND);
    vm.send(Packet::new(RW, 80, 2), b"answer");
    assert_eq!(read(&stream, 6), b"answer");
    drop(stream);
    vm.expect_end(80, 2);
    // What comes after that is lost, and no mistake.
    vm.send(Packet::new(RW, 80, 2), b"late");
    shut(2, RCV | SEND);
    vm.expect(RST, 80, 2);

    // A program that goes, with and without something that it has not read.
    for (port, data) in [(3, &b""[..]), (4, b"unread")] {
        let mut stream = vm.connect(&listener, 80, port);
        stream.write_all(b"bye").unwrap();
        vm.send(Packet::new(RW, 80, port), data);
        drop(stream);
        vm.expect_data(b"bye");
        vm.expect_end(80, port);
        vm.send(Packet::new(RST, 80, port), &[]);
    }

    // A guest that hears no more, and then sends although it said that it would not.
    let stream = vm.connect(&listener, 80, 5);
    shut(5, RCV);
    // It is seen to before the next one is given back.
    vm.send_bytes(&[0]);
    assert!((&stream).write(b"x").is_err());
    expect_rest();
    vm.send(Packet::new(RW, 80, 5), b"still");
    assert_eq!(read(&stream, 5), b"still");
    shut(5, 0);
    drop(stream);
    vm.expect_end(80, 5);
    vm.send(Packet::new(RST, 80, 5), &[]);
    let _stream = vm.connect(&listener, 80, 6);
    shut(6, SEND);
    vm.send(Packet::new(RW, 80, 6), b"x");
    vm.expect(RST, 80, 6);
    assert_eq!(vm.device.connections(), 0);
}

#[test]
fn a_program_gets_all_that_a_guest_sent_before_it_closed() {
    let vm = vm();
    let listener = vm.listen(80);
    let stream = vm.connect(&listener, 80, 1);
    let data = noise(MAX_BUFFERED);
    for part in data.chunks(MAX_PAYLOAD) {
        vm.send(Packet::new(RW, 80, 1), part);
    }
    vm.send(Packet { flags: RCV | SEND, ..Packet::new(SHUTDOWN, 80, 1) }, &[]);
    // There may be news of room before.
    while vm.receive().0.op != RST {}
    assert_eq!(vm.device.connections(), 1);
    // The guest can use its port again.
    let other = vm.connect(&listener, 80, 1);
    assert!(read(&stream, data.len()) == data);
    assert!(at_end(&stream));
    wait(|| vm.device.connections() == 1, "the old one stays");
    vm.send(Packet::new(RW, 80, 1), b"new");
    assert_eq!(read(&other, 3), b"new");
}

#[test]
fn there_are_so_many_connections_at_once() {
    let vm = vm();
    let listener = vm.listen(80);
    let limit = MAX_CONNECTIONS as u32;
    let streams: Vec<_> = (1..=limit).map(|port| vm.connect(&listener, 80, port)).collect();
    vm.send(Packet::new(REQUEST, 80, limit + 1), &[]);
    vm.expect(RST, 80, limit + 1);
    assert!(at_end(&patient(UnixStream::connect(vm.base()).unwrap())));
    vm.send(Packet::new(RST, 80, 7), &[]);
    assert!(at_end(&streams[6]));
    let _stream = vm.connect(&listener, 80, limit + 1);
}

#[test]
fn a_guest_that_takes_no_packets_costs_no_memory_and_stops() {
    let vm = vm_with(&[]);
    for port in 0..5000 {
        vm.send(Packet::new(REQUEST, 80, port), &[]);
    }
    // Packets are given back before they are seen to, one after the other.
    vm.send_bytes(&[0]);
    for number in 0..8 {
        vm.room(BUFFERS + 0x1_0000 * number, ROOM);
    }
    let mut answers = 0;
    while answers < 1024 {
        vm.expect(RST, 80, answers);
        answers += 1;
    }
    vm.expect_nothing();
}

#[test]
fn a_stop_loses_nothing() {
    let vm = vm();
    let listener = vm.listen(80);
    let mut stream = vm.connect(&listener, 80, 1);
    std::thread::sleep(A_WHILE / 5);
    for round in 0..20u8 {
        let begin = Instant::now();
        vm.guest.mmio.quiesce();
        assert!(begin.elapsed() < PATIENCE / 2, "the device does not stop");
        stream.write_all(&[round; 300]).unwrap();
        vm.guest.mmio.resume().unwrap();
        vm.expect_data(&[round; 300]);
    }
}

#[test]
fn a_restore_or_a_new_driver_ends_all_connections() {
    let vm = vm();
    let listener = vm.listen(80);
    let stream = vm.connect(&listener, 80, 1);
    let room = PACKET + 0x1000;
    let offer_event = |vm: &Vm| {
        let head = vm.guest.offer(EVENT, &[(room, 4, WRITE)]);
        vm.guest.put(room, &[0xee; 4]);
        vm.guest.kick(EVENT);
        head
    };
    let told = |vm: &Vm, head| {
        assert_eq!(vm.guest.wait(EVENT), (head, 4));
        assert_eq!(vm.guest.bytes(room, 4), [0; 4]);
    };
    let event = offer_event(&vm);

    // The same device goes on from a snapshot of itself.
    vm.guest.mmio.quiesce();
    vm.guest.mmio.restore(&vm.guest.mmio.state()).unwrap();
    assert!(at_end(&stream));
    told(&vm, event);
    vm.send(Packet::new(RW, 80, 1), b"where is it?");
    vm.expect(RST, 80, 1);

    // Another one does.
    let _stream = vm.connect(&listener, 80, 1);
    vm.guest.mmio.quiesce();
    let (device, dir) = device();
    let second = Vm {
        guest: vm.guest.moved_to(device.clone()),
        device,
        dir,
        rooms: RefCell::new(vm.rooms.borrow().clone()),
    };
    second.guest.mmio.restore(&vm.guest.mmio.state()).unwrap();
    let event = offer_event(&second);
    told(&second, event);
    second.send(Packet::new(RW, 80, 1), b"where is it?");
    second.expect(RST, 80, 1);
    // The guest is told once.
    offer_event(&second);
    std::thread::sleep(A_WHILE);
    assert_eq!(second.guest.take(EVENT), None);

    let listener = second.listen(80);
    let stream = second.connect(&listener, 80, 2);
    second.guest.start();
    assert!(at_end(&stream));
    assert_eq!(second.device.connections(), 0);
}
