//! How a guest's CPUs are grouped.

/// NUMA nodes of groups of cores that share a last-level cache. CPUs are numbered with the threads of a core next
/// to each other, then the cores of a group, then the groups of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// NUMA nodes; each is a package.
    pub nodes: u32,
    /// Last-level caches of a node.
    pub llcs: u32,
    /// Cores behind one such cache.
    pub cores: u32,
    /// Threads of a core.
    pub threads: u32,
}

impl Topology {
    /// How many CPUs there are.
    pub const fn cpus(self) -> u32 {
        self.nodes * self.cpus_of_node()
    }

    /// How many there are in a node.
    pub const fn cpus_of_node(self) -> u32 {
        self.llcs * self.cores * self.threads
    }

    /// The node of a CPU.
    pub const fn node_of(self, cpu: u32) -> u32 {
        cpu / self.cpus_of_node()
    }

    /// The APIC id of a CPU: its thread, core, last-level cache and node, each in as many bits as it needs, from
    /// the lowest bit on.
    pub const fn apic_id(self, cpu: u32) -> u32 {
        let Shifts { core, llc, node } = self.shifts();
        let (thread, rest) = (cpu % self.threads, cpu / self.threads);
        let (in_llc, rest) = (rest % self.cores, rest / self.cores);
        thread | in_llc << core | (rest % self.llcs) << llc | (rest / self.llcs) << node
    }

    /// Where the fields of an APIC id begin.
    pub const fn shifts(self) -> Shifts {
        let core = bits(self.threads);
        let llc = core + bits(self.cores);
        Shifts { core, llc, node: llc + bits(self.llcs) }
    }
}

/// How many bits of an APIC id are below each field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shifts {
    /// Below the core's number.
    pub core: u32,
    /// Below the last-level cache's.
    pub llc: u32,
    /// Below the node's.
    pub node: u32,
}

/// The bits that so many numbers need.
const fn bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apic_ids_have_a_field_for_each_level() {
        let topology = Topology { nodes: 2, llcs: 3, cores: 3, threads: 2 };
        assert_eq!(topology.cpus(), 36);
        assert_eq!(topology.shifts(), Shifts { core: 1, llc: 3, node: 5 });
        let ids: Vec<u32> = (0..9).map(|cpu| topology.apic_id(cpu)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10]);
        assert_eq!(topology.apic_id(18), 32);
        assert_eq!((topology.node_of(17), topology.node_of(18)), (0, 1));
    }

    #[test]
    fn without_levels_ids_are_numbers() {
        let topology = Topology { nodes: 1, llcs: 1, cores: 5, threads: 1 };
        assert!((0..5).all(|cpu| topology.apic_id(cpu) == cpu));
        assert_eq!(topology.shifts(), Shifts { core: 0, llc: 3, node: 3 });
    }
}
