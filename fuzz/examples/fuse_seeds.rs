//! Writes the inputs to begin with: `cargo run --example fuse_seeds -- corpus`.

use std::path::PathBuf;
use std::{env, fs, io};

use vmlab_fuse::abi::{Opcode, OpenIn};
use vmlab_fuse::testing::{RawRequest, samples};
use vmlab_fuzz::ring::{self, Act};
use vmlab_fuzz::{Request, input};

/// Flags of descriptors: `VRING_DESC_F_*`.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Where a seed's tables, requests and replies are.
const INDIRECT_TABLE: u16 = ring::BUFFERS;
const REQUEST: u16 = ring::BUFFERS + 0x1000;
/// The reply's second half is in the other region of memory.
const REPLY: u16 = ring::REGIONS[0] as u16 - 0x400;

fn seed(how: u8, requests: &[RawRequest]) -> Vec<u8> {
    let requests: Vec<Request> =
        requests.iter().map(|one| Request { bytes: one.to_vec(), room: 1024 }).collect();
    [&[how, 13], &input(&requests)[..]].concat()
}

/// Makes nodes 2, 3, 4, 5 and handles 1, 2, 3, for the samples are about these.
fn known(names: [&str; 4], open: Opcode) -> Vec<RawRequest> {
    let mut requests: Vec<RawRequest> =
        names.iter().map(|name| RawRequest::new(Opcode::Lookup).string(name)).collect();
    // `O_RDWR` for a file.
    let flags = if open == Opcode::Open { 2 } else { 0 };
    let open = RawRequest::new(open).node(2).with(&OpenIn { flags, open_flags: 0 });
    requests.extend(vec![open; 3]);
    requests
}

/// `struct virtq_desc`.
fn descriptor(address: u16, length: usize, flags: u16, next: u16) -> Vec<u8> {
    let (address, length) = (u64::from(address).to_le_bytes(), (length as u32).to_le_bytes());
    [&address[..], &length, &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

/// Requests one after the other in a ring, each behind a kick.
fn ring_seed(how: u8, requests: &[RawRequest], indirect: bool) -> Vec<u8> {
    let table = if indirect { INDIRECT_TABLE } else { ring::TABLE };
    let mut out = vec![how, 0];
    let mut act = |act: Act<'_>| out.extend(ring::input([act]));
    for (index, request) in (0_u16..).zip(requests) {
        let bytes = request.to_vec();
        let (head, rest) = bytes.split_at(bytes.len().min(40));
        let parts = [
            descriptor(REQUEST, head.len(), NEXT, 1),
            descriptor(REQUEST + 40, rest.len().max(1), NEXT, 2),
            descriptor(REPLY, 0x800, WRITE, 0),
        ];
        act(Act::Write(REQUEST, &bytes));
        act(Act::Write(table, &parts.concat()));
        if indirect {
            act(Act::Write(ring::TABLE, &descriptor(table, parts.concat().len(), INDIRECT, 0)));
        }
        act(Act::Write(ring::AVAILABLE + 2, &(index + 1).to_le_bytes()));
        act(Act::Write(ring::AVAILABLE + 4 + 2 * (index % ring::SIZE), &[0, 0]));
        act(Act::Kick);
    }
    out
}

fn main() -> io::Result<()> {
    let corpus = env::args_os().nth(1).map(PathBuf::from).ok_or(io::ErrorKind::InvalidInput)?;
    let samples = samples();
    let dir = corpus.join("fuse_request");
    fs::create_dir_all(&dir)?;
    for (number, sample) in samples.chunks(1).enumerate() {
        // Read-only and not, with INIT and without, SETXATTR of both layouts.
        for how in 0..8 {
            fs::write(dir.join(format!("one-{number}-{how}")), seed(how, sample))?;
        }
    }
    fs::write(dir.join("all"), seed(2, &samples))?;

    let dir = corpus.join("fuse_passthrough");
    fs::create_dir_all(&dir)?;
    let samples = &samples[1..];
    for (what, names, open) in [
        ("file", ["file", "dir", "link", "other"], Opcode::Open),
        ("dir", ["dir", "other", "link", "file"], Opcode::OpenDir),
    ] {
        for how in [0, 1, 8, 16] {
            let known = known(names, open);
            for (number, sample) in samples.iter().enumerate() {
                let requests = [&known[..], std::slice::from_ref(sample)].concat();
                fs::write(dir.join(format!("{what}-{number}-{how}")), seed(how, &requests))?;
            }
            let all = [&known[..], samples].concat();
            fs::write(dir.join(format!("{what}-all-{how}")), seed(how, &all))?;
        }
    }

    let dir = corpus.join("virtqueue");
    fs::create_dir_all(&dir)?;
    for (number, sample) in samples.chunks(1).enumerate() {
        for how in [0, 1, 8] {
            fs::write(dir.join(format!("one-{number}-{how}")), ring_seed(how, sample, false))?;
        }
        fs::write(dir.join(format!("indirect-{number}")), ring_seed(1, sample, true))?;
    }
    fs::write(dir.join("all"), ring_seed(0, samples, false))?;
    Ok(())
}
