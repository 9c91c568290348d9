//! What a guest does to the registers of virtio-mmio, and whoever else has to do with the device.

use vmlab_devices::transport::mmio::register;

use crate::ring::{AVAILABLE, SIZE, TABLE, USED};

/// What happens.
#[derive(Debug)]
pub enum Act {
    /// The guest writes to its memory.
    Memory(u16, Vec<u8>),
    /// It writes to an offset.
    Write(u16, Vec<u8>),
    /// It reads so many bytes at an offset.
    Read(u16, u8),
    /// Another device takes the place of this one, as after a snapshot.
    Move,
    /// The host sends bytes to a port, and takes what is there.
    Host(Vec<u8>),
}

/// The offset of the register for kicks.
pub const NOTIFY: u16 = register::QUEUE_NOTIFY as u16;

/// More acts than this show nothing new.
const MAX_ACTS: usize = 256;

const MEMORY: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;
const MOVE: u8 = 3;
const HOST: u8 = 4;
const KINDS: u8 = 5;

/// Takes the input apart: what it is, two bytes of an address, one of a length, and so many bytes.
pub fn acts(mut data: &[u8]) -> impl Iterator<Item = Act> {
    let next = move || {
        let (&[what, a, b, length], rest) = data.split_first_chunk()?;
        let at = u16::from_le_bytes([a, b]);
        let what = what % KINDS;
        let count = if matches!(what, MEMORY | WRITE | HOST) { length.into() } else { 0 };
        let (bytes, rest) = rest.split_at(rest.len().min(count));
        data = rest;
        Some(match what {
            MEMORY => Act::Memory(at, bytes.to_vec()),
            WRITE => Act::Write(at, bytes.to_vec()),
            READ => Act::Read(at, length),
            MOVE => Act::Move,
            _ => Act::Host(bytes.to_vec()),
        })
    };
    std::iter::from_fn(next).take(MAX_ACTS)
}

/// The other way round.
pub fn input(acts: &[Act]) -> Vec<u8> {
    let mut out = Vec::new();
    for act in acts {
        let (what, at, length, bytes) = match act {
            Act::Memory(at, bytes) => (MEMORY, *at, bytes.len(), &bytes[..]),
            Act::Write(at, bytes) => (WRITE, *at, bytes.len(), &bytes[..]),
            Act::Read(at, length) => (READ, *at, (*length).into(), &[][..]),
            Act::Move => (MOVE, 0, 0, &[][..]),
            Act::Host(bytes) => (HOST, 0, bytes.len(), &bytes[..]),
        };
        out.push(what);
        out.extend(at.to_le_bytes());
        out.push(length as u8);
        out.extend(bytes);
    }
    out
}

/// Where a queue's rings begin.
pub fn base(queue: u16) -> u16 {
    0x1000 * queue
}

/// What a driver does with a device of so many queues, from a reset on.
pub fn set_up(queues: u16) -> Vec<Act> {
    let word = |register: u32, value: u32| Act::Write(register as u16, value.to_le_bytes().into());
    let mut acts = Vec::new();
    for (register, value) in [
        (register::STATUS, 0),
        (register::STATUS, 1),
        (register::STATUS, 3),
        (register::DRIVER_FEATURES_SEL, 1),
        (register::DRIVER_FEATURES, 1),
        (register::STATUS, 11),
    ] {
        acts.push(word(register, value));
    }
    for queue in 0..queues {
        let at = |offset: u16| u32::from(base(queue) + offset);
        acts.push(Act::Memory(base(queue) + AVAILABLE, vec![0; 4]));
        for (register, value) in [
            (register::QUEUE_SEL, queue.into()),
            (register::QUEUE_NUM, SIZE.into()),
            (register::QUEUE_DESC_LOW, at(TABLE)),
            (register::QUEUE_AVAIL_LOW, at(AVAILABLE)),
            (register::QUEUE_USED_LOW, at(USED)),
            (register::QUEUE_READY, 1),
        ] {
            acts.push(word(register, value));
        }
    }
    acts.push(word(register::STATUS, 15));
    acts
}
