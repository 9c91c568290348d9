//! Events as KVM's interface wants them.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};

use vmm_sys_util::eventfd::EventFd;

/// An eventfd for KVM: a descriptor of its own.
pub(crate) fn for_kvm(fd: BorrowedFd<'_>) -> io::Result<EventFd> {
    let fd = fd.try_clone_to_owned()?.into_raw_fd();
    // SAFETY: the descriptor was made just now and belongs to nobody else.
    Ok(unsafe { EventFd::from_raw_fd(fd) })
}
