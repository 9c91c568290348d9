//! `vmlab test`: the targets of a file.

mod display;
mod reports;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use vmlab::Environment;
use vmlab::budget::{Slots, usual_memory};
use vmlab::results::{Outcome, Results, ShowOutput, TargetResult, terminal};
use vmlab::runner::{Runner, RunnerOptions};
use vmlab::targets::{self, FILE_NAMES, Selection, Shard, Target, TargetCommand};
use vmlab::units::{Bytes, duration};

use crate::cli::{ReportArgs, RunningArgs, ShownArg, TestArgs};
use crate::exit::Code;
use crate::output;
use crate::repeat::raise_file_limit;
use crate::signals::SignalThread;
use crate::{request, run};
use display::Lines;
use reports::{Reports, first};

pub(crate) use reports::{merge, of_tests};

pub(crate) fn run(args: &TestArgs) -> Result<Code> {
    let file = match &args.config {
        Some(path) => path.clone(),
        None => usual_file()?,
    };
    let file = targets::load(&file)?;
    let mut chosen = choose(args, &file.targets)?;
    if let Some(hypervisor) = args.running.hypervisor {
        chosen.iter_mut().for_each(|target| target.vm.hypervisor = Some(hypervisor.into()));
    }
    if args.list {
        let names: String = chosen.iter().map(|target| format!("{}\n", target.name)).collect();
        output::stdout(names.as_bytes())?;
        return Ok(Code::SUCCESS);
    }
    if let [target] = &chosen[..]
        && target.run.command == TargetCommand::Shell
    {
        if args.running.reports != ReportArgs::default() {
            bail!("`{}` is a shell, of which there are no reports", target.name);
        }
        let request = request::of_shell_target(target, args.running.snapshots.mode())?;
        return Ok(run::one(&request)?.0);
    }
    let suite = file.dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names = file.targets.iter().map(|target| target.name.as_str());
    let places: HashMap<&str, usize> = names.zip(0..).collect();
    let signals = SignalThread::start()?;
    run_targets(chosen, &args.running, suite, &signals, |results| {
        for result in &mut results.targets {
            result.index = places.get(result.name.as_str()).copied().unwrap_or_default();
        }
    })
}

/// Runs targets, and prints and writes what they came to once `finish` has seen it.
pub(crate) fn run_targets(
    targets: Vec<Target>,
    args: &RunningArgs,
    suite: String,
    signals: &SignalThread,
    finish: impl FnOnce(&mut Results),
) -> Result<Code> {
    let reports = Reports::open(&args.reports)?;
    let options = options(args, suite)?;
    // After the limits that guests are given were read.
    raise_file_limit();
    let names = targets.iter().map(|target| target.name.clone()).collect();
    let lines = Arc::new(Lines::new(names, args.quiet));
    let runner = Arc::new(Runner::new(targets, options, Arc::clone(&lines) as _));
    signals.group(Arc::clone(&runner) as _);
    let mut results = runner.run()?;
    signals.idle();
    lines.close();
    finish(&mut results);
    let show = match args.output {
        ShownArg::All => ShowOutput::All,
        ShownArg::Failed => ShowOutput::Failed,
        ShownArg::None => ShowOutput::None,
    };
    let text = terminal(&results, show);
    let shown = output::stdout(format!("\n{text}").as_bytes());
    let written = reports.write(&results);
    let code = signals.killed_by().map_or_else(|| code(&results), Code::of_signal);
    match first([shown, written]) {
        // What the targets came to says more than that it cannot be written.
        Err(error) if code != Code::SUCCESS => {
            output::error(&error);
            Ok(code)
        }
        result => result.map(|()| code),
    }
}

fn usual_file() -> Result<PathBuf> {
    let [ours, theirs] = FILE_NAMES;
    targets::find(Path::new(".")).with_context(|| {
        format!(
            "there is neither {ours} nor {theirs} in this directory; --config names another file"
        )
    })
}

/// The targets that are to run.
fn choose(args: &TestArgs, all: &[Target]) -> Result<Vec<Target>> {
    let mut selection = Selection::all();
    for filter in &args.filter {
        selection = selection.filter(filter)?;
    }
    for tag in &args.tag {
        selection = selection.tag(tag);
    }
    let selected = selection.select(all)?;
    let Some(shard) = &args.shard else { return Ok(selected.into_iter().cloned().collect()) };
    let recorded = match &args.durations {
        Some(path) => durations(path)?,
        None => BTreeMap::new(),
    };
    let names: Vec<&str> = selected.iter().map(|target| target.name.as_str()).collect();
    let ours = shard.parse::<Shard>()?.of(&names, &recorded);
    Ok(ours.into_iter().filter_map(|index| selected.get(index)).copied().cloned().collect())
}

/// How many milliseconds targets took in an earlier run.
fn durations(path: &Path) -> Result<BTreeMap<String, u64>> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(|| format!("{name} cannot be read"))?;
    let results = Results::from_json(&text).context(name)?;
    let took = |target: &TargetResult| (target.name.clone(), target.took_ms() as u64);
    Ok(results.targets.iter().map(took).collect())
}

fn options(args: &RunningArgs, suite: String) -> Result<RunnerOptions> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let slots = args.jobs.map_or(Slots::Cpus(cpus), |jobs| Slots::Count(jobs.into()));
    let memory = args.memory_budget.as_deref().map(str::parse::<Bytes>).transpose();
    let timeout = args.timeout.as_deref().map(duration).transpose();
    Ok(RunnerOptions {
        suite,
        slots,
        memory: memory.context("--memory-budget")?.or_else(usual_memory),
        fail_fast: args.fail_fast,
        timeout: timeout.context("--timeout")?,
        environment: Environment::of_caller().context("the working directory cannot be found")?,
        snapshots: args.snapshots.mode(),
        cache_dir: None,
    })
}

fn code(results: &Results) -> Code {
    let any = |outcome| results.targets.iter().any(|target| target.outcome == outcome);
    match () {
        () if any(Outcome::Failed) => Code::TARGET_FAILED,
        () if any(Outcome::Error) => Code::FAILED,
        () if any(Outcome::Cancelled) => Code::TARGET_FAILED,
        () => Code::SUCCESS,
    }
}
