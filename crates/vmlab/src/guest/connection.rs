//! One connection to an agent: a thread that reads it, a thread that writes it, and what is known.
//!
//! Nothing that a caller does blocks on the guest, except for writing to a command's stdin beyond its
//! window and waiting for something. When the connection is lost, every waiting caller is told.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use vmlab_wire::frame::{put_credit, put_data, put_empty};
use vmlab_wire::message::{
    BootLog, Exited, Failure, Ready, SetupReport, StartFailure, Stdio, encode,
};
use vmlab_wire::{Decoder, FrameKind, HostMessage, Preamble, ProcessId, StreamId};

use self::state::{Input, Output, Process, ReadError, State, protocol};
use crate::sync::{lock, wait, wait_until};

mod state;

/// How much is read from the channel at once: a whole frame of data, so that a flood costs few calls.
const READ_SIZE: usize = 256 * 1024;

/// Why a connection is no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lost {
    /// The other end closed it: the VM has ended.
    Closed,
    /// The other end broke the protocol.
    Protocol(String),
}

/// How a set-up went, and the host's time when that was known.
pub(crate) type SetupOutcome = (Result<SetupReport, Failure>, SystemTime);

/// What an agent says before it is spoken to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Greeting {
    pub(crate) ready: Ready,
    pub(crate) warnings: Vec<String>,
}

/// What is known on a connection whose agent holds: nothing is on its way in either direction. It can be gone on
/// with any number of times, with a guest that is as this one was then.
#[derive(Debug, Clone)]
pub(crate) struct Held(State);

/// A connection to an agent.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: UnixStream,
    state: Mutex<State>,
    /// Something came from the guest.
    changed: Condvar,
    /// Something is to be sent to the guest.
    outgoing: Condvar,
}

impl Connection {
    /// Takes over the channel. The guest need not run yet: what is sent waits for its preamble.
    pub(crate) fn open(socket: UnixStream) -> io::Result<Arc<Self>> {
        Self::start(socket, State::default().with_preamble())
    }

    /// As [`open`](Self::open), but says nothing, so that a snapshot can be taken of the guest: nothing is
    /// on its way to it then.
    pub(crate) fn listen(socket: UnixStream) -> io::Result<Arc<Self>> {
        Self::start(socket, State::default())
    }

    /// Goes on with a guest that has said `greeting` to another connection, which had said nothing.
    pub(crate) fn resume(socket: UnixStream, greeting: Greeting) -> io::Result<Arc<Self>> {
        let Greeting { ready, warnings } = greeting;
        let state = State { greeted: true, ready: Some(ready), warnings, ..State::default() };
        Self::start(socket, state.with_preamble())
    }

    /// Goes on where another connection was held, and sends `first` before all else.
    pub(crate) fn go_on(
        socket: UnixStream,
        held: &Held,
        first: &HostMessage,
    ) -> io::Result<Arc<Self>> {
        let mut bytes = Vec::new();
        encode(first, &mut bytes).map_err(io::Error::other)?;
        let mut state = held.0.clone();
        (state.gate, state.done, state.lost) = (None, None, None);
        // Whoever read a stream did so on the other connection. Commands must not wait for them.
        let streams: Vec<StreamId> = state.outputs.keys().copied().collect();
        for stream in streams {
            state.drop_output(stream);
        }
        state.queue.push_front(bytes);
        Self::start(socket, state)
    }

    fn start(socket: UnixStream, state: State) -> io::Result<Arc<Self>> {
        let (reading, writing) = (socket.try_clone()?, socket.try_clone()?);
        let connection = Arc::new(Self {
            socket,
            state: Mutex::new(state),
            changed: Condvar::new(),
            outgoing: Condvar::new(),
        });
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let reader = Arc::clone(&connection);
        thread("vmlab-from-guest").spawn(move || {
            let lost = match reader.read_all(reading) {
                Ok(()) => Lost::Closed,
                Err(ReadError::Io) => Lost::Closed,
                Err(ReadError::Protocol(what)) => Lost::Protocol(what),
            };
            reader.lose(lost);
        })?;
        let writer = Arc::clone(&connection);
        thread("vmlab-to-guest").spawn(move || writer.write_all(writing))?;
        Ok(connection)
    }

    /// Ends the connection from this side.
    pub(crate) fn close(&self) {
        self.lose(Lost::Closed);
    }

    /// Sends a message.
    pub(crate) fn send(&self, message: &HostMessage) -> Result<(), vmlab_wire::MessageError> {
        let mut bytes = Vec::new();
        encode(message, &mut bytes)?;
        self.enqueue(&mut self.lock(), bytes);
        Ok(())
    }

    /// Has the guest interrupted now and then from here on, by a message that asks for nothing, also where another
    /// connection goes on with it.
    pub(crate) fn nudge_every(&self, interval: Duration) {
        self.lock().nudges = Some(interval);
        self.outgoing.notify_one();
    }

    /// Sends what the agent answers with `Done`.
    pub(crate) fn ask(&self, message: &HostMessage) -> Result<(), vmlab_wire::MessageError> {
        let mut bytes = Vec::new();
        encode(message, &mut bytes)?;
        let mut state = self.lock();
        state.done = None;
        self.enqueue(&mut state, bytes);
        if matches!(message, HostMessage::Hold(_)) {
            state.gate = Some(state.queue.len());
        }
        Ok(())
    }

    /// Waits for the answer to what was asked.
    pub(crate) fn wait_done(
        &self,
        deadline: Option<Instant>,
    ) -> Result<Option<Result<(), Failure>>, Lost> {
        self.wait_for(deadline, |state| state.done.take())
    }

    /// What is known now that the agent holds.
    pub(crate) fn held(&self) -> Held {
        Held(self.lock().clone())
    }

    /// Lets all be sent again, to an agent that did not hold.
    pub(crate) fn open_gate(&self) {
        self.lock().gate = None;
        self.outgoing.notify_all();
    }

    /// Waits for the agent's first message.
    pub(crate) fn wait_ready(&self, deadline: Option<Instant>) -> Result<Option<Ready>, Lost> {
        self.wait_for(deadline, |state| state.ready.clone())
    }

    /// What the guest has said so far, once it is ready.
    pub(crate) fn greeting(&self) -> Option<Greeting> {
        let state = self.lock();
        Some(Greeting { ready: state.ready.clone()?, warnings: state.warnings.clone() })
    }

    /// Waits until the agent has taken up its set-up.
    pub(crate) fn wait_setting_up(&self, deadline: Option<Instant>) -> Result<Option<()>, Lost> {
        self.wait_for(deadline, |state| state.setting_up.then_some(()))
    }

    /// Waits for the outcome of the set-up, and tells when it came.
    pub(crate) fn wait_setup(
        &self,
        deadline: Option<Instant>,
    ) -> Result<Option<SetupOutcome>, Lost> {
        self.wait_for(deadline, |state| state.setup.clone())
    }

    /// Waits for what the kernel's log says of the boot.
    pub(crate) fn wait_boot_log(&self, deadline: Option<Instant>) -> Result<Option<BootLog>, Lost> {
        self.wait_for(deadline, |state| state.boot_log.clone())
    }

    /// Waits until the agent says that the machine may be cut off.
    pub(crate) fn wait_powering_off(&self, deadline: Option<Instant>) -> Result<Option<()>, Lost> {
        self.wait_for(deadline, |state| state.powering_off.then_some(()))
    }

    /// What the agent warned of since the last call.
    pub(crate) fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().warnings)
    }

    /// Reserves a number for a command, with those of its streams that will be used.
    pub(crate) fn new_process(&self, stdin: bool, outputs: &[Stdio]) -> ProcessId {
        let mut state = self.lock();
        let process = ProcessId(state.next_process);
        state.next_process += 1;
        state.processes.insert(process, Process::default());
        if stdin {
            state.inputs.insert(process.stream(Stdio::Stdin), Input::default());
        }
        for &stdio in outputs {
            state.outputs.insert(process.stream(stdio), Output::default());
        }
        process
    }

    /// Waits until a command runs, or could not be started.
    pub(crate) fn wait_started(
        &self,
        process: ProcessId,
    ) -> Result<Result<(), StartFailure>, Lost> {
        let started = |state: &mut State| state.processes.get(&process)?.started.clone();
        self.wait_for(None, started).map(|started| started.unwrap_or(Ok(())))
    }

    /// Waits for a command's end. `None` when the deadline came first.
    pub(crate) fn wait_exited(
        &self,
        process: ProcessId,
        deadline: Option<Instant>,
    ) -> Result<Option<Exited>, Lost> {
        self.wait_for(deadline, |state| state.processes.get(&process)?.exited)
    }

    /// Forgets a command that has ended.
    pub(crate) fn forget(&self, process: ProcessId) {
        self.lock().processes.remove(&process);
    }

    /// Sends bytes to a command's stdin; waits while its window is full.
    ///
    /// # Errors
    /// `BrokenPipe` when the command reads no more or the connection is lost.
    pub(crate) fn write_input(&self, stream: StreamId, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        loop {
            if state.lost.is_some() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let Some(input) = state.inputs.get_mut(&stream).filter(|input| !input.stopped) else {
                return Err(io::ErrorKind::BrokenPipe.into());
            };
            let count = bytes.len().min(input.window.available());
            if count > 0 || bytes.is_empty() {
                input.window.sent(count);
                let mut frames = Vec::with_capacity(count + 64);
                put_data(&mut frames, stream, &bytes[..count]);
                self.enqueue(&mut state, frames);
                return Ok(count);
            }
            state = wait(&self.changed, state);
        }
    }

    /// Waits until writing to the stream would not wait. False when nobody will read it any more.
    pub(crate) fn input_wanted(&self, stream: StreamId) -> bool {
        let wanted = self.wait_for(None, |state| match state.inputs.get(&stream) {
            Some(input) if !input.stopped && state.lost.is_none() => {
                (input.window.available() > 0).then_some(true)
            }
            _ => Some(false),
        });
        wanted == Ok(Some(true))
    }

    /// Ends a command's stdin.
    pub(crate) fn end_input(&self, stream: StreamId) {
        let mut state = self.lock();
        if state.inputs.remove(&stream).is_some_and(|input| !input.stopped) {
            let mut frame = Vec::new();
            put_empty(&mut frame, stream, FrameKind::Eof);
            self.enqueue(&mut state, frame);
        }
    }

    /// The next bytes of a stream from the guest; `None` when it or its command has ended.
    ///
    /// # Errors
    /// When the connection is lost before the stream's end.
    pub(crate) fn read_output(&self, stream: StreamId) -> Result<Option<Vec<u8>>, Lost> {
        let next = |state: &mut State| {
            let Some(output) = state.outputs.get_mut(&stream) else { return Some(None) };
            match output.chunks.pop_front() {
                Some(chunk) => Some(Some(chunk)),
                None => output.ended.then_some(None),
            }
        };
        Ok(self.wait_for(None, next)?.flatten())
    }

    /// Notes that bytes of a stream have been passed on, so that the guest may send more.
    pub(crate) fn consumed(&self, stream: StreamId, count: usize) {
        let mut state = self.lock();
        let Some(output) = state.outputs.get_mut(&stream) else { return };
        if let Some(grant) = output.window.consumed(count)
            && !output.ended
        {
            let mut frame = Vec::new();
            put_credit(&mut frame, stream, grant);
            self.enqueue(&mut state, frame);
        }
    }

    /// Tells the guest that nobody reads a stream any more.
    pub(crate) fn stop_output(&self, stream: StreamId) {
        self.lock().drop_output(stream);
        self.outgoing.notify_one();
    }

    fn enqueue(&self, state: &mut State, bytes: Vec<u8>) {
        if state.lost.is_none() && !bytes.is_empty() {
            state.queue.push_back(bytes);
            self.outgoing.notify_one();
        }
    }

    /// Waits until `found` finds something; what had come before the connection was lost counts.
    fn wait_for<T>(
        &self,
        deadline: Option<Instant>,
        mut found: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<Option<T>, Lost> {
        let mut state = self.lock();
        loop {
            if let Some(value) = found(&mut state) {
                return Ok(Some(value));
            }
            if let Some(lost) = &state.lost {
                return Err(lost.clone());
            }
            state = match wait_until(&self.changed, state, deadline) {
                Some(state) => state,
                None => return Ok(None),
            };
        }
    }

    fn lose(&self, lost: Lost) {
        self.lock().lost.get_or_insert(lost);
        let _ = self.socket.shutdown(Shutdown::Both);
        self.changed.notify_all();
        self.outgoing.notify_all();
    }

    fn write_all(&self, mut socket: UnixStream) {
        while let Some(bytes) = self.next_to_send() {
            if socket.write_all(&bytes).is_err() {
                // The reader sees the end too, after what the guest had still sent.
                return;
            }
        }
    }

    /// Waits for something to send; `None` when the connection is lost.
    fn next_to_send(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        let mut nudge = None;
        loop {
            if state.greeted
                && state.gate != Some(0)
                && let Some(bytes) = state.queue.pop_front()
            {
                state.gate = state.gate.map(|left| left - 1);
                return Some(bytes);
            }
            if state.lost.is_some() {
                return None;
            }
            // Nothing may be on its way to a guest that holds.
            let nudges = state.nudges.filter(|_| state.gate.is_none());
            nudge = nudges.map(|interval| nudge.unwrap_or_else(|| Instant::now() + interval));
            match wait_until(&self.outgoing, state, nudge) {
                Some(woken) => state = woken,
                None => {
                    let mut bytes = Vec::new();
                    // It has no content that could be too long.
                    encode(&HostMessage::Nudge, &mut bytes).ok()?;
                    return Some(bytes);
                }
            }
        }
    }

    fn read_all(&self, mut socket: UnixStream) -> Result<(), ReadError> {
        if !self.lock().greeted {
            let mut preamble = [0; Preamble::LEN];
            socket.read_exact(&mut preamble)?;
            Preamble::check(preamble).map_err(protocol)?;
            self.lock().greeted = true;
            self.outgoing.notify_one();
        }
        let mut decoder = Decoder::new();
        loop {
            let mut space = decoder.space(READ_SIZE);
            let count = match socket.read(space.bytes()) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return Err(ReadError::Io),
            };
            space.filled(count);
            if count == 0 {
                return Ok(());
            }
            let mut state = self.lock();
            while let Some(frame) = decoder.next_frame().map_err(protocol)? {
                state.take(frame)?;
            }
            let answers = !state.queue.is_empty();
            drop(state);
            self.changed.notify_all();
            if answers {
                self.outgoing.notify_one();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

#[cfg(test)]
mod tests;
