//! The ways from a VM that is prepared to a guest that is ready for commands.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use vmlab_wire::HostMessage;
use vmlab_wire::message::{Failure, Ready, SetupReport};

use crate::Error;
use crate::config::{Accel, NetworkMode, ShareDevice, VmConfig};
use crate::error::{EmulatorFault, ErrorClass};
use crate::guest::{Connection, Greeting, Lost};
use crate::hypervisor::{ExitReason, HypervisorError, Origin, Snapshot, StartOptions, VmHandle};
use crate::lan::{Claim, LanError};
use crate::prepared::{PreparedVm, no_entropy};
use crate::report::Phase;
use crate::runs::RunDir;
use crate::snapshot::{Place, SnapshotMode};
use crate::timings::Timeline;
use crate::vm::{evidence, lost_error};
use crate::ways_in::WaysIn;

/// How long a guest that damaged itself before its agent was up is given to come up all the same.
const OOPS_GRACE: Duration = Duration::from_secs(5);

/// How often the console is looked at for such damage while the agent is waited for. It delays
/// nothing: the agent's arrival ends the wait at once.
const OOPS_LOOK: Duration = Duration::from_millis(500);

/// How long a guest that goes on from a snapshot may take to say something. It takes 0.1 s; the rest is for
/// machines that are busy with many others.
const WAKE_TIME: Duration = Duration::from_secs(60);

/// How often a guest of QEMU's TCG is interrupted. A processor there forgets an interrupt that comes at the wrong moment
/// of an exit from a guest of its own (QEMU 7.2: `do_vmexit` of `svm_helper.c` changes the word of what is pending
/// without the lock). If it was its timer's, it would sleep on until another interrupt has it look at its APIC again.
const NUDGES: Duration = Duration::from_millis(500);

/// How often a snapshot is tried: the one that is there, and the one that replaces it.
const SNAPSHOT_TRIES: usize = 2;

/// How much a guest's clock may differ from the host's without being set again: less than what reading
/// both takes on a busy machine.
const CLOCK_TOLERANCE_NS: u64 = 1_000_000;

/// Why a driver may be missing that the kernel was built with.
const NO_MODULES: &str = "; nothing is known of this kernel's modules: if it has any, give its \
    package, the directory that it was unpacked to or its build tree, not the image alone";

/// A machine whose guest is ready for commands.
pub(crate) struct Booted {
    pub(crate) handle: Arc<dyn VmHandle>,
    pub(crate) connection: Arc<Connection>,
    pub(crate) ready: Ready,
    pub(crate) setup: SetupReport,
    /// The shares that it has, if only to fill places.
    pub(crate) shares: Vec<ShareDevice>,
    /// How much was on the console when the agent had come up.
    pub(crate) came_up: u64,
    pub(crate) run_dir: RunDir,
}

/// A start that failed.
struct StartFailure {
    error: Error,
    /// The guest panicked for a reason that is the emulator's.
    emulator_fault: Option<EmulatorFault>,
    /// The guest had given no sign of life, for a reason that may be the snapshot's.
    silent: bool,
}

impl From<Error> for StartFailure {
    fn from(error: Error) -> Self {
        let silent = may_be_the_snapshots(&error);
        Self { error, emulator_fault: None, silent }
    }
}

/// Whether a VM that has not said anything may have failed because of the snapshot that it went on from:
/// nobody ended it, and all else was there.
fn may_be_the_snapshots(error: &Error) -> bool {
    use ExitReason::{GuestPanic, MonitorFailed, ProcessorFailed, Reset, Shutdown, TripleFault};
    match error {
        Error::Ended { reason, .. } => {
            matches!(
                reason,
                MonitorFailed(_)
                    | ProcessorFailed(_)
                    | GuestPanic(_)
                    | Reset
                    | Shutdown
                    | TripleFault
            )
        }
        Error::Hypervisor(HypervisorError::Refused { .. })
        | Error::Hypervisor(HypervisorError::Monitor(
            vmlab_vmm::Error::State(_) | vmlab_vmm::Error::Kvm { .. },
        ))
        | Error::BootTimeout { .. }
        | Error::Protocol { .. } => true,
        _ => false,
    }
}

/// What starts a machine.
pub(crate) struct Starter<'a, F> {
    pub(crate) prepared: &'a PreparedVm,
    /// Is told of each machine as soon as it runs.
    pub(crate) started: &'a F,
    pub(crate) deadline: Option<Instant>,
    /// Its places on networks of VMs.
    pub(crate) lans: &'a [Arc<Claim>],
}

impl<F: Fn(&Arc<dyn VmHandle>)> Starter<'_, F> {
    /// Has the VM go on from a snapshot where it can, and boot else.
    pub(crate) fn start(&self, timeline: &mut Timeline) -> Result<Booted, Error> {
        match self.use_snapshot(timeline)? {
            Some(booted) => Ok(booted),
            None => self.boot(timeline),
        }
    }

    /// Boots the VM with all that the run needs.
    pub(crate) fn boot(&self, timeline: &mut Timeline) -> Result<Booted, Error> {
        let prepared = self.prepared;
        prepared.begin(timeline, Phase::Boot);
        let config = prepared.to_boot(prepared.config.clone());
        let starts_itself = config.boot.kernel().is_none();
        self.boot_twice(|| {
            let run_dir = prepared.run_dir()?;
            let begin = (&config, Origin::Boot, run_dir.path());
            let machine = self.begin(begin, Connection::open, timeline)?;
            // Into a system that an image has started, the agent has yet to come.
            let ways =
                starts_itself.then(|| WaysIn::try_all(&machine.handle, prepared.boot_timeout));
            let ready = machine.ready().map_err(|error| {
                machine.failed(match (error, &ways) {
                    (Error::BootTimeout { after, oops: None, console }, Some(ways)) => {
                        Error::NoWayIn { after, tried: ways.tried(), console }
                    }
                    (other, _) => other,
                })
            })?;
            drop(ways);
            timeline.guest_ready(&ready);
            timeline.end(Phase::Boot);
            let came_up = machine.handle.serial().position();
            let setup = machine.set_up(None, came_up, timeline);
            let setup = setup.map_err(|error| machine.failed(error))?;
            let Machine { handle, connection, .. } = machine;
            let shares = config.shares.clone();
            Ok(Booted { handle, connection, ready, setup, shares, came_up, run_dir })
        })
    }

    /// Boots once more where the first boot failed for a reason that is not the kernel's.
    fn boot_twice<T>(&self, mut boot: impl FnMut() -> Result<T, StartFailure>) -> Result<T, Error> {
        let booted = match boot() {
            Err(failure) if self.worth_another(&failure) => boot(),
            other => other,
        };
        booted.map_err(|failure| failure.error)
    }

    /// Whether a start failed for a reason that is QEMU's, and that the next one will hardly meet. The
    /// user is told of it.
    fn worth_another(&self, failure: &StartFailure) -> bool {
        let fault = failure.emulator_fault.filter(|_| self.prepared.config.accel == Accel::Tcg);
        if let Some(fault) = fault {
            self.prepared.progress.note(&format!("{fault}; it is started once more"));
        }
        fault.is_some()
    }

    /// Lets the VM go on from a snapshot, which is taken where there is none; `None` where that cannot be
    /// done.
    pub(crate) fn use_snapshot(&self, timeline: &mut Timeline) -> Result<Option<Booted>, Error> {
        let prepared = self.prepared;
        if prepared.snapshots == SnapshotMode::Never {
            return Ok(None);
        }
        let (cache, hypervisor) = (&prepared.cache, &*prepared.hypervisor);
        let Some(place) = Place::of(cache, hypervisor, &prepared.config)? else {
            return Ok(None);
        };
        for tried in 0..SNAPSHOT_TRIES {
            // One that no VM could go on from is replaced as it is.
            let renew = prepared.snapshots == SnapshotMode::Renew && tried == 0;
            let wait = || prepared.progress.phase("waiting for a snapshot");
            let (stored, taken) = match place.get_or_take(
                || self.take(&place, timeline),
                wait,
                (renew, self.deadline),
            ) {
                Ok(found) => found,
                // That is what the user has to know of the kernel.
                Err(error) if error.evidence().is_some() => return Err(error),
                Err(error) => {
                    let why = crate::error::chain(&error);
                    prepared.progress.note(&format!("the VM boots without a snapshot: {why}"));
                    return Ok(None);
                }
            };
            if taken.is_some() {
                timeline.end(Phase::Snapshot);
            }
            // This VM is the one that the snapshot was taken of, and goes on in the same memory.
            let snapshot = taken.unwrap_or_else(|| stored.snapshot.clone());
            let config = place.with_all_shares(&prepared.config, snapshot.kept);
            match self.restore(&config, snapshot, stored.greeting.clone(), timeline) {
                Ok(booted) => return Ok(Some(booted)),
                Err(failure) if tried == 0 && self.worth_another(&failure) => {}
                Err(failure) if failure.silent => stored.condemn(),
                Err(failure) => return Err(failure.error),
            }
        }
        Ok(None)
    }

    /// Boots a VM of this kind and takes a snapshot of it.
    fn take(
        &self,
        place: &Place,
        timeline: &mut Timeline,
    ) -> Result<(Snapshot, Greeting, Snapshot), Error> {
        let prepared = self.prepared;
        prepared.begin(timeline, Phase::Boot);
        let config = prepared.to_boot(place.without_run());
        self.boot_twice(|| {
            let run_dir = RunDir::create()?;
            let begin = (&config, Origin::BootForSnapshot, run_dir.path());
            let machine = self.begin(begin, Connection::listen, timeline)?;
            let ready = machine.ready().map_err(|error| machine.failed(error))?;
            timeline.guest_ready(&ready);
            timeline.end(Phase::Boot);
            prepared.begin(timeline, Phase::Snapshot);
            let since = Instant::now();
            let snapshot = machine.handle.snapshot().map_err(Error::Hypervisor);
            let snapshot = snapshot.map_err(|error| machine.failed(error))?;
            let greeting = machine.connection.greeting();
            let greeting = greeting.ok_or_else(|| machine.failed(machine.lost(Lost::Closed)))?;
            timeline.note("devices' state", since);
            let since = Instant::now();
            machine.end();
            timeline.note("end of the VM that booted", since);
            let kept = kept(greeting.ready.revivable, snapshot.shares, self.keeps_devices());
            let snapshot = Snapshot { kept, ..snapshot };
            Ok((snapshot.clone(), greeting, snapshot))
        })
    }

    /// Lets the VM go on from a snapshot.
    fn restore(
        &self,
        config: &VmConfig,
        snapshot: Snapshot,
        greeting: Greeting,
        timeline: &mut Timeline,
    ) -> Result<Booted, StartFailure> {
        let prepared = self.prepared;
        prepared.begin(timeline, Phase::Restore);
        let run_dir = prepared.run_dir()?;
        let ready = greeting.ready.clone();
        let resume = |socket| Connection::resume(socket, greeting);
        let kept = snapshot.kept;
        let origin = Origin::Snapshot(snapshot);
        let machine = self.begin((config, origin, run_dir.path()), resume, timeline)?;
        let devices = Some(Devices::of(config, kept, self.keeps_devices()));
        let setup = machine.set_up(devices, 0, timeline).map_err(|error| machine.failed(error))?;
        let Machine { handle, connection, .. } = machine;
        let shares = config.shares.clone();
        Ok(Booted { handle, connection, ready, setup, shares, came_up: 0, run_dir })
    }

    /// Whether the devices of a snapshot are as the guest left them.
    fn keeps_devices(&self) -> bool {
        self.prepared.hypervisor.capabilities().keeps_devices
    }

    /// Has a machine go on in the midst of a run, as its devices are.
    pub(crate) fn go_on(
        &self,
        origin: Origin,
        connect: impl FnOnce(UnixStream) -> io::Result<Arc<Connection>>,
        timeline: &mut Timeline,
    ) -> Result<(Arc<dyn VmHandle>, Arc<Connection>), Error> {
        let prepared = self.prepared;
        prepared.begin(timeline, Phase::Restore);
        let run_dir = prepared.run_dir()?;
        let config = (&prepared.config, origin, run_dir.path());
        let machine = self.begin(config, connect, timeline).map_err(|failure| failure.error)?;
        timeline.end(Phase::Restore);
        let Machine { handle, connection, .. } = machine;
        Ok((handle, connection))
    }

    fn begin(
        &self,
        (config, origin, log_dir): (&VmConfig, Origin, &Path),
        connect: impl FnOnce(UnixStream) -> io::Result<Arc<Connection>>,
        timeline: &mut Timeline,
    ) -> Result<Machine<'_>, StartFailure> {
        let prepared = self.prepared;
        let since = Instant::now();
        let (log_dir, deadline) = (log_dir.to_owned(), self.deadline);
        // A VM that boots for a snapshot is on no network.
        let lans = self.lans.iter().take(config.lans.len()).map(Claim::port);
        let lans = lans.collect::<io::Result<_>>();
        let lans = lans.map_err(|source| Error::from(LanError::Switch { source }))?;
        let options = StartOptions { log_dir, deadline, origin, lans, vms: prepared.vms };
        let handle = prepared.hypervisor.start(config, options).map_err(Error::Hypervisor)?;
        timeline.note("hypervisor's start", since);
        (self.started)(&handle);
        prepared.watchers.iter().for_each(|watcher| watcher.started(&handle));
        let channel =
            handle.take_agent_channel().ok_or_else(|| lost_error(&handle, Lost::Closed, None))?;
        let connection = connect(channel).map_err(|source| Error::Io {
            what: "open",
            path: "the channel to the agent".into(),
            source,
            hint: "",
        })?;
        Ok(Machine { prepared, handle, connection, since })
    }
}

/// The devices that come to a guest which goes on from a snapshot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Devices {
    /// Shares that take the places of those of the snapshot.
    pub(crate) revive: u32,
    /// Whether there are others, which the guest has to find.
    pub(crate) more: bool,
}

impl Devices {
    fn of(config: &VmConfig, kept: u32, keeps_devices: bool) -> Self {
        let shares = config.shares.len().try_into().unwrap_or(u32::MAX);
        let more = shares > kept
            || config.network != NetworkMode::None
            || !config.lans.is_empty()
            || !config.disks.is_empty()
            || config.vsock.is_some()
            || config.rng;
        let revive = if keeps_devices { 0 } else { kept.min(shares) };
        Self { revive, more }
    }
}

/// How many of a snapshot's shares a guest can go on with, which has found that it can revive so many: all or none.
fn kept(revivable: u32, shares: u32, keeps_devices: bool) -> u32 {
    if keeps_devices || revivable == shares { shares } else { 0 }
}

/// A machine whose guest is not ready for commands yet.
struct Machine<'a> {
    prepared: &'a PreparedVm,
    handle: Arc<dyn VmHandle>,
    connection: Arc<Connection>,
    since: Instant,
}

impl Machine<'_> {
    /// Waits for the agent.
    fn ready(&self) -> Result<Ready, Error> {
        loop {
            let look = Some(Instant::now() + OOPS_LOOK);
            match self.connection.wait_ready(look).map_err(|lost| self.lost(lost))? {
                Some(ready) => return Ok(ready),
                None => self.check_time()?,
            }
        }
    }

    /// Has the guest made ready. `devices` are new if it goes on from a snapshot, and `came_up` is where its
    /// console was before.
    fn set_up(
        &self,
        devices: Option<Devices>,
        came_up: u64,
        timeline: &mut Timeline,
    ) -> Result<SetupReport, Error> {
        // Made only now: it tells the time.
        let setup = self.prepared.fresh_setup(devices).map_err(no_entropy)?;
        self.send(&HostMessage::Setup(Box::new(setup)))?;
        if devices.is_some() {
            let woken = self.connection.wait_setting_up(Some(Instant::now() + WAKE_TIME));
            if woken.map_err(|lost| self.lost(lost))?.is_none() {
                return Err(self.too_slow(None));
            }
            timeline.end(Phase::Restore);
        }
        self.prepared.begin(timeline, Phase::Setup);
        let deadline = self.since.checked_add(self.prepared.boot_timeout);
        let setup = self.connection.wait_setup(deadline).map_err(|lost| self.lost(lost))?;
        if let Some((Ok(setup), _)) = &setup {
            timeline.guest_set_up(setup);
            timeline.end(Phase::Setup);
        }
        match setup {
            Some((Ok(setup), came)) => {
                self.correct_clock(setup.clock_ns, came)?;
                if self.prepared.config.accel == Accel::Tcg {
                    self.connection.nudge_every(NUDGES);
                }
                Ok(setup)
            }
            Some((Err(mut failure), _)) => {
                let unknown = failure.errno == Some(Errno::NODEV.raw_os_error());
                let kernel = self.prepared.kernel().filter(|kernel| kernel.modules.is_none());
                if let Some(kernel) = kernel.filter(|_| unknown) {
                    let why = &kernel.no_modules;
                    let why = why.as_ref().map_or(NO_MODULES.into(), |why| format!("; {why}"));
                    failure.detail.push_str(&why);
                }
                let Failure { step, detail, .. } = failure;
                Err(Error::Setup { step, detail, console: evidence(&*self.handle, came_up) })
            }
            None => Err(self.too_slow(None)),
        }
    }

    /// Takes out of the guest's clock what passed before it was told the time.
    fn correct_clock(&self, guest_ns: u64, at: SystemTime) -> Result<(), Error> {
        let host = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let behind = i128::try_from(host).unwrap_or(i128::MAX) - i128::from(guest_ns);
        match i64::try_from(behind) {
            Ok(behind) if behind.unsigned_abs() > CLOCK_TOLERANCE_NS => {
                self.send(&HostMessage::AdjustClock(behind))
            }
            _ => Ok(()),
        }
    }

    fn send(&self, message: &HostMessage) -> Result<(), Error> {
        let sent = self.connection.send(message);
        sent.map_err(|error| self.lost(Lost::Protocol(error.to_string())))
    }

    fn check_time(&self) -> Result<(), Error> {
        let oops = self.handle.serial().oops();
        if let Some((when, line)) = oops
            && when.elapsed() > OOPS_GRACE
        {
            return Err(self.too_slow(Some(line)));
        }
        match self.since.elapsed() > self.prepared.boot_timeout {
            true => Err(self.too_slow(None)),
            false => Ok(()),
        }
    }

    fn too_slow(&self, oops: Option<String>) -> Error {
        let console = evidence(&*self.handle, 0);
        Error::BootTimeout { after: self.since.elapsed(), oops, console }
    }

    fn lost(&self, lost: Lost) -> Error {
        lost_error(&self.handle, lost, None)
    }

    fn end(&self) {
        self.connection.close();
        self.handle.kill(ExitReason::Killed);
    }

    /// Ends it, and tells what came of it.
    fn failed(&self, error: Error) -> StartFailure {
        let spoke = matches!(self.connection.wait_setting_up(Some(Instant::now())), Ok(Some(())));
        let silent = !spoke && may_be_the_snapshots(&error);
        self.end();
        let panicked = error.class() == ErrorClass::GuestPanic;
        let emulator_fault = self.handle.serial().emulator_fault().filter(|_| panicked);
        StartFailure { error, emulator_fault, silent }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Caching, KernelBoot, ShareTransport, VmConfigBuilder, share_tag};

    #[test]
    fn shares_are_kept_all_or_none() {
        assert_eq!((kept(3, 3, false), kept(2, 3, false)), (3, 0));
        assert_eq!((kept(0, 3, true), kept(0, 0, true)), (3, 0));
    }

    #[test]
    fn devices_that_are_as_they_were_are_not_revived() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let config = |shares| {
            let boot = KernelBoot {
                image: file.clone(),
                arch: vmlab_artifacts::Arch::HOST,
                initramfs: file.clone(),
                command_line: String::new(),
            };
            let share = |index| ShareDevice {
                tag: share_tag(index),
                path: dir.path().to_owned(),
                read_only: true,
                transport: ShareTransport::VirtioFs,
                caching: Caching::Fixed,
            };
            let config =
                (0..shares).map(share).fold(VmConfigBuilder::new(boot), VmConfigBuilder::share);
            config.build().unwrap()
        };
        let of = |shares, keeps_devices| {
            let Devices { revive, more } = Devices::of(&config(shares), 2, keeps_devices);
            (revive, more)
        };
        assert_eq!((of(2, false), of(3, false)), ((2, false), (2, true)));
        assert_eq!((of(2, true), of(3, true)), ((0, false), (0, true)));
    }
}
