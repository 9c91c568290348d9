//! `vmlab run` and `vmlab shell`.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use vmlab::artifacts::Progress;
use vmlab::hypervisor::ExitReason;
use vmlab::report::{Phase, Report};
use vmlab::{Error, ExitStatus, PreparedVm, Vm};

use crate::command::execute;
use crate::exit::Code;
use crate::output;
use crate::progress::Display;
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
    /// One a kernel, in their order.
    runs: Vec<Outcome>,
}

#[derive(Debug, Serialize)]
struct Outcome {
    kernel: Option<String>,
    command: Vec<String>,
    exit_code: u8,
    signal: Option<i32>,
    error: Option<String>,
    exit_reason: Option<ExitReason>,
    console_log: Option<PathBuf>,
    report: Option<Report>,
}

/// What a run under one kernel came to: how the command ended, if there was one, and what is known of
/// the VM.
struct Ran {
    status: Result<Option<ExitStatus>>,
    report: Option<Report>,
}

impl Ran {
    fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self { status: Err(error.into()), report: None }
    }

    fn code(&self) -> Code {
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
    let mut outcomes = Vec::new();
    for kernel in &request.kernels {
        let display = Arc::new(Display::new(request.verbosity));
        let ran = under(request, kernel.as_ref(), &signals, &display, &mut input);
        display.clear();
        signals.idle();
        let code = match (&ran.status, signals.killed_by()) {
            (_, Some(signal)) => Code::of_signal(signal),
            (Err(error), None) => {
                output::error(error);
                ran.code()
            }
            (Ok(_), None) => ran.code(),
        };
        if first_failure == Code::SUCCESS {
            first_failure = code;
        }
        if let (Some(_), Some(report)) = (&request.timings, &ran.report) {
            let title = format!("{} ({})", report.release, report.accel.name());
            let run = Timed { title, spans: report.timings.clone() };
            output::lines(&timings::list(&run));
            timed.push(run);
        }
        outcomes.push(outcome(request, kernel.clone(), code, ran));
        if signals.killed_by().is_some() {
            break;
        }
    }
    if let (Some(mut file), Some(path)) = (json, &request.json) {
        let outcomes = Outcomes { version: JSON_VERSION, runs: outcomes };
        let json = serde_json::to_vec_pretty(&outcomes)?;
        file.write_all(&json).with_context(|| unwritable(path))?;
    }
    if let Some((mut file, path)) = svg {
        file.write_all(timings::draw(&timed).as_bytes()).with_context(|| undrawable(path))?;
    }
    Ok(first_failure)
}

fn undrawable(path: &std::path::Path) -> String {
    format!("the timings cannot be drawn in {}", path.display())
}

fn unwritable(path: &std::path::Path) -> String {
    format!("the report cannot be written to {}", path.display())
}

fn outcome(request: &Request, kernel: Option<String>, code: Code, ran: Ran) -> Outcome {
    let error = ran.status.as_ref().err();
    let report = ran.report;
    Outcome {
        kernel,
        command: request.command.iter().map(|arg| arg.to_string_lossy().into_owned()).collect(),
        exit_code: code.0,
        signal: ran.status.as_ref().ok().and_then(|status| (*status)?.signal()),
        error: error.map(|error| format!("{error:#}")),
        exit_reason: report.as_ref().and_then(|report| report.exit_reason.clone()),
        console_log: report.as_ref().and_then(|report| report.console_log.clone()),
        report,
    }
}

/// One run, under one kernel.
fn under(
    request: &Request,
    kernel: Option<&String>,
    signals: &SignalThread,
    display: &Arc<Display>,
    input: &mut Input,
) -> Ran {
    let progress: Arc<dyn Progress + Send> = display.clone();
    let mut vm = request.vm.clone().progress(progress);
    if let Some(kernel) = kernel {
        vm = vm.kernel(kernel);
    }
    let prepared = match vm.prepare() {
        Ok(prepared) => prepared,
        Err(error) => return Ran::failed(error),
    };
    if request.dry_run {
        display.clear();
        return Ran { status: dry_run(&prepared).map(|()| None), report: None };
    }
    if let Some(why) = prepared.accel_reason() {
        display.note(&format!("TCG, not KVM: {why}"));
    }
    if request.verbosity == Verbosity::Verbose
        && let Some(confinement) = prepared.confinement()
    {
        display.note(&confinement);
    }
    let mut report = prepared.report();
    let begun = Instant::now();
    let vm = match start(request, prepared, signals) {
        Ok(vm) => vm,
        Err(error) => {
            report.failed(Phase::Boot, begun.elapsed(), &error);
            return Ran { status: Err(error.into()), report: Some(report) };
        }
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

fn start(request: &Request, prepared: PreparedVm, signals: &SignalThread) -> Result<Vm, Error> {
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
    if status.oom_kills() > 0 {
        let text = format!(
            "the guest ran out of memory and killed {} process(es); it has {}, --memory gives it more",
            status.oom_kills(),
            vm.config().memory
        );
        // Of a command that failed it is the cause, which -q does not keep back.
        if status.success() { display.note(&text) } else { output::note(&text) }
    }
    Ok(status)
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
fn quoted(word: &str) -> String {
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
