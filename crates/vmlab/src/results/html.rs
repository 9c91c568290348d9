//! One page for people: all targets at a glance, and each with its attempts, events, output and console.
//!
//! The page loads nothing, and all but filtering works without its script. What a guest wrote is text; were
//! that to fail somewhere, the page's policy lets no script run but the page's own.

mod attempt;
mod grid;

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};
use vmlab_artifacts::base64;

use super::text::{add, counted, duration, escape, escape_line, moment, one_line, sane};
use super::{AttemptResult, Failure, Outcome, Results, TargetResult};

const STYLE: &str = include_str!("html/page.css");
const SCRIPT: &str = include_str!("html/page.js");

/// So many characters of a name are in what links to it.
const ID_MAX: usize = 100;

/// Results as an HTML page that is complete in itself. It is well-formed XML, too, but for its style and script.
///
/// A target's name is what `#` in the address opens, with `-` for each character that is no ASCII letter, digit,
/// `.`, `_` or `-`, and a number behind it where two would be the same.
pub fn html(results: &Results) -> String {
    let ids = ids(results);
    let mut out = String::new();
    head(&mut out, results);
    out.push_str("<main>\n");
    grid::grids(&mut out, results, &ids);
    overview(&mut out, results, &ids);
    out.push_str("<section aria-labelledby=\"ui-details\">\n<h2 id=\"ui-details\">Details</h2>\n");
    for (target, id) in results.targets.iter().zip(&ids) {
        details(&mut out, target, id);
    }
    out.push_str("</section>\n</main>\n");
    let version = env!("CARGO_PKG_VERSION");
    add(&mut out, format_args!("<footer>Written by vmlab {version}</footer>\n"));
    add(&mut out, format_args!("<script>{SCRIPT}</script>\n</body>\n</html>\n"));
    out
}

/// The identifiers of all targets in the page; those that begin with `ui-` are the page's own.
fn ids(results: &Results) -> Vec<String> {
    let mut taken = BTreeSet::new();
    let mut unique = |target: &TargetResult| {
        let kept = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let name = one_line(&target.name);
        let mut id: String =
            name.chars().take(ID_MAX).map(|c| if kept(c) { c } else { '-' }).collect();
        if id.is_empty() || id.starts_with("ui-") {
            id.insert_str(0, "target-");
        }
        let numbered = (2..).map(|number| format!("{id}-{number}"));
        let free = std::iter::once(id.clone()).chain(numbered).find(|id| !taken.contains(id));
        let free = free.unwrap_or(id);
        taken.insert(free.clone());
        free
    };
    results.targets.iter().map(&mut unique).collect()
}

fn head(out: &mut String, results: &Results) {
    let suite = match escape_line(&results.suite) {
        suite if suite.is_empty() => "vmlab".to_owned(),
        suite => suite,
    };
    let (counts, hash) = (results.counts(), base64::encode(&Sha256::digest(SCRIPT)));
    add(
        out,
        format_args!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
             style-src 'unsafe-inline'; script-src 'sha256-{hash}'; base-uri 'none'; \
             form-action 'none'\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
             <meta name=\"color-scheme\" content=\"light dark\"/>\n\
             <title>{suite}: {counts}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        ),
    );
    let good = results.targets.iter().all(|target| target.outcome.is_success());
    let (class, verdict) = match good {
        true => ("passed", "Passed"),
        false if counts.failed + counts.errors > 0 => ("failed", "Failed"),
        false => ("cancelled", "Cancelled"),
    };
    let targets = counted(results.targets.len(), "target");
    let (took, began) = (duration(results.took_ms), moment(results.began_ms));
    let (day, time) = began.trim_end_matches('Z').split_once('T').unwrap_or_default();
    add(
        out,
        format_args!(
            "<header>\n<h1>{suite}</h1>\n<p class=\"verdict {class}\">{verdict}</p>\n\
             <p class=\"when\">{targets} in {took}; began \
             <time datetime=\"{began}\">{day} {time} UTC</time></p>\n"
        ),
    );
    let numbers = [
        (Outcome::Passed, counts.passed),
        (Outcome::Flaky, counts.flaky),
        (Outcome::Failed, counts.failed),
        (Outcome::Error, counts.errors),
        (Outcome::Cancelled, counts.cancelled),
        (Outcome::Skipped, counts.skipped),
    ];
    let numbers: Vec<_> = numbers.into_iter().filter(|(_, count)| *count > 0).collect();
    out.push_str("<div class=\"shares\" aria-hidden=\"true\">");
    for (outcome, count) in &numbers {
        add(out, format_args!("<span class=\"{}\" style=\"flex:{count}\"></span>", outcome.name()));
    }
    out.push_str("</div>\n<ul class=\"counts\">\n");
    for (outcome, count) in &numbers {
        let name = outcome.name();
        let word = if name == "error" && *count > 1 { "errors" } else { name };
        add(
            out,
            format_args!(
                "<li class=\"{name}\"><label><input type=\"checkbox\" class=\"js\" value=\"{name}\" \
                 checked=\"\"/> <b>{count}</b> {word}</label></li>\n"
            ),
        );
    }
    out.push_str("</ul>\n</header>\n");
}

fn overview(out: &mut String, results: &Results, ids: &[String]) {
    out.push_str(
        "<section aria-labelledby=\"ui-targets\">\n<div class=\"bar\">\n<h2 id=\"ui-targets\">Targets</h2>\n\
         <div class=\"js tools\">\n<input type=\"search\" id=\"ui-filter\" placeholder=\"Filter targets ( / )\" \
         aria-label=\"Filter targets by name, tag or kernel\"/>\n\
         <button type=\"button\" id=\"ui-open\">Open all</button>\n\
         <button type=\"button\" id=\"ui-close\">Close all</button>\n</div>\n</div>\n\
         <div class=\"scroll\"><table>\n<thead><tr><th scope=\"col\">Target</th><th scope=\"col\">Outcome</th>\
         <th scope=\"col\">Kernel</th><th scope=\"col\" class=\"number\">Attempts</th>\
         <th scope=\"col\" class=\"number\">Time</th>",
    );
    let ends = results.targets.iter().flat_map(|target| &target.attempts);
    let ends = ends.map(|attempt| sane(attempt.start_ms) + sane(attempt.took_ms));
    let total = ends.fold(sane(results.took_ms), f64::max);
    add(
        out,
        format_args!(
            "<th scope=\"col\" class=\"when\"><span>When</span> <span>{}</span></th></tr></thead>\n<tbody>\n",
            duration(total)
        ),
    );
    for (target, id) in results.targets.iter().zip(ids) {
        row(out, target, id, total);
    }
    out.push_str("</tbody>\n</table></div>\n<p id=\"ui-none\" hidden=\"\">No target is chosen.</p>\n</section>\n");
}

fn row(out: &mut String, target: &TargetResult, id: &str, total: f64) {
    let (name, outcome) = (shown_name(target), target.outcome.name());
    let release = target.attempts.last().and_then(|attempt| attempt.release.as_deref());
    add(
        out,
        format_args!(
            "<tr data-outcome=\"{outcome}\" data-id=\"{id}\"><th scope=\"row\"><a href=\"#{id}\">{name}</a>"
        ),
    );
    for tag in &target.tags {
        add(out, format_args!(" <span class=\"tag\">{}</span>", escape_line(tag)));
    }
    add(
        out,
        format_args!(
            "</th><td><span class=\"badge {outcome}\">{outcome}</span></td><td class=\"code\">{}</td>\
             <td class=\"number\">{}</td><td class=\"number\">{}</td><td><div class=\"track\">",
            escape_line(release.unwrap_or_default()),
            target.attempts.len(),
            duration(target.took_ms())
        ),
    );
    for (index, attempt) in target.attempts.iter().enumerate() {
        let (left, width) = (share(attempt.start_ms, total), share(attempt.took_ms, total));
        let (class, number) = (attempt_class(attempt), index + 1);
        let (from, took) = (duration(attempt.start_ms), duration(attempt.took_ms));
        add(
            out,
            format_args!(
                "<span class=\"{class}\" style=\"left:{left:.3}%;width:{width:.3}%\" \
                 title=\"attempt {number}, {class}: {took}, from {from} on\"></span>"
            ),
        );
    }
    out.push_str("</div></td></tr>\n");
}

fn details(out: &mut String, target: &TargetResult, id: &str) {
    let (name, outcome) = (shown_name(target), target.outcome.name());
    // What needs attention is open, in case there is no script to open it.
    let open = match target.outcome {
        Outcome::Failed | Outcome::Error => " open=\"\"",
        _ => "",
    };
    add(
        out,
        format_args!(
            "<details class=\"target {outcome}\" data-outcome=\"{outcome}\" data-id=\"{id}\"{open}>\n<summary>\
             <span class=\"badge {outcome}\">{outcome}</span> <span class=\"name\">{name}</span> "
        ),
    );
    if !target.outcome.is_success() {
        add(out, format_args!("<span class=\"reason\">{}</span> ", escape(&target.reason())));
    }
    // The identifier is inside, for browsers open what is around the place that an address names.
    add(
        out,
        format_args!(
            "<span class=\"took\">{}</span></summary>\n<div class=\"inside\" id=\"{id}\">\n",
            duration(target.took_ms())
        ),
    );
    let count = target.attempts.len();
    for (index, attempt) in target.attempts.iter().enumerate() {
        attempt::section(out, attempt, index + 1, count);
    }
    if count == 0 {
        out.push_str("<p class=\"note\">It was not run.</p>\n");
    }
    out.push_str("</div>\n</details>\n");
}

/// A name, which must be something that can be seen and followed.
fn shown_name(target: &TargetResult) -> String {
    match escape_line(&target.name) {
        name if name.is_empty() => "(no name)".to_owned(),
        name => name,
    }
}

fn attempt_class(attempt: &AttemptResult) -> &'static str {
    match &attempt.failure {
        None => "passed",
        Some(Failure::Cancelled) => "cancelled",
        Some(failure) if failure.is_error() => "error",
        Some(_) => "failed",
    }
}

/// A part of a time in percent, from 0 to 100 whatever the numbers are.
fn share(part: f64, total: f64) -> f64 {
    let share = sane(part) / sane(total) * 100.0;
    if share.is_finite() { share.min(100.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (bytes, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64::encode(bytes.as_bytes()), expected);
        }
        assert_eq!(base64::encode(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn neither_style_nor_script_ends_its_element() {
        // `<!--` and `<script` change how the rest of a script is read.
        for text in [STYLE, SCRIPT] {
            for end in ["</", "<!--", "<script", "]]>"] {
                assert!(!text.contains(end), "{end}");
            }
        }
    }
}
