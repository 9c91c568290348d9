//! Random operations on files, and a model that knows what every file has to contain.
//!
//! What is done depends on the seed alone and never on what the filesystem answers. So the model can be played
//! again elsewhere, on the host, to compare what a guest has left there.

#![allow(clippy::print_stderr, reason = "the harness shows what a failed test has written")]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, seek};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

/// The longest file, the longest operation, and how many names and open files there are.
const LONGEST: u64 = 200_000;
const MOST_AT_ONCE: u64 = 40_000;
const NAMES: u64 = 6;
const HANDLES: usize = 5;

/// A generator of numbers: xorshift64.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        // The upper bits are the better ones.
        (self.0 >> 16) % limit
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// Bytes that only this operation writes. That many numbers for each of them would take most of the time.
fn fill(tag: u64, length: u64) -> Vec<u8> {
    const PERIOD: usize = 251;
    let mut random = Random(tag | 1 << 40);
    let part: Vec<u8> = (0..PERIOD).map(|_| random.below(255) as u8 + 1).collect();
    let mut bytes = part.repeat(length as usize / PERIOD + 1);
    bytes.truncate(length as usize);
    bytes
}

#[derive(Debug, Clone, Copy)]
struct Range {
    start: u64,
    length: u64,
}

#[derive(Debug, Clone)]
enum Op {
    Open { name: u64, append: bool, truncate: bool },
    Close { handle: usize },
    Write { handle: usize, at: Range },
    Append { handle: usize, length: u64 },
    Read { handle: usize, at: Range },
    MapWrite { handle: usize, at: Range, sync: bool },
    MapRead { handle: usize, at: Range },
    Resize { handle: usize, size: u64 },
    ResizeByName { name: u64, size: u64 },
    Allocate { handle: usize, at: Range, keep_size: bool },
    Punch { handle: usize, at: Range },
    Copy { from: usize, to: usize, at: Range, place: u64 },
    Seek { handle: usize, from: u64 },
    Sync { handle: usize, data: bool },
    Rename { from: u64, to: u64 },
    Link { from: u64, to: u64 },
    Unlink { name: u64 },
    Stat { name: u64 },
}

/// What there has to be.
#[derive(Debug, Default)]
struct Model {
    contents: Vec<Vec<u8>>,
    /// Which of the contents a name leads to.
    names: BTreeMap<u64, usize>,
    /// Which of the contents a handle is of, and whether it appends.
    handles: Vec<(usize, bool)>,
    done: u64,
}

impl Model {
    fn of(&self, handle: usize) -> &[u8] {
        &self.contents[self.handles[handle].0]
    }

    fn links(&self, content: usize) -> u64 {
        self.names.values().filter(|one| **one == content).count() as u64
    }

    /// What to do next. `None` where what was drawn makes no sense now.
    fn choose(&self, random: &mut Random) -> Option<Op> {
        let handle = random.below(HANDLES as u64) as usize;
        let name = random.below(NAMES);
        let (start, length) = (random.below(LONGEST), random.below(MOST_AT_ONCE) + 1);
        // Many errors are at the borders of pages.
        let start = if random.chance(4) { start & !4095 } else { start };
        let length = length.min(LONGEST - start).max(1);
        let kind = random.below(100);
        let flag = random.chance(2);
        let there = handle < self.handles.len();
        if kind < 12 && self.handles.len() < HANDLES {
            return Some(Op::Open { name, append: flag, truncate: random.chance(6) });
        }
        if kind >= 80 {
            let other = random.below(NAMES);
            let there = self.names.contains_key(&name);
            return match kind {
                80..84 => (there && other != name).then_some(Op::Rename { from: name, to: other }),
                84..87 => (there && !self.names.contains_key(&other))
                    .then_some(Op::Link { from: name, to: other }),
                87..89 => there.then_some(Op::Unlink { name }),
                89..92 => there.then_some(Op::ResizeByName { name, size: start }),
                _ => Some(Op::Stat { name }),
            };
        }
        if !there {
            return None;
        }
        let size = self.of(handle).len() as u64;
        // Of what is there, for what cannot go beyond the end.
        let inside =
            (start < size).then(|| Range { start, length: length.min(size.saturating_sub(start)) });
        let at = Range { start, length };
        Some(match kind {
            0..15 => Op::Close { handle },
            15..28 if self.handles[handle].1 => {
                Op::Append { handle, length: length.min(LONGEST.saturating_sub(size).max(1)) }
            }
            15..28 => Op::Write { handle, at },
            28..40 => Op::Read { handle, at },
            40..50 => Op::MapWrite { handle, at: inside?, sync: flag },
            50..57 => Op::MapRead { handle, at: inside? },
            57..61 => Op::Resize { handle, size: start },
            61..64 => Op::Allocate { handle, at, keep_size: flag },
            64..68 => Op::Punch { handle, at },
            68..73 => {
                let to = random.below(self.handles.len() as u64) as usize;
                let place = random.below(LONGEST - MOST_AT_ONCE);
                let apart = self.handles[to].0 != self.handles[handle].0;
                (apart && !self.handles[to].1).then_some(Op::Copy {
                    from: handle,
                    to,
                    at: inside?,
                    place,
                })?
            }
            73..76 => Op::Seek { handle, from: inside?.start },
            _ => Op::Sync { handle, data: flag },
        })
    }

    fn put(&mut self, content: usize, start: u64, bytes: &[u8]) {
        let content = &mut self.contents[content];
        let (start, end) = (start as usize, start as usize + bytes.len());
        content.resize(content.len().max(end), 0);
        content[start..end].copy_from_slice(bytes);
    }

    fn apply(&mut self, op: &Op) {
        self.done += 1;
        let tag = self.done;
        match *op {
            Op::Open { name, append, truncate } => {
                let content = *self.names.entry(name).or_insert_with(|| {
                    self.contents.push(Vec::new());
                    self.contents.len() - 1
                });
                if truncate {
                    self.contents[content].clear();
                }
                self.handles.push((content, append));
            }
            Op::Close { handle } => drop(self.handles.remove(handle)),
            Op::Write { handle, at } | Op::MapWrite { handle, at, .. } => {
                self.put(self.handles[handle].0, at.start, &fill(tag, at.length));
            }
            Op::Append { handle, length } => {
                let end = self.of(handle).len() as u64;
                self.put(self.handles[handle].0, end, &fill(tag, length));
            }
            Op::Resize { handle, size } => {
                self.contents[self.handles[handle].0].resize(size as usize, 0);
            }
            Op::ResizeByName { name, size } => {
                self.contents[self.names[&name]].resize(size as usize, 0);
            }
            Op::Allocate { handle, at, keep_size: false } => {
                let content = &mut self.contents[self.handles[handle].0];
                content.resize(content.len().max((at.start + at.length) as usize), 0);
            }
            Op::Punch { handle, at } => {
                let content = &mut self.contents[self.handles[handle].0];
                let end = content.len().min((at.start + at.length) as usize);
                if let Some(hole) = content.get_mut(at.start as usize..end) {
                    hole.fill(0);
                }
            }
            Op::Copy { from, to, at, place } => {
                let bytes = self.of(from)[at.start as usize..][..at.length as usize].to_vec();
                self.put(self.handles[to].0, place, &bytes);
            }
            Op::Rename { from, to } => {
                let content = self.names[&from];
                // Two names of one file both stay.
                if self.names.get(&to) != Some(&content) {
                    self.names.remove(&from);
                    self.names.insert(to, content);
                }
            }
            Op::Link { from, to } => drop(self.names.insert(to, self.names[&from])),
            Op::Unlink { name } => drop(self.names.remove(&name)),
            Op::Allocate { .. }
            | Op::Read { .. }
            | Op::MapRead { .. }
            | Op::Seek { .. }
            | Op::Sync { .. }
            | Op::Stat { .. } => {}
        }
    }
}

/// The real files.
struct Real<'a> {
    dir: &'a Path,
    handles: Vec<File>,
}

impl Real<'_> {
    fn path(&self, name: u64) -> PathBuf {
        self.dir.join(format!("file-{name}"))
    }

    /// Does what the model does afterwards, and compares with what it knows.
    fn apply(&mut self, op: &Op, model: &Model) -> std::io::Result<()> {
        let tag = model.done + 1;
        match *op {
            Op::Open { name, append, truncate } => {
                let mut options = OpenOptions::new();
                options.read(true).write(true).create(true).mode(0o600).truncate(truncate);
                let flags = if append { libc_append() } else { 0 };
                self.handles.push(options.custom_flags(flags).open(self.path(name))?);
            }
            Op::Close { handle } => drop(self.handles.remove(handle)),
            Op::Write { handle, at } => {
                self.handles[handle].write_all_at(&fill(tag, at.length), at.start)?;
            }
            Op::Append { handle, length } => {
                let bytes = fill(tag, length);
                let written = std::io::Write::write(&mut &self.handles[handle], &bytes)?;
                assert_eq!(written, bytes.len());
            }
            Op::Read { handle, at } => {
                let mut bytes = vec![0; at.length as usize];
                let read = self.handles[handle].read_at(&mut bytes, at.start)?;
                same(&bytes[..read], part(model.of(handle), at));
            }
            Op::MapWrite { handle, at, sync } => {
                let map = Map::new(&self.handles[handle], model.of(handle).len())?;
                map.write(at, &fill(tag, at.length));
                if sync {
                    map.sync()?;
                }
            }
            Op::MapRead { handle, at } => {
                let map = Map::new(&self.handles[handle], model.of(handle).len())?;
                same(&map.read(at), part(model.of(handle), at));
            }
            Op::Resize { handle, size } => self.handles[handle].set_len(size)?,
            Op::ResizeByName { name, size } => {
                OpenOptions::new().write(true).open(self.path(name))?.set_len(size)?;
            }
            Op::Allocate { handle, at, keep_size } => {
                let keep = FallocateFlags::KEEP_SIZE;
                let flags = if keep_size { keep } else { FallocateFlags::empty() };
                fallocate(&self.handles[handle], flags, at.start, at.length)?;
            }
            Op::Punch { handle, at } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&self.handles[handle], flags, at.start, at.length)?;
            }
            Op::Copy { from, to, at, place } => {
                let (mut source, mut target) = (at.start, place);
                let mut left = at.length as usize;
                while left > 0 {
                    let (from, to) = (&self.handles[from], &self.handles[to]);
                    let copied =
                        copy_file_range(from, Some(&mut source), to, Some(&mut target), left)?;
                    assert_ne!(copied, 0, "the source ended early");
                    left -= copied;
                }
            }
            Op::Seek { handle, from } => {
                let content = model.of(handle);
                let data = match seek(&self.handles[handle], SeekFrom::Data(from)) {
                    Err(Errno::NXIO) => content.len() as u64,
                    other => other?,
                };
                let hole = &content[from as usize..data as usize];
                same(&vec![0; hole.len()], hole);
            }
            Op::Sync { handle, data: true } => self.handles[handle].sync_data()?,
            Op::Sync { handle, data: false } => self.handles[handle].sync_all()?,
            Op::Rename { from, to } => std::fs::rename(self.path(from), self.path(to))?,
            Op::Link { from, to } => std::fs::hard_link(self.path(from), self.path(to))?,
            Op::Unlink { name } => std::fs::remove_file(self.path(name))?,
            Op::Stat { name } => match model.names.get(&name) {
                None => assert!(!self.path(name).exists()),
                Some(content) => {
                    let stat = self.path(name).symlink_metadata()?;
                    let wanted = (model.contents[*content].len() as u64, model.links(*content));
                    assert_eq!((stat.len(), stat.nlink()), wanted, "size and links");
                }
            },
        }
        Ok(())
    }

    /// All open files are what they should be, also those without a name.
    fn check(&self, model: &Model) -> std::io::Result<()> {
        for (file, (content, _)) in self.handles.iter().zip(&model.handles) {
            let stat = file.metadata()?;
            let content_is = &model.contents[*content];
            let wanted = (content_is.len() as u64, model.links(*content));
            assert_eq!((stat.len(), stat.nlink()), wanted, "size and links");
            let mut bytes = vec![0; content_is.len()];
            file.read_exact_at(&mut bytes, 0)?;
            same(&bytes, content_is);
        }
        Ok(())
    }
}

fn libc_append() -> i32 {
    rustix::fs::OFlags::APPEND.bits() as i32
}

fn part(content: &[u8], at: Range) -> &[u8] {
    let end = content.len().min((at.start + at.length) as usize);
    content.get(at.start as usize..end).unwrap_or_default()
}

#[track_caller]
fn same(found: &[u8], wanted: &[u8]) {
    assert_eq!(found.len(), wanted.len(), "another length");
    if found == wanted {
        return;
    }
    if let Some(first) = found.iter().zip(wanted).position(|(found, wanted)| found != wanted) {
        let count = found.iter().zip(wanted).filter(|(found, wanted)| found != wanted).count();
        panic!(
            "{count} of {} bytes differ, the first at {first}: {} and not {}",
            found.len(),
            found[first],
            wanted[first]
        );
    }
}

/// A shared mapping of a whole file.
struct Map {
    address: NonNull<c_void>,
    length: usize,
}

impl Map {
    fn new(file: &File, length: usize) -> std::io::Result<Self> {
        let (both, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses an address where nothing else is.
        let address = unsafe { mmap(std::ptr::null_mut(), length, both, shared, file, 0) }?;
        Ok(Self { address: NonNull::new(address).unwrap(), length })
    }

    fn at(&self, at: Range) -> *mut u8 {
        assert!(at.start + at.length <= self.length as u64);
        self.address.as_ptr().cast::<u8>().wrapping_add(at.start as usize)
    }

    fn write(&self, at: Range, bytes: &[u8]) {
        assert_eq!(bytes.len() as u64, at.length);
        // SAFETY: `at` has checked that this is inside of the mapping, which is as long as the file; only
        // this thread uses the file and the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(at), bytes.len()) }
    }

    fn read(&self, at: Range) -> Vec<u8> {
        let mut bytes = vec![0; at.length as usize];
        // SAFETY: as for `write`.
        unsafe { std::ptr::copy_nonoverlapping(self.at(at), bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }

    fn sync(&self) -> std::io::Result<()> {
        // SAFETY: it is a mapping, and writing it back changes nothing in memory.
        Ok(unsafe { msync(self.address.as_ptr(), self.length, MsyncFlags::SYNC) }?)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        let unmapped = unsafe { munmap(self.address.as_ptr(), self.length) };
        unmapped.unwrap();
    }
}

/// How often everything that is open is read again.
const CHECK_EVERY: usize = 100;

/// Does so many operations in a new directory.
pub(crate) fn run(seed: u64, count: usize, dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    let (mut model, mut random) = (Model::default(), Random(seed | 1 << 32));
    let mut real = Real { dir, handles: Vec::new() };
    for step in 0..count {
        let Some(op) = model.choose(&mut random) else { continue };
        let _context = Context { seed, step, op: &op };
        real.apply(&op, &model).unwrap_or_else(|error| panic!("{error}"));
        model.apply(&op);
        if step % CHECK_EVERY == 0 {
            real.check(&model).unwrap();
        }
    }
    real.check(&model).unwrap();
}

/// Says where a run was when it panicked.
struct Context<'a> {
    seed: u64,
    step: usize,
    op: &'a Op,
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}, step {}: {:?}", self.seed, self.step, self.op);
        }
    }
}

/// Compares a directory with what so many operations leave in it.
pub(crate) fn compare(seed: u64, count: usize, dir: &Path) {
    let (mut model, mut random) = (Model::default(), Random(seed | 1 << 32));
    for _ in 0..count {
        if let Some(op) = model.choose(&mut random) {
            model.apply(&op);
        }
    }
    let mut found: Vec<String> = dir
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let wanted: Vec<String> = model.names.keys().map(|name| format!("file-{name}")).collect();
    assert_eq!(found, wanted);
    assert!(!wanted.is_empty(), "there is nothing to compare");
    for (name, content) in &model.names {
        same(&std::fs::read(dir.join(format!("file-{name}"))).unwrap(), &model.contents[*content]);
    }
}
