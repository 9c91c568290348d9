//! Replies to READDIR and READDIRPLUS.

use zerocopy::IntoBytes;

use crate::abi;
use crate::filesystem::Entry;

/// Records are aligned to this.
const ALIGN: usize = 8;

/// Directory entries on their way to the guest.
#[derive(Debug)]
pub struct DirSink {
    bytes: Vec<u8>,
    size: usize,
    plus: bool,
}

impl DirSink {
    /// Room for `size` bytes of entries; of READDIRPLUS if `plus`.
    pub fn new(size: usize, plus: bool) -> Self {
        Self { bytes: Vec::with_capacity(size.min(64 * 1024)), size, plus }
    }

    /// Whether each entry goes with what it leads to.
    pub fn plus(&self) -> bool {
        self.plus
    }

    /// Whether there is room for an entry with a name of this length in bytes. To be asked before a
    /// node gets a reference for it.
    pub fn has_room(&self, name: usize) -> bool {
        self.bytes.len() + self.record(name) <= self.size
    }

    fn record(&self, name: usize) -> usize {
        let head = if self.plus { size_of::<abi::EntryOut>() } else { 0 };
        head + (size_of::<abi::Dirent>() + name).next_multiple_of(ALIGN)
    }

    /// Adds an entry: its inode number, the offset to go on from after it, its type (`DT_…`) and name.
    /// For READDIRPLUS, what it leads to; without that, the kernel looks it up when it needs it. It takes
    /// no reference for `.` and `..`, so they lead nowhere here.
    ///
    /// Returns whether there was room for it.
    pub fn add(
        &mut self,
        ino: u64,
        next: u64,
        kind: u8,
        name: &[u8],
        entry: Option<&Entry>,
    ) -> bool {
        if !self.has_room(name.len()) {
            return false;
        }
        let end = self.bytes.len() + self.record(name.len());
        if self.plus {
            let dots = matches!(name, b"." | b"..");
            debug_assert!(!dots || entry.is_none(), "the kernel does not forget `.` and `..`");
            let out = entry.filter(|_| !dots).map(entry_out).unwrap_or_default();
            self.bytes.extend_from_slice(out.as_bytes());
        }
        let namelen = name.len() as u32;
        let dirent = abi::Dirent { ino, off: next, namelen, type_: kind.into() };
        self.bytes.extend_from_slice(dirent.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(end, 0);
        true
    }

    /// The entries as the kernel reads them.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// An entry as the kernel reads it.
pub(crate) fn entry_out(entry: &Entry) -> abi::EntryOut {
    let Entry { node, valid, attributes } = entry;
    abi::EntryOut {
        nodeid: node.map_or(0, |node| node.0),
        // Node ids are not used twice in a session.
        generation: 0,
        entry_valid: valid.as_secs(),
        entry_valid_nsec: valid.subsec_nanos(),
        attr_valid: attributes.valid.as_secs(),
        attr_valid_nsec: attributes.valid.subsec_nanos(),
        attr: attributes.attr,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use zerocopy::FromBytes;

    use super::*;
    use crate::filesystem::Attributes;
    use crate::types::NodeId;

    #[test]
    fn entries_are_aligned_and_fit() {
        // 24 bytes and the name, to a multiple of 8.
        let mut sink = DirSink::new(72, false);
        assert!(sink.add(7, 1, 8, b"a", None));
        assert!(sink.has_room(16) && !sink.has_room(17));
        assert!(!sink.add(8, 2, 4, &[b'x'; 17], None));
        assert!(sink.add(8, 2, 4, &[b'x'; 16], None));
        let bytes = sink.bytes();
        assert_eq!(bytes.len(), 72);
        let (first, _) = abi::Dirent::read_from_prefix(bytes).unwrap();
        assert_eq!((first.ino, first.off, first.namelen, first.type_), (7, 1, 1, 8));
        assert_eq!(&bytes[24..32], b"a\0\0\0\0\0\0\0");
        let (second, rest) = abi::Dirent::read_from_prefix(&bytes[32..]).unwrap();
        assert_eq!((second.ino, second.off, second.namelen), (8, 2, 16));
        assert_eq!(rest, [b'x'; 16]);
    }

    #[test]
    fn plus_entries_lead_somewhere() {
        let mut sink = DirSink::new(1000, true);
        let attr = abi::Attr { ino: 9, ..Default::default() };
        let attributes = Attributes { attr, valid: Duration::from_millis(1500) };
        let entry = Entry { node: Some(NodeId(3)), valid: Duration::from_secs(2), attributes };
        assert!(sink.add(9, 1, 8, b"name", Some(&entry)) && sink.add(10, 2, 4, b"..", None));
        let bytes = sink.bytes();
        assert_eq!(bytes.len(), 2 * (128 + 32));
        let (out, _) = abi::EntryOut::read_from_prefix(bytes).unwrap();
        assert_eq!((out.nodeid, out.entry_valid, out.attr_valid), (3, 2, 1));
        assert_eq!((out.attr_valid_nsec, out.attr.ino), (500_000_000, 9));
        let (none, _) = abi::EntryOut::read_from_prefix(&bytes[160..]).unwrap();
        assert_eq!(none.nodeid, 0);
    }
}
