//! `vmlab run --repeat` and `--until-failure`: a command many times, each time in a VM of its own.

mod attempt;
mod jobs;
mod summary;
mod times;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Instant;

use anyhow::Result;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;
use vmlab::artifacts::Progress;
use vmlab::{Group, RunDir, kept};

use crate::exit::Code;
use crate::progress::Display;
use crate::request::{Repeat, Request, Verbosity};
use crate::run::{Outcome, Ran, Under, outcome, prepare};
use crate::signals::SignalThread;
use attempt::{Attempt, Plan};
use jobs::{Jobs, jobs};
use summary::Tally;
use times::millis;

pub(crate) use summary::Summary;

/// How many failures are shown and have their logs kept. What comes after them tells little more, and a
/// command that always fails must not fill the disk.
const KEPT_FAILURES: usize = 100;

/// What `--json` has of one of many runs, beside what it has of any.
#[derive(Debug, Serialize)]
pub(crate) struct Numbered {
    run: u64,
    run_ms: f64,
    command_ms: Option<f64>,
    output_log: Option<PathBuf>,
}

/// All runs under one kernel.
pub(crate) fn under(
    request: &Request,
    repeat: &Repeat,
    kernel: Option<&String>,
    signals: &SignalThread,
    display: &Arc<Display>,
) -> Result<Under> {
    let prepared = match prepare(request, kernel, display) {
        Ok(prepared) => prepared,
        Err(error) => return Ok(Under::one(request, kernel, Ran::failed(error))),
    };
    let Jobs { count: jobs, lowered } = jobs(repeat, prepared.config())?;
    if let Some(lowered) = lowered {
        display.note(&lowered);
    }
    raise_file_limit();
    let prepared = prepared.one_of(jobs);
    let logs = RunDir::create()?;
    let group = Arc::new(Group::default());
    signals.group(Arc::clone(&group) as _);
    let plan = Plan { request, prepared: &prepared, logs: &logs, group: &group };
    let mut results = Results::new(request, repeat, kernel, display);
    let begun = Instant::now();
    results.show_count();
    let taken = plan.all(repeat, jobs, |attempt| results.take(attempt));
    let wall = begun.elapsed();
    display.clear();
    let Results { tally, first_failure, outcomes, kept, .. } = results;
    if kept == 0 {
        // Nothing is in it that anybody wants; what cannot be removed is removed with old runs.
        let _ = std::fs::remove_dir_all(logs.path());
    }
    taken?;
    let log_dir = (kept > 0).then(|| logs.path().to_owned());
    let summary = tally.summary(kernel.cloned(), repeat.count, jobs, wall, log_dir);
    if request.verbosity > Verbosity::Quiet {
        crate::output::stdout(summary.text().as_bytes())?;
    }
    Ok(Under {
        code: first_failure.map_or(Code::SUCCESS, |(_, code)| code),
        outcomes: outcomes.into_values().collect(),
        summary: Some(summary),
    })
}

/// Lets this process open as many files as it may: the usual limit is for one VM. Guests are given the
/// limits that the caller had, which were read before.
pub(crate) fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // Where it cannot be raised, the file servers divide what there is.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

impl Plan<'_> {
    /// Makes all runs, `jobs` at a time, and hands them on as they end. An error of `take` ends all.
    fn all(
        &self,
        repeat: &Repeat,
        jobs: usize,
        mut take: impl FnMut(Attempt) -> Result<()>,
    ) -> Result<()> {
        let last = repeat.count.unwrap_or(u64::MAX);
        let started = AtomicU64::new(0);
        // Bounded: where nobody takes what is said of failures, no more are made.
        let (sender, attempts) = sync_channel(jobs);
        std::thread::scope(|scope| {
            for _ in 0..jobs {
                let (sender, started) = (sender.clone(), &started);
                scope.spawn(move || {
                    while !self.group.is_cancelled() {
                        let number = started.fetch_add(1, Ordering::Relaxed) + 1;
                        if number > last {
                            break;
                        }
                        let attempt = self.attempt(number);
                        let failed = attempt.failed();
                        if failed && (repeat.until_failure || attempt.is_hopeless()) {
                            self.group.cancel();
                        }
                        if sender.send(attempt).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            let mut result = Ok(());
            for attempt in attempts {
                if result.is_ok() {
                    result = take(attempt);
                }
                if result.is_err() {
                    self.group.cancel();
                }
            }
            result
        })
    }
}

/// What becomes of the runs as they end.
struct Results<'a> {
    request: &'a Request,
    repeat: &'a Repeat,
    kernel: Option<&'a String>,
    display: &'a Display,
    tally: Tally,
    /// Of the failed run with the lowest number.
    first_failure: Option<(u64, Code)>,
    /// By number; only where they are asked for.
    outcomes: BTreeMap<u64, Outcome>,
    /// Failures whose logs are kept.
    kept: usize,
}

impl<'a> Results<'a> {
    fn new(
        request: &'a Request,
        repeat: &'a Repeat,
        kernel: Option<&'a String>,
        display: &'a Display,
    ) -> Self {
        Self {
            request,
            repeat,
            kernel,
            display,
            tally: Tally::default(),
            first_failure: None,
            outcomes: BTreeMap::new(),
            kept: 0,
        }
    }

    fn take(&mut self, mut attempt: Attempt) -> Result<()> {
        let failed = attempt.failed();
        if attempt.cancelled {
            self.tally.cancelled += 1;
        } else {
            self.count(&attempt);
            if attempt.is_hopeless() && self.repeat.count != Some(1) {
                self.display.note("all other runs would fail in the same way, so there are none");
            }
        }
        let keep = failed && self.kept < KEPT_FAILURES;
        if keep || (!attempt.cancelled && !failed && self.request.verbosity == Verbosity::Verbose) {
            self.print(&attempt.block(self.repeat.count))?;
        } else if failed {
            self.print(attempt.heading(self.repeat.count).as_bytes())?;
        }
        if keep {
            self.kept += 1;
        } else {
            // What cannot be removed is removed with the logs of old runs.
            let _ = std::fs::remove_dir_all(&attempt.dir);
            if let Some(report) = &mut attempt.ran.report {
                report.console_log = None;
            }
        }
        if self.request.json.is_some() && !attempt.cancelled {
            let numbered = Numbered {
                run: attempt.number,
                run_ms: millis(attempt.took),
                command_ms: attempt.command_took.map(millis),
                output_log: kept::written(&attempt.dir),
            };
            let mut outcome = outcome(self.request, self.kernel, attempt.ran.code(), attempt.ran);
            outcome.numbered = Some(numbered);
            self.outcomes.insert(attempt.number, outcome);
        }
        self.show_count();
        Ok(())
    }

    fn count(&mut self, attempt: &Attempt) {
        let Self { tally, first_failure, .. } = self;
        tally.run_times.add(attempt.took);
        if let Some(took) = attempt.command_took {
            tally.command_times.add(took);
        }
        if tally.release.is_none()
            && let Some(report) = &attempt.ran.report
            && !report.release.is_empty()
        {
            tally.release = Some(report.release.clone());
        }
        if attempt.failed() {
            tally.failed.push(attempt.number);
            if first_failure.is_none_or(|(number, _)| attempt.number < number) {
                *first_failure = Some((attempt.number, attempt.ran.code()));
            }
        } else {
            tally.passed += 1;
        }
    }

    fn print(&self, text: &[u8]) -> Result<()> {
        self.display.aside(|| crate::output::stdout(text))
    }

    fn show_count(&self) {
        let of = self.repeat.count.map(|count| format!("/{count}")).unwrap_or_default();
        let (runs, failed) = (self.tally.runs(), self.tally.failed.len());
        self.display.count(format!("{runs}{of}, {failed} failed"));
    }
}
