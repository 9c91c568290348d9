//! What the agent does as a command of its own, with standard streams as of any other: copies files, reads the
//! kernel's log, loads and unloads modules. So nothing of that needs a program of the guest, and nothing of it stops the session.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use vmlab_copy::CopyError;

use crate::{boot_log, module};

/// The argument by which the agent is one of these.
pub(crate) const WORD: &str = "applet";

/// How long a kernel's log is read that goes on all the time.
const LOG_TIME: Duration = Duration::from_secs(5);

/// Runs what the arguments name. Who started it is told on the standard output how it went.
pub(crate) fn run(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let name = arguments.next().unwrap_or_default();
    let given: Vec<OsString> = arguments.collect();
    let done = match (name.as_encoded_bytes(), &*given) {
        (b"send", [source]) => send(Path::new(source)),
        (b"receive", [target]) => receive(Path::new(target), None),
        (b"receive", [target, name]) => receive(Path::new(target), Some(name)),
        (b"kernel-log", []) => kernel_log().map_err(CopyError::Stream),
        (b"module", [what, rest @ ..]) => {
            let Some(asked) = module::Asked::of(what, rest) else { return ExitCode::from(2) };
            input()
                .and_then(|input| module::run(asked, input, output()?))
                .map_err(CopyError::Stream)
        }
        _ => return ExitCode::from(2),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The standard output without the buffer of lines that the library puts in front.
fn output() -> io::Result<File> {
    io::stdout().as_fd().try_clone_to_owned().map(File::from)
}

fn input() -> io::Result<File> {
    io::stdin().as_fd().try_clone_to_owned().map(File::from)
}

fn send(source: &Path) -> Result<(), CopyError> {
    vmlab_copy::send(source, output().map_err(CopyError::Stream)?)
}

fn receive(target: &Path, name: Option<&OsString>) -> Result<(), CopyError> {
    let (input, output) =
        (input().map_err(CopyError::Stream)?, output().map_err(CopyError::Stream)?);
    let received = vmlab_copy::receive(input, target, name.map(OsString::as_os_str));
    vmlab_copy::answer(&received, output)?;
    received
}

/// Writes each record of the log as the kernel gives it out, behind its length (`u16`, little-endian); at the
/// end a length of 0 and an error number (`i32`).
fn kernel_log() -> io::Result<()> {
    let mut out = io::BufWriter::with_capacity(1 << 16, output()?);
    let read = kernel_records(&mut out);
    let errno = read.as_ref().err().map_or(0, |e| e.raw_os_error().unwrap_or(libc::EIO));
    out.write_all(&0u16.to_le_bytes())?;
    out.write_all(&errno.to_le_bytes())?;
    out.flush()?;
    read
}

fn kernel_records(out: &mut impl Write) -> io::Result<()> {
    let mut log = boot_log::open()?;
    let mut buffer = vec![0; boot_log::MAX_RECORD];
    let until = Instant::now() + LOG_TIME;
    for _ in 0..boot_log::MAX_RECORDS {
        let Some(record) = boot_log::next_record(&mut log, &mut buffer)? else { break };
        out.write_all(&(record.len() as u16).to_le_bytes())?;
        out.write_all(record)?;
        if Instant::now() >= until {
            break;
        }
    }
    Ok(())
}
