//! From an inode to a descriptor of it, checked to be the same file.

use std::collections::VecDeque;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat2, statx,
};
use rustix::io::Errno;

use super::Passthrough;
use super::inode::{Inode, Key};
use crate::filesystem::Result;
use crate::types::{Name, NodeId};

/// How deep a directory may be below the next one that has a descriptor. A path of `PATH_MAX` bytes has at
/// most half as many names. Renames on the host can make the remembered places a circle.
pub(super) const MAX_DEPTH: usize = 4096;

/// How a name is followed: to the entry of that one directory, and nowhere else.
pub(super) const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_SYMLINKS);

/// What is asked about every file: its attributes, and what identifies it.
const ASKED: StatxFlags =
    StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);

/// The directories that have a descriptor because they are used, in the order in which they are asked
/// whether they still are.
#[derive(Debug, Default)]
pub(super) struct Cache(Mutex<VecDeque<Weak<Inode>>>);

impl Cache {
    /// Keeps a directory's descriptor, and closes those that were not used for the longest time once there
    /// are more than `most`.
    fn add(&self, inode: &Arc<Inode>, fd: &Arc<OwnedFd>, most: usize) {
        if !inode.cache(fd) {
            return;
        }
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ring.push_back(Arc::downgrade(inode));
        while ring.len() > most {
            let Some(oldest) = ring.pop_front() else { break };
            let Some(oldest) = oldest.upgrade() else { continue };
            if oldest.was_used() {
                ring.push_back(Arc::downgrade(&oldest));
            } else {
                oldest.uncache();
            }
        }
    }

    pub(super) fn clear(&self) {
        let ring = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for inode in ring.iter().filter_map(Weak::upgrade) {
            inode.uncache();
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// Looks at what a descriptor is of.
pub(super) fn stat_of(fd: impl AsFd) -> Result<Statx> {
    statx(fd, c"", AtFlags::EMPTY_PATH, ASKED)
}

/// Looks at the entry of a directory.
pub(super) fn stat_at(directory: impl AsFd, name: &CStr) -> Result<Statx> {
    statx(directory, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, ASKED)
}

/// A descriptor of the entry of a directory, which may be anything.
pub(super) fn open_path(directory: impl AsFd, name: &CStr) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(directory, name, flags, Mode::empty(), BENEATH)
}

/// A path of what is open, for calls that take no descriptor that was opened with `O_PATH`.
pub(super) fn proc_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// What was remembered and is not there is stale: the kernel then looks the name up again.
pub(super) fn stale(error: Errno) -> Errno {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Errno::STALE,
        other => other,
    }
}

impl Passthrough {
    fn same(&self, inode: &Inode, stat: &Statx) -> Result<()> {
        let same = Key::of(stat, inode.births) == inode.key;
        if same { Ok(()) } else { Err(Errno::STALE) }
    }

    fn open_checked(
        &self,
        directory: &OwnedFd,
        name: &CStr,
        inode: &Inode,
    ) -> Result<Arc<OwnedFd>> {
        let fd = open_path(directory, name).map_err(stale)?;
        self.same(inode, &stat_of(&fd)?)?;
        Ok(Arc::new(fd))
    }

    /// A descriptor of a directory, kept for the next time.
    pub(super) fn directory(&self, inode: &Arc<Inode>) -> Result<Arc<OwnedFd>> {
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let mut missing = Vec::new();
        let mut at = Arc::clone(inode);
        let mut fd = loop {
            if let Some(fd) = at.kept() {
                break fd;
            }
            if missing.len() == MAX_DEPTH {
                return Err(Errno::STALE);
            }
            let place = at.place()?;
            missing.push((at, place.name));
            at = place.parent;
        };
        while let Some((inode, name)) = missing.pop() {
            fd = self.open_checked(&fd, &name, &inode)?;
            self.cache.add(&inode, &fd, self.config.max_descriptors);
        }
        Ok(fd)
    }

    /// A descriptor of the directory with this node id.
    pub(super) fn parent(&self, node: NodeId) -> Result<(Arc<Inode>, Arc<OwnedFd>)> {
        let inode = self.inodes.get(node)?;
        let fd = self.directory(&inode)?;
        Ok((inode, fd))
    }

    /// A descriptor of an inode of any type. It allows only what `O_PATH` allows, or what one of the
    /// inode's handles does.
    pub(super) fn descriptor(&self, inode: &Arc<Inode>) -> Result<Arc<OwnedFd>> {
        if inode.kind == FileType::Directory {
            return self.directory(inode);
        }
        if let Some(fd) = inode.kept() {
            return Ok(fd);
        }
        let place = inode.place()?;
        let directory = self.directory(&place.parent)?;
        self.open_checked(&directory, &place.name, inode)
    }

    /// Looks at an inode, without opening it if it has a name.
    pub(super) fn stat(&self, inode: &Arc<Inode>) -> Result<Statx> {
        if let Some(fd) = inode.kept() {
            return stat_of(&fd);
        }
        let place = inode.place()?;
        let directory = self.directory(&place.parent)?;
        let stat = stat_at(&directory, &place.name).map_err(stale)?;
        self.same(inode, &stat)?;
        Ok(stat)
    }

    /// A descriptor of what a name is about to be taken from, where the guest's kernel knows it by that
    /// name: it may ask for its attributes as long as it has it open, and a directory can be somebody's
    /// working directory.
    pub(super) fn victim(
        &self,
        parent: &Arc<Inode>,
        directory: &OwnedFd,
        name: Name<'_>,
    ) -> Option<(Arc<Inode>, Arc<OwnedFd>)> {
        let fd = open_path(directory, name.as_c_str()).ok()?;
        let stat = stat_of(&fd).ok()?;
        let births = parent.births_of(&stat, || Ok(fd.as_fd())).ok()?;
        let inode = self.inodes.find(&Key::of(&stat, births))?;
        inode.is_at(parent, name).then(|| (inode, Arc::new(fd)))
    }

    /// Keeps what has lost its name.
    pub(super) fn pin(&self, victim: Option<(Arc<Inode>, Arc<OwnedFd>)>) {
        let Some((inode, fd)) = victim else { return };
        // Beyond the budget the inode is stale. A kernel that forgets what it removes does not get there.
        if let Some(pin) = self.pins.take(self.config.max_descriptors) {
            inode.pin(&fd, pin);
        }
    }
}
