//! What either end of a session may receive: preamble, frames, messages, credit, trees of files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmlab_wire::frame::MAX_MESSAGE;
use vmlab_wire::tree::{Record, RecordHeader};
use vmlab_wire::{Decoder, Frame, FrameHeader, GuestMessage, HostMessage, Preamble, message};

fuzz_target!(|data: &[u8]| {
    let Some((&piece, data)) = data.split_first() else { return };
    if let Some(preamble) = data.first_chunk::<{ Preamble::LEN }>() {
        let _ = Preamble::check(*preamble);
    }
    // The same bytes in pieces of one size after the other: the frames may not depend on it.
    let whole = frames(data, data.len().max(1));
    let pieces = frames(data, usize::from(piece).max(1));
    assert_eq!(whole, pieces);
    records(data);
});

/// Records of a tree: what can be read is written as the same bytes, and no name leads elsewhere.
fn records(mut data: &[u8]) {
    while let Some((header, rest)) = data.split_first_chunk() {
        let Ok(header) = RecordHeader::decode(*header) else { return };
        let Some((payload, rest)) = rest.split_at_checked(header.payload_len()) else { return };
        let Ok(record) = Record::decode(header, payload) else { return };
        if let Record::Dir(_, name) | Record::File(_, name) | Record::Symlink { name, .. } = record
        {
            assert!(name != b"." && name != b".." && !name.contains(&b'/') && !name.contains(&0));
        }
        let mut again = Vec::new();
        record.encode(&mut again);
        assert_eq!(again, data[..again.len()]);
        data = rest;
    }
}

/// All frames of the data, received in pieces of some size, as text; at the end, what is wrong.
fn frames(data: &[u8], piece: usize) -> Vec<String> {
    let mut decoder = Decoder::new();
    let mut seen = Vec::new();
    for part in data.chunks(piece) {
        decoder.push(part);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    if let Frame::Message(payload) = frame {
                        decode(payload);
                    }
                    seen.push(format!("{frame:?}"));
                }
                Ok(None) => break,
                Err(error) => {
                    seen.push(error.to_string());
                    return seen;
                }
            }
        }
        assert!(decoder.pending() <= FrameHeader::LEN + MAX_MESSAGE);
    }
    seen
}

/// A message that can be read can be sent, and is read again as the same.
fn decode(payload: &[u8]) {
    if let Ok(read) = message::decode::<HostMessage>(payload) {
        assert_eq!(message::decode::<HostMessage>(&encoded(&read)).ok(), Some(read));
    }
    if let Ok(read) = message::decode::<GuestMessage>(payload) {
        assert_eq!(message::decode::<GuestMessage>(&encoded(&read)).ok(), Some(read));
    }
}

fn encoded<M: serde::Serialize>(message: &M) -> Vec<u8> {
    let mut out = Vec::new();
    message::encode(message, &mut out).expect("no longer than what it was read from");
    out.split_off(FrameHeader::LEN)
}
