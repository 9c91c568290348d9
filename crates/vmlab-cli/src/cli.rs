//! The command line, as it is written.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgGroup, Args, CommandFactory, Parser, Subcommand, ValueEnum};
use vmlab::SnapshotMode;
use vmlab::hypervisor::HypervisorChoice;

use crate::exit::{self, Code};
use crate::vmtest::{self, Vmtest, VmtestArgs};
use crate::{
    cache, disk, doctor, generate, image, kernel, module, output, request, run, runner, test,
};

/// Run anything in a fresh virtual machine, under any Linux kernel.
#[derive(Debug, Parser)]
#[command(name = "vmlab", version, after_help = exit::HELP)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command in a fresh VM, on the host's own userspace
    ///
    /// The guest has the host's root, with a layer of its own memory over it for what is written, and
    /// the working directory, writable. The command runs as root, with the caller's environment,
    /// working directory, umask and limits.
    #[command(after_help = exit::HELP)]
    Run(RunArgs),
    /// Run a program in a fresh VM, for Cargo
    ///
    /// CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="vmlab runner -k debian:6.12" has `cargo test` run each
    /// test program in a VM, as `cargo vmlab test` does. Lists of tests (--list) are made on the host.
    #[command(after_help = exit::HELP)]
    Runner(RunnerArgs),
    /// Open an interactive shell in a fresh VM
    ///
    /// Ctrl-] pressed three times within a second ends the VM.
    #[command(after_help = exit::HELP)]
    Shell(ShellArgs),
    /// Run the targets of vmlab.toml or vmtest.toml, each in a fresh VM
    ///
    /// Without --config, it is vmlab.toml in the working directory, else vmtest.toml.
    #[command(after_help = exit::TEST_HELP)]
    Test(TestArgs),
    /// Run the targets of vmtest.toml, or one command, as danobi/vmtest does
    ///
    /// A link to vmlab with the name `vmtest` is the same.
    #[command(after_help = vmtest::HELP)]
    Vmtest(VmtestArgs),
    /// Work on results that `test --json` has written
    #[command(subcommand)]
    Report(ReportCommand),
    /// Fetch, list, inspect and remove kernels
    #[command(subcommand)]
    Kernel(KernelCommand),
    /// Make bootable disk images
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Build kernel modules, and test them under kernels
    #[command(subcommand)]
    Module(module::ModuleCommand),
    /// List, remove and verify the disks that runs get copies of
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// List, verify and empty the cache of kernels and of what is made from them
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Say what this host can do, what is missing, and how to get it
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory
    Man {
        /// The directory
        dir: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum KernelCommand {
    /// Fetch a distribution's newest kernel that fits, or take in a .deb
    Pull {
        /// Such as debian:6.12, debian:sid-cloud, ./linux-image.deb
        #[arg(required = true)]
        kernels: Vec<String>,
    },
    /// List the kernels that were fetched
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say what a kernel is and what it has
    Inspect {
        /// As for `run -k`; nothing is fetched
        kernel: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove kernels that were fetched
    Rm {
        /// Key, package, release, or as for `run -k`
        #[arg(required = true)]
        kernels: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// List what is in the cache, with its size on disk and its last use
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Look for damaged entries; ends with code 1 if there are any
    Verify {
        /// Only these kinds, such as kernels
        kinds: Vec<String>,
        /// Remove damaged entries that are not in use; they are made or fetched anew when wanted
        #[arg(long)]
        repair: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove what is beyond each kind's bound, and what killed processes have left
    Gc {
        /// Remove entries, the least recently used first, until all take no more than this on disk: 2G
        #[arg(long, value_name = "SIZE")]
        max: Option<String>,
    },
    /// Remove all entries that are not in use
    Clear {
        /// Only these kinds, such as boot-images
        kinds: Vec<String>,
    },
}

/// What both `run` and `shell` take.
#[derive(Debug, Args)]
pub(crate) struct VmArgs {
    /// Kernel: debian:6.12, debian:sid-cloud, host, an installed release, or the path of a bzImage,
    /// vmlinux, build tree, .deb or unpacked .deb. Several run one after the other
    #[arg(short, long = "kernel", value_name = "KERNEL")]
    pub(crate) kernel: Vec<String>,
    /// Memory: 512M, 2G; a number alone is MiB
    #[arg(short, long, value_name = "SIZE", default_value = "1G")]
    pub(crate) memory: String,
    /// CPUs, or `host` for as many as the host has
    #[arg(short, long, value_name = "N", conflicts_with = "topology")]
    pub(crate) cpus: Option<String>,
    /// CPUs as NUMA nodes, last-level caches per node, cores per cache, threads per core
    #[arg(long, value_name = "NODES,LLCS,CORES,THREADS")]
    pub(crate) topology: Option<String>,
    /// What runs the VM: QEMU, or with KVM vmlab's own monitor; auto takes the monitor where it has all that is
    /// asked for. VMLAB_HYPERVISOR says so unless given
    #[arg(long, value_enum)]
    pub(crate) hypervisor: Option<HypervisorArg>,
    /// Who executes instructions; auto takes KVM where it is proved to work
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) accel: AccelArg,
    /// Board; the one that boots fastest unless given
    #[arg(long, value_enum)]
    pub(crate) machine: Option<MachineArg>,
    /// Boot faster at the price of less: no mitigations of CPU faults, no clearing of the kernel's memory,
    /// no jitter entropy
    #[arg(long)]
    pub(crate) fast: bool,
    /// Add to the kernel's command line
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    pub(crate) append: Vec<String>,
    /// Add an argument to QEMU's command line
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) qemu_arg: Vec<String>,
    /// Directory that is the guest's root
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) rootfs: PathBuf,
    /// Disk image whose system is started, or whose root a kernel (-k) has: a file, or debian:12 for what
    /// `image build` makes. It is not written to
    #[arg(long, value_name = "IMAGE", conflicts_with = "rootfs")]
    pub(crate) image: Option<PathBuf>,
    /// Start the image by UEFI, not by a BIOS
    #[arg(long, requires = "image", conflicts_with = "kernel")]
    pub(crate) uefi: bool,
    /// Start the image by UEFI, and only if its boot loader is signed
    #[arg(long, requires = "image", conflicts_with = "kernel")]
    pub(crate) secure_boot: bool,
    /// Start the image by this BIOS or UEFI firmware
    #[arg(long, value_name = "FILE", requires = "image")]
    #[arg(conflicts_with_all = ["kernel", "uefi", "secure_boot"])]
    pub(crate) bios: Option<PathBuf>,
    /// Let the guest write to the image itself
    #[arg(long, requires = "image")]
    pub(crate) persist: bool,
    /// What becomes of writes to the root: refused, kept in the guest's memory (the default), or done (the
    /// default for images)
    #[arg(long, value_enum)]
    pub(crate) root_mode: Option<RootModeArg>,
    /// Share a host directory; it is at the same path in the guest, and writable, unless said otherwise
    #[arg(long, value_name = "HOST[:GUEST][:ro|rw]")]
    pub(crate) share: Vec<String>,
    /// Give the guest a disk, at /dev/disk/by-id/virtio-NAME: a file with an image, as
    /// FILE[:NAME][:ro|rw|discard|clone], or a new one, as size=256M,fs=ext4,name=data
    ///
    /// NAME is disk0, disk1 and so on unless given. What is written to a file is discarded, unless `rw` keeps it
    /// there, `ro` has it refused, or `clone` has it written to a copy of the VM's own, as new disks are. A new
    /// disk's filesystem is made once, kept in the cache, and mounted at /mnt/NAME.
    ///
    /// Keys: size, path, name, fs (ext4, xfs, btrfs, f2fs, vfat, swap and others), label, uuid, mkfs-option,
    /// content (a directory or a tar archive), mount (a path or none), mount-option, mode, read-only, clone (auto,
    /// reflink, copy, overlay), keep (a file), serve, iops, iops-burst, bps, bps-burst, fault, record (a file),
    /// block-size, queues. mkfs-option, mount-option and fault can be given several times. docs/disks.md says more.
    #[arg(long, value_name = "DISK")]
    pub(crate) disk: Vec<String>,
    /// Keep the VM's own copies of disks in a directory, as NAME.raw
    #[arg(long, value_name = "DIR")]
    pub(crate) keep: Option<PathBuf>,
    /// How the root and all shares reach the guest; auto takes virtiofs where the kernel has it
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) share_via: ShareViaArg,
    /// Do not restrict the threads of vmlab that serve the guest and run it (see `vmlab doctor`)
    #[arg(long)]
    pub(crate) no_sandbox: bool,

    #[command(flatten)]
    pub(crate) snapshots: SnapshotArgs,
    /// Do not share the working directory; where the guest's root has none, `/` takes its place
    #[arg(long)]
    pub(crate) no_cwd: bool,
    /// Network: none, or user for what the host's user can reach
    #[arg(long, value_enum, default_value = "none")]
    pub(crate) net: NetArg,
    /// Give the guest streams to programs of the host (vsock), as Unix sockets in a directory
    ///
    /// The guest's CID is 3. A program of the host that connects to DIR/vsock, writes `CONNECT PORT` and a newline, and
    /// reads `OK` and a number is connected to that port of the guest. Where the guest connects to a port of the host,
    /// CID 2, it is DIR/vsock_PORT that is connected to. DIR is made if it is missing, and is one VM's at a time.
    #[arg(long, value_name = "DIR")]
    pub(crate) vsock: Option<PathBuf>,
    /// Give the guest a source of random numbers of the host (virtio-rng), /dev/hwrng there
    #[arg(long)]
    pub(crate) rng: bool,
    /// Load a module before the command, with its parameters: 'kvm-amd nested=1'
    #[arg(long, value_name = "MODULE")]
    pub(crate) module: Vec<String>,
    /// The guest's host name; vmlab- and six digits of its own unless given
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// Who runs the command: a name or number of the guest's root, or `caller`
    #[arg(short, long, value_name = "USER", default_value = "root")]
    pub(crate) user: String,
    /// Set an environment variable
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<OsString>,
    /// End the VM, and all that runs in it, after this time: 90s, 5m, 1h; a number alone is seconds
    #[arg(long, value_name = "TIME")]
    pub(crate) timeout: Option<String>,
    /// How long the guest may take to come up; 120s, or 300s for an image that starts its own system
    #[arg(long, value_name = "TIME")]
    pub(crate) boot_timeout: Option<String>,
    /// Print the phases, and the guest's console as it comes
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// Print nothing but failures
    #[arg(short, long, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Write a report of the run as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Print where the time went, on the host and in the guest, as a list on stderr, and draw it
    #[arg(long, value_name = "FILE.svg", num_args = 0..=1, require_equals = true)]
    pub(crate) timings: Option<Option<PathBuf>>,
    /// Print what would be run, as JSON and as QEMU's command line, and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) vm: VmArgs,
    /// Give the command a terminal. Ctrl-] pressed three times within a second ends the VM
    #[arg(short, long)]
    pub(crate) tty: bool,
    #[command(flatten)]
    pub(crate) repeat: RepeatArgs,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true)]
    pub(crate) command: Vec<OsString>,
}

/// What Cargo gives to its runner.
#[derive(Debug, Args)]
pub(crate) struct RunnerArgs {
    #[command(flatten)]
    pub(crate) vm: VmArgs,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true)]
    pub(crate) command: Vec<OsString>,
}

/// What `test` takes.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// The file with the targets
    #[arg(short, long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Run only targets whose names match this regular expression somewhere
    #[arg(short, long, value_name = "REGEX")]
    pub(crate) filter: Vec<String>,
    /// Run only targets that have one of these tags
    #[arg(short, long, value_name = "TAG")]
    pub(crate) tag: Vec<String>,
    /// Run only this part of them: 2/8 is the second of eight, which together run all
    #[arg(long, value_name = "I/N")]
    pub(crate) shard: Option<String>,
    /// What an earlier run has written by --json: parts are made to take alike
    #[arg(long, value_name = "FILE", requires = "shard")]
    pub(crate) durations: Option<PathBuf>,
    /// Print the names of the targets and stop
    #[arg(short, long)]
    pub(crate) list: bool,
    #[command(flatten)]
    pub(crate) running: RunningArgs,
}

/// How targets are run, and what is told of them.
#[derive(Debug, Args)]
pub(crate) struct RunningArgs {
    /// VMs at the same time; as many as the host has CPUs for, unless given
    #[arg(short, long, value_name = "J")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) jobs: Option<u16>,
    /// What all VMs at the same time may need of the host's memory; three quarters of what is available,
    /// unless given
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory_budget: Option<String>,
    /// End everything at the first failure
    #[arg(long)]
    pub(crate) fail_fast: bool,
    /// How long all targets together may take: 90s, 5m, 1h
    #[arg(long, value_name = "TIME")]
    pub(crate) timeout: Option<String>,
    /// Whose output is printed
    #[arg(short, long, value_enum, default_value = "failed")]
    pub(crate) output: ShownArg,
    /// What runs all VMs, whatever the targets say
    #[arg(long, value_enum)]
    pub(crate) hypervisor: Option<HypervisorArg>,
    #[command(flatten)]
    pub(crate) snapshots: SnapshotArgs,
    #[command(flatten)]
    pub(crate) reports: ReportArgs,
    /// Print nothing but failures and the count of targets
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// Whether VMs start from snapshots.
#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    /// Boot, and neither use nor take a snapshot
    #[arg(long)]
    no_snapshot: bool,
    /// Boot, and take a snapshot anew for the runs that follow
    #[arg(long, conflicts_with = "no_snapshot")]
    cold: bool,
}

impl SnapshotArgs {
    pub(crate) fn mode(&self) -> SnapshotMode {
        match (self.no_snapshot, self.cold) {
            (true, _) => SnapshotMode::Never,
            (false, true) => SnapshotMode::Renew,
            (false, false) => SnapshotMode::Use,
        }
    }
}

/// What is written of results.
#[derive(Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct ReportArgs {
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write them as JUnit's XML, which CI systems read
    #[arg(long, value_name = "FILE")]
    pub(crate) junit: Option<PathBuf>,
    /// Write them in TAP, the Test Anything Protocol
    #[arg(long, value_name = "FILE")]
    pub(crate) tap: Option<PathBuf>,
    /// Write a page to look at: DIR/index.html
    #[arg(long, value_name = "DIR")]
    pub(crate) html: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReportCommand {
    /// Put the results of shards together
    Merge(MergeArgs),
    /// Put together what tests of Rust's have put into $VMLAB_REPORT_DIR
    Tests(TestResultsArgs),
}

#[derive(Debug, Args)]
pub(crate) struct MergeArgs {
    /// What `test --json` has written
    #[arg(required = true)]
    pub(crate) parts: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) reports: ReportArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TestResultsArgs {
    /// That directory
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) reports: ReportArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ShownArg {
    All,
    Failed,
    None,
}

/// A command many times. Each option but the first two needs one of those.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("repeated").multiple(true).args(["repeat", "until_failure"])))]
pub(crate) struct RepeatArgs {
    /// Run the command N times, each time in a VM of its own, and report failures and times
    ///
    /// The command's input is empty, and VMLAB_RUN in its environment is the number of the run, from 1.
    /// What it writes is printed of runs that fail, or of all with -v.
    #[arg(long, value_name = "N", conflicts_with_all = ["tty", "timings"])]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) repeat: Option<u64>,
    /// Run it until it fails, at most as often as --repeat says, and stop there
    #[arg(long, conflicts_with_all = ["tty", "timings"])]
    pub(crate) until_failure: bool,
    /// VMs at the same time; as many as the host has CPUs for, unless given
    #[arg(short, long, value_name = "J", requires = "repeated")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) jobs: Option<u16>,
    /// What all VMs at the same time may need of the host's memory; three quarters of what is available,
    /// unless given
    #[arg(long, value_name = "SIZE", requires = "repeated")]
    pub(crate) memory_budget: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ShellArgs {
    #[command(flatten)]
    pub(crate) vm: VmArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum AccelArg {
    Auto,
    Kvm,
    Tcg,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum HypervisorArg {
    Auto,
    Qemu,
    Kvm,
}

impl From<HypervisorArg> for HypervisorChoice {
    fn from(argument: HypervisorArg) -> Self {
        match argument {
            HypervisorArg::Auto => Self::Auto,
            HypervisorArg::Qemu => Self::Qemu,
            HypervisorArg::Kvm => Self::Kvm,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum MachineArg {
    Microvm,
    Q35,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum RootModeArg {
    Ro,
    Overlay,
    Rw,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ShareViaArg {
    Auto,
    Virtiofs,
    #[value(name = "9p")]
    NineP,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum NetArg {
    None,
    User,
}

/// Reads the arguments and does what they say.
pub(crate) fn dispatch() -> Code {
    let parsed = match vmtest::is_called() {
        true => Vmtest::try_parse().map(|vmtest| Command::Vmtest(vmtest.args)),
        false => Cli::try_parse().map(|cli| cli.command),
    };
    let command = match parsed {
        Ok(command) => command,
        Err(error) => {
            // A stream that is gone cannot be told.
            let _ = error.print();
            return if error.use_stderr() { Code::FAILED } else { Code::SUCCESS };
        }
    };
    let done = |result: anyhow::Result<()>| result.map(|()| Code::SUCCESS);
    let result = match command {
        Command::Run(args) => request::of_run(args).and_then(|request| run::run(&request)),
        Command::Runner(args) => runner::run(args),
        Command::Shell(args) => request::of_shell(args).and_then(|request| run::run(&request)),
        Command::Test(args) => test::run(&args),
        Command::Vmtest(args) => vmtest::run(args),
        Command::Report(ReportCommand::Merge(args)) => done(test::merge(&args)),
        Command::Report(ReportCommand::Tests(args)) => done(test::of_tests(&args)),
        Command::Kernel(command) => done(kernel::run(command)),
        Command::Image(command) => done(image::run(command)),
        Command::Module(command) => module::run(&command),
        Command::Disk(command) => disk::run(command),
        Command::Cache(command) => cache::run(command),
        Command::Doctor { json } => doctor::run(json),
        Command::Completions { shell } => done(generate::completions(&mut Cli::command(), shell)),
        Command::Man { dir } => done(generate::man(Cli::command(), &dir)),
    };
    result.unwrap_or_else(|error| {
        output::error(&error);
        error.downcast_ref::<vmlab::Error>().map_or(Code::FAILED, Code::of_error)
    })
}
