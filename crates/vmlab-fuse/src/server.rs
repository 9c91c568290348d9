//! From requests to replies.

use std::ffi::CStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FileType, Mode, RenameFlags};
use rustix::io::Errno;
use zerocopy::FromBytes;

use crate::abi::{self, Opcode, fattr, init};
use crate::directory::DirSink;
use crate::filesystem::{Changes, Creation, DataIn, DataOut, FileSystem, Result, SetTime, WriteAt};
use crate::request::{Arguments, ReplyBytes, RequestBytes};
use crate::types::{Caller, Handle, NodeId};

mod answer;
mod negotiation;

use answer::{Answer, OUT_HEADER, attributes, created, entry, finish, opened, reply_size, xattr};

/// The most bytes of one READ, WRITE or READDIR.
pub const MAX_WRITE: u32 = 1 << 20;

/// The bytes of a guest's page: guests are of x86-64.
const PAGE: u32 = 4096;

/// The same in pages, as INIT tells it. It is all that bounds a READ, so a kernel with larger pages might ask
/// for more than [`MAX_WRITE`], and is refused then.
pub const MAX_PAGES: u16 = (MAX_WRITE / PAGE) as u16;

/// The most bytes of a request's arguments, without the data of a WRITE. The longest that a kernel sends are
/// an extended attribute of 64 KiB with its name, and a BATCH_FORGET.
pub const MAX_ARGUMENTS: usize = 128 * 1024;

/// The longest value of an extended attribute, and the longest list of their names (`XATTR_SIZE_MAX`,
/// `XATTR_LIST_MAX`): a filesystem need not make room for more.
const MAX_XATTR: u32 = 64 * 1024;

/// What RENAME2 knows.
const RENAME_FLAGS: RenameFlags =
    RenameFlags::NOREPLACE.union(RenameFlags::EXCHANGE).union(RenameFlags::WHITEOUT);

/// Arguments up to this length need no allocation.
const SHORT_ARGUMENTS: usize = 512;

const IN_HEADER: usize = size_of::<abi::InHeader>();

/// Serves one filesystem. Any number of threads may call [`serve`](Self::serve) at once.
#[derive(Debug)]
pub struct Server<F> {
    fs: F,
    /// What INIT has agreed on.
    flags: AtomicU64,
    initialised: AtomicBool,
}

struct WriteData<'a> {
    request: &'a dyn RequestBytes,
    /// Where in the data it begins.
    at: usize,
    count: usize,
}

impl DataIn for WriteData<'_> {
    fn write_to(&self, file: BorrowedFd<'_>, to: WriteAt) -> io::Result<usize> {
        let at = IN_HEADER + size_of::<abi::WriteIn>() + self.at;
        self.request.write_to(at, file, to, self.count)
    }
}

struct ReadRoom<'a> {
    reply: &'a mut dyn ReplyBytes,
    count: usize,
}

impl DataOut for ReadRoom<'_> {
    fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.reply.read_from(OUT_HEADER, file, offset, self.count)
    }
}

/// One request on its way.
struct Call<'a> {
    caller: Caller,
    node: NodeId,
    arguments: Arguments<'a>,
    request: &'a dyn RequestBytes,
}

impl<F: FileSystem> Server<F> {
    /// A server that waits for INIT.
    pub fn new(fs: F) -> Self {
        Self { fs, flags: AtomicU64::new(0), initialised: AtomicBool::new(false) }
    }

    /// The filesystem.
    pub fn filesystem(&self) -> &F {
        &self.fs
    }

    /// The same server of another filesystem, for a guest that knows of that what this one's knows.
    pub fn continued(&self, fs: F) -> Self {
        Self {
            fs,
            flags: AtomicU64::new(self.flags.load(Ordering::Relaxed)),
            initialised: AtomicBool::new(self.initialised.load(Ordering::Relaxed)),
        }
    }

    /// Does what a request asks and writes the reply. Returns the reply's length, 0 for none.
    pub fn serve(&self, request: &dyn RequestBytes, reply: &mut dyn ReplyBytes) -> usize {
        let Some((header, opcode)) = header_of(request) else { return 0 };
        if let Some(Opcode::Forget | Opcode::BatchForget) = opcode {
            let _ = self.with_arguments(header, opcode, request, &mut Answer(reply));
            return 0;
        }
        if !has_reply(opcode) || reply.capacity() < OUT_HEADER {
            return 0;
        }
        let result = self.with_arguments(header, opcode, request, &mut Answer(reply));
        finish(header, reply, result)
    }

    /// Replies to a request that the transport cannot hand over whole. Returns the reply's length, 0 for none.
    pub fn refuse(&self, request: &dyn RequestBytes, reply: &mut dyn ReplyBytes) -> usize {
        match header_of(request) {
            Some((header, opcode)) if has_reply(opcode) && reply.capacity() >= OUT_HEADER => {
                finish(header, reply, Err(Errno::INVAL))
            }
            _ => 0,
        }
    }

    /// Whether INIT has agreed on this.
    fn agreed(&self, flag: u64) -> bool {
        self.flags.load(Ordering::Relaxed) & flag != 0
    }

    fn with_arguments(
        &self,
        header: abi::InHeader,
        opcode: Option<Opcode>,
        request: &dyn RequestBytes,
        answer: &mut Answer<'_>,
    ) -> Result<usize> {
        if header.len as usize != request.len() {
            return Err(Errno::INVAL);
        }
        let opcode = opcode.ok_or(Errno::NOSYS)?;
        let unopened = self.agreed(init::NO_OPENDIR_SUPPORT);
        self.with_opcode(header, opcode, request, answer)
            .map_err(|error| lasting(opcode, error, unopened))
    }

    fn with_opcode(
        &self,
        header: abi::InHeader,
        opcode: Opcode,
        request: &dyn RequestBytes,
        answer: &mut Answer<'_>,
    ) -> Result<usize> {
        // The data of a WRITE stays where it is.
        let length = match opcode {
            Opcode::Write => size_of::<abi::WriteIn>(),
            _ => request.len() - IN_HEADER,
        };
        if length > MAX_ARGUMENTS {
            return Err(Errno::INVAL);
        }
        let mut short = [0; SHORT_ARGUMENTS];
        let mut long = Vec::new();
        let buffer = match short.get_mut(..length) {
            Some(short) => short,
            None => {
                long.resize(length, 0);
                long.as_mut_slice()
            }
        };
        let read = request.read(IN_HEADER, buffer);
        let call = Call {
            caller: Caller { uid: header.uid, gid: header.gid, pid: header.pid },
            node: NodeId(header.nodeid),
            arguments: Arguments(&buffer[..read]),
            request,
        };
        self.dispatch(opcode, call, answer)
    }

    fn dispatch(
        &self,
        opcode: Opcode,
        mut call: Call<'_>,
        answer: &mut Answer<'_>,
    ) -> Result<usize> {
        if opcode == Opcode::Init {
            return self.negotiate(&call, answer);
        }
        if !self.initialised.load(Ordering::Acquire) {
            return Err(Errno::IO);
        }
        if self.fs.read_only() && changes_something(opcode) {
            return Err(Errno::ROFS);
        }
        if answer.room() < reply_size(opcode) {
            return Err(Errno::INVAL);
        }
        let (fs, node) = (&self.fs, call.node);
        let caller = call.caller;
        let nothing = |()| 0;
        let args = &mut call.arguments;
        match opcode {
            Opcode::Init => Err(Errno::INVAL),
            Opcode::Destroy => {
                self.initialised.store(false, Ordering::Release);
                fs.destroy();
                Ok(0)
            }
            Opcode::Lookup => entry(answer, fs.lookup(&caller, node, args.name()?)),
            Opcode::Forget => {
                fs.forget(node, args.take::<abi::ForgetIn>()?.nlookup);
                Ok(0)
            }
            Opcode::BatchForget => {
                for _ in 0..args.take::<abi::BatchForgetIn>()?.count {
                    let one: abi::ForgetOne = args.take()?;
                    fs.forget(NodeId(one.nodeid), one.nlookup);
                }
                Ok(0)
            }
            Opcode::GetAttr => {
                let asked: abi::GetattrIn = args.take()?;
                let open = asked.getattr_flags & abi::getattr::FH != 0;
                attributes(answer, fs.getattr(node, open.then_some(Handle(asked.fh))))
            }
            Opcode::Statx => {
                let asked: abi::StatxIn = args.take()?;
                let open = asked.getattr_flags & abi::getattr::FH != 0;
                let handle = open.then_some(Handle(asked.fh));
                let (stat, valid) = fs.statx(node, handle, asked.sx_mask)?;
                answer.put(&abi::StatxOut {
                    attr_valid: valid.as_secs(),
                    attr_valid_nsec: valid.subsec_nanos(),
                    stat,
                    ..Default::default()
                })
            }
            Opcode::SetAttr => {
                let asked: abi::SetattrIn = args.take()?;
                let handle = (asked.valid & fattr::FH != 0).then_some(Handle(asked.fh));
                attributes(answer, fs.setattr(&caller, node, handle, &changes(&asked)?))
            }
            Opcode::ReadLink => {
                let target = fs.readlink(node)?;
                answer.bytes(&target)
            }
            Opcode::Symlink => {
                let name = args.name()?;
                let target = args.string()?;
                entry(answer, fs.symlink(&caller, node, name, target))
            }
            Opcode::MkNod => {
                let asked: abi::MknodIn = args.take()?;
                let name = args.name()?;
                if FileType::from_raw_mode(asked.mode) == FileType::Directory {
                    return Err(Errno::PERM);
                }
                entry(answer, fs.mknod(&caller, node, name, asked.mode, asked.rdev))
            }
            Opcode::MkDir => {
                let asked: abi::MkdirIn = args.take()?;
                entry(answer, fs.mkdir(&caller, node, args.name()?, asked.mode))
            }
            Opcode::Unlink => fs.unlink(node, args.name()?).map(nothing),
            Opcode::RmDir => fs.rmdir(node, args.name()?).map(nothing),
            Opcode::Rename => {
                let asked: abi::RenameIn = args.take()?;
                self.rename(&mut call, asked.newdir, 0)
            }
            Opcode::Rename2 => {
                let asked: abi::Rename2In = args.take()?;
                self.rename(&mut call, asked.newdir, asked.flags)
            }
            Opcode::Link => {
                let asked: abi::LinkIn = args.take()?;
                entry(answer, fs.link(NodeId(asked.oldnodeid), node, args.name()?))
            }
            Opcode::Open => {
                let asked: abi::OpenIn = args.take()?;
                refuse_writing(fs, asked.flags)?;
                opened(answer, fs.open(&caller, node, asked.flags, asked.open_flags))
            }
            Opcode::Create => {
                let asked: abi::CreateIn = args.take()?;
                let name = args.name()?;
                created(answer, fs.create(&caller, node, name, &creation(&asked)))
            }
            Opcode::TmpFile => {
                let asked: abi::CreateIn = args.take()?;
                created(answer, fs.tmpfile(&caller, node, &creation(&asked)))
            }
            Opcode::Read => {
                let asked: abi::ReadIn = args.take()?;
                let count = asked.size as usize;
                // Less than was asked for is the end of the file to the kernel.
                if asked.size > MAX_WRITE || count > answer.room() {
                    return Err(Errno::INVAL);
                }
                let mut room = ReadRoom { reply: answer.0, count };
                let read = fs.read(node, Handle(asked.fh), offset(asked.offset)?, &mut room)?;
                Ok(read.min(count))
            }
            Opcode::Write => {
                let asked: abi::WriteIn = args.take()?;
                let count = call.request.len() - IN_HEADER - size_of::<abi::WriteIn>();
                if asked.size as usize != count || asked.size > MAX_WRITE {
                    return Err(Errno::INVAL);
                }
                let size = write(fs, node, &asked, call.request, count)? as u32;
                answer.put(&abi::WriteOut { size, padding: 0 })
            }
            Opcode::Flush => {
                let asked: abi::FlushIn = args.take()?;
                fs.flush(node, Handle(asked.fh)).map(nothing)
            }
            Opcode::Fsync | Opcode::FsyncDir => {
                let asked: abi::FsyncIn = args.take()?;
                let data_only = asked.fsync_flags & abi::fsync::FDATASYNC != 0;
                let handle = Handle(asked.fh);
                let done = match opcode {
                    Opcode::Fsync => fs.fsync(node, handle, data_only),
                    _ => fs.fsyncdir(node, handle, data_only),
                };
                done.map(nothing)
            }
            Opcode::Release => {
                fs.release(node, Handle(args.take::<abi::ReleaseIn>()?.fh)).map(nothing)
            }
            Opcode::OpenDir => {
                args.take::<abi::OpenIn>()?;
                opened(answer, fs.opendir(node))
            }
            Opcode::ReadDir | Opcode::ReadDirPlus => {
                let asked: abi::ReadIn = args.take()?;
                let size = (asked.size.min(MAX_WRITE) as usize).min(answer.room());
                let mut sink = DirSink::new(size, opcode == Opcode::ReadDirPlus);
                let listed = fs.readdir(node, Handle(asked.fh), asked.offset, &mut sink);
                // Entries of READDIRPLUS are references that the guest has to hear of. It meets the
                // error when it goes on behind them.
                if sink.bytes().is_empty() {
                    listed?;
                }
                answer.bytes(sink.bytes())
            }
            Opcode::ReleaseDir => {
                fs.releasedir(node, Handle(args.take::<abi::ReleaseIn>()?.fh)).map(nothing)
            }
            Opcode::StatFs => {
                let numbers = fs.statfs(node)?;
                answer.put(&numbers)
            }
            Opcode::SyncFs => {
                args.take::<abi::SyncfsIn>()?;
                fs.syncfs(node).map(nothing)
            }
            Opcode::Access => {
                fs.access(&caller, node, args.take::<abi::AccessIn>()?.mask).map(nothing)
            }
            Opcode::GetXattr => {
                let asked: abi::GetxattrIn = args.take()?;
                let size = asked.size.min(MAX_XATTR);
                xattr(answer, size, fs.getxattr(node, args.string()?, size))
            }
            Opcode::ListXattr => {
                let asked: abi::GetxattrIn = args.take()?;
                let size = asked.size.min(MAX_XATTR);
                xattr(answer, size, fs.listxattr(node, size))
            }
            Opcode::SetXattr => self.setxattr(&mut call).map(nothing),
            Opcode::RemoveXattr => fs.removexattr(node, args.string()?).map(nothing),
            Opcode::Fallocate => {
                let asked: abi::FallocateIn = args.take()?;
                let abi::FallocateIn { fh, offset, length, mode, .. } = asked;
                let (at, length) = (self::offset(offset)?, self::offset(length)?);
                fs.fallocate(node, Handle(fh), at, length, mode).map(nothing)
            }
            Opcode::Lseek => {
                let asked: abi::LseekIn = args.take()?;
                let at = offset(asked.offset)?;
                let offset = fs.lseek(node, Handle(asked.fh), at, asked.whence)?;
                answer.put(&abi::LseekOut { offset })
            }
            Opcode::CopyFileRange => {
                let asked: abi::CopyFileRangeIn = args.take()?;
                if asked.flags != 0 {
                    return Err(Errno::INVAL);
                }
                let from = (node, Handle(asked.fh_in), offset(asked.off_in)?);
                let to = (NodeId(asked.nodeid_out), Handle(asked.fh_out), offset(asked.off_out)?);
                // The reply has room for 32 bits.
                let length = asked.len.min(1 << 30);
                let copied = (fs.copy_file_range(from, to, length)? as u64).min(length);
                answer.put(&abi::WriteOut { size: copied as u32, padding: 0 })
            }
            Opcode::Ioctl => Err(Errno::NOTTY),
            // Locks are the guest's own: INIT does not offer them.
            Opcode::GetLk | Opcode::SetLk | Opcode::SetLkW => Err(Errno::NOSYS),
            Opcode::Interrupt
            | Opcode::NotifyReply
            | Opcode::Bmap
            | Opcode::Poll
            | Opcode::SetupMapping
            | Opcode::RemoveMapping => Err(Errno::NOSYS),
        }
    }

    fn rename(&self, call: &mut Call<'_>, new_parent: u64, flags: u32) -> Result<usize> {
        let flags = RenameFlags::from_bits_retain(flags);
        // The type takes any bits for known ones.
        if !RENAME_FLAGS.contains(flags) {
            return Err(Errno::INVAL);
        }
        let from = (call.node, call.arguments.name()?);
        let to = (NodeId(new_parent), call.arguments.name()?);
        self.fs.rename(&call.caller, from, to, flags).map(|()| 0)
    }

    fn setxattr(&self, call: &mut Call<'_>) -> Result<()> {
        let args = &mut call.arguments;
        let mut kill_sgid = false;
        let (size, flags) = if self.agreed(init::SETXATTR_EXT) {
            let asked: abi::SetxattrIn = args.take()?;
            kill_sgid = asked.setxattr_flags & abi::setxattr::ACL_KILL_SGID != 0;
            (asked.size, asked.flags)
        } else {
            let asked = args.bytes(abi::COMPAT_SETXATTR_IN_SIZE)?;
            let [size, flags] = <[u32; 2]>::read_from_bytes(asked).map_err(|_| Errno::INVAL)?;
            (size, flags)
        };
        let name: &CStr = args.string()?;
        let value = args.bytes(size as usize)?;
        self.fs.setxattr(call.node, name, value, flags)?;
        if kill_sgid {
            // An ACL that somebody sets who is not of the group takes the bit, as chmod(2) would.
            let mode = self.fs.getattr(call.node, None)?.attr.mode;
            let left = Mode::from_raw_mode(mode) - Mode::SGID;
            if left != Mode::from_raw_mode(mode) {
                let changes = Changes { mode: Some(left.as_raw_mode()), ..Default::default() };
                self.fs.setattr(&call.caller, call.node, None, &changes)?;
            }
        }
        Ok(())
    }
}

/// Writes the data of a WRITE.
fn write(
    fs: &impl FileSystem,
    node: NodeId,
    asked: &abi::WriteIn,
    request: &dyn RequestBytes,
    count: usize,
) -> Result<usize> {
    let to = write_at(asked)?;
    let kill = asked.write_flags & abi::write::KILL_SUIDGID != 0;
    let part = |done: usize| {
        let data = WriteData { request, at: done, count: count - done };
        let written = fs.write(node, Handle(asked.fh), to.after(done), &data, kill)?;
        Ok(done + written.min(count - done))
    };
    let mut done = part(0)?;
    // Nobody waits for a page that is written back: its kernel takes what is short for whole, so that it has
    // to hear of the error that ended it.
    while asked.write_flags & abi::write::CACHE != 0 && done < count {
        match part(done)? {
            more if more > done => done = more,
            _ => return Err(Errno::IO),
        }
    }
    Ok(done)
}

/// The header of a request. Without one there is nobody to reply to.
fn header_of(request: &dyn RequestBytes) -> Option<(abi::InHeader, Option<Opcode>)> {
    let mut header = [0; IN_HEADER];
    if request.read(0, &mut header) < IN_HEADER {
        return None;
    }
    let header = abi::InHeader::read_from_bytes(&header).ok()?;
    Some((header, Opcode::of(header.opcode)))
}

/// Whether there is a reply, if only of an error.
fn has_reply(opcode: Option<Opcode>) -> bool {
    use Opcode::*;
    // A request is done when it is done; nothing waits for one that could be interrupted.
    !matches!(opcode, Some(Forget | BatchForget | Interrupt | NotifyReply))
}

/// Whether a request changes something on the filesystem by itself. OPEN depends on its flags.
fn changes_something(opcode: Opcode) -> bool {
    matches!(
        opcode,
        Opcode::SetAttr
            | Opcode::Symlink
            | Opcode::MkNod
            | Opcode::MkDir
            | Opcode::Unlink
            | Opcode::RmDir
            | Opcode::Rename
            | Opcode::Rename2
            | Opcode::Link
            | Opcode::Write
            | Opcode::SetXattr
            | Opcode::RemoveXattr
            | Opcode::Create
            | Opcode::TmpFile
            | Opcode::Fallocate
            | Opcode::CopyFileRange
    )
}

/// To the kernel `ENOSYS` says that there is no such operation on this mount at all: it never asks again, and
/// takes FSYNC, ACCESS and FLUSH for done. So only what is meant so is said; that a call is missing on the
/// host, or for one of its filesystems, is another error. OPENDIR may be missing where that was agreed on.
fn lasting(opcode: Opcode, error: Errno, unopened: bool) -> Errno {
    use Opcode::*;
    let meant = matches!(
        opcode,
        Flush
            | GetLk
            | SetLk
            | SetLkW
            | Interrupt
            | NotifyReply
            | Bmap
            | Poll
            | SetupMapping
            | RemoveMapping
    ) || opcode == OpenDir && unopened;
    match error {
        Errno::NOSYS if opcode == Rename2 => Errno::INVAL,
        Errno::NOSYS if !meant => Errno::OPNOTSUPP,
        other => other,
    }
}

/// Refuses to open for writing what cannot be written.
fn refuse_writing(fs: &impl FileSystem, flags: u32) -> Result<()> {
    use rustix::fs::OFlags;
    let flags = OFlags::from_bits_retain(flags);
    let writes = flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC | OFlags::CREATE);
    if fs.read_only() && writes { Err(Errno::ROFS) } else { Ok(()) }
}

fn changes(asked: &abi::SetattrIn) -> Result<Changes> {
    let has = |flag: u32| asked.valid & flag != 0;
    let time = |now: u32, set: u32, seconds: u64, nanos: u32| match () {
        () if has(now) => Ok(Some(SetTime::Now)),
        // More of them would be `UTIME_NOW` or `UTIME_OMIT` to utimensat(2).
        () if has(set) && nanos >= 1_000_000_000 => Err(Errno::INVAL),
        () if has(set) => Ok(Some(SetTime::At(seconds.cast_signed(), nanos))),
        () => Ok(None),
    };
    Ok(Changes {
        mode: has(fattr::MODE).then_some(asked.mode),
        uid: has(fattr::UID).then_some(asked.uid),
        gid: has(fattr::GID).then_some(asked.gid),
        size: has(fattr::SIZE).then_some(asked.size),
        atime: time(fattr::ATIME_NOW, fattr::ATIME, asked.atime, asked.atimensec)?,
        mtime: time(fattr::MTIME_NOW, fattr::MTIME, asked.mtime, asked.mtimensec)?,
        kill_suidgid: has(fattr::KILL_SUIDGID),
    })
}

/// A place in a file, or a length of a part of one, as a signed `off_t` has it. System calls take -1 for more
/// than a place.
fn offset(offset: u64) -> Result<u64> {
    i64::try_from(offset).map(|_| offset).map_err(|_| Errno::INVAL)
}

/// Where a WRITE goes. The flags are those that the file has now: fcntl(2) changes `O_APPEND` without a word to
/// the server. What comes from the guest's page cache has a place whatever they are, for it was mapped.
fn write_at(asked: &abi::WriteIn) -> Result<WriteAt> {
    use rustix::fs::OFlags;
    let place = offset(asked.offset)?;
    let appends = OFlags::from_bits_retain(asked.flags).contains(OFlags::APPEND);
    let cached = asked.write_flags & abi::write::CACHE != 0;
    Ok(if appends && !cached { WriteAt::End } else { WriteAt::Offset(place) })
}

fn creation(asked: &abi::CreateIn) -> Creation {
    Creation { mode: asked.mode, flags: asked.flags, open_flags: asked.open_flags }
}

#[cfg(test)]
mod tests;
