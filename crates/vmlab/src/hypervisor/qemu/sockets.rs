//! What QEMU inherits: its ends of the connections to this process, and files.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Signal;

use super::command::Descriptors;
use super::memory::Ram;
use crate::hypervisor::DeviceId;
use crate::lan::LanPort;

/// Connections between this process and QEMU: one end of each.
pub(super) struct Sockets {
    pub(super) console: UnixStream,
    pub(super) agent: UnixStream,
    pub(super) qmp: UnixStream,
    /// For VMs that start an image's system.
    pub(super) guest_agent: Option<UnixStream>,
    /// One for each server of ours.
    pub(super) servers: Vec<UnixStream>,
    /// Ports on networks of VMs, on QEMU's side.
    pub(super) lans: Vec<Arc<LanPort>>,
    /// The way of a snapshot's state into the VM, for one that goes on from a snapshot.
    pub(super) state: Option<UnixStream>,
}

impl Sockets {
    /// Both ends.
    pub(super) fn pairs(
        servers: usize,
        with_state: bool,
        with_guest_agent: bool,
    ) -> io::Result<(Self, Self)> {
        let (console, their_console) = UnixStream::pair()?;
        let (agent, their_agent) = UnixStream::pair()?;
        let (qmp, their_qmp) = UnixStream::pair()?;
        let pairs = std::iter::repeat_with(UnixStream::pair).take(servers);
        let (ours, theirs) = pairs.collect::<io::Result<_>>()?;
        let (state, their_state) = with_state.then(UnixStream::pair).transpose()?.unzip();
        let guest_agent = with_guest_agent.then(UnixStream::pair).transpose()?;
        let (guest_agent, their_guest_agent) = guest_agent.unzip();
        Ok((
            Self { console, agent, qmp, guest_agent, servers: ours, lans: Vec::new(), state },
            Self {
                console: their_console,
                agent: their_agent,
                qmp: their_qmp,
                guest_agent: their_guest_agent,
                servers: theirs,
                lans: Vec::new(),
                state: their_state,
            },
        ))
    }

    /// What QEMU is told of its ends, and of the files that it inherits.
    pub(super) fn descriptors(
        &self,
        ram: Option<&Ram>,
        kernel: Option<&Arc<File>>,
        on_bridge: Vec<(u32, DeviceId)>,
    ) -> Descriptors {
        let files = |ram: &Ram| ram.files.iter().map(AsRawFd::as_raw_fd).collect();
        Descriptors {
            on_bridge,
            memory: ram.map(|ram| (files(ram), ram.usage)),
            incoming: self.state.is_some(),
            reset_kernel: kernel.map(AsRawFd::as_raw_fd),
            console: self.console.as_raw_fd(),
            agent: self.agent.as_raw_fd(),
            qmp: self.qmp.as_raw_fd(),
            guest_agent: self.guest_agent.as_ref().map(AsRawFd::as_raw_fd),
            servers: self.servers.iter().map(AsRawFd::as_raw_fd).collect(),
            lans: self.lans.iter().map(|port| port.device().as_raw_fd()).collect(),
        }
    }
}

/// Lets the child have `sockets` and `files`, and makes it die with the thread that starts it.
pub(super) fn inherit(command: &mut Command, sockets: Sockets, files: Vec<Arc<File>>) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before that was set.
        if rustix::process::getppid() != Some(parent) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let more = sockets.servers.iter().chain(&sockets.state).chain(&sockets.guest_agent);
        for socket in [&sockets.console, &sockets.agent, &sockets.qmp].into_iter().chain(more) {
            fcntl_setfd(socket.as_fd(), FdFlags::empty())?;
        }
        for port in &sockets.lans {
            fcntl_setfd(port.device(), FdFlags::empty())?;
        }
        for file in &files {
            fcntl_setfd(file.as_fd(), FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec, `prepare` only makes system calls; it neither allocates nor
    // takes a lock, whatever other threads were doing at the fork.
    unsafe { command.pre_exec(prepare) };
}
