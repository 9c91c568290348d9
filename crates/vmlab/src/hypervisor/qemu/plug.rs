//! Devices that are plugged in and taken out, and snapshots, for which those are taken out that this process
//! serves.
//!
//! The guest is not asked: to the bridge's controller, which nobody has switched them on by, devices are not in
//! use. It is the agent that has the guest's kernel find and forget them.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::{DeviceId, HypervisorError, Memory, RunDevices, Snapshot, VmHandle, resource};
use super::devices::{PLACES, device_slot, devices, disk_device, disk_id, plug_id};
use super::files::Servers;
use super::process::QemuVm;
use crate::config::{DiskDevice, VmConfig};
use crate::sync::lock;

/// How long QEMU may take to write the state of its devices. It has some 100 kB and takes 10 ms; this only
/// bounds a fault, also where QEMU itself is emulated on a busy machine.
const STATE_TIME: Duration = Duration::from_secs(30);

/// The same for taking devices out of a VM.
const UNPLUG_TIME: Duration = Duration::from_secs(30);

/// The longest state of devices that is believed.
const MAX_STATE: u64 = 256 * 1024 * 1024;

/// A device behind the bridge.
#[derive(Debug, Clone)]
pub(super) struct Plugged {
    pub(super) place: u32,
    id: DeviceId,
    served: bool,
}

impl QemuVm {
    /// Gives a VM the devices of its run, each at its place.
    pub(super) fn plug_in(
        &self,
        config: &VmConfig,
        mut place: impl FnMut(&DeviceId) -> Option<u32>,
    ) -> Result<(), HypervisorError> {
        for device in devices(config) {
            let place = place(&device.id).ok_or(HypervisorError::Full { most: PLACES })?;
            if !self.on_bridge.iter().any(|(_, id)| *id == device.id) {
                let added = self.shared.qmp.run("device_add", device.to_plug(place), None);
                added.map_err(|error| of_disk(error, &device.id, config))?;
            }
            let (id, served) = (device.id, device.served);
            lock(&self.plugged).push(Plugged { place, id, served });
        }
        Ok(())
    }

    pub(super) fn attach(&self, disk: &DiskDevice) -> Result<(), HypervisorError> {
        let (qmp, backend) = (&self.shared.qmp, disk_id(&disk.serial));
        let place = {
            let plugged = lock(&self.plugged);
            let free = |place: &u32| plugged.iter().all(|device| device.place != *place);
            (0..PLACES).find(free).ok_or(HypervisorError::Full { most: PLACES })?
        };
        let server = Servers::of_disk(disk, self.sandbox)?;
        let (ours, theirs) = UnixStream::pair().map_err(resource("sockets"))?;
        for server in server.serve(vec![ours]).map_err(resource("a server of a disk"))? {
            self.shared.watch(server);
        }
        // If QEMU does not take its end, the server ends without it.
        lock(&self.shared.leaving).insert(backend.clone());
        qmp.give(&backend, theirs.as_fd())?;
        drop(theirs);
        let address = json!({"type": "fd", "data": {"str": backend}});
        let socket = json!({"type": "socket", "data": {"addr": address, "server": false}});
        let added = qmp.run("chardev-add", json!({"id": backend, "backend": socket}), None);
        if let Err(error) = added {
            // It may have been closed with the failure.
            let _ = qmp.run("closefd", json!({"fdname": backend}), None);
            return Err(error);
        }
        lock(&self.shared.leaving).remove(&backend);
        let device = disk_device(disk);
        if let Err(error) = qmp.run("device_add", device.to_plug(place), None) {
            self.let_go(&backend)?;
            return Err(error);
        }
        let (id, served) = (device.id, device.served);
        lock(&self.plugged).push(Plugged { place, id, served });
        Ok(())
    }

    /// A disk that can be taken out.
    pub(super) fn plugged_disk(&self, serial: &str) -> Option<Plugged> {
        let wanted = DeviceId::Disk(serial.to_owned());
        let plugged = lock(&self.plugged);
        plugged.iter().find(|device| device.served && device.id == wanted).cloned()
    }

    pub(super) fn detach(&self, serial: &str) -> Result<(), HypervisorError> {
        let device = self.plugged_disk(serial);
        let device =
            device.ok_or_else(|| HypervisorError::NoSuchDisk { serial: serial.to_owned() })?;
        let backend = disk_id(serial);
        // Its server's end is that of nothing else.
        lock(&self.shared.leaving).insert(backend.clone());
        self.take_out(std::slice::from_ref(&device)).inspect_err(|_| {
            lock(&self.shared.leaving).remove(&backend);
        })?;
        lock(&self.plugged).retain(|other| other.place != device.place);
        self.let_go(&backend)
    }

    /// Ends the server of a device that is out.
    fn let_go(&self, backend: &str) -> Result<(), HypervisorError> {
        lock(&self.shared.leaving).insert(backend.to_owned());
        self.shared.qmp.run("chardev-remove", json!({"id": backend}), None)?;
        let until = Instant::now() + UNPLUG_TIME;
        match self.shared.wait_left(backend, until) {
            true => Ok(()),
            false => {
                let said = "its server does not end".to_owned();
                Err(HypervisorError::Command { command: "chardev-remove", said })
            }
        }
    }

    fn take_out(&self, plugged: &[Plugged]) -> Result<(), HypervisorError> {
        let qmp = &self.shared.qmp;
        let until = Instant::now() + UNPLUG_TIME;
        for device in plugged {
            qmp.forget_unplugged(&plug_id(device.place));
            qmp.run("device_del", json!({"id": plug_id(device.place)}), None)?;
        }
        plugged.iter().try_for_each(|device| qmp.wait_unplugged(&plug_id(device.place), until))
    }

    /// Where each device is.
    fn places(&self) -> Vec<(u32, DeviceId)> {
        lock(&self.plugged).iter().map(|it| (it.place, it.id.clone())).collect()
    }

    /// Devices that are served by this process, in the order of their places.
    fn served(&self) -> Vec<Plugged> {
        let mut served: Vec<_> =
            lock(&self.plugged).iter().filter(|device| device.served).cloned().collect();
        served.sort_by_key(|device| device.place);
        served
    }

    pub(super) fn served_slots(&self) -> Vec<u8> {
        self.served().iter().map(|device| device_slot(device.place)).collect()
    }

    pub(super) fn take_snapshot(&self) -> Result<Snapshot, HypervisorError> {
        const COMMAND: &str = "migrate";
        let failed = |said: String| HypervisorError::Command { command: COMMAND, said };
        if self.memory.is_empty() {
            return Err(failed("it was not started for a snapshot".to_owned()));
        }
        if self.in_run {
            // Its devices must not change while they are taken out.
            self.pause()?;
        }
        self.take_out(&self.served())?;
        let (ours, theirs) = UnixStream::pair().map_err(resource("sockets"))?;
        ours.set_read_timeout(Some(STATE_TIME)).map_err(resource("sockets"))?;
        self.shared.qmp.give("state", theirs.as_fd())?;
        drop(theirs);
        self.shared.qmp.run(COMMAND, json!({"uri": "fd:state"}), None)?;
        let mut state = Vec::new();
        let read = ours.take(MAX_STATE).read_to_end(&mut state);
        read.map_err(|e| failed(format!("its state cannot be read ({e})")))?;
        let result = self.shared.qmp.run("query-migrate", json!({}), None)?;
        match result.get("status").and_then(Value::as_str) {
            // QEMU closes the stream a moment before it says that it is complete.
            Some("completed" | "device" | "active") if !state.is_empty() => {}
            status => {
                let why = result.get("error-desc").and_then(Value::as_str);
                let status = status.unwrap_or("unknown");
                let said = why.map_or_else(|| format!("its status is {status}"), str::to_owned);
                return Err(failed(said));
            }
        }
        let memory = self.memory.iter().cloned();
        let run = self
            .in_run
            .then(|| RunDevices::of(self.places(), &self.file_servers, &self.durable))
            .transpose()?;
        Ok(Snapshot {
            state: state.into(),
            // What goes on from the midst of a run may do so again.
            memory: match run {
                Some(_) => memory.map(Memory::Template).collect(),
                None => memory.map(Memory::Own).collect(),
            },
            console: self.shared.console.kept_after(&self.said_before).into(),
            shares: self.shares,
            kept: 0,
            run: run.map(Arc::new),
            hints: None,
        })
    }
}

/// A failure to plug in, in terms of the disk whose device it was.
fn of_disk(error: HypervisorError, id: &DeviceId, config: &VmConfig) -> HypervisorError {
    let DeviceId::Disk(serial) = id else { return error };
    let disk = config.disks.iter().find(|disk| disk.serial == *serial);
    match (error, disk) {
        (HypervisorError::Command { said, .. }, Some(disk)) => {
            HypervisorError::Disk { said: format!("{}: {said}", disk.path.display()) }
        }
        (error, _) => error,
    }
}
