//! A cache of directories, each built once and verified at every look-up.
//!
//! ```text
//! ROOT/KIND/KEY/            an entry; it appears by one rename and is never changed after
//!                       whoever uses it for long holds a shared lock on it
//! ROOT/KIND/.lock/KEY       held by whoever builds that entry; the holder's pid is in it
//! ROOT/KIND/.staging/NAME/  an entry in the making, or one on its way out
//! ROOT/KIND/.staging/NAME.lock   held as long as NAME's maker lives; a free lock marks litter
//! ```
//!
//! The locks are `flock` locks, which the operating system drops when their holder dies, however
//! it dies. So nobody waits for a dead process, and what it left behind is swept by the next one. They hold
//! within one machine; what another has in the making (a guest that shares the cache) is left alone for a day.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

mod content_key;
mod error;
mod lease;
mod manifest;
mod remembered;
mod staging;
#[cfg(test)]
mod tests;
mod usage;

pub use content_key::{ContentKey, Digest};
pub use error::CacheError;
pub(crate) use error::advice;
pub use lease::{Lease, Leases};
pub use manifest::{Manifest, ManifestError};
pub use remembered::{ContentStamp, Sources};
use staging::Staging;
pub use usage::{EntryUsage, Freed};

/// Overrides the place of the cache.
pub const CACHE_DIR_ENV: &str = "VMLAB_CACHE_DIR";

/// Longest key, so that a staging name made of it stays a legal file name (255 bytes).
const MAX_KEY: usize = 180;

/// Up to this many files are flushed one by one; for more, one flush of the file system is cheaper.
const MAX_FSYNC: usize = 64;

/// Why an entry is not what it should be.
pub type Flaw = Box<dyn std::error::Error + Send + Sync>;

/// A directory of verified entries, shared by any number of processes.
///
/// Opening one touches nothing on disk; directories (mode 0700) are made when something is built.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// One entry, as [`Cache::entries`] lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheEntry {
    /// The key that it was built under.
    pub key: String,
    /// Its directory.
    pub path: PathBuf,
}

impl Cache {
    /// The user's cache: `$VMLAB_CACHE_DIR`, else `$XDG_CACHE_HOME/vmlab`, else `~/.cache/vmlab`.
    ///
    /// # Errors
    /// [`CacheError::NoHome`] when none of the three variables is set.
    pub fn open_default() -> Result<Cache, CacheError> {
        default_root(|name| std::env::var_os(name)).map(Cache::at)
    }

    /// A cache at a place of the caller's choosing.
    pub fn at(root: impl Into<PathBuf>) -> Cache {
        Cache { root: root.into() }
    }

    /// The directory that holds all kinds.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The entry for `key`, if there is one that `verify` accepts. Takes no lock, changes nothing.
    ///
    /// # Errors
    /// [`CacheError::BadName`] for a kind or key that cannot be a file name.
    pub fn lookup(
        &self,
        kind: &str,
        key: &str,
        verify: impl Fn(&Path) -> Result<(), Flaw>,
    ) -> Result<Option<PathBuf>, CacheError> {
        let entry = self.entry_path(kind, key)?;
        Ok((entry.is_dir() && verify(&entry).is_ok()).then_some(entry))
    }

    /// The entry for `key`: the one that is there if `verify` accepts it, else a new one.
    ///
    /// `build` is given an empty directory to fill. When several threads or processes want one key
    /// at once, one of them builds and the others wait for it. An entry that `verify` rejects is
    /// thrown away and built anew.
    ///
    /// # Errors
    /// What `build` returns; [`CacheError`] when the cache cannot be written, or when `verify`
    /// rejects what was just built.
    pub fn get_or_build<E: From<CacheError>>(
        &self,
        kind: &str,
        key: &str,
        verify: impl Fn(&Path) -> Result<(), Flaw>,
        build: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        self.get_or_build_noting(kind, key, verify, build, |_| {})
    }

    /// As [`get_or_build`](Cache::get_or_build); `on_wait` is told the pid of the process that
    /// builds the entry, where that is known, before this one waits for it.
    ///
    /// # Errors
    /// As [`get_or_build`](Cache::get_or_build).
    pub fn get_or_build_noting<E: From<CacheError>>(
        &self,
        kind: &str,
        key: &str,
        verify: impl Fn(&Path) -> Result<(), Flaw>,
        build: impl FnOnce(&Path) -> Result<(), E>,
        on_wait: impl FnOnce(Option<u32>),
    ) -> Result<PathBuf, E> {
        self.get_or_build_leased(kind, key, verify, build, on_wait).map(|(entry, _)| entry)
    }

    /// As [`get_or_build_noting`](Cache::get_or_build_noting); nobody removes the entry as long as
    /// the lease is there.
    ///
    /// # Errors
    /// As [`get_or_build`](Cache::get_or_build).
    pub fn get_or_build_leased<E: From<CacheError>>(
        &self,
        kind: &str,
        key: &str,
        verify: impl Fn(&Path) -> Result<(), Flaw>,
        build: impl FnOnce(&Path) -> Result<(), E>,
        on_wait: impl FnOnce(Option<u32>),
    ) -> Result<(PathBuf, Lease), E> {
        self.get_or_build_with((kind, key), verify, build, (on_wait, None), Durability::Flushed)
    }

    /// As [`get_or_build_leased`](Cache::get_or_build_leased), but the entry is not flushed to disk: for
    /// what is large, and whose content `verify` checks after the host was restarted. Another process that
    /// builds it is not waited for beyond `until`.
    ///
    /// # Errors
    /// As [`get_or_build`](Cache::get_or_build), and [`CacheError::Busy`].
    pub fn get_or_build_unflushed<E: From<CacheError>>(
        &self,
        kind: &str,
        key: &str,
        verify: impl Fn(&Path) -> Result<(), Flaw>,
        build: impl FnOnce(&Path) -> Result<(), E>,
        on_wait: impl FnOnce(Option<u32>),
        until: Option<Instant>,
    ) -> Result<(PathBuf, Lease), E> {
        let durability = Durability::LeftToTheKernel;
        self.get_or_build_with((kind, key), verify, build, (on_wait, until), durability)
    }

    fn get_or_build_with<E: From<CacheError>>(
        &self,
        (kind, key): (&str, &str),
        verify: impl Fn(&Path) -> Result<(), Flaw>,
        build: impl FnOnce(&Path) -> Result<(), E>,
        (on_wait, until): (impl FnOnce(Option<u32>), Option<Instant>),
        durability: Durability,
    ) -> Result<(PathBuf, Lease), E> {
        let leased = || -> Result<Option<(PathBuf, Lease)>, CacheError> {
            let Some(entry) = self.lookup(kind, key, &verify)? else { return Ok(None) };
            Ok(Lease::take(&entry)?.map(|lease| (entry, lease)))
        };
        if let Some(found) = leased()? {
            return Ok(found);
        }
        let entry = self.entry_path(kind, key)?;
        // Who deletes an entry has this lock, too.
        let _lock = self.lock(kind, key, on_wait, until)?;
        if let Some(found) = leased()? {
            return Ok(found);
        }
        staging::sweep(&self.kind_dir(kind)?)?;
        let staging = Staging::new(&self.kind_dir(kind)?, key)?;
        build(staging.path())?;
        verify(staging.path()).map_err(|source| CacheError::BuiltBad {
            kind: kind.to_owned(),
            key: key.to_owned(),
            source,
        })?;
        // Not before: whoever uses it may still have to open something in it.
        self.discard(kind, key)?;
        staging.publish(&entry, durability)?;
        match Lease::take(&entry)? {
            Some(lease) => Ok((entry, lease)),
            None => {
                let gone = io::Error::from(io::ErrorKind::NotFound);
                Err(CacheError::io("find what was just built in the cache,", &entry, gone).into())
            }
        }
    }

    /// All entries of a kind, by key. They are not verified.
    ///
    /// # Errors
    /// [`CacheError::Io`] when the directory cannot be read; a missing one is an empty list.
    pub fn entries(&self, kind: &str) -> Result<Vec<CacheEntry>, CacheError> {
        let dir = self.kind_dir(kind)?;
        let listing = match fs::read_dir(&dir) {
            Ok(listing) => listing,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(CacheError::io("list the cache directory", &dir, error)),
        };
        let mut entries = Vec::new();
        for item in listing {
            let item = item.map_err(|e| CacheError::io("list the cache directory", &dir, e))?;
            match item.file_name().into_string() {
                Ok(key) if check_name("key", &key).is_ok() && item.path().is_dir() => {
                    entries.push(CacheEntry { key, path: item.path() });
                }
                _ => {}
            }
        }
        entries.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(entries)
    }

    /// Removes an entry; says whether there was one.
    ///
    /// # Errors
    /// [`CacheError::InUse`] when somebody has a lease on it, and [`CacheError::Io`] when it cannot be
    /// removed.
    pub fn remove(&self, kind: &str, key: &str) -> Result<bool, CacheError> {
        if fs::symlink_metadata(self.entry_path(kind, key)?).is_err() {
            return Ok(false);
        }
        let _lock = self.lock(kind, key, |_| {}, None)?;
        let _excluded = Lease::exclude(&self.entry_path(kind, key)?)?;
        staging::sweep(&self.kind_dir(kind)?)?;
        self.discard(kind, key)
    }

    fn kind_dir(&self, kind: &str) -> Result<PathBuf, CacheError> {
        check_name("kind", kind)?;
        Ok(self.root.join(kind))
    }

    fn entry_path(&self, kind: &str, key: &str) -> Result<PathBuf, CacheError> {
        check_name("key", key)?;
        Ok(self.kind_dir(kind)?.join(key))
    }

    /// Takes the lock of a key, waiting for as long as another holds it, but not beyond `until`.
    fn lock(
        &self,
        kind: &str,
        key: &str,
        on_wait: impl FnOnce(Option<u32>),
        until: Option<Instant>,
    ) -> Result<File, CacheError> {
        let dir = self.kind_dir(kind)?.join(".lock");
        make_dirs(&dir)?;
        let path = dir.join(key);
        let fail = |error| CacheError::io("lock the cache entry", &path, error);
        let mut on_wait = Some(on_wait);
        let mut file = loop {
            let mut file = open_lock_file(&path).map_err(fail)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut text = String::new();
                    let pid =
                        file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                    if let Some(on_wait) = on_wait.take() {
                        on_wait(pid);
                    }
                    match until {
                        None => file.lock().map_err(fail)?,
                        Some(until) => lock_until(&file, until, &path)?,
                    }
                }
                Err(TryLockError::Error(error)) => return Err(fail(error)),
            }
            // The lock of an entry that is gone may have been swept since it was opened.
            if is_linked(&file, &path) {
                break file;
            }
        };
        // The pid serves messages only, so a full disk is left for the build to report.
        let _ = file
            .rewind()
            .and_then(|()| file.set_len(0))
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(file)
    }

    /// Moves an entry out of sight, then deletes it. The caller holds the key's lock.
    fn discard(&self, kind: &str, key: &str) -> Result<bool, CacheError> {
        let entry = self.entry_path(kind, key)?;
        if fs::symlink_metadata(&entry).is_err() {
            return Ok(false);
        }
        let trash = Staging::new(&self.kind_dir(kind)?, key)?;
        let place = trash.path().join("removed");
        fs::rename(&entry, &place)
            .map_err(|e| CacheError::io("throw away the cache entry", &entry, e))?;
        Ok(true)
    }
}

/// Whether an entry is on disk before anybody sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Durability {
    Flushed,
    LeftToTheKernel,
}

fn default_root(var: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf, CacheError> {
    let set = |name: &str| var(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(root) = set(CACHE_DIR_ENV) {
        return std::path::absolute(&root)
            .map_err(|e| CacheError::io("find the cache directory", &root, e));
    }
    // The XDG base directory specification says to ignore relative paths.
    if let Some(base) = set("XDG_CACHE_HOME").filter(|path| path.is_absolute()) {
        return Ok(base.join("vmlab"));
    }
    match set("HOME").filter(|path| path.is_absolute()) {
        Some(home) => Ok(home.join(".cache/vmlab")),
        None => Err(CacheError::NoHome),
    }
}

fn check_name(what: &'static str, name: &str) -> Result<(), CacheError> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "._+~-:@,=".contains(c);
    if name.is_empty() || name.len() > MAX_KEY || name.starts_with('.') || !name.chars().all(legal)
    {
        return Err(CacheError::BadName { what, name: name.to_owned() });
    }
    Ok(())
}

fn make_dirs(dir: &Path) -> Result<(), CacheError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| CacheError::io("make the cache directory", dir, e))
}

pub(crate) fn open_lock_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Locks a file that another has locked; looks often, since flock(2) knows no time limit.
fn lock_until(file: &File, until: Instant, path: &Path) -> Result<(), CacheError> {
    const LOOK: Duration = Duration::from_millis(10);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(LOOK),
            Err(TryLockError::WouldBlock) => {
                return Err(CacheError::Busy { path: path.to_owned() });
            }
            Err(TryLockError::Error(error)) => {
                return Err(CacheError::io("lock the cache entry", path, error));
            }
        }
    }
}

fn is_linked(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn remove_tree(path: &Path) -> Result<(), CacheError> {
    let outcome = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match outcome {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(CacheError::io("delete", path, error))
        }
        _ => Ok(()),
    }
}

/// Makes a tree survive a power cut: few files are flushed by themselves, many with their disk.
fn flush_tree(root: &Path) -> io::Result<()> {
    let mut dirs = vec![root.to_owned()];
    let mut files = Vec::new();
    let mut next = 0;
    while let Some(dir) = dirs.get(next).cloned() {
        for item in fs::read_dir(&dir)? {
            let item = item?;
            let kind = item.file_type()?;
            if kind.is_dir() {
                dirs.push(item.path());
            } else if kind.is_file() {
                files.push(item.path());
            }
        }
        if files.len() > MAX_FSYNC {
            return Ok(rustix::fs::syncfs(File::open(root)?)?);
        }
        next += 1;
    }
    for path in files.iter().chain(&dirs) {
        File::open(path)?.sync_all()?;
    }
    Ok(())
}
