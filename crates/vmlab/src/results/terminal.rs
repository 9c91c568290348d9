//! The summary that a person reads at the end of a run.

use super::text::{add, duration, excerpt, one_line, plain};
use super::{AttemptResult, Outcome, Results, TargetResult};

/// So many lines of what explains a failure are shown; a screen holds them, and files have all.
const LINES: usize = 40;

/// Whose output is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ShowOutput {
    /// All targets', whole.
    All,
    /// The end of those that did not pass.
    #[default]
    Failed,
    /// Nobody's.
    None,
}

/// The summary of a run for people: what did not pass, and why, and the counts in the last line. Lines that a
/// guest wrote begin with a bar, so that they are no commands to who reads the log of a CI system.
pub fn terminal(results: &Results, show: ShowOutput) -> String {
    let mut out = String::new();
    for target in &results.targets {
        let shown = match target.outcome {
            // A run that was ended may have thousands; the counts say how many.
            Outcome::Cancelled => !target.attempts.is_empty(),
            Outcome::Passed => show == ShowOutput::All,
            Outcome::Flaky | Outcome::Failed | Outcome::Error | Outcome::Skipped => true,
        };
        if shown {
            one(&mut out, target, show);
        }
    }
    add(&mut out, format_args!("{}\n", results.counts_line()));
    out
}

fn one(out: &mut String, target: &TargetResult, show: ShowOutput) {
    let word = target.outcome.name().to_uppercase();
    let (name, took) = (one_line(&target.name), duration(target.took_ms()));
    add(out, format_args!("{word} {name} ({took})\n"));
    let count = target.attempts.len();
    // One block is enough of a target that failed alike at each attempt; the last one is what counts.
    for (index, attempt) in target.attempts.iter().enumerate() {
        let last = index + 1 == count;
        if count > 1 {
            add(out, format_args!("  attempt {} of {count}: ", index + 1));
        } else if attempt.failure.is_some() {
            out.push_str("  ");
        }
        match &attempt.failure {
            Some(failure) => message(out, &plain(&failure.to_string())),
            None if target.outcome == Outcome::Skipped => {
                add(out, format_args!("  {}\n", target.reason()));
            }
            None if count > 1 => out.push_str("passed\n"),
            None => {}
        }
        if last {
            evidence(out, attempt, target.outcome, show);
        }
    }
    if target.attempts.is_empty() {
        add(out, format_args!("  {}\n", target.reason()));
    }
    out.push('\n');
}

fn message(out: &mut String, text: &str) {
    for (index, line) in text.trim_end().lines().enumerate() {
        let indent = if index > 0 { "  | " } else { "" };
        add(out, format_args!("{indent}{line}\n"));
    }
}

fn evidence(out: &mut String, attempt: &AttemptResult, outcome: Outcome, show: ShowOutput) {
    let failed = !outcome.is_success();
    let (what, text) = match show {
        ShowOutput::None => ("", String::new()),
        ShowOutput::Failed if !failed => ("", String::new()),
        ShowOutput::All => ("output", attempt.output.clone()),
        ShowOutput::Failed => attempt.evidence().unwrap_or_default(),
    };
    // What explains a failure is often not what the command wrote.
    if show == ShowOutput::All
        && failed
        && let Some((what, text)) = attempt.evidence().filter(|(what, _)| *what != "output")
    {
        lines(out, what, &text, LINES);
    }
    lines(out, what, &text, if show == ShowOutput::All { usize::MAX } else { LINES });
    for note in &attempt.notes {
        add(out, format_args!("  note: {}\n", one_line(note)));
    }
    if failed {
        for (what, path) in attempt.files() {
            let path = one_line(&path.to_string_lossy());
            add(out, format_args!("  {what}: {path}\n"));
        }
    }
}

fn lines(out: &mut String, what: &str, text: &str, count: usize) {
    let text = plain(text);
    let (what, lines) = excerpt(what, &text, count);
    if !lines.is_empty() {
        add(out, format_args!("  {what}:\n"));
    }
    for line in lines {
        add(out, format_args!("  {}\n", format!("| {line}").trim_end()));
    }
}
