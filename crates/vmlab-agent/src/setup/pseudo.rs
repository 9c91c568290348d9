//! Filesystems of the kernel's and of the guest's own memory.

use std::ffi::CStr;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount as mount_fs};
use vmlab_wire::message::RootMode;

use super::{Step, failed};

/// A filesystem that every guest has.
struct Wanted {
    kind: &'static str,
    target: &'static str,
    options: &'static CStr,
}

const fn wanted(kind: &'static str, target: &'static str, options: &'static CStr) -> Wanted {
    Wanted { kind, target, options }
}

/// Mounted wherever the kernel has them.
const OPTIONAL: &[Wanted] = &[
    wanted("devpts", "/dev/pts", c"newinstance,ptmxmode=666,mode=620,gid=5"),
    wanted("tmpfs", "/dev/shm", c"mode=1777"),
    wanted("mqueue", "/dev/mqueue", c""),
    wanted("cgroup2", "/sys/fs/cgroup", c"nsdelegate,memory_recursiveprot"),
    wanted("bpf", "/sys/fs/bpf", c"mode=700"),
    wanted("tracefs", "/sys/kernel/tracing", c""),
    wanted("debugfs", "/sys/kernel/debug", c""),
    wanted("configfs", "/sys/kernel/config", c""),
    wanted("securityfs", "/sys/kernel/security", c""),
    wanted("hugetlbfs", "/dev/hugepages", c""),
];

/// Links that programs expect in /dev.
const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("/proc/kcore", "/dev/core"),
];

/// Mounts those that the kernel has, below /dev and /sys, with which they move into the root later.
pub(super) fn mount_kernels_own() -> Step {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let _paused = PausedModprobe::new();
    for Wanted { kind, target, options } in OPTIONAL {
        // Asking for an unknown type would make the kernel run modprobe.
        if !known.lines().any(|line| line.strip_prefix("nodev\t") == Some(kind)) {
            continue;
        }
        if target.starts_with("/dev/") {
            // It is there, or mounting says so.
            let _ = rustix::fs::mkdir(*target, 0o755.into());
        }
        let flags = MountFlags::NOSUID;
        let mounted = match mount_fs(*kind, *target, *kind, flags, Some(*options)) {
            // An older kernel refuses options that it does not know.
            Err(Errno::INVAL) => mount_fs(*kind, *target, *kind, flags, None),
            other => other,
        };
        match mounted {
            // The kernel makes the directory where it can use the filesystem.
            Ok(()) | Err(Errno::NOENT | Errno::BUSY) => {}
            Err(e) => return Err(failed(format!("mount {kind} at {target}"), e, "")),
        }
    }
    for (to, link) in LINKS {
        // The kernel's devtmpfs has none of them.
        let _ = rustix::fs::symlink(*to, *link);
    }
    own_ptmx();
    Ok(())
}

/// Mounts the directories of the root that are of the guest's own memory.
pub(super) fn mount_memory(mode: RootMode) -> Step {
    memory("/run", c"mode=755")?;
    memory("/tmp", c"mode=1777")?;
    // Unlike the two before it, a small root need not have it.
    if mode == RootMode::ReadOnly && std::fs::metadata("/var/tmp").is_ok() {
        memory("/var/tmp", c"mode=1777")?;
    }
    // /var/lock leads here on most distributions.
    make_dir("/run/lock", 0o1777);
    Ok(())
}

/// Where the kernel keeps the path of its modprobe.
const MODPROBE: &str = "/proc/sys/kernel/modprobe";

/// Keeps the kernel from running modprobe until it is dropped. To mount bpf it would look for
/// `bpf_preload`, which nobody needs and which costs as much as all the rest of the set-up.
struct PausedModprobe(Option<Vec<u8>>);

impl PausedModprobe {
    fn new() -> Self {
        // A kernel without modules has no such file.
        let path = std::fs::read(MODPROBE).ok();
        if path.is_some() {
            let _ = std::fs::write(MODPROBE, "\n");
        }
        Self(path)
    }
}

impl Drop for PausedModprobe {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = std::fs::write(MODPROBE, path);
        }
    }
}

/// The device that devtmpfs has belongs to root alone and to another instance of devpts.
fn own_ptmx() {
    let _ = rustix::fs::unlink("/dev/ptmx");
    let _ = rustix::fs::symlink("pts/ptmx", "/dev/ptmx");
}

fn make_dir(path: &str, mode: u32) {
    // The umask would take bits away from mkdir.
    let _ = rustix::fs::mkdir(path, 0o755.into());
    let _ = rustix::fs::chmod(path, mode.into());
}

/// Mounts guest memory at a directory of the root. A root without the directory gets one if it can.
fn memory(target: &str, options: &CStr) -> Step {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    let mounted = match mount_fs("tmpfs", target, "tmpfs", flags, Some(options)) {
        Err(Errno::NOENT) => {
            let _ = rustix::fs::mkdir(target, 0o755.into());
            mount_fs("tmpfs", target, "tmpfs", flags, Some(options))
        }
        other => other,
    };
    mounted.map_err(|e| {
        failed(format!("mount a tmpfs at {target}"), e, "the root needs that directory")
    })
}
