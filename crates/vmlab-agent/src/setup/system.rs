//! Clock, random numbers, host name.

use std::ffi::c_int;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::ioctl::{Opcode, opcode};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use super::{Step, bus};

/// Sets the wall clock.
pub(super) fn clock(clock_ns: u64, warn: &mut dyn FnMut(String)) {
    let time = Timespec {
        tv_sec: (clock_ns / 1_000_000_000) as _,
        tv_nsec: (clock_ns % 1_000_000_000) as _,
    };
    if let Err(e) = clock_settime(ClockId::Realtime, time) {
        warn(format!("the clock could not be set: {e}"));
    }
}

/// The wall clock, in nanoseconds since 1970.
pub(super) fn wall_clock_ns() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Makes the kernel look for devices that have come since it last did, and waits for their drivers.
pub(super) fn find_devices() -> Step {
    let _quiet = QuietConsole::new();
    bus::find(Path::new(bus::SYSFS))
}

/// Which of the kernel's messages go to the console, and three further levels.
const PRINTK: &str = "/proc/sys/kernel/printk";

/// Keeps all but warnings and worse from the console until it is dropped; the kernel's log has them. Some
/// twenty lines about new devices take longer to write than the devices take to be found.
struct QuietConsole(Option<String>);

impl QuietConsole {
    /// Messages above this level are kept back: `KERN_WARNING` and worse are below it.
    const LEVEL: u32 = 5;

    fn new() -> Self {
        let before = std::fs::read_to_string(PRINTK).ok();
        let level = |line: &String| line.split_whitespace().next()?.parse::<u32>().ok();
        let louder = before.filter(|before| level(before).is_some_and(|level| level > Self::LEVEL));
        if louder.is_some() {
            let _ = std::fs::write(PRINTK, Self::LEVEL.to_string());
        }
        Self(louder)
    }
}

impl Drop for QuietConsole {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = std::fs::write(PRINTK, before);
        }
    }
}

/// The most bytes of entropy that are taken at once; the kernel's pool holds 32.
const ENTROPY_MAX: usize = 512;

/// `_IOW('R', 0x03, int[2])` of linux/random.h.
const RNDADDENTROPY: Opcode = opcode::write::<[c_int; 2]>(b'R', 3);

/// `_IO('R', 0x07)` of linux/random.h.
const RNDRESEEDCRNG: Opcode = opcode::none(b'R', 7);

/// The argument of RNDADDENTROPY, `struct rand_pool_info` in linux/random.h.
#[repr(C)]
struct PoolInfo {
    entropy_count: c_int,
    buf_size: c_int,
    buf: [u8; ENTROPY_MAX],
}

/// Seeds the kernel's random number generator, so that nobody waits for it and no two guests of one
/// snapshot draw the same numbers: what was there before the seed is of no more use.
pub(super) fn entropy(seed: &[u8], warn: &mut dyn FnMut(String)) {
    let seed = &seed[..seed.len().min(ENTROPY_MAX)];
    let mut info = PoolInfo {
        entropy_count: seed.len() as c_int * 8,
        buf_size: seed.len() as c_int,
        buf: [0; ENTROPY_MAX],
    };
    info.buf[..seed.len()].copy_from_slice(seed);
    let added = File::options().write(true).open("/dev/random").and_then(|random| {
        // SAFETY: the kernel reads the two counts and `buf_size` bytes behind them, all in `info`.
        match unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, &info) } {
            0 => reseed(&random),
            _ => Err(std::io::Error::last_os_error()),
        }
    });
    if let Err(e) = added {
        warn(format!("the random number generator could not be seeded: {e}"));
    }
}

/// Makes the generator take its seed at once, on all CPUs.
fn reseed(random: &File) -> std::io::Result<()> {
    // SAFETY: the request has no argument.
    match unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Sets the host name.
pub(super) fn hostname(name: &str, warn: &mut dyn FnMut(String)) {
    if let Err(e) = rustix::system::sethostname(name.as_bytes()) {
        warn(format!("the host name could not be set to {name:?}: {e}"));
    }
}
