//! The debug information of a kernel and its modules, where it is on the host: reports name functions, and this
//! says which lines of the sources they are.

mod object_file;

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use vmlab_artifacts::{Kernel, Origin, modules};

use crate::events::{Location, Place, Symbols, with_places};
use object_file::ObjectFile;

/// Where distributions' packages of debug information are unpacked.
const DEBUG_ROOT: &str = "/usr/lib/debug";

/// Modules whose debug information is read for one VM. What a guest names, it may name to keep the host busy.
const MAX_MODULES: usize = 64;

/// The longest module that is read into memory: amdgpu's with all its debug information has less than half of it.
const MAX_MODULE: u64 = 1 << 30;

/// Where a kernel's debug information is looked for. Nothing is read before it is wanted.
#[derive(Debug, Clone)]
pub struct DebugInfo {
    kernels: Vec<PathBuf>,
    /// Directories like `lib/modules/RELEASE`.
    trees: Vec<PathBuf>,
    /// Directories that modules of the user's own may be in.
    dirs: Vec<PathBuf>,
    /// The build tree, whose sources are named without it.
    sources: Option<PathBuf>,
}

impl DebugInfo {
    /// That of a kernel. Modules that are not the kernel's own are looked for in `dirs`, but not below them.
    pub fn of(kernel: &Kernel, dirs: impl IntoIterator<Item = PathBuf>) -> Self {
        Self::below(Path::new(DEBUG_ROOT), kernel, dirs)
    }

    fn below(root: &Path, kernel: &Kernel, dirs: impl IntoIterator<Item = PathBuf>) -> Self {
        let Kernel { release, boot_image, modules, origin, .. } = kernel;
        let tree = root.join("lib/modules").join(release);
        let sources = match origin {
            Origin::BuildTree { path } => Some(path.clone()),
            _ => None,
        };
        let mut kernels = Vec::new();
        if let Some(sources) = &sources {
            kernels.push(sources.join("vmlinux"));
        }
        // It may be a vmlinux itself.
        kernels.push(boot_image.clone());
        if !release.is_empty() {
            kernels.push(root.join(format!("boot/vmlinux-{release}")));
            kernels.push(tree.join("vmlinux"));
            kernels.extend(modules.as_ref().map(|tree| tree.join("build/vmlinux")));
        }
        let trees = [tree].into_iter().chain(modules.clone()).collect();
        Self { kernels, trees, dirs: dirs.into_iter().collect(), sources }
    }

    /// The file with the kernel's own debug information.
    ///
    /// # Errors
    /// Where it was looked for, if there is none.
    pub fn vmlinux(&self) -> Result<PathBuf, String> {
        let found = self.kernels.iter().find(|path| object_file::has_debug_info(path));
        found.cloned().ok_or_else(|| {
            let looked: Vec<String> =
                self.kernels.iter().map(|path| path.display().to_string()).collect();
            format!("none in {}", looked.join(", "))
        })
    }

    /// What looks places up in it.
    pub fn symbols(&self) -> impl Symbols + use<> {
        Reader { info: self.clone(), files: RefCell::default() }
    }

    /// The files that may have a module's debug information, the most likely first.
    fn module_files(&self, module: &str) -> Vec<PathBuf> {
        // The name is the guest's. No path may be made of one that is none.
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if module.is_empty() || !module.chars().all(plain) {
            return Vec::new();
        }
        let name = modules::normalize(module);
        let names = [name.clone(), name.replace('_', "-")].map(|name| format!("{name}.ko"));
        let own = self.dirs.iter().flat_map(|dir| names.iter().map(|name| dir.join(name)));
        let mut files: Vec<PathBuf> = own.collect();
        // Only the kernel's own tree has an index. Packages of debug information have the same places.
        for tree in self.trees.iter().rev() {
            let Ok(index) = modules::ModuleTree::open(tree) else { continue };
            let Some(path) = index.path(&name) else { continue };
            let place = path.strip_prefix(tree).unwrap_or(&path).to_string_lossy().into_owned();
            let stem = place.find(".ko").map_or(&*place, |at| &place[..at]);
            let debug = |tree: &PathBuf| {
                [".ko", ".ko.debug"].map(|suffix| tree.join(format!("{stem}{suffix}")))
            };
            files.extend(self.trees.iter().flat_map(debug));
            files.push(path);
        }
        files
    }

    fn open(&self, module: Option<&str>) -> Option<ObjectFile> {
        let Some(module) = module else {
            return ObjectFile::of_kernel(&self.vmlinux().ok()?);
        };
        self.module_files(module).into_iter().find_map(|path| {
            let short = path.metadata().is_ok_and(|file| file.is_file() && file.len() < MAX_MODULE);
            let content = short.then(|| modules::read_module(&path).ok()).flatten()?;
            ObjectFile::of_module(&content)
        })
    }
}

/// The code in a module's file, by its sections, which have no addresses before the module is loaded.
pub(crate) struct ModuleCode {
    content: Vec<u8>,
    /// Its debug information, once that is wanted: of most modules it never is.
    file: OnceCell<Option<ObjectFile>>,
    sections: Vec<(String, u64, u64)>,
}

impl ModuleCode {
    /// That of a file. What is no module has none.
    pub(crate) fn new(content: Vec<u8>) -> Self {
        let sections = object_file::code_sections(&content);
        Self { content, file: OnceCell::new(), sections }
    }

    /// The sections with code and their lengths in bytes.
    pub(crate) fn sections(&self) -> impl Iterator<Item = (&str, u64)> {
        self.sections.iter().map(|(name, length, _)| (name.as_str(), *length))
    }

    /// The function at an offset of a section, and where that is in the sources: `f+0x12 (f.c:34)`. `None` where the
    /// file does not tell.
    pub(crate) fn function_at(&self, section: &str, offset: u64) -> Option<String> {
        let (.., place) = self.sections.iter().find(|(name, ..)| name == section)?;
        let file = self.file.get_or_init(|| ObjectFile::of_module(&self.content)).as_ref()?;
        let (name, offset, lines) = file.function_at(place.checked_add(offset)?)?;
        Some(with_places(&format!("{name}+{offset:#x}"), &lines))
    }
}

/// What was read so far, by the module's name.
struct Reader {
    info: DebugInfo,
    files: RefCell<HashMap<Option<String>, Option<Rc<ObjectFile>>>>,
}

impl Reader {
    fn file(&self, module: Option<&str>) -> Option<Rc<ObjectFile>> {
        let key = module.map(str::to_owned);
        let mut files = self.files.borrow_mut();
        if let Some(known) = files.get(&key) {
            return known.clone();
        }
        if files.len() > MAX_MODULES {
            return None;
        }
        let file = self.info.open(module).map(Rc::new);
        files.insert(key, file.clone());
        file
    }
}

impl Symbols for Reader {
    fn locate(&self, place: &Place<'_>) -> Vec<Location> {
        let Some(file) = self.file(place.module) else { return Vec::new() };
        let mut locations = file.locate(place).unwrap_or_default();
        let tree = self.info.sources.as_deref();
        // In general the kernel was built where its modules were; where not, nothing is left out of them.
        let built = || Some(PathBuf::from(self.file(None)?.sources()?));
        let tops: Vec<PathBuf> = tree.map(Path::to_owned).into_iter().chain(built()).collect();
        for location in &mut locations {
            let path = location.file.replace("/./", "/");
            let within = tops.iter().find_map(|top| {
                Path::new(&path).strip_prefix(top).ok().map(|path| path.display().to_string())
            });
            location.file = within.unwrap_or(path);
        }
        locations
    }
}

#[cfg(test)]
mod tests;
