//! Disks of the guest beside its root: files with images, and new ones, empty or with a filesystem.

mod clone;
mod content;
mod filesystem;
mod power_cuts;
mod serving;
mod template;
mod text;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use vmlab_artifacts::Cache;
use vmlab_artifacts::cache::Leases;
use vmlab_artifacts::image::{DiskImage, ImageFormat, open_data};
use vmlab_devices::blk;
use vmlab_wire::message::{self, DiskMount, DiskUse};

use crate::config::{ConfigError, DiskDevice, DiskWrites, is_serial};
use crate::rootfs::guest_bytes;
use crate::share::KERNELS_OWN;
use crate::units::{Bytes, MIB};
use crate::{Error, VmBuilder};

pub use clone::CloneMode;
pub(crate) use clone::{OwnDisks, SavedDisk, give_each_its_own};
pub use power_cuts::{Checked, PowerCuts};
pub(crate) use serving::Serving;
pub(crate) use template::{CACHE_KIND, MAKING_TIME};
pub use template::{KIND, Template, remove, templates};
pub(crate) use text::{Given, MODES};

/// The smallest new disk.
const MIN_SIZE: Bytes = Bytes(MIB);

/// The largest: what ext4 can have of a file. It is sparse.
const MAX_SIZE: Bytes = Bytes(16 << 40);

/// Where disks with a filesystem are mounted: `/mnt/NAME`.
const MOUNTS: &str = "/mnt";

/// The swap space's name among filesystems.
const SWAP: &str = "swap";

/// A disk that the guest has at `/dev/disk/by-id/virtio-NAME`.
///
/// ```
/// use vmlab::Disk;
/// use vmlab::units::{Bytes, MIB};
///
/// let data = Disk::blank(Bytes(256 * MIB)).named("data").filesystem("btrfs"); // at /mnt/data
/// let image = Disk::new("old", "old.qcow2");
/// # let _ = (data, image);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Disk {
    /// What the guest knows it by. Without one, it is `disk` and its number among all disks, from 0 on.
    pub name: Option<String>,
    /// What it is at first.
    pub source: DiskSource,
    /// What becomes of writes.
    pub writes: DiskWrites,
    /// Where it is mounted.
    pub mount: MountPoint,
    /// Options of the mount, as mount(8) has them.
    pub mount_options: Vec<String>,
    /// The file that a VM's own copy is, and that stays; without one it is gone with the VM.
    pub keep: Option<PathBuf>,
    /// How vmlab itself serves it: throttled, with faults, recorded. Without, the hypervisor does.
    pub serve: Option<blk::Options>,
    /// What a file was made of that has something else on it by now.
    was: Option<DiskSource>,
}

/// What a disk is at first.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DiskSource {
    /// A file with an image, or a block device of the host.
    File(PathBuf),
    /// A new disk of this size, zeroes unless it has a filesystem.
    Blank(Bytes, Option<Mkfs>),
}

/// How a filesystem is made.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Mkfs {
    /// Its name: `mkfs.NAME` makes it, or mkswap if it is `swap`.
    pub name: String,
    /// Its label.
    pub label: Option<String>,
    /// Its UUID; a random one, which all disks of this kind share over all runs, unless given.
    pub uuid: Option<String>,
    /// Further arguments for the program.
    pub options: Vec<String>,
    /// What is in it: a directory of the host, or a tar archive.
    pub content: Option<PathBuf>,
}

/// Where a disk is mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum MountPoint {
    /// At `/mnt/NAME`, if it is a new one with a filesystem; swap space is used. Others are not mounted.
    #[default]
    Usual,
    /// At this path of the guest.
    At(PathBuf),
    /// Nowhere.
    Nowhere,
}

impl Mkfs {
    /// An empty filesystem, made with the program's own defaults.
    pub fn new(name: impl Into<String>) -> Self {
        let (label, uuid, options, content) = Default::default();
        Self { name: name.into(), label, uuid, options, content }
    }
}

impl Disk {
    fn of(source: DiskSource, writes: DiskWrites) -> Self {
        let (name, mount, mount_options, keep, serve, was) = Default::default();
        Self { name, source, writes, mount, mount_options, keep, serve, was }
    }

    /// A file with an image. Writes are discarded: the guest sees them, and they are gone with the VM.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self::of(DiskSource::File(path.into()), DiskWrites::Discarded).named(name)
    }

    /// A new disk, which each VM has for itself.
    pub fn blank(size: Bytes) -> Self {
        Self::of(DiskSource::Blank(size, None), DiskWrites::Cloned(CloneMode::Auto))
    }

    /// Gives it a name.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Gives a new disk a filesystem: any for which there is a `mkfs.NAME`, or `swap`. It changes nothing of a
    /// file with an image.
    pub fn filesystem(self, name: impl Into<String>) -> Self {
        self.formatted(Mkfs::new(name))
    }

    /// The same, with all that can be said of it.
    pub fn formatted(mut self, mkfs: Mkfs) -> Self {
        if let DiskSource::Blank(_, filesystem) = &mut self.source {
            *filesystem = Some(mkfs);
        }
        self
    }

    /// Says what becomes of writes.
    pub fn writes(mut self, writes: DiskWrites) -> Self {
        self.writes = writes;
        self
    }

    /// Says where it is mounted.
    pub fn mounted(mut self, mount: MountPoint) -> Self {
        self.mount = mount;
        self
    }

    /// Adds an option of the mount, as mount(8) has it.
    pub fn mount_option(mut self, option: impl Into<String>) -> Self {
        self.mount_options.push(option.into());
        self
    }

    /// Keeps what the VM made of it in a file.
    pub fn keep(mut self, file: impl Into<PathBuf>) -> Self {
        self.keep = Some(file.into());
        self
    }

    /// Has vmlab itself serve it, in this way. A file has to be raw.
    pub fn served(mut self, options: blk::Options) -> Self {
        self.serve = Some(options);
        self
    }

    /// Its name where it is the disk of this number.
    pub(crate) fn serial(&self, index: usize) -> String {
        self.name.clone().unwrap_or_else(|| format!("disk{index}"))
    }

    /// What it is, or was.
    fn made_of(&self) -> &DiskSource {
        self.was.as_ref().unwrap_or(&self.source)
    }

    fn mkfs(&self) -> Option<&Mkfs> {
        match self.made_of() {
            DiskSource::Blank(_, mkfs) => mkfs.as_ref(),
            DiskSource::File(_) => None,
        }
    }

    pub(crate) fn wrong(&self, why: impl Into<String>) -> Error {
        let what = match (&self.name, &self.source) {
            (Some(name), _) => name.clone(),
            (None, DiskSource::File(path)) => path.display().to_string(),
            (None, DiskSource::Blank(size, _)) => format!("size={size}"),
        };
        Error::Disk { text: what, why: why.into() }
    }

    /// Refuses what cannot be, before anything is made for it.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if let Some(serial) = self.name.as_ref().filter(|name| !is_serial(name)) {
            return Err(self.wrong(ConfigError::Serial { serial: serial.clone() }.to_string()));
        }
        if let DiskSource::Blank(size, _) = self.source {
            if size < MIN_SIZE || size > MAX_SIZE {
                return Err(self.wrong(format!("its size has to be {MIN_SIZE} to {MAX_SIZE}")));
            }
            if !size.0.is_multiple_of(512) {
                return Err(self.wrong("its size is no multiple of 512 bytes"));
            }
            if self.writes == DiskWrites::Kept {
                return Err(self.wrong("a new disk is the VM's own; `keep` names a file for it"));
            }
        }
        let cloned = matches!(self.writes, DiskWrites::Cloned(how) if how != CloneMode::Overlay);
        if self.keep.is_some() && !cloned {
            return Err(self.wrong("only a copy of the VM's own can be kept, and no overlay"));
        }
        let mkfs = self.mkfs();
        if let Some(mkfs) = mkfs {
            filesystem::check(mkfs).map_err(|why| self.wrong(why))?;
        }
        let is_swap = mkfs.is_some_and(|mkfs| mkfs.name == SWAP);
        let is_raw = matches!(self.made_of(), DiskSource::Blank(_, None));
        if let MountPoint::At(path) = &self.mount {
            if is_swap || is_raw {
                return Err(self.wrong("there is no filesystem on it to be mounted"));
            }
            if !path.is_absolute() || path.components().any(|part| part.as_os_str() == "..") {
                return Err(
                    self.wrong("`mount` has to be an absolute path without `..`, or `none`")
                );
            }
            if path == Path::new("/") || KERNELS_OWN.iter().any(|own| path.starts_with(own)) {
                return Err(self.wrong(format!("{} is the guest's own", path.display())));
            }
        }
        if is_swap && self.writes == DiskWrites::Refused {
            return Err(self.wrong("swap space has to be writable"));
        }
        if !self.mount_options.is_empty() && self.place(0).is_none() {
            return Err(self.wrong("it has options for a mount, and is not mounted"));
        }
        Ok(())
    }

    /// Where it is mounted if it is the disk of this number.
    fn place(&self, index: usize) -> Option<PathBuf> {
        match (&self.mount, self.mkfs()) {
            (MountPoint::At(path), _) => Some(path.clone()),
            (MountPoint::Usual, Some(mkfs)) if mkfs.name != SWAP => {
                Some(Path::new(MOUNTS).join(self.serial(index)))
            }
            (MountPoint::Usual | MountPoint::Nowhere, _) => None,
        }
    }

    /// What the guest is to do with it.
    pub(crate) fn for_guest(&self, index: usize) -> message::Disk {
        let used = match (self.place(index), self.mkfs(), &self.mount) {
            (Some(place), mkfs, _) => DiskUse::Mounted(DiskMount {
                kind: mkfs.map(|mkfs| mkfs.name.clone()),
                target: guest_bytes(&place),
                options: self.mount_options.join(","),
                read_only: self.writes == DiskWrites::Refused,
            }),
            (None, Some(mkfs), MountPoint::Usual) if mkfs.name == SWAP => DiskUse::Swap,
            (None, ..) => DiskUse::Device,
        };
        message::Disk { serial: self.serial(index), used }
    }
}

/// The devices of all disks, in their order. Those with filesystems are made, or found in the cache.
pub(crate) fn devices(
    builder: &VmBuilder,
    disks: &[Disk],
    (cache, leases): (&Cache, &Leases),
) -> Result<Vec<DiskDevice>, Error> {
    // All of them before any is made.
    disks.iter().try_for_each(Disk::check)?;
    (0..disks.len()).map(|index| device(builder, disks, index, (cache, leases))).collect()
}

/// The device of one of these disks.
pub(crate) fn device(
    builder: &VmBuilder,
    disks: &[Disk],
    index: usize,
    (cache, leases): (&Cache, &Leases),
) -> Result<DiskDevice, Error> {
    let disk = &disks[index];
    let (path, format) = match &disk.source {
        DiskSource::File(file) => {
            // What is opened so names no file elsewhere, whatever a guest may have written to it.
            let DiskImage { path, format, .. } = open_data(file)?;
            (path, format)
        }
        DiskSource::Blank(size, mkfs) => {
            // Two filesystems with one UUID do not get on with each other in one guest.
            let alike = |other: &&Disk| *other.made_of() == disk.source;
            let copy = disks.iter().take(index).filter(alike).count();
            let wanted = template::Wanted { size: *size, mkfs: mkfs.as_ref(), copy };
            (wanted.get(builder, (cache, leases))?, ImageFormat::Raw)
        }
    };
    let (serial, writes, keep) = (disk.serial(index), disk.writes, disk.keep.clone());
    if matches!(writes, DiskWrites::Cloned(_)) && format != ImageFormat::Raw {
        return Err(disk.wrong(format!(
            "a {} image cannot be copied for each VM; mode=discard does without",
            format.name()
        )));
    }
    let serve = disk.serve.clone();
    Ok(DiskDevice { serial, path, format, writes, keep, serve })
}

/// Has vmlab itself serve all disks that it can. What would be discarded is in a copy, where that can be had
/// cheaply, so that snapshots can have it.
pub(crate) fn serve_all(disks: &mut [DiskDevice]) {
    for disk in disks.iter_mut().filter(|disk| disk.format == ImageFormat::Raw) {
        disk.serve.get_or_insert_default();
        if disk.writes == DiskWrites::Discarded {
            disk.writes = DiskWrites::Cloned(CloneMode::Auto);
        }
    }
}

/// Has all copies that VMs have for themselves stay in a directory, those that have no file of their own.
pub(crate) fn keep_in(dir: &Path, disks: &mut [DiskDevice]) {
    for disk in disks {
        if let DiskWrites::Cloned(how) = disk.writes
            && how != CloneMode::Overlay
        {
            let file = dir.join(format!("{}.raw", disk.serial));
            disk.keep.get_or_insert(file);
        }
    }
}

/// What the guest is to do with all disks, in their order.
pub(crate) fn for_guest(disks: &[Disk]) -> Vec<message::Disk> {
    disks.iter().enumerate().map(|(index, disk)| disk.for_guest(index)).collect()
}
