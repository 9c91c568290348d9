//! Signals that a user sends to vmlab: the first goes to the command, the second ends the VM.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::termios::tcgetwinsize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::{Handle, Signals};
use vmlab::Group;
use vmlab::guest::{ChildControl, TerminalSize};
use vmlab::hypervisor::{ExitReason, VmHandle};
use vmlab::runner::Runner;

use crate::exit::Code;
use crate::terminal;

/// How long a command with a terminal has to end after a signal that ends its session.
const SESSION_GRACE: Duration = Duration::from_secs(2);

/// What signals act on at the moment.
#[derive(Debug, Default)]
struct Target {
    vm: Option<Arc<dyn VmHandle>>,
    command: Option<ChildControl>,
    /// Several VMs, which no signal is passed on to.
    group: Option<Arc<dyn Cancel>>,
    /// The command has a terminal of its own.
    terminal: bool,
    forwarded: bool,
    killed_by: Option<i32>,
}

/// What can be ended as a whole.
pub(crate) trait Cancel: Send + Sync + std::fmt::Debug {
    fn cancel(&self);
}

impl Cancel for Group {
    fn cancel(&self) {
        Group::cancel(self);
    }
}

impl Cancel for Runner {
    fn cancel(&self) {
        Runner::cancel(self);
    }
}

/// A thread that takes the signals of this process, until it is dropped.
#[derive(Debug)]
pub(crate) struct SignalThread {
    target: Arc<Mutex<Target>>,
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl SignalThread {
    pub(crate) fn start() -> Result<Self> {
        let mut wanted = vec![SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH];
        let ignored = ignored_signals();
        wanted.retain(|signal| !ignored(*signal));
        let mut signals = Signals::new(wanted).context("signals cannot be handled")?;
        let target = Arc::new(Mutex::new(Target::default()));
        let handle = signals.handle();
        let shared = Arc::clone(&target);
        let thread = std::thread::Builder::new()
            .name("vmlab-signals".to_owned())
            .spawn(move || {
                for signal in signals.forever() {
                    take(&shared, signal);
                }
            })
            .context("a thread cannot be started")?;
        Ok(Self { target, handle, thread: Some(thread) })
    }

    /// From now on, signals that are not forwarded end this VM. A run can have one VM after the other, and
    /// what was to end the last one ends this one, too.
    pub(crate) fn vm(&self, vm: Arc<dyn VmHandle>) {
        let mut target = self.lock();
        if target.killed_by.is_some() {
            drop(target);
            return vm.kill(ExitReason::Killed);
        }
        *target = Target { vm: Some(vm), ..Target::default() };
    }

    /// From now on, the first signal ends all these VMs, and the second this process.
    pub(crate) fn group(&self, group: Arc<dyn Cancel>) {
        *self.lock() = Target { group: Some(group), ..Target::default() };
    }

    /// From now on, the first signal is for this command.
    pub(crate) fn command(&self, command: ChildControl, terminal: bool) {
        let mut target = self.lock();
        target.command = Some(command);
        target.terminal = terminal;
    }

    /// The command has ended: what comes now ends the VM.
    pub(crate) fn command_ended(&self) {
        self.lock().command = None;
    }

    /// No VM runs any more.
    pub(crate) fn idle(&self) {
        let mut target = self.lock();
        target.vm = None;
        target.command = None;
        target.group = None;
    }

    /// The signal by which the user ended the VM.
    pub(crate) fn killed_by(&self) -> Option<i32> {
        self.lock().killed_by
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Target> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SignalThread {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Which signals this process was started to ignore, as under nohup; they stay ignored. Read from
/// procfs, since asking the system call for it needs unsafe code.
fn ignored_signals() -> impl Fn(i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    move |signal| mask & (1 << (signal - 1)) != 0
}

fn take(shared: &Arc<Mutex<Target>>, signal: i32) {
    let mut target = shared.lock().unwrap_or_else(PoisonError::into_inner);
    if signal == SIGWINCH {
        if let (Some(command), Some(size)) = (&target.command, terminal_size()) {
            command.resize(size);
        }
        return;
    }
    if let Some(command) = &target.command
        && !target.forwarded
    {
        command.signal(signal);
        target.forwarded = true;
        // An interactive shell ignores what ends a session, and has no second one sent to it.
        if target.terminal
            && matches!(signal, SIGTERM | SIGHUP)
            && let Some(vm) = target.vm.clone()
        {
            let shared = Arc::clone(shared);
            std::thread::spawn(move || {
                if vm.wait(Some(Instant::now() + SESSION_GRACE)).is_none() {
                    end(&shared, signal);
                }
            });
        }
        return;
    }
    drop(target);
    end(shared, signal);
}

/// Ends the VM or the VMs, or this process where there are none.
fn end(shared: &Mutex<Target>, signal: i32) {
    let (vm, group) = {
        let mut target = shared.lock().unwrap_or_else(PoisonError::into_inner);
        target.killed_by = Some(signal);
        (target.vm.take(), target.group.take())
    };
    match (vm, group) {
        (_, Some(group)) => group.cancel(),
        (Some(vm), None) => vm.kill(ExitReason::Killed),
        // Nothing is running that would have to be ended in order: children die with this process.
        (None, None) => {
            terminal::restore();
            std::process::exit(Code::of_signal(signal).0.into());
        }
    }
}

/// The size of the terminal on stdin.
pub(crate) fn terminal_size() -> Option<TerminalSize> {
    let size = tcgetwinsize(std::io::stdin()).ok()?;
    Some(TerminalSize { rows: size.ws_row, columns: size.ws_col })
}
