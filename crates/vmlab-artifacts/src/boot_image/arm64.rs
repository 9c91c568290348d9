//! The `Image` format of arm64 (`Documentation/arch/arm64/booting.rst`).

use super::{BootFormat, Defect, Header, KERNEL_LEN_MAX, Payload};
use crate::Arch;
use crate::compress::{self, Compression};

/// Offsets of the header's fields in the file.
mod offset {
    pub(super) const IMAGE_SIZE: usize = 0x10;
    pub(super) const FLAGS: usize = 0x18;
    pub(super) const MAGIC: usize = 0x38;
}

const MAGIC: &[u8] = b"ARM\x64";

/// The length of the header.
const HEADER_LEN: usize = 64;

/// In `flags`: the kernel is big-endian.
const BIG_ENDIAN: u64 = 1 << 0;

/// Whether the file has the header's magic number.
pub(super) fn is_magic(head: &[u8]) -> bool {
    head.get(offset::MAGIC..).is_some_and(|rest| rest.starts_with(MAGIC))
}

/// Validates an uncompressed `Image`. `head` is its beginning, `len` its whole length in bytes.
pub(super) fn parse(head: &[u8], len: u64) -> Result<Header, Defect> {
    let Some(header) = head.get(..HEADER_LEN) else {
        let need = HEADER_LEN as u64;
        return Err(Defect::Truncated { part: "the Image header", need, have: len });
    };
    let field = |at: usize| header[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    if field(offset::FLAGS) & BIG_ENDIAN != 0 {
        return Err(Defect::ForeignMachine("big-endian arm64".to_owned()));
    }
    // The size in memory, with what is zeroed at boot; kernels before 3.17 have none.
    let image_size = field(offset::IMAGE_SIZE);
    if image_size > KERNEL_LEN_MAX as u64 {
        return Err(Defect::BadField { field: "image_size", value: image_size });
    }
    if let Some(need) = pe_end(head).filter(|&need| need > len) {
        return Err(Defect::Truncated { part: "the last section", need, have: len });
    }
    Ok(Header {
        arch: Arch::Aarch64,
        format: BootFormat::Arm64Image,
        version: None,
        pvh_entry: None,
        payload: Payload::Plain,
        banner_range: Some(0..len),
    })
}

/// Validates an `Image.gz` by the beginning of what is compressed in it.
pub(super) fn parse_gzip(head: &[u8], len: u64) -> Result<Header, Defect> {
    let content = compress::gzip_head(head, HEADER_LEN);
    if !is_magic(&content) {
        return Err(Defect::NotAKernel("a gzip stream".to_owned()));
    }
    Ok(Header {
        payload: Payload::Compressed {
            range: 0..len,
            compression: Compression::Gzip,
            // Tools may have padded or signed the file after its end.
            has_length: false,
        },
        banner_range: None,
        // The content's length is not known before it is extracted.
        ..parse(&content, u64::MAX)?
    })
}

/// Where the last section of an `Image` ends in the file, if it is an EFI program as well. The
/// header of the format itself has the size in memory only, which says nothing about the file's.
fn pe_end(head: &[u8]) -> Option<u64> {
    const SECTION_LEN: usize = 40;
    let u16_at = |at: usize| Some(u16::from_le_bytes(*head.get(at..)?.first_chunk()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(*head.get(at..)?.first_chunk()?));

    let pe = u32_at(0x3c)? as usize;
    if !head.starts_with(b"MZ") || !head.get(pe..)?.starts_with(b"PE\0\0") {
        return None;
    }
    // After the signature the COFF header: its number of sections, and the length of the optional
    // header, which stands between it and the section table.
    let sections = usize::from(u16_at(pe + 6)?);
    let table = pe + 24 + usize::from(u16_at(pe + 20)?);
    (0..sections)
        .filter_map(|section| {
            let at = table + section * SECTION_LEN;
            let (size, offset) = (u32_at(at + 16)?, u32_at(at + 20)?);
            (size != 0).then(|| u64::from(offset) + u64::from(size))
        })
        .max()
}
