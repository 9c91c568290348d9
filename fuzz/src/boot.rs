//! The kernels of `boot_header`.

const CODE: &[u8] = b"\xf4code";

fn put(image: &mut [u8], at: usize, value: &[u8]) {
    image[at..at + value.len()].copy_from_slice(value);
}

/// An ELF file for x86_64 with one segment, at 2 MiB.
pub fn elf() -> Vec<u8> {
    const PLACE: u64 = 2 << 20;
    let mut image = vec![0; 64 + 56];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0, 1]);
    put(&mut image, 24, &PLACE.to_le_bytes());
    put(&mut image, 32, &64_u64.to_le_bytes());
    put(&mut image, 54, &[56, 0, 1, 0]);
    put(&mut image, 64, &[1, 0, 0, 0, 7]);
    let length = CODE.len() as u64;
    for (at, number) in [(72, 120), (80, PLACE), (88, PLACE), (96, length), (104, 0x1000)] {
        put(&mut image, at, &number.to_le_bytes());
    }
    image.extend_from_slice(CODE);
    image
}

/// A bzImage of version 2.15 that is loaded at 16 MiB.
pub fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 3 * 512];
    put(&mut image, 0x1f1, &[2]);
    put(&mut image, 0x1fe, b"\x55\xaa\xeb\x6aHdrS\x0f\x02");
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000_u32.to_le_bytes());
    put(&mut image, 0x234, &[1, 21, 0x7f, 0]);
    put(&mut image, 0x238, &2047_u32.to_le_bytes());
    put(&mut image, 0x258, &(16_u64 << 20).to_le_bytes());
    put(&mut image, 0x260, &(4_u32 << 20).to_le_bytes());
    image.resize(image.len() + 0x210, 0xf4);
    image
}
