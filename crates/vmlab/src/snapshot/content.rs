//! The content of memory files: what is not zero.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vmlab_devices::sparse;

use super::Checked;

/// The unit in which zeros are found, and holes made, in bytes.
const PAGE: usize = 4096;

/// How much is read at a time, in bytes.
const CHUNK: usize = 256 * 1024;

/// Copies all pages that are not zero, and leaves holes for the others.
pub(super) fn save_memory(from: &File, to: &File) -> io::Result<Checked> {
    to.set_len(from.metadata()?.len())?;
    visit(from, |offset, run| to.write_all_at(run, offset))
}

/// The checksum of a memory file.
pub(super) fn checksum(file: &File) -> io::Result<Checked> {
    visit(file, |_, _| Ok(()))
}

/// Gives all runs of pages that are not zero to `seen`, with their offsets. The checksum is of these pages
/// alone, with their places, so that it does not depend on how a filesystem keeps holes.
fn visit(file: &File, mut seen: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<Checked> {
    let length = file.metadata()?.len();
    let mut crc = crc32fast::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    for piece in sparse::pieces(file) {
        let Range { start, end } = piece?;
        // Data may begin within a page where the filesystem's blocks are smaller, and what was read last may reach
        // into it.
        at = at.max(start - start % PAGE as u64);
        while at < end {
            let want = CHUNK.min(usize::try_from(length - at).unwrap_or(CHUNK));
            let chunk = &mut buffer[..want];
            file.read_exact_at(chunk, at)?;
            for run in runs(chunk) {
                for page in run.clone().step_by(PAGE) {
                    crc.update(&(at + page as u64).to_le_bytes());
                    crc.update(&chunk[page..run.end.min(page + PAGE)]);
                }
                seen(at + run.start as u64, &chunk[run])?;
            }
            at += want as u64;
        }
    }
    Ok(Checked { length, checksum: crc.finalize() })
}

/// The longest runs of pages that are not zero.
fn runs(chunk: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, page) in chunk.chunks(PAGE).enumerate() {
        if is_zero(page) {
            continue;
        }
        let start = index * PAGE;
        let end = start + page.len();
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

fn is_zero(page: &[u8]) -> bool {
    // If the first byte is zero and each equals the next, all are; memcmp does that fast.
    page[0] == 0 && page[..page.len() - 1] == page[1..]
}
