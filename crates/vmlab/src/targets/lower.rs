//! From a table as it is written to a target that makes sense.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use vmlab_artifacts::image_build::ImageRecipe;
use vmlab_artifacts::{Arch, KernelSpec, nearest};

use super::document::{At, Node, Span, Value};
use super::problem::Problems;
use super::spelling;
use super::table::{DiskItem, DiskTable, Field, ShareItem, ShareTable, TargetTable};
use super::value::{CommandText, FromNode, Strings};
use super::{
    FileKind, Firmware, ImageSpec, RunSpec, System, Target, TargetCommand, VerdictSpec, VmSpec,
};
use crate::config::{ConfigError, Topology, is_serial};
use crate::disk::{Given, Serving};
use crate::events::default_kinds;
use crate::share::{KERNELS_OWN, Share};
use crate::units::{Bytes, MIB};
use crate::{AccelChoice, Disk, RootMode, ShareVia};

/// Where vmtest's guests have the directory of the file.
const VMTEST_DIR: &str = "/mnt/vmtest";

/// What `ro` among a kernel's arguments is to a guest's root with a layer over it.
const MAKE_READ_ONLY: &str = "mount -o remount,ro /";

/// What vmtest's guests have unless the file says otherwise.
const VMTEST_CPUS: u32 = 2;
const VMTEST_MEMORY: Bytes = Bytes(4096 * MIB);

/// The command that means a shell on the caller's terminal.
const SHELL: &str = "-";

/// What all targets of a file have in common.
pub(super) struct Context<'a> {
    pub(super) dir: &'a Path,
    pub(super) kind: FileKind,
    pub(super) shares: &'a BTreeMap<String, Share>,
    pub(super) disks: &'a BTreeMap<String, Disk>,
}

impl Context<'_> {
    /// A path as it is written in the file.
    fn path(&self, text: &str) -> PathBuf {
        path_in(self.dir, text)
    }
}

fn path_in(dir: &Path, text: &str) -> PathBuf {
    // Without the dots that `./x` would leave in the middle.
    dir.join(text).components().collect()
}

/// Makes a target of a table; `None` where something is wrong with it, which is in the problems then.
pub(super) fn target(
    node: &Node,
    context: &Context<'_>,
    problems: &mut Problems<'_>,
) -> Option<Target> {
    let table = TargetTable::from_node(node, problems)?;
    let mut lower = Lower { node: Some(node), table, context, problems, at: node.span.clone() };
    // Each part is looked at, so that all that is wrong is found.
    let name = lower.name();
    let cwd = lower.cwd();
    let system = lower.system();
    let shares = lower.shares();
    let disks = lower.disks();
    let command = lower.command();
    let topology = lower.topology();
    let arch = lower.arch();
    let (name, system, mut shares, command) = (name?, system?, shares?, command?);
    let (cwd, cwd_share) = cwd?;
    arch?;
    let disks = disks?;
    if let Some(share) = cwd_share
        && !shares.iter().any(|other| other.guest == share.guest)
    {
        shares.push(share);
    }
    let vm = lower.vm(topology, shares, disks);
    let run = lower.run(command, cwd, &vm.append);
    Some(Target {
        name,
        tags: strings(lower.table.tags.take()).into_iter().collect(),
        axes: Vec::new(),
        system,
        vm,
        run,
        verdict: lower.verdict(),
    })
}

/// Makes a share of a table in `[shares]`.
pub(super) fn named_share(
    table: ShareTable,
    at: &Span,
    dir: &Path,
    problems: &mut Problems<'_>,
) -> Option<Share> {
    let (shares, disks) = (&BTreeMap::new(), &BTreeMap::new());
    let context = Context { dir, kind: FileKind::Vmlab, shares, disks };
    let table_of_target = TargetTable::default();
    Lower { node: None, table: table_of_target, context: &context, problems, at: at.clone() }
        .share(At { value: table, span: at.clone() })
}

/// Makes a disk of a table in `[disks]`.
pub(super) fn named_disk(
    table: DiskTable,
    name: &At<String>,
    dir: &Path,
    problems: &mut Problems<'_>,
) -> Option<Disk> {
    if !is_serial(&name.value) {
        let error = ConfigError::Serial { serial: name.value.clone() };
        problems.add(&name.span, error.to_string());
        return None;
    }
    if let Some(own) = &table.name {
        problems.add(&own.key, "the name of its table is the disk's own");
        return None;
    }
    let name_of = |disk: Disk| disk.named(&name.value);
    disk(table, &name.span, dir, problems).map(name_of)
}

/// Makes a disk of a table. What is wrong is where it says something, else at `at`.
fn disk(table: DiskTable, at: &Span, dir: &Path, problems: &mut Problems<'_>) -> Option<Disk> {
    if let (Some(path), Some(image)) = (&table.path, &table.image) {
        spelling::twice(&path.key, &image.key, problems);
        return None;
    }
    let paths = [&table.path, &table.image, &table.content, &table.keep, &table.record];
    if let Some(empty) = paths.into_iter().flatten().find(|path| path.value.is_empty()) {
        problems.add(&empty.span, "the path of a disk cannot be empty");
        return None;
    }
    let path_of = |field| value(field).map(|text: String| path_in(dir, &text));
    let given = Given {
        size: value(table.size),
        fs: value(table.fs),
        name: value(table.name),
        label: value(table.label),
        uuid: value(table.uuid),
        mount: value(table.mount),
        mount_options: strings(table.mount_options),
        mkfs_options: strings(table.mkfs_options),
        content: path_of(table.content),
        image: path_of(table.path.or(table.image)),
        mode: table.mode.map(|mode| mode.value.0),
        clone: value(table.clone),
        keep: path_of(table.keep),
        read_only: value(table.read_only).unwrap_or_default(),
        serving: Serving {
            own: value(table.serve).unwrap_or_default(),
            throttle: value(table.throttle),
            faults: strings(table.fault),
            record: path_of(table.record),
            block_size: value(table.block_size),
            queues: value(table.queues),
        },
    };
    given.disk().map_err(|why| problems.add(at, format!("this is no disk: {why}"))).ok()
}

struct Lower<'a, 'c, 't> {
    /// The target as it is written.
    node: Option<&'a Node>,
    table: TargetTable,
    context: &'a Context<'c>,
    problems: &'a mut Problems<'t>,
    /// Where the target begins.
    at: Span,
}

fn value<T>(field: Option<Field<T>>) -> Option<T> {
    field.map(|field| field.value)
}

fn strings(field: Option<Field<Strings>>) -> Vec<String> {
    value(field).map(Strings::into_strings).unwrap_or_default()
}

/// The words of strings that each may have several.
fn words(field: Option<Field<Strings>>) -> Vec<String> {
    let strings = strings(field);
    strings.iter().flat_map(|text| text.split_whitespace()).map(str::to_owned).collect()
}

impl Lower<'_, '_, '_> {
    fn wrong<T>(&mut self, span: &Span, message: impl Into<String>) -> Option<T> {
        self.problems.add(span, message);
        None
    }

    fn is_vmtest(&self) -> bool {
        self.context.kind == FileKind::Vmtest
    }

    /// Says that the target lacks something, unless it has it, but it could not be read.
    fn lacks<T>(&mut self, keys: &[&str], message: &str) -> Option<T> {
        let at = self.at.clone();
        match self.node {
            Some(Node { value: Value::Table(table), .. })
                if keys.iter().any(|key| table.has(key)) =>
            {
                None
            }
            _ => self.wrong(&at, message),
        }
    }

    fn name(&mut self) -> Option<String> {
        let Some(name) = self.table.name.take() else {
            return self.lacks(&["name"], "this target has no `name`");
        };
        if name.value.is_empty() {
            return self.wrong(&name.span, "a name cannot be empty");
        }
        if name.value.contains(|c: char| c.is_control()) {
            return self.wrong(&name.span, "a name cannot have control characters in it");
        }
        Some(name.value)
    }

    fn system(&mut self) -> Option<System> {
        let kernel = self.table.kernel.take();
        let image = self.table.image.take();
        for field in [&kernel, &image].into_iter().flatten() {
            if field.value.is_empty() {
                let key = self.problems.written(&field.key);
                self.problems.add(&field.span, format!("`{key}` cannot be empty"));
                return None;
            }
        }
        if self.is_vmtest() {
            match (&kernel, &image) {
                (Some(_), Some(image)) => {
                    let key = image.key.clone();
                    return self.wrong(
                        &key,
                        "a target has either `kernel` or `image` (in vmlab.toml, both start the \
                         image with that kernel)",
                    );
                }
                (None, None) => {
                    let message = "this target has neither `kernel` nor `image`";
                    return self.lacks(&["kernel", "image"], message);
                }
                _ => {}
            }
        }
        let found = self.check_keys(kernel.is_some(), image.is_some());
        let spec = match &kernel {
            Some(kernel) => Some(self.kernel(kernel)?),
            None => None,
        };
        found?;
        Some(match image {
            Some(image) => System::Image(ImageSpec {
                path: match ImageRecipe::is_meant(&image.value) {
                    true => PathBuf::from(&image.value),
                    false => self.context.path(&image.value),
                },
                firmware: match value(self.table.uefi.take()) {
                    Some(true) => Firmware::Uefi {
                        secure_boot: value(self.table.secure_boot.take()).unwrap_or_default(),
                    },
                    _ => Firmware::Bios,
                },
                firmware_file: value(self.table.bios.take()).map(|path| self.context.path(&path)),
                kernel: spec,
                persist: value(self.table.persist.take()).unwrap_or_default(),
            }),
            None => System::Kernel {
                spec,
                rootfs: match value(self.table.rootfs.take()) {
                    Some(path) => self.context.path(&path),
                    None => PathBuf::from("/"),
                },
                root_mode: self.root_mode(),
            },
        })
    }

    /// Refuses keys that say nothing of what the target starts.
    fn check_keys(&mut self, kernel: bool, image: bool) -> Option<()> {
        let table = &self.table;
        fn key<T>(field: &Option<Field<T>>) -> Option<Span> {
            field.as_ref().map(|field| field.key.clone())
        }
        fn truth(field: &Option<Field<bool>>) -> Option<Span> {
            field.as_ref().filter(|field| field.value).map(|field| field.key.clone())
        }
        let mut wrong: Vec<(Option<Span>, &str)> = Vec::new();
        if image {
            let why = "is of targets that start a kernel over a directory; this one has `image`";
            wrong.push((key(&table.rootfs), why));
            wrong.push((key(&table.root_mode), why));
        } else {
            let why = "needs `image`";
            wrong.push((truth(&table.uefi), why));
            wrong.push((truth(&table.secure_boot), why));
            wrong.push((key(&table.bios), why));
            wrong.push((truth(&table.persist), why));
        }
        if image && !kernel {
            let why = "needs `kernel`: an image's own boot loader says what its kernel is told";
            wrong.push((key(&table.append), why));
            wrong.push((truth(&table.fast), why));
        }
        if image && !table.uefi.as_ref().is_some_and(|uefi| uefi.value) {
            let why = "needs `uefi = true`";
            wrong.push((truth(&table.secure_boot), why));
            wrong.push((key(&table.bios), why));
        }
        if image && kernel {
            let why = "says how an image starts its own kernel; this target has `kernel`";
            wrong.push((truth(&table.uefi), why));
            wrong.push((truth(&table.secure_boot), why));
            wrong.push((key(&table.bios), why));
        } else if truth(&table.secure_boot).is_some() {
            wrong.push((key(&table.bios), "is started without secure boot, which this target has"));
        }
        let mut found = Some(());
        for (key, why) in wrong {
            let Some(key) = key else { continue };
            let written = self.problems.written(&key);
            self.problems.add(&key, format!("`{written}` {why}"));
            found = None;
        }
        found
    }

    /// A kernel as `run -k` has it, with a path that does not depend on where vmlab is run.
    fn kernel(&mut self, kernel: &Field<String>) -> Option<String> {
        let text = kernel.value.as_str();
        let below = self.context.path(text);
        let looks_like_path = text.contains('/') || text.starts_with('.') || text.ends_with(".deb");
        let beside = text != "host" && below.exists();
        if !(self.is_vmtest() || looks_like_path || beside) {
            return match text.parse() {
                Ok(KernelSpec::Path(_)) => {
                    self.wrong(&kernel.span, format!("there is no {}", below.display()))
                }
                Ok(_) => Some(text.to_owned()),
                Err(error) => self.wrong(&kernel.span, error.to_string()),
            };
        }
        match below.into_os_string().into_string() {
            Ok(path) => Some(path),
            Err(path) => {
                let message = format!("the path {} is not UTF-8", path.display());
                self.wrong(&kernel.span, message)
            }
        }
    }

    fn root_mode(&mut self) -> RootMode {
        // What is shared needs places in it, so vmtest's is made read-only once it is set up.
        self.table.root_mode.take().map_or(RootMode::Overlay, |mode| mode.value.0)
    }

    /// What comes before the command. In a `vmtest.toml`, the kernel is to mount the root, and the last of
    /// these words counts.
    fn setup(&mut self, append: &[String]) -> Vec<String> {
        let mode = append.iter().rfind(|word| ["ro", "rw"].contains(&word.as_str()));
        match mode {
            Some(mode) if mode == "ro" && self.is_vmtest() => vec![MAKE_READ_ONLY.to_owned()],
            _ => strings(self.table.setup.take()),
        }
    }

    fn shares(&mut self) -> Option<Vec<Share>> {
        let mut found: Vec<(Option<Share>, Span)> = Vec::new();
        if self.is_vmtest() {
            let dir = Share::new(self.context.dir).at(VMTEST_DIR);
            found.push((Some(dir), self.at.clone()));
        }
        for item in value(self.table.shares.take()).map(|shares| shares.0).unwrap_or_default() {
            found.push(match item {
                ShareItem::Name(name) => (self.share_named(&name), name.span),
                ShareItem::Table(table) => {
                    let span = table.span.clone();
                    (self.share(table), span)
                }
            });
        }
        let mounts = value(self.table.vm.take()).and_then(|vm| vm.mounts);
        for (guest, mount) in value(mounts).map(|mounts| mounts.0).unwrap_or_default() {
            let span = guest.span;
            let guest = Field { value: guest.value, key: span.clone(), span: span.clone() };
            let (host, writable) = (mount.host_path, mount.writable);
            let table = ShareTable { host, guest: Some(guest), writable };
            found.push((self.share(At { value: table, span: span.clone() }), span));
        }
        let mut shares: Vec<Share> = Vec::new();
        let mut all = Some(());
        for (share, span) in found {
            match share {
                Some(share) if shares.iter().any(|other| other.guest == share.guest) => {
                    let place = share.guest.display();
                    all = self.wrong(&span, format!("another share has {place} in the guest"));
                }
                Some(share) => shares.push(share),
                None => all = None,
            }
        }
        all.map(|()| shares)
    }

    fn share_named(&mut self, name: &At<String>) -> Option<Share> {
        if let Some(share) = self.context.shares.get(&name.value) {
            return Some(share.clone());
        }
        let known: Vec<&str> = self.context.shares.keys().map(String::as_str).collect();
        let hint = match nearest(&name.value, &known) {
            Some(near) => format!(": did you mean `{near}`?"),
            None => "; a directory without a name is a table such as { host = \".\" }".to_owned(),
        };
        self.wrong(&name.span, format!("[shares] has no `{}`{hint}", name.value))
    }

    fn disks(&mut self) -> Option<Vec<Disk>> {
        let items = value(self.table.disks.take()).map(|disks| disks.0).unwrap_or_default();
        let mut disks: Vec<Disk> = Vec::new();
        let mut all = Some(());
        for item in items {
            let name = match item {
                DiskItem::Name(name) => name,
                DiskItem::Table(table) => {
                    match disk(*table.value, &table.span, self.context.dir, self.problems) {
                        Some(disk) => disks.push(disk),
                        None => all = None,
                    }
                    continue;
                }
            };
            match self.context.disks.get(&name.value) {
                Some(disk) if disks.contains(disk) => {
                    all = self.wrong(&name.span, format!("`{}` is there twice", name.value));
                }
                Some(disk) => disks.push(disk.clone()),
                None => {
                    let known: Vec<&str> = self.context.disks.keys().map(String::as_str).collect();
                    let near = nearest(&name.value, &known);
                    let hint = near.map(|near| format!(": did you mean `{near}`?"));
                    let hint = hint.unwrap_or_default();
                    all = self.wrong(&name.span, format!("[disks] has no `{}`{hint}", name.value));
                }
            }
        }
        all.map(|()| disks)
    }

    fn share(&mut self, table: At<ShareTable>) -> Option<Share> {
        let ShareTable { host, guest, writable } = table.value;
        let Some(host) = host else {
            let key = if self.is_vmtest() { "host_path" } else { "host" };
            return self.wrong(&table.span, format!("this share has no `{key}`"));
        };
        if host.value.is_empty() {
            return self.wrong(&host.span, "the host's directory cannot be empty");
        }
        let read_only = !value(writable).unwrap_or_default();
        let host = self.context.path(&host.value);
        let guest = match guest {
            Some(guest) => {
                let path = PathBuf::from(&guest.value);
                match wrong_place(&path) {
                    Some(why) => return self.wrong(&guest.span, why),
                    None => path,
                }
            }
            None => place_of(&host),
        };
        Some(Share { host, guest, read_only })
    }

    fn command(&mut self) -> Option<TargetCommand> {
        let Some(command) = self.table.command.take() else {
            return self.lacks(&["command"], "this target has no `command`");
        };
        match command.value {
            CommandText::Script(text) if text.is_empty() => {
                self.wrong(&command.span, "a command cannot be empty")
            }
            CommandText::Script(text) if text == SHELL => Some(TargetCommand::Shell),
            CommandText::Script(text) => Some(TargetCommand::Script(text)),
            CommandText::Program(_) if self.is_vmtest() => {
                self.wrong(&command.span, "expected a string, found an array")
            }
            CommandText::Program(words) if words.first().is_none_or(String::is_empty) => {
                self.wrong(&command.span, "a command cannot be empty")
            }
            CommandText::Program(words) => {
                Some(TargetCommand::Program(words.into_iter().map(Into::into).collect()))
            }
        }
    }

    fn arch(&mut self) -> Option<()> {
        let Some(arch) = self.table.arch.take() else { return Some(()) };
        let ours = Arch::X86_64.to_string();
        if arch.value == ours {
            return Some(());
        }
        let message =
            format!("there are no guests of the architecture `{}`, only {ours}", arch.value);
        self.wrong(&arch.span, message)
    }

    fn topology(&mut self) -> Option<Topology> {
        match (self.table.cpus.take(), self.table.topology.take()) {
            (Some(_), Some(topology)) => {
                self.wrong(&topology.key, "a target has either `cpus` or `topology`")
            }
            (Some(cpus), None) => Some(Topology::flat(cpus.value.0)),
            (None, Some(topology)) => Some(topology.value),
            (None, None) => self.is_vmtest().then_some(Topology::flat(VMTEST_CPUS)),
        }
    }

    /// The working directory, and what has to be shared for it.
    fn cwd(&mut self) -> Option<(Option<PathBuf>, Option<Share>)> {
        if self.is_vmtest() {
            let images = self.table.image.is_some();
            let other_root = self.table.rootfs.as_ref().is_some_and(|root| root.value != "/");
            return Some(match images || other_root {
                true => (Some(PathBuf::from("/")), None),
                false => self.cwd_of_host(self.context.dir.to_owned()),
            });
        }
        let Some(cwd) = self.table.cwd.take() else { return Some((None, None)) };
        if cwd.value.is_empty() {
            return self.wrong(&cwd.span, "a working directory cannot be empty");
        }
        let path = PathBuf::from(&cwd.value);
        Some(match path.is_absolute() {
            true => (Some(path), None),
            false => self.cwd_of_host(self.context.path(&cwd.value)),
        })
    }

    /// A directory of the host as the working directory. What cannot be a share is in the root.
    fn cwd_of_host(&self, dir: PathBuf) -> (Option<PathBuf>, Option<Share>) {
        let place = place_of(&dir);
        let share = wrong_place(&place).is_none().then(|| Share::new(dir).at(&place));
        (Some(place), share)
    }

    fn vm(&mut self, topology: Option<Topology>, shares: Vec<Share>, disks: Vec<Disk>) -> VmSpec {
        let table = &mut self.table;
        let vmtest = self.context.kind == FileKind::Vmtest;
        VmSpec {
            memory: value(table.memory.take()).or(vmtest.then_some(VMTEST_MEMORY)),
            topology,
            machine: value(table.machine.take()).map(|word| word.0),
            hypervisor: value(table.hypervisor.take()).map(|word| word.0),
            accel: value(table.accel.take()).map_or(AccelChoice::Auto, |word| word.0),
            kvm_cpu: value(table.kvm_cpu_args.take()),
            fast: value(table.fast.take()).unwrap_or_default(),
            network: value(table.net.take()).map(|word| word.0).unwrap_or_default(),
            vsock: value(table.vsock.take()).map(|text| self.context.path(&text)),
            rng: value(table.rng.take()).unwrap_or_default(),
            hostname: value(table.hostname.take()),
            append: words(table.append.take()),
            modules: strings(table.modules.take()),
            shares,
            disks,
            share_via: value(table.share_via.take()).map_or(ShareVia::Auto, |word| word.0),
            qemu_args: strings(table.qemu_args.take()),
            qemu: value(table.qemu_command.take()).map(|text| match text.contains('/') {
                true => self.context.path(&text),
                // To be looked for in `PATH`.
                false => PathBuf::from(text),
            }),
            boot_timeout: value(table.boot_timeout.take()).map(|time| time.0),
        }
    }

    fn run(&mut self, command: TargetCommand, cwd: Option<PathBuf>, append: &[String]) -> RunSpec {
        let setup = self.setup(append);
        let table = &mut self.table;
        RunSpec {
            command,
            cwd,
            module: None,
            env: value(table.env.take()).map(|env| env.0).unwrap_or_default(),
            user: value(table.user.take()).unwrap_or_else(|| "root".to_owned()),
            setup,
            teardown: strings(table.teardown.take()),
            keep_on_failure: strings(table.keep_on_failure.take()),
        }
    }

    fn verdict(&mut self) -> VerdictSpec {
        let fail_on = value(self.table.fail_on.take());
        VerdictSpec {
            timeout: value(self.table.timeout.take()).map(|time| time.0),
            retries: value(self.table.retries.take()).unwrap_or_default(),
            should_fail: value(self.table.should_fail.take()).unwrap_or_default(),
            fail_on: fail_on.map_or_else(default_kinds, |kinds| kinds.0),
            expect: value(self.table.expect.take()),
        }
    }
}

/// Where the guest has a directory of the host unless it is said otherwise: at its own path, without `..`,
/// which in the guest might lead elsewhere.
fn place_of(host: &Path) -> PathBuf {
    let mut place = PathBuf::new();
    for part in host.components() {
        match part {
            Component::ParentDir => {
                place.pop();
            }
            part => place.push(part),
        }
    }
    place
}

/// Why a share cannot be at a place of the guest.
fn wrong_place(guest: &Path) -> Option<String> {
    let shown = guest.display();
    if !guest.is_absolute() || guest.components().any(|part| part.as_os_str() == "..") {
        return Some(format!("the guest's path {shown} is not absolute, or has `..` in it"));
    }
    if guest == Path::new("/") {
        return Some("the guest's root is not a share; see `rootfs`".to_owned());
    }
    let own = KERNELS_OWN.iter().find(|own| guest.starts_with(own));
    own.map(|own| format!("the guest's {own} is its own kernel's"))
}
