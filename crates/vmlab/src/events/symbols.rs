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
    /// The function, where it is inlined in the next one.
    pub inlined: Option<String>,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)?;
        match &self.inlined {
            Some(function) => write!(f, " in {function}"),
            None => Ok(()),
        }
    }
}

/// An instruction, as reports name it: `function+0x12/0x34 [module]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'a> {
    /// The function.
    pub function: &'a str,
    /// How many bytes into it.
    pub offset: u64,
    /// How long the function is, with what pads it.
    pub size: u64,
    /// The module that it is in; `None` for the kernel itself.
    pub module: Option<&'a str>,
}

/// Whoever knows a kernel's symbols: its debug information, or a program that reads that.
pub trait Symbols {
    /// Where an instruction is: of functions that were inlined there the innermost first. Nothing where that is
    /// not known.
    fn locate(&self, place: &Place<'_>) -> Vec<Location>;
}

/// A text with the place in the sources of the function in it behind it, if that is known: `f+0x1 (f.h:2 in g, inlined
/// at f.c:3)`.
pub(crate) fn with_places(text: &str, locations: &[Location]) -> String {
    let shown: Vec<String> = locations.iter().map(Location::to_string).collect();
    match shown.is_empty() {
        true => text.to_owned(),
        false => format!("{text} ({})", shown.join(", inlined at ")),
    }
}

/// A report with the place in the sources behind each function that `symbols` knows.
pub fn decode(report: &[String], symbols: &dyn Symbols) -> Vec<String> {
    let decoded = report.iter().map(|line| {
        let frame = Frame::find(line)?;
        // All but the place where it happened are places to return to, behind the call.
        let offset = match line.contains("RIP: ") || line.starts_with("WARNING: ") {
            true => frame.offset,
            false => frame.offset.saturating_sub(1),
        };
        let Frame { symbol: function, size, module, .. } = frame;
        let locations = symbols.locate(&Place { function, offset, size, module });
        (!locations.is_empty()).then(|| with_places(line, &locations))
    });
    decoded.zip(report).map(|(decoded, line)| decoded.unwrap_or_else(|| line.clone())).collect()
}
