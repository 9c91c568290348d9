//! What restricts the threads that do what guests ask, in words.
//!
//! A guest is taken for hostile: whatever it writes may be made to lead a thread astray that looks at it. Those threads
//! give up most of the process's rights, unless that was not wanted (`--no-sandbox`):
//!
//! | thread | is left with |
//! |---|---|
//! | of a file server (`virtio26-…`) | the files of its share, and the calls for them |
//! | of a disk, a network, a console, … (`virtioN-…`) | no file, and the calls of its kind: [`vmlab_devices::sandbox`] |
//! | of a processor (`vcpuN`, in the native monitor) | no file, its processor, the sockets of serial lines |
//!
//! They are the same threads under both hypervisors, but that QEMU runs its own processors, and devices that are not
//! vmlab's, in its process. These are not restricted:
//!
//! - `devices` (native monitor): starts and ends the threads above, which would inherit its restrictions. Of the guest
//!   it sees that the status of a device was written to, and which bits of it. Where queues are is checked by the same
//!   code as everywhere, before any thread looks at them.
//! - `vhost-userN` (QEMU): the same, as asked by QEMU. It maps the guest's memory and does not read from it but the
//!   index of used rings.
//! - `serial` (native monitor): bytes of the host for the guest, and those of the guest that the host had no room for.
//!   It shares the registers of the line with the thread of the processor, and takes nothing else from the guest.
//! - `end` (native monitor): waits for the threads above when a VM has ended.
//! - The pump of the console, what speaks to the agent, and the switch of a network of VMs: they read what a guest has
//!   sent, as bytes in buffers of their own. They write logs and files that the user has asked for.
//! - The supervisor: waits for the end, and sees nothing of a guest.

use vmlab_devices::fs::{Landlock, Restrictions};

use crate::error::chain;

/// Why a kernel does without Landlock, and what to do about it.
pub(crate) fn without_landlock(landlock: Landlock) -> Option<(String, &'static str)> {
    match landlock {
        Landlock::Version(_) if landlock.bears_writing() => None,
        Landlock::Version(version) => Some((
            format!("no Landlock for what can be written (version {version}, 2 is needed)"),
            "Linux 5.19 and later restrict writable shares as well",
        )),
        Landlock::Disabled => Some((
            "no Landlock: it was not chosen when the host booted".to_owned(),
            "add landlock to the list of the host's kernel argument lsm=",
        )),
        Landlock::Missing => Some((
            "no Landlock: the host's kernel does not have it".to_owned(),
            "Linux 5.19 and later restrict file servers to their shares, if built with \
             CONFIG_SECURITY_LANDLOCK",
        )),
    }
}

/// What there is, or why it cannot be used.
pub(crate) fn of_host() -> Result<Restrictions, String> {
    Restrictions::of_host().map_err(|error| chain(&error))
}

/// For a person who runs something.
pub(crate) fn describe(wanted: bool) -> String {
    if !wanted {
        return "the file servers are not restricted".to_owned();
    }
    match of_host() {
        Ok(Restrictions { landlock, seccomp }) => {
            let landlock = match (without_landlock(landlock), landlock) {
                (Some((why, _)), _) => why,
                (None, Landlock::Version(version)) => format!("Landlock (ABI {version})"),
                (None, _) => String::new(),
            };
            let seccomp = if seccomp { "seccomp" } else { "no seccomp" };
            format!("the file servers are restricted by {landlock}, {seccomp}")
        }
        Err(why) => format!("the file servers cannot be restricted: {why}"),
    }
}
