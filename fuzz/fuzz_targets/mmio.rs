//! What a guest does to the registers of a device, its rings and its memory, with threads that serve it; and
//! other devices that go on in the place of the first, at any moment.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmlab_devices::console::{Console, Port};
use vmlab_devices::rng::Rng;
use vmlab_devices::transport::mmio::{Mmio, Page, register};
use vmlab_devices::{Device, Event, Fault, OnFault};
use vmlab_fuzz::mmio::{Act, acts};
use vmlab_fuzz::ring::REGIONS;

fn device(is_console: bool, stream: &UnixStream) -> Arc<dyn Device> {
    if !is_console {
        return Arc::new(Rng::new());
    }
    let stream = stream.try_clone().expect("a descriptor");
    let ports = vec![Port::console(), Port::channel("vmlab").with_stream(stream)];
    Arc::new(Console::new(ports).expect("a device"))
}

fn mmio(device: Arc<dyn Device>, memory: &GuestMemoryMmap) -> Mmio {
    let on_fault: OnFault = Arc::new(|queue, fault| match fault {
        Fault::Queue(_) => {}
        // A panic of a thread would be lost.
        fault => {
            eprintln!("queue {queue}: {fault:?}");
            std::process::abort();
        }
    });
    let interrupt = Arc::new(Event::new().expect("a descriptor"));
    let memory = GuestMemoryAtomic::new(memory.clone());
    let page = Page::alone().expect("memory");
    Mmio::new(device, memory, interrupt, page, on_fault).expect("descriptors")
}

fuzz_target!(|data: &[u8]| {
    let Some((&[how], data)) = data.split_first_chunk() else { return };
    let is_console = how & 1 != 0;
    let total = REGIONS.iter().sum();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), total)]).expect("memory");
    let (mut host, there) = UnixStream::pair().expect("descriptors");
    host.set_nonblocking(true).expect("a socket");
    let mut transport = mmio(device(is_console, &there), &memory);
    let fresh = transport.state();

    for act in acts(data) {
        match act {
            // What is outside of memory is left out, as is the rest of what leads out of it.
            Act::Memory(at, bytes) => drop(memory.write(&bytes, GuestAddress(at.into()))),
            Act::Write(at, bytes) => transport.write(at.into(), &bytes),
            Act::Read(at, len) => transport.read(at.into(), &mut vec![0xee; len.into()]),
            Act::Host(bytes) => {
                let _ = host.write(&bytes);
                let _ = host.read(&mut [0; 4096]);
            }
            Act::Move => {
                transport.quiesce();
                let state = transport.state();
                assert_eq!(transport.state(), state, "it is not quiet");
                transport = mmio(device(is_console, &there), &memory);
                // Whatever a guest has done, a snapshot of it can be used.
                transport.restore(&state).expect("a state that was");
            }
        }
    }
    transport.write(register::STATUS.into(), &[0; 4]);
    let mut reset = transport.state();
    reset.config_generation = fresh.config_generation;
    assert_eq!(reset, fresh, "a reset forgets all");
});
