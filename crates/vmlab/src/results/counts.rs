//! What results say in a few words.

use std::fmt;
use std::path::Path;

use super::text::{REPORT, counted, duration, one_line};
use super::{AttemptResult, Failure, Outcome, Results, TargetResult};
use crate::events::EventKind;

/// How many targets had which outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// [`Outcome::Passed`].
    pub passed: usize,
    /// [`Outcome::Flaky`].
    pub flaky: usize,
    /// [`Outcome::Failed`].
    pub failed: usize,
    /// [`Outcome::Error`].
    pub errors: usize,
    /// [`Outcome::Cancelled`].
    pub cancelled: usize,
    /// [`Outcome::Skipped`].
    pub skipped: usize,
}

impl fmt::Display for Counts {
    /// `12 passed, 1 flaky, 2 failed, 1 error`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed", self.passed)?;
        for (count, what) in [
            (self.flaky, "flaky"),
            (self.failed, "failed"),
            (self.cancelled, "cancelled"),
            (self.skipped, "skipped"),
        ] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
            if what == "failed" && self.errors > 0 {
                write!(f, ", {}", counted(self.errors, "error"))?;
            }
        }
        Ok(())
    }
}

impl Results {
    /// How many targets had which outcome.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for target in &self.targets {
            *match target.outcome {
                Outcome::Passed => &mut counts.passed,
                Outcome::Flaky => &mut counts.flaky,
                Outcome::Failed => &mut counts.failed,
                Outcome::Error => &mut counts.errors,
                Outcome::Cancelled => &mut counts.cancelled,
                Outcome::Skipped => &mut counts.skipped,
            } += 1;
        }
        counts
    }

    /// `12 passed, 1 flaky, 2 failed, 1 error in 3.4 s`.
    pub fn counts_line(&self) -> String {
        format!("{} in {}", self.counts(), duration(self.took_ms))
    }
}

impl Outcome {
    /// As in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Outcome::Passed => "passed",
            Outcome::Flaky => "flaky",
            Outcome::Failed => "failed",
            Outcome::Error => "error",
            Outcome::Cancelled => "cancelled",
            Outcome::Skipped => "skipped",
        }
    }

    /// Whether nothing is wrong with the target.
    pub const fn is_success(self) -> bool {
        matches!(self, Outcome::Passed | Outcome::Flaky | Outcome::Skipped)
    }
}

impl TargetResult {
    /// All attempts together, in milliseconds.
    pub fn took_ms(&self) -> f64 {
        self.attempts.iter().map(|attempt| attempt.took_ms).sum()
    }

    /// Why it is not as it should be: what its last attempt says, in one line.
    pub(super) fn reason(&self) -> String {
        match self.attempts.last().and_then(|attempt| attempt.failure.as_ref()) {
            Some(failure) => one_line(&failure.to_string()),
            None if self.attempts.is_empty() => "it was not run".to_owned(),
            None => {
                let note = self.attempts.last().and_then(|attempt| attempt.notes.first());
                let note = note.filter(|_| self.outcome == Outcome::Skipped);
                note.map_or_else(|| self.outcome.name().to_owned(), |note| one_line(note))
            }
        }
    }
}

impl AttemptResult {
    /// Where files of it are, with what they are.
    pub(super) fn files(&self) -> Vec<(&'static str, &Path)> {
        let logs = [("output", &self.output_log), ("console", &self.console_log)];
        let logs = logs.into_iter().filter_map(|(what, path)| Some((what, path.as_deref()?)));
        logs.chain(self.kept_files.iter().map(|path| ("kept", path.as_path()))).collect()
    }

    /// What explains a failure best: a name for it, and its text.
    pub(super) fn evidence(&self) -> Option<(&'static str, String)> {
        let output = || ("output", self.output.clone());
        let console = || ("console", self.console.clone());
        let candidates = match &self.failure {
            Some(Failure::Event { title }) => {
                let event = self.events.iter().find(|event| event.title == *title);
                let report = event.map(|event| event.report.join("\n")).unwrap_or_default();
                [(REPORT, report), console(), output()]
            }
            // The message has all of it, and the console of a guest that goes on says nothing more.
            Some(Failure::Module { .. }) => [output(), ("", String::new()), ("", String::new())],
            Some(
                Failure::GuestEnded { .. }
                | Failure::Infrastructure { .. }
                | Failure::MissingEvent { .. },
            ) => [console(), output(), ("", String::new())],
            _ => [output(), console(), ("", String::new())],
        };
        candidates.into_iter().find(|(_, text)| !text.trim().is_empty())
    }
}

impl Failure {
    /// As in JSON.
    pub const fn kind(&self) -> &'static str {
        match self {
            Failure::Command { .. } => "command",
            Failure::Test { .. } => "test",
            Failure::Module { .. } => "module",
            Failure::UnexpectedSuccess => "unexpected-success",
            Failure::Event { .. } => "event",
            Failure::MissingEvent { .. } => "missing-event",
            Failure::Timeout { .. } => "timeout",
            Failure::GuestEnded { .. } => "guest-ended",
            Failure::Setup { .. } => "setup",
            Failure::Infrastructure { .. } => "infrastructure",
            Failure::Cancelled => "cancelled",
        }
    }

    /// Whether it says something of vmlab, the host or the test's surroundings, not of what was tested.
    pub const fn is_error(&self) -> bool {
        matches!(self, Failure::Setup { .. } | Failure::Infrastructure { .. })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Command { how } => write!(f, "the command ended with {how}"),
            Failure::Test { how } | Failure::Module { how } => f.write_str(how),
            Failure::UnexpectedSuccess => {
                f.write_str("the command succeeded, but it should have failed")
            }
            Failure::Event { title } => write!(f, "the kernel said: {title}"),
            Failure::MissingEvent { expected } => {
                write!(f, "the kernel should have said something of itself: {}", name(*expected))
            }
            Failure::Timeout { what } => f.write_str(what),
            Failure::GuestEnded { how } => {
                write!(f, "the guest ended before the command had: {how}")
            }
            Failure::Setup { how } => write!(f, "setup failed: {how}"),
            Failure::Infrastructure { message } => f.write_str(message),
            Failure::Cancelled => f.write_str("it was cancelled"),
        }
    }
}

/// A kind of event as in JSON.
pub(super) fn name(kind: EventKind) -> String {
    match serde_json::to_value(kind) {
        Ok(serde_json::Value::String(name)) => name,
        _ => format!("{kind:?}"),
    }
}
