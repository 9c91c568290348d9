//! Directories and names.

use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};

use rustix::fs::{CWD, FileType, RenameFlags, renameat_with};

use super::listing::AHEAD;
use super::*;

#[test]
fn a_directory_is_made_and_removed() {
    let share = Share::new();
    let dir = share.mkdir(ROOT, "dir").unwrap();
    assert_eq!(share.attr(dir).unwrap().mode, 0o040755);
    assert_eq!(share.mkdir(ROOT, "dir"), Err(Errno::EXIST));
    let (file, _) = share.create(dir, "file", 0o644, RDWR).unwrap();
    assert_eq!(share.node("dir/file"), file);
    assert_eq!(share.rmdir(ROOT, "dir"), Err(Errno::NOTEMPTY));
    assert_eq!(share.unlink(ROOT, "dir"), Err(Errno::ISDIR));
    assert_eq!(share.rmdir(dir, "file"), Err(Errno::NOTDIR));
    share.unlink(dir, "file").unwrap();
    share.rmdir(ROOT, "dir").unwrap();
    assert_eq!(share.lookup(ROOT, "dir").unwrap_err(), Errno::NOENT);
    assert_eq!(share.rmdir(ROOT, "dir"), Err(Errno::NOENT));
}

#[test]
fn a_removed_working_directory_has_attributes() {
    let share = Share::new();
    let dir = share.mkdir(ROOT, "dir").unwrap();
    share.rmdir(ROOT, "dir").unwrap();
    assert_eq!(share.attr(dir).unwrap().nlink, 0);
    assert_eq!(share.lookup(dir, "file").unwrap_err(), Errno::NOENT);
    assert_eq!(share.create(dir, "file", 0o644, RDWR), Err(Errno::NOENT));
    assert_eq!(share.names(dir), Vec::<String>::new());
    share.fs.forget(dir, 1);
    assert_eq!(share.attr(dir).unwrap_err(), Errno::STALE);
}

#[test]
fn a_list_is_whole_whatever_the_room() {
    let share = Share::new();
    let mut wanted: Vec<String> =
        (0..500).map(|i| format!("file-{i:0>width$}", width = i % 60 + 3)).collect();
    for name in &wanted {
        share.put(name, "");
    }
    wanted.extend([".".into(), "..".into()]);
    wanted.sort();
    for room in [(128, false), (4096, false), (1 << 20, false), (300, true), (1 << 20, true)] {
        let mut names: Vec<_> = share.list(ROOT, room).into_iter().map(|one| one.name).collect();
        names.sort();
        assert_eq!(names, wanted, "{room:?}");
    }
}

#[test]
fn a_list_goes_on_from_any_offset() {
    let share = Share::new();
    for i in 0..300 {
        share.put(&format!("file-{i}"), "");
    }
    let all = share.list(ROOT, (1 << 20, false));
    let handle = share.opendir(ROOT).unwrap();
    for at in [250, 10, 299, 0, 120] {
        let rest = share.readdir(ROOT, handle, all[at].next, (1 << 20, false)).unwrap();
        assert_eq!(rest, all[at + 1..], "{at}");
    }
    // From the beginning again, as rewinddir(3) does, with what has come since.
    share.put("new", "");
    let again = share.readdir(ROOT, handle, 0, (1 << 20, false)).unwrap();
    assert_eq!(again.len(), all.len() + 1);
    // Room for no entry is an error, for nothing would be the end.
    assert_eq!(share.readdir(ROOT, handle, 0, (20, false)), Err(Errno::INVAL));
    // Offsets that the kernel never gave.
    for odd in [1, u64::MAX, i64::MAX as u64] {
        let _ = share.readdir(ROOT, handle, odd, (4096, true));
    }
    assert_eq!(share.readdir(ROOT, handle, 0, (1 << 20, false)).unwrap(), again);
}

#[test]
fn entries_have_types_and_lead_to_nodes() {
    let share = Share::new();
    share.put("file", "");
    share.mkdir(ROOT, "dir").unwrap();
    symlink("nowhere", share.path("link")).unwrap();
    let before = share.fs.known_inodes();
    for entry in share.list(ROOT, (4096, true)) {
        let (kind, dots) = match entry.name.as_str() {
            "file" => (libc::DT_REG, false),
            "dir" => (libc::DT_DIR, false),
            "link" => (libc::DT_LNK, false),
            _ => (libc::DT_DIR, true),
        };
        assert_eq!(entry.kind, u32::from(kind), "{}", entry.name);
        assert_eq!(entry.node == 0, dots, "{}", entry.name);
        if !dots {
            // The reference is the same as that of LOOKUP.
            assert_eq!(entry.node, share.node(&entry.name).0);
            share.fs.forget(NodeId(entry.node), 1);
            assert!(share.attr(NodeId(entry.node)).is_ok());
        }
    }
    assert_eq!(share.fs.known_inodes(), before + 2);
}

#[test]
fn only_entries_with_room_get_references() {
    let share = Share::new();
    for i in 0..10 {
        share.put(&format!("{i}"), "");
    }
    let handle = share.opendir(ROOT).unwrap();
    let first = share.readdir(ROOT, handle, 0, (160 * 4, true)).unwrap();
    assert_eq!(first.len(), 4);
    let referred = first.iter().filter(|one| one.node != 0).count();
    assert_eq!(share.fs.known_inodes(), 1 + referred);
}

#[test]
fn handles_of_directories_are_no_files() {
    let share = Share::new();
    share.put("file", "");
    let (dir, file) = (share.opendir(ROOT).unwrap(), share.node("file"));
    let open = share.open(file, RDWR).unwrap();
    assert_eq!(share.read(ROOT, dir, 0), Err(Errno::BADF));
    assert_eq!(share.readdir(file, open, 0, (4096, false)), Err(Errno::BADF));
    assert_eq!(share.fs.release(ROOT, dir), Err(Errno::BADF));
    assert_eq!(share.fs.releasedir(file, open), Err(Errno::BADF));
    assert_eq!(share.opendir(file), Err(Errno::NOTDIR));
    for data_only in [false, true] {
        share.fs.fsyncdir(ROOT, dir, data_only).unwrap();
    }
}

#[test]
fn symbolic_links_are_made_and_read() {
    let share = Share::new();
    let target = c"../../etc/\xff";
    let entry = share.fs.symlink(&me(), ROOT, named(c"link"), target).unwrap();
    let node = entry.node.unwrap();
    assert_eq!(share.fs.readlink(node).unwrap(), target.to_bytes());
    assert_eq!(entry.attributes.attr.mode & 0o170000, 0o120000);
    assert_eq!(share.fs.readlink(ROOT), Err(Errno::INVAL));
    let long = CString::new(vec![b'x'; 4095]).unwrap();
    let entry = share.fs.symlink(&me(), ROOT, named(c"long"), &long).unwrap();
    assert_eq!(share.fs.readlink(entry.node.unwrap()).unwrap(), long.as_bytes());
    assert_eq!(share.fs.symlink(&me(), ROOT, named(c"none"), c"").unwrap_err(), Errno::NOENT);
}

#[test]
fn nodes_are_made_but_no_devices() {
    let share = Share::new();
    let mknod = |name: &str, kind: FileType, rdev| {
        let mode = kind.as_raw_mode() | 0o640;
        share
            .fs
            .mknod(&me(), ROOT, named(&text(name)), mode, rdev)
            .map(|entry| entry.attributes.attr)
    };
    for (name, kind) in [
        ("file", FileType::RegularFile),
        ("fifo", FileType::Fifo),
        ("socket", FileType::Socket),
        ("whiteout", FileType::CharacterDevice),
    ] {
        let attr = mknod(name, kind, 0).unwrap();
        assert_eq!((attr.mode, attr.rdev), (kind.as_raw_mode() | 0o640, 0), "{name}");
    }
    assert!(share.path("fifo").metadata().unwrap().file_type().is_fifo());
    let no_type = share.fs.mknod(&me(), ROOT, named(c"plain"), 0o600, 0).unwrap();
    assert_eq!(no_type.attributes.attr.mode, 0o100600);
    for (kind, rdev) in [
        (FileType::CharacterDevice, 0x103),
        (FileType::BlockDevice, 0),
        (FileType::BlockDevice, 0x800),
        (FileType::Directory, 0),
        (FileType::Symlink, 0),
    ] {
        assert_eq!(mknod("device", kind, rdev).unwrap_err(), Errno::PERM, "{kind:?}");
    }
    assert!(!share.path("device").exists());
}

#[test]
fn hard_links_are_one_inode() {
    let share = Share::new();
    share.put("file", "content");
    let dir = share.mkdir(ROOT, "dir").unwrap();
    let file = share.node("file");
    let entry = share.fs.link(file, dir, named(c"other")).unwrap();
    assert_eq!((entry.node, entry.attributes.attr.nlink), (Some(file), 2));
    // The name under which it was seen last goes, then the other.
    share.unlink(dir, "other").unwrap();
    assert_eq!(share.attr(file).unwrap().nlink, 1);
    assert_eq!(share.node("file"), file);
    share.unlink(ROOT, "file").unwrap();
    assert_eq!(share.attr(file).unwrap().nlink, 0);
    assert_eq!(share.fs.link(dir, ROOT, named(c"loop")).unwrap_err(), Errno::PERM);
    // A link to a symbolic link is one to the link.
    symlink("/etc/passwd", share.path("link")).unwrap();
    let link = share.node("link");
    let entry = share.fs.link(link, ROOT, named(c"link2")).unwrap();
    assert_eq!(entry.node, Some(link));
    assert_eq!(fs::read_link(share.path("link2")).unwrap(), PathBuf::from("/etc/passwd"));
}

#[test]
fn rename_moves_and_replaces() {
    let share = Share::new();
    let (dir, other) = (share.mkdir(ROOT, "dir").unwrap(), share.mkdir(ROOT, "other").unwrap());
    share.put("dir/a", "a");
    share.put("other/b", "b");
    let (a, b) = (share.node("dir/a"), share.node("other/b"));
    share.rename((dir, "a"), (other, "b"), RenameFlags::empty()).unwrap();
    assert_eq!(share.get("other/b"), "a");
    assert_eq!(share.node("other/b"), a);
    assert_eq!(share.attr(a).unwrap().size, 1);
    assert_eq!(share.attr(b).unwrap().nlink, 0, "the one that was replaced");
    // What is below a directory moves with it.
    share.rename((ROOT, "other"), (dir, "below"), RenameFlags::empty()).unwrap();
    share.fs.cache.clear();
    assert_eq!(share.attr(a).unwrap().nlink, 1);
    assert_eq!(share.node("dir/below/b"), a);
    let into_itself = share.rename((ROOT, "dir"), (other, "x"), RenameFlags::empty());
    assert_eq!(into_itself, Err(Errno::INVAL));
    assert_eq!(share.rename((dir, "none"), (dir, "x"), RenameFlags::empty()), Err(Errno::NOENT));
}

#[test]
fn rename_flags_are_kept() {
    let share = Share::new();
    share.put("a", "a");
    share.put("b", "b");
    let dir = share.mkdir(ROOT, "dir").unwrap();
    let (a, b) = (share.node("a"), share.node("b"));
    let refused = share.rename((ROOT, "a"), (ROOT, "b"), RenameFlags::NOREPLACE);
    assert_eq!(refused, Err(Errno::EXIST));
    share.rename((ROOT, "a"), (ROOT, "b"), RenameFlags::EXCHANGE).unwrap();
    assert_eq!((share.get("a"), share.get("b")), ("b".into(), "a".into()));
    assert_eq!((share.node("a"), share.node("b")), (b, a));
    // A file and a directory, and the attributes of both without a new look-up.
    share.rename((ROOT, "a"), (ROOT, "dir"), RenameFlags::EXCHANGE).unwrap();
    assert_eq!(share.attr(b).unwrap().mode & 0o170000, 0o100000);
    share.fs.cache.clear();
    assert_eq!(share.attr(dir).unwrap().mode & 0o170000, 0o040000);
    assert_eq!(share.names(dir), [".", ".."]);
    share.rename((ROOT, "b"), (ROOT, "c"), RenameFlags::NOREPLACE).unwrap();
    assert_eq!(share.node("c"), a);
    let unknown = RenameFlags::from_bits_retain(8);
    assert_eq!(share.rename((ROOT, "c"), (ROOT, "d"), unknown), Err(Errno::INVAL));
}

#[test]
fn rename_leaves_a_whiteout() {
    let whiteout = RenameFlags::WHITEOUT;
    // The overlay that is a container's root has none.
    let dir = [std::env::temp_dir(), "/dev/shm".into()]
        .into_iter()
        .filter_map(|place| tempfile::tempdir_in(place).ok())
        .find(|dir| {
            let (from, to) = (dir.path().join("from"), dir.path().join("to"));
            fs::write(&from, "").unwrap();
            renameat_with(CWD, &from, CWD, &to, whiteout).is_ok()
        })
        .expect("this test needs RENAME_WHITEOUT where temporary files are or in /dev/shm");
    let share = Share::at(dir, PassthroughConfig::default());
    share.put("file", "");
    let file = share.node("file");
    share.rename((ROOT, "file"), (ROOT, "moved"), whiteout).unwrap();
    assert_eq!(share.node("moved"), file);
    let left = share.path("file").symlink_metadata().unwrap();
    assert!(left.file_type().is_char_device() && left.rdev() == 0);
}

#[test]
fn rename_of_two_names_of_one_file_changes_nothing() {
    let share = Share::new();
    share.put("a", "");
    fs::hard_link(share.path("a"), share.path("b")).unwrap();
    let a = share.node("a");
    share.rename((ROOT, "a"), (ROOT, "b"), RenameFlags::empty()).unwrap();
    assert_eq!((share.node("a"), share.node("b")), (a, a));
    assert_eq!(share.fs.pins.count(), 0);
}

#[test]
fn names_are_bytes() {
    let share = Share::new();
    for name in [c"\xff\xfe", c"\n", c" ", c"..\\..", c"a:b*?", c"...", c"\x7f\x01"] {
        let how = how(0o644, RDWR);
        let (entry, _) = share.fs.create(&me(), ROOT, named(name), &how).unwrap();
        let found = share.fs.lookup(&me(), ROOT, named(name)).unwrap();
        assert_eq!(found.node, entry.node);
    }
    let longest = "x".repeat(255);
    assert!(share.create(ROOT, &longest, 0o644, RDWR).is_ok());
    assert!(share.lookup(ROOT, &longest).is_ok());
}

#[test]
fn what_is_not_there_is_remembered_as_long_as_it_holds() {
    for (cache, seconds) in [(CachePolicy::Fixed, 86400), (CachePolicy::Auto, 1)] {
        let share = Share::with(PassthroughConfig { cache, ..Default::default() });
        let entry = share.fs.lookup(&me(), ROOT, named(c"none")).unwrap();
        assert_eq!((entry.node, entry.valid.as_secs()), (None, seconds));
        assert_eq!(share.fs.getattr(ROOT, None).unwrap().valid.as_secs(), seconds);
    }
    let config = PassthroughConfig { cache: CachePolicy::Coherent, ..Default::default() };
    let share = Share::with(config);
    assert_eq!(share.fs.lookup(&me(), ROOT, named(c"none")).unwrap_err(), Errno::NOENT);
    share.put("file", "");
    let entry = share.lookup(ROOT, "file").unwrap();
    assert!(entry.valid.is_zero() && entry.attributes.valid.is_zero());
}

/// A share that does not change, in which a directory holds `count` files.
fn unopened(count: usize) -> (Share, NodeId, Vec<String>) {
    let share = Share::with(PassthroughConfig { cache: CachePolicy::Fixed, ..Default::default() });
    share.fs.init(init::NO_OPENDIR_SUPPORT);
    fs::create_dir(share.path("dir")).unwrap();
    let names: Vec<_> = (0..count).map(|i| format!("dir/file-{i}")).collect();
    names.iter().for_each(|name| share.put(name, ""));
    let mut wanted: Vec<_> = names.iter().map(|name| name[4..].to_owned()).collect();
    wanted.extend([".".into(), "..".into()]);
    wanted.sort();
    let dir = share.node("dir");
    (share, dir, wanted)
}

#[test]
fn a_directory_that_does_not_change_need_not_be_opened() {
    let (share, dir, wanted) = unopened(300);
    assert_eq!(share.fs.opendir(dir).unwrap_err(), Errno::NOSYS);
    let unopened = Handle(0);
    // Two lists at once, of which each goes on where it was.
    let mut lists = [Vec::new(), Vec::new()];
    let mut at = [0, 0];
    for turn in 0.. {
        let one = turn % 2;
        let more = share.readdir(dir, unopened, at[one], (1000, one == 1)).unwrap();
        let Some(last) = more.last() else { break };
        at[one] = last.next;
        lists[one].extend(more.into_iter().map(|entry| entry.name));
    }
    let rest = share.readdir(dir, unopened, at[1], (1 << 20, false)).unwrap();
    lists[1].extend(rest.into_iter().map(|entry| entry.name));
    for mut list in lists {
        list.sort();
        assert_eq!(list, wanted);
    }
    share.fs.fsyncdir(dir, unopened, false).unwrap();
    assert_eq!(
        share.readdir(share.node("dir/file-0"), unopened, 0, (4096, false)),
        Err(Errno::NOTDIR)
    );
    // Where the kernel does not know of this, directories are opened.
    share.fs.init(0);
    let dir = share.node("dir");
    assert!(share.fs.opendir(dir).is_ok());
    assert_eq!(share.readdir(dir, unopened, 0, (4096, false)), Err(Errno::BADF));
    let coherent =
        Share::with(PassthroughConfig { cache: CachePolicy::Coherent, ..Default::default() });
    coherent.fs.init(init::NO_OPENDIR_SUPPORT);
    assert!(coherent.fs.opendir(ROOT).is_ok());
}

#[test]
fn few_of_many_unopened_directories_are_kept_open() {
    let (share, dir, wanted) = unopened(40);
    let first = |_| share.readdir(dir, Handle(0), 0, (100, false)).unwrap();
    // Each is begun and never ended.
    let begun: Vec<_> = (0..4000).map(first).collect();
    // The tests beside this one have thousands of descriptors at times.
    let place = share.path("dir").canonicalize().unwrap();
    let open = fs::read_dir("/proc/self/fd").unwrap();
    let paths = open.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    let kept = paths.filter(|path| *path == place).count();
    assert!((1..100).contains(&kept), "{kept} descriptors of the directory");
    // All can be gone on with, also those that were closed since.
    let mut names: Vec<_> = begun[0].iter().map(|entry| entry.name.clone()).collect();
    let next = begun[0].last().unwrap().next;
    let rest = share.readdir(dir, Handle(0), next, (1 << 20, false)).unwrap();
    names.extend(rest.into_iter().map(|entry| entry.name));
    names.sort();
    assert_eq!(names, wanted);
}

/// The names of files that a list from the beginning leads to.
fn led_to(share: &Share, dir: NodeId) -> Vec<String> {
    let handle = share.opendir(dir).unwrap();
    let listed = share.readdir(dir, handle, 0, (4096, true)).unwrap();
    share.fs.releasedir(dir, handle).unwrap();
    listed.into_iter().filter(|entry| entry.node != 0).map(|entry| entry.name).collect()
}

#[test]
fn files_are_listed_with_attributes_where_they_are_looked_up() {
    let share = Share::new();
    for dir in ["one", "one/sub", "two"] {
        fs::create_dir(share.path(dir)).unwrap();
    }
    share.put("one/file", "");
    share.put("two/file", "");
    let (one, two) = (share.node("one"), share.node("two"));
    share.fs.followed.expect(0);
    for _ in 0..3 {
        assert_eq!(led_to(&share, one), ["sub"]);
        assert_eq!(led_to(&share, two), Vec::<String>::new());
        // To go on into directories says nothing of files, and what is not there nothing at all.
        share.lookup(one, "sub").unwrap();
        share.lookup(one, "nothing").unwrap_err();
    }
    share.lookup(one, "file").unwrap();
    for _ in 0..AHEAD / 2 {
        let mut both = led_to(&share, one);
        both.sort();
        assert_eq!(both, ["file", "sub"]);
        assert_eq!(led_to(&share, two), ["file"]);
        // What has been told need not be looked up; if it is, that says nothing.
        share.lookup(one, "file").unwrap();
    }
    assert_eq!(led_to(&share, one), ["sub"]);
}

#[test]
fn a_list_is_kept_where_the_next_change_can_be_told() {
    let keep = abi::fopen::KEEP_CACHE | abi::fopen::CACHE_DIR;
    let policies = [
        (CachePolicy::Fixed, [keep; 2]),
        (CachePolicy::Auto, [0, keep]),
        (CachePolicy::Coherent, [0; 2]),
    ];
    for (cache, wanted) in policies {
        let share = Share::with(PassthroughConfig { cache, ..Default::default() });
        let flags = [std::time::SystemTime::now(), std::time::UNIX_EPOCH].map(|changed| {
            let times = fs::FileTimes::new().set_modified(changed);
            fs::File::open(share.dir.path()).unwrap().set_times(times).unwrap();
            share.fs.opendir(ROOT).unwrap().flags
        });
        assert_eq!(flags, wanted, "{cache:?}");
    }
}
