//! Names of files: removing, changing, adding and reading them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, RenameFlags, linkat, readlinkat, renameat_with, unlinkat};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::Passthrough;
use super::inode::{Inode, Key};
use super::resolve::{open_path, stat_at};
use crate::filesystem::{Entry, Result};
use crate::types::{Name, NodeId};

impl Passthrough {
    pub(super) fn read_link(&self, node: NodeId) -> Result<Vec<u8>> {
        let inode = self.inodes.get(node)?;
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let fd = self.descriptor(&inode)?;
        Ok(readlinkat(&fd, c"", Vec::new())?.into_bytes())
    }

    pub(super) fn remove(&self, parent: NodeId, name: Name<'_>, flags: AtFlags) -> Result<()> {
        self.writable()?;
        let (parent, directory) = self.parent(parent)?;
        let victim = self.victim(&parent, &directory, name);
        unlinkat(&directory, name.as_c_str(), flags)?;
        self.pin(victim);
        Ok(())
    }

    pub(super) fn add_link(&self, node: NodeId, parent: NodeId, name: Name<'_>) -> Result<Entry> {
        self.writable()?;
        let inode = self.inodes.get(node)?;
        if inode.kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        let (parent, directory) = self.parent(parent)?;
        let fd = self.descriptor(&inode)?;
        // An empty path instead needs a capability.
        let from = DecInt::from_fd(&fd);
        linkat(&self.proc, from, &directory, name.as_c_str(), AtFlags::SYMLINK_FOLLOW)?;
        self.find(&parent, &directory, name)
    }

    /// The inode that the guest's kernel knows there.
    fn known(&self, parent: &Inode, directory: &OwnedFd, name: Name<'_>) -> Option<Arc<Inode>> {
        let stat = stat_at(directory, name.as_c_str()).ok()?;
        let open = || open_path(directory, name.as_c_str());
        let births = parent.births_of(&stat, open).ok()?;
        self.inodes.find(&Key::of(&stat, births))
    }

    pub(super) fn change_name(
        &self,
        (from, from_name): (NodeId, Name<'_>),
        (to, to_name): (NodeId, Name<'_>),
        flags: RenameFlags,
    ) -> Result<()> {
        self.writable()?;
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        let (from, from_fd) = self.parent(from)?;
        let (to, to_fd) = self.parent(to)?;
        let moved = self.known(&from, &from_fd, from_name);
        let exchanged = match flags.contains(RenameFlags::EXCHANGE) {
            true => self.known(&to, &to_fd, to_name),
            false => None,
        };
        let keeps = flags.intersects(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE);
        let victim = if keeps { None } else { self.victim(&to, &to_fd, to_name) };
        renameat_with(&from_fd, from_name.as_c_str(), &to_fd, to_name.as_c_str(), flags)?;
        let is = |one: &Option<Arc<Inode>>, other: &Arc<Inode>| {
            one.as_ref().is_some_and(|one| Arc::ptr_eq(one, other))
        };
        if let Some((victim, _)) = &victim
            && is(&moved, victim)
        {
            // Two names of one file: both stay.
            return Ok(());
        }
        self.pin(victim);
        if let Some(moved) = moved {
            self.inodes.set_place(&moved, &to, to_name);
        }
        if let Some(exchanged) = exchanged {
            self.inodes.set_place(&exchanged, &from, from_name);
        }
        Ok(())
    }
}
