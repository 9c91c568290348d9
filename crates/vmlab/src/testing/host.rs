//! A test's part on the host: the VM, what comes from it, and what that means.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use super::observed::{Observed, Observer};
use super::output::{self, Tail, Told, print_error};
use super::plan::Plan;
use super::records::Ended;
use super::verdict::{Body, Verdict, judge, outcome};
use super::{Recorder, Test, report};
use crate::error::chain;
use crate::events::KernelEvent;
use crate::hypervisor::ExitReason;
use crate::report::Report;
use crate::results::{AttemptResult, Failure, Measurement};
use crate::runner::{Watch, decode_reports, of_a_vm};
use crate::sync::lock;
use crate::timings::millis;
use crate::{DebugInfo, Error, PreparedVm, RunDir, Stdio, Vm, VmBuilder, random};

/// How long what a test has left running may keep its output open. It is ended with the VM.
const LINGER: Duration = Duration::from_secs(2);

/// Hexadecimal digits of the word that tells records from what else a test writes.
const CHANNEL_DIGITS: usize = 16;

/// What is known of a run, beside how its body ended.
#[derive(Default)]
struct Ran {
    report: Option<Report>,
    events: Vec<KernelEvent>,
    output: Tail,
    measurements: Vec<Measurement>,
    details: BTreeMap<String, serde_json::Value>,
    console: String,
    notes: Vec<String>,
    /// VMs that the body has started, which are its own to judge.
    others: Vec<Observed>,
}

impl Ran {
    fn take(&mut self, told: Told) {
        self.measurements = told.measurements;
        self.details = told.details;
    }
}

/// A test whose body runs in the guest.
pub(super) fn in_guest(test: &Test) {
    let word = match random::hex(CHANNEL_DIGITS) {
        Ok(word) => word,
        Err(error) => return fail(test, chain(&error)),
    };
    with_plan(test, Some(&word), |plan, prepared, ran| {
        in_a_vm(test, prepared, ran, |vm, ran| body_in_guest(test, plan, vm, &word, ran))
    });
}

/// A test whose body is given a VM that has started.
pub(super) fn with_vm(test: &Test, body: fn(&mut Vm, &Recorder) -> Option<String>) {
    with_plan(test, None, |_, prepared, ran| {
        in_a_vm(test, prepared, ran, |vm, ran| Ok(on_host(ran, |recorder| body(vm, recorder))))
    });
}

/// A test whose body starts VMs itself.
pub(super) fn with_builder(test: &Test, body: fn(VmBuilder, &Recorder) -> Option<String>) {
    with_plan(test, None, |plan, _, ran| {
        let observer = Observer::default();
        let builder = plan.vm.clone().observed_by(observer.clone());
        let ended = on_host(ran, |recorder| body(builder, recorder));
        ran.others = observer.seen();
        ended
    });
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
    test: &Test,
    prepared: PreparedVm,
    ran: &mut Ran,
    run: impl FnOnce(&mut Vm, &mut Ran) -> Result<Body, Error>,
) -> Body {
    let watch = Arc::new(Watch::default());
    // Nothing is known of a kernel that is an image's own.
    let debug_info = prepared.kernel().map(|kernel| DebugInfo::of(kernel, std::env::current_dir()));
    let prepared = match logs(test) {
        Ok(dir) => prepared.logs_in(dir),
        Err(error) => return lost(&error, ran),
    };
    // The harness runs as many tests at once.
    let tests = std::thread::available_parallelism().map_or(1, usize::from);
    let watched = prepared.one_of(tests).watched_by(Arc::<Watch>::clone(&watch));
    let started = watched.start_watched(|_| {});
    let mut vm = match started {
        Ok(vm) => vm,
        Err(failed) => {
            ran.events = decoded(&watch, debug_info.as_ref());
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
    ran.events = decoded(&watch, debug_info.as_ref());
    match (ended, stopped) {
        (Err(error), _) => lost(&error, ran),
        // What it wrote may not have arrived.
        (Ok(Body::Passed), Err(error)) => lost(&error, ran),
        (Ok(body), _) => body,
    }
}

/// What a kernel said of itself until its end.
fn decoded(watch: &Watch, debug_info: Option<&DebugInfo>) -> Vec<KernelEvent> {
    let mut events = watch.finish();
    if let Some(info) = debug_info {
        decode_reports(info, &mut events);
    }
    events
}

/// Where the logs of a test's VM are kept. All tests of a program share a directory, so that they count as one
/// run where the oldest are removed.
fn logs(test: &Test) -> Result<RunDir, Error> {
    static DIR: Mutex<Option<RunDir>> = Mutex::new(None);
    static COUNT: AtomicU32 = AtomicU32::new(1);
    let mut dir = lock(&DIR);
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let name: String = test.path().chars().map(plain).collect();
    let name = format!("{:03}-{name:.80}", COUNT.fetch_add(1, Ordering::Relaxed));
    let shared = match &*dir {
        Some(dir) => dir.clone(),
        None => dir.insert(RunDir::create()?).clone(),
    };
    shared.part(&name)
}

fn lost(error: &Error, ran: &mut Ran) -> Body {
    if let Some(evidence) = error.evidence() {
        ran.console.clone_from(&evidence.tail);
    }
    Body::Lost(of_a_vm(error))
}

fn on_host(ran: &mut Ran, body: impl FnOnce(&Recorder) -> Option<String>) -> Body {
    let recorder = Recorder::keeping();
    let ended = panic::catch_unwind(AssertUnwindSafe(|| body(&recorder)));
    ran.take(recorder.into_told());
    match ended {
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
    let (tail, told) = (Mutex::new(Tail::default()), Mutex::new(Told::default()));
    let status = std::thread::scope(|scope| {
        let (tail, told) = (&tail, &told);
        let (done, copied) = channel::<()>();
        if let Some(stream) = stdout {
            let done = done.clone();
            scope.spawn(move || {
                output::stdout(stream, word, told, tail);
                drop(done);
            });
        }
        if let Some(stream) = stderr {
            let done = done.clone();
            scope.spawn(move || {
                output::stderr(stream, tail);
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
    let (ended, began, prelude) =
        (told.ended.take(), told.began, std::mem::take(&mut told.prelude));
    ran.take(told);
    let limit = plan.timeout.as_secs_f64();
    Ok(match (status?, ended) {
        (None, _) => {
            Body::Lost(Failure::Timeout { what: format!("the test took longer than {limit} s") })
        }
        (Some(status), Some(Ended::Passed)) if status.success() => Body::Passed,
        (Some(status), Some(Ended::Skipped(reason))) if status.success() => Body::Skipped(reason),
        (Some(_), Some(Ended::Failed(failure))) => Body::Failed(failure),
        (Some(_), Some(Ended::Panicked { message, place })) => Body::Panicked { message, place },
        (Some(status), _) if began => {
            let (killed, memory) = (status.oom_kills(), vm.config().memory);
            let mut how = format!("the test's program ended before the test did: {status}");
            if killed > 0 {
                how.push_str(&format!(
                    "; the guest ran out of memory and killed {killed} process(es); it has {memory}"
                ));
            }
            Body::Lost(Failure::Test { how })
        }
        (Some(status), _) => {
            let said = String::from_utf8_lossy(&prelude).trim().to_owned();
            let message =
                format!("the program in the guest did not run the test ({status}): {said}");
            Body::Lost(Failure::Infrastructure { message })
        }
    })
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
    add_others(&mut attempt, ran.others);
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

/// Adds what VMs did that the body has started. Where there are several, their numbers tell them apart.
fn add_others(attempt: &mut AttemptResult, others: Vec<Observed>) {
    let several = others.len() > 1;
    for (number, Observed { events, report }) in (1..).zip(others) {
        attempt.events.extend(events);
        let Some(report) = report else {
            attempt.notes.push(format!("VM {number} outlived the test"));
            continue;
        };
        attempt.phases.extend(report.phases.iter().map(|phase| {
            let name = phase.phase.name();
            let name = if several { format!("VM {number}: {name}") } else { name.to_owned() };
            (name, phase.ms)
        }));
        let release = Some(report.release).filter(|release| !release.is_empty());
        attempt.release = attempt.release.take().or(release);
        attempt.accel.get_or_insert_with(|| report.accel.name().to_owned());
        match (report.console_log, &attempt.console_log) {
            (Some(log), None) => attempt.console_log = Some(log),
            (Some(log), Some(_)) => {
                attempt.notes.push(format!("console of VM {number}: {}", log.display()));
            }
            (None, _) => {}
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

fn say(text: &str) {
    print_error(&format!("{text}\n"));
}
