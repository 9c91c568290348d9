//! What a person sees of targets while they run.

use std::io::{self, Write};
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmlab::results::{Failure, Outcome, TargetResult};
use vmlab::runner::Observer;

use crate::output;
use crate::stdio::stderr_is_watched;

/// How often live lines are drawn anew.
const TICK: Duration = Duration::from_millis(100);

/// The longest part of a command's last line that is shown.
const LAST_LINE: usize = 120;

/// A line for each running target on a terminal, and one for each that has ended.
#[derive(Debug)]
pub(super) struct Lines {
    names: Vec<String>,
    quiet: bool,
    live: MultiProgress,
    bars: Vec<Mutex<Live>>,
}

/// A target's live line.
#[derive(Debug, Default)]
struct Live {
    bar: Option<ProgressBar>,
    phase: String,
    last_line: Vec<u8>,
}

impl Lines {
    pub(super) fn new(names: Vec<String>, quiet: bool) -> Self {
        let target = match stderr_is_watched() && !quiet {
            true => ProgressDrawTarget::stderr_with_hz(10),
            false => ProgressDrawTarget::hidden(),
        };
        let bars = names.iter().map(|_| Mutex::default()).collect();
        Self { names, quiet, live: MultiProgress::with_draw_target(target), bars }
    }

    /// Takes the live lines away.
    pub(super) fn close(&self) {
        // A terminal that is gone cannot be cleared.
        let _ = self.live.clear();
    }

    fn with(&self, target: usize, change: impl FnOnce(&mut Live)) {
        let Some(live) = self.bars.get(target) else { return };
        let mut live = live.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        change(&mut live);
        if let Some(bar) = &live.bar {
            let last = String::from_utf8_lossy(&live.last_line);
            let last: String = last.chars().filter(|c| !c.is_control()).take(LAST_LINE).collect();
            bar.set_message(format!("{}  {}", live.phase, last));
        }
    }

    /// Writes to stdout without a live line in the way.
    fn say(&self, text: &str) {
        // A reader that is gone cannot be told.
        self.live.suspend(|| {
            let _ = io::stdout().lock().write_all(text.as_bytes());
        });
    }
}

impl Observer for Lines {
    fn started(&self, target: usize, attempt: u32) {
        let name = self.names.get(target).map_or("", String::as_str);
        let name = match attempt {
            1 => name.to_owned(),
            more => format!("{name} (attempt {more})"),
        };
        self.with(target, |live| {
            let bar = self.live.add(ProgressBar::new_spinner().with_prefix(name));
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} {prefix}  {elapsed}  {wide_msg}")
            {
                bar.set_style(style);
            }
            bar.enable_steady_tick(TICK);
            if let Some(old) = live.bar.replace(bar) {
                old.finish_and_clear();
            }
        });
    }

    fn phase(&self, target: usize, phase: &str) {
        self.with(target, |live| phase.clone_into(&mut live.phase));
    }

    fn note(&self, target: usize, text: &str) {
        if !self.quiet {
            let name = self.names.get(target).map_or("", String::as_str);
            self.live.suspend(|| output::note(&format!("{name}: {text}")));
        }
    }

    fn output(&self, target: usize, bytes: &[u8]) {
        let last = bytes.trim_ascii_end().rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
        if !last.is_empty() {
            self.with(target, |live| last.clone_into(&mut live.last_line));
        }
    }

    fn ended(&self, target: usize, result: &TargetResult) {
        self.with(target, |live| {
            if let Some(bar) = live.bar.take() {
                bar.finish_and_clear();
                self.live.remove(&bar);
            }
        });
        let failed = matches!(result.outcome, Outcome::Failed | Outcome::Error);
        if failed || !self.quiet {
            self.say(&line(result));
        }
    }
}

/// How a target ended, in a line.
fn line(result: &TargetResult) -> String {
    let word = match result.outcome {
        Outcome::Passed => "ok",
        Outcome::Flaky => "flaky",
        Outcome::Failed => "FAILED",
        Outcome::Error => "ERROR",
        Outcome::Cancelled => "cancelled",
        Outcome::Skipped => "skipped",
    };
    let took: f64 = result.attempts.iter().map(|attempt| attempt.took_ms).sum();
    let mut text = format!("{word:<9} {} ({:.1} s)", result.name, took / 1000.0);
    if result.attempts.len() > 1 {
        text.push_str(&format!(", attempt {}", result.attempts.len()));
    }
    let why = result.attempts.iter().rev().find_map(|attempt| attempt.failure.as_ref());
    if let Some(why) = why.filter(|why| **why != Failure::Cancelled) {
        // The summary has all of it.
        text.push_str(&format!(": {}", why.to_string().lines().next().unwrap_or_default()));
    }
    text.push('\n');
    text
}
