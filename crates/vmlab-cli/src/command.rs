//! One command in a guest, with the standard streams of this process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, eventfd};
use vmlab::guest::{ChildStdin, TerminalSize};
use vmlab::hypervisor::{ExitReason, VmHandle};
use vmlab::{Command, ExitStatus, Stdio, Vm};

use crate::request::Request;
use crate::signals::{SignalThread, terminal_size};
use crate::stdio::{InputEnd, Patient, Streams, copy_input, unbuffered};
use crate::terminal::{EscapeKeys, RawMode};

/// The size of a terminal that does not tell its own.
const USUAL_SIZE: TerminalSize = TerminalSize { rows: 24, columns: 80 };

/// How long the output of a VM that is gone may take to be written. It is here already; only a reader
/// that has stalled takes longer, and for that one nobody should wait.
const FLUSH_TIME: Duration = Duration::from_secs(2);

/// What ends the wait for a command's output to be written.
enum Event {
    /// One of its streams was written to its end, or could not be.
    Copied(&'static str, io::Result<()>),
    /// The VM is gone.
    Ended,
}

/// Runs the request's command and carries its streams.
///
/// The threads that read and write this process's streams may be stuck in a reader or writer that has
/// stalled; they are left behind then, and end with the process.
pub(crate) fn execute(
    request: &Request,
    vm: &Vm,
    signals: &SignalThread,
    use_input: bool,
) -> Result<ExitStatus> {
    let mut command = vm.command(&request.command[0]).args(&request.command[1..]);
    command = match request.terminal {
        true => command.terminal(terminal_size().unwrap_or(USUAL_SIZE)),
        false => with_streams(command, Streams::of_this_process(), use_input),
    };
    let mut child = command.spawn()?;
    signals.command(child.control(), request.terminal);
    let raw = if request.terminal { Some(RawMode::enter()?) } else { None };

    let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).context("an event cannot be made")?);
    if let Some(stdin) = child.stdin.take().filter(|_| use_input || request.terminal) {
        let escape = request.terminal.then(EscapeKeys::default);
        carry_input(stdin, Arc::clone(&stop), escape, vm.handle());
    }
    let (sender, events) = channel();
    let mut open = 0;
    if let Some(mut stdout) = child.stdout.take() {
        let to = unbuffered(io::stdout())?;
        // A reader that is gone is told to the command by dropping its stream.
        carry(&sender, "output", move || stdout.copy_to(&mut Patient(to)));
        open += 1;
    }
    if let Some(mut stderr) = child.stderr.take() {
        let to = unbuffered(io::stderr())?;
        carry(&sender, "error", move || stderr.copy_to(&mut Patient(to)));
        open += 1;
    }
    let handle = vm.handle();
    std::thread::spawn(move || {
        handle.wait(None);
        // Nobody listens when all has been written.
        let _ = sender.send(Event::Ended);
    });

    let status = child.wait();
    // Adding one to a counter that is far from full does not fail.
    let _ = rustix::io::write(&*stop, &1u64.to_ne_bytes());
    let mut deadline: Option<Instant> = None;
    let mut unwritten = None;
    while open > 0 {
        let event = match deadline {
            None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(deadline) => {
                events.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            }
        };
        match event {
            Ok(Event::Copied(stream, result)) => {
                open -= 1;
                if let Err(error) = result
                    && is_ours(&error)
                {
                    unwritten = Some((stream, error));
                }
            }
            Ok(Event::Ended) => deadline = Some(Instant::now() + FLUSH_TIME),
            Err(_) => break,
        }
    }
    drop(raw);
    let status = status?;
    match unwritten {
        Some((stream, error)) => {
            Err(error).with_context(|| format!("the command's standard {stream} cannot be written"))
        }
        None => Ok(status),
    }
}

/// Whether a failure to copy is of our side and news to the user: a pipe whose reader has left is
/// none, and a VM that has ended says so itself.
fn is_ours(error: &io::Error) -> bool {
    !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

fn carry(
    events: &Sender<Event>,
    name: &'static str,
    copy: impl FnOnce() -> io::Result<()> + Send + 'static,
) {
    let events = events.clone();
    std::thread::spawn(move || {
        // Nobody listens any more when the VM was given up.
        let _ = events.send(Event::Copied(name, copy()));
    });
}

fn carry_input(
    stdin: ChildStdin,
    stop: Arc<OwnedFd>,
    escape: Option<EscapeKeys>,
    handle: Arc<dyn VmHandle>,
) {
    std::thread::spawn(move || {
        if copy_input(stdin, stop.as_fd(), escape) == InputEnd::Escape {
            handle.kill(ExitReason::Killed);
        }
    });
}

fn with_streams<'vm>(command: Command<'vm>, streams: Streams, use_input: bool) -> Command<'vm> {
    let stdio = |null: bool| if null { Stdio::Null } else { Stdio::Piped };
    let command = command
        .stdin(stdio(streams.stdin_null || !use_input))
        .stdout(stdio(streams.stdout_null))
        .stderr(stdio(streams.stderr_null));
    if streams.merged { command.merge_stderr() } else { command }
}
