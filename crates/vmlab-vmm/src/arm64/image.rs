//! The kernel's `Image`: its header, and where it goes with what it is given
//! (Documentation/arch/arm64/booting.rst).

use std::ops::Range;

use thiserror::Error;

/// Bytes of the header, which the image begins with.
pub const HEADER_LEN: usize = 64;

/// The image is this much behind a multiple of it, or less ([`Image::text_offset`]); the device tree's region has
/// this size.
const BLOCK: u64 = 2 << 20;

/// The most bytes of a device tree.
pub const FDT_MAX: u64 = BLOCK;

/// The kernel and what it is given are in so much memory from a GiB's begin on.
const WINDOW: u64 = 32 << 30;

/// The largest page that a guest may use; the initramfs begins at one.
const PAGE: u64 = 64 << 10;

/// Places in the header.
mod at {
    pub(super) const CODE: usize = 0;
    pub(super) const TEXT_OFFSET: usize = 8;
    pub(super) const IMAGE_SIZE: usize = 16;
    pub(super) const FLAGS: usize = 24;
    pub(super) const MAGIC: usize = 56;
}

/// `ARM\x64`.
const MAGIC: u32 = 0x644d_5241;

/// What a header's flags say.
mod flags {
    pub(super) const BIG_ENDIAN: u64 = 1;
    pub(super) const PAGE_SIZE_SHIFT: u32 = 1;
    pub(super) const ANYWHERE: u64 = 1 << 3;
}

/// `text_offset` is a multiple of this in all kernels (arch/arm64/kernel/head.S, until it was always 0).
const TEXT_ALIGNMENT: u64 = 4 << 10;

/// What a header says of its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Image {
    /// Bytes from a multiple of 2 MiB to the image.
    pub text_offset: u64,
    /// Bytes of memory that it takes from there on, with what is not in the file.
    pub size: u64,
    /// The pages that it uses, in bytes, where it says so.
    pub page_size: Option<u64>,
    /// Whether it can use memory that is below it.
    pub anywhere: bool,
}

/// Why a kernel cannot be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// There is no header.
    #[error("it is not an arm64 Image; a compressed one has to be decompressed first")]
    NotAnImage,
    /// There is a header and nothing to execute.
    #[error("its header has no code")]
    NoCode,
    /// It says nothing of its size.
    #[error("its header does not say how much memory it takes: it is of a Linux before 3.17")]
    NoSize,
    /// It runs the CPU in the order of bytes that nothing else here has.
    #[error("it is big-endian")]
    BigEndian,
    /// Its offset is none that a kernel has.
    #[error("its text offset {0:#x} is none of a kernel")]
    TextOffset(u64),
    /// It does not fit.
    #[error(
        "it takes {kernel} bytes of memory, and its initramfs {initramfs}, which the memory has no room for"
    )]
    NoRoom {
        /// Bytes of the kernel.
        kernel: u64,
        /// Bytes of the initramfs.
        initramfs: u64,
    },
}

/// Where a kernel and what it is given are in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The image, which is entered at its begin.
    pub kernel: Range<u64>,
    /// Where the device tree begins; [`FDT_MAX`] bytes are free.
    pub fdt: u64,
    /// The initramfs.
    pub initramfs: Range<u64>,
}

impl Image {
    /// Reads the header of an image, which `file` begins with and which has `length` bytes in all.
    ///
    /// # Errors
    /// When it is no image, or one that cannot be started.
    pub fn parse(file: &[u8], length: u64) -> Result<Self, ImageError> {
        let header: &[u8; HEADER_LEN] = file.first_chunk().ok_or(ImageError::NotAnImage)?;
        if number(header, at::MAGIC) as u32 != MAGIC {
            return Err(ImageError::NotAnImage);
        }
        // Two instructions, of which the first may do nothing but look like the begin of a Windows program.
        if number(header, at::CODE) == 0 {
            return Err(ImageError::NoCode);
        }
        let size = number(header, at::IMAGE_SIZE);
        // Before that, the other fields are in an order of bytes that is not known.
        if size == 0 {
            return Err(ImageError::NoSize);
        }
        let flags = number(header, at::FLAGS);
        if flags & flags::BIG_ENDIAN != 0 {
            return Err(ImageError::BigEndian);
        }
        let text_offset = number(header, at::TEXT_OFFSET);
        if text_offset >= BLOCK || !text_offset.is_multiple_of(TEXT_ALIGNMENT) {
            return Err(ImageError::TextOffset(text_offset));
        }
        let page_size = match flags >> flags::PAGE_SIZE_SHIFT & 3 {
            0 => None,
            code => Some(1 << (10 + 2 * code)),
        };
        let anywhere = flags & flags::ANYWHERE != 0;
        // What was appended to an image is written with it.
        Ok(Self { text_offset, size: size.max(length), page_size, anywhere })
    }

    /// Where it goes in `memory`, with an initramfs of so many bytes: as low as it can be, since some kernels
    /// cannot use what is below them; then the device tree, which old ones look for near themselves; then the
    /// initramfs.
    ///
    /// # Errors
    /// When there is no room for all.
    pub fn place(&self, memory: &Range<u64>, initramfs: u64) -> Result<Placement, ImageError> {
        let place = || {
            let window = (memory.start & !((1 << 30) - 1)).checked_add(WINDOW)?;
            let start = aligned(memory.start, BLOCK)?.checked_add(self.text_offset)?;
            let kernel = start..start.checked_add(self.size)?;
            let fdt = aligned(kernel.end, BLOCK)?;
            let first = aligned(fdt.checked_add(FDT_MAX)?, PAGE)?;
            let initramfs = first..first.checked_add(initramfs)?;
            let fits = initramfs.end <= memory.end.min(window);
            fits.then_some(Placement { kernel, fdt, initramfs })
        };
        place().ok_or(ImageError::NoRoom { kernel: self.size, initramfs })
    }
}

/// The next address from this one on that is a multiple of a power of two.
const fn aligned(address: u64, alignment: u64) -> Option<u64> {
    address.checked_next_multiple_of(alignment)
}

/// The little-endian number of 64 bits at a place in the header.
fn number(header: &[u8; HEADER_LEN], at: usize) -> u64 {
    let bytes = header[at..].first_chunk().copied();
    u64::from_le_bytes(bytes.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    /// The header of Debian's kernels.
    fn header() -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        put(&mut header, at::CODE, 0x1482_c3ff_fa40_5a4d);
        put(&mut header, at::IMAGE_SIZE, 35 * MIB);
        put(&mut header, at::FLAGS, 0b1010);
        header[56..60].copy_from_slice(b"ARM\x64");
        header[60..].copy_from_slice(&64_u32.to_le_bytes());
        header
    }

    fn put(header: &mut [u8; HEADER_LEN], at: usize, value: u64) {
        header[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn changed(at: usize, value: u64) -> Result<Image, ImageError> {
        let mut header = header();
        put(&mut header, at, value);
        Image::parse(&header, MIB)
    }

    #[test]
    fn a_header_is_read() {
        let image = Image::parse(&header(), MIB).unwrap();
        let expected =
            Image { text_offset: 0, size: 35 * MIB, page_size: Some(4096), anywhere: true };
        assert_eq!(image, expected);
        // The file may go on.
        assert_eq!(Image::parse(&[&header()[..], &[7; 100]].concat(), MIB), Ok(expected));
        let sizes = [0, 1, 2, 3].map(|code| changed(at::FLAGS, code << 1).unwrap().page_size);
        assert_eq!(sizes, [None, Some(4 << 10), Some(16 << 10), Some(64 << 10)]);
        assert!(!changed(at::FLAGS, 0).unwrap().anywhere);
        assert_eq!(changed(at::TEXT_OFFSET, 0x8_0000).unwrap().text_offset, 0x8_0000);
        // More than is known is not looked at.
        assert!(changed(at::FLAGS, !flags::BIG_ENDIAN).is_ok());
    }

    #[test]
    fn what_is_appended_takes_memory_too() {
        assert_eq!(Image::parse(&header(), 36 * MIB).unwrap().size, 36 * MIB);
    }

    #[test]
    fn what_is_no_image_is_none() {
        for length in 0..HEADER_LEN {
            let parsed = Image::parse(&header()[..length], MIB);
            assert_eq!(parsed, Err(ImageError::NotAnImage), "{length}");
        }
        for file in [&b"\x1f\x8b"[..], b"MZ\0\0zimg", b"\x7fELF"] {
            let file = [file, &[0; HEADER_LEN]].concat();
            assert_eq!(Image::parse(&file, MIB), Err(ImageError::NotAnImage));
        }
        let mut other = header();
        other[at::MAGIC] ^= 1;
        assert_eq!(Image::parse(&other, MIB), Err(ImageError::NotAnImage));
    }

    #[test]
    fn what_cannot_be_started_says_why() {
        assert_eq!(changed(at::CODE, 0), Err(ImageError::NoCode));
        assert_eq!(changed(at::IMAGE_SIZE, 0), Err(ImageError::NoSize));
        assert_eq!(changed(at::FLAGS, 0b1011), Err(ImageError::BigEndian));
        for offset in [BLOCK, BLOCK + 4096, 1, 0x8_0004, u64::MAX, !0xfff, 1 << 63] {
            assert_eq!(changed(at::TEXT_OFFSET, offset), Err(ImageError::TextOffset(offset)));
        }
    }

    #[test]
    fn all_is_in_its_place() {
        let image = changed(at::TEXT_OFFSET, 0x8_0000).unwrap();
        let placed = image.place(&(GIB..2 * GIB), 5_000_000).unwrap();
        assert_eq!(placed.kernel, GIB + 0x8_0000..GIB + 0x8_0000 + 35 * MIB);
        assert_eq!(placed.fdt, GIB + 36 * MIB);
        assert_eq!(placed.initramfs, GIB + 38 * MIB..GIB + 38 * MIB + 5_000_000);
        // Memory need not begin at a block.
        let placed = image.place(&(GIB + 1..2 * GIB), 0).unwrap();
        assert_eq!(placed.kernel.start, GIB + 2 * MIB + 0x8_0000);
        assert!(placed.initramfs.is_empty());
    }

    #[test]
    fn what_just_fits_fits_and_more_does_not() {
        let image = Image::parse(&header(), MIB).unwrap();
        let memory = GIB..GIB + 48 * MIB;
        let room = memory.end - (GIB + 38 * MIB);
        assert_eq!(image.place(&memory, room).unwrap().initramfs.end, memory.end);
        for initramfs in [room + 1, u64::MAX, u64::MAX - GIB] {
            let refused = image.place(&memory, initramfs);
            assert_eq!(refused, Err(ImageError::NoRoom { kernel: 35 * MIB, initramfs }));
        }
        // An initramfs farther from its kernel would not be found.
        let wide = GIB..GIB + 100 * GIB;
        assert!(image.place(&wide, 31 * GIB).is_ok());
        assert!(image.place(&wide, 32 * GIB).is_err());
    }

    #[test]
    fn no_size_overflows() {
        for size in [u64::MAX, u64::MAX - GIB, 1 << 63, 48 * MIB] {
            let image = changed(at::IMAGE_SIZE, size).unwrap();
            assert!(image.place(&(GIB..GIB + 48 * MIB), 0).is_err(), "{size:#x}");
            let top = u64::MAX - 4 * MIB..u64::MAX;
            assert!(image.place(&top, 0).is_err(), "{size:#x}");
        }
        let small = changed(at::IMAGE_SIZE, 1).unwrap();
        assert!(small.place(&(0..0), 0).is_err());
        let (start, end) = (2 * GIB, GIB);
        assert!(small.place(&(start..end), 0).is_err());
    }
}
