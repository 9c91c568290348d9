//! What changes which times.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, XattrFlags, chmod, mkdir, rename,
    rmdir, setxattr, symlink, unlink, utimensat,
};
use rustix::io::Errno;

use super::errors::NOW;
use super::{Case, mode, open, refused};

pub(super) const CASES: &[Case] = super::cases![
    times_are_set_as_they_are_given,
    changes_of_a_file_change_its_times,
    changes_of_names_change_times_of_directories,
    what_fails_changes_no_times,
];

/// Longer than the step of a filesystem's times, which is that of the kernel's clock tick.
const STEP: Duration = Duration::from_millis(15);

fn at(access: (i64, i64), modification: (i64, i64)) -> Timestamps {
    let time = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
    Timestamps { last_access: time(access), last_modification: time(modification) }
}

fn access(path: &Path) -> (i64, i64) {
    let stat = path.symlink_metadata().unwrap();
    (stat.atime(), stat.atime_nsec())
}

fn modification(path: &Path) -> (i64, i64) {
    let stat = path.symlink_metadata().unwrap();
    (stat.mtime(), stat.mtime_nsec())
}

fn change(path: &Path) -> (i64, i64) {
    let stat = path.symlink_metadata().unwrap();
    (stat.ctime(), stat.ctime_nsec())
}

fn times_are_set_as_they_are_given(dir: &Path) {
    let path = dir.join("file");
    std::fs::write(&path, "").unwrap();
    symlink("file", dir.join("link")).unwrap();
    let set = |name: &str, times: &Timestamps| {
        utimensat(CWD, dir.join(name), times, AtFlags::SYMLINK_NOFOLLOW)
    };
    let omit = UTIME_OMIT;
    for second in [0, 1, -1, -1_000_000_000, 1 << 31, 1 << 33] {
        let times = ((second, 123_456_789), (second + 5, 999_999_999));
        set("file", &at(times.0, times.1)).unwrap();
        assert_eq!((access(&path), modification(&path)), times);
    }
    set("file", &at((77, 1), (0, omit))).unwrap();
    assert_eq!((access(&path), modification(&path)), ((77, 1), ((1 << 33) + 5, 999_999_999)));
    set("file", &at((0, omit), (88, 2))).unwrap();
    assert_eq!((access(&path), modification(&path)), ((77, 1), (88, 2)));
    // A link has times of its own.
    set("link", &at((1, 2), (3, 4))).unwrap();
    assert_eq!(modification(&dir.join("link")), (3, 4));
    assert_eq!(modification(&path), (88, 2));
    set("file", &NOW).unwrap();
    assert!(modification(&path).0 > 1_700_000_000);
    refused(set("file", &at((0, 1_000_000_000), (0, 0))), Errno::INVAL);
}

/// Does something; says whether it has changed the modification and the change times.
fn changed(path: &Path, act: impl FnOnce()) -> (bool, bool) {
    let before = (modification(path), change(path));
    std::thread::sleep(STEP);
    act();
    let after = (modification(path), change(path));
    assert!(after.0 >= before.0 && after.1 >= before.1, "times go backwards");
    (before.0 != after.0, before.1 != after.1)
}

fn changes_of_a_file_change_its_times(dir: &Path) {
    const BOTH: (bool, bool) = (true, true);
    const CHANGE: (bool, bool) = (false, true);
    const NEITHER: (bool, bool) = (false, false);
    let path = dir.join("file");
    std::fs::write(&path, "content").unwrap();
    let file = open(&path, OFlags::RDWR).unwrap();
    assert_eq!(changed(&path, || file.write_all_at(b"C", 0).unwrap()), BOTH);
    assert_eq!(changed(&path, || file.set_len(3).unwrap()), BOTH);
    assert_eq!(changed(&path, || drop(open(&path, OFlags::RDWR | OFlags::TRUNC).unwrap())), BOTH);
    assert_eq!(changed(&path, || chmod(&path, mode(0o640)).unwrap()), CHANGE);
    assert_eq!(changed(&path, || std::fs::hard_link(&path, dir.join("other")).unwrap()), CHANGE);
    assert_eq!(changed(&path, || unlink(dir.join("other")).unwrap()), CHANGE);
    let attribute = || setxattr(&path, "user.x", b"x", XattrFlags::empty()).unwrap();
    assert_eq!(changed(&path, attribute), CHANGE);
    assert_eq!(changed(&path, || assert_eq!(file.read_at(&mut [0; 3], 0).unwrap(), 0)), NEITHER);
    assert_eq!(changed(&path, || drop(open(&path, OFlags::RDWR).unwrap())), NEITHER);
    assert_eq!(changed(&path, || file.sync_all().unwrap()), NEITHER);
    // The name is not the file, but Linux counts it.
    assert!(!changed(dir, || file.write_all_at(b"x", 0).unwrap()).0);
}

fn changes_of_names_change_times_of_directories(dir: &Path) {
    let (one, other) = (dir.join("one"), dir.join("other"));
    mkdir(&one, Mode::RWXU).unwrap();
    mkdir(&other, Mode::RWXU).unwrap();
    let both = |act: &dyn Fn()| changed(&one, act) == (true, true);
    assert!(both(&|| std::fs::write(one.join("file"), "").unwrap()));
    assert!(both(&|| mkdir(one.join("d"), Mode::RWXU).unwrap()));
    assert!(both(&|| rmdir(one.join("d")).unwrap()));
    assert!(both(&|| symlink("x", one.join("link")).unwrap()));
    assert!(both(&|| unlink(one.join("link")).unwrap()));
    assert!(both(&|| std::fs::hard_link(one.join("file"), one.join("b")).unwrap()));
    assert!(both(&|| rename(one.join("b"), one.join("c")).unwrap()));
    assert!(both(&|| {
        assert_eq!(
            changed(&other, || rename(one.join("c"), other.join("c")).unwrap()),
            (true, true)
        );
    }));
    assert_eq!(changed(&one, || assert_ne!(one.read_dir().unwrap().count(), 0)), (false, false));
}

fn what_fails_changes_no_times(dir: &Path) {
    let d = dir.join("d");
    mkdir(&d, Mode::RWXU).unwrap();
    std::fs::write(d.join("file"), "").unwrap();
    let nothing = |act: &dyn Fn()| changed(&d, act) == (false, false);
    assert!(nothing(&|| refused(mkdir(d.join("file"), Mode::RWXU), Errno::EXIST)));
    assert!(nothing(&|| refused(rmdir(d.join("file")), Errno::NOTDIR)));
    assert!(nothing(&|| refused(unlink(d.join("none")), Errno::NOENT)));
    assert!(nothing(&|| refused(rename(d.join("none"), d.join("x")), Errno::NOENT)));
    assert!(nothing(&|| refused(symlink("x", d.join("file")), Errno::EXIST)));
}
