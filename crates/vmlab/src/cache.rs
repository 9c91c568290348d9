//! Looking after the cache: what is in it, whether it is whole, and making it smaller.

use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::Serialize;
use vmlab_artifacts::cache::{Flaw, Freed};
use vmlab_artifacts::{Bound, Cache, CacheError, KINDS, Kind};

use crate::error::chain;
use crate::{Error, boot, disk, image, snapshot};

/// The name under which what is remembered of files and of the host can be cleared. It is no kind of
/// entries.
pub const REMEMBERED: &str = "remembered";

/// All kinds that this program makes.
fn kinds() -> impl Iterator<Item = Kind> {
    KINDS.into_iter().chain(boot::KINDS).chain([
        image::CACHE_KIND,
        disk::CACHE_KIND,
        snapshot::CACHE_KIND,
    ])
}

/// What is in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Contents {
    /// Where it is.
    pub root: PathBuf,
    /// All entries, by kind; in a kind the least recently used first.
    pub entries: Vec<Entry>,
    /// Bytes on disk of all of them.
    pub bytes: u64,
}

/// An entry of the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// What it is: `kernels`, `boot-images` and so on.
    pub kind: String,
    /// What it was built under.
    pub key: String,
    /// Its directory.
    pub path: PathBuf,
    /// Bytes on disk that deleting it would free.
    pub bytes: u64,
    /// When it was last taken into use, in seconds since 1970.
    pub last_used: u64,
    /// Whether a VM that runs, or something else, uses it now.
    pub in_use: bool,
}

/// An entry that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damaged {
    /// Its kind.
    pub kind: String,
    /// Its key.
    pub key: String,
    /// What is wrong with it.
    pub flaw: String,
    /// Whether it was removed.
    pub removed: bool,
}

/// What came out of verifying entries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// How many entries were looked at.
    pub verified: usize,
    /// Those of them that are not whole.
    pub damaged: Vec<Damaged>,
    /// How many more are of kinds that this version of vmlab does not know.
    pub unknown: usize,
}

/// What was removed from a kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// The kind; for a limit of all of them, `all kinds`.
    pub kind: String,
    /// How many entries were removed.
    pub entries: usize,
    /// What they took on disk, in bytes.
    pub bytes: u64,
    /// How many were to go and stayed, because they are in use.
    pub in_use: usize,
}

impl Removed {
    fn of(kind: &str, freed: Freed) -> Self {
        let Freed { entries, bytes, in_use } = freed;
        Self { kind: kind.to_owned(), entries, bytes, in_use }
    }
}

/// Looks for damage in an entry of the cache; `None` for a kind that is not known.
pub fn verify_entry(kind: &str, path: &Path) -> Option<Result<(), Flaw>> {
    kinds().find(|known| known.name == kind).map(|known| (known.verify)(path))
}

/// Lists what is in the cache.
///
/// # Errors
/// When it cannot be read.
pub fn list(cache: &Cache) -> Result<Contents, Error> {
    let mut entries = Vec::new();
    for kind in cache.kinds()? {
        for entry in cache.usage(&kind)? {
            let since = entry.last_used.duration_since(UNIX_EPOCH).unwrap_or_default();
            entries.push(Entry {
                kind: kind.clone(),
                key: entry.key,
                path: entry.path,
                bytes: entry.bytes,
                last_used: since.as_secs(),
                in_use: entry.in_use,
            });
        }
    }
    let bytes = entries.iter().map(|entry| entry.bytes).sum();
    Ok(Contents { root: cache.root().to_owned(), entries, bytes })
}

/// Verifies all entries of some kinds, or of all where none is named, and removes those that are not
/// whole if `repair` says so. What is removed is made or fetched again when it is wanted.
///
/// # Errors
/// [`Error::NoSuchKind`], and when the cache cannot be read or written.
pub fn verify(cache: &Cache, of: &[String], repair: bool) -> Result<Verification, Error> {
    let mut found = Verification::default();
    for kind in selected(cache, of)? {
        for entry in cache.entries(&kind)? {
            let flaw = match verify_entry(&kind, &entry.path) {
                Some(Ok(())) => None,
                Some(Err(flaw)) => Some(chain(&*flaw)),
                None => {
                    found.unknown += 1;
                    continue;
                }
            };
            // One that was removed in the meantime is neither whole nor damaged.
            if !entry.path.exists() {
                continue;
            }
            found.verified += 1;
            if let Some(flaw) = flaw {
                let removed = repair && removed(cache, &kind, &entry.key)?;
                found.damaged.push(Damaged { kind: kind.clone(), key: entry.key, flaw, removed });
            }
        }
    }
    Ok(found)
}

/// Removes an entry unless it is in use.
fn removed(cache: &Cache, kind: &str, key: &str) -> Result<bool, Error> {
    match cache.remove(kind, key) {
        Ok(removed) => Ok(removed),
        Err(CacheError::InUse { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Removes what is beyond the bounds of each kind, and what killed processes left; then the least recently
/// used entries of all kinds until they take no more than `max` bytes, if that is given.
///
/// # Errors
/// When the cache cannot be read or written.
pub fn collect_garbage(cache: &Cache, max: Option<u64>) -> Result<Vec<Removed>, Error> {
    let mut all = Vec::new();
    let kinds_there = cache.kinds()?;
    for kind in &kinds_there {
        let known = kinds().find(|known| known.name == kind);
        let freed = match known.map_or(Bound::None, |known| known.bound) {
            Bound::None => Freed::default(),
            Bound::Entries(keep) => cache.prune(kind, keep)?,
            // The user can have another bound for these.
            Bound::Bytes(_) if kind == snapshot::KIND => snapshot::prune(cache)?,
            Bound::Bytes(bytes) => cache.prune_to_size(kind, bytes)?,
        };
        all.push(Removed::of(kind, freed));
        cache.sweep_litter(kind)?;
    }
    let forgotten = Freed { entries: cache.forget(false), ..Freed::default() };
    all.push(Removed::of(REMEMBERED, forgotten));
    if let Some(max) = max {
        all.push(Removed::of("all kinds", cache.prune_all_to_size(&kinds_there, max)?));
    }
    all.retain(|removed| removed.entries > 0 || removed.in_use > 0);
    Ok(all)
}

/// Removes all entries of some kinds, or of all where none is named, that are not in use.
///
/// # Errors
/// [`Error::NoSuchKind`], and when the cache cannot be read or written.
pub fn clear(cache: &Cache, of: &[String]) -> Result<Vec<Removed>, Error> {
    let mut all = Vec::new();
    for kind in selected(cache, of)? {
        let freed = cache.clear(&kind)?;
        cache.sweep_litter(&kind)?;
        all.push(Removed::of(&kind, freed));
    }
    if of.is_empty() || of.iter().any(|name| name == REMEMBERED) {
        let freed = Freed { entries: cache.forget(true), ..Freed::default() };
        all.push(Removed::of(REMEMBERED, freed));
    }
    all.retain(|removed| removed.entries > 0 || removed.in_use > 0);
    Ok(all)
}

/// The kinds with these names; all that are in the cache where there are no names.
fn selected(cache: &Cache, names: &[String]) -> Result<Vec<String>, Error> {
    let there = cache.kinds()?;
    if names.is_empty() {
        return Ok(there);
    }
    let known = |name: &String| there.contains(name) || kinds().any(|kind| kind.name == name);
    let mut selected = Vec::new();
    for name in names.iter().filter(|name| *name != REMEMBERED) {
        if !known(name) {
            let mut have: Vec<String> = kinds().map(|kind| kind.name.to_owned()).collect();
            have.extend(there);
            have.push(REMEMBERED.to_owned());
            have.sort();
            have.dedup();
            return Err(Error::NoSuchKind { name: name.clone(), have });
        }
        if !selected.contains(name) {
            selected.push(name.clone());
        }
    }
    Ok(selected)
}

#[cfg(test)]
mod tests;
