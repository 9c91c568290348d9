//! The kernel's modules.

use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount as mount_fs};
use vmlab_wire::message::{Failure, Filesystem, RootMode};

use super::root::mount_at;
use super::{Step, failed, failed_io};

/// Where modprobe may be.
const SBIN: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin";

/// Mounts the module tree of the running kernel.
pub(super) fn mount(tree: &Filesystem, mode: RootMode) -> Step {
    let target = format!("/lib/modules/{}", crate::boot::release());
    let step = format!("make {target}");
    if std::fs::metadata(&target).is_err() {
        let made = match mode {
            RootMode::Overlay => std::fs::create_dir_all(&target),
            // A root that is not to change, or cannot, gets a directory of the guest's own.
            RootMode::ReadOnly | RootMode::ReadWrite => {
                let flags = MountFlags::NOSUID | MountFlags::NODEV;
                mount_fs("tmpfs", "/lib/modules", "tmpfs", flags, Some(c"mode=755"))
                    .map_err(|e| failed(&step, e, "the root needs the directory /lib/modules"))?;
                std::fs::create_dir(&target)
            }
        };
        made.map_err(|e| failed_io(&step, &e, ""))?;
    }
    mount_at(tree, target.as_bytes(), true)
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
