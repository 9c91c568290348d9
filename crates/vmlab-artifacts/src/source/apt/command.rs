//! Running apt's programs.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::spec::Distro;
use crate::{KernelError, child};

/// How much of what apt says an error repeats, in bytes.
const MAX_WORDS: usize = 1500;

/// Most bytes of error output that are kept.
const MAX_STDERR: u64 = 1 << 20;

/// Prepares one of apt's programs: in the C locale, without input, and so that it dies with us.
pub(super) fn apt(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    command.env("LC_ALL", "C").env_remove("LANGUAGE").stdin(Stdio::null());
    child::dies_with_us(&mut command);
    command
}

/// Runs a program to its end, gives each line of its output to `each`.
///
/// # Errors
/// [`KernelError::NoApt`] when it cannot be run; `Ok(Err(words))` with what it said when it failed.
pub(super) fn run(
    mut command: Command,
    distro: Distro,
    mut each: impl FnMut(&str),
) -> Result<Result<(), String>, KernelError> {
    let no_apt = |program: &Command, source| KernelError::NoApt {
        program: program.get_program().to_string_lossy().into_owned(),
        distro,
        source,
    };
    let spawned = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|e| no_apt(&command, e))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let errors = std::thread::scope(|scope| {
        let errors = scope.spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = stderr {
                let _ = pipe.by_ref().take(MAX_STDERR).read_to_end(&mut bytes);
                let _ = std::io::copy(&mut pipe, &mut std::io::sink());
            }
            bytes
        });
        if let Some(pipe) = stdout {
            let mut pipe = BufReader::new(pipe);
            let mut line = Vec::new();
            while matches!(pipe.read_until(b'\n', &mut line), Ok(n) if n > 0) {
                each(String::from_utf8_lossy(&line).trim_end_matches('\n'));
                line.clear();
            }
        }
        errors.join().unwrap_or_default()
    });
    let status = child.wait().map_err(|e| no_apt(&command, e))?;
    if status.success() {
        return Ok(Ok(()));
    }
    let words = words(&String::from_utf8_lossy(&errors));
    Ok(Err(if words.is_empty() { format!("nothing ({status})") } else { words }))
}

/// apt's errors and warnings, each once, without their marks.
fn words(stderr: &str) -> String {
    let mut said: Vec<&str> = Vec::new();
    for mark in ["E: ", "W: ", ""] {
        for text in stderr.lines().filter_map(|line| line.trim().strip_prefix(mark)) {
            if !text.is_empty() && !said.contains(&text) {
                said.push(text);
            }
        }
        if !said.is_empty() {
            break;
        }
    }
    let mut text = said.join("; ");
    if text.len() > MAX_WORDS {
        let cut = (0..=MAX_WORDS).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(cut);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_come_before_warnings() {
        assert_eq!(words("W: a\nE: b\nE: c\nE: b\n"), "b; c");
        assert_eq!(words("W: a\nN: b\n"), "a");
        assert_eq!(words("just text\n"), "just text");
    }

    #[test]
    fn long_words_are_cut() {
        let said = words(&format!("E: {}", "é".repeat(2000)));
        assert!(said.len() <= MAX_WORDS + 3 && said.ends_with('…'));
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(apt("/nonexistent/apt-get"), Distro::Debian, |_| {}).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/apt-get"), "{error}");
    }

    #[test]
    fn output_and_failure_come_through() {
        let mut command = apt("/bin/sh");
        command.args(["-c", "echo one; echo two; echo 'E: bad' >&2; exit 3"]);
        let mut lines = Vec::new();
        let outcome = run(command, Distro::Debian, |line| lines.push(line.to_owned())).unwrap();
        assert_eq!(lines, ["one", "two"]);
        assert_eq!(outcome, Err("bad".to_owned()));
    }
}
