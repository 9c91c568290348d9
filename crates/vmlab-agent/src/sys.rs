//! System calls that rustix lacks, and small helpers around those that it has.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since the kernel's clock started.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A signal set with these signals in it.
fn signal_set(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the whole set that it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: it was initialised by the line above.
    let mut set = unsafe { set.assume_init() };
    for &signal in signals {
        // SAFETY: `set` is an initialised set, and an unknown number is refused with an error.
        unsafe { libc::sigaddset(&mut set, signal) };
    }
    set
}

/// Blocks SIGCHLD and makes it readable from a descriptor.
pub(crate) fn child_signals() -> io::Result<OwnedFd> {
    let set = signal_set(&[libc::SIGCHLD]);
    // SAFETY: `set` is initialised and a null old set is allowed.
    if unsafe { libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `set` is initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above made it, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Forgets the signals that were read from [`child_signals`].
pub(crate) fn drain_signals(fd: &OwnedFd) {
    let mut buffer = [0u8; 1024];
    while matches!(rustix::io::read(fd, &mut buffer), Ok(n) if n > 0) {}
}

/// Has the kernel swap to a device: swapon(2).
pub(crate) fn swap_on(device: &str) -> rustix::io::Result<()> {
    let path = std::ffi::CString::new(device).map_err(|_| rustix::io::Errno::INVAL)?;
    // SAFETY: `path` is a string with a NUL at its end, which lives for the call.
    match unsafe { libc::swapon(path.as_ptr(), 0) } {
        0 => Ok(()),
        _ => Err(rustix::io::Errno::from_io_error(&io::Error::last_os_error())
            .unwrap_or(rustix::io::Errno::IO)),
    }
}

/// Has the kernel no longer swap to a device: swapoff(2).
pub(crate) fn swap_off(device: &str) -> io::Result<()> {
    let path = std::ffi::CString::new(device)?;
    // SAFETY: `path` is a string with a NUL at its end, which lives for the call.
    match unsafe { libc::swapoff(path.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A child that has ended.
pub(crate) struct Reaped {
    /// Its process id.
    pub(crate) pid: i32,
    /// The status as wait(2) has it.
    pub(crate) status: i32,
    /// CPU time in microseconds: user and system.
    pub(crate) cpu_us: (u64, u64),
}

/// What [`reap`] found.
pub(crate) enum Reap {
    /// A child that has ended.
    Child(Reaped),
    /// Children run, none has ended.
    Running,
    /// There are no children at all.
    None,
}

/// Reaps one child, whichever it is, without waiting.
pub(crate) fn reap() -> Reap {
    let mut status = 0;
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: both places are valid for writing.
    let pid = unsafe { libc::wait4(-1, &mut status, libc::WNOHANG, usage.as_mut_ptr()) };
    match pid {
        0 => Reap::Running,
        1.. => {
            // SAFETY: a zeroed rusage is valid, and the kernel has filled it in.
            let usage = unsafe { usage.assume_init() };
            let us = |t: libc::timeval| t.tv_sec as u64 * 1_000_000 + t.tv_usec as u64;
            Reap::Child(Reaped { pid, status, cpu_us: (us(usage.ru_utime), us(usage.ru_stime)) })
        }
        _ => Reap::None,
    }
}

/// Sends a signal as kill(2) does, with its meaning of negative ids.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill touches no memory of ours.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sees to it that descriptors 0 to 2 are open, so that no later one takes their place: they are
/// what a command's own standard streams are put on.
pub(crate) fn reserve_stdio() -> io::Result<()> {
    loop {
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
        if null.as_raw_fd() > 2 {
            return Ok(());
        }
        std::mem::forget(null);
    }
}

/// Loads a module, which is in memory: init_module(2).
pub(crate) fn init_module(module: &[u8], parameters: &std::ffi::CStr) -> io::Result<()> {
    let (start, length) = (module.as_ptr(), module.len());
    // SAFETY: the kernel reads `length` bytes from `start` and the string, both of which live for the call.
    match unsafe { libc::syscall(libc::SYS_init_module, start, length, parameters.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Unloads a module that is not in use: delete_module(2).
pub(crate) fn delete_module(name: &std::ffi::CStr) -> io::Result<()> {
    // SAFETY: the kernel reads the string, which lives for the call.
    match unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
