//! Every operation, as the server calls it.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use rustix::fs::OFlags;
use rustix::io::Errno;
use tempfile::TempDir;
use zerocopy::FromBytes;

use super::*;
use crate::directory::DirSink;
use crate::filesystem::{Creation, DataIn, DataOut, FileSystem, Opened, WriteAt};
use crate::types::{Caller, Handle};

mod adversarial;
mod directories;
mod duplicate;
mod files;
mod metadata;
mod mounts;
mod raw;
mod read_only;
mod served;
mod table;
mod together;
mod xattrs;

use served::Served;

const ROOT: NodeId = NodeId::ROOT;

/// What a file is opened with.
const RDONLY: OFlags = OFlags::RDONLY;
const RDWR: OFlags = OFlags::RDWR;

/// A shared temporary directory.
struct Share {
    dir: TempDir,
    fs: Served,
}

struct Room(Vec<u8>);

impl DataOut for Room {
    fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let read = rustix::io::pread(file, &mut self.0[..], offset)?;
        self.0.truncate(read);
        Ok(read)
    }
}

struct Data<'a>(&'a [u8]);

impl DataIn for Data<'_> {
    fn write_to(&self, file: BorrowedFd<'_>, to: WriteAt) -> io::Result<usize> {
        Ok(crate::testing::write_at(file, self.0, to)?)
    }
}

/// An entry of a directory.
#[derive(Debug, PartialEq)]
struct Listed {
    name: String,
    next: u64,
    kind: u32,
    node: u64,
}

/// The process's own user, so that nothing has to be given away.
fn me() -> Caller {
    Caller { uid: geteuid().as_raw(), gid: getegid().as_raw(), pid: 1 }
}

/// A user that is nobody on the host.
fn other() -> Caller {
    Caller { uid: 4321, gid: 8765, pid: 1 }
}

fn text(name: &str) -> CString {
    CString::new(name).unwrap()
}

fn named(name: &CStr) -> Name<'_> {
    Name::new(name).unwrap()
}

fn how(mode: u32, flags: OFlags) -> Creation {
    Creation { mode, flags: flags.bits(), open_flags: 0 }
}

fn is_root() -> bool {
    geteuid().is_root()
}

impl Share {
    fn new() -> Self {
        Self::with(PassthroughConfig::default())
    }

    fn with(config: PassthroughConfig) -> Self {
        Self::at(tempfile::tempdir().unwrap(), config)
    }

    fn at(dir: TempDir, config: PassthroughConfig) -> Self {
        let fs = Served::from(Passthrough::new(dir.path(), config).unwrap());
        fs.init(init::SUBMOUNTS);
        // Files are listed with their attributes.
        fs.followed.expect(u32::MAX);
        Self { dir, fs }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn put(&self, path: &str, content: &str) {
        fs::write(self.path(path), content).unwrap();
    }

    fn get(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    fn lookup(&self, parent: NodeId, name: &str) -> Result<Entry> {
        match self.fs.lookup(&me(), parent, named(&text(name)))? {
            Entry { node: None, .. } => Err(Errno::NOENT),
            entry => Ok(entry),
        }
    }

    /// The node at a path, every name of which gets a reference.
    fn node(&self, path: &str) -> NodeId {
        path.split('/').fold(ROOT, |parent, name| self.lookup(parent, name).unwrap().node.unwrap())
    }

    fn attr(&self, node: NodeId) -> Result<abi::Attr> {
        self.fs.getattr(node, None).map(|attributes| attributes.attr)
    }

    fn open(&self, node: NodeId, flags: OFlags) -> Result<Handle> {
        self.fs.open(&me(), node, flags.bits(), 0).map(|opened| opened.handle)
    }

    fn create(
        &self,
        parent: NodeId,
        name: &str,
        mode: u32,
        flags: OFlags,
    ) -> Result<(NodeId, Handle)> {
        let how = how(mode, flags | OFlags::CREATE);
        let (entry, Opened { handle, .. }) =
            self.fs.create(&me(), parent, named(&text(name)), &how)?;
        Ok((entry.node.unwrap(), handle))
    }

    fn mkdir(&self, parent: NodeId, name: &str) -> Result<NodeId> {
        let entry = self.fs.mkdir(&me(), parent, named(&text(name)), 0o755)?;
        Ok(entry.node.unwrap())
    }

    fn unlink(&self, parent: NodeId, name: &str) -> Result<()> {
        self.fs.unlink(parent, named(&text(name)))
    }

    fn rmdir(&self, parent: NodeId, name: &str) -> Result<()> {
        self.fs.rmdir(parent, named(&text(name)))
    }

    fn rename(
        &self,
        (from, old): (NodeId, &str),
        (to, new): (NodeId, &str),
        flags: rustix::fs::RenameFlags,
    ) -> Result<()> {
        let (old, new) = (text(old), text(new));
        self.fs.rename(&me(), (from, named(&old)), (to, named(&new)), flags)
    }

    fn read(&self, node: NodeId, handle: Handle, offset: u64) -> Result<String> {
        let mut room = Room(vec![0; 4096]);
        self.fs.read(node, handle, offset, &mut room)?;
        Ok(String::from_utf8(room.0).unwrap())
    }

    fn write(&self, node: NodeId, handle: Handle, offset: u64, data: &str) -> Result<usize> {
        self.fs.write(node, handle, WriteAt::Offset(offset), &Data(data.as_bytes()), false)
    }

    fn opendir(&self, node: NodeId) -> Result<Handle> {
        self.fs.opendir(node).map(|opened| opened.handle)
    }

    /// One READDIR with room for so many bytes.
    fn readdir(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        (size, plus): (usize, bool),
    ) -> Result<Vec<Listed>> {
        let mut sink = DirSink::new(size, plus);
        self.fs.readdir(node, handle, offset, &mut sink)?;
        assert!(sink.bytes().len() <= size);
        let mut bytes = sink.bytes();
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let mut leads_to = 0;
            if plus {
                let (entry, rest) = abi::EntryOut::read_from_prefix(bytes).unwrap();
                (leads_to, bytes) = (entry.nodeid, rest);
            }
            let (entry, rest) = abi::Dirent::read_from_prefix(bytes).unwrap();
            let length = entry.namelen as usize;
            let name = String::from_utf8(rest[..length].to_vec()).unwrap();
            bytes = &rest[(length).next_multiple_of(8)..];
            all.push(Listed { name, next: entry.off, kind: entry.type_, node: leads_to });
        }
        Ok(all)
    }

    /// The whole directory.
    fn list(&self, node: NodeId, room: (usize, bool)) -> Vec<Listed> {
        let handle = self.opendir(node).unwrap();
        let mut all: Vec<Listed> = Vec::new();
        loop {
            let offset = all.last().map_or(0, |last| last.next);
            let more = self.readdir(node, handle, offset, room).unwrap();
            if more.is_empty() {
                break;
            }
            all.extend(more);
        }
        self.fs.releasedir(node, handle).unwrap();
        all
    }

    fn names(&self, node: NodeId) -> Vec<String> {
        let mut names: Vec<_> =
            self.list(node, (4096, false)).into_iter().map(|entry| entry.name).collect();
        names.sort();
        names
    }
}
