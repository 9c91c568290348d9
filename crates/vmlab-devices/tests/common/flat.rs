//! A filesystem as small as can be: one directory with the files of a host directory, without rights,
//! names changed or anything below. What is missing says ENOSYS.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use rustix::fs::RenameFlags;
use rustix::io::Errno;
use vmlab_fuse::abi;
use vmlab_fuse::{
    Attributes, Caller, Changes, Creation, DataIn, DataOut, DirSink, Entry, FileSystem, Handle,
    Name, NodeId, Opened, Result, WriteAt, XattrReply,
};

/// How long FSYNC takes, so that a test sees whether others wait for it.
pub(crate) const FSYNC_TIME: Duration = Duration::from_millis(300);

pub(crate) struct Flat {
    dir: PathBuf,
    /// Node ids are places in this list, plus 2; handles are too.
    names: Mutex<Vec<Vec<u8>>>,
}

impl Flat {
    pub(crate) fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), names: Mutex::default() }
    }

    fn node(&self, name: &[u8]) -> NodeId {
        let mut names = self.names.lock().unwrap();
        let place = names.iter().position(|known| known == name).unwrap_or_else(|| {
            names.push(name.to_vec());
            names.len() - 1
        });
        NodeId(place as u64 + 2)
    }

    fn path(&self, node: NodeId) -> Result<PathBuf> {
        if node.0 == abi::ROOT_ID {
            return Ok(self.dir.clone());
        }
        let names = self.names.lock().unwrap();
        let name = node.0.checked_sub(2).and_then(|place| names.get(place as usize));
        let name = name.ok_or(Errno::STALE)?;
        Ok(self.dir.join(std::ffi::OsStr::from_bytes(name)))
    }

    fn file(&self, node: NodeId) -> Result<File> {
        OpenOptions::new().read(true).write(true).open(self.path(node)?).map_err(errno)
    }

    fn attributes(&self, node: NodeId) -> Result<Attributes> {
        let meta = self.path(node)?.metadata().map_err(errno)?;
        let attr = abi::Attr {
            ino: node.0,
            size: meta.len(),
            blocks: meta.blocks(),
            mode: meta.mode(),
            nlink: 1,
            blksize: 4096,
            ..Default::default()
        };
        Ok(Attributes { attr, valid: Duration::ZERO })
    }

    fn entry(&self, name: &[u8]) -> Result<Entry> {
        let node = self.node(name);
        let attributes = self.attributes(node)?;
        Ok(Entry { node: Some(node), valid: Duration::ZERO, attributes })
    }
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

const OPENED: Opened = Opened { handle: Handle(0), flags: 0 };

#[rustfmt::skip]
impl FileSystem for Flat {
    fn init(&self, _: u64) {}
    fn destroy(&self) {}
    fn read_only(&self) -> bool { false }
    fn lookup(&self, _: &Caller, _: NodeId, name: Name<'_>) -> Result<Entry> { self.entry(name.as_bytes()) }
    fn forget(&self, _: NodeId, _: u64) {}
    fn getattr(&self, node: NodeId, _: Option<Handle>) -> Result<Attributes> { self.attributes(node) }
    fn statx(&self, _: NodeId, _: Option<Handle>, _: u32) -> Result<(abi::Statx, Duration)> { Err(Errno::NOSYS) }
    fn setattr(&self, _: &Caller, node: NodeId, _: Option<Handle>, changes: &Changes) -> Result<Attributes> {
        if let Some(size) = changes.size {
            self.file(node)?.set_len(size).map_err(errno)?;
        }
        self.attributes(node)
    }
    fn readlink(&self, _: NodeId) -> Result<Vec<u8>> { Err(Errno::NOSYS) }
    fn symlink(&self, _: &Caller, _: NodeId, _: Name<'_>, _: &CStr) -> Result<Entry> { Err(Errno::NOSYS) }
    fn mknod(&self, _: &Caller, _: NodeId, _: Name<'_>, _: u32, _: u32) -> Result<Entry> { Err(Errno::NOSYS) }
    fn mkdir(&self, _: &Caller, _: NodeId, _: Name<'_>, _: u32) -> Result<Entry> { Err(Errno::NOSYS) }
    fn unlink(&self, _: NodeId, _: Name<'_>) -> Result<()> { Err(Errno::NOSYS) }
    fn rmdir(&self, _: NodeId, _: Name<'_>) -> Result<()> { Err(Errno::NOSYS) }
    fn rename(&self, _: &Caller, _: (NodeId, Name<'_>), _: (NodeId, Name<'_>), _: RenameFlags) -> Result<()> { Err(Errno::NOSYS) }
    fn link(&self, _: NodeId, _: NodeId, _: Name<'_>) -> Result<Entry> { Err(Errno::NOSYS) }
    fn open(&self, _: &Caller, node: NodeId, _: u32, _: u32) -> Result<Opened> { self.file(node).map(|_| OPENED) }
    fn create(&self, _: &Caller, _: NodeId, name: Name<'_>, _: &Creation) -> Result<(Entry, Opened)> {
        File::create(self.path(self.node(name.as_bytes()))?).map_err(errno)?;
        Ok((self.entry(name.as_bytes())?, OPENED))
    }
    fn tmpfile(&self, _: &Caller, _: NodeId, _: &Creation) -> Result<(Entry, Opened)> { Err(Errno::NOSYS) }
    fn read(&self, node: NodeId, _: Handle, offset: u64, out: &mut dyn DataOut) -> Result<usize> {
        out.read_from(self.file(node)?.as_fd(), offset).map_err(errno)
    }
    fn write(&self, node: NodeId, _: Handle, to: WriteAt, data: &dyn DataIn, _: bool) -> Result<usize> {
        data.write_to(self.file(node)?.as_fd(), to).map_err(errno)
    }
    fn flush(&self, _: NodeId, _: Handle) -> Result<()> { Ok(()) }
    fn fsync(&self, _: NodeId, _: Handle, _: bool) -> Result<()> {
        std::thread::sleep(FSYNC_TIME);
        Ok(())
    }
    fn release(&self, _: NodeId, _: Handle) -> Result<()> { Ok(()) }
    fn opendir(&self, _: NodeId) -> Result<Opened> { Ok(OPENED) }
    fn readdir(&self, _: NodeId, _: Handle, offset: u64, sink: &mut DirSink) -> Result<()> {
        let mut names: Vec<_> = std::fs::read_dir(&self.dir).map_err(errno)?.flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        for (place, name) in names.iter().enumerate().skip(offset as usize) {
            let entry = if sink.plus() { Some(self.entry(name.as_bytes())?) } else { None };
            if !sink.add(place as u64 + 2, place as u64 + 1, 8, name.as_bytes(), entry.as_ref()) {
                break;
            }
        }
        Ok(())
    }
    fn fsyncdir(&self, _: NodeId, _: Handle, _: bool) -> Result<()> { Ok(()) }
    fn releasedir(&self, _: NodeId, _: Handle) -> Result<()> { Ok(()) }
    fn statfs(&self, _: NodeId) -> Result<abi::Kstatfs> { Err(Errno::NOSYS) }
    fn syncfs(&self, _: NodeId) -> Result<()> { Ok(()) }
    fn access(&self, _: &Caller, _: NodeId, _: u32) -> Result<()> { Ok(()) }
    fn getxattr(&self, _: NodeId, _: &CStr, _: u32) -> Result<XattrReply> { Err(Errno::NOSYS) }
    fn listxattr(&self, _: NodeId, _: u32) -> Result<XattrReply> { Err(Errno::NOSYS) }
    fn setxattr(&self, _: NodeId, _: &CStr, _: &[u8], _: u32) -> Result<()> { Err(Errno::NOSYS) }
    fn removexattr(&self, _: NodeId, _: &CStr) -> Result<()> { Err(Errno::NOSYS) }
    fn fallocate(&self, _: NodeId, _: Handle, _: u64, _: u64, _: u32) -> Result<()> { Err(Errno::NOSYS) }
    fn lseek(&self, _: NodeId, _: Handle, _: u64, _: u32) -> Result<u64> { Err(Errno::NOSYS) }
    fn copy_file_range(&self, _: (NodeId, Handle, u64), _: (NodeId, Handle, u64), _: u64) -> Result<usize> { Err(Errno::NOSYS) }
}
