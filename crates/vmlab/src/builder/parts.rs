//! The parts of a VM, worked out from what a user wants.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use vmlab_artifacts::cache::Leases;
use vmlab_artifacts::{Cache, Kernel, KernelSpec, KernelStore, Progress};
use vmlab_wire::message::{Filesystem, Mount, Network, Root, RootMode as WireRootMode, Setup};

use super::{RootMode, VmBuilder};
use crate::Error;
use crate::accel::{self, Chosen};
use crate::boot::{self, Needs, PreparedKernel};
use crate::config::{
    Accel, AgentChannel, Caching, Machine, NetworkMode, ShareDevice, ShareTransport, Topology,
    VmConfigBuilder, share_tag,
};
use crate::disk;
use crate::guest::Environment;
use crate::hypervisor::{Capabilities, VirtioBus};
use crate::image::{Image, ROOT_DISK};
use crate::lan::Membership;
use crate::prepared::{ImageSystem, System};
use crate::report::Phase;
use crate::rootfs::{Identity, guest_bytes};
use crate::share::{self, KERNELS_OWN, Share, ShareVia};
use crate::snapshot::SnapshotMode;
use crate::timings::Timeline;

/// The guest's address in QEMU's user-mode network.
const USER_NETWORK: Network =
    Network { address: [10, 0, 2, 15], prefix: 24, gateway: [10, 0, 2, 2] };

/// What [`VmBuilder::fast`] tells the kernel. Each changes something that a command could notice, and each
/// was measured to save time; `docs/boot.md` says what.
const FAST: [&str; 3] = ["mitigations=off", "init_on_alloc=0", "initcall_blacklist=jent_mod_init"];

/// Directories of a system that nothing can be laid over without breaking it.
const SYSTEMS_OWN: [&str; 11] =
    ["/", "/bin", "/boot", "/etc", "/lib", "/lib64", "/opt", "/run", "/sbin", "/usr", "/var"];

/// What a VM is made of.
pub(super) struct Parts {
    pub(super) config: VmConfigBuilder,
    pub(super) setup: Setup,
    pub(super) system: System,
    pub(super) accel_reason: Option<String>,
}

impl VmBuilder {
    /// What commands inherit, with a working directory that the guest has.
    pub(super) fn environment_in_guest(&self) -> Result<Environment, Error> {
        let of_caller = || match self.image {
            Some(_) => Environment::of_system(),
            None => Environment::of_caller(),
        };
        let environment = self.environment.clone().map_or_else(of_caller, Ok);
        let mut environment = environment.map_err(|source| Error::Io {
            what: "find",
            path: PathBuf::from("the working directory"),
            source,
            hint: "",
        })?;
        if !self.has_cwd(&environment.cwd) {
            environment.cwd = PathBuf::from("/");
        }
        Ok(environment)
    }

    /// The parts of a VM whose kernel vmlab starts.
    pub(super) fn kernel_parts(
        &self,
        environment: &Environment,
        lans: &[Membership],
        (cache, leases, can): (&Cache, &Leases, &Capabilities),
        chosen: Option<Chosen>,
        timeline: &mut Timeline,
    ) -> Result<Parts, Error> {
        let store = KernelStore::open(cache.clone());
        let kernel = match &self.kernel {
            Some(spec) => store.resolve(&spec.parse::<KernelSpec>()?, &*self.progress)?,
            None => {
                let fits = |kernel: &Kernel| {
                    boot::check(cache, kernel, self.needs(kernel, can))
                        .map_err(|error| error.to_string())
                };
                store.resolve_default_for(&fits, &*self.progress)?
            }
        };
        let disk = |image: &Image| image.disk(cache, leases, &*self.progress);
        let disk = self.image.as_ref().map(disk).transpose()?;
        timeline.end(Phase::Kernel);

        let needs = self.needs(&kernel, can);
        let chosen = chosen.map_or_else(|| self.choose_accel(cache, timeline), Ok)?;
        let Chosen { accel, reason: accel_reason, arguments } = chosen;
        let mut arguments: Vec<String> = arguments.iter().map(|&arg| arg.to_owned()).collect();
        if accel == Accel::Kvm && !self.full_console {
            arguments.push("quiet".to_owned());
        }
        if can.bus == VirtioBus::Mmio {
            // It would look for a bus that is not there, in hundreds of exits, and for EFI to reset itself by.
            arguments.extend(["pci=off", "reboot=acpi"].map(str::to_owned));
        }
        if self.fast {
            arguments.extend(FAST.iter().map(|&arg| arg.to_owned()));
        }
        arguments.extend(self.append.iter().cloned());
        let since = Instant::now();
        let prepared = boot::prepare(cache, &kernel, needs, &arguments, &*self.progress)?;
        timeline.note("boot image and initramfs", since);
        let machine = self.fastest_machine(&prepared, can);
        let mut plan = MountPlan { transport: prepared.transport, devices: Vec::new() };
        let root = match disk {
            Some(_) => None,
            None => Some(absolute(&self.root)?),
        };
        let mut setup = self.setup(&mut plan, environment, &kernel, root.as_deref())?;
        setup.lans = lans.iter().map(Membership::interface).collect();
        let mut config = VmConfigBuilder::new(prepared.boot)
            .accel(accel)
            .machine(machine)
            .channel(prepared.channel);
        for device in plan.devices {
            config = config.share(device);
        }
        if let Some(disk) = disk {
            config = config.disk(disk);
        }
        let named = || lans.first().map(|lan| lan.name().to_owned());
        let identity = Identity {
            root,
            hostname: self.hostname.clone().or_else(named),
            hosts: lans.iter().flat_map(Membership::hosts).collect(),
            network: self.network,
        };
        let system = System::Kernel(Box::new((kernel, identity)));
        Ok(Parts { config, setup, system, accel_reason })
    }

    /// The parts of a VM that starts an image's own system.
    pub(super) fn image_parts(
        &self,
        image: &Image,
        environment: &Environment,
        (cache, leases): (&Cache, &Leases),
        timeline: &mut Timeline,
    ) -> Result<Parts, Error> {
        self.check_for_image()?;
        let disks = image.disks(cache, leases, &*self.progress)?;
        timeline.end(Phase::Kernel);
        let Chosen { accel, reason: accel_reason, .. } = self.choose_accel(cache, timeline)?;
        let mut setup = self.no_setup();
        let mut config = VmConfigBuilder::new(image.boot()?).accel(accel).machine(Machine::Q35);
        for disk in disks {
            config = config.disk(disk);
        }
        let shares = self.shares_in_order(self.shared_cwd(environment))?;
        for (index, share) in shares.iter().enumerate() {
            // Which of them its kernel has is known when it runs.
            let transports = match self.share_via {
                // QEMU's own server takes no other names.
                ShareVia::Auto if share.host.to_str().is_none() => vec![ShareTransport::VirtioFs],
                ShareVia::Auto => vec![ShareTransport::VirtioFs, ShareTransport::NineP],
                ShareVia::Only(transport) => vec![transport],
            };
            let caching = Caching::Coherent;
            let mut ways = Vec::new();
            for transport in transports {
                let tag = match ways.len() {
                    0 => share_tag(index),
                    _ => format!("{}-{}", share_tag(index), ways.len()),
                };
                ways.push(share::filesystem(&tag, transport, caching));
                let (path, read_only) = (share.host.clone(), share.read_only);
                config = config.share(ShareDevice { tag, path, read_only, transport, caching });
            }
            let mut ways = ways.into_iter();
            let Some(filesystem) = ways.next() else { continue };
            let target = guest_bytes(&share.guest);
            let (otherwise, read_only) = (ways.next(), share.read_only);
            setup.shares.push(Mount { filesystem, otherwise, target, read_only });
        }
        let (source, hostname) = (image.source.clone(), self.hostname.clone());
        let system = System::Image(ImageSystem { source, hostname });
        Ok(Parts { config, setup, system, accel_reason })
    }

    /// Chooses who executes instructions.
    pub(super) fn choose_accel(
        &self,
        cache: &Cache,
        timeline: &mut Timeline,
    ) -> Result<Chosen, Error> {
        let since = Instant::now();
        let chosen = accel::choose(self.accel, cache)?;
        timeline.note("proof of KVM", since);
        Ok(chosen)
    }

    /// What only a kernel that vmlab starts can be given.
    fn check_for_image(&self) -> Result<(), Error> {
        let given = [
            (!self.append.is_empty(), "arguments for the kernel"),
            (self.fast, "the fast boot"),
            (!self.lans.is_empty(), "a place on a network of VMs"),
            (self.root_mode.is_some(), "another way to write to its root"),
            (self.machine == Some(Machine::Microvm), "the machine microvm"),
        ];
        match given.into_iter().find(|(given, _)| *given) {
            Some((_, what)) => Err(Error::NotForImages { what }),
            None => Ok(()),
        }
    }

    /// A VM with the same kernel and hypervisor, and nothing else of this one, on a root without the caller's
    /// directory.
    pub(crate) fn sibling_on(&self, root: &Path) -> VmBuilder {
        VmBuilder {
            kernel: self.kernel.clone(),
            cache_dir: self.cache_dir.clone(),
            accel: self.accel,
            share_via: self.share_via,
            sandbox: self.sandbox,
            // One is used, and taken for what comes after, also where a run is to have a new one of its own.
            snapshots: match self.snapshots {
                SnapshotMode::Never => SnapshotMode::Never,
                SnapshotMode::Use | SnapshotMode::Renew => SnapshotMode::Use,
            },
            hypervisor_choice: self.hypervisor_choice,
            hypervisor: self.hypervisor.clone(),
            progress: Arc::clone(&self.progress),
            root: root.to_owned(),
            share_cwd: false,
            timeout: Some(self.timeout.unwrap_or(disk::MAKING_TIME)),
            ..VmBuilder::default()
        }
    }

    /// Where kernels and what is made of them are kept.
    pub(crate) fn cache(&self) -> Result<Cache, Error> {
        match &self.cache_dir {
            Some(dir) => Ok(Cache::at(dir)),
            None => Ok(Cache::open_default()?),
        }
    }

    /// The root whose programs make disks: the guest's, where that is a directory.
    pub(crate) fn root_of_programs(&self) -> &Path {
        match self.image {
            Some(_) => Path::new("/"),
            None => &self.root,
        }
    }

    /// Who is told of what takes time.
    pub(crate) fn told(&self) -> &dyn Progress {
        &*self.progress
    }

    fn needs(&self, kernel: &Kernel, can: &Capabilities) -> Needs {
        Needs {
            bus: can.bus,
            overlay: self.chosen_root_mode() == RootMode::Overlay,
            disk: self.image.is_some() || !self.disks.is_empty(),
            disk_later: self.pluggable,
            disk_root: self.image.is_some(),
            network: self.network != NetworkMode::None || !self.lans.is_empty(),
            vsock: self.vsock.is_some(),
            rng: self.rng,
            share_via: self.share_via,
            modules_place: self.chosen_root_mode() == RootMode::ReadOnly
                && self.image.is_none()
                && kernel.modules.is_some()
                && !self.root.join("lib/modules").is_dir(),
        }
    }

    fn fastest_machine(&self, kernel: &PreparedKernel, can: &Capabilities) -> Machine {
        if can.machines.contains(&Machine::Native) {
            return Machine::Native;
        }
        let Topology { nodes, llcs, .. } = self.topology;
        let simple =
            nodes == 1 && llcs == 1 && kernel.channel == AgentChannel::Virtio && kernel.sees_ecam;
        if simple && can.machines.contains(&Machine::Microvm) {
            Machine::Microvm
        } else {
            Machine::Q35
        }
    }

    fn chosen_root_mode(&self) -> RootMode {
        self.root_mode.unwrap_or(match self.image {
            Some(_) => RootMode::ReadWrite,
            None => RootMode::Overlay,
        })
    }

    /// `root` is the directory that the guest has as its root; without it, that is on a disk.
    fn setup(
        &self,
        plan: &mut MountPlan,
        environment: &Environment,
        kernel: &Kernel,
        root: Option<&Path>,
    ) -> Result<Setup, Error> {
        let (mode, read_only, caching) = match self.chosen_root_mode() {
            RootMode::ReadOnly => (WireRootMode::ReadOnly, true, Caching::Fixed),
            RootMode::Overlay => (WireRootMode::Overlay, true, Caching::Fixed),
            RootMode::ReadWrite => (WireRootMode::ReadWrite, false, Caching::Coherent),
        };
        let filesystem = match root {
            Some(root) => plan.add(root, read_only, caching),
            None => Filesystem {
                kind: "disk".to_owned(),
                source: ROOT_DISK.to_owned(),
                options: String::new(),
            },
        };
        let modules = kernel.modules.as_ref().map(|dir| plan.modules(dir, root));
        let shares = self.shares_in_order(self.shared_cwd(environment))?;
        let shares = shares.iter().map(|share| plan.mount(share)).collect();
        let root = Some(Root { filesystem, mode });
        Ok(Setup { root, modules, shares, ..self.no_setup() })
    }

    /// A set-up without anything to mount.
    fn no_setup(&self) -> Setup {
        Setup {
            // What each start has for itself is in `fresh_setup`.
            hostname: String::new(),
            root: None,
            modules: None,
            shares: Vec::new(),
            disks: disk::for_guest(&self.disks),
            files: Vec::new(),
            network: (self.network == NetworkMode::User).then_some(USER_NETWORK),
            lans: Vec::new(),
            modprobe: self.modules.clone(),
            revive: 0,
            accounts: self.user.is_some(),
            new_devices: false,
            clock_ns: 0,
            entropy: Vec::new(),
        }
    }

    /// The working directory, where it is to be shared.
    fn shared_cwd<'a>(&self, environment: &'a Environment) -> Option<&'a Path> {
        let cwd = environment.cwd.as_path();
        (self.share_cwd && self.can_have_cwd(cwd)).then_some(cwd)
    }

    /// Whether a directory of the host can be seen in its place in the guest.
    fn can_have_cwd(&self, cwd: &Path) -> bool {
        let of_system = || SYSTEMS_OWN.iter().any(|own| Path::new(own) == cwd);
        !is_of_the_kernel(cwd) && (self.image.is_none() || !of_system())
    }

    /// Whether the guest has the working directory, in its root where it is not shared.
    fn has_cwd(&self, cwd: &Path) -> bool {
        let in_root = || {
            let below = cwd.strip_prefix("/").unwrap_or(cwd);
            !is_of_the_guest(cwd) && self.root.join(below).is_dir()
        };
        let shared = || self.shares.iter().any(|share| cwd.starts_with(&share.guest));
        let same_root = || self.image.is_none() && in_root();
        is_of_the_kernel(cwd)
            || (self.share_cwd && self.can_have_cwd(cwd))
            || shared()
            || same_root()
    }

    /// Whether the guest has a file of the host at its own path.
    pub(super) fn sees(&self, file: &Path) -> bool {
        let cwd = match &self.environment {
            Some(environment) => Some(environment.cwd.clone()),
            None => std::env::current_dir().ok(),
        };
        let in_cwd = |cwd: PathBuf| {
            self.share_cwd
                && self.can_have_cwd(&cwd)
                && cwd != Path::new("/")
                && file.starts_with(&cwd)
        };
        let in_share = |share: &Share| share.host == share.guest && file.starts_with(&share.host);
        let same_root = self.image.is_none() && self.root == Path::new("/");
        cwd.is_some_and(in_cwd)
            || self.shares.iter().any(in_share)
            || (same_root && !is_of_the_guest(file))
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
            otherwise: None,
            filesystem: self.add(&share.host, share.read_only, Caching::Coherent),
            target: guest_bytes(&share.guest),
            read_only: share.read_only,
        }
    }

    /// The module tree. Where the root has it somewhere, no device is needed: every one costs time at
    /// boot.
    fn modules(&mut self, dir: &Path, root: Option<&Path>) -> Filesystem {
        let below = root.and_then(|root| dir.strip_prefix(root).ok());
        let source = below.map(|below| Path::new("/").join(below));
        match source.as_deref().filter(|path| !is_of_the_guest(path)).and_then(Path::to_str) {
            Some(source) => Filesystem {
                kind: "bind".to_owned(),
                source: source.to_owned(),
                options: String::new(),
            },
            None => self.add(dir, true, Caching::Fixed),
        }
    }
}
