//! A serial line, as PCs have it: a 16550 between the guest and a socket.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::SendFlags;
use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState, Trigger};

use vmlab_devices::Event;

/// Interrupts the guest.
struct Interrupt(Arc<dyn vmlab_devices::Interrupt>);

impl Trigger for Interrupt {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.signal();
        Ok(())
    }
}

/// Wakes the thread that has input for a guest which has taken all that it had.
#[derive(Debug)]
struct Emptied(Arc<Event>);

impl SerialEvents for Emptied {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.signal();
    }
}

/// The most bytes that are kept of what the host does not read. A processor waits for the host unless it is to stop, and
/// then it is done with its instruction after a thousand bytes, and there are 255 processors at most.
const MOST_UNSENT: usize = 1 << 20;

/// What the guest says. A host that has closed its end is told no more, and the guest does not notice.
#[derive(Debug)]
struct Output {
    socket: UnixStream,
    /// Readable as long as the processors are to stop, so that none waits for the host.
    awaited: Event,
    /// What the host had no room for then. It goes before all else.
    unsent: Vec<u8>,
    /// Tells the thread of the line that there is some.
    left: Arc<Event>,
}

impl Output {
    /// Sends what the host has room for.
    fn send(&mut self) {
        while !self.unsent.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, &self.unsent, flags) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.unsent.clear(),
            }
        }
    }

    /// Waits until the host has room. False when the processors are to stop.
    fn wait(&self) -> bool {
        let mut fds =
            [PollFd::new(&self.socket, PollFlags::OUT), PollFd::new(&self.awaited, PollFlags::IN)];
        loop {
            match poll(&mut fds, None) {
                Ok(_) => return fds[1].revents().is_empty(),
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = MOST_UNSENT.saturating_sub(self.unsent.len());
        self.unsent.extend(bytes.iter().take(room));
        self.send();
        while !self.unsent.is_empty() {
            if !self.wait() {
                self.left.signal();
                break;
            }
            self.send();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Device = Serial<Interrupt, Emptied, Output>;

/// A line and the thread that has its input, and the output that no processor waits for.
pub(super) struct Line {
    shared: Arc<Shared>,
    socket: UnixStream,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    device: Mutex<Device>,
    emptied: Arc<Event>,
    left: Arc<Event>,
    /// Readable for good once the thread is to end.
    stop: Event,
}

/// The registers of a line.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct LineState {
    registers: [u8; 9],
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Line {
    /// A line that goes on with a state, or begins as after power-on. A processor that writes to it waits for a host
    /// that does not read, but not while `awaited` is readable.
    ///
    /// # Errors
    /// There are no more threads or descriptors, or the state has more input or output than there can be.
    pub(super) fn new(
        socket: UnixStream,
        interrupt: Arc<dyn vmlab_devices::Interrupt>,
        awaited: Event,
        state: Option<&LineState>,
    ) -> io::Result<Self> {
        let (emptied, left) = (Arc::new(Event::new()?), Arc::new(Event::new()?));
        let (input, socket_again) = (socket.try_clone()?, socket.try_clone()?);
        let unsent = state.map(|state| state.output.clone()).unwrap_or_default();
        if unsent.len() > MOST_UNSENT {
            return Err(io::Error::other("it has more output than there can be"));
        }
        let output = Output { socket, awaited, unsent, left: Arc::clone(&left) };
        let state = state.map_or_else(SerialState::default, LineState::to_device);
        let (interrupt, events) = (Interrupt(interrupt), Emptied(Arc::clone(&emptied)));
        let device = Serial::from_state(&state, interrupt, events, output);
        let device = device.map_err(|error| io::Error::other(format!("{error:?}")))?;
        let device = Mutex::new(device);
        let shared = Arc::new(Shared { device, emptied, left, stop: Event::new()? });
        let thread = {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name("serial".into()).spawn(move || shared.serve(input))?
        };
        Ok(Self { shared, socket: socket_again, thread: Mutex::new(Some(thread)) })
    }

    /// What the guest reads from a register.
    pub(super) fn read(&self, register: u8) -> u8 {
        self.shared.device().read(register)
    }

    /// What the guest writes to a register.
    pub(super) fn write(&self, register: u8, value: u8) {
        // There is nothing that could fail: see `Output` and `Interrupt`. A full input in loop mode is the guest's.
        let _ = self.shared.device().write(register, value);
    }

    /// Interrupts the guest, in case that it was interrupted before and has not seen it. One too many does no harm.
    pub(super) fn raise(&self) {
        // It cannot fail.
        let Ok(()) = self.shared.device().interrupt_evt().trigger();
    }

    /// Takes no more input, and sends nothing but what processors still write.
    pub(super) fn quiesce(&self) {
        self.shared.stop.signal();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    /// Ends the connection.
    pub(super) fn hang_up(&self) {
        // It fails where the host has done so already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Its registers.
    pub(super) fn state(&self) -> LineState {
        let device = self.shared.device();
        LineState::of_device(&device.state(), &device.writer().unsent)
    }
}

impl Shared {
    fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest what the host writes, as fast as the guest takes it, and the host what it did not take before.
    fn serve(&self, mut socket: UnixStream) {
        let mut buffer = [0; 64];
        let mut input_ended = false;
        loop {
            let (room, unsent) = {
                let device = self.device();
                let room = device.fifo_capacity().min(buffer.len());
                (room, !device.writer().unsent.is_empty())
            };
            let source = match room {
                _ if input_ended => self.stop.as_fd(),
                0 => self.emptied.as_fd(),
                _ => socket.as_fd(),
            };
            let mut fds = [
                PollFd::from_borrowed_fd(source, PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
                match unsent {
                    true => PollFd::new(&socket, PollFlags::OUT),
                    false => PollFd::new(&self.left, PollFlags::IN),
                },
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
            if !fds[1].revents().is_empty() {
                return;
            }
            if !fds[2].revents().is_empty() {
                self.left.clear();
                self.device().writer_mut().send();
            }
            if fds[0].revents().is_empty() {
                continue;
            }
            if room == 0 {
                self.emptied.clear();
                continue;
            }
            match socket.read(&mut buffer[..room]) {
                Ok(0) => input_ended = true,
                Ok(count) => {
                    // There is room for all of it, as nobody else puts anything there but the guest itself in its
                    // loop mode.
                    let _ = self.device().enqueue_raw_bytes(&buffer[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => input_ended = true,
            }
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.quiesce();
    }
}

impl LineState {
    fn of_device(state: &SerialState, unsent: &[u8]) -> Self {
        Self {
            registers: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            input: state.in_buffer.clone(),
            output: unsent.to_vec(),
        }
    }

    fn to_device(&self) -> SerialState {
        let [low, high, enable, identification, control, status, modem, modem_status, scratch] =
            self.registers;
        SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: control,
            line_status: status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: self.input.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// Registers and bits of a 16550.
    const DATA: u8 = 0;
    const INTERRUPT_ENABLE: u8 = 1;
    const LINE_STATUS: u8 = 5;
    const SCRATCH: u8 = 7;
    const DATA_READY: u8 = 1;

    fn line(state: Option<&LineState>) -> (Line, UnixStream, Arc<Event>) {
        let (line, host, interrupt, _) = line_to_leave(state);
        (line, host, interrupt)
    }

    /// The last of them says that processors are to stop.
    fn line_to_leave(state: Option<&LineState>) -> (Line, UnixStream, Arc<Event>, Event) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let interrupt = Arc::new(Event::new().unwrap());
        let awaited = Event::new().unwrap();
        let ours_to_say = awaited.try_clone().unwrap();
        let line = Line::new(theirs, interrupt.clone(), awaited, state).unwrap();
        (line, ours, interrupt, ours_to_say)
    }

    fn readable(event: &Event) -> bool {
        let mut fds = [PollFd::new(event, PollFlags::IN)];
        let timeout = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        poll(&mut fds, Some(&timeout)).unwrap() == 1
    }

    #[test]
    fn output_goes_to_the_host_byte_by_byte() {
        let (line, mut host, _) = line(None);
        b"hello".iter().for_each(|byte| line.write(DATA, *byte));
        let mut bytes = [0; 5];
        host.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
        // Nobody listens any more, and the guest goes on.
        drop(host);
        b"more".iter().for_each(|byte| line.write(DATA, *byte));
    }

    #[test]
    fn all_input_comes_with_interrupts_however_slowly_the_guest_reads() {
        let (line, mut host, interrupt) = line(None);
        line.write(INTERRUPT_ENABLE, 1);
        let sent: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
        let all = sent.clone();
        let writer = thread::spawn(move || host.write_all(&all).map(|()| host));
        let mut found = Vec::new();
        while found.len() < sent.len() {
            assert!(readable(&interrupt), "no interrupt after {} bytes", found.len());
            interrupt.clear();
            while line.read(LINE_STATUS) & DATA_READY != 0 {
                found.push(line.read(DATA));
            }
        }
        assert_eq!(found, sent);
        writer.join().unwrap().unwrap();
    }

    #[test]
    fn a_host_that_does_not_read_can_be_hung_up_on() {
        let (line, host, _) = line(None);
        thread::scope(|scope| {
            let writer = scope.spawn(|| (0..10_000_000).for_each(|_| line.write(DATA, b'x')));
            thread::sleep(Duration::from_millis(50));
            assert!(!writer.is_finished(), "the socket takes everything");
            line.hang_up();
        });
        drop(host);
    }

    /// Writes numbers until it is to stop while the host has no room, and returns how many.
    fn fill(line: &Line, awaited: &Event) -> u32 {
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let stopped = || {
                    let mut fds = [PollFd::new(awaited, PollFlags::IN)];
                    poll(&mut fds, Some(&rustix::event::Timespec::default())).unwrap() == 1
                };
                (1..).find(|count| {
                    line.write(DATA, *count as u8);
                    stopped()
                })
            });
            thread::sleep(Duration::from_millis(50));
            assert!(!writer.is_finished());
            awaited.signal();
            let signalled = Instant::now();
            let count = writer.join().unwrap().unwrap();
            assert!(signalled.elapsed() < Duration::from_secs(1), "{:?}", signalled.elapsed());
            count
        })
    }

    fn read_numbers(host: &mut UnixStream, count: u32) {
        let mut found = vec![0; count as usize];
        host.read_exact(&mut found).unwrap();
        assert!(found.iter().copied().eq((1..=count).map(|n| n as u8)));
    }

    #[test]
    fn a_processor_that_is_to_stop_waits_for_no_host_and_nothing_is_lost() {
        let (line, mut host, _, awaited) = line_to_leave(None);
        let count = fill(&line, &awaited);
        // Another one is not kept, either.
        line.write(DATA, (count + 1) as u8);
        // The thread of the line has the rest, though no processor writes any more, and though nothing more comes in.
        host.shutdown(Shutdown::Write).unwrap();
        read_numbers(&mut host, count + 1);
        awaited.clear();
        line.write(DATA, b'a');
        let mut more = [0];
        host.read_exact(&mut more).unwrap();
        assert_eq!(more, *b"a");
    }

    #[test]
    fn what_the_host_did_not_take_goes_on_with_the_line() {
        let (line, mut host, _, awaited) = line_to_leave(None);
        let count = fill(&line, &awaited);
        line.quiesce();
        let state = line.state();
        drop(line);
        assert!(!state.output.is_empty());
        let (after, mut new_host, _) = self::line(Some(&state));
        let before = count - state.output.len() as u32;
        read_numbers(&mut host, before);
        let mut rest = vec![0; state.output.len()];
        new_host.read_exact(&mut rest).unwrap();
        assert_eq!(rest, state.output);
        assert_eq!(rest.last(), Some(&(count as u8)));
        assert!(after.state().output.is_empty());
        let too_much = LineState { output: vec![0; MOST_UNSENT + 1], ..state };
        let (_, socket) = UnixStream::pair().unwrap();
        let event = || Event::new().unwrap();
        assert!(Line::new(socket, Arc::new(event()), event(), Some(&too_much)).is_err());
    }

    #[test]
    fn a_line_goes_on_with_its_registers_and_input() {
        let (before, mut host, _) = line(None);
        before.write(SCRATCH, 0x5a);
        host.write_all(b"ab").unwrap();
        while before.state().input.len() < 2 {
            thread::yield_now();
        }
        let state = before.state();
        drop(before);
        let (after, _host, interrupt) = line(Some(&state));
        interrupt.clear();
        after.raise();
        assert!(readable(&interrupt));
        assert_eq!(after.read(SCRATCH), 0x5a);
        assert_eq!([after.read(DATA), after.read(DATA)], *b"ab");
        let too_much = LineState { input: vec![0; 1000], ..state };
        let (_, socket) = UnixStream::pair().unwrap();
        let event = || Event::new().unwrap();
        assert!(Line::new(socket, Arc::new(event()), event(), Some(&too_much)).is_err());
    }
}
