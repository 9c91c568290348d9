//! The part of an attempt that is about a target's modules: they are built while the VM starts, and loaded around or beside
//! the command.

use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmlab_artifacts::KernelStore;
use vmlab_artifacts::module_build::{self, ModuleBuild, ModuleSource};

use super::{Attempt, KILL_TIME, SIGKILL, Tee, copy_output, execute};
use crate::error::chain;
use crate::module::{
    Before, Life, OwnTest, SKIPPED, Step, build_own_tests, content_of, failures_of_tap,
};
use crate::results::{AttemptResult, explanation};
use crate::runner::verdict::End;
use crate::sync::lock;
use crate::targets::TargetCommand;
use crate::timings::millis;
use crate::{Child, Command, Error, ExitStatus, ModuleSpec, PreparedVm, RunDir, Vm};

/// How long loading and unloading modules again and again may take, where the command has no limit.
const CYCLES_TIME: Duration = Duration::from_secs(600);

/// A target's modules, which are being built for the kernel of its VM.
pub(super) struct Building {
    thread: JoinHandle<Result<Built, Error>>,
}

/// What was built for a module's test.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) modules: ModuleBuild,
    pub(super) own_tests: Vec<OwnTest>,
    pub(super) took: Duration,
}

impl Building {
    pub(super) fn begin(spec: &ModuleSpec, prepared: &PreparedVm) -> Result<Self, Error> {
        let no_kernel = || Error::ModuleWithoutKernel { image: prepared.report().kernel };
        let kernel = prepared.kernel().ok_or_else(no_kernel)?.clone();
        let source = ModuleSource::open(&spec.dir)?;
        let with_tests = spec.own_tests;
        let (cache, progress) = (prepared.cache.clone(), Arc::clone(&prepared.progress));
        let build = move || {
            let since = Instant::now();
            let tree = KernelStore::open(cache.clone()).build_tree(&kernel, &*progress)?;
            let modules = module_build::build(&cache, &source, &tree, &*progress)?;
            let own_tests = match with_tests {
                true => build_own_tests(source.dir())?,
                false => Vec::new(),
            };
            Ok(Built { modules, own_tests, took: since.elapsed() })
        };
        Ok(Self { thread: std::thread::spawn(build) })
    }

    /// What was built.
    pub(super) fn finish(self) -> Result<Built, Error> {
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Files that are kept of a failure: all that was found in words, the script that repeats it, and the modules, which
/// have the debug information of what ran.
const REPORT: &str = "report.txt";
const AGAIN: &str = "again.sh";

/// Keeps what explains a failure beside the logs. What cannot be kept is noted.
pub(super) fn keep_evidence(
    spec: &ModuleSpec,
    built: &Built,
    dir: &RunDir,
    record: &mut AttemptResult,
) {
    let mut kept = Vec::new();
    let mut keep = || -> Result<(), Error> {
        let mut write = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            let written = dir.file(name)?.write_all(content);
            written.map_err(|source| Error::Io {
                what: "write",
                path: path.clone(),
                source,
                hint: "",
            })?;
            kept.push(path);
            Ok::<(), Error>(())
        };
        write(REPORT, format!("{}\n", explanation(record)).as_bytes())?;
        if let Some(again) = &spec.again {
            write(AGAIN, again.as_bytes())?;
        }
        for module in &built.modules.modules {
            let name = module.path.file_name().unwrap_or_default().to_string_lossy();
            write(&name, &content_of(module)?)?;
        }
        Ok(())
    };
    if let Err(error) = keep() {
        record.notes.push(chain(&error));
    }
    record.kept_files.extend(kept);
}

/// A command whose output is shown beside others'.
struct Following<'vm> {
    child: Child<'vm>,
    copied: Receiver<()>,
}

impl<'vm> Following<'vm> {
    fn begin(command: Command<'vm>, tee: &Tee) -> Result<Self, Error> {
        let mut child = command.spawn()?;
        let copied = copy_output(&mut child, tee);
        Ok(Self { child, copied })
    }

    /// Ends it, once it has shown what there is. Where the VM has ended, others say why.
    fn end(mut self) {
        drop(self.child.stdin.take());
        if let Ok(None) = self.child.wait_until(Some(Instant::now() + KILL_TIME)) {
            self.child.control().signal(SIGKILL);
        }
        let _ = self.copied.recv_timeout(KILL_TIME);
    }
}

/// Keeps what is written, too, up to a limit.
#[derive(Debug, Clone)]
struct Both {
    tee: Tee,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Write for Both {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        /// More results of tests than anyone reads.
        const MOST: usize = 4 << 20;
        let mut said = lock(&self.said);
        let room = MOST.saturating_sub(said.len()).min(bytes.len());
        said.extend_from_slice(&bytes[..room]);
        self.tee.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Attempt<'_> {
    /// What runs in the guest, while its modules are loaded.
    pub(super) fn around_module(
        &self,
        vm: &Vm,
        (spec, built, before): (&ModuleSpec, &Built, Before<'_>),
        tee: &Tee,
        dir: &Path,
        record: &mut AttemptResult,
    ) -> Result<End, Error> {
        let mut life = Life::new(before, spec, &built.modules, self.debug_info.get());
        let following =
            life.follower().map(|command| Following::begin(command, tee)).transpose()?;
        let (end, steps) = match spec.cycles {
            Some(count) => self.beside_cycles(&mut life, count, (vm, tee, dir), record)?,
            None => self.while_loaded(&mut life, &built.own_tests, (vm, tee, dir), record)?,
        };
        if let Some(following) = following {
            following.end();
        }
        let mut problems = Vec::new();
        for step in steps {
            record.phases.push((step.name.to_owned(), millis(step.took)));
            problems.extend(step.problems.into_iter().map(|what| format!("{}: {what}", step.name)));
        }
        let unknown = life.unknown().iter().map(|what| format!("not looked for: {what}"));
        record.notes.extend(unknown);
        match &end {
            End::Exited(status) if status.success() && !problems.is_empty() => {
                Ok(End::Misbehaved(problems))
            }
            _ => {
                record.notes.extend(problems);
                Ok(end)
            }
        }
    }

    fn while_loaded(
        &self,
        life: &mut Life<'_>,
        own_tests: &[OwnTest],
        (vm, tee, dir): (&Vm, &Tee, &Path),
        record: &mut AttemptResult,
    ) -> Result<(End, Vec<Step>), Error> {
        let observer = &self.run.runner.observer;
        observer.phase(self.index, "load");
        let mut steps = vec![life.load()?];
        let mut end = End::Exited(ExitStatus::of_nothing());
        if steps[0].goes_on {
            end = self.commands(vm, tee, dir, record)?;
            let mut failed = Vec::new();
            for test in own_tests {
                self.run.runner.observer.phase(self.index, &test.name);
                failed.extend(self.own_test(vm, test, tee)?);
            }
            steps.push(life.used()?);
            steps[1].problems.splice(0..0, failed);
            if steps[1].goes_on {
                observer.phase(self.index, "unload");
                steps.push(life.unload()?);
            }
        }
        Ok((end, steps))
    }

    /// Runs a module's own test; gives what failed.
    fn own_test(&self, vm: &Vm, test: &OwnTest, tee: &Tee) -> Result<Vec<String>, Error> {
        let limit = self.target.verdict.timeout;
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        // It is kept with the output, so that what follows can be told apart.
        tee.clone().write_all(format!("# {}\n", test.name).as_bytes()).ok();
        let said = Arc::new(Mutex::new(Vec::new()));
        let both = Both { tee: tee.clone(), said: Arc::clone(&said) };
        let status = execute(vm, &[test.program.clone().into()], &both, deadline)?;
        let said = std::mem::take(&mut *lock(&said));
        let failed = failures_of_tap(&String::from_utf8_lossy(&said));
        let name = &test.name;
        let mut failed: Vec<String> =
            failed.into_iter().map(|what| format!("test {name} failed: {what}")).collect();
        match status {
            None => failed.push(format!("test {name} took too long")),
            Some(status) if status.success() || status.code() == Some(SKIPPED) => {}
            // What failed is known.
            Some(_) if !failed.is_empty() => {}
            Some(status) => failed.push(format!("test {name} failed: {status}")),
        }
        Ok(failed)
    }

    /// The command runs again and again until all cycles are done, or it fails.
    fn beside_cycles(
        &self,
        life: &mut Life<'_>,
        count: u32,
        (vm, tee, dir): (&Vm, &Tee, &Path),
        record: &mut AttemptResult,
    ) -> Result<(End, Vec<Step>), Error> {
        let limit = self.target.verdict.timeout.unwrap_or(CYCLES_TIME);
        self.run.runner.observer.phase(self.index, "cycles");
        let done = AtomicBool::new(false);
        let nothing = self.target.run.command == TargetCommand::Nothing;
        std::thread::scope(|scope| {
            let using = scope.spawn(|| {
                let mut end = Ok(End::Exited(ExitStatus::of_nothing()));
                while !nothing && matches!(&end, Ok(End::Exited(status)) if status.success()) {
                    end = self.commands(vm, tee, dir, record);
                    if done.load(Ordering::Acquire) {
                        break;
                    }
                }
                end
            });
            let step = life.cycle(count, limit);
            done.store(true, Ordering::Release);
            let end = using.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok((end, vec![step?]))
        })
    }
}
