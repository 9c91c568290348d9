//! The devices that a run brings, as QEMU knows them.

use std::fmt;

use serde_json::{Value, json};
use vmlab_devices::blk;

use crate::config::{DiskDevice, NetworkMode, ShareTransport, VmConfig};
use crate::hypervisor::DeviceId;

/// Where devices are plugged into VMs that go on from a snapshot. QEMU does not load the state of a VM that
/// has a `vhost-user-fs` device, and its boards take none on their root bus later. A conventional bridge has
/// 31 places and is cheap for a guest to boot with.
pub(super) const PLUG_BUS: &str = "plug";

/// Requests that a guest may have under way on one share.
const FS_QUEUE_SIZE: u16 = 1024;

/// The name of the back end of a vsock.
pub(super) const VSOCK: &str = "vsock";

/// The name of the back end of a source of random numbers.
pub(super) const RNG: &str = "rng";

/// The name of a share's back end.
pub(super) fn share_id(index: usize) -> String {
    format!("share{index}")
}

/// The same of a disk's.
pub(super) fn disk_id(serial: &str) -> String {
    format!("disk-{serial}")
}

/// The same of a port on a network of VMs.
pub(super) fn lan_id(index: usize) -> String {
    format!("lan{index}")
}

/// The name of the device that is plugged in at a place.
pub(super) fn plug_id(place: u32) -> String {
    format!("plug{place}")
}

/// A device that a run brings: its driver and properties. None of their values has a comma.
pub(super) struct Device {
    pub(super) id: DeviceId,
    /// Whether it is served by this process: the hypervisor has no state of it that could go into a snapshot.
    pub(super) served: bool,
    driver: &'static str,
    properties: Vec<(&'static str, String)>,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.driver)?;
        self.properties.iter().try_for_each(|(name, value)| write!(f, ",{name}={value}"))
    }
}

impl Device {
    /// The same at a place behind the bridge.
    pub(super) fn behind_bridge(&self, place: u32) -> String {
        format!("{self},bus={PLUG_BUS},addr={},id={}", slot(place), plug_id(place))
    }

    /// The arguments of `device_add` that plug it in at a place, from 0 on.
    pub(super) fn to_plug(&self, place: u32) -> Value {
        let slot = slot(place);
        let id = plug_id(place);
        let mut arguments = json!({"driver": self.driver, "bus": PLUG_BUS, "addr": slot, "id": id});
        for (name, value) in &self.properties {
            arguments[name] = match value.parse::<u64>() {
                Ok(number) => number.into(),
                Err(_) => value.as_str().into(),
            };
        }
        arguments
    }
}

/// The places behind the bridge.
pub(super) const PLACES: u32 = 31;

/// The slot of a place. The bridge has none of number 0.
pub(super) fn device_slot(place: u32) -> u8 {
    (place % PLACES) as u8 + 1
}

/// The same as options have it.
fn slot(place: u32) -> String {
    format!("{:#x}", device_slot(place))
}

/// The devices that a run brings, in their order.
pub(super) fn devices(config: &VmConfig) -> Vec<Device> {
    let mut devices = Vec::new();
    for (index, share) in config.shares.iter().enumerate() {
        let backend = share_id(index);
        let (id, tag) = (DeviceId::Share(share.tag.clone()), share.tag.clone());
        devices.push(match share.transport {
            ShareTransport::NineP => Device {
                id,
                served: false,
                driver: "virtio-9p-pci",
                properties: vec![("fsdev", backend), ("mount_tag", tag)],
            },
            ShareTransport::VirtioFs => Device {
                id,
                served: true,
                driver: "vhost-user-fs-pci",
                properties: vec![
                    ("chardev", backend),
                    ("tag", tag),
                    ("queue-size", FS_QUEUE_SIZE.to_string()),
                ],
            },
        });
    }
    match config.network {
        NetworkMode::None => {}
        NetworkMode::User => devices.push(Device {
            id: DeviceId::Network,
            served: false,
            driver: "virtio-net-pci",
            properties: vec![("netdev", "net".to_owned()), ("romfile", String::new())],
        }),
    }
    for (index, lan) in config.lans.iter().enumerate() {
        let properties = vec![
            ("netdev", lan_id(index)),
            ("mac", lan.mac.to_string()),
            ("romfile", String::new()),
        ];
        let id = DeviceId::Lan(lan.mac);
        devices.push(Device { id, served: false, driver: "virtio-net-pci", properties });
    }
    for (index, disk) in config.disks.iter().enumerate() {
        let mut device = disk_device(disk);
        if index == 0 && config.boot.kernel().is_none() {
            device.properties.push(("bootindex", "0".to_owned()));
        }
        devices.push(device);
    }
    if config.vsock.is_some() {
        devices.push(Device {
            id: DeviceId::Vsock,
            served: true,
            driver: "vhost-user-vsock-pci",
            properties: vec![("chardev", VSOCK.to_owned())],
        });
    }
    if config.rng {
        devices.push(Device {
            id: DeviceId::Rng,
            served: true,
            driver: "vhost-user-rng-pci",
            properties: vec![("chardev", RNG.to_owned())],
        });
    }
    devices
}

/// A disk's device.
pub(super) fn disk_device(disk: &DiskDevice) -> Device {
    let (id, backend) = (DeviceId::Disk(disk.serial.clone()), disk_id(&disk.serial));
    match &disk.serve {
        Some(options) => Device {
            id,
            served: true,
            driver: "vhost-user-blk-pci",
            properties: vec![
                ("chardev", backend),
                ("num-queues", options.queues.to_string()),
                ("queue-size", blk::QUEUE_SIZE.to_string()),
            ],
        },
        // Where the host's disk is full, QEMU would stop the VM until somebody looks after it.
        None => Device {
            id,
            served: false,
            driver: "virtio-blk-pci",
            properties: vec![
                ("drive", backend),
                ("serial", disk.serial.clone()),
                ("werror", "report".to_owned()),
                ("rerror", "report".to_owned()),
            ],
        },
    }
}
