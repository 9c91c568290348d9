use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// Tells the child test which cache to build in.
const CHILD_DIR: &str = "VMLAB_TEST_CACHE_CHILD";
/// Tells it to stop in the middle of building.
const CHILD_HANGS: &str = "VMLAB_TEST_CACHE_HANGS";

pub(super) fn whole(dir: &Path) -> Result<(), Flaw> {
    match fs::read_to_string(dir.join("content"))?.as_str() {
        "whole" => Ok(()),
        other => Err(format!("it says {other:?}").into()),
    }
}

fn fill(dir: &Path) -> Result<(), CacheError> {
    fs::write(dir.join("content"), "whole").map_err(|e| CacheError::io("write", dir, e))
}

pub(super) fn staged(cache: &Cache) -> Vec<String> {
    let dir = cache.root().join("k/.staging");
    let Ok(listing) = fs::read_dir(dir) else { return Vec::new() };
    listing.flatten().map(|item| item.file_name().to_string_lossy().into_owned()).collect()
}

/// An error with all its causes, as the command line prints it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

#[test]
fn builds_once_and_then_finds() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path().join("deep/cache"));
    assert!(cache.lookup("k", "key", whole).unwrap().is_none());
    assert!(!cache.root().exists(), "a look-up makes nothing");
    let one = cache.get_or_build("k", "key", whole, fill).unwrap();
    let two = cache
        .get_or_build("k", "key", whole, |_| -> Result<(), CacheError> { panic!("built again") })
        .unwrap();
    assert_eq!(one, two);
    assert_eq!(one, cache.root().join("k/key"));
    assert_eq!(cache.lookup("k", "key", whole).unwrap(), Some(one.clone()));
    assert_eq!(cache.entries("k").unwrap(), [CacheEntry { key: "key".to_owned(), path: one }]);
    assert!(staged(&cache).is_empty());
    for private in ["", "k", "k/key", "k/.lock", "k/.staging"] {
        let mode = fs::metadata(cache.root().join(private)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o700, "{private}");
    }
    assert!(cache.remove("k", "key").unwrap());
    assert!(!cache.remove("k", "key").unwrap());
    assert!(cache.entries("k").unwrap().is_empty());
    assert!(cache.entries("other").unwrap().is_empty());
    assert!(staged(&cache).is_empty());
}

#[test]
fn a_bad_entry_is_built_anew() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path());
    let path = cache.get_or_build("k", "key", whole, fill).unwrap();
    fs::write(path.join("content"), "damaged").unwrap();
    fs::write(path.join("left over"), "").unwrap();
    assert!(cache.lookup("k", "key", whole).unwrap().is_none());
    let path = cache.get_or_build("k", "key", whole, fill).unwrap();
    whole(&path).unwrap();
    assert!(!path.join("left over").exists());

    // Even one that is no directory.
    fs::remove_dir_all(&path).unwrap();
    fs::write(&path, "a file").unwrap();
    whole(&cache.get_or_build("k", "key", whole, fill).unwrap()).unwrap();
    assert!(staged(&cache).is_empty());
}

#[test]
fn what_fails_its_check_is_never_published() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path());
    let half = |dir: &Path| -> Result<(), CacheError> {
        fs::write(dir.join("content"), "half").map_err(|e| CacheError::io("write", dir, e))
    };
    let error = cache.get_or_build("k", "key", whole, half).unwrap_err();
    assert!(chain(&error).contains("k/key was built and then failed its check: it says \"half\""));
    let failing = |_: &Path| Err(CacheError::NoHome);
    assert!(matches!(cache.get_or_build("k", "key", whole, failing), Err(CacheError::NoHome)));
    assert!(cache.entries("k").unwrap().is_empty());
    assert!(staged(&cache).is_empty());
}

#[test]
fn a_panic_in_the_build_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path());
    let panicking =
        || cache.get_or_build("k", "key", whole, |_| -> Result<(), CacheError> { panic!() });
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panicking)).is_err());
    assert!(staged(&cache).is_empty());
    cache.get_or_build("k", "key", whole, fill).unwrap();
}

#[test]
fn fifty_threads_build_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path());
    let builds = AtomicUsize::new(0);
    let barrier = std::sync::Barrier::new(50);
    std::thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(|| {
                barrier.wait();
                let build = |dir: &Path| {
                    builds.fetch_add(1, Ordering::Relaxed);
                    fill(dir)
                };
                whole(&cache.get_or_build("k", "key", whole, build).unwrap()).unwrap();
            });
        }
    });
    assert_eq!(builds.into_inner(), 1);
}

/// Not a test: what the tests below run as another process.
#[test]
#[ignore = "run by other tests as a child process"]
fn child() {
    let cache = Cache::at(std::env::var_os(CHILD_DIR).expect("set by the parent"));
    let build = |dir: &Path| {
        if std::env::var_os(CHILD_HANGS).is_some() {
            fs::write(dir.join("content"), "who").unwrap();
            println!("\nhalf");
            // Blocks until the parent kills this process, or dies itself.
            let _ = io::stdin().read(&mut [0]);
        }
        println!("\nbuilt");
        fill(dir)
    };
    whole(&cache.get_or_build("k", "key", whole, build).unwrap()).unwrap();
}

fn spawn_child(root: &Path, hangs: bool) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "--nocapture", "cache::tests::child"]);
    command.env(CHILD_DIR, root);
    if hangs {
        command.env(CHILD_HANGS, "1");
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

fn wait_for_half(child: &mut Child) {
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "half"), "the child did not get to building");
}

#[test]
fn fifty_processes_build_once() {
    let dir = tempfile::tempdir().unwrap();
    let children: Vec<Child> = (0..50).map(|_| spawn_child(dir.path(), false)).collect();
    let mut builds = 0;
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("1 passed"), "{text}");
        builds += text.lines().filter(|line| *line == "built").count();
    }
    assert_eq!(builds, 1);
}

#[test]
fn a_killed_builder_leaves_nothing_that_looks_valid() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path());
    let mut child = spawn_child(dir.path(), true);
    wait_for_half(&mut child);
    let pid = child.id();
    assert_eq!(staged(&cache).len(), 2, "a tree and its lock");

    // While it lives, others wait for it and know whom they wait for; its staging is not swept.
    std::thread::scope(|scope| {
        let (send, receive) = std::sync::mpsc::channel();
        let cache = &cache;
        let waiting = scope.spawn(move || {
            cache.get_or_build_noting("k", "key", whole, fill, |pid| send.send(pid).unwrap())
        });
        assert_eq!(receive.recv().unwrap(), Some(pid));
        cache.get_or_build("k", "other", whole, fill).unwrap();
        assert_eq!(staged(cache).len(), 2, "a living builder's staging was swept");
        assert!(cache.lookup("k", "key", whole).unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        whole(&waiting.join().unwrap().unwrap()).unwrap();
    });
    assert!(staged(&cache).is_empty(), "{:?}", staged(&cache));
}

#[test]
fn litter_of_every_shape_is_swept() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path());
    let staging = dir.path().join("k/.staging");
    fs::create_dir_all(staging.join("a.1.0/deep")).unwrap();
    fs::write(staging.join("a.1.0.lock"), "").unwrap();
    fs::create_dir_all(staging.join("b.1.0")).unwrap();
    fs::write(staging.join("c.1.0.lock"), "").unwrap();
    cache.get_or_build("k", "key", whole, fill).unwrap();
    assert!(staged(&cache).is_empty(), "{:?}", staged(&cache));
}

#[test]
fn what_another_machine_is_building_is_left_alone_for_a_day() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path());
    let staging = dir.path().join("k/.staging");
    // A guest with the same cache: its locks hold there, and not here.
    fs::create_dir_all(staging.join("a.1.0@00000000")).unwrap();
    let lock = File::create(staging.join("a.1.0@00000000.lock")).unwrap();
    cache.get_or_build("k", "key", whole, fill).unwrap();
    assert_eq!(staged(&cache).len(), 2, "{:?}", staged(&cache));
    lock.set_modified(std::time::SystemTime::now() - Duration::from_secs(25 * 3600)).unwrap();
    cache.get_or_build("k", "other", whole, fill).unwrap();
    assert!(staged(&cache).is_empty(), "{:?}", staged(&cache));
}

#[test]
fn errors_name_the_directory_and_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let blocked = dir.path().join("file");
    fs::write(&blocked, "").unwrap();
    for root in [blocked, PathBuf::from("/proc/vmlab-test")] {
        let error = Cache::at(&root).get_or_build("k", "key", whole, fill).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&root.display().to_string()), "{text}");
        assert!(text.contains("make the cache directory"), "{text}");
        assert!(text.contains(CACHE_DIR_ENV), "{text}");
    }
    let full = io::Error::from(io::ErrorKind::StorageFull);
    let text = CacheError::io("flush to disk", Path::new("/c"), full).to_string();
    assert!(text.contains("free some space") && text.contains(CACHE_DIR_ENV), "{text}");
}

#[test]
fn only_file_names_are_keys() {
    let cache = Cache::at("/nonexistent");
    for key in ["", ".", "..", ".lock", "a/b", "a\0b", "a b", &"x".repeat(MAX_KEY + 1)] {
        let outcome = cache.lookup("k", key, whole);
        assert!(matches!(outcome, Err(CacheError::BadName { .. })), "{key:?}");
        let outcome = cache.lookup(key, "key", whole);
        assert!(matches!(outcome, Err(CacheError::BadName { .. })), "{key:?}");
    }
}

#[test]
fn the_place_follows_the_variables() {
    let root = |set: &[(&str, &str)]| {
        default_root(|name| {
            set.iter().find(|(key, _)| *key == name).map(|(_, v)| OsString::from(v))
        })
    };
    let (own, xdg, home) = ((CACHE_DIR_ENV, "/o"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h"));
    assert_eq!(root(&[own, xdg, home]).unwrap(), Path::new("/o"));
    assert_eq!(root(&[xdg, home]).unwrap(), Path::new("/x/vmlab"));
    assert_eq!(root(&[home]).unwrap(), Path::new("/h/.cache/vmlab"));
    assert_eq!(root(&[("XDG_CACHE_HOME", "rel"), home]).unwrap(), Path::new("/h/.cache/vmlab"));
    assert_eq!(root(&[(CACHE_DIR_ENV, ""), xdg]).unwrap(), Path::new("/x/vmlab"));
    assert!(matches!(root(&[]), Err(CacheError::NoHome)));
}

#[test]
fn many_files_are_flushed_too() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path());
    let build = |dir: &Path| {
        for n in 0..=MAX_FSYNC {
            fs::write(dir.join(n.to_string()), "").unwrap();
        }
        fill(dir)
    };
    let path = cache.get_or_build("k", "key", whole, build).unwrap();
    assert_eq!(fs::read_dir(path).unwrap().count(), MAX_FSYNC + 2);
}
