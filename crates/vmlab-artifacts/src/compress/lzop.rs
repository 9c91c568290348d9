//! The container of the lzop tool around LZO1X blocks, as far as `lib/decompress_unlzo.c` of the
//! kernel and the lzop tool itself agree on it. All numbers are big-endian.

use super::{CompressError, Compression, Limit, buffer};

/// The nine bytes that every lzop file starts with.
pub(super) const MAGIC: [u8; 9] = *b"\x89LZO\0\r\n\x1a\n";

/// The largest block that the lzop tool accepts, in bytes (`MAX_BLOCK_SIZE`).
const BLOCK_LEN_MAX: usize = 64 << 20;

/// The header has more fields from this version on.
const VERSION_WITH_LEVEL: u16 = 0x0940;

/// Header flags: which checksums each block carries, and which optional fields the header has.
mod flag {
    pub(super) const ADLER32_CONTENT: u32 = 0x0000_0001;
    pub(super) const ADLER32_COMPRESSED: u32 = 0x0000_0002;
    pub(super) const EXTRA_FIELD: u32 = 0x0000_0040;
    pub(super) const CRC32_CONTENT: u32 = 0x0000_0100;
    pub(super) const CRC32_COMPRESSED: u32 = 0x0000_0200;
    pub(super) const MULTIPART: u32 = 0x0000_0400;
    pub(super) const FILTER: u32 = 0x0000_0800;
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], CompressError> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or_else(|| {
            let why = format!("{len} more bytes were expected, {} are there", self.0.len());
            CompressError::corrupt(Compression::Lzop, why)
        })?;
        self.0 = rest;
        Ok(bytes)
    }

    fn u8(&mut self) -> Result<u8, CompressError> {
        Ok(self.bytes(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, CompressError> {
        let bytes = self.bytes(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&mut self) -> Result<u32, CompressError> {
        let bytes = self.bytes(4)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }
}

/// Reads the header and returns its flags.
fn header(reader: &mut Reader<'_>) -> Result<u32, CompressError> {
    let corrupt = |why: &'static str| CompressError::corrupt(Compression::Lzop, why);
    if reader.bytes(MAGIC.len())? != MAGIC {
        return Err(corrupt("the magic number is missing"));
    }
    let version = reader.u16()?;
    let _library_version = reader.u16()?;
    if version >= VERSION_WITH_LEVEL {
        let _version_needed = reader.u16()?;
    }
    // Methods 1 to 3 are LZO1X-1, LZO1X-1(15) and LZO1X-999, which decompress alike.
    if !(1..=3).contains(&reader.u8()?) {
        return Err(corrupt("the compression method is unknown"));
    }
    if version >= VERSION_WITH_LEVEL {
        let _level = reader.u8()?;
    }
    let flags = reader.u32()?;
    if flags & (flag::FILTER | flag::MULTIPART) != 0 {
        return Err(corrupt("filters and multi-part files are not supported"));
    }
    let _mode_and_mtime = reader.bytes(8)?;
    if version >= VERSION_WITH_LEVEL {
        let _mtime_high = reader.u32()?;
    }
    let name_len = reader.u8()?;
    let _name = reader.bytes(usize::from(name_len))?;
    let _checksum = reader.u32()?;
    if flags & flag::EXTRA_FIELD != 0 {
        let len = reader.u32()?;
        let _extra = reader.bytes(len as usize)?;
        let _checksum = reader.u32()?;
    }
    Ok(flags)
}

/// Decompresses one lzop file up to its end mark.
///
/// The blocks' checksums are skipped, not verified: a kernel's content is compared with the length
/// that the boot image declares, and parsed as an ELF file.
pub fn decompress(input: &[u8], limit: Limit) -> Result<Vec<u8>, CompressError> {
    let format = Compression::Lzop;
    let mut reader = Reader(input);
    let flags = header(&mut reader)?;
    let checksums = |of: &[u32]| of.iter().filter(|&&bit| flags & bit != 0).count() * 4;

    let mut out = buffer(format, limit.reserve())?;
    loop {
        let content_len = reader.u32()? as usize;
        if content_len == 0 {
            return Ok(out);
        }
        let compressed_len = reader.u32()? as usize;
        if content_len > BLOCK_LEN_MAX || compressed_len > content_len {
            let why = format!(
                "a block of {compressed_len} bytes claims a content of {content_len} bytes"
            );
            return Err(CompressError::corrupt(format, why));
        }
        if content_len > limit.max - out.len() {
            return Err(CompressError::TooLarge { format, limit: limit.max });
        }
        reader.bytes(checksums(&[flag::ADLER32_CONTENT, flag::CRC32_CONTENT]))?;
        // A block that does not shrink is stored, and has no second set of checksums.
        if compressed_len == content_len {
            out.extend_from_slice(reader.bytes(content_len)?);
            continue;
        }
        reader.bytes(checksums(&[flag::ADLER32_COMPRESSED, flag::CRC32_COMPRESSED]))?;
        let block = reader.bytes(compressed_len)?;
        let done = out.len();
        out.try_reserve(content_len)
            .map_err(|_| CompressError::OutOfMemory { format, wanted: content_len })?;
        out.resize(done + content_len, 0);
        match lzokay::decompress::decompress(block, &mut out[done..]) {
            Ok(written) if written == content_len => {}
            Ok(written) => {
                let why = format!("a block of {content_len} bytes holds only {written}");
                return Err(CompressError::corrupt(format, why));
            }
            Err(error) => return Err(CompressError::corrupt(format, format!("{error:?}"))),
        }
    }
}
