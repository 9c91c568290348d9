//! What was worked out from files, remembered for as long as these are as they were.
//!
//! ```text
//! ROOT/.remembered/SUBJECT-KEY   one answer, with the stamps of the files that it came from
//! ```
//!
//! An answer is put in place by one rename. It takes no lock and is not flushed to disk: one that is
//! lost or damaged is worked out again.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use super::{Cache, ContentKey, Digest, check_name, make_dirs};

/// The directory of all answers.
pub(super) const REMEMBERED: &str = ".remembered";

/// How long a file must have been left alone before anything is remembered of it: the coarsest time
/// stamps, those of FAT, count in two seconds. A file that changes later has another stamp then.
const SETTLED: Duration = Duration::from_secs(2);

/// How many answers are kept, the latest; they have some hundred bytes each.
const KEPT: usize = 512;

/// The largest answer that is read, in bytes. The longest there are name some hundred modules.
const ANSWER_LEN_MAX: u64 = 1 << 20;

/// The state of a file, which is another one when its content was changed, as far as the filesystem can
/// tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentStamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    /// Seconds and nanoseconds; no program can set it to what it was.
    changed: (i64, i64),
}

impl ContentStamp {
    /// The state of the file that a path leads to.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn of(path: &Path) -> io::Result<ContentStamp> {
        fs::metadata(path).map(|meta| ContentStamp::from_metadata(&meta))
    }

    fn from_metadata(meta: &Metadata) -> ContentStamp {
        ContentStamp {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// Whether the file was left alone for so long before `now` that a change after it shows.
    fn is_settled(&self, now: SystemTime) -> bool {
        let Ok(now) = now.duration_since(UNIX_EPOCH) else { return false };
        let Some(limit) = now.checked_sub(SETTLED) else { return false };
        let limit = (limit.as_secs().try_into().unwrap_or(0), i64::from(limit.subsec_nanos()));
        self.modified < limit && self.changed < limit
    }
}

/// The files that an answer comes from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    stamps: Vec<(PathBuf, Option<ContentStamp>)>,
    /// There is one of which nothing can be remembered.
    unsettled: bool,
}

impl Sources {
    /// Adds a file that is there or not. To be called before it is read.
    pub fn add(&mut self, path: impl Into<PathBuf>) {
        self.add_at(path.into(), SystemTime::now());
    }

    fn add_at(&mut self, path: PathBuf, now: SystemTime) {
        match stamp_or_none(&path) {
            Ok(stamp) => {
                self.unsettled |= stamp.is_some_and(|stamp| !stamp.is_settled(now));
                self.stamps.push((path, stamp));
            }
            Err(_) => self.unsettled = true,
        }
    }

    /// Whether nothing has changed since the files were added, and later changes will show.
    fn hold(&self) -> bool {
        !self.unsettled && unchanged(&self.stamps)
    }
}

/// The stamp of a file; that there is none is a state, too.
fn stamp_or_none(path: &Path) -> io::Result<Option<ContentStamp>> {
    match ContentStamp::of(path) {
        Ok(stamp) => Ok(Some(stamp)),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn unchanged(stamps: &[(PathBuf, Option<ContentStamp>)]) -> bool {
    stamps.iter().all(|(path, stamp)| stamp_or_none(path).is_ok_and(|now| now == *stamp))
}

/// What is in the file of an answer.
#[derive(Serialize, Deserialize)]
struct Record<T> {
    sources: Vec<(PathBuf, Option<ContentStamp>)>,
    answer: T,
}

impl Cache {
    /// What was remembered for `key`, if its sources are as they were. The key is to be made of all
    /// that shapes the answer, but for the content of its sources.
    pub fn recall<T: DeserializeOwned>(&self, subject: &str, key: &str) -> Option<T> {
        let mut bytes = Vec::new();
        let file = File::open(self.answer_path(subject, key)?).ok()?;
        file.take(ANSWER_LEN_MAX).read_to_end(&mut bytes).ok()?;
        let record: Record<T> = serde_json::from_slice(&bytes).ok()?;
        unchanged(&record.sources).then_some(record.answer)
    }

    /// Remembers an answer, unless one of its sources has changed in the meantime, or so short a time ago
    /// that another change might not show. A cache that cannot be written to remembers nothing.
    pub fn remember<T: Serialize>(&self, subject: &str, key: &str, sources: &Sources, answer: &T) {
        let Some(path) = self.answer_path(subject, key) else { return };
        if !sources.hold() {
            return;
        }
        let record = Record { sources: sources.stamps.clone(), answer };
        // A path that is not text cannot be written down.
        let Ok(json) = serde_json::to_vec(&record) else { return };
        let dir = self.root().join(REMEMBERED);
        if make_dirs(&dir).is_ok() && put(&path, &json).is_ok() {
            forget_all_but(&dir, KEPT);
        }
    }

    /// What was remembered for `key`, or else what `work_out` finds, which is then remembered. `work_out`
    /// names each file before it reads it.
    ///
    /// # Errors
    /// Those of `work_out`; they are not remembered.
    pub fn remembered<T: Serialize + DeserializeOwned, E>(
        &self,
        subject: &str,
        key: &str,
        work_out: impl FnOnce(&mut Sources) -> Result<T, E>,
    ) -> Result<T, E> {
        if let Some(answer) = self.recall(subject, key) {
            return Ok(answer);
        }
        let mut sources = Sources::default();
        let answer = work_out(&mut sources)?;
        self.remember(subject, key, &sources, &answer);
        Ok(answer)
    }

    /// The SHA-256 of a file's content.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn digest(&self, path: &Path) -> io::Result<Digest> {
        let key = ContentKey::new("digest-1").field("path", path.as_os_str().as_encoded_bytes());
        self.remembered("digest", &key.finish(), |sources| {
            sources.add(path);
            Digest::of_file(path)
        })
    }

    /// Forgets the answers whose sources have changed, and those beyond a number that will do; all of
    /// them if `all` says so. Says how many.
    pub fn forget(&self, all: bool) -> usize {
        let dir = self.root().join(REMEMBERED);
        let answers = || fs::read_dir(&dir).into_iter().flatten().flatten().map(|item| item.path());
        let before = answers().count();
        for path in answers() {
            let holds = || {
                let record: Record<IgnoredAny> =
                    serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
                Some(unchanged(&record.sources))
            };
            if all || holds() != Some(true) {
                let _ = fs::remove_file(&path);
            }
        }
        forget_all_but(&dir, KEPT);
        before.saturating_sub(answers().count())
    }

    fn answer_path(&self, subject: &str, key: &str) -> Option<PathBuf> {
        let name = format!("{subject}-{key}");
        check_name("key", &name).ok()?;
        Some(self.root().join(REMEMBERED).join(name))
    }
}

fn put(path: &Path, content: &[u8]) -> io::Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_file_name(format!(".new.{}.{count}", std::process::id()));
    let write = || {
        let mut options = OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Deletes the oldest answers beyond `keep`, and what killed processes left.
pub(super) fn forget_all_but(dir: &Path, keep: usize) {
    let Ok(listing) = fs::read_dir(dir) else { return };
    let paths: Vec<PathBuf> = listing.flatten().map(|item| item.path()).collect();
    if paths.len() <= keep {
        return;
    }
    let age = |path: PathBuf| Some((path.symlink_metadata().ok()?.modified().ok()?, path));
    let mut dated: Vec<(SystemTime, PathBuf)> = paths.into_iter().filter_map(age).collect();
    dated.sort();
    let surplus = dated.len().saturating_sub(keep);
    for (_, path) in &dated[..surplus] {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache, a file of which something is remembered, and when that file has settled.
    fn site() -> (tempfile::TempDir, Cache, PathBuf, SystemTime) {
        let dir = tempfile::tempdir().unwrap();
        let (cache, file) = (Cache::at(dir.path().join("cache")), dir.path().join("file"));
        fs::write(&file, "one").unwrap();
        (dir, cache, file, SystemTime::now() + Duration::from_secs(60))
    }

    fn sources(file: &Path, now: SystemTime) -> Sources {
        let mut sources = Sources::default();
        sources.add_at(file.to_owned(), now);
        sources
    }

    fn recall(cache: &Cache) -> Option<String> {
        cache.recall("s", "k")
    }

    #[test]
    fn an_answer_holds_until_its_source_changes_in_any_way() {
        let (dir, cache, file, settled) = site();
        let remember = || cache.remember("s", "k", &sources(&file, settled), &"answer");
        let changes: [(&str, &dyn Fn()); 5] = [
            ("nothing", &|| {}),
            ("content of the same size, and the old time set", &|| {
                let time = file.metadata().unwrap().modified().unwrap();
                fs::write(&file, "two").unwrap();
                File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
            }),
            ("size", &|| fs::write(&file, "longer").unwrap()),
            ("another file in its place", &|| {
                fs::write(dir.path().join("new"), "six").unwrap();
                fs::rename(dir.path().join("new"), &file).unwrap();
            }),
            ("gone", &|| fs::remove_file(&file).unwrap()),
        ];
        for (name, change) in changes {
            remember();
            assert_eq!(recall(&cache).as_deref(), Some("answer"), "{name}");
            change();
            assert_eq!(recall(&cache).is_some(), name == "nothing", "{name}");
        }
        // That there is no file is a state, too.
        remember();
        assert_eq!(recall(&cache).as_deref(), Some("answer"));
        fs::write(&file, "back").unwrap();
        assert_eq!(recall(&cache), None);
        assert_eq!(cache.recall::<String>("s", "other"), None);
    }

    #[test]
    fn nothing_is_remembered_of_a_file_that_could_change_unnoticed() {
        let (_dir, cache, file, settled) = site();
        let changed = file.metadata().unwrap().modified().unwrap();
        for (after, remembered) in [(0, false), (1900, false), (2100, true)] {
            let now = changed + Duration::from_millis(after);
            cache.remember("s", "k", &sources(&file, now), &"answer");
            assert_eq!(recall(&cache).is_some(), remembered, "{after} ms after");
        }
        // It changed while the answer was worked out.
        let sources = sources(&file, settled);
        fs::write(&file, "two").unwrap();
        let _ = fs::remove_dir_all(cache.root());
        cache.remember("s", "k", &sources, &"answer");
        assert_eq!(recall(&cache), None);
        let mut unreadable = Sources::default();
        unreadable.add("\0");
        cache.remember("s", "k", &unreadable, &"answer");
        assert_eq!(recall(&cache), None);
    }

    #[test]
    fn only_answers_are_remembered_and_each_is_worked_out_once() {
        let (_dir, cache, _, _) = site();
        let failing = cache.remembered("s", "k", |_| Err::<String, &str>("no"));
        assert_eq!(failing, Err("no"));
        let first = cache.remembered("s", "k", |_| Ok::<_, &str>("answer".to_owned()));
        assert_eq!(first.unwrap(), "answer");
        let again = cache.remembered("s", "k", |_| Err::<String, &str>("worked out again"));
        assert_eq!(again.unwrap(), "answer");
        // What is damaged, or of another type, is worked out again.
        assert_eq!(cache.recall::<u64>("s", "k"), None);
        fs::write(cache.root().join(REMEMBERED).join("s-k"), "{\"sources\":[],").unwrap();
        assert_eq!(recall(&cache), None);
        let again = cache.remembered("s", "k", |_| Ok::<_, &str>("another".to_owned()));
        assert_eq!(again.unwrap(), "another");
    }

    #[test]
    fn a_cache_that_cannot_be_written_remembers_nothing() {
        let (dir, _, file, _) = site();
        let cache = Cache::at(&file);
        let answer = cache.remembered("s", "k", |_| Ok::<_, &str>(1));
        assert_eq!(answer, Ok(1));
        assert_eq!(cache.recall::<u64>("s", "k"), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_digest_is_that_of_the_content_now() {
        let (dir, cache, file, settled) = site();
        // As `printf one | sha256sum` says.
        let of_one = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed";
        assert_eq!(cache.digest(&file).unwrap().to_string(), of_one);
        assert_eq!(Digest::of(b"one").to_string(), of_one);
        let remembered = dir.path().join("cache").join(REMEMBERED);
        assert!(!remembered.exists(), "the file is too young");
        let path_key =
            ContentKey::new("digest-1").field("path", file.as_os_str().as_encoded_bytes());
        let key = path_key.finish();
        cache.remember("digest", &key, &sources(&file, settled), &Digest::of_file(&file).unwrap());
        assert_eq!(fs::read_dir(&remembered).unwrap().count(), 1);
        let known = || ContentKey::new("t").known_file(&cache, "f", &file).unwrap().finish();
        let read = || ContentKey::new("t").file("f", &file).unwrap().finish();
        assert_eq!(known(), read());
        fs::write(&file, "two").unwrap();
        assert_eq!(known(), read());
        assert_ne!(cache.digest(&file).unwrap().to_string(), of_one);
        fs::remove_file(&file).unwrap();
        assert!(cache.digest(&file).is_err());
    }

    #[test]
    fn answers_that_hold_no_more_are_forgotten() {
        let (_dir, cache, file, settled) = site();
        cache.remember("s", "k", &sources(&file, settled), &"answer");
        cache.remember("s", "always", &Sources::default(), &1);
        assert_eq!(cache.forget(false), 0);
        fs::write(&file, "two").unwrap();
        fs::write(cache.root().join(REMEMBERED).join("s-damaged"), "{").unwrap();
        assert_eq!(cache.forget(false), 2);
        assert_eq!(cache.recall("s", "always"), Some(1));
        assert_eq!(cache.forget(true), 1);
        assert_eq!(cache.recall::<u64>("s", "always"), None);
        assert_eq!(cache.forget(true), 0);
    }

    #[test]
    fn the_latest_answers_are_kept() {
        let (_dir, cache, _, _) = site();
        for key in ["a", "b", "c"] {
            cache.remember("s", key, &Sources::default(), &1);
        }
        let dir = cache.root().join(REMEMBERED);
        let set = |key: &str, age: u64| {
            let file = File::options().write(true).open(dir.join(format!("s-{key}"))).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        };
        set("a", 10);
        set("b", 30);
        set("c", 20);
        forget_all_but(&dir, 2);
        let left = |key: &str| cache.recall::<u64>("s", key).is_some();
        assert_eq!(["a", "b", "c"].map(left), [true, false, true]);
    }
}
