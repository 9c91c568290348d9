//! The log of the guest's kernel, read by the agent.

use std::fmt;
use std::io::{self, Read};
use std::time::Duration;

use super::GuestUser;
use super::command::{Command, Stdio};
use crate::Error;
use crate::events::{EventReader, KernelEvent};
use crate::vm::Vm;

/// The most of a log that is taken, in bytes: more than any kernel's buffer (`log_buf_len`) usually has, so that
/// a guest cannot fill the host's memory.
const MAX_LOG: u64 = 64 * 1024 * 1024;

/// How urgent a message is: the lower, the more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "syslog(3) has them all")]
pub enum LogLevel {
    Emergency = 0,
    Alert = 1,
    Critical = 2,
    Error = 3,
    Warning = 4,
    Notice = 5,
    Info = 6,
    Debug = 7,
}

impl LogLevel {
    fn of(priority: u32) -> Self {
        match priority & 7 {
            0 => Self::Emergency,
            1 => Self::Alert,
            2 => Self::Critical,
            3 => Self::Error,
            4 => Self::Warning,
            5 => Self::Notice,
            6 => Self::Info,
            _ => Self::Debug,
        }
    }
}

/// One message in a kernel's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRecord {
    /// Its number since the kernel's start. Where one is missing, the message was overwritten.
    pub sequence: u64,
    /// How urgent it is.
    pub level: LogLevel,
    /// Who logged it, as of syslog(3): 0 is the kernel, 1 a program that wrote to `/dev/kmsg`, others services.
    pub facility: u32,
    /// When it was logged, since the kernel's start.
    pub time: Duration,
    /// What it says, perhaps in several lines. What is no UTF-8 is replaced.
    pub text: String,
}

/// As `dmesg` has it: `[    5.678901] text`.
impl fmt::Display for LogRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = self.time.as_micros();
        let (seconds, rest) = (us / 1_000_000, us % 1_000_000);
        for (number, line) in self.text.split('\n').enumerate() {
            if number > 0 {
                f.write_str("\n")?;
            }
            write!(f, "[{seconds:5}.{rest:06}] ")?;
            // Nothing that a guest logs moves a terminal.
            line.chars().try_for_each(|c| match c.is_control() && c != '\t' {
                true => write!(f, "{}", c.escape_default()),
                false => write!(f, "{c}"),
            })?;
        }
        Ok(())
    }
}

/// A place in a kernel's log, between two messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogMark(u64);

/// What a kernel's log held at some time, or a part of it, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelLog {
    records: Vec<LogRecord>,
    end: u64,
}

impl KernelLog {
    /// The messages.
    pub fn records(&self) -> &[LogRecord] {
        &self.records
    }

    /// The end of it, for [`since`](Self::since) of a log that is read later.
    pub fn mark(&self) -> LogMark {
        LogMark(self.end)
    }

    /// What came after a mark.
    pub fn since(&self, mark: &LogMark) -> Self {
        self.filtered(|record| record.sequence >= mark.0)
    }

    /// What is at least as urgent: `at_least(LogLevel::Warning)` has warnings, errors and worse.
    pub fn at_least(&self, level: LogLevel) -> Self {
        self.filtered(|record| record.level <= level)
    }

    /// What has this in its text.
    pub fn containing(&self, text: &str) -> Self {
        self.filtered(|record| record.text.contains(text))
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// What the kernel reports of itself in it: panics, oopses, warnings and others.
    pub fn events(&self) -> Vec<KernelEvent> {
        events_of(&self.records)
    }

    fn filtered(&self, wanted: impl Fn(&LogRecord) -> bool) -> Self {
        let records = self.records.iter().filter(|record| wanted(record)).cloned().collect();
        Self { records, end: self.end }
    }
}

/// What the kernel reports of itself in these records.
pub(crate) fn events_of(records: &[LogRecord]) -> Vec<KernelEvent> {
    let mut reader = EventReader::all();
    for record in records.iter().filter(|record| record.facility == 0) {
        reader.feed(format!("{record}\r\n").as_bytes());
    }
    reader.finish();
    reader.into_events()
}

/// As `dmesg` prints it, a line for each line of a message.
impl fmt::Display for KernelLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.records.iter().try_for_each(|record| writeln!(f, "{record}"))
    }
}

impl Vm {
    /// Reads all that the kernel's log holds: also what is not on the console, whatever its level, and without
    /// any program of the guest. What the kernel's buffer (`log_buf_len=`) has overwritten is gone.
    /// A kernel that logs without end is read for five seconds.
    ///
    /// ```no_run
    /// # use vmlab::LogLevel;
    /// # let vm = vmlab::Vm::builder().kernel("debian:6.12").start()?;
    /// let before = vm.kernel_log()?.mark();
    /// vm.exec(["modprobe", "mymodule"])?;
    /// let complaints = vm.kernel_log()?.since(&before).at_least(LogLevel::Warning);
    /// assert!(complaints.is_empty(), "{complaints}");
    /// # Ok::<(), vmlab::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::KernelLog`] when it cannot be read in the guest, or is longer than 64 MiB. Other errors when the
    /// VM has ended.
    pub fn kernel_log(&self) -> Result<KernelLog, Error> {
        let command = Command::of_agent(self, GuestUser::default()).arg("kernel-log");
        let mut child = command.stderr(Stdio::Null).spawn()?;
        let mut bytes = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            // That it breaks is seen below, and what the log then lacks.
            let _ = stdout.take(MAX_LOG).read_to_end(&mut bytes);
        }
        let status = child.wait()?;
        decode(&bytes).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof if (bytes.len() as u64) < MAX_LOG => {
                let how = format!("the agent's part ended early: {status}");
                Error::KernelLog { source: io::Error::other(how) }
            }
            _ => Error::KernelLog { source },
        })
    }
}

/// Reads what the agent writes: records behind their lengths, a length of 0, an error number.
fn decode(mut bytes: &[u8]) -> io::Result<KernelLog> {
    let mut log = KernelLog::default();
    let mut read = |count: usize| match bytes.split_at_checked(count) {
        Some((read, rest)) => {
            bytes = rest;
            Ok(read)
        }
        None => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
    };
    loop {
        let length = read(2)?.iter().rfold(0, |sum, byte| sum << 8 | usize::from(*byte));
        if length == 0 {
            break;
        }
        if let Some(record) = parse(read(length)?) {
            log.end = record.sequence.saturating_add(1);
            log.records.push(record);
        }
    }
    match read(4)?.iter().rfold(0_u32, |sum, byte| sum << 8 | u32::from(*byte)) {
        0 => Ok(log),
        errno => Err(io::Error::from_raw_os_error(errno.cast_signed())),
    }
}

/// Reads a record (`Documentation/ABI/testing/dev-kmsg`); `None` for what is none.
pub(crate) fn parse(record: &[u8]) -> Option<LogRecord> {
    let at = record.iter().position(|byte| *byte == b';')?;
    let (head, text) = (str::from_utf8(&record[..at]).ok()?, &record[at + 1..]);
    let mut fields = head.split(',');
    let mut number = || fields.next()?.parse::<u64>().ok();
    let (priority, sequence, us) = (number()?, number()?, number()?);
    let priority = u32::try_from(priority).ok()?;
    // Behind the first line are properties of a device.
    let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    Some(LogRecord {
        sequence,
        level: LogLevel::of(priority),
        facility: priority >> 3,
        time: Duration::from_micros(us),
        text: String::from_utf8_lossy(&unescaped(line)).into_owned(),
    })
}

/// Takes back what the kernel does to bytes that are not printable: `\x0a`.
fn unescaped(line: &[u8]) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut out = Vec::with_capacity(line.len());
    let mut rest = line;
    while let [first, more @ ..] = rest {
        rest = more;
        let escaped = match (first, more) {
            (b'\\', [b'x', high, low, ..]) => digit(*high).zip(digit(*low)),
            _ => None,
        };
        match escaped {
            Some((high, low)) => {
                out.push((high << 4 | low) as u8);
                rest = &more[3..];
            }
            None => out.push(*first),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(records: &[&str], errno: i32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for record in records {
            bytes.extend((record.len() as u16).to_le_bytes());
            bytes.extend(record.as_bytes());
        }
        bytes.extend([0, 0]);
        bytes.extend(errno.to_le_bytes());
        bytes
    }

    const RECORDS: [&str; 5] = [
        "5,0,0,-;Linux version 6.12\n",
        "4,7,1234567,-;two\\x0alines \\x5c \\xc3\\xa4\n SUBSYSTEM=pci\n",
        "garbage",
        "15,8,1234568,-;from a program",
        "2,9,99000000,-,caller=T1;critical\n",
    ];

    #[test]
    fn records_are_read_as_the_kernel_gives_them_out() {
        let log = decode(&log(&RECORDS, 0)).unwrap();
        let second = &log.records()[1];
        assert_eq!((second.sequence, second.level, second.facility), (7, LogLevel::Warning, 0));
        assert_eq!(second.time, Duration::from_micros(1_234_567));
        assert_eq!(second.text, "two\nlines \\ ä");
        let third = &log.records()[2];
        assert_eq!((third.level, third.facility), (LogLevel::Debug, 1));
        assert_eq!(
            log.to_string(),
            "[    0.000000] Linux version 6.12\n[    1.234567] two\n[    1.234567] lines \\ ä\n\
             [    1.234568] from a program\n[   99.000000] critical\n"
        );
    }

    #[test]
    fn what_a_guest_logs_moves_no_terminal() {
        let log = decode(&log(&["4,1,0,-;a\\x1b[2Jb\\x9b\tc"], 0)).unwrap();
        assert!(log.records()[0].text.starts_with("a\u{1b}[2Jb"));
        assert!(log.to_string().starts_with("[    0.000000] a\\u{1b}[2Jb"), "{log}");
        assert!(!log.to_string().contains('\u{1b}') && log.to_string().ends_with("\tc\n"));
    }

    #[test]
    fn logs_are_narrowed_down() {
        let all = decode(&log(&RECORDS, 0)).unwrap();
        let before = decode(&log(&RECORDS[..2], 0)).unwrap().mark();
        let texts = |log: &KernelLog| {
            log.records().iter().map(|record| record.text.clone()).collect::<Vec<_>>()
        };
        assert_eq!(texts(&all.since(&before)), ["from a program", "critical"]);
        assert_eq!(texts(&all.since(&before).at_least(LogLevel::Warning)), ["critical"]);
        assert_eq!(texts(&all.containing("Linux")), ["Linux version 6.12"]);
        assert!(all.since(&all.mark()).is_empty());
        // What is narrowed down ends where the whole does.
        assert_eq!(all.containing("Linux").mark(), all.mark());
    }

    #[test]
    fn what_the_kernel_says_of_itself_is_found() {
        let records = ["0,1,5,-;Kernel panic - not syncing: a test", "8,2,6,-;Kernel panic - not"];
        let events = decode(&log(&records, 0)).unwrap().events();
        assert_eq!(events.len(), 1, "{events:?}");
        assert_eq!(events[0].title, "kernel panic: a test");
    }

    #[test]
    fn logs_that_cannot_be_read_say_why() {
        assert_eq!(decode(&log(&[], 1)).unwrap_err().raw_os_error(), Some(1));
        let whole = log(&RECORDS, 0);
        for end in 0..whole.len() {
            let error = decode(&whole[..end]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{end}");
        }
    }
}
