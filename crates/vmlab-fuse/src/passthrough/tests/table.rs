//! Many inodes with few descriptors and little memory.

use std::process::Command;
use std::time::Instant;

use rustix::process::{Rlimit, setrlimit};

use super::*;
use crate::passthrough::resolve::MAX_DEPTH;

const DIRECTORIES: usize = 2000;
const FILES: usize = 100;

/// Where the child process finds its tree.
const TREE: &str = "VMLAB_TEST_TREE";

/// The process's resident memory in KiB.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_tree_is_walked_with_two_descriptors() {
    let share = Share::with(PassthroughConfig { max_descriptors: 2, ..Default::default() });
    let mut path = String::from("top");
    for depth in 0..60 {
        path += &format!("/{depth}");
    }
    fs::create_dir_all(share.path(&path)).unwrap();
    for i in 0..60 {
        share.put(&format!("{path}/{i}"), "");
        fs::create_dir(share.path(&format!("top/dir-{i}"))).unwrap();
        share.put(&format!("top/dir-{i}/file"), "x");
    }
    let deep: Vec<_> = (0..60).map(|i| share.node(&format!("{path}/{i}"))).collect();
    let wide: Vec<_> = (0..60).map(|i| share.node(&format!("top/dir-{i}/file"))).collect();
    for (deep, wide) in deep.iter().zip(&wide) {
        assert_eq!(share.attr(*deep).unwrap().size, 0);
        assert_eq!(share.attr(*wide).unwrap().size, 1);
        assert!(share.fs.cache.len() <= 2);
    }
}

#[test]
fn a_deep_tree_is_forgotten_at_once() {
    let share = Share::new();
    let mut at = ROOT;
    let mut nodes = Vec::new();
    // Deeper than any chain of destructors should be.
    for _ in 0..MAX_DEPTH + 2 {
        at = share.mkdir(at, "d").unwrap();
        nodes.push(at);
    }
    // Nobody gets there by a path; what leads there is not followed for ever.
    share.fs.cache.clear();
    assert_eq!(share.attr(at).unwrap_err(), Errno::STALE);
    assert!(share.attr(nodes[MAX_DEPTH - 1]).is_ok());
    for node in nodes {
        share.fs.forget(node, 1);
    }
    assert_eq!(share.fs.known_inodes(), 1);
    // rm -r recurses, and so does the temporary directory's destructor.
    while let Ok(entry) = share.lookup(ROOT, "d") {
        let node = entry.node.unwrap();
        let inner = share.lookup(node, "d").is_ok();
        let flags = rustix::fs::RenameFlags::empty();
        if inner {
            share.rename((node, "d"), (ROOT, "e"), flags).unwrap();
        }
        share.rmdir(ROOT, "d").unwrap();
        if inner {
            share.rename((ROOT, "e"), (ROOT, "d"), flags).unwrap();
        }
    }
}

/// RENAME finds the inode, and another thread takes its last reference before it has the new name.
#[test]
fn what_is_forgotten_while_it_is_moved_holds_no_directory() {
    let share = Share::new();
    fs::create_dir(share.path("dir")).unwrap();
    share.put("dir/file", "");
    let (dir, file) = (share.node("dir"), share.node("dir/file"));
    let moved = share.fs.inodes.get(file).unwrap();
    let to = share.fs.inodes.get(dir).unwrap();
    share.fs.forget(file, 1);
    assert_eq!(share.fs.known_inodes(), 2);
    share.fs.inodes.set_place(&moved, &to, named(c"other"));
    share.fs.forget(dir, 2);
    assert_eq!(share.fs.known_inodes(), 1);
}

#[test]
fn inodes_have_a_limit() {
    let share = Share::with(PassthroughConfig { max_inodes: 5, ..Default::default() });
    for i in 0..10 {
        share.put(&format!("{i}"), "");
    }
    let nodes: Vec<_> = (0..4).map(|i| share.node(&format!("{i}"))).collect();
    assert_eq!(share.lookup(ROOT, "4").unwrap_err(), Errno::NFILE);
    assert!(share.lookup(ROOT, "0").is_ok(), "it is known already");
    // A list is whole all the same.
    assert_eq!(share.list(ROOT, (4096, true)).len(), 12);
    // What cannot be told of is not made.
    assert_eq!(share.create(ROOT, "new", 0o644, RDWR), Err(Errno::NFILE));
    assert_eq!(share.mkdir(ROOT, "new"), Err(Errno::NFILE));
    assert!(!share.path("new").exists());
    share.fs.forget(nodes[3], 2);
    assert!(share.lookup(ROOT, "4").is_ok());
}

/// 200,000 files in 2,000 directories, with a limit of 1,024 descriptors, in a process of its own.
#[test]
fn two_hundred_thousand_files_need_few_descriptors() {
    // Making so many files on a disk takes up to a minute.
    let tree = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    for directory in 0..DIRECTORIES {
        let path = tree.path().join(format!("dir-{directory:04}"));
        fs::create_dir(&path).unwrap();
        for file in 0..FILES {
            fs::File::create(path.join(format!("some-file-{file:03}"))).unwrap();
        }
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "passthrough::tests::table::child", "--ignored", "--nocapture"])
        .env(TREE, tree.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stderr);
    eprintln!("{said}");
    assert!(child.status.success(), "{said}");
    assert!(said.contains("seen: 200000 files"), "the child did nothing: {said}");
}

#[test]
#[ignore = "a part of two_hundred_thousand_files_need_few_descriptors"]
fn child() {
    let limit = Rlimit { current: Some(1024), maximum: Some(1024) };
    setrlimit(Resource::Nofile, limit).unwrap();
    let before = resident();
    let tree = std::env::var(TREE).unwrap();
    let fs = Passthrough::new(tree.as_ref(), PassthroughConfig::default()).unwrap();
    fs.init(init::SUBMOUNTS);
    fs.followed.expect(u32::MAX);
    // The directory is not this share's, but the helpers are.
    let share = Share { dir: tempfile::tempdir().unwrap(), fs: fs.into() };
    let begin = Instant::now();
    let mut files = Vec::new();
    for directory in share.list(ROOT, (4096, true)) {
        if directory.node != 0 {
            let node = NodeId(directory.node);
            let all = share.list(node, (4096, true)).into_iter();
            files.extend(all.filter(|file| file.node != 0).map(|file| (node, file.name)));
        }
    }
    eprintln!("seen: {} files, listed in {:?}", files.len(), begin.elapsed());
    assert_eq!(files.len(), DIRECTORIES * FILES);
    assert_eq!(share.fs.known_inodes(), 1 + DIRECTORIES + DIRECTORIES * FILES);
    let used = descriptors();
    let memory = resident() - before;
    eprintln!("{used} descriptors, {} KiB more resident, with the test's own list", memory);
    assert!(used < 400, "{used} descriptors");
    assert!(memory < 200 * 1024, "{memory} KiB");
    let lookups = |files: &[(NodeId, String)]| {
        let begin = Instant::now();
        let nodes: Vec<_> =
            files.iter().map(|(parent, name)| share.lookup(*parent, name).unwrap()).collect();
        let each = begin.elapsed() / files.len() as u32;
        for entry in nodes {
            let node = entry.node.unwrap();
            assert_eq!(share.attr(node).unwrap().ino, entry.attributes.attr.ino);
        }
        each
    };
    eprintln!("a look-up takes {:?} of 200,000", lookups(&files));
    // The same with a table that has only these.
    let known = &files[..1000];
    for node in files[1000..].iter().flat_map(|(parent, name)| share.lookup(*parent, name)) {
        share.fs.forget(node.node.unwrap(), 3);
    }
    eprintln!("a look-up takes {:?} of 1,000", lookups(known));
    eprintln!("{} inodes are left", share.fs.known_inodes());
}
