//! One more start of the same VM.

use std::sync::Arc;

use crate::config::DiskDevice;
use crate::hypervisor::{ExitReason, VmHandle};
use crate::lan::Membership;
use crate::prepared::PreparedVm;
use crate::start::{Booted, Starter};
use crate::sync::lock;
use crate::timings::Timeline;
use crate::{Error, Vm};

/// The logs of how many starts of one VM are kept, beside those of the first.
const KEPT_STARTS: u32 = 32;

/// Whoever watches is known to the VM.
type Nobody = fn(&Arc<dyn VmHandle>);

impl Vm {
    /// Presses the reset button: the guest is cut off where it is, or had ended already, and the same VM starts
    /// again. What its disks have been told to write is there, as after a crash of its system; its memory is
    /// lost, and what was written to the layer over its root with it. Disks that discard what is written to them are
    /// as at first again: so is an image whose system the VM starts.
    ///
    /// ```no_run
    /// # let builder = vmlab::Vm::builder();
    /// use vmlab::Disk;
    /// use vmlab::units::{Bytes, MIB};
    ///
    /// let disk = Disk::blank(Bytes(256 * MIB)).filesystem("ext4").named("data");
    /// let mut vm = builder.disk(disk).start()?;
    /// vm.exec(["sh", "-c", "echo precious > /mnt/data/file && sync"])?;
    /// // The kernel panics, and the VM with it.
    /// let _ = vm.exec(["sh", "-c", "echo c > /proc/sysrq-trigger"]);
    /// vm.reset()?;
    /// assert_eq!(vm.exec(["cat", "/mnt/data/file"])?.stdout, b"precious\n");
    /// # Ok::<(), vmlab::Error>(())
    /// ```
    ///
    /// # Errors
    /// When it does not start again: it has ended then, and another reset may bring it back. When one of its
    /// disks is recorded.
    pub fn reset(&mut self) -> Result<(), Error> {
        self.check_again()?;
        self.connection.close();
        self.handle.kill(ExitReason::Killed);
        self.start_again()
    }

    /// Ends the VM as [`shutdown`](Self::shutdown) does, and starts it again with the same disks.
    ///
    /// # Errors
    /// As those of [`shutdown`](Self::shutdown) and [`reset`](Self::reset).
    pub fn restart(&mut self) -> Result<(), Error> {
        self.check_again()?;
        self.shutdown()?;
        self.start_again()
    }

    fn check_again(&self) -> Result<(), Error> {
        let recorded = |disk: &&DiskDevice| {
            disk.serve.as_ref().is_some_and(|options| options.record.is_some())
        };
        match self.prepared.config.disks.iter().find(recorded) {
            Some(disk) => Err(Error::RecordedDisk { serial: disk.serial.clone() }),
            None => Ok(()),
        }
    }

    fn start_again(&mut self) -> Result<(), Error> {
        let booted = self.begin_again(|starter, timeline| starter.start(timeline))?;
        self.go_on_with(booted);
        Ok(())
    }

    /// Starts another machine. Its logs are in a directory of their own.
    pub(super) fn begin_again(
        &mut self,
        start: impl FnOnce(&Starter<'_, Nobody>, &mut Timeline) -> Result<Booted, Error>,
    ) -> Result<Booted, Error> {
        self.starts += 1;
        let name = |start: u32| format!("start-{start}");
        if let Some(old) = self.starts.checked_sub(KEPT_STARTS) {
            // Whoever goes back to a snapshot thousands of times looks at the last ones. The first has no part.
            let _ = std::fs::remove_dir_all(self.run_dir.path().join(name(old)));
        }
        let logs = self.run_dir.part(&name(self.starts))?;
        let prepared = PreparedVm { run_dir: Some(logs), ..self.prepared.clone() };
        let (nobody, deadline): (Nobody, _) = (|_| {}, self.deadline);
        let lans = prepared.lans.iter().map(Membership::claim).collect::<Result<Vec<_>, _>>()?;
        let starter = Starter { prepared: &prepared, started: &nobody, deadline, lans: &lans };
        start(&starter, &mut lock(&self.timeline))
    }

    /// Takes the place of the machine that it had.
    pub(super) fn go_on_with(&mut self, booted: Booted) {
        let Booted { handle, connection, ready, setup, shares, came_up, run_dir: _ } = booted;
        self.prepared.config.shares = shares;
        (self.handle, self.connection) = (handle, connection);
        (self.ready, self.setup, self.came_up) = (ready, setup, came_up);
        self.prepared.watchers.iter().for_each(|watcher| watcher.ready());
    }
}
