//! Which devices a VM has, and in which slots.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vmlab_devices::Device;
use vmlab_devices::console::{Console, Port};
use vmlab_devices::net::Passt;
use vmlab_devices::net::{Datagrams, MacAddress, Net, Stream};

use super::super::served::{self, FileServer};
use super::super::{DeviceId, HypervisorError, resource};
use crate::config::{AgentChannel, DiskDevice, NetworkMode, VmConfig};
use crate::lan::LanPort;

/// Name of the port that the agent looks for.
const AGENT_PORT: &str = "vmlab";

/// The slot of the console, which carries the channel to the agent.
const CONSOLE: usize = 0;

/// The address of the interface on the user's network: what QEMU gives its first.
const USER_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// A device that has its slot.
pub(super) struct Placed {
    pub(super) slot: usize,
    /// What it is to a run; none of the console, which every VM has.
    pub(super) id: Option<DeviceId>,
    pub(super) device: Arc<dyn Device>,
    /// What it is for a person.
    pub(super) what: String,
}

/// All devices of a VM, and what has to be there as long as they are.
#[derive(Default)]
pub(super) struct Devices {
    pub(super) placed: Vec<Placed>,
    /// The file servers, by the tags of their shares.
    pub(super) shares: Vec<FileServer>,
    pub(super) passt: Option<Passt>,
}

/// What devices are made with.
pub(super) struct Making<'a> {
    pub(super) config: &'a VmConfig,
    /// How many VMs the process has file servers for.
    pub(super) vms: usize,
    /// Whether a guest's sync(2) waits for the host's disks.
    pub(super) durable: &'a Arc<AtomicBool>,
    /// File servers that the guest goes on with.
    pub(super) known: &'a [FileServer],
    pub(super) lans: &'a [Arc<LanPort>],
    /// Is told when the user's network cannot go on, and what it said.
    pub(super) network_ended: Box<dyn FnOnce(&str) + Send>,
}

impl Making<'_> {
    /// Makes them. `slot` says where each is that a run brings; there is none for those that have no room.
    pub(super) fn devices(
        self,
        agent: Option<UnixStream>,
        mut slot: impl FnMut(&DeviceId) -> Result<usize, HypervisorError>,
    ) -> Result<Devices, HypervisorError> {
        let Self { config, vms, durable, known, lans, network_ended } = self;
        let mut devices = Devices::default();
        if let (AgentChannel::Virtio, Some(agent)) = (config.channel, agent) {
            let console = Console::new(vec![Port::channel(AGENT_PORT).with_stream(agent)]);
            let console = console.map_err(resource("a console"))?.sandbox(config.sandbox);
            devices.placed.push(Placed {
                slot: CONSOLE,
                id: None,
                device: Arc::new(console),
                what: "the channel to the agent".to_owned(),
            });
        }
        let mut place = |id: DeviceId, device: Arc<dyn Device>, what: String| {
            let placed = Placed { slot: slot(&id)?, id: Some(id), device, what };
            devices.placed.push(placed);
            Ok::<_, HypervisorError>(())
        };
        let descriptors = served::descriptors(vms * config.served_shares().count());
        for share in config.served_shares() {
            let source = |source| HypervisorError::Share { path: share.path.clone(), source };
            let device = match known.iter().find(|(tag, _)| *tag == share.tag) {
                Some((_, known)) => served::duplicate(known, durable),
                None => served::share(share, config.sandbox, descriptors, durable),
            };
            let device = device.map_err(source)?;
            devices.shares.push((share.tag.clone(), Arc::clone(&device)));
            let id = DeviceId::Share(share.tag.clone());
            place(id, device, served::name_of_share(share))?;
        }
        match config.network {
            NetworkMode::None => {}
            NetworkMode::User => {
                let (passt, socket) =
                    Passt::start(network_ended).map_err(HypervisorError::Network)?;
                devices.passt = Some(passt);
                let net = Net::new(Box::new(Stream::new(socket)), MacAddress(USER_MAC), None);
                let net = net.sandbox(config.sandbox);
                place(DeviceId::Network, Arc::new(net), "the network".to_owned())?;
            }
        }
        for (lan, port) in config.lans.iter().zip(lans) {
            let socket = port.device().try_clone_to_owned().map_err(resource("a port"))?;
            let net = Net::new(Box::new(Datagrams::new(socket)), lan.mac, None);
            let net = net.sandbox(config.sandbox);
            let what = format!("the network interface {}", lan.mac);
            place(DeviceId::Lan(lan.mac), Arc::new(net), what)?;
        }
        for disk in &config.disks {
            let (id, device, what) = self::disk(disk, config.sandbox)?;
            place(id, device, what)?;
        }
        if let Some(vsock) = &config.vsock {
            let (device, what) = served::vsock(vsock, config.sandbox)?;
            place(DeviceId::Vsock, device, what)?;
        }
        if config.rng {
            let (device, what) = served::rng(config.sandbox);
            place(DeviceId::Rng, device, what)?;
        }
        Ok(devices)
    }
}

/// A disk's device, and what it is for a person.
pub(super) fn disk(
    disk: &DiskDevice,
    sandbox: bool,
) -> Result<(DeviceId, Arc<dyn Device>, String), HypervisorError> {
    let options = disk.serve.clone().unwrap_or_default();
    let (device, what) = served::disk(disk, &options, sandbox)?;
    Ok((DeviceId::Disk(disk.serial.clone()), device, what))
}
