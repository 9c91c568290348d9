//! A host directory as a filesystem, from which no request escapes.
//!
//! - An inode is known by what it is ([`inode::Key`]). It costs no descriptor as long as it only was looked
//!   up: its directory and name are remembered, and whatever is found there again is compared with it
//!   ([`resolve`]). Only directories that are used keep a descriptor, within a budget.
//! - Every name is followed alone, beneath a descriptor of its directory, and a symbolic link is never
//!   followed. A file is opened only after it was seen to be a regular file or a directory.
//! - Whatever the guest can make grow has a limit.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags, Statx, fstatfs, open, openat2};
use rustix::io::Errno;
use rustix::process::{Resource, getegid, geteuid, getrlimit};

use crate::abi::{self, init};
use crate::filesystem::{Attributes, Entry, Result};
use crate::sandbox::Sandbox;
use crate::types::{Name, NodeId};

mod attributes;
mod creation;
mod duplicate;
mod handles;
mod inode;
mod io_ops;
mod listing;
mod names;
mod operations;
mod resolve;
mod xattrs;

#[cfg(test)]
mod tests;

use handles::Handles;
use inode::{Inode, Inodes, Key, Pins};
use listing::{Followed, Unopened};
use resolve::{BENEATH, Cache, open_path, stat_at, stat_of};

/// How many files and directories one guest may have open, unless it is configured. Each costs up to two
/// descriptors, and a directory a buffer of 9 KiB.
pub const MAX_HANDLES: usize = 4096;

/// How many inodes one guest may know, unless it is configured. Each costs about 400 bytes here and more
/// than twice that in the guest's kernel, so that a guest with less than 2 GiB cannot remember so many.
pub const MAX_INODES: usize = 1 << 21;

/// The least and the most descriptors for directories, where the process's limit decides.
const DESCRIPTORS: (usize, usize) = (16, 4096);

/// How long something holds that does not change.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// What the guest's kernel may remember.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CachePolicy {
    /// Everything for a day: the host does not change anything.
    Fixed,
    /// Names and attributes for a second, and data until the attributes say that it has changed.
    #[default]
    Auto,
    /// Nothing that the host could change: what one side does the other sees at once.
    Coherent,
}

impl CachePolicy {
    fn valid(self) -> Duration {
        match self {
            Self::Fixed => DAY,
            Self::Auto => Duration::from_secs(1),
            Self::Coherent => Duration::ZERO,
        }
    }
}

/// How a directory is passed through.
#[derive(Debug, Clone)]
pub struct PassthroughConfig {
    /// Whether every change is refused.
    pub read_only: bool,
    /// What the guest's kernel may remember.
    pub cache: CachePolicy,
    /// Whether the guest's kernel keeps what was written until it writes it back. It is the one then that knows
    /// sizes and times, so nobody else may change the files as long as it does.
    pub writeback: bool,
    /// Whether the guest sees where another filesystem is mounted below the directory, as mounts of its
    /// own. An overlay refuses to look into those (`EREMOTE`), so what lies under one must not have them.
    pub submounts: bool,
    /// Whether the guest's kernel sees ACLs, checks them and can set them. It applies the umask as well where
    /// a directory has a default ACL.
    pub posix_acl: bool,
    /// How many files and directories may be open. More are `EMFILE`.
    pub max_handles: usize,
    /// How many directories keep a descriptor because they are used, and how many inodes because they have
    /// lost their name, each.
    pub max_descriptors: usize,
    /// How many inodes may be known. More are `ENFILE`.
    pub max_inodes: usize,
    /// Whether SYNCFS waits until everything has reached the host's disks, with all else that was written to
    /// them. It can be changed at any time.
    pub durable: Arc<AtomicBool>,
    /// Whether a thread that is prepared to serve is restricted to that, as far as the kernel can.
    pub sandbox: bool,
}

impl Default for PassthroughConfig {
    fn default() -> Self {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let quarter = usize::try_from(limit / 4).unwrap_or(usize::MAX);
        Self {
            read_only: false,
            cache: CachePolicy::default(),
            writeback: false,
            submounts: true,
            posix_acl: false,
            max_handles: MAX_HANDLES,
            max_descriptors: quarter.clamp(DESCRIPTORS.0, DESCRIPTORS.1),
            max_inodes: MAX_INODES,
            durable: Arc::new(AtomicBool::new(true)),
            sandbox: true,
        }
    }
}

/// A host directory, as the filesystem of one guest.
///
/// It uses `/proc/self/fd`, so it serves in the process that made it.
#[derive(Debug)]
pub struct Passthrough {
    config: PassthroughConfig,
    root: Arc<OwnedFd>,
    /// `/proc/self/fd`, to open again what is open.
    proc: OwnedFd,
    /// Whether files can be given to others. Else everything belongs to the process's user.
    privileged: bool,
    /// The group that the host gives to new files.
    group: u32,
    inodes: Inodes,
    cache: Cache,
    pins: Pins,
    handles: Handles,
    unopened: Unopened,
    followed: Followed,
    /// What INIT has agreed on.
    flags: AtomicU64,
    /// The restrictions of threads that serve.
    sandbox: Option<Sandbox>,
}

impl Passthrough {
    /// Shares a directory.
    ///
    /// # Errors
    /// When it cannot be opened or is none, there is no `/proc`, the host is older than Linux 5.6, or its
    /// kernel refuses restrictions that it has.
    pub fn new(root: &Path, config: PassthroughConfig) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = Arc::new(open(root, flags, Mode::empty())?);
        let sandbox = config.sandbox.then(|| Sandbox::new(&root, config.read_only)).transpose()?;
        let passthrough = Self {
            root,
            sandbox,
            proc: open(c"/proc/self/fd", flags, Mode::empty())?,
            privileged: geteuid().is_root(),
            group: getegid().as_raw(),
            inodes: Inodes::new(config.max_inodes),
            cache: Cache::default(),
            pins: Pins::default(),
            handles: Handles::new(config.max_handles),
            unopened: Unopened::default(),
            followed: Followed::default(),
            flags: AtomicU64::new(0),
            config,
        };
        passthrough.reset()?;
        // Without it, everything would be refused later.
        match openat2(&passthrough.root, c".", flags, Mode::empty(), BENEATH) {
            Err(Errno::NOSYS) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the host has no openat2(2), which came with Linux 5.6",
            )),
            Err(error) => Err(error.into()),
            Ok(_) => Ok(passthrough),
        }
    }

    /// How many inodes the guest's kernel knows.
    pub fn known_inodes(&self) -> usize {
        self.inodes.len()
    }

    /// Forgets what the guest's kernel knew.
    fn reset(&self) -> Result<()> {
        let stat = stat_of(&self.root)?;
        let births = births(&self.root)?;
        self.handles.clear();
        self.unopened.clear();
        self.cache.clear();
        self.inodes.reset(&stat, births, &self.root);
        Ok(())
    }

    fn wants(&self) -> u64 {
        let writeback = if self.config.writeback { init::WRITEBACK_CACHE } else { 0 };
        let listed_with_attributes = init::DO_READDIRPLUS | init::READDIRPLUS_AUTO;
        let policy = match self.config.cache {
            CachePolicy::Fixed => {
                init::CACHE_SYMLINKS | init::NO_OPENDIR_SUPPORT | listed_with_attributes
            }
            CachePolicy::Auto => init::AUTO_INVAL_DATA | listed_with_attributes,
            // Attributes that must not be remembered are not worth their room in a list.
            CachePolicy::Coherent => init::AUTO_INVAL_DATA,
        };
        let acl = if self.config.posix_acl { init::POSIX_ACL } else { 0 };
        writeback | acl | policy
    }

    fn negotiated(&self, flag: u64) -> bool {
        self.flags.load(Ordering::Relaxed) & flag != 0
    }

    /// Refuses a change of what is read-only. The server has done so before; this is in case it forgets.
    fn writable(&self) -> Result<()> {
        if self.config.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }

    /// Finds an entry, of which the guest's kernel then has a reference.
    fn find(&self, parent: &Arc<Inode>, directory: &OwnedFd, name: Name<'_>) -> Result<Entry> {
        let stat = stat_at(directory, name.as_c_str())?;
        self.refer(parent, directory, name, &stat)
    }

    /// Gives the guest's kernel a reference of an entry that was looked at.
    fn refer(
        &self,
        parent: &Arc<Inode>,
        directory: &OwnedFd,
        name: Name<'_>,
        stat: &Statx,
    ) -> Result<Entry> {
        let births = parent.births_of(stat, || open_path(directory, name.as_c_str()))?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let inode = self.inodes.refer(Key::of(stat, births), kind, births)?;
        self.inodes.set_place(&inode, parent, name);
        Ok(self.entry(&inode, Some(parent), stat))
    }

    fn entry(&self, inode: &Inode, parent: Option<&Inode>, stat: &Statx) -> Entry {
        let mut attributes = self.attributes(stat);
        let elsewhere = |parent: &Inode| {
            (parent.key.mount, parent.key.device) != (inode.key.mount, inode.key.device)
        };
        if self.config.submounts
            && self.negotiated(init::SUBMOUNTS)
            && inode.kind == FileType::Directory
            && parent.is_some_and(elsewhere)
        {
            attributes.attr.flags |= abi::attr::SUBMOUNT;
        }
        Entry { node: Some(inode.id), valid: self.config.cache.valid(), attributes }
    }

    /// What there is not, which the guest's kernel may remember if nothing changes behind it.
    fn nothing(&self) -> Result<Entry> {
        let valid = self.config.cache.valid();
        if valid.is_zero() {
            return Err(Errno::NOENT);
        }
        let attributes = Attributes { attr: abi::Attr::default(), valid: Duration::ZERO };
        Ok(Entry { node: None, valid, attributes })
    }

    fn lookup_name(&self, parent: NodeId, name: Name<'_>) -> Result<Entry> {
        let (parent, directory) = self.parent(parent)?;
        match self.find(&parent, &directory, name) {
            Err(Errno::NOENT) => self.nothing(),
            Ok(entry) => {
                self.followed.looked_up(&parent, &entry);
                Ok(entry)
            }
            Err(error) => Err(error),
        }
    }
}

impl Inode {
    /// Whether birth times identify files where an entry of this directory is.
    fn births_of<F: AsFd>(&self, stat: &Statx, open: impl FnOnce() -> Result<F>) -> Result<bool> {
        let at = Key::of(stat, false);
        let here =
            if at.mount == 0 { at.device == self.key.device } else { at.mount == self.key.mount };
        if here { Ok(self.births) } else { births(open()?) }
    }
}

/// Whether birth times identify files on a filesystem. An overlay tells that of the copy that it has just
/// made when a file is written to for the first time.
fn births(fd: impl AsFd) -> Result<bool> {
    let kind = fstatfs(fd)?.f_type;
    Ok(i128::from(kind) != i128::from(libc::OVERLAYFS_SUPER_MAGIC))
}
