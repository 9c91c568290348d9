//! Guests that break the rules of virtio-vsock, and programs that do. Numbers are those of virtio 1.2, 5.10.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vmlab_devices::vsock::{MAX_BUFFERED, MAX_CONNECTIONS, MAX_PAYLOAD};

#[path = "common/vsock.rs"]
#[allow(dead_code, unused_imports, reason = "not every test uses all of it")]
mod vsock;

use vsock::*;

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
