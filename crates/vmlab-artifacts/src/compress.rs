//! Compressed streams as kernels and kernel modules use them: recognised by their magic bytes and
//! decompressed in one go, into memory, up to a limit.

#[cfg(test)]
pub(crate) mod encode;
mod lz4_legacy;
mod lzop;
#[cfg(test)]
mod tests;

use std::io::{self, Read};

use zstd::zstd_safe;

pub use lz4_legacy::decompress as decompress_lz4_legacy;
pub use lzop::decompress as decompress_lzop;

/// The memory that liblzma may use for its dictionary, in bytes. The kernel compresses with
/// dictionaries of at most 128 MiB (`scripts/xz_wrap.sh`).
const LZMA_MEMORY_LIMIT: u64 = 256 << 20;

/// How much output is reserved at once when a stream does not say how long its content is.
const UNKNOWN_SIZE_RESERVE: usize = 1 << 20;

/// A compression format that the kernel's build can use for its boot image or its modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// gzip (RFC 1952).
    Gzip,
    /// The .xz container with any filter that liblzma knows, x86 BCJ among them.
    Xz,
    /// The older .lzma container ("lzma alone").
    Lzma,
    /// bzip2.
    Bzip2,
    /// LZ4 in its legacy frame, with the magic number 0x184C2102.
    Lz4Legacy,
    /// LZO1X in the container of the lzop tool.
    Lzop,
    /// Zstandard (RFC 8878).
    Zstd,
}

impl Compression {
    /// How many bytes of a stream [`Compression::sniff`] looks at, at most.
    pub const MAGIC_LEN: usize = 9;

    /// Tells the format of a stream by its first bytes.
    pub fn sniff(head: &[u8]) -> Option<Compression> {
        const MAGICS: &[(&[u8], Compression)] = &[
            (b"\x1f\x8b", Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            // The property byte of lc=3, lp=0, pb=2, and a dictionary of a multiple of 64 KiB:
            // the format has no magic number, and this is what the kernel's own decoder expects.
            (b"\x5d\0\0", Compression::Lzma),
            (b"BZh", Compression::Bzip2),
            (&lz4_legacy::MAGIC, Compression::Lz4Legacy),
            (&lzop::MAGIC, Compression::Lzop),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        ];
        MAGICS.iter().find(|(magic, _)| head.starts_with(magic)).map(|&(_, format)| format)
    }

    /// The format's usual name.
    pub const fn name(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip",
            Compression::Xz => "xz",
            Compression::Lzma => "lzma",
            Compression::Bzip2 => "bzip2",
            Compression::Lz4Legacy => "lz4",
            Compression::Lzop => "lzop",
            Compression::Zstd => "zstd",
        }
    }
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a stream could not be decompressed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompressError {
    /// The stream is damaged, cut short or uses a feature that the format does not have.
    #[error("the {format} stream is damaged or incomplete")]
    Corrupt {
        /// The stream's format.
        format: Compression,
        /// What the decoder said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The content is longer than the caller allows.
    #[error("the {format} stream holds more than the {limit} bytes that are allowed here")]
    TooLarge {
        /// The stream's format.
        format: Compression,
        /// The limit, in bytes.
        limit: usize,
    },
    /// There is no memory for the content.
    #[error("no memory for {wanted} bytes of content of a {format} stream")]
    OutOfMemory {
        /// The stream's format.
        format: Compression,
        /// How many bytes were asked for.
        wanted: usize,
    },
}

impl CompressError {
    fn corrupt(
        format: Compression,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        CompressError::Corrupt { format, source: source.into() }
    }
}

/// How much content to expect of a stream.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// The content may have this many bytes, and no more.
    pub max: usize,
    /// The length of the content where it is known beforehand. It is a hint for allocating; the
    /// caller compares it with what came out.
    pub expected: Option<usize>,
}

impl Limit {
    /// A limit without knowledge of the content's length.
    pub const fn max(max: usize) -> Limit {
        Limit { max, expected: None }
    }

    fn reserve(&self) -> usize {
        self.expected.unwrap_or(UNKNOWN_SIZE_RESERVE).min(self.max)
    }
}

/// Decompresses `input`, one stream of `format`.
///
/// What follows the end of the stream is ignored, except with LZ4 (which has no end mark) and zstd
/// (whose frames can be concatenated), where all of `input` has to belong to the stream.
pub fn decompress(
    format: Compression,
    input: &[u8],
    limit: Limit,
) -> Result<Vec<u8>, CompressError> {
    let lzma_stream = |stream: Result<liblzma::stream::Stream, liblzma::stream::Error>| {
        stream
            .map(|stream| liblzma::bufread::XzDecoder::new_stream(input, stream))
            .map_err(|error| CompressError::corrupt(format, error))
    };
    match format {
        Compression::Gzip => read_all(format, flate2::bufread::GzDecoder::new(input), limit),
        Compression::Bzip2 => read_all(format, bzip2::bufread::BzDecoder::new(input), limit),
        Compression::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(LZMA_MEMORY_LIMIT, 0);
            read_all(format, lzma_stream(stream)?, limit)
        }
        Compression::Lzma => {
            let stream = liblzma::stream::Stream::new_lzma_decoder(LZMA_MEMORY_LIMIT);
            read_all(format, lzma_stream(stream)?, limit)
        }
        Compression::Lz4Legacy => lz4_legacy::decompress(input, limit),
        Compression::Lzop => lzop::decompress(input, limit),
        Compression::Zstd => zstd_decompress(input, limit),
    }
}

/// Decompresses at most the first `len` bytes of a gzip stream's content.
pub(crate) fn gzip_head(input: &[u8], len: usize) -> Vec<u8> {
    let mut head = Vec::new();
    // A stream that is cut short or damaged further on still has a usable head.
    let _ = flate2::bufread::GzDecoder::new(input).take(len as u64).read_to_end(&mut head);
    head
}

/// Reserves room for the expected content.
fn buffer(format: Compression, wanted: usize) -> Result<Vec<u8>, CompressError> {
    let mut out = Vec::new();
    out.try_reserve_exact(wanted).map_err(|_| CompressError::OutOfMemory { format, wanted })?;
    Ok(out)
}

fn read_all(
    format: Compression,
    decoder: impl Read,
    limit: Limit,
) -> Result<Vec<u8>, CompressError> {
    let mut out = buffer(format, limit.reserve())?;
    let one_too_many = (limit.max as u64).saturating_add(1);
    match decoder.take(one_too_many).read_to_end(&mut out) {
        Ok(_) if out.len() > limit.max => Err(CompressError::TooLarge { format, limit: limit.max }),
        Ok(_) => Ok(out),
        Err(error) if error.kind() == io::ErrorKind::OutOfMemory => {
            Err(CompressError::OutOfMemory { format, wanted: out.len() })
        }
        Err(error) => Err(CompressError::corrupt(format, error)),
    }
}

/// Decompresses straight into the result where the length is known: kernels are compressed with a
/// window of 128 MiB, which the streaming decoder would have to allocate and copy from.
fn zstd_decompress(input: &[u8], limit: Limit) -> Result<Vec<u8>, CompressError> {
    let format = Compression::Zstd;
    let declared = zstd_safe::get_frame_content_size(input)
        .map_err(|_| CompressError::corrupt(format, "the frame header is malformed"))?;
    let known = match declared {
        Some(size) if size > limit.max as u64 => {
            return Err(CompressError::TooLarge { format, limit: limit.max });
        }
        Some(size) => Some(size as usize),
        None => limit.expected.filter(|&size| size <= limit.max),
    };
    let Some(known) = known else {
        let decoder = zstd::stream::read::Decoder::with_buffer(input)
            .map_err(|error| CompressError::corrupt(format, error))?;
        return read_all(format, decoder, limit);
    };
    let mut out = buffer(format, known)?;
    zstd::bulk::Decompressor::new()
        .and_then(|mut decompressor| decompressor.decompress_to_buffer(input, &mut out))
        .map_err(|error| CompressError::corrupt(format, error))?;
    Ok(out)
}
