//! A serial line, as PCs have it: a 16550 between the guest and a socket.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState, Trigger};

use vmlab_devices::Event;

/// Interrupts the guest.
#[derive(Debug)]
struct Interrupt(Arc<Event>);

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

/// A host that has closed its end is told no more, and the guest does not notice.
#[derive(Debug)]
struct Output(UnixStream);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Device = Serial<Interrupt, Emptied, Output>;

/// A line and the thread that has its input.
pub(super) struct Line {
    shared: Arc<Shared>,
    socket: UnixStream,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    device: Mutex<Device>,
    emptied: Arc<Event>,
    /// Readable for good once the thread is to end.
    stop: Event,
}

/// The registers of a line.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct LineState {
    registers: [u8; 9],
    input: Vec<u8>,
}

impl Line {
    /// A line that goes on with a state, or begins as after power-on.
    ///
    /// # Errors
    /// There are no more threads or descriptors, or the state has more input than there can be.
    pub(super) fn new(
        socket: UnixStream,
        interrupt: Arc<Event>,
        state: Option<&LineState>,
    ) -> io::Result<Self> {
        let emptied = Arc::new(Event::new()?);
        let (input, socket_again) = (socket.try_clone()?, socket.try_clone()?);
        let state = state.map_or_else(SerialState::default, LineState::to_device);
        let parts = (Interrupt(interrupt), Emptied(Arc::clone(&emptied)), Output(socket));
        let device = Serial::from_state(&state, parts.0, parts.1, parts.2);
        let device = device.map_err(|error| io::Error::other(format!("{error:?}")))?;
        let shared = Arc::new(Shared { device: Mutex::new(device), emptied, stop: Event::new()? });
        let thread = {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name("serial".into()).spawn(move || shared.take_input(input))?
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

    /// Takes no more input.
    pub(super) fn quiesce(&self) {
        self.shared.stop.signal();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    /// Ends the connection: a processor that waits for a host which does not read goes on.
    pub(super) fn hang_up(&self) {
        // It fails where the host has done so already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Its registers.
    pub(super) fn state(&self) -> LineState {
        LineState::of_device(&self.shared.device().state())
    }
}

impl Shared {
    fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest what the host writes, as fast as the guest takes it.
    fn take_input(&self, mut socket: UnixStream) {
        let mut buffer = [0; 64];
        loop {
            let room = self.device().fifo_capacity().min(buffer.len());
            let source = if room == 0 { self.emptied.as_fd() } else { socket.as_fd() };
            let mut fds = [
                PollFd::from_borrowed_fd(source, PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
            if !fds[1].revents().is_empty() {
                return;
            }
            if fds[0].revents().is_empty() {
                continue;
            }
            if room == 0 {
                self.emptied.clear();
                continue;
            }
            match socket.read(&mut buffer[..room]) {
                Ok(0) => return,
                Ok(count) => {
                    // There is room for all of it, as nobody else puts anything there but the guest itself in its
                    // loop mode.
                    let _ = self.device().enqueue_raw_bytes(&buffer[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
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
    fn of_device(state: &SerialState) -> Self {
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
    use std::time::Duration;

    /// Registers and bits of a 16550.
    const DATA: u8 = 0;
    const INTERRUPT_ENABLE: u8 = 1;
    const LINE_STATUS: u8 = 5;
    const SCRATCH: u8 = 7;
    const DATA_READY: u8 = 1;

    fn line(state: Option<&LineState>) -> (Line, UnixStream, Arc<Event>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let interrupt = Arc::new(Event::new().unwrap());
        (Line::new(theirs, Arc::clone(&interrupt), state).unwrap(), ours, interrupt)
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
        assert!(Line::new(socket, Arc::new(Event::new().unwrap()), Some(&too_much)).is_err());
    }
}
