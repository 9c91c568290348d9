//! Guests of a few instructions, as kernels in ELF files.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmlab_vmm::memory::Backing;
use vmlab_vmm::topology::Topology;
use vmlab_vmm::x86_64::boot::Kernel;
use vmlab_vmm::x86_64::layout::LOCAL_APIC;
use vmlab_vmm::x86_64::{Config, Machine, Plug};
use vmlab_vmm::{End, Error};

/// Where guests begin.
pub(crate) const CODE: u64 = 0x10_0000;
/// Where those that count have their count.
pub(crate) const COUNT: u64 = 0x20_0000;
pub(crate) const MEMORY: u64 = 32 << 20;

/// No guest has more to do than some hundred instructions.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) const COM1: u16 = 0x3f8;

/// Writes a byte to a port: `mov dx, port; mov al, value; out dx, al`.
pub(crate) fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// Powers off.
pub(crate) fn off() -> Vec<u8> {
    out(0x600, 0x34)
}

/// `mov ebx, address; mov dword [rbx], value`
pub(crate) fn store(address: u32, value: u32) -> Vec<u8> {
    let (address, value) = (address.to_le_bytes(), value.to_le_bytes());
    [&[0xbb][..], &address, &[0xc7, 0x03], &value].concat()
}

/// Where the second processor begins, in real mode.
pub(crate) const SECOND: u32 = 0x8000;

/// Has it begin there.
pub(crate) fn start_second() -> Vec<u8> {
    // The local APIC is enabled, since KVM does not know those of processors that were made after it last looked;
    // then APIC 1 gets INIT, and is to start at the page.
    let start = 0x4600 | SECOND >> 12;
    let apic = [(0xf0, 0x1ff), (0x310, 1 << 24), (0x300, 0x4500), (0x300, start)];
    apic.iter().flat_map(|(register, value)| store(LOCAL_APIC + register, *value)).collect()
}

/// Counts for ever, in rax and in memory, after it has said that it begins.
pub(crate) fn count() -> Vec<u8> {
    let count = [
        0x31, 0xc0, //                                     xor eax, eax
        0x48, 0xff, 0xc0, //                            1: inc rax
        0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, // mov [COUNT], rax
        0xeb, 0xf3, //                                     jmp 1b
    ];
    [&out(COM1, b'S')[..], &count].concat()
}

/// An ELF file whose one segment is this code.
fn image(code: &[u8]) -> File {
    let mut image = vec![0; 64 + 56];
    let mut put = |at: usize, value: &[u8]| image[at..at + value.len()].copy_from_slice(value);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1]);
    put(24, &CODE.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(54, &[56, 0, 1, 0]);
    put(64, &[1, 0, 0, 0, 7]);
    let length = code.len() as u64;
    for (at, number) in [(72, 120), (80, CODE), (88, CODE), (96, length), (104, length)] {
        put(at, &number.to_le_bytes());
    }
    image.extend_from_slice(code);
    let mut file = file();
    file.write_all(&image).unwrap();
    file
}

/// An empty file in memory.
pub(crate) fn file() -> File {
    rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
}

/// What guests are made of, with so many processors; and the other end of their serial line.
pub(crate) fn config(cpus: u32) -> (Config, UnixStream) {
    let (console, line) = UnixStream::pair().unwrap();
    console.set_read_timeout(Some(PATIENCE)).unwrap();
    let config = Config {
        memory: MEMORY,
        backing: Backing::Anonymous,
        topology: Topology { nodes: 1, llcs: 1, cores: cpus, threads: 1 },
        slots: 1,
        lines: vec![line],
        sandbox: true,
        generation: [0; 16],
    };
    (config, console)
}

/// A machine that will run this code.
pub(crate) fn boot(config: Config, code: &[u8]) -> Machine {
    boot_with(config, code, Vec::new())
}

/// A machine with these devices that will run this code.
pub(crate) fn boot_with(config: Config, code: &[u8], devices: Vec<Plug>) -> Machine {
    let kernel = Kernel { image: image(code), initrd: None, command_line: String::new() };
    Machine::boot(config, kernel, devices).unwrap()
}

/// A machine with one processor that runs this code.
pub(crate) fn run(code: &[u8]) -> (Machine, UnixStream) {
    let (config, console) = config(1);
    let machine = boot(config, code);
    machine.resume().unwrap();
    (machine, console)
}

/// How a machine ends, which it has to do by itself.
pub(crate) fn end(machine: &Machine) -> End {
    machine.wait(Some(Instant::now() + PATIENCE)).expect("it does not end")
}

/// All that a guest has said until its machine ended.
pub(crate) fn said(machine: Machine, mut console: UnixStream) -> String {
    drop(machine);
    let mut said = String::new();
    console.read_to_string(&mut said).unwrap();
    said
}

pub(crate) fn counted(machine: &Machine) -> u64 {
    machine.memory().read_obj(GuestAddress(COUNT)).unwrap()
}

/// Waits until a guest has counted on.
pub(crate) fn counts_on_from(machine: &Machine, count: u64) {
    let deadline = Instant::now() + PATIENCE;
    while counted(machine) == count {
        assert!(Instant::now() < deadline, "it counts no more");
        std::thread::yield_now();
    }
}

/// The error of what must not work.
pub(crate) fn refused<T>(result: Result<T, Error>) -> Error {
    result.err().expect("it is not refused")
}
