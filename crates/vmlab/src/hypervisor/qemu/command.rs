//! The QEMU command line for a [`VmConfig`].

use std::os::fd::RawFd;
use std::path::Path;

use crate::config::{
    Accel, AgentChannel, Machine, NetworkMode, ShareDevice, ShareTransport, Topology, VmConfig,
};
use crate::units::MIB;

/// Name of the virtio port that the agent looks for.
const AGENT_PORT: &str = "vmlab";

/// The descriptors that QEMU inherits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptors {
    pub(super) console: RawFd,
    pub(super) agent: RawFd,
    pub(super) qmp: RawFd,
}

/// QEMU's arguments, without the program. `cpu_log` gets what QEMU says about CPU resets.
pub(super) fn arguments(config: &VmConfig, fds: Descriptors, cpu_log: &Path) -> Vec<String> {
    let mut args = Arguments::default();
    args.flags(&["-nodefaults", "-no-user-config", "-no-reboot"]);
    args.option("-display", "none");
    args.option("-machine", machine(config));
    args.option("-accel", accel(config.accel));
    args.option("-cpu", cpu(config.accel));
    args.option("-m", format!("{}M", config.memory.0 / MIB));
    cpus(&mut args, config);
    args.option("-kernel", text(&config.boot.image));
    args.option("-initrd", text(&config.boot.initramfs));
    args.option("-append", config.boot.command_line.clone());

    args.option("-chardev", format!("socket,id=console,fd={}", fds.console));
    args.option("-serial", "chardev:console");
    args.option("-chardev", format!("socket,id=qmp,fd={}", fds.qmp));
    args.option("-mon", "chardev=qmp,mode=control");
    args.option("-chardev", format!("socket,id=agent,fd={}", fds.agent));
    match config.channel {
        AgentChannel::Virtio => {
            args.option("-device", "virtio-serial-pci,max_ports=2");
            args.option("-device", format!("virtserialport,chardev=agent,name={AGENT_PORT}"));
        }
        AgentChannel::Serial => args.option("-serial", "chardev:agent"),
    }
    for (index, share) in config.shares.iter().enumerate() {
        share_device(&mut args, index, share);
    }
    match config.network {
        NetworkMode::None => {}
        NetworkMode::User => {
            args.option("-netdev", "user,id=net");
            args.option("-device", "virtio-net-pci,netdev=net,romfile=");
        }
    }
    // The only trace that a triple fault leaves under TCG.
    args.option("-d", "cpu_reset");
    args.option("-D", text(cpu_log));
    args.0.extend(config.qemu_args.iter().cloned());
    args.0
}

#[derive(Default)]
struct Arguments(Vec<String>);

impl Arguments {
    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.0.push(name.to_owned());
        self.0.push(value.into());
    }

    fn flags(&mut self, names: &[&str]) {
        self.0.extend(names.iter().map(|&name| name.to_owned()));
    }
}

fn machine(config: &VmConfig) -> &'static str {
    match config.machine {
        Machine::Microvm => "microvm,pcie=on,acpi=on",
        Machine::Q35 => "q35,smbus=off,sata=off,vmport=off",
    }
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

fn cpus(args: &mut Arguments, config: &VmConfig) {
    let Topology { nodes, llcs, cores, threads } = config.topology;
    let total = nodes * llcs * cores * threads;
    let dies = if llcs > 1 { format!(",dies={llcs}") } else { String::new() };
    let shape = format!("{total},sockets={nodes}{dies},cores={cores},threads={threads}");
    args.option("-smp", shape);
    if nodes > 1 {
        let memory = config.memory.0 / u64::from(nodes) / MIB;
        for node in 0..nodes {
            args.option("-object", format!("memory-backend-ram,id=node{node},size={memory}M"));
            args.option("-numa", format!("node,nodeid={node},memdev=node{node}"));
        }
        for node in 0..nodes {
            args.option("-numa", format!("cpu,node-id={node},socket-id={node}"));
        }
    }
}

fn share_device(args: &mut Arguments, index: usize, share: &ShareDevice) {
    match share.transport {
        ShareTransport::NineP => {
            // Only root can give files to others. For everybody else, what the guest's users own
            // belongs to the caller.
            let model = if rustix::process::geteuid().is_root() { "passthrough" } else { "none" };
            let read_only = if share.read_only { ",readonly=on" } else { "" };
            let path = text(&share.path).replace(',', ",,");
            args.option(
                "-fsdev",
                format!(
                    "local,id=share{index},path={path},security_model={model},multidevs=remap{read_only}"
                ),
            );
            args.option(
                "-device",
                format!("virtio-9p-pci,fsdev=share{index},mount_tag={}", share.tag),
            );
        }
    }
}

/// Paths were checked to be UTF-8 when the configuration was built, or are vmlab's own.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
