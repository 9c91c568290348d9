//! Making files.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Statx, Uid, chownat, getxattr_query, mkdirat, mknodat,
    openat, openat2, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::Passthrough;
use super::attributes::PERMISSIONS;
use super::handles::Open;
use super::inode::{Inode, Key};
use super::resolve::{BENEATH, open_path, proc_path, stat_at, stat_of};
use crate::filesystem::{Creation, Entry, Opened, Result};
use crate::types::{Caller, Name, NodeId};

/// How often a name may vanish and be there again in turn before CREATE gives up.
const CREATE_ATTEMPTS: u32 = 8;

/// The permissions that a file is made with; the others follow once its owner is right.
const AT_FIRST: u32 = 0o1777;

/// The permissions that an ACL or the umask takes away.
const ACCESS: u32 = 0o777;

/// A directory in which something is made for somebody.
struct Site<'a> {
    caller: &'a Caller,
    parent: Arc<Inode>,
    directory: Arc<OwnedFd>,
    name: Name<'a>,
}

impl Passthrough {
    fn site<'a>(&self, caller: &'a Caller, parent: NodeId, name: Name<'a>) -> Result<Site<'a>> {
        let (parent, directory) = self.directory_for(caller, parent)?;
        Ok(Site { caller, parent, directory, name })
    }

    fn directory_for(&self, caller: &Caller, parent: NodeId) -> Result<(Arc<Inode>, Arc<OwnedFd>)> {
        self.writable()?;
        if self.privileged && (caller.uid == u32::MAX || caller.gid == u32::MAX) {
            return Err(Errno::INVAL);
        }
        self.parent(parent)
    }

    pub(super) fn make_symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        target: &CStr,
    ) -> Result<Entry> {
        let site = self.site(caller, parent, name)?;
        symlinkat(target, &site.directory, name.as_c_str())?;
        self.made(&site, FileType::Symlink, None)
    }

    pub(super) fn make_directory(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        mode: u32,
    ) -> Result<Entry> {
        let site = self.site(caller, parent, name)?;
        let first = Mode::from_raw_mode(mode & AT_FIRST);
        mkdirat(&site.directory, name.as_c_str(), first)?;
        // mkdir(2) knows no other bits.
        self.made(&site, FileType::Directory, Some(mode & AT_FIRST))
    }

    pub(super) fn make_node(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        mode: u32,
        rdev: u32,
    ) -> Result<Entry> {
        let kind = match FileType::from_raw_mode(mode) {
            // mknod(2) takes none for a regular file.
            FileType::Unknown if mode & !PERMISSIONS == 0 => FileType::RegularFile,
            kind @ (FileType::RegularFile | FileType::Fifo | FileType::Socket) => kind,
            // The whiteout of an overlay, which no driver answers.
            FileType::CharacterDevice if rdev == 0 => FileType::CharacterDevice,
            // On the host it would be the host's device, for whoever may open it there.
            _ => return Err(Errno::PERM),
        };
        let site = self.site(caller, parent, name)?;
        let mode = self.creation_mode(&site.directory, caller, mode)?;
        let first = Mode::from_raw_mode(mode & AT_FIRST);
        mknodat(&site.directory, name.as_c_str(), kind, first, 0)?;
        self.made(&site, kind, Some(mode))
    }

    /// What was made under a name, with the owner and the permissions that it is to have.
    fn made(&self, site: &Site<'_>, kind: FileType, mode: Option<u32>) -> Result<Entry> {
        let Site { parent, directory, name, .. } = site;
        let stat = stat_at(directory, name.as_c_str())?;
        let open = || {
            let fd = open_path(directory, name.as_c_str())?;
            // Somebody on the host may have put something else there.
            let found = FileType::from_raw_mode(stat_of(&fd)?.stx_mode.into());
            if found == kind { Ok(fd) } else { Err(Errno::STALE) }
        };
        let entry = self
            .finish(site.caller, directory, stat, mode, open)
            .and_then(|stat| self.refer(parent, directory, *name, &stat));
        if entry.is_err() {
            self.undo(site, kind);
        }
        entry
    }

    /// Takes away what could not be made as it was to be.
    fn undo(&self, site: &Site<'_>, kind: FileType) {
        let directory = kind == FileType::Directory;
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        // The error that led here is the one to tell.
        let _ = unlinkat(&site.directory, site.name.as_c_str(), flags);
    }

    /// Gives a new file its owner and its permissions, from which the process's umask may have taken.
    fn finish<F: AsFd>(
        &self,
        caller: &Caller,
        directory: &OwnedFd,
        stat: Statx,
        mode: Option<u32>,
        open: impl FnOnce() -> Result<F>,
    ) -> Result<Statx> {
        let owner = self.owner(caller, directory, &stat)?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let mode = mode.map(|mode| {
            // A directory has its parent's, not its maker's.
            let inherited = Mode::from_raw_mode(stat.stx_mode.into()) & Mode::SGID;
            let inherited = if kind == FileType::Directory { inherited } else { Mode::empty() };
            mode & PERMISSIONS | inherited.as_raw_mode()
        });
        let has = u32::from(stat.stx_mode) & PERMISSIONS;
        let mode = match mode {
            Some(mode) if mode == has => None,
            // The directory's default ACL has decided, not the umask.
            Some(mode) if (mode ^ has) & ACCESS != 0 && has_default_acl(directory) => {
                Some((mode & !ACCESS) | (has & ACCESS)).filter(|mode| *mode != has)
            }
            mode => mode,
        };
        if owner.is_none() && mode.is_none() {
            return Ok(stat);
        }
        let fd = open()?;
        if let Some((uid, gid)) = owner {
            chownat(&fd, c"", Some(uid), gid, AtFlags::EMPTY_PATH)?;
        }
        if let Some(mode) = mode {
            self.chmod(fd.as_fd(), mode)?;
        }
        stat_of(&fd)
    }

    /// The owner that a new file is to have, where the host gave it another. The group stays if it is the
    /// directory's.
    fn owner(
        &self,
        caller: &Caller,
        directory: &OwnedFd,
        stat: &Statx,
    ) -> Result<Option<(Uid, Option<Gid>)>> {
        if !self.privileged || (caller.uid, caller.gid) == (stat.stx_uid, stat.stx_gid) {
            return Ok(None);
        }
        let inherited = stat.stx_gid != self.group || group_is_inherited(directory)?.is_some();
        let gid = (!inherited).then(|| Gid::from_raw(caller.gid));
        Ok(Some((Uid::from_raw(caller.uid), gid)))
    }

    /// Takes the set-group-ID bit from the mode of a new file whose group would be one that the caller may
    /// not be in. Its other groups are not known here; its kernel can set the bit afterwards.
    fn creation_mode(&self, directory: &OwnedFd, caller: &Caller, mode: u32) -> Result<u32> {
        let bits = Mode::from_raw_mode(mode);
        if caller.uid != 0 && bits.contains(Mode::SGID | Mode::XGRP) {
            let group = group_is_inherited(directory)?;
            if group.is_some_and(|group| group != caller.gid) {
                return Ok((bits - Mode::SGID).as_raw_mode() & PERMISSIONS);
            }
        }
        Ok(mode & PERMISSIONS)
    }

    pub(super) fn create_file(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        how: &Creation,
    ) -> Result<(Entry, Opened)> {
        let site = self.site(caller, parent, name)?;
        let flags = self.open_flags(how.flags)?;
        let exclusive = OFlags::from_bits_retain(how.flags).contains(OFlags::EXCL);
        self.handles.room()?;
        let mode = self.creation_mode(&site.directory, caller, how.mode)?;
        let first = Mode::from_raw_mode(mode & AT_FIRST);
        let new = (flags - OFlags::TRUNC)
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::NOCTTY
            | OFlags::CLOEXEC;
        for _ in 0..CREATE_ATTEMPTS {
            match openat2(&site.directory, name.as_c_str(), new, first, BENEATH) {
                Ok(fd) => return self.created(&site, fd, flags, mode),
                Err(Errno::EXIST) if !exclusive => {}
                Err(error) => return Err(error),
            }
            match self.find(&site.parent, &site.directory, name) {
                Ok(entry) => return self.open_found(entry, how),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Errno::BUSY)
    }

    /// Opens what was there already.
    fn open_found(&self, entry: Entry, how: &Creation) -> Result<(Entry, Opened)> {
        let node = entry.node.ok_or(Errno::NOENT)?;
        let opened = self.open_file(node, how.flags, how.open_flags);
        match opened {
            Ok(opened) => Ok((entry, opened)),
            Err(error) => {
                self.inodes.forget(node, 1);
                Err(error)
            }
        }
    }

    fn created(
        &self,
        site: &Site<'_>,
        fd: OwnedFd,
        flags: OFlags,
        mode: u32,
    ) -> Result<(Entry, Opened)> {
        let Site { caller, parent, directory, name } = site;
        let made = self
            .own(caller, directory, fd.as_fd(), mode)
            .and_then(|stat| self.refer(parent, directory, *name, &stat))
            .and_then(|entry| self.opened(entry, fd, flags));
        if made.is_err() {
            self.undo(site, FileType::RegularFile);
        }
        made
    }

    fn own(
        &self,
        caller: &Caller,
        directory: &OwnedFd,
        fd: BorrowedFd<'_>,
        mode: u32,
    ) -> Result<Statx> {
        self.finish(caller, directory, stat_of(fd)?, Some(mode), || Ok(fd))
    }

    /// A handle of a new file.
    fn opened(&self, entry: Entry, fd: OwnedFd, flags: OFlags) -> Result<(Entry, Opened)> {
        let node = entry.node.ok_or(Errno::NOENT)?;
        let inode = self.inodes.get(node)?;
        match self.handles.add(Open::file(inode, fd, flags)) {
            Ok(handle) => Ok((entry, Opened { handle, flags: self.file_flags(flags) })),
            Err(error) => {
                self.inodes.forget(node, 1);
                Err(error)
            }
        }
    }

    pub(super) fn make_temporary(
        &self,
        caller: &Caller,
        parent: NodeId,
        how: &Creation,
    ) -> Result<(Entry, Opened)> {
        let (parent, directory) = self.directory_for(caller, parent)?;
        let flags = self.open_flags(how.flags)?;
        self.handles.room()?;
        let mode = self.creation_mode(&directory, caller, how.mode)?;
        let first = Mode::from_raw_mode(mode & AT_FIRST);
        let unlinkable = OFlags::from_bits_retain(how.flags) & OFlags::EXCL;
        let new = (flags - OFlags::TRUNC) | OFlags::TMPFILE | OFlags::CLOEXEC | unlinkable;
        let fd = openat(&directory, c".", new, first)?;
        let stat = self.own(caller, &directory, fd.as_fd(), mode)?;
        let births = parent.births_of(&stat, || Ok(fd.as_fd()))?;
        // It has no place: its handle is what reaches it.
        let key = Key::of(&stat, births);
        let inode = self.inodes.refer(key, FileType::RegularFile, births)?;
        self.opened(self.entry(&inode, None, &stat), fd, flags)
    }
}

/// Whether the host limits the permissions of new files in a directory.
fn has_default_acl(directory: &OwnedFd) -> bool {
    getxattr_query(proc_path(directory), c"system.posix_acl_default").is_ok()
}

/// The group that new entries of a directory get from it, if they do.
fn group_is_inherited(directory: &OwnedFd) -> Result<Option<u32>> {
    let stat = stat_of(directory)?;
    let inherited = Mode::from_raw_mode(stat.stx_mode.into()).contains(Mode::SGID);
    Ok(inherited.then_some(stat.stx_gid))
}
