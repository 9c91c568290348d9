//! What the threads of each kind of device cannot do, by system calls of their own. That they can do what they should
//! is for the tests of the devices, whose threads are all restricted.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;

use rustix::io::Errno;

use super::*;

const ALL: [Work; 5] = [Work::Disk, Work::Streams, Work::Frames, Work::Random, Work::Connections];

/// Does something in a thread of such a device.
fn restricted<T: Send>(work: Work, does: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(work).unwrap();
            does()
        });
        thread.join().unwrap()
    })
}

/// How a system call fails, which is made as it is.
fn raw(call: c_long, arguments: [usize; 5]) -> Errno {
    let [a, b, c, d, e] = arguments;
    // SAFETY: no test gives more than numbers, and pointers to live strings that the kernel only reads.
    let result = unsafe { libc::syscall(call, a, b, c, d, e) };
    assert_eq!(result, -1, "the system call {call} was made");
    Errno::from_io_error(&io::Error::last_os_error()).unwrap()
}

#[test]
fn none_opens_files_nor_executes_nor_signals_anybody() {
    let here = libc::AT_FDCWD as usize;
    let path = c"/etc/passwd".as_ptr() as usize;
    // Who is signalled has to exist, so that it is not that which fails.
    let mut other = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = other.id() as usize;
    for work in ALL {
        restricted(work, || {
            let none = |call, arguments| {
                assert_eq!(raw(call, arguments), Errno::NOSYS, "{work:?}: system call {call}");
            };
            none(libc::SYS_openat, [here, path, libc::O_RDONLY as usize, 0, 0]);
            none(libc::SYS_openat, [here, path, (libc::O_PATH | libc::O_CLOEXEC) as usize, 0, 0]);
            none(libc::SYS_openat2, [here, path, 0, 0, 0]);
            none(libc::SYS_unlinkat, [here, path, 0, 0, 0]);
            none(libc::SYS_readlinkat, [here, path, 0, 0, 0]);
            none(libc::SYS_memfd_create, [path, 0, 0, 0, 0]);
            none(libc::SYS_execve, [0; 5]);
            none(libc::SYS_execveat, [0; 5]);
            none(libc::SYS_clone, [libc::CLONE_SIGHAND as usize, 0, 0, 0, 0]);
            none(libc::SYS_clone3, [0; 5]);
            none(libc::SYS_ptrace, [libc::PTRACE_TRACEME as usize, 0, 0, 0, 0]);
            none(libc::SYS_unshare, [libc::CLONE_FS as usize, 0, 0, 0, 0]);
            none(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0]);
            // FIONREAD, and all that KVM and terminals have.
            none(libc::SYS_ioctl, [0, libc::FIONREAD as usize, 0, 0, 0]);
            none(libc::SYS_kill, [pid, 0, 0, 0, 0]);
            none(libc::SYS_tgkill, [pid, pid, 0, 0, 0]);
            none(libc::SYS_pidfd_open, [pid, 0, 0, 0, 0]);
            let stream = libc::SOCK_STREAM as usize;
            none(libc::SYS_socket, [libc::AF_INET as usize, stream, 0, 0, 0]);
            none(libc::SYS_socket, [libc::AF_NETLINK as usize, libc::SOCK_RAW as usize, 0, 0, 0]);
            let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
            let code = (libc::PROT_READ | libc::PROT_EXEC) as usize;
            none(libc::SYS_mmap, [0, 4096, code, private, usize::MAX]);
            none(libc::SYS_mprotect, [0, 0, code, 0, 0]);
        });
    }
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn each_has_the_calls_of_its_own_kind_alone() {
    let file = tempfile::tempfile().unwrap();
    let file = file.as_raw_fd() as usize;
    let byte = b"x".as_ptr() as usize;
    // With descriptors that are none, calls that are made fail in another way.
    let bad = usize::MAX;
    let disk = [
        (libc::SYS_pwrite64, [bad, byte, 1, 0, 0]),
        (libc::SYS_fallocate, [bad, 0, 0, 1, 0]),
        (libc::SYS_fdatasync, [bad, 0, 0, 0, 0]),
    ];
    let sockets = [
        (libc::SYS_sendmsg, [bad, 0, 0, 0, 0]),
        (libc::SYS_recvmsg, [bad, 0, 0, 0, 0]),
        (libc::SYS_sendto, [bad, byte, 1, 0, 0]),
        (libc::SYS_recvfrom, [bad, byte, 0, 0, 0]),
        (libc::SYS_connect, [bad, 0, 0, 0, 0]),
        (libc::SYS_accept4, [bad, 0, 0, 0, 0]),
    ];
    let unix = [libc::AF_UNIX as usize, usize::MAX, 0, 0, 0];
    for work in ALL {
        restricted(work, || {
            let made = |(call, arguments): &(c_long, _)| raw(*call, *arguments) != Errno::NOSYS;
            assert_eq!(disk.iter().filter(|call| made(call)).count() == 3, work == Work::Disk);
            let count = sockets.iter().filter(|call| made(call)).count();
            let wanted = match work {
                Work::Disk | Work::Random => 0,
                Work::Streams => 2,
                Work::Frames => 3,
                Work::Connections => 4,
            };
            assert_eq!(count, wanted, "{work:?}");
            assert_eq!(made(&(libc::SYS_socket, unix)), work == Work::Connections, "{work:?}");
            // Not even through what is open already.
            assert_eq!(raw(libc::SYS_ftruncate, [file, 0, 0, 0, 0]), Errno::NOSYS);
            assert_eq!(raw(libc::SYS_fchmod, [file, 0, 0, 0, 0]), Errno::NOSYS);
        });
    }
}

/// Tells a process of this test which work's thread is to panic.
const PANICS: &str = "VMLAB_TEST_PANICS";

#[test]
fn what_a_panic_says_is_seen_and_the_thread_ends() {
    if let Some(number) = std::env::var_os(PANICS) {
        let work = ALL[number.to_str().unwrap().parse::<usize>().unwrap()];
        let thread = thread::spawn(move || {
            enter(work).unwrap();
            let more = vec![0u8; 64 << 20];
            thread::yield_now();
            panic!("on purpose, with {} bytes", more.len());
        });
        assert!(thread.join().is_err());
        // The process goes on with all its rights.
        let passwords = std::fs::read("/etc/passwd").unwrap();
        io::stderr().write_all(format!("read {}\n", !passwords.is_empty()).as_bytes()).unwrap();
        return;
    }
    for (number, work) in ALL.into_iter().enumerate() {
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.env(PANICS, number.to_string()).env("RUST_BACKTRACE", "1").args([
            "--exact",
            "--nocapture",
            "sandbox::tests::what_a_panic_says_is_seen_and_the_thread_ends",
        ]);
        let output = again.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{work:?}: {said}");
        assert!(said.contains("on purpose, with 67108864 bytes"), "{work:?}: {said}");
        assert!(said.contains("read true"), "{work:?}: {said}");
    }
}
