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

/// Prints a failure.
pub(crate) fn error(error: &anyhow::Error) {
    let _ = io::stderr().lock().write_all(explained(error).as_bytes());
}

/// A failure in lines: what happened, why, what the guest's console said last, and where all of it is.
pub(crate) fn explained(error: &anyhow::Error) -> String {
    let mut text = String::from("vmlab: error");
    for cause in error.chain() {
        text.push_str(": ");
        text.push_str(&cause.to_string());
    }
    text.push('\n');
    let Some(evidence) = error.downcast_ref::<Error>().and_then(Error::evidence) else {
        return text;
    };
    if !evidence.tail.is_empty() {
        text.push_str("vmlab: from the console:\n");
        for line in evidence.tail.lines() {
            text.push_str("  | ");
            text.push_str(line);
            text.push('\n');
        }
    }
    if let Some(fault) = evidence.emulator_fault {
        text.push_str(&format!("vmlab: {fault}\n"));
    }
    let empty = evidence.log.metadata().is_ok_and(|log| log.len() == 0);
    text.push_str(&match empty {
        true => "vmlab: the guest wrote nothing to its console\n".to_owned(),
        false => format!("vmlab: the whole console: {}\n", evidence.log.display()),
    });
    text
}
