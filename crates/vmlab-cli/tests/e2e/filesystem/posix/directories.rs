//! Names: making, changing, removing and listing them.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, linkat, mkdir, mknodat, openat, readlink,
    rename, renameat_with, rmdir, symlink, unlink,
};
use rustix::io::Errno;

use super::{Case, mode, names, open, refused};

pub(super) const CASES: &[Case] = super::cases![
    rmdir_takes_empty_directories_only,
    unlink_takes_no_directories,
    rename_replaces_files,
    rename_replaces_empty_directories_only,
    rename_with_flags,
    a_moved_directory_takes_along_what_is_in_it,
    links_are_the_same_file,
    directories_cannot_be_linked,
    what_is_removed_can_still_be_used,
    a_removed_directory_takes_nothing_more,
    a_directory_can_be_emptied_while_it_is_listed,
    names_may_have_any_bytes,
    symbolic_links_have_any_targets,
];

fn make(path: &Path) {
    mkdir(path, mode(0o755)).unwrap();
}

fn rmdir_takes_empty_directories_only(dir: &Path) {
    make(&dir.join("d"));
    std::fs::write(dir.join("d/file"), "").unwrap();
    refused(rmdir(dir.join("d")), Errno::NOTEMPTY);
    refused(rmdir(dir.join("d/file")), Errno::NOTDIR);
    refused(rmdir(dir.join("d/.")), Errno::INVAL);
    refused(rmdir(dir.join("d/..")), Errno::NOTEMPTY);
    symlink("d", dir.join("link")).unwrap();
    refused(rmdir(dir.join("link")), Errno::NOTDIR);
    unlink(dir.join("d/file")).unwrap();
    rmdir(dir.join("d")).unwrap();
    refused(rmdir(dir.join("d")), Errno::NOENT);
    assert_eq!(names(dir), ["link"]);
}

fn unlink_takes_no_directories(dir: &Path) {
    make(&dir.join("d"));
    refused(unlink(dir.join("d")), Errno::ISDIR);
    for kind in [FileType::RegularFile, FileType::Fifo, FileType::Socket] {
        mknodat(CWD, dir.join("node"), kind, Mode::RWXU, 0).unwrap();
        unlink(dir.join("node")).unwrap();
    }
    assert_eq!(names(dir), ["d"]);
}

fn rename_replaces_files(dir: &Path) {
    let (a, b) = (dir.join("a"), dir.join("b"));
    std::fs::write(&a, "from a").unwrap();
    std::fs::write(&b, "from b").unwrap();
    let replaced = open(&b, OFlags::RDONLY).unwrap();
    rename(&a, &b).unwrap();
    assert_eq!(std::fs::read(&b).unwrap(), b"from a");
    assert_eq!(replaced.metadata().unwrap().nlink(), 0);
    assert_eq!(names(dir), ["b"]);
    // Two names of one file both stay.
    std::fs::hard_link(&b, &a).unwrap();
    rename(&a, &b).unwrap();
    assert_eq!(names(dir), ["a", "b"]);
    // A link is replaced itself, and not what it leads to.
    symlink("b", dir.join("link")).unwrap();
    rename(&a, dir.join("link")).unwrap();
    assert!(!dir.join("link").is_symlink());
    assert_eq!(names(dir), ["b", "link"]);
}

fn rename_replaces_empty_directories_only(dir: &Path) {
    make(&dir.join("d"));
    make(&dir.join("full"));
    std::fs::write(dir.join("full/file"), "").unwrap();
    std::fs::write(dir.join("file"), "").unwrap();
    refused(rename(dir.join("d"), dir.join("full")), Errno::NOTEMPTY);
    refused(rename(dir.join("d"), dir.join("file")), Errno::NOTDIR);
    refused(rename(dir.join("file"), dir.join("d")), Errno::ISDIR);
    refused(rename(dir.join("d"), dir.join("d/below")), Errno::INVAL);
    refused(rename(dir.join("full/file"), dir.join("full")), Errno::NOTEMPTY);
    rename(dir.join("full"), dir.join("d")).unwrap();
    assert_eq!(names(&dir.join("d")), ["file"]);
    assert_eq!(names(dir), ["d", "file"]);
}

fn rename_with_flags(dir: &Path) {
    let (a, b) = (dir.join("a"), dir.join("b"));
    std::fs::write(&a, "a").unwrap();
    make(&b);
    let with = |flags| renameat_with(CWD, &a, CWD, &b, flags);
    refused(with(RenameFlags::NOREPLACE), Errno::EXIST);
    with(RenameFlags::EXCHANGE).unwrap();
    assert!(a.is_dir());
    assert_eq!(std::fs::read(&b).unwrap(), b"a");
    refused(with(RenameFlags::EXCHANGE | RenameFlags::NOREPLACE), Errno::INVAL);
    unlink(&b).unwrap();
    refused(with(RenameFlags::EXCHANGE), Errno::NOENT);
    with(RenameFlags::NOREPLACE).unwrap();
    assert_eq!(names(dir), ["b"]);
}

fn a_moved_directory_takes_along_what_is_in_it(dir: &Path) {
    std::fs::create_dir_all(dir.join("from/d/e")).unwrap();
    make(&dir.join("to"));
    std::fs::write(dir.join("from/d/e/file"), "content").unwrap();
    let inside = open(dir.join("from/d/e"), OFlags::DIRECTORY).unwrap();
    rename(dir.join("from/d"), dir.join("to/moved")).unwrap();
    assert_eq!(std::fs::read(dir.join("to/moved/e/file")).unwrap(), b"content");
    assert!(!dir.join("from/d").exists());
    let file = openat(&inside, "file", OFlags::RDONLY, Mode::empty()).unwrap();
    assert_eq!(std::io::read_to_string(std::fs::File::from(file)).unwrap(), "content");
    let above = openat(&inside, "../..", OFlags::PATH, Mode::empty()).unwrap();
    let above = rustix::fs::fstat(above).unwrap();
    assert_eq!(above.st_ino, dir.join("to").metadata().unwrap().ino());
}

fn links_are_the_same_file(dir: &Path) {
    let (a, b) = (dir.join("a"), dir.join("b"));
    std::fs::write(&a, "one").unwrap();
    std::fs::hard_link(&a, &b).unwrap();
    let stat = |path: &Path| path.symlink_metadata().unwrap();
    assert_eq!((stat(&a).ino(), stat(&a).nlink()), (stat(&b).ino(), 2));
    std::fs::write(&b, "another").unwrap();
    assert_eq!(std::fs::read(&a).unwrap(), b"another");
    assert_eq!(stat(&a).len(), 7);
    unlink(&a).unwrap();
    assert_eq!(stat(&b).nlink(), 1);
    // The number in a listing is the file's.
    let listed = dir.read_dir().unwrap().next().unwrap().unwrap();
    assert_eq!(listed.ino(), stat(&b).ino());
    // A symbolic link has names of its own.
    symlink("b", &a).unwrap();
    linkat(CWD, &a, CWD, dir.join("c"), AtFlags::empty()).unwrap();
    assert_eq!((stat(&a).nlink(), stat(&dir.join("c")).ino()), (2, stat(&a).ino()));
    linkat(CWD, &a, CWD, dir.join("d"), AtFlags::SYMLINK_FOLLOW).unwrap();
    assert_eq!(stat(&dir.join("d")).ino(), stat(&b).ino());
}

fn directories_cannot_be_linked(dir: &Path) {
    make(&dir.join("d"));
    refused(linkat(CWD, dir.join("d"), CWD, dir.join("e"), AtFlags::empty()), Errno::PERM);
    let temporary = OFlags::TMPFILE | OFlags::RDWR;
    let file = open(dir, temporary).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    linkat(CWD, path, CWD, dir.join("named"), AtFlags::SYMLINK_FOLLOW).unwrap();
    let file = open(dir, temporary | OFlags::EXCL).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let link = linkat(CWD, path, CWD, dir.join("never"), AtFlags::SYMLINK_FOLLOW);
    refused(link, Errno::NOENT);
    assert_eq!(names(dir), ["d", "named"]);
}

fn what_is_removed_can_still_be_used(dir: &Path) {
    use std::os::unix::fs::FileExt;
    let path = dir.join("file");
    std::fs::write(&path, "content").unwrap();
    let file = open(&path, OFlags::RDWR).unwrap();
    let looked = open(&path, OFlags::PATH).unwrap();
    unlink(&path).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.write_all_at(b"more and more", 0).unwrap();
    file.set_len(8).unwrap();
    rustix::fs::fchmod(&file, mode(0o640)).unwrap();
    let mut bytes = [0; 20];
    assert_eq!(file.read_at(&mut bytes, 0).unwrap(), 8);
    assert_eq!(&bytes[..8], b"more and");
    let stat = file.metadata().unwrap();
    assert_eq!((stat.len(), stat.mode() & 0o777), (8, 0o640));
    assert_eq!(looked.metadata().unwrap().len(), 8);
    // Another file of that name is another file.
    std::fs::write(&path, "new").unwrap();
    assert_eq!(file.metadata().unwrap().len(), 8);
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
}

fn a_removed_directory_takes_nothing_more(dir: &Path) {
    let path = dir.join("d");
    make(&path);
    let gone = open(&path, OFlags::DIRECTORY).unwrap();
    rmdir(&path).unwrap();
    refused(
        openat(&gone, "x", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU).map(drop),
        Errno::NOENT,
    );
    refused(rustix::fs::mkdirat(&gone, "x", Mode::RWXU), Errno::NOENT);
    let listed = rustix::fs::Dir::read_from(&gone).unwrap();
    let listed = listed.filter(|entry| {
        entry.as_ref().is_ok_and(|entry| !matches!(entry.file_name().to_bytes(), b"." | b".."))
    });
    assert_eq!(listed.count(), 0);
    assert!(gone.metadata().unwrap().is_dir());
}

fn a_directory_can_be_emptied_while_it_is_listed(dir: &Path) {
    const COUNT: usize = 300;
    for i in 0..COUNT {
        std::fs::write(dir.join(format!("a-file-with-a-long-name-{i}")), "").unwrap();
    }
    let opened = open(dir, OFlags::DIRECTORY).unwrap();
    let mut listing = rustix::fs::Dir::read_from(opened.as_fd()).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    while let Some(entry) = listing.read() {
        let entry = entry.unwrap();
        let name = entry.file_name().to_str().unwrap().to_owned();
        if !name.starts_with('.') {
            unlink(dir.join(&name)).unwrap();
            assert!(seen.insert(name), "it is listed twice");
        }
    }
    assert_eq!(seen.len(), COUNT);
    std::fs::write(dir.join("new"), "").unwrap();
    listing.rewind();
    let again = listing
        .filter(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name().to_bytes() == b"new"));
    assert_eq!(again.count(), 1);
    assert_eq!(names(dir), ["new"]);
}

fn names_may_have_any_bytes(dir: &Path) {
    let all: Vec<Vec<u8>> =
        (1..=255_u8).filter(|byte| *byte != b'/').map(|b| vec![b'x', b]).collect();
    for name in &all {
        std::fs::write(dir.join(OsStr::from_bytes(name)), name).unwrap();
    }
    let listed = dir.read_dir().unwrap().map(|entry| entry.unwrap().file_name());
    let mut listed: Vec<Vec<u8>> = listed.map(|name| name.as_bytes().to_vec()).collect();
    listed.sort();
    assert_eq!(listed, all);
    for name in &all {
        assert_eq!(std::fs::read(dir.join(OsStr::from_bytes(name))).unwrap(), *name);
    }
}

fn symbolic_links_have_any_targets(dir: &Path) {
    let long = "t/".repeat(2047);
    for (i, target) in ["file", "/", "../..", " ", "a\nb", &long].iter().enumerate() {
        let path = dir.join(i.to_string());
        symlink(*target, &path).unwrap();
        assert_eq!(readlink(&path, Vec::new()).unwrap().to_str(), Ok(*target));
        assert_eq!(path.symlink_metadata().unwrap().len(), target.len() as u64);
    }
    refused(symlink("", dir.join("empty")), Errno::NOENT);
    refused(symlink("t".repeat(4096), dir.join("long")), Errno::NAMETOOLONG);
    std::fs::write(dir.join("file"), "").unwrap();
    refused(readlink(dir.join("file"), Vec::new()), Errno::INVAL);
    refused(readlink(dir, Vec::new()), Errno::INVAL);
}
