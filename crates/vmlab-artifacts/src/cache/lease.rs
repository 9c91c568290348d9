//! Entries in use, and the deletion of those that are not.
//!
//! Whoever uses an entry over a long time holds a shared `flock` lock on its directory, and whoever
//! deletes one holds an exclusive lock. A lock goes with its holder, however that ends.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use super::{Cache, CacheError, Flaw, is_linked};

/// Keeps a cache entry from being deleted for as long as it is there.
#[derive(Debug)]
pub struct Lease {
    dir: File,
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Closing it would not do: a process that another thread has just forked has the descriptor, too, until it
        // executes its program.
        let _ = self.dir.unlock();
    }
}

impl Lease {
    /// Takes an entry that was found; `None` when it has been deleted since. The time of the last
    /// lease is the entry's time of change.
    pub(crate) fn take(entry: &Path) -> Result<Option<Lease>, CacheError> {
        let dir = match File::open(entry) {
            Ok(dir) => dir,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(CacheError::io("open the cache entry", entry, error)),
        };
        dir.lock_shared().map_err(|e| CacheError::io("lock the cache entry", entry, e))?;
        if !is_linked(&dir, entry) {
            return Ok(None);
        }
        // It serves the choice of what to delete first only: another user's cache can be used, too.
        let _ = dir.set_modified(SystemTime::now());
        Ok(Some(Lease { dir }))
    }

    /// Whether somebody has a lease on an entry; if not, nobody gets one until the file is closed.
    pub(super) fn exclude(entry: &Path) -> Result<Option<File>, CacheError> {
        let Ok(dir) = File::open(entry) else { return Ok(None) };
        match dir.try_lock() {
            Err(TryLockError::WouldBlock) => Err(CacheError::InUse { path: entry.to_owned() }),
            // A filesystem without locks has no leases either.
            _ => Ok(Some(dir)),
        }
    }
}

/// The leases of one thing that needs several entries; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Leases(Arc<Mutex<Vec<Lease>>>);

impl Leases {
    /// Holds a lease for as long as there is any clone of this.
    pub fn add(&self, lease: Lease) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(lease);
    }

    /// Holds what others hold as well.
    pub fn join(&self, others: Leases) {
        let mut taken = others.0.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = std::mem::take(&mut *taken);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(taken);
    }
}

impl Cache {
    /// Takes an entry into use; `None` when there is none. It is not verified.
    ///
    /// # Errors
    /// [`CacheError::Io`] when it cannot be locked.
    pub fn lease(&self, kind: &str, key: &str) -> Result<Option<Lease>, CacheError> {
        Lease::take(&self.entry_path(kind, key)?)
    }

    /// As [`get_or_build`](Cache::get_or_build), for a kind of which only so many entries are kept: those
    /// that were used last. The entry found stays for as long as `leases` does.
    ///
    /// # Errors
    /// As [`get_or_build`](Cache::get_or_build).
    pub fn get_or_build_bounded<E: From<CacheError>>(
        &self,
        (kind, keep): (&str, usize),
        key: &str,
        leases: &Leases,
        verify: impl Fn(&Path) -> Result<(), Flaw>,
        build: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        let mut built = false;
        let build = |dir: &Path| {
            built = true;
            build(dir)
        };
        let (entry, lease) = self.get_or_build_leased(kind, key, verify, build, |_| {})?;
        leases.add(lease);
        if built {
            self.prune(kind, keep)?;
        }
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_lease_is_over_even_if_a_forked_process_has_its_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let lease = Lease::take(dir.path()).unwrap().unwrap();
        assert!(Lease::exclude(dir.path()).is_err());
        let forked = lease.dir.try_clone().unwrap();
        drop(lease);
        assert!(Lease::exclude(dir.path()).unwrap().is_some());
        drop(forked);
    }

    fn build(cache: &Cache, key: &str) -> Lease {
        let fill = |_: &Path| -> Result<(), CacheError> { Ok(()) };
        cache.get_or_build_leased("k", key, |_| Ok(()), fill, |_| {}).unwrap().1
    }

    fn keys(cache: &Cache) -> Vec<String> {
        cache.entries("k").unwrap().into_iter().map(|entry| entry.key).collect()
    }

    #[test]
    fn what_is_in_use_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let (one, two) = (build(&cache, "a"), build(&cache, "a"));
        drop(one);
        let error = cache.remove("k", "a").unwrap_err();
        assert!(matches!(error, CacheError::InUse { .. }), "{error}");
        assert_eq!(keys(&cache), ["a"]);
        let leases = Leases::default();
        leases.add(two);
        let clone = leases.clone();
        drop(leases);
        assert!(cache.remove("k", "a").is_err());
        drop(clone);
        assert!(cache.remove("k", "a").unwrap());
        assert!(Lease::take(&dir.path().join("k/a")).unwrap().is_none());
    }

    #[test]
    fn a_bounded_kind_loses_what_is_not_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let leases = Leases::default();
        let get = |key: &str, leases: &Leases| {
            let fill = |_: &Path| -> Result<(), CacheError> { Ok(()) };
            cache.get_or_build_bounded(("k", 1), key, leases, |_| Ok(()), fill).unwrap()
        };
        assert!(get("a", &leases).ends_with("k/a"));
        get("b", &Leases::default());
        get("c", &Leases::default());
        assert_eq!(keys(&cache), ["a", "c"]);
    }

    #[test]
    fn the_entries_that_were_used_last_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        for (age, key) in ["a", "b", "c", "d", "e"].iter().rev().enumerate() {
            drop(build(&cache, key));
            let time = SystemTime::now() - Duration::from_secs(100 * (age as u64 + 1));
            File::open(dir.path().join("k").join(key)).unwrap().set_modified(time).unwrap();
        }
        // The oldest is used again, the next one is in use.
        drop(build(&cache, "a"));
        let held = File::open(dir.path().join("k/b")).unwrap();
        held.lock_shared().unwrap();
        cache.prune("k", 2).unwrap();
        assert_eq!(keys(&cache), ["a", "b", "e"]);
        drop(held);
        cache.prune("k", 2).unwrap();
        assert_eq!(keys(&cache), ["a", "e"]);
        cache.prune("k", 2).unwrap();
        assert_eq!(keys(&cache), ["a", "e"]);
        cache.prune("none", 0).unwrap();
    }
}
