//! Streams between a guest and the host, behind virtio-mmio. Numbers are those of virtio 1.2, 5.10.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

use std::cell::RefCell;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vmlab_devices::Device;
use vmlab_devices::vsock::{MAX_BUFFERED, MAX_PAYLOAD, OpenError, Vsock};

#[path = "common/rest.rs"]
mod rest;
#[path = "common/vsock.rs"]
#[allow(dead_code, unused_imports, reason = "not every test uses all of it")]
mod vsock;

use rest::expect_rest;
use vsock::*;

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
