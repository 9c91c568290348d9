//! `vmlab disk`: the disks with filesystems that runs get copies of.

use std::ffi::OsString;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use vmlab::Disk;
use vmlab::artifacts::Cache;
use vmlab::blk::crash::{CrashState, Cuts};
use vmlab::disk::{self, KIND, PowerCuts};
use vmlab::units::Bytes;

use crate::cache::{shown, verify};
use crate::cli::VmArgs;
use crate::exit::Code;
use crate::kernel::{print_json, table};
use crate::{output, request};

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// List the disks that were made, with what made them
    #[command(visible_alias = "list")]
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove disks; they are made again when they are needed
    Rm {
        /// Keys, or how they begin, as `ls` shows them
        #[arg(required = true)]
        keys: Vec<String>,
    },
    /// Check what a power cut could have left of a disk, each time in a fresh VM
    ///
    /// First, a run records what is written to a disk: `vmlab run --disk size=64M,fs=ext4,record=LOG -- WORK`. Then
    /// this takes the same disk and a command that looks at it. Cuts are behind each flush, with nothing lost, and at
    /// random places, where of what was not flushed since each write is there or not. It exits with 1 if the disk
    /// cannot be mounted or the command fails in one of the states.
    CrashStates(Box<CrashArgs>),
    /// Read all of each disk, and say which are damaged; exits with 1 if one is
    Verify {
        /// Remove those that are damaged
        #[arg(long)]
        repair: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CrashArgs {
    /// The disk as it was recorded, the first `--disk`, has its log named by `record`; further ones are as of `run`
    #[command(flatten)]
    vm: VmArgs,
    /// How many cuts at random places
    #[arg(long, value_name = "N", default_value = "50")]
    random: usize,
    /// Where the random numbers begin
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    /// Let writes be torn between sectors of 512 bytes, which most filesystems do not take into account
    #[arg(long)]
    tear: bool,
    /// Let writes that were not flushed come to the disk in another order
    #[arg(long)]
    reorder: bool,
    /// The command that looks at the disk, and its arguments
    #[arg(required = true, trailing_var_arg = true)]
    command: Vec<OsString>,
}

/// As much of what a check said as is shown, in lines.
const SHOWN_LINES: usize = 10;

fn crash_states(mut args: CrashArgs) -> Result<Code> {
    if args.vm.disk.is_empty() {
        bail!("--disk has to say which disk was recorded, as it did then");
    }
    let disk: Disk = args.vm.disk.remove(0).parse().context("--disk")?;
    let log = disk.serve.as_ref().and_then(|serve| serve.record.clone());
    let log = log.context("the first --disk has to name its log: record=FILE")?;
    let cuts = Cuts { count: args.random, seed: args.seed, tear: args.tear, reorder: args.reorder };
    let quiet = args.vm.quiet;
    let vm = request::builder_for_each(args.vm)?;
    let mut power_cuts = PowerCuts::new(log, disk);
    power_cuts.at_random = cuts;
    let checked = power_cuts.check(&vm, &args.command, |number, count, checked| {
        let CrashState { cut, durable, survivors } = &checked.state;
        let what = format!(
            "{number} of {count}: cut after {cut} changes, {durable} flushed, {} others there",
            survivors.len()
        );
        match &checked.failure {
            None if quiet => {}
            None => output::lines(&format!("pass  {what}\n")),
            Some(why) => {
                output::lines(&format!("FAIL  {what}: {why}\n"));
                for line in checked.output.lines().take(SHOWN_LINES) {
                    output::lines(&format!("      {line}\n"));
                }
            }
        }
    })?;
    let failed = checked.iter().filter(|checked| checked.failure.is_some()).count();
    output::stdout(format!("{} states, {failed} failed\n", checked.len()).as_bytes())?;
    Ok(if failed > 0 { Code(1) } else { Code::SUCCESS })
}

pub(crate) fn run(command: DiskCommand) -> Result<Code> {
    let cache = Cache::open_default()?;
    match command {
        DiskCommand::Ls { json } => list(&cache, json).map(|()| Code::SUCCESS),
        DiskCommand::Rm { keys } => {
            for key in keys {
                let Some(removed) = disk::remove(&cache, &key)? else {
                    bail!("no disk, or more than one, has a key that begins with `{key}`");
                };
                output::stdout(format!("removed {}\n", shown(&removed)).as_bytes())?;
            }
            Ok(Code::SUCCESS)
        }
        DiskCommand::CrashStates(args) => crash_states(*args),
        DiskCommand::Verify { repair, json } => {
            verify(&vmlab::cache::verify(&cache, &[KIND.to_owned()], repair)?, json)
        }
    }
}

fn list(cache: &Cache, json: bool) -> Result<()> {
    let templates = disk::templates(cache)?;
    if json {
        return print_json(&templates);
    }
    let mut rows = vec![["KEY", "SIZE", "FILESYSTEM", "CONTENT", "MADE BY"].map(str::to_owned)];
    for template in &templates {
        let content = template.content.as_ref();
        rows.push([
            shown(&template.key).to_owned(),
            Bytes(template.size).to_string(),
            template.filesystem.clone().unwrap_or_else(|| "raw".to_owned()),
            content.map_or_else(|| "-".to_owned(), |path| path.display().to_string()),
            template.version.clone(),
        ]);
    }
    let text = if templates.is_empty() { "no disks\n".to_owned() } else { table(&rows) };
    output::stdout(text.as_bytes())
}
