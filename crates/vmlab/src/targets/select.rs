//! Which targets of a file are run.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use regex::Regex;
use thiserror::Error;

use super::Target;

/// How many names an error lists.
const MAX_LISTED: usize = 20;

/// What is assumed of targets whose time nobody knows, if there is none whose time is known.
const UNKNOWN_MS: u64 = 1;

/// What a user wants to run: targets that any of the patterns matches and that have any of the tags, where
/// there are some, less those with a tag that is left out.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    filters: Vec<Regex>,
    tags: BTreeSet<String>,
    skipped: BTreeSet<String>,
}

/// A selection that cannot be.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum SelectionError {
    /// A filter that is no regular expression.
    #[error("the filter `{filter}` is no regular expression")]
    Filter {
        /// The filter.
        filter: String,
        /// Why not.
        #[source]
        source: regex::Error,
    },
    /// Nothing is selected.
    #[error("no target is selected; there are {}", listed(names))]
    Nothing {
        /// The names of all targets, with their tags in brackets.
        names: Vec<String>,
    },
    /// Text that is no shard.
    #[error("`{text}` is not a shard: I/N with I from 1 to N, such as 2/8")]
    Shard {
        /// The text.
        text: String,
    },
}

fn listed(names: &[String]) -> String {
    let shown = names.iter().take(MAX_LISTED).map(|name| format!("`{name}`"));
    let shown = shown.collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(MAX_LISTED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

impl Selection {
    /// Everything.
    pub fn all() -> Self {
        Self::default()
    }

    /// Adds a regular expression, which matches anywhere in a name.
    ///
    /// # Errors
    /// When it is none.
    pub fn filter(mut self, filter: &str) -> Result<Self, SelectionError> {
        let regex = Regex::new(filter)
            .map_err(|source| SelectionError::Filter { filter: filter.to_owned(), source })?;
        self.filters.push(regex);
        Ok(self)
    }

    /// Adds a tag that targets may have.
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tags.insert(tag.into());
        self
    }

    /// Adds a tag that targets may not have.
    pub fn skip_tag(mut self, tag: impl Into<String>) -> Self {
        self.skipped.insert(tag.into());
        self
    }

    /// Whether a target is selected.
    pub fn matches(&self, target: &Target) -> bool {
        let name = self.filters.is_empty()
            || self.filters.iter().any(|filter| filter.is_match(&target.name));
        let tags = self.tags.is_empty() || !self.tags.is_disjoint(&target.tags);
        name && tags && self.skipped.is_disjoint(&target.tags)
    }

    /// The targets that are selected, in their order.
    ///
    /// # Errors
    /// When there is none.
    pub fn select<'a>(&self, targets: &'a [Target]) -> Result<Vec<&'a Target>, SelectionError> {
        let selected: Vec<&Target> = targets.iter().filter(|target| self.matches(target)).collect();
        if selected.is_empty() {
            let name = |target: &Target| match target.tags.is_empty() {
                true => target.name.clone(),
                false => {
                    let tags: Vec<&str> = target.tags.iter().map(String::as_str).collect();
                    format!("{} ({})", target.name, tags.join(", "))
                }
            };
            return Err(SelectionError::Nothing { names: targets.iter().map(name).collect() });
        }
        Ok(selected)
    }
}

/// One of several parts that targets are divided into, for one of several machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Which one, from 0.
    index: usize,
    count: usize,
}

impl FromStr for Shard {
    type Err = SelectionError;

    /// Reads `2/8`, the second of eight.
    fn from_str(text: &str) -> Result<Self, SelectionError> {
        let parts = text.split_once('/');
        let number = |text: &str| text.parse::<usize>().ok().filter(|number| *number > 0);
        match parts.and_then(|(index, count)| number(index).zip(number(count))) {
            Some((index, count)) if index <= count => Ok(Self { index: index - 1, count }),
            _ => Err(SelectionError::Shard { text: text.to_owned() }),
        }
    }
}

impl Shard {
    /// Which of the names are this part's, as indices in rising order. All parts together have each once,
    /// whatever the order of the names. `recorded` says how many milliseconds they took; one that it does
    /// not know is taken to last as long as the median of those that it does know.
    pub fn of(self, names: &[&str], recorded: &BTreeMap<String, u64>) -> Vec<usize> {
        let known = |name: &str| recorded.get(name).copied();
        let mut times: Vec<u64> = names.iter().filter_map(|name| known(name)).collect();
        times.sort_unstable();
        let usual = times.get(times.len() / 2).copied().unwrap_or(UNKNOWN_MS);
        let time = |index: usize| known(names[index]).unwrap_or(usual).max(1);

        let mut longest_first: Vec<usize> = (0..names.len()).collect();
        longest_first.sort_by_key(|&index| (std::cmp::Reverse(time(index)), names[index]));
        // More parts than names have nothing to do.
        let mut loads = vec![0u64; self.count.min(names.len())];
        let mut own = Vec::new();
        for index in longest_first {
            let Some((part, load)) = loads.iter_mut().enumerate().min_by_key(|(_, load)| **load)
            else {
                break;
            };
            *load = load.saturating_add(time(index));
            if part == self.index {
                own.push(index);
            }
        }
        own.sort_unstable();
        own
    }
}
