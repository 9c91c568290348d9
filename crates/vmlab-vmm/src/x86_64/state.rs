//! What a VM is saved as: all but its memory.

use kvm_bindings::{kvm_clock_data, kvm_cpuid_entry2, kvm_irqchip};
use serde::{Deserialize, Serialize};
use vmlab_devices::transport::mmio::MmioState;

use super::cpu::CpuState;
use super::serial::LineState;
use crate::error::Error;
use crate::format::Format;
use crate::topology::Topology;

/// It has some kB a processor and device.
const FORMAT: Format = Format { magic: *b"vmlab-vm", version: 3, max: 64 << 20 };

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

    /// What the guest depends on of its CPUID. Sizes of caches are those of the host's processor that was asked,
    /// which has several kinds of them on some hosts.
    fn features(&self) -> impl Iterator<Item = &kvm_cpuid_entry2> {
        const CACHES: [u32; 5] = [2, 4, 0x8000_0005, 0x8000_0006, 0x8000_001d];
        self.cpuid.iter().filter(|entry| !CACHES.contains(&entry.function))
    }

    /// Says what is different in another one.
    pub(super) fn difference(&self, other: &Self) -> Option<&'static str> {
        let different = [
            (self.memory != other.memory, "its memory has another size"),
            (self.topology != other.topology, "its processors are grouped in another way"),
            (self.slots != other.slots, "it has another number of slots"),
            (self.lines != other.lines, "it has another number of serial lines"),
            (!self.features().eq(other.features()), "its processors have other features"),
        ];
        different.into_iter().find_map(|(different, what)| different.then_some(what))
    }
}

impl State {
    /// As bytes.
    pub(super) fn encode(&self) -> Result<Vec<u8>, Error> {
        FORMAT.encode(self).map_err(Error::State)
    }

    /// From bytes.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Error> {
        FORMAT.decode(bytes).map_err(Error::State)
    }
}

#[cfg(test)]
mod tests {
    use super::super::fuzzing::sample as state;
    use super::*;

    fn shape() -> Shape {
        state().shape
    }

    fn wrong(bytes: &[u8]) -> String {
        match State::decode(bytes) {
            Err(Error::State(what)) => what,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_state_is_what_it_was() {
        let bytes = state().encode().unwrap();
        assert_eq!(bytes[..12], *b"vmlab-vm\x03\0\0\0");
        let found = State::decode(&bytes).unwrap();
        assert_eq!(found.shape.difference(&shape()), None);
        assert_eq!((found.cpus.len(), found.slots.len()), (2, 2));
        assert_eq!(found.clock.clock, 0x0123_4567_89ab);
        // All of it, without naming all.
        assert_eq!(found.encode().unwrap(), bytes);
        assert_eq!(format!("{found:?}"), format!("{:?}", state()));
    }

    #[test]
    fn what_is_different_is_named() {
        assert_eq!(shape().difference(&shape()), None);
        let leaf = kvm_cpuid_entry2 { function: 1, eax: 0x8087, ..Default::default() };
        let others = [
            ("memory", Shape { memory: 2 << 30, ..shape() }),
            ("grouped", Shape { topology: [1, 1, 1, 2], ..shape() }),
            ("slots", Shape { slots: 1, ..shape() }),
            ("lines", Shape { lines: 2, ..shape() }),
            ("features", Shape { cpuid: vec![leaf], ..shape() }),
            ("features", Shape { cpuid: Vec::new(), ..shape() }),
        ];
        for (what, other) in others {
            assert!(shape().difference(&other).unwrap().contains(what), "{what}");
            assert!(other.difference(&shape()).unwrap().contains(what), "{what}");
        }
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let bytes = state().encode().unwrap();
        for other in [&b""[..], b"vmlab-v", b"vmlab-vn\x01\0\0\0", &bytes[1..]] {
            assert!(wrong(other).contains("something else"));
        }
        for length in 8..12 {
            assert!(wrong(&bytes[..length]).contains("cut off"));
        }
        for version in [0, FORMAT.version + 1, u32::MAX] {
            let mut bytes = bytes.clone();
            bytes[8..12].copy_from_slice(&version.to_le_bytes());
            assert!(wrong(&bytes).contains(&format!("version {version}, not {}", FORMAT.version)));
        }
        // However little is missing, or there is too much.
        for length in 12..bytes.len() {
            wrong(&bytes[..length]);
        }
        assert!(wrong(&[&bytes[..], b"\0"].concat()).contains("behind its end"));
        assert!(wrong(&vec![0; FORMAT.max + 1]).contains("too long"));
    }

    #[test]
    fn no_bytes_end_the_monitor() {
        let bytes = state().encode().unwrap();
        let head = &bytes[..12];
        let mut random = 1_u64;
        let mut next = || {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            random >> 33
        };
        for _ in 0..2000 {
            // Bytes at random, of which those with the highest bit make long numbers; and a state with some changed.
            let noise: Vec<u8> = (0..next() % 64).map(|_| next() as u8).collect();
            let _ = State::decode(&[head, &noise].concat());
            let mut changed = bytes.clone();
            for _ in 0..next() % 8 {
                let at = 12 + next() as usize % (bytes.len() - 12);
                changed[at] = next() as u8;
            }
            if let Ok(state) = State::decode(&changed) {
                state.encode().unwrap();
            }
        }
        // Lengths that there is no memory for.
        for count in [0x7f, 0xff] {
            let huge = [&[count; 9][..], &[1]].concat();
            for at in 0..40 {
                let _ = State::decode(&[&bytes[..12 + at], &huge[..]].concat());
            }
        }
    }
}
