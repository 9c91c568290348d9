//! Module trees out of kernel build directories, without `make modules_install`.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::depmod::{depmod, tree_dir};
use super::{ModulesError, place, read_capped};

/// The largest list that is read from a build directory, in bytes.
const LIST_LEN_MAX: usize = 64 << 20;

/// The list of all modules.
const ORDER: &str = "modules.order";

/// What says which modules are built in.
pub(crate) const BUILTIN_LISTS: [&str; 2] = ["modules.builtin", "modules.builtin.modinfo"];

/// The modules that a build directory lists, and the lists.
#[derive(Debug)]
pub(crate) struct BuiltModules {
    /// The lists that were read: `modules.order`, or those of its parts.
    lists: Vec<PathBuf>,
    /// The modules in the order of the lists: the file, and its place in a module tree.
    modules: Vec<(PathBuf, String)>,
}

impl BuiltModules {
    /// Reads the lists of a build directory, and checks that all modules are there.
    ///
    /// `make path/of/one.ko` removes the list of all modules (Linux 5.4 and later, `single_modules`
    /// in the kernel's Makefile); the lists of the directories, of which it is made, stay.
    pub(crate) fn find(build_dir: &Path) -> Result<BuiltModules, ModulesError> {
        let mut lists = vec![build_dir.join(ORDER)];
        let mut texts = Vec::new();
        match list(build_dir, ORDER) {
            Ok(text) => texts.push(text),
            Err(missing @ ModulesError::NotBuilt { .. }) => {
                lists = partial_lists(build_dir);
                if lists.is_empty() {
                    return Err(missing);
                }
                for path in &lists {
                    texts.push(read_capped(path, LIST_LEN_MAX)?);
                }
            }
            Err(error) => return Err(error),
        }
        let mut modules = Vec::new();
        for text in texts {
            let text = String::from_utf8_lossy(&text);
            for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
                modules.push(find_module(build_dir, line).ok_or_else(|| {
                    ModulesError::NotBuilt { dir: build_dir.to_owned(), missing: wanted(line) }
                })?);
            }
        }
        Ok(BuiltModules { lists, modules })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.modules.is_empty()
    }

    /// All files by whose state a change of the modules shows.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.lists.iter().chain(self.modules.iter().map(|(file, _)| file)).map(PathBuf::as_path)
    }
}

/// Makes `OUT/lib/modules/RELEASE` from the modules in a kernel's build directory (the source tree,
/// or what `O=` named), and indexes it with depmod. Returns the tree's directory.
///
/// The tree needs nothing of the build directory: its modules are copies, or hard links, which are one.
///
/// `out_dir` is to be empty: what it has from an earlier build is not removed.
pub fn tree_from_build(build_dir: &Path, out_dir: &Path) -> Result<PathBuf, ModulesError> {
    let build_dir = fs::canonicalize(build_dir)
        .map_err(|source| ModulesError::Read { path: build_dir.to_owned(), source })?;
    let release = list(&build_dir, "include/config/kernel.release")?;
    let release = String::from_utf8_lossy(&release).trim().to_owned();
    let tree = tree_dir(out_dir, &release)?;

    let mut installed_order = String::new();
    for (source, place) in BuiltModules::find(&build_dir)?.modules {
        put(&source, &tree.join(&place))?;
        installed_order.push_str(&place);
        installed_order.push('\n');
    }
    write(&tree.join(ORDER), installed_order.as_bytes())?;
    for name in BUILTIN_LISTS {
        match list(&build_dir, name) {
            Ok(content) => write(&tree.join(name), &content)?,
            // Kernels before 5.2 have no modules.builtin.modinfo.
            Err(ModulesError::NotBuilt { .. }) if name == "modules.builtin.modinfo" => {}
            Err(error) => return Err(error),
        }
    }
    depmod(out_dir, &release)?;
    Ok(tree)
}

/// The lists of the source's top directories, and of those of its architectures.
fn partial_lists(build_dir: &Path) -> Vec<PathBuf> {
    let of = |dir: PathBuf| {
        let items = fs::read_dir(dir).into_iter().flatten().flatten();
        items.map(|item| item.path().join(ORDER)).filter(|list| list.is_file())
    };
    let mut lists: Vec<PathBuf> =
        of(build_dir.to_owned()).chain(of(build_dir.join("arch"))).collect();
    lists.sort();
    lists
}

fn list(build_dir: &Path, name: &str) -> Result<Vec<u8>, ModulesError> {
    match read_capped(&build_dir.join(name), LIST_LEN_MAX) {
        Err(ModulesError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Err(ModulesError::NotBuilt { dir: build_dir.to_owned(), missing: name.to_owned() })
        }
        other => other,
    }
}

/// The built module that a line of modules.order means, and its place in the tree.
///
/// The lines are `kernel/fs/9p/9p.ko` (before Linux 5.4), `fs/9p/9p.ko`, or `fs/9p/9p.o` (from 6.2
/// on). The source tree has a directory `kernel/` of its own, so the prefix alone tells nothing.
fn find_module(build_dir: &Path, line: &str) -> Option<(PathBuf, String)> {
    let stem = stem(line)?;
    let inside =
        |path: &str| Path::new(path).components().all(|p| matches!(p, Component::Normal(_)));
    [Some(stem), stem.strip_prefix("kernel/")].into_iter().flatten().find_map(|stem| {
        let path = format!("{stem}.ko");
        let source = build_dir.join(&path);
        (inside(&path) && source.is_file()).then(|| (source, format!("kernel/{path}")))
    })
}

fn stem(line: &str) -> Option<&str> {
    line.strip_suffix(".ko").or_else(|| line.strip_suffix(".o"))
}

/// The file that a line of modules.order asks for.
fn wanted(line: &str) -> String {
    stem(line).map_or_else(|| line.to_owned(), |stem| format!("{stem}.ko"))
}

fn put(source: &Path, target: &Path) -> Result<(), ModulesError> {
    let create = |source| ModulesError::Create { path: target.to_owned(), source };
    if let Some(dir) = target.parent() {
        fs::create_dir_all(dir).map_err(create)?;
    }
    place::module(source, target).map_err(create)
}

fn write(path: &Path, content: &[u8]) -> Result<(), ModulesError> {
    let create = |source| ModulesError::Create { path: path.to_owned(), source };
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(create)?;
    }
    fs::write(path, content).map_err(create)
}
