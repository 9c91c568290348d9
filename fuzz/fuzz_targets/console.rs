//! What a guest writes to the rings of a console, its descriptors, messages and bytes.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use libfuzzer_sys::fuzz_target;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmlab_devices::console::{Console, Port};
use vmlab_devices::{Device, Turn};
use vmlab_fuzz::ring::{Act, REGIONS, acts, queue_at};

fuzz_target!(|data: &[u8]| {
    let Some((&[how, next], data)) = data.split_first_chunk() else { return };
    let total = REGIONS.iter().sum();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), total)]).expect("memory");
    let begin = if how & 2 != 0 { u16::MAX - u16::from(next % 8) } else { 0 };
    let (host, there) = UnixStream::pair().expect("descriptors");
    host.set_nonblocking(true).expect("a socket");
    let mut host = Some(host);
    let ports = vec![Port::console(), Port::channel("vmlab").with_stream(there)];
    let device = Console::new(ports).expect("a device");
    if how & 4 != 0 {
        // It may be a state, too.
        let _ = device.restore(data);
    }
    let queues: Vec<_> = (0..device.queues().len() as u16)
        .map(|index| queue_at(&memory, how & 1 != 0, begin, 0x1000 * index))
        .collect();
    let mut broken = vec![false; queues.len()];

    for (number, act) in acts(data).enumerate() {
        let queue = match act {
            Act::Write(address, bytes) => {
                // What is outside of memory is left out, as is the rest of what leads out of it.
                let _ = memory.write(bytes, GuestAddress(address.into()));
                continue;
            }
            Act::Kick(queue) => usize::from(queue),
        };
        if let Some(stream) = &mut host {
            let _ = stream.write(b"from the host");
            let _ = stream.read(&mut [0; 256]);
        }
        if how & 8 != 0 && number > 64 {
            host = None;
        }
        let Some(ring) = queues.get(queue).filter(|_| !broken[queue]) else {
            // There is no such queue: the host has news instead.
            device.resize(queue as u16, number as u16);
            continue;
        };
        let mutex = Mutex::new(());
        // It ends, for a thread that is not a worker does not wait.
        broken[queue] = device.process(queue, ring, &mut Turn::take(&mutex)).is_err();
        let state = device.save();
        device.check(&state).expect("a state that was");
    }
    for (ring, broken) in queues.iter().zip(broken) {
        let ring = ring.ring();
        let given_back = ring.next_used() == ring.next_avail();
        assert!(broken || given_back, "a request that was not given back");
    }
    device.reset();
});
