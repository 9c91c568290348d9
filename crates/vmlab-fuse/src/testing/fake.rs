//! A filesystem that has nothing, says what it is told to say and remembers what it was asked.

use std::ffi::CStr;
use std::fmt::Arguments;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{MemfdFlags, RenameFlags, memfd_create};
use rustix::io::Errno;

use crate::abi;
use crate::directory::DirSink;
use crate::filesystem::{
    Attributes, Changes, Creation, DataIn, DataOut, Entry, FileSystem, Opened, Result, WriteAt,
    XattrReply,
};
use crate::types::{Caller, Handle, Name, NodeId};

/// An entry that READDIR lists.
#[derive(Debug, Clone)]
pub struct Listed {
    /// The inode number.
    pub ino: u64,
    /// Its name.
    pub name: Vec<u8>,
    /// What READDIRPLUS says that it leads to.
    pub entry: Option<Entry>,
}

/// What a [`Fake`] answers.
#[derive(Debug, Clone)]
pub struct Answers {
    /// The error that every operation fails with.
    pub error: Option<Errno>,
    /// Whether it refuses changes.
    pub read_only: bool,
    /// What it wants INIT to agree on.
    pub wanted: u64,
    /// What names lead to, and what has attributes.
    pub entry: Entry,
    /// What opening gives.
    pub opened: Opened,
    /// What statx gives.
    pub statx: abi::Statx,
    /// What STATFS gives.
    pub statfs: abi::Kstatfs,
    /// Where symbolic links lead.
    pub target: Vec<u8>,
    /// What extended attributes are.
    pub xattr: XattrReply,
    /// What is in a directory.
    pub listed: Vec<Listed>,
    /// What listing fails with once there are no more entries.
    pub listing_error: Option<Errno>,
    /// The most bytes that one write says it has written.
    pub written: usize,
    /// What LSEEK and COPY_FILE_RANGE give.
    pub number: u64,
}

impl Default for Answers {
    fn default() -> Self {
        let attr = abi::Attr { ino: 30, size: 31, mode: 0o100_644, nlink: 1, ..Default::default() };
        let attributes = Attributes { attr, valid: Duration::from_millis(2500) };
        Self {
            error: None,
            read_only: false,
            wanted: 0,
            entry: Entry { node: Some(NodeId(20)), valid: Duration::from_millis(1250), attributes },
            opened: Opened { handle: Handle(40), flags: abi::fopen::KEEP_CACHE },
            statx: abi::Statx { ino: 30, size: 31, ..Default::default() },
            statfs: abi::Kstatfs { blocks: 50, bsize: 4096, namelen: 255, ..Default::default() },
            target: b"target".to_vec(),
            xattr: XattrReply::Value(b"value".to_vec()),
            listed: Vec::new(),
            listing_error: None,
            written: usize::MAX,
            number: 60,
        }
    }
}

/// The filesystem. What it was asked is one line for each call.
#[derive(Debug)]
pub struct Fake {
    answers: Mutex<Answers>,
    calls: Mutex<Vec<String>>,
    file: File,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn show(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

impl Fake {
    /// One that answers this. What is read of its files is `content`.
    ///
    /// # Errors
    /// Those of making and filling a file in memory.
    pub fn new(answers: Answers, content: &[u8]) -> io::Result<Self> {
        let file = File::from(memfd_create("fake", MemfdFlags::CLOEXEC)?);
        rustix::io::pwrite(&file, content, 0)?;
        Ok(Self { answers: Mutex::new(answers), calls: Mutex::default(), file })
    }

    /// Changes its answers.
    pub fn answer(&self, change: impl FnOnce(&mut Answers)) {
        change(&mut lock(&self.answers));
    }

    /// The calls since they were last taken.
    pub fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.calls))
    }

    /// What its files contain.
    ///
    /// # Errors
    /// Those of reading.
    pub fn content(&self) -> io::Result<Vec<u8>> {
        let mut content = vec![0; usize::try_from(self.file.metadata()?.len()).unwrap_or(0)];
        let length = rustix::io::pread(&self.file, &mut content, 0)?;
        content.truncate(length);
        Ok(content)
    }

    fn call(&self, call: Arguments<'_>) -> Result<Answers> {
        lock(&self.calls).push(call.to_string());
        let answers = lock(&self.answers).clone();
        answers.error.map_or(Ok(answers), Err)
    }
}

/// The caller as the calls have it, where a method is told of one.
fn who(caller: &Caller) -> String {
    format!("{}:{}:{}", caller.uid, caller.gid, caller.pid)
}

impl FileSystem for Fake {
    fn init(&self, flags: u64) {
        lock(&self.calls).push(format!("init {flags:#x}"));
    }

    fn destroy(&self) {
        lock(&self.calls).push("destroy".to_owned());
    }

    fn wanted(&self) -> u64 {
        lock(&self.answers).wanted
    }

    fn read_only(&self) -> bool {
        lock(&self.answers).read_only
    }

    fn lookup(&self, caller: &Caller, parent: NodeId, name: Name<'_>) -> Result<Entry> {
        let name = show(name.as_bytes());
        Ok(self.call(format_args!("lookup {} {} {name}", who(caller), parent.0))?.entry)
    }

    fn forget(&self, node: NodeId, count: u64) {
        lock(&self.calls).push(format!("forget {} {count}", node.0));
    }

    fn getattr(&self, node: NodeId, handle: Option<Handle>) -> Result<Attributes> {
        Ok(self.call(format_args!("getattr {} {handle:?}", node.0))?.entry.attributes)
    }

    fn statx(
        &self,
        node: NodeId,
        handle: Option<Handle>,
        mask: u32,
    ) -> Result<(abi::Statx, Duration)> {
        let answers = self.call(format_args!("statx {} {handle:?} {mask:#x}", node.0))?;
        Ok((answers.statx, answers.entry.attributes.valid))
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<Attributes> {
        let who = who(caller);
        let answers = self.call(format_args!("setattr {who} {} {handle:?} {changes:?}", node.0))?;
        Ok(answers.entry.attributes)
    }

    fn readlink(&self, node: NodeId) -> Result<Vec<u8>> {
        Ok(self.call(format_args!("readlink {}", node.0))?.target)
    }

    fn symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        target: &CStr,
    ) -> Result<Entry> {
        let (who, name, target) = (who(caller), show(name.as_bytes()), show(target.to_bytes()));
        Ok(self.call(format_args!("symlink {who} {} {name} {target}", parent.0))?.entry)
    }

    fn mknod(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        mode: u32,
        rdev: u32,
    ) -> Result<Entry> {
        let (who, name) = (who(caller), show(name.as_bytes()));
        Ok(self.call(format_args!("mknod {who} {} {name} {mode:o} {rdev}", parent.0))?.entry)
    }

    fn mkdir(&self, caller: &Caller, parent: NodeId, name: Name<'_>, mode: u32) -> Result<Entry> {
        let (who, name) = (who(caller), show(name.as_bytes()));
        Ok(self.call(format_args!("mkdir {who} {} {name} {mode:o}", parent.0))?.entry)
    }

    fn unlink(&self, parent: NodeId, name: Name<'_>) -> Result<()> {
        self.call(format_args!("unlink {} {}", parent.0, show(name.as_bytes()))).map(drop)
    }

    fn rmdir(&self, parent: NodeId, name: Name<'_>) -> Result<()> {
        self.call(format_args!("rmdir {} {}", parent.0, show(name.as_bytes()))).map(drop)
    }

    fn rename(
        &self,
        caller: &Caller,
        from: (NodeId, Name<'_>),
        to: (NodeId, Name<'_>),
        flags: RenameFlags,
    ) -> Result<()> {
        let (from, to) = ((from.0.0, show(from.1.as_bytes())), (to.0.0, show(to.1.as_bytes())));
        let (who, bits) = (who(caller), flags.bits());
        let call = format_args!("rename {who} {} {} {} {} {bits}", from.0, from.1, to.0, to.1);
        self.call(call).map(drop)
    }

    fn link(&self, node: NodeId, parent: NodeId, name: Name<'_>) -> Result<Entry> {
        let name = show(name.as_bytes());
        Ok(self.call(format_args!("link {} {} {name}", node.0, parent.0))?.entry)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: u32, open_flags: u32) -> Result<Opened> {
        let call = format_args!("open {} {} {flags:#x} {open_flags:#x}", who(caller), node.0);
        Ok(self.call(call)?.opened)
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: Name<'_>,
        how: &Creation,
    ) -> Result<(Entry, Opened)> {
        let (who, name) = (who(caller), show(name.as_bytes()));
        let answers = self.call(format_args!("create {who} {} {name} {how:?}", parent.0))?;
        Ok((answers.entry, answers.opened))
    }

    fn tmpfile(&self, caller: &Caller, parent: NodeId, how: &Creation) -> Result<(Entry, Opened)> {
        let answers = self.call(format_args!("tmpfile {} {} {how:?}", who(caller), parent.0))?;
        Ok((answers.entry, answers.opened))
    }

    fn read(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        out: &mut dyn DataOut,
    ) -> Result<usize> {
        self.call(format_args!("read {} {} {offset}", node.0, handle.0))?;
        out.read_from(self.file.as_fd(), offset).map_err(|error| errno(&error))
    }

    fn write(
        &self,
        node: NodeId,
        handle: Handle,
        to: WriteAt,
        data: &dyn DataIn,
        kill_suidgid: bool,
    ) -> Result<usize> {
        let place = match to {
            WriteAt::Offset(offset) => offset.to_string(),
            WriteAt::End => "end".to_owned(),
        };
        let call = format_args!("write {} {} {place} {kill_suidgid}", node.0, handle.0);
        let most = self.call(call)?.written;
        // Where it is written says the call; here it is at the beginning, so that no file is large.
        let to = WriteAt::Offset(0);
        let written = data.write_to(self.file.as_fd(), to).map_err(|error| errno(&error))?;
        Ok(written.min(most))
    }

    fn flush(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.call(format_args!("flush {} {}", node.0, handle.0)).map(drop)
    }

    fn fsync(&self, node: NodeId, handle: Handle, data_only: bool) -> Result<()> {
        self.call(format_args!("fsync {} {} {data_only}", node.0, handle.0)).map(drop)
    }

    fn release(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.call(format_args!("release {} {}", node.0, handle.0)).map(drop)
    }

    fn opendir(&self, node: NodeId) -> Result<Opened> {
        Ok(self.call(format_args!("opendir {}", node.0))?.opened)
    }

    fn readdir(&self, node: NodeId, handle: Handle, offset: u64, sink: &mut DirSink) -> Result<()> {
        let plus = sink.plus();
        let answers = self.call(format_args!("readdir {} {} {offset} {plus}", node.0, handle.0))?;
        for (at, listed) in answers.listed.iter().enumerate() {
            let next = at as u64 + 1;
            if next > offset && !sink.add(listed.ino, next, 0, &listed.name, listed.entry.as_ref())
            {
                return Ok(());
            }
        }
        answers.listing_error.map_or(Ok(()), Err)
    }

    fn fsyncdir(&self, node: NodeId, handle: Handle, data_only: bool) -> Result<()> {
        self.call(format_args!("fsyncdir {} {} {data_only}", node.0, handle.0)).map(drop)
    }

    fn releasedir(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.call(format_args!("releasedir {} {}", node.0, handle.0)).map(drop)
    }

    fn statfs(&self, node: NodeId) -> Result<abi::Kstatfs> {
        Ok(self.call(format_args!("statfs {}", node.0))?.statfs)
    }

    fn syncfs(&self, node: NodeId) -> Result<()> {
        self.call(format_args!("syncfs {}", node.0)).map(drop)
    }

    fn access(&self, caller: &Caller, node: NodeId, mask: u32) -> Result<()> {
        self.call(format_args!("access {} {} {mask}", who(caller), node.0)).map(drop)
    }

    fn getxattr(&self, node: NodeId, name: &CStr, size: u32) -> Result<XattrReply> {
        let name = show(name.to_bytes());
        Ok(self.call(format_args!("getxattr {} {name} {size}", node.0))?.xattr)
    }

    fn listxattr(&self, node: NodeId, size: u32) -> Result<XattrReply> {
        Ok(self.call(format_args!("listxattr {} {size}", node.0))?.xattr)
    }

    fn setxattr(&self, node: NodeId, name: &CStr, value: &[u8], flags: u32) -> Result<()> {
        let (name, value) = (show(name.to_bytes()), show(value));
        self.call(format_args!("setxattr {} {name} {value} {flags}", node.0)).map(drop)
    }

    fn removexattr(&self, node: NodeId, name: &CStr) -> Result<()> {
        self.call(format_args!("removexattr {} {}", node.0, show(name.to_bytes()))).map(drop)
    }

    fn fallocate(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        length: u64,
        mode: u32,
    ) -> Result<()> {
        let call = format_args!("fallocate {} {} {offset} {length} {mode}", node.0, handle.0);
        self.call(call).map(drop)
    }

    fn lseek(&self, node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64> {
        Ok(self.call(format_args!("lseek {} {} {offset} {whence}", node.0, handle.0))?.number)
    }

    fn copy_file_range(
        &self,
        from: (NodeId, Handle, u64),
        to: (NodeId, Handle, u64),
        length: u64,
    ) -> Result<usize> {
        let (a, b) = ((from.0.0, from.1.0, from.2), (to.0.0, to.1.0, to.2));
        let answers = self.call(format_args!("copy_file_range {a:?} {b:?} {length}"))?;
        Ok(usize::try_from(answers.number).unwrap_or(usize::MAX))
    }
}
