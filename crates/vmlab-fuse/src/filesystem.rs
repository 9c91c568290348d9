//! What the server asks of a filesystem.

use std::ffi::CStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::fs::RenameFlags;
use rustix::io::Errno;

use crate::abi;
use crate::directory::DirSink;
use crate::types::{Caller, Handle, Name, NodeId};

/// What every operation gives: an error number goes to the guest as it is.
pub type Result<T> = core::result::Result<T, Errno>;

/// A file's attributes, and how long the kernel may believe them.
#[derive(Debug, Clone, Copy)]
pub struct Attributes {
    /// The attributes.
    pub attr: abi::Attr,
    /// How long they hold.
    pub valid: Duration,
}

/// What a name leads to.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The inode, of which the kernel then has one more reference; `None` says that there is nothing, and
    /// that the kernel may remember it for as long as `valid` says.
    pub node: Option<NodeId>,
    /// How long the name holds.
    pub valid: Duration,
    /// What it leads to.
    pub attributes: Attributes,
}

/// An open file or directory.
#[derive(Debug, Clone, Copy)]
pub struct Opened {
    /// Its handle.
    pub handle: Handle,
    /// [`abi::fopen`] flags.
    pub flags: u32,
}

/// How a file is to be made.
#[derive(Debug, Clone, Copy)]
pub struct Creation {
    /// Its type and permissions; the umask has been applied.
    pub mode: u32,
    /// Flags of open(2).
    pub flags: u32,
    /// [`abi::open`] flags.
    pub open_flags: u32,
}

/// A time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The server's now.
    Now,
    /// Seconds since 1970 and nanoseconds.
    At(i64, u32),
}

/// What SETATTR changes. What is `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changes {
    /// Permissions.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Length in bytes.
    pub size: Option<u64>,
    /// Time of the last access.
    pub atime: Option<SetTime>,
    /// Time of the last change of the content.
    pub mtime: Option<SetTime>,
    /// Whether the set-user-ID and set-group-ID bits go, because the caller has not the right to keep
    /// them.
    pub kill_suidgid: bool,
}

/// An extended attribute, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum XattrReply {
    /// What it is.
    Value(Vec<u8>),
    /// How long it is, where that was asked.
    Size(u32),
}

/// Where data is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteAt {
    /// A place in the file.
    Offset(u64),
    /// The file's end, wherever that is by then: the guest's kernel need not know it.
    End,
}

impl WriteAt {
    /// Where what follows so many bytes is written to.
    pub fn after(self, bytes: usize) -> Self {
        match self {
            Self::Offset(offset) => Self::Offset(offset.saturating_add(bytes as u64)),
            Self::End => Self::End,
        }
    }
}

/// Data of a WRITE.
pub trait DataIn {
    /// Writes the data to a file, as pwritev2(2) does; all of it unless there is an error.
    ///
    /// # Errors
    /// Those of pwritev2(2), before anything was written.
    fn write_to(&self, file: BorrowedFd<'_>, to: WriteAt) -> io::Result<usize>;
}

/// Room for the data of a READ.
pub trait DataOut {
    /// Fills the room from a place in a file, as pread(2) does, up to the file's end.
    ///
    /// # Errors
    /// Those of pread(2), also after something was read.
    fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize>;
}

/// A filesystem. Any number of threads call it at once.
///
/// Node ids and handles come from the guest: an unknown one is `ESTALE` or `EBADF` and never a panic.
/// Names are legal, sizes are within the server's limits.
pub trait FileSystem: Send + Sync {
    /// Called by each thread that only serves, before it does: it may give up rights that serving does not
    /// need.
    ///
    /// # Errors
    /// The thread must not serve.
    fn prepare_thread(&self) -> io::Result<()> {
        Ok(())
    }

    /// Begins a session, with these flags negotiated ([`abi::init`]); what an earlier one left is
    /// forgotten.
    fn init(&self, flags: u64);

    /// Ends a session.
    fn destroy(&self);

    /// The flags that it wants beyond those of the server. It gets those of caching and of leaving out OPEN
    /// and OPENDIR; the others need more than a filesystem.
    fn wanted(&self) -> u64 {
        0
    }

    /// Whether it refuses every change. The server then refuses them before it asks.
    fn read_only(&self) -> bool;

    /// Finds a name. Nothing found is an entry without a node, or `ENOENT`.
    fn lookup(&self, caller: &Caller, parent: NodeId, name: Name<'_>) -> Result<Entry>;

    /// Takes back so many references of the kernel.
    fn forget(&self, node: NodeId, count: u64);

    /// Attributes.
    fn getattr(&self, node: NodeId, handle: Option<Handle>) -> Result<Attributes>;

    /// Attributes as of statx(2), with the mask that was asked for.
    fn statx(
        &self,
        node: NodeId,
        handle: Option<Handle>,
        mask: u32,
    ) -> Result<(abi::Statx, Duration)>;

    /// Changes attributes.
    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<Attributes>;

    /// A symbolic link's target.
    fn readlink(&self, node: NodeId) -> Result<Vec<u8>>;

    /// Makes a symbolic link.
    fn symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        target: &CStr,
    ) -> Result<Entry>;

    /// Makes a file of any type but a directory. `mode` has the type, and the umask has been applied.
    fn mknod(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        mode: u32,
        rdev: u32,
    ) -> Result<Entry>;

    /// Makes a directory; the umask has been applied.
    fn mkdir(&self, caller: &Caller, parent: NodeId, name: Name<'_>, mode: u32) -> Result<Entry>;

    /// Removes a name that is no directory.
    fn unlink(&self, parent: NodeId, name: Name<'_>) -> Result<()>;

    /// Removes an empty directory.
    fn rmdir(&self, parent: NodeId, name: Name<'_>) -> Result<()>;

    /// Gives a file another name.
    fn rename(
        &self,
        caller: &Caller,
        from: (NodeId, Name<'_>),
        to: (NodeId, Name<'_>),
        flags: RenameFlags,
    ) -> Result<()>;

    /// Gives a file one more name.
    fn link(&self, node: NodeId, parent: NodeId, name: Name<'_>) -> Result<Entry>;

    /// Opens a file, with flags of open(2) and of [`abi::open`].
    fn open(&self, caller: &Caller, node: NodeId, flags: u32, open_flags: u32) -> Result<Opened>;

    /// Makes a file and opens it; opens one that is there unless `O_EXCL` is set.
    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        how: &Creation,
    ) -> Result<(Entry, Opened)>;

    /// Makes a file without a name and opens it.
    fn tmpfile(&self, caller: &Caller, parent: NodeId, how: &Creation) -> Result<(Entry, Opened)>;

    /// Reads from an open file into all the room that there is.
    fn read(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        out: &mut dyn DataOut,
    ) -> Result<usize>;

    /// Writes to an open file, which loses its set-user-ID and set-group-ID bits if so asked.
    fn write(
        &self,
        node: NodeId,
        handle: Handle,
        to: WriteAt,
        data: &dyn DataIn,
        kill_suidgid: bool,
    ) -> Result<usize>;

    /// A file descriptor of the guest was closed.
    fn flush(&self, node: NodeId, handle: Handle) -> Result<()>;

    /// Writes a file back; only what is needed to read it again if `data_only`.
    fn fsync(&self, node: NodeId, handle: Handle, data_only: bool) -> Result<()>;

    /// Closes a file.
    fn release(&self, node: NodeId, handle: Handle) -> Result<()>;

    /// Opens a directory. Where `NO_OPENDIR_SUPPORT` was agreed on, `ENOSYS` says that this is not needed for
    /// any: READDIR and FSYNCDIR come with handle 0 then, and the kernel keeps what it was told for good.
    fn opendir(&self, node: NodeId) -> Result<Opened>;

    /// Puts entries into the sink, from the one after `offset` on, until there are no more or no room. An
    /// error after the first of them is not heard of.
    fn readdir(&self, node: NodeId, handle: Handle, offset: u64, sink: &mut DirSink) -> Result<()>;

    /// Writes a directory back.
    fn fsyncdir(&self, node: NodeId, handle: Handle, data_only: bool) -> Result<()>;

    /// Closes a directory.
    fn releasedir(&self, node: NodeId, handle: Handle) -> Result<()>;

    /// Numbers of the filesystem.
    fn statfs(&self, node: NodeId) -> Result<abi::Kstatfs>;

    /// Writes everything back.
    fn syncfs(&self, node: NodeId) -> Result<()>;

    /// Whether the caller may do these (`R_OK`, `W_OK`, `X_OK`, or 0).
    fn access(&self, caller: &Caller, node: NodeId, mask: u32) -> Result<()>;

    /// An extended attribute; its size alone if `size` is 0, `ERANGE` if it is longer than that.
    fn getxattr(&self, node: NodeId, name: &CStr, size: u32) -> Result<XattrReply>;

    /// The names of the extended attributes, each with a zero after it; `size` as for `getxattr`.
    fn listxattr(&self, node: NodeId, size: u32) -> Result<XattrReply>;

    /// Sets an extended attribute, with flags of setxattr(2).
    fn setxattr(&self, node: NodeId, name: &CStr, value: &[u8], flags: u32) -> Result<()>;

    /// Removes an extended attribute.
    fn removexattr(&self, node: NodeId, name: &CStr) -> Result<()>;

    /// Reserves or frees a part of a file, with the mode of fallocate(2).
    fn fallocate(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        length: u64,
        mode: u32,
    ) -> Result<()>;

    /// Finds data or a hole: `SEEK_DATA` or `SEEK_HOLE`.
    fn lseek(&self, node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64>;

    /// Copies from one open file to another, at most `length` bytes.
    fn copy_file_range(
        &self,
        from: (NodeId, Handle, u64),
        to: (NodeId, Handle, u64),
        length: u64,
    ) -> Result<usize>;
}
