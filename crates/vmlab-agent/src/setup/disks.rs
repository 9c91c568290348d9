//! Disks beside the root's: their names, and what is on them mounted.

use std::ffi::{CString, OsString};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount as mount_fs, unmount};
use vmlab_wire::message::{Disk, DiskMount, DiskUse, Failure};

use super::{Step, bus, by_id, disk, failed, failed_io, files};
use crate::sys;

/// Waits for the disks, gives them their names, and mounts those that are to be.
pub(super) fn set_up(disks: &[Disk]) -> Step {
    for Disk { serial, used } in disks {
        let name = disk::wait_for(serial).ok_or_else(|| Failure {
            step: format!("find the disk `{serial}`"),
            detail: "it has not appeared: has the kernel a driver for virtio disks?".to_string(),
            errno: None,
        })?;
        by_id::name(serial, &name)?;
        let device = format!("/dev/{name}");
        match used {
            DiskUse::Device => {}
            DiskUse::Mounted(how) => mount(serial, &device, how)?,
            DiskUse::Swap => swap(serial, &device)?,
        }
    }
    Ok(())
}

fn mount(serial: &str, device: &str, how: &DiskMount) -> Step {
    let target = files::path(&how.target)?;
    let step = || format!("mount the disk `{serial}` at {}", target.display());
    let detail = |detail: &str| Failure { step: step(), detail: detail.to_string(), errno: None };
    let found;
    let kind = match &how.kind {
        Some(kind) => kind.as_str(),
        None => {
            found = disk::kind(device).map_err(|e| detail(&format!("reading it: {e}")))?;
            found.ok_or_else(|| detail("no filesystem that is known is on it"))?
        }
    };
    files::make_dir(target)?;
    let (flags, data) = divided(&how.options, how.read_only);
    let data = CString::new(data).map_err(|_| detail("an option has a NUL character"))?;
    match mount_fs(device, target, kind, flags, Some(data.as_c_str())) {
        Ok(()) => Ok(()),
        Err(Errno::NODEV) => Err(detail(&format!(
            "the kernel has no {kind}, built in or as a module that modprobe finds"
        ))),
        // The kernel's own log says more.
        Err(e) => Err(failed(step(), e, &format!("as {kind}; the kernel's log says why"))),
    }
}

fn swap(serial: &str, device: &str) -> Step {
    sys::swap_on(device).map_err(|e| failed(format!("swap to the disk `{serial}`"), e, ""))
}

/// Takes a disk out of use and has the kernel forget it.
pub(crate) fn take_out(serial: &str) -> Step {
    let step = || format!("take the disk `{serial}` out");
    let gone = || Failure { step: step(), detail: "it is not there".to_string(), errno: None };
    let name = disk::find(serial).ok_or_else(gone)?;
    for device in disk::with_partitions(&name) {
        // The last mount is above the others.
        for place in mounted(&device).iter().rev() {
            unmount(place.as_path(), UnmountFlags::empty()).map_err(|e| {
                failed(step(), e, &format!("unmounting {}; a process uses it?", place.display()))
            })?;
        }
        let device = format!("/dev/{device}");
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        if swaps.lines().any(|line| line.split(' ').next() == Some(device.as_str())) {
            sys::swap_off(&device).map_err(|e| failed_io(step(), &e, "no longer to swap to it"))?;
        }
    }
    // Whatever else uses it, in another namespace or by another driver, has it for itself.
    let exclusive = |device: String| {
        let path = format!("/dev/{device}");
        let opened = fs::File::options().read(true).custom_flags(libc::O_EXCL).open(&path);
        // One after the other: that of the disk excludes its partitions'.
        opened.map(drop).map_err(|e| failed_io(step(), &e, &format!("{path} is in use")))
    };
    disk::with_partitions(&name).into_iter().try_for_each(exclusive)?;
    by_id::forget(&name);
    let removed = fs::canonicalize(Path::new(disk::BLOCK).join(&name).join("device"))
        .and_then(|device| device.parent().map(Path::to_owned).ok_or(ErrorKind::NotFound.into()))
        .and_then(|device| bus::forget(&device));
    removed.map_err(|e| failed_io(step(), &e, ""))
}

/// Where a block device is mounted, in the order of the mounts.
fn mounted(device: &str) -> Vec<PathBuf> {
    let number = fs::read_to_string(Path::new(disk::BLOCK).join(device).join("dev"));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    places(&mounts, number.unwrap_or_default().trim(), &format!("/dev/{device}"))
}

/// Where a device is mounted. Btrfs has numbers of its own for its mounts, and names the device.
fn places(mountinfo: &str, number: &str, device: &str) -> Vec<PathBuf> {
    let place = |line: &str| {
        let mut words = line.split(' ');
        let (of, at) = (words.nth(2)?, words.nth(1)?);
        let source = line.split_once(" - ")?.1.split(' ').nth(1)?;
        (of == number || source == device).then(|| unescaped(at))
    };
    mountinfo.lines().filter_map(place).collect()
}

/// A path of the kernel's lists, in which blanks and the like are octal numbers.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        bytes.extend(before.bytes());
        match after.get(..3).and_then(|octal| u8::from_str_radix(octal, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(b'\\');
                rest = after;
            }
        }
    }
    bytes.extend(rest.bytes());
    PathBuf::from(OsString::from_vec(bytes))
}

/// Options of the mount itself, as mount(8) has them; all others are the filesystem's.
const FLAGS: [(&str, MountFlags); 10] = [
    ("ro", MountFlags::RDONLY),
    ("nosuid", MountFlags::NOSUID),
    ("nodev", MountFlags::NODEV),
    ("noexec", MountFlags::NOEXEC),
    ("sync", MountFlags::SYNCHRONOUS),
    ("dirsync", MountFlags::DIRSYNC),
    ("noatime", MountFlags::NOATIME),
    ("nodiratime", MountFlags::NODIRATIME),
    ("relatime", MountFlags::RELATIME),
    ("strictatime", MountFlags::STRICTATIME),
];

/// Options that say what is so anyway.
const USUAL: [&str; 8] = ["", "rw", "defaults", "suid", "dev", "exec", "async", "atime"];

/// Divides options into those of the mount and those of the filesystem.
fn divided(options: &str, read_only: bool) -> (MountFlags, String) {
    let mut flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let mut data: Vec<&str> = Vec::new();
    for option in options.split(',') {
        match FLAGS.iter().find(|(name, _)| *name == option) {
            Some((_, flag)) => flags |= *flag,
            None if USUAL.contains(&option) => {}
            None => data.push(option),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_of_the_mount_or_of_the_filesystem() {
        assert_eq!(divided("", false), (MountFlags::empty(), String::new()));
        assert_eq!(divided("exec,suid,dev,atime", false), (MountFlags::empty(), String::new()));
        assert_eq!(divided("rw,defaults", true), (MountFlags::RDONLY, String::new()));
        let both = divided("noatime,data=journal,nosuid,discard", false);
        let flags = MountFlags::NOATIME | MountFlags::NOSUID;
        assert_eq!(both, (flags, "data=journal,discard".to_string()));
    }

    #[test]
    fn mounts_are_found_by_number_or_device() {
        let list = "21 1 0:19 / / rw - virtiofs share0 rw\n\
                    30 21 254:0 / /mnt/a\\040b rw,noatime shared:1 - ext4 /dev/vda rw\n\
                    31 21 0:40 / /mnt/c rw - btrfs /dev/vdb rw\n\
                    32 30 254:0 /d /mnt/d rw - ext4 /dev/vda rw\n";
        let found = |number, device| places(list, number, device);
        assert_eq!(found("254:0", "/dev/vda"), [Path::new("/mnt/a b"), Path::new("/mnt/d")]);
        assert_eq!(found("254:16", "/dev/vdb"), [Path::new("/mnt/c")]);
        assert!(found("254:32", "/dev/vdc").is_empty());
    }
}
