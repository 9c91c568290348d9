//! Running Kbuild in a directory that is kept for the next time.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{MODULES, ModuleBuildError, ModuleSource};
use crate::cache::open_lock_file;
use crate::{BuildTree, Cache, ContentKey, Digest, child, find_program};

/// Below the kind's directory: the directories that builds run in. They are no entries.
const WORK: &str = ".work";

/// Work directories that were not used for so long are removed.
const KEPT_FOR: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// The names of the sources in a work directory, a line each.
const SOURCES: &str = ".vmlab-sources";

/// What a build sees of the environment.
const KEPT_VARIABLES: [&str; 5] = ["PATH", "HOME", "TMPDIR", "USER", "LOGNAME"];

/// The most that is kept of what `make` says, in bytes.
const MAX_LOG: u64 = 16 << 20;

/// How many lines of it an error has: the first errors are what counts, and the last lines say who failed.
const SHOWN_LINES: usize = 60;

/// The compiler and what is made for it to be used.
#[derive(Debug)]
pub(super) struct Toolchain {
    make: PathBuf,
    compiler: PathBuf,
    /// Variables on the command line of `make`.
    variables: Vec<String>,
    /// The compiler that the kernel was built with, if it is not here.
    missing: Option<String>,
}

impl Toolchain {
    /// That of a build tree: the compiler that the kernel was built with if it is here, else one of its kind.
    pub(super) fn of(tree: &Path) -> Result<Self, ModuleBuildError> {
        let path = tree.join(".config");
        let config =
            fs::read_to_string(&path).map_err(|e| ModuleBuildError::io("read", &path, e))?;
        let clang = config.lines().any(|line| line == "CONFIG_CC_IS_CLANG=y");
        let usual = if clang { "clang" } else { "gcc" };
        let named = compiler_of(&config).filter(|name| find_program(name).is_some());
        let name = named.unwrap_or(usual);
        let another = named.is_none();
        let find = |program: &str, package: &str| {
            let (name, package) = (program.to_owned(), package.to_owned());
            find_program(program).ok_or(ModuleBuildError::Tool { program: name, package })
        };
        let mut variables = match clang {
            true => vec!["LLVM=1".to_owned()],
            false => vec![format!("CC={name}")],
        };
        // An older compiler may not have what the kernel's has. Kbuild knows another way where this is not set.
        if another {
            variables.push("CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT=".to_owned());
        }
        // Types of the module for BPF need a program that a module does without.
        if find_program("pahole").is_none() {
            variables.push("CONFIG_DEBUG_INFO_BTF_MODULES=".to_owned());
        }
        let missing = compiler_of(&config).filter(|_| another).map(str::to_owned);
        Ok(Self { make: find("make", "make")?, compiler: find(name, usual)?, variables, missing })
    }

    /// What to do about a host that is older than the kernel's distribution, where that is why.
    fn hint(&self, said: &str) -> String {
        if said.contains("GLIBC_") && said.contains("' not found") {
            return "\nThe programs of these headers need a newer C library than this host has: build on the \
                kernel's own distribution, or take an older kernel"
                .to_owned();
        }
        match &self.missing {
            Some(missing) if said.contains("unrecognized command-line option") => {
                format!(
                    "\nThe kernel was built with {missing}, which is not here: apt-get install {missing}"
                )
            }
            _ => String::new(),
        }
    }

    /// Changes when the compiler does.
    pub(super) fn key(&self, cache: &Cache) -> Result<String, ModuleBuildError> {
        let failed = |e| ModuleBuildError::io("read", &self.compiler, e);
        let file = self.compiler.canonicalize().map_err(failed)?;
        let key = ContentKey::new("toolchain-1").field("variables", self.variables.join(" "));
        Ok(key.known_file(cache, "compiler", &file).map_err(failed)?.finish())
    }
}

/// The name of the compiler that a kernel was built with: `gcc-12` of `gcc-12 (Debian 12.2.0-14) 12.2.0`.
fn compiler_of(config: &str) -> Option<&str> {
    let text = config.lines().find_map(|line| line.strip_prefix("CONFIG_CC_VERSION_TEXT=\""))?;
    let name = text.split(' ').next()?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (!name.is_empty() && name.chars().all(plain)).then_some(name)
}

/// What `make` said.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Log {
    pub(super) text: String,
    pub(super) warnings: Vec<String>,
}

/// A directory that one build at a time runs in.
#[derive(Debug)]
pub(super) struct Work {
    dir: PathBuf,
    /// Held until the end.
    _lock: File,
}

impl Work {
    /// The one for these sources and this tree, once nobody else uses it.
    pub(super) fn open(
        cache: &Cache,
        source: &ModuleSource,
        tree: &BuildTree,
    ) -> Result<Self, ModuleBuildError> {
        let all = cache.root().join(MODULES).join(WORK);
        let make = |dir: &Path| {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(|e| ModuleBuildError::io("make", dir, e))
        };
        make(&all)?;
        let key = ContentKey::new("module-work-1")
            .field("dir", source.dir().as_os_str().as_encoded_bytes())
            .field("tree", tree.dir.as_os_str().as_encoded_bytes())
            .finish();
        let dir = all.join(&key[..24]);
        let path = all.join(format!("{}.lock", &key[..24]));
        let failed = |e| ModuleBuildError::io("lock", &path, e);
        let lock = open_lock_file(&path).map_err(failed)?;
        lock.lock().map_err(failed)?;
        // Its time says when it was used last.
        lock.set_modified(std::time::SystemTime::now()).map_err(failed)?;
        sweep(&all);
        make(&dir)?;
        Ok(Self { dir, _lock: lock })
    }

    /// Makes the sources what they were when they were hashed. What has not changed keeps its time, so that it is not built
    /// again.
    ///
    /// # Errors
    /// [`ModuleBuildError::Changed`] when one was changed since.
    pub(super) fn take(
        &self,
        source: &ModuleSource,
        files: &[(PathBuf, Digest)],
    ) -> Result<(), ModuleBuildError> {
        let list = self.dir.join(SOURCES);
        let earlier = fs::read_to_string(&list).unwrap_or_default();
        let now: BTreeSet<&str> = files.iter().filter_map(|(file, _)| file.to_str()).collect();
        for gone in earlier.lines().filter(|name| !now.contains(name)) {
            // One that is not there is gone already.
            let _ = fs::remove_file(self.dir.join(gone));
        }
        for (file, digest) in files {
            let (from, to) = (source.dir().join(file), self.dir.join(file));
            let content = fs::read(&from).map_err(|e| ModuleBuildError::io("read", &from, e))?;
            if Digest::of(&content) != *digest {
                return Err(ModuleBuildError::Changed { dir: source.dir().to_owned() });
            }
            if fs::read(&to).is_ok_and(|there| there == content) {
                continue;
            }
            let parent = to.parent().unwrap_or(&self.dir);
            fs::create_dir_all(parent).map_err(|e| ModuleBuildError::io("make", parent, e))?;
            // One that could not be written to, or a directory, may be in its place.
            let _ = fs::remove_file(&to).or_else(|_| fs::remove_dir_all(&to));
            let written = fs::write(&to, &content).and_then(|()| {
                // A script of a build has to stay one that can be run.
                let executable = fs::metadata(&from)?.permissions().mode() & 0o111;
                fs::set_permissions(&to, Permissions::from_mode(0o600 | executable))
            });
            written.map_err(|e| ModuleBuildError::io("write", &to, e))?;
        }
        let names: String = now.iter().map(|name| format!("{name}\n")).collect();
        fs::write(&list, names).map_err(|e| ModuleBuildError::io("write", &list, e))
    }

    /// Builds.
    pub(super) fn make(
        &self,
        source: &ModuleSource,
        tree: &BuildTree,
        toolchain: &Toolchain,
    ) -> Result<Log, ModuleBuildError> {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let mut command = Command::new(&toolchain.make);
        command.arg("-C").arg(&tree.dir).arg(format!("-j{jobs}")).arg("--no-print-directory");
        let work = self.dir.display();
        command.arg(format!("M={work}")).args(&toolchain.variables);
        command.arg(format!("KCFLAGS={}", self.prefix_maps(source, tree))).arg("modules");
        // What else is in the environment may be meant for another build, and is no part of the key.
        command.env_clear().env("LANG", "C");
        command
            .envs(KEPT_VARIABLES.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        let failed = |e| ModuleBuildError::io("run", &toolchain.make, e);
        let (reader, writer) = io::pipe().map_err(failed)?;
        command.stdin(Stdio::null());
        command.stdout(writer.try_clone().map_err(failed)?).stderr(writer);
        child::dies_with_us(&mut command);
        let mut child = command.spawn().map_err(failed)?;
        // It has the writing ends, without which the pipe would not end.
        drop(command);
        let mut said = Vec::new();
        (&reader).take(MAX_LOG).read_to_end(&mut said).map_err(failed)?;
        drop(reader);
        let status = child.wait().map_err(failed)?;
        let text = String::from_utf8_lossy(&said);
        let text = text.replace(&*self.dir.to_string_lossy(), &source.dir().to_string_lossy());
        if !status.success() {
            return Err(ModuleBuildError::Failed {
                dir: source.dir().to_owned(),
                tree: tree.dir.clone(),
                words: shown(&text) + &toolchain.hint(&text),
            });
        }
        Ok(Log { warnings: warnings(&text), text })
    }

    /// Arguments for the compiler by which debug information names the user's files and not the copies, and headers as the
    /// kernel's own does: include/linux/slab.h. The last that fits counts.
    fn prefix_maps(&self, source: &ModuleSource, tree: &BuildTree) -> String {
        let mut maps = vec![format!("{}={}", self.dir.display(), source.dir().display())];
        for top in &tree.sources {
            let top = top.display();
            maps.extend([format!("{top}=."), format!("{top}/=")]);
        }
        // Kbuild has no way to quote them.
        maps.retain(|map| !map.contains(|c: char| c.is_whitespace() || "'\"\\$#".contains(c)));
        let flags = maps.iter().map(|map| format!("-ffile-prefix-map={map}"));
        flags.collect::<Vec<String>>().join(" ")
    }

    /// Copies the modules that were built into `entry`, and gives their names.
    pub(super) fn collect(
        &self,
        source: &ModuleSource,
        entry: &Path,
    ) -> Result<Vec<PathBuf>, ModuleBuildError> {
        let order = self.dir.join("modules.order");
        let order = fs::read_to_string(&order).unwrap_or_default();
        let mut names = Vec::new();
        for line in order.lines() {
            // Older kernels list modules, later ones what they are made of; either by path or from the directory on.
            let listed = Path::new(line).with_extension("ko");
            let from = self.dir.join(listed.strip_prefix(&self.dir).unwrap_or(&listed));
            let Some(name) = from.file_name().map(PathBuf::from) else { continue };
            let copied = fs::copy(&from, entry.join(&name));
            copied.map_err(|e| ModuleBuildError::io("take the module", &from, e))?;
            names.push(name);
        }
        match names.is_empty() {
            true => Err(ModuleBuildError::NoModules { dir: source.dir().to_owned() }),
            false => Ok(names),
        }
    }
}

/// Removes work directories that were not used for long.
fn sweep(all: &Path) {
    let Ok(items) = fs::read_dir(all) else { return };
    for path in items.flatten().map(|item| item.path()) {
        let old = || path.metadata().ok()?.modified().ok()?.elapsed().ok();
        if path.extension().is_none_or(|ext| ext != "lock")
            || old().is_none_or(|age| age < KEPT_FOR)
        {
            continue;
        }
        // One that is in use has its lock held. What cannot be removed stays until the next time.
        if File::open(&path).is_ok_and(|lock| lock.try_lock().is_ok()) {
            let _ = fs::remove_dir_all(path.with_extension(""));
            let _ = fs::remove_file(&path);
        }
    }
}

/// The compiler's and modpost's warnings, each with the lines of the source that are shown with it.
fn warnings(text: &str) -> Vec<String> {
    let mut warnings: Vec<String> = Vec::new();
    let mut within = false;
    for line in text.lines() {
        if line.contains(": warning: ") || line.starts_with("WARNING: ") {
            warnings.push(line.to_owned());
            within = true;
        } else if within && line.starts_with(' ') && !is_step(line) {
            if let Some(warning) = warnings.last_mut() {
                warning.push('\n');
                warning.push_str(line);
            }
        } else {
            within = false;
        }
    }
    warnings
}

/// Whether a line only says what is being built: `  CC [M]  /home/me/mymod/mymod.o`.
fn is_step(line: &str) -> bool {
    line.strip_prefix("  ").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase()))
}

/// The part of what `make` said that explains a failure.
fn shown(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !is_step(line)).collect();
    let left_out = lines.len().saturating_sub(SHOWN_LINES);
    let mut shown = lines[..lines.len() - left_out].join("\n");
    if left_out > 0 {
        shown.push_str(&format!("\n({left_out} more lines)"));
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "  CC [M]  /m/a.o
/m/a.c: In function 'f':
/m/a.c:5:9: warning: unused variable 'x' [-Wunused-variable]
    5 |     int x;
      |         ^
  MODPOST /m/Module.symvers
WARNING: modpost: missing MODULE_DESCRIPTION() in /m/a.o
  LD [M]  /m/a.ko
";

    #[test]
    fn warnings_have_the_lines_that_belong_to_them() {
        assert_eq!(
            warnings(SAID),
            [
                "/m/a.c:5:9: warning: unused variable 'x' [-Wunused-variable]\n    5 |     int x;\n      |         ^",
                "WARNING: modpost: missing MODULE_DESCRIPTION() in /m/a.o",
            ]
        );
    }

    #[test]
    fn failures_are_shown_without_what_went_well() {
        assert!(shown(SAID).starts_with("/m/a.c: In function"), "{}", shown(SAID));
        assert!(!shown(SAID).contains("CC [M]"));
        assert!(shown(&"x\n".repeat(100)).ends_with("\n(40 more lines)"));
    }

    #[test]
    fn hosts_that_are_too_old_are_told() {
        let missing = Some("gcc-16".to_owned());
        let (make, compiler) = ("make".into(), "gcc".into());
        let toolchain = Toolchain { make, compiler, variables: Vec::new(), missing };
        let hint = toolchain.hint("gcc: error: unrecognized command-line option '-fnew'");
        assert!(hint.contains("apt-get install gcc-16"), "{hint}");
        let hint = toolchain.hint("objtool: libc.so.6: version `GLIBC_2.38' not found");
        assert!(hint.contains("newer C library"), "{hint}");
        assert_eq!(toolchain.hint("error: x"), "");
    }

    #[test]
    fn the_kernels_compiler_is_known() {
        let config = "CONFIG_X=y\nCONFIG_CC_VERSION_TEXT=\"gcc-12 (Debian 12.2.0-14) 12.2.0\"\n";
        assert_eq!(compiler_of(config), Some("gcc-12"));
        assert_eq!(compiler_of("CONFIG_CC_VERSION_TEXT=\"/bin/sh -c (x)\"\n"), None);
        assert_eq!(compiler_of(""), None);
    }
}
