//! Nothing changes what is read-only, not even where the server forgets to ask.

use rustix::fs::RenameFlags;

use super::*;
use crate::filesystem::{Changes, SetTime};

fn read_only() -> Share {
    let share = Share::with(PassthroughConfig { read_only: true, ..Default::default() });
    share.put("file", "content");
    fs::create_dir(share.path("dir")).unwrap();
    share
}

#[test]
fn it_is_read() {
    let share = read_only();
    let node = share.node("file");
    let handle = share.open(node, RDONLY).unwrap();
    assert_eq!(share.read(node, handle, 0).unwrap(), "content");
    assert_eq!(share.names(ROOT), [".", "..", "dir", "file"]);
    assert_eq!(share.attr(node).unwrap().size, 7);
    assert!(share.fs.read_only());
    share.fs.access(&me(), node, 5).unwrap();
}

#[test]
fn every_change_is_refused() {
    let share = read_only();
    let (fs, file, dir) = (&share.fs, share.node("file"), share.node("dir"));
    let handle = share.open(file, RDONLY).unwrap();
    let change = |changes: Changes| fs.setattr(&me(), file, None, &changes).map(drop);
    let mode = Changes { mode: Some(0o777), ..Default::default() };
    let size = Changes { size: Some(0), ..Default::default() };
    let time = Changes { mtime: Some(SetTime::Now), ..Default::default() };
    let new = how(0o644, RDWR);
    let (to, regular) = ((dir, named(c"to")), FileType::RegularFile.as_raw_mode());
    let results = [
        change(mode),
        change(size),
        change(time),
        change(Changes::default()),
        fs.symlink(&me(), ROOT, named(c"new"), c"x").map(drop),
        fs.mknod(&me(), ROOT, named(c"new"), regular | 0o644, 0).map(drop),
        fs.mkdir(&me(), ROOT, named(c"new"), 0o755).map(drop),
        fs.unlink(ROOT, named(c"file")),
        fs.rmdir(ROOT, named(c"dir")),
        fs.rename(&me(), (ROOT, named(c"file")), to, RenameFlags::empty()),
        fs.link(file, ROOT, named(c"new")).map(drop),
        share.open(file, RDWR).map(drop),
        share.open(file, OFlags::WRONLY).map(drop),
        share.open(file, OFlags::TRUNC).map(drop),
        fs.create(&me(), ROOT, named(c"new"), &new).map(drop),
        fs.create(&me(), ROOT, named(c"file"), &how(0, RDONLY)).map(drop),
        fs.tmpfile(&me(), ROOT, &new).map(drop),
        share.write(file, handle, 0, "x").map(drop),
        fs.fallocate(file, handle, 0, 10, 0),
        fs.copy_file_range((file, handle, 0), (file, handle, 0), 1).map(drop),
        fs.setxattr(file, c"user.a", b"1", 0),
        fs.removexattr(file, c"user.a"),
        fs.access(&me(), file, 2),
    ];
    for (i, result) in results.iter().enumerate() {
        assert_eq!(*result, Err(Errno::ROFS), "{i}");
    }
    assert_eq!(share.names(ROOT), [".", "..", "dir", "file"]);
    assert_eq!(share.get("file"), "content");
}

#[test]
fn reading_leaves_no_trace() {
    use std::os::unix::fs::MetadataExt;
    let share = read_only();
    // With relatime a read changes an access time that is older than the last change.
    let old = std::time::UNIX_EPOCH;
    let times = fs::FileTimes::new().set_accessed(old);
    fs::File::options().write(true).open(share.path("file")).unwrap().set_times(times).unwrap();
    let node = share.node("file");
    let handle = share.open(node, RDONLY).unwrap();
    share.read(node, handle, 0).unwrap();
    assert_eq!(share.path("file").metadata().unwrap().atime(), 0);
}
