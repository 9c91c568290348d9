//! Targets: named runs that are described in a file, which is `vmlab.toml`, or vmtest's `vmtest.toml`. What
//! can be in them is in `docs/targets.md`.

mod builder;
mod document;
mod event_names;
mod file;
mod lower;
mod matrix;
mod problem;
mod select;
mod spelling;
mod table;
mod value;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) use builder::script_words;
pub use problem::{Problem, TargetFileError};
pub use select::{Selection, SelectionError, Shard};

use crate::config::{Machine, NetworkMode, Topology};
use crate::events::{EventKind, EventKinds};
use crate::hypervisor::HypervisorChoice;
use crate::units::Bytes;
use crate::{AccelChoice, Disk, ModuleSpec, RootMode, Share, ShareVia};

/// The names of files that are looked for in a directory, the first before the second.
pub const FILE_NAMES: [&str; 2] = ["vmlab.toml", "vmtest.toml"];

/// A `vmlab.toml` that says nothing yet, with every key in a comment.
pub const DEFAULT_FILE: &str = include_str!("targets/default.toml");

/// The JSON schema of `vmlab.toml`, for editors.
pub const SCHEMA: &str = include_str!("../../../docs/vmlab.schema.json");

/// The longest file that is read, in bytes: far more than people write, and what scripts write of thousands
/// of targets fits.
const MAX_FILE: u64 = 4 * 1024 * 1024;

/// Whose keys a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// `vmlab.toml`.
    Vmlab,
    /// `vmtest.toml`: vmtest's keys, with vmtest's defaults.
    Vmtest,
}

impl FileKind {
    /// What a file of this name is.
    pub fn of(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default();
        if name.as_encoded_bytes().starts_with(b"vmtest") { Self::Vmtest } else { Self::Vmlab }
    }
}

/// The targets of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct TargetFile {
    /// The file, absolute.
    pub path: PathBuf,
    /// The directory that it is in, absolute and without symbolic links. Relative paths in the file are
    /// from there.
    pub dir: PathBuf,
    /// Whose keys it has.
    pub kind: FileKind,
    /// In the order of the file; at least one.
    pub targets: Vec<Target>,
}

/// The file of targets in a directory, if there is one.
pub fn find(dir: &Path) -> Option<PathBuf> {
    FILE_NAMES.iter().map(|name| dir.join(name)).find(|path| path.is_file())
}

/// Reads a file. One whose name begins with `vmtest` is taken for vmtest's.
///
/// # Errors
/// When it cannot be read, or something in it makes no sense: all that does not is in the error.
pub fn load(path: &Path) -> Result<TargetFile, TargetFileError> {
    load_as(path, FileKind::of(path))
}

/// Reads a file of a kind, whatever its name.
///
/// # Errors
/// As for [`load`].
pub fn load_as(path: &Path, kind: FileKind) -> Result<TargetFile, TargetFileError> {
    let cannot = |source| TargetFileError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(cannot)?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > MAX_FILE {
        let message = format!("it is longer than {}", Bytes(MAX_FILE));
        return Err(cannot(std::io::Error::new(std::io::ErrorKind::FileTooLarge, message)));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let line =
            error.as_bytes()[..error.utf8_error().valid_up_to()].split(|b| *b == b'\n').count();
        let message = format!("line {line} is not UTF-8");
        cannot(std::io::Error::new(std::io::ErrorKind::InvalidData, message))
    })?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    // As the kernel names it, like the working directory.
    let dir = parent.unwrap_or(Path::new(".")).canonicalize().map_err(cannot)?;
    let targets = file::read(&text, kind, path, &dir)?;
    let path = dir.join(path.file_name().unwrap_or_default());
    Ok(TargetFile { path, dir, kind, targets })
}

/// A named run: a command in a fresh VM.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// Unique in its file.
    pub name: String,
    /// What it can be chosen by, beside its name.
    pub tags: BTreeSet<String>,
    /// Of a matrix, its axes and the target's values on them, in the order of the file.
    pub axes: Vec<(String, String)>,
    /// What the VM starts.
    pub system: System,
    /// What the VM is.
    pub vm: VmSpec,
    /// What runs in it.
    pub run: RunSpec,
    /// When it counts as passed.
    pub verdict: VerdictSpec,
}

/// What a VM starts.
#[derive(Debug, Clone, PartialEq)]
pub enum System {
    /// A kernel over a directory of the host.
    Kernel {
        /// As for `run -k`; `None` is the default kernel.
        spec: Option<String>,
        /// The guest's root.
        rootfs: PathBuf,
        /// Where writes to it go.
        root_mode: RootMode,
    },
    /// A disk image with a system in it.
    Image(ImageSpec),
}

/// A disk image and how it starts.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageSpec {
    /// The file, absolute.
    pub path: PathBuf,
    /// What starts its boot loader.
    pub firmware: Firmware,
    /// Another file of UEFI firmware than the distribution's.
    pub firmware_file: Option<PathBuf>,
    /// A kernel that is started instead of its own.
    pub kernel: Option<String>,
    /// Whether what the guest writes stays in the image.
    pub persist: bool,
}

/// What a PC starts before any boot loader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Firmware {
    /// SeaBIOS.
    #[default]
    Bios,
    /// OVMF.
    Uefi {
        /// Whether it starts only what is signed.
        secure_boot: bool,
    },
}

/// What a VM is. `None` is the default of `vmlab run`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct VmSpec {
    /// RAM.
    pub memory: Option<Bytes>,
    /// CPUs.
    pub topology: Option<Topology>,
    /// The board.
    pub machine: Option<Machine>,
    /// What runs it.
    pub hypervisor: Option<HypervisorChoice>,
    /// Who executes instructions.
    pub accel: AccelChoice,
    /// QEMU's `-cpu` where KVM is used.
    pub kvm_cpu: Option<String>,
    /// Whether it boots faster at a price.
    pub fast: bool,
    /// Its network.
    pub network: NetworkMode,
    /// The directory of its vsock's sockets.
    pub vsock: Option<PathBuf>,
    /// Whether it has a source of random numbers of the host.
    pub rng: bool,
    /// Its name.
    pub hostname: Option<String>,
    /// Words behind the kernel's command line.
    pub append: Vec<String>,
    /// Modules to load, with their parameters.
    pub modules: Vec<String>,
    /// Host directories in the guest.
    pub shares: Vec<Share>,
    /// Disks of the guest beside its root.
    pub disks: Vec<Disk>,
    /// What carries shares.
    pub share_via: ShareVia,
    /// Arguments for QEMU.
    pub qemu_args: Vec<String>,
    /// Another QEMU: a path, or a name to be looked for in `PATH`.
    pub qemu: Option<PathBuf>,
    /// How long it may take to come up.
    pub boot_timeout: Option<Duration>,
}

/// What runs in a VM.
#[derive(Debug, Clone, PartialEq)]
pub struct RunSpec {
    /// The command.
    pub command: TargetCommand,
    /// Its working directory, absolute, in the guest. `None` is the caller's.
    pub cwd: Option<PathBuf>,
    /// Modules that are built, loaded before it, and unloaded after it.
    pub module: Option<ModuleSpec>,
    /// What its environment has beside the caller's.
    pub env: BTreeMap<String, String>,
    /// Who runs it: as for `run --user`.
    pub user: String,
    /// Scripts for bash before it. One that fails is an error, and the command does not run.
    pub setup: Vec<String>,
    /// Scripts for bash after it, in any case.
    pub teardown: Vec<String>,
    /// Files of the guest, as patterns of the shell, that are kept when the target fails.
    pub keep_on_failure: Vec<String>,
}

/// What a target runs.
#[derive(Debug, Clone, PartialEq)]
pub enum TargetCommand {
    /// A script for bash.
    Script(String),
    /// A program and its arguments.
    Program(Vec<OsString>),
    /// A shell on the caller's terminal.
    Shell,
    /// Nothing: what comes before and after it is all.
    Nothing,
}

/// When a target counts as passed.
#[derive(Debug, Clone, PartialEq)]
pub struct VerdictSpec {
    /// How long an attempt may take.
    pub timeout: Option<Duration>,
    /// How often it is tried again when it fails.
    pub retries: u32,
    /// Whether the command has to fail.
    pub should_fail: bool,
    /// Events that make it fail, whatever the command's exit code.
    pub fail_on: EventKinds,
    /// An event that has to happen; it is no failure then, even if the VM ends by it.
    pub expect: Option<EventKind>,
}
