//! Lines of a console: what the kernel put before them, and whether they are the kernel's at all.

use std::borrow::Cow;

use memchr::{memchr, memchr_iter};

use crate::hypervisor::printable;

/// The longest line that is looked at. The kernel's own end at about 1,000 bytes (`LOG_LINE_MAX`); what a
/// guest writes beyond this without a newline costs nothing.
pub(super) const MAX_LINE: usize = 4096;

/// How many places of a line are tried for a time stamp behind a program's text.
const MAX_STAMP_TRIES: usize = 8;

/// Cuts bytes into lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Calls `each` with every line that ends in `bytes`, without what is meant for a terminal.
    pub(super) fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(&str)) {
        let mut rest = bytes;
        while let Some(end) = memchr(b'\n', rest) {
            let (line, behind) = (&rest[..end], &rest[end + 1..]);
            if self.partial.is_empty() {
                each(&clean(&line[..line.len().min(MAX_LINE)]));
            } else {
                self.keep(line);
                each(&clean(&self.partial));
                self.partial.clear();
            }
            rest = behind;
        }
        self.keep(rest);
    }

    /// The line that has not ended yet, as one that has.
    pub(super) fn flush(&mut self, each: impl FnOnce(&str)) {
        if !self.partial.is_empty() {
            each(&clean(&self.partial));
            self.partial.clear();
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = MAX_LINE - self.partial.len();
        self.partial.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.partial.len()
    }
}

fn clean(line: &[u8]) -> Cow<'_, str> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    match std::str::from_utf8(line) {
        Ok(text) if line.iter().all(|b| (b' '..=b'~').contains(b)) => {
            Cow::Borrowed(text.trim_end())
        }
        _ => Cow::Owned(printable(&String::from_utf8_lossy(line))),
    }
}

/// Who wrote a line, where the kernel says so (`CONFIG_PRINTK_CALLER`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caller {
    Task(u32),
    Cpu(u32),
}

/// A line of the kernel's without what it put before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Line<'a> {
    /// Its clock, in microseconds.
    pub(super) at_us: Option<u64>,
    pub(super) caller: Option<Caller>,
    pub(super) text: &'a str,
}

impl<'a> Line<'a> {
    /// Takes apart what `print_prefix` of kernel/printk/printk.c makes. A program that has not ended its
    /// own line may stand before it.
    pub(super) fn parse(line: &'a str) -> Self {
        let line = without_level(line);
        if let Some(stamped) = stamped(line) {
            return stamped;
        }
        let later = memchr_iter(b'[', line.as_bytes()).take(MAX_STAMP_TRIES);
        later.filter_map(|at| stamped(&line[at..])).next().unwrap_or(Self {
            at_us: None,
            caller: None,
            text: line,
        })
    }
}

/// `<4>`: the level, and the facility of what a program wrote to /dev/kmsg.
fn without_level(line: &str) -> &str {
    let level = line.strip_prefix('<').and_then(|rest| rest.split_once('>'));
    match level {
        Some((level, rest)) if (1..=4).contains(&level.len()) && all_digits(level) => rest,
        _ => line,
    }
}

fn all_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// `[    1.234567] text`, also with `[  T123]` or `[    C0]` behind the time.
fn stamped(line: &str) -> Option<Line<'_>> {
    let (stamp, mut text) = line.strip_prefix('[')?.split_once(']')?;
    let (seconds, micros) = stamp.trim_start_matches(' ').split_once('.')?;
    if micros.len() != 6 || !all_digits(micros) || !all_digits(seconds) {
        return None;
    }
    let seconds: u64 = seconds.parse().ok()?;
    let at_us = seconds.checked_mul(1_000_000)?.checked_add(micros.parse().ok()?)?;
    let mut caller = None;
    if let Some((inner, behind)) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        caller = who(inner.trim_start_matches(' '));
        text = if caller.is_some() { behind } else { text };
    }
    Some(Line { at_us: Some(at_us), caller, text: text.strip_prefix(' ').unwrap_or(text) })
}

fn who(inner: &str) -> Option<Caller> {
    let id = inner.get(1..).filter(|id| all_digits(id))?.parse().ok()?;
    match inner.as_bytes()[0] {
        b'T' => Some(Caller::Task(id)),
        b'C' => Some(Caller::Cpu(id)),
        _ => None,
    }
}

/// Which lines are the kernel's. Its console is shared with programs, so words alone prove nothing; but a
/// kernel that puts the time before its lines does so before all of them.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    /// A line with a time was seen.
    stamps: bool,
    /// The kernel's first line was seen, without a time (`printk.time=0`).
    bare: bool,
}

/// How a kernel begins, whatever its log level lets through later.
pub(super) const FIRST_LINE: &str = "Linux version ";

impl Evidence {
    /// Whether a line may be the kernel's, and whether it surely is. Before any evidence every line may be:
    /// its text has to have a form that only the kernel's has.
    pub(super) fn weigh(&mut self, line: &Line<'_>) -> Option<bool> {
        if line.at_us.is_some() {
            self.stamps = true;
            return Some(true);
        }
        self.bare |= !self.stamps && line.text.starts_with(FIRST_LINE);
        (!self.stamps).then_some(self.bare)
    }
}
