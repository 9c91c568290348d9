use proptest::prelude::*;

use super::encode::{ALL, compress, lzop};
use super::*;

/// Content that compresses, with some of it that does not.
fn content(len: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    let mut out: Vec<u8> = b"\xe8\x10\x20\x00\x00 call, and more of the same; ".repeat(len / 64);
    out.extend(noise.take(len - out.len()));
    out
}

#[test]
fn every_format_is_recognised_and_restored() {
    for format in ALL {
        for len in [0, 1, 63, 4096, 600_000] {
            let content = content(len);
            let stream = compress(format, &content);
            assert_eq!(Compression::sniff(&stream), Some(format), "{format} of {len}");
            let restored = decompress(format, &stream, Limit::max(len)).unwrap();
            assert!(restored == content, "{format} of {len}");
            let expected = Limit { max: 1 << 20, expected: Some(len) };
            assert!(decompress(format, &stream, expected).unwrap() == content, "{format} of {len}");
        }
    }
}

#[test]
fn a_wrong_expectation_is_never_more_than_a_hint_or_an_error() {
    let content = content(10_000);
    for format in ALL {
        let stream = compress(format, &content);
        for expected in [0, 1, 9_999, 10_001, usize::MAX] {
            let limit = Limit { max: 1 << 20, expected: Some(expected) };
            match decompress(format, &stream, limit) {
                Ok(restored) => assert!(restored == content, "{format}, {expected}"),
                // zstd without a length in its frame is given the room that was announced.
                Err(CompressError::Corrupt { format: Compression::Zstd, .. }) => {
                    assert!(expected < content.len());
                }
                Err(error) => panic!("{format}, {expected}: {error}"),
            }
        }
    }
}

#[test]
fn more_content_than_allowed_is_refused() {
    let content = content(10_000);
    for format in ALL {
        let error = decompress(format, &compress(format, &content), Limit::max(9_999)).unwrap_err();
        assert!(matches!(error, CompressError::TooLarge { limit: 9_999, .. }), "{format}: {error}");
    }
    let with_length = zstd::bulk::compress(&content, 1).unwrap();
    let error = decompress(Compression::Zstd, &with_length, Limit::max(9_999)).unwrap_err();
    assert!(matches!(error, CompressError::TooLarge { .. }), "{error}");
    assert!(decompress(Compression::Zstd, &with_length, Limit::max(10_000)).unwrap() == content);
}

#[test]
fn streams_that_are_cut_short_are_refused() {
    let content = content(3_000);
    for format in ALL {
        let stream = compress(format, &content);
        for cut in 0..stream.len() {
            // An LZ4 frame can end after any block: here, after the magic number.
            if format == Compression::Lz4Legacy && cut == 4 {
                continue;
            }
            let result = decompress(format, &stream[..cut], Limit::max(1 << 20));
            assert!(result.is_err(), "{format} cut to {cut} of {}", stream.len());
        }
    }
}

#[test]
fn lz4_frames_have_several_blocks_and_can_be_concatenated() {
    let long = b"eight MiB are one block. ".repeat((9 << 20) / 25);
    let stream = compress(Compression::Lz4Legacy, &long);
    assert!(decompress_lz4_legacy(&stream, Limit::max(9 << 20)).unwrap() == long);

    let mut twice = compress(Compression::Lz4Legacy, b"first ");
    twice.extend(compress(Compression::Lz4Legacy, b"second"));
    assert_eq!(decompress_lz4_legacy(&twice, Limit::max(12)).unwrap(), b"first second");
    assert!(decompress_lz4_legacy(&twice, Limit::max(11)).is_err());
}

#[test]
fn lzop_flags_say_what_stands_between_the_blocks() {
    let content = content(600_000);
    for flags in [0, 0x1, 0x2, 0x3, 0x100, 0x303, 0x40 | 0x1] {
        let restored = decompress_lzop(&lzop(&content, flags, true), Limit::max(600_000)).unwrap();
        assert!(restored == content, "{flags:#x}");
    }
    for flags in [0x400, 0x800] {
        assert!(decompress_lzop(&lzop(&content, flags, true), Limit::max(600_000)).is_err());
    }
}

#[test]
fn lzop_blocks_with_hostile_lengths_are_refused() {
    let empty = lzop(b"", 0, false);
    for (content, packed) in [(u32::MAX, 8), (1 << 30, 1 << 30), (8, 9), (8, u32::MAX), (64, 8)] {
        let mut stream = empty.clone();
        stream.extend(content.to_be_bytes());
        stream.extend(packed.to_be_bytes());
        stream.extend([0; 16]);
        let limit = Limit::max(1 << 20);
        assert!(decompress_lzop(&stream, limit).is_err(), "{content:#x} {packed:#x}");
    }
}

#[test]
fn what_follows_the_stream_is_ignored_where_the_format_has_an_end() {
    for format in [
        Compression::Gzip,
        Compression::Xz,
        Compression::Lzma,
        Compression::Bzip2,
        Compression::Lzop,
    ] {
        let mut stream = compress(format, b"content");
        stream.extend(b"\x07\0\0\0");
        assert_eq!(decompress(format, &stream, Limit::max(7)).unwrap(), b"content", "{format}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn arbitrary_streams_do_no_harm(
        format in proptest::sample::select(&ALL[..]),
        tail in proptest::collection::vec(any::<u8>(), 0..300),
        flip in any::<proptest::sample::Index>(),
        value in any::<u8>(),
    ) {
        let limit = Limit::max(64 << 10);
        let mut stream = compress(format, &content(2_000));
        let at = flip.index(stream.len());
        stream[at] ^= value;
        for input in [&stream[..], &[&stream[..8], &tail].concat(), &tail] {
            if let Ok(content) = decompress(format, input, limit) {
                prop_assert!(content.len() <= limit.max);
            }
        }
    }
}
