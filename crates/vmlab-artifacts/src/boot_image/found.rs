//! Words for what a file is that is no kernel.

use std::fmt::Write;
use std::fs::FileType;
use std::os::unix::fs::FileTypeExt;

use crate::compress::Compression;

/// Formats that people take for kernels, by what they start with.
const MAGICS: &[(&[u8], &str)] = &[
    (b"#!", "a script"),
    (b"!<arch>\ndebian-binary", "a Debian package"),
    (b"!<arch>\n", "an ar archive"),
    (b"\xed\xab\xee\xdb", "an RPM package"),
    (b"070701", "a cpio archive (an initramfs?)"),
    (b"070702", "a cpio archive (an initramfs?)"),
    (b"QFI\xfb", "a qcow2 disk image"),
    (b"hsqs", "a squashfs image"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x27\x05\x19\x56", "a U-Boot image"),
    (b"MZ\0\0zimg", "a self-extracting EFI kernel (zboot)"),
    (b"MZ", "an EFI or DOS program"),
];

/// What a file that is not a regular one is.
pub(crate) fn file_type(file_type: FileType) -> String {
    let name = if file_type.is_dir() {
        "a directory"
    } else if file_type.is_block_device() {
        "a block device"
    } else if file_type.is_char_device() {
        "a character device"
    } else if file_type.is_fifo() {
        "a named pipe"
    } else if file_type.is_socket() {
        "a socket"
    } else {
        "a special file"
    };
    name.to_owned()
}

/// What a file is, by its beginning and its length in bytes.
pub(crate) fn describe(head: &[u8], len: u64) -> String {
    if len == 0 {
        return "an empty file".to_owned();
    }
    if let Some((_, name)) = MAGICS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return (*name).to_owned();
    }
    if let Some(compression) = Compression::sniff(head) {
        let article = if compression == Compression::Xz { "an" } else { "a" };
        return format!("{article} {compression} stream");
    }
    if head.get(257..262) == Some(b"ustar") {
        return "a tar archive".to_owned();
    }
    if head.iter().all(|&byte| byte == 0) {
        return "a file that begins with nothing but zero bytes".to_owned();
    }
    if is_text(head) {
        return "a text file".to_owned();
    }
    if head.get(510..512) == Some(b"\x55\xaa") {
        return "a boot sector or disk image".to_owned();
    }
    format!("a file of an unknown format (it starts with the bytes {})", hex(head))
}

/// The first bytes in hexadecimal, separated by spaces.
pub(super) fn hex(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (index, byte) in bytes.iter().take(8).enumerate() {
        let space = if index == 0 { "" } else { " " };
        let _ = write!(out, "{space}{byte:02x}");
    }
    out
}

fn is_text(head: &[u8]) -> bool {
    let head = &head[..head.len().min(4096)];
    let valid = match std::str::from_utf8(head) {
        Ok(_) => head.len(),
        // A character can be cut by the end of what was read.
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        Err(_) => return false,
    };
    valid > 0
        && head[..valid]
            .iter()
            .all(|&byte| byte >= 0x20 || matches!(byte, b'\t' | b'\n' | b'\r' | 0x0c))
}
