use super::*;

const SETUP_LEN: usize = 3 * 512;
const PAYLOAD_OFFSET: usize = 0x40;
const VERSION: &str = "6.12.0-test (a@b) #1 SMP Fri Nov 20 2026";

/// A bzImage with the given payload, boot protocol 2.15, and nothing that could be left out.
pub(super) fn image(payload: &[u8]) -> Vec<u8> {
    let kernel_len = (PAYLOAD_OFFSET + payload.len()).next_multiple_of(16);
    let mut image = vec![0; SETUP_LEN + kernel_len];
    image[0x1f1] = 2; // setup_sects
    put(&mut image, 0x1f4, &(kernel_len as u32 / 16).to_le_bytes()); // syssize
    put(&mut image, 0x1fe, &[0x55, 0xaa]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020f_u16.to_le_bytes());
    put(&mut image, 0x20e, &0x0100_u16.to_le_bytes()); // kernel_version, from 0x200
    image[0x211] = 1; // loadflags
    put(&mut image, 0x236, &0x3f_u16.to_le_bytes()); // xloadflags
    put(&mut image, 0x248, &(PAYLOAD_OFFSET as u32).to_le_bytes());
    put(&mut image, 0x24c, &(payload.len() as u32).to_le_bytes());
    put(&mut image, 0x300, VERSION.as_bytes());
    put(&mut image, SETUP_LEN + PAYLOAD_OFFSET, payload);
    image
}

/// What the kernel's build makes of `kernel`: the stream, and its length unless it has one.
fn payload(format: Compression, kernel: &[u8]) -> Vec<u8> {
    let mut payload = encode::compress(format, kernel);
    if format != Compression::Gzip {
        payload.extend((kernel.len() as u32).to_le_bytes());
    }
    payload
}

pub(super) fn whole(format: Compression, kernel: &[u8]) -> Vec<u8> {
    image(&payload(format, kernel))
}

#[test]
fn the_kernel_is_extracted_from_every_format() {
    let dir = tempfile::tempdir().unwrap();
    for format in encode::ALL {
        let image = open(dir.path(), "bzImage", &whole(format, &elf::vmlinux())).unwrap();
        assert_eq!((image.arch(), image.format()), (Arch::X86_64, BootFormat::BzImage));
        assert_eq!(image.version_string(), Some(VERSION));
        assert_eq!(image.release(), Some("6.12.0-test"));
        assert_eq!(image.compression(), Some(format));
        let kernel = image.extract().unwrap().unwrap();
        assert!(kernel == elf::vmlinux(), "{format}");
        assert_eq!(pvh_entry(&kernel), Some(0x100_0a30));
    }
}

#[test]
fn every_cut_is_refused() {
    let mut whole = whole(Compression::Zstd, &elf::vmlinux());
    refuses_every_cut(&whole, 0x206);
    // What a signature appends is no harm.
    whole.extend([0xff; 100]);
    parse(whole.as_slice()).unwrap();
}

#[test]
fn an_image_that_is_cut_short_says_so() {
    let whole = whole(Compression::Gzip, &elf::vmlinux());
    let message = message(&whole[..1700]);
    let expected = format!(
        "it is truncated: the protected-mode kernel reaches to byte {}, and the file has 1700",
        whole.len()
    );
    assert!(message.contains(&expected), "{message}");
}

#[test]
fn kernels_that_cannot_run_are_refused() {
    let with = |at: usize, value: &[u8]| {
        let mut image = whole(Compression::Gzip, &elf::vmlinux());
        put(&mut image, at, value);
        message(&image)
    };
    for (message, expected) in [
        (with(0x236, &[0x3e, 0]), "it is a kernel for 32-bit x86"),
        (with(0x206, &[0x05, 0x02]), "its boot protocol is version 2.05"),
        (with(0x211, &[0x80]), "it is a zImage"),
        (with(0x1f4, &[0; 4]), "syssize is 0x0"),
        (with(0x24c, &[0; 4]), "payload_length is 0x0"),
    ] {
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn hostile_places_are_refused() {
    let with = |changes: &[(usize, &[u8])]| {
        let mut image = whole(Compression::Gzip, &elf::vmlinux());
        for (at, value) in changes {
            put(&mut image, *at, value);
        }
        parse(image.as_slice())
    };
    let max = &[0xff; 4];
    for changes in [
        &[(0x1f1, &max[..1])][..],
        &[(0x1f4, max)],
        &[(0x248, max)],
        &[(0x24c, max)],
        &[(0x248, max), (0x24c, max)],
        &[(0x1f1, &max[..1]), (0x1f4, max), (0x248, max), (0x24c, max)],
    ] {
        let result = with(changes);
        assert!(matches!(result, Err(Defect::Truncated { .. })), "{changes:?}: {result:?}");
    }
    // A version string that is nowhere, or not a string, is no reason to refuse a kernel.
    for (at, value) in
        [(0x20e, &[0, 0][..]), (0x20e, &[0xff, 0xff]), (0x20e, &[0xff, 0x03]), (0x303, b"\x1b[2J")]
    {
        assert_eq!(with(&[(at, value)]).unwrap().version, None, "{at:#x} {value:?}");
    }
}

#[test]
fn setup_sects_of_zero_means_four() {
    let image = whole(Compression::Gzip, &elf::vmlinux());
    let mut old = [&image[..SETUP_LEN], &[0; 2 * 512], &image[SETUP_LEN..]].concat();
    old[0x1f1] = 0;
    let header = parse(old.as_slice()).unwrap();
    let range = (5 * 512 + PAYLOAD_OFFSET) as u64;
    assert!(matches!(header.payload, Payload::Compressed { range: r, .. } if r.start == range));
}

#[test]
fn old_protocols_lack_fields() {
    let mut image = whole(Compression::Gzip, &elf::vmlinux());
    // 2.11 does not tell the word size, 2.07 not where the payload is.
    put(&mut image, 0x206, &0x020b_u16.to_le_bytes());
    put(&mut image, 0x236, &[0, 0]);
    assert!(matches!(parse(image.as_slice()).unwrap().payload, Payload::Compressed { .. }));
    put(&mut image, 0x206, &0x0207_u16.to_le_bytes());
    assert!(matches!(parse(image.as_slice()).unwrap().payload, Payload::Unknown(_)));
}

/// The error of extracting from an image that opens.
fn extract_error(image: &[u8]) -> BootImageError {
    let dir = tempfile::tempdir().unwrap();
    let error = open(dir.path(), "some-bzImage", image).unwrap().extract().unwrap_err();
    assert!(error.to_string().contains("some-bzImage"), "{error}");
    error
}

#[test]
fn damage_inside_the_payload_is_found_by_extracting() {
    let kernel = elf::vmlinux();
    for format in encode::ALL {
        let mut stream = payload(format, &kernel);
        let end = stream.len();
        stream.drain(end - 20..end - 10);
        let error = extract_error(&image(&stream));
        let expected = matches!(error, BootImageError::Decompress { .. })
            || matches!(error, BootImageError::InvalidPayload { .. });
        assert!(expected, "{format}: {error:?}");
    }
}

#[test]
fn a_wrong_length_of_the_kernel_is_found() {
    let kernel = elf::vmlinux();
    for format in encode::ALL.into_iter().filter(|&format| format != Compression::Gzip) {
        for length in [0, kernel.len() as u32 - 1, kernel.len() as u32 + 1, 1 << 30, u32::MAX] {
            let mut stream = payload(format, &kernel);
            let at = stream.len() - 4;
            put(&mut stream, at, &length.to_le_bytes());
            let error = extract_error(&image(&stream));
            let expected = matches!(
                error,
                BootImageError::InvalidPayload {
                    defect: Defect::PayloadLength { .. } | Defect::BadField { .. },
                    ..
                } | BootImageError::Decompress { .. }
            );
            assert!(expected, "{format}, {length}: {error:?}");
        }
    }
}

#[test]
fn what_is_inside_has_to_be_a_kernel_for_the_same_machine() {
    let mut arm = elf::vmlinux();
    put(&mut arm, 18, &183_u16.to_le_bytes());
    let mut i386 = elf::vmlinux();
    i386[4] = 1;
    for (inner, expected) in [
        (b"#!/bin/sh\n".to_vec(), "it is a script, not a kernel"),
        (Vec::new(), "it is an empty file"),
        (arm, "it is a kernel for aarch64"),
        (i386, "it is a 32-bit ELF file"),
        (elf::vmlinux()[..4150].to_vec(), "it is truncated: "),
        (whole(Compression::Gzip, &elf::vmlinux()), "another compressed kernel"),
    ] {
        let error = extract_error(&whole(Compression::Gzip, &inner)).to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_payload_in_an_unknown_format_is_named_by_its_bytes() {
    let error = extract_error(&image(b"\xca\xfe and so on")).to_string();
    assert!(error.contains("it starts with the bytes ca fe 20 61"), "{error}");
    let error = extract_error(&image(b"\x1f")).to_string();
    assert!(error.contains("it starts with the bytes 1f"), "{error}");
}
