//! What GitHub Actions shows: annotations and groups by workflow commands in a step's log, and a summary in Markdown.

use super::text::{add, counted, duration, escape, escape_line, excerpt, one_line, plain};
use super::{Outcome, Results, TargetResult};

/// GitHub shows so many annotations of a kind for each step, and drops the others without a word.
const ANNOTATIONS: usize = 10;

/// So many lines of evidence are in a group or behind a failure in the summary.
const LINES: usize = 100;

/// GitHub refuses a summary of more than 1 MiB. There must be room for what is written behind this.
const SUMMARY_MAX: usize = 900 * 1024;

/// So many characters of a line of evidence are in the summary, so that one line cannot fill it.
const LINE_MAX: usize = 1000;

/// Workflow commands for the log of a step: a group for each target that did not pass, with the tail of what
/// explains it, then an annotation for each: an error, or a warning for a flaky one. Where there are more than
/// GitHub shows, the last one says how many there are besides.
///
/// No line that a guest wrote begins one of ours or holds `##[`, so that a guest cannot give GitHub commands.
pub fn github_annotations(results: &Results) -> String {
    let mut out = String::new();
    for target in results.targets.iter().filter(|target| !target.outcome.is_success()) {
        let Some(attempt) = target.attempts.last() else { continue };
        let title = format!("{}: {}", target.name, target.reason());
        add(&mut out, format_args!("::group::{}\n", data(&one_line(&title))));
        if let Some((what, text)) = attempt.evidence() {
            let text = plain(&text);
            let (what, lines) = excerpt(what, &text, LINES);
            add(&mut out, format_args!("{what}:\n"));
            for line in lines {
                add(&mut out, format_args!("| {}\n", harmless(line)));
            }
        }
        for (what, path) in attempt.files() {
            let path = one_line(&path.to_string_lossy());
            add(&mut out, format_args!("{what}: {}\n", harmless(&path)));
        }
        out.push_str("::endgroup::\n");
    }
    let failed = |outcome| matches!(outcome, Outcome::Failed | Outcome::Error);
    annotations(&mut out, "error", results.targets.iter().filter(|t| failed(t.outcome)).collect());
    let flaky = |target: &&TargetResult| target.outcome == Outcome::Flaky;
    annotations(&mut out, "warning", results.targets.iter().filter(flaky).collect());
    out
}

fn annotations(out: &mut String, kind: &str, targets: Vec<&TargetResult>) {
    let shown = match targets.len() > ANNOTATIONS {
        true => ANNOTATIONS - 1,
        false => targets.len(),
    };
    for target in &targets[..shown] {
        let (title, message) = (property(&one_line(&target.name)), data(&message(target)));
        add(out, format_args!("::{kind} title={title}::{message}\n"));
    }
    if shown < targets.len() {
        let names: Vec<String> = targets[shown..].iter().map(|t| one_line(&t.name)).collect();
        let (more, names) = (names.len(), data(&names.join("\n")));
        add(out, format_args!("::{kind} title={more} more targets::{names}\n"));
    }
}

/// Of a failure all lines of its message; of a flaky target how its first attempt failed.
fn message(target: &TargetResult) -> String {
    let attempt = match target.outcome {
        Outcome::Flaky => target.attempts.first(),
        _ => target.attempts.last(),
    };
    let failure = attempt.and_then(|attempt| attempt.failure.as_ref());
    let message = failure.map_or_else(|| target.reason(), |failure| plain(&failure.to_string()));
    match (target.outcome, target.attempts.len()) {
        (Outcome::Flaky, count) => format!("passed at attempt {count}; before: {message}"),
        (_, 0 | 1) => message,
        (_, count) => format!("{message} (attempt {count} of {count})"),
    }
}

/// The message of a command.
fn data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

/// A command's property.
fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

/// The older form of commands is recognised anywhere in a line.
fn harmless(line: &str) -> String {
    line.replace("##[", "## [")
}

/// Markdown for `$GITHUB_STEP_SUMMARY`: a table of the targets, and what explains those that did not pass. It stays
/// below GitHub's limit, and says what it left out for that.
pub fn github_summary(results: &Results) -> String {
    let mut out = format!(
        "## {}\n\n{}\n\n",
        match markdown(&results.suite) {
            suite if suite.is_empty() => "vmlab".to_owned(),
            suite => suite,
        },
        results.counts_line()
    );
    out.push_str("| | Target | Outcome | Time | Attempts | Kernel |\n|---|---|---|--:|--:|---|\n");
    // What needs attention comes first, and is not what the limit cuts.
    let order = [
        Outcome::Error,
        Outcome::Failed,
        Outcome::Flaky,
        Outcome::Cancelled,
        Outcome::Skipped,
        Outcome::Passed,
    ];
    let in_order = || {
        order.iter().flat_map(|o| results.targets.iter().filter(move |target| target.outcome == *o))
    };
    let left_out = push(&mut out, in_order(), row);
    if left_out > 0 {
        let targets = counted(left_out, "target");
        add(&mut out, format_args!("\n{targets} left out, since GitHub limits this page.\n"));
    }
    let left_out =
        push(&mut out, in_order().filter(|target| !target.outcome.is_success()), details);
    if left_out > 0 {
        let targets = counted(left_out, "target");
        add(
            &mut out,
            format_args!("\nDetails of {targets} left out, since GitHub limits this page.\n"),
        );
    }
    out
}

/// Appends what `show` says of each target until there is no more room; gives how many are left out.
fn push<'a>(
    out: &mut String,
    mut targets: impl Iterator<Item = &'a TargetResult>,
    show: impl Fn(&TargetResult) -> String,
) -> usize {
    for target in targets.by_ref() {
        let text = show(target);
        if out.len() + text.len() > SUMMARY_MAX {
            return 1 + targets.count();
        }
        out.push_str(&text);
    }
    0
}

fn row(target: &TargetResult) -> String {
    let mark = match target.outcome {
        Outcome::Passed => "✅",
        Outcome::Flaky => "⚠️",
        Outcome::Failed => "❌",
        Outcome::Error => "💥",
        Outcome::Cancelled => "⏹️",
        Outcome::Skipped => "⏭️",
    };
    let release = target.attempts.last().and_then(|attempt| attempt.release.as_deref());
    format!(
        "| {mark} | {} | {} | {} | {} | {} |\n",
        markdown(&target.name),
        target.outcome.name(),
        duration(target.took_ms()),
        target.attempts.len(),
        markdown(release.unwrap_or_default()),
    )
}

fn details(target: &TargetResult) -> String {
    let (name, reason) = (escape_line(&target.name), escape(&target.reason()));
    let mut out = format!("\n<details><summary><b>{name}</b>: {reason}</summary>\n\n");
    if let Some((what, text)) = target.attempts.last().and_then(|attempt| attempt.evidence()) {
        let text = plain(&text);
        let (what, lines) = excerpt(what, &text, LINES);
        add(&mut out, format_args!("{what}:\n\n<pre>\n"));
        for line in lines {
            let shown: String = line.chars().take(LINE_MAX).collect();
            let cut = if shown.len() < line.len() { "…" } else { "" };
            add(&mut out, format_args!("{}{cut}\n", escape(&shown)));
        }
        out.push_str("</pre>\n\n");
    }
    out.push_str("</details>\n");
    out
}

/// Text as it is: punctuation that could mean something is escaped, so that a name is no link, mention or table cell.
fn markdown(text: &str) -> String {
    let mut out = String::new();
    for c in one_line(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            // Some autolinks are found in spite of a backslash.
            '@' => out.push_str("&#64;"),
            c if c.is_ascii_punctuation() && !matches!(c, '-' | ',' | '/' | '=' | '+') => {
                out.push('\\');
                out.push(c);
            }
            c => out.push(c),
        }
    }
    out
}
