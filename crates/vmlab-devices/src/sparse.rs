//! Files with holes, such as disks and memory.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{SeekFrom, copy_file_range, seek, sendfile};
use rustix::io::Errno;

/// The pieces of a file or block device that are no holes, by their bytes. What cannot have holes is one piece.
///
/// # Errors
/// An item is one where the file cannot be searched; it is the last one.
pub fn pieces(file: &File) -> impl Iterator<Item = io::Result<Range<u64>>> {
    let next = move |from: u64| {
        let start = match seek(file, SeekFrom::Data(from)) {
            // It does not know where data is.
            Err(Errno::INVAL) => from,
            start => start?,
        };
        let end = match seek(file, SeekFrom::Hole(start)) {
            Err(Errno::INVAL) => seek(file, SeekFrom::End(0))?,
            end => end?,
        };
        if start < end { Ok(start..end) } else { Err(Errno::NXIO) }
    };
    let mut at = Some(0);
    std::iter::from_fn(move || {
        let piece = next(at?);
        at = piece.as_ref().ok().map(|piece| piece.end);
        match piece {
            Err(Errno::NXIO) => None,
            piece => Some(piece.map_err(Into::into)),
        }
    })
}

/// How many bytes of a file are no holes.
///
/// # Errors
/// The file cannot be searched.
pub fn data(file: &File) -> io::Result<u64> {
    pieces(file).map(|piece| piece.map(|piece| piece.end - piece.start)).sum()
}

/// Copies what is data to the same places of another file, by the kernel's own means, and neither reads nor writes
/// where the first one has holes. Where the other file is longer, it stays so.
///
/// # Errors
/// One of them cannot be read or written, or the first one becomes shorter meanwhile. Nothing is known of the other's
/// content then.
pub fn copy(from: &File, to: &File) -> io::Result<()> {
    // A filesystem may share blocks, or have its server copy them. Not all can, and none with another one.
    let mut ranges = true;
    for piece in pieces(from) {
        let Range { start: mut at, end } = piece?;
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let copied = if ranges {
                let mut place = at;
                copy_file_range(from, Some(&mut at), to, Some(&mut place), left)
            } else {
                seek(to, SeekFrom::Start(at))?;
                sendfile(to, from, Some(&mut at), left)
            };
            match copied {
                // It was cut meanwhile.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) if ranges => {
                    ranges = false;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    const SIZE: u64 = 64 << 20;

    /// Files on a disk, and in memory, of 64 MiB.
    fn files() -> [File; 2] {
        let memory = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let files = [tempfile::tempfile().unwrap(), memory.into()];
        files.iter().for_each(|file| file.set_len(SIZE).unwrap());
        files
    }

    fn content(file: &File) -> Vec<u8> {
        let mut content = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut content, 0).unwrap();
        content
    }

    #[test]
    fn copies_have_the_content_and_the_holes() {
        for from in files() {
            // Longer than the kernel copies at once through a pipe.
            let long: Vec<u8> = (0..3_u32 << 20).map(|n| (n % 251) as u8).collect();
            from.write_all_at(&long, 1 << 20).unwrap();
            from.write_all_at(b"end", SIZE - 3).unwrap();
            let whole = content(&from);
            for to in files() {
                copy(&from, &to).unwrap();
                assert!(content(&to) == whole);
                assert!(to.metadata().unwrap().blocks() * 512 < 8 << 20);
                let found = pieces(&to).map(Result::unwrap).collect::<Vec<_>>();
                assert_eq!((found.len(), found[1].end), (2, SIZE), "{found:?}");
                assert_eq!(data(&to).unwrap(), data(&from).unwrap());
            }
        }
    }

    #[test]
    fn what_is_longer_stays_so_and_what_is_empty_is_no_piece() {
        let [from, to] = files();
        assert_eq!(pieces(&from).count(), 0);
        from.set_len(0).unwrap();
        assert_eq!((pieces(&from).count(), data(&from).unwrap()), (0, 0));
        copy(&from, &to).unwrap();
        from.write_all_at(b"begin", 0).unwrap();
        copy(&from, &to).unwrap();
        let content = content(&to);
        assert!(content.starts_with(b"begin\0") && content.len() as u64 == SIZE);
    }

    #[test]
    fn files_that_cannot_be_written_are_errors() {
        let [from, _] = files();
        from.write_all_at(b"x", 0).unwrap();
        let to = File::open("/dev/null").unwrap();
        assert!(copy(&from, &to).is_err());
    }
}
