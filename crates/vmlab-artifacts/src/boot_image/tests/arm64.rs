use super::*;

const BANNER: &[u8] = b"Linux version 6.6.1 (a@b) (gcc) #3 SMP\n\0";

/// The smallest `Image`, which is an EFI program with one section as well.
pub(super) fn image() -> Vec<u8> {
    let mut image = vec![0; 0x200 + BANNER.len()];
    let section_len = (image.len() - 0x180) as u32;
    put(&mut image, 0, b"MZ");
    put(&mut image, 16, &0x1_0000_u64.to_le_bytes()); // image_size
    put(&mut image, 24, &0xa_u64.to_le_bytes()); // flags
    put(&mut image, 0x38, b"ARM\x64");
    put(&mut image, 0x3c, &64_u32.to_le_bytes());
    put(&mut image, 64, b"PE\0\0");
    put(&mut image, 64 + 6, &1_u16.to_le_bytes()); // NumberOfSections
    put(&mut image, 64 + 20, &0x10_u16.to_le_bytes()); // SizeOfOptionalHeader
    let section = 64 + 24 + 0x10;
    put(&mut image, section + 16, &section_len.to_le_bytes()); // SizeOfRawData
    put(&mut image, section + 20, &0x180_u32.to_le_bytes()); // PointerToRawData
    put(&mut image, 0x200, BANNER);
    image
}

#[test]
fn an_image_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let image = open(dir.path(), "Image", &image()).unwrap();
    assert_eq!((image.arch(), image.format()), (Arch::Aarch64, BootFormat::Arm64Image));
    assert_eq!(image.release(), Some("6.6.1"));
    assert_eq!(image.extract().unwrap(), None);
    assert_eq!(image.pvh_entry(), None);
}

#[test]
fn an_image_gz_is_read_and_extracted() {
    let dir = tempfile::tempdir().unwrap();
    let stream = encode::compress(Compression::Gzip, &image());
    let compressed = open(dir.path(), "Image.gz", &stream).unwrap();
    assert_eq!(compressed.arch(), Arch::Aarch64);
    assert_eq!(compressed.format(), BootFormat::Arm64Image);
    assert_eq!(compressed.compression(), Some(Compression::Gzip));
    assert_eq!(compressed.release(), None);
    assert_eq!(compressed.extract().unwrap().unwrap(), image());

    let cut = open(dir.path(), "Image.gz", &stream[..stream.len() - 9]).unwrap();
    let error = cut.extract().unwrap_err();
    assert!(matches!(error, BootImageError::Decompress { .. }), "{error:?}");

    let inner_cut = encode::compress(Compression::Gzip, &image()[..0x190]);
    let error = open(dir.path(), "Image.gz", &inner_cut).unwrap().extract().unwrap_err();
    assert!(matches!(error, BootImageError::InvalidPayload { .. }), "{error:?}");
}

#[test]
fn every_cut_is_refused() {
    // Before the section table is complete, nothing says how long the file has to be.
    let whole = image();
    for cut in 0..0x3c {
        assert!(matches!(parse(&whole[..cut]), Err(Defect::NotAKernel(_))), "{cut}");
    }
    for cut in (0x3c..64).chain(128..whole.len()) {
        assert!(matches!(parse(&whole[..cut]), Err(Defect::Truncated { .. })), "{cut}");
    }
    parse(whole.as_slice()).unwrap();
}

#[test]
fn other_arm64_images_are_refused() {
    let mut big_endian = image();
    put(&mut big_endian, 24, &1_u64.to_le_bytes());
    assert!(message(&big_endian).contains("a kernel for big-endian arm64"));
    let mut huge = image();
    put(&mut huge, 16, &u64::MAX.to_le_bytes());
    assert!(message(&huge).contains("image_size is 0xffffffffffffffff"));
}

#[test]
fn hostile_sections_do_no_harm() {
    for (at, value) in [
        (0x3c, u32::MAX),
        (64 + 6, 0xffff),
        (64 + 20, 0xffff_ffff),
        (64 + 24 + 0x10 + 16, u32::MAX),
        (64 + 24 + 0x10 + 20, u32::MAX),
    ] {
        let mut bytes = image();
        put(&mut bytes, at, &value.to_le_bytes());
        let _ = parse(bytes.as_slice());
    }
}
