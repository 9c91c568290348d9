//! The boundary between vmlab and whatever runs a VM.

mod choice;
mod console;
mod fate;
pub mod kvm;
mod panic;
pub mod qemu;
mod served;
mod snapshot;

use std::ffi::OsString;
use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use thiserror::Error;

use vmlab_artifacts::Cache;
use vmlab_artifacts::image::ImageFormat;
use vmlab_vmm::probe::KvmUnusable;
use vmlab_vmm::x86_64::boot::KernelError;

pub use choice::HypervisorChoice;
pub use console::SerialConsole;
pub(crate) use console::printable;
pub(crate) use snapshot::DeviceId;
pub use snapshot::{Hints, Memory, Origin, RunDevices, Snapshot};

pub use crate::lan::LanPort;
pub use crate::report::ExitCount;

use crate::config::{
    Accel, ConfigError, DiskDevice, Machine, NetworkMode, ShareTransport, VmConfig,
};

/// A program or library that can run VMs.
///
/// Implementations hold no VM; one value serves any number of them, from any thread.
pub trait Hypervisor: Send + Sync {
    /// The name that users choose it by.
    fn name(&self) -> &'static str;

    /// Finds out whether it is there at all, without running anything.
    ///
    /// # Errors
    /// What is missing, and how to get it.
    fn find(&self) -> Result<(), HypervisorError>;

    /// Finds out whether it can be used on this host, and which one it is.
    ///
    /// # Errors
    /// What is missing, and how to get it.
    fn probe(&self) -> Result<ProbeReport, HypervisorError>;

    /// What its VMs can do.
    fn capabilities(&self) -> Capabilities;

    /// Checks that it can start a kernel, given its boot image.
    ///
    /// # Errors
    /// [`HypervisorError::Kernel`] with why it cannot.
    fn check_kernel(&self, image: &Path) -> Result<(), HypervisorError> {
        let _ = image;
        Ok(())
    }

    /// What a snapshot depends on besides the VM's configuration: this hypervisor's program, and what of
    /// the host its VMs can see. A snapshot is of use only where this is the same. `None` when it takes
    /// none. What was worked out from files is remembered in `cache`.
    ///
    /// # Errors
    /// What is missing, and how to get it.
    fn snapshot_identity(
        &self,
        config: &VmConfig,
        cache: &Cache,
    ) -> Result<Option<String>, HypervisorError> {
        let _ = (config, cache);
        Ok(None)
    }

    /// Starts a VM. It runs when this returns, and is gone when the handle is dropped or this process
    /// ends in any way.
    ///
    /// # Errors
    /// When the VM could not be started. Nothing is then left running.
    fn start(
        &self,
        config: &VmConfig,
        options: StartOptions,
    ) -> Result<Arc<dyn VmHandle>, HypervisorError>;

    /// What [`start`](Self::start) would execute, for a person to read; empty when it runs no program.
    fn command_line(&self, config: &VmConfig) -> Vec<OsString>;
}

/// A running VM, or one that has ended. All methods may be called from any thread at any time.
pub trait VmHandle: Send + Sync + fmt::Debug {
    /// What it is doing now.
    fn state(&self) -> VmState;

    /// Waits until the VM has ended, or until the deadline. Once it has ended, every call returns the
    /// same reason at once.
    fn wait(&self, deadline: Option<Instant>) -> Option<ExitReason>;

    /// The host's end of the channel to the agent. It can be taken once; the second call gives `None`.
    fn take_agent_channel(&self) -> Option<UnixStream>;

    /// The host's end of the channel to qemu-guest-agent, where a VM starts an image's own system. It can be
    /// taken once.
    fn take_guest_agent_channel(&self) -> Option<UnixStream> {
        None
    }

    /// What the guest writes to its first serial port.
    fn serial(&self) -> &SerialConsole;

    /// Stops all CPUs.
    ///
    /// # Errors
    /// When the VM has ended or does not answer.
    fn pause(&self) -> Result<(), HypervisorError>;

    /// Lets the CPUs go on.
    ///
    /// # Errors
    /// When the VM has ended or does not answer.
    fn resume(&self) -> Result<(), HypervisorError>;

    /// Presses the power button. The guest decides what follows; [`wait`](Self::wait) tells.
    ///
    /// # Errors
    /// When the VM has ended or does not answer.
    fn shutdown(&self) -> Result<(), HypervisorError>;

    /// Stops all CPUs for good and takes a snapshot of a VM that was started for it and has no devices of
    /// a run yet, or of a [pluggable](VmConfig::pluggable) one in the midst of a run. The VM is of no more use
    /// then; another can go on from the snapshot.
    ///
    /// # Errors
    /// When the VM was not started for it, has ended, or does not answer.
    fn snapshot(&self) -> Result<Snapshot, HypervisorError>;

    /// The slots behind the bridge whose devices a snapshot replaces, which the guest has to know of before
    /// and after it.
    fn replaced_slots(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Plugs a disk into a [pluggable](VmConfig::pluggable) VM. The guest is not told.
    ///
    /// # Errors
    /// When the disk cannot be used, there is no room for it, or the VM has ended.
    fn attach_disk(&self, disk: &DiskDevice) -> Result<(), HypervisorError> {
        let _ = disk;
        Err(HypervisorError::NotPluggable)
    }

    /// Whether a disk can be taken out.
    fn can_detach(&self, serial: &str) -> bool {
        let _ = serial;
        false
    }

    /// Takes a disk out, by its serial number. The guest is not asked. Its file is free when this returns.
    ///
    /// # Errors
    /// When there is no such disk, or the VM has ended.
    fn detach_disk(&self, serial: &str) -> Result<(), HypervisorError> {
        let _ = serial;
        Err(HypervisorError::NotPluggable)
    }

    /// How often its CPUs have left the guest, by reason; nothing where that is not counted.
    fn exits(&self) -> Vec<ExitCount> {
        Vec::new()
    }

    /// Says that the VM is about to end: what the guest writes back from now on has to reach the host, but
    /// need not wait for the host's disks and for all that others write to them.
    fn wind_down(&self);

    /// Ends the VM at once, for the given reason, unless it has ended already. Returns when it is gone.
    fn kill(&self, reason: ExitReason);
}

/// Things of one start that are not part of what the VM is.
#[derive(Debug, Clone)]
pub struct StartOptions {
    /// Directory for this run's logs. It exists and is private to the user.
    pub log_dir: PathBuf,
    /// When to end the VM with [`ExitReason::Timeout`].
    pub deadline: Option<Instant>,
    /// How it begins.
    pub origin: Origin,
    /// One for each of the configuration's [`lans`](VmConfig::lans), in their order, to be dropped when the VM has
    /// ended.
    pub lans: Vec<Arc<LanPort>>,
    /// How many VMs of this process may run at the same time. What each has of the process's open files
    /// is divided by that.
    pub vms: usize,
}

/// What carries virtio devices, and so which driver a guest needs to find them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VirtioBus {
    /// They are on a PCI bus.
    Pci,
    /// Their registers are at fixed addresses, which ACPI or a device tree lists.
    Mmio,
}

/// What a VM can be asked to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Capabilities {
    /// Whether it can run guests without KVM.
    pub tcg: bool,
    /// Whether it has firmware, which starts systems of disks.
    pub firmware: bool,
    /// Boards it can be.
    pub machines: Vec<Machine>,
    /// Where the guest finds its virtio devices, on whichever board.
    pub bus: VirtioBus,
    /// How host directories can be carried.
    pub shares: Vec<ShareTransport>,
    /// Networks it can have.
    pub networks: Vec<NetworkMode>,
    /// Whether it can be on networks of VMs.
    pub lans: bool,
    /// Whether it has streams between guest and host.
    pub vsock: bool,
    /// How many devices a run can bring, where there is a limit that is lower than QEMU's.
    pub devices: Option<usize>,
    /// Whether disks can be in other formats than raw.
    pub disk_formats: bool,
    /// Whether arguments can be handed through to QEMU.
    pub qemu_args: bool,
    /// Whether it can be stopped and continued.
    pub pause: bool,
    /// Whether snapshots can be taken and restored.
    pub snapshot: bool,
    /// Whether devices that this process serves are part of its snapshots: a guest that goes on from one finds
    /// them as it left them, and has nothing to revive.
    pub keeps_devices: bool,
    /// Whether VMs can be [pluggable](VmConfig::pluggable).
    pub pluggable: bool,
}

impl Capabilities {
    /// Checks that a VM of the hypervisor with this name can be what is asked for.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`] with the first thing that it cannot be.
    pub fn check(&self, hypervisor: &'static str, config: &VmConfig) -> Result<(), ConfigError> {
        let raw = |disk: &DiskDevice| disk.format == ImageFormat::Raw;
        let needs = [
            ("TCG", self.tcg || config.accel != Accel::Tcg),
            ("systems of images", self.firmware || config.boot.kernel().is_some()),
            ("disks that are not raw", self.disk_formats || config.disks.iter().all(raw)),
            ("this machine", self.machines.contains(&config.machine)),
            (
                "shares of this kind",
                config.shares.iter().all(|share| self.shares.contains(&share.transport)),
            ),
            ("this network", self.networks.contains(&config.network)),
            ("devices that are plugged in later", self.pluggable || !config.pluggable),
            ("networks of VMs", self.lans || config.lans.is_empty()),
            ("vsock", self.vsock || config.vsock.is_none()),
            ("so many devices", self.devices.is_none_or(|most| config.devices() <= most)),
            ("arguments for QEMU", self.qemu_args || config.qemu_args.is_empty()),
        ];
        match needs.iter().find(|(_, can)| !can) {
            Some((what, _)) => Err(ConfigError::Unsupported { hypervisor, what }),
            None => Ok(()),
        }
    }
}

/// A hypervisor that can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProbeReport {
    /// Its program.
    pub program: PathBuf,
    /// Its version, as it says it.
    pub version: String,
}

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum VmState {
    /// Its CPUs run.
    Running,
    /// Its CPUs are stopped.
    Paused,
    /// It is gone.
    Ended,
}

/// Why a VM has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ExitReason {
    /// The guest powered itself off.
    Shutdown,
    /// The guest reset itself.
    Reset,
    /// The guest's kernel panicked, with this message where it was seen.
    GuestPanic(Option<String>),
    /// The guest's CPU gave up: a fault while handling a fault while handling a fault.
    TripleFault,
    /// The host ended it.
    Killed,
    /// It ran for longer than it was allowed to.
    Timeout,
    /// KVM could not go on with the guest's processor, with what is known of it.
    ProcessorFailed(String),
    /// The hypervisor itself ended or broke, with what it said.
    MonitorFailed(String),
    /// A device that vmlab serves cannot go on, with which one it is and what happened.
    DeviceFailed(String),
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("the guest powered itself off"),
            Self::Reset => f.write_str("the guest reset itself"),
            Self::GuestPanic(None) => f.write_str("the guest's kernel panicked"),
            Self::GuestPanic(Some(message)) => write!(f, "the guest's kernel panicked: {message}"),
            Self::TripleFault => f.write_str("the guest's CPU reset itself after a triple fault"),
            Self::Killed => f.write_str("the VM was killed"),
            Self::Timeout => f.write_str("the VM ran into its time limit"),
            Self::ProcessorFailed(what) => {
                write!(f, "KVM could not go on with the guest's processor: {what}")
            }
            Self::MonitorFailed(what) => write!(f, "the hypervisor failed: {what}"),
            Self::DeviceFailed(what) => f.write_str(what),
        }
    }
}

/// An error of the host, which lacks something that a VM needs.
fn resource(what: &'static str) -> impl FnOnce(std::io::Error) -> HypervisorError {
    move |source| HypervisorError::Resource { what, source }
}

/// A hypervisor that cannot do what it was asked for.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HypervisorError {
    /// Its program is not there.
    #[error(
        "{program} was not found in PATH; install QEMU (Debian and Ubuntu: apt-get install {package})"
    )]
    NotFound {
        /// The program.
        program: String,
        /// Debian's name of the package that has it.
        package: &'static str,
    },
    /// Its program could not be run.
    #[error("{program} could not be run")]
    Run {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its program cannot be read.
    #[error("{} cannot be read, to tell it from other versions of it", program.display())]
    Identify {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The host could not provide what a VM needs.
    #[error("{what} could not be made for the VM")]
    Resource {
        /// What was needed.
        what: &'static str,
        /// Why it was not there.
        #[source]
        source: std::io::Error,
    },
    /// A log cannot be made: the disk is full, or its directory is gone.
    #[error("the log {} cannot be made", path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A share's directory cannot be served.
    #[error("{} cannot be shared", path.display())]
    Share {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The sockets of a VM's vsock cannot be made.
    #[error("{} cannot be used for the VM's vsock", dir.display())]
    Vsock {
        /// The directory that they were to be in.
        dir: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended or refused before the VM ran.
    #[error("the VM was not started: {said}")]
    Refused {
        /// What it said.
        said: String,
    },
    /// It cannot use a disk, such as one that another VM writes to.
    #[error("a disk cannot be used: {said}")]
    Disk {
        /// What it said.
        said: String,
    },
    /// Nothing can be plugged into the VM.
    #[error("nothing can be plugged into this VM, as it was not started so (VmBuilder::pluggable)")]
    NotPluggable,
    /// It has no more places for devices.
    #[error("there is no more room for devices: {most} fit")]
    Full {
        /// How many there are.
        most: u32,
    },
    /// A disk is not there, or has its place for good.
    #[error("no disk `{serial}` is plugged in that could be taken out")]
    NoSuchDisk {
        /// Its serial number.
        serial: String,
    },
    /// vmlab's own monitor cannot start a kernel.
    #[error("vmlab's own monitor cannot start {}; QEMU may (--hypervisor qemu)", image.display())]
    Kernel {
        /// Its boot image.
        image: PathBuf,
        /// Why not.
        #[source]
        source: KernelError,
    },
    /// KVM cannot be used.
    #[error("KVM cannot be used on this host")]
    Kvm(#[from] KvmUnusable),
    /// vmlab's own monitor cannot do what a VM needs.
    #[error("the VM cannot be run")]
    Monitor(#[from] vmlab_vmm::Error),
    /// The network of a VM cannot be started.
    #[error("the VM cannot reach the network")]
    Network(#[source] vmlab_devices::net::StartError),
    /// A command to a running VM failed.
    #[error("the VM did not take the command `{command}`: {said}")]
    Command {
        /// The command.
        command: &'static str,
        /// What it said.
        said: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_device_that_failed_is_none_but_itself_to_people_and_programs() {
        let said = "the network ended, as passt did: no route";
        let reason = ExitReason::DeviceFailed(said.to_owned());
        assert_eq!(reason.to_string(), said);
        assert_eq!(serde_json::to_value(&reason).unwrap(), json!({ "device_failed": said }));
    }
}
