//! The switch: its ports and the thread that carries frames between them.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use super::frame::{Addresses, MAX_FRAME, MacAddress};
use super::table::{PortId, Table};
use crate::event::Event;

/// How much waits for a port whose guest does not fetch it, in bytes; what comes when it is full is lost. It is
/// what fast switches have for a port, and lets TCP fill a link without a loss.
pub const MAX_QUEUED: usize = 1024 * 1024;

/// What the kernel is asked to hold for a socket, in bytes. It may allow less, but never less than one frame.
const SOCKET_BUFFER: usize = 1024 * 1024;

/// Frames that a socket's buffer may hold: beyond that, a guest sends faster than they are read.
const MAX_PENDING: usize = SOCKET_BUFFER / 64;

/// Frames that are taken from a port before the others have their turn.
const BURST: usize = 64;

/// How long the thread waits where the kernel has no memory for it to poll with.
const RETRY: Duration = Duration::from_millis(10);

/// An Ethernet switch. It goes on until it and all of its ports are dropped, and the last drop waits for its thread.
#[derive(Debug, Clone)]
pub struct Switch {
    worker: Arc<Worker>,
}

/// A place of a switch. Dropping it takes it away, with all that is still on its way there.
#[derive(Debug)]
pub struct Port {
    id: PortId,
    worker: Arc<Worker>,
}

/// What became of frames at a port, since it is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames that came from its guest, and were carried on.
    pub received: u64,
    /// Frames that went to its guest.
    pub sent: u64,
    /// Frames of its guest that were none, that had another port's own address as their source, or that came while
    /// the port was cut off.
    pub refused: u64,
    /// Frames for its guest that were lost: its queue was full, or they came from another side.
    pub lost: u64,
}

/// What stops the thread with the last user of a switch.
#[derive(Debug)]
struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Wakes the thread up when there are other ports than those that it waits for.
    changed: Event,
}

#[derive(Debug, Default)]
struct State {
    ports: BTreeMap<PortId, Attached>,
    table: Table,
    next: PortId,
    ended: bool,
}

#[derive(Debug)]
struct Attached {
    socket: Arc<OwnedFd>,
    /// The side that it is on; none if it is cut off.
    side: Option<u32>,
    /// The other end is gone.
    broken: bool,
    /// Frames that wait, and from whom they are.
    queue: VecDeque<(PortId, Arc<[u8]>)>,
    queued: usize,
    counters: Counters,
}

impl Switch {
    /// A switch without ports.
    ///
    /// # Errors
    /// No more descriptors or threads.
    pub fn new() -> io::Result<Self> {
        let changed = Event::new()?;
        let shared = Arc::new(Shared { state: Mutex::default(), changed });
        let thread = std::thread::Builder::new().name("vmlab-switch".to_owned());
        let thread = thread.spawn({
            let shared = Arc::clone(&shared);
            move || shared.run()
        })?;
        Ok(Self { worker: Arc::new(Worker { shared, thread: Some(thread) }) })
    }

    /// Adds a port for an interface with this address, which no other port can send from, on a side as of
    /// [`arrange`](Self::arrange). The second value is the device's end of the port's socket: each datagram is a frame.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn port(&self, address: MacAddress, side: Option<u32>) -> io::Result<(Port, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, device) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        for socket in [&ours, &device] {
            set_socket_send_buffer_size(socket, SOCKET_BUFFER)?;
            set_socket_recv_buffer_size(socket, SOCKET_BUFFER)?;
        }
        let mut state = self.worker.shared.lock();
        let id = state.next;
        state.next += 1;
        state.table.own(address, id);
        state.ports.insert(
            id,
            Attached {
                socket: Arc::new(ours),
                side,
                broken: false,
                queue: VecDeque::new(),
                queued: 0,
                counters: Counters::default(),
            },
        );
        drop(state);
        self.worker.shared.wake();
        Ok((Port { id, worker: Arc::clone(&self.worker) }, device))
    }

    /// Puts ports on other sides of the switch, all at once. Frames pass only between ports of the same side; a port on
    /// none is cut off. What was sent before goes as it would have gone before, unless it still waits for its guest.
    /// Nothing passes between two sides once this has returned.
    pub fn arrange<'a>(&self, sides: impl IntoIterator<Item = (&'a Port, Option<u32>)>) {
        let mut state = self.worker.shared.lock();
        state.carry_all();
        for (port, side) in sides {
            if let Some(port) = state.ports.get_mut(&port.id) {
                port.side = side;
            }
        }
        state.lose_across();
        drop(state);
        // Some may wait for room now.
        self.worker.shared.wake();
    }
}

impl Port {
    /// What became of its frames.
    pub fn counters(&self) -> Counters {
        let state = self.worker.shared.lock();
        state.ports.get(&self.id).map(|port| port.counters).unwrap_or_default()
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        let mut state = self.worker.shared.lock();
        state.ports.remove(&self.id);
        state.table.forget(self.id);
        drop(state);
        self.worker.shared.wake();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        self.changed.signal();
    }

    fn run(&self) {
        // One byte more than a frame, to tell longer ones.
        let mut buffer = vec![0; MAX_FRAME + 1];
        while let Some(waits) = self.waits() {
            let ready = self.poll(&waits);
            // The sockets of ports that were taken away meanwhile close now.
            drop(waits);
            for (id, flags) in ready {
                self.lock().serve(id, flags, &mut buffer);
            }
        }
    }

    /// What to wait for; `None` when all is over.
    fn waits(&self) -> Option<Vec<(PortId, Arc<OwnedFd>, PollFlags)>> {
        let state = self.lock();
        let live = state.ports.iter().filter(|(_, port)| !port.broken);
        let waits = live.map(|(&id, port)| {
            let room = if port.queue.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            (id, Arc::clone(&port.socket), PollFlags::IN | room)
        });
        (!state.ended).then(|| waits.collect())
    }

    /// Waits for frames, room or other ports.
    fn poll(&self, waits: &[(PortId, Arc<OwnedFd>, PollFlags)]) -> Vec<(PortId, PollFlags)> {
        let mut fds = vec![PollFd::new(&self.changed, PollFlags::IN)];
        fds.extend(waits.iter().map(|(_, socket, flags)| PollFd::new(&**socket, *flags)));
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return Vec::new(),
            Err(_) => {
                std::thread::sleep(RETRY);
                return Vec::new();
            }
        }
        if !fds[0].revents().is_empty() {
            self.changed.clear();
        }
        let found = waits.iter().zip(&fds[1..]).map(|((id, ..), fd)| (*id, fd.revents()));
        found.filter(|(_, flags)| !flags.is_empty()).collect()
    }
}

/// What a socket gave.
enum Taken {
    Frame(usize),
    Nothing,
    Broken,
}

fn take(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Taken {
    loop {
        return match recv(socket, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((length, _)) => Taken::Frame(length),
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => Taken::Nothing,
            Err(_) => Taken::Broken,
        };
    }
}

impl State {
    /// Does what can be done for a port that is ready for it.
    fn serve(&mut self, id: PortId, flags: PollFlags, buffer: &mut [u8]) {
        let Some(port) = self.ports.get_mut(&id) else { return };
        if flags.contains(PollFlags::OUT) {
            port.flush();
        }
        let socket = Arc::clone(&port.socket);
        for _ in 0..BURST {
            match take(socket.as_fd(), buffer) {
                Taken::Frame(length) => self.carry(id, &buffer[..length]),
                Taken::Nothing => break,
                Taken::Broken => return self.broken(id),
            }
        }
        if flags.intersects(PollFlags::HUP | PollFlags::NVAL) {
            self.broken(id);
        }
    }

    fn broken(&mut self, id: PortId) {
        if let Some(port) = self.ports.get_mut(&id) {
            port.broken = true;
            port.discard();
        }
    }

    /// Carries a frame of a guest to whom it is for.
    fn carry(&mut self, from: PortId, frame: &[u8]) {
        let Some(port) = self.ports.get_mut(&from) else { return };
        let addresses = port.side.and_then(|_| Addresses::of(frame));
        let Some(addresses) = addresses.filter(|known| self.table.learn(known.source, from)) else {
            port.counters.refused += 1;
            return;
        };
        let sender = (from, port.side);
        port.counters.received += 1;
        let mut kept = None;
        let group = addresses.destination.is_group();
        match self.table.port(addresses.destination).filter(|_| !group) {
            Some(to) if to == from => {}
            Some(to) => {
                if let Some(port) = self.ports.get_mut(&to) {
                    port.send(sender, frame, &mut kept);
                }
            }
            None => {
                for (_, port) in self.ports.iter_mut().filter(|(id, _)| **id != from) {
                    port.send(sender, frame, &mut kept);
                }
            }
        }
    }
}

impl State {
    /// Carries what guests have sent so far, or as much of it as was there at a time.
    fn carry_all(&mut self) {
        let mut buffer = vec![0; MAX_FRAME + 1];
        let sockets = self.ports.iter().map(|(&id, port)| (id, Arc::clone(&port.socket)));
        for (id, socket) in sockets.collect::<Vec<_>>() {
            for _ in 0..MAX_PENDING {
                match take(socket.as_fd(), &mut buffer) {
                    Taken::Frame(length) => self.carry(id, &buffer[..length]),
                    Taken::Nothing | Taken::Broken => break,
                }
            }
        }
    }

    /// Loses what waits for a port and came from another side than it is on now.
    fn lose_across(&mut self) {
        let sides: BTreeMap<_, _> = self.ports.iter().map(|(&id, port)| (id, port.side)).collect();
        for port in self.ports.values_mut() {
            let side = port.side;
            let before = port.queue.len();
            let passes =
                |from: &PortId| side.is_some() && sides.get(from).is_none_or(|from| *from == side);
            port.queue.retain(|(from, _)| passes(from));
            port.counters.lost += (before - port.queue.len()) as u64;
            port.queued = port.queue.iter().map(|(_, frame)| frame.len()).sum();
        }
    }
}

/// What became of a frame that was to be sent at once.
enum Sent {
    Gone,
    Lost,
    NoRoom,
}

impl Attached {
    /// Sends a frame, or keeps it until there is room. `kept` is the frame in memory, once for all ports.
    fn send(
        &mut self,
        (from, side): (PortId, Option<u32>),
        frame: &[u8],
        kept: &mut Option<Arc<[u8]>>,
    ) {
        if self.side != side || self.broken {
            self.counters.lost += 1;
            return;
        }
        let sent = if self.queue.is_empty() { self.send_now(frame) } else { Sent::NoRoom };
        match sent {
            Sent::Gone => self.counters.sent += 1,
            Sent::NoRoom if self.queued + frame.len() <= MAX_QUEUED => {
                let kept = kept.get_or_insert_with(|| frame.into());
                self.queue.push_back((from, Arc::clone(kept)));
                self.queued += frame.len();
            }
            Sent::NoRoom | Sent::Lost => self.counters.lost += 1,
        }
    }

    fn send_now(&self, frame: &[u8]) -> Sent {
        loop {
            return match send(&self.socket, frame, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) => Sent::Gone,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Sent::NoRoom,
                Err(_) => Sent::Lost,
            };
        }
    }

    /// Sends what waits, as far as there is room.
    fn flush(&mut self) {
        while let Some((_, frame)) = self.queue.front().cloned() {
            match self.send_now(&frame) {
                Sent::NoRoom => return,
                Sent::Gone => self.counters.sent += 1,
                Sent::Lost => self.counters.lost += 1,
            }
            self.queue.pop_front();
            self.queued -= frame.len();
        }
    }

    /// Loses what waits for the guest.
    fn discard(&mut self) {
        self.counters.lost += self.queue.len() as u64;
        self.queue.clear();
        self.queued = 0;
    }
}

#[cfg(test)]
mod tests;
