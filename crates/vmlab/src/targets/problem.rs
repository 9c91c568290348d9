//! What is wrong with a file of targets, and where.

use std::fmt::{self, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Problems of one file that are shown; who made so many has made one of them many times.
const MAX_SHOWN: usize = 20;

/// Problems of one file that are kept: no one reads more, and each costs time.
const MAX_KEPT: usize = 100;

/// The widest part of a line that is shown, in characters: about what a terminal has.
const MAX_WIDTH: usize = 100;

/// How much of a long line is shown before the place that is meant.
const LEAD: usize = 30;

/// A file of targets that cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TargetFileError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It says something that makes no sense. All that was found is there, each with its place.
    #[error("{}", Shown { path, problems })]
    Invalid {
        /// The file.
        path: PathBuf,
        /// In the order of the file; at least one.
        problems: Vec<Problem>,
    },
}

/// Something that is wrong, and the text that is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong, and what to write instead.
    pub message: String,
    /// The line, from 1.
    pub line: usize,
    /// The first character in it that is meant, from 1.
    pub column: usize,
    /// The line's text.
    text: String,
    /// How many characters of it are meant, at least 1.
    width: usize,
}

/// Collects what is wrong with a text.
pub(super) struct Problems<'a> {
    text: &'a str,
    /// Whether keys are proposed with `_`, as vmtest has them.
    pub(super) snake: bool,
    found: Vec<(Range<usize>, String)>,
}

impl<'a> Problems<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, snake: false, found: Vec::new() }
    }

    /// What a span of the file says.
    pub(super) fn written(&self, span: &Range<usize>) -> &'a str {
        self.text.get(span.clone()).unwrap_or_default()
    }

    /// Each is kept once: what is wrong with a matrix is wrong with each of its targets.
    pub(super) fn add(&mut self, span: &Range<usize>, message: impl Into<String>) {
        if self.is_full() {
            return;
        }
        let problem = (span.clone(), message.into());
        if !self.found.contains(&problem) {
            self.found.push(problem);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Whether further problems are not kept, so that there is no need to look for the best words.
    pub(super) fn is_full(&self) -> bool {
        self.found.len() == MAX_KEPT
    }

    pub(super) fn count(&self) -> usize {
        self.found.len()
    }

    /// The number of the line that a place is in, from 1.
    pub(super) fn line(&self, at: usize) -> usize {
        place(self.text, at).0
    }

    pub(super) fn into_error(mut self, path: &Path) -> TargetFileError {
        self.found.sort_by_key(|(span, _)| span.start);
        let found = self.found.into_iter();
        let problems = found.map(|(span, message)| locate(self.text, &span, message)).collect();
        TargetFileError::Invalid { path: path.to_owned(), problems }
    }
}

/// Line and column of a byte, and where its line begins.
fn place(text: &str, at: usize) -> (usize, usize, usize) {
    let at = text.floor_char_boundary(at);
    let before = &text[..at];
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[start..].chars().count() + 1, start)
}

fn locate(text: &str, span: &Range<usize>, message: String) -> Problem {
    let (line, column, start) = place(text, span.start);
    let text_of_line = text[start..].lines().next().unwrap_or_default();
    let left = text_of_line.chars().count().saturating_sub(column - 1);
    let meant = text.get(span.clone()).unwrap_or_default().lines().next().unwrap_or_default();
    let width = meant.chars().count().min(left).max(1);
    Problem { message, line, column, text: text_of_line.to_owned(), width }
}

struct Shown<'a> {
    path: &'a Path,
    problems: &'a [Problem],
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, problem) in self.problems.iter().take(MAX_SHOWN).enumerate() {
            if number > 0 {
                f.write_str("\n\n")?;
            }
            problem.show(f, self.path)?;
        }
        match self.problems.len().saturating_sub(MAX_SHOWN) {
            0 => Ok(()),
            more => write!(f, "\n\n{}: {more} more problems", self.path.display()),
        }
    }
}

impl Problem {
    fn show(&self, f: &mut fmt::Formatter<'_>, path: &Path) -> fmt::Result {
        let Self { message, line, column, .. } = self;
        writeln!(f, "{message}")?;
        let margin = " ".repeat(line.to_string().len());
        writeln!(f, "{margin}--> {}:{line}:{column}", path.display())?;
        let (text, before, width) = self.excerpt();
        writeln!(f, "{margin} |")?;
        writeln!(f, "{line} | {text}")?;
        write!(f, "{margin} | {}{}", " ".repeat(before), "^".repeat(width))
    }

    /// What is shown of the line, how many characters of it are before what is meant, and how many are.
    fn excerpt(&self) -> (String, usize, usize) {
        let at = self.column - 1;
        let from = if at < MAX_WIDTH - LEAD { 0 } else { at - LEAD };
        let mut text = String::new();
        if from > 0 {
            text.push_str("...");
        }
        for c in self.text.chars().skip(from).take(MAX_WIDTH) {
            // Neither tabs, which have no width of their own, nor what a terminal would obey.
            let c = if c.is_control() { ' ' } else { c };
            text.push(c);
        }
        let before = at - from + if from > 0 { 3 } else { 0 };
        let width = self.width.min(text.chars().count().saturating_sub(before)).max(1);
        if self.text.chars().count() > from + MAX_WIDTH {
            let _ = write!(text, "...");
        }
        (text, before, width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str, span: Range<usize>) -> String {
        let mut problems = Problems::new(text);
        problems.add(&span, "wrong");
        problems.into_error(Path::new("f.toml")).to_string()
    }

    #[test]
    fn the_meant_text_is_underlined() {
        let text = "a = 1\nname = \"\u{e4}\u{f6}\" # \u{fc}\n";
        let at = text.find('"').unwrap();
        let expected =
            "wrong\n --> f.toml:2:8\n  |\n2 | name = \"\u{e4}\u{f6}\" # \u{fc}\n  |        ^^^^";
        assert_eq!(shown(text, at..at + 6), expected);
    }

    #[test]
    fn ends_of_lines_and_files_have_a_place() {
        assert!(shown("", 0..0).ends_with("f.toml:1:1\n  |\n1 | \n  | ^"));
        assert!(shown("x =", 3..3).ends_with("f.toml:1:4\n  |\n1 | x =\n  |    ^"));
        assert!(shown("x\r\ny", 1..3).ends_with("1 | x\n  |  ^"));
        assert!(shown("x = [\n1,\n]", 4..10).ends_with("1 | x = [\n  |     ^"));
        assert!(shown("x", 7..9).ends_with("1 | x\n  |  ^"));
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let text = shown("\ta = \x1b[31m", 5..6);
        assert!(text.ends_with("1 |  a =  [31m\n  |      ^"), "{text:?}");
    }

    #[test]
    fn of_long_lines_the_meant_part_is_shown() {
        let text = format!("{}bad{}", "x".repeat(500), "y".repeat(500));
        let message = shown(&text, 500..503);
        let lines: Vec<&str> = message.lines().collect();
        assert_eq!(lines[3], format!("1 | ...{}bad{}...", "x".repeat(30), "y".repeat(67)));
        assert_eq!(lines[4], format!("  | {}^^^", " ".repeat(33)));
        assert!(message.contains("f.toml:1:501"));
    }

    #[test]
    fn problems_are_sorted_and_each_is_there_once() {
        let text = "a\nb\n".repeat(1000);
        let mut problems = Problems::new(&text);
        for at in (0..2000).rev() {
            problems.add(&(at * 2..at * 2 + 1), "wrong");
            problems.add(&(at * 2..at * 2 + 1), "wrong");
        }
        let message = problems.into_error(Path::new("f")).to_string();
        // The last hundred of the two thousand lines.
        assert!(message.starts_with("wrong\n    --> f:1901:1\n"), "{message}");
        assert!(message.ends_with("\n\nf: 80 more problems"), "{message}");
    }
}
