//! `cargo vmlab test`: runs a crate's tests in VMs, once for each kernel.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Instant;

use anyhow::{Context, Result, bail};

const HELP: &str = "\
Runs tests in VMs, once for each kernel.

Usage: cargo vmlab test [-k KERNEL]... [-m SIZE] [-c N] [CARGO OPTIONS] [-- TEST OPTIONS]

  -k, --kernel KERNEL  As for `vmlab run`; without one, the default kernel
  -m, --memory SIZE    Memory of each VM: 512M, 2G
  -c, --cpus N         CPUs of each VM

`nextest` and `bench` may be in the place of `test`. All else is Cargo's. Each test program runs in a VM of
its own. The exit code is that of the first kernel under which something failed.";

/// Commands of Cargo's that run programs with a runner.
const COMMANDS: [&str; 3] = ["test", "nextest", "bench"];

/// What failed before Cargo could.
const FAILED: u8 = 125;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            note(&format!("error: {error:#}"));
            FAILED.into()
        }
    }
}

/// What is not Cargo's.
#[derive(Debug, Default)]
struct Arguments {
    kernels: Vec<OsString>,
    /// Further options for the runner.
    vm: Vec<OsString>,
    /// Cargo's command and its arguments.
    cargo: Vec<OsString>,
}

impl Arguments {
    /// `None` where help is wanted.
    fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Self>> {
        let mut read = Self::default();
        // Cargo gives the name that it was called by.
        let mut rest = arguments.into_iter().skip_while(|word| word == "vmlab");
        match rest.next() {
            Some(command) if COMMANDS.iter().any(|known| command == *known) => {
                read.cargo.push(command);
            }
            Some(help) if help == "--help" || help == "-h" => return Ok(None),
            Some(other) => bail!("`{}` is none of {}", other.display(), COMMANDS.join(", ")),
            None => return Ok(None),
        }
        while let Some(word) = rest.next() {
            let text = word.to_str().unwrap_or_default();
            let (name, value) = match text.split_once('=') {
                Some((name, value)) => (name, Some(OsString::from(value))),
                None => (text, None),
            };
            let option = match name {
                "-k" | "--kernel" => "--kernel",
                "-m" | "--memory" => "--memory",
                "-c" | "--cpus" => "--cpus",
                "-h" | "--help" => return Ok(None),
                // What comes behind may be values of Cargo's options.
                _ => {
                    read.cargo.push(word);
                    read.cargo.extend(rest);
                    break;
                }
            };
            let value = value.or_else(|| rest.next());
            let value = value.with_context(|| format!("{option} needs a value"))?;
            match option {
                "--kernel" => read.kernels.push(value),
                _ => read.vm.extend([option.into(), value]),
            }
        }
        Ok(Some(read))
    }
}

fn run() -> Result<ExitCode> {
    let Some(arguments) = Arguments::read(std::env::args_os().skip(1))? else {
        writeln!(std::io::stdout(), "{HELP}").context("the help cannot be written")?;
        return Ok(ExitCode::SUCCESS);
    };
    let vmlab = vmlab()?;
    let variable = runner_variable(&host_triple()?);
    let kernels: Vec<Option<&OsString>> = match arguments.kernels.is_empty() {
        true => vec![None],
        false => arguments.kernels.iter().map(Some).collect(),
    };
    let mut first_failure = None;
    let mut lines = Vec::new();
    for kernel in kernels {
        let mut words: Vec<OsString> = vec![vmlab.clone().into(), "runner".into()];
        if let Some(kernel) = kernel {
            words.extend(["--kernel".into(), whole_path(kernel)]);
        }
        words.extend(arguments.vm.iter().cloned());
        let since = Instant::now();
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .args(&arguments.cargo)
            .env(&variable, joined(&words)?)
            .status()
            .context("cargo cannot be run")?;
        let name = kernel.map_or("default kernel".into(), |kernel| kernel.to_string_lossy());
        let seconds = since.elapsed().as_secs_f64();
        let how = if status.success() { "ok".to_owned() } else { format!("FAILED ({status})") };
        lines.push(format!("{name}: {how} in {seconds:.1} s"));
        if !status.success() {
            first_failure = first_failure.or(Some(code(status)));
        }
    }
    lines.iter().for_each(|line| note(line));
    Ok(first_failure.unwrap_or(ExitCode::SUCCESS))
}

/// The code of a command that failed.
fn code(status: ExitStatus) -> ExitCode {
    status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED).into()
}

/// The program beside this one, as they are installed together.
fn vmlab() -> Result<PathBuf> {
    let own = std::env::current_exe().context("this program cannot be found")?;
    let beside = own.with_file_name("vmlab");
    Ok(if beside.is_file() { beside } else { "vmlab".into() })
}

/// What rustc builds for unless told otherwise.
fn host_triple() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(&rustc).arg("-vV").output();
    let output = output.with_context(|| format!("{} cannot be run", rustc.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("`rustc -vV` does not say what the host is")?.to_owned())
}

/// The variable that Cargo has a target's runner from.
fn runner_variable(triple: &str) -> String {
    let upper = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    format!("CARGO_TARGET_{}_RUNNER", triple.chars().map(upper).collect::<String>())
}

/// Cargo parts the words of a runner at spaces, and knows no quotes.
fn joined(words: &[OsString]) -> Result<OsString> {
    let spaced = |word: &&OsString| word.as_encoded_bytes().iter().any(u8::is_ascii_whitespace);
    if let Some(word) = words.iter().find(spaced) {
        bail!("`{}` has a space, which Cargo's runners cannot have", word.display());
    }
    Ok(words.join(OsStr::new(" ")))
}

/// A kernel's file by its whole path: Cargo starts programs in the directories of their packages.
fn whole_path(kernel: &OsStr) -> OsString {
    let path = Path::new(kernel);
    match path.components().count() > 1 && path.exists() {
        true => std::path::absolute(path).map_or_else(|_| kernel.to_owned(), Into::into),
        false => kernel.to_owned(),
    }
}

fn note(text: &str) {
    // A stream that is gone cannot be told.
    let _ = writeln!(std::io::stderr(), "vmlab: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_cargos_comes_first() {
        let read = |words: &[&str]| {
            Arguments::read(words.iter().map(OsString::from)).map(|read| {
                read.map(|read| {
                    let text = |words: Vec<OsString>| words.join(OsStr::new(" ")).into_string();
                    [read.kernels, read.vm, read.cargo].map(|words| text(words).unwrap())
                })
            })
        };
        assert_eq!(
            read(&["vmlab", "test", "-k", "a", "--kernel=b", "-m", "1G", "-p", "x", "--", "-k"])
                .unwrap()
                .unwrap(),
            ["a b", "--memory 1G", "test -p x -- -k"]
        );
        let nextest = read(&["nextest", "run", "-k", "a"]).unwrap().unwrap();
        assert_eq!(nextest, ["", "", "nextest run -k a"]);
        assert_eq!(read(&["vmlab", "test", "--help"]).unwrap(), None);
        assert!(read(&["vmlab", "build"]).is_err());
        assert!(read(&["vmlab", "test", "-k"]).is_err());
    }

    #[test]
    fn runners_are_as_cargo_reads_them() {
        let triple = "x86_64-unknown-linux-gnu";
        assert_eq!(runner_variable(triple), "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER");
        assert_eq!(joined(&["a".into(), "b".into()]).unwrap(), "a b");
        assert!(joined(&["a b".into()]).is_err());
    }
}
