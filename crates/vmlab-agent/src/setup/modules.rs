//! The kernel's modules.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount as mount_fs};
use vmlab_wire::message::{Failure, Filesystem, RootMode};

use super::root::mount_at;
use super::{Step, failed_io};

/// Where a kernel's modules are looked for.
const MODULES: &str = "/lib/modules";

/// What is laid over the root's `/lib` where that has no place for modules.
const ASIDE: &str = "/run/vmlab/lib";

/// Where modprobe may be.
const SBIN: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin";

/// Where the module tree of the running kernel belongs.
pub(super) fn place() -> PathBuf {
    Path::new(MODULES).join(crate::boot::release())
}

/// Mounts the module tree of the running kernel. A root without a place for it does without, and
/// `warn` is told: a command may not need modules.
pub(super) fn mount(tree: &Filesystem, mode: RootMode, warn: &mut dyn FnMut(String)) -> Step {
    let release = crate::boot::release();
    let target = format!("{MODULES}/{release}");
    if std::fs::metadata(&target).is_err() {
        let made = match mode {
            RootMode::Overlay => std::fs::create_dir_all(&target),
            RootMode::ReadOnly | RootMode::ReadWrite => make_place(&target, &release, mode),
        };
        if let Err(e) = made {
            warn(format!("the kernel's modules are not in the guest: making {target}: {e}"));
            return Ok(());
        }
    }
    mount_at(tree, target.as_bytes(), true)
}

/// Makes the directory `target` for this release in the guest's own memory, as the root is not to
/// change, or cannot.
fn make_place(target: &str, release: &str, mode: RootMode) -> io::Result<()> {
    if mode == RootMode::ReadWrite {
        // A mount needs its mount point.
        std::fs::create_dir_all(MODULES)?;
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    match mount_fs("tmpfs", MODULES, "tmpfs", flags, Some(c"mode=755")) {
        Ok(()) => std::fs::create_dir(target),
        Err(Errno::NOENT) => {
            std::fs::create_dir_all(format!("{ASIDE}/modules/{release}"))?;
            // Read-only, like the root, since it has no upper layer.
            let options = c"lowerdir=/run/vmlab/lib:/lib";
            Ok(mount_fs("overlay", "/lib", "overlay", MountFlags::empty(), Some(options))?)
        }
        Err(e) => Err(e.into()),
    }
}

/// Loads a module by the root's own modprobe.
pub(super) fn modprobe(words: &[String]) -> Step {
    let step = format!("modprobe {}", words.join(" "));
    let output = Command::new("modprobe")
        .args(words)
        .env_clear()
        .env("PATH", SBIN)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| match e.raw_os_error() {
            Some(n) if n == Errno::NOENT.raw_os_error() => {
                failed_io(&step, &e, "the root has no modprobe: install kmod in it")
            }
            _ => failed_io(&step, &e, ""),
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
    Err(Failure { step, detail: format!("{}: {said}", output.status), errno: None })
}
