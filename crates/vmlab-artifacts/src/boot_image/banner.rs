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
///
/// Kernels hold it twice, and one copy was made before the number of the build was known; the other
/// one is preferred.
pub fn find(kernel: &[u8]) -> Option<String> {
    let mut incomplete = None;
    let complete = candidates(kernel).find(|text| is_complete(text, &mut incomplete));
    complete.or(incomplete)
}

/// Like [`find`], in a range of a file, which is not read into memory as a whole.
pub(super) fn find_in_file(file: &File, range: Range<u64>) -> io::Result<Option<String>> {
    // A string that crosses the border of two chunks is seen whole in the second of them.
    const OVERLAP: usize = PREFIX.len() + LEN_MAX + 1;
    let end = range.end.min(range.start.saturating_add(SEARCH_LEN_MAX));
    let mut at = range.start;
    let mut chunk = vec![0; CHUNK_LEN];
    let mut incomplete = None;
    while at < end {
        let len = CHUNK_LEN.min((end - at) as usize);
        let got = file.read_at(&mut chunk[..len], at)?;
        let mut found = candidates(&chunk[..got]);
        if let Some(found) = found.find(|text| is_complete(text, &mut incomplete)) {
            return Ok(Some(found));
        }
        if got <= OVERLAP {
            break;
        }
        at += (got - OVERLAP) as u64;
    }
    Ok(incomplete)
}

fn candidates(kernel: &[u8]) -> impl Iterator<Item = String> {
    memmem::find_iter(kernel, PREFIX).filter_map(|at| clean(&kernel[at + PREFIX.len()..], b'\n'))
}

/// Whether the text has the number of the build in it. The first one that has not is remembered.
fn is_complete(text: &str, incomplete: &mut Option<String>) -> bool {
    let complete = text
        .rsplit_once(" #")
        .is_some_and(|(_, build)| build.starts_with(|c: char| c.is_ascii_digit()));
    if !complete && incomplete.is_none() {
        *incomplete = Some(text.to_owned());
    }
    complete
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
