//! What is written of results, for machines and for people.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use vmlab::results::{
    Results, ShowOutput, github_annotations, github_summary, html, junit, tap, terminal,
};
use vmlab::testing::read_reports;

use crate::cli::{MergeArgs, ReportArgs, TestResultsArgs};
use crate::output;

/// The page in the directory that --html names.
const PAGE: &str = "index.html";

/// Says that GitHub Actions reads stdout.
const IN_GITHUB: &str = "GITHUB_ACTIONS";

/// Names the file that GitHub shows with a step.
const GITHUB_SUMMARY: &str = "GITHUB_STEP_SUMMARY";

type Writer = fn(&Results) -> String;

/// Files that are open, and what is to be in them.
#[derive(Debug)]
pub(super) struct Reports {
    files: Vec<(PathBuf, File, Writer)>,
}

impl Reports {
    /// Opens them before anything runs: a report that cannot be written should not cost a run.
    pub(super) fn open(args: &ReportArgs) -> Result<Self> {
        let page = match &args.html {
            Some(dir) => {
                fs::create_dir_all(dir).with_context(|| unwritable(dir))?;
                Some(dir.join(PAGE))
            }
            None => None,
        };
        let wanted: [(Option<PathBuf>, Writer); 4] = [
            (args.json.clone(), Results::to_json),
            (args.junit.clone(), junit),
            (args.tap.clone(), tap),
            (page, html),
        ];
        let mut files = Vec::new();
        for (path, writer) in wanted {
            if let Some(path) = path {
                let file = File::create(&path).with_context(|| unwritable(&path))?;
                files.push((path, file, writer));
            }
        }
        Ok(Self { files })
    }

    /// Writes all of them, and what GitHub Actions reads where that is running this. One that cannot be written
    /// is no reason to leave out another.
    ///
    /// # Errors
    /// Why the first of those could not be written; the others are said.
    pub(super) fn write(self, results: &Results) -> Result<()> {
        let files = self.files.into_iter().map(|(path, mut file, writer)| {
            let written = file.write_all(writer(results).as_bytes());
            if written.is_err() {
                // Half of a report would be taken for a whole one. What is not there cannot be.
                let _ = file.set_len(0);
            }
            written.with_context(|| unwritable(&path))
        });
        let mut written: Vec<Result<()>> = files.collect();
        if std::env::var_os(IN_GITHUB).is_some_and(|value| value == "true") {
            written.push(output::stdout(github_annotations(results).as_bytes()));
        }
        if let Some(path) = std::env::var_os(GITHUB_SUMMARY).map(PathBuf::from) {
            let file = File::options().append(true).create(true).open(&path);
            let summary =
                file.and_then(|mut file| file.write_all(github_summary(results).as_bytes()));
            written.push(summary.with_context(|| unwritable(&path)));
        }
        first(written)
    }
}

/// The first failure; the others are said.
pub(super) fn first(results: impl IntoIterator<Item = Result<()>>) -> Result<()> {
    let mut failures = results.into_iter().filter_map(Result::err);
    let Some(failure) = failures.next() else { return Ok(()) };
    failures.for_each(|failure| output::error(&failure));
    Err(failure)
}

/// Puts the results of shards together.
pub(crate) fn merge(args: &MergeArgs) -> Result<()> {
    let mut parts = Vec::new();
    for path in &args.parts {
        let name = path.display().to_string();
        let text = fs::read_to_string(path).with_context(|| format!("{name} cannot be read"))?;
        parts.push((name.clone(), Results::from_json(&text).context(name)?));
    }
    write_and_show(&args.reports, &Results::merge(parts)?)
}

/// Puts the results of Rust's tests together.
pub(crate) fn of_tests(args: &TestResultsArgs) -> Result<()> {
    write_and_show(&args.reports, &read_reports(&args.dir)?)
}

fn write_and_show(reports: &ReportArgs, results: &Results) -> Result<()> {
    let written = Reports::open(reports)?.write(results);
    let shown = output::stdout(terminal(results, ShowOutput::Failed).as_bytes());
    first([written, shown])
}

fn unwritable(path: &Path) -> String {
    format!("the report cannot be written to {}", path.display())
}
