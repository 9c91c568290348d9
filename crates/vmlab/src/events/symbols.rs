//! Where in the sources the functions of a report are.

use std::fmt;

use super::title::Frame;

/// A line of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The file, as the kernel's debug information names it.
    pub file: String,
    /// From 1 on.
    pub line: u32,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// Whoever knows a kernel's symbols: its debug information, or a program that reads that.
pub trait Symbols {
    /// Where the instruction `offset` bytes into a function is, of a module or of the kernel itself. For a
    /// return address, that is the one behind the call.
    fn locate(&self, function: &str, offset: u64, module: Option<&str>) -> Option<Location>;
}

/// A report with the place in the sources behind each function that `symbols` knows.
pub fn decode(report: &[String], symbols: &dyn Symbols) -> Vec<String> {
    let decoded = report.iter().map(|line| {
        let frame = Frame::find(line)?;
        let location = symbols.locate(frame.symbol, frame.offset, frame.module)?;
        Some(format!("{line} ({location})"))
    });
    decoded.zip(report).map(|(decoded, line)| decoded.unwrap_or_else(|| line.clone())).collect()
}
