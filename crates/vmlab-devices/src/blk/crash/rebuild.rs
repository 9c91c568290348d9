//! The disk that a power cut leaves, as a file.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::log::{Change, Log};
use super::states::CrashState;
use crate::blk::backend::{Backend, Buffers, RawFile, Sectors};
use crate::blk::config::SECTOR;
use crate::sparse;

/// A state that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("{what} {} to rebuild a disk after a power cut", path.display())]
pub struct RebuildError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Writes the disk as a power cut leaves it to a new file, which has holes where it can. `base` is the file as it was
/// when the log began: that of a disk whose writes were discarded, or a copy of one whose writes were kept.
///
/// # Errors
/// A file cannot be read or written, `base` has another size, there is a file at `to`, or the state is not one of this
/// log.
pub fn rebuild(base: &Path, log: &Log, state: &CrashState, to: &Path) -> Result<(), RebuildError> {
    let error = |what, path: &Path| {
        let path = path.to_owned();
        move |source| RebuildError { what, path, source }
    };
    let from = File::open(base).map_err(error("cannot read", base))?;
    let length = (&from).seek(SeekFrom::End(0)).map_err(error("cannot read", base))?;
    if length.div_ceil(SECTOR) != log.capacity() {
        let other = io::Error::other("it is not as large as the disk of the log was");
        return Err(error("cannot use", base)(other));
    }
    let new = File::options().read(true).write(true).create_new(true).open(to);
    let new = new.map_err(error("cannot make", to))?;
    let copied = new.set_len(log.capacity() * SECTOR).and_then(|()| sparse::copy(&from, &new));
    copied.map_err(error("cannot copy to", to))?;
    let disk = RawFile::new(new).map_err(error("cannot write", to))?;
    apply(&disk, log, state).map_err(error("cannot write", to))
}

fn apply(disk: &RawFile, log: &Log, state: &CrashState) -> io::Result<()> {
    let all = (0..state.durable).map(|entry| (entry, 0..u64::MAX));
    let some = state.survivors.iter().map(|survivor| (survivor.entry, survivor.sectors.clone()));
    for (place, part) in all.chain(some) {
        let entry = log.entries().get(place).ok_or(io::ErrorKind::InvalidInput)?;
        let of = |sectors: Sectors| sectors.part(part.start, part.end.saturating_sub(part.start));
        match entry.change {
            Change::Write(sectors) => {
                let (mut data, part) = (log.data(entry)?, of(sectors));
                let skip = ((part.first() - sectors.first()) * SECTOR) as usize;
                let data = Buffers::from_bytes(&mut data);
                disk.write(part, &data.part(skip, (part.count() * SECTOR) as usize))?;
            }
            Change::Discard(sectors) | Change::Zeroes(sectors) => {
                disk.write_zeroes(of(sectors), true)?;
            }
            Change::Flush { .. } => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Cuts, Survivor, at_flushes, at_random};
    use super::*;
    use crate::blk::backend::Recorded;
    use std::os::unix::fs::MetadataExt;

    const SECTORS: u64 = 64;

    fn sectors(first: u64, count: u64) -> Sectors {
        Sectors::within(first, count, SECTORS).unwrap()
    }

    /// A base in which each sector has its number, and a log of changes to it.
    struct Place {
        dir: tempfile::TempDir,
        disk: Recorded<RawFile>,
    }

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let base: Vec<u8> = (0..SECTORS).flat_map(|n| [n as u8; 512]).collect();
            for name in ["base", "disk"] {
                std::fs::write(dir.path().join(name), &base).unwrap();
            }
            let file = File::options().read(true).write(true).open(dir.path().join("disk"));
            let raw = RawFile::new(file.unwrap()).unwrap();
            let disk = Recorded::create(raw, &dir.path().join("log")).unwrap();
            Self { dir, disk }
        }

        fn write(&self, first: u64, count: u64, byte: u8) {
            let mut bytes = vec![byte; count as usize * 512];
            self.disk.write(sectors(first, count), &Buffers::from_bytes(&mut bytes)).unwrap();
        }

        fn log(&self) -> Log {
            Log::open(&self.dir.path().join("log")).unwrap()
        }

        /// The first byte of each sector of a state.
        fn rebuilt(&self, state: &CrashState) -> Vec<u8> {
            let to = self.dir.path().join("to");
            rebuild(&self.dir.path().join("base"), &self.log(), state, &to).unwrap();
            let content = std::fs::read(&to).unwrap();
            std::fs::remove_file(to).unwrap();
            assert_eq!(content.len() as u64, SECTORS * 512);
            content.chunks(512).map(|sector| sector[0]).collect()
        }
    }

    #[test]
    fn what_was_recorded_comes_back() {
        let place = Place::new();
        place.write(1, 2, 0xaa);
        place.disk.discard(sectors(8, 4)).unwrap();
        place.disk.flush().unwrap();
        place.disk.write_zeroes(sectors(20, 1), false).unwrap();
        place.write(2, 1, 0xbb);
        place.disk.flush().unwrap();
        place.write(3, 4, 0xcc);
        let log = place.log();
        let flushed: Vec<CrashState> = at_flushes(log.entries()).collect();
        assert_eq!(flushed.len(), 2);
        let mut wanted: Vec<u8> = (0..SECTORS as u8).collect();
        wanted[1..3].fill(0xaa);
        wanted[8..12].fill(0);
        assert_eq!(place.rebuilt(&flushed[0]), wanted);
        wanted[20] = 0;
        wanted[2] = 0xbb;
        assert_eq!(place.rebuilt(&flushed[1]), wanted);
        let survivors = vec![Survivor { entry: 6, sectors: 1..3 }];
        let torn = CrashState { cut: 7, durable: 6, survivors };
        wanted[4..6].fill(0xcc);
        assert_eq!(place.rebuilt(&torn), wanted);
        let bad = CrashState { cut: 8, durable: 8, survivors: Vec::new() };
        let to = place.dir.path().join("to");
        assert!(rebuild(&place.dir.path().join("base"), &log, &bad, &to).is_err());
    }

    #[test]
    fn a_power_cut_never_loses_what_was_flushed() {
        let place = Place::new();
        place.write(0, 4, 0x80);
        place.disk.flush().unwrap();
        place.write(10, 8, 0x81);
        let cuts = Cuts { count: 60, seed: 5, tear: true, reorder: true };
        let (mut lost, mut kept) = (0, 0);
        for state in at_random(place.log().entries(), cuts) {
            let content = place.rebuilt(&state);
            if state.cut >= 2 {
                assert_eq!(content[..4], [0x80; 4], "{state:?}");
            }
            if state.cut == 3 {
                let is_there = content[10..18].iter().filter(|byte| **byte == 0x81).count();
                lost += u32::from(is_there == 0);
                kept += u32::from(is_there == 8);
            }
        }
        assert!(lost > 0 && kept > 0, "{lost} {kept}");
    }

    #[test]
    fn a_log_is_of_one_disk_at_a_time_and_begins_anew() {
        let place = Place::new();
        place.write(0, 1, 1);
        assert_eq!(place.log().entries().len(), 1);
        let log = place.dir.path().join("log");
        let raw = || RawFile::new(tempfile::tempfile().unwrap()).unwrap();
        let error = Recorded::create(raw(), &log).err().unwrap();
        assert!(error.to_string().contains("another disk"), "{error}");
        drop(place.disk);
        let _again = Recorded::create(raw(), &log).unwrap();
        assert!(Log::open(&log).unwrap().entries().is_empty());
    }

    #[test]
    fn holes_stay_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let base = File::create(path("base")).unwrap();
        base.set_len(64 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&base, b"end", (64 << 20) - 3).unwrap();
        let raw = RawFile::new(File::open(path("base")).unwrap()).unwrap();
        drop(Recorded::create(raw, &path("log")).unwrap());
        let log = Log::open(&path("log")).unwrap();
        let state = CrashState { cut: 0, durable: 0, survivors: Vec::new() };
        rebuild(&path("base"), &log, &state, &path("to")).unwrap();
        let meta = path("to").metadata().unwrap();
        assert_eq!(meta.len(), 64 << 20);
        assert!(meta.blocks() < 1000, "{}", meta.blocks());
        assert!(std::fs::read(path("to")).unwrap().ends_with(b"\0end"));
        let error = rebuild(&path("base"), &log, &state, &path("to")).unwrap_err().to_string();
        assert!(error.contains("cannot make"), "{error}");
    }
}
