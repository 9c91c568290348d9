//! Entries in the making, and what is left of those whose maker died.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::{
    CacheError, Durability, flush_tree, is_linked, make_dirs, open_lock_file, remove_tree,
};

/// The directory of all of a kind.
const DIR: &str = ".staging";

/// What a lock file is called, beside its tree.
const LOCK: &str = ".lock";

/// After how long a thing that another machine had in the making is litter: building anything takes minutes.
const OTHERS_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// The end of the names of all that this machine has in the making, since it was booted: the first digits of
/// its boot id.
fn machine() -> &'static str {
    static MACHINE: LazyLock<String> = LazyLock::new(|| {
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits: String = id.chars().filter(char::is_ascii_hexdigit).take(8).collect();
        format!("@{digits}")
    });
    &MACHINE
}

/// Whether a machine that cannot be asked may still be at it: its locks are not seen here.
fn may_be_anothers(stem: &str, lock: &Path) -> bool {
    let maker = stem.rsplit('.').next().unwrap_or_default();
    let own = !maker.contains('@') || maker.ends_with(machine());
    let changed = fs::symlink_metadata(lock).and_then(|meta| meta.modified());
    let age = |changed| SystemTime::now().duration_since(changed).unwrap_or_default();
    !own && changed.is_ok_and(|changed| age(changed) < OTHERS_AGE)
}

/// Deletes what dead processes left in the staging directory of a kind.
pub(super) fn sweep(kind_dir: &Path) -> Result<(), CacheError> {
    let dir = kind_dir.join(DIR);
    let Ok(listing) = fs::read_dir(&dir) else { return Ok(()) };
    for item in listing.flatten() {
        let Some(name) = item.file_name().to_str().map(str::to_owned) else { continue };
        let stem = name.strip_suffix(LOCK).unwrap_or(&name);
        let (lock_path, tree) = (dir.join(format!("{stem}{LOCK}")), dir.join(stem));
        if may_be_anothers(stem, &lock_path) {
            continue;
        }
        // The lock file is made before its tree and deleted after it, so a tree without one
        // is litter too.
        let lock = match File::open(&lock_path) {
            Ok(file) => match file.try_lock() {
                Ok(()) => Some(file),
                Err(_) => continue,
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(_) => continue,
        };
        remove_tree(&tree)?;
        if lock.is_some() {
            let _ = fs::remove_file(&lock_path);
        }
    }
    Ok(())
}

/// A directory in the making; dropping it deletes it.
pub(super) struct Staging {
    dir: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl Staging {
    pub(super) fn new(kind_dir: &Path, key: &str) -> Result<Staging, CacheError> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let parent = kind_dir.join(DIR);
        make_dirs(&parent)?;
        loop {
            let count = COUNTER.fetch_add(1, Ordering::Relaxed);
            let name = format!("{key}.{}.{count}{}", std::process::id(), machine());
            let dir = parent.join(&name);
            let lock_path = parent.join(format!("{name}{LOCK}"));
            let fail = |error| CacheError::io("make a staging directory", &dir, error);
            let lock = open_lock_file(&lock_path).map_err(fail)?;
            // Between its making and its locking a sweeper may have taken the file for litter. It
            // is ours only when it is still the one in the directory. (Another process with this
            // pid can be there too, in a container that shares the cache.)
            if lock.try_lock().is_err() || !is_linked(&lock, &lock_path) {
                continue;
            }
            match DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => return Ok(Staging { dir, lock_path, _lock: lock }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    remove_tree(&dir)?;
                    let _ = fs::remove_file(&lock_path);
                }
                Err(error) => {
                    let _ = fs::remove_file(&lock_path);
                    return Err(fail(error));
                }
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.dir
    }

    /// Flushes the tree to disk, if it is to be durable, and renames it to its place.
    pub(super) fn publish(self, entry: &Path, durability: Durability) -> Result<(), CacheError> {
        let flushed = durability == Durability::Flushed;
        if flushed {
            flush_tree(&self.dir).map_err(|e| CacheError::io("flush to disk", &self.dir, e))?;
        }
        fs::rename(&self.dir, entry)
            .map_err(|e| CacheError::io("move into the cache the entry", entry, e))?;
        if flushed && let Some(parent) = entry.parent() {
            File::open(parent)
                .and_then(|dir| dir.sync_all())
                .map_err(|e| CacheError::io("flush the cache directory", parent, e))?;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What cannot be deleted here is litter for the next sweep.
        if remove_tree(&self.dir).is_ok() {
            let _ = fs::remove_file(&self.lock_path);
        }
    }
}
