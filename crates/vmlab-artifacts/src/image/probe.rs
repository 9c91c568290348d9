//! What a file is, by its magic bytes, and how long it has to be.

use std::fs::File;
use std::io;

use super::numbers::{be32, be64, le32, le64, read_at};
use super::{Compression, ImageFormat, found};

/// How much of a file is looked at. The last thing that is looked for is the superblock of btrfs.
pub(super) const HEAD_LEN: usize = 68 << 10;

/// The largest table of a qcow2 image that is read, in bytes. QEMU allows refcount tables of 8 MiB.
const TABLE_MAX: u64 = 8 << 20;

pub(super) enum Found {
    Disk(ImageFormat),
    Compressed(Compression),
    Tar,
    Other { what: String, advice: Option<&'static str> },
}

fn other(what: &str, advice: &'static str) -> Found {
    Found::Other { what: what.to_owned(), advice: Some(advice) }
}

pub(super) const CONVERT: &str = "`qemu-img convert -O qcow2` makes a usable one of it";
const INSTALLER: &str = "installation media are not disk images; install it to a disk first, or take the \
                         cloud image of the same distribution";
const KERNEL: &str = "give kernels by -k (--kernel)";

/// Tells what a file is that begins with `head`; `len` is the length of all of it where that is known.
pub(super) fn find(head: &[u8], len: Option<u64>) -> Found {
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    if at(0, b"QFI\xfb") {
        return match head.get(4..8) {
            Some([0, 0, 0, 2 | 3]) => Found::Disk(ImageFormat::Qcow2),
            _ => other("a qcow image of version 1", CONVERT),
        };
    }
    if at(0, b"KDMV") || is_vmdk_descriptor(head) {
        return Found::Disk(ImageFormat::Vmdk);
    }
    if at(0x40, &0xbeda_107f_u32.to_le_bytes()) {
        return Found::Disk(ImageFormat::Vdi);
    }
    for (magic, what) in [
        (&b"vhdxfile"[..], "a VHDX image (Hyper-V)"),
        (b"conectix", "a VHD image (Hyper-V, Azure)"),
        (b"COWD", "a vmdk image of an old version (COWD)"),
        (b"QED\0", "a QED image"),
        (b"WithoutFreeSpace", "a Parallels image"),
        (b"WithouFreSpacExt", "a Parallels image"),
    ] {
        if at(0, magic) {
            return other(what, CONVERT);
        }
    }
    // Images for USB sticks have a partition table, too, so this comes first.
    if at(0x8001, b"CD001") {
        return other("an ISO 9660 image", INSTALLER);
    }
    if at(0x202, b"HdrS") && at(0x1fe, b"\x55\xaa") || at(0, b"\x7fELF") || at(0x38, b"ARM\x64") {
        return other("a kernel or another program", KERNEL);
    }
    if at(257, b"ustar") {
        return Found::Tar;
    }
    if is_raw(head) {
        return Found::Disk(ImageFormat::Raw);
    }
    match Compression::sniff(head) {
        // Too short a magic number for what may be anything.
        Some(Compression::Lzma) | None => {}
        Some(Compression::Lz4Legacy | Compression::Lzop) => {
            return other("compressed by lz4 or lzop", "unpack it first");
        }
        Some(compression) => return Found::Compressed(compression),
    }
    let zeros = head.iter().all(|&byte| byte == 0);
    let what = match len {
        Some(len) if len > 0 && zeros => {
            "a file that begins with nothing but zero bytes (no partition table, no file system)"
                .to_owned()
        }
        _ => found::describe(head, len.unwrap_or(head.len() as u64)),
    };
    Found::Other { what, advice: None }
}

/// A partition table, or a file system that a guest could have as its root.
fn is_raw(head: &[u8]) -> bool {
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    // Also GPT has an MBR, with one partition; a FAT volume has the same mark.
    at(510, b"\x55\xaa")
        || at(512, b"EFI PART")
        || at(4096, b"EFI PART")
        || at(0x438, b"\x53\xef") // ext2 to ext4
        || at(0, b"XFSB")
        || at(0x1_0040, b"_BHRfS_M") // btrfs
        || at(0, b"hsqs") // squashfs
        || at(0x400, b"\xe2\xe1\xf5\xe0") // erofs
        || at(0x400, b"\x10\x20\xf5\xf2") // f2fs
}

/// A descriptor has a line with its version before any other but for comments, as QEMU takes it.
fn is_vmdk_descriptor(head: &[u8]) -> bool {
    let text = head.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii);
    let mut lines = text.filter(|line| !line.is_empty() && !line.starts_with(b"#"));
    lines.next().is_some_and(|line| {
        line.strip_prefix(b"version=").is_some_and(|version| matches!(version, b"1" | b"2" | b"3"))
    })
}

/// Up to which byte an image reaches at least, where that can be told.
pub(super) fn needed(file: &File, format: ImageFormat) -> io::Result<Option<u64>> {
    let head = read_at(file, 0, HEAD_LEN)?;
    match format {
        ImageFormat::Raw => Ok(raw_needed(&head)),
        ImageFormat::Qcow2 => qcow2_needed(file, &head),
        ImageFormat::Vmdk if head.starts_with(b"KDMV") => vmdk_needed(file, &head),
        ImageFormat::Vmdk => Ok(None),
        ImageFormat::Vdi => Ok(vdi_needed(&head)),
    }
}

/// The type of the one partition that stands for those of GPT.
const PROTECTIVE: u8 = 0xee;

/// By the place of GPT's second header, the last partition of an MBR, or the size of an ext file system.
fn raw_needed(head: &[u8]) -> Option<u64> {
    for block in [512, 4096] {
        if head.get(block..block + 8) == Some(b"EFI PART") {
            let last = le64(head, block + 32)?;
            return last.checked_add(1)?.checked_mul(block as u64);
        }
    }
    if head.get(0x438..0x43a) == Some(b"\x53\xef") {
        let size = 1024_u64.checked_shl(le32(head, 0x418)?)?;
        return u64::from(le32(head, 0x404)?).checked_mul(size);
    }
    // A FAT volume has code where the partitions are.
    if head.get(510..512) != Some(b"\x55\xaa") || head.get(0x36..0x39) == Some(b"FAT") {
        return None;
    }
    let ends = (0..4).filter_map(|index| {
        let entry = head.get(446 + 16 * index..446 + 16 * (index + 1))?;
        let used = matches!(entry[0], 0 | 0x80) && entry[4] != 0 && entry[4] != PROTECTIVE;
        let end = u64::from(le32(entry, 8)?) + u64::from(le32(entry, 12)?);
        used.then_some(end * 512)
    });
    ends.max()
}

/// By the last cluster that is counted.
fn qcow2_needed(file: &File, head: &[u8]) -> io::Result<Option<u64>> {
    let header = || {
        let version = be32(head, 4)?;
        let bits = be32(head, 20).filter(|bits| (9..=21).contains(bits))?;
        let table = be64(head, 48)?;
        let table_len = u64::from(be32(head, 56)?) << bits;
        let order = if version < 3 { 4 } else { be32(head, 96).filter(|&order| order <= 6)? };
        Some((1_u64 << bits, table, table_len, order))
    };
    let Some((cluster, table, table_len, order)) = header() else { return Ok(None) };
    let bytes = read_at(file, table, table_len.min(TABLE_MAX) as usize)?;
    if (bytes.len() as u64) < table_len.min(TABLE_MAX) {
        return Ok(table.checked_add(table_len));
    }
    let entry = |index: usize| be64(&bytes, 8 * index).unwrap_or(0);
    let Some(last) = (0..bytes.len() / 8).rev().find(|&index| entry(index) != 0) else {
        return Ok(None);
    };
    let block = read_at(file, entry(last), cluster as usize)?;
    if (block.len() as u64) < cluster {
        return Ok(entry(last).checked_add(cluster));
    }
    let Some(byte) = block.iter().rposition(|&byte| byte != 0) else { return Ok(None) };
    // Counts are of 2^order bits; those smaller than a byte begin with its lowest bits.
    let bit = byte as u64 * 8 + u64::from(block[byte].ilog2());
    let per_block = (cluster * 8) >> order;
    let index = (last as u64 * per_block).checked_add(bit >> order);
    // The last cluster of a file need not be whole.
    Ok(index.and_then(|index| index.checked_mul(cluster)?.checked_add(1)))
}

/// What stands where a directory's offset would, if it is at the end of the file.
const AT_END: u64 = u64::MAX;

/// As many grain tables of a vmdk image are read, of 2 KiB each as a rule: those of 256 GiB.
const GRAIN_TABLES_MAX: u64 = 8192;

/// The longest grain table that is read, in entries. The format has 512, always.
const GRAIN_TABLE_MAX: u64 = 4096;

/// By the last grain that there is, or the end mark of images that are written in one go.
fn vmdk_needed(file: &File, head: &[u8]) -> io::Result<Option<u64>> {
    let header = || {
        let (capacity, grain) = (le64(head, 12)?, le64(head, 20)?);
        let entries = u64::from(le32(head, 44)?).min(GRAIN_TABLE_MAX);
        let tables = capacity.div_ceil(grain.checked_mul(entries).filter(|&len| len > 0)?);
        Some((le64(head, 56)?, le64(head, 64)?, entries, tables.min(GRAIN_TABLES_MAX)))
    };
    let Some((directory, data, entries, tables)) = header() else { return Ok(None) };
    if directory == AT_END {
        // Before the last sector, which marks the end, is another header.
        let len = file.metadata()?.len();
        let footer = read_at(file, len.saturating_sub(1024), 4)?;
        return Ok((footer != b"KDMV").then_some(len + 1));
    }
    let words = |sector: u64, count: u64| -> io::Result<Vec<u64>> {
        let bytes = read_at(file, sector.saturating_mul(512), 4 * count as usize)?;
        Ok((0..bytes.len() / 4).filter_map(|at| le32(&bytes, 4 * at).map(u64::from)).collect())
    };
    let mut last = 0;
    for table in words(directory, tables)?.into_iter().filter(|&table| table != 0) {
        last = words(table, entries)?.into_iter().fold(last.max(table), u64::max);
    }
    // A compressed grain has any length.
    Ok((last * 512).checked_add(1).max(data.checked_mul(512)))
}

fn vdi_needed(head: &[u8]) -> Option<u64> {
    let (data, block, allocated) = (le32(head, 0x158)?, le32(head, 0x178)?, le32(head, 0x184)?);
    u64::from(allocated).checked_mul(block.into())?.checked_add(data.into())
}
