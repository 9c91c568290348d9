//! A filesystem once more as it is at one moment, for a guest that goes on from there: its kernel then names the
//! same nodes and handles.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags, openat};

use super::handles::Open;
use super::inode::Pins;
use super::listing::{Followed, Stream, Unopened};
use super::resolve::Cache;
use super::{Passthrough, PassthroughConfig};
use crate::filesystem::Result;
use crate::sandbox::Sandbox;

impl Passthrough {
    /// The same filesystem for another guest, which knows of it what this one's knows. Files stay open in both;
    /// what one writes to them, or the host has changed since, the other sees. To be called while no request is
    /// served. `durable` is as in [`PassthroughConfig`].
    ///
    /// # Errors
    /// There are no more descriptors.
    pub fn duplicate(&self, durable: Arc<AtomicBool>) -> io::Result<Self> {
        let config = PassthroughConfig { durable, ..self.config.clone() };
        let sandbox = config.sandbox.then(|| Sandbox::new(&self.root, config.read_only));
        let pins = Pins::default();
        let open = self.handles.all();
        let (inodes, copies) =
            self.inodes.duplicate(&self.root, &pins, open.iter().map(|(_, open)| &open.inode));
        let handles = open.iter().filter_map(|(handle, open)| {
            let inode = copies.get(&Arc::as_ptr(&open.inode))?;
            let (inode, fd) = (Arc::clone(inode), open.shared_fd());
            let again = match open.is_directory() {
                // One that cannot be opened again fails from now on.
                true => Open::directory(inode, fd, self.again(open).ok()?),
                false => Open::file_of(inode, fd, open.writable()),
            };
            Some((*handle, again))
        });
        Ok(Self {
            root: Arc::clone(&self.root),
            proc: self.proc.try_clone()?,
            privileged: self.privileged,
            group: self.group,
            handles: self.handles.with(handles),
            inodes,
            cache: Cache::default(),
            pins,
            unopened: Unopened::default(),
            followed: Followed::default(),
            flags: AtomicU64::new(self.flags.load(Ordering::Relaxed)),
            sandbox: sandbox.transpose()?,
            config,
        })
    }

    /// The entries of an open directory, from the beginning: whoever goes on with them says where.
    fn again(&self, open: &Open) -> Result<Stream> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = open.shared_fd();
        Stream::new(self.without_atime(|more| openat(&fd, c".", flags | more, Mode::empty()))?)
    }
}
