//! A guest with virtio-vsock behind virtio-mmio, and programs of its host. Numbers are those of virtio 1.2, 5.10.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmlab_devices::vsock::{MAX_BUFFERED, Vsock};

#[path = "guest.rs"]
#[allow(dead_code, unused_imports, reason = "not every test uses all of it")]
pub(crate) mod guest;

pub(crate) use guest::{BUFFERS, Guest, WRITE};

pub(crate) const RX: u32 = 0;
pub(crate) const TX: u32 = 1;
pub(crate) const EVENT: u32 = 2;

pub(crate) const CID: u64 = 42;
pub(crate) const HOST: u64 = 2;
pub(crate) const STREAM: u16 = 1;
pub(crate) const REQUEST: u16 = 1;
pub(crate) const RESPONSE: u16 = 2;
pub(crate) const RST: u16 = 3;
pub(crate) const SHUTDOWN: u16 = 4;
pub(crate) const RW: u16 = 5;
pub(crate) const CREDIT_UPDATE: u16 = 6;
pub(crate) const CREDIT_REQUEST: u16 = 7;
/// No more of receiving, of sending.
pub(crate) const RCV: u32 = 1;
pub(crate) const SEND: u32 = 2;

pub(crate) const HEADER: usize = 44;
/// The guest's buffers for packets, about as Linux has them.
pub(crate) const ROOM: u32 = 4096;
pub(crate) const PACKET: u64 = BUFFERS + 0x10_0000;

/// Far longer than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Time in which what must not happen would.
pub(crate) const A_WHILE: Duration = Duration::from_millis(50);

/// A packet, host port and guest port instead of source and destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) host: u32,
    pub(crate) guest: u32,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) room: u32,
    pub(crate) forwarded: u32,
}

impl Packet {
    pub(crate) fn new(op: u16, host: u32, guest: u32) -> Self {
        Self { host, guest, op, flags: 0, room: 1 << 20, forwarded: 0 }
    }

    pub(crate) fn bytes(&self, source: u64, destination: u64, kind: u16, data: &[u8]) -> Vec<u8> {
        let mut bytes = [source.to_le_bytes(), destination.to_le_bytes()].concat();
        bytes.extend([self.guest, self.host, data.len() as u32].map(u32::to_le_bytes).concat());
        bytes.extend([kind, self.op].map(u16::to_le_bytes).concat());
        bytes.extend([self.flags, self.room, self.forwarded].map(u32::to_le_bytes).concat());
        [&bytes, data].concat()
    }

    pub(crate) fn parse(bytes: &[u8]) -> (Self, u16, Vec<u8>) {
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

pub(crate) struct Vm {
    pub(crate) guest: Guest,
    pub(crate) device: Arc<Vsock>,
    pub(crate) dir: TempDir,
    /// Where each buffer for packets is, by its name in the ring.
    pub(crate) rooms: RefCell<HashMap<u16, (u64, u32)>>,
}

pub(crate) fn device() -> (Arc<Vsock>, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (Arc::new(Vsock::new(CID, &dir.path().join("vsock")).unwrap()), dir)
}

pub(crate) fn vm() -> Vm {
    vm_with(&[ROOM; 8])
}

pub(crate) fn vm_with(rooms: &[u32]) -> Vm {
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
    pub(crate) fn room(&self, at: u64, len: u32) {
        let head = self.guest.offer(RX, &[(at, len, WRITE)]);
        self.rooms.borrow_mut().insert(head, (at, len));
        self.guest.kick(RX);
    }

    pub(crate) fn base(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    pub(crate) fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("vsock_{port}"))).unwrap()
    }

    /// Has these bytes sent, in buffers of some lengths.
    pub(crate) fn send_bytes(&self, bytes: &[u8]) {
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

    pub(crate) fn send(&self, packet: Packet, data: &[u8]) {
        self.send_bytes(&packet.bytes(CID, HOST, STREAM, data));
    }

    /// Waits for the next packet, of any kind.
    pub(crate) fn receive_any(&self) -> (u64, u16, Packet, Vec<u8>) {
        let (head, len) = self.guest.wait(RX);
        let (at, room) = self.rooms.borrow_mut().remove(&head).unwrap();
        let bytes = self.guest.bytes(at, len as usize);
        self.room(at, room);
        let (packet, kind, data) = Packet::parse(&bytes);
        (u64::from_le_bytes(bytes[..8].try_into().unwrap()), kind, packet, data)
    }

    /// The last packet that is there, if there is one.
    pub(crate) fn last(&self) -> Option<Packet> {
        let mut last = None;
        while let Some((head, len)) = self.guest.take(RX) {
            let (at, room) = self.rooms.borrow_mut().remove(&head).unwrap();
            last = Some(Packet::parse(&self.guest.bytes(at, len as usize)).0);
            self.room(at, room);
        }
        last
    }

    pub(crate) fn receive(&self) -> (Packet, Vec<u8>) {
        let (source, kind, packet, data) = self.receive_any();
        assert_eq!((source, kind), (HOST, STREAM));
        (packet, data)
    }

    /// Waits for a packet of this connection that says this and has no data. Returns its flags.
    pub(crate) fn expect(&self, op: u16, host: u32, guest: u32) -> u32 {
        let (packet, data) = self.receive();
        assert_eq!((packet.op, packet.host, packet.guest), (op, host, guest), "{packet:?}");
        assert!(data.is_empty());
        packet.flags
    }

    /// Waits until the guest knows that the program is gone. It may be told of its two halves one by one.
    pub(crate) fn expect_end(&self, host: u32, guest: u32) {
        let mut flags = 0;
        while flags != RCV | SEND {
            flags |= self.expect(SHUTDOWN, host, guest);
        }
    }

    pub(crate) fn expect_data(&self, wanted: &[u8]) {
        let mut all = Vec::new();
        while all.len() < wanted.len() {
            let (packet, data) = self.receive();
            assert_eq!((packet.op, packet.room), (RW, MAX_BUFFERED as u32));
            all.extend(data);
        }
        assert!(all == wanted, "other data");
    }

    pub(crate) fn expect_nothing(&self) {
        std::thread::sleep(A_WHILE);
        assert_eq!(self.guest.take(RX), None);
    }

    /// Connects the guest to a program that listens.
    pub(crate) fn connect(&self, listener: &UnixListener, host: u32, guest: u32) -> UnixStream {
        self.send(Packet::new(REQUEST, host, guest), &[]);
        let stream = patient(listener.accept().unwrap().0);
        self.expect(RESPONSE, host, guest);
        stream
    }

    /// Connects a program to the guest up to the guest's answer. Returns the host's port.
    pub(crate) fn ask(&self, port: u32) -> (UnixStream, u32) {
        let mut stream = patient(UnixStream::connect(self.base()).unwrap());
        writeln!(stream, "CONNECT {port}").unwrap();
        let (packet, _) = self.receive();
        assert_eq!((packet.op, packet.guest), (REQUEST, port));
        (stream, packet.host)
    }
}

pub(crate) fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

pub(crate) fn read(mut stream: &UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

pub(crate) fn at_end(mut stream: &UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(count) => count == 0,
        // There may have been something that nobody will read.
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

pub(crate) fn wait(done: impl Fn() -> bool, what: &str) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

pub(crate) fn noise(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}
