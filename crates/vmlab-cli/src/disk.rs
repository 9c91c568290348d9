//! `vmlab disk`: the disks with filesystems that runs get copies of.

use anyhow::{Result, bail};
use clap::Subcommand;
use vmlab::artifacts::Cache;
use vmlab::disk::{self, KIND};
use vmlab::units::Bytes;

use crate::cache::{shown, verify};
use crate::exit::Code;
use crate::kernel::{print_json, table};
use crate::output;

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
