//! Records on streams of bytes.

use std::io::{self, BufReader, Read, Write};

use vmlab_wire::tree::{MAX_DATA, Record, RecordHeader};

use crate::CopyError;

/// Reads records, one at a time.
pub(crate) struct Records<R> {
    stream: BufReader<R>,
    payload: Vec<u8>,
}

impl<R: Read> Records<R> {
    pub(crate) fn new(stream: R) -> Self {
        Self { stream: BufReader::with_capacity(MAX_DATA, stream), payload: Vec::new() }
    }

    /// The next record. A stream that ends before a record says so is broken.
    pub(crate) fn next(&mut self) -> Result<Record<'_>, CopyError> {
        let mut header = [0; RecordHeader::LEN];
        self.stream.read_exact(&mut header).map_err(CopyError::Stream)?;
        let header = RecordHeader::decode(header)?;
        // The header has seen to it that this is bounded.
        self.payload.resize(header.payload_len(), 0);
        self.stream.read_exact(&mut self.payload).map_err(CopyError::Stream)?;
        match Record::decode(header, &self.payload)? {
            Record::Failed { doing, errno, path } => Err(CopyError::there(doing, errno, path)),
            record => Ok(record),
        }
    }
}

/// Writes records, several at once where they are short.
pub(crate) struct Writer<W: Write> {
    stream: W,
    buffer: Vec<u8>,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(stream: W) -> Self {
        Self { stream, buffer: Vec::with_capacity(2 * MAX_DATA) }
    }

    pub(crate) fn put(&mut self, record: &Record<'_>) -> Result<(), CopyError> {
        record.encode(&mut self.buffer);
        if self.buffer.len() >= MAX_DATA { self.flush() } else { Ok(()) }
    }

    pub(crate) fn flush(&mut self) -> Result<(), CopyError> {
        let written = self.stream.write_all(&self.buffer).and_then(|()| self.stream.flush());
        self.buffer.clear();
        written.map_err(CopyError::Stream)
    }
}

/// Reads what a receiver has to say at its end ([`answer`](crate::answer)).
///
/// # Errors
/// When it did not receive all, or ended without a word.
pub fn outcome(stream: impl Read) -> Result<(), CopyError> {
    match Records::new(stream).next()? {
        Record::Done => Ok(()),
        _ => Err(CopyError::Stream(io::ErrorKind::InvalidData.into())),
    }
}
