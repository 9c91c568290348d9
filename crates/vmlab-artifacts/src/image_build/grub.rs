//! GRUB in the MBR and in the BIOS boot partition, as `grub-bios-setup` puts it there, but without
//! a device. The places in its two images are those of `include/grub/i386/pc/boot.h`.

use super::gpt::SECTOR;

/// How much of the first sector is code; the rest is the disk's signature and the partition table.
const CODE: usize = 440;

/// In boot.img: where the first sector of the core image is, 8 bytes.
const KERNEL_SECTOR: usize = 0x5c;
/// In boot.img: the drive to load from; 0xff is that which the BIOS booted.
const BOOT_DRIVE: usize = 0x64;
/// In boot.img: a jump around the correction of drive numbers that some BIOSes get wrong. Two `nop`
/// in its place make the correction, as for any hard disk.
const DRIVE_CHECK: usize = 0x66;
const NOPS: [u8; 2] = [0x90, 0x90];

/// In the first sector of the core image: the first sector to load, 8 bytes; then how many, 2 bytes;
/// then at which segment, 2 bytes. It is the last of a list that grows downwards.
const BLOCK_LIST: usize = 512 - 12;

/// Why GRUB's images cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum GrubError {
    /// boot.img is no boot sector.
    #[error("GRUB's boot.img is no boot sector of 512 bytes")]
    BootImage,
    /// The core image does not begin with a list of its blocks.
    #[error("GRUB's core image has no list of its blocks, or one that does not fit its {0} bytes")]
    CoreImage(usize),
    /// The core image is too large.
    #[error("GRUB's core image has {len} bytes, and its partition {room}")]
    TooLarge {
        /// Bytes of the core image.
        len: usize,
        /// Bytes of the partition.
        room: u64,
    },
}

/// Puts the boot code into a first sector with a partition table.
pub(super) fn patch_mbr(mbr: &mut [u8], boot: &[u8], core_at: u64) -> Result<(), GrubError> {
    if boot.len() != SECTOR as usize || boot[510..] != [0x55, 0xaa] || mbr.len() != boot.len() {
        return Err(GrubError::BootImage);
    }
    mbr[..CODE].copy_from_slice(&boot[..CODE]);
    mbr[KERNEL_SECTOR..KERNEL_SECTOR + 8].copy_from_slice(&(core_at / SECTOR).to_le_bytes());
    mbr[BOOT_DRIVE] = 0xff;
    mbr[DRIVE_CHECK..DRIVE_CHECK + 2].copy_from_slice(&NOPS);
    Ok(())
}

/// Tells a core image where it lies: `core_at` bytes from the start of the disk, in one piece.
pub(super) fn patch_core(core: &mut [u8], core_at: u64, room: u64) -> Result<(), GrubError> {
    let len = core.len();
    if len as u64 > room {
        return Err(GrubError::TooLarge { len, room });
    }
    if len <= SECTOR as usize {
        return Err(GrubError::CoreImage(len));
    }
    // `grub-mkimage` has written the length of the rest; one that is wrong is another format.
    let sectors = u16::from_le_bytes([core[BLOCK_LIST + 8], core[BLOCK_LIST + 9]]);
    if u64::from(sectors) != (len as u64).div_ceil(SECTOR) - 1 {
        return Err(GrubError::CoreImage(len));
    }
    core[BLOCK_LIST..BLOCK_LIST + 8].copy_from_slice(&(core_at / SECTOR + 1).to_le_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot_image() -> Vec<u8> {
        let mut boot = vec![0x11; 512];
        boot[510..].copy_from_slice(&[0x55, 0xaa]);
        boot
    }

    #[test]
    fn the_partition_table_stays() {
        let mut mbr = vec![0x22; 512];
        patch_mbr(&mut mbr, &boot_image(), 1 << 20).unwrap();
        assert_eq!(mbr[..KERNEL_SECTOR], [0x11; KERNEL_SECTOR]);
        assert_eq!(mbr[KERNEL_SECTOR..KERNEL_SECTOR + 8], 2048u64.to_le_bytes());
        assert_eq!(mbr[BOOT_DRIVE..BOOT_DRIVE + 4], [0xff, 0x11, 0x90, 0x90]);
        assert_eq!(mbr[CODE..], [0x22; 72]);
    }

    #[test]
    fn what_is_no_boot_sector_is_refused() {
        for bad in [vec![], vec![0; 512], vec![0x55; 1024]] {
            assert_eq!(patch_mbr(&mut [0; 512], &bad, 0), Err(GrubError::BootImage));
        }
    }

    #[test]
    fn a_core_image_learns_where_it_is() {
        let mut core = vec![0; 512 + 700];
        core[BLOCK_LIST + 8] = 2;
        patch_core(&mut core, 1 << 20, 1 << 20).unwrap();
        assert_eq!(core[BLOCK_LIST..BLOCK_LIST + 8], 2049u64.to_le_bytes());
        assert_eq!(core[BLOCK_LIST + 8], 2);

        let too_large = GrubError::TooLarge { len: 1212, room: 1024 };
        assert_eq!(patch_core(&mut core, 1 << 20, 1024), Err(too_large));
        core[BLOCK_LIST + 8] = 3;
        assert_eq!(patch_core(&mut core, 1 << 20, 1 << 20), Err(GrubError::CoreImage(1212)));
        assert_eq!(patch_core(&mut [0; 512], 1 << 20, 1 << 20), Err(GrubError::CoreImage(512)));
    }
}
