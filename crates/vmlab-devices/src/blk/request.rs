//! Requests, checked whole before anything is done: virtio 1.2, 5.2.6.

use std::mem::offset_of;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, virtio_blk_discard_write_zeroes as Range,
    virtio_blk_outhdr as Header,
};

use crate::blk::backend::Sectors;
use crate::blk::config::{BlockSize, MAX_RANGE, MAX_RANGES, SECTOR};
use crate::chain::Chain;

/// The bytes of a request before its data.
pub(super) const HEADER: usize = size_of::<Header>();

/// The bytes behind its data.
pub(super) const STATUS: usize = 1;

/// The bytes of a serial number, padded with zeroes.
pub(super) const SERIAL: usize = VIRTIO_BLK_ID_BYTES as usize;

/// What a guest asks of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// Sectors into the room of the request.
    Read(Sectors),
    /// The data of the request into sectors.
    Write(Sectors),
    Flush,
    Discard(Vec<Sectors>),
    /// Ranges, and whether each may be given back to whoever stores them.
    WriteZeroes(Vec<(Sectors, bool)>),
    GetId,
}

/// Why a request is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It makes no sense, or not for this disk: VIRTIO_BLK_S_IOERR.
    Bad,
    /// There is no such request: VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Sectors of the disk.
    pub(super) capacity: u64,
    pub(super) block: BlockSize,
    pub(super) read_only: bool,
}

impl Request {
    /// Reads a request. The chain has room for a status.
    pub(super) fn of(chain: &Chain<'_>, limits: Limits) -> Result<Self, Refusal> {
        let mut header = [0; HEADER];
        if chain.read(0, &mut header) < HEADER {
            return Err(Refusal::Bad);
        }
        let data = chain.readable() - HEADER;
        let room = chain.writable().checked_sub(STATUS).ok_or(Refusal::Bad)?;
        let first = long(&header, offset_of!(Header, sector));
        let writes = |request| if limits.read_only { Err(Refusal::Bad) } else { Ok(request) };
        match int(&header, offset_of!(Header, type_)) {
            VIRTIO_BLK_T_IN if data == 0 => Ok(Self::Read(limits.sectors(first, room)?)),
            VIRTIO_BLK_T_OUT if room == 0 => writes(Self::Write(limits.sectors(first, data)?)),
            VIRTIO_BLK_T_FLUSH if data == 0 && room == 0 => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID if data == 0 && room >= SERIAL => Ok(Self::GetId),
            VIRTIO_BLK_T_DISCARD if room == 0 => {
                let ranges = limits.ranges(chain, data)?;
                // The specification has no flags for it.
                if ranges.iter().any(|(_, unmap)| *unmap) {
                    return Err(Refusal::Unsupported);
                }
                writes(Self::Discard(ranges.into_iter().map(|(sectors, _)| sectors).collect()))
            }
            VIRTIO_BLK_T_WRITE_ZEROES if room == 0 => {
                writes(Self::WriteZeroes(limits.ranges(chain, data)?))
            }
            VIRTIO_BLK_T_IN
            | VIRTIO_BLK_T_OUT
            | VIRTIO_BLK_T_FLUSH
            | VIRTIO_BLK_T_GET_ID
            | VIRTIO_BLK_T_DISCARD
            | VIRTIO_BLK_T_WRITE_ZEROES => Err(Refusal::Bad),
            _ => Err(Refusal::Unsupported),
        }
    }
}

impl Limits {
    /// Sectors that have so many bytes, all of them on the disk.
    fn sectors(&self, first: u64, bytes: usize) -> Result<Sectors, Refusal> {
        let bytes = bytes as u64;
        if !bytes.is_multiple_of(SECTOR) {
            return Err(Refusal::Bad);
        }
        self.blocks(first, bytes / SECTOR)
    }

    /// Sectors that are whole blocks on the disk.
    fn blocks(&self, first: u64, count: u64) -> Result<Sectors, Refusal> {
        let block = self.block.sectors();
        if !first.is_multiple_of(block) || !count.is_multiple_of(block) {
            return Err(Refusal::Bad);
        }
        Sectors::within(first, count, self.capacity).ok_or(Refusal::Bad)
    }

    /// The ranges of a DISCARD or WRITE_ZEROES, with their flag.
    fn ranges(&self, chain: &Chain<'_>, data: usize) -> Result<Vec<(Sectors, bool)>, Refusal> {
        let count = data / size_of::<Range>();
        if !data.is_multiple_of(size_of::<Range>()) || !(1..=MAX_RANGES).contains(&count) {
            return Err(Refusal::Bad);
        }
        let mut ranges = Vec::with_capacity(count);
        for number in 0..count {
            let mut range = [0; size_of::<Range>()];
            chain.read(HEADER + number * range.len(), &mut range);
            let flags = int(&range, offset_of!(Range, flags));
            if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                return Err(Refusal::Unsupported);
            }
            let sectors = int(&range, offset_of!(Range, num_sectors));
            if sectors > MAX_RANGE {
                return Err(Refusal::Bad);
            }
            let first = long(&range, offset_of!(Range, sector));
            ranges.push((self.blocks(first, sectors.into())?, flags != 0));
        }
        Ok(ranges)
    }
}

fn int(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
