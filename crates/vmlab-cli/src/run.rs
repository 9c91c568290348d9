//! `vmlab run` and `vmlab shell`.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde::Serialize;
use vmlab::artifacts::Progress;
use vmlab::config::Machine;
use vmlab::hypervisor::ExitReason;
use vmlab::report::Report;
use vmlab::{Error, ExitStatus, FailedStart, PreparedVm, Vm};

use crate::command::execute;
use crate::exit::Code;
use crate::output;
use crate::progress::Display;
use crate::repeat::{self, Numbered, Summary};
use crate::request::{Request, Verbosity};
use crate::signals::SignalThread;
use crate::stdio::unbuffered;
use crate::timings::{self, Timed};

/// The version of what `--json` writes; it rises when something that was there changes or goes.
const JSON_VERSION: u32 = 1;

/// What is written for `--json`.
#[derive(Debug, Serialize)]
struct Outcomes {
    version: u32,
    /// One a kernel, in their order; with `--repeat`, all of a kernel, then those of the next.
    runs: Vec<Outcome>,
    /// One a kernel, where the command was repeated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    summaries: Vec<Summary>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    kernel: Option<String>,
    command: Vec<String>,
    exit_code: u8,
    signal: Option<i32>,
    error: Option<String>,
    exit_reason: Option<ExitReason>,
    console_log: Option<PathBuf>,
    report: Option<Report>,
    #[serde(flatten)]
    pub(crate) numbered: Option<Numbered>,
}

/// What one run came to: how the command ended, if there was one, and what is known of the VM.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: Result<Option<ExitStatus>>,
    pub(crate) report: Option<Report>,
}

/// What was done under one kernel.
#[derive(Debug)]
pub(crate) struct Under {
    pub(crate) code: Code,
    pub(crate) outcomes: Vec<Outcome>,
    pub(crate) summary: Option<Summary>,
}

impl Under {
    /// A single run. What failed of vmlab itself is told.
    pub(crate) fn one(request: &Request, kernel: Option<&String>, ran: Ran) -> Self {
        if let Err(error) = &ran.status {
            output::error(error);
        }
        let code = ran.code();
        Self { code, outcomes: vec![outcome(request, kernel, code, ran)], summary: None }
    }
}

impl Ran {
    pub(crate) fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self { status: Err(error.into()), report: None }
    }

    pub(crate) fn not_started(failed: FailedStart) -> Self {
        Self { status: Err(failed.error.into()), report: Some(failed.report) }
    }

    pub(crate) fn code(&self) -> Code {
        match &self.status {
            Ok(status) => status.map_or(Code::SUCCESS, |status| Code(status.shell_code())),
            Err(error) => error.downcast_ref::<Error>().map_or(Code::FAILED, Code::of_error),
        }
    }
}

pub(crate) fn run(request: &Request) -> Result<Code> {
    // Opened before anything runs: a report that cannot be written should not cost a run.
    let json = match &request.json {
        Some(path) => Some(File::create(path).with_context(|| unwritable(path))?),
        None => None,
    };
    let svg = request.timings.as_ref().and_then(|timings| timings.svg.as_ref());
    let svg = match svg {
        Some(path) => Some((File::create(path).with_context(|| undrawable(path))?, path)),
        None => None,
    };
    let mut timed = Vec::new();
    let signals = SignalThread::start()?;
    let mut input = Input::new(request.kernels.len());
    let mut first_failure = Code::SUCCESS;
    let (mut outcomes, mut summaries) = (Vec::new(), Vec::new());
    for kernel in &request.kernels {
        let display = Arc::new(Display::new(request.verbosity));
        let kernel = kernel.as_ref();
        let repeat = request.repeat.as_ref().filter(|_| !request.dry_run);
        let under = match repeat {
            Some(repeat) => repeat::under(request, repeat, kernel, &signals, &display),
            None => Ok(once(request, kernel, &signals, &display, &mut input)),
        };
        display.clear();
        signals.idle();
        let under = under?;
        let killed = signals.killed_by();
        let code = killed.map_or(under.code, Code::of_signal);
        if first_failure == Code::SUCCESS {
            first_failure = code;
        }
        if request.timings.is_some() {
            for report in under.outcomes.iter().filter_map(|outcome| outcome.report.as_ref()) {
                // The monitor has a board of its own, QEMU has several.
                let by = match report.machine {
                    Machine::Native => Machine::Native.name(),
                    Machine::Microvm | Machine::Q35 => report.accel.name(),
                };
                let title = format!("{} ({by})", report.release);
                let (spans, exits) = (report.timings.clone(), report.exits.clone());
                let run = Timed { title, spans, exits };
                output::lines(&timings::list(&run));
                timed.push(run);
            }
        }
        outcomes.extend(under.outcomes);
        summaries.extend(under.summary);
        let enough = repeat.is_some_and(|repeat| repeat.until_failure) && code != Code::SUCCESS;
        if killed.is_some() || enough {
            break;
        }
    }
    if let (Some(mut file), Some(path)) = (json, &request.json) {
        let outcomes = Outcomes { version: JSON_VERSION, runs: outcomes, summaries };
        let json = serde_json::to_vec_pretty(&outcomes)?;
        file.write_all(&json).with_context(|| unwritable(path))?;
    }
    if let Some((mut file, path)) = svg {
        file.write_all(timings::draw(&timed).as_bytes()).with_context(|| undrawable(path))?;
    }
    Ok(first_failure)
}

/// A single run that nothing is written of: its code, and whether the command came to its end.
pub(crate) fn one(request: &Request) -> Result<(Code, bool)> {
    let signals = SignalThread::start()?;
    let display = Arc::new(Display::new(request.verbosity));
    let kernel = request.kernels.first().and_then(Option::as_ref);
    let ran = under(request, kernel, &signals, &display, &mut Input::new(1));
    display.clear();
    signals.idle();
    if let Some(signal) = signals.killed_by() {
        return Ok((Code::of_signal(signal), true));
    }
    if let Err(error) = &ran.status {
        output::error(error);
    }
    Ok((ran.code(), ran.status.is_ok()))
}

fn undrawable(path: &std::path::Path) -> String {
    format!("the timings cannot be drawn in {}", path.display())
}

fn unwritable(path: &std::path::Path) -> String {
    format!("the report cannot be written to {}", path.display())
}

pub(crate) fn outcome(request: &Request, kernel: Option<&String>, code: Code, ran: Ran) -> Outcome {
    let error = ran.status.as_ref().err();
    let report = ran.report;
    Outcome {
        kernel: kernel.cloned(),
        command: request.command.iter().map(|arg| arg.to_string_lossy().into_owned()).collect(),
        exit_code: code.0,
        signal: ran.status.as_ref().ok().and_then(|status| (*status)?.signal()),
        error: error.map(|error| format!("{error:#}")),
        exit_reason: report.as_ref().and_then(|report| report.exit_reason.clone()),
        console_log: report.as_ref().and_then(|report| report.console_log.clone()),
        report,
        numbered: None,
    }
}

/// One run under one kernel, and what is to be told of it.
fn once(
    request: &Request,
    kernel: Option<&String>,
    signals: &SignalThread,
    display: &Arc<Display>,
    input: &mut Input,
) -> Under {
    let ran = under(request, kernel, signals, display, input);
    display.clear();
    match signals.killed_by().map(Code::of_signal) {
        Some(code) => {
            Under { code, outcomes: vec![outcome(request, kernel, code, ran)], summary: None }
        }
        None => Under::one(request, kernel, ran),
    }
}

/// Makes everything ready for VMs with a kernel, and says what is not as it might have been.
pub(crate) fn prepare(
    request: &Request,
    kernel: Option<&String>,
    display: &Arc<Display>,
) -> Result<PreparedVm, Error> {
    let progress: Arc<dyn Progress + Send> = display.clone();
    let mut vm = request.vm.clone().progress(progress);
    if let Some(kernel) = kernel {
        vm = vm.kernel(kernel);
    }
    let prepared = vm.prepare()?;
    if request.dry_run {
        return Ok(prepared);
    }
    if let Some(why) = prepared.accel_reason() {
        display.note(&format!("TCG, not KVM: {why}"));
    }
    if request.verbosity == Verbosity::Verbose
        && let Some(confinement) = prepared.confinement()
    {
        display.note(&confinement);
    }
    Ok(prepared)
}

fn under(
    request: &Request,
    kernel: Option<&String>,
    signals: &SignalThread,
    display: &Arc<Display>,
    input: &mut Input,
) -> Ran {
    let prepared = match prepare(request, kernel, display) {
        Ok(prepared) => prepared,
        Err(error) => return Ran::failed(error),
    };
    if request.dry_run {
        display.clear();
        return Ran { status: dry_run(&prepared).map(|()| None), report: None };
    }
    let vm = match start(request, prepared, signals) {
        Ok(vm) => vm,
        Err(failed) => return Ran::not_started(*failed),
    };
    display.clear();
    if request.kernels.len() > 1 {
        display.note(&format!("{}:", vm.release()));
    }
    let status = to_the_end(request, &vm, signals, display, input);
    let report = vm.report();
    if let Ok(status) = &status
        && (request.verbosity == Verbosity::Verbose || display.is_live())
    {
        output::note(&summary(&report, *status));
    }
    Ran { status: status.map(Some), report: Some(report) }
}

fn start(
    request: &Request,
    prepared: PreparedVm,
    signals: &SignalThread,
) -> Result<Vm, Box<FailedStart>> {
    prepared.start_watched(|handle| {
        signals.vm(Arc::clone(handle));
        if request.verbosity == Verbosity::Verbose {
            let console = handle.serial().subscribe();
            std::thread::spawn(move || {
                for bytes in console {
                    let _ = io::stderr().lock().write_all(&bytes);
                }
            });
        }
    })
}

/// Runs the command and ends the VM.
fn to_the_end(
    request: &Request,
    vm: &Vm,
    signals: &SignalThread,
    display: &Display,
    input: &mut Input,
) -> Result<ExitStatus> {
    let status = execute(request, vm, signals, input.next());
    signals.command_ended();
    if request.timings.is_some() {
        // A guest that has ended is reported below.
        let _ = vm.read_boot_log();
    }
    let stopped = vm.shutdown();
    for warning in vm.take_warnings() {
        display.note(&format!("warning from the guest: {warning}"));
    }
    let status = status?;
    stopped?;
    if let Some(text) = out_of_memory(vm, status) {
        // Of a command that failed it is the cause, which -q does not keep back.
        if status.success() { display.note(&text) } else { output::note(&text) }
    }
    Ok(status)
}

/// What to say of a command that needed more memory than the guest has.
pub(crate) fn out_of_memory(vm: &Vm, status: ExitStatus) -> Option<String> {
    let killed = status.oom_kills();
    (killed > 0).then(|| {
        format!(
            "the guest ran out of memory and killed {killed} process(es); it has {}, --memory gives \
             it more",
            vm.config().memory
        )
    })
}

fn summary(report: &Report, status: ExitStatus) -> String {
    let phases: Vec<String> = report
        .phases
        .iter()
        .map(|phase| format!("{} {:.2} s", phase.phase.name(), phase.ms / 1000.0))
        .collect();
    format!("{} ({}), {status}: {}", report.release, report.accel.name(), phases.join(", "))
}

fn dry_run(prepared: &PreparedVm) -> Result<()> {
    let mut text = serde_json::to_string_pretty(prepared.config())?;
    text.push('\n');
    for word in prepared.command_line() {
        text.push_str(&quoted(&word.to_string_lossy()));
        text.push(' ');
    }
    text.push('\n');
    output::stdout(text.as_bytes())
}

/// A word as a shell reads it.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,./:@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Standard input, for one kernel after the other.
struct Input {
    several: bool,
    start: Option<u64>,
    used: bool,
}

impl Input {
    fn new(kernels: usize) -> Self {
        let start = unbuffered(io::stdin()).ok().and_then(|mut file| file.stream_position().ok());
        Self { several: kernels > 1, start, used: false }
    }

    /// Whether the next command gets the input: a file is read again from where it began, a pipe goes
    /// to the first command only.
    fn next(&mut self) -> bool {
        let first = !std::mem::replace(&mut self.used, true);
        match self.start {
            _ if first || !self.several => true,
            Some(start) => unbuffered(io::stdin())
                .is_ok_and(|mut file| file.seek(io::SeekFrom::Start(start)).is_ok()),
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_needed() {
        assert_eq!(quoted("-m"), "-m");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
