//! A module's own tests: programs in its directory `tests`, built on the host where there is something to build, and run in
//! the guest while the module is loaded.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use serde_json::Value;
use vmlab_artifacts::dies_with_us;

use crate::Error;
use crate::sync::lock;

/// The directory, in that of the module.
const DIR: &str = "tests";

/// The exit code of a program that cannot run here (`KSFT_SKIP` of kselftest).
pub(crate) const SKIPPED: u8 = 4;

/// A program that tests the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OwnTest {
    /// What it is called.
    pub(crate) name: String,
    /// The program, at the same place in the guest.
    pub(crate) program: PathBuf,
}

/// Builds the tests of a module's directory and lists them; none where it has none.
///
/// `tests/Makefile` is made, in that directory, with `VMLAB_MODULE_DIR` in its environment. `tests/Cargo.toml` has its tests
/// built. Programs are those, and all files in `tests` that can be executed.
///
/// # Errors
/// What the build said.
pub(crate) fn build(module: &Path) -> Result<Vec<OwnTest>, Error> {
    let dir = module.join(DIR);
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    // One at a time: builds for several kernels are the same ones.
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one = lock(&BUILDING);
    if dir.join("Makefile").is_file() {
        run(Command::new("make").arg("-C").arg(&dir), module)?;
    }
    let mut tests = match dir.join("Cargo.toml") {
        manifest if manifest.is_file() => of_cargo(&manifest, module)?,
        _ => Vec::new(),
    };
    tests.extend(programs(&dir).map_err(|source| Error::Io {
        what: "list the tests in",
        path: dir,
        source,
        hint: "",
    })?);
    Ok(tests)
}

/// The files in a directory that can be executed, by name.
fn programs(dir: &Path) -> io::Result<Vec<OwnTest>> {
    let mut tests = Vec::new();
    for item in std::fs::read_dir(dir)? {
        let program = item?.path();
        let meta = program.metadata()?;
        if meta.is_file() && meta.permissions().mode() & 0o111 != 0 {
            let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
            tests.push(OwnTest { name, program });
        }
    }
    tests.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tests)
}

/// The test programs of a crate.
fn of_cargo(manifest: &Path, module: &Path) -> Result<Vec<OwnTest>, Error> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["test", "--no-run", "--message-format=json-render-diagnostics"]);
    // Beside the tests, whatever the environment says: there the guest sees it.
    let target = manifest.with_file_name("target");
    cargo.arg("--manifest-path").arg(manifest).arg("--target-dir").arg(target);
    let said = run(&mut cargo, module)?;
    let messages = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let test = |message: Value| {
        let program = PathBuf::from(message.get("executable")?.as_str()?);
        message.pointer("/profile/test")?.as_bool()?.then_some(())?;
        let name = message.pointer("/target/name")?.as_str()?.to_owned();
        Some(OwnTest { name, program })
    };
    Ok(messages.filter_map(test).collect())
}

/// Runs a build and gives what it wrote to its output.
fn run(command: &mut Command, module: &Path) -> Result<String, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |words: String| Error::ModuleTests { program: program.clone(), words };
    command.env("VMLAB_MODULE_DIR", module).env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    dies_with_us(command);
    let output = command.stdin(Stdio::null()).output().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => failed("it is not here; it has to be in PATH".to_owned()),
        _ => failed(e.to_string()),
    })?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim_end().to_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_built_and_found() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(build(dir.path()).unwrap(), []);
        let tests = dir.path().join("tests");
        std::fs::create_dir(&tests).unwrap();
        std::fs::write(tests.join("data"), "").unwrap();
        let makefile =
            "all:\n\techo '#!/bin/sh' > b.sh\n\tchmod 755 b.sh\n\ttest -d \"$$VMLAB_MODULE_DIR\"\n";
        std::fs::write(tests.join("Makefile"), makefile).unwrap();
        std::fs::write(tests.join("a.sh"), "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(tests.join("a.sh"), PermissionsExt::from_mode(0o755)).unwrap();
        let found = build(dir.path()).unwrap();
        let names: Vec<&str> = found.iter().map(|test| test.name.as_str()).collect();
        assert_eq!(names, ["a.sh", "b.sh"]);
        std::fs::write(tests.join("Makefile"), "all:\n\techo this is wrong >&2; false\n").unwrap();
        let error = build(dir.path()).unwrap_err().to_string();
        assert!(error.contains("this is wrong"), "{error}");
    }
}
