//! A running VM.

mod again;
mod control;
mod snapshot;
mod vsock;

pub use snapshot::VmSnapshot;

use std::ffi::OsStr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmlab_artifacts::Kernel;
use vmlab_wire::HostMessage;
use vmlab_wire::message::{Accounts, Ready, SetupReport};

use crate::Error;
use crate::builder::VmBuilder;
use crate::config::{DiskWrites, VmConfig};
use crate::disk::{self, OwnDisks};
use crate::error::{EmulatorFault, Evidence, FailedStart};
use crate::guest::{Command, Connection, Environment, GuestUser, Lost, Output};
use crate::hypervisor::{ExitReason, SerialConsole, VmHandle, VmState};
use crate::lan::claim_all;
use crate::prepared::{PreparedVm, System, Watcher};
use crate::report::{GuestBoot, GuestStep, Phase, Report};
use crate::runs::RunDir;
use crate::start::{Booted, Starter};
use crate::sync::lock;
use crate::testing::ObservedVm;
use crate::timings::{Timeline, millis};
use crate::vsock::Listening;

/// How long the hypervisor may take to end after it closed the channel to the agent.
const END_TIME: Duration = Duration::from_secs(5);

/// How long the guest may take to end its processes and write everything back.
const STOP_TIME: Duration = Duration::from_secs(30);

/// How long an image's own system may take to power itself off. systemd gives each service ninety seconds.
const POWER_OFF_TIME: Duration = Duration::from_secs(120);

/// How long the guest may take to read its kernel's log. Without it, timings say less.
const BOOT_LOG_TIME: Duration = Duration::from_secs(5);

/// After so long its power button is pressed again: early in a boot, nobody may listen to that yet.
const BUTTON_TIME: Duration = Duration::from_secs(5);

/// Lines of the console that are shown with a failure.
const SHOWN_LINES: usize = 30;

/// A VM whose guest is ready for commands. Dropping it ends it at once.
///
/// What the guest does to itself is told apart from what a command does:
///
/// ```no_run
/// use vmlab::hypervisor::ExitReason;
/// use vmlab::{Error, Vm};
///
/// let vm = Vm::builder().kernel("debian:6.12").start()?;
/// match vm.exec(["sh", "-c", "echo c > /proc/sysrq-trigger"]) {
///     Ok(output) => println!("the command ended with {}", output.status),
///     Err(Error::Ended { reason: ExitReason::GuestPanic(message), console, .. }) => {
///         println!("the kernel panicked: {message:?}");
///         println!("{}\nmore in {}", console.tail, console.log.display());
///     }
///     Err(other) => return Err(other),
/// }
/// # Ok::<(), vmlab::Error>(())
/// ```
#[derive(Debug)]
pub struct Vm {
    handle: Arc<dyn VmHandle>,
    connection: Arc<Connection>,
    environment: Environment,
    prepared: PreparedVm,
    prospect: Report,
    ready: Ready,
    setup: SetupReport,
    came_up: u64,
    timeline: Mutex<Timeline>,
    deadline: Option<Instant>,
    /// The logs of its first start; those of others are in parts of it.
    run_dir: RunDir,
    starts: u32,
    own_disks: Vec<Arc<OwnDisks>>,
    listening: Listening,
    observed: Option<Arc<ObservedVm>>,
}

impl Vm {
    /// What a VM can be.
    pub fn builder() -> VmBuilder {
        VmBuilder::default()
    }

    pub(crate) fn start(
        mut prepared: PreparedVm,
        started: impl Fn(&Arc<dyn VmHandle>),
    ) -> Result<Self, Box<FailedStart>> {
        let mut timeline = prepared.timeline.resumed();
        let prospect = prepared.report();
        let failed = |error| Box::new(FailedStart { error, report: prospect.clone() });
        let lans = claim_all(&prepared.lans).map_err(|error| failed(error.into()))?;
        let since = Instant::now();
        let own_disks = disk::give_each_its_own(&mut prepared.config.disks).map_err(&failed)?;
        if !prepared.config.disks.is_empty() {
            timeline.note("copies of disks", since);
        }
        // A limit beyond what the clock can count is none.
        let deadline = prepared.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let observer = prepared.observer.as_ref();
        let observed = observer.map(|observer| observer.vm(prepared.kernel()));
        let watcher = observed.clone().map(|observed| observed as Arc<dyn Watcher>);
        prepared.watchers.extend(watcher);
        let starter = Starter { prepared: &prepared, started: &started, deadline, lans: &lans };
        let booted = starter.start(&mut timeline).map_err(|error| {
            own_disks.keep_none();
            timeline.fail();
            let mut report = prospect.clone();
            report.failed(&timeline, &error);
            observed.iter().for_each(|observed| observed.ended(report.clone()));
            Box::new(FailedStart { error, report })
        })?;
        let Booted { handle, connection, ready, setup, shares, came_up, run_dir } = booted;
        prepared.config.shares = shares;
        let mut vm = Self {
            handle,
            connection,
            environment: prepared.environment.clone(),
            prospect,
            ready,
            setup,
            came_up,
            timeline: Mutex::new(timeline),
            deadline,
            run_dir,
            starts: 1,
            own_disks: vec![Arc::new(own_disks)],
            listening: Listening::default(),
            prepared,
            observed,
        };
        vm.prepared.watchers.iter().for_each(|watcher| watcher.ready());
        if let Some(name) = vm.prepared.user.clone()
            && let Err(error) = vm.become_user(&name)
        {
            // Its disks may be kept; that it does not end in time is not what the user has to know.
            let _ = vm.shutdown();
            let report = vm.report();
            return Err(Box::new(FailedStart { error, report }));
        }
        Ok(vm)
    }

    /// Has commands run by a user of the guest, who is looked up there.
    fn become_user(&mut self, name: &str) -> Result<(), Error> {
        let user = match name {
            "root" => GuestUser::default(),
            "caller" => GuestUser::caller(),
            name => {
                let Accounts { passwd, group } = self.setup.accounts.take().unwrap_or_default();
                let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                let user = GuestUser::find(name, &text(&passwd), &text(&group));
                let user = user.ok_or_else(|| Error::NoSuchUser { name: name.to_owned() })?;
                self.environment.become_login(&user, &text(&passwd));
                user
            }
        };
        self.environment.user = user;
        Ok(())
    }

    /// Runs a command to its end: the program, looked for in `PATH`, and its arguments.
    ///
    /// # Errors
    /// When it cannot be started, or the VM ends before it does. A command that fails is no error.
    pub fn exec(&self, argv: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Output, Error> {
        let mut argv = argv.into_iter();
        let Some(program) = argv.next() else {
            return Err(Error::CommandNotFound { program: Default::default() });
        };
        self.command(program).args(argv).output()
    }

    /// A command to be run in the guest, with the environment that the VM was given.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command<'_> {
        Command::new(self, program.as_ref().to_owned(), self.environment.clone())
    }

    /// The kernel that it was started with; `None` where an image has started its own.
    pub fn kernel(&self) -> Option<&Kernel> {
        self.prepared.kernel()
    }

    /// The running kernel's release, as `uname -r` says it.
    pub fn release(&self) -> &str {
        &self.ready.release
    }

    /// What it is.
    pub fn config(&self) -> &VmConfig {
        &self.prepared.config
    }

    /// The guest's first serial port.
    pub fn console(&self) -> &SerialConsole {
        self.handle.serial()
    }

    /// A handle on the machine itself, for pausing, killing and waiting from any thread.
    pub fn handle(&self) -> Arc<dyn VmHandle> {
        Arc::clone(&self.handle)
    }

    /// What the agent warned of since the last call.
    pub fn take_warnings(&self) -> Vec<String> {
        self.connection.take_warnings()
    }

    /// Asks the guest what its kernel's log says of the boot, for the [`timings`](Report::timings) of the
    /// report. That costs some time, so it is best done when all else is.
    ///
    /// # Errors
    /// When the VM has ended.
    pub fn read_boot_log(&self) -> Result<(), Error> {
        let since = Instant::now();
        // The message is short, so the only failure is that the VM has ended, which is found below.
        let _ = self.connection.send(&HostMessage::BootLog);
        let log = self.connection.wait_boot_log(Some(since + BOOT_LOG_TIME));
        let mut timeline = lock(&self.timeline);
        timeline.note("kernel's log", since);
        if let Some(log) = log.map_err(|lost| self.lost(lost))? {
            timeline.boot_log(&log);
        }
        Ok(())
    }

    /// Ends all commands, writes everything back and ends the VM.
    ///
    /// # Errors
    /// When the guest had ended before, or does not end in time; it is gone all the same.
    pub fn shutdown(&self) -> Result<(), Error> {
        self.end_phase(Phase::Run);
        if self.handle.state() == VmState::Paused {
            // If that fails, it has ended, which is found below.
            let _ = self.handle.resume();
        }
        self.handle.wind_down();
        // The message is short, so the only failure is that the VM has ended, which is found below.
        let _ = self.connection.send(&HostMessage::PowerOff);
        let stopped = self.connection.wait_powering_off(Some(Instant::now() + STOP_TIME));
        let result = match stopped {
            Ok(Some(())) => Ok(()),
            Ok(None) => Err(Error::NotStopped {
                after: STOP_TIME,
                console: evidence(&*self.handle, self.came_up),
            }),
            Err(lost) => Err(self.lost(lost)),
        };
        // Where all is written back, nothing is gained by watching the guest power itself off.
        let result = match &self.prepared.system {
            System::Image(_) if self.keeps_writes() => result.and_then(|()| self.power_off()),
            _ => result,
        };
        self.connection.close();
        self.handle.kill(match result {
            Ok(()) => ExitReason::Shutdown,
            Err(_) => ExitReason::Killed,
        });
        self.end_phase(Phase::Stop);
        result
    }

    /// Whether what it writes to its disks is there after it.
    fn keeps_writes(&self) -> bool {
        self.prepared.config.disks.iter().any(|disk| match disk.writes {
            DiskWrites::Kept => true,
            DiskWrites::Cloned(_) => disk.keep.is_some(),
            DiskWrites::Discarded | DiskWrites::Refused => false,
        })
    }

    /// Has the guest's own system end everything and unmount its disks.
    fn power_off(&self) -> Result<(), Error> {
        let deadline = Instant::now() + POWER_OFF_TIME;
        let ended = loop {
            let pressed = self.handle.shutdown();
            let until = deadline.min(Instant::now() + BUTTON_TIME);
            let ended = self.handle.wait(Some(until));
            if ended.is_some() || Instant::now() >= deadline {
                break ended;
            }
            pressed?;
        };
        match ended {
            Some(ExitReason::Shutdown) => Ok(()),
            Some(reason) => {
                let console = evidence(&*self.handle, self.came_up);
                Err(Error::Ended { reason, booting: false, console })
            }
            None => {
                let console = evidence(&*self.handle, self.came_up);
                Err(Error::NotStopped { after: POWER_OFF_TIME, console })
            }
        }
    }

    /// What it did so far.
    pub fn report(&self) -> Report {
        let ms = |ns: u64| millis(Duration::from_nanos(ns));
        let step = |(step, us): &(String, u64)| GuestStep {
            step: step.clone(),
            ms: millis(Duration::from_micros(*us)),
        };
        let timeline = lock(&self.timeline);
        Report {
            release: self.ready.release.clone(),
            phases: timeline.phases(),
            timings: timeline.spans(),
            guest_boot: Some(GuestBoot {
                agent_started_ms: ms(self.ready.started_ns),
                agent_ready_ms: ms(self.ready.ready_ns),
            }),
            setup_steps: self.setup.steps.iter().map(step).collect(),
            exits: self.handle.exits(),
            exit_reason: self.handle.wait(Some(Instant::now())),
            console_log: Some(self.console().log_path().to_owned()),
            ..self.prospect.clone()
        }
    }

    /// Ends the machine at once, if it has not ended.
    fn cut_off(&self) {
        self.connection.close();
        self.handle.kill(ExitReason::Killed);
    }

    /// Declares that everything since the last phase was this one.
    fn end_phase(&self, phase: Phase) {
        lock(&self.timeline).end(phase);
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// What commands inherit.
    pub(crate) fn environment(&self) -> &Environment {
        &self.environment
    }

    pub(crate) fn lost(&self, lost: Lost) -> Error {
        lost_error(&self.handle, lost, Some(self.came_up))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.cut_off();
        if let Some(observed) = &self.observed {
            if self.report().phases.iter().all(|phase| phase.phase != Phase::Run) {
                self.end_phase(Phase::Run);
            }
            observed.ended(self.report());
        }
    }
}

/// The error for a channel that is lost. `came_up` is how much was on the console when the agent had come
/// up, if it had.
pub(crate) fn lost_error(handle: &Arc<dyn VmHandle>, lost: Lost, came_up: Option<u64>) -> Error {
    let since = came_up.unwrap_or(0);
    if let Lost::Protocol(what) = lost {
        return Error::Protocol { what, console: evidence(&**handle, since) };
    }
    // The channel closes a moment before the machine is gone and the reason is known.
    let reason = handle.wait(Some(Instant::now() + END_TIME)).unwrap_or_else(|| {
        ExitReason::MonitorFailed("it closed the channel to the guest and goes on".to_owned())
    });
    Error::Ended { reason, booting: came_up.is_none(), console: evidence(&**handle, since) }
}

/// What the console has that explains a failure. What a kernel says while it boots does not explain what
/// happens later, so only what came after `since` is looked at.
pub(crate) fn evidence(handle: &dyn VmHandle, since: u64) -> Box<Evidence> {
    let console = handle.serial();
    let tail = console.excerpt(since, SHOWN_LINES);
    // A breakpoint may be the kernel's own fault.
    let certain = |fault: &EmulatorFault| *fault == EmulatorFault::ImpossibleFlags;
    let emulator_fault = console.emulator_fault().filter(certain);
    Box::new(Evidence { tail, log: console.log_path().to_owned(), emulator_fault })
}
