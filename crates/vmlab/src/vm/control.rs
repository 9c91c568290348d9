//! What is done to a VM from outside while it runs.

use std::time::{Duration, Instant};

use vmlab_artifacts::image::ImageFormat;
use vmlab_wire::HostMessage;
use vmlab_wire::message::Failure;

use super::evidence;
use crate::config::{ConfigError, check_disks};
use crate::disk::{self, Disk};
use crate::guest::Lost;
use crate::hypervisor::{HypervisorError, VmState};
use crate::{Error, Vm};

/// How long a guest may take to find a disk and mount it, or to write it back and let it go.
const DISK_TIME: Duration = Duration::from_secs(60);

impl Vm {
    /// Stops all CPUs. To the guest no time passes; what is asked of it waits until [`resume`](Self::resume).
    ///
    /// # Errors
    /// When the VM has ended.
    pub fn pause(&self) -> Result<(), Error> {
        Ok(self.handle.pause()?)
    }

    /// Lets the CPUs go on.
    ///
    /// # Errors
    /// When the VM has ended.
    pub fn resume(&self) -> Result<(), Error> {
        Ok(self.handle.resume()?)
    }

    /// Plugs a disk into a [pluggable](crate::VmBuilder::pluggable) VM, and has the guest find it and mount it
    /// where a disk like it is mounted from the start. Its content has to be raw.
    ///
    /// # Errors
    /// When the disk cannot be made or used, another one has its name, or the guest cannot take it into use;
    /// it is out again then.
    pub fn attach(&mut self, disk: Disk) -> Result<(), Error> {
        self.check_pluggable()?;
        let index = self.prepared.disks.len();
        let serial = disk.serial(index);
        let disk = disk.named(&serial);
        disk.check()?;
        if self.prepared.config.disks.iter().any(|other| other.serial == serial) {
            return Err(ConfigError::DuplicateSerial { serial }.into());
        }
        let mut disks = self.prepared.disks.clone();
        disks.push(disk);
        let (cache, leases) = (&self.prepared.cache, &self.prepared.leases);
        let device = disk::device(&self.prepared.builder, &disks, index, (cache, leases))?;
        if device.format != ImageFormat::Raw {
            return Err(disks[index].wrong("a disk that is plugged in has to be raw"));
        }
        let mut device = [device];
        disk::serve_all(&mut device);
        check_disks(&device)?;
        let own = disk::give_each_its_own(&mut device)?;
        let for_guest = disks[index].for_guest(index);
        let [device] = device;
        self.handle.attach_disk(&device).inspect_err(|_| own.keep_none())?;
        if let Err(error) = self.ask(&HostMessage::Attach(for_guest.clone()), DISK_TIME) {
            // What is wrong is said already.
            let _ = self.handle.detach_disk(&serial);
            own.keep_none();
            return Err(error);
        }
        self.own_disks.push(own.into());
        self.prepared.disks = disks;
        self.prepared.config.disks.push(device);
        self.prepared.setup.disks.push(for_guest);
        Ok(())
    }

    /// Has the guest unmount a disk and forget it, and takes it out of a [pluggable](crate::VmBuilder::pluggable)
    /// VM. All that was written to it is in its file then, if there is one that stays.
    ///
    /// # Errors
    /// When there is no such disk, or it is in use in the guest; it stays then.
    pub fn detach(&mut self, name: &str) -> Result<(), Error> {
        self.check_pluggable()?;
        // Before the guest lets go of it.
        if !self.handle.can_detach(name) {
            return Err(HypervisorError::NoSuchDisk { serial: name.to_owned() }.into());
        }
        self.ask(&HostMessage::Detach(name.to_owned()), DISK_TIME)?;
        self.handle.detach_disk(name)?;
        self.prepared.config.disks.retain(|disk| disk.serial != name);
        self.prepared.setup.disks.retain(|disk| disk.serial != name);
        Ok(())
    }

    pub(super) fn check_pluggable(&self) -> Result<(), Error> {
        match self.prepared.config.pluggable {
            true => Ok(()),
            false => Err(HypervisorError::NotPluggable.into()),
        }
    }

    /// Has the guest do something that it says the end of.
    pub(super) fn ask(&self, message: &HostMessage, time: Duration) -> Result<(), Error> {
        if self.handle.state() == VmState::Paused {
            return Err(Error::Paused);
        }
        let asked = self.connection.ask(message);
        asked.map_err(|error| self.lost(Lost::Protocol(error.to_string())))?;
        self.answer(time)
    }

    /// Waits for the end of what was asked.
    pub(super) fn answer(&self, time: Duration) -> Result<(), Error> {
        let console = || evidence(&*self.handle, self.came_up);
        match self.connection.wait_done(Some(Instant::now() + time)) {
            Ok(Some(Ok(()))) => Ok(()),
            Ok(Some(Err(Failure { step, detail, .. }))) => {
                Err(Error::Setup { step, detail, console: console() })
            }
            Ok(None) => {
                let console = console();
                // Its answer may still come, and must not be taken for another one.
                self.cut_off();
                Err(Error::NoAnswer { after: time, console })
            }
            Err(lost) => Err(self.lost(lost)),
        }
    }
}
