//! Requests that a guest sends to the whole server, over a directory next to which something lies that it may
//! neither reach nor change.
//!
//! Run by root it tries what root can do, so run it where nothing else can be written:
//! `unshare -m sh -c 'mount -t tmpfs -o size=16m tmpfs $TMPDIR; mount -o remount,bind,ro /; …'`.
#![no_main]

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vmlab_fuse::abi::{self, Opcode, init as flags};
use vmlab_fuse::testing::{RawRequest, Reply, init, serve};
use vmlab_fuse::{CachePolicy, Passthrough, PassthroughConfig, Server};
use vmlab_fuzz::requests;

/// What the directory holds, next to which the canary lies.
struct Scratch {
    base: tempfile::TempDir,
    secret: [u8; 16],
}

impl Scratch {
    fn new() -> io::Result<Self> {
        let base = tempfile::tempdir()?;
        let mut secret = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut secret)?;
        let share = base.path().join("share");
        let canary = base.path().join("canary");
        for dir in [&share, &canary, &share.join("dir"), &share.join("dir/name")] {
            fs::create_dir(dir)?;
        }
        fs::write(canary.join("secret"), secret)?;
        for file in ["file", "other", "dir/from"] {
            fs::write(share.join(file), "content")?;
        }
        symlink("../canary", share.join("link"))?;
        symlink(canary.join("secret"), share.join("absolute"))?;
        symlink("../../canary", share.join("dir/up"))?;
        Ok(Self { base, secret })
    }

    fn share(&self) -> PathBuf {
        self.base.path().join("share")
    }
}

/// What would tell of any change: all but the time of the last access.
fn state(metadata: &Metadata) -> [i64; 10] {
    [
        metadata.ino() as i64,
        metadata.mode().into(),
        metadata.uid().into(),
        metadata.gid().into(),
        metadata.nlink() as i64,
        metadata.size() as i64,
        metadata.mtime(),
        metadata.mtime_nsec(),
        metadata.ctime(),
        metadata.ctime_nsec(),
    ]
}

/// Everything in and below a directory, but nothing below `except`.
fn tree(dir: &Path, except: &Path, into: &mut BTreeMap<PathBuf, [i64; 10]>) -> io::Result<()> {
    let metadata = fs::symlink_metadata(dir)?;
    if dir == except {
        return Ok(());
    }
    into.insert(dir.to_owned(), state(&metadata));
    if metadata.is_dir() {
        for entry in fs::read_dir(dir)? {
            tree(&entry?.path(), except, into)?;
        }
    }
    Ok(())
}

fn snapshot(scratch: &Scratch, read_only: bool) -> BTreeMap<PathBuf, [i64; 10]> {
    // A share that can be written to may change as it likes.
    let except = if read_only { PathBuf::new() } else { scratch.share() };
    let mut all = BTreeMap::new();
    tree(scratch.base.path(), &except, &mut all).expect("a tree that root can read");
    all
}

/// The guest can make nodes, but none of a device of the host.
fn has_no_devices(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        let kind = metadata.file_type();
        assert!(!kind.is_block_device(), "{:?}", entry.path());
        assert!(!kind.is_char_device() || metadata.rdev() == 0, "{:?}", entry.path());
        if kind.is_dir() {
            has_no_devices(&entry.path());
        }
    }
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").expect("/proc").count()
}

/// The inode number in a reply that has one.
fn ino(opcode: u32, reply: &Reply) -> Option<u64> {
    if reply.error != 0 || reply.body.is_empty() {
        return None;
    }
    use Opcode::*;
    match Opcode::of(opcode)? {
        Lookup | Symlink | MkNod | MkDir | Link | Create | TmpFile => {
            Some(reply.get::<abi::EntryOut>().attr.ino)
        }
        GetAttr | SetAttr => Some(reply.get::<abi::AttrOut>().attr.ino),
        Statx => Some(reply.get::<abi::StatxOut>().stat.ino),
        _ => None,
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&[how, piece], data)) = data.split_first_chunk() else { return };
    let scratch = Scratch::new().expect("a directory");
    let read_only = how & 1 != 0;
    let cache = match how >> 3 & 3 {
        0 => CachePolicy::Fixed,
        1 => CachePolicy::Auto,
        _ => CachePolicy::Coherent,
    };
    let before = snapshot(&scratch, read_only);
    let outside: Vec<u64> = ["", "canary", "canary/secret"]
        .iter()
        .map(|path| fs::symlink_metadata(scratch.base.path().join(path)).expect("it").ino())
        .collect();
    let open = descriptors();
    let config = PassthroughConfig {
        read_only,
        cache,
        submounts: how & 32 == 0,
        writeback: how & 64 != 0,
        posix_acl: how & 128 != 0,
        // Waiting for a disk shows nothing.
        durable: Arc::default(),
        max_handles: 16,
        max_descriptors: 4,
        max_inodes: 64,
        // It is for threads, and would be made anew for each input.
        sandbox: false,
    };
    let server = Server::new(Passthrough::new(&scratch.share(), config).expect("a share"));
    if how & 2 == 0 {
        let known = if how & 4 == 0 { u64::MAX } else { !flags::SETXATTR_EXT };
        init(known).serve(&server, 64);
    }
    for request in requests(data) {
        let Some(reply) = serve(&server, &request.bytes, request.room, piece.into()) else {
            continue;
        };
        assert!(!reply.body.windows(16).any(|bytes| bytes == scratch.secret), "the secret");
        let opcode = request.bytes.get(4..8).and_then(|bytes| bytes.first_chunk());
        let opcode = opcode.map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        if let Some(ino) = ino(opcode, &reply) {
            assert!(!outside.contains(&ino), "{opcode} of what is outside");
        }
        assert!(server.filesystem().known_inodes() <= 64);
    }
    // A session leaves nothing behind, however it went.
    init(0).serve(&server, 64);
    RawRequest::new(Opcode::Destroy).serve(&server, 0);
    assert_eq!(server.filesystem().known_inodes(), 1);
    drop(server);
    assert_eq!(descriptors(), open, "descriptors");
    assert_eq!(snapshot(&scratch, read_only), before);
    assert_eq!(
        fs::read(scratch.base.path().join("canary/secret")).ok(),
        Some(scratch.secret.into())
    );
    has_no_devices(&scratch.share());
});
