//! A host directory that changes under the requests, and requests that no kernel sends.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicBool;

use rustix::fs::{FileType, RenameFlags};

use super::*;
use crate::filesystem::Changes;

/// A share with a directory and a file in it, next to which something is that must not be reached.
fn with_outside() -> (Share, TempDir) {
    let share = Share::new();
    fs::create_dir(share.path("dir")).unwrap();
    share.put("dir/file", "inside");
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("file"), "outside").unwrap();
    (share, outside)
}

fn untouched(outside: &TempDir) {
    let names: Vec<_> = fs::read_dir(outside.path()).unwrap().collect();
    assert_eq!(names.len(), 1);
    assert_eq!(fs::read_to_string(outside.path().join("file")).unwrap(), "outside");
}

#[test]
fn a_directory_that_becomes_a_symbolic_link_is_stale() {
    let (share, outside) = with_outside();
    let (dir, file) = (share.node("dir"), share.node("dir/file"));
    fs::rename(share.path("dir"), share.path("moved")).unwrap();
    symlink(outside.path(), share.path("dir")).unwrap();
    // The host's hand is faster than every descriptor that was kept.
    share.fs.cache.clear();
    let changes = Changes { size: Some(0), mode: Some(0o777), ..Default::default() };
    let new = how(0o644, RDWR);
    let results = [
        share.open(file, RDWR).map(drop),
        share.attr(file).map(drop),
        share.fs.setattr(&me(), file, None, &changes).map(drop),
        share.fs.setxattr(file, c"user.a", b"1", 0),
        share.lookup(dir, "file").map(drop),
        share.create(dir, "new", 0o644, RDWR).map(drop),
        share.fs.tmpfile(&me(), dir, &new).map(drop),
        share.mkdir(dir, "new").map(drop),
        share.fs.symlink(&me(), dir, named(c"new"), c"x").map(drop),
        share.unlink(dir, "file"),
        share.rename((dir, "file"), (dir, "new"), RenameFlags::empty()),
        share.opendir(dir).map(drop),
    ];
    for (i, result) in results.iter().enumerate() {
        assert_eq!(*result, Err(Errno::STALE), "{i}");
    }
    untouched(&outside);
    // A new look-up finds the link, as a link.
    let link = share.node("dir");
    assert_ne!(link, dir);
    assert!(share.fs.readlink(link).is_ok());
    // And the directory where it is now is the same inode.
    assert_eq!(share.node("moved"), dir);
    assert_eq!(share.node("moved/file"), file);
}

#[test]
fn a_file_that_becomes_a_symbolic_link_is_stale() {
    let (share, outside) = with_outside();
    let file = share.node("dir/file");
    fs::remove_file(share.path("dir/file")).unwrap();
    symlink(outside.path().join("file"), share.path("dir/file")).unwrap();
    assert_eq!(share.open(file, RDWR), Err(Errno::STALE));
    assert_eq!(share.attr(file).unwrap_err(), Errno::STALE);
    // CREATE opens what is there, but no link.
    let dir = share.node("dir");
    assert_eq!(share.create(dir, "file", 0o644, RDWR | OFlags::TRUNC), Err(Errno::LOOP));
    // Nor does it make what a link leads to.
    symlink(outside.path().join("made"), share.path("dir/dangling")).unwrap();
    assert_eq!(share.create(dir, "dangling", 0o644, RDWR), Err(Errno::LOOP));
    untouched(&outside);
}

#[test]
fn a_symbolic_link_is_no_parent_and_no_file() {
    let (share, outside) = with_outside();
    symlink(outside.path(), share.path("link")).unwrap();
    symlink(outside.path().join("file"), share.path("to-file")).unwrap();
    let (link, dir) = (share.node("link"), share.node("dir"));
    let new = how(0o644, RDWR);
    let regular = FileType::RegularFile.as_raw_mode();
    let results = [
        share.lookup(link, "file").map(drop),
        share.create(link, "new", 0o644, RDWR).map(drop),
        share.fs.tmpfile(&me(), link, &new).map(drop),
        share.mkdir(link, "new").map(drop),
        share.fs.mknod(&me(), link, named(c"new"), regular, 0).map(drop),
        share.fs.symlink(&me(), link, named(c"new"), c"x").map(drop),
        share.unlink(link, "file"),
        share.rmdir(link, "file"),
        share.rename((link, "file"), (dir, "new"), RenameFlags::empty()),
        share.rename((dir, "file"), (link, "new"), RenameFlags::empty()),
        share.fs.link(share.node("dir/file"), link, named(c"new")).map(drop),
        share.opendir(link).map(drop),
    ];
    for (i, result) in results.iter().enumerate() {
        assert_eq!(*result, Err(Errno::NOTDIR), "{i}");
    }
    assert_eq!(share.open(share.node("to-file"), RDWR), Err(Errno::LOOP));
    let changes = Changes { size: Some(0), ..Default::default() };
    let cut = share.fs.setattr(&me(), share.node("to-file"), None, &changes);
    assert_eq!(cut.unwrap_err(), Errno::INVAL);
    untouched(&outside);
}

#[test]
fn special_files_are_not_opened() {
    let share = Share::new();
    rustix::fs::mkfifoat(rustix::fs::CWD, share.path("fifo"), Mode::from(0o600)).unwrap();
    let _socket = UnixListener::bind(share.path("socket")).unwrap();
    for name in ["fifo", "socket"] {
        let node = share.node(name);
        for flags in [RDONLY, OFlags::WRONLY, RDWR] {
            assert_eq!(share.open(node, flags), Err(Errno::NXIO), "{name}");
            assert_eq!(share.create(ROOT, name, 0o600, flags), Err(Errno::NXIO), "{name}");
        }
        let changes = Changes { size: Some(0), ..Default::default() };
        let cut = share.fs.setattr(&me(), node, None, &changes);
        assert_eq!(cut.unwrap_err(), Errno::INVAL, "{name}");
        share.fs.syncfs(node).unwrap();
    }
}

#[test]
fn another_file_of_the_same_name_is_another_node() {
    let share = Share::new();
    // Filesystems use an inode number again as soon as they can.
    let mut reused = 0;
    for _ in 0..20 {
        share.put("file", "old");
        let old = share.node("file");
        let ino = share.attr(old).unwrap().ino;
        fs::remove_file(share.path("file")).unwrap();
        share.put("file", "new");
        let same = share.attr(old);
        assert_eq!(same.unwrap_err(), Errno::STALE);
        assert_eq!(share.open(old, RDONLY), Err(Errno::STALE));
        let new = share.node("file");
        assert_ne!(new, old);
        reused += u32::from(share.attr(new).unwrap().ino == ino);
        let handle = share.open(new, RDONLY).unwrap();
        assert_eq!(share.read(new, handle, 0).unwrap(), "new");
        share.fs.forget(old, 1);
        assert!(share.attr(new).is_ok());
        fs::remove_file(share.path("file")).unwrap();
    }
    eprintln!("an inode number was used again in {reused} of 20 cases");
}

#[test]
fn a_parent_that_the_host_renames_is_found_again() {
    let (share, _outside) = with_outside();
    let file = share.node("dir/file");
    fs::rename(share.path("dir"), share.path("elsewhere")).unwrap();
    // Its descriptor was kept.
    assert_eq!(share.attr(file).unwrap().size, 6);
    share.fs.cache.clear();
    assert_eq!(share.attr(file).unwrap_err(), Errno::STALE);
    share.node("elsewhere");
    assert_eq!(share.attr(file).unwrap().size, 6);
}

#[test]
fn directories_that_the_host_turns_around_end() {
    let share = Share::new();
    fs::create_dir_all(share.path("a/b")).unwrap();
    let (a, b) = (share.node("a"), share.node("a/b"));
    // It is in use, so it has a descriptor.
    assert_eq!(share.names(b), [".", ".."]);
    fs::rename(share.path("a/b"), share.path("b")).unwrap();
    fs::rename(share.path("a"), share.path("b/a")).unwrap();
    // b is remembered in a, and a now in b.
    assert_eq!(share.lookup(b, "a").unwrap().node, Some(a));
    share.fs.cache.clear();
    assert_eq!(share.attr(a).unwrap_err(), Errno::STALE);
    assert_eq!(share.opendir(b), Err(Errno::STALE));
    assert_eq!(share.node("b/a"), a);
    assert_eq!(share.names(a), [".", ".."]);
}

#[test]
fn unknown_nodes_and_handles_are_errors() {
    let share = Share::new();
    share.put("file", "");
    let file = share.node("file");
    for node in [0, 99, u64::MAX].map(NodeId) {
        assert_eq!(share.attr(node).unwrap_err(), Errno::STALE);
        assert_eq!(share.open(node, RDONLY), Err(Errno::STALE));
        assert_eq!(share.lookup(node, "x").unwrap_err(), Errno::STALE);
        assert_eq!(share.fs.link(node, ROOT, named(c"x")).unwrap_err(), Errno::STALE);
        share.fs.forget(node, u64::MAX);
    }
    let open = share.open(file, RDWR).unwrap();
    for handle in [0, 99, u64::MAX].map(Handle) {
        assert_eq!(share.read(file, handle, 0), Err(Errno::BADF));
        assert_eq!(share.fs.getattr(file, Some(handle)).unwrap_err(), Errno::BADF);
        assert_eq!(share.fs.release(file, handle), Err(Errno::BADF));
    }
    // A handle belongs to its node.
    assert_eq!(share.read(ROOT, open, 0), Err(Errno::BADF));
    assert_eq!(share.fs.release(ROOT, open), Err(Errno::BADF));
}

#[test]
fn more_is_forgotten_than_there_was() {
    let share = Share::new();
    fs::create_dir_all(share.path("a/b/c")).unwrap();
    let c = share.node("a/b/c");
    let a = share.node("a");
    share.fs.forget(ROOT, u64::MAX);
    share.fs.forget(a, u64::MAX);
    // Its child still has its place in it.
    assert!(share.attr(c).is_ok());
    share.fs.cache.clear();
    assert!(share.attr(c).is_ok());
    assert_eq!(share.node("a"), a);
    share.fs.forget(a, 1);
    share.fs.forget(c, u64::MAX);
    share.fs.forget(share.node("a/b"), u64::MAX);
    share.fs.forget(a, u64::MAX);
    assert_eq!(share.fs.known_inodes(), 1);
    assert!(share.attr(ROOT).is_ok());
}

#[test]
fn a_forgotten_node_with_a_handle_does_no_harm() {
    let share = Share::new();
    let (node, handle) = share.create(ROOT, "file", 0o644, RDWR).unwrap();
    share.fs.forget(node, 1);
    assert_eq!(share.write(node, handle, 0, "x"), Ok(1));
    assert_eq!(share.attr(node).unwrap_err(), Errno::STALE);
    assert_ne!(share.node("file"), node);
    share.fs.release(node, handle).unwrap();
}

#[test]
fn what_is_removed_and_not_forgotten_has_a_limit() {
    let share = Share::with(PassthroughConfig { max_descriptors: 4, ..Default::default() });
    let nodes: Vec<_> = (0..10)
        .map(|i| {
            share.put(&format!("{i}"), "");
            let node = share.node(&format!("{i}"));
            share.unlink(ROOT, &format!("{i}")).unwrap();
            node
        })
        .collect();
    assert_eq!(share.fs.pins.count(), 4);
    let reached = nodes.iter().filter(|node| share.attr(**node).is_ok()).count();
    assert_eq!(reached, 4);
}

#[test]
fn a_new_session_forgets_everything() {
    let share = Share::new();
    fs::create_dir_all(share.path("a/b")).unwrap();
    let b = share.node("a/b");
    let handle = share.opendir(b).unwrap();
    share.fs.init(0);
    assert_eq!(share.attr(b).unwrap_err(), Errno::STALE);
    assert_eq!(share.fs.releasedir(b, handle), Err(Errno::BADF));
    assert_eq!(share.fs.known_inodes(), 1);
    assert!(share.node("a") > b, "node ids are not used again");
    share.fs.destroy();
    assert!(share.attr(ROOT).is_ok());
}

/// A name is a directory and a symbolic link in turn, as fast as the host can, while every operation is
/// tried beneath it.
#[test]
fn a_race_leads_nowhere() {
    let (share, outside) = with_outside();
    symlink(outside.path(), share.path("link")).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (dir, link) = (share.path("dir"), share.path("link"));
            while !done.load(Ordering::Relaxed) {
                let cwd = rustix::fs::CWD;
                rustix::fs::renameat_with(cwd, &dir, cwd, &link, RenameFlags::EXCHANGE).unwrap();
            }
        });
        let mut inside = 0;
        for i in 0..3000 {
            share.fs.cache.clear();
            let Ok(Entry { node: Some(dir), .. }) = share.lookup(ROOT, "dir") else { continue };
            if let Ok((node, handle)) = share.create(dir, &format!("new-{i}"), 0o644, RDWR) {
                share.write(node, handle, 0, "x").unwrap();
                share.fs.release(node, handle).unwrap();
                inside += 1;
            }
            let _ = share.mkdir(dir, &format!("dir-{i}"));
            if let Ok(Entry { node: Some(file), .. }) = share.lookup(dir, "file")
                && let Ok(handle) = share.open(file, RDWR)
            {
                assert_eq!(share.read(file, handle, 0).unwrap(), "inside");
                share.fs.release(file, handle).unwrap();
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(inside > 0, "the directory was never caught");
    });
    untouched(&outside);
}
