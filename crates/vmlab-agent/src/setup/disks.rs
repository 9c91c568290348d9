//! Disks beside the root's: their names, and what is on them mounted.

use std::ffi::CString;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount as mount_fs};
use vmlab_wire::message::{Disk, DiskMount, DiskUse, Failure};

use super::{Step, by_id, disk, failed, files};
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
}
