//! `vmlab kernel`.

use std::fmt::Write as _;

use anyhow::Result;
use serde_json::json;
use vmlab::DebugInfo;
use vmlab::artifacts::{Cache, Kernel, KernelSpec, KernelStore, Origin};
use vmlab::units::Bytes;

use crate::cli::KernelCommand;
use crate::output;
use crate::progress::Display;
use crate::request::Verbosity;

pub(crate) fn run(command: KernelCommand) -> Result<()> {
    let store = KernelStore::open(Cache::open_default()?);
    match command {
        KernelCommand::Pull { kernels } => pull(&store, &kernels),
        KernelCommand::List { json } => list(&store, json),
        KernelCommand::Inspect { kernel, json } => inspect(&store, &kernel, json),
        KernelCommand::Rm { kernels } => {
            for kernel in &kernels {
                let key = store.remove(kernel)?;
                output::stdout(format!("removed {key}\n").as_bytes())?;
            }
            Ok(())
        }
    }
}

fn pull(store: &KernelStore, specs: &[String]) -> Result<()> {
    for spec in specs {
        let display = Display::new(Verbosity::Normal);
        let pulled = store.pull(&spec.parse::<KernelSpec>()?, &display);
        display.clear();
        output::stdout(format!("{spec}: {}\n", pulled?.release).as_bytes())?;
    }
    Ok(())
}

fn list(store: &KernelStore, json: bool) -> Result<()> {
    let kernels = store.list()?;
    if json {
        return print_json(&kernels);
    }
    if kernels.is_empty() {
        output::note("no kernels were fetched yet; `vmlab kernel pull debian:6.12` fetches one");
        return Ok(());
    }
    let mut rows = vec![["RELEASE", "SUITE", "PACKAGE VERSION", "SIZE", ""].map(str::to_owned)];
    for kernel in kernels {
        rows.push([
            kernel.release,
            kernel.suites.first().cloned().unwrap_or_else(|| "-".to_owned()),
            kernel.version,
            Bytes(kernel.bytes).to_string(),
            if kernel.valid { String::new() } else { "damaged".to_owned() },
        ]);
    }
    output::stdout(table(&rows).as_bytes())
}

fn inspect(store: &KernelStore, spec: &str, json: bool) -> Result<()> {
    let kernel = store.inspect(&spec.parse::<KernelSpec>()?)?;
    let features = kernel.features()?;
    if json {
        return print_json(&json!({ "kernel": kernel, "features": features }));
    }
    let mut rows: Vec<[String; 2]> = description(&kernel);
    rows.extend(features.iter().map(|(feature, have)| [feature.to_string(), have.to_string()]));
    output::stdout(table(&rows).as_bytes())
}

fn description(kernel: &Kernel) -> Vec<[String; 2]> {
    let path = |path: &std::path::Path| path.display().to_string();
    let absent = || "-".to_owned();
    let no_modules = || kernel.no_modules.as_ref().map_or_else(absent, |why| format!("- ({why})"));
    let from = match &kernel.origin {
        Origin::File { path: file } => path(file),
        Origin::Installed => "installed on this host".to_owned(),
        Origin::BuildTree { path: dir } => format!("build tree {}", path(dir)),
        Origin::Unpacked { path: dir } => format!("unpacked package {}", path(dir)),
        Origin::Package { package, version, suites, .. } => {
            let of = if suites.is_empty() { String::new() } else { format!(" of {}", suites[0]) };
            format!("{package} {version}{of}")
        }
    };
    let config = match &kernel.config_source {
        Some(vmlab::artifacts::ConfigSource::File(file)) => path(file),
        Some(vmlab::artifacts::ConfigSource::BootImage) => "in the boot image".to_owned(),
        None => absent(),
    };
    let debug_info = match DebugInfo::of(kernel, []).vmlinux() {
        Ok(file) => path(&file),
        Err(why) => format!("- ({why})"),
    };
    [
        ("release", kernel.release.clone()),
        ("version", kernel.version_string.clone().unwrap_or_else(absent)),
        ("architecture", kernel.arch.to_string()),
        ("from", from),
        ("boot image", path(&kernel.boot_image)),
        ("modules", kernel.modules.as_deref().map_or_else(no_modules, path)),
        ("config", config),
        ("debug info", debug_info),
    ]
    .map(|(name, value)| [name.to_owned(), value])
    .into()
}

pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    output::stdout(text.as_bytes())
}

/// Rows with columns as wide as their widest cell.
pub(crate) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            // Writing to a string does not fail.
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
