//! The root of a system on a disk, whatever its partitions and filesystems are.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use vmlab_wire::message::Failure;

use super::Step;
use crate::{modules, sys};

/// Where the kernel lists its block devices.
pub(super) const BLOCK: &str = "/sys/class/block";

/// How long a disk may take to appear: its driver is loaded, or it has just been plugged in.
const APPEARS_NS: u64 = 10_000_000_000;

/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(2);

/// Where a filesystem is looked into that may be in a part of the one that was found.
const INSIDE: &str = "/inside";

/// What a system's root has, of which one is enough.
const SIGNS: [&str; 4] = ["etc/os-release", "usr/lib/os-release", "sbin/init", "bin/sh"];

/// Where distributions have the root in a filesystem of subvolumes that is itself none.
const SUBVOLUMES: [&str; 3] = ["@", "root", "@rootfs"];

/// How filesystems and what else may be on a partition begin: the name, the place and the bytes.
const MAGIC: [(&str, u64, &[u8]); 12] = [
    ("ext4", 1080, b"\x53\xef"),
    ("xfs", 0, b"XFSB"),
    ("btrfs", 65600, b"_BHRfS_M"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("squashfs", 0, b"hsqs"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("crypto_LUKS", 0, b"LUKS\xba\xbe"),
    ("LVM2_member", 536, b"LVM2 001"),
    ("iso9660", 32769, b"CD001"),
    ("swap", 4086, b"SWAPSPACE2"),
    ("vfat", 82, b"FAT32"),
    ("vfat", 54, b"FAT1"),
];

/// Those that are not filesystems, or never a system's root.
const NEVER: [&str; 5] = ["crypto_LUKS", "LVM2_member", "swap", "vfat", "iso9660"];

/// Mounts the root that is on the disk with this serial number.
pub(super) fn mount_root(serial: &str, target: &[u8], flags: MountFlags) -> Step {
    let failure = |detail: String| Failure {
        step: "mount the root of the image".to_string(),
        detail,
        errno: None,
    };
    let disk = wait_for(serial).ok_or_else(|| {
        failure(format!("there is no disk `{serial}`: has the kernel a driver for virtio disks?"))
    })?;
    let mut found = Vec::new();
    for part in parts(&disk).map_err(|e| failure(format!("reading {BLOCK}: {e}")))? {
        let what = match kind(&part) {
            Ok(Some(kind)) if NEVER.contains(&kind) => kind.to_string(),
            Ok(Some(kind)) => {
                let trouble = modules::load_for(kind);
                match mount_system(&part, target, kind, flags) {
                    Ok(true) => return Ok(()),
                    Ok(false) => format!("{kind}, no system"),
                    Err(Errno::NODEV) => {
                        let trouble = trouble.join("; ");
                        format!("{kind}, which the kernel does not have {trouble}")
                    }
                    Err(e) => format!("{kind}, which cannot be mounted: {e}"),
                }
            }
            Ok(None) => "nothing that is known".to_string(),
            Err(e) => format!("cannot be read: {e}"),
        };
        found.push(format!("{}: {}", part.trim_start_matches("/dev/"), what.trim_end()));
    }
    Err(failure(format!("no partition of the disk has one ({})", found.join(", "))))
}

/// The kernel's name of a disk, once it is there with all its partitions.
pub(super) fn wait_for(serial: &str) -> Option<String> {
    let until = sys::monotonic_ns() + APPEARS_NS;
    loop {
        if let Some(name) = find(serial) {
            return Some(name);
        }
        if sys::monotonic_ns() > until {
            return None;
        }
        std::thread::sleep(LOOK);
    }
}

/// The kernel's name of a disk that is there.
pub(super) fn find(serial: &str) -> Option<String> {
    fs::read_dir(BLOCK).ok()?.flatten().find_map(|entry| {
        let read = fs::read_to_string(entry.path().join("serial")).ok()?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // To open it means to wait until the kernel has read its partitions.
        let ready = read.trim_end() == serial && File::open(format!("/dev/{name}")).is_ok();
        ready.then_some(name)
    })
}

/// The names of a disk and of its partitions.
pub(super) fn with_partitions(disk: &str) -> Vec<String> {
    let entries = fs::read_dir(Path::new(BLOCK).join(disk)).into_iter().flatten().flatten();
    let partitions = entries.filter(|entry| entry.path().join("partition").exists());
    let names = partitions.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.chain([disk.to_owned()]).collect()
}

/// The partitions of a disk, the largest first, as its root is there; the disk itself where it has none.
fn parts(disk: &str) -> io::Result<Vec<String>> {
    let mut parts = Vec::new();
    for entry in fs::read_dir(Path::new(BLOCK).join(disk))?.flatten() {
        if entry.path().join("partition").exists() {
            let size = fs::read_to_string(entry.path().join("size")).unwrap_or_default();
            let size: u64 = size.trim().parse().unwrap_or(0);
            parts.push((size, format!("/dev/{}", entry.file_name().to_string_lossy())));
        }
    }
    parts.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    if parts.is_empty() {
        parts.push((0, format!("/dev/{disk}")));
    }
    Ok(parts.into_iter().map(|(_, path)| path).collect())
}

/// What a device has on it, by its first bytes.
pub(super) fn kind(device: &str) -> io::Result<Option<&'static str>> {
    let device = File::open(device)?;
    for (name, at, magic) in MAGIC {
        let mut bytes = vec![0; magic.len()];
        match device.read_exact_at(&mut bytes, at) {
            Ok(()) if bytes == magic => return Ok(Some(name)),
            // It is shorter.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(e) => return Err(e),
            Ok(()) => {}
        }
    }
    Ok(None)
}

/// Mounts a device's filesystem if a system's root is in it.
fn mount_system(
    device: &str,
    target: &[u8],
    kind: &str,
    flags: MountFlags,
) -> rustix::io::Result<bool> {
    let _ = rustix::fs::mkdir(INSIDE, 0o755.into());
    // Only to look: what is not the root stays as it is, its journal too.
    let options = match kind {
        "ext4" => Some(c"noload"),
        "xfs" => Some(c"norecovery"),
        _ => None,
    };
    mount(device, INSIDE, kind, MountFlags::RDONLY, options)?;
    let has_system =
        |dir: &Path| SIGNS.iter().any(|sign| dir.join(sign).symlink_metadata().is_ok());
    let inside = PathBuf::from(INSIDE);
    let options = if has_system(&inside) {
        Some(None)
    } else {
        let subvolume = SUBVOLUMES.iter().find(|name| has_system(&inside.join(name)));
        subvolume.filter(|_| kind == "btrfs").map(|name| Some(format!("subvol={name}")))
    };
    unmount(INSIDE, UnmountFlags::empty())?;
    let Some(options) = options else { return Ok(false) };
    let options = options.and_then(|options| std::ffi::CString::new(options).ok());
    mount(device, target, kind, flags, options.as_deref())?;
    Ok(true)
}
