//! Open files and directories.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::inode::Inode;
use super::listing::Stream;
use crate::filesystem::Result;
use crate::types::{Handle, NodeId};

#[derive(Debug)]
enum Kind {
    File { writable: bool },
    Directory(Mutex<Stream>),
}

/// An open file or directory.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) inode: Arc<Inode>,
    fd: Arc<OwnedFd>,
    kind: Kind,
}

impl Open {
    /// A regular file, opened with these flags.
    pub(super) fn file(inode: Arc<Inode>, fd: OwnedFd, flags: OFlags) -> Self {
        Self::file_of(inode, Arc::new(fd), flags.intersects(OFlags::WRONLY | OFlags::RDWR))
    }

    /// A regular file whose descriptor others use as well.
    pub(super) fn file_of(inode: Arc<Inode>, fd: Arc<OwnedFd>, writable: bool) -> Self {
        Self::new(inode, fd, Kind::File { writable })
    }

    /// A directory: a descriptor of it, and its entries.
    pub(super) fn directory(inode: Arc<Inode>, fd: Arc<OwnedFd>, entries: Stream) -> Self {
        Self::new(inode, fd, Kind::Directory(Mutex::new(entries)))
    }

    fn new(inode: Arc<Inode>, fd: Arc<OwnedFd>, kind: Kind) -> Self {
        inode.opened(&fd);
        Self { inode, fd, kind }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn shared_fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    pub(super) fn writable(&self) -> bool {
        matches!(self.kind, Kind::File { writable: true })
    }

    pub(super) fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory(_))
    }

    pub(super) fn entries(&self) -> Result<MutexGuard<'_, Stream>> {
        match &self.kind {
            Kind::Directory(entries) => Ok(entries.lock().unwrap_or_else(PoisonError::into_inner)),
            Kind::File { .. } => Err(Errno::NOTDIR),
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.inode.closed();
    }
}

/// All handles.
#[derive(Debug)]
pub(super) struct Handles {
    open: RwLock<HashMap<Handle, Arc<Open>>>,
    next: AtomicU64,
    most: usize,
}

impl Handles {
    pub(super) fn new(most: usize) -> Self {
        Self { open: RwLock::default(), next: AtomicU64::new(1), most }
    }

    /// Whether one more fits, to be asked before anything is done for it.
    pub(super) fn room(&self) -> Result<()> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        if open.len() < self.most { Ok(()) } else { Err(Errno::MFILE) }
    }

    pub(super) fn add(&self, new: Open) -> Result<Handle> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= self.most {
            return Err(Errno::MFILE);
        }
        let handle = Handle(self.next.fetch_add(1, Ordering::Relaxed));
        open.insert(handle, Arc::new(new));
        Ok(handle)
    }

    /// What this handle of this node is.
    pub(super) fn any(&self, node: NodeId, handle: Handle) -> Result<Arc<Open>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let open = open.get(&handle).filter(|open| open.inode.id == node);
        open.cloned().ok_or(Errno::BADF)
    }

    /// An open file.
    pub(super) fn file(&self, node: NodeId, handle: Handle) -> Result<Arc<Open>> {
        let open = self.any(node, handle)?;
        if matches!(open.kind, Kind::File { .. }) { Ok(open) } else { Err(Errno::BADF) }
    }

    /// An open directory.
    pub(super) fn directory(&self, node: NodeId, handle: Handle) -> Result<Arc<Open>> {
        let open = self.any(node, handle)?;
        if matches!(open.kind, Kind::Directory(_)) { Ok(open) } else { Err(Errno::BADF) }
    }

    /// All that are open.
    pub(super) fn all(&self) -> Vec<(Handle, Arc<Open>)> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.iter().map(|(handle, open)| (*handle, Arc::clone(open))).collect()
    }

    /// Another table that goes on from here, with others for those that are open.
    pub(super) fn with(&self, open: impl Iterator<Item = (Handle, Open)>) -> Self {
        let open = open.map(|(handle, open)| (handle, Arc::new(open))).collect();
        let next = AtomicU64::new(self.next.load(Ordering::Relaxed));
        Self { open: RwLock::new(open), next, most: self.most }
    }

    pub(super) fn remove(&self, handle: Handle) {
        let closed = self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&handle);
        // Closing can take time, the table is free again.
        drop(closed);
    }

    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.open.write().unwrap_or_else(PoisonError::into_inner));
        drop(all);
    }
}
