//! Files that are a guest's RAM.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek, sendfile};
use rustix::io::Errno;

use super::command::MemoryUse;
use crate::config::VmConfig;
use crate::hypervisor::{Memory, Origin};

/// The files that are a VM's RAM, one a node, and what has to be copied into them before it runs.
pub(super) struct Ram {
    pub(super) files: Vec<Arc<File>>,
    pub(super) usage: MemoryUse,
    pub(super) copies: Vec<Copy>,
}

/// A template and the file that is to have its content.
pub(super) struct Copy {
    from: Arc<File>,
    to: Arc<File>,
}

impl Ram {
    /// What a VM of that origin needs; `None` where QEMU's own memory will do.
    pub(super) fn of(config: &VmConfig, origin: &Origin) -> io::Result<Option<Self>> {
        let snapshot = match origin {
            Origin::Boot if !config.pluggable => return Ok(None),
            Origin::Boot | Origin::BootForSnapshot => {
                let nodes = config.topology.nodes.max(1);
                let size = config.memory.0 / u64::from(nodes);
                let files = (0..nodes).map(|_| empty(size)).collect::<io::Result<_>>()?;
                return Ok(Some(Self { files, usage: MemoryUse::Shared, copies: Vec::new() }));
            }
            Origin::Snapshot(snapshot) => snapshot,
        };
        let template = snapshot.memory.iter().any(|memory| matches!(memory, Memory::Template(_)));
        let mut ram = Self { files: Vec::new(), usage: MemoryUse::Shared, copies: Vec::new() };
        if template && config.servers() == 0 && !config.pluggable {
            // Nobody else looks at this VM's memory, so that the template can be mapped as it is.
            ram.usage = MemoryUse::Private;
        }
        for memory in &snapshot.memory {
            ram.files.push(match memory {
                Memory::Own(file) => Arc::clone(file),
                Memory::Template(file) if ram.usage == MemoryUse::Private => Arc::clone(file),
                Memory::Template(from) => {
                    let to = empty(from.metadata()?.len())?;
                    ram.copies.push(Copy { from: Arc::clone(from), to: Arc::clone(&to) });
                    to
                }
            });
        }
        Ok(Some(ram))
    }
}

impl Copy {
    /// Copies all but the holes.
    pub(super) fn run(&self) -> io::Result<()> {
        let mut at = 0;
        loop {
            at = match seek(&self.from, SeekFrom::Data(at)) {
                Ok(at) => at,
                Err(Errno::NXIO) => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            let end = seek(&self.from, SeekFrom::Hole(at))?;
            seek(&self.to, SeekFrom::Start(at))?;
            while at < end {
                let rest = usize::try_from(end - at).unwrap_or(usize::MAX);
                if sendfile(&self.to, &self.from, Some(&mut at), rest)? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
    }
}

/// Memory that reads as zeros.
fn empty(size: u64) -> io::Result<Arc<File>> {
    let file = File::from(memfd_create("vmlab-ram", MemfdFlags::CLOEXEC)?);
    file.set_len(size)?;
    Ok(Arc::new(file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_copy_has_the_content_and_the_holes() {
        let from = Arc::new(tempfile::tempfile().unwrap());
        from.set_len(64 << 20).unwrap();
        from.write_all_at(b"begin", 4096).unwrap();
        from.write_all_at(b"end", (64 << 20) - 3).unwrap();
        let to = empty(64 << 20).unwrap();
        Copy { from, to: Arc::clone(&to) }.run().unwrap();
        let at = |offset| {
            let mut bytes = [0; 3];
            to.read_exact_at(&mut bytes, offset).unwrap();
            bytes
        };
        assert_eq!(&at(4096), b"beg");
        assert_eq!(at(1 << 20), [0; 3]);
        assert_eq!(&at((64 << 20) - 3), b"end");
        let blocks = std::os::unix::fs::MetadataExt::blocks(&to.metadata().unwrap());
        assert!(blocks * 512 < 1 << 20, "{blocks} blocks");
    }
}
