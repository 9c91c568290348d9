//! The sources of modules in a directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::ModuleBuildError;

/// More than modules outside of the kernel's tree have, and little enough to copy in no time.
const MAX_FILES: usize = 5000;
const MAX_BYTES: u64 = 128 << 20;

/// What says how to build it, in the order in which Kbuild looks.
const MAKEFILES: [&str; 2] = ["Kbuild", "Makefile"];

/// What builds leave behind.
const BUILT: [&str; 8] = [".o", ".ko", ".a", ".mod", ".mod.c", ".order", ".symvers", ".cmd"];

/// Directories of programs beside modules, with what was built there.
const OTHER_DIRS: [&str; 2] = ["target", "node_modules"];

/// The directory with programs that test a module, which are no part of it.
const TESTS: &str = "tests";

/// What a directory's files were at some time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceState {
    files: Vec<(PathBuf, Option<(SystemTime, u64)>)>,
}

impl SourceState {
    /// The file that was changed last since an earlier state, and when; `None` where none was changed but by being
    /// removed.
    pub fn last_change(&self, earlier: &Self) -> Option<(&Path, SystemTime)> {
        let changed = self.files.iter().filter(|file| !earlier.files.contains(file));
        let times = changed.filter_map(|(file, state)| Some((file.as_path(), (*state)?.0)));
        times.max_by_key(|(_, time)| *time)
    }
}

/// A directory with the sources of modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleSource {
    dir: PathBuf,
}

impl ModuleSource {
    /// The sources in a directory, which has a Kbuild or a Makefile.
    ///
    /// # Errors
    /// [`ModuleBuildError::NoMakefile`], and when it cannot be found.
    pub fn open(dir: &Path) -> Result<Self, ModuleBuildError> {
        let found = dir.canonicalize().map_err(|e| ModuleBuildError::io("find", dir, e))?;
        match MAKEFILES.iter().any(|name| found.join(name).is_file()) {
            true => Ok(Self { dir: found }),
            false => Err(ModuleBuildError::NoMakefile { dir: found }),
        }
    }

    /// The directory, absolute and without symbolic links.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the directory is called.
    pub fn name(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// What the files are at the moment, to see later whether any was changed, and when that was.
    ///
    /// # Errors
    /// As for a build.
    pub fn state(&self) -> Result<SourceState, ModuleBuildError> {
        let mut files = self.files()?;
        files.extend(self.test_sources());
        let files = files.into_iter().map(|file| {
            let meta = self.dir.join(&file).metadata().ok();
            (file, meta.and_then(|meta| Some((meta.modified().ok()?, meta.len()))))
        });
        Ok(SourceState { files: files.collect() })
    }

    /// What tests of the module are made of, as far as names tell: what is built of it mostly has no ending.
    fn test_sources(&self) -> Vec<PathBuf> {
        let items = fs::read_dir(self.dir.join(TESTS)).into_iter().flatten().flatten();
        let names = items.map(|item| Path::new(TESTS).join(item.file_name()));
        let is_source = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let built = BUILT.iter().any(|end| name.ends_with(end)) || name == "Cargo.lock";
            !built && !name.starts_with('.') && (name == "Makefile" || name.contains('.'))
        };
        names.filter(is_source).collect()
    }

    /// The files that a build may depend on, relative and sorted. Hidden ones, tests and what builds leave behind are
    /// none.
    pub(super) fn files(&self) -> Result<Vec<PathBuf>, ModuleBuildError> {
        let mut files = Vec::new();
        let mut bytes = 0;
        let mut todo = vec![PathBuf::new()];
        while let Some(relative) = todo.pop() {
            let dir = self.dir.join(&relative);
            let list = || -> std::io::Result<Vec<fs::DirEntry>> { fs::read_dir(&dir)?.collect() };
            for item in list().map_err(|e| ModuleBuildError::io("list", &dir, e))? {
                let name = item.file_name();
                let path = relative.join(&name);
                // A link counts as what it leads to. One that leads nowhere is no source.
                let Ok(meta) = item.path().metadata() else { continue };
                let name = name.to_string_lossy();
                if name.starts_with('.') || path == Path::new(TESTS) {
                    continue;
                }
                if meta.is_dir() && !item.path().is_symlink() && !OTHER_DIRS.contains(&&*name) {
                    todo.push(path);
                } else if meta.is_file() && !BUILT.iter().any(|end| name.ends_with(end)) {
                    bytes += meta.len();
                    files.push(path);
                }
            }
            let limit = match () {
                () if files.len() > MAX_FILES => format!("{MAX_FILES} files"),
                () if bytes > MAX_BYTES => format!("{} MiB", MAX_BYTES >> 20),
                () => continue,
            };
            return Err(ModuleBuildError::TooMuch { dir: self.dir.clone(), limit });
        }
        files.sort();
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_builds_leave_is_no_source() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "Makefile",
            "a.c",
            "sub/b.h",
            "a.o",
            "a.ko",
            "a.mod.c",
            ".a.ko.cmd",
            "modules.order",
            "Module.symvers",
            "target/debug/x",
            "tests/number.c",
            ".git/config",
        ] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
        std::os::unix::fs::symlink("nowhere", dir.path().join("gone.h")).unwrap();
        std::os::unix::fs::symlink("a.c", dir.path().join("link.c")).unwrap();
        // A loop.
        std::os::unix::fs::symlink(".", dir.path().join("sub/again")).unwrap();
        let files = ModuleSource::open(dir.path()).unwrap().files().unwrap();
        assert_eq!(files, ["Makefile", "a.c", "link.c", "sub/b.h"].map(PathBuf::from));
    }

    #[test]
    fn changes_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("Makefile"), "obj-m := a.o").unwrap();
        fs::write(dir.path().join("a.c"), "1").unwrap();
        let source = ModuleSource::open(dir.path()).unwrap();
        let before = source.state().unwrap();
        fs::write(dir.path().join("a.o"), "built").unwrap();
        assert_eq!(source.state().unwrap(), before);
        fs::write(dir.path().join("a.c"), "12").unwrap();
        let after = source.state().unwrap();
        assert_eq!(after.last_change(&before).unwrap().0, Path::new("a.c"));
        fs::remove_file(dir.path().join("a.c")).unwrap();
        let removed = source.state().unwrap();
        fs::create_dir(dir.path().join("tests")).unwrap();
        fs::write(dir.path().join("tests/number"), "built").unwrap();
        assert_eq!(source.state().unwrap(), removed);
        fs::write(dir.path().join("tests/number.c"), "source").unwrap();
        let tested = source.state().unwrap();
        assert_eq!(tested.last_change(&removed).unwrap().0, Path::new("tests/number.c"));
        assert!(removed != after && removed.last_change(&after).is_none());
    }

    #[test]
    fn a_directory_without_a_makefile_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = ModuleSource::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("obj-m := mymod.o"), "{error}");
    }
}
