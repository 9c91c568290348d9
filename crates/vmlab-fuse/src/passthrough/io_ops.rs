//! Files: opening, data, and where it is.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{
    FallocateFlags, FileType, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fstatvfs,
    fsync, seek, syncfs,
};
use rustix::io::Errno;

use super::handles::Open;
use super::resolve::stat_of;
use super::{CachePolicy, Passthrough};
use crate::abi::{self, init};
use crate::filesystem::{DataIn, DataOut, Opened, Result, WriteAt};
use crate::types::{Handle, NodeId};

/// The flags of open(2) that have a meaning here. The others are about how a name is followed, which is done
/// already, or about the guest's own side, as `O_DIRECT` is, or are told with each write, as `O_APPEND` is: what
/// was mapped is written back through the same handle. An overlay opens all that lies under it with
/// `O_NOATIME`, which the host refuses to all but a file's owner: see [`Passthrough::without_atime`].
const KEPT: OFlags = OFlags::RWMODE.union(OFlags::TRUNC).union(OFlags::SYNC);

pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

pub(super) fn sync(fd: BorrowedFd<'_>, data_only: bool) -> Result<()> {
    if data_only { fdatasync(fd) } else { fsync(fd) }
}

/// Whether a file of this type is opened for the guest. Devices, FIFOs and sockets are the guest kernel's
/// own matter, so it never asks for them; opening one here could block, or reach a device of the host.
pub(super) fn openable(kind: FileType) -> Result<()> {
    match kind {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(Errno::ISDIR),
        FileType::Symlink => Err(Errno::LOOP),
        _ => Err(Errno::NXIO),
    }
}

impl Passthrough {
    /// The flags that a file is opened with.
    pub(super) fn open_flags(&self, flags: u32) -> Result<OFlags> {
        let flags = OFlags::from_bits_retain(flags) & KEPT;
        // The fourth mode is for ioctl(2) on devices.
        if flags.contains(OFlags::WRONLY | OFlags::RDWR) {
            return Err(Errno::INVAL);
        }
        if flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC) {
            self.writable()?;
        }
        if !self.negotiated(init::WRITEBACK_CACHE) {
            return Ok(flags);
        }
        // The kernel reads the rest of a page that it writes a part of.
        let write_only = flags & OFlags::RWMODE == OFlags::WRONLY;
        Ok(if write_only { (flags - OFlags::WRONLY) | OFlags::RDWR } else { flags })
    }

    /// Opens with `O_NOATIME` what is read-only, where the process may.
    pub(super) fn without_atime(
        &self,
        open: impl Fn(OFlags) -> Result<OwnedFd>,
    ) -> Result<OwnedFd> {
        if self.config.read_only {
            match open(OFlags::NOATIME) {
                Err(Errno::PERM) => {}
                other => return other,
            }
        }
        open(OFlags::empty())
    }

    /// Opens a file that the process may perhaps only write to. Gives what it was opened with.
    fn open_to_write(&self, path: BorrowedFd<'_>, flags: OFlags) -> Result<(OwnedFd, OFlags)> {
        let open = |flags| {
            let fd = self.without_atime(|more| self.reopen(path, flags | more))?;
            Ok((fd, flags))
        };
        match open(flags) {
            Err(Errno::ACCESS) if self.negotiated(init::WRITEBACK_CACHE) => {
                open((flags - OFlags::RDWR) | OFlags::WRONLY)
            }
            other => other,
        }
    }

    /// What the reply to OPEN allows.
    pub(super) fn file_flags(&self, flags: OFlags) -> u32 {
        // What cannot be read cannot be in pages that are written back.
        if flags.contains(OFlags::WRONLY) && self.negotiated(init::WRITEBACK_CACHE) {
            return abi::fopen::DIRECT_IO;
        }
        // What is not written needs nothing at close(2).
        let flush =
            if flags.intersects(OFlags::WRONLY | OFlags::RDWR) { 0 } else { abi::fopen::NOFLUSH };
        match self.config.cache {
            // AUTO_INVAL_DATA drops the pages of a file whose attributes say that it has changed.
            CachePolicy::Fixed | CachePolicy::Auto => flush | abi::fopen::KEEP_CACHE,
            CachePolicy::Coherent => flush,
        }
    }

    pub(super) fn open_file(&self, node: NodeId, flags: u32, open_flags: u32) -> Result<Opened> {
        let inode = self.inodes.get(node)?;
        openable(inode.kind)?;
        let appends = OFlags::from_bits_retain(flags).contains(OFlags::APPEND);
        let flags = self.open_flags(flags)?;
        self.handles.room()?;
        let path = self.descriptor(&inode)?;
        let (fd, flags) = match self.open_to_write(path.as_fd(), flags) {
            // The host's root may have allowed nothing else (`chattr +a`).
            Err(Errno::PERM) if appends => self.open_to_write(path.as_fd(), flags | OFlags::APPEND),
            other => other,
        }?;
        if open_flags & abi::open::KILL_SUIDGID != 0 && flags.contains(OFlags::TRUNC) {
            self.kill_suidgid(fd.as_fd())?;
        }
        let handle = self.handles.add(Open::file(inode, fd, flags))?;
        Ok(Opened { handle, flags: self.file_flags(flags) })
    }

    pub(super) fn read_file(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        out: &mut dyn DataOut,
    ) -> Result<usize> {
        let open = self.handles.file(node, handle)?;
        out.read_from(open.fd(), offset).map_err(|error| errno(&error))
    }

    pub(super) fn write_file(
        &self,
        node: NodeId,
        handle: Handle,
        to: WriteAt,
        data: &dyn DataIn,
        kill_suidgid: bool,
    ) -> Result<usize> {
        self.writable()?;
        let open = self.handles.file(node, handle)?;
        if !open.writable() {
            return Err(Errno::BADF);
        }
        if kill_suidgid {
            // Before the data, as the kernel does: nothing new ever runs with the old bits.
            self.kill_suidgid(open.fd())?;
        }
        data.write_to(open.fd(), to).map_err(|error| errno(&error))
    }

    pub(super) fn sync_file(&self, node: NodeId, handle: Handle, data_only: bool) -> Result<()> {
        sync(self.handles.file(node, handle)?.fd(), data_only)
    }

    pub(super) fn close(&self, node: NodeId, handle: Handle, directory: bool) -> Result<()> {
        match directory {
            true => self.handles.directory(node, handle)?,
            false => self.handles.file(node, handle)?,
        };
        self.handles.remove(handle);
        Ok(())
    }

    pub(super) fn allocate(
        &self,
        node: NodeId,
        handle: Handle,
        (offset, length): (u64, u64),
        mode: u32,
    ) -> Result<()> {
        self.writable()?;
        let open = self.handles.file(node, handle)?;
        fallocate(open.fd(), FallocateFlags::from_bits_retain(mode), offset, length)
    }

    pub(super) fn find_data(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        whence: u32,
    ) -> Result<u64> {
        // All reads and writes say where, so the descriptor's own position means nothing.
        let to = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        seek(self.handles.file(node, handle)?.fd(), to)
    }

    pub(super) fn copy(
        &self,
        from: (NodeId, Handle, u64),
        to: (NodeId, Handle, u64),
        length: u64,
    ) -> Result<usize> {
        self.writable()?;
        let (source, target) = (self.handles.file(from.0, from.1)?, self.handles.file(to.0, to.1)?);
        let (mut at, mut to) = (from.2, to.2);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        copy_file_range(source.fd(), Some(&mut at), target.fd(), Some(&mut to), length)
    }

    pub(super) fn filesystem_numbers(&self, node: NodeId) -> Result<abi::Kstatfs> {
        let numbers = fstatvfs(self.descriptor(&self.inodes.get(node)?)?)?;
        Ok(abi::Kstatfs {
            blocks: numbers.f_blocks,
            bfree: numbers.f_bfree,
            bavail: numbers.f_bavail,
            files: numbers.f_files,
            ffree: numbers.f_ffree,
            bsize: numbers.f_bsize as u32,
            namelen: numbers.f_namemax as u32,
            frsize: numbers.f_frsize as u32,
            ..Default::default()
        })
    }

    pub(super) fn sync_all(&self, node: NodeId) -> Result<()> {
        let fd = self.descriptor(&self.inodes.get(node)?)?;
        // Of the file's own filesystem, for there may be others below the root.
        let kind = FileType::from_raw_mode(stat_of(&fd)?.stx_mode.into());
        let flags = match kind {
            FileType::RegularFile => OFlags::RDONLY,
            FileType::Directory => OFlags::RDONLY | OFlags::DIRECTORY,
            _ => return Ok(()),
        };
        if !self.config.durable.load(Ordering::Relaxed) {
            return Ok(());
        }
        syncfs(self.reopen(fd.as_fd(), flags)?)
    }
}
