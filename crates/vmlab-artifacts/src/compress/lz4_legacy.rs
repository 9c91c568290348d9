//! LZ4's legacy frame: the magic number, then blocks of at most 8 MiB of content, each after its
//! compressed length (`lz4_Frame_format.md`, "Legacy frame"). `lz4 -l` writes it.

use super::{CompressError, Compression, Limit, buffer};

/// The magic number 0x184C2102, as it stands in the file.
pub(super) const MAGIC: [u8; 4] = 0x184C_2102_u32.to_le_bytes();

/// The content of a block: 8 MiB in every block but the last one.
const BLOCK_LEN: usize = 8 << 20;

/// Decompresses a legacy frame. All of `input` has to belong to it, for the format has no end mark.
pub fn decompress(input: &[u8], limit: Limit) -> Result<Vec<u8>, CompressError> {
    let format = Compression::Lz4Legacy;
    let mut rest = input
        .strip_prefix(&MAGIC)
        .ok_or_else(|| CompressError::corrupt(format, "the magic number is missing"))?;
    // The last block is decompressed into the room of a whole one.
    let mut out = buffer(format, limit.reserve().saturating_add(BLOCK_LEN))?;
    while !rest.is_empty() {
        let (len, after) = rest
            .split_first_chunk::<4>()
            .ok_or_else(|| CompressError::corrupt(format, "a block length is cut short"))?;
        // Concatenated frames repeat the magic number in the place of a length.
        if *len == MAGIC {
            rest = after;
            continue;
        }
        let len = u32::from_le_bytes(*len) as usize;
        let (block, after) = after.split_at_checked(len).ok_or_else(|| {
            let why = format!("a block of {len} bytes begins {} bytes before the end", after.len());
            CompressError::corrupt(format, why)
        })?;
        rest = after;

        let done = out.len();
        let room = BLOCK_LEN.min(limit.max - done);
        out.try_reserve(room).map_err(|_| CompressError::OutOfMemory { format, wanted: room })?;
        out.resize(done + room, 0);
        let written = match lz4_flex::block::decompress_into(block, &mut out[done..]) {
            Ok(written) => written,
            Err(lz4_flex::block::DecompressError::OutputTooSmall { .. }) if room < BLOCK_LEN => {
                return Err(CompressError::TooLarge { format, limit: limit.max });
            }
            Err(error) => return Err(CompressError::corrupt(format, error)),
        };
        out.truncate(done + written);
    }
    Ok(out)
}
