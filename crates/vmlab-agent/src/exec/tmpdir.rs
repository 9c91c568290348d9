//! The directory for temporary files that a command's environment names.
//!
//! `/tmp`, `/run` and `/var/tmp` are the guest's own and start empty. What the environment of the
//! host names in them is not there, and most programs fail without it.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path};

use vmlab_wire::message::Exec;

/// The variables that name a directory for temporary files: that of POSIX, and those that programs
/// from elsewhere look at.
const NAMES: [&[u8]; 3] = [b"TMPDIR", b"TMP", b"TEMP"];

/// Directories below which the guest's own filesystems are.
const PLACES: [&str; 3] = ["/tmp", "/run", "/var/tmp"];

/// The guest's own filesystems, by their device numbers. What is made in them is gone with the guest.
#[derive(Debug, Clone, Default)]
pub(crate) struct OwnFilesystems(Vec<u64>);

impl OwnFilesystems {
    /// Those that directories are in now. A missing directory has none.
    pub(crate) fn of<'a>(directories: impl IntoIterator<Item = &'a str>) -> Self {
        let device = |directory| Some(fs::metadata(directory).ok()?.dev());
        Self(directories.into_iter().filter_map(device).collect())
    }

    fn has(&self, meta: &Metadata) -> bool {
        self.0.contains(&meta.dev())
    }
}

/// Makes the directories for temporary files that a command's environment names, where they belong
/// to the guest. A share, which may be in the same place, is never written to.
pub(super) fn make(exec: &Exec, own: &OwnFilesystems) {
    for (_, value) in exec.env.iter().filter(|(name, _)| NAMES.contains(&name.as_slice())) {
        // A command that needs it will say that it is not there.
        let _ = make_one(Path::new(OsStr::from_bytes(value)), exec, own);
    }
}

fn make_one(path: &Path, exec: &Exec, own: &OwnFilesystems) -> io::Result<()> {
    let plain = path.components().all(|part| part != Component::ParentDir);
    let placed = PLACES.iter().any(|place| path != Path::new(place) && path.starts_with(place));
    if !plain || !placed || path.symlink_metadata().is_ok() {
        return Ok(());
    }
    let above = path.ancestors().skip(1).find_map(|above| above.metadata().ok());
    if !above.is_some_and(|meta| own.has(&meta)) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    }
    DirBuilder::new().mode(0o700).create(path)?;
    std::os::unix::fs::chown(path, Some(exec.user.uid), Some(exec.user.gid))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use vmlab_wire::ProcessId;
    use vmlab_wire::message::{ExecStdio, StderrTo, User};

    use super::*;

    fn exec(name: &str, path: &Path) -> Exec {
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        Exec {
            process: ProcessId(0),
            argv: vec![b"true".to_vec()],
            env: vec![(name.into(), path.as_os_str().as_bytes().to_vec())],
            cwd: b"/".to_vec(),
            user: User { uid, gid, groups: Vec::new() },
            umask: 0o22,
            rlimits: Vec::new(),
            stdio: ExecStdio::Pipes { stdin: false, stdout: false, stderr: StderrTo::Null },
        }
    }

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn what_is_named_is_made() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let own = OwnFilesystems::of([dir.path().to_str().unwrap(), "/no/such"]);
        for name in ["TMPDIR", "TMP", "TEMP"] {
            let path = dir.path().join(name).join("of/mine");
            make(&exec(name, &path), &own);
            assert_eq!(mode(&path), 0o700, "{name}");
            assert_eq!(mode(path.parent().unwrap()), 0o755, "{name}");
            // A second command finds it as the first has left it.
            fs::write(path.join("file"), "").unwrap();
            make(&exec(name, &path), &own);
            assert!(path.join("file").exists(), "{name}");
        }
    }

    #[test]
    fn nothing_is_made_elsewhere() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let own = OwnFilesystems::of([dir.path().to_str().unwrap(), "/proc", "/"]);
        let other = OwnFilesystems::of(["/proc"]);
        let path = dir.path().join("new/er");
        // In a filesystem that is not the guest's own, as a share's.
        make(&exec("TMPDIR", &path), &other);
        make(&exec("TMPDIR", &path), &OwnFilesystems::default());
        // Under another name, or another way.
        make(&exec("TMPDIRS", &path), &own);
        let relative = path.strip_prefix("/").unwrap();
        make(&exec("TMPDIR", relative), &own);
        make(&exec("TMPDIR", &dir.path().join("../..").join(relative)), &own);
        // In no place for temporary files.
        let home = format!("/vmlab-test-{}", std::process::id());
        make(&exec("TMPDIR", Path::new(&home)), &own);
        assert!(!Path::new(&home).exists());
        // A link that leads nowhere is what its maker wanted.
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
        make(&exec("TMPDIR", &dir.path().join("link")), &own);
        assert!(!dir.path().join("new").exists());
    }
}
