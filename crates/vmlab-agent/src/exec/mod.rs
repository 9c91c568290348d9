//! Commands: starting, their streams, their end.

mod spawn;
mod stdio;
mod tmpdir;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll;
use vmlab_wire::message::{Exec, ExitStatus, Exited, StartFailure, StartStage, TerminalSize};
use vmlab_wire::{FlowError, FrameKind, GuestMessage, ProcessId, StreamId};

use self::stdio::{AgentStdio, Fed, Input, Output, Pumped};
pub(crate) use self::tmpdir::OwnFilesystems;
use crate::channel::Outbox;
use crate::sys::Reaped;

/// A command that runs, or whose streams are still open.
struct Command {
    pid: i32,
    stdio: AgentStdio,
    /// Kills by the kernel for want of memory, before it started.
    oom_kills: u64,
    end: End,
}

/// How far a command's end has come.
enum End {
    Running,
    /// It has ended, but what it wrote has not all been sent.
    Draining(Exited),
    /// The host knows.
    Told,
}

/// All commands of a session.
pub(crate) struct Commands {
    epoll: OwnedFd,
    commands: BTreeMap<ProcessId, Command>,
    /// The stream that was served last, so that the others have their turn.
    last_served: StreamId,
    /// Where directories for temporary files may be made.
    own_filesystems: OwnFilesystems,
    /// This program, which no root has that the guest will be given later.
    agent: rustix::io::Result<OwnedFd>,
}

/// What a command executes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// What its first argument names.
    Named,
    /// The agent itself.
    Agent,
}

/// Marks the epoll events of streams; the stream's id is in the low half.
const STREAM_EVENT: u64 = 1 << 32;

fn process_of(stream: StreamId) -> ProcessId {
    ProcessId(stream.0 / 4)
}

impl Commands {
    /// No commands. Their descriptors will be watched by `epoll`.
    pub(crate) fn new(epoll: OwnedFd) -> Self {
        Self {
            epoll,
            commands: BTreeMap::new(),
            last_served: StreamId::CONTROL,
            own_filesystems: OwnFilesystems::default(),
            agent: spawn::this_program(),
        }
    }

    /// Says which filesystems are the guest's own. Until then, none is.
    pub(crate) fn set_own_filesystems(&mut self, own: OwnFilesystems) {
        self.own_filesystems = own;
    }

    /// Starts a command and answers the host.
    pub(crate) fn start(&mut self, exec: &Exec, program: Program, outbox: &mut Outbox) {
        let process = exec.process;
        outbox.message(&match self.try_start(exec, program) {
            Ok(()) => GuestMessage::Started(process),
            Err(failure) => GuestMessage::StartFailed(process, failure),
        });
    }

    fn try_start(&mut self, exec: &Exec, program: Program) -> Result<(), StartFailure> {
        let stdio_failure = |e: rustix::io::Errno| StartFailure {
            stage: StartStage::Stdio,
            errno: e.raw_os_error(),
        };
        if self.commands.contains_key(&exec.process) {
            return Err(StartFailure { stage: StartStage::Stdio, errno: libc::EEXIST });
        }
        let (child, ours) = stdio::open(exec).map_err(stdio_failure)?;
        for output in &ours.outputs {
            self.watch(output.stream, output.fd(), epoll::EventFlags::IN).map_err(stdio_failure)?;
        }
        if let Some(input) = &ours.input {
            self.watch(input.stream, input.fd(), epoll::EventFlags::OUT).map_err(stdio_failure)?;
        }
        tmpdir::make(exec, &self.own_filesystems);
        let oom_kills = oom_kills();
        let agent = match (program, &self.agent) {
            (Program::Named, _) => None,
            (Program::Agent, Ok(agent)) => Some(agent),
            (Program::Agent, Err(e)) => {
                let errno = e.raw_os_error();
                return Err(StartFailure { stage: StartStage::Program, errno });
            }
        };
        let pid = spawn::spawn(exec, agent, child)?;
        self.commands
            .insert(exec.process, Command { pid, stdio: ours, oom_kills, end: End::Running });
        Ok(())
    }

    /// Watches a stream, edge-triggered: what is ready is remembered until a call finds it is not.
    fn watch(
        &self,
        stream: StreamId,
        fd: &OwnedFd,
        flags: epoll::EventFlags,
    ) -> rustix::io::Result<()> {
        let data = epoll::EventData::new_u64(STREAM_EVENT | u64::from(stream.0));
        epoll::add(&self.epoll, fd.as_fd(), data, flags | epoll::EventFlags::ET)
    }

    /// Takes in an event of the epoll instance. Returns false when it is none of a stream's.
    pub(crate) fn event(
        &mut self,
        data: u64,
        flags: epoll::EventFlags,
        outbox: &mut Outbox,
    ) -> bool {
        if data & STREAM_EVENT == 0 {
            return false;
        }
        let stream = StreamId(data as u32);
        if let Some(output) = self.output(stream) {
            output.ready = true;
        } else if let Some(input) = self.input(stream) {
            input.writable = true;
            let hung_up = flags.contains(epoll::EventFlags::ERR);
            self.feed(stream, hung_up, outbox);
        }
        true
    }

    fn output(&mut self, stream: StreamId) -> Option<&mut Output> {
        let command = self.commands.get_mut(&process_of(stream))?;
        command.stdio.outputs.iter_mut().find(|o| o.stream == stream)
    }

    fn input(&mut self, stream: StreamId) -> Option<&mut Input> {
        let command = self.commands.get_mut(&process_of(stream))?;
        command.stdio.input.as_mut().filter(|i| i.stream == stream)
    }

    fn feed(&mut self, stream: StreamId, hung_up: bool, outbox: &mut Outbox) {
        let Some(input) = self.input(stream) else { return };
        let fed = if hung_up { Fed::Closed } else { input.feed(outbox) };
        if fed == Fed::Closed {
            input.stop(outbox);
        }
        let process = process_of(stream);
        if fed != Fed::Open
            && let Some(command) = self.commands.get_mut(&process)
        {
            command.stdio.input = None;
            self.forget_if_over(process);
        }
    }

    /// Data for a stdin. Nothing is said about streams that are gone: the host may not know yet.
    pub(crate) fn data(
        &mut self,
        stream: StreamId,
        data: &[u8],
        outbox: &mut Outbox,
    ) -> Result<(), FlowError> {
        if let Some(input) = self.input(stream) {
            input.received(data)?;
            self.feed(stream, false, outbox);
        }
        Ok(())
    }

    /// The end of a stdin.
    pub(crate) fn eof(&mut self, stream: StreamId, outbox: &mut Outbox) {
        if let Some(input) = self.input(stream) {
            input.ended();
            self.feed(stream, false, outbox);
        }
    }

    /// The host grants credit.
    pub(crate) fn credit(&mut self, stream: StreamId, bytes: u32) -> Result<(), FlowError> {
        self.output(stream).map_or(Ok(()), |output| output.granted(bytes))
    }

    /// The host reads no more of a stream: the command gets SIGPIPE when it writes on.
    pub(crate) fn stop(&mut self, stream: StreamId, outbox: &mut Outbox) {
        self.end_output(stream, outbox);
    }

    /// Ends an output stream. One that has ended before, or never was, is not named again: the host
    /// forgets a stream with its first Eof.
    fn end_output(&mut self, stream: StreamId, outbox: &mut Outbox) {
        let process = process_of(stream);
        let Some(command) = self.commands.get_mut(&process) else { return };
        let outputs = &mut command.stdio.outputs;
        let Some(index) = outputs.iter().position(|o| o.stream == stream) else { return };
        outputs.remove(index);
        outbox.empty(stream, FrameKind::Eof);
        self.tell_if_drained(process, outbox);
    }

    /// Moves output while there is room for it. Returns whether anything moved.
    pub(crate) fn pump(&mut self, outbox: &mut Outbox) -> bool {
        if !outbox.has_room() {
            return false;
        }
        let outputs = self.commands.values().flat_map(|c| &c.stdio.outputs);
        let mut ready: Vec<_> = outputs.filter(|o| o.can_pump()).map(|o| o.stream).collect();
        let next = ready.iter().position(|&s| s > self.last_served).unwrap_or(0);
        ready.rotate_left(next);
        let mut moved = false;
        for stream in ready {
            if !outbox.has_room() {
                break;
            }
            let Some(output) = self.output(stream) else { continue };
            let pumped = output.pump(outbox);
            moved |= pumped != Pumped::Nothing;
            self.last_served = stream;
            match pumped {
                Pumped::Eof => self.end_output(stream, outbox),
                Pumped::Bytes | Pumped::Nothing => {
                    self.tell_if_drained(process_of(stream), outbox);
                }
            }
        }
        moved
    }

    /// Takes in the end of a child, which may be a command or an orphan.
    pub(crate) fn reaped(&mut self, child: &Reaped, outbox: &mut Outbox) {
        let found = self
            .commands
            .iter_mut()
            .find(|(_, c)| c.pid == child.pid && matches!(c.end, End::Running));
        let Some((&process, command)) = found else { return };
        let status = match libc::WIFSIGNALED(child.status) {
            true => ExitStatus::Signal(libc::WTERMSIG(child.status)),
            false => ExitStatus::Code(libc::WEXITSTATUS(child.status) as u8),
        };
        let oom_kills = oom_kills().saturating_sub(command.oom_kills);
        command.end = End::Draining(Exited { status, oom_kills, cpu_us: child.cpu_us });
        command.stdio.outputs.iter_mut().for_each(Output::command_ended);
        self.tell_if_drained(process, outbox);
    }

    fn tell_if_drained(&mut self, process: ProcessId, outbox: &mut Outbox) {
        let Some(command) = self.commands.get_mut(&process) else { return };
        if let End::Draining(exited) = command.end
            && command.stdio.outputs.iter().all(Output::is_drained)
        {
            outbox.message(&GuestMessage::Exited(process, exited));
            command.end = End::Told;
        }
        self.forget_if_over(process);
    }

    fn forget_if_over(&mut self, process: ProcessId) {
        let over = self
            .commands
            .get(&process)
            .is_some_and(|c| matches!(c.end, End::Told) && c.stdio.outputs.is_empty());
        if over {
            self.commands.remove(&process);
        }
    }

    /// Sends a signal to a command's process group, or to what is in its terminal's foreground.
    pub(crate) fn signal(&self, process: ProcessId, signal: i32) {
        let Some(command) = self.commands.get(&process) else { return };
        // Once it is reaped, its number may be another's.
        if !matches!(command.end, End::Running) {
            return;
        }
        let foreground = command
            .stdio
            .terminal
            .as_ref()
            .and_then(|terminal| rustix::termios::tcgetpgrp(terminal).ok())
            .map(|group| group.as_raw_nonzero().get());
        // It may just have ended, which its exit status will tell.
        let _ = crate::sys::kill(-foreground.unwrap_or(command.pid), signal);
    }

    /// Sets the size of a command's terminal.
    pub(crate) fn resize(&self, process: ProcessId, size: TerminalSize) {
        let terminal = self.commands.get(&process).and_then(|c| c.stdio.terminal.as_ref());
        if let Some(terminal) = terminal {
            // A terminal that is hung up has no use for a size.
            let _ = stdio::resize(terminal, size);
        }
    }

    /// Process ids of all commands that run.
    pub(crate) fn running(&self) -> impl Iterator<Item = i32> {
        self.commands.values().filter(|c| matches!(c.end, End::Running)).map(|c| c.pid)
    }
}

/// How many processes the kernel has killed for want of memory since it started.
fn oom_kills() -> u64 {
    let Ok(stat) = std::fs::read_to_string("/proc/vmstat") else { return 0 };
    let line = stat.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.and_then(|count| count.parse().ok()).unwrap_or(0)
}
