//! Writes the inputs to begin with: `cargo run --example fuse_seeds -- corpus`.

use std::path::PathBuf;
use std::{env, fs, io};

use vmlab_fuse::abi::{Opcode, OpenIn};
use vmlab_fuse::testing::{RawRequest, samples};
use vmlab_fuzz::{Request, input};

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
    Ok(())
}
