//! The life of modules in a guest: before they are loaded, while they are, and after.

use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use regex::Regex;
use vmlab_artifacts::module_build::{BuiltModule, ModuleBuild};
use vmlab_wire::observation::{ModuleAnswer, ModuleFile, ModuleRequest, Observation};

use super::code::LoadedCode;
use super::session::{Reply, Session, within};
use super::tap::Tap;
use super::{ModuleSpec, checks};
use crate::debug_info::ModuleCode;
use crate::events::decode;
use crate::guest::{Command, GuestUser, LogRecord, Stdio, parse_log_record};
use crate::vm::Vm;
use crate::{DebugInfo, Error};

/// How long what is being freed or taken away may still be there after a module is gone.
const SETTLE_TIME: Duration = Duration::from_millis(300);

/// The same where memory is freed after a grace period: the kernel gathers that for five seconds (`KFREE_DRAIN_JIFFIES`).
const GRACE_TIME: Duration = Duration::from_secs(6);

/// How long is waited between two looks for that.
const SETTLE_STEP: Duration = Duration::from_millis(50);

/// How long the kernel may take to tell where a task is stuck.
const STACKS_TIME: Duration = Duration::from_secs(10);

/// What a module calls that frees memory after a grace period.
const DEFERRED: [&str; 3] = ["kvfree_call_rcu", "kfree_call_rcu", "call_rcu"];

/// What a module calls that frees memory in bulk, of which there are no trace events.
const UNSEEN: [&str; 4] =
    ["kvfree_call_rcu", "kfree_call_rcu", "kfree_bulk", "kmem_cache_free_bulk"];

/// One step, and what was wrong with it.
#[derive(Debug)]
pub(crate) struct Step {
    /// `load`, `use`, `unload` or `cycles`.
    pub(crate) name: &'static str,
    /// What the kernel took for it.
    pub(crate) took: Duration,
    /// What is wrong, a line or more each.
    pub(crate) problems: Vec<String>,
    /// Whether the next step can be taken.
    pub(crate) goes_on: bool,
}

/// What a guest was like before modules came.
pub(crate) struct Before<'vm> {
    vm: &'vm Vm,
    session: Session<'vm>,
    seen: Observation,
}

impl<'vm> Before<'vm> {
    /// Looks at the guest as it is without them.
    ///
    /// # Errors
    /// When the guest cannot be asked.
    pub(crate) fn look(vm: &'vm Vm, limit: Duration) -> Result<Self, Error> {
        let broken = |how: String| Error::ModuleLook { how };
        let opened = within(vm, limit, || Session::open(vm, u64::MAX))?;
        let mut session = opened.ok_or_else(|| broken("it does not begin".to_owned()))?;
        match session.ask(&ModuleRequest::Look, limit)? {
            Reply::Answer(answer) => Ok(Self { vm, session, seen: answer.observation }),
            Reply::Died(status) => Err(broken(format!("it ended with {status}"))),
            Reply::TimedOut => Err(broken("it took too long".to_owned())),
        }
    }
}

/// The modules of a build in a guest.
pub(crate) struct Life<'a> {
    vm: &'a Vm,
    session: Session<'a>,
    spec: &'a ModuleSpec,
    build: &'a ModuleBuild,
    debug_info: Option<&'a DebugInfo>,
    allowed: Vec<Regex>,
    before: Observation,
    /// What could not be looked for, and why.
    unknown: Vec<String>,
    known_taint: u64,
    /// The number of the next record of the kernel's log.
    log_next: u64,
    /// What is read of the modules' files once they were loaded.
    files: HashMap<String, Rc<ModuleCode>>,
    code: Vec<LoadedCode>,
}

impl<'a> Life<'a> {
    /// Their life in a guest that was looked at. A regular expression that is none lets nothing pass.
    pub(crate) fn new(
        before: Before<'a>,
        spec: &'a ModuleSpec,
        build: &'a ModuleBuild,
        debug_info: Option<&'a DebugInfo>,
    ) -> Self {
        let Before { vm, session, seen } = before;
        Self {
            vm,
            session,
            spec,
            build,
            debug_info,
            allowed: spec.allowed_log.iter().filter_map(|text| Regex::new(text).ok()).collect(),
            unknown: Vec::new(),
            known_taint: seen.taint,
            log_next: seen.log_next,
            before: seen,
            files: HashMap::new(),
            code: Vec::new(),
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
        let request = ModuleRequest::Insert(self.module_files(&mut step)?);
        let Some(answer) = self.ask(&request, self.spec.step_time, &mut step)? else {
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

    /// Looks at the guest after they were used.
    ///
    /// # Errors
    /// When the VM ends.
    pub(crate) fn used(&mut self) -> Result<Step, Error> {
        let mut step = Step::new("use");
        if let Some(answer) = self.ask(&ModuleRequest::Glance, self.spec.step_time, &mut step)? {
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
        let names = self.build.modules.iter().rev().map(|module| module.name.clone());
        let request = ModuleRequest::Remove(names.collect());
        if let Some(answer) = self.ask(&request, self.spec.step_time, &mut step)? {
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
        let request = ModuleRequest::Cycle { files: self.module_files(&mut step)?, count };
        if let Some(answer) = self.ask(&request, limit, &mut step)? {
            self.take(&answer, "load and unload", &mut step)?;
            if answer.errno != 0 {
                step.fail(format!("it was in cycle {} of {count}", answer.cycles + 1));
            }
            self.after(answer.observation, &mut step)?;
        }
        Ok(step)
    }

    /// The command that shows the kernel's log and trace events from now on, until its input ends; `None` where they are not
    /// to be shown.
    pub(crate) fn follower(&self) -> Option<Command<'a>> {
        let ModuleSpec { show_log, trace, .. } = self.spec;
        let wanted = *show_log || !trace.is_empty();
        let command = || {
            let command = Command::of_agent(self.vm, GuestUser::default());
            let command = command.args(["module", "follow", &self.log_next.to_string()]);
            command.args(trace).stdin(Stdio::Piped).stderr(Stdio::Null)
        };
        wanted.then(command)
    }

    /// What could not be looked for, and why.
    pub(crate) fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// Loads the kernel's modules that they need, which stay.
    fn load_needs(&mut self, step: &mut Step) -> Result<bool, Error> {
        let needs = self.build.needs();
        if !needs.is_empty() {
            let words = ["-a"].into_iter().chain(needs.iter().copied());
            if let Some(said) = self.modprobe(words, step)? {
                step.fail(format!("modprobe {}: {said}", needs.join(" ")));
            }
        }
        Ok(step.goes_on)
    }

    /// Runs modprobe; gives what it said if it failed.
    fn modprobe<'w>(
        &self,
        words: impl Iterator<Item = &'w str>,
        step: &mut Step,
    ) -> Result<Option<String>, Error> {
        let command = self.vm.command("modprobe").args(words);
        match within(self.vm, self.spec.step_time, || command.output())? {
            Some(output) if output.status.success() => Ok(None),
            Some(output) => Ok(Some(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
            None => {
                step.fail("modprobe took too long, and the VM was ended".to_owned());
                Ok(None)
            }
        }
    }

    /// The modules with their parameters.
    fn module_files(&self, step: &mut Step) -> Result<Vec<ModuleFile>, Error> {
        let all = &self.build.modules;
        let names: Vec<&str> = all.iter().map(|module| module.name.as_str()).collect();
        for parameter in self.spec.strangers(&names) {
            step.problems.push(format!("no module here takes `{parameter}`"));
        }
        let file = |(index, module): (usize, &BuiltModule)| {
            let parameters = self.spec.parameters_of(&module.name, index + 1 == all.len());
            Ok(ModuleFile { name: module.name.clone(), parameters, content: content_of(module)? })
        };
        all.iter().enumerate().map(file).collect()
    }

    /// What an answer says of a step: what was logged and refused, and where modules were.
    fn take(&mut self, answer: &ModuleAnswer, verb: &str, step: &mut Step) -> Result<(), Error> {
        let now = &answer.observation;
        let records = self.records(now);
        step.took += Duration::from_micros(answer.took_us);
        self.judge(now, &records, step);
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
            let Some(module) = self.build.modules.iter().find(|module| module.name == load.module)
            else {
                continue;
            };
            let file = match self.files.get(&module.name) {
                Some(file) => Rc::clone(file),
                None => Rc::new(ModuleCode::new(content_of(module)?)),
            };
            self.files.insert(module.name.clone(), Rc::clone(&file));
            self.code.push(LoadedCode::new(&module.name, file, &load.sections));
        }
        Ok(())
    }

    /// What an observation says by itself.
    fn judge(&mut self, now: &Observation, records: &[LogRecord], step: &mut Step) {
        step.problems.extend(checks::complaints(records, &self.allowed));
        // KUnit tells of its tests in the log.
        let lines = records.iter().filter(|record| record.facility == 0);
        let tap = Tap::read(lines.map(|record| record.text.as_str()));
        step.problems.extend(checks::listed("test failed", tap.failed));
        // Damage is told once, and there is no going on after a part of the kernel has died.
        step.problems.extend(checks::taints(self.known_taint, now));
        self.known_taint |= now.taint;
        step.goes_on &= !checks::has_died(now);
        if let Some(why) = &now.untracked {
            self.unknown.push(format!("memory that is not freed: {why}"));
        }
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
            self.modprobe(["-ra"].into_iter().chain(others), step)?;
            let Some(looked) = self.look_again(&now, step)? else { return Ok(()) };
            now = looked;
        }
        let imports = |names: &[&str]| {
            let mut all = self.build.modules.iter().flat_map(|module| &module.imports);
            all.any(|name| names.contains(&name.as_str()))
        };
        let (later, unseen) = (imports(&DEFERRED), imports(&UNSEEN));
        let deadline = Instant::now() + if later { GRACE_TIME } else { SETTLE_TIME };
        let mut left = self.left(&now);
        while !left.is_empty() && Instant::now() < deadline {
            std::thread::sleep(SETTLE_STEP);
            let Some(looked) = self.look_again(&now, step)? else { break };
            now = looked;
            left = self.left(&now);
        }
        if unseen && !checks::not_freed(&self.before, &now, &self.code).is_empty() {
            let what = "memory that is not freed: there is some, but they free in bulk or after a grace \
                period, which cannot be followed";
            self.unknown.push(what.to_owned());
            left.retain(|what| !what.starts_with(checks::NOT_FREED));
        }
        step.problems.extend(left);
        let others = checks::newcomers(&self.before, &now);
        if !others.is_empty() {
            let others = others.join(", ");
            self.unknown.push(format!("names that are left behind: they may be those of {others}"));
        }
        self.unknown.dedup();
        Ok(())
    }

    /// Looks once more. kmemleak has looked when they were removed.
    fn look_again(
        &mut self,
        earlier: &Observation,
        step: &mut Step,
    ) -> Result<Option<Observation>, Error> {
        let asked = self.ask(&ModuleRequest::Look, self.spec.step_time, step)?;
        let Some(answer) = asked else { return Ok(None) };
        let mut now = answer.observation;
        let records = self.records(&now);
        self.judge(&now, &records, step);
        now.kmemleak.clone_from(&earlier.kmemleak);
        if now.untracked.is_some() {
            now.unfreed.clone_from(&earlier.unfreed);
        }
        Ok(Some(now))
    }

    fn left(&self, now: &Observation) -> Vec<String> {
        let mut left = checks::not_freed(&self.before, now, &self.code);
        left.extend(checks::left_behind(&self.before, now));
        left.extend(checks::users(&self.before, now));
        left.extend(checks::listed("kmemleak", now.kmemleak.clone()));
        left
    }

    /// Asks; if there is no answer, the step has failed.
    fn ask(
        &mut self,
        request: &ModuleRequest,
        limit: Duration,
        step: &mut Step,
    ) -> Result<Option<ModuleAnswer>, Error> {
        match self.session.ask(request, limit)? {
            Reply::Answer(answer) => return Ok(Some(*answer)),
            Reply::Died(status) => {
                step.fail(format!("the process that did it ended with {status}"));
            }
            Reply::TimedOut => {
                let seconds = limit.as_secs_f64();
                let place = match within(self.vm, STACKS_TIME, || self.stuck_in())? {
                    None => ", and the guest does not answer any more".to_owned(),
                    Some(stack) if stack.is_empty() => String::new(),
                    Some(stack) => format!(", in {}", stack.join(" <- ")),
                };
                step.fail(format!("it took longer than {seconds} s{place}"));
            }
        }
        Ok(None)
    }

    /// Where the task is that loads or unloads a module: the kernel shows what all blocked tasks and all processors do.
    fn stuck_in(&self) -> Result<Vec<String>, Error> {
        let ask = "echo w > /proc/sysrq-trigger; echo l > /proc/sysrq-trigger";
        self.vm.command("sh").args(["-c", ask]).output()?;
        let mut session = Session::open(self.vm, self.log_next)?;
        let Reply::Answer(answer) = session.ask(&ModuleRequest::Glance, STACKS_TIME)? else {
            return Ok(Vec::new());
        };
        let records = parsed(&answer.observation);
        let lines: Vec<&str> = records.iter().map(|record| record.text.as_str()).collect();
        let frames = checks::frames_of_module_calls(&lines);
        Ok(match self.debug_info {
            Some(info) => decode(&frames, &info.symbols()),
            None => frames,
        })
    }

    /// Records of the log that are new in an observation.
    fn records(&mut self, now: &Observation) -> Vec<LogRecord> {
        self.log_next = now.log_next;
        parsed(now)
    }
}

fn parsed(now: &Observation) -> Vec<LogRecord> {
    now.log.iter().filter_map(|record| parse_log_record(record)).collect()
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
///
/// # Errors
/// When it cannot be read.
pub(crate) fn content_of(module: &BuiltModule) -> Result<Vec<u8>, Error> {
    std::fs::read(&module.path).map_err(|source| Error::Io {
        what: "read the module",
        path: module.path.clone(),
        source,
        hint: "",
    })
}
