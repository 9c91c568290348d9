//! Requests that a guest sends to the FUSE server, over a filesystem that records what it is asked.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmlab_fuse::Server;
use vmlab_fuse::abi::{OutHeader, init as flags};
use vmlab_fuse::testing::{Answers, Fake, Listed, Reply, init, serve};
use vmlab_fuzz::requests;

/// What changes something.
const CHANGES: &[&str] = &[
    "setattr",
    "symlink",
    "mknod",
    "mkdir",
    "unlink",
    "rmdir",
    "rename",
    "link",
    "create",
    "tmpfile",
    "write",
    "setxattr",
    "removexattr",
    "fallocate",
    "copy_file_range",
];

fuzz_target!(|data: &[u8]| {
    let Some((&[how, piece], data)) = data.split_first_chunk() else { return };
    let whole = run(how, 0, data);
    // Where the bytes lie makes no difference.
    assert_eq!(whole, run(how, usize::from(piece).max(1), data));
});

/// The replies and the calls.
fn run(how: u8, piece: usize, data: &[u8]) -> (Vec<Option<Reply>>, Vec<String>) {
    let read_only = how & 1 != 0;
    let names = [&b"."[..], b"..", b"a", &[b'x'; 255]];
    let mut answers = Answers { read_only, ..Default::default() };
    answers.listed = names
        .iter()
        .map(|name| Listed {
            ino: 1,
            name: name.to_vec(),
            entry: (name[0] != b'.').then_some(answers.entry),
        })
        .collect();
    let fake = Fake::new(answers, b"some content of a file").expect("a file in memory");
    let server = Server::new(fake);
    let mut initialised = how & 2 == 0;
    if initialised {
        let known = if how & 4 == 0 { u64::MAX } else { !flags::SETXATTR_EXT };
        let reply = init(known).serve(&server, 64).expect("a reply to INIT");
        assert_eq!(reply.error, 0);
    }
    let mut replies = Vec::new();
    let mut calls = server.filesystem().take_calls();
    for request in requests(data) {
        let header = size_of::<OutHeader>();
        let reply = serve(&server, &request.bytes, request.room, piece);
        let new = server.filesystem().take_calls();
        if let (Some(reply), Some(unique)) = (&reply, request.bytes.get(8..16)) {
            assert_eq!(reply.unique.to_ne_bytes(), unique);
            assert!(header + reply.body.len() <= request.room);
        }
        for call in &new {
            let word = call.split(' ').next().unwrap_or_default();
            initialised |= word == "init";
            assert!(initialised, "{call} before INIT");
            assert!(!read_only || !CHANGES.contains(&word), "{call} of what is read-only");
        }
        calls.extend(new);
        replies.push(reply);
    }
    (replies, calls)
}
