//! The Test Anything Protocol, version 14 (testanything.org).

use std::path::Path;

use super::counts::name;
use super::text::{add, counted, one_line, plain, tail};
use super::{AttemptResult, Outcome, Results, TargetResult};

/// So many lines of the output and of each report are in a test point's diagnostics; more would bury the
/// other points, and whoever wants all has the files.
const LINES: usize = 50;

/// Results as TAP 14.
///
/// What failed, and what passed only when it was tried again, has a YAML block. What was cancelled is skipped, and
/// then the run bails out at the end, since it is not whole. `# TODO` is never written: a target that should fail and
/// does has passed.
pub fn tap(results: &Results) -> String {
    let mut out = format!("TAP version 14\n1..{}\n", results.targets.len());
    for (index, target) in results.targets.iter().enumerate() {
        let not = match target.outcome {
            Outcome::Passed | Outcome::Flaky | Outcome::Cancelled | Outcome::Skipped => "",
            Outcome::Failed | Outcome::Error => "not ",
        };
        let (number, name) = (index + 1, escaped(&one_line(&target.name)));
        add(&mut out, format_args!("{not}ok {number} - {name}"));
        match target.outcome {
            Outcome::Cancelled | Outcome::Skipped => {
                add(&mut out, format_args!(" # SKIP {}\n", escaped(&target.reason())));
            }
            Outcome::Passed => out.push('\n'),
            Outcome::Flaky | Outcome::Failed | Outcome::Error => {
                out.push('\n');
                diagnostics(&mut out, target);
            }
        }
    }
    let cancelled = results.counts().cancelled;
    if cancelled > 0 {
        let targets = counted(cancelled, "target");
        add(&mut out, format_args!("Bail out! The run was ended; cancelled: {targets}\n"));
    }
    out
}

/// What tells a description from a directive.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('#', "\\#")
}

fn diagnostics(out: &mut String, target: &TargetResult) {
    // Of a flaky target, the last attempt that failed is the one to look at.
    let failed = target.attempts.iter().rev().find(|attempt| attempt.failure.is_some());
    let shown = failed.or(target.attempts.last());
    out.push_str("  ---\n");
    let message = match shown.and_then(|attempt| attempt.failure.as_ref()) {
        Some(failure) => one_line(&failure.to_string()),
        None => target.reason(),
    };
    add(out, format_args!("  message: {}\n", quoted(&message)));
    let severity = match target.outcome {
        Outcome::Failed => "fail",
        Outcome::Error => "error",
        _ => "comment",
    };
    add(out, format_args!("  severity: {severity}\n"));
    if let Some(failure) = shown.and_then(|attempt| attempt.failure.as_ref()) {
        add(out, format_args!("  kind: {}\n", failure.kind()));
    }
    add(out, format_args!("  attempts: {}\n", target.attempts.len()));
    add(out, format_args!("  duration_ms: {:.3}\n", super::text::sane(target.took_ms())));
    if let Some(attempt) = shown {
        attempt_in_yaml(out, attempt);
    }
    out.push_str("  ...\n");
}

fn attempt_in_yaml(out: &mut String, attempt: &AttemptResult) {
    if let Some(release) = &attempt.release {
        add(out, format_args!("  kernel: {}\n", quoted(&one_line(release))));
    }
    if let Some(code) = attempt.exit_code {
        add(out, format_args!("  exit_code: {code}\n"));
    }
    if let Some(signal) = attempt.signal {
        add(out, format_args!("  signal: {signal}\n"));
    }
    if !attempt.events.is_empty() {
        out.push_str("  events:\n");
        for event in &attempt.events {
            let title = quoted(&one_line(&event.title));
            add(out, format_args!("    - kind: {}\n      title: {title}\n", name(event.kind)));
            add(out, format_args!("      count: {}\n", event.count));
            block(out, "      ", "report", &event.report.join("\n"));
        }
    }
    block(out, "  ", "output", &attempt.output);
    let path = |path: &Path| quoted(&one_line(&path.to_string_lossy()));
    for (key, log) in [("output_log", &attempt.output_log), ("console_log", &attempt.console_log)] {
        if let Some(log) = log {
            add(out, format_args!("  {key}: {}\n", path(log)));
        }
    }
    if !attempt.kept_files.is_empty() {
        out.push_str("  kept_files:\n");
    }
    for kept in &attempt.kept_files {
        add(out, format_args!("    - {}\n", path(kept)));
    }
}

/// A scalar in double quotes: what JSON has is YAML, too.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The last lines of a text: as a literal block if it is one without more words, else in double quotes. TAP's
/// consumers often read only a part of YAML, which has no block whose indentation is named.
fn block(out: &mut String, indent: &str, key: &str, text: &str) {
    let text = plain(text);
    let (lines, before) = tail(&text, LINES);
    let Some(first) = lines.first() else { return };
    if before > 0 {
        add(out, format_args!("{indent}{key}_lines_left_out: {before}\n"));
    }
    let ends = |line: &&str| matches!(line.trim(), "..." | "---");
    if first.is_empty() || first.starts_with([' ', '\t']) || lines.iter().any(ends) {
        let text = quoted(&format!("{}\n", lines.join("\n")));
        add(out, format_args!("{indent}{key}: {text}\n"));
        return;
    }
    add(out, format_args!("{indent}{key}: |\n"));
    // Empty lines are indented, too, for a block ends with its indentation.
    for line in lines {
        add(out, format_args!("{indent}  {line}\n"));
    }
}
