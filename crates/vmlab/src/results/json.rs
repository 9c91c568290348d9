//! Results as JSON, and results of several machines as one.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Results, VERSION};

/// Why results cannot be read or put together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResultsError {
    /// The text is not what [`Results::to_json`] writes.
    #[error("these are no results of vmlab as JSON")]
    Json(#[source] serde_json::Error),
    /// Another vmlab wrote it.
    #[error(
        "these results have version {found}, and this vmlab knows version {VERSION} only; \
         use the vmlab that wrote them"
    )]
    Version {
        /// The version in the text.
        found: u64,
    },
    /// There is nothing to put together.
    #[error("there are no results to merge")]
    NothingToMerge,
    /// Parts are of different suites.
    #[error("{first} has results of `{first_suite}`, but {second} has results of `{second_suite}`")]
    SuitesDiffer {
        /// Where the first part came from.
        first: String,
        /// Its suite.
        first_suite: String,
        /// Where the other part came from.
        second: String,
        /// Its suite.
        second_suite: String,
    },
    /// Two parts have the same target.
    #[error("target `{target}` is in {first} and in {second}; each target may be in one part only")]
    SameTarget {
        /// Its name.
        target: String,
        /// Where the first result came from.
        first: String,
        /// Where the other one came from.
        second: String,
    },
}

impl Results {
    /// All of it, with line breaks, for [`Results::from_json`].
    pub fn to_json(&self) -> String {
        // Only a map with keys that are no strings could fail, and there is none.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// Reads what [`Results::to_json`] wrote.
    ///
    /// # Errors
    /// [`ResultsError::Version`] if it has another version than [`VERSION`], whatever else it holds, and
    /// [`ResultsError::Json`] if it is not such a text.
    pub fn from_json(text: &str) -> Result<Results, ResultsError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }
        let Versioned { version } = serde_json::from_str(text).map_err(ResultsError::Json)?;
        if version != u64::from(VERSION) {
            return Err(ResultsError::Version { found: version });
        }
        serde_json::from_str(text).map_err(ResultsError::Json)
    }

    /// Puts the results of shards together; a part comes with where it is from, for messages. What comes out
    /// does not depend on the order of the parts: targets are in the order of their file.
    ///
    /// Times are those of the machines' own clocks: it began when the first part did, and took until the last
    /// one ended.
    ///
    /// # Errors
    /// [`ResultsError::NothingToMerge`], [`ResultsError::SuitesDiffer`] and [`ResultsError::SameTarget`].
    pub fn merge(parts: Vec<(String, Results)>) -> Result<Results, ResultsError> {
        let Some((first, suite)) =
            parts.first().map(|(from, part)| (from.clone(), part.suite.clone()))
        else {
            return Err(ResultsError::NothingToMerge);
        };
        let began_ms = parts.iter().map(|(_, part)| part.began_ms).min().unwrap_or_default();
        let mut merged =
            Results { version: VERSION, suite, began_ms, took_ms: 0.0, targets: Vec::new() };
        let mut seen: BTreeMap<String, String> = BTreeMap::new();
        for (from, part) in parts {
            if part.suite != merged.suite {
                return Err(ResultsError::SuitesDiffer {
                    first,
                    first_suite: merged.suite,
                    second: from,
                    second_suite: part.suite,
                });
            }
            let later = (part.began_ms - began_ms) as f64;
            merged.took_ms = merged.took_ms.max(later + part.took_ms);
            for mut target in part.targets {
                if let Some(first) = seen.insert(target.name.clone(), from.clone()) {
                    return Err(ResultsError::SameTarget {
                        target: target.name,
                        first,
                        second: from,
                    });
                }
                for attempt in &mut target.attempts {
                    attempt.start_ms += later;
                }
                merged.targets.push(target);
            }
        }
        merged.targets.sort_by(|a, b| (a.index, &a.name).cmp(&(b.index, &b.name)));
        Ok(merged)
    }
}
