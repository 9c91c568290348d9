//! The life of modules in a guest: before they are loaded, while they are, and after.

use std::io::{Read, Write};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use regex::Regex;
use vmlab_artifacts::module_build::{BuiltModule, ModuleBuild};
use vmlab_wire::observation::{MAX_ANSWER, ModuleAnswer, ModuleFile, Observation};

use super::code::LoadedCode;
use super::tap::Tap;
use super::{ModuleSpec, checks};
use crate::events::decode;
use crate::guest::{Command, ExitStatus, GuestUser, LogRecord, Stdio, parse_log_record};
use crate::vm::Vm;
use crate::{DebugInfo, Error};

/// How long what is being freed or taken away may still be there after a module is gone.
const SETTLE_TIME: Duration = Duration::from_millis(300);

/// The same where memory is freed after a grace period: the kernel gathers that for five seconds (`KFREE_DRAIN_JIFFIES`).
const GRACE_TIME: Duration = Duration::from_secs(6);

/// How long is waited between two looks for that.
const SETTLE_STEP: Duration = Duration::from_millis(50);

/// How long the kernel may take to tell where a task is stuck.
const STACKS_TIME: Duration = Duration::from_secs(5);

/// What frees memory after a grace period.
const DEFERRED: [&str; 3] = ["kvfree_call_rcu", "kfree_call_rcu", "call_rcu"];

/// One step, and what was wrong with it.
#[derive(Debug)]
pub(crate) struct Step {
    /// `load`, `use` or `unload`.
    pub(crate) name: &'static str,
    /// What the kernel took for it.
    pub(crate) took: Duration,
    /// What is wrong, a line or more each.
    pub(crate) problems: Vec<String>,
    /// Whether the next step can be taken.
    pub(crate) goes_on: bool,
}

/// The modules of a build in a guest.
pub(crate) struct Life<'a> {
    vm: &'a Vm,
    spec: &'a ModuleSpec,
    build: &'a ModuleBuild,
    debug_info: Option<&'a DebugInfo>,
    allowed: Vec<Regex>,
    before: Observation,
    /// What could not be looked for, and why.
    unknown: Vec<String>,
    known_taint: u64,
    /// The number of the next record of the kernel's log.
    log_from: u64,
    code: Vec<LoadedCode>,
}

/// What came of asking the agent.
enum Reply {
    Answer(Box<ModuleAnswer>),
    /// The kernel killed the process that did it.
    Died(ExitStatus),
    TimedOut,
}

impl<'a> Life<'a> {
    /// Looks at the guest as it is without them.
    ///
    /// # Errors
    /// When the guest cannot be asked. A regular expression that is none lets nothing pass.
    pub(crate) fn begin(
        vm: &'a Vm,
        spec: &'a ModuleSpec,
        build: &'a ModuleBuild,
        debug_info: Option<&'a DebugInfo>,
    ) -> Result<Self, Error> {
        let allowed = spec.allowed_log.iter().filter_map(|text| Regex::new(text).ok()).collect();
        let mut life = Self {
            vm,
            spec,
            build,
            debug_info,
            allowed,
            before: Observation::default(),
            unknown: Vec::new(),
            known_taint: 0,
            log_from: 0,
            code: Vec::new(),
        };
        match life.ask(&["look"], None, spec.step_time)? {
            Reply::Answer(answer) => {
                life.next_records(&answer.observation);
                life.known_taint = answer.observation.taint;
                life.before = answer.observation;
                Ok(life)
            }
            Reply::Died(status) => Err(broken(&format!("it ended with {status}"))),
            Reply::TimedOut => Err(broken("it took too long")),
        }
    }

    /// Loads them, those first that others need.
    ///
    /// # Errors
    /// When the VM ends.
    pub(crate) fn load(&mut self) -> Result<Step, Error> {
        let mut step = Step::new("load");
        if !self.load_needs(&mut step)? {
            return Ok(step);
        }
        let reply = self.ask(&["insert"], Some(&self.files()?), self.spec.step_time)?;
        let Some(answer) = self.done(reply, self.spec.step_time, &mut step)? else {
            return Ok(step);
        };
        self.take(&answer, "load", &mut step)?;
        let mut names = self.build.modules.iter().map(|module| &module.name);
        let missing = names.find(|name| !checks::is_loaded(&answer.observation, name));
        if let (Some(name), true) = (missing, step.goes_on) {
            step.fail(format!("{name} was loaded and is not there"));
        }
        Ok(step)
    }

    /// Loads the kernel's modules that they need, which stay.
    fn load_needs(&self, step: &mut Step) -> Result<bool, Error> {
        let needs = self.build.needs();
        if !needs.is_empty() {
            let output = self.vm.command("modprobe").arg("-a").args(&needs).output()?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                step.fail(format!("modprobe {}: {said}", needs.join(" ")));
            }
        }
        Ok(step.goes_on)
    }

    /// The modules with their parameters.
    fn files(&self) -> Result<Vec<u8>, Error> {
        let all = &self.build.modules;
        let file = |(index, module): (usize, &BuiltModule)| {
            let last = index + 1 == all.len();
            let parameters = self.spec.parameters_of(&module.name, last);
            Ok(ModuleFile { name: module.name.clone(), parameters, content: content_of(module)? })
        };
        let files = all.iter().enumerate().map(file).collect::<Result<Vec<_>, Error>>()?;
        Ok(ModuleFile::encode_all(&files))
    }

    /// What an answer says of a step: what was logged and refused, and where modules were.
    fn take(&mut self, answer: &ModuleAnswer, verb: &str, step: &mut Step) -> Result<(), Error> {
        let now = &answer.observation;
        let records = self.next_records(now);
        step.took += Duration::from_micros(answer.took_us);
        step.problems.extend(checks::complaints(&records, &self.allowed));
        self.taints(now, step);
        if answer.errno != 0 {
            let (name, error) = (&answer.module, std::io::Error::from_raw_os_error(answer.errno));
            // Why is in the kernel's log, at whatever level.
            let lines = records.iter().filter(|record| record.text.starts_with(name.as_str()));
            let said: Vec<String> = lines.map(|record| record.text.clone()).collect();
            let said = match said.is_empty() {
                true => String::new(),
                false => format!("; it logged: {}", said.join("; ")),
            };
            step.fail(format!("the kernel does not {verb} {name}: {error}{said}"));
        }
        for load in &answer.loads {
            let module = self.build.modules.iter().find(|module| module.name == load.module);
            if let Some(module) = module {
                self.code.push(LoadedCode::new(&module.name, &content_of(module)?, &load.sections));
            }
        }
        // KUnit tells of its tests in the log.
        let lines = records.iter().filter(|record| record.facility == 0);
        let tap = Tap::read(lines.map(|record| record.text.as_str()));
        step.problems.extend(tap.failed.into_iter().map(|test| format!("test failed: {test}")));
        if let Some(why) = &now.untracked {
            self.unknown.push(format!("memory that is not freed: {why}"));
        }
        Ok(())
    }

    /// Looks at the guest after they were used.
    ///
    /// # Errors
    /// When the VM ends.
    pub(crate) fn used(&mut self) -> Result<Step, Error> {
        let mut step = Step::new("use");
        let reply = self.ask(&["glance"], None, self.spec.step_time)?;
        if let Some(answer) = self.done(reply, self.spec.step_time, &mut step)? {
            self.take(&answer, "show", &mut step)?;
        }
        Ok(step)
    }

    /// Unloads them, and sees whether they have left the guest as it was.
    ///
    /// # Errors
    /// When the VM ends.
    pub(crate) fn unload(&mut self) -> Result<Step, Error> {
        let mut step = Step::new("unload");
        let names = self.build.modules.iter().rev().map(|module| module.name.as_str());
        let words: Vec<&str> = ["remove"].into_iter().chain(names).collect();
        let reply = self.ask(&words, None, self.spec.step_time)?;
        if let Some(answer) = self.done(reply, self.spec.step_time, &mut step)? {
            self.take(&answer, "unload", &mut step)?;
            self.after(answer.observation, &mut step)?;
        }
        Ok(step)
    }

    /// Loads and unloads them so often within a time, and sees whether they have left the guest as it was.
    ///
    /// # Errors
    /// When the VM ends.
    pub(crate) fn cycle(&mut self, count: u32, limit: Duration) -> Result<Step, Error> {
        let mut step = Step::new("cycles");
        if !self.load_needs(&mut step)? {
            return Ok(step);
        }
        let reply = self.ask(&["cycle", &count.to_string()], Some(&self.files()?), limit)?;
        if let Some(answer) = self.done(reply, limit, &mut step)? {
            self.take(&answer, "load and unload", &mut step)?;
            if answer.errno != 0 {
                step.fail(format!("it was in cycle {} of {count}", answer.cycles + 1));
            }
            self.after(answer.observation, &mut step)?;
        }
        Ok(step)
    }

    /// Sees whether modules that were unloaded have left the guest as it was.
    fn after(&mut self, mut now: Observation, step: &mut Step) -> Result<(), Error> {
        if !step.goes_on {
            return Ok(());
        }
        let mut names = self.build.modules.iter().map(|module| &module.name);
        if let Some(name) = names.find(|name| checks::is_loaded(&now, name)) {
            step.fail(format!("{name} was unloaded and is still there"));
            return Ok(());
        }
        let others = checks::newcomers(&self.before, &now);
        if !others.is_empty() {
            // What they have made is not ours. Those that are in use stay.
            self.vm.command("modprobe").arg("-ra").args(others).output()?;
            let Some(looked) = self.look_again(&now, step)? else { return Ok(()) };
            now = looked;
        }
        let patience = if self.frees_later() { GRACE_TIME } else { SETTLE_TIME };
        let deadline = Instant::now() + patience;
        let mut left = self.left(&now);
        while !left.is_empty() && Instant::now() < deadline {
            std::thread::sleep(SETTLE_STEP);
            let Some(looked) = self.look_again(&now, step)? else { break };
            now = looked;
            left = self.left(&now);
        }
        step.problems.extend(left);
        let others = checks::newcomers(&self.before, &now);
        if !others.is_empty() {
            let others = others.join(", ");
            self.unknown.push(format!("names that are left behind: they may be those of {others}"));
        }
        Ok(())
    }

    /// Looks once more. kmemleak has looked when they were removed.
    fn look_again(
        &mut self,
        earlier: &Observation,
        step: &mut Step,
    ) -> Result<Option<Observation>, Error> {
        let reply = self.ask(&["look"], None, self.spec.step_time)?;
        let Some(answer) = self.done(reply, self.spec.step_time, step)? else { return Ok(None) };
        let now = answer.observation;
        let records = self.next_records(&now);
        step.problems.extend(checks::complaints(&records, &self.allowed));
        self.taints(&now, step);
        Ok(Some(Observation { kmemleak: earlier.kmemleak.clone(), ..now }))
    }

    /// The command that shows the kernel's log and trace events from now on, until its input ends; `None` where they are not
    /// to be shown.
    pub(crate) fn follower(&self) -> Option<Command<'a>> {
        let ModuleSpec { show_log, trace, .. } = self.spec;
        let wanted = *show_log || !trace.is_empty();
        let command = || {
            let command = Command::of_agent(self.vm, GuestUser::default());
            let command = command.args(["module", "follow", &self.log_from.to_string()]);
            command.args(trace).stdin(Stdio::Piped).stderr(Stdio::Null)
        };
        wanted.then(command)
    }

    /// What could not be looked for, and why.
    pub(crate) fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// Tells of damage once, and goes no further after a part of the kernel has died.
    fn taints(&mut self, now: &Observation, step: &mut Step) {
        step.problems.extend(checks::taints(self.known_taint, now));
        self.known_taint |= now.taint;
        step.goes_on &= !checks::has_died(now);
    }

    fn left(&self, now: &Observation) -> Vec<String> {
        let mut left = checks::not_freed(&self.before, now, &self.code);
        left.extend(checks::left_behind(&self.before, now));
        left.extend(checks::users(&self.before, now));
        left.extend(checks::kmemleak(&self.before, now));
        left
    }

    fn frees_later(&self) -> bool {
        let imports = self.build.modules.iter().flat_map(|module| &module.imports);
        imports.into_iter().any(|name| DEFERRED.contains(&name.as_str()))
    }

    /// The answer, if there is one; otherwise the step has failed.
    fn done(
        &mut self,
        reply: Reply,
        limit: Duration,
        step: &mut Step,
    ) -> Result<Option<ModuleAnswer>, Error> {
        match reply {
            Reply::Answer(answer) => return Ok(Some(*answer)),
            Reply::Died(status) => {
                step.fail(format!("the process that did it ended with {status}"))
            }
            Reply::TimedOut => {
                let limit = limit.as_secs_f64();
                let stack = self.stuck_in()?;
                let place = match stack.is_empty() {
                    true => String::new(),
                    false => format!(", in {}", stack.join(" <- ")),
                };
                step.fail(format!("it took longer than {limit} s{place}"));
            }
        }
        Ok(None)
    }

    /// Where the task is that loads or unloads a module: the kernel shows what all blocked tasks and all processors do.
    fn stuck_in(&mut self) -> Result<Vec<String>, Error> {
        let ask = "echo w > /proc/sysrq-trigger; echo l > /proc/sysrq-trigger";
        let shell = self.vm.command("sh").args(["-c", ask]);
        let quiet = shell.stdin(Stdio::Null).stdout(Stdio::Null).stderr(Stdio::Null);
        quiet.spawn()?.wait_until(Some(Instant::now() + STACKS_TIME))?;
        let Reply::Answer(answer) = self.ask(&["look"], None, self.spec.step_time)? else {
            return Ok(Vec::new());
        };
        let records = self.next_records(&answer.observation);
        let lines: Vec<&str> = records.iter().map(|record| record.text.as_str()).collect();
        let frames = checks::frames_of_module_calls(&lines);
        Ok(match self.debug_info {
            Some(info) => decode(&frames, &info.symbols()),
            None => frames,
        })
    }

    /// Records of the log that are new in an observation.
    fn next_records(&mut self, now: &Observation) -> Vec<LogRecord> {
        let records: Vec<LogRecord> =
            now.log.iter().filter_map(|record| parse_log_record(record)).collect();
        if let Some(last) = records.last() {
            self.log_from = last.sequence.saturating_add(1);
        }
        records
    }

    fn ask(&self, words: &[&str], files: Option<&[u8]>, limit: Duration) -> Result<Reply, Error> {
        let deadline = Instant::now() + limit;
        let mut command =
            Command::of_agent(self.vm, GuestUser::default()).args(["module", words[0]]);
        command = command.arg(self.log_from.to_string()).args(&words[1..]).stderr(Stdio::Null);
        command = command.stdin(if files.is_some() { Stdio::Piped } else { Stdio::Null });
        let mut child = command.spawn()?;
        if let (Some(mut stdin), Some(files)) = (child.stdin.take(), files) {
            // That it breaks is seen below.
            let _ = stdin.write_all(files);
        }
        let (sender, answer) = channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                // What is missing is seen when it is decoded; nobody listens once the time is over.
                let _ = stdout.take(MAX_ANSWER).read_to_end(&mut bytes);
                let _ = sender.send(bytes);
            });
        }
        let Some(status) = child.wait_until(Some(deadline))? else { return Ok(Reply::TimedOut) };
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(bytes) = answer.recv_timeout(left) else { return Ok(Reply::TimedOut) };
        Ok(match ModuleAnswer::decode(&bytes) {
            Ok(answer) => Reply::Answer(Box::new(answer)),
            Err(_) => Reply::Died(status),
        })
    }
}

impl Step {
    fn new(name: &'static str) -> Self {
        Self { name, took: Duration::ZERO, problems: Vec::new(), goes_on: true }
    }

    fn fail(&mut self, problem: String) {
        self.problems.insert(0, problem);
        self.goes_on = false;
    }
}

/// A module's file.
pub(crate) fn content_of(module: &BuiltModule) -> Result<Vec<u8>, Error> {
    std::fs::read(&module.path).map_err(|source| Error::Io {
        what: "read the module",
        path: module.path.clone(),
        source,
        hint: "",
    })
}

/// The agent's own part does not work.
fn broken(how: &str) -> Error {
    Error::ModuleLook { how: how.to_owned() }
}
