//! What a restricted thread cannot do, by system calls of its own.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::panic::catch_unwind;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, ResolveFlags, XattrFlags, chmodat, chownat,
    linkat, mkdirat, mknodat, open, openat, openat2, renameat_with, setxattr, symlinkat, unlinkat,
    utimensat,
};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};
use tempfile::TempDir;

use super::*;

const NONE: Mode = Mode::empty();

#[test]
fn a_filter_of_all_is_made_once() {
    let (filter, mut made) = (FilterOfAll::new(), 0);
    for _ in 0..3 {
        let calls = || {
            made += 1;
            Calls::runtime()
        };
        filter.get(calls).unwrap();
    }
    assert_eq!(made, 1);
}

/// A directory with a share in it, and what is beside that.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("share/sub")).unwrap();
        for file in ["share/file", "share/sub/file", "outside"] {
            fs::write(dir.path().join(file), "content").unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn directory(&self) -> OwnedFd {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        open(self.path("share"), flags, NONE).unwrap()
    }

    /// Does something in a restricted thread, with the share's directory.
    fn restricted<T: Send>(&self, read_only: bool, does: impl FnOnce(OwnedFd) -> T + Send) -> T {
        let share = self.directory();
        let sandbox = Sandbox::new(&share, read_only).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                sandbox.enter().unwrap();
                does(share)
            });
            thread.join().unwrap()
        })
    }
}

fn read(path: impl AsRef<Path>) -> rustix::io::Result<OwnedFd> {
    openat(CWD, path.as_ref(), OFlags::RDONLY | OFlags::CLOEXEC, NONE)
}

/// The error of a system call that is made as it is.
fn raw(call: libc::c_long, arguments: [usize; 5]) -> Errno {
    let [a, b, c, d, e] = arguments;
    // SAFETY: no test gives more than numbers, and pointers to live strings that the kernel only reads.
    let result = unsafe { libc::syscall(call, a, b, c, d, e) };
    assert_eq!(result, -1, "the system call {call} was made");
    Errno::from_io_error(&io::Error::last_os_error()).unwrap()
}

#[test]
fn files_outside_cannot_be_opened_nor_changed() {
    let place = Place::new();
    let outside = place.path("outside");
    let inside = place.path("share/file");
    // Open for everybody, so that nothing but the restriction is in the way.
    let parent = open(place.path(""), OFlags::PATH | OFlags::CLOEXEC, NONE).unwrap();
    place.restricted(false, |share| {
        read(inside).unwrap();
        openat(&share, "sub/file", OFlags::RDWR | OFlags::TRUNC, NONE).unwrap();
        assert_eq!(read(&outside).unwrap_err(), Errno::ACCESS);
        assert_eq!(read("/etc/passwd").unwrap_err(), Errno::ACCESS);
        assert_eq!(openat(&share, "../outside", OFlags::RDONLY, NONE).unwrap_err(), Errno::ACCESS);
        // A descriptor of the file itself is opened again as little.
        let path = OFlags::PATH | OFlags::CLOEXEC;
        let fd = openat2(&parent, "outside", path, NONE, ResolveFlags::empty()).unwrap();
        let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        assert_eq!(read(again).unwrap_err(), Errno::ACCESS);

        let write = OFlags::WRONLY | OFlags::CREATE;
        assert_eq!(openat(&parent, "new", write, NONE).unwrap_err(), Errno::ACCESS);
        let flags = AtFlags::empty();
        assert_eq!(unlinkat(&parent, "outside", flags).unwrap_err(), Errno::ACCESS);
        assert_eq!(mkdirat(&parent, "new", NONE).unwrap_err(), Errno::ACCESS);
        assert_eq!(symlinkat("x", &parent, "new").unwrap_err(), Errno::ACCESS);
        // Both have other names for a move between directories that is not allowed.
        let refused = [Errno::XDEV, Errno::ACCESS];
        let moved = renameat_with(&share, "file", &parent, "new", RenameFlags::empty());
        assert!(refused.contains(&moved.unwrap_err()));
        let linked = linkat(&parent, "outside", &share, "new", flags);
        assert!(refused.contains(&linked.unwrap_err()));
    });
    assert_eq!(fs::read_dir(place.path("")).unwrap().count(), 2);
}

#[test]
fn nothing_is_executed_and_nobody_is_talked_to() {
    let place = Place::new();
    place.restricted(false, |_| {
        let no = Errno::NOSYS;
        // What would do harm here has arguments with which it fails, in another way, if it is made.
        assert_eq!(raw(libc::SYS_execve, [0; 5]), no);
        assert_eq!(raw(libc::SYS_execveat, [0; 5]), no);
        assert_eq!(raw(libc::SYS_clone, [libc::CLONE_SIGHAND as usize, 0, 0, 0, 0]), no);
        assert_eq!(raw(libc::SYS_clone3, [0; 5]), no);
        let (unix, inet) = (libc::AF_UNIX as usize, libc::AF_INET as usize);
        let stream = libc::SOCK_STREAM as usize;
        assert_eq!(raw(libc::SYS_socket, [inet, stream, 0, 0, 0]), no);
        assert_eq!(raw(libc::SYS_socket, [unix, stream, 0, 0, 0]), no);
        let traced = libc::PTRACE_TRACEME as usize;
        assert_eq!(raw(libc::SYS_ptrace, [traced, 0, 0, 0, 0]), no);
        assert_eq!(raw(libc::SYS_kill, [std::process::id() as usize, 0, 0, 0, 0]), no);
        assert_eq!(raw(libc::SYS_unshare, [libc::CLONE_FS as usize, 0, 0, 0, 0]), no);
        assert_eq!(raw(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0]), no);
        // Not even as another architecture's number, with the bit of x32.
        assert_eq!(raw(libc::SYS_getpid | 0x4000_0000, [0; 5]), no);
        // Nor is there new code.
        let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
        let (data, code) = (libc::PROT_READ as usize, libc::PROT_EXEC as usize);
        assert_eq!(raw(libc::SYS_mmap, [0, 4096, data | code, private, usize::MAX]), no);
        assert_eq!(raw(libc::SYS_mprotect, [0, 0, data | code, 0, 0]), no);
    });
}

#[test]
fn no_device_is_made() {
    let place = Place::new();
    place.restricted(false, |share| {
        let null = rustix::fs::makedev(1, 3);
        let device = FileType::CharacterDevice;
        assert_eq!(mknodat(&share, "null", device, NONE, null).unwrap_err(), Errno::NOSYS);
        // An overlay's whiteout is none.
        mknodat(&share, "whiteout", device, NONE, 0).unwrap();
        mknodat(&share, "fifo", FileType::Fifo, NONE, 0).unwrap();
    });
}

#[test]
fn a_read_only_share_is_so_for_every_system_call() {
    let place = Place::new();
    let fd = open(place.path("share/file"), OFlags::RDWR | OFlags::CLOEXEC, NONE).unwrap();
    // Linux 6.2 and later.
    let known = Restrictions::of_host().unwrap().landlock;
    let knows_truncation = matches!(known, Landlock::Version(3..));
    let proc = CString::new(place.path("share/file").as_os_str().as_bytes()).unwrap();
    place.restricted(true, |share| {
        openat(&share, "file", OFlags::RDONLY, NONE).unwrap();
        let list = openat(&share, ".", OFlags::RDONLY | OFlags::DIRECTORY, NONE).unwrap();
        assert!(rustix::fs::Dir::new(list).unwrap().count() > 3);
        let no = Errno::NOSYS;
        for (name, flags) in [
            ("file", OFlags::WRONLY),
            ("file", OFlags::RDWR),
            ("file", OFlags::TRUNC),
            ("new", OFlags::CREATE),
            (".", OFlags::TMPFILE | OFlags::WRONLY),
        ] {
            assert_eq!(openat(&share, name, flags, NONE).unwrap_err(), no, "{flags:?}");
            if flags == OFlags::TRUNC && !knows_truncation {
                continue;
            }
            // Whose flags the filter cannot see.
            let opened = openat2(&share, name, flags, NONE, ResolveFlags::empty());
            assert_eq!(opened.unwrap_err(), Errno::ACCESS, "{flags:?}");
        }
        assert_eq!(unlinkat(&share, "file", AtFlags::empty()).unwrap_err(), no);
        assert_eq!(mkdirat(&share, "new", NONE).unwrap_err(), no);
        assert_eq!(mknodat(&share, "new", FileType::Fifo, NONE, 0).unwrap_err(), no);
        assert_eq!(symlinkat("x", &share, "new").unwrap_err(), no);
        assert_eq!(linkat(&share, "file", &share, "new", AtFlags::empty()).unwrap_err(), no);
        let renamed = renameat_with(&share, "file", &share, "new", RenameFlags::empty());
        assert_eq!(renamed.unwrap_err(), no);
        // What Landlock knows nothing of.
        assert_eq!(chmodat(&share, "file", NONE, AtFlags::empty()).unwrap_err(), no);
        let (user, group) = (Some(geteuid()), Some(getegid()));
        assert_eq!(chownat(&share, "file", user, group, AtFlags::empty()).unwrap_err(), no);
        let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
        let now = rustix::fs::Timestamps { last_access: now, last_modification: now };
        assert_eq!(utimensat(&share, "file", &now, AtFlags::empty()).unwrap_err(), no);
        let set = setxattr(&*proc, c"user.x", b"x", XattrFlags::empty());
        assert_eq!(set.unwrap_err(), no);
        // Not through what is open already.
        assert_eq!(rustix::io::pwrite(&fd, b"x", 0).unwrap_err(), no);
        assert_eq!(rustix::fs::ftruncate(&fd, 0).unwrap_err(), no);
        assert_eq!(
            rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, 99).unwrap_err(),
            no
        );
    });
    assert_eq!(fs::read_to_string(place.path("share/file")).unwrap(), "content");
    let mut left: Vec<_> =
        fs::read_dir(place.path("share")).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["file", "sub"]);
}

/// A line of this thread's status.
fn status(name: &str) -> String {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap().trim().to_owned()
}

#[test]
fn only_the_thread_itself_is_restricted() {
    let place = Place::new();
    let (tell, told) = std::sync::mpsc::channel();
    let (finish, finished) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let place = &place;
        scope.spawn(move || {
            place.restricted(true, move |_| {
                tell.send(rustix::thread::gettid()).unwrap();
                finished.recv().unwrap_err();
            });
        });
        let restricted = told.recv().unwrap();
        let path = format!("/proc/self/task/{}/status", restricted.as_raw_nonzero());
        let its = fs::read_to_string(path).unwrap();
        assert!(its.contains("NoNewPrivs:\t1\n") && its.contains("Seccomp:\t2\n"), "{its}");
        assert_eq!((status("NoNewPrivs"), status("Seccomp")), ("0".to_owned(), "0".to_owned()));
        let mut child = std::process::Command::new("grep");
        let said = child.args(["NoNewPrivs", "/proc/self/status"]).output().unwrap();
        assert_eq!(said.stdout, b"NoNewPrivs:\t0\n");
        read(place.path("outside")).unwrap();
        drop(finish);
    });
}

#[test]
fn a_panic_and_memory_work_as_ever() {
    let place = Place::new();
    let panicked = place.restricted(true, |_| {
        let mut sum = 0;
        for size in (0..40).map(|bits| 1usize << (bits % 26)) {
            let mut all = vec![1u8; size];
            all.resize(size * 2, 2);
            sum += all.iter().map(|byte| usize::from(*byte)).sum::<usize>();
        }
        assert!(sum > 0);
        std::thread::yield_now();
        assert!(std::time::Instant::now().elapsed().as_secs() < 60);
        let map = std::collections::HashMap::from([(1, 2)]);
        // With a backtrace, whose symbols are in files that cannot be opened.
        let hook = catch_unwind(|| panic!("on purpose, in a restricted thread {}", map[&1]));
        let trace = std::backtrace::Backtrace::force_capture().to_string();
        assert!(!trace.is_empty());
        hook.unwrap_err().downcast_ref::<String>().cloned()
    });
    assert_eq!(panicked.as_deref(), Some("on purpose, in a restricted thread 2"));
}

#[test]
fn the_root_can_be_a_share() {
    let sandbox = Sandbox::new(File::open("/").unwrap(), true).unwrap();
    let opened = std::thread::spawn(move || {
        sandbox.enter().unwrap();
        (read("/etc/passwd").map(drop), read("/proc/self/status").map(drop))
    });
    assert_eq!(opened.join().unwrap(), (Ok(()), Ok(())));
}

#[test]
fn what_the_kernel_refuses_is_an_error() {
    let place = Place::new();
    let share = place.directory();
    let error = std::thread::spawn(move || {
        let sandbox = Sandbox::new(share.as_fd(), false).unwrap();
        // The kernel nests sixteen restrictions; each of these takes one.
        let nested = (0..20).find_map(|_| {
            let ruleset = sandbox.landlock.as_ref().unwrap().try_clone().unwrap();
            ruleset.restrict_self().err()
        });
        nested.expect("nothing was refused");
        sandbox.enter().unwrap_err()
    });
    let error = error.join().unwrap();
    let text = error.to_string();
    assert!(text.starts_with("Landlock refuses"), "{text}");
    assert!(error.source().is_some(), "{error:?}");
}

fn without_files<T: Send + 'static>(calls: &Calls, does: fn() -> T) -> T {
    let sandbox = Sandbox::without_files(&Filter::new(calls).unwrap()).unwrap();
    let thread = std::thread::spawn(move || {
        sandbox.enter().unwrap();
        does()
    });
    thread.join().unwrap()
}

#[test]
fn no_file_is_reached_without_a_share() {
    // Nothing but Landlock is in the way of these.
    let calls = Calls::runtime().and(&[libc::SYS_openat, libc::SYS_unlinkat]);
    without_files(&calls, || {
        assert_eq!(read("/etc/passwd").unwrap_err(), Errno::ACCESS);
        assert_eq!(read("/proc/self/status").unwrap_err(), Errno::ACCESS);
        let removed = unlinkat(CWD, "Cargo.toml", AtFlags::empty());
        assert_eq!(removed.unwrap_err(), Errno::ACCESS);
    });
    without_files(&Calls::runtime(), || {
        assert_eq!(read("/etc/passwd").unwrap_err(), Errno::NOSYS);
    });
}

#[test]
fn a_call_can_be_kept_for_some_arguments() {
    let only = |name| vec![(0, Is::This(name))];
    // That of a priority takes any numbers, and changes nothing.
    let calls = Calls::runtime().and_if(libc::SYS_getpriority, [only(0), only(2)]);
    without_files(&calls, || {
        assert!(rustix::process::getpriority_process(None).is_ok());
        assert!(rustix::process::getpriority_user(rustix::process::Uid::ROOT).is_ok());
        assert_eq!(rustix::process::getpriority_pgrp(None).unwrap_err(), Errno::NOSYS);
    });
}
