//! From a kernel to what a VM boots: an image that starts fast, an initramfs that reaches the root,
//! and a command line.

mod findings;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::path::{Path, PathBuf};

use vmlab_artifacts::boot_image::{BootFormat, BootImage, BootImageError, Defect, pvh_entry};
use vmlab_artifacts::cache::{Flaw, Leases, Sources};
use vmlab_artifacts::features::{Lack, MissingOption, ModuleNames, missing};
use vmlab_artifacts::initramfs::{BootModule, build_initramfs};
use vmlab_artifacts::kconfig::{KernelConfig, Tristate};
use vmlab_artifacts::modules::{ModuleRef, ModuleTree};
use vmlab_artifacts::{
    Arch, Availability, Bound, Cache, CacheError, ContentKey, Digest, Feature, Features, Kernel,
    Kind, Progress,
};

use crate::Error;
use crate::config::{AgentChannel, ConfigError, KernelBoot, ShareTransport};
use crate::hypervisor::VirtioBus;
use crate::identity::of_this_program;
use crate::share::ShareVia;
use findings::Findings;

/// The agent for guests of this architecture, built with this library.
pub(crate) static AGENT: &[u8] = include_bytes!(env!("VMLAB_AGENT"));

/// The SHA-256 of it, in hexadecimal digits.
pub(crate) const AGENT_SHA256: &str = env!("VMLAB_AGENT_SHA256");

/// Kinds of cache entries.
const IMAGES: &str = "boot-images";
const INITRAMFS: &str = "initramfs";

/// How many entries of each kind are kept. An extracted kernel has 30 to 90 MiB, an initramfs has some.
const IMAGES_KEPT: usize = 8;
const INITRAMFS_KEPT: usize = 32;

/// The two, for whoever looks after the cache.
pub(crate) const KINDS: [Kind; 2] = [
    Kind {
        name: IMAGES,
        bound: Bound::Entries(IMAGES_KEPT),
        verify: |entry| verify_image(entry).and_then(|()| verify_digest(entry, IMAGE_FILE)),
    },
    Kind {
        name: INITRAMFS,
        bound: Bound::Entries(INITRAMFS_KEPT),
        verify: |entry| {
            verify_length(entry, INITRAMFS_FILE)?;
            verify_digest(entry, INITRAMFS_FILE)
        },
    },
];

/// Files in cache entries.
const IMAGE_FILE: &str = "vmlinux";
const NO_PVH_FILE: &str = "no-pvh";
const INITRAMFS_FILE: &str = "initramfs.cpio";

/// What the root of a disk may be, where the kernel has it as a module.
const DISK_FILESYSTEMS: [&str; 6] = ["ext4", "xfs", "btrfs", "f2fs", "squashfs", "erofs"];

/// What a run needs of its kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Needs {
    /// Where its virtio devices are.
    pub(crate) bus: VirtioBus,
    /// Writes to the root go into memory.
    pub(crate) overlay: bool,
    /// There is a network interface.
    pub(crate) network: bool,
    /// There are streams to programs of the host.
    pub(crate) vsock: bool,
    /// There is a source of random numbers.
    pub(crate) rng: bool,
    /// How host directories are carried.
    pub(crate) share_via: ShareVia,
    /// There is a disk.
    pub(crate) disk: bool,
    /// There may be disks later.
    pub(crate) disk_later: bool,
    /// Its root is on a disk.
    pub(crate) disk_root: bool,
    /// The root cannot be written to and has no place for modules; an overlay can make one.
    pub(crate) modules_place: bool,
}

/// A kernel made ready to boot.
#[derive(Debug)]
pub(crate) struct PreparedKernel {
    pub(crate) boot: KernelBoot,
    pub(crate) channel: AgentChannel,
    pub(crate) transport: ShareTransport,
    /// It sees devices that are described by ACPI alone, and whose configuration is in memory alone.
    pub(crate) sees_ecam: bool,
}

/// Makes a kernel ready to boot. `arguments` are added to the command line.
pub(crate) fn prepare(
    cache: &Cache,
    kernel: &Kernel,
    needs: Needs,
    arguments: &[String],
    progress: &dyn Progress,
) -> Result<PreparedKernel, Error> {
    let image = BootImage::open_unversioned(&kernel.boot_image)?;
    if image.arch() != Arch::HOST {
        let path = kernel.boot_image.clone();
        return Err(
            ConfigError::ArchMismatch { path, kernel: image.arch(), host: Arch::HOST }.into()
        );
    }
    let direct = direct_image(cache, &image, &kernel.leases)?;
    let found = Findings::of(cache, kernel, needs, Some(&direct))?;
    if let Some(why) = found.silence.as_ref().filter(|_| image.arch() == Arch::X86_64) {
        progress.note(why);
    }
    for note in kernel.no_modules.iter().cloned().chain(other_release(kernel)) {
        progress.note(&note);
    }
    let modules = kernel.modules.as_deref();
    let modules = modules.filter(|_| needs.disk_root || !found.modules.is_empty());
    let modules = modules.map(|tree| (tree, found.modules.as_slice()));
    let Findings { channel, transport, sees_ecam, .. } = found;
    let boot = KernelBoot {
        image: direct,
        arch: image.arch(),
        initramfs: initramfs(cache, modules, needs.disk_root, &kernel.leases)?,
        command_line: command_line(channel, arguments),
    };
    Ok(PreparedKernel { boot, channel, transport, sees_ecam })
}

/// What to say of modules that a build has made for another release than the boot image's. Those of
/// before may still be there, and some kernels load any.
fn other_release(kernel: &Kernel) -> Option<String> {
    let built = kernel.modules.as_ref()?.file_name()?.to_str()?;
    let image = kernel.release.as_str();
    (!image.is_empty() && built != image).then(|| {
        format!(
            "the boot image is {image}, but the modules were last built as {built}, and may not load: \
             `make` builds both"
        )
    })
}

/// What every guest needs of a kernel whose configuration is known. None of these can be a module.
const BASE: [&str; 6] = [
    "CONFIG_BLK_DEV_INITRD",
    "CONFIG_BINFMT_ELF",
    "CONFIG_DEVTMPFS",
    "CONFIG_TMPFS",
    "CONFIG_PROC_FS",
    "CONFIG_SYSFS",
];

/// What it needs besides to look for virtio devices there at all.
const fn finds_bus(bus: VirtioBus) -> &'static [&'static str] {
    match (bus, Arch::HOST) {
        (VirtioBus::Pci, _) => &["CONFIG_PCI"],
        (VirtioBus::Mmio, Arch::X86_64) => &["CONFIG_ACPI"],
        // Every kernel of the others reads a device tree.
        (VirtioBus::Mmio, _) => &[],
    }
}

/// What a kernel needs to find devices on a PCI Express bus that has no I/O ports.
const ECAM: [&str; 2] = ["CONFIG_ACPI", "CONFIG_PCI_MMCONFIG"];

/// What is known of a kernel before it is booted.
struct Known<'a> {
    config: Option<&'a KernelConfig>,
    modules: Option<ModuleNames>,
    /// Why nothing is known of its modules.
    no_modules: Option<&'a str>,
    /// Its image has the driver of 9p and not the one of virtio-fs.
    only_9p_in_image: bool,
}

/// What is in the image of a kernel that has these built in: the drivers' names.
const VIRTIO_FS_NAME: &[u8] = b"virtiofs\0";
const NINE_P_NAME: &[u8] = b"9pnet_virtio\0";

impl<'a> Known<'a> {
    fn of(kernel: &'a Kernel) -> Result<Self, Error> {
        Ok(Self {
            config: kernel.config.as_ref(),
            modules: kernel.module_names()?,
            no_modules: kernel.no_modules.as_deref(),
            only_9p_in_image: false,
        })
    }

    /// Looks into the image, where nothing else tells what the kernel can mount.
    fn find_drivers(&mut self, image: &Path) -> Result<(), Error> {
        if self.config.is_some() || self.modules.is_some() {
            return Ok(());
        }
        let path = image.to_owned();
        let content = std::fs::read(image).map_err(|source| Error::Io {
            what: "read the kernel",
            path,
            source,
            hint: "",
        })?;
        let has = |name: &[u8]| memchr::memmem::find(&content, name).is_some();
        self.only_9p_in_image = has(NINE_P_NAME) && !has(VIRTIO_FS_NAME);
        Ok(())
    }

    /// Whether it finds a PCI Express bus that has no I/O ports, as the one of a microvm.
    fn sees_ecam(&self) -> bool {
        let has = |option| self.config.is_none_or(|c| c.get(option) == Tristate::BuiltIn);
        ECAM.into_iter().all(has)
    }

    /// Why nothing will be seen of the kernel's messages, if that is so.
    fn silence(&self) -> Option<&'static str> {
        let config = self.config?;
        (config.get("CONFIG_SERIAL_8250_CONSOLE") != Tristate::BuiltIn).then_some(
            "the kernel was built without CONFIG_SERIAL_8250_CONSOLE: none of its messages will be \
             seen, and a panic will look like a time limit",
        )
    }
}

/// What a kernel does not have.
#[derive(Debug)]
struct Lacking {
    purpose: &'static str,
    missing: Vec<String>,
    hint: String,
}

impl Lacking {
    fn of(self, kernel: &Kernel) -> Error {
        let kernel = match kernel.release.as_str() {
            "" => kernel.boot_image.display().to_string(),
            release => release.to_owned(),
        };
        let Self { purpose, missing, hint } = self;
        Error::KernelLacks { kernel, purpose, missing, hint }
    }
}

/// Whether a kernel can do what a run needs, as far as that can be told without booting it.
///
/// # Errors
/// [`Error::KernelLacks`] when it cannot.
pub(crate) fn check(cache: &Cache, kernel: &Kernel, needs: Needs) -> Result<(), Error> {
    Findings::of(cache, kernel, needs, None).map(drop)
}

/// How a guest comes to its root.
#[derive(Debug)]
struct Way {
    /// Modules to load, by name.
    modules: Vec<&'static str>,
    channel: AgentChannel,
    transport: ShareTransport,
}

/// Which modules reach the agent's channel and the root, and over which channel the agent talks.
/// What nothing is known of is taken to be built in; the guest tells if it is not.
fn way_to_root(known: &Known<'_>, needs: Needs) -> Result<Way, Lacking> {
    let features = Features::of(known.config, known.modules.as_ref());
    let transport = match needs.share_via {
        ShareVia::Only(transport) => transport,
        ShareVia::Auto => {
            let nine_p = match features.get(Feature::Virtiofs) {
                Availability::Absent => features.get(Feature::NineP) != Availability::Absent,
                Availability::Unknown => known.only_9p_in_image,
                _ => false,
            };
            if nine_p { ShareTransport::NineP } else { ShareTransport::VirtioFs }
        }
    };
    let carrier = match transport {
        ShareTransport::VirtioFs => Feature::Virtiofs,
        ShareTransport::NineP => Feature::NineP,
    };
    let bus = match needs.bus {
        VirtioBus::Pci => Feature::VirtioPci,
        VirtioBus::Mmio => Feature::VirtioMmio,
    };
    let mut required = vec![(bus, "reach the host's files"), (carrier, "mount the host's files")];
    if needs.overlay {
        required.push((Feature::Overlay, "lay a writable layer over its root"));
    }
    let disk_later = needs.disk_later && features.get(Feature::VirtioBlk) != Availability::Absent;
    if needs.disk || disk_later {
        required.push((Feature::VirtioBlk, "reach its disks"));
    }
    if needs.network {
        required.push((Feature::VirtioNet, "reach the network"));
    }
    if needs.vsock {
        required.push((Feature::Vsock, "reach programs of the host over vsock"));
    }
    if needs.rng {
        required.push((Feature::VirtioRng, "have random numbers of the host"));
    }
    let has_serial = |config: &KernelConfig| config.get("CONFIG_SERIAL_8250") == Tristate::BuiltIn;
    let channel = match features.get(Feature::VirtioConsole) {
        Availability::Absent if known.config.is_none_or(has_serial) => AgentChannel::Serial,
        _ => AgentChannel::Virtio,
    };
    let mut modules = Vec::new();
    if channel == AgentChannel::Virtio {
        required.push((Feature::VirtioConsole, "talk to the host"));
    }
    let mut purposes = Vec::new();
    let mut absent: Vec<String> = Vec::new();
    let mut hints = Vec::new();
    if let Some(config) = known.config {
        let base = BASE.iter().chain(finds_bus(needs.bus));
        let base = base.filter(|option| config.get(option) != Tristate::BuiltIn);
        absent.extend(base.map(|option| (*option).to_owned()));
        if !absent.is_empty() {
            purposes.push("run the agent");
        }
    }
    for (feature, purpose) in required {
        match features.get(feature) {
            Availability::BuiltIn | Availability::Unknown => {}
            Availability::Module => {
                modules.extend(feature.needs().iter().filter_map(|(_, module)| *module));
            }
            Availability::Absent => {
                let missing = missing(feature, known.config, known.modules.as_ref());
                purposes.push(purpose);
                hints.push(match feature {
                    _ if missing.iter().any(|option| option.why == Lack::NotInTree) => {
                        "its module tree is of another or an unfinished build: `make modules` \
                         finishes one in a build tree"
                    }
                    _ if missing.iter().any(|option| option.why == Lack::NoTree) => {
                        known.no_modules.unwrap_or(
                            "to use its modules, give its package, unpacked package or build tree \
                             instead of the image",
                        )
                    }
                    Feature::NineP => "the generic flavours of distributions have it as a module",
                    Feature::Virtiofs if needs.share_via == ShareVia::Auto => {
                        "or CONFIG_9P_FS and CONFIG_NET_9P_VIRTIO"
                    }
                    Feature::Overlay => "--root-mode ro does without",
                    _ => "",
                });
                absent.extend(missing.iter().map(MissingOption::to_string));
            }
        }
    }
    if !absent.is_empty() {
        let purpose = match purposes.as_slice() {
            [purpose] => purpose,
            _ => "do what this run needs",
        };
        let hint = hints.into_iter().find(|hint| !hint.is_empty()).unwrap_or_default().to_owned();
        return Err(Lacking { purpose, missing: absent, hint });
    }
    if needs.modules_place && features.get(Feature::Overlay) == Availability::Module {
        modules.extend(Feature::Overlay.needs().iter().filter_map(|(_, module)| *module));
    }
    Ok(Way { modules, channel, transport })
}

fn command_line(channel: AgentChannel, arguments: &[String]) -> String {
    let channel = match channel {
        AgentChannel::Virtio => "virtio",
        AgentChannel::Serial => "ttyS1",
    };
    let mut line = String::from("console=ttyS0 panic=-1");
    // Tests of the kernel's own cryptography at every boot; a quarter of the boot time under TCG.
    line.push_str(" cryptomgr.notests");
    line.push_str(" vmlab.channel=");
    line.push_str(channel);
    for more in arguments {
        line.push(' ');
        line.push_str(more);
    }
    line
}

/// The image to start: a bzImage's content, which starts without decompressing itself in the guest,
/// where the kernel can be entered directly; the image itself where not. That one has been judged is
/// cached, but no failure to judge it.
fn direct_image(cache: &Cache, image: &BootImage, leases: &Leases) -> Result<PathBuf, Error> {
    if image.format() != BootFormat::BzImage {
        return Ok(image.path().to_owned());
    }
    let read = |source| Error::Io {
        what: "read the kernel",
        path: image.path().to_owned(),
        source,
        hint: "",
    };
    let key = ContentKey::new("boot-image-1").known_file(cache, "bzImage", image.path());
    let key = key.map_err(read)?.finish();
    let build = |dir: &Path| {
        match image.extract() {
            Ok(Some(vmlinux)) if pvh_entry(&vmlinux).is_some() => {
                write_sealed(dir, IMAGE_FILE, &vmlinux)
            }
            Ok(_) => write(&dir.join(NO_PVH_FILE), b"no PVH entry\n"),
            // The kernel can extract itself from a format that is unknown here. From a damaged
            // payload it cannot, and would stay silent until the time limit.
            Err(BootImageError::InvalidPayload {
                defect: defect @ Defect::UnknownPayload(_),
                ..
            }) => write(&dir.join(NO_PVH_FILE), format!("{defect}\n").as_bytes()),
            Err(error) => Err(error.into()),
        }
    };
    let entry =
        cache.get_or_build_bounded((IMAGES, IMAGES_KEPT), &key, leases, verify_image, build)?;
    let vmlinux = entry.join(IMAGE_FILE);
    Ok(if vmlinux.exists() { vmlinux } else { image.path().to_owned() })
}

fn verify_image(entry: &Path) -> Result<(), Flaw> {
    if entry.join(NO_PVH_FILE).exists() {
        return Ok(());
    }
    let vmlinux = entry.join(IMAGE_FILE);
    verify_length(entry, IMAGE_FILE)?;
    match BootImage::open_unversioned(&vmlinux)?.pvh_entry() {
        Some(_) => Ok(()),
        None => Err("it has no PVH entry".into()),
    }
}

/// Builds, or finds, the initramfs with these modules of a tree and all that they need.
fn initramfs(
    cache: &Cache,
    modules: Option<(&Path, &[String])>,
    disk_root: bool,
    leases: &Leases,
) -> Result<PathBuf, Error> {
    let verify = |entry: &Path| verify_length(entry, INITRAMFS_FILE);
    let question = of_this_program(ContentKey::new("modules-of-initramfs"))
        .field("tree", modules.map_or(&[][..], |(dir, _)| dir.as_os_str().as_encoded_bytes()))
        .field("disk", [u8::from(disk_root)]);
    let wanted = modules.iter().flat_map(|(_, wanted)| wanted.iter());
    let question = wanted.fold(question, |key, name| key.field("wanted", name)).finish();
    if let Some(key) = cache.recall::<String>(INITRAMFS, &question)
        && let Some(entry) = cache.lookup(INITRAMFS, &key, verify)?
        && let Some(lease) = cache.lease(INITRAMFS, &key)?
    {
        leases.add(lease);
        return Ok(entry.join(INITRAMFS_FILE));
    }

    let mut sources = Sources::default();
    let mut key = ContentKey::new("initramfs-3").field("agent", AGENT_SHA256);
    let mut closure: Vec<ModuleRef> = Vec::new();
    let mut on_demand: Vec<(&str, Vec<ModuleRef>)> = Vec::new();
    let mut tree = None;
    if let Some((dir, wanted)) = modules {
        ModuleTree::index_files(dir).for_each(|file| sources.add(file));
        let opened = ModuleTree::open(dir)?;
        closure = opened.closure(&wanted.iter().map(String::as_str).collect::<Vec<_>>())?;
        // What the kernel has built in has no module, and what it does not have the guest will tell.
        let of_disk = |name| Some((name, opened.closure(&[name]).ok()?));
        on_demand.extend(DISK_FILESYSTEMS.into_iter().filter(|_| disk_root).filter_map(of_disk));
        tree = Some(opened);
    }
    for (name, _) in &on_demand {
        key = key.field("on demand", name);
    }
    for module in closure.iter().chain(on_demand.iter().flat_map(|(_, modules)| modules)) {
        sources.add(&module.path);
        key = key.field("name", &module.name).file("module", &module.path).map_err(|source| {
            Error::Io { what: "read the module", path: module.path.clone(), source, hint: "" }
        })?;
    }
    let key = key.finish();
    let build = |dir: &Path| {
        let mut contents = HashMap::new();
        for module in closure.iter().chain(on_demand.iter().flat_map(|(_, modules)| modules)) {
            if let (Some(tree), Entry::Vacant(place)) = (&tree, contents.entry(&module.path)) {
                place.insert(tree.read(module)?);
            }
        }
        let list = |(name, modules)| (name, boot_modules(modules, &contents));
        let on_demand: Vec<_> =
            on_demand.iter().map(|(name, modules)| list((*name, modules.as_slice()))).collect();
        let archive = build_initramfs(AGENT, &boot_modules(&closure, &contents), &on_demand)?;
        write_sealed(dir, INITRAMFS_FILE, &archive)
    };
    let kind = (INITRAMFS, INITRAMFS_KEPT);
    let entry = cache.get_or_build_bounded(kind, &key, leases, verify, build)?;
    cache.remember(INITRAMFS, &question, &sources, &key);
    Ok(entry.join(INITRAMFS_FILE))
}

fn boot_modules<'a>(
    modules: &'a [ModuleRef],
    contents: &'a HashMap<&PathBuf, Vec<u8>>,
) -> Vec<BootModule<'a>> {
    let boot_module = |module: &'a ModuleRef| {
        let content = contents.get(&module.path)?;
        Some(BootModule { name: &module.name, content, params: "", wave: module.wave })
    };
    modules.iter().filter_map(boot_module).collect()
}

fn write(path: &Path, content: &[u8]) -> Result<(), Error> {
    std::fs::write(path, content).map_err(|source| Error::Io {
        what: "write to the cache",
        path: path.to_owned(),
        source,
        hint: "; VMLAB_CACHE_DIR chooses another place",
    })
}

/// Writes a file, and beside it its length, so that a look-up notices when it was cut short, and its
/// digest, for whoever looks for damage and has the time.
pub(crate) fn write_sealed(dir: &Path, file: &str, content: &[u8]) -> Result<(), Error> {
    write(&dir.join(file), content)?;
    write(&length_file(dir, file), content.len().to_string().as_bytes())?;
    write(&digest_file(dir, file), Digest::of(content).to_string().as_bytes())
}

fn length_file(dir: &Path, file: &str) -> PathBuf {
    dir.join(format!("{file}.length"))
}

fn digest_file(dir: &Path, file: &str) -> PathBuf {
    dir.join(format!("{file}.sha256"))
}

/// Compares a file with its digest. Entries that earlier versions have made have none.
pub(crate) fn verify_digest(dir: &Path, file: &str) -> Result<(), Flaw> {
    let recorded = match std::fs::read_to_string(digest_file(dir, file)) {
        Ok(recorded) => recorded,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    match Digest::of_file(&dir.join(file))?.to_string() == recorded.trim() {
        true => Ok(()),
        false => Err(format!("the content of {file} has changed").into()),
    }
}

pub(crate) fn verify_length(dir: &Path, file: &str) -> Result<(), Flaw> {
    let recorded: u64 = std::fs::read_to_string(length_file(dir, file))?.trim().parse()?;
    let found = std::fs::metadata(dir.join(file))?.len();
    if found == recorded {
        Ok(())
    } else {
        Err(Box::new(io::Error::other(format!("{found} bytes instead of {recorded}"))))
    }
}

// `Cache::get_or_build` turns its own failures into the error of the closure that it is given.
const _: fn(CacheError) -> Error = Error::Cache;

#[cfg(test)]
mod tests;
