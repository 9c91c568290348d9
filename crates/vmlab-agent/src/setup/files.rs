//! Shares and files.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::Access;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount as mount_fs, mount_bind, unmount};
use vmlab_wire::message::{Accounts, Failure, File, Mount, RootMode};

use super::root::mount_at;
use super::{Step, failed, failed_io};

/// Where files are while they are put in their places.
const ASIDE: &str = "/run/vmlab-files";

pub(super) fn path(bytes: &[u8]) -> Result<&Path, Failure> {
    let path = Path::new(OsStr::from_bytes(bytes));
    if path.is_absolute() {
        return Ok(path);
    }
    let step = format!("use the path {}", path.display());
    Err(Failure { step, detail: "it is not absolute".to_string(), errno: None })
}

const READ_ONLY_HINT: &str =
    "where the root cannot be written to, the mount point must be there already";

pub(super) fn make_dir(path: &Path) -> Step {
    fs::create_dir_all(path).map_err(|e| {
        failed_io(format!("make the directory {}", path.display()), &e, READ_ONLY_HINT)
    })
}

/// How long a system that boots may take to make its root writable, when this program came first.
const WRITABLE_TIME: Duration = Duration::from_secs(30);

/// How often it is looked at.
const WRITABLE_LOOK: Duration = Duration::from_millis(20);

/// Waits for the root to become writable, where mount points have to be made.
pub(super) fn await_writable_root(shares: &[Mount]) {
    let until = Instant::now() + WRITABLE_TIME;
    let missing = |share: &Mount| path(&share.target).is_ok_and(|target| !target.is_dir());
    let read_only = || rustix::fs::access("/", Access::WRITE_OK) == Err(Errno::ROFS);
    while shares.iter().any(missing) && read_only() && Instant::now() < until {
        std::thread::sleep(WRITABLE_LOOK);
    }
}

/// The longest file of users or groups that is read: a message has to take both of them.
const MAX_ACCOUNTS: u64 = 256 * 1024;

/// The users and groups of the root. A file that is not there has none.
pub(super) fn accounts() -> Accounts {
    let read = |path| {
        let mut content = Vec::new();
        if let Ok(file) = fs::File::open(path) {
            // What cannot be read names nobody, either.
            let _ = file.take(MAX_ACCOUNTS).read_to_end(&mut content);
        }
        content
    };
    Accounts { passwd: read("/etc/passwd"), group: read("/etc/group") }
}

/// Mounts a share at its target.
pub(super) fn share(share: &Mount) -> Step {
    make_dir(path(&share.target)?)?;
    let Err(failure) = mount_at(&share.filesystem, &share.target, share.read_only) else {
        return Ok(());
    };
    let unknown = failure.errno == Some(Errno::NODEV.raw_os_error());
    match share.otherwise.as_ref().filter(|_| unknown) {
        Some(filesystem) => mount_at(filesystem, &share.target, share.read_only),
        None => Err(failure),
    }
}

/// Takes a share away. Who still uses it keeps it, but all that was written is with the host.
pub(super) fn unshare(share: &Mount) -> Step {
    let target = path(&share.target)?;
    let step = || format!("unmount {}", target.display());
    if let Ok(dir) = fs::File::open(target) {
        rustix::fs::syncfs(&dir).map_err(|e| failed(step(), e, ""))?;
    }
    unmount(target, UnmountFlags::DETACH).map_err(|e| failed(step(), e, ""))
}

fn write(path: &Path, file: &File) -> io::Result<()> {
    fs::write(path, &file.content)?;
    fs::set_permissions(path, Permissions::from_mode(file.mode & 0o7777))
}

/// Puts files in their places without changing the root below. No share may be mounted yet: its host
/// directory would be changed instead. A share that is mounted over a file later hides it.
pub(super) fn place(files: &[File], mode: RootMode, warn: &mut dyn FnMut(String)) -> Step {
    let mut aside = None;
    files.iter().try_for_each(|file| {
        let target = path(&file.path)?;
        match mode {
            RootMode::Overlay => replace(file, target),
            RootMode::ReadOnly | RootMode::ReadWrite => cover(file, target, &mut aside, &mut *warn),
        }
    })
}

/// Writes a file into the overlay. A link, which may lead out of it or nowhere, is replaced and not
/// followed.
fn replace(file: &File, target: &Path) -> Step {
    if let Some(parent) = target.parent() {
        make_dir(parent)?;
    }
    match fs::remove_file(target) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => write(target, file),
    }
    .map_err(|e| failed_io(format!("write {}", target.display()), &e, ""))
}

/// Shows a file of the guest's own memory in the place of one of the root.
fn cover(
    file: &File,
    target: &Path,
    aside: &mut Option<Aside>,
    warn: &mut dyn FnMut(String),
) -> Step {
    let step = || format!("write {}", target.display());
    if let Some(end) = memory_end(target) {
        // It leads into the guest's own memory, where it can simply be written.
        if let Some(parent) = end.parent() {
            make_dir(parent)?;
        }
        return write(&end, file).map_err(|e| failed_io(step(), &e, ""));
    }
    if !target.exists() {
        warn(format!(
            "{} is not there, and is not made in a root that is not the guest's own",
            target.display()
        ));
        return Ok(());
    }
    let aside = match aside {
        Some(aside) => aside,
        None => aside.insert(Aside::mount()?),
    };
    let content = aside.next();
    write(&content, file).map_err(|e| failed_io(step(), &e, ""))?;
    mount_bind(&content, target).map_err(|e| failed(step(), e, ""))
}

/// A tmpfs for files that are only to be seen elsewhere, by bind mounts. It is at no path once this
/// is dropped, and lives as long as they do.
struct Aside {
    files: u32,
}

impl Aside {
    fn mount() -> Result<Self, Failure> {
        make_dir(Path::new(ASIDE))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount_fs("tmpfs", ASIDE, "tmpfs", flags, Some(c"mode=755"))
            .map_err(|e| failed(format!("mount a tmpfs at {ASIDE}"), e, ""))?;
        Ok(Self { files: 0 })
    }

    /// A path that no file has yet.
    fn next(&mut self) -> PathBuf {
        self.files += 1;
        PathBuf::from(format!("{ASIDE}/{}", self.files))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // What is left behind is untidy, not wrong.
        let _ = unmount(ASIDE, UnmountFlags::DETACH);
        let _ = fs::remove_dir(ASIDE);
    }
}

/// Where a path ends after its last link, if that is in /run or /tmp.
fn memory_end(target: &Path) -> Option<PathBuf> {
    let parent = fs::canonicalize(target.parent()?).ok()?;
    let end = match fs::read_link(target) {
        Err(_) => parent.join(target.file_name()?),
        Ok(link) => normalize(&parent.join(link)),
    };
    (end.starts_with("/run") || end.starts_with("/tmp")).then_some(end)
}

/// Takes `..` out of a path whose directories may not exist.
fn normalize(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                out.pop();
            }
            part => out.push(part),
        }
    }
    out
}
