//! The errors that every call with a path knows.

use std::path::Path;

use rustix::fs::{
    Access, AtFlags, CWD, FileType, Mode, OFlags, Timestamps, access, chmod, chownat, linkat,
    listxattr, mkdir, mknodat, readlink, rename, rmdir, stat, statfs, symlink, unlink, utimensat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::{Case, mode, open, refused};

pub(super) const CASES: &[Case] = super::cases![
    what_is_missing_is_enoent,
    what_is_no_directory_is_enotdir,
    what_leads_nowhere_is_eloop,
    what_is_too_long_is_enametoolong,
    what_is_there_is_eexist,
    what_is_on_another_filesystem_is_exdev,
];

/// A call with a path, and a directory with a file for those that take two.
pub(super) type Call = fn(&Path, &Path) -> Result<(), Errno>;

/// Calls that make something.
const MAKING: &[(&str, Call)] = &[
    ("mkdir", |_, path| mkdir(path, mode(0o755))),
    ("mkfifo", |_, path| mknodat(CWD, path, FileType::Fifo, mode(0o644), 0)),
    ("mknod", |_, path| mknodat(CWD, path, FileType::RegularFile, mode(0o644), 0)),
    ("symlink", |_, path| symlink("target", path)),
    ("link to", |dir, path| linkat(CWD, dir.join("file"), CWD, path, AtFlags::empty())),
    ("create", |_, path| open(path, OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY).map(drop)),
];

/// The others.
const USING: &[(&str, Call)] = &[
    ("chmod", |_, path| chmod(path, mode(0o644))),
    ("chown", |_, path| chownat(CWD, path, Some(geteuid()), None, AtFlags::SYMLINK_NOFOLLOW)),
    ("link", |dir, path| linkat(CWD, path, CWD, dir.join("new"), AtFlags::empty())),
    ("open", |_, path| open(path, OFlags::RDONLY).map(drop)),
    ("truncate", |_, path| open(path, OFlags::WRONLY | OFlags::TRUNC).map(drop)),
    ("rename", |dir, path| rename(path, dir.join("new"))),
    ("rename to", |dir, path| rename(dir.join("file"), path)),
    ("rmdir", |_, path| rmdir(path)),
    ("unlink", |_, path| unlink(path)),
    ("utimensat", |_, path| utimensat(CWD, path, &NOW, AtFlags::SYMLINK_NOFOLLOW)),
    ("stat", |_, path| stat(path).map(drop)),
    ("statfs", |_, path| statfs(path).map(drop)),
    ("readlink", |_, path| readlink(path, Vec::new()).map(drop)),
    ("access", |_, path| access(path, Access::EXISTS)),
    ("listxattr", |_, path| listxattr(path, &mut [0_u8; 64][..]).map(drop)),
];

pub(super) const NOW: Timestamps = Timestamps {
    last_access: rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
    last_modification: rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
};

/// Fails unless all calls are refused with this error.
pub(super) fn all_refused(dir: &Path, path: &Path, wanted: Errno) {
    let wrong: Vec<String> = [MAKING, USING]
        .concat()
        .iter()
        .map(|(name, call)| (name, call(dir, path)))
        .filter(|(_, result)| *result != Err(wanted))
        .map(|(name, result)| format!("{name}: {result:?}"))
        .collect();
    assert!(wrong.is_empty(), "{path:?} is not {wanted:?}: {wrong:?}");
}

pub(super) fn with_file(dir: &Path) {
    std::fs::write(dir.join("file"), "content").unwrap();
}

fn what_is_missing_is_enoent(dir: &Path) {
    with_file(dir);
    all_refused(dir, &dir.join("missing/x"), Errno::NOENT);
    for (name, call) in USING.iter().filter(|(name, _)| *name != "rename to") {
        assert_eq!(call(dir, &dir.join("missing")), Err(Errno::NOENT), "{name}");
    }
    // A name that has just gone is missing, too.
    std::fs::write(dir.join("gone"), "").unwrap();
    unlink(dir.join("gone")).unwrap();
    for (name, call) in USING.iter().filter(|(name, _)| *name != "rename to") {
        assert_eq!(call(dir, &dir.join("gone")), Err(Errno::NOENT), "{name}");
    }
}

fn what_is_no_directory_is_enotdir(dir: &Path) {
    with_file(dir);
    mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    all_refused(dir, &dir.join("file/x"), Errno::NOTDIR);
    all_refused(dir, &dir.join("fifo/x"), Errno::NOTDIR);
    refused(rmdir(dir.join("file")), Errno::NOTDIR);
    refused(open(dir.join("file"), OFlags::DIRECTORY), Errno::NOTDIR);
    refused(open(dir.join("file/"), OFlags::RDONLY), Errno::NOTDIR);
}

fn what_leads_nowhere_is_eloop(dir: &Path) {
    with_file(dir);
    symlink("b", dir.join("a")).unwrap();
    symlink("a", dir.join("b")).unwrap();
    all_refused(dir, &dir.join("a/x"), Errno::LOOP);
    refused(open(dir.join("a"), OFlags::RDONLY), Errno::LOOP);
    symlink("file", dir.join("link")).unwrap();
    refused(open(dir.join("link"), OFlags::NOFOLLOW), Errno::LOOP);
    // That many at once are too many, fewer are not.
    symlink("file", dir.join("link-0")).unwrap();
    for i in 1..=45 {
        symlink(format!("link-{}", i - 1), dir.join(format!("link-{i}"))).unwrap();
    }
    assert!(open(dir.join("link-30"), OFlags::RDONLY).is_ok());
    refused(open(dir.join("link-45"), OFlags::RDONLY), Errno::LOOP);
}

fn what_is_too_long_is_enametoolong(dir: &Path) {
    with_file(dir);
    all_refused(dir, &dir.join("n".repeat(256)), Errno::NAMETOOLONG);
    all_refused(dir, &dir.join("n".repeat(256)).join("x"), Errno::NAMETOOLONG);
    all_refused(dir, &dir.join("n".repeat(1100)), Errno::NAMETOOLONG);
    all_refused(dir, &dir.join("n/".repeat(2100)), Errno::NAMETOOLONG);
    for (name, make) in MAKING {
        let path = dir.join("n".repeat(255));
        assert_eq!(make(dir, &path), Ok(()), "{name}");
        if *name == "mkdir" { rmdir(&path).unwrap() } else { unlink(&path).unwrap() }
    }
}

fn what_is_there_is_eexist(dir: &Path) {
    with_file(dir);
    mkdir(dir.join("directory"), mode(0o755)).unwrap();
    mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    mknodat(CWD, dir.join("socket"), FileType::Socket, Mode::RWXU, 0).unwrap();
    symlink("file", dir.join("link")).unwrap();
    symlink("nothing", dir.join("dangling")).unwrap();
    for there in ["file", "directory", "fifo", "socket", "link", "dangling"] {
        for (name, make) in MAKING {
            assert_eq!(make(dir, &dir.join(there)), Err(Errno::EXIST), "{name} {there}");
        }
    }
    assert_eq!(std::fs::read(dir.join("file")).unwrap(), b"content");
}

fn what_is_on_another_filesystem_is_exdev(dir: &Path) {
    with_file(dir);
    let elsewhere = tempfile::Builder::new().prefix("vmlab-e2e-").tempdir_in("/dev/shm").unwrap();
    let (here, there) = (dir.join("file"), elsewhere.path().join("file"));
    refused(rename(&here, &there), Errno::XDEV);
    refused(linkat(CWD, &here, CWD, &there, AtFlags::empty()), Errno::XDEV);
    std::fs::write(&there, "").unwrap();
    refused(rename(&there, &here), Errno::XDEV);
    refused(linkat(CWD, &there, CWD, dir.join("new"), AtFlags::empty()), Errno::XDEV);
}
