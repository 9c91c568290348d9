//! The end of the guest: processes, data on their way, power.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::system::{RebootCommand, reboot};

use crate::channel::Outbox;
use crate::kmsg;
use crate::sys::{self, Reap};

/// How long processes may take to end after SIGTERM. Tests have said all that they have to say by
/// then; this is for databases and the like that want to leave clean files.
const TERM_GRACE: Duration = Duration::from_millis(200);

/// How long killed processes may take to be gone. One that waits for a dead device never is.
const KILL_GRACE: Duration = Duration::from_millis(500);

/// How long the host may take to read the agent's last words.
const FLUSH_GRACE: Duration = Duration::from_secs(1);

/// Waits until a descriptor is ready or the time is over. Returns false in the latter case.
pub(crate) fn wait(fd: &OwnedFd, flags: PollFlags, until: Option<Instant>) -> bool {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    let timeout = left
        .map(|left| Timespec { tv_sec: left.as_secs() as _, tv_nsec: left.subsec_nanos().into() });
    let mut fds = [PollFd::new(fd, flags)];
    matches!(poll(&mut fds, timeout.as_ref()), Ok(1..) | Err(rustix::io::Errno::INTR))
}

/// Waits until a descriptor is readable or the kernel's clock has come to `until_ns`. Returns false
/// in the latter case.
pub(crate) fn wait_until(fd: &OwnedFd, until_ns: u64) -> bool {
    let left = Duration::from_nanos(until_ns.saturating_sub(sys::monotonic_ns()));
    wait(fd, PollFlags::IN, Some(Instant::now() + left))
}

/// Reaps until no child is left (true) or the time is over (false).
fn reap_all(signals: &OwnedFd, grace: Duration) -> bool {
    let until = Instant::now() + grace;
    loop {
        sys::drain_signals(signals);
        loop {
            match sys::reap() {
                Reap::Child(_) => {}
                Reap::Running => break,
                Reap::None => return true,
            }
        }
        if !wait(signals, PollFlags::IN, Some(until)) {
            return false;
        }
    }
}

/// Ends all other processes of the guest, first politely.
pub(crate) fn end_all(signals: &OwnedFd) {
    if reap_all(signals, Duration::ZERO) {
        return;
    }
    for (signal, grace) in [(libc::SIGTERM, TERM_GRACE), (libc::SIGKILL, KILL_GRACE)] {
        // Fails only when there is nobody left, which reaping finds out.
        let _ = sys::kill(-1, signal);
        let _ = sys::kill(-1, libc::SIGCONT);
        if reap_all(signals, grace) {
            return;
        }
    }
    kmsg::error("some processes could not be ended");
}

/// Writes what is left for the host, as far as it takes it.
pub(crate) fn flush(outbox: &mut Outbox, fd: &OwnedFd) {
    let until = Instant::now() + FLUSH_GRACE;
    while matches!(outbox.flush(fd), Ok(false)) && wait(fd, PollFlags::OUT, Some(until)) {}
}

/// Powers the machine off. Returns only when the kernel refuses.
pub(crate) fn off() {
    if let Err(e) = reboot(RebootCommand::PowerOff) {
        kmsg::error(&format!("the kernel does not power off: {e}"));
    }
}
