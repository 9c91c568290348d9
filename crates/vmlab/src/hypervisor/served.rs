//! The devices that this process serves to guests, whatever hypervisor they run in.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::process::{Resource, getrlimit};
use vmlab_devices::Device;
use vmlab_devices::blk::{self, Blk, Source};
use vmlab_devices::fs::{self, CachePolicy, Fs, Passthrough, PassthroughConfig};
use vmlab_devices::rng::Rng;

use super::HypervisorError;
use crate::config::{Caching, DiskDevice, DiskWrites, ShareDevice};
use crate::error::chain;
use crate::vsock::VsockDevice;

/// Queues for requests of one share.
const REQUEST_QUEUES: u32 = 1;

/// With fewer descriptors than this, a server would open the same directories again and again.
const FEWEST_DESCRIPTORS: usize = 16;

/// The file server of a share, by its tag.
pub(crate) type FileServer = (String, Arc<Fs<Passthrough>>);

/// How many descriptors each of so many servers may keep of what is used: half of what the process has for all
/// of them. The rest is for what guests really open, and for the VMs themselves.
pub(super) fn descriptors(servers: usize) -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let part = usize::try_from(limit / 2).unwrap_or(usize::MAX) / servers.max(1);
    PassthroughConfig::default().max_descriptors.min(part.max(FEWEST_DESCRIPTORS))
}

/// The server of a share over virtio-fs. `max_descriptors` is what it keeps of files that are in use, and a guest's
/// sync(2) waits for the host's disks as long as `durable` says so.
///
/// # Errors
/// Its directory cannot be opened.
pub(super) fn share(
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

/// What a share's server is for a person.
pub(super) fn name_of_share(share: &ShareDevice) -> String {
    format!("the file server of {}", share.path.display())
}

/// The device of a disk that this process serves, and what it is for a person.
///
/// # Errors
/// It cannot be opened.
pub(super) fn disk(
    disk: &DiskDevice,
    options: &blk::Options,
    sandbox: bool,
) -> Result<(Arc<dyn Device>, String), HypervisorError> {
    let path = disk.path.display();
    let said = |why: String| HypervisorError::Disk { said: format!("{path}: {why}") };
    let device = Arc::new(open(disk, options).map_err(said)?.sandbox(sandbox));
    Ok((device, format!("the server of the disk `{}` ({path})", disk.serial)))
}

/// The device of a VM's vsock, and what it is for a person.
///
/// # Errors
/// Its sockets cannot be made.
pub(super) fn vsock(
    vsock: &VsockDevice,
    sandbox: bool,
) -> Result<(Arc<dyn Device>, String), HypervisorError> {
    let what = format!("the vsock in {}", vsock.dir.display());
    Ok((Arc::new(vsock.open()?.sandbox(sandbox)), what))
}

/// The device that has random numbers for a VM, and what it is for a person.
pub(super) fn rng(sandbox: bool) -> (Arc<dyn Device>, String) {
    (Arc::new(Rng::new().sandbox(sandbox)), "the random number generator".to_owned())
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
