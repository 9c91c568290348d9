//! The configuration space: `struct virtio_blk_config` in `linux/virtio_blk.h`, virtio 1.2, 5.2.4.

use std::mem::offset_of;

use virtio_bindings::virtio_blk::virtio_blk_config as Layout;

/// Bytes of a sector, in which the device counts whatever its block size is.
pub const SECTOR: u64 = 512;

/// The size of every ring, which a monitor has to give the guest as it is: how long requests can be depends on it.
pub const QUEUE_SIZE: u16 = 256;

/// The most buffers with data of one request: a ring less its header and its status.
pub(super) const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;

/// The most bytes of one such buffer. All together are within [`MAX_GATHERED`](crate::MAX_GATHERED), with the
/// header and the status.
pub(super) const MAX_SEGMENT: u32 = 8192;

/// The most ranges of one DISCARD or WRITE_ZEROES. A guest's driver merges so many.
pub(super) const MAX_RANGES: usize = 32;

/// The most sectors of such a range, 1 GiB: what can be written, where a file has no other way to zeroes, before
/// a guest takes its disk for hung (30 s).
pub(super) const MAX_RANGE: u32 = (1 << 30) / SECTOR as u32;

/// The size of the blocks in which the guest reads and writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, serde::Serialize)]
pub enum BlockSize {
    /// 512 bytes.
    #[default]
    #[serde(rename = "512")]
    B512,
    /// 1 KiB.
    #[serde(rename = "1024")]
    B1024,
    /// 2 KiB.
    #[serde(rename = "2048")]
    B2048,
    /// 4 KiB, the largest that guests with such pages have.
    #[serde(rename = "4096")]
    B4096,
}

impl BlockSize {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::B512, Self::B1024, Self::B2048, Self::B4096];

    /// In bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B1024 => 1024,
            Self::B2048 => 2048,
            Self::B4096 => 4096,
        }
    }

    /// In sectors.
    pub const fn sectors(self) -> u64 {
        self.bytes() as u64 / SECTOR
    }
}

/// What the guest is told of a disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    /// In sectors.
    pub(super) capacity: u64,
    pub(super) block: BlockSize,
    pub(super) queues: u16,
}

impl Geometry {
    /// The bytes of the configuration space.
    pub(super) fn space(self) -> Vec<u8> {
        let mut space = vec![0; size_of::<Layout>()];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        let ranges = MAX_RANGES as u32;
        put(offset_of!(Layout, capacity), &self.capacity.to_le_bytes());
        for (at, value) in [
            (offset_of!(Layout, size_max), MAX_SEGMENT),
            (offset_of!(Layout, seg_max), MAX_SEGMENTS),
            (offset_of!(Layout, blk_size), self.block.bytes()),
            (offset_of!(Layout, max_discard_sectors), MAX_RANGE),
            (offset_of!(Layout, max_discard_seg), ranges),
            (offset_of!(Layout, discard_sector_alignment), self.block.sectors() as u32),
            (offset_of!(Layout, max_write_zeroes_sectors), MAX_RANGE),
            (offset_of!(Layout, max_write_zeroes_seg), ranges),
        ] {
            put(at, &value.to_le_bytes());
        }
        put(offset_of!(Layout, num_queues), &self.queues.to_le_bytes());
        put(offset_of!(Layout, write_zeroes_may_unmap), &[1]);
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_request_can_be_gathered() {
        let data = u64::from(MAX_SEGMENT) * u64::from(MAX_SEGMENTS);
        assert!(16 + data < crate::MAX_GATHERED);
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let geometry = Geometry { capacity: 0x1_0203_0405, block: BlockSize::B4096, queues: 3 };
        let space = geometry.space();
        assert_eq!(space[..8], [5, 4, 3, 2, 1, 0, 0, 0]);
        let long = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        assert_eq!((long(8), long(12)), (8192, 254), "size_max, seg_max");
        assert_eq!(long(20), 4096, "blk_size");
        assert_eq!(space[34..36], [3, 0], "num_queues");
        assert_eq!((long(36), long(40), long(44)), (2_097_152, 32, 8), "discard");
        assert_eq!((long(48), long(52), space[56]), (2_097_152, 32, 1), "write zeroes");
    }
}
