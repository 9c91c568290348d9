//! This process's standard streams, connected to those of a command in the guest.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, Stat, fstat, major, minor};
use vmlab::guest::ChildStdin;

use crate::terminal::EscapeKeys;

/// How much is read from stdin at once.
const READ_SIZE: usize = 64 * 1024;

/// What stdin, stdout and stderr of this process are, as far as it matters to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Streams {
    pub(crate) stdin_null: bool,
    pub(crate) stdout_null: bool,
    pub(crate) stderr_null: bool,
    /// Stdout and stderr are one and the same, so that the order between them can be seen.
    pub(crate) merged: bool,
}

impl Streams {
    pub(crate) fn of_this_process() -> Self {
        let stat = |fd: BorrowedFd<'_>| fstat(fd).ok();
        let (stdout, stderr) = (stat(io::stdout().as_fd()), stat(io::stderr().as_fd()));
        let stdout_null = stdout.as_ref().is_none_or(is_null);
        let stderr_null = stderr.as_ref().is_none_or(is_null);
        let same =
            |a: &Stat, b: &Stat| (a.st_dev, a.st_ino, a.st_rdev) == (b.st_dev, b.st_ino, b.st_rdev);
        let merged = stdout.zip(stderr).is_some_and(|(a, b)| same(&a, &b)) && !stdout_null;
        Self {
            stdin_null: stat(io::stdin().as_fd()).as_ref().is_none_or(is_null),
            stdout_null,
            stderr_null,
            merged,
        }
    }
}

/// Whether a file is `/dev/null`, which the guest has too. A stream that was closed is one as well:
/// the runtime opens it so.
fn is_null(stat: &Stat) -> bool {
    const NULL: (u32, u32) = (1, 3);
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (major(stat.st_rdev), minor(stat.st_rdev)) == NULL
}

/// A descriptor without a buffer, so that partial lines go on at once.
pub(crate) fn unbuffered(fd: impl AsFd) -> Result<File> {
    let fd: OwnedFd = fd.as_fd().try_clone_to_owned().context("a stream cannot be used")?;
    Ok(File::from(fd))
}

/// What ends the copying of stdin.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum InputEnd {
    /// The input ended, or the command wants no more.
    Done,
    /// The user pressed the keys that end the VM.
    Escape,
}

/// Copies stdin to a command until it ends, the command wants no more, or `stop` becomes readable.
///
/// Nothing is taken from stdin that the command has no room for.
pub(crate) fn copy_input(
    mut to: ChildStdin,
    stop: BorrowedFd<'_>,
    mut escape: Option<EscapeKeys>,
) -> InputEnd {
    let stdin = io::stdin();
    let Ok(mut from) = unbuffered(&stdin) else { return InputEnd::Done };
    let mut buffer = vec![0; READ_SIZE];
    while to.wait_wanted() {
        let mut fds =
            [PollFd::new(&from, PollFlags::IN), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return InputEnd::Done,
            Ok(_) | Err(rustix::io::Errno::INTR) if fds[0].revents().is_empty() => continue,
            Ok(_) => {}
            Err(_) => return InputEnd::Done,
        }
        let count = match from.read(&mut buffer) {
            Ok(0) => return InputEnd::Done,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // A non-blocking stdin that somebody else has emptied.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => return InputEnd::Done,
        };
        let bytes = &buffer[..count];
        if escape.as_mut().is_some_and(|keys| keys.pressed(bytes, Instant::now())) {
            return InputEnd::Escape;
        }
        if to.write_all(bytes).is_err() {
            return InputEnd::Done;
        }
    }
    InputEnd::Done
}

/// A non-blocking stdout would lose what does not fit at once; the guest's output waits instead.
#[derive(Debug)]
pub(crate) struct Patient(pub(crate) File);

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(&self.0, PollFlags::OUT)];
                    poll(&mut fds, None)?;
                }
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether a person watches stderr.
pub(crate) fn stderr_is_watched() -> bool {
    io::stderr().is_terminal()
}
