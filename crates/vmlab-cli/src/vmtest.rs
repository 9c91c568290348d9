//! `vmlab vmtest`, and a link to vmlab with the name `vmtest`: takes what danobi/vmtest takes.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser};
use vmlab::budget::{Slots, usual_memory};
use vmlab::hypervisor::qemu::Qemu;
use vmlab::results::{AttemptResult, Failure, Outcome, Results, TargetResult};
use vmlab::runner::{Observer, Runner, RunnerOptions};
use vmlab::targets::{self, FileKind, Selection, Target, TargetCommand};
use vmlab::{Environment, Share, SnapshotMode, Vm};

use crate::exit::Code;
use crate::output;
use crate::request::{self, Request, Verbosity};
use crate::run;
use crate::signals::SignalThread;

/// The name under which vmlab is vmtest.
pub(crate) const NAME: &str = "vmtest";

/// The file that is looked for.
const FILE: &str = "vmtest.toml";

/// Where guests have the directory of the file, or the working directory.
const SHARED: &str = "/mnt/vmtest";

/// The command that is a shell on the caller's terminal.
const SHELL: &str = "-";

/// Text for `--help`.
pub(crate) const HELP: &str = "\
Exit codes:
  with one target, or a kernel and a command: the command's own, 128+N when signal N killed it
  with several targets: how many failed
  69   the VM could not be run
  125  the arguments or the file are wrong";

/// vmtest's command line.
#[derive(Debug, Args)]
pub(crate) struct VmtestArgs {
    /// The file with the targets; vmtest.toml unless given
    #[arg(short, long, value_name = "CONFIG", conflicts_with = "kernel")]
    config: Option<PathBuf>,
    /// Run only targets whose names match this regular expression somewhere
    #[arg(short, long, value_name = "FILTER")]
    filter: Option<String>,
    /// Run the command under this kernel
    #[arg(short, long, value_name = "KERNEL", requires = "command")]
    kernel: Option<String>,
    /// More arguments for the kernel
    #[arg(long, value_name = "KARGS", requires = "kernel")]
    kargs: Option<String>,
    /// The guest's root
    #[arg(short, long, value_name = "ROOTFS", default_value = "/")]
    rootfs: PathBuf,
    /// The guest's architecture
    #[arg(short, long, value_name = "ARCH", default_value = "x86_64")]
    arch: String,
    /// Another QEMU: a path, or a name that is looked for in PATH
    #[arg(short, long, value_name = "QEMU_COMMAND")]
    qemu_command: Option<PathBuf>,
    /// What to run under the kernel: a script for bash, or a program and its arguments; `-` is a shell
    #[arg(trailing_var_arg = true)]
    command: Vec<OsString>,
}

/// The command line of a link with vmtest's name.
#[derive(Debug, Parser)]
#[command(name = NAME, version, about = "Run targets in virtual machines", after_help = HELP)]
pub(crate) struct Vmtest {
    #[command(flatten)]
    pub(crate) args: VmtestArgs,
}

/// Whether this program was called by vmtest's name.
pub(crate) fn is_called() -> bool {
    let name = std::env::args_os().next().unwrap_or_default();
    Path::new(&name).file_name() == Some(OsStr::new(NAME))
}

pub(crate) fn run(args: VmtestArgs) -> Result<Code> {
    if args.arch != "x86_64" {
        bail!("--arch: guests are x86_64, not {}", args.arch);
    }
    match &args.kernel {
        Some(_) => one(args),
        None if !args.command.is_empty() => bail!("a command needs a kernel: -k"),
        None => file(&args),
    }
}

/// One command under one kernel.
fn one(args: VmtestArgs) -> Result<Code> {
    let environment = Environment::of_caller().context("the working directory cannot be found")?;
    let mut vm = Vm::builder()
        .rootfs(&args.rootfs)
        .cpus(2)
        .memory("4G".parse()?)
        .share(Share::new(&environment.cwd).at(SHARED))
        .environment(environment);
    if let Some(words) = args.kargs {
        vm = vm.append(words);
    }
    if let Some(qemu) = &args.qemu_command {
        vm = vm.hypervisor(Arc::new(Qemu::with_program(qemu)));
    }
    let terminal = args.command == [SHELL] && rustix::termios::isatty(io::stdin());
    let command = match &args.command[..] {
        [shell] if shell == SHELL => vec!["bash".into()],
        [script] => vec!["bash".into(), "-c".into(), script.clone()],
        // What the caller's shell has taken apart stays apart.
        words => [&["bash".into(), "-c".into(), "\"$@\"".into(), "bash".into()], words].concat(),
    };
    let request = Request {
        kernels: vec![args.kernel],
        vm,
        command,
        terminal,
        repeat: None,
        verbosity: Verbosity::Quiet,
        json: None,
        timings: None,
        dry_run: false,
    };
    code_of(&request)
}

/// Runs it, and tells a VM that could not be run from a command that failed.
fn code_of(request: &Request) -> Result<Code> {
    let (code, ended) = run::one(request)?;
    Ok(if ended { code } else { Code::NO_VM })
}

/// The targets of a file, one after the other.
fn file(args: &VmtestArgs) -> Result<Code> {
    let path = args.config.clone().unwrap_or_else(|| FILE.into());
    let file = targets::load_as(&path, FileKind::Vmtest)?;
    let mut selection = Selection::all();
    if let Some(filter) = &args.filter {
        selection = selection.filter(filter)?;
    }
    let targets: Vec<Target> = selection.select(&file.targets)?.into_iter().cloned().collect();
    if let [target] = &targets[..]
        && target.run.command == TargetCommand::Shell
    {
        return code_of(&request::of_shell_target(target, SnapshotMode::Use)?);
    }
    let options = RunnerOptions {
        suite: NAME.to_owned(),
        slots: Slots::Count(1),
        memory: usual_memory(),
        fail_fast: false,
        timeout: None,
        environment: Environment::of_caller().context("the working directory cannot be found")?,
        snapshots: SnapshotMode::Use,
        cache_dir: None,
    };
    let signals = SignalThread::start()?;
    let said = Arc::new(Said { targets: targets.clone() });
    let runner = Arc::new(Runner::new(targets, options, said as _));
    signals.group(Arc::clone(&runner) as _);
    let results = runner.run()?;
    signals.idle();
    Ok(signals.killed_by().map_or_else(|| code(&results), Code::of_signal))
}

fn code(results: &Results) -> Code {
    match &results.targets[..] {
        [target] => match (target.outcome, target.attempts.last()) {
            (outcome, _) if outcome.is_success() => Code::SUCCESS,
            (_, Some(AttemptResult { exit_code: Some(code), .. })) if *code != 0 => Code(*code),
            _ => Code::NO_VM,
        },
        targets => {
            let failed = targets.iter().filter(|target| !target.outcome.is_success()).count();
            Code(u8::try_from(failed).unwrap_or(u8::MAX))
        }
    }
}

/// Says what vmtest says.
#[derive(Debug)]
struct Said {
    targets: Vec<Target>,
}

impl Observer for Said {
    fn started(&self, target: usize, _attempt: u32) {
        let name = self.targets.get(target).map_or("", |target| target.name.as_str());
        print(format!("=> {name}\n").as_bytes());
    }

    fn phase(&self, _target: usize, phase: &str) {
        let said = match phase {
            "boot" | "restore" => "Booting",
            "setup" => "Setting up VM",
            "command" => "Running command",
            _ => return,
        };
        print(format!("===> {said}\n").as_bytes());
    }

    fn note(&self, _target: usize, text: &str) {
        output::note(text);
    }

    fn output(&self, _target: usize, bytes: &[u8]) {
        print(bytes);
    }

    fn ended(&self, _target: usize, result: &TargetResult) {
        let attempt = result.attempts.last();
        let failure = attempt.and_then(|attempt| attempt.failure.as_ref());
        let said = match failure {
            None if result.outcome == Outcome::Passed => "PASS\n".to_owned(),
            None | Some(Failure::Cancelled) => "CANCELLED\n".to_owned(),
            Some(Failure::Command { how }) => match attempt.and_then(|last| last.exit_code) {
                Some(code) => format!("Command failed with exit code: {code}\nFAILED\n"),
                None => format!("{how}\nFAILED\n"),
            },
            Some(other) => format!("{other}\nFAILED\n"),
        };
        print(said.as_bytes());
        let log = attempt.and_then(|attempt| attempt.console_log.as_ref());
        if let Some(log) = log.filter(|_| failure.is_some()) {
            output::note(&format!("the whole console: {}", log.display()));
        }
    }
}

/// Prints as it comes. A reader that is gone cannot be told.
fn print(bytes: &[u8]) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}
