//! The servers of a VM in this process: one for each share over virtio-fs, and for each disk of our own.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::process::{Resource, getrlimit};
use vmlab_devices::Device;
use vmlab_devices::blk::{self, Blk, Source};
use vmlab_devices::fs::{self, CachePolicy, Fs, Passthrough, PassthroughConfig};
use vmlab_devices::transport::vhost_user::{self, Served};

use super::super::HypervisorError;
use crate::config::{Caching, DiskDevice, DiskWrites, ShareDevice, VmConfig};
use crate::error::chain;

/// Queues for requests of one share.
const REQUEST_QUEUES: u32 = 1;

/// With fewer descriptors than this, a server would open the same directories again and again.
const FEWEST_DESCRIPTORS: usize = 16;

/// Servers that wait for their connections, each with what it is for a person.
pub(super) struct Servers(Vec<(String, Arc<dyn Device>)>);

/// A server that is connected.
pub(super) struct Server {
    what: String,
    served: Served,
}

impl Servers {
    /// Opens the directories of all shares over virtio-fs, and the files of disks of our own. A guest's sync(2) waits for the host's disks
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
        let shares = config.served_shares().map(|share| {
            let source = |source| HypervisorError::Share { path: share.path.clone(), source };
            let device = device(share, config.sandbox, descriptors, durable).map_err(source)?;
            Ok((format!("the file server of {}", share.path.display()), device))
        });
        let disks = config.served_disks().map(|(disk, options)| {
            let path = disk.path.display();
            let said = |why: String| HypervisorError::Disk { said: format!("{path}: {why}") };
            let device: Arc<dyn Device> = Arc::new(open(disk, options).map_err(said)?);
            Ok((format!("the server of the disk `{}` ({path})", disk.serial), device))
        });
        shares.chain(disks).collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// Starts them on their ends of the connections.
    ///
    /// # Errors
    /// No more threads or descriptors.
    pub(super) fn serve(self, connections: Vec<UnixStream>) -> io::Result<Vec<Server>> {
        let pairs = self.0.into_iter().zip(connections);
        pairs
            .map(|((what, device), connection)| {
                vhost_user::serve(device, connection).map(|served| Server { what, served })
            })
            .collect()
    }
}

impl Server {
    /// Waits until it has nobody to serve any more. `ended` says whether that is because QEMU ends, and
    /// else what happened is said.
    pub(super) fn wait(self, ended: impl FnOnce() -> bool) -> Option<String> {
        let Self { what, served } = self;
        match served.wait() {
            Err(error) => Some(format!("{what} ended: {}", chain(&error))),
            Ok(()) if ended() => None,
            Ok(()) => Some(format!("{what} has lost its connection to QEMU")),
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
    let server = fs::Server::new(Passthrough::new(&share.path, config)?);
    Ok(Arc::new(Fs::new(server, &share.tag, REQUEST_QUEUES)))
}

/// The disk, or why there is none.
fn open(disk: &DiskDevice, options: &blk::Options) -> Result<Blk, String> {
    let writable = matches!(disk.writes, DiskWrites::Kept | DiskWrites::Cloned(_));
    let file = File::options().read(true).write(writable).open(&disk.path);
    let file = file.map_err(|error| error.to_string())?;
    let source = match disk.writes {
        DiskWrites::Refused => Source::ReadOnly(file),
        DiskWrites::Cloned(_) if disk.keep.is_none() => Source::Scratch(file),
        DiskWrites::Kept | DiskWrites::Cloned(_) => Source::Kept(file),
        DiskWrites::Discarded => Source::Discarded(file),
    };
    Blk::open(source, &disk.serial, options).map_err(|error| chain(&error))
}
