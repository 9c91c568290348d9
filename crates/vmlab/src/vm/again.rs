//! One more start of the same VM.

use std::sync::Arc;

use crate::config::DiskDevice;
use crate::guest::Connection;
use crate::hypervisor::VmHandle;
use crate::lan::claim_all;
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
        self.cut_off();
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
        let Booted { handle, connection, ready, setup, shares, came_up, run_dir: _ } = booted;
        self.prepared.config.shares = shares;
        (self.ready, self.setup) = (ready, setup);
        self.go_on_with(handle, connection, came_up);
        Ok(())
    }

    /// Starts another machine. Its logs are in a directory of their own.
    pub(super) fn begin_again<T>(
        &mut self,
        start: impl FnOnce(&Starter<'_, Nobody>, &mut Timeline) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.starts += 1;
        let name = |start: u32| format!("start-{start}");
        if let Some(old) = self.starts.checked_sub(KEPT_STARTS) {
            // Whoever goes back to a snapshot thousands of times looks at the last ones. The first has no part.
            let _ = std::fs::remove_dir_all(self.run_dir.path().join(name(old)));
        }
        let logs = self.run_dir.part(&name(self.starts))?;
        let prepared = PreparedVm { run_dir: Some(logs), ..self.prepared.clone() };
        let (nobody, deadline): (Nobody, _) = (|_| {}, self.deadline);
        let lans = claim_all(&prepared.lans)?;
        let starter = Starter { prepared: &prepared, started: &nobody, deadline, lans: &lans };
        start(&starter, &mut lock(&self.timeline))
    }

    /// Has another machine in the place of the one that it had. `came_up` is how much was on its console when the
    /// agent had come up.
    pub(super) fn go_on_with(
        &mut self,
        handle: Arc<dyn VmHandle>,
        connection: Arc<Connection>,
        came_up: u64,
    ) {
        (self.handle, self.connection, self.came_up) = (handle, connection, came_up);
        self.prepared.watchers.iter().for_each(|watcher| watcher.ready());
    }
}
