//! A proof that QEMU runs guests.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::super::HypervisorError;
use super::{Qemu, reset_kernel};

/// The port of the device that ends QEMU, and with which value the guest does.
const EXIT_PORT: u8 = 0xf4;
const VALUE: u8 = 0x2a;

/// What QEMU ends with then.
const STATUS: i32 = ((VALUE as i32) << 1) | 1;

/// Where the guest's code is: behind a PC's first megabyte.
const ENTRY: u32 = 0x10_0000;

/// 32-bit code: adds two numbers, and ends QEMU with the sum.
const CODE: [u8; 8] = [
    0xb0,
    VALUE - 2, // mov al, VALUE - 2
    0x04,
    0x02, //      add al, 2
    0xe6,
    EXIT_PORT, // out EXIT_PORT, al
    0xeb,
    0xfe, //      1: jmp 1b
];

/// How long it may take. It takes 0.1 s.
const PATIENCE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

impl Qemu {
    /// Has QEMU run a guest of a few instructions under TCG, and returns how long that took.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn prove(&self) -> Result<Duration, HypervisorError> {
        let program = self.program()?;
        let run = |source| HypervisorError::Run { program: program.display().to_string(), source };
        let kernel = reset_kernel::file(ENTRY, &CODE).map_err(run)?;
        let exit = format!("isa-debug-exit,iobase={EXIT_PORT:#x},iosize=4");
        let mut command = Command::new(&program);
        command
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-machine", "microvm", "-accel", "tcg", "-m", "16M", "-device", &exit])
            .args(["-kernel", &format!("/proc/{}/fd/{}", std::process::id(), kernel.as_raw_fd())])
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let since = Instant::now();
        let mut child = command.spawn().map_err(run)?;
        wait(&mut child).map_err(run)?;
        let output = child.wait_with_output().map_err(run)?;
        match output.status.code() {
            Some(STATUS) => Ok(since.elapsed()),
            _ => {
                let said = String::from_utf8_lossy(&output.stderr);
                let said = format!("a tiny guest did not run ({}): {}", output.status, said.trim());
                Err(HypervisorError::Refused { said })
            }
        }
    }
}

/// Waits until it ends, and ends it if that takes too long.
fn wait(child: &mut Child) -> io::Result<()> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&PATIENCE));
    if !matches!(ended, Ok(1..)) {
        child.kill()?;
    }
    Ok(())
}
