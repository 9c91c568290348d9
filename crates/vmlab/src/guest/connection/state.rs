//! What is known on a connection, and what becomes of it with what the guest says.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::time::{Duration, SystemTime};

use vmlab_wire::frame::put_empty;
use vmlab_wire::message::{
    BootLog, Exited, Failure, Ready, SetupReport, StartFailure, Stdio, decode,
};
use vmlab_wire::{
    Frame, FrameKind, GuestMessage, Preamble, ProcessId, ReceiveWindow, SendWindow, StreamId,
};

use super::{Lost, SetupOutcome};

/// How many of the agent's warnings are kept for the caller to take.
const MAX_WARNINGS: usize = 100;

#[derive(Debug, Default, Clone)]
pub(super) struct State {
    /// The guest has greeted. On a serial line, what comes before would be echoed.
    pub(super) greeted: bool,
    pub(super) queue: VecDeque<Vec<u8>>,
    /// After how long without anything to send it is nudged.
    pub(super) nudges: Option<Duration>,
    /// How much of the queue may still be sent, if not all: the guest holds after that.
    pub(super) gate: Option<usize>,
    /// The answer to what was asked last.
    pub(super) done: Option<Result<(), Failure>>,
    pub(super) ready: Option<Ready>,
    pub(super) setting_up: bool,
    pub(super) setup: Option<SetupOutcome>,
    pub(super) boot_log: Option<BootLog>,
    pub(super) powering_off: bool,
    pub(super) processes: HashMap<ProcessId, Process>,
    pub(super) next_process: u32,
    pub(super) inputs: HashMap<StreamId, Input>,
    pub(super) outputs: HashMap<StreamId, Output>,
    pub(super) warnings: Vec<String>,
    pub(super) lost: Option<Lost>,
}

#[derive(Debug, Default, Clone)]
pub(super) struct Process {
    pub(super) started: Option<Result<(), StartFailure>>,
    pub(super) exited: Option<Exited>,
}

/// A stream to the guest.
#[derive(Debug, Default, Clone)]
pub(super) struct Input {
    pub(super) window: SendWindow,
    pub(super) stopped: bool,
}

/// A stream from the guest. It holds at most a window of data.
#[derive(Debug, Default, Clone)]
pub(super) struct Output {
    pub(super) window: ReceiveWindow,
    pub(super) chunks: VecDeque<Vec<u8>>,
    /// Nothing more is taken in: the stream or its command has ended, or nobody reads it.
    pub(super) ended: bool,
    /// The guest has ended the stream and will not name it again.
    pub(super) closed: bool,
    /// The reader is gone.
    pub(super) dropped: bool,
}

pub(super) enum ReadError {
    Io,
    Protocol(String),
}

impl From<io::Error> for ReadError {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

pub(super) fn protocol(error: impl std::fmt::Display) -> ReadError {
    ReadError::Protocol(error.to_string())
}

fn not_open(stream: StreamId) -> ReadError {
    protocol(format_args!("something on stream {}, which is not open", stream.0))
}

impl State {
    fn set_up(&mut self, outcome: Result<SetupReport, Failure>) {
        self.setup.get_or_insert_with(|| (outcome, SystemTime::now()));
    }

    pub(super) fn with_preamble(mut self) -> Self {
        self.queue.push_back(Preamble::OURS.encode().to_vec());
        self
    }

    pub(super) fn take(&mut self, frame: Frame<'_>) -> Result<(), ReadError> {
        match frame {
            Frame::Message(payload) => match decode(payload).map_err(protocol)? {
                GuestMessage::Ready(ready) => _ = self.ready.get_or_insert(ready),
                GuestMessage::SettingUp => self.setting_up = true,
                GuestMessage::SetupDone(report) => self.set_up(Ok(report)),
                GuestMessage::SetupFailed(failure) => self.set_up(Err(failure)),
                GuestMessage::BootLog(log) => _ = self.boot_log.get_or_insert(log),
                GuestMessage::Done(done) => self.done = Some(done),
                GuestMessage::PoweringOff => self.powering_off = true,
                GuestMessage::Warning(text) => {
                    if self.warnings.len() < MAX_WARNINGS {
                        self.warnings.push(text);
                    }
                }
                GuestMessage::Started(process) => {
                    self.update(process, |known| known.started = Some(Ok(())))?;
                }
                GuestMessage::StartFailed(process, failure) => {
                    self.update(process, |known| known.started = Some(Err(failure)))?;
                    // The guest says nothing more of a command that never ran.
                    for stdio in [Stdio::Stdin, Stdio::Stdout, Stdio::Stderr] {
                        self.inputs.remove(&process.stream(stdio));
                        self.outputs.remove(&process.stream(stdio));
                    }
                }
                GuestMessage::Exited(process, exited) => {
                    self.update(process, |known| known.exited = Some(exited))?;
                    // All that the command wrote has come before. What its children still write
                    // is nobody's.
                    self.end_output(process.stream(Stdio::Stdout));
                    self.end_output(process.stream(Stdio::Stderr));
                    if let Some(input) = self.inputs.get_mut(&process.stream(Stdio::Stdin)) {
                        input.stopped = true;
                    }
                }
            },
            Frame::Data(stream, bytes) => {
                let output = self.output(stream)?;
                output.window.received(bytes.len()).map_err(protocol)?;
                if !output.ended {
                    output.chunks.push_back(bytes.to_vec());
                }
            }
            Frame::Eof(stream) => match self.outputs.get_mut(&stream) {
                Some(output) => {
                    output.closed = true;
                    self.end_output(stream);
                }
                // Of a stream that both sides were done with.
                None => self.output_was_open(stream)?,
            },
            // What is no longer written to may still be granted or stopped by a guest that does not
            // know it yet.
            Frame::Credit(stream, bytes) => {
                if let Some(input) = self.inputs.get_mut(&stream) {
                    input.window.granted(bytes).map_err(protocol)?;
                }
            }
            Frame::Stop(stream) => {
                if let Some(input) = self.inputs.get_mut(&stream) {
                    input.stopped = true;
                }
            }
        }
        Ok(())
    }

    /// Nobody reads a stream any more.
    pub(super) fn drop_output(&mut self, stream: StreamId) {
        let Some(output) = self.outputs.get_mut(&stream) else { return };
        output.chunks.clear();
        output.dropped = true;
        self.end_output(stream);
    }

    /// Takes in no more of a stream, and forgets it once neither side will name it again.
    fn end_output(&mut self, stream: StreamId) {
        let Some(output) = self.outputs.get_mut(&stream) else { return };
        let first = !std::mem::replace(&mut output.ended, true);
        if first && !output.closed {
            let mut frame = Vec::new();
            put_empty(&mut frame, stream, FrameKind::Stop);
            self.queue.push_back(frame);
        }
        if output.closed && output.dropped {
            self.outputs.remove(&stream);
        }
    }

    /// Changes what is known of a command, unless nobody wants to know of it any more.
    fn update(
        &mut self,
        process: ProcessId,
        change: impl FnOnce(&mut Process),
    ) -> Result<(), ReadError> {
        if process.0 >= self.next_process {
            return Err(protocol(format_args!("news of command {}, never started", process.0)));
        }
        if let Some(known) = self.processes.get_mut(&process) {
            change(known);
        }
        Ok(())
    }

    fn output_was_open(&self, stream: StreamId) -> Result<(), ReadError> {
        let issued = |id: u32| {
            let process = ProcessId(id);
            [Stdio::Stdout, Stdio::Stderr].iter().any(|stdio| process.stream(*stdio) == stream)
        };
        match stream.0.checked_div(4).filter(|id| *id < self.next_process && issued(*id)) {
            Some(_) => Ok(()),
            None => Err(not_open(stream)),
        }
    }

    fn output(&mut self, stream: StreamId) -> Result<&mut Output, ReadError> {
        self.outputs.get_mut(&stream).ok_or_else(|| not_open(stream))
    }
}
