//! VMs run by vmlab's own monitor, in this process.

mod places;
mod vm;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use vmlab_artifacts::{Cache, ContentKey, find_program};
use vmlab_vmm::probe;

use super::{
    Capabilities, Hypervisor, HypervisorError, ProbeReport, StartOptions, VirtioBus, VmHandle,
};
use crate::config::{Machine, NetworkMode, ShareTransport, VmConfig};
use crate::identity::{of_this_program, processor};
use vm::KvmVm;

/// The host's device.
const DEVICE: &str = "/dev/kvm";

/// What carries the packets of guests on the user's network.
const PASST: &str = "passt";

/// vmlab's own monitor, which runs guests by KVM.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kvm;

impl Hypervisor for Kvm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn find(&self) -> Result<(), HypervisorError> {
        Ok(probe::makes_a_vm()?)
    }

    fn probe(&self) -> Result<ProbeReport, HypervisorError> {
        let version = probe::prove()?.to_string();
        Ok(ProbeReport { program: PathBuf::from(DEVICE), version })
    }

    fn capabilities(&self) -> Capabilities {
        let mut networks = vec![NetworkMode::None];
        if find_program(PASST).is_some() {
            networks.push(NetworkMode::User);
        }
        Capabilities {
            tcg: false,
            machines: vec![Machine::Native],
            bus: VirtioBus::Mmio,
            shares: vec![ShareTransport::VirtioFs],
            networks,
            lans: true,
            vsock: true,
            disk_formats: false,
            qemu_args: false,
            pause: true,
            snapshot: true,
            keeps_devices: true,
            pluggable: true,
        }
    }

    fn snapshot_identity(
        &self,
        _: &VmConfig,
        _: &Cache,
    ) -> Result<Option<String>, HypervisorError> {
        let read =
            |source| HypervisorError::Resource { what: "the processor's description", source };
        let uname = rustix::system::uname();
        // What state there is of a processor is the host's kernel's to say.
        let key = of_this_program(ContentKey::new("kvm"))
            .field("release", uname.release().to_bytes())
            .field("version", uname.version().to_bytes())
            .field("processor", processor().map_err(read)?);
        Ok(Some(key.finish()))
    }

    fn start(
        &self,
        config: &VmConfig,
        options: StartOptions,
    ) -> Result<Arc<dyn VmHandle>, HypervisorError> {
        Ok(Arc::new(KvmVm::start(config, options)?))
    }

    fn command_line(&self, _: &VmConfig) -> Vec<OsString> {
        Vec::new()
    }
}
