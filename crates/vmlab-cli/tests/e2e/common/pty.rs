//! A terminal that a test holds the other side of.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Signal, ioctl_tiocsctty, setsid};
use rustix::pty::OpenptFlags;
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

use super::{Capture, PATIENCE, Process};

/// A session of its own whose controlling terminal is a pseudo terminal, with vmlab in its
/// foreground.
#[derive(Debug)]
pub(crate) struct Terminal {
    master: File,
    /// Kept open, so that settings can be read after the session's end.
    slave: OwnedFd,
    child: Child,
    pub(crate) process: Process,
    pub(crate) screen: Capture,
    before: Vec<u8>,
    deadline: Instant,
}

impl Terminal {
    /// Runs a command in a new terminal of this size.
    pub(crate) fn start(command: Command, rows: u16, columns: u16) -> Self {
        Self::start_patient(command, rows, columns, PATIENCE)
    }

    /// The same for one that may take longer than usual.
    pub(crate) fn start_patient(
        mut command: Command,
        rows: u16,
        columns: u16,
        patience: Duration,
    ) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
        resize(&master, rows, columns);
        let before = settings(&slave);
        let stdio = || slave.try_clone().unwrap();
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        let become_session = || {
            setsid()?;
            ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        };
        // SAFETY: between fork and exec, the closure only makes system calls.
        unsafe { command.pre_exec(become_session) };
        let child = command.spawn().unwrap();
        let process = Process::of_child(&child);
        drop(command);
        let master = File::from(master);
        let screen = Capture::of(master.try_clone().unwrap());
        let deadline = Instant::now() + patience;
        Self { master, slave, child, process, screen, before, deadline }
    }

    /// Waits until the terminal shows this.
    #[track_caller]
    pub(crate) fn wait(&self, wanted: &str) {
        let found = self.screen.wait_for(wanted.as_bytes(), self.deadline);
        assert!(found, "no {wanted:?} in the terminal: {:?}", self.text());
    }

    /// Types.
    pub(crate) fn type_in(&mut self, bytes: &str) {
        self.master.write_all(bytes.as_bytes()).unwrap();
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        resize(&self.master, rows, columns);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Everything that it has shown.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.screen.bytes()).into_owned()
    }

    /// Whether typed characters go through unchanged and unechoed.
    pub(crate) fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.slave).unwrap().local_modes;
        !modes.intersects(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
    }

    /// Whether its settings are those that it began with.
    pub(crate) fn is_restored(&self) -> bool {
        settings(&self.slave) == self.before
    }

    /// Waits for the end of the command, and for all that it wrote.
    #[track_caller]
    pub(crate) fn finish(&mut self) -> ExitStatus {
        let gone = self.process.wait_gone(self.deadline);
        assert!(gone, "it does not end: {:?}", self.text());
        // What comes last on the screen shows that everything before it has been read.
        rustix::io::write(&self.slave, END.as_bytes()).unwrap();
        self.wait(END);
        self.child.wait().unwrap()
    }

    /// How long a person may have to wait for their terminal.
    pub(crate) const PROMPTLY: Duration = Duration::from_secs(3);
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Does nothing once it has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a test itself writes to a terminal after the command's end.
const END: &str = "<the command has ended>";

fn resize(terminal: impl AsFd, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).unwrap();
}

/// A terminal's settings, in a form that can be compared.
fn settings(terminal: impl AsFd) -> Vec<u8> {
    let settings: Termios = tcgetattr(terminal).unwrap();
    format!("{settings:?}").into_bytes()
}
