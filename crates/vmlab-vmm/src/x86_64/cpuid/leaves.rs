//! A set of CPUID entries that can be changed.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::Error;

/// The entries: each is found by its leaf and, in leaves that have several, by its index.
pub(super) struct Leaves(Vec<kvm_cpuid_entry2>);

impl Leaves {
    pub(super) fn new(set: &CpuId) -> Self {
        Self(set.as_slice().to_vec())
    }

    fn position(&self, leaf: u32, index: u32) -> Option<usize> {
        self.0.iter().position(|entry| entry.function == leaf && entry.index == index)
    }

    /// EAX, EBX, ECX and EDX, which are 0 in entries that are not there.
    pub(super) fn get(&self, leaf: u32, index: u32) -> [u32; 4] {
        let entry = self.position(leaf, index).map(|at| &self.0[at]);
        entry.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    }

    /// An entry, which is made where there is none.
    pub(super) fn entry(&mut self, leaf: u32, index: u32) -> &mut kvm_cpuid_entry2 {
        let at = self.position(leaf, index).unwrap_or_else(|| {
            self.0.push(kvm_cpuid_entry2 { function: leaf, index, ..Default::default() });
            self.0.len() - 1
        });
        &mut self.0[at]
    }

    /// All entries of a leaf, in their order.
    pub(super) fn all(&mut self, leaf: u32) -> impl Iterator<Item = &mut kvm_cpuid_entry2> {
        self.0.iter_mut().filter(move |entry| entry.function == leaf)
    }

    /// Takes a leaf away.
    pub(super) fn remove(&mut self, leaf: u32) {
        self.0.retain(|entry| entry.function != leaf);
    }

    /// Makes a leaf consist of these entries, told apart by their index.
    pub(super) fn replace(&mut self, leaf: u32, entries: impl IntoIterator<Item = [u32; 4]>) {
        self.remove(leaf);
        for (index, registers) in (0..).zip(entries) {
            self.put(leaf, index, registers);
        }
    }

    /// Sets an entry of a leaf whose entries are told apart by their index.
    pub(super) fn put(&mut self, leaf: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) {
        let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        let padding = [0; 3];
        *self.entry(leaf, index) =
            kvm_cpuid_entry2 { function: leaf, index, flags, eax, ebx, ecx, edx, padding };
    }

    /// The highest leaf of a range, which the range's first says.
    pub(super) fn last(&self, range: u32) -> u32 {
        let [last, ..] = self.get(range, 0);
        last
    }

    /// Makes a range reach to a leaf at least. What is between is not there, which reads as 0.
    pub(super) fn reach(&mut self, range: u32, leaf: u32) {
        let entry = self.entry(range, 0);
        entry.eax = entry.eax.max(leaf);
    }

    /// The set, in the order of its leaves.
    pub(super) fn finish(mut self) -> Result<CpuId, Error> {
        self.0.sort_by_key(|entry| (entry.function, entry.index));
        CpuId::from_entries(&self.0).map_err(|_| Error::TooMany(self.0.len()))
    }
}
