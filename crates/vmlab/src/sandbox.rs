//! What restricts the threads of vmlab's own file servers, in words.

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
