//! What is left of a VM that was stopped in order to go on elsewhere.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{MemfdFlags, memfd_create};
use vmlab_devices::net::MacAddress;

use super::served::{self, FileServer};
use super::{HypervisorError, resource};
use crate::runs::replace_private;

/// A VM at one moment: its memory, the state of its devices, and what its console had said.
#[derive(Clone)]
pub struct Snapshot {
    /// CPUs and devices, in a form that only the hypervisor which wrote it understands.
    pub state: Arc<[u8]>,
    /// RAM: one file a NUMA node, as long as the node's memory.
    pub memory: Vec<Memory>,
    /// What the serial console had shown until then.
    pub console: Arc<[u8]>,
    /// The shares that the guest knew, and that are in the snapshot no more.
    pub shares: u32,
    /// How many of them, the first ones, the guest can go on with when others have come in their places.
    pub kept: u32,
    /// What it had of a run; `None` where it was taken before the run's devices came.
    pub run: Option<Arc<RunDevices>>,
    /// What is learnt of VMs that go on from it, if many do.
    pub hints: Option<Hints>,
}

/// A file for what a hypervisor learns of the VMs that go on from a snapshot. How fast the next ones do may depend on it,
/// and nothing else.
#[derive(Debug, Clone)]
pub struct Hints(Arc<Path>);

impl Hints {
    /// Longer than any.
    const MAX: u64 = 16 << 20;

    /// The file with this path, which need not be there.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into().into())
    }

    /// What was learnt, if anything was.
    pub(super) fn read(&self) -> Option<Vec<u8>> {
        let mut content = Vec::new();
        File::open(&self.0).ok()?.take(Self::MAX).read_to_end(&mut content).ok()?;
        Some(content)
    }

    /// Keeps it. Where that cannot be done, the next VM learns it again.
    pub(super) fn keep(&self, content: &[u8]) {
        let _ = replace_private(&self.0, content);
    }
}

/// The devices of a run as they were in the midst of it.
#[derive(Debug)]
pub struct RunDevices {
    /// Where each was plugged in.
    pub(crate) places: Vec<(u32, DeviceId)>,
    /// The file servers, by the tags of their shares.
    pub(crate) shares: Vec<FileServer>,
}

impl RunDevices {
    /// Those that are in these places, with file servers of their own that go on where these are. A guest's sync(2)
    /// waits for the host's disks as long as `durable` says so.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub(super) fn of(
        places: Vec<(u32, DeviceId)>,
        shares: &[FileServer],
        durable: &Arc<AtomicBool>,
    ) -> Result<Self, HypervisorError> {
        let again = |(tag, server): &FileServer| {
            let copy = served::duplicate(server, durable);
            Ok((tag.clone(), copy.map_err(resource("another server of a share"))?))
        };
        let shares = shares.iter().map(again).collect::<Result<_, HypervisorError>>()?;
        Ok(Self { places, shares })
    }

    /// Where a device was.
    pub(super) fn place_of(&self, id: &DeviceId) -> Option<u32> {
        self.places.iter().find(|(_, other)| other == id).map(|(place, _)| *place)
    }
}

/// Memory that reads as zeros, of so many bytes.
pub(super) fn empty_memory(size: u64) -> io::Result<Arc<File>> {
    let file = File::from(memfd_create("vmlab-ram", MemfdFlags::CLOEXEC)?);
    file.set_len(size)?;
    Ok(Arc::new(file))
}

/// Tells the devices of a run apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DeviceId {
    /// A share, by its tag.
    Share(String),
    /// The network.
    Network,
    /// A port on a network of VMs, by its address.
    Lan(MacAddress),
    /// A disk, by its serial number.
    Disk(String),
    /// Streams to programs of the host.
    Vsock,
    /// A source of random numbers.
    Rng,
}

/// The content of some RAM.
#[derive(Debug, Clone)]
pub enum Memory {
    /// For one VM alone, which changes it.
    Own(Arc<File>),
    /// For any number of VMs, each of which has its own changes. Holes in the file are zeros.
    Template(Arc<File>),
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("state", &self.state.len())
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

/// How a VM begins.
#[derive(Debug, Clone, Default)]
pub enum Origin {
    /// Its kernel boots.
    #[default]
    Boot,
    /// Its kernel boots, and a snapshot can be taken of it.
    BootForSnapshot,
    /// It goes on where another was stopped. Its devices of a run are its own: new to the guest, unless the
    /// snapshot was taken in the midst of a run, whose devices it then has.
    Snapshot(Snapshot),
}
