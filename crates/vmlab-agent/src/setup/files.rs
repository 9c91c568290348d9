//! Shares and files.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::mount::mount_bind;
use vmlab_wire::message::{Failure, File, Mount, RootMode};

use super::root::mount_at;
use super::{Mounted, Step, failed, failed_io};

/// Where mounts and files are kept that are only seen elsewhere.
const ASIDE: &str = "/run/vmlab";

fn path(bytes: &[u8]) -> Result<&Path, Failure> {
    let path = Path::new(OsStr::from_bytes(bytes));
    if path.is_absolute() {
        return Ok(path);
    }
    let step = format!("use the path {}", path.display());
    Err(Failure { step, detail: "it is not absolute".to_string(), errno: None })
}

const READ_ONLY_HINT: &str =
    "where the root cannot be written to, the mount point must be there already";

fn make_dir(path: &Path) -> Step {
    fs::create_dir_all(path).map_err(|e| {
        failed_io(format!("make the directory {}", path.display()), &e, READ_ONLY_HINT)
    })
}

/// Mounts a share at its target.
pub(super) fn share(share: &Mount, mounted: &mut Mounted) -> Step {
    make_dir(path(&share.target)?)?;
    mount_at(&share.filesystem, &share.target, share.read_only)?;
    if !share.read_only {
        mounted.add(&share.target);
    }
    Ok(())
}

fn write(path: &Path, file: &File) -> io::Result<()> {
    fs::write(path, &file.content)?;
    fs::set_permissions(path, Permissions::from_mode(file.mode & 0o7777))
}

/// Puts a file in its place without changing the root below.
pub(super) fn place(
    index: usize,
    file: &File,
    mode: RootMode,
    warn: &mut dyn FnMut(String),
) -> Step {
    let target = path(&file.path)?;
    if mode == RootMode::Overlay {
        if let Some(parent) = target.parent() {
            make_dir(parent)?;
        }
        // A link, which may lead out of the overlay or nowhere, is replaced and not followed.
        return match fs::remove_file(target) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => write(target, file),
        }
        .map_err(|e| failed_io(format!("write {}", target.display()), &e, ""));
    }
    place_aside(index, file, target, warn)
}

/// Shows a file of the guest's own memory in the place of one of the root.
fn place_aside(index: usize, file: &File, target: &Path, warn: &mut dyn FnMut(String)) -> Step {
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
    let aside = PathBuf::from(format!("{ASIDE}/files"));
    make_dir(&aside)?;
    let aside = aside.join(index.to_string());
    write(&aside, file).map_err(|e| failed_io(step(), &e, ""))?;
    mount_bind(&aside, target).map_err(|e| failed(step(), e, ""))
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
