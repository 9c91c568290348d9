//! `vmlab image`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Subcommand};
use vmlab::artifacts::image_build::{self, BootFirmware, BuiltImage, ImageRecipe};
use vmlab::artifacts::{Cache, find_program};
use vmlab::units::Bytes;

use crate::output;
use crate::progress::Display;
use crate::request::Verbosity;

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Make a bootable disk image of a distribution's own packages, and print its path
    ///
    /// An image that was made from the same recipe before is used again.
    Build(BuildArgs),
}

#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// Distribution and suite: debian:12, debian:trixie, debian:sid
    image: String,
    /// Install a package besides those that every image has; linux-image-... takes the place of the
    /// cloud kernel
    #[arg(short, long, value_name = "NAME")]
    package: Vec<String>,
    /// Size of the disk: 4G unless given. What is not used takes no space
    #[arg(short, long, value_name = "SIZE")]
    size: Option<String>,
    /// Make it bootable by UEFI alone, with and without secure boot
    #[arg(long, conflicts_with = "bios")]
    uefi: bool,
    /// Make it bootable by a BIOS alone
    #[arg(long)]
    bios: bool,
    /// Ask the archive what is new, and build anew if anything is
    #[arg(long)]
    refresh: bool,
    /// Copy the image to this file and print its name instead; as qcow2 if it ends so
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(crate) fn run(command: ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Build(args) => build(&args),
    }
}

fn build(args: &BuildArgs) -> Result<()> {
    let recipe = recipe(args)?;
    if let Some(to) = &args.output {
        check_output(to)?;
    }
    let cache = Cache::open_default()?;
    let display = Display::new(Verbosity::Normal);
    let built = match args.refresh {
        true => image_build::refresh(&cache, &recipe, &display),
        false => image_build::build(&cache, &recipe, &display),
    };
    display.clear();
    let built = built?;
    let path = match &args.output {
        None => &built.path,
        Some(to) => {
            write_output(&built, to)?;
            to
        }
    };
    output::stdout(&[path.as_os_str().as_bytes(), b"\n"].concat())
}

fn recipe(args: &BuildArgs) -> Result<ImageRecipe> {
    let firmware = match (args.uefi, args.bios) {
        (true, _) => BootFirmware::Uefi,
        (_, true) => BootFirmware::Bios,
        _ => BootFirmware::Both,
    };
    let recipe: ImageRecipe = args.image.parse()?;
    let recipe = recipe.with_packages(&args.package)?.with_firmware(firmware);
    match &args.size {
        None => Ok(recipe),
        Some(size) => Ok(recipe.with_size(size.parse::<Bytes>()?.0)?),
    }
}

fn is_qcow2(path: &Path) -> bool {
    path.extension() == Some(OsStr::new("qcow2"))
}

/// What would fail at the end should fail before minutes were spent.
fn check_output(to: &Path) -> Result<()> {
    if is_qcow2(to) && find_program("qemu-img").is_none() {
        bail!(
            "qemu-img, which writes qcow2, is not here; install it with `sudo apt-get install \
             qemu-utils`, or let the name of the file end in .raw"
        );
    }
    let dir = match to.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    if !dir.is_dir() {
        bail!("there is no directory {} for the image", dir.display());
    }
    Ok(())
}

/// Writes the file in one step, so that nobody takes half of one for an image.
fn write_output(built: &BuiltImage, to: &Path) -> Result<()> {
    let mut temporary = to.as_os_str().to_owned();
    temporary.push(format!(".{}.new", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = match is_qcow2(to) {
        true => convert(&built.path, &temporary),
        false => image_build::copy(&built.path, &temporary).map_err(Into::into),
    };
    let moved = written.and_then(|()| {
        std::fs::rename(&temporary, to).with_context(|| format!("cannot write {}", to.display()))
    });
    if moved.is_err() {
        // It may not have been made at all.
        let _ = std::fs::remove_file(&temporary);
    }
    moved
}

fn convert(from: &Path, to: &Path) -> Result<()> {
    let program = find_program("qemu-img").context("qemu-img is gone")?;
    let args =
        [OsStr::new("convert"), "-f".as_ref(), "raw".as_ref(), "-O".as_ref(), "qcow2".as_ref()];
    let mut command = Command::new(program);
    let done = command.args(args).arg(from).arg(to).output().context("cannot run qemu-img")?;
    match done.status.success() {
        true => Ok(()),
        false => Err(anyhow!("qemu-img says: {}", String::from_utf8_lossy(&done.stderr).trim())),
    }
}
