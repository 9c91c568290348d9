//! Attributes, and changes of them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Statx, StatxFlags, StatxTimestamp, Timespec, Timestamps,
    UTIME_NOW, UTIME_OMIT, Uid, chmodat, chownat, ftruncate, makedev, openat, utimensat,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::Passthrough;
use super::resolve::stat_of;
use crate::abi;
use crate::filesystem::{Attributes, Changes, Result, SetTime};
use crate::types::{Handle, NodeId};

/// The bits that chmod(2) sets.
pub(super) const PERMISSIONS: u32 = 0o7777;

const NANOS: u32 = 1_000_000_000;

impl Passthrough {
    pub(super) fn attributes(&self, stat: &Statx) -> Attributes {
        let attr = abi::Attr {
            ino: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: stat.stx_atime.tv_sec.cast_unsigned(),
            mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
            ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
            atimensec: stat.stx_atime.tv_nsec,
            mtimensec: stat.stx_mtime.tv_nsec,
            ctimensec: stat.stx_ctime.tv_nsec,
            mode: stat.stx_mode.into(),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            // The kernel's 32 bits of a device number are the lower half of the C library's.
            rdev: makedev(stat.stx_rdev_major, stat.stx_rdev_minor) as u32,
            blksize: stat.stx_blksize,
            flags: 0,
        };
        Attributes { attr, valid: self.config.cache.valid() }
    }

    /// Looks at an inode, through a handle if there is one.
    fn look(&self, node: NodeId, handle: Option<Handle>) -> Result<Statx> {
        match handle {
            Some(handle) => stat_of(self.handles.any(node, handle)?.fd()),
            None => self.stat(&self.inodes.get(node)?),
        }
    }

    pub(super) fn get_attributes(
        &self,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<Attributes> {
        self.look(node, handle).map(|stat| self.attributes(&stat))
    }

    pub(super) fn get_statx(
        &self,
        node: NodeId,
        handle: Option<Handle>,
        mask: u32,
    ) -> Result<(abi::Statx, Duration)> {
        let stat = self.look(node, handle)?;
        let known = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        // Everything was asked for; what was not wanted does no harm, but the rest must not be claimed.
        let wanted = StatxFlags::from_bits_retain(mask) | StatxFlags::BASIC_STATS;
        let time = |time: StatxTimestamp| abi::SxTime {
            tv_sec: time.tv_sec,
            tv_nsec: time.tv_nsec,
            ..Default::default()
        };
        let out = abi::Statx {
            mask: stat.stx_mask & (known & wanted).bits(),
            blksize: stat.stx_blksize,
            attributes: stat.stx_attributes.bits(),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            mode: stat.stx_mode,
            ino: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            attributes_mask: stat.stx_attributes_mask.bits(),
            atime: time(stat.stx_atime),
            btime: time(stat.stx_btime),
            ctime: time(stat.stx_ctime),
            mtime: time(stat.stx_mtime),
            rdev_major: stat.stx_rdev_major,
            rdev_minor: stat.stx_rdev_minor,
            dev_major: stat.stx_dev_major,
            dev_minor: stat.stx_dev_minor,
            ..Default::default()
        };
        Ok((out, self.config.cache.valid()))
    }

    pub(super) fn change(
        &self,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<Attributes> {
        self.writable()?;
        let open = handle.map(|handle| self.handles.any(node, handle)).transpose()?;
        let fd = match &open {
            Some(open) => open.shared_fd(),
            None => self.descriptor(&self.inodes.get(node)?)?,
        };
        let times = times(changes)?;
        self.change_owner(&fd, changes)?;
        // After the owner, a change of which takes the set-user-ID bit.
        if let Some(mode) = changes.mode {
            self.chmod(fd.as_fd(), mode)?;
        }
        if let Some(size) = changes.size {
            let writable = open.is_some_and(|open| open.writable());
            if writable {
                ftruncate(&fd, size)?;
            } else {
                // A node id may be of anything.
                if FileType::from_raw_mode(stat_of(&fd)?.stx_mode.into()) != FileType::RegularFile {
                    return Err(Errno::INVAL);
                }
                ftruncate(self.reopen(fd.as_fd(), OFlags::WRONLY)?, size)?;
            }
        }
        if changes.kill_suidgid {
            self.kill_suidgid(fd.as_fd())?;
        }
        if let Some(times) = times {
            utimensat(&self.proc, DecInt::from_fd(&fd), &times, AtFlags::empty())?;
        }
        Ok(self.attributes(&stat_of(&fd)?))
    }

    fn change_owner(&self, fd: &OwnedFd, changes: &Changes) -> Result<()> {
        let Changes { uid, gid, .. } = *changes;
        if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
            return Err(Errno::INVAL);
        }
        if (uid, gid) == (None, None) || !self.privileged {
            // All ids are those of the process's user.
            return Ok(());
        }
        chownat(fd, c"", uid.map(Uid::from_raw), gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)
    }

    /// Opens again what is open, after its type was checked.
    pub(super) fn reopen(&self, fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        openat(&self.proc, DecInt::from_fd(fd), flags, Mode::empty())
    }

    /// Sets the permissions of what is open, also with `O_PATH`.
    pub(super) fn chmod(&self, fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
        let mode = Mode::from_raw_mode(mode & PERMISSIONS);
        chmodat(&self.proc, DecInt::from_fd(fd), mode, AtFlags::empty())
    }

    /// Takes the bits that let a program run as somebody else, as a change by somebody without
    /// `CAP_FSETID` does. The process may have that, so the host does not do it.
    pub(super) fn kill_suidgid(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let stat = stat_of(fd)?;
        let mode = u32::from(stat.stx_mode);
        if FileType::from_raw_mode(mode) != FileType::RegularFile {
            return Ok(());
        }
        let mode = Mode::from_raw_mode(mode & PERMISSIONS);
        let mut left = mode - Mode::SUID;
        if mode.contains(Mode::XGRP) {
            left -= Mode::SGID;
        }
        if left == mode { Ok(()) } else { self.chmod(fd, left.as_raw_mode()) }
    }
}

fn times(changes: &Changes) -> Result<Option<Timestamps>> {
    if (changes.atime, changes.mtime) == (None, None) {
        return Ok(None);
    }
    let time = |time: Option<SetTime>| match time {
        None => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }),
        Some(SetTime::Now) => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_NOW }),
        // Larger numbers have other meanings.
        Some(SetTime::At(_, nanos)) if nanos >= NANOS => Err(Errno::INVAL),
        Some(SetTime::At(seconds, nanos)) => {
            Ok(Timespec { tv_sec: seconds, tv_nsec: nanos.into() })
        }
    };
    let (last_access, last_modification) = (time(changes.atime)?, time(changes.mtime)?);
    Ok(Some(Timestamps { last_access, last_modification }))
}
