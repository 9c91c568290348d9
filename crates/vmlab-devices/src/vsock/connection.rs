//! One connection: the stream of a program of the host, and the credit of both sides.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::packet::{Header, NO_RECEIVE, NO_SEND, Op};

/// The most bytes of a guest that wait for a program of the host, for each connection. It is what the guest is told that
/// it may send ahead, and what Linux gives a socket as well.
pub const MAX_BUFFERED: usize = 256 << 10;

/// The guest is told of room once there is so much more than it knows. It keeps the rest in the meantime, so it never
/// waits for what is not told.
const TELL: u32 = (MAX_BUFFERED / 4) as u32;

/// The two ports of a connection, which are its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// A program of the host has not said yet to which port it wants.
    Greeting,
    /// The guest has not answered.
    Connecting,
    Open,
    /// The guest has closed it and knows nothing of it any more. The program has yet to get the rest.
    Lingering,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: OwnedFd,
    pub(super) state: State,
    pub(super) ports: Ports,
    /// It is in the list of those that may have something to send.
    pub(super) queued: bool,
    /// A request or a response to send first.
    pub(super) first: Option<Op>,
    /// Reading may give something: bytes, or an end.
    readable: bool,
    /// The program is gone, or both directions are at their end.
    hung_up: bool,
    /// What the guest will not do any more: [`NO_RECEIVE`], [`NO_SEND`].
    guest_shut: u32,
    /// What of that the program can see.
    guest_shut_shown: u32,
    /// The same of the program, and what of it the guest was told.
    host_shut: u32,
    host_shut_told: u32,
    /// Bytes of the guest that wait for the program.
    waiting: VecDeque<u8>,
    /// How many bytes of the guest came and were passed on, modulo 2^32, and what of that it was told.
    forwarded: u32,
    forwarded_told: u32,
    tell_credit: bool,
    /// What the guest says about its own room, and how many bytes it was sent.
    guest_room: u32,
    guest_forwarded: u32,
    sent: u32,
    /// The guest was asked for room, and has not answered.
    asked: bool,
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    GoesOn,
    /// It is over, and the guest knows.
    Closed,
    /// The guest has broken or refused it, and has to be told.
    Reset,
    /// The guest has closed it, and has to be told. The program gets the rest.
    Finished,
}

/// The next packet for the guest: what it says, its flags, and how many bytes of data it has.
pub(super) type Next = (Op, u32, usize);

impl Connection {
    pub(super) fn new(socket: OwnedFd, state: State, ports: Ports) -> Self {
        Self {
            socket,
            state,
            ports,
            queued: false,
            first: None,
            readable: true,
            hung_up: false,
            guest_shut: 0,
            guest_shut_shown: 0,
            host_shut: 0,
            host_shut_told: 0,
            waiting: VecDeque::new(),
            forwarded: 0,
            forwarded_told: 0,
            tell_credit: false,
            guest_room: 0,
            guest_forwarded: 0,
            sent: 0,
            asked: false,
        }
    }

    /// Notes what the socket is ready for.
    pub(super) fn ready(&mut self, flags: EventFlags) {
        self.readable = true;
        self.hung_up |= flags.intersects(EventFlags::HUP | EventFlags::ERR);
        self.flush();
    }

    pub(super) fn hung_up(&self) -> bool {
        self.hung_up
    }

    /// Whether the program has all that the guest sent.
    pub(super) fn is_flushed(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Notes the credit that each packet of the guest tells.
    pub(super) fn credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
    }

    /// Writes the guest's own credit into a packet for it.
    pub(super) fn stamp(&mut self, header: &mut Header) {
        header.buf_alloc = MAX_BUFFERED as u32;
        header.fwd_cnt = self.forwarded;
        self.forwarded_told = self.forwarded;
        self.tell_credit = false;
    }

    /// Does what a packet of the guest says.
    pub(super) fn packet(&mut self, op: Op, flags: u32, payload: &[u8]) -> Fate {
        match (op, self.state) {
            (Op::Reset, _) => Fate::Closed,
            (Op::Response, State::Connecting) => self.accepted(),
            (Op::Data, State::Open) => self.data(payload),
            (Op::Shutdown, State::Open) => self.shut(flags),
            (Op::CreditUpdate, State::Open) => {
                self.asked = false;
                Fate::GoesOn
            }
            (Op::CreditRequest, State::Open) => {
                self.tell_credit = true;
                Fate::GoesOn
            }
            // What does not belong to the state that the connection is in.
            _ => Fate::Reset,
        }
    }

    /// Tells the program that the guest has accepted.
    fn accepted(&mut self) -> Fate {
        self.state = State::Open;
        let line = format!("OK {}\n", self.ports.host);
        // There is room, for it is the first that is written.
        match write(&self.socket, line.as_bytes()) {
            Ok(sent) if sent == line.len() => Fate::GoesOn,
            _ => Fate::Reset,
        }
    }

    fn data(&mut self, payload: &[u8]) -> Fate {
        let too_much = self.waiting.len() + payload.len() > MAX_BUFFERED;
        if too_much || self.guest_shut & NO_SEND != 0 {
            return Fate::Reset;
        }
        let at_once = if self.waiting.is_empty() && self.host_shut & NO_RECEIVE == 0 {
            write(&self.socket, payload).unwrap_or_else(|_| {
                self.host_shut |= NO_RECEIVE;
                0
            })
        } else {
            0
        };
        self.forwarded = self.forwarded.wrapping_add(at_once as u32);
        self.waiting.extend(&payload[at_once..]);
        self.flush();
        Fate::GoesOn
    }

    fn shut(&mut self, flags: u32) -> Fate {
        self.guest_shut |= flags & (NO_RECEIVE | NO_SEND);
        if self.guest_shut == NO_RECEIVE | NO_SEND {
            return Fate::Finished;
        }
        if self.guest_shut & NO_RECEIVE != 0 {
            // The program's writes are to fail.
            self.show(NO_RECEIVE, Shutdown::Read);
        }
        self.flush();
        Fate::GoesOn
    }

    /// Passes on what waits for the program, as far as there is room. What it does not want is lost.
    pub(super) fn flush(&mut self) {
        while !self.waiting.is_empty() && self.host_shut & NO_RECEIVE == 0 {
            match write(&self.socket, self.waiting.as_slices().0) {
                Ok(0) => return,
                Ok(sent) => {
                    self.waiting.drain(..sent);
                    self.forwarded = self.forwarded.wrapping_add(sent as u32);
                }
                Err(_) => self.host_shut |= NO_RECEIVE,
            }
        }
        self.forwarded = self.forwarded.wrapping_add(self.waiting.len() as u32);
        self.waiting = VecDeque::new();
        if self.guest_shut & NO_SEND != 0 {
            self.show(NO_SEND, Shutdown::Write);
        }
    }

    /// Shuts a half of the socket, once: each time is an event of its own socket, which would lead here again.
    fn show(&mut self, half: u32, how: Shutdown) {
        if self.guest_shut_shown & half == 0 {
            self.guest_shut_shown |= half;
            // It fails where the program is gone.
            let _ = shutdown(&self.socket, how);
        }
    }

    /// The next packet for the guest, if there is one; its data goes to `buffer`.
    pub(super) fn next(&mut self, buffer: &mut [u8]) -> Option<Next> {
        if let Some(op) = self.first.take() {
            return Some((op, 0, 0));
        }
        if self.state != State::Open {
            return None;
        }
        if let Some(next) = self.read(buffer) {
            return Some(next);
        }
        if self.host_shut != self.host_shut_told {
            self.host_shut_told = self.host_shut;
            return Some((Op::Shutdown, self.host_shut, 0));
        }
        let untold = self.forwarded.wrapping_sub(self.forwarded_told);
        (self.tell_credit || untold >= TELL).then_some((Op::CreditUpdate, 0, 0))
    }

    /// Reads what the program sent, as much as the guest has room for.
    fn read(&mut self, buffer: &mut [u8]) -> Option<Next> {
        if self.host_shut & NO_SEND != 0 || self.guest_shut & NO_RECEIVE != 0 {
            // Nothing is left to read that anybody wants.
            if self.hung_up {
                self.host_shut = NO_RECEIVE | NO_SEND;
            }
            return None;
        }
        if !self.readable {
            return None;
        }
        // A guest that has passed on more than it was sent has no room until it is right again.
        let on_the_way = self.sent.wrapping_sub(self.guest_forwarded);
        let room = self.guest_room.saturating_sub(on_the_way) as usize;
        if room == 0 {
            let ask = !std::mem::replace(&mut self.asked, true);
            return ask.then_some((Op::CreditRequest, 0, 0));
        }
        let most = room.min(buffer.len());
        match read(&self.socket, &mut buffer[..most], RecvFlags::empty()) {
            Ok(0) => {
                self.host_shut |= NO_SEND;
                if self.hung_up {
                    self.host_shut |= NO_RECEIVE;
                }
                None
            }
            Ok(length) => {
                self.asked = false;
                self.sent = self.sent.wrapping_add(length as u32);
                Some((Op::Data, 0, length))
            }
            // It is tried again with the next event.
            Err(Errno::AGAIN) => {
                self.readable = false;
                None
            }
            Err(_) => {
                self.host_shut = NO_RECEIVE | NO_SEND;
                None
            }
        }
    }
}

/// Reads what is there; nothing is the end.
pub(super) fn read(socket: &OwnedFd, buffer: &mut [u8], flags: RecvFlags) -> Result<usize, Errno> {
    loop {
        match recv(socket, &mut *buffer, RecvFlags::DONTWAIT | flags) {
            Err(Errno::INTR) => {}
            result => return result.map(|(length, _)| length),
        }
    }
}

/// Writes as much as there is room for.
fn write(socket: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    loop {
        match send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(0),
            result => return result,
        }
    }
}
