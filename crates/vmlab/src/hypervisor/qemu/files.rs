//! The servers of a VM in this process: one for each share over virtio-fs, and for each disk of our own.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vmlab_devices::Device;
use vmlab_devices::blk;
use vmlab_devices::transport::vhost_user::{self, Served};

use super::super::HypervisorError;
use super::super::served::{self, FileServer};
use super::devices::{RNG, VSOCK, disk_id, share_id};
use crate::config::{DiskDevice, ShareTransport, VmConfig};
use crate::error::chain;

/// Servers that wait for their connections.
pub(super) struct Servers {
    waiting: Vec<Waiting>,
    /// Those of shares, by their tags.
    shares: Vec<FileServer>,
    /// The guest goes on with devices that it had.
    goes_on: bool,
}

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
    /// Opens the directories of all shares over virtio-fs, the files of disks of our own, and the sockets of a vsock.
    /// A guest's sync(2) waits for the host's disks as long as `durable` says so. The process has file servers for so many `vms`. Where the guest goes on
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
        let descriptors = served::descriptors(vms * config.served_shares().count());
        let goes_on = known.is_some();
        let known = known.unwrap_or_default();
        let mut servers = Self { waiting: Vec::new(), shares: Vec::new(), goes_on };
        for (index, share) in config.shares.iter().enumerate() {
            if share.transport != ShareTransport::VirtioFs {
                continue;
            }
            let source = |source| HypervisorError::Share { path: share.path.clone(), source };
            let device = match known.iter().find(|(tag, _)| *tag == share.tag) {
                Some((_, known)) => served::duplicate(known, durable),
                None => served::share(share, config.sandbox, descriptors, durable),
            };
            let device = device.map_err(source)?;
            servers.shares.push((share.tag.clone(), Arc::clone(&device)));
            let what = served::name_of_share(share);
            servers.waiting.push(Waiting { id: share_id(index), what, device });
        }
        for (disk, options) in config.served_disks() {
            servers.waiting.push(Waiting::of_disk(disk, options, config.sandbox)?);
        }
        if let Some(vsock) = &config.vsock {
            let (device, what) = served::vsock(vsock, config.sandbox)?;
            servers.waiting.push(Waiting { id: VSOCK.to_owned(), what, device });
        }
        if config.rng {
            let (device, what) = served::rng(config.sandbox);
            servers.waiting.push(Waiting { id: RNG.to_owned(), what, device });
        }
        Ok(servers)
    }

    /// The server of a disk alone, in any case one of our own.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(super) fn of_disk(disk: &DiskDevice, sandbox: bool) -> Result<Self, HypervisorError> {
        let options = disk.serve.as_ref().ok_or(HypervisorError::NotPluggable)?;
        let waiting = vec![Waiting::of_disk(disk, options, sandbox)?];
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
    fn of_disk(
        disk: &DiskDevice,
        options: &blk::Options,
        sandbox: bool,
    ) -> Result<Self, HypervisorError> {
        let (device, what) = served::disk(disk, options, sandbox)?;
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
