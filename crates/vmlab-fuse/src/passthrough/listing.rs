//! Reading directories.

use rustix::fs::{Dir, DirEntry, FileType, Mode, OFlags, openat};
use rustix::io::Errno;

use super::Passthrough;
use super::handles::Open;
use crate::directory::DirSink;
use crate::filesystem::{Opened, Result};
use crate::types::{Handle, Name, NodeId};

/// The entries of an open directory, as the kernel gives them.
#[derive(Debug)]
pub(super) struct Stream {
    dir: Dir,
    /// The offset of what comes next.
    at: Option<u64>,
    /// What was read and had no room.
    pending: Option<DirEntry>,
}

impl Stream {
    fn seek(&mut self, offset: u64) -> Result<()> {
        if self.at != Some(offset) {
            self.at = None;
            self.pending = None;
            self.dir.seek(offset.cast_signed())?;
            self.at = Some(offset);
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Option<DirEntry>> {
        if let Some(pending) = self.pending.take() {
            return Ok(Some(pending));
        }
        let next = self.dir.read().transpose();
        if next.is_err() {
            // The next request has to seek.
            self.at = None;
        }
        next
    }
}

impl Passthrough {
    pub(super) fn open_directory(&self, node: NodeId) -> Result<Opened> {
        let (inode, fd) = self.parent(node)?;
        self.handles.room()?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |more| openat(&fd, c".", flags | more, Mode::empty());
        let entries = self.without_atime(open)?;
        let stream = Stream { dir: Dir::new(entries)?, at: Some(0), pending: None };
        let handle = self.handles.add(Open::directory(inode, fd, stream))?;
        Ok(Opened { handle, flags: self.directory_flags() })
    }

    pub(super) fn list(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        sink: &mut DirSink,
    ) -> Result<()> {
        let open = self.handles.directory(node, handle)?;
        let fd = open.shared_fd();
        let mut stream = open.entries()?;
        stream.seek(offset)?;
        let mut added = false;
        loop {
            let entry = match stream.next() {
                Ok(Some(entry)) => entry,
                Ok(None) => return Ok(()),
                // What was read before comes first.
                Err(_) if added => return Ok(()),
                Err(error) => return Err(error),
            };
            let name = entry.file_name();
            if !sink.has_room(name.count_bytes()) {
                stream.pending = Some(entry);
                // No entries would mean that there are no more.
                return if added { Ok(()) } else { Err(Errno::INVAL) };
            }
            let leads_to = match Name::new(name) {
                // An entry that has gone since or cannot be looked at is listed all the same.
                Ok(name) if sink.plus() => self.find(&open.inode, &fd, name).ok(),
                _ => None,
            };
            let next = entry.offset().cast_unsigned();
            // What is above the root is none of the guest's business.
            let above = node == NodeId::ROOT && name.to_bytes() == b"..";
            sink.add(
                if above { open.inode.key.ino } else { entry.ino() },
                next,
                kind_of(entry.file_type()),
                name.to_bytes(),
                leads_to.as_ref(),
            );
            stream.at = Some(next);
            added = true;
        }
    }

    pub(super) fn sync_directory(
        &self,
        node: NodeId,
        handle: Handle,
        data_only: bool,
    ) -> Result<()> {
        let open = self.handles.directory(node, handle)?;
        let stream = open.entries()?;
        super::io_ops::sync(stream.dir.fd()?, data_only)
    }
}

/// The type of an entry: the file type's bits of a mode, shifted.
fn kind_of(kind: FileType) -> u8 {
    match kind {
        FileType::Unknown => 0,
        known => (known.as_raw_mode() >> 12) as u8,
    }
}
