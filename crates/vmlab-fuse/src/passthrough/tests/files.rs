//! Data of files, and handles.

use std::os::unix::fs::MetadataExt;

use rustix::process::{Rlimit, setrlimit};

use super::*;

#[test]
fn a_file_is_made_written_and_read() {
    let share = Share::new();
    let (node, handle) = share.create(ROOT, "file", 0o644, RDWR).unwrap();
    assert_eq!(share.write(node, handle, 0, "hello"), Ok(5));
    assert_eq!(share.write(node, handle, 5, " there"), Ok(6));
    assert_eq!(share.read(node, handle, 6).unwrap(), "there");
    assert_eq!(share.read(node, handle, 11).unwrap(), "");
    assert_eq!(share.get("file"), "hello there");
    for data_only in [false, true] {
        share.fs.fsync(node, handle, data_only).unwrap();
    }
    assert_eq!(share.fs.flush(node, handle), Err(Errno::NOSYS));
    share.fs.release(node, handle).unwrap();
    assert_eq!(share.fs.release(node, handle), Err(Errno::BADF));
    assert_eq!(share.read(node, handle, 0), Err(Errno::BADF));
}

#[test]
fn what_a_handle_may_is_what_it_was_opened_for() {
    let share = Share::new();
    share.put("file", "content");
    let node = share.node("file");
    let reader = share.open(node, RDONLY).unwrap();
    assert_eq!(share.write(node, reader, 0, "x"), Err(Errno::BADF));
    let writer = share.open(node, OFlags::WRONLY).unwrap();
    assert_eq!(share.read(node, writer, 0), Err(Errno::BADF));
    assert_eq!(share.write(node, writer, 0, "C"), Ok(1));
    assert_eq!(share.read(node, reader, 0).unwrap(), "Content");
    assert_eq!(share.open(node, OFlags::WRONLY | RDWR), Err(Errno::INVAL));
}

#[test]
fn open_truncates_and_appends() {
    let share = Share::new();
    share.put("file", "content");
    let node = share.node("file");
    let append = share.open(node, OFlags::WRONLY | OFlags::APPEND).unwrap();
    let write = |to, data: &[u8]| share.fs.write(node, append, to, &Data(data), false);
    assert_eq!(write(WriteAt::End, b"+"), Ok(1));
    assert_eq!(share.get("file"), "content+");
    // A page of a mapping comes through the same handle and has its place.
    assert_eq!(write(WriteAt::Offset(0), b"C"), Ok(1));
    assert_eq!(share.get("file"), "Content+");
    // The host's end counts, not the one that the guest's kernel knows.
    share.put("file", "longer than before");
    assert_eq!(write(WriteAt::End, b"!"), Ok(1));
    assert_eq!(share.get("file"), "longer than before!");
    share.open(node, OFlags::WRONLY | OFlags::TRUNC).unwrap();
    assert_eq!(share.get("file"), "");
}

#[test]
fn with_writeback_the_kernel_reads_and_appends() {
    let config = PassthroughConfig { writeback: true, ..Default::default() };
    let share = Share::with(config);
    assert_ne!(share.fs.wanted() & init::WRITEBACK_CACHE, 0);
    share.put("file", "content");
    share.fs.init(0);
    // One that does not know of it gets what it opens.
    let node = share.node("file");
    let writer = share.open(node, OFlags::WRONLY).unwrap();
    assert_eq!(share.read(node, writer, 0), Err(Errno::BADF));

    share.fs.init(init::WRITEBACK_CACHE);
    let node = share.node("file");
    let writer = share.open(node, OFlags::WRONLY | OFlags::APPEND).unwrap();
    assert_eq!(share.read(node, writer, 0).unwrap(), "content");
    assert_eq!(share.write(node, writer, 0, "C"), Ok(1));
    assert_eq!(share.get("file"), "Content");
    let (new, writer) = share.create(ROOT, "new", 0o644, OFlags::WRONLY).unwrap();
    share.write(new, writer, 0, "new").unwrap();
    assert_eq!(share.read(new, writer, 0).unwrap(), "new");
    // It still is the one who reads or does not write.
    let reader = share.open(node, RDONLY).unwrap();
    assert_eq!(share.write(node, reader, 0, "x"), Err(Errno::BADF));
    if !is_root() {
        // What can only be written to has no pages.
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o200);
        fs::set_permissions(share.path("file"), permissions).unwrap();
        let opened = share.fs.open(&me(), node, OFlags::WRONLY.bits(), 0).unwrap();
        assert_eq!(opened.flags, abi::fopen::DIRECT_IO);
        share.write(node, opened.handle, 0, "x").unwrap();
    }
    assert_eq!(Share::new().fs.wanted() & init::WRITEBACK_CACHE, 0);
}

#[test]
fn flags_that_mean_nothing_here_are_left_out() {
    let share = Share::new();
    share.put("file", "content");
    let node = share.node("file");
    // None of these may make, refuse or follow anything.
    let odd = OFlags::CREATE
        | OFlags::EXCL
        | OFlags::NOFOLLOW
        | OFlags::DIRECT
        | OFlags::PATH
        | OFlags::DIRECTORY
        | OFlags::TMPFILE;
    let handle = share.open(node, odd).unwrap();
    assert_eq!(share.read(node, handle, 0).unwrap(), "content");
    // Nor may the host do anything else with what is open, whatever there will be.
    let kept = OFlags::RWMODE | OFlags::APPEND | OFlags::SYNC | OFlags::LARGEFILE;
    for bit in 2..32 {
        for access in [RDONLY, OFlags::WRONLY, RDWR] {
            let flags = OFlags::from_bits_retain(1 << bit) | access;
            let handle = share.open(node, flags).unwrap();
            let open = share.fs.handles.file(node, handle).unwrap();
            let has = rustix::fs::fcntl_getfl(open.fd()).unwrap();
            assert!(kept.contains(has), "{flags:?}: {has:?}");
            assert_eq!(has & OFlags::RWMODE, access, "{flags:?}");
        }
    }
}

#[test]
fn create_opens_what_is_there_unless_it_is_exclusive() {
    let share = Share::new();
    share.put("file", "content");
    assert_eq!(share.create(ROOT, "file", 0o644, RDWR | OFlags::EXCL), Err(Errno::EXIST));
    let (node, handle) = share.create(ROOT, "file", 0o600, RDWR).unwrap();
    assert_eq!(share.read(node, handle, 0).unwrap(), "content");
    assert_eq!(node, share.node("file"));
    let (node, handle) = share.create(ROOT, "file", 0o600, RDWR | OFlags::TRUNC).unwrap();
    assert_eq!(share.read(node, handle, 0).unwrap(), "");
    share.mkdir(ROOT, "dir").unwrap();
    assert_eq!(share.create(ROOT, "dir", 0o600, RDWR), Err(Errno::ISDIR));
}

#[test]
fn a_temporary_file_has_no_name_until_it_gets_one() {
    let share = Share::new();
    let made = share.fs.tmpfile(&me(), ROOT, &how(0o640, RDWR)).unwrap();
    let (node, handle) = (made.0.node.unwrap(), made.1.handle);
    assert_eq!((made.0.attributes.attr.nlink, made.0.attributes.attr.mode & 0o7777), (0, 0o640));
    share.write(node, handle, 0, "data").unwrap();
    assert_eq!(share.names(ROOT), [".", ".."]);
    assert_eq!(share.attr(node).unwrap().size, 4);
    let entry = share.fs.link(node, ROOT, named(c"named")).unwrap();
    assert_eq!((entry.node, entry.attributes.attr.nlink), (Some(node), 1));
    share.fs.release(node, handle).unwrap();
    assert_eq!(share.get("named"), "data");
    assert_eq!(share.attr(node).unwrap().size, 4);
    // With O_EXCL it never gets one.
    let made = share.fs.tmpfile(&me(), ROOT, &how(0o640, RDWR | OFlags::EXCL)).unwrap();
    let refused = share.fs.link(made.0.node.unwrap(), ROOT, named(c"other"));
    assert_eq!(refused.unwrap_err(), Errno::NOENT);
    // One that is closed and has no name is gone.
    share.fs.release(made.0.node.unwrap(), made.1.handle).unwrap();
    assert_eq!(share.attr(made.0.node.unwrap()).unwrap_err(), Errno::STALE);
}

#[test]
fn space_is_reserved_and_freed() {
    let share = Share::new();
    let (node, handle) = share.create(ROOT, "file", 0o644, RDWR).unwrap();
    let allocate = |offset, length, mode: rustix::fs::FallocateFlags| {
        share.fs.fallocate(node, handle, offset, length, mode.bits())
    };
    use rustix::fs::FallocateFlags as Mode;
    allocate(0, 1 << 20, Mode::empty()).unwrap();
    assert_eq!(share.attr(node).unwrap().size, 1 << 20);
    allocate(1 << 20, 1 << 20, Mode::KEEP_SIZE).unwrap();
    assert_eq!(share.attr(node).unwrap().size, 1 << 20);
    let before = share.path("file").metadata().unwrap().blocks();
    allocate(0, 1 << 19, Mode::PUNCH_HOLE | Mode::KEEP_SIZE).unwrap();
    assert!(share.path("file").metadata().unwrap().blocks() < before);
    // ZERO_RANGE, COLLAPSE_RANGE and INSERT_RANGE are the filesystem's to have.
    for mode in [Mode::ZERO_RANGE, Mode::COLLAPSE_RANGE, Mode::INSERT_RANGE] {
        let result = allocate(0, 1 << 16, mode);
        assert!(matches!(result, Ok(()) | Err(Errno::OPNOTSUPP)), "{mode:?}: {result:?}");
    }
    assert_eq!(allocate(u64::MAX, 1, Mode::empty()), Err(Errno::INVAL));
    assert_eq!(allocate(0, 0, Mode::empty()), Err(Errno::INVAL));
}

#[test]
fn data_and_holes_are_found() {
    let share = Share::new();
    let (node, handle) = share.create(ROOT, "file", 0o644, RDWR).unwrap();
    share.write(node, handle, 1 << 20, "data").unwrap();
    let find = |offset, whence: i32| share.fs.lseek(node, handle, offset, whence as u32);
    assert_eq!(find(0, libc::SEEK_DATA), Ok(1 << 20));
    assert_eq!(find(0, libc::SEEK_HOLE), Ok(0));
    assert_eq!(find(2 << 20, libc::SEEK_DATA), Err(Errno::NXIO));
    for whence in [libc::SEEK_SET, libc::SEEK_CUR, libc::SEEK_END, -1] {
        assert_eq!(find(0, whence), Err(Errno::INVAL));
    }
}

#[test]
fn ranges_are_copied() {
    let share = Share::new();
    share.put("from", "0123456789");
    let from = share.node("from");
    let reader = share.open(from, RDONLY).unwrap();
    let (to, writer) = share.create(ROOT, "to", 0o644, RDWR).unwrap();
    let copied = share.fs.copy_file_range((from, reader, 3), (to, writer, 2), 4);
    assert_eq!(copied, Ok(4));
    assert_eq!(share.get("to"), "\0\x003456");
    let refused = share.fs.copy_file_range((to, writer, 0), (from, reader, 0), 4);
    assert_eq!(refused, Err(Errno::BADF));
}

#[test]
fn numbers_of_the_filesystem() {
    let share = Share::new();
    share.put("file", "");
    let numbers = share.fs.statfs(ROOT).unwrap();
    assert!(numbers.blocks > 0 && numbers.bsize > 0 && numbers.namelen == 255);
    assert_eq!(share.fs.statfs(share.node("file")).unwrap().blocks, numbers.blocks);
    share.fs.syncfs(ROOT).unwrap();
    share.fs.syncfs(share.node("file")).unwrap();
}

#[test]
fn the_reply_to_open_says_what_may_be_remembered() {
    use abi::fopen::{CACHE_DIR, KEEP_CACHE, NOFLUSH};
    for (cache, reader, writer, directory) in [
        (CachePolicy::Fixed, KEEP_CACHE | NOFLUSH, KEEP_CACHE, KEEP_CACHE | CACHE_DIR),
        (CachePolicy::Auto, KEEP_CACHE | NOFLUSH, KEEP_CACHE, 0),
        (CachePolicy::Coherent, NOFLUSH, 0, 0),
    ] {
        let share = Share::with(PassthroughConfig { cache, ..Default::default() });
        share.put("file", "");
        let node = share.node("file");
        let open = |flags: OFlags| share.fs.open(&me(), node, flags.bits(), 0).unwrap().flags;
        assert_eq!((open(RDONLY), open(RDWR)), (reader, writer), "{cache:?}");
        assert_eq!(share.fs.opendir(ROOT).unwrap().flags, directory, "{cache:?}");
        let coherent = cache != CachePolicy::Fixed;
        assert_eq!(share.fs.wanted() & init::AUTO_INVAL_DATA != 0, coherent);
        assert_eq!(share.fs.wanted() & init::CACHE_SYMLINKS != 0, !coherent);
    }
}

#[test]
fn handles_have_a_limit() {
    let share = Share::with(PassthroughConfig { max_handles: 3, ..Default::default() });
    share.put("file", "");
    let node = share.node("file");
    let handles = [share.open(node, RDONLY), share.open(node, RDWR), share.opendir(ROOT)];
    assert!(handles.iter().all(|handle| handle.is_ok()));
    assert_eq!(share.open(node, RDONLY | OFlags::TRUNC), Err(Errno::MFILE));
    assert_eq!(share.opendir(ROOT), Err(Errno::MFILE));
    // What is refused leaves nothing behind.
    assert_eq!(share.create(ROOT, "new", 0o644, RDWR), Err(Errno::MFILE));
    assert_eq!(share.fs.tmpfile(&me(), ROOT, &how(0o644, RDWR)).unwrap_err(), Errno::MFILE);
    assert!(!share.path("new").exists());
    share.fs.release(node, handles[0].unwrap()).unwrap();
    let next = share.open(node, RDONLY).unwrap();
    assert!(!handles.contains(&Ok(next)), "a handle is used twice");
}

#[test]
fn thousands_of_handles_are_open_at_once() {
    // And what other tests have open.
    let needed = MAX_HANDLES as u64 + 1024;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < needed) {
        let maximum = limit.maximum.map(|maximum| maximum.max(needed));
        setrlimit(Resource::Nofile, Rlimit { current: Some(needed), maximum }).unwrap_or_else(
            |error| panic!("this test needs {needed} descriptors: {error}, {limit:?}"),
        );
    }
    let share = Share::new();
    share.put("file", "");
    let node = share.node("file");
    let opened = (0..2 * MAX_HANDLES).filter(|_| share.open(node, RDONLY).is_ok()).count();
    assert_eq!(opened, MAX_HANDLES);
}

/// Lets every syncfs(2) of the calling thread fail.
fn refuse_syncfs() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
    let calls = [(libc::SYS_syncfs, Vec::new())].into();
    let (allow, refuse) = (SeccompAction::Allow, SeccompAction::Errno(libc::EIO as u32));
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(calls, allow, refuse, arch).unwrap();
    apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

#[test]
fn nobody_waits_for_the_disks_at_the_end() {
    let durable = Arc::new(AtomicBool::new(true));
    let config = PassthroughConfig { durable: Arc::clone(&durable), ..Default::default() };
    let share = Share::with(config);
    // Of this test's thread alone, as that of a test is.
    refuse_syncfs();
    let sync = || FileSystem::syncfs(&*share.fs, ROOT);
    assert_eq!(sync(), Err(Errno::IO));
    durable.store(false, Ordering::Relaxed);
    assert_eq!(sync(), Ok(()));
    assert_eq!(FileSystem::syncfs(&*share.fs, NodeId(99)), Err(Errno::STALE));
}
