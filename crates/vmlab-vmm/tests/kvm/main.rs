//! What the monitor does with guests of a few instructions.
//!
//! They need a KVM that works, and so they are run by name, by `--ignored`; without such a KVM they fail. On a host
//! that has none, a guest of vmlab has:
//!
//! ```sh
//! vmlab run -k debian:6.12-cloud -m 3G --module kvm-amd -- target/debug/deps/kvm-… --ignored --test-threads 1
//! ```
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "it is a test")]
#![allow(clippy::print_stdout, reason = "times are told")]

mod devices;
mod guest;
mod hangs;

use std::fs;
use std::io::{Read, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use guest::*;
use vm_memory::{Bytes, GuestAddress};
use vmlab_vmm::memory::Backing;
use vmlab_vmm::topology::Topology;
use vmlab_vmm::x86_64::{Config, Machine};
use vmlab_vmm::{End, Error};

/// How long a guest may run on that is to stop. It is a matter of microseconds, but for a host that is busy.
const SOON: Duration = Duration::from_millis(100);

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_guest_powers_off() {
    let (machine, console) = run(&off());
    assert_eq!(end(&machine), End::PowerOff);
    assert!(matches!(refused(machine.resume()), Error::Ended));
    assert!(matches!(refused(machine.pause()), Error::Ended));
    assert!(matches!(refused(machine.save()), Error::Ended));
    // The first reason counts.
    machine.end(End::Stopped);
    assert_eq!(end(&machine), End::PowerOff);
    assert_eq!(machine.exits(), [("port", 1)]);
    assert_eq!(said(machine, console), "");
    // Other sleep states, and this one without the bit that begins it, do nothing.
    let (machine, _console) = run(&[out(0x600, 0x14), out(0x600, 0x30), out(0x602, 1)].concat());
    assert_eq!(end(&machine), End::Reset);
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_guest_resets() {
    for code in [out(0x602, 1), vec![0xb0, 0xfe, 0xe6, 0x64]] {
        let (machine, _console) = run(&code);
        assert_eq!(end(&machine), End::Reset);
    }
}

/// `lidt` of an empty table, and an invalid instruction.
const TRIPLE_FAULT: [u8; 19] =
    [0x0f, 0x01, 0x1d, 2, 0, 0, 0, 0x0f, 0x0b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_guest_faults_for_good() {
    let (machine, _console) = run(&TRIPLE_FAULT);
    assert_eq!(end(&machine), End::TripleFault);
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_panic_is_one_however_the_guest_ends_then() {
    for last in [out(0x602, 1), off(), TRIPLE_FAULT.to_vec()] {
        let (machine, _console) = run(&[out(0x505, 1), last].concat());
        assert_eq!(end(&machine), End::Panic);
    }
    // That a kernel for crashes is loaded is no panic.
    let (machine, _console) = run(&[out(0x505, 2), off()].concat());
    assert_eq!(end(&machine), End::PowerOff);
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_guest_writes_to_its_serial_line() {
    const TEXT: &[u8] = b"written by one instruction\n";
    let head = [
        0x48,
        0x8d,
        0x35,
        0x12,
        0,
        0,
        0, //      lea rsi, [rip + 18]: the text
        0xb9,
        TEXT.len() as u8,
        0,
        0,
        0, //      mov ecx, its length
        0x66,
        0xba,
        0xf8,
        0x03, //               mov dx, COM1
        0xf3,
        0x6e, //                           rep outsb
    ];
    let code = [&head[..], &off(), TEXT].concat();
    let (machine, console) = run(&code);
    assert_eq!(end(&machine), End::PowerOff);
    assert_eq!(said(machine, console).as_bytes(), TEXT);
}

/// Writes back what it reads, and powers off after a `q`.
fn echo() -> Vec<u8> {
    let echo = [
        0x66, 0xba, 0xfd, 0x03, // 1: mov dx, COM1 + 5
        0xec, //                      in al, dx
        0xa8, 0x01, //                test al, 1
        0x74, 0xf7, //                jz 1b
        0x66, 0xba, 0xf8, 0x03, //    mov dx, COM1
        0xec, //                      in al, dx
        0xee, //                      out dx, al
        0x3c, b'q', //                cmp al, 'q'
        0x75, 0xed, //                jne 1b
    ];
    [&echo[..], &off()].concat()
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_guest_reads_from_its_serial_line() {
    let (machine, mut console) = run(&echo());
    // More than the line holds at once.
    let text = "0123456789".repeat(20);
    console.write_all(text.as_bytes()).unwrap();
    let mut found = vec![0; text.len()];
    console.read_exact(&mut found).unwrap();
    assert_eq!(found, text.as_bytes());
    console.write_all(b"q").unwrap();
    assert_eq!(end(&machine), End::PowerOff);
    assert_eq!(said(machine, console), "q");
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn registers_of_slots_are_where_they_are_and_around_them_is_nothing() {
    /// Reads four bytes from an address, and writes them to the serial line.
    fn read(address: u32) -> Vec<u8> {
        let load = [&[0xbb][..], &address.to_le_bytes(), &[0x8b, 0x03]].concat(); // mov ebx, address; mov eax, [rbx]
        let write = [0x66, 0xba, 0xf8, 0x03, 0xee, 0xc1, 0xe8, 8]; // mov dx, COM1; out dx, al; shr eax, 8
        [&load[..], &write.repeat(4)].concat()
    }
    // An empty slot, its version, what is behind the last slot, and an address far from all.
    let code = [read(0xd000_0000), read(0xd000_0004), read(0xd000_1000), read(0xd002_0000)];
    let (machine, mut console) = run(&[code.concat(), off()].concat());
    let mut found = [0; 16];
    console.read_exact(&mut found).unwrap();
    assert_eq!(&found, b"virt\x02\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff");
    assert_eq!(end(&machine), End::PowerOff);
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_guest_that_never_leaves_is_paused_and_goes_on_at_once() {
    let (machine, _console) = run(&count());
    let mut longest = Duration::ZERO;
    let mut count = 0;
    for _ in 0..20 {
        counts_on_from(&machine, count);
        assert!(machine.runs());
        assert!(matches!(refused(machine.save()), Error::Running));
        let started = Instant::now();
        machine.pause().unwrap();
        longest = longest.max(started.elapsed());
        assert!(!machine.runs());
        count = counted(&machine);
        thread::sleep(Duration::from_millis(5));
        assert_eq!(counted(&machine), count, "it runs while it is paused");
        // Twice is once.
        machine.pause().unwrap();
        machine.resume().unwrap();
        machine.resume().unwrap();
    }
    println!("paused within {longest:?}");
    assert!(longest < SOON, "{longest:?}");
}

/// Writes to its serial line for ever.
fn chatter() -> Vec<u8> {
    [&out(COM1, b'x')[..], &[0xeb, 0xf7]].concat() // jmp to the mov of the port
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_guest_whose_host_does_not_read_is_paused_saved_and_stopped() {
    let (config, _console) = config(2);
    let machine = boot(config, &chatter());
    machine.resume().unwrap();
    // Until the socket is full, and it is stuck.
    let mut exits = machine.exits();
    loop {
        thread::sleep(Duration::from_millis(200));
        let before = std::mem::replace(&mut exits, machine.exits());
        if before == exits && !exits.is_empty() {
            break;
        }
    }
    let mut longest = Duration::ZERO;
    for _ in 0..5 {
        let started = Instant::now();
        machine.pause().unwrap();
        longest = longest.max(started.elapsed());
        machine.resume().unwrap();
        thread::sleep(Duration::from_millis(5));
    }
    machine.pause().unwrap();
    machine.save().unwrap();
    let started = Instant::now();
    drop(machine);
    longest = longest.max(started.elapsed());
    println!("paused and stopped within {longest:?}");
    assert!(longest < SOON, "{longest:?}");
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_guest_that_never_leaves_is_stopped_by_another_thread() {
    let mut longest = Duration::ZERO;
    for _ in 0..10 {
        let (machine, _console) = run(&count());
        counts_on_from(&machine, 0);
        thread::scope(|scope| {
            let waits = scope.spawn(|| (end(&machine), Instant::now()));
            let started = Instant::now();
            machine.end(End::Stopped);
            let (end, at) = waits.join().unwrap();
            assert_eq!(end, End::Stopped);
            longest = longest.max(at.duration_since(started));
        });
        let started = Instant::now();
        drop(machine);
        longest = longest.max(started.elapsed());
    }
    println!("stopped within {longest:?}");
    assert!(longest < SOON, "{longest:?}");
    let (machine, _console) = run(&count());
    let soon = Instant::now() + Duration::from_millis(20);
    assert_eq!(machine.wait(Some(soon)), None);
    assert!(Instant::now() >= soon);
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn what_kvm_cannot_do_is_told_with_registers_and_code() {
    // mov eax, 0xd0800000; jmp rax: there is no code.
    let (machine, _console) = run(&[0xb8, 0, 0, 0x80, 0xd0, 0xff, 0xe0]);
    let End::InternalError(what) = end(&machine) else { panic!("{:?}", end(&machine)) };
    println!("{what}");
    assert!(what.contains("rip 0xd0800000 [no code there]"), "{what}");
    assert!(what.contains(" rax 0xd0800000 ") && what.contains(" efer 0x"), "{what}");
    // mov eax, 0xd0800000; fld qword [rax]; hlt: a device that is read to a floating-point register.
    let (machine, _console) = run(&[0xb8, 0, 0, 0x80, 0xd0, 0xdd, 0x00, 0xf4]);
    let End::InternalError(what) = end(&machine) else { panic!("{:?}", end(&machine)) };
    println!("{what}");
    assert!(what.contains("could not emulate an instruction"), "{what}");
    assert!(what.contains("rip 0x100005 [dd 00 f4 "), "{what}");
}

/// A guest that was saved while it counted: its state, its memory, and how far it has come.
fn saved() -> (Vec<u8>, Arc<fs::File>, u64) {
    let memory = Arc::new(file());
    memory.set_len(MEMORY).unwrap();
    let (config, mut console) = config(1);
    let machine =
        boot(Config { backing: Backing::Shared(Arc::clone(&memory)), ..config }, &count());
    machine.resume().unwrap();
    counts_on_from(&machine, 0);
    let mut begun = [0];
    console.read_exact(&mut begun).unwrap();
    assert_eq!(&begun, b"S");
    machine.pause().unwrap();
    let state = machine.save().unwrap();
    println!("{} bytes of state", state.len());
    let count = counted(&machine);
    assert_eq!(said(machine, console), "");
    (state, memory, count)
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_guest_goes_on_where_it_was_saved() {
    let (state, memory, count) = saved();
    // Twice, since the memory is not changed by those that go on.
    for _ in 0..2 {
        let (config, console) = config(1);
        let backing = Backing::Private(Arc::clone(&memory));
        let generation = *b"another instance";
        let config = Config { backing, generation, ..config };
        let machine = Machine::restore(config, &state, Vec::new()).unwrap();
        assert!(!machine.runs());
        assert_eq!(counted(&machine), count);
        let mut told = [0; 16];
        machine.memory().read_slice(&mut told, GuestAddress(0xf_f000)).unwrap();
        assert_eq!(told, generation);
        machine.resume().unwrap();
        counts_on_from(&machine, count);
        machine.pause().unwrap();
        // Had it begun anew, it would not have come as far, and would have said so.
        assert!(counted(&machine) > count);
        // It can be saved again.
        machine.save().unwrap();
        assert_eq!(said(machine, console), "");
    }
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_guest_goes_on_with_the_pages_that_another_used() {
    let (state, memory, count) = saved();
    let restore = || {
        let (config, console) = config(1);
        let config = Config { backing: Backing::Private(Arc::clone(&memory)), ..config };
        (Machine::restore(config, &state, Vec::new()).unwrap(), console)
    };
    let used = |machine: &Machine| machine.working_set(MEMORY / 4096).unwrap().unwrap();
    let (first, console) = restore();
    let untouched = used(&first);
    first.resume().unwrap();
    counts_on_from(&first, count);
    first.pause().unwrap();
    let learnt = used(&first);
    assert_ne!(learnt, untouched);
    assert_eq!(first.working_set(1).unwrap(), None);
    assert_eq!(said(first, console), "");
    // It has all of them before it runs, and with what they had.
    let (second, console) = restore();
    second.prefault(&learnt);
    assert_eq!(used(&second), learnt);
    assert_eq!(counted(&second), count);
    second.resume().unwrap();
    counts_on_from(&second, count);
    second.pause().unwrap();
    assert_eq!(used(&second), learnt);
    assert_eq!(said(second, console), "");
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_state_of_another_machine_is_refused() {
    let (state, _, _) = saved();
    let restore = |change: &dyn Fn(Config) -> Config, state: &[u8]| {
        let (config, _console) = config(1);
        let error = refused(Machine::restore(change(config), state, Vec::new()));
        assert!(matches!(error, Error::State(_)), "{error}");
        error.to_string()
    };
    let more = restore(&|config| Config { memory: 2 * MEMORY, ..config }, &state);
    assert!(more.contains("memory has another size"), "{more}");
    let two = Topology { nodes: 1, llcs: 1, cores: 2, threads: 1 };
    let cpus = restore(&|config| Config { topology: two, ..config }, &state);
    assert!(cpus.contains("grouped in another way"), "{cpus}");
    let slots = restore(&|config| Config { slots: 2, ..config }, &state);
    assert!(slots.contains("number of slots"), "{slots}");
    let lines = restore(&|config| Config { lines: Vec::new(), ..config }, &state);
    assert!(lines.contains("number of serial lines"), "{lines}");
    for wrong in
        [&state[..0], &state[..12], &state[..state.len() - 1], &[&state[..], b"\0"].concat()]
    {
        restore(&|config| config, wrong);
    }
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn one_processor_starts_another() {
    // In real mode.
    let second: [u8; 16] = [
        0x31, 0xc0, //       xor ax, ax
        0x8e, 0xd8, //       mov ds, ax
        0xba, 0xf8, 0x03, // mov dx, COM1
        0xb0, b'A', //       mov al, 'A'
        0xee, //             out dx, al
        0xa2, 0x00, 0x88, // mov [0x8800], al
        0xf4, //          1: hlt
        0xeb, 0xfd, //       jmp 1b
    ];
    let words = second.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
    let copied = (SECOND..).step_by(4).zip(words).flat_map(|(at, word)| store(at, word));
    let wait = [
        0x80, 0x3c, 0x25, 0x00, 0x88, 0, 0, b'A', // 1: cmp byte [0x8800], 'A'
        0x75, 0xf6, //                                  jne 1b
    ];
    let code = copied.chain(start_second()).chain(wait).chain(out(COM1, b'B')).chain(off());
    let (config, console) = config(2);
    let machine = boot(config, &code.collect::<Vec<_>>());
    machine.resume().unwrap();
    assert_eq!(end(&machine), End::PowerOff);
    assert_eq!(said(machine, console), "AB");
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_processor_that_was_not_started_is_paused_and_saved_too() {
    let (config, _console) = config(2);
    let machine = boot(config, &count());
    for _ in 0..5 {
        let before = counted(&machine);
        machine.resume().unwrap();
        counts_on_from(&machine, before);
        machine.pause().unwrap();
    }
    machine.save().unwrap();
}

/// Descriptors, threads, and mappings of this process.
fn held() -> [usize; 3] {
    let entries = |path: &str| fs::read_dir(path).unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("kvm-vcpu"), "{maps}");
    [entries("/proc/self/fd"), entries("/proc/self/task"), maps.lines().count()]
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn machines_leave_nothing_behind() {
    let one = |index: usize| {
        let (config, console) = config(1 + index as u32 % 2);
        let code = if index.is_multiple_of(3) { count() } else { off() };
        let machine = boot(config, &code);
        // One in five never runs.
        if !index.is_multiple_of(5) {
            machine.resume().unwrap();
            match index % 3 {
                0 => counts_on_from(&machine, 0),
                _ => assert_eq!(end(&machine), End::PowerOff),
            }
        }
        drop((machine, console));
    };
    // What is kept for good, like stacks for threads to come, is there after some.
    (0..15).for_each(one);
    let before = held();
    (0..50).for_each(one);
    // A thread that was joined may be seen for a moment.
    let deadline = Instant::now() + Duration::from_secs(5);
    while held()[1] > before[1] && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    let after = held();
    println!("descriptors, threads, mappings: {before:?}, then {after:?}");
    assert_eq!(after[..2], before[..2]);
    // Allocators have their own ways; one mapping for each would be fifty.
    assert!(after[2] < before[2] + 10, "{before:?} {after:?}");
}
