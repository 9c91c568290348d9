//! The host's side of the protocol, as small as tests need it.

#![allow(dead_code, unreachable_pub, reason = "a module of several programs")]
#![allow(clippy::unwrap_used, reason = "helpers of tests, which may fail anywhere")]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};

use vmlab_wire::frame::{put_credit, put_data, put_empty};
use vmlab_wire::message::{
    Exec, ExecStdio, Exited, Ready, Setup, StartFailure, StderrTo, Stdio, User,
};
use vmlab_wire::{
    Decoder, Frame, FrameKind, GuestMessage, HostMessage, Preamble, ProcessId, ReceiveWindow,
    SendWindow, StreamId, message,
};

/// What came from the agent.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Message(GuestMessage),
    Data(StreamId, Vec<u8>),
    Eof(StreamId),
    Stop(StreamId),
    Credit(StreamId),
}

/// One end of a session.
pub struct Host {
    socket: UnixStream,
    decoder: Decoder,
    send: HashMap<StreamId, SendWindow>,
    receive: HashMap<StreamId, ReceiveWindow>,
    /// Streams that are granted no credit.
    pub stalled: Vec<StreamId>,
}

/// All that a command did.
#[derive(Debug, Default)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub stdin_stopped: bool,
    pub exited: Option<Exited>,
    pub failed: Option<StartFailure>,
}

impl Host {
    pub fn greet(mut socket: UnixStream) -> (Self, Ready) {
        let mut preamble = [0; Preamble::LEN];
        socket.read_exact(&mut preamble).unwrap();
        Preamble::check(preamble).unwrap();
        // Only now: a serial line echoes what comes before the agent has opened it.
        socket.write_all(&Preamble::OURS.encode()).unwrap();
        let mut host = Self {
            socket,
            decoder: Decoder::new(),
            send: HashMap::new(),
            receive: HashMap::new(),
            stalled: Vec::new(),
        };
        match host.next() {
            Some(Event::Message(GuestMessage::Ready(ready))) => (host, ready),
            other => panic!("expected Ready, got {other:?}"),
        }
    }

    pub fn message(&mut self, message: &HostMessage) {
        let mut out = Vec::new();
        message::encode(message, &mut out).unwrap();
        self.socket.write_all(&out).unwrap();
    }

    pub fn setup(&mut self, setup: Setup) -> GuestMessage {
        self.message(&HostMessage::Setup(Box::new(setup)));
        match self.next() {
            Some(Event::Message(message)) => message,
            other => panic!("expected the set-up's end, got {other:?}"),
        }
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// The next thing from the agent; `None` when it has closed the channel.
    pub fn next(&mut self) -> Option<Event> {
        loop {
            let event = match self.decoder.next_frame().unwrap() {
                Some(Frame::Message(payload)) => Event::Message(message::decode(payload).unwrap()),
                Some(Frame::Data(stream, data)) => {
                    let window = self.receive.entry(stream).or_default();
                    window.received(data.len()).unwrap();
                    if !self.stalled.contains(&stream)
                        && let Some(grant) = window.consumed(data.len())
                    {
                        let mut out = Vec::new();
                        put_credit(&mut out, stream, grant);
                        // The agent may be gone by now.
                        let _ = self.socket.write_all(&out);
                    }
                    Event::Data(stream, data.to_vec())
                }
                Some(Frame::Eof(stream)) => Event::Eof(stream),
                Some(Frame::Stop(stream)) => Event::Stop(stream),
                Some(Frame::Credit(stream, bytes)) => {
                    self.send.entry(stream).or_default().granted(bytes).unwrap();
                    Event::Credit(stream)
                }
                None => {
                    let mut space = self.decoder.space(1 << 20);
                    let count = match self.socket.read(space.bytes()) {
                        Ok(count) => count,
                        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => 0,
                        Err(e) => panic!("reading from the agent: {e}"),
                    };
                    space.filled(count);
                    if count == 0 {
                        return None;
                    }
                    continue;
                }
            };
            return Some(event);
        }
    }

    /// Whether anything comes in that time.
    pub fn speaks_within(&mut self, time: std::time::Duration) -> bool {
        let mut byte = [0];
        self.socket.set_read_timeout(Some(time)).unwrap();
        let peeked = rustix::net::recv(&self.socket, &mut byte, rustix::net::RecvFlags::PEEK);
        self.socket.set_read_timeout(None).unwrap();
        peeked != Err(rustix::io::Errno::AGAIN)
    }

    pub fn data(&mut self, stream: StreamId, data: &[u8]) {
        self.send.entry(stream).or_default().sent(data.len());
        let mut out = Vec::new();
        put_data(&mut out, stream, data);
        // The agent may have ended the stream or itself.
        let _ = self.socket.write_all(&out);
    }

    pub fn room(&mut self, stream: StreamId) -> usize {
        self.send.entry(stream).or_default().available()
    }

    pub fn empty(&mut self, stream: StreamId, kind: FrameKind) {
        let mut out = Vec::new();
        put_empty(&mut out, stream, kind);
        self.socket.write_all(&out).unwrap();
    }

    /// Writes bytes that the agent may not wait for.
    pub fn raw_lossy(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    pub fn hang_up(&mut self) {
        self.socket.shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// Reads a command's stdout until it contains `end`.
    pub fn until(&mut self, exec: &Exec, end: &str) -> String {
        let stdout = exec.process.stream(Stdio::Stdout);
        let mut seen = String::new();
        while !seen.contains(end) {
            match self.next() {
                Some(Event::Data(s, data)) if s == stdout => {
                    seen.push_str(&String::from_utf8_lossy(&data));
                }
                Some(_) => {}
                None => panic!("the agent went away after {seen:?}"),
            }
        }
        seen
    }

    /// Grants a stream that was stalled its whole window again.
    pub fn regrant(&mut self, stream: StreamId, bytes: u32) {
        self.receive.insert(stream, ReceiveWindow::default());
        self.grant(stream, bytes);
    }

    pub fn grant(&mut self, stream: StreamId, bytes: u32) {
        let mut out = Vec::new();
        put_credit(&mut out, stream, bytes);
        self.socket.write_all(&out).unwrap();
    }

    pub fn start(&mut self, exec: &Exec) {
        self.message(&HostMessage::Exec(Box::new(exec.clone())));
    }

    /// Runs a command to its end and that of its streams, with `input` on its stdin.
    pub fn run(&mut self, exec: &Exec, input: &[u8]) -> Outcome {
        self.start(exec);
        self.finish(exec, Some(input))
    }

    /// Serves a command that was started until it and its streams have ended.
    pub fn finish(&mut self, exec: &Exec, input: Option<&[u8]>) -> Outcome {
        let process = exec.process;
        let [stdin, stdout, stderr] =
            [Stdio::Stdin, Stdio::Stdout, Stdio::Stderr].map(|s| process.stream(s));
        let mut outcome = Outcome::default();
        let mut started = false;
        let mut left = input;
        let (takes_input, open) = match exec.stdio {
            ExecStdio::Terminal(_) => (true, 1),
            ExecStdio::Pipes { stdin, stdout, stderr } => {
                (stdin, usize::from(stdout) + usize::from(stderr == StderrTo::Stream))
            }
        };
        let mut eofs = 0;
        loop {
            if started && takes_input && !outcome.stdin_stopped {
                while let Some(rest) = left {
                    let room = self.room(stdin);
                    if rest.is_empty() {
                        self.empty(stdin, FrameKind::Eof);
                        left = None;
                    } else if room == 0 {
                        break;
                    } else {
                        let (now, later) = rest.split_at(room.min(rest.len()).min(65536));
                        self.data(stdin, now);
                        left = Some(later);
                    }
                }
            }
            if outcome.exited.is_some() && eofs >= open {
                return outcome;
            }
            match self.next().expect("the agent went away") {
                Event::Data(s, data) if s == stdout => outcome.stdout.extend(data),
                Event::Data(s, data) if s == stderr => outcome.stderr.extend(data),
                Event::Eof(s) if s == stdout || s == stderr => eofs += 1,
                Event::Stop(s) if s == stdin => outcome.stdin_stopped = true,
                Event::Message(GuestMessage::Started(p)) if p == process => {
                    started = true;
                }
                Event::Message(GuestMessage::StartFailed(p, failure)) if p == process => {
                    outcome.failed = Some(failure);
                    return outcome;
                }
                Event::Message(GuestMessage::Exited(p, exited)) if p == process => {
                    outcome.exited = Some(exited);
                }
                _ => {}
            }
        }
    }
}

/// The agent as a process, with its session.
pub struct Agent {
    pub child: Child,
    pub host: Host,
}

impl Agent {
    pub fn start() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_vmlab-agent"))
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .unwrap();
        let (host, ready) = Host::greet(ours);
        assert!(ready.ready_ns >= ready.started_ns);
        Self { child, host }
    }

    /// The agent's resident memory at its highest, in KiB.
    pub fn peak_kib(&self) -> u64 {
        let status = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn command(argv: &[&str]) -> Exec {
    Exec {
        process: ProcessId(0),
        argv: argv.iter().map(|a| a.as_bytes().to_vec()).collect(),
        env: vec![(b"PATH".to_vec(), b"/usr/bin:/bin".to_vec())],
        cwd: b"/".to_vec(),
        user: User {
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            groups: Vec::new(),
        },
        umask: 0o22,
        rlimits: Vec::new(),
        stdio: ExecStdio::Pipes { stdin: true, stdout: true, stderr: StderrTo::Stream },
    }
}

pub fn sh(script: &str) -> Exec {
    command(&["sh", "-c", script])
}
