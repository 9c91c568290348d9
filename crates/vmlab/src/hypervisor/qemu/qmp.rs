//! The few commands and events of the QEMU Machine Protocol that vmlab needs, typed.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::HypervisorError;
use crate::sync::{lock, wait, wait_until};

/// How long QEMU may take to answer a command. It answers in a millisecond unless it hangs, or fifty others
/// start at the same time.
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// The longest line that QEMU may send.
const MAX_LINE: u64 = 4 * 1024 * 1024;

/// Why QEMU stopped the VM, as its `SHUTDOWN` event says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ShutdownCause {
    GuestShutdown,
    GuestReset,
    GuestPanic,
    HostQmpQuit,
    HostQmpSystemReset,
    HostSignal,
    HostUi,
    HostError,
    SubsystemReset,
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Default)]
struct State {
    answers: HashMap<u64, Result<Value, String>>,
    next_id: u64,
    shutdown: Option<ShutdownCause>,
    paused: bool,
    /// The VM's CPUs have been started once.
    resumed: bool,
    /// Devices that are gone, by their ids.
    unplugged: HashSet<String>,
    /// The state of a snapshot has been loaded.
    loaded: bool,
    closed: bool,
}

/// A QMP connection. Commands may be given from any thread.
#[derive(Debug)]
pub(super) struct Qmp {
    writer: Mutex<UnixStream>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    id: Option<u64>,
    #[serde(rename = "return", default)]
    returned: Option<Value>,
    #[serde(default)]
    error: Option<ErrorBody>,
    #[serde(default)]
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Deserialize)]
struct ErrorBody {
    desc: String,
}

/// The id of the command that opens every session.
const CAPABILITIES: u64 = 0;

/// What is sent ahead after it has no id: its failure shows in what follows.
fn command(execute: &str, arguments: Value) -> String {
    format!("{}\n", json!({"execute": execute, "arguments": arguments}))
}

impl Qmp {
    /// Opens a session. The first command is sent ahead, before QEMU runs, and answered when its main
    /// loop does.
    pub(super) fn new(socket: &UnixStream) -> std::io::Result<Self> {
        let mut writer = socket.try_clone()?;
        let hello = json!({"execute": "qmp_capabilities", "id": CAPABILITIES});
        // In one piece: each part would be a packet of its own, for which QEMU wakes up.
        writer.write_all(format!("{hello}\n").as_bytes())?;
        let state = State { next_id: CAPABILITIES + 1, ..State::default() };
        Ok(Self { writer: Mutex::new(writer), state: Mutex::new(state), changed: Condvar::new() })
    }

    /// Sends ahead that RAM which is a file is no part of a snapshot's state, and that it is to be told when one
    /// has been loaded.
    pub(super) fn leave_memory_out(&self) -> std::io::Result<()> {
        let on = |name: &str| json!({"capability": name, "state": true});
        let arguments = json!({"capabilities": [on("x-ignore-shared"), on("events")]});
        lock(&self.writer).write_all(command("migrate-set-capabilities", arguments).as_bytes())
    }

    /// Sends ahead that the state of a snapshot comes by a descriptor that QEMU inherits.
    pub(super) fn take_state_from(&self, descriptor: RawFd) -> std::io::Result<()> {
        let arguments = json!({"uri": format!("fd:{descriptor}")});
        lock(&self.writer).write_all(command("migrate-incoming", arguments).as_bytes())
    }

    /// Gives QEMU a descriptor, by a name for further commands.
    pub(super) fn give(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), HypervisorError> {
        self.run("getfd", json!({"fdname": name}), Some(fd)).map(drop)
    }

    /// Takes in what QEMU says until it ends. To be run in a thread.
    pub(super) fn pump(&self, socket: UnixStream) {
        let mut reader = BufReader::new(socket);
        let mut line = Vec::new();
        loop {
            line.clear();
            let limited = &mut std::io::Read::take(&mut reader, MAX_LINE);
            match limited.read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => break,
                Ok(_) => {
                    if let Ok(line) = serde_json::from_slice(&line) {
                        self.take(line);
                    }
                }
            }
        }
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits until QEMU's main loop runs. False when QEMU ended before.
    pub(super) fn wait_ready(&self) -> bool {
        let mut state = self.lock();
        loop {
            if state.answers.remove(&CAPABILITIES).is_some() {
                return true;
            }
            if state.closed {
                return false;
            }
            state = wait(&self.changed, state);
        }
    }

    /// Waits until the VM runs that goes on from a snapshot. False when QEMU ended before.
    pub(super) fn wait_resumed(&self) -> bool {
        let mut state = self.lock();
        loop {
            if state.resumed || state.closed {
                return state.resumed;
            }
            state = wait(&self.changed, state);
        }
    }

    /// Waits until the state of a snapshot has been loaded. False when QEMU ended before.
    pub(super) fn wait_loaded(&self) -> bool {
        let mut state = self.lock();
        loop {
            if state.loaded || state.closed {
                return state.loaded;
            }
            state = wait(&self.changed, state);
        }
    }

    /// Forgets that a device of this id was ever taken out.
    pub(super) fn forget_unplugged(&self, id: &str) {
        self.lock().unplugged.remove(id);
    }

    /// Waits until a device has been taken out of the VM.
    pub(super) fn wait_unplugged(
        &self,
        id: &str,
        deadline: Instant,
    ) -> Result<(), HypervisorError> {
        let failed =
            |said: &str| HypervisorError::Command { command: "device_del", said: said.to_owned() };
        let mut state = self.lock();
        while !state.unplugged.contains(id) {
            if state.closed {
                return Err(failed("it has ended"));
            }
            state = wait_until(&self.changed, state, Some(deadline))
                .ok_or_else(|| failed("the device stays"))?;
        }
        Ok(())
    }

    /// Why QEMU stopped the VM, once it has said so.
    pub(super) fn shutdown_cause(&self) -> Option<ShutdownCause> {
        self.lock().shutdown
    }

    /// Whether the VM's CPUs are stopped.
    pub(super) fn paused(&self) -> bool {
        self.lock().paused
    }

    /// Whether QEMU has closed the connection: it has ended.
    pub(super) fn closed(&self) -> bool {
        self.lock().closed
    }

    /// Waits until QEMU has closed the connection, so that no event is missed.
    pub(super) fn wait_closed(&self, deadline: Instant) {
        let mut state = self.lock();
        while !state.closed {
            let Some(woken) = wait_until(&self.changed, state, Some(deadline)) else { return };
            state = woken;
        }
    }

    /// Executes a command without arguments.
    pub(super) fn execute(&self, command: &'static str) -> Result<(), HypervisorError> {
        self.run(command, json!({}), None).map(drop)
    }

    /// Executes a command, with a descriptor if it needs one.
    pub(super) fn run(
        &self,
        command: &'static str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, HypervisorError> {
        let failed = |said: String| HypervisorError::Command { command, said };
        let id = {
            let mut state = self.lock();
            let id = state.next_id;
            state.next_id += 1;
            id
        };
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments, "id": id}));
        self.write(line.as_bytes(), fd).map_err(|e| failed(format!("it has ended ({e})")))?;
        let deadline = Instant::now() + ANSWER_TIME;
        let mut state = self.lock();
        loop {
            if let Some(answer) = state.answers.remove(&id) {
                return answer.map_err(failed);
            }
            if state.closed {
                return Err(failed("it has ended".to_owned()));
            }
            let Some(woken) = wait_until(&self.changed, state, Some(deadline)) else {
                return Err(failed(format!("no answer within {} s", ANSWER_TIME.as_secs())));
            };
            state = woken;
        }
    }

    fn write(&self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
        let mut writer = lock(&self.writer);
        let Some(fd) = fd else { return writer.write_all(line) };
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = sendmsg(&*writer, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
        writer.write_all(&line[sent..])
    }

    fn take(&self, line: Line) {
        let mut state = self.lock();
        if let Some(id) = line.id {
            let answer = match line.error {
                Some(error) => Err(error.desc),
                None => Ok(line.returned.unwrap_or_default()),
            };
            state.answers.insert(id, answer);
        }
        match line.event.as_deref() {
            // The first cause is the true one: a reset that becomes a shutdown is reported twice.
            Some("SHUTDOWN") if state.shutdown.is_none() => {
                let reason = line.data.get("reason").cloned().unwrap_or_default();
                state.shutdown =
                    Some(serde_json::from_value(reason).unwrap_or(ShutdownCause::Unknown));
            }
            Some("DEVICE_DELETED") => {
                // Without a name it is a part of a device.
                if let Some(id) = line.data.get("device").and_then(Value::as_str) {
                    state.unplugged.insert(id.to_owned());
                }
            }
            Some("MIGRATION") if line.data.get("status") == Some(&json!("completed")) => {
                state.loaded = true;
            }
            Some("STOP") => state.paused = true,
            Some("RESUME") => {
                state.paused = false;
                state.resumed = true;
            }
            _ => {}
        }
        drop(state);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// A QMP session whose other end is `peer`.
    fn session(peer: impl FnOnce(UnixStream) + Send + 'static) -> Arc<Qmp> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qmp = Arc::new(Qmp::new(&ours).unwrap());
        let pump = Arc::clone(&qmp);
        std::thread::spawn(move || pump.pump(ours));
        std::thread::spawn(move || peer(theirs));
        qmp
    }

    fn answer(socket: &mut BufReader<UnixStream>, with: &str) -> String {
        let mut line = String::new();
        socket.read_line(&mut line).unwrap();
        let id = serde_json::from_str::<Value>(&line).unwrap()["id"].clone();
        let reply = with.replace("ID", &id.to_string());
        socket.get_mut().write_all(format!("{reply}\n").as_bytes()).unwrap();
        line
    }

    #[test]
    fn commands_events_and_errors() {
        let qmp = session(|socket| {
            let mut socket = BufReader::new(socket);
            socket.get_mut().write_all(b"{\"QMP\": {\"version\": {}}}\r\n").unwrap();
            assert!(
                answer(&mut socket, r#"{"return": {}, "id": ID}"#).contains("qmp_capabilities")
            );
            let stop = r#"{"event": "STOP", "data": {}}
{"return": {}, "id": ID}"#;
            assert!(answer(&mut socket, stop).contains("stop"));
            answer(&mut socket, r#"{"error": {"class": "GenericError", "desc": "no"}, "id": ID}"#);
            let end = r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}
{"event": "SHUTDOWN", "data": {"guest": false, "reason": "host-qmp-quit"}}"#;
            socket.get_mut().write_all(format!("{end}\n").as_bytes()).unwrap();
        });
        assert!(qmp.wait_ready());
        qmp.execute("stop").unwrap();
        assert!(qmp.paused());
        let error = qmp.execute("cont").unwrap_err().to_string();
        assert!(error.contains("cont") && error.contains("no"), "{error}");
        qmp.wait_closed(Instant::now() + ANSWER_TIME);
        assert_eq!(qmp.shutdown_cause(), Some(ShutdownCause::GuestReset));
        assert!(qmp.execute("stop").is_err());
    }

    #[test]
    fn a_qemu_that_ends_at_once_is_noticed() {
        assert!(!session(drop).wait_ready());
    }
}
