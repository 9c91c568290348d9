//! Who may do what, where files can belong to different users; and what holds where they cannot.

use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{
    Access, AtFlags, CWD, Gid, OFlags, Timespec, Timestamps, Uid, access, chmod, chownat, mkdir,
    rename, rmdir, symlink, unlink, utimensat,
};
use rustix::io::Errno;

use super::errors::{NOW, all_refused, with_file};
use super::{Case, OTHER, as_other, mode, open, owned, refused};

pub(super) const CASES: &[Case] = super::cases![
    what_is_closed_is_eacces,
    directories_that_are_not_writable_keep_their_names,
    sticky_directories_protect_what_others_have,
    only_owners_change_attributes,
    permissions_decide_who_reads_and_writes,
    what_somebody_makes_is_theirs,
    groups_of_directories_are_inherited,
    writing_takes_the_bits_of_programs,
    owners_give_files_only_to_their_groups,
];

/// As an ordinary user of the host.
pub(super) const SQUASHED: &[Case] = super::cases![everything_belongs_to_one_user];

fn give(path: &Path, (uid, gid): (u32, u32)) {
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    chownat(CWD, path, uid, gid, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn what_is_closed_is_eacces(dir: &Path) {
    chmod(dir, mode(0o777)).unwrap();
    with_file(dir);
    mkdir(dir.join("closed"), mode(0o700)).unwrap();
    std::fs::write(dir.join("closed/x"), "").unwrap();
    as_other(|| all_refused(dir, &dir.join("closed/x"), Errno::ACCESS));
    // It may be listed, but not entered; and the other way round.
    chmod(dir.join("closed"), mode(0o704)).unwrap();
    as_other(|| {
        assert_eq!(super::names(&dir.join("closed")), ["x"]);
        refused(open(dir.join("closed/x"), OFlags::RDONLY), Errno::ACCESS);
    });
    chmod(dir.join("closed"), mode(0o701)).unwrap();
    as_other(|| {
        refused(open(dir.join("closed"), OFlags::DIRECTORY), Errno::ACCESS);
        assert!(open(dir.join("closed/x"), OFlags::RDONLY).is_ok());
    });
}

fn directories_that_are_not_writable_keep_their_names(dir: &Path) {
    let d = dir.join("d");
    mkdir(&d, mode(0o755)).unwrap();
    std::fs::write(d.join("file"), "").unwrap();
    mkdir(d.join("e"), mode(0o777)).unwrap();
    give(&d.join("file"), OTHER);
    as_other(|| {
        let new = d.join("new");
        refused(open(&new, OFlags::CREATE | OFlags::RDWR), Errno::ACCESS);
        refused(mkdir(&new, mode(0o755)), Errno::ACCESS);
        refused(symlink("x", &new), Errno::ACCESS);
        refused(rename(d.join("file"), &new), Errno::ACCESS);
        refused(rename(d.join("file"), d.join("e/file")), Errno::ACCESS);
        refused(unlink(d.join("file")), Errno::ACCESS);
        refused(rmdir(d.join("e")), Errno::ACCESS);
        // The file itself is theirs.
        open(d.join("file"), OFlags::RDWR | OFlags::TRUNC).unwrap();
    });
}

fn sticky_directories_protect_what_others_have(dir: &Path) {
    let d = dir.join("d");
    mkdir(&d, mode(0o1777)).unwrap();
    std::fs::write(d.join("roots"), "").unwrap();
    mkdir(d.join("roots-directory"), mode(0o777)).unwrap();
    as_other(|| {
        refused(unlink(d.join("roots")), Errno::PERM);
        refused(rename(d.join("roots"), d.join("x")), Errno::PERM);
        refused(rmdir(d.join("roots-directory")), Errno::PERM);
        std::fs::write(d.join("own"), "").unwrap();
        refused(rename(d.join("own"), d.join("roots")), Errno::PERM);
        rename(d.join("own"), d.join("renamed")).unwrap();
        unlink(d.join("renamed")).unwrap();
    });
    chmod(&d, mode(0o777)).unwrap();
    as_other(|| unlink(d.join("roots")).unwrap());
}

fn only_owners_change_attributes(dir: &Path) {
    let path = dir.join("file");
    std::fs::write(&path, "").unwrap();
    chmod(&path, mode(0o666)).unwrap();
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    let past = Timestamps { last_access: zero, last_modification: zero };
    let set = |times| utimensat(CWD, &path, times, AtFlags::empty());
    as_other(|| {
        refused(chmod(&path, mode(0o777)), Errno::PERM);
        let (uid, gid) = (Some(Uid::from_raw(OTHER.0)), Some(Gid::from_raw(OTHER.1)));
        refused(chownat(CWD, &path, uid, None, AtFlags::empty()), Errno::PERM);
        refused(chownat(CWD, &path, None, gid, AtFlags::empty()), Errno::PERM);
        refused(set(&past), Errno::PERM);
        // Whoever may write may say that it was now.
        set(&NOW).unwrap();
    });
    chmod(&path, mode(0o644)).unwrap();
    as_other(|| refused(set(&NOW), Errno::ACCESS));
    give(&path, OTHER);
    as_other(|| {
        set(&past).unwrap();
        chmod(&path, mode(0o600)).unwrap();
    });
    assert_eq!(owned(&path), (0o600, OTHER.0, OTHER.1));
}

fn permissions_decide_who_reads_and_writes(dir: &Path) {
    let path = dir.join("file");
    std::fs::write(&path, "").unwrap();
    // Whose the file is, and by which bits it is opened then.
    for (owner, shift) in [(OTHER, 6), ((0, OTHER.1), 3), ((0, 0), 0)] {
        give(&path, owner);
        for bits in 0..8_u32 {
            // All others may do the opposite.
            let others = 0o777 & !(0o7 << shift) & if bits & 4 == 0 { 0o777 } else { 0 };
            chmod(&path, mode(bits << shift | others)).unwrap();
            as_other(|| {
                let may = |flags, right| {
                    let opened = open(&path, flags).map(drop);
                    let wanted = if bits & right == 0 { Err(Errno::ACCESS) } else { Ok(()) };
                    assert_eq!(opened, wanted, "{owner:?} {bits:o} {flags:?}");
                };
                may(OFlags::RDONLY, 4);
                may(OFlags::WRONLY, 2);
                may(OFlags::WRONLY | OFlags::TRUNC, 2);
                let runs = access(&path, Access::EXEC_OK);
                assert_eq!(runs.is_ok(), bits & 1 != 0, "{owner:?} {bits:o}");
            });
        }
    }
}

fn what_somebody_makes_is_theirs(dir: &Path) {
    chmod(dir, mode(0o777)).unwrap();
    as_other(|| {
        open(dir.join("file"), OFlags::CREATE | OFlags::RDWR).unwrap();
        mkdir(dir.join("directory"), mode(0o750)).unwrap();
        symlink("x", dir.join("link")).unwrap();
        // A file that its owner may not write can be written by who has just made it.
        let flags = OFlags::CREATE | OFlags::RDWR;
        let made = rustix::fs::open(dir.join("read-only"), flags, mode(0o400)).unwrap();
        assert_eq!(rustix::io::write(&made, b"x"), Ok(1));
        refused(open(dir.join("read-only"), OFlags::RDWR), Errno::ACCESS);
    });
    assert_eq!(owned(&dir.join("file")), (0o666, OTHER.0, OTHER.1));
    assert_eq!(owned(&dir.join("directory")), (0o750, OTHER.0, OTHER.1));
    assert_eq!(owned(&dir.join("link")), (0o777, OTHER.0, OTHER.1));
    assert_eq!(owned(&dir.join("read-only")), (0o400, OTHER.0, OTHER.1));
}

fn groups_of_directories_are_inherited(dir: &Path) {
    const GROUP: u32 = 1111;
    let d = dir.join("d");
    mkdir(&d, mode(0o777)).unwrap();
    give(&d, (0, GROUP));
    chmod(&d, mode(0o2777)).unwrap();
    as_other(|| {
        open(d.join("file"), OFlags::CREATE | OFlags::RDWR).unwrap();
        mkdir(d.join("directory"), mode(0o755)).unwrap();
        symlink("x", d.join("link")).unwrap();
    });
    assert_eq!(owned(&d.join("file")), (0o666, OTHER.0, GROUP));
    assert_eq!(owned(&d.join("directory")), (0o2755, OTHER.0, GROUP));
    assert_eq!(owned(&d.join("link")), (0o777, OTHER.0, GROUP));
}

fn writing_takes_the_bits_of_programs(dir: &Path) {
    let path = dir.join("program");
    std::fs::write(&path, "content").unwrap();
    let again = |bits| {
        chmod(&path, mode(bits)).unwrap();
        assert_eq!(owned(&path).0, bits);
    };
    again(0o6777);
    let file = as_other(|| open(&path, OFlags::RDWR).unwrap());
    as_other(|| file.write_all_at(b"x", 0).unwrap());
    assert_eq!(owned(&path).0, 0o777);
    again(0o6777);
    as_other(|| file.set_len(3).unwrap());
    assert_eq!(owned(&path).0, 0o777);
    again(0o6777);
    as_other(|| drop(open(&path, OFlags::RDWR | OFlags::TRUNC).unwrap()));
    assert_eq!(owned(&path).0, 0o777);
    again(0o6777);
    give(&path, (OTHER.0, 0));
    assert_eq!(owned(&path), (0o777, OTHER.0, 0));
    // Root writes what it likes.
    again(0o6777);
    open(&path, OFlags::RDWR).unwrap().write_all_at(b"y", 0).unwrap();
    assert_eq!(owned(&path).0, 0o6777);
}

fn owners_give_files_only_to_their_groups(dir: &Path) {
    let path = dir.join("file");
    std::fs::write(&path, "").unwrap();
    give(&path, (OTHER.0, 0));
    as_other(|| {
        let group = |gid| chownat(CWD, &path, None, Some(Gid::from_raw(gid)), AtFlags::empty());
        refused(group(1), Errno::PERM);
        // The bit is for groups that one is in.
        chmod(&path, mode(0o2755)).unwrap();
        assert_eq!(owned(&path).0, 0o755);
        group(OTHER.1).unwrap();
        chmod(&path, mode(0o2755)).unwrap();
    });
    assert_eq!(owned(&path), (0o2755, OTHER.0, OTHER.1));
}

fn everything_belongs_to_one_user(dir: &Path) {
    let (_, uid, gid) = owned(dir);
    std::fs::write(dir.join("file"), "").unwrap();
    mkdir(dir.join("directory"), mode(0o755)).unwrap();
    symlink("x", dir.join("link")).unwrap();
    for name in ["file", "directory", "link"] {
        assert_eq!((owned(&dir.join(name)).1, owned(&dir.join(name)).2), (uid, gid), "{name}");
    }
    // It may be refused or have no effect.
    let given =
        chownat(CWD, dir.join("file"), Some(Uid::from_raw(uid + 1)), None, AtFlags::empty());
    assert!(matches!(given, Ok(()) | Err(Errno::PERM)), "{given:?}");
    assert_eq!(owned(&dir.join("file")).1, uid);
}
