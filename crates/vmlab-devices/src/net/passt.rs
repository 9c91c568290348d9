//! The program passt: a guest reaches what the host reaches, without rights of the host.
//!
//! Tried with Debian's 0.0~git20230309.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::queue::lock;

/// The network as QEMU's user network has it: the guest, its gateway, who answers its DNS queries, and the address of
/// the other end of its wire. The gateway's address is the host's loopback interface as well.
///
/// passt has `--dns` as well, to tell guests of a server by DHCP, but with it forgets the host's servers, to which
/// `--dns-forward` would forward. IPv6 is left out, since a guest would get the addresses of the host.
const NETWORK: [&str; 13] = [
    "--ipv4-only",
    "--address",
    "10.0.2.15",
    "--netmask",
    "24",
    "--gateway",
    "10.0.2.2",
    "--mac-addr",
    "52:55:0a:00:02:02",
    "--dns-forward",
    "10.0.2.3",
    "--mtu",
    "1500",
];

/// Nobody reaches a port of the guest; the socket is the standard input, which closes with passt itself.
const RUN: [&str; 9] = [
    "--foreground",
    "--quiet",
    "--stderr",
    "--tcp-ports",
    "none",
    "--udp-ports",
    "none",
    "--fd",
    "0",
];

/// The most bytes that are kept of what passt says: a guest may make it complain without end.
const MAX_SAID: usize = 4096;

/// The most bytes of one line of that.
const MAX_LINE: u64 = 512;

/// What passt says about itself of each line, where the host has no system logger.
const UNLOGGED: &str = "Failed to send ";

/// A running passt, for one guest. It is ended when this is dropped. When this process dies, it ends by itself, since
/// the other end of its socket is gone: a parent-death signal would not do, for the kernel forgets it where passt gives
/// up root's rights.
#[derive(Debug)]
pub struct Passt {
    child: Child,
    said: Arc<Mutex<String>>,
    listener: Option<JoinHandle<()>>,
}

/// passt could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// It is not there.
    #[error("passt is not installed; install the package passt, or give the VM no user network")]
    Missing,
    /// It does not start.
    #[error("passt cannot be started")]
    Spawn(#[source] io::Error),
    /// No socket or thread for it.
    #[error("there is no socket or thread for passt")]
    Resources(#[source] io::Error),
}

impl Passt {
    /// Starts passt. The second value is the end of its socket for a [`Stream`](super::Stream). That passt has come up
    /// is not waited for, since a guest takes longer. `on_end` is told what it said when it ends, also when that is
    /// because this is dropped.
    ///
    /// # Errors
    /// It is not installed, or there is not what it needs.
    pub fn start(
        on_end: impl FnOnce(&str) + Send + 'static,
    ) -> Result<(Self, OwnedFd), StartError> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|error| StartError::Resources(error.into()))?;
        let mut command = Command::new("passt");
        command.args(NETWORK).args(RUN);
        // What a terminal sends to its foreground group is for others.
        command.process_group(0);
        command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StartError::Missing,
            _ => StartError::Spawn(error),
        })?;
        let mut passt = Self { child, said: Arc::default(), listener: None };
        if let Some(stderr) = passt.child.stderr.take() {
            let said = Arc::clone(&passt.said);
            let listener = thread::Builder::new().name("vmlab-passt".to_owned());
            let listener = listener.spawn(move || {
                listen(stderr, &said);
                let said = lock(&said).trim_end().to_owned();
                on_end(&said);
            });
            passt.listener = Some(listener.map_err(StartError::Resources)?);
        }
        Ok((passt, ours))
    }

    /// Why passt is not running any more, as far as it said; `None` while it runs.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn ended(&mut self) -> io::Result<Option<String>> {
        let Some(status) = self.child.try_wait()? else { return Ok(None) };
        self.hear_out();
        Ok(Some(format!("passt ended with {status}: {}", lock(&self.said).trim_end())))
    }

    /// Waits for the last of what it said; it has ended.
    fn hear_out(&mut self) {
        if let Some(listener) = self.listener.take() {
            // It does not panic.
            let _ = listener.join();
        }
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.hear_out();
    }
}

/// Reads what passt says to the end, so that it never waits for somebody to read it, and keeps the beginning.
fn listen(stderr: ChildStderr, said: &Mutex<String>) {
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match lines.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let mut said = lock(said);
        if !text.starts_with(UNLOGGED) && said.len() + text.len() <= MAX_SAID {
            said.push_str(&text);
        }
    }
}
