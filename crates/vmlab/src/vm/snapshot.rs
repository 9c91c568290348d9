//! Snapshots in the midst of a run, and going back to them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vmlab_wire::HostMessage;
use vmlab_wire::message::GoOn;

use crate::config::{DiskDevice, DiskWrites, ShareTransport};
use crate::disk::{OwnDisks, SavedDisk};
use crate::guest::{Connection, Held};
use crate::hypervisor::{Origin, Snapshot};
use crate::prepared::{PreparedVm, clock_ns, entropy, no_entropy};
use crate::{Error, Vm};

/// How long a guest may take to hold, and to go on.
const HOLD_TIME: Duration = Duration::from_secs(60);

/// A VM at one moment: memory, processors, devices, what is on its disks, and which files it has open in
/// shares. It takes as much memory of the host as the guest used then.
#[derive(Debug)]
pub struct VmSnapshot {
    snapshot: Snapshot,
    held: Held,
    prepared: PreparedVm,
    disks: Vec<SavedDisk>,
    own_disks: Vec<Arc<OwnDisks>>,
    run_dir: PathBuf,
}

impl Vm {
    /// Takes a snapshot of a [pluggable](crate::VmBuilder::pluggable) VM, which then goes on. Commands that run in
    /// it, in the background, are part of it.
    ///
    /// Streams of commands that somebody still has are of no use after that: what the commands write is lost.
    ///
    /// What is in the directories of shares is the host's and no part of it. A guest that goes on from the
    /// snapshot sees what has become of them.
    ///
    /// ```no_run
    /// # let builder = vmlab::Vm::builder();
    /// let mut vm = builder.pluggable(true).start()?;
    /// vm.exec(["sh", "-c", "echo 1 > /tmp/state"])?;
    /// let snapshot = vm.snapshot()?;
    /// for input in ["a", "b", "c"] {
    ///     vm.restore(&snapshot)?;
    ///     assert_eq!(vm.exec(["cat", "/tmp/state"])?.stdout, b"1\n");
    ///     vm.exec(["sh", "-c", "echo 2 > /tmp/state", "sh", input])?;
    /// }
    /// # Ok::<(), vmlab::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the VM is none of which one can be taken: see [`NotInSnapshot`](Error::NotInSnapshot). When it has
    /// ended, or the host lacks memory or room for what is on the disks; the VM has then ended, unless it is
    /// the guest that failed to hold.
    pub fn snapshot(&mut self) -> Result<VmSnapshot, Error> {
        self.check_for_snapshot()?;
        let hold = HostMessage::Hold(self.handle.replaced_slots());
        self.ask(&hold, HOLD_TIME).inspect_err(|_| self.connection.open_gate())?;
        let held = self.connection.held();
        let taken = self.handle.snapshot().map_err(Error::Hypervisor).and_then(|snapshot| {
            let own = |disk: &&DiskDevice| matches!(disk.writes, DiskWrites::Cloned(_));
            let disks = self.prepared.config.disks.iter().filter(own);
            let disks = disks.map(|disk| SavedDisk::of(&disk.path)).collect::<Result<_, _>>()?;
            Ok((snapshot, disks))
        });
        // This machine is done: its devices are out.
        self.cut_off();
        let (snapshot, disks) = taken?;
        let snapshot = VmSnapshot {
            snapshot,
            held,
            prepared: self.prepared.clone(),
            disks,
            own_disks: self.own_disks.clone(),
            run_dir: self.run_dir.path().to_owned(),
        };
        self.go_on_from(&snapshot)?;
        Ok(snapshot)
    }

    /// Goes back to a snapshot of this VM, whatever has become of it since: it may even have ended. Its disks
    /// have what they had then.
    ///
    /// # Errors
    /// When it cannot go on from there, it has ended then; when the snapshot is of another VM.
    pub fn restore(&mut self, snapshot: &VmSnapshot) -> Result<(), Error> {
        // Its disks and its places on networks are that VM's.
        if snapshot.run_dir != self.run_dir.path() {
            return Err(Error::OthersSnapshot);
        }
        self.cut_off();
        self.prepared = snapshot.prepared.clone();
        self.own_disks.clone_from(&snapshot.own_disks);
        snapshot.disks.iter().try_for_each(SavedDisk::restore)?;
        self.go_on_from(snapshot)
    }

    fn check_for_snapshot(&self) -> Result<(), Error> {
        let config = &self.prepared.config;
        self.check_pluggable()?;
        let not = |why: String| Err(Error::NotInSnapshot { why });
        if config.boot.kernel().is_none() {
            return not("it starts the system of an image".to_owned());
        }
        if config.shares.iter().any(|share| share.transport == ShareTransport::NineP) {
            return not("its shares are carried by 9p".to_owned());
        }
        // In QEMU another device takes the place of each of these, and nobody would tell the guest.
        let keeps_devices = self.prepared.hypervisor.capabilities().keeps_devices;
        let devices =
            [(config.vsock.is_some(), "a vsock"), (config.rng, "a random number generator")];
        if let Some((_, what)) = devices.iter().find(|(is_there, _)| *is_there && !keeps_devices) {
            return not(format!("it has {what}, which is kept by vmlab's own monitor only"));
        }
        for DiskDevice { serial, writes, serve, .. } in &config.disks {
            let why = match (writes, serve) {
                (_, None) => "is not served by vmlab itself, as it is not raw or has the root",
                (_, Some(options)) if options.record.is_some() => "is recorded",
                (DiskWrites::Kept, _) => "is a file of the host that is written to",
                (DiskWrites::Discarded, _) => {
                    "is too large to be copied for a snapshot (clone=copy does)"
                }
                (DiskWrites::Refused | DiskWrites::Cloned(_), _) => continue,
            };
            return not(format!("its disk `{serial}` {why}"));
        }
        Ok(())
    }

    fn go_on_from(&mut self, from: &VmSnapshot) -> Result<(), Error> {
        let entropy = entropy().map_err(no_entropy)?;
        let (handle, connection) = self.begin_again(|starter, timeline| {
            let origin = Origin::Snapshot(from.snapshot.clone());
            let connect = |socket| {
                let go_on = GoOn { revive: true, clock_ns: clock_ns(), entropy };
                Connection::go_on(socket, &from.held, &HostMessage::GoOn(go_on))
            };
            starter.go_on(origin, connect, timeline)
        })?;
        self.go_on_with(handle, connection, 0);
        self.answer(HOLD_TIME).inspect_err(|_| self.cut_off())
    }
}
