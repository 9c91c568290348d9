//! Packets of a guest and what programs of the host do, in any order, before a device for streams between them.
#![no_main]

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;

use libfuzzer_sys::fuzz_target;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmlab_devices::vsock::{MAX_CONNECTIONS, Vsock};
use vmlab_devices::{Device, Turn, VirtQueue};
use vmlab_fuzz::ring::{AVAILABLE, BUFFERS, REGIONS, SIZE, TABLE, queue};

const CID: u64 = 3;
const HOST: u64 = 2;
/// Where programs listen; nobody does at the others.
const PORT: u32 = 1;
const HEADER: usize = 44;
/// The guest's buffers for packets.
const ROOM: u32 = 0x400;
/// More acts than this show nothing new.
const MAX_ACTS: usize = 256;

/// A ring with its own memory, and how many chains were offered.
struct Ring {
    memory: GuestMemoryMmap,
    queue: VirtQueue,
    offered: u16,
}

impl Ring {
    fn new(event_idx: bool) -> Self {
        let total = REGIONS.iter().sum();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), total)]).expect("memory");
        let queue = queue(&memory, event_idx, 0);
        Self { memory, queue, offered: 0 }
    }

    fn put(&self, at: u16, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at.into())).expect("in memory");
    }

    /// Offers one buffer.
    fn offer(&mut self, at: u16, len: u32, flags: u16) {
        let slot = self.offered % SIZE;
        let mut descriptor = [&u64::from(at).to_le_bytes()[..], &len.to_le_bytes()].concat();
        descriptor.extend([flags.to_le_bytes(), [0; 2]].concat());
        self.put(TABLE + 16 * slot, &descriptor);
        self.put(AVAILABLE + 4 + 2 * slot, &slot.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        self.put(AVAILABLE + 2, &self.offered.to_le_bytes());
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&how, data)) = data.split_first() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let base = dir.path().join("v");
    let device = Vsock::new(CID, &base).expect("a device");
    let listener = UnixListener::bind(dir.path().join(format!("v_{PORT}"))).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    let (mut receive, mut transmit) = (Ring::new(how & 1 != 0), Ring::new(how & 1 != 0));
    let mut programs: VecDeque<UnixStream> = VecDeque::new();
    let turn = Mutex::new(());
    let serve = |index, ring: &Ring| {
        device.process(index, &ring.queue, &mut Turn::take(&turn)).expect("a good ring");
    };

    for act in data.chunks_exact(8).take(MAX_ACTS) {
        let &[what, host, guest, flags, a, b, room, forwarded] = act else { return };
        let length = usize::from(u16::from_le_bytes([a, b])).min(0x8000);
        if what & 0x80 == 0 {
            let source = if flags & 0x80 == 0 { CID } else { HOST };
            let claimed = length as u32 + u32::from(flags >> 6 & 1);
            // Ports that devices give are beyond those that are chosen.
            let port = u32::from(host & 3) | u32::from(host >> 7) << 30;
            let mut packet = [source.to_le_bytes(), HOST.to_le_bytes()].concat();
            packet.extend([port, u32::from(guest & 3), claimed].map(u32::to_le_bytes).concat());
            // Ports are the other way round for the host.
            packet[16..24].rotate_left(4);
            packet.extend([1, u16::from(what & 0xf)].map(u16::to_le_bytes).concat());
            let credit = [u32::from(flags & 3), u32::from(room) << 10, u32::from(forwarded) << 4];
            packet.extend(credit.map(u32::to_le_bytes).concat());
            packet.resize(HEADER + length, what);
            transmit.put(BUFFERS, &packet);
            transmit.offer(BUFFERS, packet.len() as u32, 0);
            serve(1, &transmit);
            assert_eq!(transmit.queue.ring().next_used(), transmit.offered, "a packet is kept");
        } else {
            match what & 7 {
                0 => programs.extend(UnixStream::connect(&base)),
                1 => programs.extend(listener.accept().map(|(stream, _)| stream)),
                2 => drop(programs.pop_front()),
                3 => programs.rotate_left(usize::from(!programs.is_empty())),
                _ => {}
            }
            if let Some(program) = programs.front_mut() {
                program.set_nonblocking(true).expect("a socket");
                let _ = match what & 7 {
                    4 => program.write(format!("CONNECT {}\n", guest & 3).as_bytes()),
                    5 => program.write(&vec![what; length]),
                    6 => program.read(&mut vec![0; length]),
                    _ => Ok(0),
                };
                if what & 7 == 7 {
                    let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both];
                    let _ = program.shutdown(how[usize::from(flags) % how.len()]);
                }
            }
        }
        // Sometimes the guest takes no packets for a while.
        if what & 0x40 == 0 {
            let left = receive.offered.wrapping_sub(receive.queue.ring().next_used());
            for number in left..SIZE {
                receive.offer(BUFFERS + number * ROOM as u16, ROOM, 2);
            }
            serve(0, &receive);
        }
        assert!(device.connections() <= MAX_CONNECTIONS, "connections without end");
    }
    let ring = receive.queue.ring();
    assert_eq!(ring.next_used(), ring.next_avail(), "a buffer is kept");
});
