//! From what a user wants to a VM that is ready to start.

mod parts;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmlab_artifacts::cache::Leases;
use vmlab_artifacts::{Progress, Silent};

use crate::Error;
use crate::accel::{AccelChoice, Chosen};
use crate::config::{Accel, ConfigError, Machine, NetworkMode, Topology, VmConfigBuilder};
use crate::disk::{self, Disk};
use crate::guest::Environment;
use crate::hypervisor::kvm::Kvm;
use crate::hypervisor::qemu::Qemu;
use crate::hypervisor::{Hypervisor, HypervisorChoice, HypervisorError};
use crate::image::Image;
use crate::lan::{Lan, Membership, memberships};
use crate::prepared::{PreparedVm, System};
use crate::report::Phase;
use crate::share::{Share, ShareVia};
use crate::snapshot::SnapshotMode;
use crate::testing::Observer;
use crate::timings::Timeline;
use crate::tsc::TscPoint;
use crate::units::{Bytes, MIB};
use crate::vm::Vm;
use crate::vsock::VsockDevice;
use parts::Parts;

/// How long a guest may take to come up. Booting takes one to three seconds under TCG; the rest is for
/// machines that are busy with other things.
pub const BOOT_TIME: Duration = Duration::from_secs(120);

/// How long an image may take to start its own system: ten to thirty seconds under TCG, and more where many
/// services are in it.
pub const IMAGE_BOOT_TIME: Duration = Duration::from_secs(300);

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
    root_mode: Option<RootMode>,
    image: Option<Image>,
    share_cwd: bool,
    shares: Vec<Share>,
    disks: Vec<Disk>,
    keep_disks: Option<PathBuf>,
    share_via: ShareVia,
    sandbox: bool,
    network: NetworkMode,
    pluggable: bool,
    lans: Vec<(Lan, String)>,
    vsock: Option<PathBuf>,
    rng: bool,
    hostname: Option<String>,
    append: Vec<String>,
    full_console: bool,
    fast: bool,
    qemu_args: Vec<String>,
    kvm_cpu: Option<String>,
    modules: Vec<Vec<String>>,
    environment: Option<Environment>,
    user: Option<String>,
    timeout: Option<Duration>,
    boot_timeout: Option<Duration>,
    snapshots: SnapshotMode,
    hypervisor_choice: Option<HypervisorChoice>,
    /// The one that it is to be, or that was chosen.
    hypervisor: Option<Arc<dyn Hypervisor>>,
    progress: Arc<dyn Progress + Send>,
    observer: Option<Observer>,
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
            root_mode: None,
            image: None,
            share_cwd: true,
            shares: Vec::new(),
            disks: Vec::new(),
            keep_disks: None,
            share_via: ShareVia::Auto,
            sandbox: true,
            network: NetworkMode::None,
            pluggable: false,
            lans: Vec::new(),
            vsock: None,
            rng: false,
            hostname: None,
            append: Vec::new(),
            full_console: false,
            fast: false,
            qemu_args: Vec::new(),
            kvm_cpu: None,
            modules: Vec::new(),
            environment: None,
            user: None,
            timeout: None,
            boot_timeout: None,
            snapshots: SnapshotMode::default(),
            hypervisor_choice: None,
            hypervisor: None,
            progress: Arc::new(Silent),
            observer: None,
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

    /// How the root can be written to; into memory unless set, or really where it is on an image, of which
    /// the VM has a layer of its own.
    pub fn root_mode(mut self, mode: RootMode) -> Self {
        self.root_mode = Some(mode);
        self
    }

    /// The disk image that the VM starts. With a [`kernel`](Self::kernel), that one is started, and has its
    /// root on the image.
    pub fn image(mut self, image: Image) -> Self {
        self.image = Some(image);
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

    /// Adds a disk beside the root. The guest has it at `/dev/disk/by-id/virtio-NAME`.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds a disk before all others.
    pub(crate) fn first_disk(mut self, disk: Disk) -> Self {
        self.disks.insert(0, disk);
        self
    }

    /// Keeps the VM's own copies of disks in a directory, as `NAME.raw`.
    pub fn keep_disks(mut self, dir: impl Into<PathBuf>) -> Self {
        self.keep_disks = Some(dir.into());
        self
    }

    /// How the root and all shares are carried; over 9p where the kernel has it, else over virtio-fs,
    /// unless set.
    pub fn share_via(mut self, via: ShareVia) -> Self {
        self.share_via = via;
        self
    }

    /// Whether vmlab's own file servers restrict themselves to their shares, and other threads that serve the guest
    /// or run it to no file, as far as the host's kernel can; they do unless set.
    pub fn sandbox(mut self, sandbox: bool) -> Self {
        self.sandbox = sandbox;
        self
    }

    /// The network; none unless set.
    pub fn network(mut self, network: NetworkMode) -> Self {
        self.network = network;
        self
    }

    /// Puts the VM on a network of VMs, as one of its members, whose name is the guest's host name unless that is set
    /// or it is on another one before. Can be called several times.
    pub fn lan(mut self, lan: &Lan, member: impl Into<String>) -> Self {
        self.lans.push((lan.clone(), member.into()));
        self
    }

    /// Gives the guest streams to programs of the host: a virtio-vsock device, whose Unix sockets are in a directory. It
    /// is made if it is missing, for this user alone, and is one VM's at a time. The guest's CID is
    /// [`GUEST_CID`](crate::vsock::GUEST_CID).
    pub fn vsock(mut self, dir: impl Into<PathBuf>) -> Self {
        self.vsock = Some(dir.into());
        self
    }

    /// Gives the guest a source of random numbers of the host: a virtio-rng device, `/dev/hwrng` there. Its kernel's own
    /// generator is seeded at each start without.
    pub fn rng(mut self, rng: bool) -> Self {
        self.rng = rng;
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

    /// QEMU's `-cpu` where KVM is used, instead of the host's own processor.
    pub fn kvm_cpu(mut self, cpu: impl Into<String>) -> Self {
        self.kvm_cpu = Some(cpu.into());
        self
    }

    /// Loads a module with `modprobe` before any command runs: its name and its parameters.
    pub fn module(mut self, words: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.modules.push(words.into_iter().map(Into::into).collect());
        self
    }

    /// Has the guest see a program of the host at its own path: where it would not be there otherwise, such as
    /// below `/tmp`, the directory that it is in is shared, read-only. To be called last, as what is seen
    /// depends on all else.
    pub fn program(self, program: &Path) -> Self {
        match program.parent() {
            Some(dir) if !self.sees(program) => self.share(Share::new(dir).read_only()),
            _ => self,
        }
    }

    /// Whether disks can be [attached](Vm::attach) and [detached](Vm::detach) while the VM runs, and
    /// [snapshots](Vm::snapshot) taken of it. It is so for `#[vmlab::test(host)]`, and else not unless set.
    /// vmlab itself serves all its raw disks then, but for the one with its root.
    pub fn pluggable(mut self, pluggable: bool) -> Self {
        self.pluggable = pluggable;
        self
    }

    /// What commands inherit; the caller's own unless set.
    pub fn environment(mut self, environment: Environment) -> Self {
        self.environment = Some(environment);
        self
    }

    /// The user of the commands, by a name that only the guest knows; that of the environment unless set.
    pub fn user_of_guest(mut self, name: impl Into<String>) -> Self {
        self.user = Some(name.into());
        self
    }

    /// How long the VM may exist. After that it ends with
    /// [`ExitReason::Timeout`](crate::hypervisor::ExitReason::Timeout).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// How long the guest may take to come up; [`BOOT_TIME`] unless set, [`IMAGE_BOOT_TIME`] for an image
    /// that starts its own system.
    pub fn boot_timeout(mut self, timeout: Duration) -> Self {
        self.boot_timeout = Some(timeout);
        self
    }

    /// Whether the VM starts from a snapshot, and one is taken where there is none; so it is unless set.
    pub fn snapshots(mut self, mode: SnapshotMode) -> Self {
        self.snapshots = mode;
        self
    }

    /// Which hypervisor runs it; `VMLAB_HYPERVISOR` says so unless set, and [`HypervisorChoice::Auto`] if that is
    /// not set either.
    pub fn hypervisor_choice(mut self, choice: HypervisorChoice) -> Self {
        self.hypervisor_choice = Some(choice);
        self
    }

    /// Has this very hypervisor run it.
    pub fn hypervisor(mut self, hypervisor: Arc<dyn Hypervisor>) -> Self {
        self.hypervisor = Some(hypervisor);
        self
    }

    /// Who is told of what takes time.
    pub fn progress(mut self, progress: Arc<dyn Progress + Send>) -> Self {
        self.progress = progress;
        self
    }

    /// Has somebody see the VMs that are made of this.
    pub(crate) fn observed_by(mut self, observer: Observer) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Finds and makes everything that the VM needs, without starting it.
    ///
    /// # Errors
    /// When something cannot be had, or the whole cannot work.
    pub fn prepare(self) -> Result<PreparedVm, Error> {
        let mut timeline = Timeline::start();
        if let Some(given) = self.hypervisor.clone() {
            return self.prepare_on(given, None, timeline);
        }
        let qemu = || Arc::new(Qemu::new());
        match self.hypervisor_choice.map_or_else(HypervisorChoice::of_environment, Ok)? {
            HypervisorChoice::Qemu => self.prepare_on(qemu(), None, timeline),
            HypervisorChoice::Kvm => self.prepare_on(Arc::new(Kvm::new()), None, timeline),
            // The monitor would have neither.
            HypervisorChoice::Auto if !self.starts_kernel() || self.accel == AccelChoice::Tcg => {
                self.prepare_on(qemu(), None, timeline)
            }
            HypervisorChoice::Auto => {
                let chosen = self.choose_accel(&self.cache()?, &mut timeline)?;
                if chosen.accel != Accel::Kvm {
                    return self.prepare_on(qemu(), Some(chosen), timeline);
                }
                let (native, known) = (self.clone(), Some(chosen.clone()));
                match native.prepare_on(Arc::new(Kvm::new()), known, timeline.clone()) {
                    Err(error) if qemu_may(&error) => {
                        self.prepare_on(qemu(), Some(chosen), timeline)
                    }
                    prepared => prepared,
                }
            }
        }
    }

    /// Whether it starts a kernel, and not a system of an image.
    fn starts_kernel(&self) -> bool {
        self.image.is_none() || self.kernel.is_some()
    }

    /// As [`prepare`](Self::prepare), for this hypervisor. `chosen` is who executes instructions, where that is known.
    fn prepare_on(
        mut self,
        hypervisor: Arc<dyn Hypervisor>,
        chosen: Option<Chosen>,
        mut timeline: Timeline,
    ) -> Result<PreparedVm, Error> {
        self.hypervisor = Some(Arc::clone(&hypervisor));
        let can = hypervisor.capabilities();
        if !can.tcg && self.accel == AccelChoice::Auto {
            self.accel = AccelChoice::Kvm;
        }
        let builder = Arc::new(self.clone());
        let tsc = TscPoint::now();
        let lans = memberships(&self.lans)?;
        let environment = self.environment_in_guest()?;
        let cache = self.cache()?;
        // Before anything is fetched for a VM that could not be started.
        hypervisor.find()?;
        if !can.firmware && !self.starts_kernel() {
            let (hypervisor, what) = (hypervisor.name(), "systems of images");
            return Err(ConfigError::Unsupported { hypervisor, what }.into());
        }
        let leases = Leases::default();
        let since = Instant::now();
        let mut disks = disk::devices(&self, &self.disks, (&cache, &leases))?;
        if let Some(dir) = &self.keep_disks {
            disk::keep_in(dir, &mut disks);
        }
        if self.pluggable {
            disk::serve_all(&mut disks);
        }
        if !disks.is_empty() {
            timeline.note("disks", since);
        }
        let parts = match &self.image {
            Some(image) if self.kernel.is_none() => {
                self.image_parts(image, &environment, (&cache, &leases), &mut timeline)?
            }
            _ => {
                let made = (&cache, &leases, &can);
                self.kernel_parts(&environment, &lans, made, chosen, &mut timeline)?
            }
        };
        let Parts { config, setup, system, accel_reason } = parts;
        let config = lans.iter().map(Membership::device).fold(config, VmConfigBuilder::lan);
        let mut config = disks
            .into_iter()
            .fold(config, VmConfigBuilder::disk)
            .memory(self.memory)
            .topology(self.topology)
            .sandbox(self.sandbox)
            .network(self.network)
            .pluggable(self.pluggable)
            .qemu_args(self.qemu_args);
        if let Some(machine) = self.machine {
            config = config.machine(machine);
        }
        if let Some(dir) = &self.vsock {
            config = config.vsock(VsockDevice::in_dir(dir)?);
        }
        config = config.rng(self.rng);
        let mut config = config.build()?;
        if let Some(cpu) = self.kvm_cpu.filter(|_| config.accel == Accel::Kvm) {
            config.qemu_args.extend(["-cpu".to_owned(), cpu]);
        }
        can.check(hypervisor.name(), &config)?;
        if let Some(kernel) = config.boot.kernel() {
            hypervisor.check_kernel(&kernel.image)?;
        }
        timeline.end(Phase::Prepare);
        let usual_time = match system {
            System::Kernel(_) => BOOT_TIME,
            System::Image(_) => IMAGE_BOOT_TIME,
        };
        // The microvm has no timer that the guest could check its time-stamp counter against.
        let tsc = (config.accel == Accel::Tcg).then_some(tsc);
        Ok(PreparedVm {
            config,
            setup,
            system,
            environment,
            user: self.user,
            accel_reason,
            lans,
            hypervisor,
            timeout: self.timeout,
            boot_timeout: self.boot_timeout.unwrap_or(usual_time),
            snapshots: self.snapshots,
            cache,
            leases,
            tsc,
            timeline,
            progress: self.progress,
            vms: 1,
            run_dir: None,
            observer: self.observer,
            builder,
            disks: self.disks,
            watchers: Vec::new(),
        })
    }

    /// Starts the VM and waits until it is ready for commands.
    ///
    /// # Errors
    /// When something cannot be had, the VM does not start, or the guest does not come up.
    pub fn start(self) -> Result<Vm, Error> {
        self.prepare()?.start()
    }
}

/// Whether QEMU may have what vmlab's own monitor lacks.
fn qemu_may(error: &Error) -> bool {
    matches!(
        error,
        Error::Config(ConfigError::Unsupported { .. })
            | Error::KernelLacks { .. }
            | Error::Hypervisor(HypervisorError::Kernel { .. })
    )
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::error::chain;

    #[test]
    fn kernels_without_a_64_bit_entry_are_for_qemu() {
        /// Offsets in an image (`Documentation/arch/x86/boot.rst` of Linux), and where its header ends.
        const JUMP: usize = 0x201;
        const MAGIC: usize = 0x202;
        const VERSION: usize = 0x206;
        const XLOADFLAGS: usize = 0x236;
        const END: usize = 0x26c;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bzImage");
        let image = |version: u16, flags: u8| {
            let mut image = vec![0; 4096];
            image[JUMP] = (END - MAGIC) as u8;
            image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
            image[VERSION..VERSION + 2].copy_from_slice(&version.to_le_bytes());
            image[XLOADFLAGS] = flags;
            fs::write(&path, image).unwrap();
        };
        let refused = |why: &str| {
            let error = Kvm::new().check_kernel(&path).unwrap_err();
            assert!(chain(&error).contains(why), "{}", chain(&error));
            assert!(qemu_may(&error.into()));
            Qemu::new().check_kernel(&path).unwrap();
        };
        image(0x020f, 1);
        Kvm::new().check_kernel(&path).unwrap();
        image(0x020f, 0xfe);
        refused("no 64-bit entry");
        image(0x020b, 1);
        refused("version 2.11 of the boot protocol");
        fs::write(&path, [&b"\x7fELF\x01\x01"[..], &[0; 4096]].concat()).unwrap();
        refused("64-bit processors");
    }
}
