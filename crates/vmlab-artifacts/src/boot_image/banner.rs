//! The version string that every kernel carries.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use memchr::memmem;

/// What stands before the release in an uncompressed kernel (`linux_banner`, `init/version.c`).
const PREFIX: &[u8] = b"Linux version ";

/// The longest version string that is believed, in bytes.
const LEN_MAX: usize = 1024;

/// How much of a file is looked at in one go, in bytes.
const CHUNK_LEN: usize = 1 << 20;

/// How far into a file the search goes, in bytes: the string stands among the kernel's constants,
/// before any debugging information.
const SEARCH_LEN_MAX: u64 = 256 << 20;

/// Finds the version string in an uncompressed kernel: what follows `Linux version ` up to the end
/// of the line, like `6.12.1 (user@host) (gcc …) #1 SMP …`.
pub fn find(kernel: &[u8]) -> Option<String> {
    memmem::find_iter(kernel, PREFIX).find_map(|at| clean(&kernel[at + PREFIX.len()..], b'\n'))
}

/// Like [`find`], in a range of a file, which is not read into memory as a whole.
pub(super) fn find_in_file(file: &File, range: Range<u64>) -> io::Result<Option<String>> {
    // A string that crosses the border of two chunks is seen whole in the second of them.
    const OVERLAP: usize = PREFIX.len() + LEN_MAX + 1;
    let end = range.end.min(range.start.saturating_add(SEARCH_LEN_MAX));
    let mut at = range.start;
    let mut chunk = vec![0; CHUNK_LEN];
    while at < end {
        let len = CHUNK_LEN.min((end - at) as usize);
        let got = file.read_at(&mut chunk[..len], at)?;
        if let Some(found) = find(&chunk[..got]) {
            return Ok(Some(found));
        }
        if got <= OVERLAP {
            break;
        }
        at += (got - OVERLAP) as u64;
    }
    Ok(None)
}

/// The text up to `terminator`, if it looks like a version string: it begins with a digit and has
/// nothing in it that a terminal would interpret.
pub(super) fn clean(bytes: &[u8], terminator: u8) -> Option<String> {
    let bytes = &bytes[..bytes.len().min(LEN_MAX + 1)];
    let end = memchr::memchr(terminator, bytes)?;
    let text = std::str::from_utf8(&bytes[..end]).ok()?.trim_end();
    let plausible =
        text.starts_with(|c: char| c.is_ascii_digit()) && !text.contains(char::is_control);
    plausible.then(|| text.to_owned())
}
