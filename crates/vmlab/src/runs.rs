//! Where the logs of runs are kept.
//!
//! Every run has a directory below `$XDG_STATE_HOME/vmlab/runs`. The newest are kept, so that what a
//! failed run left can still be looked at; nothing but logs is ever in them. Runs that belong together
//! share one, and each has a part of it.

use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::Error;

/// How many runs' logs are kept.
const KEPT_RUNS: usize = 50;

/// Held locked while the run goes on.
const LOCK: &str = "lock";

/// The directory for the logs of a run. It is private to the user, and stays for some time after the run.
#[derive(Debug, Clone)]
pub struct RunDir {
    path: PathBuf,
    /// Shared with the parts, so that none of them is removed while a run goes on in another.
    lock: Arc<File>,
}

impl RunDir {
    /// Makes a directory for a new run, and removes the oldest ones.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create() -> Result<Self, Error> {
        Self::create_in(&default_root()?)
    }

    fn create_in(root: &Path) -> Result<Self, Error> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{:013}-{}-{count:06}", now.as_millis(), std::process::id());
        let path = root.join(name);
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(failed(&path))?;
        let lock = private_file(&path.join(LOCK)).map_err(failed(&path))?;
        lock.lock().map_err(failed(&path))?;
        prune(root);
        Ok(Self { path, lock: Arc::new(lock) })
    }

    /// Makes a directory in it for one of several runs that belong together. They count as one where the
    /// oldest are removed.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn part(&self, name: &str) -> Result<Self, Error> {
        let path = self.path.join(name);
        DirBuilder::new().mode(0o700).create(&path).map_err(failed(&path))?;
        Ok(Self { path, lock: Arc::clone(&self.lock) })
    }

    /// Makes a file in it that only the user can read, whatever their umask.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn file(&self, name: &str) -> Result<File, Error> {
        let path = self.path.join(name);
        private_file(&path).map_err(failed(&path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Error {
    |source| Error::Io {
        what: "make the log",
        path: path.to_owned(),
        source,
        hint: "; XDG_STATE_HOME chooses another place",
    }
}

/// Makes a file that only the user can read, whatever their umask.
pub(crate) fn private_file(path: &Path) -> io::Result<File> {
    File::options().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// The same where there is none yet.
pub(crate) fn new_private_file(path: &Path) -> io::Result<File> {
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

/// Puts such a file in the place of another as a whole.
pub(crate) fn replace_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let aside = path.with_extension(std::process::id().to_string());
    let mut file = new_private_file(&aside)?;
    let replaced = file.write_all(content).and_then(|()| std::fs::rename(&aside, path));
    if replaced.is_err() {
        let _ = std::fs::remove_file(&aside);
    }
    replaced
}

fn default_root() -> Result<PathBuf, Error> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let state = absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .ok_or_else(|| Error::Io {
            what: "find a place for logs in",
            path: PathBuf::from("$XDG_STATE_HOME"),
            source: io::ErrorKind::NotFound.into(),
            hint: ": neither it nor HOME is set",
        })?;
    Ok(state.join("vmlab/runs"))
}

/// Removes the oldest directories of runs that have ended. What cannot be removed stays.
fn prune(root: &Path) {
    let Ok(entries) = root.read_dir() else { return };
    let mut dirs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    dirs.sort();
    let excess = dirs.len().saturating_sub(KEPT_RUNS);
    for dir in &dirs[..excess] {
        let ended = match File::open(dir.join(LOCK)) {
            Ok(lock) => lock.try_lock().is_ok(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if ended {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_newest_and_the_running_are_kept() {
        let root = tempfile::tempdir().unwrap();
        let whole = RunDir::create_in(root.path()).unwrap();
        // A part holds the lock of the whole.
        let running = whole.part("7").unwrap();
        drop(whole);
        let mode = running.path().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let ended: Vec<PathBuf> = (0..KEPT_RUNS + 3)
            .map(|_| RunDir::create_in(root.path()).unwrap().path().to_owned())
            .collect();
        assert!(running.path().exists());
        assert!(!ended[0].exists() && !ended[1].exists());
        assert!(ended[ended.len() - 1].exists());
        let left = root.path().read_dir().unwrap().count();
        assert!((KEPT_RUNS..=KEPT_RUNS + 1).contains(&left), "{left}");
    }
}
