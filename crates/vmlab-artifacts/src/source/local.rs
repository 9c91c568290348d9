//! Kernels on this host: plain files, unpacked packages, build trees, installed releases.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::boot_image::{BootImage, BootImageError};
use crate::cache::{CacheError, Flaw, Leases};
use crate::kconfig::KernelConfig;
use crate::kernel::{ConfigSource, Kernel, Origin};
use crate::modules;
use crate::{Bound, Cache, ContentKey, KernelError, Kind};

mod build_tree;
#[cfg(test)]
mod tests;

/// The cache kind of configurations that were found inside boot images.
const CONFIGS: &str = "configs";

/// How many of them, found or not, are kept; they are small.
const CONFIGS_KEPT: usize = 64;

/// The cache kind of module trees made from modules elsewhere, mostly as hard links.
const LINKED_MODULES: &str = "linked-modules";

/// How many of them are kept. Links cost nothing while the modules are there, but their directory may go.
const LINKED_MODULES_KEPT: usize = 16;

/// The two, for whoever looks after the cache.
pub(crate) const CONFIGS_KIND: Kind =
    Kind { name: CONFIGS, bound: Bound::Entries(CONFIGS_KEPT), verify: verify_config };
pub(crate) const LINKED_MODULES_KIND: Kind = Kind {
    name: LINKED_MODULES,
    bound: Bound::Entries(LINKED_MODULES_KEPT),
    verify: |dir| linked_tree(dir).map(drop),
};

/// Largest uncompressed image that is searched for its configuration, in bytes.
const MAX_SEARCHED: u64 = 1 << 30;

/// The files that make up a kernel.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) image: PathBuf,
    /// Known from a file's name; the image's own word for it comes first.
    pub(crate) release: Option<String>,
    pub(crate) config: Option<PathBuf>,
    pub(crate) modules: Option<PathBuf>,
    /// Why there are none, where there could be some.
    pub(crate) no_modules: Option<String>,
    pub(crate) origin: Origin,
    pub(crate) leases: Leases,
}

/// Checks the files and reads what they say.
pub(crate) fn assemble(cache: &Cache, spec: String, parts: Parts) -> Result<Kernel, KernelError> {
    let image = open_image(&parts.image)?;
    let (config, config_source) = match &parts.config {
        Some(path) => (Some(read_config(path)?), Some(ConfigSource::File(path.clone()))),
        None => {
            let config = embedded_config(cache, &image)?;
            let source = config.is_some().then_some(ConfigSource::BootImage);
            (config, source)
        }
    };
    Ok(Kernel {
        spec,
        release: image.release().map(str::to_owned).or(parts.release).unwrap_or_default(),
        arch: image.arch(),
        version_string: image.version_string().map(str::to_owned),
        boot_image: parts.image,
        config,
        config_source,
        modules: parts.modules,
        no_modules: parts.no_modules,
        origin: parts.origin,
        leases: parts.leases,
    })
}

/// Opens a boot image, with an error of its own for one that this user may not read.
pub(crate) fn open_image(path: &Path) -> Result<BootImage, KernelError> {
    BootImage::open(path).map_err(|error| image_error(path, error))
}

fn image_error(path: &Path, error: BootImageError) -> KernelError {
    match error {
        BootImageError::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
            KernelError::Unreadable { path: path.to_owned(), source }
        }
        error => KernelError::BadImage(error),
    }
}

/// The kernel at a path that is no `.deb`.
pub(crate) fn at_path(cache: &Cache, spec: String, path: &Path) -> Result<Kernel, KernelError> {
    let path = std::path::absolute(path).map_err(|e| KernelError::io("find", path, e))?;
    let meta = match fs::metadata(&path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(KernelError::NoSuchPath { path });
        }
        Err(error) => return Err(KernelError::io("look at the kernel", &path, error)),
    };
    let parts = if !meta.is_dir() {
        bare_image(cache, path)?
    } else if let Some(image) = build_tree::image_in(&path) {
        build_tree::parts(cache, path, image)?
    } else {
        unpacked(cache, path)?
    };
    assemble(cache, spec, parts)
}

/// A boot image by itself, with the configuration and the modules of the same kernel that lie where
/// builds and packages put them: in the build tree that it is in, or beside a `vmlinuz-RELEASE`. An
/// image alone is one, too, and so is one whose neighbours cannot be used.
fn bare_image(cache: &Cache, path: PathBuf) -> Result<Parts, KernelError> {
    let image = open_image(&path)?;
    // A link shows where the image really is, as from arch/x86_64 to arch/x86.
    let real = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
    let own = image.release();
    let near = match (build_tree::top_of(&real), release_of(&real)) {
        (Some(top), _) => in_tree(cache, top, &path, own)?,
        // A name is not worth much: only an image that does not contradict it has these neighbours.
        (None, Some(release)) if own.is_none_or(|own| own == release) => {
            match beside(cache, &real, release) {
                Err(KernelError::Modules { source, .. }) => alone(&path, Some(source.to_string())),
                parts => parts?,
            }
        }
        _ => alone(&path, None),
    };
    Ok(Parts { image: path.clone(), origin: Origin::File { path }, ..near })
}

/// An image in the build tree that it was made in.
fn in_tree(
    cache: &Cache,
    top: PathBuf,
    image: &Path,
    own: Option<&str>,
) -> Result<Parts, KernelError> {
    if let (Some(own), Some(built)) = (own, build_tree::release(&top))
        && own != built
    {
        let why = format!(
            "the last build in {} is {built}, not this image's {own}: its modules are left out",
            top.display()
        );
        return Ok(alone(image, Some(why)));
    }
    match build_tree::parts(cache, top.clone(), image.to_owned()) {
        Err(KernelError::Modules { source, .. }) => {
            Ok(build_tree::without_modules(top, image.to_owned(), Some(source.to_string())))
        }
        parts => parts,
    }
}

/// An image of which nothing else is known.
fn alone(image: &Path, why: Option<String>) -> Parts {
    Parts {
        image: image.to_owned(),
        release: None,
        config: None,
        modules: None,
        no_modules: why,
        origin: Origin::File { path: image.to_owned() },
        leases: Leases::default(),
    }
}

/// The release that a file's name or place tells: `vmlinuz-RELEASE`, `lib/modules/RELEASE/vmlinuz`.
fn release_of(image: &Path) -> Option<&str> {
    let name = image.file_name()?.to_str()?;
    let release = match name {
        "vmlinuz" => image.parent()?.file_name()?.to_str(),
        _ => IMAGE_PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)),
    };
    release.filter(|release| !release.is_empty())
}

/// The configuration and modules of a release beside its image: in the root that the image is in, or
/// the modules that are installed here.
fn beside(cache: &Cache, image: &Path, release: &str) -> Result<Parts, KernelError> {
    let dir = image.parent().unwrap_or(image);
    let in_tree = image.file_name().is_some_and(|name| name == "vmlinuz");
    let root = match in_tree {
        // ROOT/lib/modules/RELEASE/vmlinuz
        true => dir.ancestors().nth(3),
        false => dir.parent(),
    };
    let near = [dir.join(format!("config-{release}")), dir.join("config")];
    let config = match (in_tree, near) {
        (true, [_, config]) | (false, [config, _]) => existing([config]),
    };
    let leases = Leases::default();
    let own = in_tree.then(|| dir.to_owned());
    let of_root = root.into_iter().flat_map(|root| module_dirs(root, release));
    let tree = own.into_iter().chain(of_root).find(|dir| is_tree(dir));
    let modules = match tree {
        Some(tree) => Some(indexed(cache, tree, image, release, &leases)?),
        None => module_dirs(Path::new("/"), release).find(|dir| dir.join("modules.dep").is_file()),
    };
    let origin = Origin::File { path: image.to_owned() };
    let release = Some(release.to_owned());
    let image = image.to_owned();
    Ok(Parts { image, release, config, modules, no_modules: None, origin, leases })
}

/// Whether a directory is a module tree, with an index or without one.
fn is_tree(dir: &Path) -> bool {
    existing([dir.join("modules.dep"), dir.join("modules.order")]).is_some()
}

fn unpacked(cache: &Cache, path: PathBuf) -> Result<Parts, KernelError> {
    let mut images = images_in(&path);
    let (release, image) = match images.len() {
        1 => images.remove(0),
        0 => {
            // What may not be looked into seems to be empty.
            fs::read_dir(&path).map_err(|e| KernelError::io("look for a kernel in", &path, e))?;
            let none = || KernelError::NoKernelInDir { path: path.clone() };
            return Err(build_tree::unbuilt(&path).unwrap_or_else(none));
        }
        _ => {
            let found = images.iter().map(|(_, image)| image.display().to_string()).collect();
            return Err(KernelError::Ambiguous { path, found });
        }
    };
    let leases = Leases::default();
    let modules = match module_dirs(&path, &release).find(|dir| dir.is_dir()) {
        Some(tree) => Some(indexed(cache, tree, &image, &release, &leases)?),
        None => None,
    };
    let config = configs_of(&path, &release);
    let origin = Origin::Unpacked { path };
    let release = Some(release);
    Ok(Parts { image, release, config, modules, no_modules: None, origin, leases })
}

/// A module tree where it is if it has an index, else a copy with one.
fn indexed(
    cache: &Cache,
    tree: PathBuf,
    image: &Path,
    release: &str,
    leases: &Leases,
) -> Result<PathBuf, KernelError> {
    if tree.join("modules.dep").is_file() {
        return Ok(tree);
    }
    let files = modules::place::files(&tree)
        .map_err(|e| KernelError::io("list the modules in", &tree, e))?;
    let stamps: Vec<PathBuf> = files.into_iter().chain([image.to_owned()]).collect();
    linked_modules(cache, &tree, &stamps, leases, |out| {
        modules::place::tree(&tree, &out.join("lib/modules").join(release))
            .map_err(|e| KernelError::cache_io("copy to the cache the modules of", &tree, e))?;
        modules::depmod(out, release).map_err(|e| modules_error(&tree, e))
    })
}

/// How the names of boot images begin, before their release.
const IMAGE_PREFIXES: [&str; 3] = ["vmlinuz-", "vmlinux-", "Image-"];

/// The boot images below a root directory, with the releases that their names tell.
pub(crate) fn images_in(root: &Path) -> Vec<(String, PathBuf)> {
    let mut images: Vec<(String, PathBuf)> = Vec::new();
    let list = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
    for item in list(root.join("boot")) {
        let name = item.file_name();
        let release = IMAGE_PREFIXES.iter().find_map(|prefix| name.to_str()?.strip_prefix(prefix));
        if let Some(release) = release.filter(|_| item.path().is_file()) {
            images.push((release.to_owned(), item.path()));
        }
    }
    for modules in ["usr/lib/modules", "lib/modules"] {
        for item in list(root.join(modules)) {
            let image = item.path().join("vmlinuz");
            if let (Ok(release), true) = (item.file_name().into_string(), image.is_file()) {
                images.push((release, image));
            }
        }
    }
    // A root with /lib -> usr/lib shows one image twice, and distributions keep one in /boot, too.
    images.sort();
    images.dedup_by(|b, a| a.0 == b.0);
    images
}

/// An installed release. `root` is `/`, except in tests; `running` tells that it is the one that
/// runs, whose configuration /proc may have.
pub(crate) fn installed(
    cache: &Cache,
    root: &Path,
    release: &str,
    running: bool,
) -> Result<Kernel, KernelError> {
    let candidates = [
        root.join("boot").join(format!("vmlinuz-{release}")),
        root.join("usr/lib/modules").join(release).join("vmlinuz"),
        root.join("lib/modules").join(release).join("vmlinuz"),
        root.join("boot").join(format!("vmlinux-{release}")),
        root.join("boot").join(format!("Image-{release}")),
    ];
    let [first, ..] = &candidates;
    let Some(image) = existing(candidates.clone()) else {
        let mut installed: Vec<String> =
            images_in(root).into_iter().map(|(release, _)| release).collect();
        installed.sort_by(|a, b| crate::version::compare(a, b));
        // 6.12 alone is no release, but a version that a distribution may have.
        let suggestion = release
            .bytes()
            .all(|b| b.is_ascii_digit() || b == b'.')
            .then(|| format!("debian:{release}"));
        return Err(KernelError::NotInstalled {
            release: release.to_owned(),
            image: first.clone(),
            installed,
            suggestion,
        });
    };
    let modules = module_dirs(root, release).find(|dir| dir.is_dir());
    if let Some(tree) = &modules
        && let Err(error) = fs::File::open(tree.join("modules.dep"))
    {
        return Err(match error.kind() {
            io::ErrorKind::PermissionDenied => {
                KernelError::Unreadable { path: tree.join("modules.dep"), source: error }
            }
            _ => KernelError::NoModulesDep { tree: tree.clone(), release: release.to_owned() },
        });
    }
    let mut config = configs_of(root, release);
    if running && config.is_none() {
        config = existing([root.join("proc/config.gz")]);
    }
    let parts = Parts {
        image,
        release: Some(release.to_owned()),
        config,
        modules,
        no_modules: None,
        origin: Origin::Installed,
        leases: Leases::default(),
    };
    let mut kernel = assemble(cache, release.to_owned(), parts)?;
    if running {
        kernel.spec = "host".to_owned();
    }
    Ok(kernel)
}

fn module_dirs(root: &Path, release: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let dirs = ["lib/modules", "usr/lib/modules"].map(|dir| root.join(dir).join(release));
    dirs.into_iter()
}

fn configs_of(root: &Path, release: &str) -> Option<PathBuf> {
    existing([
        root.join("boot").join(format!("config-{release}")),
        root.join("usr/lib/modules").join(release).join("config"),
        root.join("lib/modules").join(release).join("config"),
    ])
}

fn existing<const N: usize>(paths: [PathBuf; N]) -> Option<PathBuf> {
    paths.into_iter().find(|path| path.is_file())
}

pub(crate) fn read_config(path: &Path) -> Result<KernelConfig, KernelError> {
    let fail = |e| KernelError::io("read the kernel configuration", path, e);
    let bytes = fs::read(path).map_err(fail)?;
    if path.extension().is_some_and(|ext| ext == "gz") {
        let mut text = Vec::new();
        let gz = flate2::read::GzDecoder::new(bytes.as_slice());
        io::copy(&mut io::Read::take(gz, MAX_SEARCHED), &mut text).map_err(fail)?;
        return Ok(KernelConfig::parse(text));
    }
    Ok(KernelConfig::parse(bytes))
}

/// The configuration inside a boot image (CONFIG_IKCONFIG), looked for once for each state of the
/// file, because it means to unpack the image.
fn embedded_config(cache: &Cache, image: &BootImage) -> Result<Option<KernelConfig>, KernelError> {
    let key = stamp(ContentKey::new("config-1"), image.path()).finish();
    let leases = Leases::default();
    let kind = (CONFIGS, CONFIGS_KEPT);
    let entry = cache.get_or_build_bounded(kind, &key, &leases, verify_config, |dir| {
        // Damage inside the image is reported by whoever boots it.
        let kernel = match image.extract() {
            Ok(None) if image.file_len() <= MAX_SEARCHED => fs::read(image.path()).ok(),
            Ok(kernel) => kernel,
            Err(_) => None,
        };
        let config = kernel.and_then(|bytes| KernelConfig::from_ikconfig(&bytes));
        let (name, text) = match &config {
            Some(config) => ("config", config.text()),
            None => ("none", ""),
        };
        fs::write(dir.join(name), text)
            .map_err(|e| KernelError::cache_io("write the kernel configuration to", dir, e))
    })?;
    existing([entry.join("config")]).map(|path| read_config(&path)).transpose()
}

fn verify_config(dir: &Path) -> Result<(), Flaw> {
    match dir.join("config").is_file() || dir.join("none").is_file() {
        true => Ok(()),
        false => Err("it is empty".into()),
    }
}

/// The module tree in an entry.
fn linked_tree(dir: &Path) -> Result<PathBuf, Flaw> {
    let mut trees = fs::read_dir(dir.join("lib/modules"))?.flatten().map(|item| item.path());
    let tree = trees.next().ok_or("it has no module tree")?;
    fs::metadata(tree.join("modules.dep"))?;
    Ok(tree)
}

/// A cached module tree with the modules of `home`; made anew when a stamp file changes.
fn linked_modules(
    cache: &Cache,
    home: &Path,
    stamps: &[PathBuf],
    leases: &Leases,
    build: impl FnOnce(&Path) -> Result<(), KernelError>,
) -> Result<PathBuf, KernelError> {
    let home_key = ContentKey::new("home-1").field("path", home.as_os_str().as_encoded_bytes());
    let prefix = home_key.finish()[..16].to_owned();
    let state =
        stamps.iter().fold(ContentKey::new("linked-modules-2"), |key, file| stamp(key, file));
    let key = format!("{prefix}-{}", &state.finish()[..32]);
    let entry = cache.get_or_build_bounded(
        (LINKED_MODULES, LINKED_MODULES_KEPT),
        &key,
        leases,
        |dir| linked_tree(dir).map(drop),
        |dir| {
            // Trees of earlier builds of the same directory have no further use, but for VMs that run.
            for old in cache.entries(LINKED_MODULES)? {
                if old.key.starts_with(&prefix) && old.key != key {
                    match cache.remove(LINKED_MODULES, &old.key) {
                        Ok(_) | Err(CacheError::InUse { .. }) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            build(dir)
        },
    )?;
    linked_tree(&entry).map_err(|source| KernelError::Modules { tree: home.to_owned(), source })
}

/// Adds a file's identity and state to a key; a missing file is a state, too.
fn stamp(key: ContentKey, file: &Path) -> ContentKey {
    let state = fs::metadata(file).map(|meta| {
        format!(
            "{}:{}:{}:{}.{}",
            meta.dev(),
            meta.ino(),
            meta.len(),
            meta.mtime(),
            meta.mtime_nsec()
        )
    });
    key.field("path", file.as_os_str().as_encoded_bytes()).field("state", state.unwrap_or_default())
}

pub(crate) fn modules_error(tree: &Path, source: modules::ModulesError) -> KernelError {
    KernelError::Modules { tree: tree.to_owned(), source: Box::new(source) }
}
