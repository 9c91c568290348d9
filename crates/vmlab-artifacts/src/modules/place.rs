//! Putting files of one directory into another, as cheaply as the filesystem allows.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// Makes `target` a copy of the module `source` that needs nothing of its place: by sharing its blocks
/// (reflink), as a second name (hard link), or byte by byte. `target` is not to be there.
///
/// A hard link follows a build that changes the module in place; tools mostly replace their output.
pub(crate) fn module(source: &Path, target: &Path) -> io::Result<()> {
    if reflink(source, target).is_ok() || fs::hard_link(source, target).is_ok() {
        return Ok(());
    }
    // Never onto a file that is there: it could be a hard link to the source, and would empty it.
    let mut from = File::open(source)?;
    io::copy(&mut from, &mut new_file(target)?).map(drop)
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}

fn reflink(source: &Path, target: &Path) -> io::Result<()> {
    let from = File::open(source)?;
    let to = new_file(target)?;
    let cloned = rustix::fs::ioctl_ficlone(&to, &from);
    if cloned.is_err() {
        fs::remove_file(target)?;
    }
    Ok(cloned?)
}

/// Whether a file is a module, compressed or not.
pub(crate) fn is_module(path: &Path) -> bool {
    path.file_name().is_some_and(|name| {
        let name = name.to_string_lossy();
        name.ends_with(".ko") || name.contains(".ko.")
    })
}

/// Places the files of `from` in `to`, each in a directory as it was in. What is no module is copied,
/// for depmod may write to it.
pub(crate) fn tree(from: &Path, to: &Path) -> io::Result<()> {
    for file in files(from)? {
        let target = to.join(file.strip_prefix(from).unwrap_or(&file));
        if let Some(dir) = target.parent() {
            fs::create_dir_all(dir)?;
        }
        match is_module(&file) {
            true => module(&file, &target)?,
            false => fs::copy(&file, &target).map(drop)?,
        }
    }
    // A tree without any file is one, too.
    fs::create_dir_all(to)
}

/// The files of a tree, sorted; no links, which in a module tree lead to its kernel's source.
pub(crate) fn files(tree: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut todo = vec![tree.to_owned()];
    while let Some(dir) = todo.pop() {
        for item in fs::read_dir(dir)? {
            let item = item?;
            match item.file_type()? {
                kind if kind.is_dir() => todo.push(item.path()),
                kind if kind.is_file() => files.push(item.path()),
                _ => {}
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_placed_without_symbolic_links() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("kernel/fs")).unwrap();
        fs::write(from.join("kernel/fs/a.ko.xz"), "a").unwrap();
        fs::write(from.join("modules.order"), "old").unwrap();
        std::os::unix::fs::symlink("/usr/src", from.join("build")).unwrap();
        tree(&from, &to).unwrap();
        // The list can be rewritten without harm, and the source can go.
        fs::write(to.join("modules.order"), "new").unwrap();
        assert_eq!(fs::read_to_string(from.join("modules.order")).unwrap(), "old");
        fs::remove_dir_all(&from).unwrap();
        assert_eq!(fs::read_to_string(to.join("kernel/fs/a.ko.xz")).unwrap(), "a");
        assert!(!to.join("build").is_symlink());
    }

    #[test]
    fn another_filesystem_gets_a_copy() {
        // /dev/shm is a filesystem of its own.
        let other = tempfile::tempdir_in("/dev/shm").unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.ko"), "a").unwrap();
        module(&dir.path().join("a.ko"), &other.path().join("a.ko")).unwrap();
        assert_eq!(fs::read_to_string(other.path().join("a.ko")).unwrap(), "a");
        assert!(module(&dir.path().join("none.ko"), &other.path().join("b.ko")).is_err());
        assert!(!other.path().join("b.ko").exists());
    }

    #[test]
    fn a_file_that_is_there_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a.ko"), dir.path().join("b.ko"));
        fs::write(&source, "a").unwrap();
        module(&source, &target).unwrap();
        assert!(module(&source, &target).is_err());
        assert_eq!(fs::read_to_string(&source).unwrap(), "a");
    }
}
