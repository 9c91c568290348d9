//! From arguments as they are written to a request that makes sense.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use vmlab::config::{Machine, NetworkMode, ShareTransport, Topology};
use vmlab::targets::{Firmware, Target};
use vmlab::units::{Bytes, duration};
use vmlab::{
    AccelChoice, Disk, Environment, GuestUser, Image, RootMode, Share, ShareVia, SnapshotMode, Vm,
    VmBuilder,
};

use crate::cli::{
    AccelArg, MachineArg, NetArg, RepeatArgs, RootModeArg, RunArgs, ShareViaArg, ShellArgs, VmArgs,
};

/// A command to be run under one or more kernels.
#[derive(Debug)]
pub(crate) struct Request {
    /// `None` is the default kernel.
    pub(crate) kernels: Vec<Option<String>>,
    pub(crate) vm: VmBuilder,
    pub(crate) command: Vec<OsString>,
    pub(crate) terminal: bool,
    pub(crate) repeat: Option<Repeat>,
    pub(crate) verbosity: Verbosity,
    pub(crate) json: Option<PathBuf>,
    pub(crate) timings: Option<Timings>,
    pub(crate) dry_run: bool,
}

/// A command that is run many times.
#[derive(Debug)]
pub(crate) struct Repeat {
    /// How often; `None` is until it fails.
    pub(crate) count: Option<u64>,
    pub(crate) until_failure: bool,
    /// VMs at the same time.
    pub(crate) jobs: Option<usize>,
    /// What they may need at the same time.
    pub(crate) memory_budget: Option<Bytes>,
}

/// Where the times of runs are shown, beside stderr.
#[derive(Debug)]
pub(crate) struct Timings {
    pub(crate) svg: Option<PathBuf>,
}

/// How much vmlab says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verbosity {
    Quiet,
    Normal,
    Verbose,
}

pub(crate) fn of_run(args: RunArgs) -> Result<Request> {
    let terminal = args.tty;
    if terminal && !rustix::termios::isatty(std::io::stdin()) {
        bail!("-t needs a terminal on standard input; without -t, any input will do");
    }
    let repeat = repeat(&args.repeat)?;
    if args.vm.kernel.len() > 1 && repeat.as_ref().is_some_and(|repeat| repeat.count.is_none()) {
        bail!(
            "--until-failure with several kernels needs --repeat: under one where nothing fails, it \
             would go on for ever"
        );
    }
    request(args.vm, args.command, terminal, repeat)
}

/// A program that Cargo has run.
pub(crate) fn of_program(vm: VmArgs, program: &Path, command: Vec<OsString>) -> Result<Request> {
    let mut request = request(vm, command, false, None)?;
    request.vm = request.vm.program(program);
    Ok(request)
}

fn repeat(args: &RepeatArgs) -> Result<Option<Repeat>> {
    if args.repeat.is_none() && !args.until_failure {
        return Ok(None);
    }
    let memory_budget = args.memory_budget.as_deref().map(str::parse::<Bytes>).transpose();
    Ok(Some(Repeat {
        count: args.repeat,
        until_failure: args.until_failure,
        jobs: args.jobs.map(usize::from),
        memory_budget: memory_budget.context("--memory-budget")?,
    }))
}

pub(crate) fn of_shell(args: ShellArgs) -> Result<Request> {
    let shell = match args.vm.image {
        // What it has is not known before it runs.
        Some(_) => "/bin/sh".into(),
        None => shell_of(&args.vm.rootfs, std::env::var_os("SHELL")),
    };
    // Without a terminal the shell reads commands from its input, as any shell does.
    let terminal = rustix::termios::isatty(std::io::stdin());
    request(args.vm, vec![shell], terminal, None)
}

/// A shell in the VM of a target whose command is one.
pub(crate) fn of_shell_target(target: &Target, snapshots: SnapshotMode) -> Result<Request> {
    let environment = Environment::of_caller().context("the working directory cannot be found")?;
    let mut vm = target.vm_builder(&environment, &[])?.snapshots(snapshots);
    if let Some(timeout) = target.verdict.timeout {
        vm = vm.timeout(timeout);
    }
    Ok(Request {
        kernels: vec![None],
        vm,
        command: target.run.shell_words(),
        terminal: rustix::termios::isatty(std::io::stdin()),
        repeat: None,
        verbosity: Verbosity::Quiet,
        json: None,
        timings: None,
        dry_run: false,
    })
}

/// The user's shell where the guest's root has it, else what every root has.
fn shell_of(root: &Path, wanted: Option<OsString>) -> OsString {
    let candidates = wanted.into_iter().chain(["/bin/bash".into(), "/bin/sh".into()]);
    let in_root = |shell: &OsString| {
        let below = shell.as_bytes().strip_prefix(b"/");
        below.is_some_and(|path| root.join(OsStr::from_bytes(path)).exists())
    };
    candidates.into_iter().find(in_root).unwrap_or_else(|| "/bin/sh".into())
}

fn request(
    args: VmArgs,
    command: Vec<OsString>,
    terminal: bool,
    repeat: Option<Repeat>,
) -> Result<Request> {
    if args.keep.is_some() && (args.kernel.len() > 1 || repeat.is_some()) {
        bail!("--keep is for one VM: the copies of several would have the same names");
    }
    let at_once = repeat.as_ref().is_some_and(|repeat| repeat.jobs != Some(1));
    if args.vsock.is_some() && at_once {
        bail!(
            "--vsock is for one VM at a time: --repeat and --until-failure need --jobs 1 with it"
        );
    }
    let kernels = match args.kernel.is_empty() {
        true => vec![None],
        false => args.kernel.iter().cloned().map(Some).collect(),
    };
    let verbosity = match (args.quiet, args.verbose) {
        (true, _) => Verbosity::Quiet,
        (_, true) => Verbosity::Verbose,
        _ => Verbosity::Normal,
    };
    let (json, dry_run) = (args.json.clone(), args.dry_run);
    let timings = args.timings.clone().map(|svg| Timings { svg });
    let vm = builder(args)?;
    Ok(Request { kernels, vm, command, terminal, repeat, verbosity, json, timings, dry_run })
}

/// VMs for a command that has each of them to itself, one after the other.
pub(crate) fn builder_for_each(args: VmArgs) -> Result<VmBuilder> {
    if args.kernel.len() > 1 {
        bail!("only one --kernel can be given here");
    }
    let kernel = args.kernel.first().cloned();
    let vm = builder(args)?;
    Ok(match kernel {
        Some(kernel) => vm.kernel(kernel),
        None => vm,
    })
}

fn builder(args: VmArgs) -> Result<VmBuilder> {
    let mut vm = Vm::builder()
        .memory(args.memory.parse::<Bytes>().context("--memory")?)
        .accel(match args.accel {
            AccelArg::Auto => AccelChoice::Auto,
            AccelArg::Kvm => AccelChoice::Kvm,
            AccelArg::Tcg => AccelChoice::Tcg,
        })
        .rootfs(&args.rootfs)
        .network(match args.net {
            NetArg::None => NetworkMode::None,
            NetArg::User => NetworkMode::User,
        })
        .share_via(match args.share_via {
            ShareViaArg::Auto => ShareVia::Auto,
            ShareViaArg::Virtiofs => ShareVia::Only(ShareTransport::VirtioFs),
            ShareViaArg::NineP => ShareVia::Only(ShareTransport::NineP),
        })
        .sandbox(!args.no_sandbox)
        .snapshots(args.snapshots.mode())
        .share_cwd(!args.no_cwd)
        .full_console(args.verbose)
        .fast(args.fast);
    if let Some(mode) = args.root_mode {
        vm = vm.root_mode(match mode {
            RootModeArg::Ro => RootMode::ReadOnly,
            RootModeArg::Overlay => RootMode::Overlay,
            RootModeArg::Rw => RootMode::ReadWrite,
        });
    }
    if let Some(limit) = &args.boot_timeout {
        vm = vm.boot_timeout(duration(limit).context("--boot-timeout")?);
    }
    vm = match (args.cpus.as_deref(), args.topology.as_deref()) {
        (Some("host"), _) => {
            let cpus = std::thread::available_parallelism().context("--cpus host")?;
            vm.cpus(cpus.get().try_into().unwrap_or(u32::MAX))
        }
        (Some(cpus), _) => {
            vm.cpus(cpus.parse().with_context(|| format!("--cpus: `{cpus}` is not a number"))?)
        }
        (None, Some(topology)) => vm.topology(topology.parse::<Topology>().context("--topology")?),
        (None, None) => vm,
    };
    if let Some(hypervisor) = args.hypervisor {
        vm = vm.hypervisor_choice(hypervisor.into());
    }
    if let Some(machine) = args.machine {
        vm = vm.machine(match machine {
            MachineArg::Microvm => Machine::Microvm,
            MachineArg::Q35 => Machine::Q35,
        });
    }
    if let Some(name) = args.hostname {
        vm = vm.hostname(name);
    }
    for share in &args.share {
        vm = vm.share(share.parse::<Share>().context("--share")?);
    }
    for disk in &args.disk {
        vm = vm.disk(disk.parse::<Disk>().context("--disk")?);
    }
    if let Some(dir) = args.keep {
        vm = vm.keep_disks(std::path::absolute(dir).context("--keep")?);
    }
    if let Some(dir) = args.vsock {
        vm = vm.vsock(dir);
    }
    vm = vm.rng(args.rng);
    for arguments in args.append {
        vm = vm.append(arguments);
    }
    for argument in args.qemu_arg {
        vm = vm.qemu_arg(argument);
    }
    for module in &args.module {
        vm = vm.module(module.split_whitespace());
    }
    if let Some(timeout) = &args.timeout {
        vm = vm.timeout(duration(timeout).context("--timeout")?);
    }
    let no_cwd = "the working directory cannot be found";
    let Some(image) = args.image else {
        let mut environment = Environment::of_caller().context(no_cwd)?;
        environment.user = GuestUser::of(&args.user, &args.rootfs).context("--user")?;
        return Ok(vm.environment(with_variables(environment, &args.env)?));
    };
    let mut image = Image::new(image).persist(args.persist);
    if args.uefi || args.secure_boot {
        image = image.firmware(Firmware::Uefi { secure_boot: args.secure_boot });
    }
    if let Some(file) = args.bios {
        image = image.firmware_file(file);
    }
    let environment = with_variables(Environment::of_system().context(no_cwd)?, &args.env)?;
    Ok(vm.image(image).user_of_guest(args.user).environment(environment))
}

/// With those that the user gives.
fn with_variables(mut environment: Environment, variables: &[OsString]) -> Result<Environment> {
    for variable in variables {
        let bytes = variable.as_bytes();
        let Some(equals) = bytes.iter().position(|b| *b == b'=').filter(|at| *at > 0) else {
            bail!("--env: `{}` is not NAME=VALUE", variable.display());
        };
        environment
            .set(OsStr::from_bytes(&bytes[..equals]), OsStr::from_bytes(&bytes[equals + 1..]));
    }
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_replace_inherited_ones() {
        let set = ["PATH=/x".into(), "A=b=c".into(), "EMPTY=".into()];
        let caller = Environment::of_caller().unwrap();
        let environment = with_variables(caller.clone(), &set).unwrap();
        let values = |name: &str| {
            let found = environment.vars.iter().filter(|(n, _)| n == name);
            found.map(|(_, v)| v.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(values("PATH"), ["/x"]);
        assert_eq!(values("A"), ["b=c"]);
        assert_eq!(values("EMPTY"), [""]);
        assert!(with_variables(caller.clone(), &["=x".into()]).is_err());
        assert!(with_variables(caller, &["x".into()]).is_err());
    }

    #[test]
    fn the_shell_is_one_that_the_root_has() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("bin")).unwrap();
        std::fs::write(root.path().join("bin/sh"), "").unwrap();
        assert_eq!(shell_of(root.path(), Some("/bin/zsh".into())), "/bin/sh");
        std::fs::write(root.path().join("bin/zsh"), "").unwrap();
        assert_eq!(shell_of(root.path(), Some("/bin/zsh".into())), "/bin/zsh");
    }
}
