//! JUnit XML: as Surefire writes it, so with retries, within what Jenkins, GitLab and GitHub's reporters read.

use super::counts::name;
use super::text::{add, escape, escape_line, moment, plain, seconds};
use super::{AttemptResult, Failure, Measurement, Outcome, Results, TargetResult};

/// The longest value of a property that a test told, in bytes.
const MAX_DETAIL: usize = 4096;

/// Results as JUnit XML.
///
/// A target is a test case of one suite. [`Outcome::Failed`] is a `failure`, [`Outcome::Error`] an `error`, and
/// [`Outcome::Cancelled`] and [`Outcome::Skipped`] are `skipped`. Each attempt before the last one is a `rerunFailure` or `rerunError`, of a
/// flaky target a `flakyFailure` or `flakyError`. The output is `system-out`, the console `system-err`.
///
/// XML 1.0 has no place for most control characters: sequences that steer a terminal are left out, and other control
/// characters are replaced by their pictures.
pub fn junit(results: &Results) -> String {
    let counts = results.counts();
    let suite = match escape_line(&results.suite) {
        suite if suite.is_empty() => "vmlab".to_owned(),
        suite => suite,
    };
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let numbers = format!(
        "name=\"{suite}\" tests=\"{}\" failures=\"{}\" errors=\"{}\"",
        results.targets.len(),
        counts.failed,
        counts.errors
    );
    let time = seconds(results.took_ms);
    add(&mut out, format_args!("<testsuites {numbers} time=\"{time}\">\n"));
    let (skipped, began) = (counts.cancelled + counts.skipped, moment(results.began_ms));
    add(
        &mut out,
        format_args!(
            "  <testsuite {numbers} skipped=\"{skipped}\" time=\"{time}\" timestamp=\"{began}\">\n"
        ),
    );
    properties(&mut out, results);
    for target in &results.targets {
        case(&mut out, &suite, target);
    }
    out.push_str("  </testsuite>\n</testsuites>\n");
    out
}

/// Properties are the suite's, since schemas know none of cases.
fn properties(out: &mut String, results: &Results) {
    out.push_str("    <properties>\n");
    let mut property = |name: &str, value: &str| {
        let (name, value) = (escape_line(name), escape_line(value));
        add(out, format_args!("      <property name=\"{name}\" value=\"{value}\"/>\n"));
    };
    property("vmlab.version", env!("CARGO_PKG_VERSION"));
    for target in &results.targets {
        let last = target.attempts.last();
        let kernel = last.and_then(|attempt| attempt.release.as_deref());
        let accel = last.and_then(|attempt| attempt.accel.as_deref());
        let tags = (!target.tags.is_empty()).then(|| target.tags.join(","));
        for (what, value) in [("kernel", kernel), ("accel", accel), ("tags", tags.as_deref())] {
            if let Some(value) = value {
                property(&format!("{}.{what}", target.name), value);
            }
        }
        for (what, value) in last.into_iter().flat_map(measured) {
            property(&format!("{}.{what}", target.name), &value);
        }
    }
    out.push_str("    </properties>\n");
}

/// What an attempt measured and told, and its phases to compare that with, which say little else here.
fn measured(attempt: &AttemptResult) -> Vec<(String, String)> {
    let AttemptResult { phases, measurements, details, .. } = attempt;
    if measurements.is_empty() && details.is_empty() {
        return Vec::new();
    }
    let phase = |(name, ms): &(String, f64)| (format!("phase.{name}"), format!("{ms} ms"));
    let measurement = |measured: &Measurement| {
        let value = format!("{} {}", measured.value, measured.unit);
        (format!("measurement.{}", measured.name), value.trim_end().to_owned())
    };
    let detail = |(key, value): (&String, &serde_json::Value)| {
        (format!("detail.{key}"), shortened(value.to_string()))
    };
    let phases = phases.iter().map(phase);
    phases.chain(measurements.iter().map(measurement)).chain(details.iter().map(detail)).collect()
}

/// As much of a detail as an attribute should have. JSON has all of it.
fn shortened(mut text: String) -> String {
    if text.len() > MAX_DETAIL {
        text.truncate(text.floor_char_boundary(MAX_DETAIL));
        text.push('…');
    }
    text
}

fn case(out: &mut String, suite: &str, target: &TargetResult) {
    let (name, time) = (escape_line(&target.name), seconds(target.took_ms()));
    add(
        out,
        format_args!("    <testcase name=\"{name}\" classname=\"{suite}\" time=\"{time}\">\n"),
    );
    // The verdict is that of the last attempt; those before it are retries.
    let (last, before) = match target.attempts.split_last() {
        Some((last, before)) => (Some(last), before),
        None => (None, [].as_slice()),
    };
    let reruns = |out: &mut String, word: &str, errors: bool| {
        for attempt in before {
            match &attempt.failure {
                Some(failure) if failure.is_error() == errors => {
                    let element = format!("{word}{}", if errors { "Error" } else { "Failure" });
                    rerun(out, &element, failure, attempt);
                }
                _ => {}
            }
        }
    };
    // Surefire's schema has these in this order.
    let word = if target.outcome == Outcome::Flaky { "flaky" } else { "rerun" };
    if target.outcome == Outcome::Failed {
        verdict(out, "failure", target, last);
    }
    reruns(out, word, false);
    if matches!(target.outcome, Outcome::Cancelled | Outcome::Skipped) {
        let reason = escape(&target.reason());
        add(out, format_args!("      <skipped message=\"{reason}\"/>\n"));
    }
    if target.outcome == Outcome::Error {
        verdict(out, "error", target, last);
    }
    reruns(out, word, true);
    if let Some(last) = last {
        streams(out, "      ", last);
    }
    out.push_str("    </testcase>\n");
}

fn verdict(
    out: &mut String,
    element: &str,
    target: &TargetResult,
    attempt: Option<&AttemptResult>,
) {
    let failure = attempt.and_then(|attempt| attempt.failure.as_ref());
    let kind = failure.map_or("unknown", Failure::kind);
    let message = escape(&target.reason());
    add(out, format_args!("      <{element} type=\"{kind}\" message=\"{message}\">"));
    if let Some(attempt) = attempt {
        out.push_str(&escape(&explanation(attempt)));
    }
    add(out, format_args!("</{element}>\n"));
}

fn rerun(out: &mut String, element: &str, failure: &Failure, attempt: &AttemptResult) {
    let (kind, message) = (failure.kind(), escape_line(&failure.to_string()));
    add(out, format_args!("      <{element} type=\"{kind}\" message=\"{message}\">\n"));
    let text = escape(&explanation(attempt));
    add(out, format_args!("        <stackTrace>{text}</stackTrace>\n"));
    streams(out, "        ", attempt);
    add(out, format_args!("      </{element}>\n"));
}

fn streams(out: &mut String, indent: &str, attempt: &AttemptResult) {
    for (element, text) in [("system-out", &attempt.output), ("system-err", &attempt.console)] {
        if !text.is_empty() {
            let text = escape(&plain(text));
            add(out, format_args!("{indent}<{element}>{text}</{element}>\n"));
        }
    }
}

/// All of a failure in words: its message, the kernel's reports, notes, and where files are.
pub(crate) fn explanation(attempt: &AttemptResult) -> String {
    let mut lines: Vec<String> = Vec::new();
    lines.extend(attempt.failure.iter().map(|failure| plain(&failure.to_string())));
    for event in &attempt.events {
        let times =
            if event.count > 1 { format!(" ({} times)", event.count) } else { String::new() };
        lines.push(format!("{}: {}{times}", name(event.kind), plain(&event.title)));
        lines.extend(event.report.iter().map(|line| format!("    {}", plain(line))));
    }
    lines.extend(attempt.notes.iter().map(|note| format!("note: {}", plain(note))));
    for (what, path) in attempt.files() {
        lines.push(format!("{what}: {}", plain(&path.to_string_lossy())));
    }
    lines.join("\n")
}
