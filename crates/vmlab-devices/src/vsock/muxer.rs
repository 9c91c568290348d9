//! All connections of a guest: which packet is for which, and which one has the next packet for the guest.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, socket_with,
};

use super::connection::{Connection, Fate, Ports, State, read};
use super::packet::{HEADER, HOST_CID, Header, MAX_PAYLOAD, Op, STREAM};
use crate::chain::Chain;
use crate::event::Event;

/// The most connections at once, with those that programs of the host have yet to name a port for. Each has a descriptor
/// of this process, and up to [`MAX_BUFFERED`](super::MAX_BUFFERED) bytes.
pub const MAX_CONNECTIONS: usize = 256;

/// The most answers to packets that belong to nothing which wait for the guest; more of them are lost. A guest that
/// sends nonsense without end must not fill this process's memory.
const MAX_ANSWERS: usize = 1024;

/// The most bytes of the line with which a program of the host names a port.
const MAX_LINE: usize = 32;

/// What that line begins with.
const CONNECT: &str = "CONNECT ";

/// Programs that wait to be accepted.
const BACKLOG: i32 = 128;

/// The first port that the host's ends get: far from those that anybody chooses.
const FIRST_PORT: u32 = 1 << 30;

/// Events that are taken at once; what is beyond that comes with the next call.
const EVENTS: usize = 64;

const SOCKET: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Edge-triggered, so that what nobody can do anything about now wakes nobody.
const INTEREST: EventFlags =
    EventFlags::IN.union(EventFlags::OUT).union(EventFlags::RDHUP).union(EventFlags::ET);

/// What events are about: a connection's number, or these.
const LISTENER: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;

type Id = u64;

pub(super) struct Muxer {
    cid: u64,
    /// The listener's path; the others begin with it.
    base: PathBuf,
    epoll: Arc<OwnedFd>,
    wake: Event,
    listener: OwnedFd,
    connections: HashMap<Id, Connection>,
    /// Those that the guest knows.
    known: HashMap<Ports, Id>,
    next_id: Id,
    next_port: u32,
    /// Answers to packets that belong to nothing.
    answers: VecDeque<Header>,
    /// Connections that may have something for the guest, each once, in turn.
    queue: VecDeque<Id>,
    staged: Option<Staged>,
    buffer: Box<[u8]>,
}

/// A packet on its way to the guest. Its data is in the muxer's buffer, and may need several of the guest's.
struct Staged {
    of: Option<Id>,
    header: Header,
    begin: usize,
    end: usize,
}

impl Muxer {
    /// Listens at a path. `epoll` becomes readable when there may be something for the guest, as it does when somebody
    /// signals `wake`.
    pub(super) fn new(cid: u64, base: &Path, epoll: Arc<OwnedFd>, wake: Event) -> io::Result<Self> {
        let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SOCKET, None)?;
        epoll::add(&*epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN | EventFlags::ET)?;
        let interest = EventFlags::IN | EventFlags::ET;
        epoll::add(&*epoll, &listener, EventData::new_u64(LISTENER), interest)?;
        bind(&listener, &SocketAddrUnix::new(base)?)?;
        let muxer = Self {
            cid,
            base: base.to_owned(),
            epoll,
            wake,
            listener,
            connections: HashMap::new(),
            known: HashMap::new(),
            next_id: 0,
            next_port: FIRST_PORT,
            answers: VecDeque::new(),
            queue: VecDeque::new(),
            staged: None,
            buffer: vec![0; MAX_PAYLOAD].into(),
        };
        listen(&muxer.listener, BACKLOG)?;
        Ok(muxer)
    }

    /// Ends all connections.
    pub(super) fn reset(&mut self) {
        self.connections.clear();
        self.known.clear();
        self.answers.clear();
        self.queue.clear();
        self.staged = None;
    }

    /// How many connections there are.
    pub(super) fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Does what a packet of the guest says. Its data is missing if it is not all there.
    pub(super) fn packet(&mut self, header: &Header, payload: Option<&[u8]>) {
        // There is nobody to be told of it.
        if header.source_cid != self.cid {
            return;
        }
        if header.destination_cid != HOST_CID || header.kind != STREAM {
            return self.answer(header);
        }
        let ports = Ports { host: header.destination_port, guest: header.source_port };
        let op = Op::of(header.op);
        let Some(&id) = self.known.get(&ports) else {
            if op != Some(Op::Request) || !self.connect(ports, header) {
                self.answer(header);
            }
            return;
        };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.credit(header);
        let fate = match (op, payload) {
            (Some(op), Some(payload)) => connection.packet(op, header.flags, payload),
            _ => Fate::Reset,
        };
        match fate {
            Fate::GoesOn => self.enqueue(id),
            Fate::Closed => self.close(id),
            Fate::Reset => {
                self.close(id);
                self.answer(header);
            }
            Fate::Finished => {
                self.linger(id);
                self.answer(header);
            }
        }
    }

    /// Answers a packet that belongs to nothing.
    fn answer(&mut self, header: &Header) {
        // Two that answer each other would never end.
        if header.op != Op::Reset as u16 && self.answers.len() < MAX_ANSWERS {
            self.answers.push_back(header.reset());
        }
    }

    /// Connects the guest to a program. False if there is none.
    fn connect(&mut self, ports: Ports, header: &Header) -> bool {
        let mut path = self.base.clone().into_os_string();
        path.push(format!("_{}", ports.host));
        let connected = || {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SOCKET, None)?;
            connect(&socket, &SocketAddrUnix::new(path.as_bytes())?)?;
            Ok::<_, rustix::io::Errno>(socket)
        };
        if self.connections.len() >= MAX_CONNECTIONS {
            return false;
        }
        let Ok(socket) = connected() else { return false };
        let mut connection = Connection::new(socket, State::Open, ports);
        connection.credit(header);
        connection.first = Some(Op::Response);
        let Some(id) = self.add(connection) else { return false };
        self.known.insert(ports, id);
        self.enqueue(id);
        true
    }

    fn add(&mut self, connection: Connection) -> Option<Id> {
        let id = self.next_id;
        self.next_id += 1;
        epoll::add(&*self.epoll, &connection.socket, EventData::new_u64(id), INTEREST).ok()?;
        self.connections.insert(id, connection);
        Some(id)
    }

    fn close(&mut self, id: Id) {
        let Some(connection) = self.connections.remove(&id) else { return };
        // One that lingers has a name that may be another one's by now, and one that greets has none.
        if self.known.get(&connection.ports) == Some(&id) {
            self.known.remove(&connection.ports);
        }
        if self.staged.as_ref().is_some_and(|staged| staged.of == Some(id)) {
            self.staged = None;
        }
    }

    /// Closes a connection once the program has what waits for it.
    fn linger(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.is_flushed() {
            return self.close(id);
        }
        connection.state = State::Lingering;
        self.known.remove(&connection.ports);
        if self.staged.as_ref().is_some_and(|staged| staged.of == Some(id)) {
            self.staged = None;
        }
    }

    fn enqueue(&mut self, id: Id) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !std::mem::replace(&mut connection.queued, true)
        {
            self.queue.push_back(id);
        }
    }

    /// Whether there may be something for the guest already.
    pub(super) fn has_work(&self) -> bool {
        self.staged.is_some() || !self.answers.is_empty() || !self.queue.is_empty()
    }

    /// Finds the next packet for the guest, after it has seen to the host's sockets. False if there is none.
    pub(super) fn stage(&mut self) -> bool {
        if self.staged.is_some() {
            return true;
        }
        self.poll();
        if let Some(header) = self.answers.pop_front() {
            self.staged = Some(Staged { of: None, header, begin: 0, end: 0 });
            return true;
        }
        while let Some(id) = self.queue.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.queued = false;
            let Some((op, flags, end)) = connection.next(&mut self.buffer) else { continue };
            let header = Header {
                source_cid: HOST_CID,
                destination_cid: self.cid,
                source_port: connection.ports.host,
                destination_port: connection.ports.guest,
                kind: STREAM,
                op: op as u16,
                flags,
                ..Header::default()
            };
            self.staged = Some(Staged { of: Some(id), header, begin: 0, end });
            self.enqueue(id);
            return true;
        }
        false
    }

    /// Writes the packet that was found to a buffer of the guest, or as much of it as there is room for. Returns how
    /// many bytes that is: none, if it has no room for any.
    pub(super) fn give(&mut self, chain: &mut Chain<'_>) -> usize {
        let Some(staged) = &mut self.staged else { return 0 };
        let left = staged.end - staged.begin;
        let Some(room) = chain.writable().checked_sub(HEADER) else { return 0 };
        let length = left.min(room);
        if length == 0 && left > 0 {
            return 0;
        }
        staged.header.length = length as u32;
        if let Some(connection) = staged.of.and_then(|id| self.connections.get_mut(&id)) {
            connection.stamp(&mut staged.header);
        }
        let data = &self.buffer[staged.begin..staged.begin + length];
        let written = chain.write(0, &staged.header.bytes()) + chain.write(HEADER, data);
        staged.begin += length;
        if staged.begin == staged.end {
            self.staged = None;
        }
        written
    }

    /// Sees to the host's sockets.
    fn poll(&mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        let at_once = Timespec::default();
        let spare = rustix::buffer::spare_capacity(&mut events);
        // It fails only where a signal comes at that time, and the events stay then.
        if epoll::wait(&*self.epoll, spare, Some(&at_once)).is_err() {
            return;
        }
        for event in events {
            match event.data.u64() {
                WAKE => self.wake.clear(),
                LISTENER => self.accept(),
                id => self.ready(id, event.flags),
            }
        }
    }

    fn ready(&mut self, id: Id, flags: EventFlags) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.ready(flags);
        match connection.state {
            State::Open => self.enqueue(id),
            State::Greeting => self.greet(id),
            State::Lingering if connection.is_flushed() => self.close(id),
            State::Lingering => {}
            // The program has given up.
            State::Connecting if connection.hung_up() => {
                let Ports { host, guest } = connection.ports;
                let answered = Header {
                    source_cid: self.cid,
                    destination_cid: HOST_CID,
                    source_port: guest,
                    destination_port: host,
                    kind: STREAM,
                    ..Header::default()
                };
                self.close(id);
                self.answer(&answered);
            }
            State::Connecting => {}
        }
    }

    /// Accepts programs of the host. Beyond the limit, they see the end at once.
    fn accept(&mut self) {
        while let Ok(socket) = accept_with(self.listener.as_fd(), SOCKET) {
            if self.connections.len() < MAX_CONNECTIONS {
                let nowhere = Ports { host: 0, guest: 0 };
                // It comes with an event, since it can be written to.
                self.add(Connection::new(socket, State::Greeting, nowhere));
            }
        }
    }

    /// Reads which port a program wants, once it has said so, and asks the guest.
    fn greet(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let mut line = [0; MAX_LINE];
        // What is behind the line is for the guest.
        let there = match read(&connection.socket, &mut line, RecvFlags::PEEK) {
            Ok(length) if length > 0 => &line[..length],
            Err(rustix::io::Errno::AGAIN) => return,
            _ => return self.close(id),
        };
        let Some(end) = there.iter().position(|byte| *byte == b'\n') else {
            // It may go on, unless it is as long as none is.
            if there.len() == MAX_LINE || connection.hung_up() {
                self.close(id);
            }
            return;
        };
        let text = std::str::from_utf8(&there[..end]).unwrap_or_default();
        let port = text.strip_prefix(CONNECT).and_then(|port| port.parse().ok());
        let taken = read(&connection.socket, &mut line[..=end], RecvFlags::empty());
        let (Some(guest), Ok(_)) = (port, taken) else { return self.close(id) };
        let ports = self.free_ports(guest);
        self.known.insert(ports, id);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.ports = ports;
            connection.state = State::Connecting;
            connection.first = Some(Op::Request);
        }
        self.enqueue(id);
    }

    /// Ports that no connection has: there are fewer connections than ports.
    fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            let ports = Ports { host: self.next_port, guest };
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
            if !self.known.contains_key(&ports) {
                return ports;
            }
        }
    }
}

impl Drop for Muxer {
    fn drop(&mut self) {
        // Who removed it before has done this.
        let _ = std::fs::remove_file(&self.base);
    }
}
