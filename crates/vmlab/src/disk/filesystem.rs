//! Filesystems: the program that makes one, and how one is recognised.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{Mkfs, SWAP};

/// What is known of a filesystem's program. Of others it is known only that there may be a `mkfs.NAME`.
struct Known {
    name: &'static str,
    /// To say nothing, and to ask nothing.
    quiet: &'static [&'static str],
    /// Before a label, and the most bytes of one.
    label: (&'static str, usize),
    /// Before a UUID; with `=` at its end it is one word with it.
    uuid: &'static [&'static str],
}

const KNOWN: [Known; 9] = [
    Known { name: "ext2", quiet: &["-q", "-F"], label: ("-L", 16), uuid: &["-U"] },
    Known { name: "ext3", quiet: &["-q", "-F"], label: ("-L", 16), uuid: &["-U"] },
    Known { name: "ext4", quiet: &["-q", "-F"], label: ("-L", 16), uuid: &["-U"] },
    Known { name: "xfs", quiet: &["-q", "-f"], label: ("-L", 12), uuid: &["-m", "uuid="] },
    Known { name: "btrfs", quiet: &["-q", "-f"], label: ("-L", 255), uuid: &["-U"] },
    Known { name: "f2fs", quiet: &["-q", "-f"], label: ("-l", 512), uuid: &["-U"] },
    Known { name: "vfat", quiet: &[], label: ("-n", 11), uuid: &["-i"] },
    Known { name: "bcachefs", quiet: &["-q", "-f"], label: ("-L", 32), uuid: &["-U"] },
    Known { name: SWAP, quiet: &[], label: ("-L", 15), uuid: &["-U"] },
];

fn known(name: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|known| known.name == name)
}

/// The program that makes it.
pub(super) fn program(name: &str) -> String {
    match name {
        SWAP => "mkswap".to_owned(),
        name => format!("mkfs.{name}"),
    }
}

/// Refuses what no program would make.
pub(super) fn check(mkfs: &Mkfs) -> Result<(), String> {
    let name = &mkfs.name;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || !name.chars().all(plain) {
        return Err(format!("`{name}` is no name of a filesystem"));
    }
    let of_unknown = mkfs.label.is_some() || mkfs.uuid.is_some();
    let Some(known) = known(name) else {
        return match of_unknown {
            true => Err(format!(
                "how {} takes a label or a UUID is not known; `mkfs-options` can have them",
                program(name)
            )),
            false => Ok(()),
        };
    };
    if let Some(label) = &mkfs.label {
        let (_, most) = known.label;
        if label.is_empty() || label.len() > most || label.starts_with('-') {
            return Err(format!("a label of {name} has 1 to {most} bytes and begins with no `-`"));
        }
    }
    if let Some(uuid) = &mkfs.uuid {
        let digits: String = uuid.chars().filter(|c| *c != '-').collect();
        let wanted = if name == "vfat" { 8 } else { 32 };
        if digits.len() != wanted || !digits.chars().all(|c| c.is_ascii_hexdigit()) {
            return Err(format!("the UUID of {name} has {wanted} hexadecimal digits"));
        }
    }
    if mkfs.content.is_some() && name == SWAP {
        return Err("swap space has no content".to_owned());
    }
    Ok(())
}

/// The program and its arguments, but for the device.
pub(super) fn words(mkfs: &Mkfs) -> Vec<String> {
    let mut words = vec![program(&mkfs.name)];
    if let Some(known) = known(&mkfs.name) {
        words.extend(known.quiet.iter().map(|&word| word.to_owned()));
        if let Some(label) = &mkfs.label {
            words.extend([known.label.0.to_owned(), label.clone()]);
        }
        if let Some(uuid) = &mkfs.uuid {
            let value = match mkfs.name.as_str() {
                "vfat" => uuid.replace('-', ""),
                _ => uuid.clone(),
            };
            words.extend(known.uuid.iter().map(|&word| word.to_owned()));
            match words.last_mut().filter(|last| last.ends_with('=')) {
                Some(last) => last.push_str(&value),
                None => words.push(value),
            }
        }
    }
    words.extend(mkfs.options.iter().cloned());
    words
}

/// How a filesystem begins: the place and the bytes. Sources: `fs/ext4/ext4.h`, `fs/xfs/libxfs/xfs_format.h`,
/// `include/uapi/linux/btrfs_tree.h`, `include/linux/f2fs_fs.h`, `include/linux/swap.h` of the kernel.
fn magic(name: &str) -> &'static [(u64, &'static [u8])] {
    match name {
        "ext2" | "ext3" | "ext4" => &[(1080, b"\x53\xef")],
        "xfs" => &[(0, b"XFSB")],
        "btrfs" => &[(65600, b"_BHRfS_M")],
        "f2fs" => &[(1024, b"\x10\x20\xf5\xf2")],
        "vfat" => &[(510, b"\x55\xaa")],
        SWAP => &[(4086, b"SWAPSPACE2")],
        _ => &[],
    }
}

/// Looks whether a disk of `size` bytes has the filesystem, as its superblock says.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn look(disk: &File, name: &str, size: u64) -> Result<(), String> {
    let read = |at: u64, buffer: &mut [u8]| {
        disk.read_exact_at(buffer, at).map_err(|e: io::Error| format!("reading at {at}: {e}"))
    };
    for (at, bytes) in magic(name) {
        let mut found = vec![0; bytes.len()];
        read(*at, &mut found)?;
        if found != *bytes {
            return Err(format!("there is no superblock of {name}"));
        }
    }
    let mut block = [0; 256];
    let of_filesystem = match name {
        "ext2" | "ext3" | "ext4" => {
            read(1024, &mut block)?;
            let low = u64::from(le32(&block, 4));
            // The upper half counts where the feature of 64 bits is on.
            let wide = le32(&block, 96) & 0x80 != 0;
            let mut high = [0; 4];
            read(1024 + 0x150, &mut high)?;
            let high = if wide { u64::from(u32::from_le_bytes(high)) } else { 0 };
            Some(((high << 32) | low).checked_shl(10 + le32(&block, 24).min(6)).unwrap_or(0))
        }
        "xfs" => {
            read(0, &mut block)?;
            let block_size = u64::from(u32::from_be_bytes(array(&block, 4)));
            Some(u64::from_be_bytes(array(&block, 8)).saturating_mul(block_size))
        }
        "btrfs" => {
            read(65536, &mut block)?;
            Some(u64::from_le_bytes(array(&block, 112)))
        }
        _ => None,
    };
    match of_filesystem {
        // What the last, broken group of blocks would have had is left out by some.
        Some(found) if found > size || found < size / 2 => {
            Err(format!("its superblock speaks of {found} bytes, and the disk has {size}"))
        }
        _ => Ok(()),
    }
}

fn array<const N: usize>(block: &[u8; 256], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&block[at..at + N]);
    bytes
}

fn le32(block: &[u8; 256], at: usize) -> u32 {
    u32::from_le_bytes(array(block, at))
}
