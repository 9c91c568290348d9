//! Module trees out of kernel build directories, without `make modules_install`.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::depmod::{depmod, tree_dir};
use super::{ModulesError, place, read_capped};

/// The largest list that is read from a build directory, in bytes.
const LIST_LEN_MAX: usize = 64 << 20;

/// Makes `OUT/lib/modules/RELEASE` from the modules in a kernel's build directory (the source tree,
/// or what `O=` named), and indexes it with depmod. Returns the tree's directory.
///
/// The tree needs nothing of the build directory: its modules are copies, or hard links, which are one.
///
/// `out_dir` is to be empty: what it has from an earlier build is not removed.
pub fn tree_from_build(build_dir: &Path, out_dir: &Path) -> Result<PathBuf, ModulesError> {
    let build_dir = fs::canonicalize(build_dir)
        .map_err(|source| ModulesError::Read { path: build_dir.to_owned(), source })?;
    let list = |name: &str| match read_capped(&build_dir.join(name), LIST_LEN_MAX) {
        Err(ModulesError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Err(ModulesError::NotBuilt { dir: build_dir.clone(), missing: name.to_owned() })
        }
        other => other,
    };
    let release = list("include/config/kernel.release")?;
    let release = String::from_utf8_lossy(&release).trim().to_owned();
    let tree = tree_dir(out_dir, &release)?;
    let order = list("modules.order")?;
    let order = String::from_utf8_lossy(&order).into_owned();

    let mut installed_order = String::new();
    for line in order.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (source, place) = find_module(&build_dir, line).ok_or_else(|| {
            ModulesError::NotBuilt { dir: build_dir.clone(), missing: line.to_owned() }
        })?;
        put(&source, &tree.join(&place))?;
        installed_order.push_str(&place);
        installed_order.push('\n');
    }
    write(&tree.join("modules.order"), installed_order.as_bytes())?;
    for name in ["modules.builtin", "modules.builtin.modinfo"] {
        match list(name) {
            Ok(content) => write(&tree.join(name), &content)?,
            // Kernels before 5.2 have no modules.builtin.modinfo.
            Err(ModulesError::NotBuilt { .. }) if name == "modules.builtin.modinfo" => {}
            Err(error) => return Err(error),
        }
    }
    depmod(out_dir, &release)?;
    Ok(tree)
}

/// The built module that a line of modules.order means, and its place in the tree.
///
/// The lines are `kernel/fs/9p/9p.ko` (before Linux 5.4), `fs/9p/9p.ko`, or `fs/9p/9p.o` (from 6.2
/// on). The source tree has a directory `kernel/` of its own, so the prefix alone tells nothing.
fn find_module(build_dir: &Path, line: &str) -> Option<(PathBuf, String)> {
    let stem = line.strip_suffix(".ko").or_else(|| line.strip_suffix(".o"))?;
    let inside =
        |path: &str| Path::new(path).components().all(|p| matches!(p, Component::Normal(_)));
    [Some(stem), stem.strip_prefix("kernel/")].into_iter().flatten().find_map(|stem| {
        let path = format!("{stem}.ko");
        let source = build_dir.join(&path);
        (inside(&path) && source.is_file()).then(|| (source, format!("kernel/{path}")))
    })
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
