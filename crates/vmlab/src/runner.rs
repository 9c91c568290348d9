//! Runs targets: side by side as far as the host carries that, each attempt in a VM of its own.

mod attempt;
mod keep;
mod verdict;
mod watch;

pub(crate) use attempt::decode_reports;
pub(crate) use verdict::of_a_vm;
pub(crate) use watch::Watch;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::budget::{Budget, Slots};
use crate::results::{AttemptResult, Failure, Outcome, Results, TargetResult, VERSION};
use crate::sync::lock;
use crate::targets::Target;
use crate::timings::millis;
use crate::units::Bytes;
use crate::{Environment, Error, Group, RunDir, SnapshotMode};

/// How targets are run.
#[derive(Debug, Clone)]
pub struct RunnerOptions {
    /// What is tested, for reports.
    pub suite: String,
    /// How many VMs run at the same time.
    pub slots: Slots,
    /// What all VMs at the same time may take of the host's memory; `None` is no limit.
    pub memory: Option<Bytes>,
    /// Whether the first failure ends all.
    pub fail_fast: bool,
    /// How long all targets together may take.
    pub timeout: Option<Duration>,
    /// What commands inherit, beside what their targets say.
    pub environment: Environment,
    /// Whether VMs start from snapshots.
    pub snapshots: SnapshotMode,
    /// Where kernels and what is made of them are kept; `None` is the usual place.
    pub cache_dir: Option<PathBuf>,
}

/// Is told what happens, from several threads. Targets are known by their place among those that run.
pub trait Observer: Send + Sync + std::fmt::Debug {
    /// An attempt begins, counted from 1.
    fn started(&self, target: usize, attempt: u32);
    /// An attempt is in another phase.
    fn phase(&self, target: usize, phase: &str);
    /// Something that a person should know, besides.
    fn note(&self, target: usize, text: &str);
    /// The command has written something.
    fn output(&self, target: usize, bytes: &[u8]);
    /// All attempts are over.
    fn ended(&self, target: usize, result: &TargetResult);
}

/// Why everything ends before it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    User,
    FailFast,
    Timeout,
}

/// Runs targets.
#[derive(Debug)]
pub struct Runner {
    targets: Vec<Target>,
    options: RunnerOptions,
    observer: Arc<dyn Observer>,
    budget: Budget,
    group: Arc<Group>,
    stop: Mutex<Option<Stop>>,
}

impl Runner {
    /// A runner of these targets.
    pub fn new(targets: Vec<Target>, options: RunnerOptions, observer: Arc<dyn Observer>) -> Self {
        let budget = Budget::new(options.slots, options.memory);
        Self { targets, options, observer, budget, group: Arc::default(), stop: Mutex::default() }
    }

    /// Ends all VMs, and starts no more. [`run`](Self::run) returns soon after.
    pub fn cancel(&self) {
        self.end_all(Stop::User);
    }

    /// Runs all targets to their ends.
    ///
    /// # Errors
    /// When there is no place for logs.
    pub fn run(&self) -> Result<Results, Error> {
        let logs = RunDir::create()?;
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let began = Instant::now();
        let next = AtomicUsize::new(0);
        let results: Mutex<Vec<Option<TargetResult>>> = Mutex::new(vec![None; self.targets.len()]);
        let run = Run { runner: self, logs: &logs, began };
        std::thread::scope(|scope| {
            let (done, all_done) = channel::<()>();
            if let Some(timeout) = self.options.timeout {
                scope.spawn(move || {
                    if all_done.recv_timeout(timeout) == Err(RecvTimeoutError::Timeout) {
                        self.end_all(Stop::Timeout);
                    }
                });
            }
            for _ in 0..self.workers() {
                let (run, next, results, done) = (&run, &next, &results, done.clone());
                scope.spawn(move || {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(target) = self.targets.get(at) else { break };
                        let result = run.target(at, target);
                        self.observer.ended(at, &result);
                        lock(results)[at] = Some(result);
                    }
                    drop(done);
                });
            }
            drop(done);
        });
        let targets = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Results {
            version: VERSION,
            suite: self.options.suite.clone(),
            began_ms: since_1970.as_millis().try_into().unwrap_or(u64::MAX),
            took_ms: millis(began.elapsed()),
            targets: targets.into_iter().flatten().collect(),
        })
    }

    fn workers(&self) -> usize {
        let (Slots::Count(most) | Slots::Cpus(most)) = self.options.slots;
        most.clamp(1, self.targets.len().max(1))
    }

    fn end_all(&self, why: Stop) {
        lock(&self.stop).get_or_insert(why);
        self.budget.close();
        self.group.cancel();
    }

    fn stopped(&self) -> Option<Stop> {
        *lock(&self.stop)
    }
}

/// One run of all targets.
#[derive(Debug)]
struct Run<'a> {
    runner: &'a Runner,
    logs: &'a RunDir,
    began: Instant,
}

impl Run<'_> {
    /// Tries a target until it passes, or has failed often enough.
    fn target(&self, index: usize, target: &Target) -> TargetResult {
        let mut attempts: Vec<AttemptResult> = Vec::new();
        while attempts.len() <= target.verdict.retries as usize && self.runner.stopped().is_none() {
            let number = attempts.len() as u32 + 1;
            self.runner.observer.started(index, number);
            let attempt = self.attempt(index, target, number);
            let again = match &attempt.failure {
                None | Some(Failure::Cancelled | Failure::Infrastructure { .. }) => false,
                Some(_) => true,
            };
            attempts.push(attempt);
            if !again {
                break;
            }
        }
        let outcome = outcome(&attempts);
        if self.runner.options.fail_fast && matches!(outcome, Outcome::Failed | Outcome::Error) {
            self.runner.end_all(Stop::FailFast);
        }
        let tags = target.tags.iter().cloned().collect();
        let (name, axes) = (target.name.clone(), target.axes.clone());
        TargetResult { name, index, tags, axes, outcome, attempts }
    }
}

fn outcome(attempts: &[AttemptResult]) -> Outcome {
    match attempts.last().map(|last| &last.failure) {
        None | Some(Some(Failure::Cancelled)) => Outcome::Cancelled,
        Some(None) if attempts.len() == 1 => Outcome::Passed,
        Some(None) => Outcome::Flaky,
        Some(Some(Failure::Infrastructure { .. })) => Outcome::Error,
        Some(Some(_)) => Outcome::Failed,
    }
}
