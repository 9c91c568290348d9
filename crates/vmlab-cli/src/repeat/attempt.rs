//! One run of many: a VM of its own, the command, and what came of it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmlab::hypervisor::ExitReason;
use vmlab::kept::{self, Keeper};
use vmlab::{Error, ExitStatus, Group, PreparedVm, RunDir, Stdio, Vm};

use super::times::written;
use crate::output::explained;
use crate::request::Request;
use crate::run::{Ran, out_of_memory};

/// The variable that tells a command which of the runs it is, from 1.
const NUMBER: &str = "VMLAB_RUN";

/// What all runs under a kernel have in common.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) request: &'a Request,
    pub(super) prepared: &'a PreparedVm,
    pub(super) logs: &'a RunDir,
    pub(super) group: &'a Group,
}

/// A run that is over.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) number: u64,
    pub(super) ran: Ran,
    /// It was ended from outside before it was done, and says nothing.
    pub(super) cancelled: bool,
    /// From before the VM's start until it was gone.
    pub(super) took: Duration,
    /// The command alone, if it came to its end.
    pub(super) command_took: Option<Duration>,
    /// Its logs.
    pub(super) dir: PathBuf,
    /// What the user should know of a run that is shown.
    notes: Vec<String>,
}

impl Plan<'_> {
    /// Makes one run.
    pub(super) fn attempt(&self, number: u64) -> Attempt {
        let name = format!("run-{number:04}");
        let begun = Instant::now();
        let mut attempt = Attempt {
            number,
            ran: Ran { status: Ok(None), report: None },
            cancelled: false,
            took: Duration::ZERO,
            command_took: None,
            dir: self.logs.path().join(&name),
            notes: Vec::new(),
        };
        match self.logs.part(&name) {
            Ok(logs) => self.run(&logs, &mut attempt),
            Err(error) => attempt.ran = Ran::failed(error),
        }
        self.group.remove(number);
        attempt.took = begun.elapsed();
        attempt.cancelled = self.group.is_cancelled() && attempt.was_killed();
        attempt
    }

    fn run(&self, logs: &RunDir, attempt: &mut Attempt) {
        let prepared = self.prepared.clone().logs_in(logs.clone());
        let vm = match prepared.start_watched(|vm| self.group.add(attempt.number, vm)) {
            Ok(vm) => vm,
            Err(failed) => {
                attempt.ran = Ran::not_started(*failed);
                return;
            }
        };
        let status = self.to_the_end(&vm, logs, attempt);
        attempt.ran = Ran { status: status.map(Some), report: Some(vm.report()) };
    }

    /// Runs the command and ends the VM.
    fn to_the_end(&self, vm: &Vm, logs: &RunDir, attempt: &mut Attempt) -> Result<ExitStatus> {
        let mut keeper = Keeper::new(logs.file(kept::OUTPUT_FILE)?);
        let begun = Instant::now();
        let status = self.execute(vm, attempt.number, &mut keeper);
        attempt.command_took = status.is_ok().then(|| begun.elapsed());
        let kept = keeper.finish();
        let stopped = vm.shutdown();
        let warnings = vm.take_warnings();
        let warnings = warnings.iter().map(|warning| format!("warning from the guest: {warning}"));
        attempt.notes.extend(warnings);
        let status = status?;
        stopped?;
        kept.map_err(|unkept| unkept.error).context("the command's output cannot be kept")?;
        attempt.notes.extend(out_of_memory(vm, status));
        Ok(status)
    }

    fn execute(&self, vm: &Vm, number: u64, keeper: &mut Keeper) -> Result<ExitStatus, Error> {
        let command = &self.request.command;
        let mut child = vm
            .command(&command[0])
            .args(&command[1..])
            .env(NUMBER, number.to_string())
            .stdin(Stdio::Null)
            .merge_stderr()
            .spawn()?;
        if let Some(mut stdout) = child.stdout.take() {
            // The keeper never fails, so it is the VM that has ended, which the wait reports.
            let _ = stdout.copy_to(keeper);
        }
        child.wait()
    }
}

impl Attempt {
    pub(super) fn failed(&self) -> bool {
        !self.cancelled && !matches!(&self.ran.status, Ok(Some(status)) if status.success())
    }

    /// Whether all other runs would fail in the same way, for reasons that are not the guest's.
    pub(super) fn is_hopeless(&self) -> bool {
        let Err(error) = &self.ran.status else { return false };
        matches!(
            error.downcast_ref::<Error>(),
            None | Some(
                Error::CommandNotFound { .. }
                    | Error::CommandNotExecutable { .. }
                    | Error::WorkingDirectory { .. }
                    | Error::TooManyArguments { .. }
                    | Error::Hypervisor(_)
                    | Error::Config(_)
                    | Error::Io { .. }
            )
        )
    }

    fn was_killed(&self) -> bool {
        let error = self.ran.status.as_ref().err().and_then(|error| error.downcast_ref::<Error>());
        error.and_then(Error::exit_reason) == Some(&ExitReason::Killed)
    }

    /// How it ended, in a line. `of` is how many runs there are to be.
    pub(super) fn heading(&self, of: Option<u64>) -> String {
        let number = self.number;
        let run = of.map_or(format!("run {number}"), |of| format!("run {number} of {of}"));
        let (how, took) = match (&self.ran.status, self.command_took) {
            (Ok(Some(status)), Some(took)) => (status.to_string(), took),
            _ => ("failed".to_owned(), self.took),
        };
        format!("=== {run}: {how} after {} ===\n", written(took))
    }

    /// All that a person needs to know of it, in one piece.
    pub(super) fn block(&self, of: Option<u64>) -> Vec<u8> {
        let mut block = self.heading(of).into_bytes();
        let written = kept::written(&self.dir);
        let mut notes = String::new();
        match written.as_deref().map(kept::excerpt) {
            Some(Ok(shown)) => block.extend_from_slice(&shown),
            Some(Err(error)) => {
                // Writing to a string does not fail.
                let _ = writeln!(notes, "vmlab: its output cannot be read: {error}");
            }
            None => {}
        }
        for note in &self.notes {
            let _ = writeln!(notes, "vmlab: {note}");
        }
        if let Err(error) = &self.ran.status {
            notes.push_str(&explained(error));
        }
        let console = self.ran.report.as_ref().and_then(|report| report.console_log.as_deref());
        let explained = self.ran.status.is_err();
        if let Some(console) = console.filter(|_| self.failed() && !explained) {
            let _ = writeln!(notes, "vmlab: the whole console: {}", console.display());
        }
        if let Some(path) = written.filter(|_| self.failed()) {
            let _ = writeln!(notes, "vmlab: its output: {}", path.display());
        }
        block.extend_from_slice(notes.as_bytes());
        block.push(b'\n');
        block
    }
}
