//! A QEMU process and the threads that look after it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use vmlab_artifacts::boot_image::BootImage;

use super::super::fate::Fate;
use super::super::panic::panic_patience;
use super::super::served::FileServer;
use super::super::{
    DeviceId, ExitReason, HypervisorError, Origin, RunDevices, SerialConsole, Snapshot,
    StartOptions, VmHandle, VmState, resource,
};
use super::command::arguments;
use super::devices::{PLACES, devices};
use super::files::Servers;
use super::memory::{Copy, Ram};
use super::plug::Plugged;
use super::qmp::Qmp;
use super::reset_kernel;
use super::sockets::{Sockets, inherit};
use super::supervise::{DRAIN_TIME, Outputs, Shared};
use crate::config::{DiskDevice, VmConfig};
use crate::runs::private_file;
use crate::sync::lock;

/// A VM in a QEMU process.
#[derive(Debug)]
pub(super) struct QemuVm {
    pub(super) shared: Arc<Shared>,
    agent: Mutex<Option<UnixStream>>,
    guest_agent: Mutex<Option<UnixStream>>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
    /// Whether a guest's sync(2) waits for the host's disks.
    pub(super) durable: Arc<AtomicBool>,
    /// Its RAM, if a snapshot can be taken.
    pub(super) memory: Vec<Arc<File>>,
    /// How many shares it has.
    pub(super) shares: u32,
    pub(super) file_servers: Vec<FileServer>,
    /// What is behind the bridge.
    pub(super) plugged: Mutex<Vec<Plugged>>,
    /// What of it was there when the VM began.
    pub(super) on_bridge: Vec<(u32, DeviceId)>,
    /// Whether it has the devices of a run.
    pub(super) in_run: bool,
    /// Whether disks can be plugged in.
    pluggable: bool,
    /// Whether what serves its disks is restricted.
    pub(super) sandbox: bool,
    /// What its console had shown before it went on from a snapshot.
    pub(super) said_before: Arc<[u8]>,
}

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

impl QemuVm {
    pub(super) fn start(
        program: &Path,
        config: &VmConfig,
        options: StartOptions,
    ) -> Result<Self, HypervisorError> {
        let durable = Arc::new(AtomicBool::new(true));
        let begin = match &options.origin {
            Origin::Boot if !config.pluggable => Begin::Boots,
            Origin::Boot | Origin::BootForSnapshot => Begin::BootsPluggable,
            Origin::Snapshot(Snapshot { run: Some(run), .. }) => Begin::InRun(Arc::clone(run)),
            Origin::Snapshot(Snapshot { shares, kept, .. }) => Begin::BeforeRun(*shares, *kept),
        };
        let in_run = !matches!(options.origin, Origin::BootForSnapshot);
        let run = begin.run();
        let known = run.map(|run| &run.shares[..]);
        let servers = Servers::of(config, options.vms, &durable, known)?;
        let file_servers = servers.file_servers();
        let on_bridge = run.map_or_else(Vec::new, |run| run.not_served(config));
        let with_state = matches!(begin, Begin::InRun(_) | Begin::BeforeRun(..));
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
        let reset_kernel = if with_state {
            entry().map(|entry| reset_kernel::file(entry, &reset_kernel::NO_CODE))
        } else {
            None
        };
        let reset_kernel = reset_kernel.transpose().map_err(resource("memory"))?;
        let descriptors =
            theirs.descriptors(ram.as_ref(), reset_kernel.as_ref(), on_bridge.clone());
        command.args(arguments(config, &descriptors, &cpu_log));
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let connections = std::mem::take(&mut ours.servers);
        let servers =
            servers.serve(connections).map_err(resource("servers of shares and disks"))?;

        let input = ours.console.try_clone().map_err(resource("sockets"))?;
        let console = SerialConsole::new(log_path, input);
        let mut console_log = log;
        let qmp = Qmp::new(&ours.qmp).map_err(resource("a monitor socket"))?;
        if !matches!(begin, Begin::Boots) {
            qmp.leave_memory_out().map_err(resource("a monitor socket"))?;
        }
        if let Some(state) = &theirs.state {
            qmp.take_state_from(state.as_raw_fd()).map_err(resource("a monitor socket"))?;
        }
        let (files, copies) = ram.map_or_else(Default::default, |ram| (ram.files, ram.copies));
        let kept = matches!(begin, Begin::BootsPluggable) || config.pluggable;
        let memory = if kept { files.clone() } else { Vec::new() };
        inherit(&mut command, theirs, files.into_iter().chain(reset_kernel).collect());
        let mut said_before = Arc::default();
        let restore = match (options.origin, ours.state.take()) {
            (Origin::Snapshot(snapshot), Some(socket)) => {
                // The log is whole, though the console began before.
                if let Err(error) = console_log.write_all(&snapshot.console) {
                    console.log_failed(&error);
                }
                said_before = snapshot.console;
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
                let (serving, served) = sync_channel::<()>(0);
                let shared = Arc::new(Shared {
                    console,
                    qmp,
                    pidfd,
                    stderr: Arc::default(),
                    cpu_log,
                    fate: Fate::default(),
                    leaving: Mutex::default(),
                    left: Condvar::new(),
                    serving: Mutex::new(Some(serving)),
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
                servers.into_iter().for_each(|server| shared.watch(server));
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
            file_servers,
            plugged: Mutex::default(),
            on_bridge,
            in_run,
            pluggable: config.pluggable,
            sandbox: config.sandbox,
            said_before,
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
        vm.begin(config, &begin)?;
        Ok(vm)
    }

    /// Lets it run with all its devices, as soon as it can.
    fn begin(&self, config: &VmConfig, begin: &Begin) -> Result<(), HypervisorError> {
        let qmp = &self.shared.qmp;
        let begun = match begin {
            Begin::Boots => Ok(()),
            Begin::BootsPluggable => {
                let mut places = 0..;
                match config.boot.kernel() {
                    Some(_) => self.plug_in(config, |_| places.next()),
                    None => Ok(()),
                }
                .and_then(|()| qmp.execute("cont"))
            }
            // It runs as soon as it has its state.
            Begin::BeforeRun(taken, kept) => {
                let mut places = (0..*kept).chain(*taken..PLACES);
                match qmp.wait_resumed() {
                    true => self.plug_in(config, |_| places.next()),
                    false => Ok(()),
                }
            }
            Begin::InRun(run) => match qmp.wait_loaded() {
                true => {
                    let plugged = self.plug_in(config, |id| run.place_of(id));
                    plugged.and_then(|()| qmp.execute("cont"))
                }
                false => Ok(()),
            },
        };
        if matches!(begin, Begin::Boots | Begin::BootsPluggable) {
            return begun;
        }
        if begun.is_err() {
            // The failure to write to it is seen before its end is.
            qmp.wait_closed(Instant::now() + DRAIN_TIME);
        }
        if !qmp.closed() {
            return begun;
        }
        match self.wait(None) {
            Some(ExitReason::MonitorFailed(said)) => Err(HypervisorError::Refused { said }),
            // Whoever uses the VM finds that it has ended, and why.
            _ => Ok(()),
        }
    }
}

/// How a VM begins to run.
enum Begin {
    /// As it is.
    Boots,
    /// With devices that can be taken out.
    BootsPluggable,
    /// From a snapshot, with devices that are new to it: so many places had shares in them, of which the first
    /// ones can have new ones.
    BeforeRun(u32, u32),
    /// From a snapshot, with the devices that it had.
    InRun(Arc<RunDevices>),
}

impl Begin {
    fn run(&self) -> Option<&RunDevices> {
        match self {
            Begin::InRun(run) => Some(run),
            _ => None,
        }
    }
}

impl RunDevices {
    /// Those whose state is part of the snapshot's.
    fn not_served(&self, config: &VmConfig) -> Vec<(u32, DeviceId)> {
        let own = devices(config).into_iter().filter(|device| !device.served);
        own.filter_map(|device| Some((self.place_of(&device.id)?, device.id))).collect()
    }
}

impl VmHandle for QemuVm {
    fn state(&self) -> VmState {
        match () {
            () if self.shared.fate.is_decided() => VmState::Ended,
            () if self.shared.qmp.paused() => VmState::Paused,
            () => VmState::Running,
        }
    }

    fn wait(&self, deadline: Option<Instant>) -> Option<ExitReason> {
        self.shared.fate.wait(deadline)
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
        self.take_snapshot()
    }

    fn replaced_slots(&self) -> Vec<u8> {
        self.served_slots()
    }

    fn attach_disk(&self, disk: &DiskDevice) -> Result<(), HypervisorError> {
        self.pluggable.then_some(()).ok_or(HypervisorError::NotPluggable)?;
        self.attach(disk)
    }

    fn can_detach(&self, serial: &str) -> bool {
        self.pluggable && self.plugged_disk(serial).is_some()
    }

    fn detach_disk(&self, serial: &str) -> Result<(), HypervisorError> {
        self.pluggable.then_some(()).ok_or(HypervisorError::NotPluggable)?;
        self.detach(serial)
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
