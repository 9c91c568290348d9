//! Commands and answers of the guest agent: JSON objects in lines, which nothing but their order
//! tells apart.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::QgaError;

/// The time from the first call of the guest agent to the second; it doubles with each. Whoever opens
/// the port late finds all calls, and has to answer them, but one that starts anew may have lost them.
const CALL_INTERVAL_FIRST: Duration = Duration::from_secs(1);

/// The longest time between two calls.
const CALL_INTERVAL_MAX: Duration = Duration::from_secs(8);

/// How long a wait goes on before it is looked whether anybody still wants it.
const SLICE: Duration = Duration::from_millis(50);

/// The longest answer. The longest one that is wanted has what a script wrote to its standard
/// error; the guest could send without end.
const ANSWER_MAX: usize = 1 << 20;

/// Bytes that are read at once.
const READ_SIZE: usize = 16 * 1024;

/// Comes before the answer to a call, and resets the guest agent's parser. It occurs in no JSON.
const DELIMITER: u8 = 0xff;

/// What synchronises both ends.
const CALL: &str = "guest-sync-delimited";

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<ErrorBody>,
}

#[derive(Deserialize)]
struct ErrorBody {
    #[serde(default)]
    class: String,
    desc: String,
}

/// A line from the guest, without its end.
enum Line {
    Whole(Vec<u8>),
    /// One that is longer than any answer; it was not kept.
    TooLong,
}

/// The way to the guest agent, until a deadline.
pub(super) struct Channel<'a> {
    socket: &'a UnixStream,
    started: Instant,
    deadline: Instant,
    cancelled: &'a dyn Fn() -> bool,
    /// What came after the last line; or the head of a line that is too long.
    buffer: Vec<u8>,
    /// No line ends before this in the buffer.
    searched: usize,
    too_long: bool,
}

/// Why a wait has ended without what was waited for.
enum Wait {
    DeadlinePassed,
    /// The time of the wait itself.
    TimePassed,
    Failed(QgaError),
}

impl<'a> Channel<'a> {
    pub(super) fn new(
        socket: &'a UnixStream,
        deadline: Instant,
        cancelled: &'a dyn Fn() -> bool,
    ) -> Result<Self, QgaError> {
        socket.set_nonblocking(false).map_err(QgaError::Io)?;
        socket.set_read_timeout(Some(SLICE)).map_err(QgaError::Io)?;
        socket.set_write_timeout(Some(SLICE)).map_err(QgaError::Io)?;
        Ok(Self {
            socket,
            started: Instant::now(),
            deadline,
            cancelled,
            buffer: Vec::new(),
            searched: 0,
            too_long: false,
        })
    }

    /// Waits until the guest agent answers, and skips all that it had still to say.
    pub(super) fn synchronise(&mut self) -> Result<(), QgaError> {
        // Not the same as in another try, whose answers may still be on their way.
        let mut id = u64::from(std::process::id()) << 24;
        let mut interval = CALL_INTERVAL_FIRST;
        loop {
            id += 1;
            let call = json!({"execute": CALL, "arguments": {"id": id}}).to_string();
            let call = [&[DELIMITER], call.as_bytes(), b"\n"].concat();
            let until = Instant::now() + interval;
            interval = (interval * 2).min(CALL_INTERVAL_MAX);
            match self.send(&call).and_then(|()| self.answer_to_call(id, until)) {
                Ok(()) => return Ok(()),
                Err(Wait::TimePassed) => {}
                Err(Wait::DeadlinePassed) => {
                    return Err(QgaError::NotAnswering { waited: self.started.elapsed() });
                }
                Err(Wait::Failed(error)) => return Err(error),
            }
        }
    }

    /// Executes a command.
    pub(super) fn execute<T: DeserializeOwned>(
        &mut self,
        command: &'static str,
        arguments: &Value,
    ) -> Result<T, QgaError> {
        let nonsense = |why: String| QgaError::Nonsense { command, why };
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        let answer = self.send(line.as_bytes()).and_then(|()| self.line(None));
        let line = match answer {
            Ok(Line::Whole(line)) => line,
            Ok(Line::TooLong) => {
                return Err(nonsense(format!("it has more than {ANSWER_MAX} bytes")));
            }
            Err(wait) => return Err(self.gave_up(wait, command)),
        };
        let answer: Answer = serde_json::from_slice(&line).map_err(|e| nonsense(e.to_string()))?;
        if let Some(ErrorBody { class, desc: said }) = answer.error {
            // The class is older than the words, and not in all versions the same for both.
            let unknown = class == "CommandNotFound" || said.contains("has been disabled");
            return Err(match unknown {
                true => QgaError::Disabled { command, said },
                false => QgaError::Refused { command, said },
            });
        }
        serde_json::from_value(answer.returned.unwrap_or_default())
            .map_err(|e| nonsense(e.to_string()))
    }

    /// Lets some time pass.
    pub(super) fn pause(&self, time: Duration, command: &'static str) -> Result<(), QgaError> {
        let until = Instant::now() + time;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            self.check(None).map_err(|wait| self.gave_up(wait, command))?;
            std::thread::sleep(left.min(SLICE));
        }
        Ok(())
    }

    fn gave_up(&self, wait: Wait, command: &'static str) -> QgaError {
        match wait {
            Wait::Failed(error) => error,
            Wait::DeadlinePassed | Wait::TimePassed => {
                QgaError::Silent { command, waited: self.started.elapsed() }
            }
        }
    }

    /// Skips lines until the answer to a call.
    fn answer_to_call(&mut self, id: u64, until: Instant) -> Result<(), Wait> {
        loop {
            // Whatever else comes is of a time before.
            let Line::Whole(line) = self.line(Some(until))? else { continue };
            let answer = line.rsplit(|&byte| byte == DELIMITER).next().unwrap_or_default();
            let answer: Option<Answer> = serde_json::from_slice(answer).ok();
            let returned = answer.and_then(|answer| answer.returned?.as_u64());
            if line.contains(&DELIMITER) && returned == Some(id) {
                return Ok(());
            }
        }
    }

    /// Whether it is worth to go on waiting.
    fn check(&self, until: Option<Instant>) -> Result<(), Wait> {
        let now = Instant::now();
        if (self.cancelled)() {
            return Err(Wait::Failed(QgaError::Cancelled));
        }
        if now >= self.deadline {
            return Err(Wait::DeadlinePassed);
        }
        match until {
            Some(until) if now >= until => Err(Wait::TimePassed),
            _ => Ok(()),
        }
    }

    fn send(&self, mut bytes: &[u8]) -> Result<(), Wait> {
        while !bytes.is_empty() {
            self.check(None)?;
            match (&mut &*self.socket).write(bytes) {
                Ok(0) => return Err(Wait::Failed(QgaError::Closed)),
                Ok(count) => bytes = &bytes[count..],
                Err(error) => retriable(error)?,
            }
        }
        Ok(())
    }

    /// The next line from the guest.
    fn line(&mut self, until: Option<Instant>) -> Result<Line, Wait> {
        loop {
            if let Some(at) = memchr::memchr(b'\n', &self.buffer[self.searched..]) {
                let rest = self.buffer.split_off(self.searched + at + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                self.searched = 0;
                line.pop();
                return Ok(match std::mem::take(&mut self.too_long) || line.len() > ANSWER_MAX {
                    true => Line::TooLong,
                    false => Line::Whole(line),
                });
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > ANSWER_MAX {
                self.buffer.clear();
                self.searched = 0;
                self.too_long = true;
            }
            self.check(until)?;
            let mut chunk = [0; READ_SIZE];
            match (&mut &*self.socket).read(&mut chunk) {
                Ok(0) => return Err(Wait::Failed(QgaError::Closed)),
                Ok(count) => self.buffer.extend_from_slice(&chunk[..count]),
                Err(error) => retriable(error)?,
            }
        }
    }
}

/// Nothing for errors after which the same is tried again.
fn retriable(error: io::Error) -> Result<(), Wait> {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, Interrupted, TimedOut, WouldBlock};
    match error.kind() {
        Interrupted | TimedOut | WouldBlock => Ok(()),
        BrokenPipe | ConnectionReset => Err(Wait::Failed(QgaError::Closed)),
        _ => Err(Wait::Failed(QgaError::Io(error))),
    }
}
