//! The agent put into a booted guest by way of QEMU's guest agent.

mod channel;
#[cfg(test)]
mod tests;

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;
use vmlab_artifacts::base64;
use vmlab_artifacts::seed::{EXIT_NO_DRIVE, START_AGENT, UNIT_FILE};

use channel::Channel;

/// The first pause before a program in the guest is asked after; each is twice as long as the one
/// before. The guest agent tells nobody by itself that a program has ended.
const POLL_FIRST: Duration = Duration::from_millis(10);

/// The longest such pause.
const POLL_MAX: Duration = Duration::from_millis(200);

/// How long an agent that systemd has been given may take to come. It is started before qemu-guest-agent in
/// nearly all boots.
const COMING_TIME: Duration = Duration::from_secs(3);

const FILE_OPEN: &str = "guest-file-open";

/// As much as an error shows of what a program in the guest wrote.
const WORDS_MAX: usize = 2000;

/// Why the agent could not be put into the guest.
#[derive(Debug, Error)]
pub(crate) enum QgaError {
    /// Nobody has opened the port in the guest, or whoever did does not speak.
    #[error("qemu-guest-agent did not answer within {} s", waited.as_secs_f32().round())]
    NotAnswering {
        /// How long it was waited for.
        waited: Duration,
    },
    /// It has answered before, but not to this.
    #[error("qemu-guest-agent did not answer `{command}` within {} s", waited.as_secs_f32().round())]
    Silent {
        /// The command.
        command: &'static str,
        /// How long after the first try to reach it.
        waited: Duration,
    },
    /// The image's configuration forbids the command, as RHEL's and its kin's does.
    #[error(
        "qemu-guest-agent may not run programs in this image: {command} is disabled (it says: {said}); \
         allow it in /etc/sysconfig/qemu-ga or /etc/qemu/qemu-ga.conf of the image"
    )]
    Disabled {
        /// The command.
        command: &'static str,
        /// What the guest agent said.
        said: String,
    },
    /// The command failed.
    #[error("qemu-guest-agent failed to do {command}: {said}")]
    Refused {
        /// The command.
        command: &'static str,
        /// What the guest agent said.
        said: String,
    },
    /// The script that starts the agent failed in the guest.
    #[error("the agent could not be started in the guest ({how}): {words}")]
    Start {
        /// How the script ended.
        how: String,
        /// What it wrote to its standard error.
        words: String,
    },
    /// What came from the guest makes no sense.
    #[error("qemu-guest-agent's answer to `{command}` makes no sense: {why}")]
    Nonsense {
        /// The command.
        command: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// QEMU has closed the port's socket.
    #[error("the VM ended before qemu-guest-agent answered")]
    Closed,
    /// The caller wants no more of it.
    #[error("cancelled")]
    Cancelled,
    /// The socket failed.
    #[error("the socket to qemu-guest-agent failed")]
    Io(#[source] std::io::Error),
}

/// Puts the agent into the guest and starts it there, detached, once qemu-guest-agent answers. The
/// agent comes from the seed drive where the guest has one, else through the port.
///
/// `socket` leads to the port `org.qemu.guest_agent.0`. It is used by nobody else until this
/// returns, which is soon after `cancelled` says so.
///
/// # Errors
/// [`QgaError`], also when the deadline passes. That the agent is started does not mean that it
/// has opened its own port: who waits for it knows.
pub(crate) fn put_agent(
    socket: &UnixStream,
    agent: &[u8],
    deadline: Instant,
    cancelled: &dyn Fn() -> bool,
) -> Result<(), QgaError> {
    let mut channel = Channel::new(socket, deadline, cancelled)?;
    channel.synchronise()?;
    if is_coming(&mut channel)? {
        channel.pause(COMING_TIME, FILE_OPEN)?;
    }
    let ended = run_script(&mut channel, "detached", None)?;
    match ended.exit_code {
        Some(0) => Ok(()),
        Some(EXIT_NO_DRIVE) => run_script(&mut channel, "stdin", Some(agent))?.success(),
        _ => ended.success(),
    }
}

/// Whether systemd was given the agent by credentials, so that it most likely comes by itself. Asking after a
/// file starts no program, which on an emulated processor takes long.
fn is_coming(channel: &mut Channel<'_>) -> Result<bool, QgaError> {
    match channel.execute::<i64>(FILE_OPEN, &json!({ "path": UNIT_FILE, "mode": "r" })) {
        Ok(handle) => {
            let closed: Result<Value, _> =
                channel.execute("guest-file-close", &json!({ "handle": handle }));
            closed.map(|_| true)
        }
        // There is none, or the image's configuration lets nobody ask.
        Err(QgaError::Refused { .. } | QgaError::Disabled { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// How a program in the guest is getting on, as `guest-exec-status` says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Status {
    exited: bool,
    #[serde(rename = "exitcode")]
    exit_code: Option<i64>,
    signal: Option<i64>,
    #[serde(default)]
    err_data: String,
}

impl Status {
    fn success(self) -> Result<(), QgaError> {
        let how = match (self.exit_code, self.signal) {
            (Some(0), _) => return Ok(()),
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "no exit code".to_owned(),
        };
        let words = base64::decode(&self.err_data).unwrap_or_default();
        let words = String::from_utf8_lossy(&words[..words.len().min(WORDS_MAX)]);
        let words = match words.trim() {
            "" => "it said nothing".to_owned(),
            words => words.to_owned(),
        };
        Err(QgaError::Start { how, words })
    }
}

/// Runs the script that starts the agent, to its end.
fn run_script(
    channel: &mut Channel<'_>,
    how: &str,
    input: Option<&[u8]>,
) -> Result<Status, QgaError> {
    #[derive(Deserialize)]
    struct Started {
        pid: i64,
    }
    const EXEC: &str = "guest-exec";
    const STATUS: &str = "guest-exec-status";
    let mut arguments = json!({
        "path": "/bin/sh",
        "arg": ["-c", START_AGENT, "start", how],
        "capture-output": true,
    });
    if let Some(input) = input {
        arguments["input-data"] = Value::String(base64::encode(input));
    }
    let Started { pid } = channel.execute(EXEC, &arguments)?;
    let mut pause = POLL_FIRST;
    loop {
        let status: Status = channel.execute(STATUS, &json!({ "pid": pid }))?;
        if status.exited {
            return Ok(status);
        }
        channel.pause(pause, STATUS)?;
        pause = (pause * 2).min(POLL_MAX);
    }
}
