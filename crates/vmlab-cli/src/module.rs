//! `vmlab module`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use vmlab::artifacts::module_build::{self, ModuleBuild, ModuleSource};
use vmlab::artifacts::{Cache, KernelSpec, KernelStore, Progress};
use vmlab::events::{EventKind, default_kinds};
use vmlab::targets::{RunSpec, System, Target, TargetCommand, VerdictSpec, VmSpec};
use vmlab::units::{Bytes, duration};
use vmlab::{ModuleSpec, RootMode, Share};

use crate::cli::RunningArgs;
use crate::exit::{self, Code};
use crate::output;
use crate::progress::Display;
use crate::request::Verbosity;
use crate::run::quoted;
use crate::signals::SignalThread;
use crate::test::run_targets;

/// What of the kernel's own words makes a module fail beside what makes any target fail.
const MODULES_FAIL_ON: [EventKind; 4] =
    [EventKind::Warning, EventKind::HungTask, EventKind::Lockdep, EventKind::MemoryLeak];

/// How often files are looked at, which takes next to nothing for a module's few.
const WATCH_STEP: Duration = Duration::from_millis(50);

#[derive(Debug, Subcommand)]
pub(crate) enum ModuleCommand {
    /// Build a directory's modules for kernels, and print where they are
    ///
    /// The directory is not written to. A distribution's headers are fetched, and what was built of the same
    /// sources before is used again.
    Build(BuildArgs),
    /// Build, load, use and unload a directory's modules, in a fresh VM for each kernel
    ///
    /// They fail when they do not build, load or unload, when the command fails, when the kernel warns or worse, and
    /// when something of them stays behind once they are unloaded: memory, names in /proc, /sys and /dev, users of
    /// other modules.
    #[command(after_help = exit::TEST_HELP)]
    Test(Box<TestArgs>),
    /// Load and unload a directory's modules many times while a command uses them
    ///
    /// The command runs again and again until that is done, and has to put up with the modules not being there. The
    /// modules' own tests are not run. All else is as for `test`.
    #[command(after_help = exit::TEST_HELP)]
    Stress(Box<StressArgs>),
    /// Test a directory's modules, and again each time that a file there is saved
    ///
    /// All else is as for `test`. Ctrl-C ends it.
    Watch(Box<TestArgs>),
}

/// Which modules, and for which kernels.
#[derive(Debug, Args)]
pub(crate) struct WhatArgs {
    /// The directory with the sources: a Kbuild or Makefile with `obj-m`
    dir: PathBuf,
    /// Kernel, as for `run -k`; each that is given is one more. The usual one unless given
    #[arg(short, long = "kernel", value_name = "KERNEL")]
    kernel: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    #[command(flatten)]
    what: WhatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    #[command(flatten)]
    what: WhatArgs,
    /// Give a parameter to the module that no other needs, or to another one: NAME=VALUE, MODULE.NAME=VALUE
    #[arg(short, long, value_name = "PARAMETER")]
    param: Vec<String>,
    /// Let lines of the kernel's log pass that match this regular expression, though they are warnings or worse
    #[arg(long, value_name = "REGEX")]
    allow_log: Vec<String>,
    /// Show the kernel's log from loading on among the command's output
    #[arg(long)]
    show_log: bool,
    /// Switch debugging messages of the modules on, and show them: +p for all, 'file x.c +p' for a file's
    #[arg(long, value_name = "QUERY", allow_hyphen_values = true)]
    dyndbg: Option<String>,
    /// Show a trace event of the kernel's or the modules' own, or all of a system: SYSTEM[:EVENT]
    #[arg(long, value_name = "EVENT")]
    trace: Vec<String>,
    /// How long loading and unloading may take; 20s unless given
    #[arg(long, value_name = "TIME")]
    step_timeout: Option<String>,
    /// How long the command may take; 5m unless given
    #[arg(long, value_name = "TIME", default_value = "5m")]
    command_timeout: String,
    /// Memory of each VM
    #[arg(short, long, value_name = "SIZE", default_value = "512M")]
    memory: Bytes,
    #[command(flatten)]
    running: RunningArgs,
    /// The command that uses the modules, and its arguments. Without it, the programs in the directory's `tests` are run
    #[arg(trailing_var_arg = true)]
    command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct StressArgs {
    /// How often
    #[arg(short = 'n', long, value_name = "N", default_value = "100")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    cycles: u32,
    #[command(flatten)]
    test: TestArgs,
}

pub(crate) fn run(command: &ModuleCommand) -> Result<Code> {
    match command {
        ModuleCommand::Build(args) => build(&args.what).map(|()| Code::SUCCESS),
        ModuleCommand::Test(args) => test(args, None, &SignalThread::start()?),
        ModuleCommand::Stress(args) => test(&args.test, Some(args.cycles), &SignalThread::start()?),
        ModuleCommand::Watch(args) => watch(args),
    }
}

fn build(what: &WhatArgs) -> Result<()> {
    let store = KernelStore::open(Cache::open_default()?);
    let source = ModuleSource::open(&what.dir)?;
    let kernels: Vec<Option<&str>> = match what.kernel.is_empty() {
        true => vec![None],
        false => what.kernel.iter().map(|kernel| Some(kernel.as_str())).collect(),
    };
    for kernel in kernels {
        let since = Instant::now();
        let display = Display::new(Verbosity::Normal);
        let built = build_for(&store, &source, kernel, &display);
        display.clear();
        let (release, built) = built?;
        for warning in &built.warnings {
            output::lines(&format!("{warning}\n"));
        }
        let how = if built.fresh { "built" } else { "was built before" };
        output::note(&format!("{release}: {how}, {:.1} s", since.elapsed().as_secs_f64()));
        for module in &built.modules {
            output::stdout(format!("{}\n", module.path.display()).as_bytes())?;
        }
    }
    Ok(())
}

fn build_for(
    store: &KernelStore,
    source: &ModuleSource,
    kernel: Option<&str>,
    progress: &dyn Progress,
) -> Result<(String, ModuleBuild)> {
    let kernel = match kernel {
        Some(spec) => store.resolve(&spec.parse::<KernelSpec>()?, progress)?,
        None => store.resolve_default(progress)?,
    };
    let tree = store.build_tree(&kernel, progress)?;
    Ok((kernel.release, module_build::build(store.cache(), source, &tree, progress)?))
}

fn test(args: &TestArgs, cycles: Option<u32>, signals: &SignalThread) -> Result<Code> {
    let source = ModuleSource::open(&args.what.dir)?;
    let mut module = ModuleSpec::of(source.dir());
    module.parameters.clone_from(&args.param);
    module.cycles = cycles;
    module.show_log = args.show_log || args.dyndbg.is_some();
    module.dynamic_debug.clone_from(&args.dyndbg);
    module.trace.clone_from(&args.trace);
    // Beside cycles, a command has to put up with the modules not being there, and tests do not.
    module.own_tests = args.command.is_empty() && cycles.is_none();
    for regex in &args.allow_log {
        module.allow_log(regex).context("--allow-log")?;
    }
    if let Some(limit) = &args.step_timeout {
        module.step_time = duration(limit).context("--step-timeout")?;
    }
    let limit = duration(&args.command_timeout).context("--command-timeout")?;
    let mut fail_on = default_kinds();
    fail_on.extend(MODULES_FAIL_ON);
    let verdict =
        VerdictSpec { timeout: Some(limit), retries: 0, should_fail: false, fail_on, expect: None };
    let command = match args.command.is_empty() {
        true => TargetCommand::Nothing,
        false => TargetCommand::Program(args.command.clone()),
    };
    let cwd = std::env::current_dir().context("the working directory cannot be found")?;
    let target = |kernel: Option<&String>| Target {
        name: kernel.map_or_else(|| source.name(), |kernel| format!("{}[{kernel}]", source.name())),
        tags: [].into(),
        axes: kernel.iter().map(|kernel| ("kernel".to_owned(), (*kernel).clone())).collect(),
        system: System::Kernel {
            spec: kernel.cloned(),
            rootfs: PathBuf::from("/"),
            root_mode: RootMode::Overlay,
        },
        vm: VmSpec {
            memory: Some(args.memory),
            hypervisor: args.running.hypervisor.map(Into::into),
            shares: shares(&cwd, source.dir()),
            ..VmSpec::default()
        },
        run: RunSpec {
            command: command.clone(),
            cwd: None,
            module: Some(ModuleSpec {
                again: Some(again(args, cycles, kernel, (&cwd, source.dir()))),
                ..module.clone()
            }),
            env: BTreeMap::from([(
                "VMLAB_MODULE_DIR".to_owned(),
                source.dir().to_string_lossy().into_owned(),
            )]),
            user: "root".to_owned(),
            setup: Vec::new(),
            teardown: Vec::new(),
            keep_on_failure: Vec::new(),
        },
        verdict: verdict.clone(),
    };
    let targets: Vec<Target> = match args.what.kernel.is_empty() {
        true => vec![target(None)],
        false => args.what.kernel.iter().map(|kernel| target(Some(kernel))).collect(),
    };
    if let Some(twice) = args
        .what
        .kernel
        .iter()
        .find(|kernel| args.what.kernel.iter().filter(|other| other == kernel).count() > 1)
    {
        bail!("-k {twice} is given twice");
    }
    run_targets(targets, &args.running, source.name(), signals, |_| {})
}

/// The script that repeats a test under one kernel.
fn again(
    args: &TestArgs,
    cycles: Option<u32>,
    kernel: Option<&String>,
    (cwd, dir): (&Path, &Path),
) -> String {
    let mut words: Vec<String> = ["vmlab", "module"].map(str::to_owned).into();
    match cycles {
        None => words.push("test".to_owned()),
        Some(cycles) => words.extend(["stress".to_owned(), format!("--cycles={cycles}")]),
    }
    words.push(dir.to_string_lossy().into_owned());
    let mut given: Vec<(&str, &str)> = Vec::new();
    given.extend(kernel.map(|kernel| ("kernel", kernel.as_str())));
    given.extend(args.param.iter().map(|param| ("param", param.as_str())));
    given.extend(args.allow_log.iter().map(|regex| ("allow-log", regex.as_str())));
    given.extend(args.dyndbg.iter().map(|query| ("dyndbg", query.as_str())));
    given.extend(args.trace.iter().map(|event| ("trace", event.as_str())));
    given.extend(args.step_timeout.iter().map(|limit| ("step-timeout", limit.as_str())));
    let memory = args.memory.to_string();
    given.extend([("command-timeout", args.command_timeout.as_str()), ("memory", &memory)]);
    words.extend(given.into_iter().map(|(name, value)| format!("--{name}={value}")));
    if args.show_log {
        words.push("--show-log".to_owned());
    }
    if !args.command.is_empty() {
        words.push("--".to_owned());
        words.extend(args.command.iter().map(|word| word.to_string_lossy().into_owned()));
    }
    let line: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    format!("#!/bin/sh\ncd {} && exec {}\n", quoted(&cwd.to_string_lossy()), line.join(" "))
}

fn watch(args: &TestArgs) -> Result<Code> {
    let source = ModuleSource::open(&args.what.dir)?;
    let signals = SignalThread::start()?;
    let mut state = source.state()?;
    let mut saved: Option<(PathBuf, SystemTime)> = None;
    loop {
        let code = test(args, None, &signals).unwrap_or_else(|error| {
            output::error(&error);
            Code::FAILED
        });
        if code.is_of_signal() {
            return Ok(code);
        }
        let word = if code == Code::SUCCESS { "ok" } else { "FAILED" };
        let after = saved.take().map_or_else(String::new, |(file, time)| {
            let took = time.elapsed().unwrap_or_default().as_secs_f64();
            format!(", {took:.1} s after {} was saved", file.display())
        });
        output::stdout(format!("{word:<9} {}{after}\n", source.name()).as_bytes())?;
        // Several files may be saved, or one in several steps. A directory may be gone for a moment.
        let look = || source.state().unwrap_or_else(|_| state.clone());
        let mut now = look();
        loop {
            std::thread::sleep(WATCH_STEP);
            let later = look();
            if later != state && later == now {
                break;
            }
            now = later;
        }
        saved = now.last_change(&state).map(|(file, time)| (file.to_owned(), time));
        state = now;
    }
}

/// The working directory, for the command, and the modules' own directory, unless it is in that.
fn shares(cwd: &Path, dir: &Path) -> Vec<Share> {
    let mut dirs = vec![cwd];
    if !dir.starts_with(cwd) {
        dirs.push(dir);
    }
    let below_root = dirs.into_iter().filter(|dir| *dir != Path::new("/"));
    below_root.map(Share::new).collect()
}
