//! From a target to the VM and the command that it describes.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{RunSpec, System, Target, TargetCommand};
use crate::hypervisor::qemu::Qemu;
use crate::{Environment, Error, GuestUser, Image, Vm, VmBuilder};

/// The shell of scripts, as vmtest has it.
const SHELL: &str = "bash";

/// Has a shell, with scripts before and after it; the first argument is how many are before.
const SHELL_BETWEEN: &str = r#"before=$1; shift
for ((; before > 0; before--)); do bash -c "$1" || exit; shift; done
bash; code=$?
for script; do bash -c "$script"; done
exit "$code""#;

/// A script as a command.
pub(crate) fn script_words(script: &str) -> Vec<OsString> {
    vec![SHELL.into(), "-c".into(), script.into()]
}

impl RunSpec {
    /// The command as a program and its arguments, without the scripts before and after it.
    pub(crate) fn words(&self) -> Vec<OsString> {
        match &self.command {
            TargetCommand::Script(script) => script_words(script),
            TargetCommand::Program(words) => words.clone(),
            TargetCommand::Shell => vec![SHELL.into()],
            TargetCommand::Nothing => Vec::new(),
        }
    }

    /// A shell in the place of the command, between the scripts before and after it, as a program and its
    /// arguments.
    pub fn shell_words(&self) -> Vec<OsString> {
        if self.setup.is_empty() && self.teardown.is_empty() {
            return vec![SHELL.into()];
        }
        let mut words = script_words(SHELL_BETWEEN);
        words.extend([SHELL.into(), self.setup.len().to_string().into()]);
        words.extend(self.setup.iter().chain(&self.teardown).map(Into::into));
        words
    }
}

impl Target {
    /// The VM that the target describes, for commands that inherit `of_caller`, beside what the target says,
    /// and `own` variables.
    ///
    /// # Errors
    /// When its user is unknown.
    pub fn vm_builder(
        &self,
        of_caller: &Environment,
        own: &[(&str, &str)],
    ) -> Result<VmBuilder, Error> {
        let Target { system, vm: spec, run, .. } = self;
        let (kernel, vm) = match system {
            System::Kernel { spec, rootfs, root_mode } => {
                (spec, Vm::builder().rootfs(rootfs).root_mode(*root_mode))
            }
            System::Image(image) => {
                (&image.kernel, Vm::builder().image(Image::of(image)).user_of_guest(&run.user))
            }
        };
        let mut vm =
            vm.accel(spec.accel).fast(spec.fast).network(spec.network).share_via(spec.share_via);
        if let Some(choice) = spec.hypervisor {
            vm = vm.hypervisor_choice(choice);
        }
        if let Some(cpu) = &spec.kvm_cpu {
            vm = vm.kvm_cpu(cpu);
        }
        if let Some(kernel) = kernel {
            vm = vm.kernel(kernel);
        }
        if let Some(memory) = spec.memory {
            vm = vm.memory(memory);
        }
        if let Some(topology) = spec.topology {
            vm = vm.topology(topology);
        }
        if let Some(machine) = spec.machine {
            vm = vm.machine(machine);
        }
        if let Some(hostname) = &spec.hostname {
            vm = vm.hostname(hostname);
        }
        if let Some(dir) = &spec.vsock {
            vm = vm.vsock(dir);
        }
        vm = vm.rng(spec.rng);
        if let Some(limit) = spec.boot_timeout {
            vm = vm.boot_timeout(limit);
        }
        if let Some(qemu) = &spec.qemu {
            vm = vm.hypervisor(Arc::new(Qemu::with_program(qemu)));
        }
        for share in &spec.shares {
            vm = vm.share(share.clone());
        }
        for disk in &spec.disks {
            vm = vm.disk(disk.clone());
        }
        for words in &spec.append {
            vm = vm.append(words);
        }
        for module in &spec.modules {
            vm = vm.module(module.split_whitespace());
        }
        for argument in &spec.qemu_args {
            vm = vm.qemu_arg(argument);
        }
        let of_caller = of_caller.clone();
        let mut environment = match system {
            System::Kernel { rootfs, .. } => {
                Environment { user: user(&run.user, rootfs)?, ..of_caller }
            }
            System::Image(_) => Environment::of_system_in(of_caller.cwd),
        };
        if let Some(cwd) = &run.cwd {
            environment.cwd = cwd.clone();
        }
        let given = run.env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in own.iter().copied().chain(given) {
            environment.set(name, value);
        }
        Ok(vm.environment(environment))
    }
}

fn user(name: &str, root: &Path) -> Result<GuestUser, Error> {
    GuestUser::of(name, root).map_err(|source| Error::Io {
        what: "find the user",
        path: PathBuf::from(name),
        source,
        hint: "",
    })
}
