//! VMs run by QEMU.

mod command;
mod devices;
mod files;
mod identity;
mod memory;
mod plug;
mod process;
#[cfg(target_arch = "x86_64")]
mod proof;
mod qmp;
mod reset_kernel;
mod sockets;
mod supervise;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vmlab_artifacts::{Arch, Cache, find_program};

use super::{
    Capabilities, Hypervisor, HypervisorError, ProbeReport, StartOptions, VirtioBus, VmHandle,
};
use crate::config::{Machine, NetworkMode, ShareTransport, VmConfig};
use command::{Descriptors, arguments};
use process::QemuVm;

/// QEMU's system emulator, found in `PATH`.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: String,
}

impl Default for Qemu {
    fn default() -> Self {
        Self { program: format!("qemu-system-{}", Arch::HOST.machine()) }
    }
}

impl Qemu {
    /// QEMU for guests of the host's architecture.
    pub fn new() -> Self {
        Self::default()
    }

    /// Another QEMU: a name that is looked for in `PATH`, or a path.
    pub fn with_program(program: impl AsRef<Path>) -> Self {
        Self { program: program.as_ref().to_string_lossy().into_owned() }
    }

    /// Debian's name of the package that has it.
    const PACKAGE: &str = match Arch::HOST {
        Arch::X86_64 => "qemu-system-x86",
        Arch::Aarch64 => "qemu-system-arm",
    };

    /// Where the program is.
    ///
    /// # Errors
    /// When it is in no directory of `PATH`.
    pub fn program(&self) -> Result<PathBuf, HypervisorError> {
        find_program(&self.program).ok_or_else(|| HypervisorError::NotFound {
            program: self.program.clone(),
            package: Self::PACKAGE,
        })
    }
}

impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn find(&self) -> Result<(), HypervisorError> {
        self.program().map(drop)
    }

    fn probe(&self) -> Result<ProbeReport, HypervisorError> {
        let program = self.program()?;
        let run = |source| HypervisorError::Run { program: self.program.clone(), source };
        let output = Command::new(&program).arg("--version").output().map_err(run)?;
        let said = String::from_utf8_lossy(&output.stdout);
        match said.lines().next() {
            Some(version) if output.status.success() => {
                Ok(ProbeReport { program, version: version.to_owned() })
            }
            _ => Err(HypervisorError::Refused {
                said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            }),
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            tcg: true,
            firmware: true,
            devices: None,
            machines: vec![Machine::Microvm, Machine::Q35],
            bus: VirtioBus::Pci,
            shares: vec![ShareTransport::VirtioFs, ShareTransport::NineP],
            networks: vec![NetworkMode::None, NetworkMode::User],
            lans: true,
            vsock: true,
            disk_formats: true,
            qemu_args: true,
            pause: true,
            snapshot: true,
            keeps_devices: false,
            pluggable: true,
        }
    }

    fn snapshot_identity(
        &self,
        config: &VmConfig,
        cache: &Cache,
    ) -> Result<Option<String>, HypervisorError> {
        let program = self.fingerprint(cache)?;
        let read =
            |source| HypervisorError::Resource { what: "the processor's description", source };
        let processor = crate::identity::processor().map_err(read)?;
        let line = self.command_line(config);
        Ok(Some(format!("{program} {line:?} {processor}")))
    }

    fn start(
        &self,
        config: &VmConfig,
        options: StartOptions,
    ) -> Result<Arc<dyn VmHandle>, HypervisorError> {
        Ok(Arc::new(QemuVm::start(&self.program()?, config, options)?))
    }

    fn command_line(&self, config: &VmConfig) -> Vec<OsString> {
        let program = self.program().unwrap_or_else(|_| PathBuf::from(&self.program));
        let image = config.boot.kernel().is_none();
        let mut inherited = 7..;
        let servers = inherited.by_ref().take(config.servers()).collect();
        let lans = inherited.take(config.lans.len()).collect();
        let fds = Descriptors {
            console: 3,
            agent: 4,
            qmp: 5,
            guest_agent: image.then_some(6),
            servers,
            lans,
            memory: None,
            incoming: false,
            reset_kernel: None,
            on_bridge: Vec::new(),
        };
        let mut line = vec![program.into_os_string()];
        line.extend(arguments(config, &fds, Path::new("cpu.log")));
        line
    }
}
