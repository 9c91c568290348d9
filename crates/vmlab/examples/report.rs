//! Writes a report of made-up results to stdout, as `html`, `junit`, `tap`, `json`, `github`, `summary` or `text`:
//! `cargo run -p vmlab --example report html > page.html`.
#![allow(clippy::print_stdout, reason = "that is what it is for")]

use vmlab::results::{self, ShowOutput};

#[path = "../tests/reports/samples.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod samples;

fn main() {
    let results = samples::demo();
    let text = match std::env::args().nth(1).as_deref() {
        Some("html") => results::html(&results),
        Some("junit") => results::junit(&results),
        Some("tap") => results::tap(&results),
        Some("json") => results.to_json(),
        Some("github") => results::github_annotations(&results),
        Some("summary") => results::github_summary(&results),
        Some("text") => results::terminal(&results, ShowOutput::Failed),
        _ => panic!("name one of html, junit, tap, json, github, summary, text"),
    };
    print!("{text}");
}
