//! A partition table: GPT with a protective MBR (UEFI specification 2.10, chapter 5).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of a sector, as every firmware sees a virtual disk.
pub(super) const SECTOR: u64 = 512;

/// What GPT has room for at least, and what all tools write.
const ENTRIES: usize = 128;
const ENTRY_BYTES: usize = 128;
const HEADER_BYTES: usize = 92;
const ARRAY_BYTES: usize = ENTRIES * ENTRY_BYTES;
const ARRAY_SECTORS: u64 = ARRAY_BYTES as u64 / SECTOR;

/// Characters of a partition's name, in UTF-16.
const NAME_CHARS: usize = 36;

/// Partitions start at multiples of this, as all tools make them.
pub(super) const MIB: u64 = 1 << 20;

/// A globally unique identifier, as it is written: the first three fields big-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Guid(pub(super) [u8; 16]);

impl Guid {
    /// An identifier out of 16 bytes of a hash, marked as version 8, which is "of the maker's own".
    pub(super) fn from_hash(bytes: [u8; 16]) -> Guid {
        let mut guid = bytes;
        guid[6] = guid[6] & 0x0f | 0x80;
        guid[8] = guid[8] & 0x3f | 0x80;
        Guid(guid)
    }

    /// As it lies on disk: the first three fields little-endian.
    fn on_disk(self) -> [u8; 16] {
        let mut bytes = self.0;
        bytes[..4].reverse();
        bytes[4..6].reverse();
        bytes[6..8].reverse();
        bytes
    }
}

impl std::fmt::Display for Guid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// What a partition is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// GRUB's BIOS boot partition, 21686148-6449-6E6F-744E-656564454649.
    BiosBoot,
    /// The EFI system partition, c12a7328-f81f-11d2-ba4b-00a0c93ec93b.
    EfiSystem,
    /// An x86-64 root, 4f68bce3-e8cd-4db1-96e7-fbcaf984b709, of the Discoverable Partitions
    /// Specification.
    Root,
}

impl Role {
    const fn guid(self) -> Guid {
        Guid(match self {
            Role::BiosBoot => *b"\x21\x68\x61\x48\x64\x49\x6e\x6f\x74\x4e\x65\x65\x64\x45\x46\x49",
            Role::EfiSystem => *b"\xc1\x2a\x73\x28\xf8\x1f\x11\xd2\xba\x4b\x00\xa0\xc9\x3e\xc9\x3b",
            Role::Root => *b"\x4f\x68\xbc\xe3\xe8\xcd\x4d\xb1\x96\xe7\xfb\xca\xf9\x84\xb7\x09",
        })
    }

    const fn name(self) -> &'static str {
        match self {
            Role::BiosBoot => "bios",
            Role::EfiSystem => "esp",
            Role::Root => "root",
        }
    }
}

/// A partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Partition {
    /// From 1. The numbers of a table may have gaps.
    pub(super) number: usize,
    pub(super) role: Role,
    /// Where it starts and how long it is, in bytes: multiples of 1 MiB.
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) guid: Guid,
}

/// What a disk of this size has for partitions: the first MiB and the last one are the tables'.
pub(super) const fn usable(size: u64) -> (u64, u64) {
    (MIB, size - MIB)
}

/// Writes both tables and the protective MBR. What boots is put into the MBR later.
pub(super) fn write(
    disk: &File,
    size: u64,
    guid: Guid,
    partitions: &[Partition],
) -> io::Result<()> {
    let last = size / SECTOR - 1;
    let array = array(partitions);
    let backup = last - ARRAY_SECTORS;
    disk.write_all_at(&protective_mbr(last), 0)?;
    disk.write_all_at(&header(1, last, 2, guid, &array, last), SECTOR)?;
    disk.write_all_at(&array, 2 * SECTOR)?;
    disk.write_all_at(&array, backup * SECTOR)?;
    disk.write_all_at(&header(last, 1, backup, guid, &array, last), last * SECTOR)
}

fn array(partitions: &[Partition]) -> Vec<u8> {
    let mut array = vec![0; ARRAY_BYTES];
    for partition in partitions {
        let at = (partition.number - 1) * ENTRY_BYTES;
        let entry = &mut array[at..at + ENTRY_BYTES];
        let first = partition.start / SECTOR;
        entry[..16].copy_from_slice(&partition.role.guid().on_disk());
        entry[16..32].copy_from_slice(&partition.guid.on_disk());
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&(first + partition.len / SECTOR - 1).to_le_bytes());
        for (index, unit) in partition.role.name().encode_utf16().take(NAME_CHARS).enumerate() {
            entry[56 + 2 * index..58 + 2 * index].copy_from_slice(&unit.to_le_bytes());
        }
    }
    array
}

fn header(own: u64, other: u64, array_at: u64, guid: Guid, array: &[u8], last: u64) -> Vec<u8> {
    let mut header = vec![0; SECTOR as usize];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
    header[12..16].copy_from_slice(&(HEADER_BYTES as u32).to_le_bytes());
    header[24..32].copy_from_slice(&own.to_le_bytes());
    header[32..40].copy_from_slice(&other.to_le_bytes());
    header[40..48].copy_from_slice(&(2 + ARRAY_SECTORS).to_le_bytes());
    header[48..56].copy_from_slice(&(last - ARRAY_SECTORS - 1).to_le_bytes());
    header[56..72].copy_from_slice(&guid.on_disk());
    header[72..80].copy_from_slice(&array_at.to_le_bytes());
    header[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
    header[84..88].copy_from_slice(&(ENTRY_BYTES as u32).to_le_bytes());
    header[88..92].copy_from_slice(&crc32fast::hash(array).to_le_bytes());
    let sum = crc32fast::hash(&header[..HEADER_BYTES]);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
    header
}

/// One partition of type 0xEE over the whole disk, which keeps old tools away.
fn protective_mbr(last: u64) -> Vec<u8> {
    let mut mbr = vec![0; SECTOR as usize];
    let sectors = u32::try_from(last).unwrap_or(u32::MAX);
    mbr[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]);
    mbr[458..462].copy_from_slice(&sectors.to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    mbr
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> (Vec<u8>, u64) {
        let size = 64 * MIB;
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(size).unwrap();
        let guid = |byte| Guid::from_hash([byte; 16]);
        let (start, end) = usable(size);
        let partitions = [
            Partition { number: 14, role: Role::BiosBoot, start, len: MIB, guid: guid(1) },
            Partition {
                number: 1,
                role: Role::Root,
                start: start + MIB,
                len: end - start - MIB,
                guid: guid(2),
            },
        ];
        write(&disk, size, guid(3), &partitions).unwrap();
        let mut bytes = vec![0; size as usize];
        disk.read_exact_at(&mut bytes, 0).unwrap();
        (bytes, size)
    }

    fn number(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn a_guid_has_its_text_and_its_place_on_disk() {
        let esp = Role::EfiSystem.guid();
        assert_eq!(esp.to_string(), "c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
        assert_eq!(esp.on_disk()[..8], [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11]);
        // "Hah!IdontNeedEFI" is what GRUB's looks like on disk.
        assert_eq!(&Role::BiosBoot.guid().on_disk(), b"Hah!IdontNeedEFI");
        let made = Guid::from_hash([0xff; 16]).to_string();
        assert_eq!(made, "ffffffff-ffff-8fff-bfff-ffffffffffff");
    }

    #[test]
    fn both_tables_agree_and_add_up() {
        let (bytes, size) = written();
        let last = size / SECTOR - 1;
        for (own, other) in [(1, last), (last, 1)] {
            let at = (own * SECTOR) as usize;
            let header = &bytes[at..at + HEADER_BYTES];
            assert_eq!(&header[..8], b"EFI PART");
            assert_eq!((number(header, 24), number(header, 32)), (own, other));
            let mut unsummed = header.to_vec();
            unsummed[16..20].fill(0);
            assert_eq!(header[16..20], crc32fast::hash(&unsummed).to_le_bytes());
            let array = (number(header, 72) * SECTOR) as usize;
            let array = &bytes[array..array + ARRAY_BYTES];
            assert_eq!(header[88..92], crc32fast::hash(array).to_le_bytes());
            // The root: number 1, after the BIOS boot partition, up to the last usable MiB.
            assert_eq!(array[..16], Role::Root.guid().on_disk());
            assert_eq!((number(array, 32), number(array, 40)), (4096, (size - MIB) / SECTOR - 1));
            assert!(number(array, 40) <= number(header, 48));
            let bios = &array[13 * ENTRY_BYTES..14 * ENTRY_BYTES];
            assert_eq!(bios[..16], *b"Hah!IdontNeedEFI");
            assert_eq!((number(bios, 32), number(bios, 40)), (2048, 4095));
            assert_eq!(&bios[56..66], b"b\0i\0o\0s\0\0\0");
        }
        assert_eq!(bytes[450], 0xee);
        assert_eq!(bytes[510..512], [0x55, 0xaa]);
    }
}
