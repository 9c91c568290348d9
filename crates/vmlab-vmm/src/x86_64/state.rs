//! What a VM is saved as: all but its memory.

use kvm_bindings::{kvm_clock_data, kvm_cpuid_entry2, kvm_irqchip};
use serde::{Deserialize, Serialize};
use vmlab_devices::transport::mmio::MmioState;

use super::cpu::CpuState;
use super::serial::LineState;
use crate::error::Error;
use crate::topology::Topology;

/// What a state begins with.
const MAGIC: [u8; 8] = *b"vmlab-vm";

/// The version of all that follows. It rises with every change to what is in it.
const VERSION: u32 = 1;

/// The longest state that is believed: some kB a processor and device.
const MAX: usize = 64 << 20;

/// A VM.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// What has to be the same where it goes on.
    pub(super) shape: Shape,
    pub(super) cpus: Vec<CpuState>,
    pub(super) interrupts: Vec<kvm_irqchip>,
    pub(super) clock: kvm_clock_data,
    pub(super) lines: Vec<LineState>,
    pub(super) slots: Vec<Option<MmioState>>,
}

/// What a VM is made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Shape {
    /// In bytes.
    pub(super) memory: u64,
    /// Nodes, last-level caches, cores, threads.
    pub(super) topology: [u32; 4],
    pub(super) slots: usize,
    pub(super) lines: usize,
    /// That of the first processor.
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
}

impl Shape {
    pub(super) fn topology(topology: Topology) -> [u32; 4] {
        [topology.nodes, topology.llcs, topology.cores, topology.threads]
    }

    /// Says what is different in another one.
    pub(super) fn difference(&self, other: &Self) -> Option<&'static str> {
        let different = [
            (self.memory != other.memory, "its memory has another size"),
            (self.topology != other.topology, "its processors are grouped in another way"),
            (self.slots != other.slots, "it has another number of slots"),
            (self.lines != other.lines, "it has another number of serial lines"),
            (self.cpuid != other.cpuid, "its processors have other features"),
        ];
        different.into_iter().find_map(|(different, what)| different.then_some(what))
    }
}

impl State {
    /// As bytes.
    pub(super) fn encode(&self) -> Result<Vec<u8>, Error> {
        let head = [&MAGIC[..], &VERSION.to_le_bytes()].concat();
        let encoded = postcard::to_extend(self, head);
        encoded.map_err(|error| Error::State(error.to_string()))
    }

    /// From bytes.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let wrong = |what: &str| Error::State(what.to_owned());
        if bytes.len() > MAX {
            return Err(wrong("it is too long"));
        }
        let rest = bytes.strip_prefix(&MAGIC).ok_or_else(|| wrong("it is something else"))?;
        let (version, rest) = rest.split_first_chunk().ok_or_else(|| wrong("it is cut off"))?;
        match u32::from_le_bytes(*version) {
            VERSION => {}
            other => return Err(Error::State(format!("it has version {other}, not {VERSION}"))),
        }
        match postcard::take_from_bytes(rest) {
            Ok((state, [])) => Ok(state),
            Ok(_) => Err(wrong("there is more behind its end")),
            Err(error) => Err(Error::State(error.to_string())),
        }
    }
}
