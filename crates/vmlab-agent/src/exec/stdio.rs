//! A command's standard streams: how they are made, and the agent's ends of them.

use std::os::fd::OwnedFd;

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::pty::OpenptFlags;
use rustix::termios::{SpecialCodeIndex, Winsize, tcgetattr, tcsetwinsize};
use vmlab_wire::message::{Exec, ExecStdio, StderrTo, Stdio, TerminalSize};
use vmlab_wire::{FlowError, FrameKind, ReceiveWindow, SendWindow, StreamId};

use super::spawn::ChildStdio;
use crate::channel::Outbox;

/// Size of an output pipe: a flood then needs one read per frame, not sixteen.
const OUTPUT_PIPE: usize = 256 * 1024;

/// End of file on a terminal that has not been told otherwise: Ctrl-D.
const DEFAULT_EOF: u8 = 4;

/// The size of a terminal whose size the host does not know: that of a VT100.
const USUAL_SIZE: TerminalSize = TerminalSize { rows: 24, columns: 80 };

/// The agent's end of an output stream.
pub(crate) struct Output {
    pub(crate) stream: StreamId,
    fd: OwnedFd,
    window: SendWindow,
    /// Whether a read may bring something.
    pub(crate) ready: bool,
    terminal: bool,
    /// A terminal that was found to be closed on the other side.
    hung_up: bool,
    /// After the command's end: bytes that it wrote before and that were not sent yet.
    owed: Option<u64>,
}

/// What became of an output stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pumped {
    /// Bytes were taken from it.
    Bytes,
    /// Nothing can be taken now.
    Nothing,
    /// It has ended.
    Eof,
}

impl Output {
    fn new(stream: StreamId, fd: OwnedFd, terminal: bool) -> Self {
        let window = SendWindow::default();
        Self { stream, fd, window, ready: true, terminal, hung_up: false, owed: None }
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub(crate) fn granted(&mut self, bytes: u32) -> Result<(), FlowError> {
        self.window.granted(bytes)
    }

    /// Whether reading now may bring something that may be sent.
    pub(crate) fn can_pump(&self) -> bool {
        self.ready && self.window.available() > 0
    }

    /// Moves what is there into a frame.
    pub(crate) fn pump(&mut self, outbox: &mut Outbox) -> Pumped {
        match outbox.data_from(self.stream, &self.fd, self.window.available()) {
            Ok(0) => Pumped::Eof,
            Ok(count) => {
                self.window.sent(count);
                if let Some(owed) = &mut self.owed {
                    *owed = owed.saturating_sub(count as u64);
                }
                Pumped::Bytes
            }
            Err(Errno::INTR) => Pumped::Bytes,
            Err(Errno::AGAIN) => {
                self.ready = false;
                if self.owed.is_some() && !self.terminal {
                    self.owed = Some(0);
                }
                Pumped::Nothing
            }
            // A terminal whose other side is closed reads as EIO. The kernel looks for what was written
            // before it looks for that: when both come in between, only a second read finds the first.
            Err(Errno::IO) if self.terminal && !self.hung_up => {
                self.hung_up = true;
                Pumped::Bytes
            }
            Err(_) => Pumped::Eof,
        }
    }

    /// The command has ended: what it has written by now is still to be sent.
    pub(crate) fn command_ended(&mut self) {
        // How much a terminal holds cannot be asked, and a read that finds nothing proves nothing:
        // what was written comes through a work queue of the kernel. But the kernel hangs it up when
        // its session leader ends, and all has come when that is read.
        self.owed = Some(match rustix::io::ioctl_fionread(&self.fd) {
            Ok(bytes) if !self.terminal => bytes,
            _ => u64::MAX,
        });
        self.ready = true;
    }

    /// Whether all that the command wrote before its end has been sent.
    pub(crate) fn is_drained(&self) -> bool {
        self.owed == Some(0)
    }
}

/// The agent's end of a command's stdin.
pub(crate) struct Input {
    pub(crate) stream: StreamId,
    fd: OwnedFd,
    window: ReceiveWindow,
    /// At most a window's worth.
    held: Vec<u8>,
    terminal: bool,
    eof: bool,
    pub(crate) writable: bool,
}

/// Whether an input stream goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fed {
    /// More may come.
    Open,
    /// Everything was written and the end reached.
    Done,
    /// Nobody reads it any more.
    Closed,
}

impl Input {
    fn new(stream: StreamId, fd: OwnedFd, terminal: bool) -> Self {
        let window = ReceiveWindow::default();
        Self { stream, fd, window, held: Vec::new(), terminal, eof: false, writable: true }
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Takes in data from the host.
    pub(crate) fn received(&mut self, data: &[u8]) -> Result<(), FlowError> {
        self.window.received(data.len())?;
        self.held.extend_from_slice(data);
        Ok(())
    }

    /// The host will send no more.
    pub(crate) fn ended(&mut self) {
        if self.eof {
            return;
        }
        self.eof = true;
        if self.terminal {
            let eof = tcgetattr(&self.fd)
                .map_or(DEFAULT_EOF, |t| t.special_codes[SpecialCodeIndex::VEOF]);
            self.held.push(eof);
        }
    }

    /// Writes what the command's end takes, and grants the host as much.
    pub(crate) fn feed(&mut self, outbox: &mut Outbox) -> Fed {
        let mut done = 0;
        let mut closed = false;
        while self.writable && done < self.held.len() {
            match rustix::io::write(&self.fd, &self.held[done..]) {
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.writable = false,
                Err(_) => {
                    closed = true;
                    break;
                }
            }
        }
        if closed {
            return Fed::Closed;
        }
        self.held.drain(..done);
        if let Some(grant) = self.window.consumed(done) {
            outbox.credit(self.stream, grant);
        }
        match self.eof && self.held.is_empty() {
            true => Fed::Done,
            false => Fed::Open,
        }
    }

    /// Tells the host that nobody reads this stream.
    pub(crate) fn stop(&self, outbox: &mut Outbox) {
        if !self.eof {
            outbox.empty(self.stream, FrameKind::Stop);
        }
    }
}

/// The agent's ends of a command's standard streams.
pub(crate) struct AgentStdio {
    pub(crate) input: Option<Input>,
    pub(crate) outputs: Vec<Output>,
    pub(crate) terminal: Option<OwnedFd>,
}

/// Makes both ends of a command's standard streams.
pub(crate) fn open(exec: &Exec) -> Result<(ChildStdio, AgentStdio), Errno> {
    match &exec.stdio {
        ExecStdio::Terminal(size) => open_terminal(exec, *size),
        &ExecStdio::Pipes { stdin, stdout, stderr } => open_pipes(exec, stdin, stdout, stderr),
    }
}

fn null() -> Result<OwnedFd, Errno> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

/// Gives a pipe or terminal to the command's user, who may then open `/dev/stdout`.
fn give(fd: &OwnedFd, exec: &Exec) -> Result<(), Errno> {
    let user = &exec.user;
    if rustix::process::getuid().as_raw() == user.uid {
        return Ok(());
    }
    rustix::fs::fchown(fd, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))
}

fn non_blocking(fd: &OwnedFd) -> Result<(), Errno> {
    rustix::io::ioctl_fionbio(fd, true)
}

fn output_pipe(exec: &Exec) -> Result<(OwnedFd, OwnedFd), Errno> {
    let (ours, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    non_blocking(&ours)?;
    give(&theirs, exec)?;
    // Users may have used up their share of pipe buffers; a small pipe is only slower.
    let _ = rustix::pipe::fcntl_setpipe_size(&ours, OUTPUT_PIPE);
    Ok((ours, theirs))
}

fn open_pipes(
    exec: &Exec,
    stdin: bool,
    stdout: bool,
    stderr: StderrTo,
) -> Result<(ChildStdio, AgentStdio), Errno> {
    let mut outputs = Vec::new();
    let (input, child_in) = match stdin {
        false => (None, null()?),
        true => {
            let (theirs, ours) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            non_blocking(&ours)?;
            give(&theirs, exec)?;
            (Some(Input::new(exec.process.stream(Stdio::Stdin), ours, false)), theirs)
        }
    };
    let mut output = |stdio| -> Result<OwnedFd, Errno> {
        let (ours, theirs) = output_pipe(exec)?;
        outputs.push(Output::new(exec.process.stream(stdio), ours, false));
        Ok(theirs)
    };
    let child_out = if stdout { output(Stdio::Stdout)? } else { null()? };
    let child_err = match stderr {
        StderrTo::Null => null()?,
        StderrTo::Stream => output(Stdio::Stderr)?,
        StderrTo::Stdout => rustix::io::fcntl_dupfd_cloexec(&child_out, 3)?,
    };
    let child =
        ChildStdio { stdin: child_in, stdout: child_out, stderr: child_err, terminal: false };
    Ok((child, AgentStdio { input, outputs, terminal: None }))
}

fn open_terminal(exec: &Exec, size: TerminalSize) -> Result<(ChildStdio, AgentStdio), Errno> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    give(&slave, exec)?;
    resize(&master, size)?;
    non_blocking(&master)?;
    let ours = || rustix::io::fcntl_dupfd_cloexec(&master, 3);
    let theirs = || rustix::io::fcntl_dupfd_cloexec(&slave, 3);
    let input = Input::new(exec.process.stream(Stdio::Stdin), ours()?, true);
    let output = Output::new(exec.process.stream(Stdio::Stdout), ours()?, true);
    let child = ChildStdio { stdin: theirs()?, stdout: theirs()?, stderr: slave, terminal: true };
    Ok((child, AgentStdio { input: Some(input), outputs: vec![output], terminal: Some(master) }))
}

/// Sets a terminal's size. Programs that draw cannot do with a size of zero.
pub(crate) fn resize(terminal: &OwnedFd, size: TerminalSize) -> Result<(), Errno> {
    let known = |size, usual| if size == 0 { usual } else { size };
    let ws_row = known(size.rows, USUAL_SIZE.rows);
    let ws_col = known(size.columns, USUAL_SIZE.columns);
    tcsetwinsize(terminal, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 })
}
