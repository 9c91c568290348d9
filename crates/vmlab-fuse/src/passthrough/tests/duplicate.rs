//! A filesystem once more, for a guest that goes on with it.

use std::sync::atomic::AtomicBool;

use super::*;

/// The share as another guest has it. Its own directory is not that of the files.
fn again(share: &Share) -> Share {
    let fs = share.fs.duplicate(Arc::new(AtomicBool::new(true))).unwrap();
    Share { dir: tempfile::tempdir().unwrap(), fs: Served::from(fs) }
}

#[test]
fn nodes_and_handles_are_the_same_and_nothing_is_shared_but_files() {
    let share = Share::new();
    fs::create_dir_all(share.path("a/b")).unwrap();
    share.put("a/b/file", "content");
    share.put("a/gone", "still there");
    for i in 0..300 {
        share.put(&format!("a/{i:03}"), "");
    }
    let directory = share.node("a");
    let file = share.node("a/b/file");
    let open = share.open(file, RDWR).unwrap();
    let gone = share.node("a/gone");
    let gone_open = share.open(gone, RDONLY).unwrap();
    share.unlink(directory, "gone").unwrap();
    let listing = share.opendir(directory).unwrap();
    let first = share.readdir(directory, listing, 0, (2048, false)).unwrap();

    let twin = again(&share);
    assert_eq!(twin.fs.known_inodes(), share.fs.known_inodes());
    // What one guest closes and forgets, the other still has.
    share.fs.release(file, open).unwrap();
    share.fs.release(gone, gone_open).unwrap();
    [file, gone, directory].into_iter().for_each(|node| share.fs.forget(node, 10));
    assert_eq!(share.read(file, open, 0), Err(Errno::BADF));
    assert_eq!(twin.read(file, open, 0).unwrap(), "content");
    assert_eq!(twin.read(gone, gone_open, 0).unwrap(), "still there");
    assert_eq!(twin.attr(file).unwrap().size, 7);
    assert_eq!(twin.attr(gone).unwrap().nlink, 0);
    twin.write(file, open, 0, "CON").unwrap();
    assert_eq!(share.get("a/b/file"), "CONtent");
    // A list goes on where it was.
    let mut all: Vec<String> = Vec::new();
    let mut part = first;
    while let Some(last) = part.last() {
        let next = last.next;
        all.extend(part.into_iter().map(|entry| entry.name));
        part = twin.readdir(directory, listing, next, (4096, false)).unwrap();
    }
    let count = all.len();
    all.sort();
    all.dedup();
    // 300 files, a directory, `.` and `..`.
    assert_eq!((all.len(), count), (303, 303));
    // New nodes are new in both.
    let new = twin.lookup(directory, "000").unwrap().node.unwrap();
    assert!(new.0 > gone.0);
    assert_eq!(share.attr(new).map(drop), Err(Errno::STALE));
    // The other one was not harmed, and can be as it was again.
    [file, gone, directory, new].into_iter().for_each(|node| twin.fs.forget(node, 10));
    twin.fs.release(file, open).unwrap();
    twin.fs.release(gone, gone_open).unwrap();
    twin.fs.releasedir(directory, listing).unwrap();
    let b = share.node("a/b");
    assert!(twin.attr(b).is_ok());
    twin.fs.forget(b, 10);
    assert_eq!(twin.fs.known_inodes(), 1);
}

#[test]
fn one_that_is_not_used_any_more_closes_everything() {
    let share = Share::new();
    fs::create_dir(share.path("d")).unwrap();
    share.put("d/file", "1");
    let file = share.node("d/file");
    share.open(file, RDONLY).unwrap();
    let held = || {
        let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let targets = links.filter_map(|link| fs::read_link(link.path()).ok());
        targets.filter(|target| target.starts_with(share.dir.path())).count()
    };
    let before = held();
    let (twin, second) = (again(&share), again(&share));
    assert!(twin.attr(file).is_ok());
    drop(twin);
    assert!(second.attr(file).is_ok());
    drop(second);
    assert_eq!(held(), before);
}
