//! A guest's memory.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion,
};
use vmlab_devices::sparse;

/// Bytes of a page, of guests and of hosts.
pub(crate) const PAGE: u64 = 4096;

/// What is behind a guest's memory. Files have its first byte at their beginning, and no hole where the devices
/// are.
#[derive(Debug, Clone)]
pub enum Backing {
    /// Nothing: it is zero, and gone with the VM.
    Anonymous,
    /// A file that what the guest writes goes to.
    Shared(Arc<File>),
    /// A file that it begins as, and that stays as it is.
    Private(Arc<File>),
}

/// Maps memory to these ranges of guest-physical addresses.
///
/// # Errors
/// The host has too little of it, or a file is too short.
pub fn map(ranges: &[Range<u64>], backing: &Backing) -> io::Result<GuestMemoryMmap> {
    let mut offset = 0;
    let mut regions = Vec::new();
    for range in ranges {
        let size = range.end - range.start;
        let length = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let (file, flags) = match backing {
            Backing::Anonymous => (None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
            Backing::Shared(file) => (Some(file), libc::MAP_SHARED),
            Backing::Private(file) => (Some(file), libc::MAP_PRIVATE),
        };
        if let Some(file) = file
            && file.metadata()?.len() < offset + size
        {
            // What is behind its end would be a fault when it is used.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let file = file.map(|file| FileOffset::from_arc(Arc::clone(file), offset));
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // As much as is used is taken, whatever the host says of all that could be.
        let flags = flags | libc::MAP_NORESERVE;
        let region = MmapRegion::build(file, length, protection, flags).map_err(failed)?;
        let region = GuestRegionMmap::new(region, GuestAddress(range.start));
        regions.push(region.ok_or(io::ErrorKind::InvalidInput)?);
        offset += size;
    }
    let memory = GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?;
    if let Backing::Private(file) = backing {
        fill_holes(&memory, file)?;
    }
    Ok(memory)
}

/// Pages of the least hole that is filled, and how many are at most: each takes two mappings, of which a process has
/// 65,530.
const HOLE: u64 = 256;
const HOLES: usize = 4096;

/// Puts memory of its own in the place of the holes of the file that a memory is mapped from privately. A page in a hole
/// would be taken twice when it is used: of the file, to be read from there, and as the copy that is written to. Where
/// the file is in memory, that would stay, up to the size of the memory.
fn fill_holes(memory: &GuestMemoryMmap, file: &File) -> io::Result<()> {
    let end = file.metadata()?.len() / PAGE;
    let mut page = 0;
    let mut holes = Vec::new();
    for piece in sparse::pieces(file).chain(std::iter::once(Ok(end * PAGE..end * PAGE))) {
        let piece = piece?;
        let until = piece.start / PAGE;
        if until.saturating_sub(page) >= HOLE && holes.len() < HOLES {
            holes.push(page..until);
        }
        page = piece.end.div_ceil(PAGE);
    }
    for part in parts(memory, &holes) {
        let address = part.region.get_host_address(MemoryRegionAddress(part.offset));
        let address = address.map_err(io::Error::other)?.cast();
        let length = part.length as usize;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        let flags = flags | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: the range is in the region's mapping, which nobody uses yet, and has the same content: zeroes.
        unsafe { mmap_anonymous(address, length, protection, flags) }?;
        // As the rest: which pages are used can be told, and one costs no more than itself.
        // SAFETY: the same range; nothing of its content changes.
        let _ = unsafe { madvise(address, length, Advice::LinuxNoHugepage) };
    }
    Ok(())
}

/// Writes what a guest has changed in memory that is mapped [privately](Backing::Private) to another file with what
/// the first one has. The guest must not run.
///
/// # Errors
/// The file cannot be written, or the kernel does not tell what has changed.
pub fn write_changes(memory: &GuestMemoryMmap, to: &File) -> io::Result<()> {
    let mut changed = Vec::new();
    present(memory, |page, which| {
        if which == Present::Own {
            add(&mut changed, page);
        }
    })?;
    let mut to = to.try_clone()?;
    for part in parts(memory, &changed) {
        to.seek(SeekFrom::Start(part.at))?;
        let length = usize::try_from(part.length).map_err(|_| io::ErrorKind::OutOfMemory)?;
        memory.write_all_volatile_to(part.address(), &mut to, length).map_err(io::Error::other)?;
    }
    Ok(())
}

/// A page of a memory that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Present {
    /// It is the file's.
    OfFile,
    /// The memory has it for itself: it was written to, or there is no file.
    Own,
}

/// Goes through the pages of a memory that are there, in order. They count from the beginning of the file behind it.
pub(crate) fn present(
    memory: &GuestMemoryMmap,
    mut each: impl FnMut(u64, Present),
) -> io::Result<()> {
    /// Bits of an entry: `Documentation/admin-guide/mm/pagemap.rst`.
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_FILE: u64 = 1 << 61;
    const ENTRY: u64 = size_of::<u64>() as u64;
    let page_map = File::open("/proc/self/pagemap")?;
    let mut entries = vec![0; 64 * 1024];
    let mut page = 0;
    for region in memory.iter() {
        let (mut entry, end) = (host_address(region)? as u64 / PAGE, page + region.len() / PAGE);
        while page < end {
            let part = (end - page).min(entries.len() as u64 / ENTRY);
            let entries = &mut entries[..(part * ENTRY) as usize];
            page_map.read_exact_at(entries, entry * ENTRY)?;
            entry += part;
            for bits in entries.chunks_exact(ENTRY as usize) {
                let bits = bits.try_into().map_or(0, u64::from_ne_bytes);
                if bits & (PRESENT | SWAPPED) != 0 {
                    each(page, if bits & OF_FILE == 0 { Present::Own } else { Present::OfFile });
                }
                page += 1;
            }
        }
    }
    Ok(())
}

/// Adds a page behind those that are there.
pub(crate) fn add(ranges: &mut Vec<Range<u64>>, page: u64) {
    match ranges.last_mut() {
        Some(last) if last.end == page => last.end += 1,
        _ => ranges.push(page..page + 1),
    }
}

/// Bytes of a memory that are in one of its regions.
pub(crate) struct Part<'a> {
    pub(crate) region: &'a GuestRegionMmap,
    /// Where they are in it.
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// Where they are in the file behind the memory.
    pub(crate) at: u64,
}

impl Part<'_> {
    /// Where the guest has them.
    pub(crate) fn address(&self) -> GuestAddress {
        self.region.start_addr().unchecked_add(self.offset)
    }
}

/// The parts that ranges of pages have in the regions of a memory. What is not in it is left out.
pub(crate) fn parts<'a>(
    memory: &'a GuestMemoryMmap,
    ranges: &'a [Range<u64>],
) -> impl Iterator<Item = Part<'a>> {
    let mut end = 0;
    memory.iter().flat_map(move |region| {
        let first = end;
        end += region.len() / PAGE;
        ranges.iter().filter_map(move |range| {
            let pages = range.start.max(first)..range.end.min(end);
            (!pages.is_empty()).then(|| Part {
                region,
                offset: (pages.start - first) * PAGE,
                length: (pages.end - pages.start) * PAGE,
                at: pages.start * PAGE,
            })
        })
    })
}

/// Where a region is in this process's memory.
pub(crate) fn host_address(region: &GuestRegionMmap) -> io::Result<*mut u8> {
    region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)
}

fn failed(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_file_has_the_ranges_one_after_the_other() {
        let mut file = tempfile();
        file.set_len(3 * PAGE).unwrap();
        file.seek(io::SeekFrom::Start(PAGE)).unwrap();
        file.write_all(b"second range").unwrap();
        let ranges = [0..PAGE, 16 * PAGE..18 * PAGE];
        let file = Arc::new(file);
        let read = |memory: &GuestMemoryMmap| {
            let mut bytes = [0; 12];
            memory.read_slice(&mut bytes, GuestAddress(16 * PAGE)).unwrap();
            bytes
        };
        let private = map(&ranges, &Backing::Private(Arc::clone(&file))).unwrap();
        assert_eq!(&read(&private), b"second range");
        private.write_slice(b"other", GuestAddress(16 * PAGE)).unwrap();
        let shared = map(&ranges, &Backing::Shared(Arc::clone(&file))).unwrap();
        assert_eq!(&read(&shared), b"second range", "a private mapping has changed the file");
        shared.write_slice(b"SECOND", GuestAddress(16 * PAGE)).unwrap();
        let mut content = Vec::new();
        (&*file).rewind().unwrap();
        (&*file).read_to_end(&mut content).unwrap();
        assert_eq!(&content[PAGE as usize..][..12], b"SECOND range");
        assert!(shared.read_obj::<u8>(GuestAddress(PAGE)).is_err(), "there is memory in the hole");
    }

    #[test]
    fn changes_alone_are_written_wherever_they_are() {
        let template = Arc::new(tempfile());
        template.set_len(6 * PAGE).unwrap();
        template.write_all_at(b"of the template", 3 * PAGE).unwrap();
        let ranges = [0..2 * PAGE, 16 * PAGE..20 * PAGE];
        let memory = map(&ranges, &Backing::Private(Arc::clone(&template))).unwrap();
        // Pages that are read only are the template's still.
        let mut read = [0; 15];
        memory.read_slice(&mut read, GuestAddress(17 * PAGE)).unwrap();
        assert_eq!(&read, b"of the template");
        memory.write_slice(b"low", GuestAddress(PAGE)).unwrap();
        memory.write_slice(b"high", GuestAddress(20 * PAGE - 4)).unwrap();
        let to = tempfile();
        to.set_len(6 * PAGE).unwrap();
        to.write_all_at(b"stays", 3 * PAGE).unwrap();
        write_changes(&memory, &to).unwrap();
        let mut content = vec![0; 6 * PAGE as usize];
        to.read_exact_at(&mut content, 0).unwrap();
        let mut expected = vec![0; 6 * PAGE as usize];
        expected[PAGE as usize..][..3].copy_from_slice(b"low");
        expected[3 * PAGE as usize..][..5].copy_from_slice(b"stays");
        expected[6 * PAGE as usize - 4..].copy_from_slice(b"high");
        assert!(content == expected);
    }

    #[test]
    fn memory_in_the_holes_of_a_file_takes_nothing_of_it() {
        const MIB: u64 = 1 << 20;
        let file = tempfile();
        file.set_len(8 * MIB).unwrap();
        // In the midst of each region.
        for place in [3 * MIB + 5, 6 * MIB + 5] {
            file.write_all_at(b"data", place).unwrap();
        }
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        let before = blocks();
        let ranges = [0..5 * MIB, 16 * MIB..19 * MIB];
        let file = Arc::new(file.try_clone().unwrap());
        let memory = map(&ranges, &Backing::Private(file)).unwrap();
        let mut content = Vec::new();
        for address in ranges.into_iter().flat_map(|range| range.step_by(PAGE as usize)) {
            let mut page = vec![0; PAGE as usize];
            memory.read_slice(&mut page, GuestAddress(address)).unwrap();
            content.extend(page);
            memory.write_slice(b"mine", GuestAddress(address + 100)).unwrap();
        }
        let mut wanted = vec![0; 8 << 20];
        wanted[(3 << 20) + 5..][..4].copy_from_slice(b"data");
        wanted[(6 << 20) + 5..][..4].copy_from_slice(b"data");
        assert!(content == wanted);
        // What is around the data, in holes that are not worth a mapping.
        assert!(blocks() <= before + 2 * HOLE * PAGE / 512, "{before}, then {}", blocks());
        let mut all = 0;
        present(&memory, |_, which| all += u64::from(which == Present::Own)).unwrap();
        assert_eq!(all, 8 * MIB / PAGE);
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let file = tempfile();
        file.set_len(PAGE).unwrap();
        map(&[0..2 * PAGE], &Backing::Shared(Arc::new(file))).unwrap_err();
    }

    pub(crate) fn tempfile() -> File {
        rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
    }
}
