//! What a guest writes to a ring, its descriptors and its buffers, before a network interface; and what comes from the
//! other end of its stream.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmlab_devices::net::{MAX_FRAME, MIN_FRAME, MacAddress, Net, Stream};
use vmlab_fuzz::ring::{REGIONS, play, queue};

fuzz_target!(|data: &[u8]| {
    let Some((&[how, a, b], data)) = data.split_first_chunk() else { return };
    let total = REGIONS.iter().sum();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), total)]).expect("memory");
    let queue = queue(&memory, how & 1 != 0, 0);

    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    let (incoming, data) = data.split_at(data.len().min(u16::from_le_bytes([a, b]).into()));
    theirs.set_nonblocking(true).expect("a socket");
    // What there is no room for never comes.
    let _ = theirs.write(incoming);
    theirs.shutdown(Shutdown::Write).expect("a socket");
    let device = Net::new(Box::new(Stream::new(ours.into())), MacAddress([2; 6]), None);

    play(data, &memory, &device, (usize::from(how & 2 != 0), &queue));
    let (received, sent) = (device.traffic().received, device.traffic().sent);
    // Each has a length before it.
    assert!(received as usize <= incoming.len() / size_of::<u32>(), "frames out of nothing");

    // All that is there: it ends with an error, since the device could send more.
    let mut outgoing = Vec::new();
    theirs.read_to_end(&mut outgoing).expect_err("a device that goes on");
    let (mut rest, mut whole) = (&outgoing[..], 0);
    while let Some((length, frame)) = rest.split_first_chunk() {
        let length = u32::from_be_bytes(*length) as usize;
        assert!((MIN_FRAME..=MAX_FRAME).contains(&length), "no frame of a guest");
        let Some(behind) = frame.get(length..) else { break };
        (rest, whole) = (behind, whole + 1);
    }
    // The last one may not have had enough room.
    assert!((whole..=whole + 1).contains(&sent), "{sent} frames are {whole}");
});
