//! What tests came to, as files: one for each run of a test, so that programs and machines need not know of
//! each other.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use thiserror::Error;

use super::Test;
use crate::error::chain;
use crate::results::{AttemptResult, Outcome, Results, ResultsError, TargetResult, VERSION};

/// Names the directory where results of tests are put.
const DIR: &str = "VMLAB_REPORT_DIR";

/// The longest file of one test that is read, in bytes: its output and the details that it tells are far
/// below that.
pub const MAX_RESULT_FILE: u64 = 16 * 1024 * 1024;

/// Puts a test's result into the directory that the caller has named, if any.
pub(super) fn write(
    test: &Test,
    other_kernel: Option<&str>,
    began: SystemTime,
    outcome: Outcome,
    attempt: AttemptResult,
) -> io::Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else { return Ok(()) };
    let began_ms = began.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let mut name = format!("{}::{}", test.module, test.name);
    if let Some(kernel) = other_kernel {
        name = format!("{name} [{kernel}]");
    }
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_".contains(c) { c } else { '-' };
    let stem: String = name.chars().map(plain).collect();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let file = format!("{began_ms}-{}-{count}-{stem:.120}.json", std::process::id());
    let results = Results {
        version: VERSION,
        suite: test.package.to_owned(),
        began_ms: began_ms.try_into().unwrap_or(u64::MAX),
        took_ms: attempt.took_ms,
        targets: vec![TargetResult {
            name,
            index: 0,
            tags: Vec::new(),
            axes: Vec::new(),
            outcome,
            attempts: vec![attempt],
        }],
    };
    fs::create_dir_all(&dir)?;
    // Who looks at the directory in the meantime finds whole files.
    let staged = dir.join(format!(".{file}"));
    File::create(&staged)?.write_all(results.to_json().as_bytes())?;
    fs::rename(staged, dir.join(file))
}

/// Why the results of tests cannot be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadReportsError {
    /// A file or the directory cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file is longer than [`MAX_RESULT_FILE`].
    #[error("{} is longer than a test's results are", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// A file has something else.
    #[error("{}", path.display())]
    Results {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ResultsError,
    },
    /// There are none.
    #[error("{} has no results of tests; {DIR} names the directory where tests put them", dir.display())]
    None {
        /// The directory.
        dir: PathBuf,
    },
}

/// Puts the results in a directory together. A test that ran several times has each of these as an attempt.
///
/// # Errors
/// When there are none, or a file is something else.
pub fn read_reports(dir: &Path) -> Result<Results, ReadReportsError> {
    let read = |path: &Path| {
        let path = path.to_owned();
        move |source| ReadReportsError::Read { path, source }
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(read(dir))? {
        let path = entry.map_err(read(dir))?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if path.extension().is_some_and(|extension| extension == "json") && !hidden {
            files.push(path);
        }
    }
    let mut all = Vec::new();
    for path in files {
        let mut text = String::new();
        let file = File::open(&path).map_err(read(&path))?;
        file.take(MAX_RESULT_FILE + 1).read_to_string(&mut text).map_err(read(&path))?;
        if text.len() as u64 > MAX_RESULT_FILE {
            return Err(ReadReportsError::TooLong { path });
        }
        let results = Results::from_json(&text);
        all.push(results.map_err(|source| ReadReportsError::Results { path, source })?);
    }
    together(all).ok_or_else(|| ReadReportsError::None { dir: dir.to_owned() })
}

/// `None` where there is nothing.
fn together(mut all: Vec<Results>) -> Option<Results> {
    all.sort_by_key(|results| results.began_ms);
    let (began_ms, suite) = all.first().map(|first| (first.began_ms, first.suite.clone()))?;
    let suite = match all.iter().all(|results| results.suite == suite) {
        true => suite,
        false => "tests".to_owned(),
    };
    let mut took_ms: f64 = 0.0;
    // Tests of two crates can have one name.
    let mut targets: BTreeMap<(String, String), TargetResult> = BTreeMap::new();
    for results in all {
        let later = (results.began_ms - began_ms) as f64;
        took_ms = took_ms.max(later + results.took_ms);
        for mut target in results.targets {
            target.attempts.iter_mut().for_each(|attempt| attempt.start_ms += later);
            let key = (target.name.clone(), results.suite.clone());
            match targets.get_mut(&key) {
                Some(first) => {
                    let before = first.outcome;
                    first.attempts.extend(target.attempts);
                    first.outcome = match (before, target.outcome) {
                        (before, Outcome::Skipped) => before,
                        (Outcome::Passed | Outcome::Skipped, now) => now,
                        (_, Outcome::Passed) => Outcome::Flaky,
                        (_, now) => now,
                    };
                }
                None => _ = targets.insert(key, target),
            }
        }
    }
    let names: Vec<String> = targets.keys().map(|(name, _)| name.clone()).collect();
    let twice = |name: &String| names.iter().filter(|other| *other == name).count() > 1;
    let numbered = targets.into_iter().enumerate();
    let targets = numbered.map(|(index, ((name, suite), target))| {
        let name = if twice(&name) { format!("{suite}: {name}") } else { name };
        TargetResult { index, name, ..target }
    });
    let targets = targets.collect();
    Some(Results { version: VERSION, suite, began_ms, took_ms, targets })
}

/// What to say where a result could not be written: a test does not fail by that.
pub(super) fn unwritten(error: &io::Error) -> String {
    format!("the result of the test cannot be put into ${DIR}: {}", chain(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(suite: &str, name: &str, began_ms: u64, outcome: Outcome) -> Results {
        let attempt = AttemptResult { took_ms: 10.0, ..AttemptResult::default() };
        let target = TargetResult {
            name: name.to_owned(),
            index: 0,
            tags: Vec::new(),
            axes: Vec::new(),
            outcome,
            attempts: vec![attempt],
        };
        let suite = suite.to_owned();
        Results { version: VERSION, suite, began_ms, took_ms: 10.0, targets: vec![target] }
    }

    #[test]
    fn results_of_tests_are_put_together() {
        use Outcome::{Failed, Flaky, Passed, Skipped};
        let all = vec![
            result("a", "a::two", 1300, Passed),
            result("a", "a::one", 1000, Failed),
            result("a", "a::one", 1100, Passed),
            result("a", "a::three", 1200, Skipped),
        ];
        let results = together(all).unwrap();
        assert_eq!((results.suite.as_str(), results.began_ms), ("a", 1000));
        assert_eq!(results.took_ms, 310.0);
        let found: Vec<_> = results
            .targets
            .iter()
            .map(|target| (target.name.as_str(), target.outcome, target.attempts.len()))
            .collect();
        assert_eq!(found, [("a::one", Flaky, 2), ("a::three", Skipped, 1), ("a::two", Passed, 1)]);
        let two = together(vec![result("a", "x", 1, Passed), result("b", "y", 2, Passed)]).unwrap();
        assert_eq!(two.suite, "tests");
        // Two crates have tests of one name; one that is skipped later failed all the same.
        let alike = together(vec![
            result("a", "x", 1, Failed),
            result("b", "x", 2, Passed),
            result("a", "x", 3, Skipped),
        ]);
        let alike: Vec<_> = alike
            .unwrap()
            .targets
            .into_iter()
            .map(|target| (target.name, target.outcome, target.attempts.len()))
            .collect();
        assert_eq!(alike, [("a: x".to_owned(), Failed, 2), ("b: x".to_owned(), Passed, 1)]);
        assert_eq!(together(Vec::new()), None);
    }

    #[test]
    fn files_that_are_none_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = |dir: &Path| chain(&read_reports(dir).unwrap_err());
        assert!(error(dir.path()).contains(DIR));
        fs::write(dir.path().join(".half.json"), "{").unwrap();
        assert!(error(dir.path()).contains(DIR));
        fs::write(dir.path().join("x.json"), "{}").unwrap();
        assert!(error(dir.path()).contains("x.json: these are no results"));
        assert!(error(&dir.path().join("gone")).contains("gone"));
    }
}
