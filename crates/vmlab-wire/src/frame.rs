//! Frames: what the byte channel carries after the preambles.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | stream id, little endian |
//! | 4 | 1 | kind, see [`FrameKind`] |
//! | 5 | 3 | zero |
//! | 8 | 4 | length of the payload in bytes, little endian |
//! | 12 | length | payload |

use thiserror::Error;

/// The most bytes that one [`FrameKind::Data`] frame carries.
pub const MAX_DATA: usize = 256 * 1024;

/// The most bytes of one message. A command's arguments and environment must fit: Linux allows 2 MiB
/// of them with the usual stack limit and 6 MiB at the most.
pub const MAX_MESSAGE: usize = 8 * 1024 * 1024;

/// A stream of frames. Stream 0 carries messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u32);

impl StreamId {
    /// The stream that carries messages.
    pub const CONTROL: StreamId = StreamId(0);
}

/// What a frame means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// An encoded message, on stream 0 only.
    Message = 0,
    /// Bytes of a stream, at least one. They use up credit, which is what bounds the number of frames.
    Data = 1,
    /// No more data will come on this stream. Empty payload.
    Eof = 2,
    /// The receiver of the stream grants as many bytes more: a `u32`, little endian.
    Credit = 3,
    /// The receiver of the stream will read no more of it, as a closed pipe's reader. Empty payload.
    Stop = 4,
}

impl FrameKind {
    fn parse(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Message,
            1 => Self::Data,
            2 => Self::Eof,
            3 => Self::Credit,
            4 => Self::Stop,
            _ => return None,
        })
    }
}

/// Bytes that are no frame. The channel cannot be used any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FrameError {
    /// Unknown kind, or non-zero padding.
    #[error("not a frame: kind and padding are {0:02x?}")]
    Kind([u8; 4]),
    /// More payload than the kind allows.
    #[error("a {kind:?} frame of {len} bytes, more than the {max} allowed")]
    TooLong {
        /// What the frame claims to be.
        kind: FrameKind,
        /// Its claimed length in bytes.
        len: u32,
        /// The most that this kind may have.
        max: usize,
    },
    /// Less or more payload than the kind needs.
    #[error("a {kind:?} frame of {len} bytes, which has {want}")]
    Length {
        /// What the frame claims to be.
        kind: FrameKind,
        /// Its claimed length in bytes.
        len: u32,
        /// The only length it may have.
        want: usize,
    },
    /// Data without a byte: it would use up no credit, so that any number of them could come.
    #[error("a Data frame without data on stream {}", .0.0)]
    Empty(StreamId),
    /// A message outside of stream 0, or anything else on it.
    #[error("a {kind:?} frame on stream {}", stream.0)]
    WrongStream {
        /// What the frame claims to be.
        kind: FrameKind,
        /// Where it came.
        stream: StreamId,
    },
}

/// The fixed part of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Which stream the frame belongs to.
    pub stream: StreamId,
    /// What the frame means.
    pub kind: FrameKind,
    /// Length of the payload in bytes.
    pub len: u32,
}

impl FrameHeader {
    /// Length of an encoded header in bytes.
    pub const LEN: usize = 12;

    /// The bytes to send.
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..4].copy_from_slice(&self.stream.0.to_le_bytes());
        out[4] = self.kind as u8;
        out[8..].copy_from_slice(&self.len.to_le_bytes());
        out
    }

    fn parse(bytes: [u8; Self::LEN]) -> Result<Self, FrameError> {
        let [s0, s1, s2, s3, k, p0, p1, p2, l0, l1, l2, l3] = bytes;
        let stream = StreamId(u32::from_le_bytes([s0, s1, s2, s3]));
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let kind = match FrameKind::parse(k) {
            Some(kind) if [p0, p1, p2] == [0; 3] => kind,
            _ => return Err(FrameError::Kind([k, p0, p1, p2])),
        };
        if (stream == StreamId::CONTROL) != (kind == FrameKind::Message) {
            return Err(FrameError::WrongStream { kind, stream });
        }
        let exactly = |want: usize| match len as usize == want {
            true => Ok(()),
            false => Err(FrameError::Length { kind, len, want }),
        };
        let at_most = |max: usize| match len as usize <= max {
            true => Ok(()),
            false => Err(FrameError::TooLong { kind, len, max }),
        };
        match kind {
            FrameKind::Message => at_most(MAX_MESSAGE)?,
            FrameKind::Data if len == 0 => return Err(FrameError::Empty(stream)),
            FrameKind::Data => at_most(MAX_DATA)?,
            FrameKind::Eof | FrameKind::Stop => exactly(0)?,
            FrameKind::Credit => exactly(4)?,
        }
        Ok(Self { stream, kind, len })
    }
}

/// A received frame. It borrows from the [`Decoder`] that found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// An encoded message, for [`message::decode`](crate::message::decode).
    Message(&'a [u8]),
    /// Bytes of a stream.
    Data(StreamId, &'a [u8]),
    /// The stream has ended.
    Eof(StreamId),
    /// The peer has room for this many bytes more.
    Credit(StreamId, u32),
    /// The peer will read no more of the stream.
    Stop(StreamId),
}

/// Appends a frame without payload.
pub fn put_empty(out: &mut Vec<u8>, stream: StreamId, kind: FrameKind) {
    out.extend_from_slice(&FrameHeader { stream, kind, len: 0 }.encode());
}

/// Appends a grant of `bytes` more.
pub fn put_credit(out: &mut Vec<u8>, stream: StreamId, bytes: u32) {
    out.extend_from_slice(&FrameHeader { stream, kind: FrameKind::Credit, len: 4 }.encode());
    out.extend_from_slice(&bytes.to_le_bytes());
}

/// Appends `data` as frames of at most [`MAX_DATA`] bytes, none for no data.
pub fn put_data(out: &mut Vec<u8>, stream: StreamId, data: &[u8]) {
    for chunk in data.chunks(MAX_DATA) {
        let len = chunk.len() as u32;
        out.extend_from_slice(&FrameHeader { stream, kind: FrameKind::Data, len }.encode());
        out.extend_from_slice(chunk);
    }
}

/// Cuts received bytes into frames.
///
/// It holds no more than one frame and what came after it in the same read.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// A decoder that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in bytes as they came, in pieces of any size.
    pub fn push(&mut self, bytes: &[u8]) {
        self.compact();
        self.buffer.extend_from_slice(bytes);
    }

    /// Room for up to `want` bytes to read into; [`filled`](Space::filled) says how many came.
    pub fn space(&mut self, want: usize) -> Space<'_> {
        self.compact();
        let old = self.buffer.len();
        self.buffer.resize(old + want, 0);
        Space { buffer: &mut self.buffer, old, filled: 0 }
    }

    /// The next whole frame, or `None` until more bytes come.
    ///
    /// # Errors
    /// When the bytes are no frame. Every later call then gives the same error.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let rest = &self.buffer[self.start..];
        let Some((header, rest)) = rest.split_first_chunk::<{ FrameHeader::LEN }>() else {
            return Ok(None);
        };
        let header = FrameHeader::parse(*header)?;
        let len = header.len as usize;
        if rest.len() < len {
            return Ok(None);
        }
        self.start += FrameHeader::LEN + len;
        let payload = &self.buffer[self.start - len..self.start];
        let stream = header.stream;
        Ok(Some(match header.kind {
            FrameKind::Message => Frame::Message(payload),
            FrameKind::Data => Frame::Data(stream, payload),
            FrameKind::Eof => Frame::Eof(stream),
            FrameKind::Stop => Frame::Stop(stream),
            FrameKind::Credit => {
                let mut bytes = [0; 4];
                bytes.copy_from_slice(payload);
                Frame::Credit(stream, u32::from_le_bytes(bytes))
            }
        }))
    }

    /// Bytes held that are no whole frame yet.
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.start
    }

    fn compact(&mut self) {
        if self.start == self.buffer.len() {
            self.buffer.clear();
        } else if self.start > 0 {
            self.buffer.drain(..self.start);
        }
        self.start = 0;
    }
}

/// Writable room at the end of a [`Decoder`]'s buffer. What is not declared filled is given back.
#[derive(Debug)]
pub struct Space<'a> {
    buffer: &'a mut Vec<u8>,
    old: usize,
    filled: usize,
}

impl Space<'_> {
    /// The room to read into.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.buffer[self.old..]
    }

    /// Declares that the first `count` bytes have been read into.
    pub fn filled(mut self, count: usize) {
        self.filled = count.min(self.buffer.len() - self.old);
    }
}

impl Drop for Space<'_> {
    fn drop(&mut self) {
        self.buffer.truncate(self.old + self.filled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, PartialEq)]
    enum Owned {
        Message(Vec<u8>),
        Data(u32, Vec<u8>),
        Eof(u32),
        Credit(u32, u32),
        Stop(u32),
    }

    impl From<Frame<'_>> for Owned {
        fn from(frame: Frame<'_>) -> Self {
            match frame {
                Frame::Message(b) => Owned::Message(b.to_vec()),
                Frame::Data(s, b) => Owned::Data(s.0, b.to_vec()),
                Frame::Eof(s) => Owned::Eof(s.0),
                Frame::Credit(s, n) => Owned::Credit(s.0, n),
                Frame::Stop(s) => Owned::Stop(s.0),
            }
        }
    }

    fn put(out: &mut Vec<u8>, frame: &Owned) {
        match frame {
            Owned::Message(b) => {
                let len = b.len() as u32;
                let header =
                    FrameHeader { stream: StreamId::CONTROL, kind: FrameKind::Message, len };
                out.extend_from_slice(&header.encode());
                out.extend_from_slice(b);
            }
            Owned::Data(s, b) => put_data(out, StreamId(*s), b),
            Owned::Eof(s) => put_empty(out, StreamId(*s), FrameKind::Eof),
            Owned::Credit(s, n) => put_credit(out, StreamId(*s), *n),
            Owned::Stop(s) => put_empty(out, StreamId(*s), FrameKind::Stop),
        }
    }

    fn frames() -> impl Strategy<Value = Vec<Owned>> {
        let bytes = || proptest::collection::vec(any::<u8>(), 1..300);
        let one = prop_oneof![
            bytes().prop_map(Owned::Message),
            (1u32.., bytes()).prop_map(|(s, b)| Owned::Data(s, b)),
            (1u32..).prop_map(Owned::Eof),
            (1u32.., any::<u32>()).prop_map(|(s, n)| Owned::Credit(s, n)),
            (1u32..).prop_map(Owned::Stop),
        ];
        proptest::collection::vec(one, 0..12)
    }

    proptest! {
        #[test]
        fn any_cutting_gives_the_same_frames(sent in frames(), cuts in proptest::collection::vec(1usize..40, 1..50)) {
            let mut bytes = Vec::new();
            for frame in &sent {
                put(&mut bytes, frame);
            }
            let mut decoder = Decoder::new();
            let mut got = Vec::new();
            let mut rest = bytes.as_slice();
            let mut cuts = cuts.iter().cycle();
            while !rest.is_empty() {
                let (now, later) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                if now.len() % 2 == 0 {
                    decoder.push(now);
                } else {
                    let mut space = decoder.space(now.len() + 7);
                    space.bytes()[..now.len()].copy_from_slice(now);
                    space.filled(now.len());
                }
                rest = later;
                while let Some(frame) = decoder.next_frame().unwrap() {
                    got.push(Owned::from(frame));
                }
            }
            prop_assert_eq!(sent, got);
            prop_assert_eq!(decoder.pending(), 0);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::new();
            decoder.push(&bytes);
            for _ in 0..40 {
                match decoder.next_frame() {
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => break,
                }
            }
        }
    }

    fn first(header: [u8; 12]) -> Result<bool, FrameError> {
        let mut decoder = Decoder::new();
        decoder.push(&header);
        decoder.next_frame().map(|frame| frame.is_some())
    }

    #[test]
    fn limits_are_checked_before_the_payload_comes() {
        let header =
            |stream, kind, len: u32| FrameHeader { stream: StreamId(stream), kind, len }.encode();
        let max = MAX_DATA as u32;
        assert_eq!(first(header(5, FrameKind::Data, max)), Ok(false));
        assert!(matches!(
            first(header(5, FrameKind::Data, max + 1)),
            Err(FrameError::TooLong { kind: FrameKind::Data, .. })
        ));
        assert!(matches!(
            first(header(0, FrameKind::Message, u32::MAX)),
            Err(FrameError::TooLong { kind: FrameKind::Message, .. })
        ));
        assert!(matches!(first(header(5, FrameKind::Eof, 1)), Err(FrameError::Length { .. })));
        assert!(matches!(first(header(5, FrameKind::Credit, 3)), Err(FrameError::Length { .. })));
        assert!(matches!(
            first(header(0, FrameKind::Data, 1)),
            Err(FrameError::WrongStream { .. })
        ));
        assert!(matches!(
            first(header(1, FrameKind::Message, 1)),
            Err(FrameError::WrongStream { .. })
        ));
        assert!(matches!(first([1, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]), Err(FrameError::Kind(_))));
        assert!(matches!(first([1, 0, 0, 0, 1, 0, 7, 0, 0, 0, 0, 0]), Err(FrameError::Kind(_))));
    }

    #[test]
    fn long_data_is_split() {
        let mut out = Vec::new();
        put_data(&mut out, StreamId(1), &vec![7; MAX_DATA + 1]);
        let mut decoder = Decoder::new();
        decoder.push(&out);
        assert!(matches!(decoder.next_frame(), Ok(Some(Frame::Data(_, d))) if d.len() == MAX_DATA));
        assert!(matches!(decoder.next_frame(), Ok(Some(Frame::Data(_, [7])))));
        assert_eq!(decoder.next_frame(), Ok(None));
    }

    #[test]
    fn there_is_no_empty_data() {
        let mut out = Vec::new();
        put_data(&mut out, StreamId(5), b"");
        assert_eq!(out, b"");
        put_empty(&mut out, StreamId(5), FrameKind::Data);
        let mut decoder = Decoder::new();
        decoder.push(&out);
        let refused = Err(FrameError::Empty(StreamId(5)));
        assert_eq!(decoder.next_frame(), refused);
        assert_eq!(decoder.next_frame(), refused);
    }

    #[test]
    fn unfilled_space_is_given_back() {
        let mut decoder = Decoder::new();
        let mut space = decoder.space(100);
        space.bytes()[0] = 1;
        drop(space);
        assert_eq!(decoder.pending(), 0);
    }
}
