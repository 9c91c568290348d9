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
use super::devices::{disk_id, share_id};
use crate::config::{Caching, DiskDevice, DiskWrites, ShareDevice, ShareTransport, VmConfig};
use crate::error::chain;

/// Queues for requests of one share.
const REQUEST_QUEUES: u32 = 1;

/// With fewer descriptors than this, a server would open the same directories again and again.
const FEWEST_DESCRIPTORS: usize = 16;

/// Servers that wait for their connections.
pub(super) struct Servers {
    waiting: Vec<Waiting>,
    /// Those of shares, by their tags.
    shares: Vec<FileServer>,
    /// The guest goes on with devices that it had.
    goes_on: bool,
}

/// The file server of a share, by its tag.
pub(super) type FileServer = (String, Arc<Fs<Passthrough>>);

struct Waiting {
    id: String,
    /// What it is for a person.
    what: String,
    device: Arc<dyn Device>,
}

/// A server that is connected.
pub(super) struct Server {
    id: String,
    what: String,
    served: Served,
}

impl Servers {
    /// Opens the directories of all shares over virtio-fs, and the files of disks of our own. A guest's sync(2) waits for the host's disks
    /// as long as `durable` says so. The process has file servers for so many `vms`. Where the guest goes on
    /// with file servers that it had, those are given in `known`.
    ///
    /// # Errors
    /// One cannot be opened.
    pub(super) fn of(
        config: &VmConfig,
        vms: usize,
        durable: &Arc<AtomicBool>,
        known: Option<&[FileServer]>,
    ) -> Result<Self, HypervisorError> {
        let descriptors = descriptors(vms * config.served_shares().count());
        let goes_on = known.is_some();
        let known = known.unwrap_or_default();
        let mut servers = Self { waiting: Vec::new(), shares: Vec::new(), goes_on };
        for (index, share) in config.shares.iter().enumerate() {
            if share.transport != ShareTransport::VirtioFs {
                continue;
            }
            let source = |source| HypervisorError::Share { path: share.path.clone(), source };
            let device = match known.iter().find(|(tag, _)| *tag == share.tag) {
                Some((_, known)) => duplicate(known, durable),
                None => device(share, config.sandbox, descriptors, durable),
            };
            let device = device.map_err(source)?;
            servers.shares.push((share.tag.clone(), Arc::clone(&device)));
            let what = format!("the file server of {}", share.path.display());
            servers.waiting.push(Waiting { id: share_id(index), what, device });
        }
        for (disk, options) in config.served_disks() {
            servers.waiting.push(Waiting::of_disk(disk, options)?);
        }
        Ok(servers)
    }

    /// The server of a disk alone, in any case one of our own.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(super) fn of_disk(disk: &DiskDevice) -> Result<Self, HypervisorError> {
        let options = disk.serve.as_ref().ok_or(HypervisorError::NotPluggable)?;
        let waiting = vec![Waiting::of_disk(disk, options)?];
        Ok(Self { waiting, shares: Vec::new(), goes_on: false })
    }

    pub(super) fn count(&self) -> usize {
        self.waiting.len()
    }

    /// The file servers.
    pub(super) fn file_servers(&self) -> Vec<FileServer> {
        self.shares.clone()
    }

    /// Starts them on their ends of the connections.
    ///
    /// # Errors
    /// No more threads or descriptors.
    pub(super) fn serve(self, connections: Vec<UnixStream>) -> io::Result<Vec<Server>> {
        let serve = if self.goes_on { vhost_user::serve_on } else { vhost_user::serve };
        let pairs = self.waiting.into_iter().zip(connections);
        pairs
            .map(|(Waiting { id, what, device }, connection)| {
                serve(device, connection).map(|served| Server { id, what, served })
            })
            .collect()
    }
}

impl Waiting {
    fn of_disk(disk: &DiskDevice, options: &blk::Options) -> Result<Self, HypervisorError> {
        let path = disk.path.display();
        let said = |why: String| HypervisorError::Disk { said: format!("{path}: {why}") };
        let device = Arc::new(open(disk, options).map_err(said)?);
        let what = format!("the server of the disk `{}` ({path})", disk.serial);
        Ok(Self { id: disk_id(&disk.serial), what, device })
    }
}

impl Server {
    /// The name of its device's back end.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Waits until it has nobody to serve any more. `ended` says whether that is because QEMU or its device
    /// goes, and else what happened is said.
    pub(super) fn wait(self, ended: impl FnOnce() -> bool) -> Option<String> {
        let Self { what, served, id: _ } = self;
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
) -> io::Result<Arc<Fs<Passthrough>>> {
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

/// A file server that goes on where another one is, for a guest that does.
pub(super) fn duplicate(
    server: &Fs<Passthrough>,
    durable: &Arc<AtomicBool>,
) -> io::Result<Arc<Fs<Passthrough>>> {
    server.duplicate(Arc::clone(durable)).map(Arc::new)
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
