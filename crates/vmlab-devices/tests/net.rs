//! A network interface through chains of a guest. Numbers are those of virtio 1.2, 5.1.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};
use vmlab_devices::net::{
    Backend, Datagrams, MAX_FRAME, MIN_FRAME, MacAddress, Net, Passt, Stream, Traffic,
};
use vmlab_devices::{Device, OnFault, Workers};

#[path = "common/driver.rs"]
#[allow(dead_code, reason = "not every test uses all of it")]
mod driver;
#[path = "common/rest.rs"]
mod rest;

use driver::{BUFFERS, Driver, NEXT, USED, WRITE};
use rest::expect_rest;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const HEADER: usize = 12;
const ADDRESS: MacAddress = MacAddress([2, 0x76, 0, 0, 0, 1]);

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// Time in which what must not happen would.
const A_WHILE: Duration = Duration::from_millis(50);

/// One queue of a device, which is served.
struct Served {
    driver: Driver,
    device: Arc<Net>,
    index: usize,
    kick: OwnedFd,
    workers: Option<Workers>,
}

fn served(device: &Arc<Net>, index: usize) -> Served {
    let kick = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let device = Arc::clone(device);
    let mut served = Served { driver: Driver::new(), device, index, kick, workers: None };
    served.start();
    served
}

impl Served {
    fn start(&mut self) {
        let on_fault: OnFault = Arc::new(|index, fault| panic!("queue {index}: {fault}"));
        let (queue, kick) = (Arc::clone(&self.driver.queue), self.kick.try_clone().unwrap());
        let device: Arc<dyn Device> = self.device.clone();
        let workers = Workers::start(device, self.index, queue, kick, &on_fault).unwrap();
        self.workers = Some(workers);
    }

    fn stop(&mut self) {
        let begin = Instant::now();
        self.workers.take().unwrap().stop();
        assert!(begin.elapsed() < PATIENCE / 2, "the queue does not stop");
    }

    fn kick(&self) {
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Offers room for a frame with its header, at a place that its number says.
    fn room(&self, number: u16, len: u32) {
        self.driver.describe(number, (place(number), len, WRITE, 0));
        self.driver.offer(number);
        self.kick();
    }

    /// Has bytes sent, header and all, in buffers of these lengths.
    fn send(&self, bytes: &[u8], lens: &[u32]) {
        let before = self.driver.number(USED + 2);
        self.driver.memory.write_slice(bytes, GuestAddress(BUFFERS)).unwrap();
        let mut at = BUFFERS;
        for (index, len) in (0u16..).zip(lens) {
            let last = usize::from(index) + 1 == lens.len();
            let flags = if last { 0 } else { NEXT };
            self.driver.describe(index, (at, *len, flags, index + 1));
            at += u64::from(*len);
        }
        self.driver.offer(0);
        self.kick();
        self.wait(before.wrapping_add(1));
    }

    /// Has a frame sent.
    fn send_frame(&self, frame: &[u8]) {
        self.send(&[&[0; HEADER][..], frame].concat(), &[12, frame.len() as u32]);
    }

    /// Waits until so many chains were given back.
    fn wait(&self, used: u16) {
        wait(|| self.driver.number(USED + 2) == used, "no chain is given back");
    }

    /// The bytes of the last frame that came, with its header.
    fn last(&self, number: u16) -> Vec<u8> {
        let (head, len) = *self.driver.used().last().unwrap();
        assert_eq!(head, u32::from(number));
        self.driver.bytes(place(number), len as usize)
    }
}

fn wait(done: impl Fn() -> bool, what: &str) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

/// What a guest sends is counted after it is given back.
fn wait_for(device: &Net, traffic: Traffic) {
    wait(|| device.traffic() == traffic, "other frames are counted");
}

fn place(number: u16) -> u64 {
    BUFFERS + 0x20_000 * u64::from(number)
}

fn net(backend: impl Backend + 'static) -> Arc<Net> {
    Arc::new(Net::new(Box::new(backend), ADDRESS, None))
}

fn datagrams() -> (Arc<Net>, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    (net(Datagrams::new(ours.into())), theirs)
}

fn stream() -> (Arc<Net>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    (net(Stream::new(ours.into())), theirs)
}

fn frame(byte: u8, len: usize) -> Vec<u8> {
    vec![byte; len]
}

/// What a guest gets of a frame.
fn with_header(frame: &[u8]) -> Vec<u8> {
    // All but the number of buffers, 1, is zero.
    [&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0][..], frame].concat()
}

fn on_stream(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes(), frame].concat()
}

fn read_frame(mut stream: &UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut frame).unwrap();
    frame
}

#[test]
fn a_guest_is_told_its_address_and_perhaps_an_mtu() {
    let (ours, _theirs) = UnixDatagram::pair().unwrap();
    let device = Net::new(Box::new(Datagrams::new(ours.into())), ADDRESS, Some(0x1234));
    assert_eq!((device.id(), device.features()), (1, 1 << 5 | 1 << 3));
    assert_eq!(device.config(), [2, 0x76, 0, 0, 0, 1, 0, 0, 0, 0, 0x34, 0x12]);
    let (device, _theirs) = datagrams();
    assert_eq!(device.features(), 1 << 5);
}

#[test]
fn frames_of_the_host_come_with_a_header() {
    let (device, host) = datagrams();
    let guest = served(&device, RECEIVE);
    guest.room(0, 1526);
    host.send(&frame(7, 60)).unwrap();
    guest.wait(1);
    assert_eq!(guest.last(0), with_header(&frame(7, 60)));

    // Without room they wait.
    host.send(&frame(8, 1514)).unwrap();
    host.send(&frame(9, 14)).unwrap();
    std::thread::sleep(A_WHILE);
    guest.room(1, 1526);
    guest.wait(2);
    assert_eq!(guest.last(1), with_header(&frame(8, 1514)));
    guest.room(2, HEADER as u32 + 14);
    guest.wait(3);
    assert_eq!(guest.last(2), with_header(&frame(9, 14)));
    assert_eq!(device.traffic(), Traffic { received: 3, ..Traffic::default() });
}

#[test]
fn frames_without_enough_room_are_lost_alone() {
    let (device, host) = datagrams();
    let guest = served(&device, RECEIVE);
    let lens = [1526, HEADER as u32 - 1, 1, 1526, HEADER as u32 + MAX_FRAME as u32 + 9];
    for (number, len) in (0..).zip(lens) {
        guest.room(number, len);
    }
    // Without any room at all.
    guest.driver.describe(5, (BUFFERS, 64, 0, 0));
    guest.driver.offer(5);
    guest.room(6, HEADER as u32 + MAX_FRAME as u32);
    for len in [1515, 60, 60, 1514, MAX_FRAME + 1, 60, MAX_FRAME] {
        host.send(&frame(1, len)).unwrap();
    }
    guest.wait(7);
    let lens: Vec<_> = guest.driver.used().iter().map(|(_, len)| *len).collect();
    let longest = (HEADER + MAX_FRAME) as u32;
    assert_eq!(lens, [0, 0, 0, 1526, 0, 0, longest]);
    assert_eq!(guest.last(6), with_header(&frame(1, MAX_FRAME)));
    assert_eq!(device.traffic(), Traffic { received: 2, dropped: 5, ..Traffic::default() });
}

#[test]
fn malformed_room_costs_no_frame() {
    let (device, host) = datagrams();
    let guest = served(&device, RECEIVE);
    host.send(&frame(3, 60)).unwrap();
    guest.driver.describe(0, (driver::MEMORY, 1526, WRITE, 0));
    guest.driver.offer(0);
    guest.kick();
    guest.wait(1);
    guest.room(1, 1526);
    guest.wait(2);
    assert_eq!(guest.last(1), with_header(&frame(3, 60)));
}

#[test]
fn a_stop_loses_no_room_and_no_frame() {
    let (device, host) = datagrams();
    let mut guest = served(&device, RECEIVE);
    guest.room(0, 1526);
    std::thread::sleep(A_WHILE);
    guest.stop();
    assert!(guest.driver.used().is_empty());
    host.send(&frame(4, 60)).unwrap();
    guest.start();
    guest.wait(1);
    assert_eq!(guest.last(0), with_header(&frame(4, 60)));
}

#[test]
fn only_frames_of_the_guest_go_out() {
    let (device, host) = datagrams();
    let guest = served(&device, TRANSMIT);
    let bytes = [&[0xff; HEADER][..], &frame(5, MAX_FRAME + 1)].concat();
    let longest = (HEADER + MAX_FRAME) as u32;
    let shortest = (HEADER + MIN_FRAME) as u32;
    // Without a whole header, a frame, enough of one; or too much of it.
    for lens in [&[1][..], &[11], &[12], &[12, 13], &[longest + 1], &[shortest - 1], &[1 << 20]] {
        guest.send(&bytes, lens);
    }
    // Room alone.
    guest.driver.describe(0, (BUFFERS, 1526, WRITE, 0));
    guest.driver.offer(0);
    guest.kick();
    guest.wait(8);
    for lens in [&[12, 60][..], &[72], &[5, 8, 59], &[shortest]] {
        guest.send(&bytes, lens);
    }
    let mut buffer = [0; 100];
    for len in [60, 60, 60, MIN_FRAME] {
        let length = host.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..length], frame(5, len)[..]);
    }
    assert!(guest.driver.used().iter().all(|(_, len)| *len == 0));
    wait_for(&device, Traffic { sent: 4, refused: 8, ..Traffic::default() });
}

#[test]
fn a_full_port_does_not_stop_a_guest() {
    let (device, host) = datagrams();
    let guest = served(&device, TRANSMIT);
    let begin = Instant::now();
    while device.traffic().lost < 3 {
        guest.send_frame(&frame(6, 1500));
        assert!(begin.elapsed() < PATIENCE, "the socket is never full");
    }
    let sent = device.traffic().sent;
    assert!(sent > 0);
    host.set_nonblocking(true).unwrap();
    let mut buffer = [0; 2000];
    let there = std::iter::from_fn(|| host.recv(&mut buffer).ok()).count();
    assert_eq!(there as u64, sent);
}

#[test]
fn frames_of_a_stream_come_in_pieces_and_together() {
    let (device, mut host) = stream();
    let guest = served(&device, RECEIVE);
    for number in 0..5 {
        guest.room(number, HEADER as u32 + MAX_FRAME as u32);
    }
    for byte in on_stream(&frame(1, 60)) {
        host.write_all(&[byte]).unwrap();
        std::thread::yield_now();
    }
    guest.wait(1);
    assert_eq!(guest.last(0), with_header(&frame(1, 60)));
    // One that is empty is none.
    let several = [frame(2, 60), Vec::new(), frame(3, 1514), frame(4, MAX_FRAME), frame(5, 14)];
    let bytes: Vec<u8> = several.iter().flat_map(|frame| on_stream(frame)).collect();
    host.write_all(&bytes).unwrap();
    guest.wait(5);
    let lens: Vec<_> = guest.driver.used().iter().map(|(_, len)| *len as usize).collect();
    let longest = HEADER + MAX_FRAME;
    assert_eq!(lens, [72, 72, HEADER + 1514, longest, HEADER + 14]);
    assert_eq!(guest.driver.bytes(place(3), longest), with_header(&frame(4, MAX_FRAME)));
    assert_eq!(guest.last(4), with_header(&frame(5, 14)));
}

#[test]
fn a_stream_out_of_step_or_at_its_end_is_no_more_work() {
    for end in [&u32::to_be_bytes(MAX_FRAME as u32 + 1)[..], &[]] {
        let (device, mut host) = stream();
        let mut guest = served(&device, RECEIVE);
        guest.room(0, 1526);
        host.write_all(&on_stream(&frame(1, 60))).unwrap();
        guest.wait(1);
        guest.room(1, 1526);
        host.write_all(end).unwrap();
        let kept = (!end.is_empty()).then_some(&host);
        if kept.is_none() {
            host.shutdown(std::net::Shutdown::Both).unwrap();
        }
        expect_rest();
        guest.stop();
        assert_eq!(guest.driver.used().len(), 1);
        // Nor is it for what the guest sends.
        let other = served(&device, TRANSMIT);
        other.send_frame(&frame(2, 60));
    }
}

#[test]
fn a_full_stream_holds_the_guest_until_there_is_room() {
    let (device, host) = stream();
    let mut guest = served(&device, TRANSMIT);
    let begin = Instant::now();
    let mut frames = Vec::new();
    // A frame that waits is in no buffer of the guest any more; the one behind it is.
    loop {
        let number = frames.len() as u32;
        let frame = [&number.to_be_bytes()[..], &frame(9, 60_001)].concat();
        let bytes = [&[0; HEADER][..], &frame].concat();
        guest.driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        guest.driver.describe(0, (BUFFERS, bytes.len() as u32, 0, 0));
        guest.driver.offer(0);
        guest.kick();
        frames.push(frame);
        let served = |guest: &Served| guest.driver.number(USED + 2) == frames.len() as u16;
        std::thread::sleep(A_WHILE / 10);
        if !served(&guest) {
            std::thread::sleep(A_WHILE);
            guest.stop();
            if !served(&guest) {
                break;
            }
            // It was only slow.
            guest.start();
        }
        assert!(begin.elapsed() < PATIENCE, "the socket is never full");
    }
    guest.start();
    for frame in &frames {
        assert!(read_frame(&host) == *frame, "another frame than {:?}", &frame[..4]);
    }
    guest.wait(frames.len() as u16);
    wait_for(&device, Traffic { sent: frames.len() as u64, ..Traffic::default() });
}

/// A question for who has an address: RFC 826.
fn arp(of: [u8; 4]) -> Vec<u8> {
    let mine = [10, 0, 2, 15];
    let kinds = [0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1];
    let parts = [&[0xff; 6][..], &ADDRESS.0, &kinds, &ADDRESS.0, &mine, &[0; 6], &of];
    parts.concat()
}

#[test]
fn passt_answers_a_guest() {
    let (mut passt, socket) = match Passt::start(|_| ()) {
        Ok(started) => started,
        Err(error) => panic!("this test needs the package passt: {error}"),
    };
    let device = net(Stream::new(socket));
    let (inward, outward) = (served(&device, RECEIVE), served(&device, TRANSMIT));
    for (number, of) in [[10, 0, 2, 2], [10, 0, 2, 3]].into_iter().enumerate() {
        inward.room(number as u16, 1526);
        outward.send_frame(&arp(of));
        let begin = Instant::now();
        while inward.driver.number(USED + 2) == number as u16 {
            if let Some(why) = passt.ended().unwrap() {
                panic!("{why}");
            }
            assert!(begin.elapsed() < PATIENCE, "passt does not answer");
            std::thread::yield_now();
        }
        let reply = inward.last(number as u16);
        let reply = &reply[HEADER..];
        // To us, from the gateway: a reply of ARP about the address that was asked for.
        assert_eq!(reply[..6], ADDRESS.0);
        assert_eq!(reply[6..12], [0x52, 0x55, 0x0a, 0, 2, 2]);
        assert_eq!(reply[12..22], [0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2]);
        assert_eq!(reply[28..32], of);
    }
    assert_eq!(passt.ended().unwrap(), None);
}

#[test]
fn passt_ends_with_its_socket() {
    let (mut passt, socket) = match Passt::start(|_| ()) {
        Ok(started) => started,
        Err(error) => panic!("this test needs the package passt: {error}"),
    };
    drop(socket);
    let begin = Instant::now();
    while passt.ended().unwrap().is_none() {
        assert!(begin.elapsed() < PATIENCE, "passt goes on");
        std::thread::sleep(Duration::from_millis(1));
    }
}
