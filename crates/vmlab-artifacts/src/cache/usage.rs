//! What the cache takes on disk, and bringing that down.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::lease::Lease;
use super::{Cache, CacheError, check_name, is_linked, open_lock_file, staging};

/// Bytes in the unit of `st_blocks` (inode(7)).
const BLOCK: u64 = 512;

/// What one entry takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryUsage {
    /// The key that it was built under.
    pub key: String,
    /// Its directory.
    pub path: PathBuf,
    /// Bytes on disk that deleting it would free. A file that has names elsewhere, too, does not count.
    pub bytes: u64,
    /// When it was last taken into use.
    pub last_used: SystemTime,
    /// Whether somebody has a lease on it.
    pub in_use: bool,
}

/// What was deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    /// How many entries.
    pub entries: usize,
    /// What they took on disk, in bytes.
    pub bytes: u64,
    /// How many were to go and stayed, because they are in use.
    pub in_use: usize,
}

impl Cache {
    /// The kinds of which something is or was in the cache, by name.
    ///
    /// # Errors
    /// [`CacheError::Io`] when the directory cannot be read; a missing one is an empty list.
    pub fn kinds(&self) -> Result<Vec<String>, CacheError> {
        let listing = match fs::read_dir(self.root()) {
            Ok(listing) => listing,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(CacheError::io("list the cache directory", self.root(), error));
            }
        };
        let name = |item: fs::DirEntry| item.file_name().into_string().ok();
        let dirs = listing.flatten().filter(|item| item.path().is_dir());
        let mut kinds: Vec<String> =
            dirs.filter_map(name).filter(|name| check_name("kind", name).is_ok()).collect();
        kinds.sort();
        Ok(kinds)
    }

    /// All entries of a kind with what they take, the least recently used first. They are not verified.
    ///
    /// # Errors
    /// As [`entries`](Cache::entries).
    pub fn usage(&self, kind: &str) -> Result<Vec<EntryUsage>, CacheError> {
        let mut usage = Vec::new();
        for entry in self.entries(kind)? {
            // One that is gone by now is none.
            let Ok(last_used) = entry.path.metadata().and_then(|meta| meta.modified()) else {
                continue;
            };
            usage.push(EntryUsage {
                bytes: allocated(&entry.path),
                last_used,
                in_use: matches!(Lease::exclude(&entry.path), Err(CacheError::InUse { .. })),
                key: entry.key,
                path: entry.path,
            });
        }
        usage.sort_by(|a, b| (a.last_used, &a.key).cmp(&(b.last_used, &b.key)));
        Ok(usage)
    }

    /// Deletes the entries of a kind beyond the `keep` that were used last. Those in use stay.
    ///
    /// # Errors
    /// [`CacheError::Io`] when one cannot be deleted.
    pub fn prune(&self, kind: &str, keep: usize) -> Result<Freed, CacheError> {
        let mut freed = Freed::default();
        if self.entries(kind)?.len() <= keep {
            return Ok(freed);
        }
        let entries = self.usage(kind)?;
        let surplus = entries.len().saturating_sub(keep);
        for entry in &entries[..surplus] {
            self.remove_counted(kind, entry, &mut freed)?;
        }
        Ok(freed)
    }

    /// Deletes the least recently used entries of a kind until the rest takes no more than `bytes` on
    /// disk. Those in use stay.
    ///
    /// # Errors
    /// [`CacheError::Io`] when one cannot be deleted.
    pub fn prune_to_size(&self, kind: &str, bytes: u64) -> Result<Freed, CacheError> {
        let entries = self.usage(kind)?;
        let entries: Vec<(&str, EntryUsage)> = entries.into_iter().map(|e| (kind, e)).collect();
        self.shrink(&entries, bytes)
    }

    /// Deletes the least recently used entries of all these kinds until the rest takes no more than
    /// `bytes` on disk. Those in use stay.
    ///
    /// # Errors
    /// [`CacheError::Io`] when one cannot be deleted.
    pub fn prune_all_to_size(&self, kinds: &[String], bytes: u64) -> Result<Freed, CacheError> {
        let mut entries = Vec::new();
        for kind in kinds {
            entries.extend(self.usage(kind)?.into_iter().map(|entry| (kind.as_str(), entry)));
        }
        entries.sort_by_key(|(_, entry)| entry.last_used);
        self.shrink(&entries, bytes)
    }

    /// Deletes all entries of a kind that are not in use.
    ///
    /// # Errors
    /// [`CacheError::Io`] when one cannot be deleted.
    pub fn clear(&self, kind: &str) -> Result<Freed, CacheError> {
        let mut freed = Freed::default();
        for entry in self.usage(kind)? {
            self.remove_counted(kind, &entry, &mut freed)?;
        }
        Ok(freed)
    }

    /// Deletes what killed processes left of a kind: trees that are not whole, and the locks of entries
    /// that are gone.
    ///
    /// # Errors
    /// [`CacheError::Io`] when something cannot be deleted.
    pub fn sweep_litter(&self, kind: &str) -> Result<(), CacheError> {
        staging::sweep(&self.kind_dir(kind)?)?;
        let dir = self.root().join(kind);
        let Ok(locks) = fs::read_dir(dir.join(".lock")) else { return Ok(()) };
        for item in locks.flatten() {
            if fs::symlink_metadata(dir.join(item.file_name())).is_ok() {
                continue;
            }
            // Whoever waits for this lock finds that its file is gone, and makes a new one.
            if let Ok(lock) = open_lock_file(&item.path())
                && lock.try_lock().is_ok()
                && is_linked(&lock, &item.path())
            {
                let _ = fs::remove_file(item.path());
            }
        }
        Ok(())
    }

    /// Deletes entries from the first on until the rest is small enough.
    fn shrink(&self, entries: &[(&str, EntryUsage)], bytes: u64) -> Result<Freed, CacheError> {
        let mut left: u64 = entries.iter().map(|(_, entry)| entry.bytes).sum();
        let mut freed = Freed::default();
        for (kind, entry) in entries {
            if left <= bytes {
                break;
            }
            if self.remove_counted(kind, entry, &mut freed)? {
                left -= entry.bytes;
            }
        }
        Ok(freed)
    }

    fn remove_counted(
        &self,
        kind: &str,
        entry: &EntryUsage,
        freed: &mut Freed,
    ) -> Result<bool, CacheError> {
        match self.remove(kind, &entry.key) {
            Ok(removed) => {
                freed.entries += usize::from(removed);
                freed.bytes += if removed { entry.bytes } else { 0 };
                Ok(true)
            }
            Err(CacheError::InUse { .. }) => {
                freed.in_use += 1;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

/// Bytes on disk that deleting a tree would free. What cannot be looked at counts nothing.
fn allocated(tree: &Path) -> u64 {
    let mut bytes = 0;
    // Of files with several names: how many of them are in the tree.
    let mut shared: HashMap<(u64, u64), (u64, u64)> = HashMap::new();
    let mut todo = vec![tree.to_owned()];
    while let Some(path) = todo.pop() {
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        let size = meta.blocks() * BLOCK;
        if meta.is_dir() {
            bytes += size;
            let listing = fs::read_dir(&path).into_iter().flatten().flatten();
            todo.extend(listing.map(|item| item.path()));
        } else if meta.nlink() == 1 {
            bytes += size;
        } else {
            let (names, _) = shared.entry((meta.dev(), meta.ino())).or_insert((meta.nlink(), size));
            *names = names.saturating_sub(1);
        }
    }
    bytes + shared.values().filter(|(elsewhere, _)| *elsewhere == 0).map(|(_, s)| s).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use super::*;
    use crate::cache::tests::{staged, whole};

    const MIB: u64 = 1 << 20;

    /// An entry with a file of one MiB, last used so many seconds ago.
    fn build(cache: &Cache, kind: &str, key: &str, age: u64) {
        let fill = |dir: &Path| -> Result<(), CacheError> {
            fs::write(dir.join("content"), "whole").unwrap();
            fs::write(dir.join("data"), vec![1; MIB as usize]).unwrap();
            Ok(())
        };
        let path = cache.get_or_build(kind, key, whole, fill).unwrap();
        let time = SystemTime::now() - Duration::from_secs(age);
        File::open(path).unwrap().set_modified(time).unwrap();
    }

    fn keys(cache: &Cache, kind: &str) -> Vec<String> {
        cache.usage(kind).unwrap().into_iter().map(|entry| entry.key).collect()
    }

    #[test]
    fn a_kind_is_brought_to_a_size_by_what_was_used_last() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        for (key, age) in [("a", 10), ("b", 40), ("c", 30), ("d", 20)] {
            build(&cache, "k", key, age);
        }
        assert_eq!(keys(&cache, "k"), ["b", "c", "d", "a"]);
        let one = cache.usage("k").unwrap()[0].bytes;
        assert!((MIB..MIB + MIB / 2).contains(&one), "{one}");
        assert_eq!(cache.prune_to_size("k", 4 * one).unwrap(), Freed::default());

        let lease = cache.lease("k", "c").unwrap().unwrap();
        let time = SystemTime::now() - Duration::from_secs(30);
        File::open(dir.path().join("k/c")).unwrap().set_modified(time).unwrap();
        assert!(cache.usage("k").unwrap()[1].in_use);
        // Too large by one byte: the oldest goes, and the next one is in use.
        let freed = cache.prune_to_size("k", 3 * one - 1).unwrap();
        assert_eq!(freed, Freed { entries: 2, bytes: 2 * one, in_use: 1 });
        assert_eq!(keys(&cache, "k"), ["c", "a"]);
        assert_eq!(cache.prune_to_size("k", 0).unwrap().entries, 1);
        assert_eq!(keys(&cache, "k"), ["c"]);
        drop(lease);
        assert!(!cache.usage("k").unwrap()[0].in_use);
        assert_eq!(cache.prune_to_size("k", 0).unwrap().entries, 1);
        assert_eq!(cache.prune_to_size("none", 0).unwrap(), Freed::default());
    }

    #[test]
    fn kinds_share_a_size() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        for (kind, key, age) in [("k", "a", 10), ("l", "b", 40), ("k", "c", 30), ("l", "d", 20)] {
            build(&cache, kind, key, age);
        }
        fs::write(dir.path().join("file"), "").unwrap();
        cache.remember("s", "k", &Default::default(), &1);
        let kinds = cache.kinds().unwrap();
        assert_eq!(kinds, ["k", "l"]);
        let one = cache.usage("k").unwrap()[0].bytes;
        let freed = cache.prune_all_to_size(&kinds, 2 * one).unwrap();
        assert_eq!(freed, Freed { entries: 2, bytes: 2 * one, in_use: 0 });
        assert_eq!((keys(&cache, "k"), keys(&cache, "l")), (vec!["a".into()], vec!["d".into()]));
        assert_eq!(cache.clear("k").unwrap(), Freed { entries: 1, bytes: one, in_use: 0 });
        assert!(keys(&cache, "k").is_empty());
        assert!(Cache::at(dir.path().join("none")).kinds().unwrap().is_empty());
    }

    #[test]
    fn only_what_would_be_freed_counts() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("sub")).unwrap();
        let empty = allocated(&tree);
        fs::write(tree.join("sub/data"), vec![1; MIB as usize]).unwrap();
        let one = allocated(&tree) - empty;
        assert!(one >= MIB);
        fs::hard_link(tree.join("sub/data"), tree.join("again")).unwrap();
        assert_eq!(allocated(&tree) - empty, one, "two names within the tree are one file");
        fs::hard_link(tree.join("sub/data"), dir.path().join("outside")).unwrap();
        assert_eq!(allocated(&tree), empty);
        // A hole takes nothing.
        File::create(tree.join("sparse")).unwrap().set_len(64 * MIB).unwrap();
        assert!(allocated(&tree) - empty < MIB);
    }

    #[test]
    fn litter_and_the_locks_of_gone_entries_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        for key in ["a", "b", "c"] {
            build(&cache, "k", key, 1);
        }
        cache.clear("k").unwrap();
        build(&cache, "k", "a", 1);
        fs::create_dir_all(dir.path().join("k/.staging/x.1.0/deep")).unwrap();
        let lock = |key: &str| dir.path().join("k/.lock").join(key);
        // Somebody builds this one.
        let held = open_lock_file(&lock("c")).unwrap();
        held.lock().unwrap();
        cache.sweep_litter("k").unwrap();
        assert!(staged(&cache).is_empty());
        assert!(lock("a").exists() && !lock("b").exists() && lock("c").exists());
    }

    #[test]
    fn a_lock_that_was_swept_is_not_mistaken_for_the_one_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let path = dir.path().join("k/.lock/key");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let swept = open_lock_file(&path).unwrap();
        swept.lock().unwrap();
        std::thread::scope(|scope| {
            let (send, waits) = std::sync::mpsc::channel();
            let cache = &cache;
            let waiting =
                scope.spawn(move || cache.lock("k", "key", |_| send.send(()).unwrap(), None));
            waits.recv().unwrap();
            fs::remove_file(&path).unwrap();
            drop(swept);
            let lock = waiting.join().unwrap().unwrap();
            assert!(is_linked(&lock, &path));
        });
    }
}
