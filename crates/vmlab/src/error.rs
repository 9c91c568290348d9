//! Everything that can go wrong with a VM.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use vmlab_artifacts::boot_image::BootImageError;
use vmlab_artifacts::firmware::FirmwareError;
use vmlab_artifacts::image::ImageError;
use vmlab_artifacts::image_build::{ImageBuildError, RecipeError};
use vmlab_artifacts::initramfs::InitramfsError;
use vmlab_artifacts::module_build::ModuleBuildError;
use vmlab_artifacts::modules::ModulesError;
use vmlab_artifacts::{CacheError, KernelError, SpecError};
use vmlab_vmm::probe::KvmUnusable;

use crate::config::ConfigError;
use crate::guest::{CopySide, shown};
use crate::hypervisor::{ExitReason, HypervisorError};
use crate::lan::LanError;
use crate::report::Report;
use crate::units::BytesError;

/// A failure of vmlab, of the guest, or of what was asked for.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel's name makes no sense.
    #[error(transparent)]
    KernelSpec(#[from] SpecError),
    /// The kernel cannot be had.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The kernel's image is not one.
    #[error(transparent)]
    BootImage(#[from] BootImageError),
    /// The kernel's modules cannot be used.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// A variable should be a size.
    #[error("{variable}: {source}")]
    Size {
        /// The variable.
        variable: &'static str,
        /// Why it is none.
        source: BytesError,
    },
    /// There are no such entries in the cache.
    #[error("the cache has no kind `{name}`; there are {}", have.join(", "))]
    NoSuchKind {
        /// What was asked for.
        name: String,
        /// What there is.
        have: Vec<String>,
    },
    /// The initramfs cannot be made.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The kernel has no way to do what is needed.
    #[error(
        "the kernel {kernel} cannot {purpose}: it lacks {}{}",
        missing.join(", "),
        if hint.is_empty() { String::new() } else { format!(" ({hint})") }
    )]
    KernelLacks {
        /// Its release, or its file.
        kernel: String,
        /// What it is needed for.
        purpose: &'static str,
        /// The options that are missing, by their names in the kernel's configuration.
        missing: Vec<String>,
        /// What to try.
        hint: String,
    },
    /// What was asked for cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A network of VMs cannot be as it is asked for.
    #[error(transparent)]
    Lan(#[from] LanError),
    /// A share was given in a wrong way.
    #[error("`{text}` is not a share: {why}; give HOST[:GUEST][:ro|rw] with absolute guest paths")]
    Share {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// A disk was given in a wrong way.
    #[error(
        "`{text}` is not a disk: {why}; give FILE[:NAME][:ro|rw|discard|clone], or size=SIZE,fs=FS,name=NAME"
    )]
    Disk {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// A filesystem cannot be made.
    #[error("a disk cannot be made: `{command}` in a VM: {how}{}{said}", if said.is_empty() { "" } else { ": " })]
    Template {
        /// What ran.
        command: String,
        /// How it ended.
        how: String,
        /// What it said.
        said: String,
    },
    /// What a disk was recorded in cannot be used, or no disk be made of it.
    #[error("power cuts cannot be tried with the log {}: {why}", log.display())]
    PowerCuts {
        /// The log.
        log: PathBuf,
        /// Why not.
        why: String,
    },
    /// There is no program that makes a filesystem.
    #[error("{program}, which the disk needs, is not in {}: install the filesystem's programs there", root.display())]
    NoMkfs {
        /// The program.
        program: String,
        /// The root that was looked into.
        root: PathBuf,
    },
    /// The hypervisor cannot do what it should.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// KVM was asked for and does not work here.
    #[error(
        "KVM cannot be used; without --accel kvm or --hypervisor kvm, QEMU's TCG is used instead"
    )]
    Kvm(#[source] KvmUnusable),
    /// A file or directory of vmlab's own cannot be used.
    #[error("cannot {what} {}{}", path.display(), hint)]
    Io {
        /// What was being done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
        /// What to try, beginning with a separator, or empty.
        hint: &'static str,
    },
    /// The guest did not come up in time.
    #[error("the guest did not come up within {} s{}", after.as_secs_f32().round(), match oops {
        Some(oops) => format!(", after its kernel reported: {oops}"),
        None => String::new(),
    })]
    BootTimeout {
        /// How long it was waited for.
        after: Duration,
        /// The first report of damage on the console.
        oops: Option<String>,
        /// What its console had to say, and where all of it is.
        console: Box<Evidence>,
    },
    /// The VM ended before it should have.
    #[error("{}", ended_text(reason, *booting))]
    Ended {
        /// Why.
        reason: ExitReason,
        /// Whether the agent had not come up yet.
        booting: bool,
        /// What its console had to say, and where all of it is.
        console: Box<Evidence>,
    },
    /// The guest did not end its processes and write everything back. It is gone all the same.
    #[error("the guest did not write everything back within {} s, and was cut off", after.as_secs())]
    NotStopped {
        /// How long it was waited for.
        after: Duration,
        /// What its console had to say, and where all of it is.
        console: Box<Evidence>,
    },
    /// The agent said something that makes no sense.
    #[error("the agent in the guest broke the protocol: {what}")]
    Protocol {
        /// What it did.
        what: String,
        /// What its console had to say, and where all of it is.
        console: Box<Evidence>,
    },
    /// The guest could not be made ready.
    #[error("the guest could not {step}: {detail}")]
    Setup {
        /// What it was doing.
        step: String,
        /// What went wrong.
        detail: String,
        /// What its console had to say, and where all of it is.
        console: Box<Evidence>,
    },
    /// The guest did not do in time what it was asked for. The VM has ended.
    #[error("the guest did not answer within {} s, and was cut off", after.as_secs())]
    NoAnswer {
        /// How long it was waited for.
        after: Duration,
        /// What its console had to say, and where all of it is.
        console: Box<Evidence>,
    },
    /// What is paused cannot answer.
    #[error("the VM is paused, and has to be resumed before it can be asked for something")]
    Paused,
    /// A VM goes back to its own snapshots only.
    #[error("the snapshot was taken of another VM")]
    OthersSnapshot,
    /// What is recorded of a disk is of one start.
    #[error(
        "the VM cannot be started again: its disk `{serial}` is recorded, from its first content on"
    )]
    RecordedDisk {
        /// Its serial number.
        serial: String,
    },
    /// A snapshot cannot have all that a VM is.
    #[error("no snapshot can be taken of this VM: {why}")]
    NotInSnapshot {
        /// What it could not have.
        why: String,
    },
    /// There is no such program in the guest.
    #[error("{}: command not found in the guest", program.display())]
    CommandNotFound {
        /// The program.
        program: OsString,
    },
    /// The program cannot be executed.
    #[error("{} cannot be executed in the guest", program.display())]
    CommandNotExecutable {
        /// The program.
        program: OsString,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest does not know a user.
    #[error("the guest has no user `{name}`")]
    NoSuchUser {
        /// The name.
        name: String,
    },
    /// The working directory cannot be entered.
    #[error("the working directory {} cannot be entered in the guest", dir.display())]
    WorkingDirectory {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else about starting a command failed.
    #[error("{}: its {what} could not be set up in the guest", program.display())]
    CommandSetup {
        /// The program.
        program: OsString,
        /// What failed.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Everything is to end.
    #[error("it was cancelled")]
    Cancelled,
    /// An image's name makes no sense.
    #[error(transparent)]
    ImageRecipe(#[from] RecipeError),
    /// A file is no image that can be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is no firmware for it.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// An image cannot be built.
    #[error(transparent)]
    ImageBuild(#[from] ImageBuildError),
    /// What a guest writes cannot be kept in an image of the cache.
    #[error(
        "what the guest writes cannot be kept in {}, of which vmlab uses a copy in its cache; unpack it, or \
         make an image of your own by `vmlab image build --output FILE`",
        image.display()
    )]
    CachedImage {
        /// The image, as it was asked for.
        image: PathBuf,
    },
    /// Only a kernel that vmlab starts can have it.
    #[error(
        "an image that starts its own system cannot be given {what}; with a kernel (-k), it can"
    )]
    NotForImages {
        /// What.
        what: &'static str,
    },
    /// An image gave no way to run commands in it.
    #[error(
        "the image let nobody in within {} s: {}",
        after.as_secs_f32().round(),
        tried.join("; ")
    )]
    NoWayIn {
        /// How long it was waited for.
        after: Duration,
        /// What was tried, and what came of it.
        tried: Vec<String>,
        /// What its console had to say, and where all of it is.
        console: Box<Evidence>,
    },
    /// A target is a shell, which needs the caller's terminal for itself.
    #[error(
        "`{target}` is a shell, which needs the terminal for itself: choose it alone, by --filter"
    )]
    ShellAmongOthers {
        /// Its name.
        target: String,
    },
    /// A file could not be copied between host and guest.
    #[error("cannot {doing} {}{}, copying {what}", shown(path), side.words())]
    Copy {
        /// What was to be copied, and where.
        what: String,
        /// What was being done.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// Whose file that is.
        side: CopySide,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The guest's kernel gave out no log.
    #[error("the log of the guest's kernel cannot be read")]
    KernelLog {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A module cannot be built.
    #[error(transparent)]
    ModuleBuild(#[from] ModuleBuildError),
    /// A module's own tests cannot be built.
    #[error("the module's tests cannot be built by {program}:\n{words}")]
    ModuleTests {
        /// The program.
        program: String,
        /// What it says.
        words: String,
    },
    /// A module cannot be built for a kernel that is not known.
    #[error(
        "{image} starts a kernel of its own, for which no module can be built; name a kernel beside it"
    )]
    ModuleWithoutKernel {
        /// The image.
        image: String,
    },
    /// The agent's part that looks at a guest around a module's life does not work.
    #[error("the guest cannot be looked at: {how}")]
    ModuleLook {
        /// How that ended.
        how: String,
    },
    /// The arguments and environment of a command are too large.
    #[error("{}: its arguments and environment are too large", program.display())]
    TooManyArguments {
        /// The program.
        program: OsString,
        /// The limit.
        #[source]
        source: vmlab_wire::MessageError,
    },
}

/// A VM that did not start, and how far it came.
#[derive(Debug)]
pub struct FailedStart {
    /// Why.
    pub error: Error,
    /// Its last phase is the one that failed.
    pub report: Report,
}

impl From<Box<FailedStart>> for Error {
    fn from(failed: Box<FailedStart>) -> Self {
        failed.error
    }
}

/// What is known of a guest that failed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Of the serial console: the kernel's report of damage to itself, else the last lines.
    pub tail: String,
    /// The whole log of the serial console.
    pub log: PathBuf,
    /// A fault of whoever emulates the processor, where the console shows one for certain.
    pub emulator_fault: Option<EmulatorFault>,
}

/// A known fault of QEMU without KVM, which a guest's kernel takes for damage to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum EmulatorFault {
    /// Code runs that the kernel has meanwhile patched: about one boot in two thousand stops at a
    /// breakpoint that is no longer there.
    #[error(
        "the guest stopped at a breakpoint that is not there, a fault of QEMU before 8.1 without KVM"
    )]
    StaleBreakpoint,
    /// An interrupt right behind `cmpxchg16b` saves flags that no processor has.
    #[error(
        "the guest's processor had flags that do not exist, a fault of QEMU before 8.0 without KVM \
         (cmpxchg16b)"
    )]
    ImpossibleFlags,
}

impl Error {
    /// What the console had to say, for failures of a guest.
    pub fn evidence(&self) -> Option<&Evidence> {
        match self {
            Self::BootTimeout { console, .. }
            | Self::NoWayIn { console, .. }
            | Self::Ended { console, .. }
            | Self::NotStopped { console, .. }
            | Self::Protocol { console, .. }
            | Self::NoAnswer { console, .. }
            | Self::Setup { console, .. } => Some(console),
            _ => None,
        }
    }
}

/// The kinds of failure that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// vmlab, the host or what was asked for is at fault.
    Vmlab,
    /// A time limit passed.
    TimeLimit,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest reset or powered itself off.
    GuestEnded,
    /// The command was not found.
    NotFound,
    /// The command cannot be executed.
    NotExecutable,
}

impl Error {
    /// What kind of failure it is.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::BootTimeout { .. } | Self::NoWayIn { .. } | Self::NoAnswer { .. } => {
                ErrorClass::TimeLimit
            }
            Self::Ended { reason, .. } => match reason {
                ExitReason::Timeout => ErrorClass::TimeLimit,
                ExitReason::GuestPanic(_) => ErrorClass::GuestPanic,
                ExitReason::Shutdown | ExitReason::Reset | ExitReason::TripleFault => {
                    ErrorClass::GuestEnded
                }
                ExitReason::Killed
                | ExitReason::ProcessorFailed(_)
                | ExitReason::MonitorFailed(_)
                | ExitReason::DeviceFailed(_) => ErrorClass::Vmlab,
            },
            Self::CommandNotFound { .. } => ErrorClass::NotFound,
            Self::CommandNotExecutable { .. } => ErrorClass::NotExecutable,
            Self::KernelSpec(_)
            | Self::Kernel(_)
            | Self::BootImage(_)
            | Self::Modules(_)
            | Self::Initramfs(_)
            | Self::Cache(_)
            | Self::Size { .. }
            | Self::NoSuchKind { .. }
            | Self::KernelLacks { .. }
            | Self::Config(_)
            | Self::Lan(_)
            | Self::Share { .. }
            | Self::Disk { .. }
            | Self::Template { .. }
            | Self::NoMkfs { .. }
            | Self::PowerCuts { .. }
            | Self::Hypervisor(_)
            | Self::NotInSnapshot { .. }
            | Self::RecordedDisk { .. }
            | Self::Paused
            | Self::OthersSnapshot
            | Self::Kvm(_)
            | Self::Io { .. }
            | Self::NotStopped { .. }
            | Self::Protocol { .. }
            | Self::Setup { .. }
            | Self::NoSuchUser { .. }
            | Self::WorkingDirectory { .. }
            | Self::CommandSetup { .. }
            | Self::Cancelled
            | Self::ImageRecipe(_)
            | Self::ImageBuild(_)
            | Self::Image(_)
            | Self::Firmware(_)
            | Self::CachedImage { .. }
            | Self::NotForImages { .. }
            | Self::ShellAmongOthers { .. }
            | Self::Copy { .. }
            | Self::KernelLog { .. }
            | Self::ModuleBuild(_)
            | Self::ModuleTests { .. }
            | Self::ModuleWithoutKernel { .. }
            | Self::ModuleLook { .. }
            | Self::TooManyArguments { .. } => ErrorClass::Vmlab,
        }
    }

    /// Why the VM ended, where that is what failed.
    pub fn exit_reason(&self) -> Option<&ExitReason> {
        match self {
            Self::Ended { reason, .. } => Some(reason),
            _ => None,
        }
    }
}

/// An error with all its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// What the kernel says when PID 1, which is the agent, is gone.
const INIT_DIED: &str = "Attempted to kill init";

fn ended_text(reason: &ExitReason, booting: bool) -> String {
    let when = if booting { " before the agent was up" } else { "" };
    match reason {
        ExitReason::GuestPanic(Some(message)) if message.starts_with(INIT_DIED) => {
            format!("the agent in the guest died{when} ({message})")
        }
        ExitReason::GuestPanic(Some(message)) => {
            format!("the guest's kernel panicked{when}: {message}")
        }
        ExitReason::Shutdown if !booting => {
            "the guest powered itself off before the command had ended".to_owned()
        }
        ExitReason::Reset if !booting => {
            "the guest reset itself before the command had ended".to_owned()
        }
        reason => format!("{reason}{when}"),
    }
}
