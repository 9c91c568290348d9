//! What the monitor does with a guest that uses a device: a driver of a few instructions.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};
use vmlab_devices::blk::{Blk, Options, Source};
use vmlab_devices::transport::mmio::register;
use vmlab_vmm::End;
use vmlab_vmm::memory::Backing;
use vmlab_vmm::x86_64::layout::{IO_APIC, LOCAL_APIC, slot_address, slot_gsi};
use vmlab_vmm::x86_64::{Config, Machine, Plug};

use super::guest::*;

// Where the guest has its tables and buffers. This program writes most of them, and the guest's code only what
// only the guest can: registers.
const IDT: u32 = 0x21_0000;
const IDT_POINTER: u32 = 0x21_1000;
const HANDLER: u32 = 0x22_0000;
const STACK: u32 = 0x23_0000;
const TABLE: u32 = 0x24_0000;
const AVAILABLE: u32 = 0x24_1000;
const USED: u32 = 0x24_2000;
/// The headers of requests, what they read, and their statuses: a page for each request.
const HEADERS: u32 = 0x25_0000;
const DATA: u32 = 0x26_0000;
const STATUSES: u32 = 0x27_0000;
/// Not zero as soon as the guest may be interrupted.
const GO: u32 = 0x28_0000;
/// How many interrupts of the device the guest has handled.
const HANDLED: u32 = 0x28_1000;
/// Where the second processor counts, in its first 64 KiB.
const SECOND_COUNT: u32 = 0x8800;

/// Of the guest's handler; above those of exceptions.
const VECTOR: u8 = 0x30;
/// Descriptors of the ring.
const SIZE: u32 = 8;
/// The code segment that guests begin with.
const CODE_SEGMENT: u16 = 0x10;
/// `VIRTIO_BLK_S_OK`, and what is there before.
const OK: u8 = 0;
const NO_STATUS: u8 = 0xee;
const SECTOR: usize = 512;
/// All reasons for an interrupt. Of one that is acknowledged for a queue alone, the device is not told.
const ALL: u32 = 0b11;

fn device(register: u32) -> u32 {
    slot_address(0) as u32 + register
}

/// `mov ebx, address of the register`, and code that uses it.
fn load(code: &[u8], register: u32) -> Vec<u8> {
    [&[0xbb], &device(register).to_le_bytes()[..], code].concat()
}

/// `1: pause; cmp byte [address], value; jne 1b`
fn wait_for(address: u32, value: u8) -> Vec<u8> {
    [&[0xf3, 0x90, 0x80, 0x3c, 0x25], &address.to_le_bytes()[..], &[value, 0x75, 0xf4]].concat()
}

/// Where the interrupt is that a guest has to get when it goes on.
#[derive(Clone, Copy, PartialEq)]
enum Pending {
    /// In its local APIC and in the device, which has not been told that the guest knows.
    Everywhere,
    /// In its local APIC alone.
    InApic,
}

/// Sets everything up, asks for one sector and does not let itself be interrupted, then for another one.
fn driver(pending: Pending) -> Vec<u8> {
    let input = 0x10 + 2 * slot_gsi(0);
    // The entry of the interrupt: to APIC 0, as an edge, and not masked.
    let routed = [(input + 1, 0), (input, u32::from(VECTOR))];
    let routed = routed
        .map(|(register, value)| [store(IO_APIC, register), store(IO_APIC + 0x10, value)].concat());
    // Virtio 1.2, 3.1.1 and 4.2.3: of all features, VIRTIO_F_VERSION_1.
    let set_up = [
        (register::STATUS, 1),
        (register::STATUS, 1 | 2),
        (register::DRIVER_FEATURES_SEL, 1),
        (register::DRIVER_FEATURES, 1),
        (register::STATUS, 1 | 2 | 8),
        (register::QUEUE_NUM, SIZE),
        (register::QUEUE_DESC_LOW, TABLE),
        (register::QUEUE_AVAIL_LOW, AVAILABLE),
        (register::QUEUE_USED_LOW, USED),
        (register::QUEUE_READY, 1),
        (register::STATUS, 1 | 2 | 8 | 4),
    ];
    let set_up = set_up.map(|(register, value)| store(device(register), value));
    let ask = |requests: u32| {
        // Flags of zero, and the index behind them.
        [store(AVAILABLE, requests << 16), store(device(register::QUEUE_NOTIFY), 0)].concat()
    };
    let acknowledge = [
        // 1: mov eax, [rbx]; test al, al; jz 1b, with what comes before
        load(&[0x8b, 0x03, 0x84, 0xc0, 0x74, 0xf5], register::INTERRUPT_STATUS),
        store(device(register::INTERRUPT_ACK), ALL),
    ]
    .concat();
    [
        [&[0xbc][..], &STACK.to_le_bytes()].concat(), //                    mov esp, STACK
        [&[0x0f, 0x01, 0x1c, 0x25][..], &IDT_POINTER.to_le_bytes()].concat(), // lidt [IDT_POINTER]
        start_second(),
        routed.concat(),
        set_up.concat(),
        ask(1),
        wait_for(USED + 2, 1),
        if pending == Pending::InApic { acknowledge } else { Vec::new() },
        out(COM1, b'W'),
        wait_for(GO, 1),
        vec![0xfb], // sti
        wait_for(HANDLED, 1),
        ask(2),
        wait_for(HANDLED, 2),
        off(),
    ]
    .concat()
}

/// Acknowledges an interrupt, says the device's reasons for it, and counts it. Where the device had some when it was
/// saved, it may interrupt once too often, which is not counted.
fn handler(pending: Pending) -> Vec<u8> {
    let say = [
        &[0x04, b'0'][..],         // add al, '0'
        &[0x66, 0xba, 0xf8, 0x03], // mov dx, COM1
        &[0xee, 0xfe, 0x04, 0x25], // out dx, al; inc byte [HANDLED]
        &HANDLED.to_le_bytes(),
    ]
    .concat();
    let unless_none = [0x84, 0xc0, 0x74, say.len() as u8]; // test al, al; jz 1f
    [
        load(&[0x8b, 0x03], register::INTERRUPT_STATUS), // mov eax, [rbx]
        store(device(register::INTERRUPT_ACK), ALL),
        if pending == Pending::Everywhere { unless_none.to_vec() } else { Vec::new() },
        say,
        store(LOCAL_APIC + 0xb0, 0), // 1: the end of the interrupt
        vec![0x48, 0xcf],            // iretq
    ]
    .concat()
}

/// Counts for ever.
const SECOND_CODE: [u8; 11] = [
    0x31, 0xc0, //                   xor ax, ax
    0x8e, 0xd8, //                   mov ds, ax
    0x66, 0xff, 0x06, 0x00, 0x88, // 1: inc dword [SECOND_COUNT]
    0xeb, 0xf9, //                   jmp 1b
];

/// What the guest has in its memory before it begins.
fn prepare(machine: &Machine, pending: Pending) {
    let put = |at: u32, bytes: &[u8]| {
        machine.memory().write_slice(bytes, GuestAddress(at.into())).unwrap();
    };
    put(SECOND, &SECOND_CODE);
    put(HANDLER, &handler(pending));
    let [a, b, c, d] = HANDLER.to_le_bytes();
    let [low, high] = CODE_SEGMENT.to_le_bytes();
    // An interrupt gate: Intel SDM volume 3, 6.14.1.
    put(IDT + 16 * u32::from(VECTOR), &[a, b, low, high, 0, 0x8e, c, d]);
    put(IDT_POINTER, &[&0xfff_u16.to_le_bytes()[..], &u64::from(IDT).to_le_bytes()].concat());
    for request in 0..2 {
        // Reads the sector of its number.
        let page = request * 0x1000;
        put(HEADERS + page, &[[0; 8], u64::from(request).to_le_bytes()].concat());
        put(STATUSES + page, &[NO_STATUS]);
        let head = 3 * request as u16;
        let parts = [(HEADERS, 16, 1), (DATA, SECTOR as u32, 1 | 2), (STATUSES, 1, 2)].into_iter();
        for (index, (address, length, flags)) in (head..).zip(parts) {
            // `struct virtq_desc`; flags are NEXT and WRITE.
            let address = u64::from(address + page).to_le_bytes();
            let (flags, next) = (u16::to_le_bytes(flags), (index + 1).to_le_bytes());
            let descriptor = [&address[..], &u32::to_le_bytes(length), &flags, &next].concat();
            put(TABLE + 16 * u32::from(index), &descriptor);
        }
        put(AVAILABLE + 4 + 2 * request, &head.to_le_bytes());
    }
}

/// A disk whose sectors are full of their numbers, from 1 on.
fn disk() -> File {
    let disk = file();
    for sector in 0..8 {
        let bytes = [sector as u8 + 1; SECTOR];
        disk.write_all_at(&bytes, sector * SECTOR as u64).unwrap();
    }
    disk
}

fn plug(disk: &File) -> Plug {
    let source = Source::Discarded(disk.try_clone().unwrap());
    let device = Blk::open(source, "serial-1", &Options::default()).unwrap();
    let on_fault = Arc::new(|queue, _| panic!("the queue {queue} is served no more"));
    Plug { slot: 0, device: Arc::new(device), on_fault }
}

fn configured(backing: Backing) -> (Config, UnixStream) {
    let (config, console) = config(2);
    (Config { backing, ..config }, console)
}

fn byte(machine: &Machine, at: u32) -> u8 {
    machine.memory().read_obj(GuestAddress(at.into())).unwrap()
}

/// What a request has read, and its status.
fn answer(machine: &Machine, request: u32) -> (Vec<u8>, u8) {
    let mut data = vec![0; SECTOR];
    let at = GuestAddress((DATA + request * 0x1000).into());
    machine.memory().read_slice(&mut data, at).unwrap();
    (data, byte(machine, STATUSES + request * 0x1000))
}

fn second_counted(machine: &Machine) -> u32 {
    machine.memory().read_obj(GuestAddress(SECOND_COUNT.into())).unwrap()
}

/// Waits until the second processor has counted on.
fn second_counts_on_from(machine: &Machine, before: u32) {
    let deadline = Instant::now() + PATIENCE;
    while second_counted(machine) == before {
        assert!(Instant::now() < deadline, "the second processor counts no more");
        std::thread::yield_now();
    }
}

fn goes_on_with(pending: Pending, wanted: &str) {
    let memory = Arc::new(file());
    memory.set_len(MEMORY).unwrap();
    let disk = disk();
    let (config, mut console) = configured(Backing::Shared(Arc::clone(&memory)));
    let machine = boot_with(config, &driver(pending), vec![plug(&disk)]);
    prepare(&machine, pending);
    machine.resume().unwrap();
    let mut begun = [0];
    console.read_exact(&mut begun).unwrap();
    assert_eq!(&begun, b"W");
    second_counts_on_from(&machine, 0);
    machine.pause().unwrap();
    let state = machine.save().unwrap();
    assert_eq!(byte(&machine, HANDLED), 0);
    assert_eq!(answer(&machine, 0), (vec![1; SECTOR], OK));
    assert_eq!(answer(&machine, 1), (vec![0; SECTOR], NO_STATUS));
    let count = second_counted(&machine);
    assert_eq!(said(machine, console), "");

    // Twice, since the memory is not changed by those that go on.
    for _ in 0..2 {
        let (config, console) = configured(Backing::Private(Arc::clone(&memory)));
        let machine = Machine::restore(config, &state, vec![plug(&disk)]).unwrap();
        machine.resume().unwrap();
        second_counts_on_from(&machine, count);
        // It does not let itself be interrupted yet.
        assert_eq!(byte(&machine, HANDLED), 0);
        machine.memory().write_obj(1_u8, GuestAddress(GO.into())).unwrap();
        assert_eq!(end(&machine), End::PowerOff);
        assert_eq!(answer(&machine, 1), (vec![2; SECTOR], OK));
        assert_eq!(said(machine, console), wanted);
    }
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn an_interrupt_that_was_pending_when_it_was_saved_comes_when_it_goes_on() {
    // What the handler says of it, and of the answer to what is asked for then: `VIRTIO_MMIO_INT_VRING`.
    goes_on_with(Pending::Everywhere, "11");
    goes_on_with(Pending::InApic, "01");
}
