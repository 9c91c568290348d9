//! From what a user wants to a VM that is ready to start.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmlab_artifacts::{Cache, Kernel, KernelSpec, KernelStore, Progress, Silent};
use vmlab_wire::message::{Filesystem, Mount, Network, Root, RootMode as WireRootMode, Setup};

use crate::Error;
use crate::accel::{self, AccelChoice, Chosen};
use crate::boot::{self, Needs, PreparedKernel};
use crate::config::{
    Accel, AgentChannel, Caching, Machine, NetworkMode, ShareDevice, ShareTransport, Topology,
    VmConfigBuilder, share_tag,
};
use crate::guest::Environment;
use crate::hypervisor::{Capabilities, Hypervisor, qemu::Qemu};
use crate::prepared::PreparedVm;
use crate::report::Phase;
use crate::rootfs::{Identity, guest_bytes};
use crate::share::{self, KERNELS_OWN, Share, ShareVia};
use crate::snapshot::SnapshotMode;
use crate::timings::Timeline;
use crate::tsc::TscPoint;
use crate::units::{Bytes, MIB};
use crate::vm::Vm;

/// How long a guest may take to come up. Booting takes one to three seconds under TCG; the rest is for
/// machines that are busy with other things.
pub const BOOT_TIME: Duration = Duration::from_secs(120);

/// The guest's address in QEMU's user-mode network.
const USER_NETWORK: Network =
    Network { address: [10, 0, 2, 15], prefix: 24, gateway: [10, 0, 2, 2] };

/// What [`VmBuilder::fast`] tells the kernel. Each changes something that a command could notice, and each
/// was measured to save time; `docs/boot.md` says what.
const FAST: [&str; 3] = ["mitigations=off", "init_on_alloc=0", "initcall_blacklist=jent_mod_init"];

/// How the guest's root can be written to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RootMode {
    /// Not at all; `/tmp`, `/run` and `/var/tmp` are of the guest's own memory.
    ReadOnly,
    /// Into the guest's memory. The host sees nothing of it.
    #[default]
    Overlay,
    /// Really: what the guest writes, the host has.
    ReadWrite,
}

/// Collects what a VM should be.
///
/// ```no_run
/// use std::time::Duration;
/// use vmlab::units::Bytes;
/// use vmlab::{AccelChoice, RootMode, Share, Vm};
///
/// let vm = Vm::builder()
///     .kernel("./arch/x86/boot/bzImage")
///     .memory("2G".parse::<Bytes>().expect("a size"))
///     .cpus(2)
///     .accel(AccelChoice::Auto)
///     .root_mode(RootMode::Overlay)
///     .share(Share::new("/srv/data").at("/mnt/data").read_only())
///     .module(["loop", "max_loop=4"])
///     .append("softlockup_panic=1")
///     .timeout(Duration::from_secs(300))
///     .start()?;
/// println!("{}", vm.release());
/// # Ok::<(), vmlab::Error>(())
/// ```
#[derive(Clone)]
pub struct VmBuilder {
    kernel: Option<String>,
    cache_dir: Option<PathBuf>,
    memory: Bytes,
    topology: Topology,
    accel: AccelChoice,
    machine: Option<Machine>,
    root: PathBuf,
    root_mode: RootMode,
    share_cwd: bool,
    shares: Vec<Share>,
    share_via: ShareVia,
    sandbox: bool,
    network: NetworkMode,
    hostname: Option<String>,
    append: Vec<String>,
    full_console: bool,
    fast: bool,
    qemu_args: Vec<String>,
    modules: Vec<Vec<String>>,
    environment: Option<Environment>,
    timeout: Option<Duration>,
    boot_timeout: Duration,
    snapshots: SnapshotMode,
    hypervisor: Arc<dyn Hypervisor>,
    progress: Arc<dyn Progress + Send>,
}

impl std::fmt::Debug for VmBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmBuilder").field("kernel", &self.kernel).finish_non_exhaustive()
    }
}

impl Default for VmBuilder {
    fn default() -> Self {
        Self {
            kernel: None,
            cache_dir: None,
            memory: Bytes(1024 * MIB),
            topology: Topology::flat(1),
            accel: AccelChoice::Auto,
            machine: None,
            root: PathBuf::from("/"),
            root_mode: RootMode::Overlay,
            share_cwd: true,
            shares: Vec::new(),
            share_via: ShareVia::Auto,
            sandbox: true,
            network: NetworkMode::None,
            hostname: None,
            append: Vec::new(),
            full_console: false,
            fast: false,
            qemu_args: Vec::new(),
            modules: Vec::new(),
            environment: None,
            timeout: None,
            boot_timeout: BOOT_TIME,
            snapshots: SnapshotMode::default(),
            hypervisor: Arc::new(Qemu::new()),
            progress: Arc::new(Silent),
        }
    }
}

impl VmBuilder {
    /// The kernel: a path, an installed release, `host`, or a distribution's such as `debian:6.12`.
    /// Without it, the host's own, the newest fetched one, or the distribution's newest.
    pub fn kernel(mut self, spec: impl Into<String>) -> Self {
        self.kernel = Some(spec.into());
        self
    }

    /// Where kernels and what is made of them are kept, instead of the user's cache directory.
    pub fn cache_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cache_dir = Some(dir.into());
        self
    }

    /// The guest's RAM; 1 GiB unless set.
    pub fn memory(mut self, memory: Bytes) -> Self {
        self.memory = memory;
        self
    }

    /// The number of CPUs, all alike; one unless set.
    pub fn cpus(self, cpus: u32) -> Self {
        self.topology(Topology::flat(cpus))
    }

    /// The CPUs, with their nodes and caches.
    pub fn topology(mut self, topology: Topology) -> Self {
        self.topology = topology;
        self
    }

    /// Who executes instructions; KVM where it works unless set.
    pub fn accel(mut self, accel: AccelChoice) -> Self {
        self.accel = accel;
        self
    }

    /// The board; the one that boots fastest unless set.
    pub fn machine(mut self, machine: Machine) -> Self {
        self.machine = Some(machine);
        self
    }

    /// The directory that the guest has as its root; the host's own root unless set.
    pub fn rootfs(mut self, dir: impl Into<PathBuf>) -> Self {
        self.root = dir.into();
        self
    }

    /// How the root can be written to; into memory unless set.
    pub fn root_mode(mut self, mode: RootMode) -> Self {
        self.root_mode = mode;
        self
    }

    /// Whether the working directory is shared, writable, at its own path; it is unless set. Where it
    /// is neither shared nor in the guest's root, commands start in `/`.
    pub fn share_cwd(mut self, share: bool) -> Self {
        self.share_cwd = share;
        self
    }

    /// Adds a host directory.
    pub fn share(mut self, share: Share) -> Self {
        self.shares.push(share);
        self
    }

    /// How the root and all shares are carried; over 9p where the kernel has it, else over virtio-fs,
    /// unless set.
    pub fn share_via(mut self, via: ShareVia) -> Self {
        self.share_via = via;
        self
    }

    /// Whether vmlab's own file servers restrict themselves to their shares, as far as the host's kernel
    /// can; they do unless set.
    pub fn sandbox(mut self, sandbox: bool) -> Self {
        self.sandbox = sandbox;
        self
    }

    /// The network; none unless set.
    pub fn network(mut self, network: NetworkMode) -> Self {
        self.network = network;
        self
    }

    /// The guest's host name; one that no other guest has unless set.
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.hostname = Some(name.into());
        self
    }

    /// Adds arguments to the kernel's command line.
    pub fn append(mut self, arguments: impl Into<String>) -> Self {
        self.append.push(arguments.into());
        self
    }

    /// Whether the kernel writes all of its log to the console, also under KVM. There, every character
    /// is an exit to the hypervisor, so that only warnings are written unless this is set.
    pub fn full_console(mut self, full: bool) -> Self {
        self.full_console = full;
        self
    }

    /// Whether the guest boots faster at the price of what some commands could notice; it does not unless
    /// set. What changes is in `docs/boot.md`.
    pub fn fast(mut self, fast: bool) -> Self {
        self.fast = fast;
        self
    }

    /// Adds an argument for QEMU, as it is.
    pub fn qemu_arg(mut self, argument: impl Into<String>) -> Self {
        self.qemu_args.push(argument.into());
        self
    }

    /// Loads a module with `modprobe` before any command runs: its name and its parameters.
    pub fn module(mut self, words: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.modules.push(words.into_iter().map(Into::into).collect());
        self
    }

    /// What commands inherit; the caller's own unless set.
    pub fn environment(mut self, environment: Environment) -> Self {
        self.environment = Some(environment);
        self
    }

    /// How long the VM may exist. After that it ends with
    /// [`ExitReason::Timeout`](crate::hypervisor::ExitReason::Timeout).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// How long the guest may take to come up; [`BOOT_TIME`] unless set.
    pub fn boot_timeout(mut self, timeout: Duration) -> Self {
        self.boot_timeout = timeout;
        self
    }

    /// Whether the VM starts from a snapshot, and one is taken where there is none; so it is unless set.
    pub fn snapshots(mut self, mode: SnapshotMode) -> Self {
        self.snapshots = mode;
        self
    }

    /// What runs the VM; QEMU unless set.
    pub fn hypervisor(mut self, hypervisor: Arc<dyn Hypervisor>) -> Self {
        self.hypervisor = hypervisor;
        self
    }

    /// Who is told of what takes time.
    pub fn progress(mut self, progress: Arc<dyn Progress + Send>) -> Self {
        self.progress = progress;
        self
    }

    /// Finds and makes everything that the VM needs, without starting it.
    ///
    /// # Errors
    /// When something cannot be had, or the whole cannot work.
    pub fn prepare(self) -> Result<PreparedVm, Error> {
        let mut timeline = Timeline::start();
        let tsc = TscPoint::now();
        let mut environment = match &self.environment {
            Some(environment) => environment.clone(),
            None => Environment::of_caller().map_err(|source| Error::Io {
                what: "find",
                path: PathBuf::from("the working directory"),
                source,
                hint: "",
            })?,
        };
        if !self.has_cwd(&environment.cwd) {
            environment.cwd = PathBuf::from("/");
        }
        let cache = match &self.cache_dir {
            Some(dir) => Cache::at(dir),
            None => Cache::open_default()?,
        };
        // Before anything is fetched for a VM that could not be started.
        self.hypervisor.find()?;
        let capabilities = self.hypervisor.capabilities();
        let store = KernelStore::open(cache.clone());
        let kernel = match &self.kernel {
            Some(spec) => store.resolve(&spec.parse::<KernelSpec>()?, &*self.progress)?,
            None => {
                let fits = |kernel: &Kernel| {
                    boot::check(&cache, kernel, self.needs(kernel))
                        .map_err(|error| error.to_string())
                };
                store.resolve_default_for(&fits, &*self.progress)?
            }
        };
        timeline.end(Phase::Kernel);

        let needs = self.needs(&kernel);
        let since = Instant::now();
        let Chosen { accel, reason: accel_reason, arguments } = accel::choose(self.accel, &cache)?;
        timeline.note("proof of KVM", since);
        let mut arguments: Vec<String> = arguments.iter().map(|&arg| arg.to_owned()).collect();
        if accel == Accel::Kvm && !self.full_console {
            arguments.push("quiet".to_owned());
        }
        if self.fast {
            arguments.extend(FAST.iter().map(|&arg| arg.to_owned()));
        }
        arguments.extend(self.append.iter().cloned());
        let since = Instant::now();
        let prepared = boot::prepare(&cache, &kernel, needs, &arguments, &*self.progress)?;
        timeline.note("boot image and initramfs", since);
        let machine =
            self.machine.unwrap_or_else(|| self.fastest_machine(&prepared, &capabilities));
        let mut plan = MountPlan { transport: prepared.transport, devices: Vec::new() };
        let root = absolute(&self.root)?;
        let setup = self.setup(&mut plan, &environment, &kernel, &root)?;
        let mut config = VmConfigBuilder::new(prepared.boot)
            .memory(self.memory)
            .topology(self.topology)
            .accel(accel)
            .machine(machine)
            .sandbox(self.sandbox)
            .network(self.network)
            .channel(prepared.channel)
            .qemu_args(self.qemu_args);
        for device in plan.devices {
            config = config.share(device);
        }
        let config = config.build()?;
        capabilities.check(self.hypervisor.name(), &config)?;
        timeline.end(Phase::Prepare);
        let identity = Identity { root, hostname: self.hostname, network: self.network };
        Ok(PreparedVm {
            config,
            setup,
            identity,
            kernel,
            environment,
            accel_reason,
            hypervisor: self.hypervisor,
            timeout: self.timeout,
            boot_timeout: self.boot_timeout,
            snapshots: self.snapshots,
            cache,
            // The microvm has no timer that the guest could check its time-stamp counter against.
            tsc: (accel == Accel::Tcg).then_some(tsc),
            timeline,
            progress: self.progress,
            vms: 1,
            run_dir: None,
        })
    }

    /// Starts the VM and waits until it is ready for commands.
    ///
    /// # Errors
    /// When something cannot be had, the VM does not start, or the guest does not come up.
    pub fn start(self) -> Result<Vm, Error> {
        self.prepare()?.start()
    }

    fn needs(&self, kernel: &Kernel) -> Needs {
        Needs {
            overlay: self.root_mode == RootMode::Overlay,
            network: self.network != NetworkMode::None,
            share_via: self.share_via,
            modules_place: self.root_mode == RootMode::ReadOnly
                && kernel.modules.is_some()
                && !self.root.join("lib/modules").is_dir(),
        }
    }

    fn fastest_machine(&self, kernel: &PreparedKernel, can: &Capabilities) -> Machine {
        let Topology { nodes, llcs, .. } = self.topology;
        let simple =
            nodes == 1 && llcs == 1 && kernel.channel == AgentChannel::Virtio && kernel.sees_ecam;
        if simple && can.machines.contains(&Machine::Microvm) {
            Machine::Microvm
        } else {
            Machine::Q35
        }
    }

    fn setup(
        &self,
        plan: &mut MountPlan,
        environment: &Environment,
        kernel: &Kernel,
        root_path: &Path,
    ) -> Result<Setup, Error> {
        let (mode, read_only, caching) = match self.root_mode {
            RootMode::ReadOnly => (WireRootMode::ReadOnly, true, Caching::Fixed),
            RootMode::Overlay => (WireRootMode::Overlay, true, Caching::Fixed),
            RootMode::ReadWrite => (WireRootMode::ReadWrite, false, Caching::Coherent),
        };
        let filesystem = plan.add(root_path, read_only, caching);
        let root = Root { filesystem, mode };
        let modules = kernel.modules.as_ref().map(|dir| plan.modules(dir, root_path));

        let cwd = environment.cwd.as_path();
        let cwd = (self.share_cwd && !is_of_the_kernel(cwd)).then_some(cwd);
        let shares = self.shares_in_order(cwd)?;
        let shares = shares.iter().map(|share| plan.mount(share)).collect();
        Ok(Setup {
            // What each start has for itself is in `fresh_setup`.
            hostname: String::new(),
            root,
            modules,
            shares,
            files: Vec::new(),
            network: (self.network == NetworkMode::User).then_some(USER_NETWORK),
            modprobe: self.modules.clone(),
            revive: 0,
            new_devices: false,
            clock_ns: 0,
            entropy: Vec::new(),
        })
    }

    /// Whether the guest has the working directory, in its root where it is not shared.
    fn has_cwd(&self, cwd: &Path) -> bool {
        let in_root = || {
            let below = cwd.strip_prefix("/").unwrap_or(cwd);
            !is_of_the_guest(cwd) && self.root.join(below).is_dir()
        };
        let shared = || self.shares.iter().any(|share| cwd.starts_with(&share.guest));
        is_of_the_kernel(cwd) || self.share_cwd || shared() || in_root()
    }

    /// All shares, the working directory among them unless another is given for its place.
    fn shares_in_order(&self, cwd: Option<&Path>) -> Result<Vec<Share>, Error> {
        let mut shares: Vec<Share> = Vec::new();
        for share in &self.shares {
            share.validate()?;
            if shares.iter().any(|other| other.guest == share.guest) {
                return Err(share.error("another share has this place in the guest"));
            }
            shares.push(share.clone());
        }
        let root = Path::new("/");
        if let Some(cwd) = cwd.filter(|cwd| *cwd != root)
            && !shares.iter().any(|share| share.guest == cwd)
        {
            shares.push(Share::new(cwd));
        }
        // From the outside in: a mount covers what was mounted below it before.
        shares.sort_by_key(|share| share.guest.components().count());
        Ok(shares)
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::fs::canonicalize(path).map_err(|source| Error::Io {
        what: "use the root filesystem",
        path: path.to_owned(),
        source,
        hint: "",
    })
}

/// Whether a path of the root is hidden in the guest by something of its own.
fn is_of_the_guest(path: &Path) -> bool {
    ["/dev", "/proc", "/run", "/sys", "/tmp", "/var/tmp"].iter().any(|own| path.starts_with(own))
}

/// Whether a path is one that every guest has from its own kernel.
fn is_of_the_kernel(path: &Path) -> bool {
    KERNELS_OWN.iter().any(|own| path.starts_with(own))
}

/// Which devices carry which directories, and what the guest mounts of them.
struct MountPlan {
    transport: ShareTransport,
    devices: Vec<ShareDevice>,
}

impl MountPlan {
    fn add(&mut self, path: &Path, read_only: bool, caching: Caching) -> Filesystem {
        let transport = self.transport;
        let path = path.to_owned();
        let tag = share_tag(self.devices.len());
        let filesystem = share::filesystem(&tag, transport, caching);
        self.devices.push(ShareDevice { tag, path, read_only, transport, caching });
        filesystem
    }

    fn mount(&mut self, share: &Share) -> Mount {
        Mount {
            filesystem: self.add(&share.host, share.read_only, Caching::Coherent),
            target: guest_bytes(&share.guest),
            read_only: share.read_only,
        }
    }

    /// The module tree. Where the root has it somewhere, no device is needed: every one costs time at
    /// boot.
    fn modules(&mut self, dir: &Path, root: &Path) -> Filesystem {
        let source = dir.strip_prefix(root).map(|below| Path::new("/").join(below));
        match source.ok().as_deref().filter(|path| !is_of_the_guest(path)).and_then(Path::to_str) {
            Some(source) => Filesystem {
                kind: "bind".to_owned(),
                source: source.to_owned(),
                options: String::new(),
            },
            None => self.add(dir, true, Caching::Fixed),
        }
    }
}
