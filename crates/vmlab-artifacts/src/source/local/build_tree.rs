//! Kernels where they were built: a source tree, or what `O=` named.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Parts, existing, linked_modules, modules_error, read_config};
use crate::cache::Leases;
use crate::kernel::Origin;
use crate::modules::{self, BUILTIN_LISTS, BuiltModules, ModulesError};
use crate::{Arch, Cache, KernelError};

/// The release that the build has given to the kernel.
const RELEASE: &str = "include/config/kernel.release";

/// The configuration that the last build has used, and the one that the next build will use. Between
/// the two lies what was edited since.
const CONFIGS: [&str; 2] = ["include/config/auto.conf", ".config"];

/// The boot image that was built in a kernel tree, the host's architecture first.
pub(super) fn image_in(tree: &Path) -> Option<PathBuf> {
    let mut arches = [Arch::X86_64, Arch::Aarch64];
    arches.sort_by_key(|arch| *arch != Arch::HOST);
    arches.into_iter().map(|arch| tree.join(image_name(arch))).find(|path| path.is_file())
}

/// Where a build puts the boot image.
fn image_name(arch: Arch) -> PathBuf {
    let name = if arch == Arch::X86_64 { "bzImage" } else { "Image" };
    Path::new("arch").join(arch.kernel_dir()).join("boot").join(name)
}

/// What to say of a kernel's source or build directory that has no boot image; none for others.
pub(super) fn unbuilt(tree: &Path) -> Option<KernelError> {
    let is_source = ["Kbuild", "Kconfig", "Makefile"].iter().all(|f| tree.join(f).is_file());
    (is_source || tree.join(RELEASE).is_file()).then(|| KernelError::NotBuilt {
        path: tree.to_owned(),
        image: image_name(Arch::HOST),
        vmlinux: existing([tree.join("vmlinux")]),
    })
}

/// The top of the build tree that an image is in: `TOP/arch/ARCH/boot/IMAGE`, or `TOP/vmlinux`.
pub(super) fn top_of(image: &Path) -> Option<PathBuf> {
    let dir = image.parent()?;
    let top = match image.file_name()?.to_str()? {
        "bzImage" | "Image" | "Image.gz" => {
            let arch = dir.parent()?.parent()?;
            let placed = dir.ends_with("boot") && arch.ends_with("arch");
            placed.then(|| arch.parent()).flatten()?
        }
        "vmlinux" => dir,
        _ => return None,
    };
    existing([top.join("modules.order"), top.join(".config")]).map(|_| top.to_owned())
}

/// The release that a build tree was last built for.
pub(super) fn release(top: &Path) -> Option<String> {
    let text = fs::read_to_string(top.join(RELEASE)).ok()?;
    Some(text.trim().to_owned())
}

/// A kernel of a build tree, with its configuration and modules.
pub(super) fn parts(cache: &Cache, path: PathBuf, image: PathBuf) -> Result<Parts, KernelError> {
    let mut parts = without_modules(path.clone(), image, None);
    let found = match BuiltModules::find(&path) {
        Ok(found) => found,
        // Without any list, no module was built: which is all right where there are to be none, and
        // where those that the run needs are built in.
        Err(error @ ModulesError::NotBuilt { .. }) if is_listless(&error) => {
            let config = parts.config.as_deref().map(read_config).transpose()?;
            if config.is_none_or(|config| config.has_modules()) {
                parts.no_modules = Some(error.to_string());
            }
            return Ok(parts);
        }
        Err(error) => return Err(modules_error(&path, error)),
    };
    if !found.is_empty() {
        // One module may be built anew, and an interrupted build goes on, without any change of the
        // lists.
        let lists = BUILTIN_LISTS.iter().chain([&RELEASE]).map(|name| path.join(name));
        let stamps: Vec<PathBuf> = found.files().map(Path::to_owned).chain(lists).collect();
        let tree = linked_modules(cache, &path, &stamps, &parts.leases, |out| {
            let made = modules::tree_from_build(&path, out);
            made.map(drop).map_err(|e| modules_error(&path, e))
        })?;
        parts.modules = Some(tree);
    }
    Ok(parts)
}

fn is_listless(error: &ModulesError) -> bool {
    matches!(error, ModulesError::NotBuilt { missing, .. } if missing == "modules.order")
}

/// A kernel of a build tree whose modules cannot be used, and why.
pub(super) fn without_modules(path: PathBuf, image: PathBuf, why: Option<String>) -> Parts {
    Parts {
        image,
        release: release(&path),
        config: existing(CONFIGS.map(|name| path.join(name))),
        modules: None,
        no_modules: why,
        origin: Origin::BuildTree { path },
        leases: Leases::default(),
    }
}
