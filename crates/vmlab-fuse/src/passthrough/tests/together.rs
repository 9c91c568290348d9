//! Many threads at once, mounts inside of a share, and requests as bytes.

use std::sync::atomic::AtomicU32;

use rustix::fs::RenameFlags;
use zerocopy::IntoBytes;

use super::mounts::{Mounted, with_own_mounts};
use super::*;
use crate::abi::Opcode;
use crate::request::{ReplyBytes, RequestBytes};
use crate::server::Server;

#[test]
fn threads_share_names_and_leave_nothing() {
    let config = PassthroughConfig { max_descriptors: 3, ..Default::default() };
    let share = Share::with(config);
    // Fewer than threads, so that they meet in them.
    for i in 0..2 {
        fs::create_dir(share.path(&format!("dir-{i}"))).unwrap();
    }
    let made = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let (share, made) = (&share, &made);
            scope.spawn(move || {
                for round in 0..600 {
                    let name = format!("dir-{}", round % 2);
                    let Ok(entry) = share.lookup(ROOT, &name) else { continue };
                    let dir = entry.node.unwrap();
                    // Names that the other threads use too.
                    let file = format!("file-{}", round % 2);
                    if let Ok((node, handle)) = share.create(dir, &file, 0o644, RDWR) {
                        made.fetch_add(1, Ordering::Relaxed);
                        share.write(node, handle, 0, "x").unwrap();
                        assert!(share.attr(node).is_ok(), "it is open");
                        let _ = share.rename((dir, &file), (dir, "other"), RenameFlags::empty());
                        let _ = share.unlink(dir, "other");
                        assert!(share.fs.getattr(node, Some(handle)).is_ok());
                        share.fs.release(node, handle).unwrap();
                        share.fs.forget(node, 1);
                    }
                    for found in share.list(dir, (4096, true)) {
                        if found.node != 0 {
                            share.fs.forget(NodeId(found.node), 1);
                        }
                    }
                    share.fs.forget(dir, 1);
                }
            });
        }
    });
    assert!(made.load(Ordering::Relaxed) > 100);
    assert_eq!((share.fs.known_inodes(), share.fs.pins.count()), (1, 0));
}

#[test]
fn a_mount_inside_is_told_and_is_another_file() {
    let name = "passthrough::tests::together::a_mount_inside_is_told_and_is_another_file";
    with_own_mounts(name, || {
        let share = Share::new();
        fs::create_dir_all(share.path("dir/sub")).unwrap();
        fs::create_dir(share.path("bound")).unwrap();
        share.put("dir/file", "content");
        let _mounted = Mounted::bind(&share.path("dir"), &share.path("bound"));
        let is_submount = |name: &str| {
            let attr = share.lookup(ROOT, name).unwrap().attributes.attr;
            attr.flags & abi::attr::SUBMOUNT != 0
        };
        assert!(is_submount("bound") && !is_submount("dir"));
        // The same directory at two places: one node would be a circle for the guest's kernel.
        assert_ne!(share.node("bound"), share.node("dir"));
        let (here, there) = (share.node("dir/file"), share.node("bound/file"));
        assert_ne!(here, there);
        assert_eq!(share.attr(here).unwrap().ino, share.attr(there).unwrap().ino);
        let sub = share.lookup(share.node("bound"), "sub").unwrap();
        assert_eq!(sub.attributes.attr.flags, 0);
    });
}

struct Bytes(Vec<u8>);

impl RequestBytes for Bytes {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn read(&self, at: usize, buffer: &mut [u8]) -> usize {
        let rest = self.0.get(at..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        count
    }

    fn write_to(
        &self,
        at: usize,
        file: BorrowedFd<'_>,
        to: WriteAt,
        count: usize,
    ) -> io::Result<usize> {
        Ok(crate::testing::write_at(file, &self.0[at..at + count], to)?)
    }
}

impl ReplyBytes for Bytes {
    fn capacity(&self) -> usize {
        self.0.len()
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn read_from(
        &mut self,
        at: usize,
        file: BorrowedFd<'_>,
        from: u64,
        count: usize,
    ) -> io::Result<usize> {
        Ok(rustix::io::pread(file, &mut self.0[at..at + count], from)?)
    }
}

/// Sends one request; gives the error or what is behind the reply's header.
fn ask(
    server: &Server<Passthrough>,
    opcode: Opcode,
    node: u64,
    body: &[&[u8]],
) -> std::result::Result<Vec<u8>, i32> {
    let body = body.concat();
    let header = abi::InHeader {
        len: (size_of::<abi::InHeader>() + body.len()) as u32,
        opcode: opcode as u32,
        nodeid: node,
        uid: me().uid,
        gid: me().gid,
        ..Default::default()
    };
    let request = Bytes([header.as_bytes(), &body].concat());
    let mut reply = Bytes(vec![0; 8192]);
    let length = server.serve(&request, &mut reply);
    let (out, rest) = abi::OutHeader::read_from_prefix(&reply.0[..length]).unwrap();
    if out.error == 0 { Ok(rest.to_vec()) } else { Err(out.error) }
}

#[test]
fn requests_reach_nothing_outside() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("share")).unwrap();
    fs::write(dir.path().join("secret"), "secret").unwrap();
    let root = dir.path().join("share");
    let fs = Passthrough::new(&root, PassthroughConfig::default()).unwrap();
    let server = Server::new(fs);
    let init = abi::InitIn { major: 7, minor: 41, ..Default::default() };
    ask(&server, Opcode::Init, 0, &[init.as_bytes()]).unwrap();
    let inval = Errno::INVAL.raw_os_error();
    for name in
        [&b"..\0"[..], b".\0", b"\0", b"/\0", b"../secret\0", b"/etc/passwd\0", b"a/b\0", b"x"]
    {
        assert_eq!(ask(&server, Opcode::Lookup, 1, &[name]), Err(-inval), "{name:?}");
        let create = abi::CreateIn { flags: 2, mode: 0o644, ..Default::default() };
        let made = ask(&server, Opcode::Create, 1, &[create.as_bytes(), name]);
        assert_eq!(made, Err(-inval), "{name:?}");
    }
    let create = abi::CreateIn { flags: 2, mode: 0o644, ..Default::default() };
    let made = ask(&server, Opcode::Create, 1, &[create.as_bytes(), b"file\0"]).unwrap();
    let (entry, rest) = abi::EntryOut::read_from_prefix(&made).unwrap();
    let (open, _) = abi::OpenOut::read_from_prefix(rest).unwrap();
    let write = abi::WriteIn { fh: open.fh, size: 4, ..Default::default() };
    ask(&server, Opcode::Write, entry.nodeid, &[write.as_bytes(), b"data"]).unwrap();
    let read = abi::ReadIn { fh: open.fh, offset: 1, size: 100, ..Default::default() };
    assert_eq!(ask(&server, Opcode::Read, entry.nodeid, &[read.as_bytes()]).unwrap(), b"ata");
    assert_eq!(std::fs::read_to_string(root.join("file")).unwrap(), "data");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}
