//! What filesystems say when they find themselves damaged. Each has words of its own; what they say of mounting
//! something else, of recovery and of options is no damage.

use super::title::{plain, symbol_in};

/// The event's title, if a line of the kernel's reports damage.
pub(super) fn damage(text: &str) -> Option<String> {
    let (first, rest) = text.split_once(' ')?;
    match first {
        // fs/ext4/super.c: "EXT4-fs error (device sda): func:line: ..."
        "EXT4-fs" | "EXT3-fs" | "EXT2-fs" => ext(first, rest),
        "XFS" => xfs(rest.split_once("): ")?.1),
        "BTRFS" | "BTRFS:" => btrfs(rest),
        "F2FS-fs" => f2fs(rest.split_once("): ")?.1),
        // fs/fat/misc.c, fs/exfat/misc.c: "FAT-fs (sda): error, ..."
        "FAT-fs" | "exFAT-fs" => {
            let said = rest.split_once("): error, ")?.1;
            Some(format!("{first} error: {}", plain(said)))
        }
        "SQUASHFS" => {
            let said = rest.strip_prefix("error: ")?;
            (!said.contains("Can't find a SQUASHFS superblock"))
                .then(|| format!("SQUASHFS error: {}", plain(said)))
        }
        // fs/erofs/super.c: "erofs (device sda): ..."; other messages of it are of mounting.
        "erofs" => {
            let said = rest.split_once("): ")?.1;
            said.contains("corrupted").then(|| format!("erofs error: {}", plain(said)))
        }
        // "UDF-fs: error (device sda): func: ..."
        "UDF-fs:" | "JFS:" | "OCFS2:" | "NILFS" | "REISERFS" => {
            let rest = rest.trim_start_matches("ERROR").trim_start_matches("error");
            let said = rest.strip_prefix(" (device ")?.split_once("): ")?.1;
            Some(format!("{} error: {}", first.trim_end_matches(':'), plain(said)))
        }
        // fs/jbd2/journal.c: "Aborting journal on device sda-8."
        "Aborting" => text
            .starts_with("Aborting journal on device ")
            .then(|| "JBD2: aborting journal".to_owned()),
        _ => None,
    }
}

fn ext(name: &str, rest: &str) -> Option<String> {
    if let Some(said) = rest.strip_prefix("error (device ") {
        let said = said.split_once("): ")?.1;
        let function = said.split(':').next().unwrap_or(said);
        return Some(format!("{name} error in {}", plain(function)));
    }
    let said = rest.strip_prefix('(')?.split_once("): ")?.1;
    ["error: ", "previous I/O error to superblock", "failed to convert unwritten extents"]
        .iter()
        .any(|words| said.starts_with(words))
        .then(|| format!("{name} error: {}", plain(said.trim_start_matches("error: "))))
}

/// `said` is what follows the device.
fn xfs(said: &str) -> Option<String> {
    const DAMAGE: [&str; 7] = [
        "Metadata corruption detected",
        "Metadata CRC error detected",
        "Corruption of in-memory data",
        "Corruption detected",
        "metadata I/O error",
        "Internal error",
        "Filesystem has been shut down",
    ];
    let words = DAMAGE.iter().find(|words| said.starts_with(**words))?;
    Some(match symbol_in(said) {
        Some(function) => format!("XFS: {words} in {function}"),
        None => format!("XFS: {words}"),
    })
}

/// `error (device sda): ...`, `critical (device sda state EA): ...`, `error (device sda) in func:line: ...`
fn btrfs(rest: &str) -> Option<String> {
    let rest = rest.trim_start_matches(": ");
    let level = ["error", "critical"].iter().find(|level| rest.starts_with(**level))?;
    let said = rest[level.len()..].strip_prefix(" (device ")?.split_once(')')?.1;
    if let Some(said) = said.strip_prefix(" in ") {
        let function = said.split(':').next().unwrap_or(said);
        return Some(format!("BTRFS {level} in {}", plain(function)));
    }
    Some(format!("BTRFS {level}: {}", plain(said.strip_prefix(": ").unwrap_or(said))))
}

/// `said` is what follows the device. It has no word for how bad something is.
fn f2fs(said: &str) -> Option<String> {
    const DAMAGE: [&str; 6] =
        ["inconsistent", "corrupt", "sanity check", "Bitmap was wrongly", "wrong ", "run fsck"];
    DAMAGE.iter().any(|words| said.contains(words)).then(|| format!("F2FS error: {}", plain(said)))
}
