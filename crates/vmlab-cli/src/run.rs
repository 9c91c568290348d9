//! `vmlab run` and `vmlab shell`.

use std::io::{self, Seek};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use rustix::event::{EventfdFlags, eventfd};
use serde::Serialize;
use vmlab::artifacts::Progress;
use vmlab::guest::TerminalSize;
use vmlab::hypervisor::ExitReason;
use vmlab::report::Report;
use vmlab::{Command, Error, ExitStatus, PreparedVm, Stdio, Vm};

use crate::exit::Code;
use crate::output;
use crate::progress::Display;
use crate::request::{Request, Verbosity};
use crate::signals::{SignalThread, terminal_size};
use crate::stdio::{InputEnd, Patient, Streams, copy_input, unbuffered};
use crate::terminal::{EscapeKeys, RawMode};

/// The size of a terminal that does not tell its own.
const USUAL_SIZE: TerminalSize = TerminalSize { rows: 24, columns: 80 };

/// What is written for `--json`: one entry a kernel.
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

/// What a command came to.
struct Ran {
    code: Code,
    status: Option<ExitStatus>,
    report: Report,
}

pub(crate) fn run(request: &Request) -> Result<Code> {
    let signals = SignalThread::start()?;
    let mut input = Input::new(request.kernels.len());
    let mut first_failure = Code::SUCCESS;
    let mut outcomes = Vec::new();
    for kernel in &request.kernels {
        let display = Arc::new(Display::new(request.verbosity));
        let progress: Arc<dyn Progress + Send> = display.clone();
        let mut vm = request.vm.clone().progress(progress);
        if let Some(kernel) = kernel {
            vm = vm.kernel(kernel);
        }
        let result = vm.prepare().map_err(anyhow::Error::from).and_then(|prepared| {
            if request.dry_run {
                display.clear();
                return dry_run(&prepared).map(|()| None);
            }
            one(request, prepared, &signals, &display, &mut input).map(Some)
        });
        display.clear();
        signals.idle();
        let failed = result.as_ref().err();
        if let Some(error) = failed
            && signals.killed_by().is_none()
        {
            output::error(error);
        }
        let code = match (&result, signals.killed_by()) {
            (_, Some(signal)) => Code::of_signal(signal),
            (Ok(ran), None) => ran.as_ref().map_or(Code::SUCCESS, |ran| ran.code),
            (Err(error), None) => {
                error.downcast_ref::<Error>().map_or(Code::FAILED, Code::of_error)
            }
        };
        if first_failure == Code::SUCCESS {
            first_failure = code;
        }
        outcomes.push(outcome(request, kernel.as_ref(), code, result));
        if signals.killed_by().is_some() {
            break;
        }
    }
    if let Some(path) = &request.json {
        let json = serde_json::to_vec_pretty(&outcomes)?;
        std::fs::write(path, json)
            .with_context(|| format!("the report cannot be written to {}", path.display()))?;
    }
    Ok(first_failure)
}

fn outcome(
    request: &Request,
    kernel: Option<&String>,
    code: Code,
    result: Result<Option<Ran>>,
) -> Outcome {
    let (ran, error) = match result {
        Ok(ran) => (ran, None),
        Err(error) => (None, Some(error)),
    };
    let report = ran.as_ref().map(|ran| ran.report.clone());
    let cause = error.as_ref().and_then(|error| error.downcast_ref::<Error>());
    let evidence = cause.and_then(Error::evidence);
    let failed_by = match cause {
        Some(Error::Ended { reason, .. }) => Some(reason.clone()),
        Some(Error::BootTimeout { .. }) => Some(ExitReason::Timeout),
        _ => None,
    };
    Outcome {
        kernel: kernel.cloned(),
        command: request.command.iter().map(|arg| arg.to_string_lossy().into_owned()).collect(),
        exit_code: code.0,
        signal: ran.as_ref().and_then(|ran| ran.status?.signal()),
        error: error.as_ref().map(|error| format!("{error:#}")),
        exit_reason: report.as_ref().and_then(|r| r.exit_reason.clone()).or(failed_by),
        console_log: report
            .as_ref()
            .map(|report| report.console_log.clone())
            .or_else(|| evidence.map(|evidence| evidence.log.clone())),
        report,
    }
}

fn dry_run(prepared: &PreparedVm) -> Result<()> {
    let mut text = serde_json::to_string_pretty(prepared.config())?;
    text.push('\n');
    for word in prepared.command_line() {
        text.push_str(&quoted(&word));
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

fn one(
    request: &Request,
    prepared: PreparedVm,
    signals: &SignalThread,
    display: &Display,
    input: &mut Input,
) -> Result<Ran> {
    if let Some(why) = prepared.accel_reason() {
        display.note(&format!("TCG, not KVM: {why}"));
    }
    let verbose = request.verbosity == Verbosity::Verbose;
    let vm = prepared.start_watched(|handle| {
        signals.vm(Arc::clone(handle));
        if verbose {
            let console = handle.serial().subscribe();
            std::thread::spawn(move || {
                for bytes in console {
                    let _ = io::Write::write_all(&mut io::stderr().lock(), &bytes);
                }
            });
        }
    })?;
    display.clear();
    if request.kernels.len() > 1 {
        display.note(&format!("{}:", vm.release()));
    }
    let code = execute(request, &vm, signals, input);
    signals.command_ended();
    let stopped = vm.shutdown();
    for warning in vm.take_warnings() {
        display.note(&format!("warning from the guest: {warning}"));
    }
    let status = code?;
    stopped?;
    if status.oom_kills() > 0 {
        display.note(&format!(
            "the guest ran out of memory and killed {} process(es); it has {}, --memory gives it more",
            status.oom_kills(),
            vm.config().memory
        ));
    }
    let report = vm.report();
    if verbose || (crate::stdio::stderr_is_watched() && request.verbosity == Verbosity::Normal) {
        output::note(&summary(&report, status));
    }
    Ok(Ran { code: Code(status.shell_code()), status: Some(status), report })
}

fn summary(report: &Report, status: ExitStatus) -> String {
    let phases: Vec<String> = report
        .phases
        .iter()
        .map(|phase| format!("{} {:.2} s", phase.phase.name(), phase.ms / 1000.0))
        .collect();
    format!("{} ({}), {status}: {}", report.release, report.accel.name(), phases.join(", "))
}

fn execute(
    request: &Request,
    vm: &Vm,
    signals: &SignalThread,
    input: &mut Input,
) -> Result<ExitStatus> {
    let streams = Streams::of_this_process();
    let use_input = input.next();
    let mut command = vm.command(&request.command[0]).args(&request.command[1..]);
    command = match request.terminal {
        true => command.terminal(terminal_size().unwrap_or(USUAL_SIZE)),
        false => with_streams(command, streams, use_input),
    };
    let mut child = command.spawn()?;
    signals.command(child.control());
    let raw = if request.terminal { Some(RawMode::enter()?) } else { None };
    let escape = request.terminal.then(EscapeKeys::default);
    let stop = eventfd(0, EventfdFlags::CLOEXEC).context("an event cannot be made")?;

    let stdin = child.stdin.take().filter(|_| use_input || request.terminal);
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let escaped = AtomicBool::new(false);
    let status = std::thread::scope(|scope| {
        if let Some(stdin) = stdin {
            let (stop, handle, escaped) = (stop.as_fd(), vm.handle(), &escaped);
            scope.spawn(move || {
                if copy_input(stdin, stop, escape) == InputEnd::Escape {
                    escaped.store(true, Ordering::Relaxed);
                    handle.kill(ExitReason::Killed);
                }
            });
        }
        let out = stdout.map(|mut stdout| {
            let to = unbuffered(io::stdout());
            // A reader that is gone is told to the command by dropping the stream.
            scope.spawn(move || stdout.copy_to(&mut Patient(to?)).map_err(anyhow::Error::from))
        });
        let err = stderr.map(|mut stderr| {
            let to = unbuffered(io::stderr());
            scope.spawn(move || stderr.copy_to(&mut Patient(to?)).map_err(anyhow::Error::from))
        });
        for copier in [out, err].into_iter().flatten() {
            let _ = copier.join();
        }
        let status = child.wait();
        // Failing is not possible: the counter is far from full.
        let _ = rustix::io::write(&stop, &1u64.to_ne_bytes());
        status
    });
    drop(raw);
    if escaped.into_inner() {
        bail!("the VM was ended by Ctrl-], pressed three times");
    }
    Ok(status?)
}

fn with_streams<'vm>(command: Command<'vm>, streams: Streams, use_input: bool) -> Command<'vm> {
    let stdio = |null: bool| if null { Stdio::Null } else { Stdio::Piped };
    let command = command
        .stdin(stdio(streams.stdin_null || !use_input))
        .stdout(stdio(streams.stdout_null))
        .stderr(stdio(streams.stderr_null));
    if streams.merged { command.merge_stderr() } else { command }
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
