//! A QEMU process and the threads that look after it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use vmlab_artifacts::boot_image::BootImage;
use vmlab_devices::bear_file_limits;

use super::super::{
    ExitReason, HypervisorError, Memory, Origin, SerialConsole, Snapshot, StartOptions, VmHandle,
    VmState,
};
use super::command::{arguments, devices, plug_id};
use super::files::Servers;
use super::memory::{Copy, Ram};
use super::qmp::{Qmp, ShutdownCause};
use super::reset_kernel;
use super::sockets::{Sockets, inherit};
use crate::config::VmConfig;
use crate::lan::LanPort;
use crate::runs::private_file;
use crate::sync::{lock, wait_until};

/// How much of what QEMU says on stderr is kept.
const KEPT_STDERR: usize = 64 * 1024;

/// How long the last output of an ended QEMU may take to be read. It is there already, so this only
/// bounds a fault.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// How long QEMU may take to end after it has closed its connections. One that goes on is of no use to its
/// guest, which waits for files.
const END_OF_QEMU: Duration = Duration::from_secs(3);

/// How long a guest that panicked may say nothing before it is taken to be stuck: it should have reset
/// the machine.
const PANIC_SILENCE: Duration = Duration::from_secs(10);

/// A VM in a QEMU process.
#[derive(Debug)]
pub(super) struct QemuVm {
    shared: Arc<Shared>,
    agent: Mutex<Option<UnixStream>>,
    guest_agent: Mutex<Option<UnixStream>>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
    /// Whether a guest's sync(2) waits for the host's disks.
    durable: Arc<AtomicBool>,
    /// Its RAM, if a snapshot can be taken.
    memory: Vec<Arc<File>>,
    /// How many shares it has.
    shares: u32,
}

/// How long QEMU may take to write the state of its devices. It has some 100 kB and takes 10 ms; this only
/// bounds a fault, also where QEMU itself is emulated on a busy machine.
const STATE_TIME: Duration = Duration::from_secs(30);

/// The same for taking devices out of a VM.
const UNPLUG_TIME: Duration = Duration::from_secs(30);

/// The longest state of devices that is believed.
const MAX_STATE: u64 = 256 * 1024 * 1024;

/// What is still to be done for a VM that goes on from a snapshot while QEMU starts.
struct Restore {
    copies: Vec<Copy>,
    state: Arc<[u8]>,
    socket: UnixStream,
}

impl Restore {
    fn run(mut self) -> io::Result<()> {
        self.copies.iter().try_for_each(Copy::run)?;
        // The VM runs as soon as it has all of it.
        self.socket.write_all(&self.state)
    }
}

#[derive(Debug)]
struct Shared {
    console: SerialConsole,
    qmp: Qmp,
    pidfd: OwnedFd,
    stderr: Arc<Stderr>,
    cpu_log: PathBuf,
    fate: Mutex<Fate>,
    ended: Condvar,
}

/// What QEMU writes, where it is kept, and what is the VM's as long as it runs.
struct Outputs {
    qmp: UnixStream,
    console: UnixStream,
    console_log: File,
    stderr: Option<ChildStderr>,
    stderr_log: File,
    lans: Vec<Arc<LanPort>>,
}

#[derive(Debug, Default)]
struct Fate {
    asked: Option<ExitReason>,
    reason: Option<ExitReason>,
}

fn resource(what: &'static str) -> impl FnOnce(io::Error) -> HypervisorError {
    move |source| HypervisorError::Resource { what, source }
}

impl QemuVm {
    pub(super) fn start(
        program: &Path,
        config: &VmConfig,
        options: StartOptions,
    ) -> Result<Self, HypervisorError> {
        let durable = Arc::new(AtomicBool::new(true));
        let servers = Servers::of(config, options.vms, &durable)?;
        let for_snapshot = matches!(options.origin, Origin::BootForSnapshot);
        let shares_of = match &options.origin {
            Origin::Snapshot(snapshot) => Some((snapshot.shares, snapshot.kept)),
            Origin::Boot | Origin::BootForSnapshot => None,
        };
        let with_state = shares_of.is_some();
        let ram = Ram::of(config, &options.origin).map_err(resource("memory"))?;
        let kernel = config.boot.kernel();
        let (mut ours, mut theirs) = Sockets::pairs(servers.count(), with_state, kernel.is_none())
            .map_err(resource("sockets"))?;
        theirs.lans.clone_from(&options.lans);
        let cpu_log = options.log_dir.join("cpu.log");
        let log_path = options.log_dir.join("console.log");
        let log_file = |path: &Path| {
            private_file(path)
                .map_err(|source| HypervisorError::Log { path: path.to_owned(), source })
        };
        let log = log_file(&log_path)?;
        let stderr_log = log_file(&options.log_dir.join("qemu.log"))?;
        // QEMU would make it with the user's umask.
        drop(log_file(&cpu_log)?);
        let mut command = Command::new(program);
        let entry = || BootImage::open_unversioned(&kernel?.image).ok()?.pvh_entry();
        let reset_kernel = if with_state { entry().map(reset_kernel::file) } else { None };
        let reset_kernel = reset_kernel.transpose().map_err(resource("memory"))?;
        let descriptors = theirs.descriptors(ram.as_ref(), reset_kernel.as_ref());
        command.args(arguments(config, &descriptors, &cpu_log));
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let connections = std::mem::take(&mut ours.servers);
        let servers =
            servers.serve(connections).map_err(resource("servers of shares and disks"))?;

        let input = ours.console.try_clone().map_err(resource("sockets"))?;
        let console = SerialConsole::new(log_path, input);
        let mut console_log = log;
        let qmp = Qmp::new(&ours.qmp).map_err(resource("a monitor socket"))?;
        if with_state || for_snapshot {
            qmp.leave_memory_out().map_err(resource("a monitor socket"))?;
        }
        if let Some(state) = &theirs.state {
            qmp.take_state_from(state.as_raw_fd()).map_err(resource("a monitor socket"))?;
        }
        let (files, copies) = ram.map_or_else(Default::default, |ram| (ram.files, ram.copies));
        let memory = if for_snapshot { files.clone() } else { Vec::new() };
        inherit(&mut command, theirs, files.into_iter().chain(reset_kernel).collect());
        let restore = match (options.origin, ours.state.take()) {
            (Origin::Snapshot(snapshot), Some(socket)) => {
                // The log is whole, though the console began before.
                if let Err(error) = console_log.write_all(&snapshot.console) {
                    console.log_failed(&error);
                }
                Some(Restore { copies, state: snapshot.state, socket })
            }
            _ => None,
        };
        // Without a limit the kernel's own word is waited for, for ever if need be.
        ours.console
            .set_read_timeout(panic_patience(kernel.map_or("", |kernel| &kernel.command_line)))
            .map_err(resource("sockets"))?;
        let (deadline, lans) = (options.deadline, options.lans);

        // A child's parent-death signal comes when the *thread* that made it ends, so the thread that
        // starts QEMU is the one that waits for it.
        let (sender, receiver) = sync_channel(1);
        let thread = std::thread::Builder::new().name("vmlab-qemu".to_owned());
        let supervisor = thread
            .spawn(move || {
                let spawned = command.spawn().and_then(|mut child| {
                    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
                    if pidfd.is_err() {
                        let _ = child.kill();
                        let _ = child.wait();
                    }
                    Ok((child, pidfd?))
                });
                // QEMU's ends of the sockets must close here, or their ends would never be seen.
                drop(command);
                let (mut child, pidfd) = match spawned {
                    Ok(spawned) => spawned,
                    Err(source) => return drop(sender.send(Err(source))),
                };
                let stderr = child.stderr.take();
                let cpu_log = cpu_log.clone();
                let shared = Arc::new(Shared {
                    console,
                    qmp,
                    pidfd,
                    stderr: Arc::default(),
                    cpu_log,
                    fate: Mutex::default(),
                    ended: Condvar::new(),
                });
                if let Some(restore) = restore {
                    let shared = Arc::clone(&shared);
                    std::thread::spawn(move || {
                        if let Err(error) = restore.run() {
                            let said = format!("the snapshot cannot be loaded: {error}");
                            shared.end(ExitReason::MonitorFailed(said));
                        }
                    });
                }
                let outputs = Outputs {
                    qmp: ours.qmp,
                    console: ours.console,
                    console_log,
                    stderr,
                    stderr_log,
                    lans,
                };
                let (serving, served) = sync_channel::<()>(0);
                for server in servers {
                    let (shared, serving) = (Arc::clone(&shared), serving.clone());
                    std::thread::spawn(move || {
                        let ended = || shared.ended_by(Some(Instant::now() + END_OF_QEMU));
                        if let Some(said) = server.wait(ended) {
                            shared.end(ExitReason::FileServerFailed(said));
                        }
                        drop(serving);
                    });
                }
                drop(serving);
                if sender.send(Ok(Arc::clone(&shared))).is_ok() {
                    shared.supervise(child, outputs, &served, deadline);
                }
            })
            .map_err(resource("a thread"))?;
        let run = |source| HypervisorError::Run { program: program.display().to_string(), source };
        let shared = match receiver.recv() {
            Ok(spawned) => spawned.map_err(run)?,
            Err(_) => return Err(run(io::Error::other("its supervisor ended"))),
        };
        let vm = Self {
            shared,
            agent: Mutex::new(Some(ours.agent)),
            guest_agent: Mutex::new(ours.guest_agent),
            supervisor: Mutex::new(Some(supervisor)),
            durable,
            memory,
            shares: u32::try_from(config.shares.len()).unwrap_or(u32::MAX),
        };
        if !vm.shared.qmp.wait_ready()
            && let Some(ExitReason::MonitorFailed(said)) = vm.wait(None)
        {
            // It names the option that it refuses.
            return Err(match said.contains(": -drive ") {
                true => HypervisorError::Disk { said },
                false => HypervisorError::Refused { said },
            });
        }
        match shares_of {
            Some(places) => vm.plug(config, places)?,
            None if for_snapshot => {
                vm.plug_in(config, 0..)?;
                vm.shared.qmp.execute("cont")?;
            }
            None => {}
        }
        Ok(vm)
    }
}

impl QemuVm {
    /// Gives a VM that goes on from a snapshot the devices of its run, as soon as it runs. `taken` places had
    /// shares of the snapshot in them, and the first `kept` can have new ones.
    fn plug(&self, config: &VmConfig, (taken, kept): (u32, u32)) -> Result<(), HypervisorError> {
        let qmp = &self.shared.qmp;
        let plugged = match qmp.wait_resumed() {
            true => self.plug_in(config, (0..kept).chain(taken..)),
            false => Ok(()),
        };
        if plugged.is_err() {
            // The failure to write to it is seen before its end is.
            qmp.wait_closed(Instant::now() + DRAIN_TIME);
        }
        if !qmp.closed() {
            return plugged;
        }
        match self.wait(None) {
            Some(ExitReason::MonitorFailed(said)) => Err(HypervisorError::Refused { said }),
            // Whoever uses the VM finds that it has ended, and why.
            _ => Ok(()),
        }
    }

    fn plug_in(
        &self,
        config: &VmConfig,
        places: impl Iterator<Item = u32>,
    ) -> Result<(), HypervisorError> {
        let devices = devices(config);
        // They are the last ones.
        let disks = devices.len().saturating_sub(config.disks.len());
        for ((index, device), place) in devices.iter().enumerate().zip(places) {
            let plugged = self.shared.qmp.run("device_add", device.to_plug(place), None);
            let disk = index.checked_sub(disks).and_then(|number| config.disks.get(number));
            match (plugged, disk) {
                (Err(HypervisorError::Command { said, .. }), Some(disk)) => {
                    let said = format!("{}: {said}", disk.path.display());
                    return Err(HypervisorError::Disk { said });
                }
                (plugged, _) => plugged?,
            };
        }
        Ok(())
    }

    /// Takes all devices out that were plugged in before the VM ran. The guest is not asked: to the bridge's
    /// controller, which nobody has switched them on by, they are not in use.
    fn unplug(&self) -> Result<(), HypervisorError> {
        let qmp = &self.shared.qmp;
        for place in 0..self.shares {
            qmp.run("device_del", json!({"id": plug_id(place)}), None)?;
        }
        qmp.wait_unplugged(self.shares, Instant::now() + UNPLUG_TIME)
    }
}

impl Shared {
    /// Looks after QEMU until it has ended, and finds out why it did. All servers hold the other end of `served`.
    fn supervise(
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
        let _ = served.recv_timeout(drained.saturating_duration_since(Instant::now()));
        for socket in ends.into_iter().flatten() {
            let _ = socket.shutdown(Shutdown::Both);
        }
        // Others can have its places on networks.
        drop(lans);
        let mut fate = self.lock();
        let reason = self.reason(&fate, status, &said);
        fate.reason = Some(reason);
        drop(fate);
        self.ended.notify_all();
    }

    /// Waits for QEMU's end. False when the deadline came first.
    fn ended_by(&self, deadline: Option<Instant>) -> bool {
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

    fn end(&self, reason: ExitReason) {
        self.lock().asked.get_or_insert(reason);
        // It fails only when QEMU has ended already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    fn reason(&self, fate: &Fate, status: io::Result<ExitStatus>, said: &str) -> ExitReason {
        // Nothing but a guest that ends itself makes QEMU end well without being asked to, also when
        // it was too busy to say so.
        let well = status.as_ref().is_ok_and(ExitStatus::success) && fate.asked.is_none();
        let cause = self.qmp.shutdown_cause().or_else(|| well.then_some(ShutdownCause::GuestReset));
        match (cause, &fate.asked) {
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

    fn lock(&self) -> MutexGuard<'_, Fate> {
        lock(&self.fate)
    }
}

/// How long a guest with this command line may stay silent after a panic. `panic=N` lets it reset the
/// machine after N seconds, at once if negative; with 0 it stays as it is, for a debugger.
fn panic_patience(command_line: &str) -> Option<Duration> {
    let mut values = command_line.split_whitespace().filter_map(|word| word.strip_prefix("panic="));
    match values.next_back().and_then(|value| value.parse::<i64>().ok()) {
        Some(0) => None,
        Some(seconds @ 1..) => Some(PANIC_SILENCE + Duration::from_secs(seconds.unsigned_abs())),
        _ => Some(PANIC_SILENCE),
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
struct Stderr {
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

impl VmHandle for QemuVm {
    fn state(&self) -> VmState {
        match () {
            () if self.shared.lock().reason.is_some() => VmState::Ended,
            () if self.shared.qmp.paused() => VmState::Paused,
            () => VmState::Running,
        }
    }

    fn wait(&self, deadline: Option<Instant>) -> Option<ExitReason> {
        let mut fate = self.shared.lock();
        loop {
            if let Some(reason) = &fate.reason {
                return Some(reason.clone());
            }
            fate = wait_until(&self.shared.ended, fate, deadline)?;
        }
    }

    fn take_agent_channel(&self) -> Option<UnixStream> {
        lock(&self.agent).take()
    }

    fn take_guest_agent_channel(&self) -> Option<UnixStream> {
        lock(&self.guest_agent).take()
    }

    fn serial(&self) -> &SerialConsole {
        &self.shared.console
    }

    fn pause(&self) -> Result<(), HypervisorError> {
        self.shared.qmp.execute("stop")
    }

    fn resume(&self) -> Result<(), HypervisorError> {
        self.shared.qmp.execute("cont")
    }

    fn shutdown(&self) -> Result<(), HypervisorError> {
        self.shared.qmp.execute("system_powerdown")
    }

    fn snapshot(&self) -> Result<Snapshot, HypervisorError> {
        const COMMAND: &str = "migrate";
        let failed = |said: String| HypervisorError::Command { command: COMMAND, said };
        if self.memory.is_empty() {
            return Err(failed("it was not started for a snapshot".to_owned()));
        }
        self.unplug()?;
        let (ours, theirs) = UnixStream::pair().map_err(resource("sockets"))?;
        ours.set_read_timeout(Some(STATE_TIME)).map_err(resource("sockets"))?;
        self.shared.qmp.give("state", theirs.as_fd())?;
        drop(theirs);
        self.shared.qmp.run(COMMAND, json!({"uri": "fd:state"}), None)?;
        let mut state = Vec::new();
        let read = ours.take(MAX_STATE).read_to_end(&mut state);
        read.map_err(|e| failed(format!("its state cannot be read ({e})")))?;
        let result = self.shared.qmp.run("query-migrate", json!({}), None)?;
        match result.get("status").and_then(Value::as_str) {
            // QEMU closes the stream a moment before it says that it is complete.
            Some("completed" | "device" | "active") if !state.is_empty() => Ok(Snapshot {
                state: state.into(),
                memory: self.memory.iter().cloned().map(Memory::Own).collect(),
                console: self.shared.console.kept().into(),
                shares: self.shares,
                kept: 0,
            }),
            status => {
                let why = result.get("error-desc").and_then(Value::as_str);
                let status = status.unwrap_or("unknown");
                Err(failed(why.map_or_else(|| format!("its status is {status}"), str::to_owned)))
            }
        }
    }

    fn wind_down(&self) {
        self.durable.store(false, Ordering::Relaxed);
    }

    fn kill(&self, reason: ExitReason) {
        self.shared.end(reason);
        self.wait(None);
    }
}

impl Drop for QemuVm {
    fn drop(&mut self) {
        self.shared.end(ExitReason::Killed);
        let supervisor = lock(&self.supervisor).take();
        if let Some(supervisor) = supervisor {
            let _ = supervisor.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_on_panics_counts() {
        let patience = |line| panic_patience(line).map(|time| time.as_secs());
        assert_eq!(patience("console=ttyS0 panic=-1 quiet"), Some(10));
        assert_eq!(patience("panic=-1 quiet panic=5"), Some(15));
        assert_eq!(patience("panic=-1 panic=0"), None);
        assert_eq!(patience("oops=panic"), Some(10));
    }
}
