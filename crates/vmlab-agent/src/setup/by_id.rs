//! Disks by the names that the host gives them, as udev has them for its rules: there is none of it here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::disk::BLOCK;
use super::{Step, failed_io};

/// Where such names are. That of a disk begins with `virtio-`, and has `-partN` behind it for partitions.
const BY_ID: &str = "/dev/disk/by-id";

/// Makes a link to a disk with this serial number, and to each of its partitions.
pub(super) fn name(serial: &str, disk: &str) -> Step {
    let failed = |e: io::Error| failed_io(format!("make links in {BY_ID}"), &e, "");
    fs::create_dir_all(BY_ID).map_err(failed)?;
    let link = Path::new(BY_ID).join(format!("virtio-{serial}"));
    point(&link, disk).map_err(failed)?;
    for (number, partition) in partitions(disk).map_err(failed)? {
        let link = Path::new(BY_ID).join(format!("virtio-{serial}-part{number}"));
        point(&link, &partition).map_err(failed)?;
    }
    Ok(())
}

/// Removes all links to a disk and its partitions.
pub(super) fn forget(disk: &str) {
    for entry in fs::read_dir(BY_ID).into_iter().flatten().flatten() {
        let target = fs::read_link(entry.path()).ok();
        let device = target.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
        let of_disk = |name: &str| super::disk::with_partitions(disk).iter().any(|it| it == name);
        if device.is_some_and(of_disk) {
            // Where udev is, it has done so already.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The partitions of a disk: their numbers and the kernel's names of them.
fn partitions(disk: &str) -> io::Result<Vec<(u32, String)>> {
    let mut partitions = Vec::new();
    for entry in fs::read_dir(Path::new(BLOCK).join(disk))? {
        let entry = entry?;
        let Ok(number) = fs::read_to_string(entry.path().join("partition")) else { continue };
        if let Ok(number) = number.trim().parse() {
            partitions.push((number, entry.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(partitions)
}

/// Makes a link to a device, unless udev has made it.
fn point(link: &Path, device: &str) -> io::Result<()> {
    match std::os::unix::fs::symlink(PathBuf::from("../..").join(device), link) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}
