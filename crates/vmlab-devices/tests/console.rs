//! A console with ports, through virtio-mmio. Numbers are those of virtio 1.2, 5.3.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmlab_devices::Device;
use vmlab_devices::console::{Console, MAX_NAME, MAX_PORTS, Port};
use vmlab_devices::transport::mmio::{StateError, register};

#[path = "common/guest.rs"]
#[allow(dead_code, reason = "not every test uses all of it")]
mod guest;

use guest::{
    ACKNOWLEDGE, BUFFERS, DRIVER, DRIVER_OK, FEATURES_OK, Guest, MEMORY, SIZE, WRITE, available,
};

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// The queues for control, and those of port 1.
const TELL: u32 = 2;
const HEAR: u32 = 3;
const INPUT: u32 = 4;
const OUTPUT: u32 = 5;

/// Where messages are, and data.
const SAID: u64 = BUFFERS;
const HEARD: u64 = BUFFERS + 0x1000;
const DATA: u64 = BUFFERS + 0x1_0000;

/// Long enough for what should not happen.
const MOMENT: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(20);

fn message(id: u32, event: u16, value: u16) -> Vec<u8> {
    [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

fn pair() -> (UnixStream, UnixStream) {
    let (here, there) = UnixStream::pair().unwrap();
    here.set_read_timeout(Some(PATIENCE)).unwrap();
    here.set_write_timeout(Some(PATIENCE)).unwrap();
    (here, there)
}

/// A console that the host has left, and a channel.
fn console(stream: UnixStream) -> Arc<Console> {
    let channel = Port::channel("vmlab").with_stream(stream);
    Arc::new(Console::new(vec![Port::console(), channel]).unwrap())
}

fn say(guest: &Guest, id: u32, event: u16, value: u16) {
    guest.put(SAID, &message(id, event, value));
    let head = guest.offer(HEAR, &[(SAID, 8, 0)]);
    guest.kick(HEAR);
    assert_eq!(guest.wait(HEAR), (head, 0));
}

/// Gives a buffer for a message.
fn listen(guest: &Guest) {
    guest.offer(TELL, &[(HEARD, 0x1000, WRITE)]);
    guest.kick(TELL);
}

fn heard(guest: &Guest) -> Vec<u8> {
    let (_, len) = guest.wait(TELL);
    guest.bytes(HEARD, len as usize)
}

fn hear(guest: &Guest) -> Vec<u8> {
    listen(guest);
    heard(guest)
}

/// The set-up of Linux, up to where a program has opened port 1.
fn open(guest: &Guest) {
    guest.start();
    say(guest, 0, DEVICE_READY, 1);
    assert_eq!(hear(guest), message(0, PORT_ADD, 1));
    assert_eq!(hear(guest), message(1, PORT_ADD, 1));
    say(guest, 0, PORT_READY, 1);
    assert_eq!(hear(guest), message(0, CONSOLE_PORT, 1));
    say(guest, 1, PORT_READY, 1);
    assert_eq!(hear(guest), [&message(1, PORT_NAME, 1)[..], b"vmlab"].concat());
    assert_eq!(hear(guest), message(1, PORT_OPEN, 1));
    say(guest, 1, PORT_OPEN, 1);
}

fn opened() -> (Guest, UnixStream) {
    let (here, there) = pair();
    let guest = Guest::new(console(there));
    open(&guest);
    (guest, here)
}

/// Bytes that are not the same anywhere near.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n ^ n >> 8 ^ n >> 16) as u8).collect()
}

fn never(what: impl Fn() -> bool) {
    std::thread::sleep(MOMENT);
    assert!(!what());
}

fn until(what: impl Fn() -> bool) {
    let begin = Instant::now();
    while !what() {
        assert!(begin.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn messages_wait_for_buffers() {
    let (_here, there) = pair();
    let guest = Guest::new(console(there));
    guest.start();
    for _ in 0..100 {
        say(&guest, 0, DEVICE_READY, 1);
        say(&guest, 1, PORT_READY, 1);
    }
    let expected = [
        message(0, PORT_ADD, 1),
        message(1, PORT_ADD, 1),
        [&message(1, PORT_NAME, 1)[..], b"vmlab"].concat(),
        message(1, PORT_OPEN, 1),
    ];
    for message in expected {
        assert_eq!(hear(&guest), message);
    }
    // And buffers for messages, which are not given back without one.
    listen(&guest);
    never(|| guest.take(TELL).is_some());
    say(&guest, 0, PORT_READY, 1);
    assert_eq!(heard(&guest), message(0, CONSOLE_PORT, 1));
}

#[test]
fn bytes_go_both_ways() {
    let (guest, mut host) = opened();
    guest.put(DATA, b"from the guest");
    let head = guest.offer(OUTPUT, &[(DATA, 4, 0), (DATA + 4, 10, 0)]);
    guest.kick(OUTPUT);
    assert_eq!(guest.wait(OUTPUT), (head, 0));
    let mut bytes = [0; 14];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"from the guest");

    // Room waits for bytes.
    let first = guest.offer(INPUT, &[(DATA, 4, WRITE), (DATA + 4, 100, WRITE)]);
    let second = guest.offer(INPUT, &[(DATA + 200, 100, WRITE)]);
    guest.kick(INPUT);
    never(|| guest.take(INPUT).is_some());
    host.write_all(b"from the host").unwrap();
    assert_eq!(guest.wait(INPUT), (first, 13));
    assert_eq!(guest.bytes(DATA, 13), b"from the host");
    host.write_all(b"more").unwrap();
    assert_eq!(guest.wait(INPUT), (second, 4));
    // Bytes wait for room, and fill it.
    host.write_all(&pattern(5000)).unwrap();
    for part in pattern(5000).chunks(2000) {
        let head = guest.offer(INPUT, &[(DATA, 1000, WRITE), (DATA + 1000, 1000, WRITE)]);
        guest.kick(INPUT);
        assert_eq!(guest.wait(INPUT), (head, part.len() as u32));
        assert_eq!(guest.bytes(DATA, part.len()), part);
    }
}

#[test]
fn a_port_that_is_not_open_gets_nothing() {
    let (guest, mut host) = opened();
    say(&guest, 1, PORT_OPEN, 0);
    let head = guest.offer(INPUT, &[(DATA, 100, WRITE)]);
    guest.kick(INPUT);
    host.write_all(b"later").unwrap();
    never(|| guest.take(INPUT).is_some());
    say(&guest, 1, PORT_OPEN, 1);
    assert_eq!(guest.wait(INPUT), (head, 5));
    // It may close while it waits.
    guest.offer(INPUT, &[(DATA, 100, WRITE)]);
    guest.kick(INPUT);
    std::thread::sleep(MOMENT);
    say(&guest, 1, PORT_OPEN, 0);
    host.write_all(b"again").unwrap();
    never(|| guest.take(INPUT).is_some());
}

#[test]
fn a_host_that_closes_ends_its_port_alone() {
    let (console_here, console_there) = pair();
    let (here, there) = pair();
    let ports =
        vec![Port::console().with_stream(console_there), Port::channel("vmlab").with_stream(there)];
    let guest = Guest::new(Arc::new(Console::new(ports).unwrap()));
    guest.start();
    say(&guest, 1, PORT_READY, 1);
    hear(&guest);
    hear(&guest);
    say(&guest, 1, PORT_OPEN, 1);
    guest.offer(INPUT, &[(DATA, 100, WRITE)]);
    guest.kick(INPUT);
    (&here).write_all(b"end").unwrap();
    drop(here);
    // What was sent before comes first.
    assert_eq!(guest.wait(INPUT).1, 3);
    guest.offer(INPUT, &[(DATA, 100, WRITE)]);
    guest.kick(INPUT);
    assert_eq!(hear(&guest), message(1, PORT_OPEN, 0));
    never(|| guest.take(INPUT).is_some());
    for _ in 0..3 {
        guest.offer(OUTPUT, &[(DATA, 100, 0)]);
        guest.kick(OUTPUT);
        guest.wait(OUTPUT);
    }
    // The other port is there. Its driver never said that it knows several.
    guest.put(DATA, b"login:");
    guest.offer(1, &[(DATA, 6, 0)]);
    guest.kick(1);
    guest.wait(1);
    let mut bytes = [0; 6];
    (&console_here).read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"login:");
    guest.offer(0, &[(DATA, 100, WRITE)]);
    guest.kick(0);
    (&console_here).write_all(b"root").unwrap();
    assert_eq!(guest.wait(0).1, 4);
    assert!(guest.faults.lock().unwrap().is_empty());
}

#[test]
fn a_driver_that_knows_one_port_uses_it() {
    let (mut host, there) = pair();
    let guest = Guest::new(Arc::new(
        Console::new(vec![Port::console().with_stream(there), Port::channel("other")]).unwrap(),
    ));
    guest.add_status(ACKNOWLEDGE | DRIVER);
    guest.accept(1 << 32 | 1 << 29);
    guest.add_status(FEATURES_OK);
    for queue in [0, 1] {
        guest.place(queue);
        assert!(guest.ready());
    }
    guest.add_status(DRIVER_OK);
    guest.put(DATA, b"?");
    guest.offer(1, &[(DATA, 1, 0)]);
    guest.kick(1);
    guest.wait(1);
    host.read_exact(&mut [0]).unwrap();
    host.write_all(b"!").unwrap();
    guest.offer(0, &[(DATA, 1, WRITE)]);
    guest.kick(0);
    assert_eq!(guest.wait(0).1, 1);
    assert_eq!(guest.bytes(DATA, 1), b"!");
}

#[test]
fn a_console_that_the_host_has_left_takes_everything() {
    let (guest, _host) = opened();
    say(&guest, 0, PORT_OPEN, 1);
    guest.offer(0, &[(DATA, 100, WRITE)]);
    guest.kick(0);
    for _ in 0..100 {
        guest.offer(1, &[(DATA, 4096, 0)]);
        guest.kick(1);
        guest.wait(1);
    }
    assert!(guest.take(0).is_none());
}

#[test]
fn sizes_are_told() {
    let (_here, there) = pair();
    let device = console(there);
    let guest = Guest::new(device.clone());
    assert_eq!(guest.get(register::CONFIG + 4), 2, "ports");
    assert_eq!(guest.get(register::QUEUE_NUM_MAX), 128);
    device.resize(80, 25);
    guest.mmio.config_changed();
    assert_eq!(guest.get(register::CONFIG), 25 << 16 | 80);
    open_sized(&guest);
    for columns in 100..200 {
        device.resize(columns, 50);
    }
    // The last one is enough, though more may have been told.
    let mut sizes = std::iter::repeat_with(|| hear(&guest));
    let last = [&message(0, RESIZE, 1)[..], &[199, 0, 50, 0]].concat();
    assert!(sizes.any(|size| size == last));
}

fn open_sized(guest: &Guest) {
    guest.start();
    say(guest, 0, PORT_READY, 1);
    assert_eq!(hear(guest), message(0, CONSOLE_PORT, 1));
    assert_eq!(hear(guest), [&message(0, RESIZE, 1)[..], &[80, 0, 25, 0]].concat());
}

const PIECE: usize = 128 << 10;
const PIECES: usize = 8;

/// Has the guest send more than a socket takes. Returns the names of the requests.
fn flood(guest: &Guest) -> Vec<u16> {
    let all = pattern(PIECE * PIECES);
    guest.put(DATA, &all);
    let piece = |number: usize| {
        // Where one ends is not where a call ends.
        let at = DATA + (number * PIECE) as u64;
        guest.offer(OUTPUT, &[(at, 1001, 0), (at + 1001, PIECE as u32 - 1001, 0)])
    };
    let heads = (0..PIECES).map(piece).collect();
    guest.kick(OUTPUT);
    heads
}

/// Reads all that was sent, and sees that it was given back.
fn drain(guest: &Guest, mut host: &UnixStream, heads: &[u16]) {
    let mut bytes = vec![0; PIECE * PIECES];
    host.read_exact(&mut bytes).unwrap();
    assert!(bytes == pattern(PIECE * PIECES));
    for head in heads {
        assert_eq!(guest.wait(OUTPUT), (*head, 0));
    }
    host.set_nonblocking(true).unwrap();
    assert!(host.read(&mut [0]).is_err(), "there is more");
    host.set_nonblocking(false).unwrap();
}

#[test]
fn a_host_that_does_not_read_blocks_one_queue() {
    let (guest, mut host) = opened();
    let heads = flood(&guest);
    std::thread::sleep(MOMENT);
    let spare = DATA + (PIECE * PIECES) as u64;
    guest.offer(INPUT, &[(spare, 100, WRITE)]);
    guest.kick(INPUT);
    host.write_all(b"x").unwrap();
    assert_eq!(guest.wait(INPUT).1, 1);
    say(&guest, 1, PORT_OPEN, 1);
    // Not all of it was sent.
    let idle = opened_state();
    until(|| guest.mmio.state().device != idle);
    drain(&guest, &host, &heads);
}

#[test]
fn a_stop_in_the_middle_of_a_request_loses_nothing() {
    let idle = opened_state();
    let (guest, host) = opened();
    for _ in 0..3 {
        let heads = flood(&guest);
        until(|| guest.mmio.state().device != idle);
        std::thread::sleep(MOMENT);
        let begin = Instant::now();
        guest.mmio.quiesce();
        assert!(begin.elapsed() < Duration::from_secs(5));
        let queue = guest.mmio.state().queues[OUTPUT as usize];
        assert_eq!(queue.next_available, queue.next_used);
        let stopped = guest.mmio.state();
        std::thread::sleep(MOMENT);
        assert_eq!(guest.mmio.state(), stopped);
        guest.mmio.resume().unwrap();
        drain(&guest, &host, &heads);
    }
}

/// What a device keeps where nothing is in progress.
fn opened_state() -> Vec<u8> {
    let (guest, _host) = opened();
    guest.mmio.state().device
}

#[test]
fn another_device_goes_on_in_the_middle_of_a_request() {
    let (here, there) = pair();
    let first = Guest::new(console(there.try_clone().unwrap()));
    open(&first);
    let heads = flood(&first);
    listen(&first);
    let idle = opened_state();
    until(|| first.mmio.state().device != idle);
    std::thread::sleep(MOMENT);
    first.mmio.quiesce();
    let state = first.mmio.state();
    assert_ne!(state.device, idle);
    let second = first.moved_to(console(there));
    second.mmio.restore(&state).unwrap();
    drain(&second, &here, &heads);
    // The port is open, and the buffer for messages still there.
    (&here).write_all(b"hi").unwrap();
    second.offer(INPUT, &[(DATA, 100, WRITE)]);
    second.kick(INPUT);
    assert_eq!(second.wait(INPUT).1, 2);
    here.shutdown(std::net::Shutdown::Both).unwrap();
    second.offer(INPUT, &[(DATA, 100, WRITE)]);
    second.kick(INPUT);
    assert_eq!(heard(&second), message(1, PORT_OPEN, 0));

    // One without the channel's other end says so.
    second.mmio.quiesce();
    let ports = vec![Port::console(), Port::channel("vmlab")];
    let third = first.moved_to(Arc::new(Console::new(ports).unwrap()));
    third.mmio.restore(&state).unwrap();
    assert_eq!(heard(&third), message(1, PORT_OPEN, 0));
}

#[test]
fn a_reset_ends_what_waits_and_begins_anew() {
    let (guest, mut host) = opened();
    for _ in 0..3 {
        open(&guest);
        // The first request of a ring, as is the one below.
        guest.put(DATA, &pattern(PIECE * PIECES));
        guest.offer(OUTPUT, &[(DATA, (PIECE * PIECES) as u32, 0)]);
        guest.kick(OUTPUT);
        listen(&guest);
        std::thread::sleep(MOMENT);
        let begin = Instant::now();
        guest.set(register::STATUS, 0);
        assert!(begin.elapsed() < Duration::from_secs(5));
        host.set_nonblocking(true).unwrap();
        let mut rest = Vec::new();
        let _ = host.read_to_end(&mut rest);
        host.set_nonblocking(false).unwrap();
        assert!(rest == pattern(rest.len()) && rest.len() < PIECE * PIECES);
        // The guest's driver begins with the whole handshake, and nothing of before comes.
        open(&guest);
        guest.put(DATA, b"anew");
        guest.offer(OUTPUT, &[(DATA, 4, 0)]);
        guest.kick(OUTPUT);
        guest.wait(OUTPUT);
        let mut bytes = [0; 4];
        host.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"anew");
    }
}

#[test]
fn requests_that_make_no_sense_are_given_back() {
    let (guest, mut host) = opened();
    // Messages that are too short, too long, or no messages.
    guest.put(SAID, &message(1, PORT_OPEN, 0));
    for buffers in [&[(SAID, 7, 0)][..], &[(SAID, 8, WRITE)], &[(MEMORY, 8, 0)], &[(SAID, 0, 0)]] {
        guest.offer(HEAR, buffers);
        guest.kick(HEAR);
        assert_eq!(guest.wait(HEAR).1, 0);
    }
    // Room that is none: what was to be told waits for better.
    say(&guest, 0, PORT_READY, 1);
    for buffers in [&[(HEARD, 7, WRITE)][..], &[(HEARD, 8, 0)], &[(MEMORY - 4, 8, WRITE)]] {
        guest.offer(TELL, buffers);
        guest.kick(TELL);
        assert_eq!(guest.wait(TELL).1, 0);
    }
    assert_eq!(hear(&guest), message(0, CONSOLE_PORT, 1));
    guest.offer(INPUT, &[(DATA, 8, 0)]);
    guest.offer(INPUT, &[(MEMORY - 4, 8, WRITE)]);
    guest.offer(OUTPUT, &[(DATA, 8, WRITE)]);
    guest.offer(OUTPUT, &[(DATA, u32::MAX, 0)]);
    for queue in [INPUT, OUTPUT] {
        guest.kick(queue);
        assert_eq!(guest.wait(queue).1, 0);
        assert_eq!(guest.wait(queue).1, 0);
    }
    // The port is open still, and nothing was sent.
    host.write_all(b"x").unwrap();
    guest.offer(INPUT, &[(DATA, 8, WRITE)]);
    guest.kick(INPUT);
    assert_eq!(guest.wait(INPUT).1, 1);
    host.set_nonblocking(true).unwrap();
    assert!(host.read(&mut [0]).is_err());
    // A broken ring is one of its port alone.
    guest.set_number(available(OUTPUT) + 2, 1000);
    guest.kick(OUTPUT);
    until(|| guest.mmio.broken() == 1);
    say(&guest, 1, PORT_OPEN, 1);
}

#[test]
fn states_that_are_none_are_refused() {
    let (_here, there) = pair();
    let device = console(there);
    let good = device.save();
    device.check(&good).unwrap();
    let one = Console::new(vec![Port::console()]).unwrap();
    for bad in [vec![], one.save(), good[1..].to_vec(), vec![0xff; 64], vec![0; 1 << 20]] {
        assert!(device.check(&bad).is_err());
        assert!(device.restore(&bad).is_err());
        assert_eq!(device.save(), good);
    }
    for at in 0..good.len() {
        let mut changed = good.clone();
        changed[at] ^= 0xff;
        // It may be one, and is then taken without a panic.
        let _ = device.restore(&changed);
    }
    device.restore(&good).unwrap();
    let guest = Guest::new(device);
    let mut state = guest.mmio.state();
    state.device.clear();
    assert!(matches!(guest.mmio.restore(&state), Err(StateError::Device(_))));
}

#[test]
fn ports_have_limits() {
    let ports = |count| (0..count).map(|n| Port::channel(n.to_string())).collect::<Vec<_>>();
    assert!(Console::new(ports(0)).is_err());
    assert!(Console::new(ports(MAX_PORTS + 1)).is_err());
    assert!(Console::new(vec![Port::channel("")]).is_err());
    assert!(Console::new(vec![Port::channel("x".repeat(MAX_NAME + 1))]).is_err());
    let many = Console::new(ports(MAX_PORTS)).unwrap();
    assert_eq!(many.queues().len(), 64);
    many.check(&many.save()).unwrap();
}

#[test]
fn much_goes_both_ways_at_once() {
    const TOTAL: usize = 16 << 20;
    const PART: usize = 32 << 10;
    let (guest, host) = opened();
    let echo = std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        let mut left = TOTAL;
        while left > 0 {
            let count = (&host).read(&mut buffer).unwrap();
            (&host).write_all(&buffer[..count]).unwrap();
            left -= count;
        }
        host
    });
    let all = pattern(TOTAL);
    let (out, room) = (DATA, DATA + (1 << 20));
    let (mut given, mut taken, mut sent, mut sending) = (0u64, 0u64, 0, 0);
    let mut got = Vec::new();
    let begin = Instant::now();
    while got.len() < TOTAL {
        while given - taken < SIZE.into() {
            guest.offer(INPUT, &[(room + 4096 * (given % u64::from(SIZE)), 4096, WRITE)]);
            given += 1;
        }
        guest.kick(INPUT);
        while sending < SIZE && sent < TOTAL {
            let at = out + (sent % (usize::from(SIZE) * PART)) as u64;
            guest.put(at, &all[sent..sent + PART]);
            guest.offer(OUTPUT, &[(at, PART as u32, 0)]);
            sent += PART;
            sending += 1;
        }
        guest.kick(OUTPUT);
        let (head, len) = guest.wait(INPUT);
        taken += 1;
        got.extend(guest.bytes(room + 4096 * u64::from(head), len as usize));
        while guest.take(OUTPUT).is_some() {
            sending -= 1;
        }
    }
    assert!(got == all);
    drop(echo.join().unwrap());
    eprintln!("{} MiB/s both ways", (TOTAL >> 20) as f64 / begin.elapsed().as_secs_f64());
}
