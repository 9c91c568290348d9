//! A VM that is ready to start.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmlab_artifacts::cache::Leases;
use vmlab_artifacts::{Cache, Kernel, Progress};
use vmlab_wire::message::Setup;

use crate::config::VmConfig;
use crate::guest::Environment;
use crate::hypervisor::{Hypervisor, VmHandle};
use crate::lan::Membership;
use crate::random;
use crate::report::{Phase, Report};
use crate::rootfs::Identity;
use crate::runs::RunDir;
use crate::sandbox;
use crate::snapshot::SnapshotMode;
use crate::start::Devices;
use crate::testing::Observer;
use crate::timings::Timeline;
use crate::tsc::TscPoint;
use crate::vm::Vm;
use crate::{Disk, Error, FailedStart, VmBuilder};

/// How much entropy a guest is given before anything runs in it, in bytes.
const ENTROPY: usize = 64;

/// What runs in a VM.
#[derive(Debug, Clone)]
pub(crate) enum System {
    /// A kernel that vmlab starts, and a root that it mounts.
    Kernel(Box<(Kernel, Identity)>),
    /// What an image starts by itself.
    Image(ImageSystem),
}

/// An image that starts its own system.
#[derive(Debug, Clone)]
pub(crate) struct ImageSystem {
    /// As it was asked for.
    pub(crate) source: PathBuf,
    /// Its host name, if it is given another one.
    pub(crate) hostname: Option<String>,
}

/// A VM for which everything is there. It can be cloned and started any number of times, also from several
/// threads at once.
#[derive(Clone)]
pub struct PreparedVm {
    pub(crate) config: VmConfig,
    pub(crate) setup: Setup,
    pub(crate) system: System,
    pub(crate) environment: Environment,
    /// The user, where only the guest knows who that is.
    pub(crate) user: Option<String>,
    pub(crate) accel_reason: Option<String>,
    /// What it is on networks of VMs.
    pub(crate) lans: Vec<Membership>,
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) boot_timeout: Duration,
    pub(crate) snapshots: SnapshotMode,
    pub(crate) cache: Cache,
    /// What it uses of the cache beside its kernel.
    pub(crate) leases: Leases,
    /// When its time-stamp counter was first read, if the guest has to be told the frequency.
    pub(crate) tsc: Option<TscPoint>,
    pub(crate) timeline: Timeline,
    pub(crate) progress: Arc<dyn Progress + Send>,
    pub(crate) vms: usize,
    pub(crate) run_dir: Option<RunDir>,
    pub(crate) observer: Option<Observer>,
    /// Whom it was made by, for what comes later.
    pub(crate) builder: Arc<VmBuilder>,
    /// Its disks, also those that are out again.
    pub(crate) disks: Vec<Disk>,
    pub(crate) watchers: Vec<Arc<dyn Watcher>>,
}

/// Random numbers for one guest.
pub(crate) fn entropy() -> io::Result<Vec<u8>> {
    let mut entropy = vec![0; ENTROPY];
    random::fill(&mut entropy)?;
    Ok(entropy)
}

/// There are none.
pub(crate) fn no_entropy(source: io::Error) -> Error {
    Error::Io { what: "read", path: "the host's random numbers".into(), source, hint: "" }
}

/// The present time, in nanoseconds since 1970.
pub(crate) fn clock_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_nanos().try_into().unwrap_or(u64::MAX)
}

/// Who is told of all machines of a VM: it has more than one where it is reset or restored.
pub(crate) trait Watcher: Send + Sync {
    /// One runs. It may be there for a snapshot only, or be tried once more.
    fn started(&self, handle: &Arc<dyn VmHandle>);

    /// The last one is ready for commands.
    fn ready(&self);
}

impl std::fmt::Debug for PreparedVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PreparedVm").field("config", &self.config).finish_non_exhaustive()
    }
}

impl PreparedVm {
    /// What the hypervisor will be asked to run.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The kernel; `None` where an image starts its own.
    pub fn kernel(&self) -> Option<&Kernel> {
        match &self.system {
            System::Kernel(known) => Some(&known.0),
            System::Image(_) => None,
        }
    }

    /// Why KVM is not used, where it might have been.
    pub fn accel_reason(&self) -> Option<&str> {
        self.accel_reason.as_deref()
    }

    /// How vmlab's own file servers are restricted, if the VM has any.
    pub fn confinement(&self) -> Option<String> {
        let served = self.config.served_shares().next().is_some();
        served.then(|| sandbox::describe(self.config.sandbox))
    }

    /// What is known of the run before it has begun.
    pub fn report(&self) -> Report {
        let (kernel, release) = match &self.system {
            System::Kernel(known) => (known.0.spec.clone(), known.0.release.clone()),
            System::Image(image) => (image.source.display().to_string(), String::new()),
        };
        Report {
            kernel,
            release,
            hypervisor: self.hypervisor.name(),
            accel: self.config.accel,
            accel_reason: self.accel_reason.clone(),
            machine: self.config.machine,
            memory: self.config.memory,
            cpus: self.config.topology.cpus().unwrap_or(0),
            phases: self.timeline.phases(),
            timings: self.timeline.spans(),
            guest_boot: None,
            setup_steps: Vec::new(),
            exits: Vec::new(),
            exit_reason: None,
            console_log: None,
        }
    }

    /// The hypervisor's command line, with stand-ins for descriptors and logs.
    pub fn command_line(&self) -> Vec<OsString> {
        self.hypervisor.command_line(&self.to_boot(self.config.clone()))
    }

    /// Says how many VMs of this process may run at the same time, so that each gets its part of the
    /// process's open files; one unless set.
    pub fn one_of(mut self, vms: usize) -> Self {
        self.vms = vms;
        self
    }

    /// Keeps the logs of the VM there; in a new directory unless set.
    pub fn logs_in(mut self, dir: RunDir) -> Self {
        self.run_dir = Some(dir);
        self
    }

    /// Has all its machines watched.
    pub(crate) fn watched_by(mut self, watcher: Arc<dyn Watcher>) -> Self {
        self.watchers.push(watcher);
        self
    }

    /// Starts the VM and waits until it is ready for commands.
    ///
    /// # Errors
    /// When the VM does not start, or the guest does not come up.
    pub fn start(self) -> Result<Vm, Error> {
        Ok(self.start_watched(|_| {})?)
    }

    /// As [`start`](Self::start), and gives the machine to `started` as soon as it runs: to watch its
    /// console, or to end it while it boots. In rare cases a machine is started a second time.
    ///
    /// # Errors
    /// When the VM does not start, or the guest does not come up.
    pub fn start_watched(
        self,
        started: impl Fn(&Arc<dyn VmHandle>),
    ) -> Result<Vm, Box<FailedStart>> {
        Vm::start(self, started)
    }

    pub(crate) fn begin(&self, timeline: &mut Timeline, phase: Phase) {
        timeline.begin(phase);
        self.progress.phase(phase.name());
    }

    pub(crate) fn run_dir(&self) -> Result<RunDir, Error> {
        self.run_dir.clone().map_or_else(RunDir::create, Ok)
    }

    /// What a VM has to be given that boots now, as it measures nothing for itself. It is no part of what
    /// the VM is: measuring gives another number each time.
    pub(crate) fn to_boot(&self, mut config: VmConfig) -> VmConfig {
        if let (Some(tsc), Some(kernel)) = (self.tsc, config.boot.kernel_mut()) {
            let line = &mut kernel.command_line;
            // First, so that users can have their own.
            *line = format!("tsc=reliable tsc_early_khz={} {line}", tsc.khz(&self.cache));
        }
        config
    }

    /// The set-up for a VM, with the present time and random numbers of its own. `devices` are those that it
    /// did not boot with.
    pub(crate) fn fresh_setup(&self, devices: Option<Devices>) -> io::Result<Setup> {
        let (hostname, files) = match &self.system {
            System::Kernel(known) => known.1.fresh()?,
            System::Image(image) => (image.hostname.clone().unwrap_or_default(), Vec::new()),
        };
        Ok(Setup {
            hostname,
            files,
            entropy: entropy()?,
            revive: devices.map_or(0, |devices| devices.revive),
            new_devices: devices.is_some_and(|devices| devices.more),
            clock_ns: clock_ns(),
            ..self.setup.clone()
        })
    }
}
