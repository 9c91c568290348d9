//! One attempt: what came out, where its time went, what the kernel said, and what was written.

use super::super::counts::name;
use super::super::text::{add, counted, duration, escape, escape_line, plain, sane};
use super::super::{AttemptResult, Failure, Measurement};
use super::{attempt_class, share};
use crate::events::KernelEvent;

pub(super) fn section(out: &mut String, attempt: &AttemptResult, number: usize, count: usize) {
    out.push_str("<section class=\"attempt\">\n");
    let class = attempt_class(attempt);
    if count > 1 {
        add(
            out,
            format_args!(
                "<h3>Attempt {number} of {count} <span class=\"badge {class}\">{class}</span></h3>\n"
            ),
        );
    }
    if let Some(failure) = &attempt.failure {
        let message = escape(plain(&failure.to_string()).trim());
        add(out, format_args!("<p class=\"why {class}\">{message}</p>\n"));
    }
    facts(out, attempt);
    phases(out, attempt);
    measured(out, attempt);
    events(out, attempt);
    for note in &attempt.notes {
        let note = escape(plain(note).trim());
        add(out, format_args!("<p class=\"note\">{note}</p>\n"));
    }
    log(out, "Output", &attempt.output, attempt.failure.is_some());
    // Where the VM itself failed, the console is what explains it.
    let console = matches!(
        attempt.failure,
        Some(
            Failure::GuestEnded { .. }
                | Failure::Infrastructure { .. }
                | Failure::MissingEvent { .. }
        )
    );
    log(out, "Console", &attempt.console, console || attempt.output.trim().is_empty());
    out.push_str("</section>\n");
}

fn facts(out: &mut String, attempt: &AttemptResult) {
    let mut facts: Vec<(&str, String)> = Vec::new();
    let mut fact = |what: &'static str, value: Option<String>| {
        facts.extend(value.map(|value| (what, value)));
    };
    fact("Kernel", attempt.release.clone());
    fact("Accelerator", attempt.accel.clone());
    fact("Exit code", attempt.exit_code.map(|code| code.to_string()));
    fact("Signal", attempt.signal.map(|signal| signal.to_string()));
    fact("Command", attempt.command_ms.map(duration));
    fact("Whole attempt", Some(duration(attempt.took_ms)));
    out.push_str("<dl class=\"facts\">\n");
    for (what, value) in facts {
        add(out, format_args!("<div><dt>{what}</dt><dd>{}</dd></div>\n", escape_line(&value)));
    }
    for (what, path) in attempt.files() {
        let what = match what {
            "output" => "Output",
            "console" => "Console",
            _ => "Kept",
        };
        let path = escape_line(&path.to_string_lossy());
        add(out, format_args!("<div class=\"file\"><dt>{what}</dt><dd>{path}</dd></div>\n"));
    }
    out.push_str("</dl>\n");
}

fn phases(out: &mut String, attempt: &AttemptResult) {
    if attempt.phases.is_empty() {
        return;
    }
    let sum: f64 = attempt.phases.iter().map(|(_, ms)| sane(*ms)).sum();
    let total = sum.max(sane(attempt.took_ms));
    let rest = sane(total - sum);
    let mut parts: Vec<(&str, f64)> =
        attempt.phases.iter().map(|(name, ms)| (name.as_str(), *ms)).collect();
    // What no phase covers is the ends of the VM and of what is around it.
    if share(rest, total) >= 1.0 {
        parts.push(("other", rest));
    }
    out.push_str("<div class=\"phases\" aria-hidden=\"true\">");
    for (name, ms) in &parts {
        let (class, width, took) = (phase_class(name), share(*ms, total), duration(*ms));
        let name = escape_line(name);
        add(
            out,
            format_args!(
                "<span class=\"{class}\" style=\"width:{width:.3}%\" title=\"{name}: {took}\"></span>"
            ),
        );
    }
    out.push_str("</div>\n<ul class=\"legend\" aria-label=\"Phases\">");
    for (name, ms) in &parts {
        let (class, name, took) = (phase_class(name), escape_line(name), duration(*ms));
        add(out, format_args!("<li><i class=\"{class}\"></i>{name} <b>{took}</b></li>"));
    }
    out.push_str("</ul>\n");
}

/// What a test measured and told.
fn measured(out: &mut String, attempt: &AttemptResult) {
    if attempt.measurements.is_empty() && attempt.details.is_empty() {
        return;
    }
    out.push_str("<dl class=\"facts\">\n");
    let mut row = |what: &str, value: &str| {
        let (what, value) = (escape_line(what), escape_line(value));
        add(out, format_args!("<div><dt>{what}</dt><dd>{value}</dd></div>\n"));
    };
    for Measurement { name, value, unit } in &attempt.measurements {
        row(name, &format!("{value} {unit}"));
    }
    for (key, value) in &attempt.details {
        row(key, &value.to_string());
    }
    out.push_str("</dl>\n");
}

fn phase_class(name: &str) -> &'static str {
    match name {
        "boot" => "boot",
        "snapshot" | "restore" => "restore",
        "setup" => "setup",
        "run" => "run",
        _ => "other",
    }
}

fn events(out: &mut String, attempt: &AttemptResult) {
    if attempt.events.is_empty() {
        return;
    }
    add(out, format_args!("<h4>{}</h4>\n", counted(attempt.events.len(), "kernel event")));
    let cause = match &attempt.failure {
        Some(Failure::Event { title }) => Some(title),
        _ => None,
    };
    for event in &attempt.events {
        one_event(out, event, cause == Some(&event.title));
    }
}

fn one_event(out: &mut String, event: &KernelEvent, is_cause: bool) {
    let (open, class) = if is_cause { (" open=\"\"", "failed") } else { ("", "cancelled") };
    let (kind, title) = (name(event.kind), escape_line(&event.title));
    add(
        out,
        format_args!(
            "<details class=\"event\"{open}><summary><span class=\"badge {class}\">{kind}</span> \
             <span class=\"name\">{title}</span>"
        ),
    );
    let times = (event.count > 1).then(|| format!("{} times", event.count));
    let at = event.at_us.map(|us| format!("at {:.6} s", us as f64 / 1e6));
    let when = match (times, at) {
        (Some(times), Some(at)) => Some(format!("{times}, first {at}")),
        (times, at) => times.or(at),
    };
    if let Some(when) = when {
        add(out, format_args!(" <span class=\"took\">{when}</span>"));
    }
    let report = escape(&plain(&event.report.join("\n")));
    // A line break right behind the tag is no part of the text.
    add(out, format_args!("</summary>\n<pre tabindex=\"0\">\n{report}</pre>\n</details>\n"));
}

/// A text with a field to search it, which works by the page's script.
fn log(out: &mut String, what: &str, text: &str, open: bool) {
    let text = plain(text);
    if text.trim().is_empty() {
        return;
    }
    let lines = counted(text.lines().count(), "line");
    let open = if open { " open=\"\"" } else { "" };
    let text = escape(&text);
    add(
        out,
        format_args!(
            "<details class=\"log\"{open}><summary>{what} <span class=\"took\">{lines}</span></summary>\n\
             <div class=\"js tools\"><input type=\"search\" placeholder=\"Find lines\" \
             aria-label=\"Find lines of the {}\"/> <output></output></div>\n\
             <pre tabindex=\"0\" role=\"region\" aria-label=\"{what}\">\n{text}</pre>\n</details>\n",
            what.to_lowercase()
        ),
    );
}
