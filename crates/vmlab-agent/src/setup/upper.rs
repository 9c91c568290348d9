//! What is put into the upper layer of the root's overlay while that is only a directory in memory. Making
//! it through the overlay would copy each directory on the way up.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, chown, openat2,
    stat, utimensat,
};
use rustix::io::Errno;
use vmlab_wire::message::File;

/// The layers of an overlay that is not mounted yet.
pub(super) struct Layers<'a> {
    pub(super) lower: &'a Path,
    pub(super) upper: &'a Path,
}

impl Layers<'_> {
    /// Puts files in their places, as [`place`](super::files::place) does once the overlay is mounted.
    pub(super) fn place(&self, files: &[File]) -> io::Result<()> {
        let lower = self.open_lower()?;
        files.iter().try_for_each(|file| {
            let path = PathBuf::from(OsString::from_vec(file.path.clone()));
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            let parent = self.dir(&lower, parent)?;
            // A file over a directory would hide it.
            if fs::symlink_metadata(self.lower.join(&parent).join(name)).is_ok_and(|m| m.is_dir()) {
                return Err(io::ErrorKind::IsADirectory.into());
            }
            let target = self.upper.join(parent).join(name);
            fs::write(&target, &file.content)?;
            fs::set_permissions(&target, Permissions::from_mode(file.mode & 0o7777))
        })
    }

    /// Makes a directory with all that lead to it.
    pub(super) fn make_dir(&self, path: &Path) -> io::Result<()> {
        self.dir(&self.open_lower()?, path).map(drop)
    }

    fn open_lower(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(self.lower, flags, Mode::empty())?)
    }

    /// Makes the upper layer have the directory that `path` leads to in the root, and returns its place
    /// below the layers' roots: there are no links in it.
    fn dir(&self, lower: &OwnedFd, path: &Path) -> io::Result<PathBuf> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat2(lower, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
            Ok(found) => {
                let link = format!("/proc/self/fd/{}", found.as_raw_fd());
                let real = fs::read_link(link)?;
                let place = real.strip_prefix(self.lower).map_err(io::Error::other)?.to_owned();
                self.merge(&place)?;
                Ok(place)
            }
            Err(Errno::NOENT) => {
                let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                    return Err(Errno::NOENT.into());
                };
                let place = self.dir(lower, parent)?.join(name);
                // A link that leads nowhere is no place for a directory.
                if fs::symlink_metadata(self.lower.join(&place)).is_ok() {
                    return Err(Errno::NOENT.into());
                }
                match fs::create_dir(self.upper.join(&place)) {
                    Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
                    _ => Ok(place),
                }
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Gives the upper layer the directory at `place` and all above it, with the lower ones' attributes.
    fn merge(&self, place: &Path) -> io::Result<()> {
        let mut missing: Vec<&Path> = Vec::new();
        for dir in place.ancestors().take_while(|dir| !dir.as_os_str().as_bytes().is_empty()) {
            if self.upper.join(dir).is_dir() {
                break;
            }
            missing.push(dir);
        }
        for dir in missing.into_iter().rev() {
            let upper = self.upper.join(dir);
            fs::create_dir(&upper)?;
            like(&stat(self.lower.join(dir))?, &upper)?;
        }
        Ok(())
    }
}

/// Gives a directory the attributes of another.
fn like(other: &Stat, dir: &Path) -> io::Result<()> {
    chown(dir, Some(Uid::from_raw(other.st_uid)), Some(Gid::from_raw(other.st_gid)))?;
    fs::set_permissions(dir, Permissions::from_mode(other.st_mode & 0o7777))?;
    let time = |seconds, nanos: u64| Timespec { tv_sec: seconds, tv_nsec: nanos as _ };
    let times = Timestamps {
        last_access: time(other.st_atime as _, other.st_atime_nsec as _),
        last_modification: time(other.st_mtime as _, other.st_mtime_nsec as _),
    };
    Ok(utimensat(rustix::fs::CWD, dir, &times, AtFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    struct Dirs(PathBuf);

    impl Dirs {
        fn new(name: &str) -> Self {
            let dir =
                std::env::temp_dir().join(format!("vmlab-upper-{name}-{}", std::process::id()));
            fs::create_dir_all(dir.join("lower/usr/lib")).unwrap();
            fs::create_dir(dir.join("upper")).unwrap();
            symlink("usr/lib", dir.join("lower/lib")).unwrap();
            Self(dir)
        }
    }

    impl Drop for Dirs {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn file(path: &str) -> File {
        File { path: path.as_bytes().to_vec(), mode: 0o640, content: b"new".to_vec() }
    }

    #[test]
    fn links_are_followed_below_the_root_and_directories_are_as_they_were() {
        let dirs = Dirs::new("merge");
        let (lower, upper) = (dirs.0.join("lower"), dirs.0.join("upper"));
        let layers = Layers { lower: &lower, upper: &upper };
        fs::set_permissions(lower.join("usr/lib"), Permissions::from_mode(0o1711)).unwrap();
        symlink("/usr/lib", lower.join("absolute")).unwrap();
        layers.make_dir(Path::new("/lib/modules/6.1")).unwrap();
        assert!(upper.join("usr/lib/modules/6.1").is_dir());
        let (below, above) = (lower.join("usr/lib"), upper.join("usr/lib"));
        let [below, above] = [below, above].map(|dir| dir.metadata().unwrap());
        assert_eq!(above.mode(), below.mode());
        layers.place(&[file("/absolute/f"), file("/new/dir/f")]).unwrap();
        assert_eq!(fs::read(upper.join("usr/lib/f")).unwrap(), b"new");
        assert_eq!(upper.join("new/dir/f").metadata().unwrap().mode() & 0o7777, 0o640);
        assert!(!upper.join("lib").exists());
    }

    #[test]
    fn the_lower_layers_time_is_kept() {
        let dirs = Dirs::new("time");
        let (lower, upper) = (dirs.0.join("lower"), dirs.0.join("upper"));
        let layers = Layers { lower: &lower, upper: &upper };
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        fs::File::open(lower.join("usr/lib")).unwrap().set_modified(old).unwrap();
        layers.make_dir(Path::new("/lib")).unwrap();
        assert_eq!(upper.join("usr/lib").metadata().unwrap().modified().unwrap(), old);
    }

    #[test]
    fn nothing_that_is_there_is_hidden() {
        let dirs = Dirs::new("hide");
        let (lower, upper) = (dirs.0.join("lower"), dirs.0.join("upper"));
        let layers = Layers { lower: &lower, upper: &upper };
        layers.place(&[file("/usr/lib")]).unwrap_err();
        symlink("nowhere", lower.join("dangling")).unwrap();
        layers.make_dir(Path::new("/dangling/x")).unwrap_err();
        fs::write(lower.join("plain"), "").unwrap();
        layers.make_dir(Path::new("/plain/x")).unwrap_err();
        // A link is replaced, not followed.
        layers.place(&[file("/dangling")]).unwrap();
        assert!(upper.join("dangling").symlink_metadata().unwrap().is_file());
    }
}
