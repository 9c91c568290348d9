//! What tests of a crate have in common: `[package.metadata.vmlab]` of its `Cargo.toml`, and under that
//! `[defaults]` of a `vmlab.toml` beside it.

use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::plan::TestError;

/// The longest file that is read, in bytes: far more than any `Cargo.toml` has.
const MAX_FILE: u64 = 4 * 1024 * 1024;

/// The keys that tests have defaults for. `vmlab.toml` has others, which are of its targets.
const KEYS: [&str; 4] = ["kernel", "memory", "cpus", "timeout"];

/// Values as they are written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Defaults {
    pub(super) kernel: Option<String>,
    pub(super) memory: Option<String>,
    pub(super) cpus: Option<String>,
    pub(super) timeout: Option<String>,
}

impl Defaults {
    /// Those of the crate in a directory.
    pub(super) fn of(dir: &Path) -> Result<Self, TestError> {
        let mut defaults = Self::default();
        defaults.read(&dir.join("vmlab.toml"), &["defaults"], false)?;
        defaults.read(&dir.join("Cargo.toml"), &["package", "metadata", "vmlab"], true)?;
        Ok(defaults)
    }

    /// Takes what a table of a file has, if both are there. `whole` says that the table has nothing else.
    fn read(&mut self, file: &Path, path: &[&str], whole: bool) -> Result<(), TestError> {
        let bad = |why: String| TestError::Defaults { path: file.to_owned(), why };
        let text = match read_text(file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(bad(error.to_string())),
        };
        let document = DeTable::parse(&text).map_err(|error| bad(error.message().to_owned()))?;
        let mut table = document.get_ref();
        for name in path {
            match table.get(*name).map(toml::Spanned::get_ref) {
                Some(DeValue::Table(inner)) => table = inner,
                Some(_) => return Err(bad(format!("`{name}` is no table"))),
                None => return Ok(()),
            }
        }
        let table_name = path.join(".");
        for (key, value) in table {
            let key: &str = key.get_ref();
            let name = key.replace('-', "_");
            if !KEYS.contains(&name.as_str()) {
                if whole {
                    let known = KEYS.join(", ");
                    return Err(bad(format!("[{table_name}] has no `{key}`; there are {known}")));
                }
                continue;
            }
            let text = match value.get_ref() {
                DeValue::String(text) => text.to_string(),
                DeValue::Integer(number) => number.as_str().to_owned(),
                _ => {
                    let why = format!("`{key}` of [{table_name}] is neither a string nor a number");
                    return Err(bad(why));
                }
            };
            *match name.as_str() {
                "kernel" => &mut self.kernel,
                "memory" => &mut self.memory,
                "cpus" => &mut self.cpus,
                _ => &mut self.timeout,
            } = Some(text);
        }
        Ok(())
    }
}

fn read_text(file: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(file)?.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crates_own_are_above_those_of_its_targets() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Defaults::of(dir.path()).unwrap(), Defaults::default());
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            "vmlab.toml",
            "[defaults]\nkernel = \"debian:6.1\"\nmemory = 512\nfail-on = [\"none\"]\n",
        );
        write(
            "Cargo.toml",
            "[package]\nname = \"x\"\n[package.metadata.vmlab]\nkernel = \"debian:6.12\"\ncpus = 2\n",
        );
        let defaults = Defaults::of(dir.path()).unwrap();
        let text = |text: &str| Some(text.to_owned());
        let wanted = Defaults {
            kernel: text("debian:6.12"),
            memory: text("512"),
            cpus: text("2"),
            timeout: None,
        };
        assert_eq!(defaults, wanted);
        for (table, why) in [
            ("kernal = \"x\"", "has no `kernal`; there are kernel, memory"),
            ("kernel = true", "neither a string nor a number"),
            ("kernel = ", "Cargo.toml"),
        ] {
            write("Cargo.toml", &format!("[package.metadata.vmlab]\n{table}\n"));
            let error = Defaults::of(dir.path()).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
