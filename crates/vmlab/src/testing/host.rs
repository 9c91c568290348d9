//! A test's part on the host: the VM, what comes from it, and what that means.

use std::any::Any;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::panic::{self, AssertUnwindSafe};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use super::plan::Plan;
use super::records::{Ended, Piece, Reader, Record};
use super::{Test, guest, report};
use crate::error::chain;
use crate::events::{EventKinds, KernelEvent};
use crate::hypervisor::ExitReason;
use crate::report::Report;
use crate::results::{AttemptResult, Failure, Measurement, Outcome};
use crate::runner::{Watch, of_a_vm};
use crate::sync::lock;
use crate::timings::millis;
use crate::{Error, PreparedVm, Stdio, Vm, VmBuilder, random};

/// How long what a test has left running may keep its output open. It is ended with the VM.
const LINGER: Duration = Duration::from_secs(2);

/// How much of a test's output is in its results, in bytes. The end has what failed.
const KEPT_OUTPUT: usize = 64 * 1024;

/// How much is kept of what the program writes before the body begins, to be shown if it never does, in bytes.
const KEPT_PRELUDE: usize = 4 * 1024;

/// The longest line that is printed in one piece, in bytes.
const LONGEST_LINE: usize = 64 * 1024;

/// How many measurements and details of one test are taken.
const MAX_TOLD: usize = 10_000;

/// Hexadecimal digits of the word that tells records from what else a test writes.
const CHANNEL_DIGITS: usize = 16;

/// How a body ended.
enum Body {
    Passed,
    /// It returned a failure.
    Failed(String),
    /// It panicked in the guest.
    Panicked {
        message: Option<String>,
        place: Option<String>,
    },
    /// It panicked on the host.
    Unwound(Box<dyn Any + Send>),
    /// It cannot run here.
    Skipped(String),
    /// It did not come to its end.
    Lost(Failure),
}

/// What a test came to.
enum Verdict {
    Passed,
    Skipped(String),
    /// As the body itself has it.
    Body,
    Failed(Failure),
}

/// What is known of a run, beside how its body ended.
#[derive(Default)]
struct Ran {
    report: Option<Report>,
    events: Vec<KernelEvent>,
    output: Tail,
    measurements: Vec<Measurement>,
    details: std::collections::BTreeMap<String, serde_json::Value>,
    console: String,
    notes: Vec<String>,
}

/// A test whose body runs in the guest.
pub(super) fn in_guest(test: &Test) {
    let word = match random::hex(CHANNEL_DIGITS) {
        Ok(word) => word,
        Err(error) => return fail(test, chain(&error)),
    };
    with_plan(test, Some(&word), |plan, prepared, ran| {
        in_a_vm(prepared, ran, |vm, ran| body_in_guest(test, plan, vm, &word, ran))
    });
}

/// A test whose body is given a VM that has started.
pub(super) fn with_vm(test: &Test, body: fn(&mut Vm) -> Option<String>) {
    with_plan(test, None, |_, prepared, ran| {
        in_a_vm(prepared, ran, |vm, _| Ok(on_host(|| body(vm))))
    });
}

/// A test whose body starts VMs itself.
pub(super) fn with_builder(test: &Test, body: fn(VmBuilder) -> Option<String>) {
    with_plan(test, None, |plan, _, _| on_host(|| body(plan.vm.clone())));
}

/// Says that a test cannot run, for want of something that it needs.
pub(super) fn skipped(test: &Test, reason: &str) {
    let verdict = Verdict::Skipped(reason.to_owned());
    conclude(test, None, SystemTime::now(), Instant::now(), Ran::default(), Body::Passed, verdict);
}

/// Leaves a test out, and says so.
pub(super) fn left_out(test: &Test, reason: &str) {
    tell(&format!("SKIPPED {}: {reason}", test.path()));
    if let Some(expected) = test.settings.should_panic {
        // The harness takes a test that should panic and does not for failed.
        panic::resume_unwind(Box::new(expected.to_owned()));
    }
}

/// Fails a test, of which nothing has run.
pub(super) fn fail(test: &Test, message: String) {
    let verdict = Verdict::Failed(Failure::Infrastructure { message });
    conclude(test, None, SystemTime::now(), Instant::now(), Ran::default(), Body::Passed, verdict);
}

fn with_plan(
    test: &Test,
    channel: Option<&str>,
    run: impl FnOnce(&Plan, PreparedVm, &mut Ran) -> Body,
) {
    let (began, since) = (SystemTime::now(), Instant::now());
    let plan = match Plan::of(test, channel) {
        Ok(plan) => plan,
        Err(error) => return fail(test, chain(&error)),
    };
    let other_kernel = plan.other_kernel.clone();
    let mut ran = Ran::default();
    let prepared = match plan.vm.clone().prepare() {
        Ok(prepared) => prepared,
        Err(error) => {
            let said = chain(&error);
            let verdict = match is_missing(&error) {
                true => Verdict::Skipped(said),
                false => Verdict::Failed(Failure::Infrastructure { message: said }),
            };
            return conclude(test, other_kernel, began, since, ran, Body::Passed, verdict);
        }
    };
    let body = run(&plan, prepared, &mut ran);
    let verdict = judge(test, &plan, &body, &ran.events);
    conclude(test, other_kernel, began, since, ran, body, verdict);
}

/// Whether a VM cannot be had for want of something on this host, and not because of what the test says.
fn is_missing(error: &Error) -> bool {
    matches!(
        error,
        Error::Hypervisor(_)
            | Error::Kernel(_)
            | Error::KernelLacks { .. }
            | Error::Kvm(_)
            | Error::Firmware(_)
    )
}

/// Starts the VM, has the body run and ends the VM.
fn in_a_vm(
    prepared: PreparedVm,
    ran: &mut Ran,
    run: impl FnOnce(&mut Vm, &mut Ran) -> Result<Body, Error>,
) -> Body {
    let watch = Watch::default();
    // The harness runs as many tests at once.
    let tests = std::thread::available_parallelism().map_or(1, usize::from);
    let started = prepared.one_of(tests).start_watched(|vm| watch.vm(vm));
    let mut vm = match started {
        Ok(vm) => vm,
        Err(failed) => {
            ran.events = watch.finish();
            ran.report = Some(failed.report);
            return lost(&failed.error, ran);
        }
    };
    let ended = run(&mut vm, ran);
    // A body may have ended its VM.
    let stopped = match vm.handle().wait(Some(Instant::now())) {
        Some(_) => Ok(()),
        None => vm.shutdown(),
    };
    let warnings = vm.take_warnings();
    ran.notes.extend(warnings.iter().map(|text| format!("warning from the guest: {text}")));
    ran.report = Some(vm.report());
    drop(vm);
    ran.events = watch.finish();
    match (ended, stopped) {
        (Err(error), _) => lost(&error, ran),
        // What it wrote may not have arrived.
        (Ok(Body::Passed), Err(error)) => lost(&error, ran),
        (Ok(body), _) => body,
    }
}

fn lost(error: &Error, ran: &mut Ran) -> Body {
    if let Some(evidence) = error.evidence() {
        ran.console.clone_from(&evidence.tail);
    }
    Body::Lost(of_a_vm(error))
}

fn on_host(body: impl FnOnce() -> Option<String>) -> Body {
    match panic::catch_unwind(AssertUnwindSafe(body)) {
        Ok(None) => Body::Passed,
        Ok(Some(failure)) => {
            say(&failure);
            Body::Failed(failure)
        }
        Err(payload) => Body::Unwound(payload),
    }
}

/// Has this program run the test in the guest.
fn body_in_guest(
    test: &Test,
    plan: &Plan,
    vm: &mut Vm,
    word: &str,
    ran: &mut Ran,
) -> Result<Body, Error> {
    let deadline = Instant::now().checked_add(plan.timeout);
    let command = vm.command(&plan.program).arg(test.path());
    // Two threads, so that the harness runs the test in one that has its name.
    let command = command.args(["--exact", "--include-ignored", "--nocapture", "--test-threads=2"]);
    let mut child = command.stdin(Stdio::Null).spawn()?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let tail = Arc::new(Mutex::new(Tail::default()));
    let told = Mutex::new(Told::default());
    let status = std::thread::scope(|scope| {
        let (done, copied) = channel::<()>();
        if let Some(stdout) = stdout {
            let (told, tail, done) = (&told, Arc::clone(&tail), done.clone());
            let out = Printer { print: |text| print(text), line: Vec::new(), tail };
            scope.spawn(move || {
                read_records(stdout, word, told, out);
                drop(done);
            });
        }
        if let Some(stderr) = stderr {
            let tail = Arc::clone(&tail);
            let mut out = Printer { print: |text| print_error(text), line: Vec::new(), tail };
            let done = done.clone();
            scope.spawn(move || {
                read_all(stderr, |bytes| out.write(bytes));
                out.flush();
                drop(done);
            });
        }
        drop(done);
        let status = child.wait_until(deadline);
        match &status {
            Ok(Some(_)) => {
                // Nothing is ever sent: what ends the wait is that both are dropped.
                if copied.recv_timeout(LINGER) == Err(RecvTimeoutError::Timeout) {
                    // What the test has left running is ended, and its output with it.
                    let _ = vm.shutdown();
                }
            }
            // The VM's end ends the streams.
            Ok(None) => vm.handle().kill(ExitReason::Timeout),
            Err(_) => {}
        }
        status
    });
    let mut told = std::mem::take(&mut *lock(&told));
    ran.output = std::mem::take(&mut *lock(&tail));
    ran.measurements = std::mem::take(&mut told.measurements);
    ran.details = std::mem::take(&mut told.details);
    let limit = plan.timeout.as_secs_f64();
    Ok(match (status?, told.ended) {
        (None, _) => {
            Body::Lost(Failure::Timeout { what: format!("the test took longer than {limit} s") })
        }
        (Some(status), Some(Ended::Passed)) if status.success() => Body::Passed,
        (Some(status), Some(Ended::Skipped(reason))) if status.success() => Body::Skipped(reason),
        (Some(_), Some(Ended::Failed(failure))) => Body::Failed(failure),
        (Some(_), Some(Ended::Panicked { message, place })) => Body::Panicked { message, place },
        (Some(status), _) if told.began => {
            let how = format!("the test's program ended before the test did: {status}");
            Body::Lost(Failure::Test { how })
        }
        (Some(status), _) => {
            let said = String::from_utf8_lossy(&told.prelude).trim().to_owned();
            let message =
                format!("the program in the guest did not run the test ({status}): {said}");
            Body::Lost(Failure::Infrastructure { message })
        }
    })
}

/// What a test has told.
#[derive(Default)]
struct Told {
    began: bool,
    ended: Option<Ended>,
    measurements: Vec<Measurement>,
    details: std::collections::BTreeMap<String, serde_json::Value>,
    prelude: Vec<u8>,
}

impl Told {
    fn record(&mut self, record: Record) {
        match record {
            Record::Began => self.began = true,
            Record::Ended(ended) => self.ended = Some(ended),
            Record::Measured(measured) if self.measurements.len() < MAX_TOLD => {
                self.measurements.push(measured);
            }
            Record::Detail { key, value } if self.details.len() < MAX_TOLD => {
                self.details.insert(key, value);
            }
            Record::Measured(_) | Record::Detail { .. } => {}
        }
    }
}

fn read_records(
    stdout: impl Read,
    word: &str,
    told: &Mutex<Told>,
    mut out: Printer<impl Fn(&str)>,
) {
    let mut reader = Reader::new(word);
    read_all(stdout, |bytes| {
        let mut told = lock(told);
        reader.feed(bytes, |piece| match piece {
            Piece::Record(record) => told.record(record),
            // What the harness writes around the body is of no interest.
            Piece::Text(_) if told.ended.is_some() => {}
            Piece::Text(text) if told.began => out.write(text),
            Piece::Text(text) => {
                let room = KEPT_PRELUDE.saturating_sub(told.prelude.len()).min(text.len());
                told.prelude.extend_from_slice(&text[..room]);
            }
        });
    });
    out.flush();
}

/// Reads until the end. A stream fails only when the VM has ended, which is found elsewhere.
fn read_all(mut from: impl Read, mut take: impl FnMut(&[u8])) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        take(&buffer[..count]);
    }
}

/// The last of an output.
#[derive(Default)]
struct Tail(VecDeque<u8>);

impl Tail {
    fn add(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
        let excess = self.0.len().saturating_sub(KEPT_OUTPUT);
        self.0.drain(..excess);
    }

    fn text(self) -> String {
        String::from_utf8_lossy(&Vec::from(self.0)).into_owned()
    }
}

/// Prints bytes as lines of text.
struct Printer<P: Fn(&str)> {
    print: P,
    line: Vec<u8>,
    tail: Arc<Mutex<Tail>>,
}

impl<P: Fn(&str)> Printer<P> {
    fn write(&mut self, bytes: &[u8]) {
        lock(&self.tail).add(bytes);
        self.line.extend_from_slice(bytes);
        let whole = match self.line.iter().rposition(|byte| *byte == b'\n') {
            Some(end) => end + 1,
            None if self.line.len() > LONGEST_LINE => self.line.len(),
            None => return,
        };
        let rest = self.line.split_off(whole);
        (self.print)(&String::from_utf8_lossy(&self.line));
        self.line = rest;
    }

    fn flush(&mut self) {
        if !self.line.is_empty() {
            (self.print)(&String::from_utf8_lossy(&self.line));
            self.line.clear();
        }
    }
}

fn judge(test: &Test, plan: &Plan, body: &Body, events: &[KernelEvent]) -> Verdict {
    let wanted = plan.expect.and_then(|kind| events.iter().position(|event| event.kind == kind));
    if let Body::Skipped(reason) = body {
        return Verdict::Skipped(reason.clone());
    }
    if let Body::Lost(failure @ Failure::Infrastructure { .. }) = body {
        return Verdict::Failed(failure.clone());
    }
    // What follows from the expected event is expected as well.
    if let Some(event) = unexpected(&events[..wanted.unwrap_or(events.len())], &plan.fail_on) {
        return Verdict::Failed(Failure::Event { title: event.title.clone() });
    }
    match (body, plan.expect, test.settings.expect_err) {
        (_, Some(_), _) if wanted.is_some() => Verdict::Passed,
        (Body::Lost(failure), _, _) => Verdict::Failed(failure.clone()),
        (Body::Passed, Some(expected), _) => Verdict::Failed(Failure::MissingEvent { expected }),
        (Body::Passed, None, true) => Verdict::Failed(Failure::Test {
            how: "the test passed, and should have failed".to_owned(),
        }),
        (Body::Passed, None, false) | (_, None, true) => Verdict::Passed,
        _ => Verdict::Body,
    }
}

fn unexpected<'a>(events: &'a [KernelEvent], fail_on: &EventKinds) -> Option<&'a KernelEvent> {
    events.iter().find(|event| fail_on.contains(&event.kind))
}

/// Writes down what a test came to, and passes or fails it.
fn conclude(
    test: &Test,
    other_kernel: Option<String>,
    began: SystemTime,
    since: Instant,
    ran: Ran,
    body: Body,
    verdict: Verdict,
) {
    let verdict = match verdict {
        Verdict::Skipped(reason) if is_required() => {
            let message =
                format!("it cannot run here, which is a failure by CI or VMLAB_REQUIRE: {reason}");
            Verdict::Failed(Failure::Infrastructure { message })
        }
        other => other,
    };
    let (outcome, failure) = outcome(test, &body, &verdict);
    let failed_event = match &failure {
        Some(Failure::Event { title }) => ran.events.iter().find(|event| event.title == *title),
        _ => None,
    };
    if let Verdict::Failed(failure) = &verdict {
        say(&format!("vmlab: {}: {failure}", test.path()));
        failed_event.iter().for_each(|event| show(&event.report));
        if failed_event.is_none() && !ran.console.is_empty() {
            say("vmlab: from the console:");
            show(ran.console.lines());
        }
        if let Some(log) = ran.report.as_ref().and_then(|report| report.console_log.as_ref()) {
            say(&format!("vmlab: the whole console: {}", log.display()));
        }
    }
    let mut attempt = AttemptResult {
        failure: failure.clone(),
        took_ms: millis(since.elapsed()),
        events: ran.events,
        output: ran.output.text(),
        console: ran.console,
        notes: ran.notes,
        measurements: ran.measurements,
        details: ran.details,
        ..AttemptResult::default()
    };
    if let Verdict::Skipped(reason) = &verdict {
        attempt.notes.insert(0, reason.clone());
    }
    if let Some(report) = ran.report {
        attempt.release = Some(report.release).filter(|release| !release.is_empty());
        attempt.accel = Some(report.accel.name().to_owned());
        attempt.phases =
            report.phases.iter().map(|phase| (phase.phase.name().to_owned(), phase.ms)).collect();
        attempt.console_log = report.console_log;
    }
    if let Err(error) = report::write(test, other_kernel.as_deref(), began, outcome, attempt) {
        tell(&report::unwritten(&error));
    }
    match verdict {
        Verdict::Passed => {}
        Verdict::Skipped(reason) => left_out(test, &reason),
        Verdict::Body => match body {
            Body::Failed(failure) => panic::resume_unwind(Box::new(failure)),
            Body::Panicked { message, .. } => panic::resume_unwind(match message {
                Some(message) => Box::new(message),
                None => Box::new(()),
            }),
            Body::Unwound(payload) => panic::resume_unwind(payload),
            Body::Passed | Body::Skipped(_) | Body::Lost(_) => {}
        },
        // A panic would be what the test should do; without one, it has failed.
        Verdict::Failed(_) if test.settings.should_panic.is_some() => {}
        Verdict::Failed(failure) => panic::resume_unwind(Box::new(failure.to_string())),
    }
}

/// What goes into the results.
fn outcome(test: &Test, body: &Body, verdict: &Verdict) -> (Outcome, Option<Failure>) {
    let failed = |failure: Failure| {
        let outcome = if failure.is_error() { Outcome::Error } else { Outcome::Failed };
        (outcome, Some(failure))
    };
    let passed = (Outcome::Passed, None);
    let expected = test.settings.should_panic;
    let message = match body {
        Body::Panicked { message, .. } => message.as_deref(),
        Body::Unwound(payload) => guest::message(&**payload),
        _ => None,
    };
    match (verdict, expected, body) {
        (Verdict::Skipped(_), _, _) => (Outcome::Skipped, None),
        (Verdict::Failed(failure), _, _) => failed(failure.clone()),
        (Verdict::Passed, Some(_), _) => {
            failed(Failure::Test { how: "the test should have panicked".to_owned() })
        }
        (Verdict::Passed, None, _) => passed,
        (Verdict::Body, Some(expected), Body::Panicked { .. } | Body::Unwound(_))
            if message.unwrap_or_default().contains(expected) =>
        {
            passed
        }
        (Verdict::Body, _, Body::Failed(failure)) => failed(Failure::Test { how: failure.clone() }),
        (Verdict::Body, _, body) => {
            let place = match body {
                Body::Panicked { place: Some(place), .. } => format!(" at {place}"),
                _ => String::new(),
            };
            let message = message.unwrap_or("something that is no text");
            failed(Failure::Test { how: format!("panicked{place}: {message}") })
        }
    }
}

/// Whether what cannot run has failed.
fn is_required() -> bool {
    let is = |name: &str, wanted: &str| std::env::var(name).is_ok_and(|value| value == wanted);
    is("CI", "true") || is("VMLAB_REQUIRE", "1")
}

fn show<'a>(lines: impl IntoIterator<Item = impl AsRef<str> + 'a>) {
    lines.into_iter().for_each(|line| say(&format!("  | {}", line.as_ref())));
}

/// Tells the user, whatever the harness captures.
fn tell(text: &str) {
    // A stream that is gone cannot be told.
    let _ = writeln!(io::stderr().lock(), "vmlab: {text}");
}

#[allow(clippy::print_stdout, reason = "the harness captures what is printed, and nothing else")]
fn print(text: &str) {
    print!("{text}");
}

#[allow(clippy::print_stderr, reason = "the harness captures what is printed, and nothing else")]
fn print_error(text: &str) {
    eprint!("{text}");
}

fn say(text: &str) {
    print_error(&format!("{text}\n"));
}
