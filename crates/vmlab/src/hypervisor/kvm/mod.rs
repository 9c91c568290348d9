//! VMs run by vmlab's own monitor, in this process.

mod places;
mod vm;

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use vmlab_artifacts::{Cache, ContentKey, find_program};
use vmlab_vmm::probe;
use vmlab_vmm::x86_64::boot::{KernelError, check};

use super::{
    Capabilities, Hypervisor, HypervisorError, ProbeReport, StartOptions, VirtioBus, VmHandle,
};
use crate::config::{Machine, NetworkMode, ShareTransport, VmConfig};
use crate::identity::{of_this_program, processor};
use vm::{KvmVm, MOST_DEVICES};

/// The host's device.
const DEVICE: &str = "/dev/kvm";

/// What carries the packets of guests on the user's network.
const PASST: &str = "passt";

/// vmlab's own monitor, which runs guests by KVM.
#[derive(Debug)]
pub struct Kvm {
    /// Whether it can have the user's network, once somebody has asked.
    user_network: LazyLock<bool>,
}

impl Kvm {
    /// The monitor on this host.
    pub fn new() -> Self {
        Self::on(|| find_program(PASST).is_some() && has_way_out())
    }

    /// The monitor on a host that has what the user's network takes, or not.
    fn on(user_network: fn() -> bool) -> Self {
        Self { user_network: LazyLock::new(user_network) }
    }
}

impl Default for Kvm {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether the host has a default route over IPv4, without which passt does not start.
fn has_way_out() -> bool {
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    is_way_out(&routes)
}

/// Whether one of these routes is a default one: its destination, in the second column, is 0.
fn is_way_out(routes: &str) -> bool {
    routes.lines().any(|line| line.split_whitespace().nth(1) == Some("00000000"))
}

impl Hypervisor for Kvm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn find(&self) -> Result<(), HypervisorError> {
        // That it makes VMs is part of choosing to use it.
        Ok(probe::opens()?)
    }

    fn probe(&self) -> Result<ProbeReport, HypervisorError> {
        let version = probe::prove()?.to_string();
        Ok(ProbeReport { program: PathBuf::from(DEVICE), version })
    }

    fn capabilities(&self) -> Capabilities {
        let mut networks = vec![NetworkMode::None];
        if *self.user_network {
            networks.push(NetworkMode::User);
        }
        Capabilities {
            tcg: false,
            firmware: false,
            devices: Some(MOST_DEVICES),
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

    fn check_kernel(&self, image: &Path) -> Result<(), HypervisorError> {
        let checked = File::open(image).map_err(KernelError::Read).and_then(|file| check(&file));
        checked.map_err(|source| HypervisorError::Kernel { image: image.to_owned(), source })
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::{Hypervisor, Kvm, NetworkMode, is_way_out};

    #[test]
    fn what_the_host_has_is_looked_for_once() {
        static LOOKS: AtomicUsize = AtomicUsize::new(0);
        let kvm = Kvm::on(|| LOOKS.fetch_add(1, Ordering::Relaxed) == 0);
        for _ in 0..3 {
            assert!(kvm.capabilities().networks.contains(&NetworkMode::User));
        }
        assert_eq!(LOOKS.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_default_route_is_a_way_out() {
        let head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n";
        let near = "eth0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\n";
        let default = "eth0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\n";
        assert!(is_way_out(&[head, near, default].concat()));
        assert!(!is_way_out(&[head, near].concat()));
        assert!(!is_way_out(""));
    }
}
