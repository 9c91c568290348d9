//! What a test in the guest tells the host, in the standard output of its program.
//!
//! A record is JSON, cut into frames: a separator, the VM's own word, whether more follows, a part of the
//! record, a newline. A frame is written at once and fits what a pipe takes whole (`PIPE_BUF`), so that
//! processes which write to the same pipe do not come between.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::results::Measurement;

/// ASCII's record separator, which texts do not have.
const SEPARATOR: u8 = 0x1e;

/// The most of a record in one frame, in bytes, so that all of it is below `PIPE_BUF` (4096).
const PART: usize = 3072;

/// The longest record that is taken, in bytes: more than a person reads of one message. A longer one is cut
/// where it is made.
const MAX_RECORD: usize = 1024 * 1024;

/// The longest text in a record, in bytes. Each may take six in JSON.
const MAX_TEXT: usize = MAX_RECORD / 8;

/// Something that a test tells.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Record {
    /// The body begins. What was written before is the harness's.
    Began,
    Measured(Measurement),
    Detail {
        key: String,
        value: Value,
    },
    Ended(Ended),
}

/// How a body ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ended {
    Passed,
    /// It returned a failure.
    Failed(String),
    /// It panicked: with what, unless that is no text, and where.
    Panicked {
        message: Option<String>,
        place: Option<String>,
    },
    Skipped(String),
}

/// As much of a text as a record can have.
pub(super) fn shortened(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        text.push_str(" […]");
    }
    text
}

/// Writes a record.
pub(super) fn write(mut to: impl Write, channel: &str, record: &Record) -> io::Result<()> {
    let json = serde_json::to_vec(record)?;
    if json.len() > MAX_RECORD {
        let message = format!("a record of more than {MAX_RECORD} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    let mut parts = json.chunks(PART).peekable();
    while let Some(part) = parts.next() {
        let mut frame = vec![SEPARATOR];
        frame.extend_from_slice(channel.as_bytes());
        frame.push(if parts.peek().is_some() { b'+' } else { b'.' });
        frame.extend_from_slice(part);
        frame.push(b'\n');
        to.write_all(&frame)?;
    }
    Ok(())
}

/// Something that was read.
#[derive(Debug, PartialEq)]
pub(super) enum Piece<'a> {
    Text(&'a [u8]),
    Record(Record),
}

/// Parts records from what else is written.
#[derive(Debug)]
pub(super) struct Reader {
    /// What a frame begins with.
    head: Vec<u8>,
    /// What may be the beginning of a frame.
    held: Vec<u8>,
    /// The parts of a record so far.
    record: Vec<u8>,
}

impl Reader {
    pub(super) fn new(channel: &str) -> Self {
        let mut head = vec![SEPARATOR];
        head.extend_from_slice(channel.as_bytes());
        Self { head, held: Vec::new(), record: Vec::new() }
    }

    /// Takes what came, in pieces of any size.
    pub(super) fn feed(&mut self, bytes: &[u8], mut take: impl FnMut(Piece<'_>)) {
        let mut held = std::mem::take(&mut self.held);
        held.extend_from_slice(bytes);
        let mut rest = held.as_slice();
        while !rest.is_empty() {
            let Some(at) = memchr::memchr(SEPARATOR, rest) else {
                take(Piece::Text(rest));
                return;
            };
            if at > 0 {
                take(Piece::Text(&rest[..at]));
            }
            rest = &rest[at..];
            let compared = rest.len().min(self.head.len());
            if rest[..compared] != self.head[..compared] {
                take(Piece::Text(&rest[..1]));
                rest = &rest[1..];
                continue;
            }
            let longest = self.head.len() + 1 + PART + 1;
            match memchr::memchr(b'\n', &rest[..rest.len().min(longest)]) {
                Some(end) if end > self.head.len() => {
                    if let Some(record) = self.frame(&rest[self.head.len()..end]) {
                        take(Piece::Record(record));
                    }
                    rest = &rest[end + 1..];
                }
                None if rest.len() < longest => {
                    self.held = rest.to_vec();
                    return;
                }
                _ => {
                    take(Piece::Text(&rest[..1]));
                    rest = &rest[1..];
                }
            }
        }
    }

    /// Takes a frame without what is around it.
    fn frame(&mut self, frame: &[u8]) -> Option<Record> {
        let (more, part) = frame.split_first()?;
        if self.record.len() + part.len() <= MAX_RECORD {
            self.record.extend_from_slice(part);
        }
        match more {
            b'+' => None,
            _ => serde_json::from_slice(&std::mem::take(&mut self.record)).ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text and the records of some output that comes in pieces of a size.
    fn read(output: &[u8], size: usize) -> (String, Vec<Record>) {
        let (mut text, mut records) = (Vec::new(), Vec::new());
        let mut reader = Reader::new("word");
        for piece in output.chunks(size) {
            reader.feed(piece, |piece| match piece {
                Piece::Text(bytes) => text.extend_from_slice(bytes),
                Piece::Record(record) => records.push(record),
            });
        }
        (String::from_utf8(text).unwrap(), records)
    }

    #[test]
    fn records_are_parted_from_text() {
        let long = "long \u{1e}word.\n\"".repeat(2000);
        let detail = Record::Detail { key: "k".to_owned(), value: long.into() };
        let ended = Record::Ended(Ended::Panicked { message: Some("m".to_owned()), place: None });
        let mut output = b"before\n".to_vec();
        write(&mut output, "word", &Record::Began).unwrap();
        output.extend_from_slice(b"no \x1ewor end\x1e");
        write(&mut output, "word", &detail).unwrap();
        output.extend_from_slice(b"in a line");
        write(&mut output, "word", &ended).unwrap();
        write(&mut output, "else", &Record::Began).unwrap();
        for size in [1, 7, 4096, output.len()] {
            let (text, records) = read(&output, size);
            assert_eq!(text, "before\nno \x1ewor end\x1ein a line\x1eelse.\"Began\"\n", "{size}");
            assert_eq!(records, [Record::Began, detail.clone(), ended.clone()], "{size}");
        }
    }

    /// What frames are made of, and what may come between.
    const PIECES: [&str; 9] = [
        "\u{1e}",
        "\u{1e}word",
        "\u{1e}word.",
        "\u{1e}word+",
        "\n",
        "\"Began\"",
        "{\"Ended\":\"Passed\"}",
        "wor",
        "text",
    ];

    proptest::proptest! {
        #[test]
        fn where_output_is_cut_makes_no_difference(
            pieces in proptest::collection::vec(proptest::sample::select(&PIECES), 0..30),
            size in 1..9_usize,
        ) {
            let output = pieces.concat().into_bytes();
            proptest::prop_assert_eq!(read(&output, size), read(&output, output.len().max(1)));
        }
    }

    #[test]
    fn what_a_guest_sends_without_end_is_not_kept() {
        let mut reader = Reader::new("word");
        let mut records = 0;
        for _ in 0..1000 {
            reader.feed(b"\x1eword+", |_| {});
            reader.feed(&[b'x'; PART], |_| {});
            reader.feed(b"\n", |piece| records += usize::from(matches!(piece, Piece::Record(_))));
        }
        assert!(reader.record.len() <= MAX_RECORD && reader.held.is_empty());
        reader.feed(b"\x1eword.", |_| {});
        reader.feed(&[b'x'; 100_000], |_| {});
        assert!(reader.held.len() <= PART + 16, "{}", reader.held.len());
        assert_eq!(records, 0);
    }

    #[test]
    fn texts_are_cut_where_a_record_would_be_too_long() {
        let text = shortened("ä\u{1}".repeat(MAX_RECORD));
        assert!(text.ends_with(" […]"));
        let record = Record::Ended(Ended::Failed(text));
        write(Vec::new(), "word", &record).unwrap();
    }
}
