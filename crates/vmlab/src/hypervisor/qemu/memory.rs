//! Files that are a guest's RAM.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vmlab_devices::sparse;

use super::command::MemoryUse;
use crate::config::VmConfig;
use crate::hypervisor::snapshot::empty_memory;
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
                let files = (0..nodes).map(|_| empty_memory(size)).collect::<io::Result<_>>()?;
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
                    let to = empty_memory(from.metadata()?.len())?;
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
        sparse::copy(&self.from, &self.to)
    }
}
