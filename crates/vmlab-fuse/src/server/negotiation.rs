//! INIT.

use std::sync::atomic::Ordering;

use rustix::io::Errno;
use zerocopy::FromBytes;

use super::{Answer, Call, MAX_PAGES, MAX_WRITE, Server};
use crate::abi::{self, init};
use crate::filesystem::{FileSystem, Result};

/// The oldest protocol that is spoken: that of Linux 5.4, the first with virtio-fs.
const OLDEST_MINOR: u32 = 31;

/// How many requests the kernel may have under way in the background. The queues bound them anyway.
const MAX_BACKGROUND: u16 = 1024;

/// What the server does with every filesystem, where the kernel knows it.
const OFFERED: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::SUBMOUNTS
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT
    | init::DIRECT_IO_ALLOW_MMAP;

/// What a filesystem may want besides. Of all else the server would have to know more: of other arguments
/// (SECURITY_CTX, CREATE_SUPP_GROUP), of a umask that was not applied (DONT_MASK), of `..` as a
/// name (EXPORT_SUPPORT), of locks.
const WANTABLE: u64 = init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::EXPLICIT_INVAL_DATA
    | init::WRITEBACK_CACHE
    | init::NO_OPEN_SUPPORT
    | init::NO_OPENDIR_SUPPORT
    | init::CACHE_SYMLINKS
    | init::POSIX_ACL
    | init::NO_EXPORT_SUPPORT;

impl<F: FileSystem> Server<F> {
    pub(super) fn negotiate(&self, call: &Call<'_>, answer: &mut Answer<'_>) -> Result<usize> {
        // Kernels before 5.17 send less of the structure.
        let mut bytes = [0; size_of::<abi::InitIn>()];
        let sent = call.arguments.0;
        if sent.len() < abi::COMPAT_INIT_IN_SIZE {
            return Err(Errno::INVAL);
        }
        let count = sent.len().min(bytes.len());
        bytes[..count].copy_from_slice(&sent[..count]);
        let asked = abi::InitIn::read_from_bytes(&bytes).map_err(|_| Errno::INVAL)?;
        let newest = abi::InitOut {
            major: abi::KERNEL_VERSION,
            minor: abi::KERNEL_MINOR_VERSION,
            ..Default::default()
        };
        if asked.major > abi::KERNEL_VERSION {
            // The kernel asks again with a version that both know.
            return answer.put(&newest);
        }
        if asked.major < abi::KERNEL_VERSION || asked.minor < OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        let mut known = u64::from(asked.flags);
        if known & init::INIT_EXT != 0 {
            known |= u64::from(asked.flags2) << 32;
        }
        let flags = known & (OFFERED | self.fs.wanted() & WANTABLE);
        if answer.room() < size_of::<abi::InitOut>() {
            return Err(Errno::INVAL);
        }
        self.flags.store(flags, Ordering::Relaxed);
        self.fs.init(flags);
        self.initialised.store(true, Ordering::Release);
        answer.put(&abi::InitOut {
            max_readahead: asked.max_readahead,
            flags: flags as u32,
            flags2: (flags >> 32) as u32,
            max_background: MAX_BACKGROUND,
            congestion_threshold: MAX_BACKGROUND / 4 * 3,
            max_write: MAX_WRITE,
            time_gran: 1,
            max_pages: MAX_PAGES,
            ..newest
        })
    }
}
