//! The QEMU command line for a [`VmConfig`].

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::path::Path;

use super::devices::{PLUG_BUS, RNG, VSOCK, devices, disk_id, lan_id, share_id};
use crate::config::{
    Accel, AgentChannel, Boot, DiskWrites, Firmware, FirmwareBoot, Machine, NetworkMode,
    ShareTransport, Topology, VmConfig,
};
use crate::hypervisor::DeviceId;
use crate::units::MIB;

/// Name of the virtio port that the agent looks for.
const AGENT_PORT: &str = "vmlab";

/// The same of the port that qemu-guest-agent looks for.
const GUEST_AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// The descriptors that QEMU inherits.
#[derive(Debug, Clone)]
pub(super) struct Descriptors {
    pub(super) console: RawFd,
    pub(super) agent: RawFd,
    pub(super) qmp: RawFd,
    /// The way to qemu-guest-agent, for images.
    pub(super) guest_agent: Option<RawFd>,
    /// Connections to servers of ours: one for each share over virtio-fs, then one for each disk that is served
    /// here, in their order, then one for a vsock and one for random numbers.
    pub(super) servers: Vec<RawFd>,
    /// Datagram sockets of ports on networks of VMs.
    pub(super) lans: Vec<RawFd>,
    /// Where RAM is a file of ours: one for each NUMA node, and whether QEMU keeps its changes to itself.
    pub(super) memory: Option<(Vec<RawFd>, MemoryUse)>,
    /// The VM goes on from a snapshot, whose state will be named by QMP.
    pub(super) incoming: bool,
    /// The kernel for a guest that goes on from a snapshot and resets itself.
    pub(super) reset_kernel: Option<RawFd>,
    /// Devices that the VM begins with behind the bridge, as their state is part of the snapshot's.
    pub(super) on_bridge: Vec<(u32, DeviceId)>,
}

impl Descriptors {
    /// Whether devices are behind the bridge, where they can be plugged in and taken out. Firmware finds its
    /// disks without.
    pub(super) fn plugs(&self, config: &VmConfig) -> bool {
        self.memory.is_some() && config.boot.kernel().is_some()
    }
}

/// What becomes of a guest's changes to a file that is its RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MemoryUse {
    /// They are written to the file, as servers outside of QEMU need.
    Shared,
    /// They stay in QEMU.
    Private,
}

/// QEMU's arguments, without the program. `cpu_log` gets what QEMU says about CPU resets.
pub(super) fn arguments(config: &VmConfig, fds: &Descriptors, cpu_log: &Path) -> Vec<OsString> {
    let mut args = Arguments::default();
    args.flags(&["-nodefaults", "-no-user-config", "-no-reboot"]);
    args.option("-display", "none");
    let memory = Ram::of(config, fds);
    args.option("-machine", machine(config, &memory));
    args.option("-accel", accel(config.accel));
    args.option("-cpu", cpu(config.accel));
    args.option("-m", format!("{}M", config.memory.0 / MIB));
    cpus(&mut args, config, &memory);
    if fds.incoming {
        args.option("-incoming", "defer");
        if let Some(kernel) = fds.reset_kernel {
            args.option("-kernel", format!("/proc/self/fd/{kernel}"));
        }
    } else {
        if fds.plugs(config) {
            // Its devices are plugged in before it runs.
            args.flags(&["-S"]);
        }
        match &config.boot {
            Boot::Kernel(kernel) => {
                args.option("-kernel", &kernel.image);
                args.option("-initrd", &kernel.initramfs);
                args.option("-append", &kernel.command_line);
            }
            Boot::Firmware(boot) => firmware(&mut args, boot),
        }
    }

    args.option("-chardev", format!("socket,id=console,fd={}", fds.console));
    args.option("-serial", "chardev:console");
    args.option("-chardev", format!("socket,id=qmp,fd={}", fds.qmp));
    args.option("-mon", "chardev=qmp,mode=control");
    args.option("-chardev", format!("socket,id=agent,fd={}", fds.agent));
    match config.channel {
        AgentChannel::Virtio => {
            args.option("-device", "virtio-serial-pci,max_ports=3");
            args.option("-device", format!("virtserialport,chardev=agent,name={AGENT_PORT}"));
        }
        AgentChannel::Serial => args.option("-serial", "chardev:agent"),
    }
    if let Some(socket) = fds.guest_agent {
        args.option("-chardev", format!("socket,id=qga,fd={socket}"));
        args.option("-device", format!("virtserialport,chardev=qga,name={GUEST_AGENT_PORT}"));
    }
    if fds.memory.is_some() {
        if config.machine == Machine::Q35 {
            // It would tell the guest of each device that is plugged in or taken out.
            args.option("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off");
        }
        args.option("-device", format!("pci-bridge,id={PLUG_BUS},chassis_nr=1,shpc=on"));
    }
    backends(&mut args, config, fds);
    for device in devices(config) {
        if !fds.plugs(config) {
            args.option("-device", device.to_string());
        } else if let Some((place, _)) = fds.on_bridge.iter().find(|(_, id)| *id == device.id) {
            args.option("-device", device.behind_bridge(*place));
        }
    }
    // The only trace that a triple fault leaves under TCG.
    args.option("-d", "cpu_reset");
    args.option("-D", cpu_log);
    args.0.extend(config.qemu_args.iter().map(OsString::from));
    args.0
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.0.push(name.into());
        self.0.push(value.as_ref().to_owned());
    }

    fn flags(&mut self, names: &[&str]) {
        self.0.extend(names.iter().map(OsString::from));
    }
}

/// Where a guest's RAM is.
enum Ram<'a> {
    /// In QEMU.
    Plain,
    /// Where servers outside of QEMU can read and write it too.
    Shared,
    /// In files, one for each node.
    Files(&'a [RawFd], MemoryUse),
}

impl<'a> Ram<'a> {
    fn of(config: &VmConfig, fds: &'a Descriptors) -> Self {
        match &fds.memory {
            Some((files, usage)) => Ram::Files(files, *usage),
            None if has_servers(config) => Ram::Shared,
            None => Ram::Plain,
        }
    }

    fn backend(&self, id: &str, node: usize, mebibytes: u64) -> String {
        match self {
            Ram::Plain => format!("memory-backend-ram,id={id},size={mebibytes}M"),
            Ram::Shared => format!("memory-backend-memfd,id={id},size={mebibytes}M,share=on"),
            Ram::Files(files, usage) => {
                let share = if *usage == MemoryUse::Shared { "on" } else { "off" };
                let file = files.get(node).copied().unwrap_or(-1);
                format!(
                    "memory-backend-file,id={id},size={mebibytes}M,mem-path=/proc/self/fd/{file},\
                     share={share}"
                )
            }
        }
    }
}

fn machine(config: &VmConfig, memory: &Ram<'_>) -> String {
    let board = match (config.machine, &config.boot) {
        (Machine::Microvm, _) => "microvm,pcie=on,acpi=on",
        (_, Boot::Firmware(FirmwareBoot { firmware: Firmware::Uefi { smm: true, .. }, .. })) => {
            "q35,smbus=off,sata=off,vmport=off,smm=on"
        }
        (Machine::Q35, _) => "q35,smbus=off,sata=off,vmport=off",
        // It is not among the capabilities. QEMU refuses what is asked of it all the same.
        (Machine::Native, _) => Machine::Native.name(),
    };
    // Nodes have memory of their own.
    match memory {
        Ram::Shared | Ram::Files(..) if config.topology.nodes <= 1 => {
            format!("{board},memory-backend=ram")
        }
        _ => board.to_owned(),
    }
}

/// What starts the system of a disk, and what it finds beside the disk.
fn firmware(args: &mut Arguments, boot: &FirmwareBoot) {
    match &boot.firmware {
        Firmware::Bios => {}
        Firmware::File(file) => args.option("-bios", file),
        Firmware::Uefi { code, vars, format, smm } => {
            let format = format.name();
            // What a guest writes into its variables is gone with it.
            let flash = |unit: u32, file: &Path, how: &str| {
                format!("if=pflash,unit={unit},format={format},{how},file={}", escaped(file))
            };
            args.option("-drive", flash(0, code, "readonly=on"));
            args.option("-drive", flash(1, vars, "snapshot=on"));
            if *smm {
                args.option("-global", "driver=cfi.pflash01,property=secure,value=on");
                // Waking up again would leave that mode open.
                args.option("-global", "ICH9-LPC.disable_s3=1");
            }
        }
    }
    for string in &boot.oem_strings {
        args.option("-smbios", format!("type=11,value={}", string.replace(',', ",,")));
    }
    // Systems wait for random numbers while they boot.
    args.option("-device", "virtio-rng-pci");
    // Tells of panics, which an image need not have a console for.
    args.option("-device", "pvpanic");
}

/// A path in the options of QEMU. It was checked to be UTF-8 when the configuration was built.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// Whether servers outside of QEMU read and write the guest's memory, which they then have to share.
fn has_servers(config: &VmConfig) -> bool {
    config.servers() > 0
}

fn accel(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg,thread=multi",
    }
}

/// Five-level page tables cost every boot and hinder crash tools, and no test guest has the memory
/// that they are for. TCG executes the string instructions that `erms` and `fsrm` recommend byte by
/// byte; without them, guests copy more than twice as fast.
fn cpu(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "host",
        Accel::Tcg => "max,la57=off,erms=off,fsrm=off",
    }
}

fn cpus(args: &mut Arguments, config: &VmConfig, ram: &Ram<'_>) {
    let Topology { nodes, llcs, cores, threads } = config.topology;
    let total = nodes * llcs * cores * threads;
    let dies = if llcs > 1 { format!(",dies={llcs}") } else { String::new() };
    let shape = format!("{total},sockets={nodes}{dies},cores={cores},threads={threads}");
    args.option("-smp", shape);
    if nodes <= 1 && !matches!(ram, Ram::Plain) {
        args.option("-object", ram.backend("ram", 0, config.memory.0 / MIB));
    }
    if nodes > 1 {
        let memory = config.memory.0 / u64::from(nodes) / MIB;
        for node in 0..nodes {
            args.option("-object", ram.backend(&format!("node{node}"), node as usize, memory));
            args.option("-numa", format!("node,nodeid={node},memdev=node{node}"));
        }
        for node in 0..nodes {
            args.option("-numa", format!("cpu,node-id={node},socket-id={node}"));
        }
    }
}

/// What the devices of a run are fronts of.
fn backends(args: &mut Arguments, config: &VmConfig, fds: &Descriptors) {
    // Only root can give files to others. For everybody else, what the guest's users own belongs to the
    // caller.
    let model = if rustix::process::geteuid().is_root() { "passthrough" } else { "none" };
    let mut servers = fds.servers.iter();
    for (index, share) in config.shares.iter().enumerate() {
        match share.transport {
            ShareTransport::NineP => {
                let read_only = if share.read_only { ",readonly=on" } else { "" };
                let path = escaped(&share.path);
                let id = share_id(index);
                args.option(
                    "-fsdev",
                    format!(
                        "local,id={id},path={path},security_model={model},\
                         multidevs=remap{read_only}"
                    ),
                );
            }
            ShareTransport::VirtioFs => {
                if let Some(fd) = servers.next() {
                    args.option("-chardev", format!("socket,id={},fd={fd}", share_id(index)));
                }
            }
        }
    }
    match config.network {
        NetworkMode::None => {}
        NetworkMode::User => args.option("-netdev", "user,id=net"),
    }
    for (index, fd) in fds.lans.iter().enumerate().take(config.lans.len()) {
        // `dgram` is the same, and newer than 7.1.
        args.option("-netdev", format!("socket,id={},fd={fd}", lan_id(index)));
    }
    for disk in &config.disks {
        if disk.serve.is_some() {
            if let Some(fd) = servers.next() {
                args.option("-chardev", format!("socket,id={},fd={fd}", disk_id(&disk.serial)));
            }
            continue;
        }
        let how = match disk.writes {
            // What nobody will read need not be on the host's disks.
            DiskWrites::Discarded => ",snapshot=on,cache=unsafe",
            DiskWrites::Cloned(_) if disk.keep.is_none() => ",cache=unsafe",
            DiskWrites::Kept | DiskWrites::Cloned(_) => "",
            DiskWrites::Refused => ",readonly=on",
        };
        let (path, format) = (escaped(&disk.path), disk.format.name());
        let id = disk_id(&disk.serial);
        let drive = format!("if=none,id={id},discard=unmap,format={format}{how},file={path}");
        args.option("-drive", drive);
    }
    let others = [config.vsock.is_some().then_some(VSOCK), config.rng.then_some(RNG)];
    for (id, fd) in others.into_iter().flatten().zip(servers) {
        args.option("-chardev", format!("socket,id={id},fd={fd}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmlab_artifacts::image::ImageFormat;

    use crate::config::{
        Caching, DiskDevice, KernelBoot, LanDevice, ShareDevice, VmConfigBuilder, VsockDevice,
    };
    use crate::units::Bytes;
    use vmlab_artifacts::Arch;
    use vmlab_devices::net::MacAddress;

    fn line(change: impl FnOnce(VmConfigBuilder) -> VmConfigBuilder) -> Vec<String> {
        // Any readable file will do: nothing is started.
        let file = std::env::current_exe().unwrap();
        let boot = KernelBoot {
            image: file.clone(),
            arch: Arch::HOST,
            initramfs: file,
            command_line: "console=ttyS0 a=\"b c\"".to_owned(),
        };
        words(&change(VmConfigBuilder::new(boot)).build().unwrap(), None)
    }

    fn words(config: &VmConfig, guest_agent: Option<RawFd>) -> Vec<String> {
        let servers = vec![10, 11];
        let fds = Descriptors {
            console: 7,
            agent: 8,
            qmp: 9,
            guest_agent,
            servers,
            lans: vec![20, 21],
            memory: None,
            incoming: false,
            reset_kernel: None,
            on_bridge: Vec::new(),
        };
        let words = arguments(config, &fds, Path::new("/logs/cpu.log"));
        words.into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    /// The values of an option, in order.
    fn values<'a>(line: &'a [String], option: &str) -> Vec<&'a str> {
        let pairs = line.iter().zip(line.iter().skip(1));
        pairs.filter(|(name, _)| *name == option).map(|(_, value)| value.as_str()).collect()
    }

    #[test]
    fn descriptors_and_command_line_go_through_as_they_are() {
        let line = line(|config| config);
        assert_eq!(values(&line, "-append"), ["console=ttyS0 a=\"b c\""]);
        let chardevs = values(&line, "-chardev");
        assert!(chardevs.contains(&"socket,id=console,fd=7"), "{chardevs:?}");
        assert!(chardevs.contains(&"socket,id=agent,fd=8"), "{chardevs:?}");
        assert!(chardevs.contains(&"socket,id=qmp,fd=9"), "{chardevs:?}");
    }

    #[test]
    fn a_topology_has_dies_for_caches_and_nodes_with_memory() {
        let topology = Topology { nodes: 2, llcs: 3, cores: 4, threads: 2 };
        let line = line(|config| {
            config.machine(Machine::Q35).topology(topology).memory(Bytes(1024 * MIB))
        });
        assert_eq!(values(&line, "-smp"), ["48,sockets=2,dies=3,cores=4,threads=2"]);
        let numa = values(&line, "-numa");
        assert_eq!(numa[0], "node,nodeid=0,memdev=node0");
        assert_eq!(numa[3], "cpu,node-id=1,socket-id=1");
        assert!(values(&line, "-object").contains(&"memory-backend-ram,id=node1,size=512M"));
    }

    #[test]
    fn shares_are_read_only_in_the_server_and_commas_survive() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a,b");
        std::fs::create_dir(&dir).unwrap();
        let share = |read_only| ShareDevice {
            tag: if read_only { "ro".to_owned() } else { "rw".to_owned() },
            path: dir.clone(),
            read_only,
            transport: ShareTransport::NineP,
            caching: Caching::Fixed,
        };
        let line = line(|config| config.share(share(true)).share(share(false)));
        let fsdevs = values(&line, "-fsdev");
        assert!(fsdevs[0].contains("/a,,b,") && fsdevs[0].ends_with(",readonly=on"));
        assert!(!fsdevs[1].contains("readonly"));
        let devices = values(&line, "-device");
        assert!(devices.contains(&"virtio-9p-pci,fsdev=share1,mount_tag=rw"), "{devices:?}");
    }

    #[test]
    fn disks_are_written_to_as_is_asked_for_and_commas_survive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a,b");
        std::fs::write(&path, "").unwrap();
        let disk = |serial: &str, format, writes| DiskDevice {
            serial: serial.to_owned(),
            path: path.clone(),
            format,
            writes,
            keep: None,
            serve: None,
        };
        let line = line(|config| {
            config
                .disk(disk("one", ImageFormat::Qcow2, DiskWrites::Discarded))
                .disk(disk("two", ImageFormat::Raw, DiskWrites::Kept))
                .disk(disk("three", ImageFormat::Raw, DiskWrites::Refused))
        });
        let drives = values(&line, "-drive");
        assert!(drives[0].contains("format=qcow2,snapshot=on,") && drives[0].ends_with("/a,,b"));
        assert!(!drives[1].contains("snapshot=on") && !drives[1].contains("readonly=on"));
        assert!(drives[2].contains("format=raw,readonly=on,"), "{drives:?}");
        let devices = values(&line, "-device");
        assert!(
            devices
                .contains(&"virtio-blk-pci,drive=disk-two,serial=two,werror=report,rerror=report"),
            "{devices:?}"
        );
    }

    #[test]
    fn firmware_starts_the_first_disk_and_keeps_nothing_of_its_variables() {
        let file = std::env::current_exe().unwrap();
        let firmware = Firmware::Uefi {
            code: file.clone(),
            vars: file.clone(),
            format: ImageFormat::Raw,
            smm: true,
        };
        let boot = FirmwareBoot { firmware, oem_strings: vec!["a,b".to_owned()] };
        let disk = DiskDevice {
            serial: "root".to_owned(),
            path: file,
            format: ImageFormat::Raw,
            writes: DiskWrites::Discarded,
            keep: None,
            serve: None,
        };
        let config = VmConfigBuilder::new(boot).machine(Machine::Q35).disk(disk).build().unwrap();
        let line = words(&config, Some(12));
        let drives = values(&line, "-drive");
        assert!(drives[0].starts_with("if=pflash,unit=0,") && drives[0].contains("readonly=on"));
        assert!(drives[1].starts_with("if=pflash,unit=1,") && drives[1].contains("snapshot=on"));
        assert!(values(&line, "-machine")[0].ends_with(",smm=on"), "{line:?}");
        assert_eq!(values(&line, "-smbios"), ["type=11,value=a,,b"]);
        let devices = values(&line, "-device");
        for wanted in [
            "virtio-blk-pci,drive=disk-root,serial=root,werror=report,rerror=report,bootindex=0",
            "virtserialport,chardev=qga,name=org.qemu.guest_agent.0",
        ] {
            assert!(devices.contains(&wanted), "{wanted}: {devices:?}");
        }
        assert!(values(&line, "-kernel").is_empty(), "{line:?}");
    }

    #[test]
    fn file_servers_share_the_guests_memory() {
        let dir = tempfile::tempdir().unwrap();
        let share = |tag: &str, transport| ShareDevice {
            tag: tag.to_owned(),
            path: dir.path().to_owned(),
            read_only: false,
            transport,
            caching: Caching::Coherent,
        };
        let shares = |config: VmConfigBuilder| {
            config
                .share(share("one", ShareTransport::VirtioFs))
                .share(share("two", ShareTransport::NineP))
                .share(share("three", ShareTransport::VirtioFs))
                .memory(Bytes(512 * MIB))
        };
        let one_node = line(shares);
        assert!(values(&one_node, "-machine")[0].ends_with(",memory-backend=ram"));
        let memory = "memory-backend-memfd,id=ram,size=512M,share=on";
        assert_eq!(values(&one_node, "-object"), [memory]);
        let devices = values(&one_node, "-device");
        assert!(
            devices
                .iter()
                .any(|device| device.starts_with("vhost-user-fs-pci,chardev=share2,tag=three"))
        );
        assert!(values(&one_node, "-chardev").contains(&"socket,id=share2,fd=11"));
        let topology = Topology { nodes: 2, llcs: 1, cores: 1, threads: 1 };
        let nodes = line(|config| shares(config).machine(Machine::Q35).topology(topology));
        assert!(!values(&nodes, "-machine")[0].contains("memory-backend"));
        let objects = values(&nodes, "-object");
        assert_eq!(objects[1], "memory-backend-memfd,id=node1,size=256M,share=on");
    }

    #[test]
    fn disks_of_our_own_are_connections_behind_those_of_shares() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, "").unwrap();
        let disk = |serial: &str, serve| DiskDevice {
            serial: serial.to_owned(),
            path: path.clone(),
            format: ImageFormat::Raw,
            writes: DiskWrites::Kept,
            serve,
            keep: None,
        };
        let share = ShareDevice {
            tag: "one".to_owned(),
            path: dir.path().to_owned(),
            read_only: false,
            transport: ShareTransport::VirtioFs,
            caching: Caching::Coherent,
        };
        let options = vmlab_devices::blk::Options { queues: 3, ..Default::default() };
        let disks = |config: VmConfigBuilder| {
            config.disk(disk("a", None)).disk(disk("b", Some(options.clone())))
        };
        let line = line(|config| disks(config).share(share));
        assert!(values(&line, "-chardev").contains(&"socket,id=share0,fd=10"), "{line:?}");
        assert!(values(&line, "-chardev").contains(&"socket,id=disk-b,fd=11"), "{line:?}");
        assert_eq!(values(&line, "-drive").len(), 1, "{line:?}");
        let device = "vhost-user-blk-pci,chardev=disk-b,num-queues=3,queue-size=256";
        assert!(values(&line, "-device").contains(&device), "{line:?}");
        assert!(values(&line, "-object")[0].ends_with(",share=on"), "{line:?}");
    }

    #[test]
    fn a_vsock_is_the_last_connection() {
        let vsock = VsockDevice { dir: "/run/x".into() };
        let line = line(|config| config.vsock(vsock));
        assert!(values(&line, "-chardev").contains(&"socket,id=vsock,fd=10"), "{line:?}");
        assert!(values(&line, "-device").contains(&"vhost-user-vsock-pci,chardev=vsock"));
        assert!(values(&line, "-object")[0].ends_with(",share=on"), "{line:?}");
    }

    #[test]
    fn a_serial_channel_is_the_second_serial_port() {
        let line = line(|config| config.machine(Machine::Q35).channel(AgentChannel::Serial));
        assert_eq!(values(&line, "-serial"), ["chardev:console", "chardev:agent"]);
        assert!(!line.iter().any(|word| word.contains("virtserialport")));
    }

    #[test]
    fn a_network_is_there_only_when_asked_for() {
        assert!(values(&line(|config| config), "-netdev").is_empty());
        let line = line(|config| config.network(NetworkMode::User));
        assert_eq!(values(&line, "-netdev"), ["user,id=net"]);
    }

    #[test]
    fn networks_of_vms_are_sockets_and_known_by_their_addresses() {
        let lan = |last| LanDevice { mac: MacAddress([0x02, 0x76, 10, 77, 1, last]) };
        let line = line(|config| config.network(NetworkMode::User).lan(lan(1)).lan(lan(2)));
        let sockets = ["user,id=net", "socket,id=lan0,fd=20", "socket,id=lan1,fd=21"];
        assert_eq!(values(&line, "-netdev"), sockets);
        let device = "virtio-net-pci,netdev=lan1,mac=02:76:0a:4d:01:02,romfile=";
        assert!(values(&line, "-device").contains(&device), "{line:?}");
    }
}
