//! A guest's memory.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion,
};

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
    GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)
}

/// Writes what a guest has changed in memory that is mapped [privately](Backing::Private) to another file with what
/// the first one has. The guest must not run.
///
/// # Errors
/// The file cannot be written, or the kernel does not tell what has changed.
pub fn write_changes(memory: &GuestMemoryMmap, to: &File) -> io::Result<()> {
    let page_map = page_map()?;
    let mut to = to.try_clone()?;
    let mut offset = 0;
    for region in memory.iter() {
        let (first, count) = (host_address(region)? as u64 / PAGE, region.len() / PAGE);
        let mut changed: Vec<Range<u64>> = Vec::new();
        present(&page_map, first, count, |page, which| {
            if which == Present::Own {
                add(&mut changed, page);
            }
        })?;
        for pages in changed {
            to.seek(SeekFrom::Start(offset + pages.start * PAGE))?;
            let length = (pages.end - pages.start) * PAGE;
            let length = usize::try_from(length).map_err(|_| io::ErrorKind::OutOfMemory)?;
            let from = region.start_addr().unchecked_add(pages.start * PAGE);
            memory.write_all_volatile_to(from, &mut to, length).map_err(io::Error::other)?;
        }
        offset += region.len();
    }
    Ok(())
}

/// A page of a mapping that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Present {
    /// It is the file's.
    OfFile,
    /// The mapping has it for itself: it was written to, or there is no file.
    Own,
}

/// Goes through the pages of a mapping that are there, in order; pages count from its beginning. It begins at the page
/// `first` of this process's memory and has `count`.
pub(crate) fn present(
    page_map: &File,
    first: u64,
    count: u64,
    mut each: impl FnMut(u64, Present),
) -> io::Result<()> {
    /// Bits of an entry: `Documentation/admin-guide/mm/pagemap.rst`.
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_FILE: u64 = 1 << 61;
    const ENTRY: u64 = size_of::<u64>() as u64;
    let mut entries = vec![0; 64 * 1024];
    let mut page = 0;
    while page < count {
        let part = (count - page).min(entries.len() as u64 / ENTRY);
        let entries = &mut entries[..(part * ENTRY) as usize];
        page_map.read_exact_at(entries, (first + page) * ENTRY)?;
        for entry in entries.chunks_exact(ENTRY as usize) {
            let entry = entry.try_into().map_or(0, u64::from_ne_bytes);
            if entry & (PRESENT | SWAPPED) != 0 {
                each(page, if entry & OF_FILE == 0 { Present::Own } else { Present::OfFile });
            }
            page += 1;
        }
    }
    Ok(())
}

/// This process's map of pages, for [`present`].
pub(crate) fn page_map() -> io::Result<File> {
    File::open("/proc/self/pagemap")
}

/// Where a region is in this process's memory.
pub(crate) fn host_address(region: &GuestRegionMmap) -> io::Result<*mut u8> {
    region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)
}

/// Adds a page behind those that are there.
pub(crate) fn add(ranges: &mut Vec<Range<u64>>, page: u64) {
    match ranges.last_mut() {
        Some(last) if last.end == page => last.end += 1,
        _ => ranges.push(page..page + 1),
    }
}

fn failed(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
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
    fn a_file_that_is_too_short_is_refused() {
        let file = tempfile();
        file.set_len(PAGE).unwrap();
        map(&[0..2 * PAGE], &Backing::Shared(Arc::new(file))).unwrap_err();
    }

    fn tempfile() -> File {
        rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
    }
}
