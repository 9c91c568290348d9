//! Power cuts: what a disk may have had at each of them, checked in a fresh VM.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use vmlab_artifacts::Cache;
use vmlab_artifacts::cache::Leases;
use vmlab_devices::blk::Options;
use vmlab_devices::blk::crash::{CrashState, Cuts, Log, at_flushes, at_random, rebuild};

use super::clone::unnamed_path;
use super::{Disk, DiskSource};
use crate::config::DiskWrites;
use crate::error::chain;
use crate::{Error, Stdio, Vm, VmBuilder};

/// As much of what a check says as is kept of each state, in bytes.
const OUTPUT_MAX: u64 = 64 * 1024;

/// How many random cuts there are unless it is said.
const RANDOM: usize = 50;

/// The states that a power cut could have left of a disk whose changes were recorded, and a check of each.
#[derive(Debug, Clone)]
pub struct PowerCuts {
    /// The log that the disk was recorded in.
    pub log: PathBuf,
    /// The disk as it was then. It is mounted in the same place; one that was read from a file has to be as it was.
    pub disk: Disk,
    /// Whether there is a cut behind each flush, with nothing lost.
    pub at_flushes: bool,
    /// Cuts at random places, with what was not flushed dropped at random.
    pub at_random: Cuts,
    /// The directory of a log that nobody else is to have.
    _dir: Option<Arc<TempDir>>,
}

/// What came of one state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// The state.
    pub state: CrashState,
    /// Why it does not pass; `None` if the check ended with 0.
    pub failure: Option<String>,
    /// What the check said, on both of its streams, up to 64 KiB.
    pub output: String,
}

impl PowerCuts {
    /// Cuts of a disk that was recorded in this log: behind each flush, and [fifty](Self::at_random) at random.
    pub fn new(log: impl Into<PathBuf>, disk: Disk) -> Self {
        let at_random = Cuts { count: RANDOM, ..Cuts::default() };
        Self { log: log.into(), disk, at_flushes: true, at_random, _dir: None }
    }

    /// Records what happens to a disk: starts a VM with it, has `write` do what it does there, and ends the VM.
    ///
    /// ```no_run
    /// # let builder = vmlab::Vm::builder();
    /// use vmlab::disk::PowerCuts;
    /// use vmlab::units::{Bytes, MIB};
    /// use vmlab::{Disk, Vm};
    ///
    /// let disk = Disk::blank(Bytes(64 * MIB)).filesystem("ext4").named("data");
    /// let sh = |vm: &Vm, script: &str| vm.exec(["sh", "-ec", script]);
    /// let cuts = PowerCuts::record(&builder, disk, |vm| {
    ///     sh(vm, "cd /mnt/data; echo old > a; sync; echo new > b; mv b a; sync")
    /// })?;
    /// // Nobody has flushed the new file before it took the place of the old one.
    /// let states = cuts.check_by(&builder, |vm| {
    ///     let content = sh(vm, "cat /mnt/data/a 2> /dev/null || echo old").map_err(|e| e.to_string())?;
    ///     match content.stdout_text().as_str() {
    ///         "old\n" | "new\n" => Ok(()),
    ///         other => Err(format!("it has {other:?}")),
    ///     }
    /// })?;
    /// assert!(states.iter().any(|state| state.failure.is_some()));
    /// # Ok::<(), vmlab::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of `write`; when the VM does not start, or the log cannot be written.
    pub fn record<T, E: From<Error>>(
        vm: &VmBuilder,
        disk: Disk,
        write: impl FnOnce(&mut Vm) -> Result<T, E>,
    ) -> Result<Self, E> {
        let dir = tempfile::tempdir().map_err(no_directory)?;
        let log = dir.path().join("log");
        let recorded =
            Options { record: Some(log.clone()), ..disk.serve.clone().unwrap_or_default() };
        // First there as it will be in the checks: so it has the same name, place and UUID.
        let mut vm = vm.clone().first_disk(disk.clone().served(recorded)).start()?;
        write(&mut vm)?;
        vm.shutdown()?;
        Ok(Self { _dir: Some(Arc::new(dir)), ..Self::new(log, disk) })
    }

    /// Checks each state that differs from those before, as [`check`](Self::check) does, by what `check` does with a
    /// VM that has the disk as it would be, before those of the builder. An error of `check` is why the state does not pass.
    ///
    /// # Errors
    /// When the log or the disk cannot be read, or a VM not be started for another reason than its disk.
    pub fn check_by(
        &self,
        vm: &VmBuilder,
        mut check: impl FnMut(&mut Vm) -> Result<(), String>,
    ) -> Result<Vec<Checked>, Error> {
        let check = |vm: &mut Vm| Ok((check(vm).err(), String::new()));
        self.check_states(vm, check, |_, _, _| {})
    }

    /// Checks each state that differs from those before: boots a VM with the disk as it would be, mounts it and runs
    /// `check`. A filesystem that cannot be mounted does not pass. `each` is told of each, with its number and how
    /// many there are.
    ///
    /// # Errors
    /// When the log or the disk cannot be read, or a VM not be started for another reason.
    pub fn check(
        &self,
        vm: &VmBuilder,
        check: &[OsString],
        each: impl FnMut(usize, usize, &Checked),
    ) -> Result<Vec<Checked>, Error> {
        self.check_states(vm, |vm| run(vm, check), each)
    }

    fn check_states(
        &self,
        vm: &VmBuilder,
        mut check: impl FnMut(&mut Vm) -> Result<Found, Error>,
        mut each: impl FnMut(usize, usize, &Checked),
    ) -> Result<Vec<Checked>, Error> {
        let wrong = |error: &dyn std::error::Error| Error::PowerCuts {
            log: self.log.clone(),
            why: chain(error),
        };
        if matches!(self.disk.source, DiskSource::File(_)) && self.disk.writes == DiskWrites::Kept {
            let log = self.log.clone();
            let why = "the disk was written to, and is not as it was any more: record it with mode=discard";
            return Err(Error::PowerCuts { log, why: why.to_owned() });
        }
        let log = Log::open(&self.log).map_err(|error| wrong(&error))?;
        let leases = Leases::default();
        let cache = vm.cache()?;
        let base = self.base(vm, (&cache, &leases))?;
        let states = self.states(&log);
        let dir = tempfile::tempdir().map_err(no_directory)?;
        let mut all = Vec::new();
        for (number, state) in states.iter().enumerate() {
            let file = dir.path().join("disk.raw");
            rebuild(&base, &log, state, &file).map_err(|error| wrong(&error))?;
            // Without a name, it is gone with this process, however that ends.
            let io = |source| Error::Io { what: "use", path: file.clone(), source, hint: "" };
            let held = File::options().read(true).write(true).open(&file).map_err(io)?;
            std::fs::remove_file(&file).map_err(io)?;
            let (failure, output) = self.look(vm, &mut check, &unnamed_path(&held))?;
            let checked = Checked { state: state.clone(), failure, output };
            each(number + 1, states.len(), &checked);
            all.push(checked);
        }
        Ok(all)
    }

    /// The states, each once.
    fn states(&self, log: &Log) -> Vec<CrashState> {
        let mut seen = HashSet::new();
        let flushes = at_flushes(log.entries()).filter(|_| self.at_flushes);
        let all = flushes.chain(at_random(log.entries(), self.at_random));
        // Where the cut was makes no difference, only what is there.
        all.filter(|state| seen.insert((state.durable, format!("{:?}", state.survivors)))).collect()
    }

    /// The disk as it was before anything was written to it.
    fn base(&self, vm: &VmBuilder, cache: (&Cache, &Leases)) -> Result<PathBuf, Error> {
        let disk = Disk { serve: None, keep: None, ..self.disk.clone() };
        let devices = super::devices(vm, &[disk], cache)?;
        Ok(devices.into_iter().next().map(|device| device.path).unwrap_or_default())
    }

    /// Runs the check on one state. Returns why it does not pass, and what it said.
    fn look(
        &self,
        vm: &VmBuilder,
        check: &mut impl FnMut(&mut Vm) -> Result<Found, Error>,
        file: &Path,
    ) -> Result<Found, Error> {
        let disk = Disk {
            source: DiskSource::File(file.to_owned()),
            writes: DiskWrites::Kept,
            keep: None,
            serve: None,
            was: Some(self.disk.source.clone()),
            ..self.disk.clone()
        };
        match vm.clone().first_disk(disk).start() {
            Ok(mut vm) => check(&mut vm),
            // A guest that breaks over its disk is what is looked for.
            Err(
                error @ (Error::Setup { .. } | Error::Ended { .. } | Error::BootTimeout { .. }),
            ) => Ok((Some(chain(&error)), String::new())),
            Err(error) => Err(error),
        }
    }
}

/// Why a state does not pass, and what the check said.
type Found = (Option<String>, String);

fn no_directory(source: io::Error) -> Error {
    let path = std::env::temp_dir();
    Error::Io { what: "make a directory for disks in", path, source, hint: "" }
}

/// Runs a command that checks the disk.
fn run(vm: &Vm, check: &[OsString]) -> Result<Found, Error> {
    let [program, arguments @ ..] = check else { return Ok((None, String::new())) };
    let command = vm.command(program).args(arguments).stdin(Stdio::Null).merge_stderr();
    let mut child = command.spawn()?;
    let mut said = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        // The rest has to go somewhere. What cannot be read, the end tells.
        let _ = stdout.by_ref().take(OUTPUT_MAX).read_to_end(&mut said);
        let _ = io::copy(&mut stdout, &mut io::sink());
    }
    let said = String::from_utf8_lossy(&said).into_owned();
    match child.wait() {
        Ok(status) => Ok(((!status.success()).then(|| status.to_string()), said)),
        Err(error @ Error::Ended { .. }) => Ok((Some(chain(&error)), said)),
        Err(error) => Err(error),
    }
}
