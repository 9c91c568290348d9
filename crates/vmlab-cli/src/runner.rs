//! `vmlab runner`: runs programs in VMs for Cargo, which puts it before the program and its arguments.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use vmlab::testing::{INSIDE, WHOLE};

use crate::cli::RunnerArgs;
use crate::exit::Code;
use crate::{request, run};

/// Asks a test program for its tests. The answer is the same everywhere, and runners of tests ask often.
const LIST: &str = "--list";

pub(crate) fn run(mut args: RunnerArgs) -> Result<Code> {
    // Without a directory, it would be looked for in PATH.
    let program = std::path::absolute(&args.command[0])
        .with_context(|| format!("{} cannot be found", args.command[0].display()))?;
    if args.command[1..].iter().any(|argument| argument == LIST) {
        let error = Command::new(&program).args(&args.command[1..]).exec();
        return Err(error).with_context(|| unusable(&program));
    }
    // Where it is, and not by way of a link into a directory that the guest may lack.
    let program = program.canonicalize().with_context(|| unusable(&program))?;
    args.command[0] = program.clone().into();
    // What it says is the program's alone.
    args.vm.quiet = !args.vm.verbose;
    args.vm.env.push(OsString::from(format!("{INSIDE}={WHOLE}")));
    run::run(&request::of_program(args.vm, &program, args.command)?)
}

fn unusable(program: &Path) -> String {
    format!("{} cannot be run", program.display())
}
