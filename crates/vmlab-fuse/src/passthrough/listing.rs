//! Reading directories.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{Dir, DirEntry, FileType, Mode, OFlags, Statx, openat};
use rustix::io::Errno;

use super::handles::Open;
use super::inode::Inode;
use super::resolve::stat_of;
use super::{CachePolicy, Passthrough};
use crate::abi::{self, init};
use crate::directory::DirSink;
use crate::filesystem::{Entry, Opened, Result};
use crate::types::{Handle, Name, NodeId};

/// What a request has where nothing was opened for it.
const NO_HANDLE: Handle = Handle(0);

/// The entries of an open directory, as the kernel gives them.
#[derive(Debug)]
pub(super) struct Stream {
    dir: Dir,
    /// The offset of what comes next.
    at: Option<u64>,
    /// What was read and had no room.
    pending: Option<DirEntry>,
}

impl Stream {
    /// The entries of a directory that was opened to be read.
    pub(super) fn new(directory: OwnedFd) -> Result<Self> {
        Ok(Self { dir: Dir::new(directory)?, at: Some(0), pending: None })
    }

    fn seek(&mut self, offset: u64) -> Result<()> {
        if self.at != Some(offset) {
            self.at = None;
            self.pending = None;
            self.dir.seek(offset.cast_signed())?;
            self.at = Some(offset);
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Option<DirEntry>> {
        if let Some(pending) = self.pending.take() {
            return Ok(Some(pending));
        }
        let next = self.dir.read().transpose();
        if next.is_err() {
            // The next request has to seek.
            self.at = None;
        }
        next
    }
}

/// A directory that is being listed: its inode, a descriptor of it, and its entries.
#[derive(Debug)]
struct Listing {
    inode: Arc<Inode>,
    fd: Arc<OwnedFd>,
    stream: Stream,
}

/// How many directories are kept open that the guest lists without having opened them. One more that is
/// listed at the same time costs the first to be opened again, and nothing else.
const MAX_UNOPENED: usize = 16;

/// Directories that the guest lists without having opened them, the one that was listed last at the end.
#[derive(Debug, Default)]
pub(super) struct Unopened(Mutex<VecDeque<Listing>>);

impl Unopened {
    fn list(&self) -> MutexGuard<'_, VecDeque<Listing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one that has come to this place.
    fn take(&self, node: NodeId, offset: u64) -> Option<Listing> {
        let mut list = self.list();
        let here = |it: &Listing| it.inode.id == node && it.stream.at == Some(offset);
        let index = list.iter().position(here)?;
        list.remove(index)
    }

    fn keep(&self, listing: Listing) {
        let mut list = self.list();
        list.push_back(listing);
        let oldest = if list.len() > MAX_UNOPENED { list.pop_front() } else { None };
        drop(list);
        // Closing can take time, the list is free again.
        drop(oldest);
    }

    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.list());
        drop(all);
    }
}

/// How many directories are listed with the attributes of their files after one whose files were looked up.
pub(super) const AHEAD: u32 = 16;

/// Whether the guest looks at the files that it has listed, as far as it has shown.
///
/// The kernel asks for attributes at the beginning of each list, before it can know whether anybody wants
/// them. To look at each file costs the host, and to remember it the guest, so files have none until one is
/// looked up in a directory that was listed so.
#[derive(Debug, Default)]
pub(super) struct Followed(AtomicU32);

impl Followed {
    /// Whether a list that begins now is to have the attributes of files.
    fn next(&self) -> bool {
        let less = |ahead: u32| ahead.checked_sub(1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    /// A name was looked up.
    pub(super) fn looked_up(&self, parent: &Inode, entry: &Entry) {
        let directory = FileType::from_raw_mode(entry.attributes.attr.mode) == FileType::Directory;
        if !directory && parent.bare.load(Ordering::Relaxed) {
            parent.bare.store(false, Ordering::Relaxed);
            self.expect(AHEAD);
        }
    }

    /// So many lists are to have them.
    pub(super) fn expect(&self, ahead: u32) {
        self.0.store(ahead, Ordering::Relaxed);
    }
}

impl Passthrough {
    /// Whether the guest's kernel is told not to open directories, which costs it two requests each. What
    /// it then keeps of their entries it never asks for again, so nothing may change.
    fn unopened(&self) -> bool {
        self.config.cache == CachePolicy::Fixed && self.negotiated(init::NO_OPENDIR_SUPPORT)
    }

    fn listing(&self, node: NodeId) -> Result<Listing> {
        let (inode, fd) = self.parent(node)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |more| openat(&fd, c".", flags | more, Mode::empty());
        let entries = self.without_atime(open)?;
        Ok(Listing { inode, fd, stream: Stream::new(entries)? })
    }

    pub(super) fn open_directory(&self, node: NodeId) -> Result<Opened> {
        if self.unopened() {
            return Err(Errno::NOSYS);
        }
        self.handles.room()?;
        let Listing { inode, fd, stream } = self.listing(node)?;
        let keep = match self.config.cache {
            CachePolicy::Fixed => true,
            CachePolicy::Auto => settled(&stat_of(&fd)?),
            CachePolicy::Coherent => false,
        };
        let flags = if keep { abi::fopen::KEEP_CACHE | abi::fopen::CACHE_DIR } else { 0 };
        let handle = self.handles.add(Open::directory(inode, fd, stream))?;
        Ok(Opened { handle, flags })
    }

    pub(super) fn list(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        sink: &mut DirSink,
    ) -> Result<()> {
        if handle == NO_HANDLE && self.unopened() {
            let known = self.unopened.take(node, offset);
            let mut listing = known.map_or_else(|| self.listing(node), Ok)?;
            let Listing { inode, fd, stream } = &mut listing;
            // The guest's kernel asks again after the last entry, and not after that.
            if self.fill(inode, fd, stream, offset, sink)? {
                self.unopened.keep(listing);
            }
            return Ok(());
        }
        let open = self.handles.directory(node, handle)?;
        let fd = open.shared_fd();
        let mut stream = open.entries()?;
        self.fill(&open.inode, &fd, &mut stream, offset, sink).map(drop)
    }

    /// Puts entries into the sink. Returns whether there were any.
    fn fill(
        &self,
        inode: &Arc<Inode>,
        fd: &OwnedFd,
        stream: &mut Stream,
        offset: u64,
        sink: &mut DirSink,
    ) -> Result<bool> {
        stream.seek(offset)?;
        // Behind its beginning, the kernel asks for attributes only where they were needed.
        let files = offset != 0 || !sink.plus() || self.followed.next();
        if sink.plus() && offset == 0 {
            inode.bare.store(!files, Ordering::Relaxed);
        }
        let mut added = false;
        loop {
            let entry = match stream.next() {
                Ok(Some(entry)) => entry,
                Ok(None) => return Ok(added),
                // What was read before comes first.
                Err(_) if added => return Ok(added),
                Err(error) => return Err(error),
            };
            let name = entry.file_name();
            if !sink.has_room(name.count_bytes()) {
                stream.pending = Some(entry);
                // No entries would mean that there are no more.
                return if added { Ok(added) } else { Err(Errno::INVAL) };
            }
            let leads_to = match Name::new(name) {
                // An entry that has gone since or cannot be looked at is listed all the same.
                Ok(name) if sink.plus() && (files || may_be_directory(&entry)) => {
                    self.find(inode, fd, name).ok()
                }
                _ => None,
            };
            let next = entry.offset().cast_unsigned();
            // What is above the root is none of the guest's business.
            let above = inode.id == NodeId::ROOT && name.to_bytes() == b"..";
            sink.add(
                if above { inode.key.ino } else { entry.ino() },
                next,
                kind_of(entry.file_type()),
                name.to_bytes(),
                leads_to.as_ref(),
            );
            stream.at = Some(next);
            added = true;
        }
    }

    pub(super) fn sync_directory(
        &self,
        node: NodeId,
        handle: Handle,
        data_only: bool,
    ) -> Result<()> {
        if handle == NO_HANDLE && self.unopened() {
            return super::io_ops::sync(self.listing(node)?.stream.dir.fd()?, data_only);
        }
        let open = self.handles.directory(node, handle)?;
        let stream = open.entries()?;
        super::io_ops::sync(stream.dir.fd()?, data_only)
    }
}

/// How long ago a directory must have changed for its next change to have another time: longer than the
/// tick of any filesystem's clock.
const SETTLED: Duration = Duration::from_secs(2);

/// Whether the next change of a directory can be told by its time of modification. The kernel then keeps
/// the list for as long as that stays the same.
fn settled(stat: &Statx) -> bool {
    let changed = u64::try_from(stat.stx_mtime.tv_sec).map(Duration::from_secs);
    let age = changed.ok().and_then(|changed| (UNIX_EPOCH + changed).elapsed().ok());
    age.is_some_and(|age| age > SETTLED)
}

fn may_be_directory(entry: &DirEntry) -> bool {
    matches!(entry.file_type(), FileType::Directory | FileType::Unknown)
}

/// The type of an entry: the file type's bits of a mode, shifted.
fn kind_of(kind: FileType) -> u8 {
    match kind {
        FileType::Unknown => 0,
        known => (known.as_raw_mode() >> 12) as u8,
    }
}
