//! What the threads of devices give up: see [`vmlab_fuse::sandbox`]. File servers have rules of their own there.
//!
//! All that a device works with is open before its threads start: files, their locks, logs of disks, sockets. So the
//! threads open no file. What they have open they can use in whatever way their calls allow, and a worker of a disk
//! that was led astray could write to the file of another disk of the process, by its number: neither seccomp nor
//! Landlock tells descriptors apart.

use std::io;

use libc::c_long;
use vmlab_fuse::sandbox::FilterOfAll;
pub use vmlab_fuse::sandbox::{Calls, Filter, Is, KVM_IRQ_LINE, Sandbox};

/// What a device's threads do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// They read and write a file, and what is behind it, and the log of a disk that is recorded.
    Disk,
    /// They pass bytes between the guest's buffers and sockets that are connected.
    Streams,
    /// They pass frames on by one socket.
    Frames,
    /// They ask the host's kernel for random numbers, as any code may.
    Random,
    /// They accept connections and make them, to sockets of the host's programs. Which ones cannot be told here: a
    /// path is nothing that seccomp sees, and nothing that Landlock knows of sockets.
    Connections,
}

const DISK: &[c_long] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    // C libraries take these where there are no flags.
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_pwrite64,
];

const STREAMS: &[c_long] = &[libc::SYS_recvmsg, libc::SYS_sendmsg];

const FRAMES: &[c_long] = &[libc::SYS_recvfrom, libc::SYS_sendmsg, libc::SYS_sendto];

const CONNECTIONS: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
];

impl Work {
    fn calls(self) -> Calls {
        let calls = Calls::of_worker();
        match self {
            Self::Disk => calls.and(DISK),
            Self::Streams => calls.and(STREAMS),
            Self::Frames => calls.and(FRAMES),
            Self::Random => calls,
            Self::Connections => {
                let unix = vec![(0, Is::This(libc::AF_UNIX.cast_unsigned()))];
                calls.and(CONNECTIONS).and_if(libc::SYS_socket, [unix])
            }
        }
    }
}

const KINDS: usize = Work::Connections as usize + 1;

/// The filters of each kind.
static FILTERS: [FilterOfAll; KINDS] = [const { FilterOfAll::new() }; KINDS];

/// Has the calling thread give up all that such work does not need, for good. What the kernel lacks is left out.
///
/// # Errors
/// The kernel has something and refuses it.
pub(crate) fn enter(work: Work) -> io::Result<()> {
    let filter = FILTERS[work as usize].get(|| work.calls())?;
    Sandbox::without_files(filter)?.enter().map(drop)
}

#[cfg(test)]
mod tests;
