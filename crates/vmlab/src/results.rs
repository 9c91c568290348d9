//! What targets came to, and how machines and people read that.

mod counts;
mod github;
mod html;
mod json;
mod junit;
mod tap;
mod terminal;
mod text;

use std::collections::BTreeMap;
use std::path::PathBuf;

pub use counts::Counts;
pub use github::{github_annotations, github_summary};
pub use html::html;
pub use json::ResultsError;
pub(crate) use junit::explanation;
pub use junit::junit;
pub use tap::tap;
pub use terminal::{ShowOutput, terminal};

use serde::{Deserialize, Serialize};

use crate::events::{EventKind, KernelEvent};

/// The version of results as JSON; it rises when something that was there changes or goes. What is added has a default,
/// so that results that were written before can be read.
pub const VERSION: u32 = 1;

/// What all targets of a file came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`VERSION`].
    pub version: u32,
    /// What was tested: the name of the file's directory.
    pub suite: String,
    /// When the first target began, in milliseconds since 1970.
    pub began_ms: u64,
    /// How long it took from then until the last one ended, in milliseconds.
    pub took_ms: f64,
    /// In the order of the file.
    pub targets: Vec<TargetResult>,
}

/// What a target came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TargetResult {
    /// Its name.
    pub name: String,
    /// Its place in the file, all targets counted from 0, so that shards can be put together in that order.
    #[serde(default)]
    pub index: usize,
    /// Its tags.
    pub tags: Vec<String>,
    /// Of a matrix, its axes and the target's values on them, in the order of the file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub axes: Vec<(String, String)>,
    /// What it means.
    pub outcome: Outcome,
    /// Each time that it was tried, in order; none where it was not.
    pub attempts: Vec<AttemptResult>,
}

/// What a target's attempts mean together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It passed at the first attempt.
    Passed,
    /// It passed, but not at the first attempt.
    Flaky,
    /// It failed at each attempt.
    Failed,
    /// vmlab or the host could not run it.
    Error,
    /// It was not run, or ended before it was done, because the user or another failure ended all.
    Cancelled,
    /// It said itself that it cannot run here; why is in its notes.
    Skipped,
}

/// One attempt, in a VM of its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AttemptResult {
    /// Why it does not count as passed; `None` if it does.
    pub failure: Option<Failure>,
    /// When it began, in milliseconds since the first target did.
    pub start_ms: f64,
    /// How long it took, in milliseconds, the VM's start and end included.
    pub took_ms: f64,
    /// Building its modules, or finding what was built before, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build_ms: Option<f64>,
    /// The command alone, in milliseconds.
    pub command_ms: Option<f64>,
    /// The command's exit code as a shell has it, if it came to its end.
    pub exit_code: Option<u8>,
    /// The signal that ended the command.
    pub signal: Option<i32>,
    /// The running kernel's release.
    pub release: Option<String>,
    /// How instructions were executed: `kvm` or `tcg`.
    pub accel: Option<String>,
    /// The phases, in order, with their times in milliseconds.
    pub phases: Vec<(String, f64)>,
    /// What the kernel said of itself.
    pub events: Vec<KernelEvent>,
    /// What the command wrote, both streams in the order of writing; the middle is left out where it is long.
    pub output: String,
    /// The console, likewise.
    pub console: String,
    /// All of the output, where it is kept.
    pub output_log: Option<PathBuf>,
    /// All of the console, where it is kept.
    pub console_log: Option<PathBuf>,
    /// Files of the guest that were kept.
    pub kept_files: Vec<PathBuf>,
    /// What a person should know of it besides.
    pub notes: Vec<String>,
    /// What a test measured.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub measurements: Vec<Measurement>,
    /// What else a test told, by its keys.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<String, serde_json::Value>,
}

/// A number that a test measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// What was measured.
    pub name: String,
    /// How much.
    pub value: f64,
    /// In which unit, such as `ms`.
    pub unit: String,
}

/// Why an attempt does not count as passed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Failure {
    /// The command ended with another code than 0, or by a signal.
    Command {
        /// Such as `exit code 3`.
        how: String,
    },
    /// A test of Rust's failed.
    Test {
        /// Its panic and where that was, or what it returned.
        how: String,
    },
    /// The command should have failed.
    UnexpectedSuccess,
    /// A module does not build, load or unload, or has left something behind.
    Module {
        /// What is wrong, a line or more for each thing: `unload: left behind: /proc/mymod`.
        how: String,
    },
    /// The kernel said something of itself that makes it fail.
    Event {
        /// The first such event's title.
        title: String,
    },
    /// The kernel should have said something of itself.
    MissingEvent {
        /// What.
        expected: EventKind,
    },
    /// A time limit passed.
    Timeout {
        /// Such as `the command took longer than 30 s`.
        what: String,
    },
    /// The guest ended before the command had.
    GuestEnded {
        /// How.
        how: String,
    },
    /// A script before the command failed.
    Setup {
        /// Which, and how.
        how: String,
    },
    /// vmlab or the host failed.
    Infrastructure {
        /// All of the message, in one or more lines.
        message: String,
    },
    /// It was ended from outside.
    Cancelled,
}
