//! What a test in the guest writes: printed as the harness has it of any test, kept in part, and parted from
//! what the test tells.

use std::collections::{BTreeMap, VecDeque};
use std::io::Read;
use std::sync::Mutex;

use super::records::{Ended, Piece, Reader, Record};
use crate::results::Measurement;
use crate::sync::lock;

/// How much of a test's output is in its results, in bytes. The end has what failed.
const KEPT_OUTPUT: usize = 64 * 1024;

/// How much is kept of what the program writes before the body begins, to be shown if it never does, in bytes.
const KEPT_PRELUDE: usize = 4 * 1024;

/// The longest line that is printed in one piece, in bytes.
const LONGEST_LINE: usize = 64 * 1024;

/// How much one test may tell in measurements and details, in bytes: reports of many tests are read at once.
const MAX_TOLD: usize = 4 * 1024 * 1024;

/// What a test has told.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) began: bool,
    pub(super) ended: Option<Ended>,
    pub(super) measurements: Vec<Measurement>,
    pub(super) details: BTreeMap<String, serde_json::Value>,
    /// What the program wrote before the body began.
    pub(super) prelude: Vec<u8>,
    bytes: usize,
}

impl Told {
    pub(super) fn record(&mut self, record: Record) {
        match record {
            Record::Began => self.began = true,
            Record::Ended(ended) => self.ended = Some(ended),
            Record::Measured(measured) => {
                if self.has_room(measured.name.len() + measured.unit.len() + size_of::<f64>()) {
                    self.measurements.push(measured);
                }
            }
            Record::Detail { key, value } => {
                if self.has_room(key.len() + value.to_string().len()) {
                    self.details.insert(key, value);
                }
            }
        }
    }

    fn has_room(&mut self, bytes: usize) -> bool {
        let room = self.bytes + bytes <= MAX_TOLD;
        self.bytes += if room { bytes } else { 0 };
        room
    }
}

/// Prints a test's standard output, and takes what it tells.
pub(super) fn stdout(stream: impl Read, word: &str, told: &Mutex<Told>, tail: &Mutex<Tail>) {
    let mut out = Printer { print: print_out, line: Vec::new(), tail };
    let mut reader = Reader::new(word);
    read_all(stream, |bytes| {
        let mut told = lock(told);
        reader.feed(bytes, |piece| match piece {
            Piece::Record(record) => told.record(record),
            // What the harness writes around the body is of no interest.
            Piece::Text(_) if told.ended.is_some() => {}
            Piece::Text(text) if told.began => out.write(text),
            Piece::Text(text) => {
                let room = KEPT_PRELUDE.saturating_sub(told.prelude.len()).min(text.len());
                told.prelude.extend_from_slice(&text[..room]);
            }
        });
    });
    out.flush();
}

/// Prints a test's standard error.
pub(super) fn stderr(stream: impl Read, tail: &Mutex<Tail>) {
    let mut out = Printer { print: print_error, line: Vec::new(), tail };
    read_all(stream, |bytes| out.write(bytes));
    out.flush();
}

/// Reads until the end. A stream fails only when the VM has ended, which is found elsewhere.
fn read_all(mut from: impl Read, mut take: impl FnMut(&[u8])) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        take(&buffer[..count]);
    }
}

/// The last of an output.
#[derive(Default)]
pub(super) struct Tail(VecDeque<u8>);

impl Tail {
    fn add(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
        let excess = self.0.len().saturating_sub(KEPT_OUTPUT);
        self.0.drain(..excess);
    }

    pub(super) fn text(self) -> String {
        String::from_utf8_lossy(&Vec::from(self.0)).into_owned()
    }
}

/// Prints bytes as lines of text.
struct Printer<'a> {
    print: fn(&str),
    line: Vec<u8>,
    tail: &'a Mutex<Tail>,
}

impl Printer<'_> {
    fn write(&mut self, bytes: &[u8]) {
        lock(self.tail).add(bytes);
        self.line.extend_from_slice(bytes);
        let whole = match self.line.iter().rposition(|byte| *byte == b'\n') {
            Some(end) => end + 1,
            None if self.line.len() > LONGEST_LINE => self.line.len(),
            None => return,
        };
        let rest = self.line.split_off(whole);
        (self.print)(&String::from_utf8_lossy(&self.line));
        self.line = rest;
    }

    fn flush(&mut self) {
        if !self.line.is_empty() {
            (self.print)(&String::from_utf8_lossy(&self.line));
            self.line.clear();
        }
    }
}

#[allow(clippy::print_stdout, reason = "the harness captures what is printed, and nothing else")]
fn print_out(text: &str) {
    print!("{text}");
}

#[allow(clippy::print_stderr, reason = "the harness captures what is printed, and nothing else")]
pub(super) fn print_error(text: &str) {
    eprint!("{text}");
}
