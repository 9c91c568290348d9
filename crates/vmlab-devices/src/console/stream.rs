//! Bytes between the guest's buffers and a socket, without a copy in between.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use crate::chain::Part;
use crate::transfer::{moved, transfer};

/// Neither call waits, whatever the socket's own flags are, for these are shared with whoever else has it.
const FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// Fills buffers with what there is. Returns how many bytes, and with what it ended.
pub(super) fn receive(stream: &UnixStream, room: &Part<'_>) -> (usize, io::Result<()>) {
    transfer(room.range(0, room.len), 0, |buffers, _| {
        let mut message = message(buffers);
        // SAFETY: `message` is about `buffers` alone, which are parts of the guest's memory: it is mapped for as
        // long as the slices that `transfer` has made them of, and nobody has references to what is in it.
        moved(unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, FLAGS) })
    })
}

/// Sends what is in buffers from a place on. Returns how many bytes, and with what it ended.
pub(super) fn send(stream: &UnixStream, bytes: &Part<'_>, from: usize) -> (usize, io::Result<()>) {
    transfer(bytes.range(from, bytes.len), 0, |buffers, _| {
        let message = message(buffers);
        // SAFETY: as above.
        moved(unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, FLAGS) })
    })
}

fn message(buffers: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: a struct of integers and pointers, for which zeroes are values.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = buffers.as_ptr().cast_mut();
    message.msg_iovlen = buffers.len();
    message
}
