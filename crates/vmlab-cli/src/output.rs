//! What vmlab itself says: results on stdout, everything else on stderr.

use std::io::{self, Write};

use anyhow::{Context, Result};
use vmlab::Error;

/// Prints a result. A reader that has gone away is no failure.
pub(crate) fn stdout(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("the output cannot be written")
        }
        _ => Ok(()),
    }
}

/// Prints a line for the user. A stream that is gone cannot be told.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "vmlab: {text}");
}

/// Prints lines for the user as they are.
pub(crate) fn lines(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Prints a failure: what happened, why, what the guest's console said last, and where all of it is.
pub(crate) fn error(error: &anyhow::Error) {
    let mut text = String::from("error");
    for cause in error.chain() {
        text.push_str(": ");
        text.push_str(&cause.to_string());
    }
    note(&text);
    let Some(evidence) = error.downcast_ref::<Error>().and_then(Error::evidence) else { return };
    if !evidence.tail.is_empty() {
        note("from the console:");
        for line in evidence.tail.lines() {
            let _ = writeln!(io::stderr().lock(), "  | {line}");
        }
    }
    let empty = evidence.log.metadata().is_ok_and(|log| log.len() == 0);
    if empty {
        note("the guest wrote nothing to its console");
    } else {
        note(&format!("the whole console: {}", evidence.log.display()));
    }
}
