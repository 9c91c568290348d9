//! Opening files, their contents, permissions and extended attributes.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{
    CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, XattrFlags, chmod,
    fallocate, flock, getxattr, listxattr, mkdir, mknodat, removexattr, seek, setxattr, statvfs,
    symlink,
};
use rustix::io::Errno;
use rustix::process::umask;

use super::{Case, mode, open, owned, refused};

pub(super) const CASES: &[Case] = super::cases![
    flags_of_open,
    running_programs_are_not_written,
    permissions_are_set,
    the_umask_takes_permissions,
    sizes_are_changed,
    holes_are_holes,
    fifos_and_sockets_connect,
    locks_exclude,
    extended_attributes_are_kept,
    the_filesystem_has_numbers,
];

const MAKE: OFlags = OFlags::CREATE.union(OFlags::RDWR);

fn flags_of_open(dir: &Path) {
    let path = dir.join("file");
    refused(open(&path, OFlags::RDWR), Errno::NOENT);
    drop(open(&path, MAKE | OFlags::EXCL).unwrap());
    std::fs::write(&path, "content").unwrap();
    drop(open(&path, MAKE).unwrap());
    assert_eq!(std::fs::read(&path).unwrap(), b"content");
    drop(open(&path, MAKE | OFlags::TRUNC).unwrap());
    assert_eq!(path.metadata().unwrap().len(), 0);
    for flags in [OFlags::WRONLY, OFlags::RDWR, MAKE, OFlags::TRUNC | OFlags::WRONLY] {
        refused(open(dir, flags), Errno::ISDIR);
    }
    // A link that leads nowhere is where something can be made.
    symlink("made", dir.join("dangling")).unwrap();
    drop(open(dir.join("dangling"), MAKE).unwrap());
    assert!(dir.join("made").is_file());
    let reader = open(&path, OFlags::RDONLY).unwrap();
    assert_eq!(rustix::io::write(&reader, b"x"), Err(Errno::BADF));
    refused(rustix::fs::ftruncate(&reader, 0), Errno::INVAL);
    let writer = open(&path, OFlags::WRONLY).unwrap();
    assert_eq!(rustix::io::read(&writer, &mut [0_u8; 4][..]), Err(Errno::BADF));
    let appender = open(&path, OFlags::RDWR | OFlags::APPEND).unwrap();
    appender.write_all_at(b"one", 0).unwrap();
    appender.write_all_at(b"two", 0).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"onetwo");
    rustix::fs::fcntl_setfl(&appender, OFlags::empty()).unwrap();
    appender.write_all_at(b"T", 3).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"oneTwo");
    mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    refused(open(dir.join("fifo"), OFlags::WRONLY | OFlags::NONBLOCK), Errno::NXIO);
    mknodat(CWD, dir.join("socket"), FileType::Socket, Mode::RWXU, 0).unwrap();
    refused(open(dir.join("socket"), OFlags::RDWR), Errno::NXIO);
}

fn running_programs_are_not_written(dir: &Path) {
    let path = dir.join("program");
    // By another process, so that no descriptor for writing is inherited by any of those that other threads
    // start in the meantime.
    assert!(
        Command::new("cp")
            .args(["/bin/sleep".as_ref(), path.as_path()])
            .status()
            .unwrap()
            .success()
    );
    let mut running = Command::new(&path).arg("100").stdin(Stdio::null()).spawn().unwrap();
    refused(open(&path, OFlags::WRONLY), Errno::TXTBSY);
    refused(open(&path, OFlags::RDWR | OFlags::TRUNC), Errno::TXTBSY);
    running.kill().unwrap();
    running.wait().unwrap();
    drop(open(&path, OFlags::WRONLY).unwrap());
}

fn permissions_are_set(dir: &Path) {
    let (file, below) = (dir.join("file"), dir.join("directory"));
    std::fs::write(&file, "").unwrap();
    mkdir(&below, mode(0o755)).unwrap();
    for path in [&file, &below] {
        for bits in [0, 0o111, 0o222, 0o444, 0o700, 0o777, 0o1777, 0o4755, 0o2755, 0o7777] {
            chmod(path, mode(bits)).unwrap();
            assert_eq!(owned(path).0, bits);
        }
    }
    // Through a link, and by descriptor.
    symlink("file", dir.join("link")).unwrap();
    chmod(dir.join("link"), mode(0o604)).unwrap();
    assert_eq!(owned(&file).0, 0o604);
    rustix::fs::fchmod(open(&file, OFlags::RDONLY).unwrap(), mode(0o440)).unwrap();
    assert_eq!(owned(&file).0, 0o440);
}

fn the_umask_takes_permissions(dir: &Path) {
    let kinds = [FileType::RegularFile, FileType::Fifo, FileType::Socket];
    for bits in [0, 0o022, 0o077, 0o137] {
        let before = umask(mode(bits));
        let path = |name: &str| dir.join(format!("{name}-{bits:o}"));
        drop(open(path("file"), MAKE).unwrap());
        mkdir(path("directory"), mode(0o777)).unwrap();
        for kind in kinds {
            mknodat(CWD, path(&format!("{kind:?}")), kind, mode(0o777), 0).unwrap();
        }
        umask(before);
        assert_eq!(owned(&path("file")).0, 0o666 & !bits);
        assert_eq!(owned(&path("directory")).0, 0o777 & !bits);
        for kind in kinds {
            assert_eq!(owned(&path(&format!("{kind:?}"))).0, 0o777 & !bits, "{kind:?}");
        }
    }
}

fn sizes_are_changed(dir: &Path) {
    let path = dir.join("file");
    let file = open(&path, MAKE).unwrap();
    file.write_all_at(b"0123456789", 0).unwrap();
    file.set_len(4).unwrap();
    file.set_len(8).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"0123\0\0\0\0");
    file.write_all_at(b"end", 12).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"0123\0\0\0\0\0\0\0\0end");
    let mut bytes = [0; 4];
    assert_eq!(file.read_at(&mut bytes, 15).unwrap(), 0);
    assert_eq!(file.read_at(&mut bytes, 13).unwrap(), 2);
    fallocate(&file, FallocateFlags::empty(), 0, 100).unwrap();
    assert_eq!(path.metadata().unwrap().len(), 100);
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 9000).unwrap();
    assert_eq!(path.metadata().unwrap().len(), 100);
    refused(fallocate(&file, FallocateFlags::empty(), 0, 0), Errno::INVAL);
    refused(rustix::fs::ftruncate(&file, u64::MAX), Errno::INVAL);
    refused(rustix::io::pwrite(&file, b"x", 1 << 63), Errno::INVAL);
    // Nothing of what was cut off comes back.
    file.write_all_at(&[b'x'; 5000], 0).unwrap();
    file.set_len(10).unwrap();
    file.set_len(5000).unwrap();
    let content = std::fs::read(&path).unwrap();
    assert!(content[10..].iter().all(|byte| *byte == 0));
}

fn holes_are_holes(dir: &Path) {
    const FAR: u64 = 1 << 33;
    let path = dir.join("file");
    let file = open(&path, MAKE).unwrap();
    file.write_all_at(b"end", FAR).unwrap();
    let stat = path.metadata().unwrap();
    assert_eq!(stat.len(), FAR + 3);
    assert!(stat.blocks() * 512 < 1 << 20, "{} blocks", stat.blocks());
    assert_eq!(seek(&file, SeekFrom::Data(0)), Ok(FAR));
    assert_eq!(seek(&file, SeekFrom::Hole(FAR)), Ok(FAR + 3));
    refused(seek(&file, SeekFrom::Data(FAR + 3)), Errno::NXIO);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, FAR, 4096).unwrap();
    refused(seek(&file, SeekFrom::Data(0)), Errno::NXIO);
    let mut bytes = [1; 3];
    file.read_exact_at(&mut bytes, FAR).unwrap();
    assert_eq!(bytes, [0; 3]);
}

fn fifos_and_sockets_connect(dir: &Path) {
    let fifo = dir.join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, mode(0o600), 0).unwrap();
    assert!(fifo.symlink_metadata().unwrap().file_type().is_fifo());
    std::thread::scope(|scope| {
        scope.spawn(|| std::fs::write(&fifo, "through").unwrap());
        assert_eq!(std::fs::read(&fifo).unwrap(), b"through");
    });
    // The path of a socket is short.
    let here = open(dir, OFlags::DIRECTORY).unwrap();
    let path = format!("/proc/self/fd/{}/socket", here.as_raw_fd());
    let listener = UnixListener::bind(&path).unwrap();
    let mut one = UnixStream::connect(&path).unwrap();
    let (mut other, _) = listener.accept().unwrap();
    one.write_all(b"through").unwrap();
    drop(one);
    let mut text = String::new();
    other.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through");
    drop(listener);
    let refused = UnixStream::connect(&path).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
}

fn locks_exclude(dir: &Path) {
    let path = dir.join("file");
    let (one, other) = (open(&path, MAKE).unwrap(), open(&path, MAKE).unwrap());
    flock(&one, FlockOperation::NonBlockingLockExclusive).unwrap();
    refused(flock(&other, FlockOperation::NonBlockingLockShared), Errno::WOULDBLOCK);
    flock(&one, FlockOperation::NonBlockingLockShared).unwrap();
    flock(&other, FlockOperation::NonBlockingLockShared).unwrap();
    drop(one);
    flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
}

fn extended_attributes_are_kept(dir: &Path) {
    let path = dir.join("file");
    std::fs::write(&path, "").unwrap();
    let value = [7_u8; 1000];
    setxattr(&path, "user.one", &value, XattrFlags::CREATE).unwrap();
    setxattr(&path, "user.two", b"", XattrFlags::empty()).unwrap();
    refused(setxattr(&path, "user.one", b"x", XattrFlags::CREATE), Errno::EXIST);
    refused(setxattr(&path, "user.three", b"x", XattrFlags::REPLACE), Errno::NODATA);
    let mut room = [0_u8; 2000];
    let length = getxattr(&path, "user.one", &mut room[..]).unwrap();
    assert_eq!(room[..length], value);
    assert_eq!(getxattr(&path, "user.two", &mut room[..]), Ok(0));
    refused(getxattr(&path, "user.one", &mut [0_u8; 999][..]), Errno::RANGE);
    refused(getxattr(&path, "user.none", &mut room[..]), Errno::NODATA);
    let length = listxattr(&path, &mut room[..]).unwrap();
    let mut listed: Vec<&[u8]> = room[..length].split(|byte| *byte == 0).collect();
    listed.sort_unstable();
    assert!(listed.contains(&b"user.one".as_slice()) && listed.contains(&b"user.two".as_slice()));
    removexattr(&path, "user.one").unwrap();
    refused(removexattr(&path, "user.one"), Errno::NODATA);
    setxattr(dir, "user.directory", b"x", XattrFlags::empty()).unwrap();
    assert_eq!(getxattr(dir, "user.directory", &mut room[..]), Ok(1));
}

fn the_filesystem_has_numbers(dir: &Path) {
    let numbers = statvfs(dir).unwrap();
    assert_eq!(numbers.f_namemax, 255);
    assert!(numbers.f_blocks > 0 && numbers.f_bavail <= numbers.f_blocks);
    assert!(numbers.f_frsize >= 512);
}
