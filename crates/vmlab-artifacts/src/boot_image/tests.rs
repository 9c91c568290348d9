//! Headers are built here by their documentation, with numbers of their own, so that a wrong offset
//! in the parser is not repeated.

mod arm64;
mod bzimage;
mod elf;

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::compress::encode;

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Writes `content` to a file named `name` and opens it as a boot image.
fn open(dir: &Path, name: &str, content: &[u8]) -> Result<BootImage, BootImageError> {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    BootImage::open(&path)
}

/// The message for a file with `content`, which has to name the file.
fn message(content: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let message = open(dir.path(), "some-kernel", content).unwrap_err().to_string();
    assert!(message.contains("some-kernel cannot be booted: "), "{message}");
    message
}

/// Checks that every shorter version of a whole image is refused, and says how long it is where
/// its beginning still tells that it is a kernel.
fn refuses_every_cut(whole: &[u8], recognised_from: usize) {
    parse(whole).unwrap();
    for cut in 0..whole.len() {
        match parse(&whole[..cut]) {
            Err(Defect::Truncated { need, have, .. }) => {
                assert_eq!(have, cut as u64);
                assert!(need > have && need <= whole.len() as u64, "{cut}: {need}");
            }
            Err(Defect::NotAKernel(_)) if cut < recognised_from => {}
            other => panic!("cut to {cut} of {}: {other:?}", whole.len()),
        }
    }
}

#[test]
fn other_files_are_called_by_their_names() {
    let tar = {
        let mut tar = vec![b'x'; 512];
        put(&mut tar, 257, b"ustar\0");
        tar
    };
    let boot_sector = {
        let mut sector = vec![0xfa; 512];
        put(&mut sector, 510, b"\x55\xaa");
        sector
    };
    let cases: &[(&[u8], &str)] = &[
        (b"", "an empty file"),
        (b"#!/bin/sh\necho hello\n", "a script"),
        (b"CONFIG_VIRTIO=y\n# \xc3\xa4hnlich\n", "a text file"),
        (b"cut within a character \xc3", "a text file"),
        (&encode::compress(Compression::Gzip, b"no kernel"), "a gzip stream"),
        (b"\x1f\x8b\x08", "a gzip stream"),
        (&encode::compress(Compression::Xz, b"no kernel"), "an xz stream"),
        (&encode::compress(Compression::Zstd, b"no kernel"), "a zstd stream"),
        (b"!<arch>\ndebian-binary   1410", "a Debian package"),
        (b"070701000000010000", "a cpio archive (an initramfs?)"),
        (b"MZ\0\0zimg\0\0\x01", "a self-extracting EFI kernel (zboot)"),
        (b"MZ\x90\x00\x03\x00", "an EFI or DOS program"),
        (b"QFI\xfb\0\0\0\x03", "a qcow2 disk image"),
        (&[0; 4096], "a file that begins with nothing but zero bytes"),
        (&tar, "a tar archive"),
        (&boot_sector, "a boot sector or disk image"),
        (
            b"\xde\xad\xbe\xef\x00\x01\x02\x03\x04",
            "a file of an unknown format (it starts with the bytes de ad be ef 00 01 02 03)",
        ),
    ];
    for (content, expected) in cases {
        let message = message(content);
        assert!(message.contains(&format!("it is {expected}, not a kernel")), "{message}");
    }
}

#[test]
fn what_is_no_regular_file_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let error = BootImage::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("it is a directory"), "{error}");

    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let error = BootImage::open(&socket).unwrap_err();
    assert!(error.to_string().contains("it is a socket"), "{error}");

    let error = BootImage::open(Path::new("/dev/null")).unwrap_err();
    assert!(error.to_string().contains("it is a character device"), "{error}");

    let absent = dir.path().join("absent");
    let error = BootImage::open(&absent).unwrap_err();
    assert!(matches!(&error, BootImageError::Io { path, .. } if *path == absent), "{error:?}");
}

#[test]
fn version_strings_are_found_where_they_are_complete() {
    let first = b"Linux version 6.1.2 (a@b) (gcc) # SMP \n\0".as_slice();
    let second = b"Linux version 6.1.2 (a@b) (gcc) #7 SMP Fri Nov 20 2026\n\0".as_slice();
    let decoys = b"Linux version %s Linux version 6\x1b[2J\nLinux version 7\0".as_slice();
    let complete = Some("6.1.2 (a@b) (gcc) #7 SMP Fri Nov 20 2026".to_owned());

    assert_eq!(linux_banner(&[first, decoys, second].concat()), complete);
    assert_eq!(linux_banner(&[second, first].concat()), complete);
    assert_eq!(linux_banner(first), Some("6.1.2 (a@b) (gcc) # SMP".to_owned()));
    assert_eq!(linux_banner(decoys), None);
    assert_eq!(linux_banner(b""), None);

    // The string is found wherever it stands towards the borders of what is read at once.
    let dir = tempfile::tempdir().unwrap();
    for at in [0, 1, (1 << 20) - 1100, (1 << 20) - 20, 1 << 20, (3 << 20) + 7] {
        let path = dir.path().join("kernel");
        std::fs::write(&path, [&vec![0; at], first, second].concat()).unwrap();
        let file = File::open(&path).unwrap();
        let len = file.metadata().unwrap().len();
        assert_eq!(banner::find_in_file(&file, 0..len).unwrap(), complete, "at {at}");
        assert_eq!(banner::find_in_file(&file, 0..at as u64).unwrap(), None, "at {at}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn arbitrary_bytes_do_no_harm(
        start in proptest::sample::select(vec![0, 1, 2, 3, 4]),
        bytes in proptest::collection::vec(any::<u8>(), 0..2048),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<[u8; 8]>()), 0..6),
    ) {
        let mut image = match start {
            0 => bytes,
            1 => bzimage::whole(Compression::Gzip, b"no kernel"),
            2 => elf::vmlinux(),
            3 => arm64::image(),
            _ => encode::compress(Compression::Gzip, &arm64::image()),
        };
        for (at, value) in changes {
            // Fields stand in the first KiB.
            let end = image.len().min(1024);
            if end >= 8 {
                put(&mut image, at.index(end - 7), &value);
            }
        }
        let _ = parse(image.as_slice());
        let _ = pvh_entry(&image);
        let _ = linux_banner(&image);
    }

    #[test]
    fn arbitrary_payloads_do_no_harm(
        format in proptest::sample::select(&encode::ALL[..]),
        has_length in any::<bool>(),
        bytes in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let _ = decompress_payload(&bytes, format, has_length);
    }
}
