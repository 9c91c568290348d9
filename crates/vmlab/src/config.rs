//! What a hypervisor is asked to run: everything resolved, nothing left to look for.

mod check;
mod error;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmlab_artifacts::Arch;
use vmlab_artifacts::image::ImageFormat;
use vmlab_devices::blk;
use vmlab_devices::net::MacAddress;

use crate::disk::CloneMode;
use crate::units::{Bytes, MIB};

pub use crate::vsock::VsockDevice;
use check::{check_boot, check_shares};
pub(crate) use check::{check_disks, is_serial};
pub use error::ConfigError;

/// The least memory that a guest can be given. Distribution kernels do not reach their init with less.
pub const MIN_MEMORY: Bytes = Bytes(96 * MIB);

/// The most memory that a guest can be given: what QEMU's machine types for x86-64 can map.
pub const MAX_MEMORY: Bytes = Bytes(1024 * 1024 * MIB);

/// The most CPUs: beyond it, QEMU's machine types need an interrupt remapping unit.
pub const MAX_CPUS: u32 = 255;

/// The longest share tag in bytes: virtio-9p's limit is 31, virtio-fs has 36.
pub const MAX_TAG: usize = 31;

/// The longest kernel command line in bytes: x86's `COMMAND_LINE_SIZE` less its final NUL.
pub const MAX_COMMAND_LINE: usize = 2047;

/// A guest's CPUs: `nodes` NUMA nodes, each of `llcs` groups that share a last-level cache, each of
/// `cores` cores with `threads` threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Topology {
    /// NUMA nodes.
    pub nodes: u32,
    /// Last-level caches per node.
    pub llcs: u32,
    /// Cores per last-level cache.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
}

impl Topology {
    /// That many single-threaded cores behind one cache, in one node.
    pub const fn flat(cpus: u32) -> Self {
        Self { nodes: 1, llcs: 1, cores: cpus, threads: 1 }
    }

    /// The number of CPUs that the guest sees, or `None` when it overflows.
    pub fn cpus(self) -> Option<u32> {
        self.nodes.checked_mul(self.llcs)?.checked_mul(self.cores)?.checked_mul(self.threads)
    }
}

impl std::fmt::Display for Topology {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{},{},{},{}", self.nodes, self.llcs, self.cores, self.threads)
    }
}

impl std::str::FromStr for Topology {
    type Err = ConfigError;

    /// Reads `NODES,LLCS,CORES,THREADS`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::TopologySyntax { text: text.to_owned() };
        let numbers: Vec<u32> = text
            .split(',')
            .map(|part| part.trim().parse().map_err(|_| bad()))
            .collect::<Result<_, _>>()?;
        match numbers[..] {
            [nodes, llcs, cores, threads] => Ok(Self { nodes, llcs, cores, threads }),
            _ => Err(bad()),
        }
    }
}

/// How guest instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// By the processor itself, through KVM.
    Kvm,
    /// By QEMU's translator.
    Tcg,
}

impl Accel {
    /// The name that users and QEMU have for it.
    pub const fn name(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        }
    }
}

/// The virtual machine's board.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// QEMU's `microvm` with PCI Express: little to probe, so it boots fastest.
    Microvm,
    /// A PC with the Q35 chip set.
    Q35,
    /// The board of vmlab's own monitor: virtio devices at fixed addresses, serial ports, ACPI. Its hypervisor has no
    /// other, and no other hypervisor has it.
    Native,
}

impl Machine {
    /// The name that users and QEMU have for it.
    pub const fn name(self) -> &'static str {
        match self {
            Machine::Microvm => "microvm",
            Machine::Q35 => "q35",
            Machine::Native => "native",
        }
    }
}

/// How a share reaches the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ShareTransport {
    /// vmlab's own server, over virtio-fs.
    #[serde(rename = "virtiofs")]
    VirtioFs,
    /// QEMU's own 9p server, over virtio.
    #[serde(rename = "9p")]
    NineP,
}

/// How the content of a share may change under the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Caching {
    /// The host does not change it while the guest runs: what was once read stays valid.
    Fixed,
    /// Host and guest both see what the other writes.
    Coherent,
}

/// What the guest is connected to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// Nothing; the guest has the loopback interface only.
    #[default]
    None,
    /// The outside world, through connections that the host's user makes; nothing gets in.
    User,
}

/// An interface on a network that VMs have to themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct LanDevice {
    /// Its address, by which the guest tells it from others.
    pub mac: MacAddress,
}

/// The byte channel between host and agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AgentChannel {
    /// A port of a virtio console device.
    Virtio,
    /// The second serial port, for kernels without virtio consoles. Slow.
    Serial,
}

/// The tag of a VM's share of this number, from 0 on.
pub(crate) fn share_tag(index: usize) -> String {
    format!("share{index}")
}

/// A host directory that the guest can mount by its tag.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct ShareDevice {
    /// Name that the guest mounts it by, at most [`MAX_TAG`] bytes.
    pub tag: String,
    /// Directory on the host.
    pub path: PathBuf,
    /// Whether the server refuses every change.
    pub read_only: bool,
    /// How it is carried.
    pub transport: ShareTransport,
    /// How it may change under the guest.
    pub caching: Caching,
}

/// The most bytes that a virtio disk's serial number has.
pub const MAX_SERIAL: usize = 20;

/// What becomes of a guest's writes to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskWrites {
    /// The guest sees them, and they are gone with the VM.
    Discarded,
    /// They are in the file.
    Kept,
    /// The disk is read-only.
    Refused,
    /// They are in a copy of the file, which the VM has for itself.
    Cloned(CloneMode),
}

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct DiskDevice {
    /// What the guest knows it by, 1 to [`MAX_SERIAL`] letters, digits, `-` or `_`.
    pub serial: String,
    /// The file with its content.
    pub path: PathBuf,
    /// How that file is laid out.
    pub format: ImageFormat,
    /// What becomes of writes.
    pub writes: DiskWrites,
    /// The file that the VM's own copy is to be, and that stays; without one it has no name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<PathBuf>,
    /// How vmlab itself serves it, which it can if the format is raw. Without, the hypervisor does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serve: Option<blk::Options>,
}

/// What a PC starts before any boot loader.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// The hypervisor's own BIOS.
    Bios,
    /// A file with a BIOS.
    File(PathBuf),
    /// UEFI.
    Uefi {
        /// The program.
        code: PathBuf,
        /// What each VM's variables are at first.
        vars: PathBuf,
        /// How both files are laid out.
        format: ImageFormat,
        /// Whether the program runs parts of itself in system management mode, which protects the variables.
        smm: bool,
    },
}

/// A system on a disk, which is the first one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct FirmwareBoot {
    /// What starts its boot loader.
    pub firmware: Firmware,
    /// Strings for the system, as SMBIOS has them for manufacturers of computers (type 11).
    pub oem_strings: Vec<String>,
}

/// What a VM starts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(untagged)]
pub enum Boot {
    /// A kernel, without any boot loader.
    Kernel(KernelBoot),
    /// The boot loader of a disk.
    Firmware(FirmwareBoot),
}

impl Boot {
    /// The kernel, where it is started directly.
    pub fn kernel(&self) -> Option<&KernelBoot> {
        match self {
            Boot::Kernel(kernel) => Some(kernel),
            Boot::Firmware(_) => None,
        }
    }

    /// The same, to change it.
    pub(crate) fn kernel_mut(&mut self) -> Option<&mut KernelBoot> {
        match self {
            Boot::Kernel(kernel) => Some(kernel),
            Boot::Firmware(_) => None,
        }
    }
}

impl From<KernelBoot> for Boot {
    fn from(kernel: KernelBoot) -> Self {
        Boot::Kernel(kernel)
    }
}

impl From<FirmwareBoot> for Boot {
    fn from(firmware: FirmwareBoot) -> Self {
        Boot::Firmware(firmware)
    }
}

/// The files that a kernel boots from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct KernelBoot {
    /// Kernel image, in a form that the hypervisor starts directly.
    pub image: PathBuf,
    /// Architecture of the image.
    pub arch: Arch,
    /// Initial RAM filesystem.
    pub initramfs: PathBuf,
    /// Kernel command line.
    pub command_line: String,
}

/// A validated request for a VM. Two equal configurations give equal VMs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[non_exhaustive]
pub struct VmConfig {
    /// What it boots.
    pub boot: Boot,
    /// RAM.
    pub memory: Bytes,
    /// CPUs.
    pub topology: Topology,
    /// Who executes instructions.
    pub accel: Accel,
    /// The board.
    pub machine: Machine,
    /// Host directories.
    pub shares: Vec<ShareDevice>,
    /// Disks.
    pub disks: Vec<DiskDevice>,
    /// Whether the threads of this process that serve the guest and run it are restricted: file servers to their
    /// shares, all others to no file.
    pub sandbox: bool,
    /// Network.
    pub network: NetworkMode,
    /// Interfaces on networks of VMs. Each start brings a port for each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lans: Vec<LanDevice>,
    /// Streams to programs of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockDevice>,
    /// Whether it has a source of random numbers of the host, by virtio-rng.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub rng: bool,
    /// How the agent is reached.
    pub channel: AgentChannel,
    /// Whether disks can be plugged in and taken out while it runs, and a snapshot taken in the midst of a run.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub pluggable: bool,
    /// Further arguments for QEMU, as they are.
    pub qemu_args: Vec<String>,
}

impl VmConfig {
    /// The shares whose servers are vmlab's own, and read and write the guest's memory.
    pub(crate) fn served_shares(&self) -> impl Iterator<Item = &ShareDevice> {
        self.shares.iter().filter(|share| share.transport == ShareTransport::VirtioFs)
    }

    /// The disks that vmlab itself serves, in the same way, and how.
    pub(crate) fn served_disks(&self) -> impl Iterator<Item = (&DiskDevice, &blk::Options)> {
        self.disks.iter().filter_map(|disk| Some((disk, disk.serve.as_ref()?)))
    }

    /// How many devices a run brings.
    pub(crate) fn devices(&self) -> usize {
        let network = usize::from(self.network != NetworkMode::None);
        self.shares.len() + network + self.lans.len() + self.single_servers() + self.disks.len()
    }

    /// How many servers of vmlab's own read and write the guest's memory.
    pub(crate) fn servers(&self) -> usize {
        self.served_shares().count() + self.served_disks().count() + self.single_servers()
    }

    /// How many of them are for devices that a VM has one of at most.
    fn single_servers(&self) -> usize {
        usize::from(self.vsock.is_some()) + usize::from(self.rng)
    }
}

/// Collects a [`VmConfig`] and checks it as a whole.
#[derive(Debug, Clone)]
pub struct VmConfigBuilder {
    config: VmConfig,
}

impl VmConfigBuilder {
    /// A VM with one CPU and 1 GiB of memory that boots `boot`.
    pub fn new(boot: impl Into<Boot>) -> Self {
        Self {
            config: VmConfig {
                boot: boot.into(),
                memory: Bytes(1024 * MIB),
                topology: Topology::flat(1),
                accel: Accel::Tcg,
                machine: Machine::Microvm,
                shares: Vec::new(),
                disks: Vec::new(),
                sandbox: true,
                network: NetworkMode::None,
                lans: Vec::new(),
                vsock: None,
                rng: false,
                channel: AgentChannel::Virtio,
                pluggable: false,
                qemu_args: Vec::new(),
            },
        }
    }

    /// Sets the RAM.
    pub fn memory(mut self, memory: Bytes) -> Self {
        self.config.memory = memory;
        self
    }

    /// Sets the CPUs.
    pub fn topology(mut self, topology: Topology) -> Self {
        self.config.topology = topology;
        self
    }

    /// Sets who executes instructions.
    pub fn accel(mut self, accel: Accel) -> Self {
        self.config.accel = accel;
        self
    }

    /// Sets the board.
    pub fn machine(mut self, machine: Machine) -> Self {
        self.config.machine = machine;
        self
    }

    /// Adds a host directory.
    pub fn share(mut self, share: ShareDevice) -> Self {
        self.config.shares.push(share);
        self
    }

    /// Adds a disk.
    pub fn disk(mut self, disk: DiskDevice) -> Self {
        self.config.disks.push(disk);
        self
    }

    /// Sets whether the threads that serve the guest and run it are restricted.
    pub fn sandbox(mut self, sandbox: bool) -> Self {
        self.config.sandbox = sandbox;
        self
    }

    /// Sets the network.
    pub fn network(mut self, network: NetworkMode) -> Self {
        self.config.network = network;
        self
    }

    /// Adds an interface on a network of VMs.
    pub fn lan(mut self, lan: LanDevice) -> Self {
        self.config.lans.push(lan);
        self
    }

    /// Adds streams to programs of the host.
    pub fn vsock(mut self, vsock: VsockDevice) -> Self {
        self.config.vsock = Some(vsock);
        self
    }

    /// Gives it a source of random numbers.
    #[must_use]
    pub fn rng(mut self, rng: bool) -> Self {
        self.config.rng = rng;
        self
    }

    /// Sets how the agent is reached.
    pub fn channel(mut self, channel: AgentChannel) -> Self {
        self.config.channel = channel;
        self
    }

    /// Sets whether something can be plugged in later.
    pub fn pluggable(mut self, pluggable: bool) -> Self {
        self.config.pluggable = pluggable;
        self
    }

    /// Adds arguments for QEMU.
    pub fn qemu_args(mut self, args: impl IntoIterator<Item = String>) -> Self {
        self.config.qemu_args.extend(args);
        self
    }

    /// Checks everything that can be known before a VM is started.
    ///
    /// # Errors
    /// The first thing that cannot work.
    pub fn build(self) -> Result<VmConfig, ConfigError> {
        let config = self.config;
        if let Some(KernelBoot { image, arch, .. }) = config.boot.kernel()
            && *arch != Arch::HOST
        {
            let path = image.clone();
            return Err(ConfigError::ArchMismatch { path, kernel: *arch, host: Arch::HOST });
        }
        if config.memory < MIN_MEMORY || config.memory > MAX_MEMORY {
            return Err(ConfigError::Memory { asked: config.memory });
        }
        let topology = config.topology;
        if !topology.cpus().is_some_and(|cpus| (1..=MAX_CPUS).contains(&cpus)) {
            return Err(ConfigError::Cpus { topology });
        }
        let nodes = u64::from(topology.nodes);
        if nodes > 1 && !config.memory.0.is_multiple_of(nodes * MIB) {
            return Err(ConfigError::NodeMemory { nodes: topology.nodes, memory: config.memory });
        }
        let lacks = |what| Err(ConfigError::Machine { machine: config.machine.name(), what });
        if config.machine == Machine::Microvm {
            if topology.nodes > 1 {
                return lacks("NUMA nodes");
            }
            if topology.llcs > 1 {
                return lacks("several last-level caches");
            }
            if config.channel == AgentChannel::Serial {
                return lacks("second serial port, which a kernel without virtio consoles needs");
            }
        }
        if config.machine != Machine::Q35 && config.boot.kernel().is_none() {
            return lacks("firmware that starts disks");
        }
        check_boot(&config.boot)?;
        check_shares(&config.shares)?;
        check_disks(&config.disks)?;
        config.vsock.iter().try_for_each(|vsock| vsock.check(&config.shares))?;
        Ok(config)
    }
}
