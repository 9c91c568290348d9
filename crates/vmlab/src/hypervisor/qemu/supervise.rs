//! What looks after a QEMU process until its end, and finds out why it ended.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ExitStatus};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process_group, pidfd_send_signal};
use vmlab_devices::bear_file_limits;

use super::super::fate::Fate;
use super::super::{ExitReason, SerialConsole};
use super::files::Server;
use super::qmp::{Qmp, ShutdownCause};
use crate::lan::LanPort;
use crate::sync::{lock, wait_until};

/// How much of what QEMU says on stderr is kept.
const KEPT_STDERR: usize = 64 * 1024;

/// How long the last output of an ended QEMU may take to be read. It is there already, so this only
/// bounds a fault.
pub(super) const DRAIN_TIME: Duration = Duration::from_secs(2);

/// How long QEMU may take to end after it has closed its connections. One that goes on is of no use to its
/// guest, which waits for files.
const END_OF_QEMU: Duration = Duration::from_secs(3);

/// What is known of a QEMU process, to all who have to do with it.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) console: SerialConsole,
    pub(super) qmp: Qmp,
    pub(super) pidfd: OwnedFd,
    pub(super) stderr: Arc<Stderr>,
    pub(super) cpu_log: PathBuf,
    pub(super) fate: Fate,
    /// Servers whose devices are taken out, by their ids.
    pub(super) leaving: Mutex<HashSet<String>>,
    pub(super) left: Condvar,
    /// Every server holds one of it as long as it serves.
    pub(super) serving: Mutex<Option<SyncSender<()>>>,
}

/// What QEMU writes, where it is kept, and what is the VM's as long as it runs.
pub(super) struct Outputs {
    pub(super) qmp: UnixStream,
    pub(super) console: UnixStream,
    pub(super) console_log: File,
    pub(super) stderr: Option<ChildStderr>,
    pub(super) stderr_log: File,
    pub(super) lans: Vec<Arc<LanPort>>,
}

impl Shared {
    /// Looks after QEMU until it has ended, and finds out why it did. All servers hold the other end of `served`.
    pub(super) fn supervise(
        self: &Arc<Self>,
        mut child: Child,
        outputs: Outputs,
        served: &Receiver<()>,
        deadline: Option<Instant>,
    ) {
        let group = Pid::from_child(&child);
        let said = Arc::clone(&self.stderr);
        let Outputs { qmp, console, console_log, stderr, stderr_log, lans } = outputs;
        let ends = [qmp.try_clone(), console.try_clone()];
        // Threads of their own and not of a scope: a process that QEMU started and that outlives it
        // can hold its stderr open for ever.
        let pumps: [Box<dyn FnOnce() + Send>; 3] = [
            Box::new({
                let shared = Arc::clone(self);
                move || shared.qmp.pump(qmp)
            }),
            Box::new({
                let shared = Arc::clone(self);
                move || {
                    let stuck = |message| {
                        if !shared.qmp.paused() {
                            shared.end(ExitReason::GuestPanic(Some(message)));
                        }
                    };
                    shared.console.pump(console, console_log, stuck);
                }
            }),
            Box::new(move || said.pump(stderr, stderr_log)),
        ];
        for pump in pumps {
            std::thread::spawn(move || {
                // What the guest says on its console must not end this process. It is only a log that ends.
                let _ = bear_file_limits();
                pump();
            });
        }
        if !self.ended_by(deadline) {
            self.end(ExitReason::Timeout);
            self.ended_by(None);
        }
        // It is a zombie still, so its group is that of nobody else.
        let _ = kill_process_group(group, Signal::KILL);
        let status = child.wait();
        let drained = Instant::now() + DRAIN_TIME;
        self.qmp.wait_closed(drained);
        self.console.wait_closed(drained);
        let said = self.stderr.wait_closed(drained);
        // The files of disks are free for the next VM then, and what was written to them is there.
        drop(lock(&self.serving).take());
        let _ = served.recv_timeout(drained.saturating_duration_since(Instant::now()));
        for socket in ends.into_iter().flatten() {
            let _ = socket.shutdown(Shutdown::Both);
        }
        // Others can have its places on networks.
        drop(lans);
        self.fate.decide(|asked| self.reason(asked, status, &said));
    }

    /// Has a thread wait for the end of a server, and end the VM if that is not because its device or QEMU is
    /// about to go.
    pub(super) fn watch(self: &Arc<Self>, server: Server) {
        let (shared, serving) = (Arc::clone(self), lock(&self.serving).clone());
        std::thread::spawn(move || {
            let id = server.id().to_owned();
            let leaves = || {
                lock(&shared.leaving).contains(&id)
                    || shared.ended_by(Some(Instant::now() + END_OF_QEMU))
            };
            if let Some(said) = server.wait(leaves) {
                shared.end(ExitReason::DeviceFailed(said));
            }
            drop(serving);
            lock(&shared.leaving).remove(&id);
            shared.left.notify_all();
        });
    }

    /// Waits for the end of a server that leaves. False when the deadline came first.
    pub(super) fn wait_left(&self, id: &str, deadline: Instant) -> bool {
        let mut leaving = lock(&self.leaving);
        while leaving.contains(id) {
            match wait_until(&self.left, leaving, Some(deadline)) {
                Some(woken) => leaving = woken,
                None => return false,
            }
        }
        true
    }

    /// Waits for QEMU's end. False when the deadline came first.
    pub(super) fn ended_by(&self, deadline: Option<Instant>) -> bool {
        loop {
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            let timeout = left.map(|left| Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            });
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return true,
            }
        }
    }

    pub(super) fn end(&self, reason: ExitReason) {
        self.fate.ask(reason);
        // It fails only when QEMU has ended already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    fn reason(
        &self,
        asked: Option<&ExitReason>,
        status: io::Result<ExitStatus>,
        said: &str,
    ) -> ExitReason {
        // Nothing but a guest that ends itself makes QEMU end well without being asked to, also when
        // it was too busy to say so.
        let well = status.as_ref().is_ok_and(ExitStatus::success) && asked.is_none();
        let cause = self.qmp.shutdown_cause().or_else(|| well.then_some(ShutdownCause::GuestReset));
        match (cause, asked) {
            (Some(ShutdownCause::GuestShutdown), _) => ExitReason::Shutdown,
            (Some(ShutdownCause::GuestPanic), _) => {
                ExitReason::GuestPanic(self.console.panic_message())
            }
            (Some(ShutdownCause::GuestReset), _) => match self.console.panic_message() {
                Some(message) => ExitReason::GuestPanic(Some(message)),
                // A kernel on a board without a reset register faults on purpose.
                None if self.console.restart_announced() => ExitReason::Reset,
                None if triple_fault(&self.cpu_log) => ExitReason::TripleFault,
                None => ExitReason::Reset,
            },
            (_, Some(ExitReason::Timeout)) => match self.console.panic_message() {
                // It stayed in its panic: see `panic_patience`.
                Some(message) => ExitReason::GuestPanic(Some(message)),
                None => ExitReason::Timeout,
            },
            (_, Some(asked)) => asked.clone(),
            (Some(ShutdownCause::HostQmpQuit), None) => ExitReason::Killed,
            (_, None) => ExitReason::MonitorFailed(describe(status, said)),
        }
    }
}

fn triple_fault(cpu_log: &Path) -> bool {
    std::fs::read_to_string(cpu_log).is_ok_and(|log| log.contains("Triple fault"))
}

fn describe(status: io::Result<ExitStatus>, said: &str) -> String {
    let how = match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("QEMU ended with code {code}"),
            (None, Some(signal)) => format!("QEMU was killed by signal {signal}"),
            (None, None) => "QEMU ended".to_owned(),
        },
        Err(error) => format!("QEMU cannot be waited for ({error})"),
    };
    match said.trim() {
        "" => format!("{how} and said nothing"),
        said => format!("{how} and said: {said}"),
    }
}

/// What QEMU says on stderr: the beginning of it, and whether it has ended.
#[derive(Debug, Default)]
pub(super) struct Stderr {
    state: Mutex<(Vec<u8>, bool)>,
    closed: Condvar,
}

impl Stderr {
    /// Reads it to its end, into the log and, as far as it is kept, into memory.
    fn pump(&self, stderr: Option<ChildStderr>, mut log: File) {
        let mut buffer = [0; 4096];
        if let Some(mut stderr) = stderr {
            while let Ok(count @ 1..) = stderr.read(&mut buffer) {
                let _ = log.write_all(&buffer[..count]);
                let mut state = lock(&self.state);
                let room = KEPT_STDERR.saturating_sub(state.0.len());
                state.0.extend_from_slice(&buffer[..count.min(room)]);
            }
        }
        lock(&self.state).1 = true;
        self.closed.notify_all();
    }

    /// What was said until the end, or until the deadline.
    fn wait_closed(&self, deadline: Instant) -> String {
        let mut state = lock(&self.state);
        while !state.1 {
            match wait_until(&self.closed, state, Some(deadline)) {
                Some(woken) => state = woken,
                None => {
                    state = lock(&self.state);
                    break;
                }
            }
        }
        String::from_utf8_lossy(&state.0).into_owned()
    }
}
