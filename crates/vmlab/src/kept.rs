//! What the command of one of many runs wrote: kept in a file, and shown in part.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::units::{Bytes, MIB};

/// The file in a run's directory.
pub const OUTPUT_FILE: &str = "output.log";

/// How much is kept of what one run writes, beside the last of it: a guest that writes without end must
/// not fill the host's disk. Kept is what the user can read, which ends somewhere near this.
const KEPT: u64 = 64 * MIB;

/// How much of the beginning and of the end of a longer output is shown. The end has what failed.
const SHOWN_HEAD: u64 = 16 * 1024;
const SHOWN_TAIL: u64 = 48 * 1024;

/// Takes what a command writes, into a file with a limit. It never fails, as the command would notice.
#[derive(Debug)]
pub struct Keeper {
    file: File,
    limit: u64,
    taken: u64,
    /// The last of what is beyond the limit, or came after the file could not be written.
    tail: VecDeque<u8>,
    failed: Option<io::Error>,
}

/// An output that could not be kept in its file.
#[derive(Debug)]
pub struct Unkept {
    /// Why not.
    pub error: io::Error,
    /// The end of it, which is in memory only.
    pub tail: Vec<u8>,
}

impl Keeper {
    /// Keeps what comes in this file.
    pub fn new(file: File) -> Self {
        Self { file, limit: KEPT, taken: 0, tail: VecDeque::new(), failed: None }
    }

    /// Adds the end of what was too long.
    ///
    /// # Errors
    /// When something could not be written.
    pub fn finish(mut self) -> Result<(), Unkept> {
        let left_out = self.taken.saturating_sub(self.limit + self.tail.len() as u64);
        let written = match self.failed.take() {
            Some(error) => Err(error),
            None => self.write_tail(left_out),
        };
        written.map_err(|error| Unkept { error, tail: self.tail.into() })
    }

    fn write_tail(&mut self, left_out: u64) -> io::Result<()> {
        if left_out > 0 {
            self.file.write_all(&left_out_line(left_out, "not kept"))?;
        }
        let (a, b) = self.tail.as_slices();
        self.file.write_all(a)?;
        self.file.write_all(b)
    }
}

impl Write for Keeper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.limit.saturating_sub(self.taken);
        let mut now = bytes.len().min(room.try_into().unwrap_or(usize::MAX));
        self.taken += bytes.len() as u64;
        let mut later = bytes;
        while now > 0 && self.failed.is_none() {
            match self.file.write(&later[..now]) {
                Ok(0) => self.failed = Some(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    later = &later[count..];
                    now -= count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.failed = Some(error),
            }
        }
        self.tail.extend(later);
        let excess = self.tail.len().saturating_sub(SHOWN_TAIL as usize);
        self.tail.drain(..excess);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A kept output, as much of it as a person should be shown. It ends with a newline, if there is any.
///
/// # Errors
/// When the file cannot be read.
pub fn excerpt(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut shown = Vec::new();
    if length <= SHOWN_HEAD + SHOWN_TAIL {
        file.read_to_end(&mut shown)?;
    } else {
        (&mut file).take(SHOWN_HEAD).read_to_end(&mut shown)?;
        // Whole lines, where they are not as long as all of it.
        let head = shown.iter().rposition(|byte| *byte == b'\n').map_or(shown.len(), |at| at + 1);
        shown.truncate(head);
        file.seek(SeekFrom::Start(length - SHOWN_TAIL))?;
        let mut tail = Vec::new();
        file.read_to_end(&mut tail)?;
        let start = tail.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let start = if start == tail.len() { 0 } else { start };
        let left_out = length - (head + tail.len() - start) as u64;
        let place = format!("to be found in {}", path.display());
        shown.extend_from_slice(&left_out_line(left_out, &place));
        shown.extend_from_slice(&tail[start..]);
    }
    if !shown.is_empty() && !shown.ends_with(b"\n") {
        shown.push(b'\n');
    }
    Ok(shown)
}

fn left_out_line(bytes: u64, why: &str) -> Vec<u8> {
    format!("\n[... {} left out, {why} ...]\n", Bytes(bytes)).into_bytes()
}

/// Where a run's output is, if it wrote any.
pub fn written(dir: &Path) -> Option<PathBuf> {
    let path = dir.join(OUTPUT_FILE);
    path.metadata().is_ok_and(|file| file.len() > 0).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(count: usize) -> Vec<u8> {
        (0..count).flat_map(|n| format!("line {n:06}\n").into_bytes()).collect()
    }

    fn shown(content: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let text = String::from_utf8(excerpt(file.path()).unwrap()).unwrap();
        text.replace(file.path().to_str().unwrap(), "FILE")
    }

    #[test]
    fn short_outputs_are_shown_whole() {
        assert_eq!(shown(b""), "");
        assert_eq!(shown(b"a\nb"), "a\nb\n");
        let all = lines(64 * 1024 / 12);
        assert_eq!(shown(&all).as_bytes(), all);
    }

    #[test]
    fn long_outputs_lose_their_middle() {
        let all = lines(100_000);
        let text = shown(&all);
        let (head, rest) = text.split_once("\n[... ").unwrap();
        let (said, tail) = rest.split_once(" ...]\n").unwrap();
        assert!(head.starts_with("line 000000\n") && head.ends_with('\n'), "{head}");
        assert!(tail.starts_with("line ") && tail.ends_with("line 099999\n"), "{tail}");
        assert!(all.starts_with(head.as_bytes()) && all.ends_with(tail.as_bytes()));
        let left_out = Bytes((all.len() - head.len() - tail.len()) as u64);
        assert_eq!(said, format!("{left_out} left out, to be found in FILE"));
        assert!(text.len() < 65 * 1024 && text.len() > 60 * 1024, "{}", text.len());
        // No line ends in it.
        let text = shown(&vec![b'x'; 1 << 20]);
        assert_eq!(text.matches('x').count(), 64 * 1024);
    }

    #[test]
    fn endless_outputs_are_kept_in_part() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut keeper = Keeper::new(file.reopen().unwrap());
        keeper.limit = 1000;
        let all = lines(50_000);
        for piece in all.chunks(777) {
            keeper.write_all(piece).unwrap();
            assert!(keeper.tail.len() <= SHOWN_TAIL as usize);
        }
        keeper.finish().unwrap();
        let kept = std::fs::read(file.path()).unwrap();
        assert_eq!(kept[..1000], all[..1000]);
        let tail = SHOWN_TAIL as usize;
        assert_eq!(kept[kept.len() - tail..], all[all.len() - tail..]);
        let between = String::from_utf8_lossy(&kept[1000..kept.len() - tail]).into_owned();
        let left_out = Bytes((all.len() - tail - 1000) as u64);
        assert_eq!(between, format!("\n[... {left_out} left out, not kept ...]\n"));

        // Just above the limit, nothing is left out.
        let mut keeper = Keeper::new(file.reopen().unwrap());
        file.as_file().set_len(0).unwrap();
        keeper.limit = 1000;
        keeper.write_all(&all[..1100]).unwrap();
        keeper.finish().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), all[..1100]);
    }

    #[test]
    fn a_full_disk_is_told_at_the_end() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut keeper = Keeper::new(full);
        assert_eq!(keeper.write(b"abc").unwrap(), 3);
        assert_eq!(keeper.write(b"def").unwrap(), 3);
        let unkept = keeper.finish().unwrap_err();
        assert_eq!(unkept.error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(unkept.tail, b"abcdef");
    }
}
