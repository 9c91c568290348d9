//! The pages that a VM uses when it goes on from a saved state, so that the next one has them before it needs them.
//!
//! A guest that goes on touches some thousand pages at once, mostly the same each time. One by one, each costs an exit to
//! the host's kernel, which finds the page, copies it if it is written, and maps it. The way is that of REAP (Ustiugov et
//! al., "Benchmarking, Analysis, and Optimization of Serverless Function Snapshots", ASPLOS 2021).

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::VcpuFd;
use rustix::ioctl::{self, Opcode, Updater, opcode};
use rustix::mm::{Advice, madvise};
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use crate::format::Format;
use crate::memory::{self, Present};

/// `KVM_PRE_FAULT_MEMORY` of linux/kvm.h.
const KVM_PRE_FAULT_MEMORY: Opcode = opcode::read_write::<kvm_pre_fault_memory>(KVMIO as u8, 0xd5);

/// Some kB are usual.
const FORMAT: Format = Format { magic: *b"vmlab-ws", version: 1, max: 4 << 20 };

/// Pages, as ranges of numbers of pages in ascending order. They count from the beginning of the file behind the memory
/// ([`Backing`](memory::Backing)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// Those that were read at most.
    read: Vec<Range<u64>>,
    written: Vec<Range<u64>>,
}

impl WorkingSet {
    /// The pages of this memory that are there; `None` where they are more than `most`. Those read include some around
    /// them, which the host's kernel maps along with them.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn of(memory: &GuestMemoryMmap, most: u64) -> io::Result<Option<Self>> {
        let (mut set, mut found) = (Self::default(), 0);
        memory::present(memory, |page, which| {
            let ranges = match which {
                Present::OfFile => &mut set.read,
                Present::Own => &mut set.written,
            };
            found += 1;
            if found <= most {
                memory::add(ranges, page);
            }
        })?;
        Ok((found <= most).then_some(set))
    }

    /// As bytes; `None` where they are too many to be read back.
    pub fn encode(&self) -> Option<Vec<u8>> {
        FORMAT.encode(self).ok().filter(|bytes| bytes.len() <= FORMAT.max)
    }

    /// From bytes; `None` where they are none of a set, or one of another version.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        FORMAT.decode(bytes).ok()
    }

    /// Gives this process the pages that were written, as copies. What is not in the memory is left out.
    pub(crate) fn populate(&self, memory: &GuestMemoryMmap) {
        for part in memory::parts(memory, &self.written) {
            let address = MemoryRegionAddress(part.offset);
            let Ok(address) = part.region.get_host_address(address) else { continue };
            let length = part.length as usize;
            // SAFETY: the range is in the region's mapping, which the borrow keeps; it gets pages that have the same
            // content. Where there is no memory for them, nothing has changed.
            let _ = unsafe { madvise(address.cast(), length, Advice::LinuxPopulateWrite) };
        }
    }

    /// Has KVM map the pages for the guest of this processor, which does not run.
    pub(crate) fn map_for_guest(&self, memory: &GuestMemoryMmap, vcpu: &VcpuFd) {
        // SAFETY: the descriptor belongs to the processor, which is open during the borrow.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let parts = [&self.written, &self.read].into_iter();
        for part in parts.flat_map(|ranges| memory::parts(memory, ranges)) {
            let (gpa, size) = (part.address().0, part.length);
            let mut wanted = kvm_pre_fault_memory { gpa, size, ..Default::default() };
            // SAFETY: the opcode takes this structure, and writes to it how much is left.
            let request = unsafe { Updater::<'_, KVM_PRE_FAULT_MEMORY, _>::new(&mut wanted) };
            // SAFETY: it is a processor of KVM's. Its guest finds the same content with and without.
            let _ = unsafe { ioctl::ioctl(vcpu, request) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::tests::tempfile;
    use crate::memory::{Backing, PAGE, map};

    /// Where the second of two regions is.
    const HIGH: u64 = 1 << 20;

    /// Enough that the pages around one that is read are no others of these tests.
    const LOW_PAGES: u64 = 64;

    fn template() -> (Arc<File>, [Range<u64>; 2]) {
        let file = tempfile();
        let pages = 2 * LOW_PAGES;
        file.set_len(pages * PAGE).unwrap();
        for page in 0..pages {
            file.write_all_at(&[page as u8], page * PAGE).unwrap();
        }
        (Arc::new(file), [0..LOW_PAGES * PAGE, HIGH..HIGH + LOW_PAGES * PAGE])
    }

    fn pages(ranges: &[Range<u64>]) -> Vec<u64> {
        ranges.iter().cloned().flatten().collect()
    }

    fn used(memory: &GuestMemoryMmap) -> WorkingSet {
        WorkingSet::of(memory, 2 * LOW_PAGES).unwrap().unwrap()
    }

    #[test]
    fn what_was_used_is_there_before_it_is_used_again() {
        let (file, ranges) = template();
        let memory = map(&ranges, &Backing::Private(Arc::clone(&file))).unwrap();
        assert_eq!(used(&memory), WorkingSet::default());
        let byte: u8 = memory.read_obj(GuestAddress(3 * PAGE)).unwrap();
        assert_eq!(byte, 3);
        for page in [5, 6] {
            memory.write_obj(0xff_u8, GuestAddress(page * PAGE + 1)).unwrap();
        }
        memory.write_obj(0xff_u8, GuestAddress(HIGH + PAGE)).unwrap();
        let set = used(&memory);
        assert!(pages(&set.read).contains(&3), "{set:?}");
        assert_eq!(set.written, [5..7, LOW_PAGES + 1..LOW_PAGES + 2]);
        let most = (pages(&set.read).len() + 3) as u64;
        assert_eq!(WorkingSet::of(&memory, most).unwrap(), Some(set.clone()));
        assert_eq!(WorkingSet::of(&memory, most - 1).unwrap(), None);

        let again = WorkingSet::decode(&set.encode().unwrap()).unwrap();
        assert_eq!(again, set);
        let other = map(&ranges, &Backing::Private(file)).unwrap();
        again.populate(&other);
        assert_eq!(used(&other).written, set.written);
        // It has what the file has.
        let at = |address| other.read_obj::<u16>(GuestAddress(address)).unwrap();
        assert_eq!([at(5 * PAGE), at(6 * PAGE), at(HIGH + PAGE)], [5, 6, 65]);
    }

    #[test]
    fn a_set_of_another_memory_does_no_harm() {
        let (file, ranges) = template();
        let memory = map(&ranges, &Backing::Private(file)).unwrap();
        let all = 2 * LOW_PAGES;
        #[allow(clippy::reversed_empty_ranges, reason = "a damaged one has such")]
        let written = vec![1..2, 9..3, all - 1..all + 5, all..u64::MAX, u64::MAX - 1..u64::MAX];
        WorkingSet { read: Vec::new(), written }.populate(&memory);
        assert_eq!(used(&memory).written, [1..2, all - 1..all]);
    }

    #[test]
    fn what_is_no_set_is_none() {
        let set = WorkingSet { read: vec![1..2], written: vec![5..300] };
        let bytes = set.encode().unwrap();
        assert_eq!(WorkingSet::decode(&bytes), Some(set));
        for length in 0..bytes.len() {
            assert_eq!(WorkingSet::decode(&bytes[..length]), None);
        }
        let many = (0..FORMAT.max as u64).map(|page| 2 * page..2 * page + 1).collect();
        assert_eq!(WorkingSet { read: many, written: Vec::new() }.encode(), None);
    }
}
