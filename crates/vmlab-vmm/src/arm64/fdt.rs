//! What an arm64 guest is told of its machine: a flattened device tree
//! (<https://devicetree-specification.readthedocs.io>, and the kernel's Documentation/devicetree/bindings).

#[cfg(test)]
mod tests;

use std::ops::Range;

use thiserror::Error;
use vm_fdt::{FdtWriter, FdtWriterResult};

use super::gic::affinity;
use super::image::FDT_MAX;
use super::layout::{self, ppi, spi};
use crate::topology::Topology;

/// A machine to describe.
#[derive(Debug, Clone)]
pub struct Machine<'a> {
    /// CPUs. Each node has memory of its own.
    pub topology: Topology,
    /// Memory.
    pub memory: Range<u64>,
    /// Slots for virtio devices, with something in them or not.
    pub slots: usize,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// Where the initramfs is; empty where there is none.
    pub initramfs: Range<u64>,
}

/// Why a machine cannot be described.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FdtError {
    /// It has more CPUs than there are places for, or none.
    #[error("it has {cpus} CPUs, and can have 1 to {}", layout::MAX_CPUS)]
    Cpus {
        /// How many.
        cpus: u64,
    },
    /// It has more slots than there are places for.
    #[error("it has {slots} slots, and there is room for {}", layout::MAX_SLOTS)]
    Slots {
        /// How many.
        slots: usize,
    },
    /// A string has a NUL character, which is the only thing that can be wrong with what is written here.
    #[error("its device tree cannot be written")]
    Write(#[from] vm_fdt::Error),
    /// The kernel would not read all of it.
    #[error("its device tree has {length} bytes, and a kernel reads {FDT_MAX}")]
    Length {
        /// Bytes of the tree.
        length: usize,
    },
}

/// Phandles, by which nodes refer to each other: those of the CPUs are behind these, and then the caches'.
mod phandle {
    pub(super) const GIC: u32 = 1;
    pub(super) const CPUS: u32 = 2;
}

/// The first of the three cells of an interrupt.
mod interrupt {
    pub(super) const SHARED: u32 = 0;
    pub(super) const PRIVATE: u32 = 1;
}

/// The last of these.
mod trigger {
    pub(super) const EDGE_RISING: u32 = 1;
    pub(super) const LEVEL_HIGH: u32 = 4;
}

/// What a PC's serial lines have: 16 times their fastest rate, in Hz. Here, no rate makes a difference.
const UART_CLOCK: u32 = 1_843_200;

/// The level of the caches that groups of cores share. A guest of KVM sees those of the first level and at most one
/// behind them, so that this is the one that a chain from the CPU's own node comes to next.
const SHARED_CACHE_LEVEL: u32 = 2;

/// How far memory of the own node is, and that of others, as ACPI has it for PCs.
const DISTANCE: (u32, u32) = (10, 20);

/// Describes a machine.
///
/// # Errors
/// When it is one that there is no room for.
pub fn describe(machine: &Machine<'_>) -> Result<Vec<u8>, FdtError> {
    let Topology { nodes, llcs, cores, threads } = machine.topology;
    let cpus = [llcs, cores, threads].into_iter().map(u64::from);
    let cpus = cpus.fold(u64::from(nodes), u64::saturating_mul);
    if !(1..=u64::from(layout::MAX_CPUS)).contains(&cpus) {
        return Err(FdtError::Cpus { cpus });
    }
    if machine.slots > layout::MAX_SLOTS {
        return Err(FdtError::Slots { slots: machine.slots });
    }
    let tree = write(machine)?;
    match tree.len() as u64 > FDT_MAX {
        true => Err(FdtError::Length { length: tree.len() }),
        false => Ok(tree),
    }
}

fn write(machine: &Machine<'_>) -> FdtWriterResult<Vec<u8>> {
    let Machine { topology, memory, slots, command_line, initramfs } = machine;
    let mut fdt = Writer(FdtWriter::new()?);
    fdt.node("", |fdt| {
        fdt.0.property_string("compatible", "linux,dummy-virt")?;
        fdt.0.property_u32("#address-cells", 2)?;
        fdt.0.property_u32("#size-cells", 2)?;
        fdt.0.property_u32("interrupt-parent", phandle::GIC)?;
        fdt.0.property_null("dma-coherent")?;
        fdt.chosen(command_line, initramfs)?;
        fdt.cpus(*topology)?;
        fdt.memory(memory, topology.nodes)?;
        fdt.interrupt_controller(topology.cpus())?;
        fdt.timer()?;
        fdt.psci()?;
        fdt.uart(layout::UART1, spi::UART1)?;
        fdt.uart(layout::UART2, spi::UART2)?;
        (0..*slots).try_for_each(|slot| fdt.slot(slot))
    })?;
    fdt.0.finish()
}

/// Writes nodes, each as the bindings of its kind have it.
struct Writer(FdtWriter);

impl Writer {
    /// A node with what is written meanwhile.
    fn node(
        &mut self,
        name: &str,
        content: impl FnOnce(&mut Self) -> FdtWriterResult<()>,
    ) -> FdtWriterResult<()> {
        let node = self.0.begin_node(name)?;
        content(self)?;
        self.0.end_node(node)
    }

    /// A node of a device with registers at a place.
    fn device(
        &mut self,
        kind: &str,
        (address, size): (u64, u64),
        content: impl FnOnce(&mut Self) -> FdtWriterResult<()>,
    ) -> FdtWriterResult<()> {
        self.node(&format!("{kind}@{address:x}"), |fdt| {
            fdt.0.property_array_u64("reg", &[address, size])?;
            content(fdt)
        })
    }

    fn shared_interrupt(&mut self, number: u32) -> FdtWriterResult<()> {
        let cells = [interrupt::SHARED, number, trigger::EDGE_RISING];
        self.0.property_array_u32("interrupts", &cells)
    }

    fn chosen(&mut self, command_line: &str, initramfs: &Range<u64>) -> FdtWriterResult<()> {
        self.node("chosen", |fdt| {
            fdt.0.property_string("bootargs", command_line)?;
            fdt.0.property_string("stdout-path", &uart_path(layout::UART1))?;
            if !initramfs.is_empty() {
                fdt.0.property_u64("linux,initrd-start", initramfs.start)?;
                fdt.0.property_u64("linux,initrd-end", initramfs.end)?;
            }
            Ok(())
        })?;
        // The numbers that the kernel gives the lines.
        self.node("aliases", |fdt| {
            fdt.0.property_string("serial0", &uart_path(layout::UART1))?;
            fdt.0.property_string("serial1", &uart_path(layout::UART2))
        })
    }

    fn cpus(&mut self, topology: Topology) -> FdtWriterResult<()> {
        self.node("cpus", |fdt| {
            // One cell has all levels of affinity but the last, which is 0.
            fdt.0.property_u32("#address-cells", 1)?;
            fdt.0.property_u32("#size-cells", 0)?;
            (0..topology.cpus()).try_for_each(|cpu| fdt.cpu(topology, cpu))?;
            (0..topology.nodes * topology.llcs).try_for_each(|llc| fdt.cache(topology, llc))?;
            fdt.node("cpu-map", |fdt| match topology.nodes {
                // Kernels before 6.0 know no sockets, and look for clusters here.
                1 => fdt.clusters(topology, 0),
                nodes => (0..nodes).try_for_each(|node| {
                    fdt.node(&format!("socket{node}"), |fdt| fdt.clusters(topology, node))
                }),
            })
        })
    }

    fn cpu(&mut self, topology: Topology, cpu: u32) -> FdtWriterResult<()> {
        let affinity = affinity(cpu) as u32;
        self.node(&format!("cpu@{affinity:x}"), |fdt| {
            fdt.0.property_string("device_type", "cpu")?;
            fdt.0.property_string("compatible", "arm,armv8")?;
            fdt.0.property_u32("reg", affinity)?;
            fdt.0.property_string("enable-method", "psci")?;
            let llc = cpu / (topology.cores * topology.threads);
            fdt.0.property_u32("next-level-cache", cache_phandle(topology, llc))?;
            fdt.numa_node(topology.nodes, topology.node_of(cpu))?;
            fdt.0.property_phandle(phandle::CPUS + cpu)
        })
    }

    fn cache(&mut self, topology: Topology, llc: u32) -> FdtWriterResult<()> {
        self.node(&format!("l{SHARED_CACHE_LEVEL}-cache{llc}"), |fdt| {
            fdt.0.property_string("compatible", "cache")?;
            fdt.0.property_u32("cache-level", SHARED_CACHE_LEVEL)?;
            fdt.0.property_null("cache-unified")?;
            fdt.0.property_phandle(cache_phandle(topology, llc))
        })
    }

    /// The groups of a node's cores, by bindings/cpu/cpu-topology.txt.
    fn clusters(&mut self, topology: Topology, node: u32) -> FdtWriterResult<()> {
        let Topology { llcs, cores, threads, .. } = topology;
        (0..llcs).try_for_each(|llc| {
            self.node(&format!("cluster{llc}"), |fdt| {
                (0..cores).try_for_each(|core| {
                    let first = ((node * llcs + llc) * cores + core) * threads;
                    fdt.node(&format!("core{core}"), |fdt| fdt.core(first..first + threads))
                })
            })
        })
    }

    fn core(&mut self, cpus: Range<u32>) -> FdtWriterResult<()> {
        if cpus.len() == 1 {
            return self.0.property_u32("cpu", phandle::CPUS + cpus.start);
        }
        cpus.enumerate().try_for_each(|(thread, cpu)| {
            self.node(&format!("thread{thread}"), |fdt| {
                fdt.0.property_u32("cpu", phandle::CPUS + cpu)
            })
        })
    }

    /// The node that something belongs to, where there are several.
    fn numa_node(&mut self, nodes: u32, node: u32) -> FdtWriterResult<()> {
        match nodes {
            1 => Ok(()),
            _ => self.0.property_u32("numa-node-id", node),
        }
    }

    fn memory(&mut self, memory: &Range<u64>, nodes: u32) -> FdtWriterResult<()> {
        for (node, part) in (0..).zip(layout::node_memory(memory.clone(), nodes)) {
            self.device("memory", (part.start, part.end - part.start), |fdt| {
                fdt.0.property_string("device_type", "memory")?;
                fdt.numa_node(nodes, node)
            })?;
        }
        if nodes == 1 {
            return Ok(());
        }
        let (own, other) = DISTANCE;
        let distance = |from, to| [from, to, if from == to { own } else { other }];
        let pairs = (0..nodes).flat_map(|from| (0..nodes).map(move |to| (from, to)));
        let matrix: Vec<u32> = pairs.flat_map(|(from, to)| distance(from, to)).collect();
        self.node("distance-map", |fdt| {
            fdt.0.property_string("compatible", "numa-distance-map-v1")?;
            fdt.0.property_array_u32("distance-matrix", &matrix)
        })
    }

    fn interrupt_controller(&mut self, cpus: u32) -> FdtWriterResult<()> {
        // Its maintenance interrupt is of use to hypervisors, which this guest is none of.
        self.node(&format!("intc@{:x}", layout::GIC_DISTRIBUTOR), |fdt| {
            fdt.0.property_string("compatible", "arm,gic-v3")?;
            let redistributors = u64::from(cpus) * layout::GIC_REDISTRIBUTOR_SIZE;
            let distributor = [layout::GIC_DISTRIBUTOR, layout::GIC_DISTRIBUTOR_SIZE];
            let registers =
                [&distributor[..], &[layout::GIC_REDISTRIBUTORS, redistributors]].concat();
            fdt.0.property_array_u64("reg", &registers)?;
            fdt.0.property_null("interrupt-controller")?;
            fdt.0.property_u32("#interrupt-cells", 3)?;
            fdt.0.property_u32("#address-cells", 0)?;
            fdt.0.property_phandle(phandle::GIC)
        })
    }

    fn timer(&mut self) -> FdtWriterResult<()> {
        // In the order of the bindings.
        let timers =
            [ppi::TIMER_SECURE, ppi::TIMER_PHYSICAL, ppi::TIMER_VIRTUAL, ppi::TIMER_HYPERVISOR];
        let cells = timers.map(|number| [interrupt::PRIVATE, number, trigger::LEVEL_HIGH]);
        self.node("timer", |fdt| {
            fdt.0.property_string("compatible", "arm,armv8-timer")?;
            fdt.0.property_array_u32("interrupts", cells.as_flattened())?;
            fdt.0.property_null("always-on")
        })
    }

    fn psci(&mut self) -> FdtWriterResult<()> {
        self.node("psci", |fdt| {
            let versions = ["arm,psci-1.0", "arm,psci-0.2"].map(str::to_owned);
            fdt.0.property_string_list("compatible", versions.into())?;
            // KVM itself answers what comes by this instruction.
            fdt.0.property_string("method", "hvc")
        })
    }

    fn uart(&mut self, address: u64, number: u32) -> FdtWriterResult<()> {
        self.device("uart", (address, layout::UART_SIZE), |fdt| {
            fdt.0.property_string("compatible", "ns16550a")?;
            fdt.0.property_u32("clock-frequency", UART_CLOCK)?;
            fdt.shared_interrupt(number)
        })
    }

    fn slot(&mut self, slot: usize) -> FdtWriterResult<()> {
        let registers = (layout::slot_address(slot), layout::SLOT_SIZE);
        self.device("virtio_mmio", registers, |fdt| {
            fdt.0.property_string("compatible", "virtio,mmio")?;
            fdt.shared_interrupt(layout::slot_spi(slot))?;
            fdt.0.property_null("dma-coherent")
        })
    }
}

fn uart_path(address: u64) -> String {
    format!("/uart@{address:x}")
}

/// The phandle of a cache, by its number among those of all nodes.
const fn cache_phandle(topology: Topology, llc: u32) -> u32 {
    phandle::CPUS + topology.cpus() + llc
}
