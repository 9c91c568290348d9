use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// Tokens of the flattened format (Devicetree Specification 0.4, 5.4.1).
mod token {
    pub(super) const BEGIN_NODE: u32 = 1;
    pub(super) const END_NODE: u32 = 2;
    pub(super) const PROP: u32 = 3;
    pub(super) const NOP: u32 = 4;
}

/// A node of a tree that was read back.
#[derive(Debug, Default)]
struct Node {
    properties: BTreeMap<String, Vec<u8>>,
    children: Vec<(String, Node)>,
}

/// What is left to read of the structure block.
struct Reader<'a> {
    structure: &'a [u8],
    strings: &'a [u8],
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn text(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap();
    std::str::from_utf8(&bytes[..end]).unwrap()
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.structure.split_at(length.next_multiple_of(4));
        self.structure = rest;
        &taken[..length]
    }

    fn number(&mut self) -> u32 {
        u32_at(self.take(4), 0)
    }

    /// A node, whose first token has been read.
    fn node(&mut self) -> (String, Node) {
        let name = text(self.structure).to_owned();
        self.take(name.len() + 1);
        let mut node = Node::default();
        loop {
            match self.number() {
                token::BEGIN_NODE => node.children.push(self.node()),
                token::END_NODE => return (name, node),
                token::PROP => {
                    let (length, at) = (self.number(), self.number());
                    let key = text(&self.strings[at as usize..]).to_owned();
                    node.properties.insert(key, self.take(length as usize).to_vec());
                }
                token::NOP => {}
                other => panic!("token {other:#x}"),
            }
        }
    }
}

impl Node {
    fn read(tree: &[u8]) -> Node {
        let header = |field: usize| u32_at(tree, field * 4) as usize;
        assert_eq!((header(0), header(1), header(5)), (0xd00d_feed, tree.len(), 17));
        let structure = &tree[header(2)..header(2) + header(9)];
        let strings = &tree[header(3)..header(3) + header(8)];
        let mut reader = Reader { structure, strings };
        assert_eq!(reader.number(), token::BEGIN_NODE);
        reader.node().1
    }

    /// The node at a path.
    fn at(&self, path: &str) -> &Node {
        let names = path.split('/').filter(|name| !name.is_empty());
        names.fold(self, |node, name| {
            let child = node.children.iter().find(|(child, _)| child == name);
            &child.unwrap_or_else(|| panic!("{name} of {path}")).1
        })
    }

    fn names(&self, prefix: &str) -> Vec<&str> {
        let names = self.children.iter().map(|(name, _)| name.as_str());
        names.filter(|name| name.starts_with(prefix)).collect()
    }

    fn has(&self, key: &str) -> bool {
        self.properties.contains_key(key)
    }

    fn bytes(&self, key: &str) -> &[u8] {
        self.properties.get(key).unwrap_or_else(|| panic!("no {key}"))
    }

    fn strings(&self, key: &str) -> Vec<&str> {
        let list = self.bytes(key).strip_suffix(b"\0").unwrap();
        list.split(|byte| *byte == 0).map(|s| std::str::from_utf8(s).unwrap()).collect()
    }

    fn cells(&self, key: &str) -> Vec<u32> {
        self.bytes(key).chunks(4).map(|cell| u32_at(cell, 0)).collect()
    }

    fn wide(&self, key: &str) -> Vec<u64> {
        let pair = |pair: &[u32]| u64::from(pair[0]) << 32 | u64::from(pair[1]);
        self.cells(key).chunks(2).map(pair).collect()
    }

    /// All nodes, this one first.
    fn all(&self) -> Vec<&Node> {
        let below = self.children.iter().flat_map(|(_, child)| child.all());
        std::iter::once(self).chain(below).collect()
    }
}

const GIB: u64 = 1 << 30;

fn machine(nodes: u32, llcs: u32, cores: u32, threads: u32) -> Machine<'static> {
    Machine {
        topology: Topology { nodes, llcs, cores, threads },
        memory: layout::memory(4 * GIB).unwrap(),
        slots: 3,
        command_line: "console=ttyS0 a=\"b c\"",
        initramfs: 0x4800_0000..0x4812_3456,
    }
}

fn tree(machine: &Machine<'_>) -> Node {
    Node::read(&describe(machine).unwrap())
}

#[test]
fn the_kernel_is_told_what_it_was_started_with() {
    let root = tree(&machine(1, 1, 1, 1));
    let chosen = root.at("chosen");
    assert_eq!(chosen.strings("bootargs"), ["console=ttyS0 a=\"b c\""]);
    assert_eq!(chosen.wide("linux,initrd-start"), [0x4800_0000]);
    assert_eq!(chosen.wide("linux,initrd-end"), [0x4812_3456]);
    let uart = root.at(chosen.strings("stdout-path")[0]);
    assert_eq!(uart.strings("compatible"), ["ns16550a"]);
    let aliases = root.at("aliases");
    assert_eq!(aliases.strings("serial0"), chosen.strings("stdout-path"));
    assert_eq!(root.at(aliases.strings("serial1")[0]).wide("reg"), [layout::UART2, 8]);

    let without = tree(&Machine { initramfs: 0..0, ..machine(1, 1, 1, 1) });
    assert!(!without.at("chosen").has("linux,initrd-start"));
}

#[test]
fn cpus_are_known_by_their_affinity() {
    let root = tree(&machine(1, 1, 18, 1));
    let names = root.at("cpus").names("cpu@");
    assert_eq!(names.len(), 18);
    assert_eq!(
        (names[0], names[15], names[16], names[17]),
        ("cpu@0", "cpu@f", "cpu@100", "cpu@101")
    );
    let cpu = root.at("cpus/cpu@101");
    assert_eq!(cpu.cells("reg"), [0x101]);
    assert_eq!(cpu.strings("enable-method"), ["psci"]);
    assert_eq!(cpu.strings("device_type"), ["cpu"]);
    assert!(!cpu.has("numa-node-id"));
    let psci = root.at("psci");
    assert_eq!(psci.strings("compatible"), ["arm,psci-1.0", "arm,psci-0.2"]);
    assert_eq!(psci.strings("method"), ["hvc"]);
}

/// The CPUs of a part of the map, by what the kernel calls them: the places of their nodes.
fn members(root: &Node, part: &Node) -> Vec<usize> {
    let cpus = root.at("cpus");
    let handles: Vec<u32> =
        cpus.names("cpu@").iter().map(|name| cpus.at(name).cells("phandle")[0]).collect();
    let place = |node: &Node| {
        let handle = node.cells("cpu")[0];
        handles.iter().position(|other| *other == handle).unwrap()
    };
    part.all().into_iter().filter(|node| node.has("cpu")).map(place).collect()
}

#[test]
fn the_map_has_a_level_for_each_of_the_topologys() {
    let machine = machine(2, 3, 2, 2);
    let root = tree(&machine);
    let map = root.at("cpus/cpu-map");
    assert_eq!(map.names(""), ["socket0", "socket1"]);
    assert_eq!(map.at("socket1").names(""), ["cluster0", "cluster1", "cluster2"]);
    assert_eq!(map.at("socket1/cluster2").names(""), ["core0", "core1"]);
    assert_eq!(map.at("socket1/cluster2/core1").names(""), ["thread0", "thread1"]);
    assert_eq!(members(&root, map), (0..24).collect::<Vec<_>>());
    assert_eq!(members(&root, map.at("socket1/cluster2")), [20, 21, 22, 23]);
    for (cpu, name) in root.at("cpus").names("cpu@").iter().enumerate() {
        let node = root.at("cpus").at(name).cells("numa-node-id");
        assert_eq!(node, [machine.topology.node_of(cpu as u32)]);
    }
}

#[test]
fn without_levels_the_map_is_of_cores() {
    let root = tree(&machine(1, 1, 3, 1));
    let map = root.at("cpus/cpu-map");
    assert_eq!(
        (map.names(""), map.at("cluster0").names("")),
        (vec!["cluster0"], vec!["core0", "core1", "core2"])
    );
    assert_eq!(members(&root, map.at("cluster0/core2")), [2]);
}

#[test]
fn each_group_of_cores_has_a_cache_of_its_own() {
    let root = tree(&machine(2, 2, 2, 2));
    let cpus = root.at("cpus");
    let caches: Vec<u32> = (cpus.names("l2-cache").iter())
        .map(|name| {
            let cache = cpus.at(name);
            assert_eq!(
                (cache.strings("compatible"), cache.cells("cache-level")),
                (vec!["cache"], vec![2])
            );
            assert!(cache.has("cache-unified"));
            cache.cells("phandle")[0]
        })
        .collect();
    let of_cpu = |name: &&str| cpus.at(name).cells("next-level-cache")[0];
    let used: Vec<u32> = cpus.names("cpu@").iter().map(of_cpu).collect();
    let expected: Vec<u32> = caches.iter().flat_map(|cache| [*cache; 4]).collect();
    assert_eq!(used, expected);
}

#[test]
fn memory_is_divided_among_the_nodes() {
    let root = tree(&machine(1, 1, 1, 1));
    assert_eq!(root.names("memory@"), ["memory@40000000"]);
    let memory = root.at("memory@40000000");
    assert_eq!(memory.wide("reg"), [GIB, 4 * GIB]);
    assert_eq!(memory.strings("device_type"), ["memory"]);
    assert!(!memory.has("numa-node-id") && root.names("distance-map").is_empty());

    let root = tree(&machine(2, 1, 1, 1));
    assert_eq!(root.names("memory@"), ["memory@40000000", "memory@c0000000"]);
    let memory = root.at("memory@c0000000");
    assert_eq!(
        (memory.wide("reg"), memory.cells("numa-node-id")),
        (vec![3 * GIB, 2 * GIB], vec![1])
    );
    let map = root.at("distance-map");
    assert_eq!(map.strings("compatible"), ["numa-distance-map-v1"]);
    assert_eq!(map.cells("distance-matrix"), [0, 0, 10, 0, 1, 20, 1, 0, 20, 1, 1, 10]);
}

#[test]
fn interrupts_come_from_a_controller_that_is_there() {
    let root = tree(&machine(1, 1, 5, 1));
    let gic = root.at("intc@8000000");
    assert_eq!(gic.strings("compatible"), ["arm,gic-v3"]);
    assert_eq!(gic.wide("reg"), [0x800_0000, 0x1_0000, 0x1000_0000, 5 * 0x2_0000]);
    assert_eq!(gic.cells("#interrupt-cells"), [3]);
    assert!(gic.has("interrupt-controller"));
    assert_eq!(root.cells("interrupt-parent"), gic.cells("phandle"));
    let timer = root.at("timer");
    assert_eq!(timer.strings("compatible"), ["arm,armv8-timer"]);
    assert_eq!(timer.cells("interrupts"), [1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4]);
    let shared = root.all().into_iter().filter(|node| node.has("interrupts")).filter_map(|node| {
        let cells = node.cells("interrupts");
        (cells[0] == 0).then_some(cells)
    });
    let shared: Vec<_> = shared.collect();
    let numbers: BTreeSet<u32> = shared.iter().map(|cells| cells[1]).collect();
    assert_eq!((shared.len(), numbers.len()), (5, 5));
    assert!(shared.iter().all(|cells| cells.len() == 3 && cells[1] < spi::COUNT && cells[2] == 1));
}

#[test]
fn every_slot_is_announced() {
    let most = Machine { slots: layout::MAX_SLOTS, ..machine(1, 1, 1, 1) };
    let root = tree(&most);
    let slots = root.names("virtio_mmio@");
    assert_eq!(slots.len(), layout::MAX_SLOTS);
    for (slot, name) in slots.iter().enumerate() {
        let node = root.at(name);
        assert_eq!(node.wide("reg"), [layout::slot_address(slot), 0x1000]);
        assert_eq!(node.cells("interrupts"), [0, layout::slot_spi(slot), 1]);
        assert_eq!(node.strings("compatible"), ["virtio,mmio"]);
        assert!(node.has("dma-coherent"));
    }
}

#[test]
fn handles_are_of_one_node_each() {
    let root = tree(&machine(2, 3, 4, 2));
    let with_handle = root.all().into_iter().filter(|node| node.has("phandle"));
    let handles: Vec<u32> = with_handle.map(|node| node.cells("phandle")[0]).collect();
    let different: BTreeSet<u32> = handles.iter().copied().collect();
    assert_eq!((handles.len(), different.len()), (1 + 48 + 6, 1 + 48 + 6));
}

#[test]
fn the_largest_machine_can_be_described() {
    let largest = Machine { slots: layout::MAX_SLOTS, ..machine(16, 4, 4, 2) };
    assert_eq!(largest.topology.cpus(), layout::MAX_CPUS);
    let length = describe(&largest).unwrap().len() as u64;
    assert!(length < FDT_MAX / 4, "{length}");
}

#[test]
fn what_there_is_no_room_for_is_refused() {
    let refused = |machine: Machine<'_>| describe(&machine).unwrap_err();
    for (nodes, cores, cpus) in
        [(0, 1, 0), (1, 513, 513), (u32::MAX, u32::MAX, 0xffff_fffe_0000_0001)]
    {
        let error = refused(machine(nodes, 1, cores, 1));
        assert!(matches!(error, FdtError::Cpus { cpus: found } if found == cpus), "{error}");
    }
    let error = refused(Machine { slots: 33, ..machine(1, 1, 1, 1) });
    assert!(matches!(error, FdtError::Slots { slots: 33 }), "{error}");
    let error = refused(Machine { command_line: "a\0b", ..machine(1, 1, 1, 1) });
    assert!(matches!(error, FdtError::Write(_)), "{error}");
    let long = "x".repeat(3 << 20);
    let error = refused(Machine { command_line: &long, ..machine(1, 1, 1, 1) });
    assert!(matches!(error, FdtError::Length { .. }), "{error}");
}
