//! The session with the host: one loop that serves the channel, the commands and their ends.

use std::convert::Infallible;
use std::fmt::Display;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use rustix::event::{PollFlags, Timespec, epoll};
use vmlab_wire::message::{Mount, Ready};
use vmlab_wire::{Frame, GuestMessage, HostMessage, message};

use crate::channel::{ChannelError, Inbox, Outbox, Received};
use crate::exec::{Commands, Program};
use crate::sys::{self, Reap};
use crate::{boot_log, kmsg, power, setup};

const CHANNEL: u64 = 0;
const SIGNALS: u64 = 1;

/// Events taken from the kernel at once.
const EVENTS: usize = 32;

/// Frames are handled for at most so many reads before output has its turn.
const READS_PER_TURN: usize = 16;

/// What the agent is in this system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// PID 1: it makes the guest ready and powers it off.
    Init,
    /// A process of a system that has another PID 1: it mounts shares and runs commands.
    Guest,
    /// A process like any other: it only runs commands.
    Service,
}

/// Why a session is over.
#[derive(Debug)]
pub(crate) enum Over {
    /// The host asked for it.
    PowerOff,
    /// The host has gone.
    HungUp,
    /// The session cannot go on.
    Broken(String),
}

impl From<ChannelError> for Over {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::HungUp => Over::HungUp,
            ChannelError::Broken(why) => Over::Broken(why),
        }
    }
}

fn broken(what: impl Display) -> Over {
    Over::Broken(what.to_string())
}

/// A session with the host over a non-blocking byte channel.
pub(crate) struct Session {
    role: Role,
    fd: OwnedFd,
    inbox: Inbox,
    outbox: Outbox,
    epoll: OwnedFd,
    signals: OwnedFd,
    commands: Commands,
    readable: bool,
    writable: bool,
    /// Whether the guest has been made ready.
    ready: bool,
    /// What went wrong in the boot.
    trouble: Vec<String>,
    /// How the part of the set-up went that was done before the host asked for one.
    begun: setup::Step,
    /// The devices of shares that a snapshot can be taken with.
    devices: setup::Devices,
    /// What was mounted into a system that is not this one's.
    shares: Vec<Mount>,
}

impl Session {
    /// A session that has not spoken yet.
    pub(crate) fn new(role: Role, fd: OwnedFd) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let signals = sys::child_signals()?;
        let flags = epoll::EventFlags::IN;
        let both = flags | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&epoll, &fd, epoll::EventData::new_u64(CHANNEL), both)?;
        epoll::add(&epoll, &signals, epoll::EventData::new_u64(SIGNALS), flags)?;
        Ok(Self {
            role,
            fd,
            inbox: Inbox::new(),
            outbox: Outbox::new(),
            commands: Commands::new(epoll.as_fd().try_clone_to_owned()?),
            epoll,
            signals,
            readable: true,
            writable: true,
            ready: role == Role::Service,
            trouble: Vec::new(),
            begun: Ok(()),
            devices: setup::Devices::default(),
            shares: Vec::new(),
        })
    }

    /// Keeps what went wrong before, to be told if the set-up fails.
    pub(crate) fn note_trouble(&mut self, trouble: Vec<String>) {
        self.trouble = trouble;
    }

    /// Begins the set-up, before the host is told that this agent is ready for it.
    pub(crate) fn begin_setup(&mut self) {
        let mut warn = |text| self.outbox.message(&GuestMessage::Warning(text));
        self.begun = setup::begin(&mut warn);
    }

    /// Takes over the devices that may be replaced.
    pub(crate) fn keep_devices(&mut self, devices: setup::Devices) {
        self.devices = devices;
    }

    /// Serves the host until the session is over.
    pub(crate) fn run(&mut self, ready: Ready) -> Over {
        self.outbox.message(&GuestMessage::Ready(ready));
        match self.serve() {
            Err(over) => over,
            Ok(never) => match never {},
        }
    }

    fn serve(&mut self) -> Result<Infallible, Over> {
        loop {
            let mut busy = self.receive()?;
            busy |= self.commands.pump(&mut self.outbox);
            if self.writable && !self.outbox.is_empty() {
                self.writable = self.outbox.flush(&self.fd)?;
            }
            self.wait(busy)?;
        }
    }

    /// Reads the channel and does what it says. Returns whether there may be more.
    fn receive(&mut self) -> Result<bool, Over> {
        for _ in 0..READS_PER_TURN {
            if !self.readable {
                return Ok(false);
            }
            if self.inbox.receive(&self.fd)? == Received::Nothing {
                self.readable = false;
                return Ok(false);
            }
            self.frames()?;
        }
        Ok(true)
    }

    fn frames(&mut self) -> Result<(), Over> {
        loop {
            let Self { inbox, outbox, commands, .. } = self;
            let message = match inbox.next_frame()? {
                None => return Ok(()),
                Some(Frame::Message(payload)) => message::decode(payload).map_err(broken)?,
                Some(Frame::Data(stream, data)) => {
                    commands.data(stream, data, outbox).map_err(broken)?;
                    continue;
                }
                Some(Frame::Eof(stream)) => {
                    commands.eof(stream, outbox);
                    continue;
                }
                Some(Frame::Credit(stream, bytes)) => {
                    commands.credit(stream, bytes).map_err(broken)?;
                    continue;
                }
                Some(Frame::Stop(stream)) => {
                    commands.stop(stream, outbox);
                    continue;
                }
            };
            self.message(message)?;
        }
    }

    fn message(&mut self, message: HostMessage) -> Result<(), Over> {
        match message {
            HostMessage::Setup(_) if self.ready => {
                return Err(broken("the host sent a second set-up"));
            }
            HostMessage::Setup(setup) => {
                self.outbox.message(&GuestMessage::SettingUp);
                // What does not go out now goes with the next message.
                self.writable = self.outbox.flush(&self.fd)?;
                let mut warn = |text| self.outbox.message(&GuestMessage::Warning(text));
                let begun = std::mem::replace(&mut self.begun, Ok(()));
                let done = begun.and_then(|()| match self.role {
                    Role::Init | Role::Service => setup::run(&setup, &self.devices, &mut warn),
                    Role::Guest => {
                        self.shares.clone_from(&setup.shares);
                        setup::run_in_system(&setup, &mut warn)
                    }
                });
                self.ready = done.is_ok();
                self.outbox.message(&match done {
                    Ok(done) => {
                        self.commands.set_own_filesystems(done.own_filesystems);
                        GuestMessage::SetupDone(done.report)
                    }
                    Err(mut failure) => {
                        for trouble in &self.trouble {
                            failure.detail.push_str("; before that: ");
                            failure.detail.push_str(trouble);
                        }
                        GuestMessage::SetupFailed(failure)
                    }
                });
            }
            HostMessage::Exec(_) if !self.ready => {
                return Err(broken("the host sent a command before the set-up was done"));
            }
            HostMessage::ExecAgent(_) if !self.ready => {
                return Err(broken("the host sent a command before the set-up was done"));
            }
            HostMessage::Exec(exec) => {
                self.commands.start(&exec, Program::Named, &mut self.outbox);
            }
            HostMessage::ExecAgent(exec) => {
                self.commands.start(&exec, Program::Agent, &mut self.outbox);
            }
            HostMessage::AdjustClock(by_ns) => {
                let mut warn = |text| self.outbox.message(&GuestMessage::Warning(text));
                setup::adjust_clock(by_ns, &mut warn);
            }
            HostMessage::Signal(process, signal) => self.commands.signal(process, signal),
            HostMessage::Resize(process, size) => self.commands.resize(process, size),
            HostMessage::BootLog => {
                self.outbox.message(&GuestMessage::BootLog(boot_log::read()));
            }
            HostMessage::Attach(disk) => {
                self.outbox.message(&GuestMessage::Done(setup::take_in(&disk)));
            }
            HostMessage::Detach(serial) => {
                self.outbox.message(&GuestMessage::Done(setup::take_out(&serial)));
            }
            HostMessage::Hold(slots) => match setup::hold(&slots) {
                Ok(devices) => self.hold(&devices)?,
                Err(failure) => self.outbox.message(&GuestMessage::Done(Err(failure))),
            },
            HostMessage::GoOn(_) => return Err(broken("the host let it go on that had not held")),
            HostMessage::Nudge => {}
            HostMessage::PowerOff => return Err(Over::PowerOff),
        }
        Ok(())
    }

    /// Says and does nothing until the host lets it go on, so that nothing is on its way in either direction
    /// while the machine is stopped. Commands go on.
    fn hold(&mut self, devices: &setup::Devices) -> Result<(), Over> {
        self.outbox.message(&GuestMessage::Done(Ok(())));
        while !self.outbox.flush(&self.fd)? {
            power::wait(&self.fd, PollFlags::OUT, None);
        }
        let go_on = loop {
            match self.inbox.next_frame()? {
                Some(Frame::Message(payload)) => match message::decode(payload).map_err(broken)? {
                    HostMessage::GoOn(go_on) => break go_on,
                    _ => return Err(broken("the host did not let it go on that had held")),
                },
                Some(_) => return Err(broken("something on a stream while it held")),
                None => {}
            }
            if self.inbox.receive(&self.fd)? == Received::Nothing {
                power::wait(&self.fd, PollFlags::IN, None);
            }
        };
        let mut warn = |text| self.outbox.message(&GuestMessage::Warning(text));
        let done = match self.role {
            Role::Init | Role::Guest => setup::go_on(&go_on, devices, &mut warn),
            // Its clock and devices are those of a host.
            Role::Service => Ok(()),
        };
        self.outbox.message(&GuestMessage::Done(done));
        Ok(())
    }

    /// Waits for something to happen; only looks when there is still something to do.
    fn wait(&mut self, busy: bool) -> Result<(), Over> {
        let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; EVENTS];
        let at_once = Timespec::default();
        let timeout = busy.then_some(&at_once);
        let events = match epoll::wait(&self.epoll, &mut events, timeout) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(e) => return Err(broken(format!("waiting for events: {e}"))),
        };
        for event in events {
            let (data, flags) = (event.data.u64(), event.flags);
            match data {
                CHANNEL => {
                    self.readable = true;
                    self.writable |= flags.contains(epoll::EventFlags::OUT);
                }
                SIGNALS => {
                    sys::drain_signals(&self.signals);
                    while let Reap::Child(child) = sys::reap() {
                        self.commands.reaped(&child, &mut self.outbox);
                    }
                }
                data => {
                    self.commands.event(data, flags, &mut self.outbox);
                }
            }
        }
        Ok(())
    }

    /// Ends everything after the session is over.
    pub(crate) fn end(mut self, over: &Over) {
        match over {
            Over::PowerOff => {}
            Over::HungUp if self.role == Role::Init => {
                kmsg::error("the host has gone, powering off");
            }
            Over::HungUp => {}
            Over::Broken(why) => kmsg::error(&format!("fatal: {why}")),
        }
        match self.role {
            Role::Init => power::end_all(&self.signals),
            Role::Guest | Role::Service => self.commands.running().for_each(|pid| {
                // It may just have ended.
                let _ = sys::kill(-pid, libc::SIGKILL);
            }),
        }
        if self.role == Role::Guest {
            setup::unmount(&self.shares);
        }
        if self.role == Role::Init {
            setup::make_clean();
            // That is all that the host's files need. Filesystems of the guest's own are as after a sync, too.
            rustix::fs::sync();
        }
        if matches!(over, Over::PowerOff) {
            self.outbox.message(&GuestMessage::PoweringOff);
            power::flush(&mut self.outbox, &self.fd);
        }
    }
}

/// Serves commands on standard input, a socket.
pub(crate) fn serve_stdin(started_ns: u64) -> ExitCode {
    match service(started_ns) {
        Ok(Over::PowerOff | Over::HungUp) => ExitCode::SUCCESS,
        Ok(Over::Broken(_)) => ExitCode::FAILURE,
        Err(e) => {
            kmsg::error(&format!("cannot serve standard input: {e}"));
            ExitCode::FAILURE
        }
    }
}

fn service(started_ns: u64) -> io::Result<Over> {
    let fd = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    rustix::io::ioctl_fionbio(&fd, true)?;
    // As PID 1 does, it inherits what its descendants leave behind.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let mut session = Session::new(Role::Service, fd)?;
    let ready_ns = sys::monotonic_ns();
    let release = crate::boot::release();
    let (steps, modules) = (Vec::new(), Vec::new());
    let ready = Ready { release, started_ns, ready_ns, steps, modules, revivable: 0 };
    let over = session.run(ready);
    session.end(&over);
    Ok(over)
}
