//! The root filesystem.

use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount as mount_fs, mount_bind, mount_move};
use vmlab_wire::message::{Failure, Filesystem, Root, RootMode};

use super::upper::Layers;
use super::{Step, disk, failed};

/// The kind of a root that is on a disk.
const DISK: &str = "disk";

/// Where the root is put together. The initramfs has these directories, or is writable.
const NEW_ROOT: &str = "/newroot";
const LOWER: &str = "/lower";
const OVERLAY: &str = "/overlay";
const UPPER: &str = "/overlay/upper";

/// Mounts the root at [`NEW_ROOT`]. `fill` puts into the upper layer of an overlay what it is to have.
pub(super) fn mount(root: &Root, fill: impl FnOnce(&Layers<'_>)) -> Step {
    make_dir(NEW_ROOT)?;
    let filesystem = &root.filesystem;
    match root.mode {
        RootMode::ReadOnly => mount_at(filesystem, NEW_ROOT.as_bytes(), true),
        RootMode::ReadWrite => mount_at(filesystem, NEW_ROOT.as_bytes(), false),
        RootMode::Overlay => {
            make_dir(LOWER)?;
            make_dir(OVERLAY)?;
            mount_at(filesystem, LOWER.as_bytes(), true)?;
            overlay(fill)
        }
    }
}

fn overlay(fill: impl FnOnce(&Layers<'_>)) -> Step {
    let step = "mount a tmpfs for the root's overlay";
    mount_fs("tmpfs", OVERLAY, "tmpfs", MountFlags::empty(), Some(c"mode=755"))
        .map_err(|e| failed(step, e, "the kernel needs CONFIG_TMPFS"))?;
    make_dir(UPPER)?;
    make_dir("/overlay/work")?;
    fill(&Layers { lower: Path::new(LOWER), upper: Path::new(UPPER) });
    let mount = |options| mount_fs("overlay", NEW_ROOT, "overlay", MountFlags::empty(), options);
    // With redirects, directories of the root can be renamed. Kernels before 4.10 refuse the option.
    let mounted = match mount(Some(
        c"lowerdir=/lower,upperdir=/overlay/upper,workdir=/overlay/work,redirect_dir=on",
    )) {
        Err(Errno::INVAL) => {
            mount(Some(c"lowerdir=/lower,upperdir=/overlay/upper,workdir=/overlay/work"))
        }
        other => other,
    };
    mounted.map_err(|e| {
        let hint = match e {
            Errno::NODEV => "the kernel needs CONFIG_OVERLAY_FS or the module overlay",
            Errno::INVAL => "the tmpfs needs CONFIG_TMPFS_XATTR; the kernel's log says more",
            _ => "",
        };
        failed("mount the overlay over the root", e, hint)
    })
}

/// Makes the mounted root this process's, and so everybody's.
pub(super) fn switch() -> Step {
    let step = "switch to the root";
    for (from, to) in
        [("/dev", "/newroot/dev"), ("/proc", "/newroot/proc"), ("/sys", "/newroot/sys")]
    {
        let moved = match mount_move(from, to) {
            Err(Errno::NOENT) => {
                rustix::fs::mkdir(to, 0o755.into()).and_then(|()| mount_move(from, to))
            }
            other => other,
        };
        moved.map_err(|e| {
            failed(format!("move {from} into the root"), e, "the root needs that directory")
        })?;
    }
    rustix::process::chdir(NEW_ROOT).map_err(|e| failed(step, e, ""))?;
    mount_move(".", "/").map_err(|e| failed(step, e, ""))?;
    rustix::process::chroot(".").map_err(|e| failed(step, e, ""))?;
    rustix::process::chdir("/").map_err(|e| failed(step, e, ""))
}

fn make_dir(path: &str) -> Step {
    match rustix::fs::mkdir(path, 0o755.into()) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(failed(format!("make {path} in the initramfs"), e, "")),
    }
}

/// Mounts a filesystem that the host describes.
pub(super) fn mount_at(filesystem: &Filesystem, target: &[u8], read_only: bool) -> Step {
    let Filesystem { kind, source, options } = filesystem;
    if kind == "bind" {
        return mount_bind(source.as_str(), target).map_err(|e| {
            failed(format!("bind {source} to {}", String::from_utf8_lossy(target)), e, "")
        });
    }
    let flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    if kind == DISK {
        return disk::mount_root(source, target, flags);
    }
    let data = std::ffi::CString::new(options.as_str()).map_err(|_| Failure {
        step: format!("mount {source}"),
        detail: "its options contain a NUL byte".to_string(),
        errno: None,
    })?;
    mount_fs(source.as_str(), target, kind.as_str(), flags, Some(data.as_c_str())).map_err(|e| {
        let at = String::from_utf8_lossy(target);
        let hint = hint(kind, e);
        failed(format!("mount {kind} {source} at {at}"), e, &hint)
    })
}

/// What usually is the matter.
fn hint(kind: &str, errno: Errno) -> String {
    let is_share = matches!(kind, "9p" | "virtiofs");
    match (errno, kind) {
        (Errno::NODEV, "9p") => {
            "the kernel needs CONFIG_9P_FS and CONFIG_NET_9P_VIRTIO, or the modules 9p and \
             9pnet_virtio"
                .to_string()
        }
        (Errno::NODEV, "virtiofs") => {
            "the kernel needs CONFIG_VIRTIO_FS, or the module virtiofs".to_string()
        }
        (Errno::NODEV, kind) => {
            format!("the kernel does not know this filesystem; the module would be {kind}")
        }
        (Errno::NOENT | Errno::INVAL | Errno::BUSY, _) if is_share => {
            "is there a device with this tag, and a driver for its transport: virtio_pci or \
             virtio_mmio?"
                .to_string()
        }
        _ => String::new(),
    }
}
