//! The operations, each done where its subject is.

use std::ffi::CStr;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::fs::{Access, AtFlags, RenameFlags};
use rustix::io::Errno;

use super::Passthrough;
use crate::abi;
use crate::directory::DirSink;
use crate::filesystem::{
    Attributes, Changes, Creation, DataIn, DataOut, Entry, FileSystem, Opened, Result, WriteAt,
    XattrReply,
};
use crate::types::{Caller, Handle, Name, NodeId};

impl FileSystem for Passthrough {
    fn prepare_thread(&self) -> io::Result<()> {
        self.sandbox.as_ref().map_or(Ok(()), |sandbox| sandbox.enter().map(|_| ()))
    }

    fn init(&self, flags: u64) {
        self.flags.store(flags, Ordering::Relaxed);
        // The root was there when the share was made, and an error leaves what was known.
        let _ = self.reset();
    }

    fn destroy(&self) {
        let _ = self.reset();
    }

    fn wanted(&self) -> u64 {
        self.wants()
    }

    fn read_only(&self) -> bool {
        self.config.read_only
    }

    fn lookup(&self, _caller: &Caller, parent: NodeId, name: Name<'_>) -> Result<Entry> {
        self.lookup_name(parent, name)
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.inodes.forget(node, count);
    }

    fn getattr(&self, node: NodeId, handle: Option<Handle>) -> Result<Attributes> {
        self.get_attributes(node, handle)
    }

    fn statx(
        &self,
        node: NodeId,
        handle: Option<Handle>,
        mask: u32,
    ) -> Result<(abi::Statx, Duration)> {
        self.get_statx(node, handle, mask)
    }

    fn setattr(
        &self,
        _caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<Attributes> {
        self.change(node, handle, changes)
    }

    fn readlink(&self, node: NodeId) -> Result<Vec<u8>> {
        self.read_link(node)
    }

    fn symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        target: &CStr,
    ) -> Result<Entry> {
        self.make_symlink(caller, parent, name, target)
    }

    fn mknod(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        mode: u32,
        rdev: u32,
    ) -> Result<Entry> {
        self.make_node(caller, parent, name, mode, rdev)
    }

    fn mkdir(&self, caller: &Caller, parent: NodeId, name: Name<'_>, mode: u32) -> Result<Entry> {
        self.make_directory(caller, parent, name, mode)
    }

    fn unlink(&self, parent: NodeId, name: Name<'_>) -> Result<()> {
        self.remove(parent, name, AtFlags::empty())
    }

    fn rmdir(&self, parent: NodeId, name: Name<'_>) -> Result<()> {
        self.remove(parent, name, AtFlags::REMOVEDIR)
    }

    fn rename(
        &self,
        _caller: &Caller,
        from: (NodeId, Name<'_>),
        to: (NodeId, Name<'_>),
        flags: RenameFlags,
    ) -> Result<()> {
        self.change_name(from, to, flags)
    }

    fn link(&self, node: NodeId, parent: NodeId, name: Name<'_>) -> Result<Entry> {
        self.add_link(node, parent, name)
    }

    fn open(&self, _caller: &Caller, node: NodeId, flags: u32, open_flags: u32) -> Result<Opened> {
        self.open_file(node, flags, open_flags)
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        how: &Creation,
    ) -> Result<(Entry, Opened)> {
        self.create_file(caller, parent, name, how)
    }

    fn tmpfile(&self, caller: &Caller, parent: NodeId, how: &Creation) -> Result<(Entry, Opened)> {
        self.make_temporary(caller, parent, how)
    }

    fn read(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        out: &mut dyn DataOut,
    ) -> Result<usize> {
        self.read_file(node, handle, offset, out)
    }

    fn write(
        &self,
        node: NodeId,
        handle: Handle,
        to: WriteAt,
        data: &dyn DataIn,
        kill_suidgid: bool,
    ) -> Result<usize> {
        self.write_file(node, handle, to, data, kill_suidgid)
    }

    fn flush(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.handles.file(node, handle)?;
        // Nothing is kept back here. The kernel writes its own pages back and does not ask again.
        Err(Errno::NOSYS)
    }

    fn fsync(&self, node: NodeId, handle: Handle, data_only: bool) -> Result<()> {
        self.sync_file(node, handle, data_only)
    }

    fn release(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.close(node, handle, false)
    }

    fn opendir(&self, node: NodeId) -> Result<Opened> {
        self.open_directory(node)
    }

    fn readdir(&self, node: NodeId, handle: Handle, offset: u64, sink: &mut DirSink) -> Result<()> {
        self.list(node, handle, offset, sink)
    }

    fn fsyncdir(&self, node: NodeId, handle: Handle, data_only: bool) -> Result<()> {
        self.sync_directory(node, handle, data_only)
    }

    fn releasedir(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.close(node, handle, true)
    }

    fn statfs(&self, node: NodeId) -> Result<abi::Kstatfs> {
        self.filesystem_numbers(node)
    }

    fn syncfs(&self, node: NodeId) -> Result<()> {
        self.sync_all(node)
    }

    fn access(&self, _caller: &Caller, node: NodeId, mask: u32) -> Result<()> {
        // virtio-fs has the guest's kernel check permissions, which knows all of the caller's groups; what the
        // process itself may not do, the host refuses when it is done.
        self.inodes.get(node)?;
        if Access::from_bits_retain(mask).contains(Access::WRITE_OK) {
            self.writable()
        } else {
            Ok(())
        }
    }

    fn getxattr(&self, node: NodeId, name: &CStr, size: u32) -> Result<XattrReply> {
        self.get_xattr(node, name, size)
    }

    fn listxattr(&self, node: NodeId, size: u32) -> Result<XattrReply> {
        self.list_xattrs(node, size)
    }

    fn setxattr(&self, node: NodeId, name: &CStr, value: &[u8], flags: u32) -> Result<()> {
        self.set_xattr(node, name, value, flags)
    }

    fn removexattr(&self, node: NodeId, name: &CStr) -> Result<()> {
        self.remove_xattr(node, name)
    }

    fn fallocate(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        length: u64,
        mode: u32,
    ) -> Result<()> {
        self.allocate(node, handle, (offset, length), mode)
    }

    fn lseek(&self, node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64> {
        self.find_data(node, handle, offset, whence)
    }

    fn copy_file_range(
        &self,
        from: (NodeId, Handle, u64),
        to: (NodeId, Handle, u64),
        length: u64,
    ) -> Result<usize> {
        self.copy(from, to, length)
    }
}
