//! Encoders of all formats, for tests.

use std::io::{Read, Write};

use liblzma::stream::{Check, Filters, LzmaOptions, Stream};

use super::{Compression, lz4_legacy, lzop};

pub(crate) const ALL: [Compression; 7] = [
    Compression::Gzip,
    Compression::Xz,
    Compression::Lzma,
    Compression::Bzip2,
    Compression::Lz4Legacy,
    Compression::Lzop,
    Compression::Zstd,
];

pub(crate) fn compress(format: Compression, content: &[u8]) -> Vec<u8> {
    match format {
        Compression::Gzip => {
            let level = flate2::Compression::fast();
            all(flate2::read::GzEncoder::new(content, level))
        }
        Compression::Bzip2 => all(bzip2::read::BzEncoder::new(content, bzip2::Compression::fast())),
        Compression::Xz => {
            // The filters that the kernel's build uses for x86.
            let mut filters = Filters::new();
            filters.x86().lzma2(&LzmaOptions::new_preset(1).unwrap());
            let stream = Stream::new_stream_encoder(&filters, Check::Crc32).unwrap();
            all(liblzma::bufread::XzEncoder::new_stream(content, stream))
        }
        Compression::Lzma => {
            let stream = Stream::new_lzma_encoder(&LzmaOptions::new_preset(1).unwrap()).unwrap();
            all(liblzma::bufread::XzEncoder::new_stream(content, stream))
        }
        Compression::Lz4Legacy => {
            let mut out = lz4_legacy::MAGIC.to_vec();
            for block in content.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                out.extend((block.len() as u32).to_le_bytes());
                out.extend(block);
            }
            out
        }
        Compression::Lzop => lzop(content, 0x1, true),
        Compression::Zstd => {
            // A stream of unknown length, as `cat … | zstd` in the kernel's build makes it.
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            encoder.write_all(content).unwrap();
            encoder.finish().unwrap()
        }
    }
}

/// A file as lzop 1.04 writes it, with the given flags. The checksums are zeros.
pub(crate) fn lzop(content: &[u8], flags: u32, end: bool) -> Vec<u8> {
    let mut out = lzop::MAGIC.to_vec();
    for number in [0x1040_u16, 0x20a0, 0x0940] {
        out.extend(number.to_be_bytes());
    }
    out.extend([3, 9]);
    out.extend(flags.to_be_bytes());
    out.extend([0; 12]);
    out.extend(b"\x04name");
    out.extend([0; 4]);
    if flags & 0x40 != 0 {
        out.extend(3_u32.to_be_bytes());
        out.extend(b"xtr\0\0\0\0");
    }
    let checksums = |bits: [u32; 2]| vec![0; bits.iter().filter(|&b| flags & b != 0).count() * 4];
    for block in content.chunks(256 << 10) {
        let packed = lzokay::compress::compress(block).unwrap();
        let packed = if packed.len() < block.len() { packed.as_slice() } else { block };
        out.extend((block.len() as u32).to_be_bytes());
        out.extend((packed.len() as u32).to_be_bytes());
        out.extend(checksums([0x1, 0x100]));
        if packed.len() < block.len() {
            out.extend(checksums([0x2, 0x200]));
        }
        out.extend(packed);
    }
    if end {
        out.extend([0; 4]);
    }
    out
}

fn all(mut reader: impl Read) -> Vec<u8> {
    let mut out = Vec::new();
    reader.read_to_end(&mut out).unwrap();
    out
}
