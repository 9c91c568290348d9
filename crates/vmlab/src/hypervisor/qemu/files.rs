//! The file servers of a VM: one for each share over virtio-fs, in this process.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::process::{Resource, getrlimit};
use vmlab_devices::Device;
use vmlab_devices::fs::{CachePolicy, Fs, Passthrough, PassthroughConfig, Server};
use vmlab_devices::transport::vhost_user::{self, Served};

use super::super::HypervisorError;
use crate::config::{Caching, ShareDevice, VmConfig};
use crate::error::chain;

/// Queues for requests of one share.
const REQUEST_QUEUES: u32 = 1;

/// With fewer descriptors than this, a server would open the same directories again and again.
const FEWEST_DESCRIPTORS: usize = 16;

/// File servers that wait for their connections.
pub(super) struct FileServers(Vec<(PathBuf, Arc<dyn Device>)>);

/// A file server that is connected.
pub(super) struct FileServer {
    path: PathBuf,
    served: Served,
}

impl FileServers {
    /// Opens the directories of all shares over virtio-fs. A guest's sync(2) waits for the host's disks
    /// as long as `durable` says so. The process has file servers for so many `vms`.
    ///
    /// # Errors
    /// One cannot be opened.
    pub(super) fn of(
        config: &VmConfig,
        vms: usize,
        durable: &Arc<AtomicBool>,
    ) -> Result<Self, HypervisorError> {
        let descriptors = descriptors(vms * config.served_shares().count());
        config
            .served_shares()
            .map(|share| {
                let source = |source| HypervisorError::Share { path: share.path.clone(), source };
                let device = device(share, config.sandbox, descriptors, durable);
                Ok((share.path.clone(), device.map_err(source)?))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// Starts them on their ends of the connections.
    ///
    /// # Errors
    /// No more threads or descriptors.
    pub(super) fn serve(self, connections: Vec<UnixStream>) -> io::Result<Vec<FileServer>> {
        let pairs = self.0.into_iter().zip(connections);
        pairs
            .map(|((path, device), connection)| {
                vhost_user::serve(device, connection).map(|served| FileServer { path, served })
            })
            .collect()
    }
}

impl FileServer {
    /// Waits until it has nobody to serve any more. `ended` says whether that is because QEMU ends, and
    /// else what happened is said.
    pub(super) fn wait(self, ended: impl FnOnce() -> bool) -> Option<String> {
        let Self { path, served } = self;
        let path = path.display();
        match served.wait() {
            Err(error) => Some(format!("the file server of {path} ended: {}", chain(&error))),
            Ok(()) if ended() => None,
            Ok(()) => Some(format!("the file server of {path} has lost its connection to QEMU")),
        }
    }
}

/// How many descriptors each of so many servers may keep of what is used: half of what the process has for all
/// of them. The rest is for what guests really open, and for the VMs themselves.
fn descriptors(servers: usize) -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let part = usize::try_from(limit / 2).unwrap_or(usize::MAX) / servers.max(1);
    PassthroughConfig::default().max_descriptors.min(part.max(FEWEST_DESCRIPTORS))
}

fn device(
    share: &ShareDevice,
    sandbox: bool,
    max_descriptors: usize,
    durable: &Arc<AtomicBool>,
) -> io::Result<Arc<dyn Device>> {
    let cache = match share.caching {
        Caching::Fixed => CachePolicy::Fixed,
        Caching::Coherent => CachePolicy::Coherent,
    };
    // What does not change may lie under an overlay.
    let submounts = share.caching == Caching::Coherent;
    let read_only = share.read_only;
    let durable = Arc::clone(durable);
    let config = PassthroughConfig {
        read_only,
        cache,
        submounts,
        max_descriptors,
        durable,
        sandbox,
        ..Default::default()
    };
    let server = Server::new(Passthrough::new(&share.path, config)?);
    Ok(Arc::new(Fs::new(server, &share.tag, REQUEST_QUEUES)))
}
