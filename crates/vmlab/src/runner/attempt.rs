//! One attempt at a target: a VM, what runs before, the command, what runs after.

mod module;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use vmlab_artifacts::{Kernel, Progress};

use super::keep::keep;
use super::verdict::{End, judge};
use super::watch::Watch;
use super::{Observer, Run, Stop};
use crate::budget::Need;
use crate::error::chain;
use crate::events::{KernelEvent, decode};
use crate::hypervisor::ExitReason;
use crate::kept::{self, Keeper};
use crate::module::Before;
use crate::report::Report;
use crate::results::{AttemptResult, Failure};
use crate::sync::lock;
use crate::targets::{Target, TargetCommand, script_words};
use crate::timings::millis;
use crate::{Child, DebugInfo, Error, ExitStatus, RunDir, Stdio, Vm, VmBuilder};
use module::{Building, Built};

/// Variables that tell a command what it is.
const NAME: &str = "VMLAB_TARGET";
const ATTEMPT: &str = "VMLAB_ATTEMPT";

/// How long each script after the command may take: it is there to look and to tidy up.
const TEARDOWN_TIME: Duration = Duration::from_secs(60);

/// How long a command that was killed may take to be gone.
const KILL_TIME: Duration = Duration::from_secs(5);

/// Held while reports are decoded: a kernel's debug information takes most of a gigabyte, so it is there once.
static DECODING: Mutex<()> = Mutex::new(());

/// The signal that nothing can ignore.
const SIGKILL: i32 = 9;

impl Run<'_> {
    /// Tries a target once.
    pub(super) fn attempt(&self, index: usize, target: &Target, number: u32) -> AttemptResult {
        let start = Instant::now();
        let mut record =
            AttemptResult { start_ms: millis(start - self.began), ..AttemptResult::default() };
        let watch = Watch::default();
        let (debug_info, built) = (OnceLock::new(), OnceLock::new());
        let attempt = Attempt {
            run: self,
            index,
            target,
            number,
            watch: &watch,
            debug_info: &debug_info,
            built: &built,
        };
        let name = format!("{:03}-{}-{number}", index + 1, file_name(&target.name));
        let (end, dir) = match self.logs.part(&name) {
            Ok(logs) => (attempt.run(&logs, &mut record), Some(logs)),
            Err(error) => (End::Lost(Box::new(error)), None),
        };
        self.runner.group.remove(attempt.key());
        record.events = watch.finish();
        if let Some(info) = debug_info.get() {
            decode_reports(info, &mut record.events);
        }
        record.failure = self.failure(target, &end, &record);
        if let End::Exited(status) = &end {
            (record.exit_code, record.signal) = (Some(status.shell_code()), status.signal());
        }
        if let Some(log) = record.console_log.as_deref().filter(|_| record.console.is_empty()) {
            record.console = excerpt(log, &mut record.notes);
        }
        if let (Some(_), Some(dir)) = (&record.failure, dir)
            && let (Some(spec), Some(built)) = (&target.run.module, built.get())
        {
            module::keep_evidence(spec, built, &dir, &mut record);
        }
        record.took_ms = millis(start.elapsed());
        record
    }

    fn failure(&self, target: &Target, end: &End, record: &AttemptResult) -> Option<Failure> {
        let killed = matches!(end, End::Lost(error)
            if error.exit_reason() == Some(&ExitReason::Killed)
                || matches!(**error, Error::Cancelled));
        match self.runner.stopped().filter(|_| killed) {
            Some(Stop::Timeout) => {
                let limit = self.runner.options.timeout.unwrap_or_default().as_secs_f64();
                let what = format!("all targets together took longer than {limit} s");
                Some(Failure::Timeout { what })
            }
            Some(Stop::User | Stop::FailFast) => Some(Failure::Cancelled),
            None => judge(&target.verdict, end, &record.events),
        }
    }
}

/// Says of each function in events' reports where it is in the sources.
pub(crate) fn decode_reports(info: &DebugInfo, events: &mut [KernelEvent]) {
    if events.is_empty() {
        return;
    }
    let _one = lock(&DECODING);
    let symbols = info.symbols();
    for event in events {
        event.report = decode(&event.report, &symbols);
    }
}

#[derive(Debug)]
struct Attempt<'a> {
    run: &'a Run<'a>,
    index: usize,
    target: &'a Target,
    number: u32,
    watch: &'a Watch,
    /// That of its kernel, once that is known.
    debug_info: &'a OnceLock<DebugInfo>,
    /// Its modules, once they are built.
    built: &'a OnceLock<Built>,
}

/// Where the output of all that runs in a guest goes.
#[derive(Debug, Clone)]
struct Tee {
    /// Gone once the VM is: what still comes then comes too late.
    keeper: Arc<Mutex<Option<Keeper>>>,
    observer: Arc<dyn Observer>,
    index: usize,
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match lock(&self.keeper).as_mut() {
            Some(keeper) => {
                self.observer.output(self.index, bytes);
                keeper.write(bytes)
            }
            None => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands on what a VM's preparation and start say.
#[derive(Debug)]
struct Told {
    observer: Arc<dyn Observer>,
    index: usize,
}

impl Progress for Told {
    fn phase(&self, name: &str) {
        self.observer.phase(self.index, name);
    }

    fn note(&self, text: &str) {
        self.observer.note(self.index, text);
    }

    fn download(&self, _done: u64, _total: Option<u64>) {}
}

impl Attempt<'_> {
    fn key(&self) -> u64 {
        self.index as u64
    }

    fn run(&self, logs: &RunDir, record: &mut AttemptResult) -> End {
        match self.in_a_vm(logs, record) {
            Ok(end) => end,
            Err(error) => {
                if let Some(evidence) = error.evidence() {
                    record.console_log.get_or_insert_with(|| evidence.log.clone());
                }
                End::Lost(Box::new(error))
            }
        }
    }

    fn in_a_vm(&self, logs: &RunDir, record: &mut AttemptResult) -> Result<End, Error> {
        let runner = self.run.runner;
        let vm = self.builder()?;
        let prepared = vm.prepare()?;
        // While the VM starts.
        let building = match &self.target.run.module {
            Some(spec) => Some((spec, Building::begin(spec, &prepared)?)),
            None => None,
        };
        record.accel = Some(prepared.config().accel.name().to_owned());
        let kernel = prepared.kernel().cloned();
        let permit = runner.budget.acquire(Need::of(prepared.config()));
        let _permit = permit.ok_or(Error::Cancelled)?;
        let prepared = prepared.one_of(runner.workers()).logs_in(logs.clone());
        let started = prepared.start_watched(|vm| {
            runner.group.add(self.key(), vm);
            self.watch.vm(vm);
        });
        let vm = match started {
            Ok(vm) => vm,
            Err(failed) => {
                // Its thread is not left behind. What it came to does not matter any more.
                let _ = building.map(|(_, building)| building.finish());
                self.find_debug_info(kernel.as_ref());
                record.phases = phases(&failed.report);
                return Err(failed.error);
            }
        };
        // What the guest is like without its modules is looked at while they are still being built.
        let module = match building {
            Some((spec, building)) => {
                let before = Before::look(&vm, spec.step_time);
                let built = building.finish()?;
                Some((spec, self.built.get_or_init(|| built), before?))
            }
            None => None,
        };
        self.find_debug_info(kernel.as_ref());
        if let Some((_, built, _)) = &module {
            record.build_ms = Some(millis(built.took));
            let warnings = built.modules.warnings.iter();
            record.notes.extend(warnings.map(|text| format!("building: {text}")));
        }
        record.console_log = Some(vm.console().log_path().to_owned());
        record.release = Some(vm.release().to_owned());
        let keeper = Keeper::new(logs.file(kept::OUTPUT_FILE)?);
        let observer = Arc::clone(&runner.observer);
        let tee = Tee { keeper: Arc::new(Mutex::new(Some(keeper))), observer, index: self.index };
        let around =
            module.map(|module| self.around_module(&vm, module, &tee, logs.path(), record));
        let end = around.unwrap_or_else(|| self.commands(&vm, &tee, logs.path(), record));
        let stopped = vm.shutdown();
        let warnings = vm.take_warnings();
        record.notes.extend(warnings.iter().map(|text| format!("warning from the guest: {text}")));
        record.phases.splice(0..0, phases(&vm.report()));
        let console = vm.console().clone();
        drop(vm);
        if let Some(error) = console.log_failure() {
            let path = console.log_path().display();
            record.notes.push(format!("{path}: not all of the console is kept: {error}"));
            // The end of it, which is in memory.
            record.console = String::from_utf8_lossy(&console.kept()).into_owned();
        }
        let kept = lock(&tee.keeper).take().map(Keeper::finish);
        record.output_log = kept::written(logs.path());
        if let Some(log) = &record.output_log {
            record.output = excerpt(log, &mut record.notes);
        }
        if let Some(Err(unkept)) = kept {
            let path = logs.path().join(kept::OUTPUT_FILE);
            let error = unkept.error;
            record.notes.push(format!("{}: not all output is kept: {error}", path.display()));
            record.output.push_str(&String::from_utf8_lossy(&unkept.tail));
        }
        let end = end?;
        match (&end, stopped) {
            // What it wrote may not have arrived.
            (End::Exited(_), Err(error)) => Err(error),
            _ => Ok(end),
        }
    }

    /// Says where debug information is looked for, once that is known. Nothing is of a kernel that is an image's own.
    fn find_debug_info(&self, kernel: Option<&Kernel>) {
        let Some(kernel) = kernel else { return };
        let built = self.built.get().map(|built| built.modules.dir.clone());
        let cwd = self.run.runner.options.environment.cwd.clone();
        let shares = self.target.vm.shares.iter().map(|share| share.host.clone());
        let dirs = built.into_iter().chain([cwd]).chain(shares);
        self.debug_info.get_or_init(|| DebugInfo::of(kernel, dirs));
    }

    /// What runs in the guest, in its order.
    fn commands(
        &self,
        vm: &Vm,
        tee: &Tee,
        dir: &Path,
        record: &mut AttemptResult,
    ) -> Result<End, Error> {
        let Target { run, verdict, .. } = self.target;
        let observer = &self.run.runner.observer;
        let deadline = verdict.timeout.and_then(|limit| Instant::now().checked_add(limit));
        let limit = verdict.timeout.unwrap_or_default();
        let mut end = None;
        for script in &run.setup {
            observer.phase(self.index, "before the command");
            end = match execute(vm, &script_words(script), tee, deadline)? {
                Some(status) if status.success() => continue,
                Some(status) => {
                    Some(End::SetupFailed(format!("`{}`: {status}", first_line(script))))
                }
                None => Some(End::TimedOut(limit)),
            };
            break;
        }
        let end = match end {
            Some(end) => end,
            None if run.command == TargetCommand::Nothing => End::Exited(ExitStatus::of_nothing()),
            None => {
                observer.phase(self.index, "command");
                let since = Instant::now();
                let status = execute(vm, &run.words(), tee, deadline)?;
                record.command_ms = Some(millis(since.elapsed()));
                status.map_or(End::TimedOut(limit), End::Exited)
            }
        };
        let failed = judge(verdict, &end, &self.watch.so_far()).is_some()
            || !self.watch.unfinished().is_disjoint(&verdict.fail_on);
        if failed && !run.keep_on_failure.is_empty() {
            observer.phase(self.index, "keeping files");
            match keep(vm, &run.keep_on_failure, dir, &mut record.notes) {
                Ok(files) => record.kept_files = files,
                Err(error) => record.notes.push(format!("files to keep: {}", chain(&error))),
            }
        }
        for script in &run.teardown {
            observer.phase(self.index, "after the command");
            let deadline = Some(Instant::now() + TEARDOWN_TIME);
            let how = match execute(vm, &script_words(script), tee, deadline)? {
                Some(status) if status.success() => continue,
                Some(status) => status.to_string(),
                None => format!("took longer than {} s", TEARDOWN_TIME.as_secs()),
            };
            record.notes.push(format!("after the command, `{}`: {how}", first_line(script)));
        }
        if let End::Exited(status) = &end
            && status.oom_kills() > 0
        {
            let (killed, memory) = (status.oom_kills(), vm.config().memory);
            record.notes.push(format!(
                "the guest ran out of memory and killed {killed} process(es); it has {memory}"
            ));
        }
        Ok(end)
    }

    /// The VM that the target describes.
    fn builder(&self) -> Result<VmBuilder, Error> {
        let options = &self.run.runner.options;
        let observer = Arc::clone(&self.run.runner.observer);
        if self.target.run.command == TargetCommand::Shell {
            return Err(Error::ShellAmongOthers { target: self.target.name.clone() });
        }
        let number = self.number.to_string();
        let own = [(NAME, self.target.name.as_str()), (ATTEMPT, &number)];
        let mut target = self.target.clone();
        if self.number > 1 {
            // What was kept of the attempt before stays.
            for keep in target.vm.disks.iter_mut().filter_map(|disk| disk.keep.as_mut()) {
                keep.as_mut_os_string().push(format!(".{number}"));
            }
        }
        let vm = target.vm_builder(&options.environment, &own)?;
        let vm = vm
            // Events are read from it.
            .full_console(true)
            .snapshots(options.snapshots)
            .progress(Arc::new(Told { observer, index: self.index }));
        Ok(match &options.cache_dir {
            Some(dir) => vm.cache_dir(dir),
            None => vm,
        })
    }
}

/// Runs a command to its end, and until all its output is here; `None` once the deadline has passed.
fn execute(
    vm: &Vm,
    command: &[OsString],
    tee: &(impl Write + Clone + Send + 'static),
    deadline: Option<Instant>,
) -> Result<Option<ExitStatus>, Error> {
    let mut child =
        vm.command(&command[0]).args(&command[1..]).stdin(Stdio::Null).merge_stderr().spawn()?;
    let copied = copy_output(&mut child, tee);
    let Some(status) = child.wait_until(deadline)? else {
        child.control().signal(SIGKILL);
        child.wait_until(Some(Instant::now() + KILL_TIME))?;
        return Ok(None);
    };
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    match left {
        None => _ = copied.recv(),
        Some(left) => {
            if copied.recv_timeout(left) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                return Ok(None);
            }
        }
    }
    Ok(Some(status))
}

/// Copies what a command writes until there is no more. Nothing is ever sent: what ends the wait for that is that the
/// sender is dropped.
fn copy_output(child: &mut Child<'_>, tee: &(impl Write + Clone + Send + 'static)) -> Receiver<()> {
    let (done, copied) = channel();
    if let Some(mut stdout) = child.stdout.take() {
        let mut tee = tee.clone();
        std::thread::spawn(move || {
            // The keeper never fails, so it is the VM that has ended, which the wait for the command reports.
            let _ = stdout.copy_to(&mut tee);
            drop((tee, done));
        });
    }
    copied
}

fn phases(report: &Report) -> Vec<(String, f64)> {
    report.phases.iter().map(|phase| (phase.phase.name().to_owned(), phase.ms)).collect()
}

fn first_line(script: &str) -> &str {
    script.trim().lines().next().unwrap_or_default()
}

/// As much of a log as a report should have.
fn excerpt(log: &Path, notes: &mut Vec<String>) -> String {
    match kept::excerpt(log) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => {
            notes.push(format!("{} cannot be read: {error}", log.display()));
            String::new()
        }
    }
}

/// A target's name as a part of a file's name.
fn file_name(name: &str) -> String {
    /// Leaves room for what is around it.
    const MOST: usize = 80;
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    name.chars().take(MOST).map(plain).collect()
}
