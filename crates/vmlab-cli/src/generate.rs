//! Completions and manual pages, made from the definition of the command line.

use std::path::Path;

use anyhow::{Context, Result};

pub(crate) fn completions(command: &mut clap::Command, shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, command, "vmlab", &mut script);
    crate::output::stdout(&script)
}

pub(crate) fn man(command: clap::Command, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(command, dir))
        .with_context(|| format!("the manual pages cannot be written to {}", dir.display()))
}
