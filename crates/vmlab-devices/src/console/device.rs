//! The device: its ports, and the queues that carry their bytes.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use crate::console::control::{self, Control, Kind};
use crate::console::gate::Gate;
use crate::console::stream::{receive, send};
use crate::device::{Device, DeviceStateError, QueueKind};
use crate::queue::{QueueError, Turn, VirtQueue};
use crate::sandbox::{self, Work};
use crate::transfer::may_wait;
use crate::workers::wait_for;

/// The most ports, as of QEMU. Each has two threads.
pub const MAX_PORTS: usize = 31;

/// The most bytes of a port's name, far less than a driver's buffer for a message, which is a page.
pub const MAX_NAME: usize = 128;

/// The size of every ring, as of QEMU. A Linux guest keeps a page for each of a port's input: more of them would be
/// memory that it lacks.
const RING: u16 = 128;

/// The features: `VIRTIO_CONSOLE_F_*` of `linux/virtio_console.h`.
const F_SIZE: u64 = 1;
const F_MULTIPORT: u64 = 1 << 1;

/// The most bytes of a saved state that are looked at. Each port takes up to ten.
const MAX_STATE: usize = 16 * (1 + MAX_PORTS);

/// A port.
#[derive(Debug, Default)]
pub struct Port {
    name: Option<String>,
    console: bool,
    stream: Option<UnixStream>,
}

impl Port {
    /// A port that programs of the guest find by its name: `/dev/virtio-ports/NAME`.
    pub fn channel(name: impl Into<String>) -> Self {
        Self { name: Some(name.into()), ..Self::default() }
    }

    /// A terminal of the guest: `/dev/hvcN`.
    pub fn console() -> Self {
        Self { console: true, ..Self::default() }
    }

    /// Where its bytes come from and go to. Without this, they go nowhere.
    #[must_use]
    pub fn with_stream(self, stream: UnixStream) -> Self {
        Self { stream: Some(stream), ..self }
    }
}

/// A virtio-console device.
///
/// What the guest sends to a port waits there until the host takes it, and the other way round; neither stops another
/// port. When the host closes its end, the guest is told, and what it sends is discarded.
pub struct Console {
    ports: Vec<Ends>,
    control: Mutex<Control>,
    /// Open as long as there is something to tell.
    news: Gate,
    sandbox: bool,
}

struct Ends {
    stream: Option<UnixStream>,
    /// Open as long as the guest takes bytes, and the host sends some.
    input: Gate,
    /// How much of the first request in the queue of output has been sent.
    sent: Mutex<Sent>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Sent {
    head: u16,
    bytes: u32,
}

#[derive(Serialize, Deserialize)]
struct State {
    control: control::State,
    sent: Vec<Sent>,
}

/// What a queue is for.
enum Role {
    Input(usize),
    Output(usize),
    Tell,
    Hear,
}

impl Role {
    /// Virtio 1.2, 5.3.2: the queues for control are behind those of the first port.
    fn of(queue: usize) -> Self {
        match queue {
            2 => Self::Tell,
            3 => Self::Hear,
            _ => {
                let port = (queue / 2).saturating_sub(usize::from(queue > 3));
                if queue.is_multiple_of(2) { Self::Input(port) } else { Self::Output(port) }
            }
        }
    }
}

/// What a thread does after it has looked at a request.
enum Next {
    Request,
    /// There is none.
    Leave,
    Wait,
}

impl Console {
    /// A device with these ports.
    ///
    /// # Errors
    /// There are none or more than [`MAX_PORTS`], a name is empty or longer than [`MAX_NAME`], or there are no more
    /// descriptors.
    pub fn new(ports: Vec<Port>) -> io::Result<Self> {
        let invalid = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        if !(1..=MAX_PORTS).contains(&ports.len()) {
            return invalid("a console device has from 1 to 31 ports");
        }
        let named =
            |port: &Port| port.name.as_ref().is_none_or(|n| (1..=MAX_NAME).contains(&n.len()));
        if !ports.iter().all(named) {
            return invalid("the name of a port has from 1 to 128 bytes");
        }
        let host_open = ports.iter().map(|port| port.stream.is_some()).collect();
        let (mut kinds, mut ends) = (Vec::new(), Vec::new());
        for Port { name, console, stream } in ports {
            kinds.push(Kind { name, console });
            ends.push(Ends { stream, input: Gate::new()?, sent: Mutex::default() });
        }
        let control = Mutex::new(Control::new(kinds, host_open));
        let console = Self { ports: ends, control, news: Gate::new()?, sandbox: true };
        console.change(|_| {});
        Ok(console)
    }

    /// Sets whether its threads keep no rights but those that they need, as they do unless set.
    #[must_use]
    pub fn sandbox(self, sandbox: bool) -> Self {
        Self { sandbox, ..self }
    }

    /// Tells the guest the size of its consoles. (For a driver that knows one port only, the transport has to be told
    /// that the configuration has changed.)
    pub fn resize(&self, columns: u16, rows: u16) {
        self.change(|control| control.resize(columns, rows));
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        lock(&self.control)
    }

    /// Changes what is known of ports, and wakes whoever waits for that.
    fn change<T>(&self, change: impl FnOnce(&mut Control) -> T) -> T {
        let mut control = self.control();
        let result = change(&mut control);
        for (index, port) in self.ports.iter().enumerate() {
            port.input.set(control.flows(index));
        }
        self.news.set(control.has_news());
        result
    }

    /// Host to guest. It returns only when there are no buffers, not when there are no bytes: the guest need not kick
    /// for those that it has already given.
    fn input(&self, index: usize, queue: &VirtQueue) -> Result<(), QueueError> {
        let port = &self.ports[index];
        loop {
            let ready = match self.receive(index, queue)? {
                Next::Request => true,
                Next::Leave => false,
                Next::Wait => match &port.stream {
                    Some(stream) if port.input.is_open() => wait_for(stream.as_fd(), PollFlags::IN),
                    _ => port.input.wait(),
                },
            };
            if !ready {
                return Ok(());
            }
        }
    }

    /// Fills one request. It is taken from the ring only when there are bytes for it.
    fn receive(&self, index: usize, queue: &VirtQueue) -> Result<Next, QueueError> {
        let port = &self.ports[index];
        let memory = queue.memory();
        let Some(mut chain) = queue.peek(&memory)? else { return Ok(Next::Leave) };
        let Some(stream) = port.stream.as_ref().filter(|_| port.input.is_open()) else {
            return Ok(Next::Wait);
        };
        let (received, end) = receive(stream, chain.parts().1);
        let full = received == chain.writable();
        if received > 0 || full {
            queue.finish(&memory, chain.head(), received as u32)?;
        }
        match end {
            Ok(()) if full => Ok(Next::Request),
            Err(error) if may_wait(&error) => Ok(Next::Wait),
            // The end of the stream, or an error, after which nothing comes either.
            _ => {
                self.change(|control| control.host_closed(index));
                Ok(Next::Wait)
            }
        }
    }

    /// Guest to host.
    fn output(&self, index: usize, queue: &VirtQueue) -> Result<(), QueueError> {
        let port = &self.ports[index];
        loop {
            let ready = match (Self::send(port, queue)?, &port.stream) {
                (Next::Request, _) => true,
                (Next::Wait, Some(stream)) => wait_for(stream.as_fd(), PollFlags::OUT),
                (Next::Wait | Next::Leave, _) => false,
            };
            if !ready {
                return Ok(());
            }
        }
    }

    /// Sends one request, or a part of it. It stays in the ring until all of it has been sent, for the queue may be
    /// stopped in between, and another device may go on with the rest.
    fn send(port: &Ends, queue: &VirtQueue) -> Result<Next, QueueError> {
        let memory = queue.memory();
        let Some(mut chain) = queue.peek(&memory)? else { return Ok(Next::Leave) };
        let mut sent = lock(&port.sent);
        // A guest that gives another request in its place has that one sent.
        if sent.head != chain.head() {
            *sent = Sent { head: chain.head(), bytes: 0 };
        }
        if let Some(stream) = &port.stream {
            let (count, end) = send(stream, chain.parts().0, sent.bytes as usize);
            sent.bytes += count as u32;
            if end.is_err_and(|error| may_wait(&error)) {
                return Ok(Next::Wait);
            }
            // After another error, nobody will ever read it.
        }
        *sent = Sent::default();
        queue.finish(&memory, chain.head(), 0)?;
        Ok(Next::Request)
    }

    /// Device to driver.
    fn tell(&self, queue: &VirtQueue) -> Result<(), QueueError> {
        loop {
            {
                let memory = queue.memory();
                let Some(mut chain) = queue.peek(&memory)? else { return Ok(()) };
                let fits = chain.writable() >= control::HEADER;
                let message = if fits { self.change(Control::tell) } else { Some(Vec::new()) };
                if let Some(message) = message {
                    let written = chain.write(0, &message);
                    queue.finish(&memory, chain.head(), written as u32)?;
                    continue;
                }
            }
            if !self.news.wait() {
                return Ok(());
            }
        }
    }

    /// Driver to device.
    fn hear(&self, queue: &VirtQueue) -> Result<(), QueueError> {
        loop {
            let memory = queue.memory();
            let Some(chain) = queue.pop(&memory)? else { return Ok(()) };
            let mut message = [0; control::HEADER];
            if chain.read(0, &mut message) == message.len() {
                self.change(|control| control.hear(message));
            }
            queue.complete(&memory, chain.head(), 0)?;
        }
    }

    fn decode(&self, state: &[u8]) -> Result<State, DeviceStateError> {
        let error = |reason| DeviceStateError { device: self.id(), reason };
        if state.len() > MAX_STATE {
            return Err(error("it is too long"));
        }
        let state: State = postcard::from_bytes(state).map_err(|_| error("it is none"))?;
        let ports = self.ports.len();
        if state.sent.len() == ports && state.control.fits(ports) {
            Ok(state)
        } else {
            Err(error("it is that of a device with other ports"))
        }
    }
}

impl Device for Console {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queues(&self) -> Vec<QueueKind> {
        vec![QueueKind { max_size: RING, workers: 1 }; 2 * (self.ports.len() + 1)]
    }

    fn features(&self) -> u64 {
        F_SIZE | F_MULTIPORT
    }

    /// `struct virtio_console_config`, without the field of a feature that is not offered.
    fn config(&self) -> Vec<u8> {
        let (columns, rows) = self.control().size().unwrap_or_default();
        let ports = self.ports.len() as u32;
        [&columns.to_le_bytes()[..], &rows.to_le_bytes(), &ports.to_le_bytes()].concat()
    }

    fn provides_config(&self) -> bool {
        true
    }

    fn prepare_thread(&self) -> io::Result<()> {
        if self.sandbox { sandbox::enter(Work::Streams) } else { Ok(()) }
    }

    fn process(&self, index: usize, queue: &VirtQueue, _: &mut Turn<'_>) -> Result<(), QueueError> {
        match Role::of(index) {
            Role::Tell => self.tell(queue),
            Role::Hear => self.hear(queue),
            Role::Input(port) => self.input(port, queue),
            Role::Output(port) => self.output(port, queue),
        }
    }

    fn reset(&self) {
        self.change(Control::reset);
        for port in &self.ports {
            *lock(&port.sent) = Sent::default();
        }
    }

    /// A request of output that has been sent in part goes on with the rest: what was sent is with the host. Bytes of
    /// the host that the guest has not taken are the host's to keep.
    fn save(&self) -> Vec<u8> {
        let control = self.control().state().clone();
        let sent = self.ports.iter().map(|port| *lock(&port.sent)).collect();
        // Into memory, of plain data: it does not fail.
        postcard::to_stdvec(&State { control, sent }).unwrap_or_default()
    }

    fn check(&self, state: &[u8]) -> Result<(), DeviceStateError> {
        self.decode(state).map(|_| ())
    }

    fn restore(&self, state: &[u8]) -> Result<(), DeviceStateError> {
        let State { control, sent } = self.decode(state)?;
        for (port, sent) in self.ports.iter().zip(sent) {
            *lock(&port.sent) = sent;
        }
        self.change(|own| own.restore(control));
        Ok(())
    }
}

/// Locks what no panic leaves half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
