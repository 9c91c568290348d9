//! The index files of a module tree (`man modules.dep`, `Documentation/kbuild/kbuild.rst`).

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Component, Path, PathBuf};

use super::{ModulesError, normalize, read_capped};

/// The largest index file that is read, in bytes. Distribution kernels have 2 MiB.
const INDEX_LEN_MAX: usize = 64 << 20;

/// The names of the index files.
pub(super) const FILES: [&str; 5] = [
    "modules.dep",
    "modules.softdep",
    "modules.alias",
    "modules.builtin",
    "modules.builtin.modinfo",
];

/// A module that is a file.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// Its place, relative to the tree.
    pub(super) path: PathBuf,
    /// The names of the modules that have to be loaded before it, in load order.
    pub(super) needs: Vec<String>,
}

/// The soft dependencies of a module: names or aliases of modules to load before and after it.
#[derive(Debug, Clone, Default)]
pub(super) struct Soft {
    pub(super) before: Vec<String>,
    pub(super) after: Vec<String>,
}

/// What the index files say. All names are normalised.
#[derive(Debug, Clone, Default)]
pub(super) struct Index {
    pub(super) modules: HashMap<String, Entry>,
    pub(super) soft: HashMap<String, Soft>,
    /// Modules by aliases without wildcards.
    aliases: HashMap<String, Vec<String>>,
    /// Names and aliases without wildcards of what is built in.
    builtin: HashSet<String>,
}

impl Index {
    pub(super) fn read(dir: &Path, release: &str) -> Result<Index, ModulesError> {
        let dep = match read_capped(&dir.join("modules.dep"), INDEX_LEN_MAX) {
            Ok(dep) => dep,
            // A tree without an index is another error than no tree.
            Err(ModulesError::Read { source, .. })
                if source.kind() == io::ErrorKind::NotFound && dir.is_dir() =>
            {
                let base = dir.ancestors().nth(3).filter(|base| !base.as_os_str().is_empty());
                return Err(ModulesError::NotIndexed {
                    dir: dir.to_owned(),
                    base: base.unwrap_or(Path::new(".")).to_owned(),
                    release: release.to_owned(),
                });
            }
            Err(error) => return Err(error),
        };
        let bad_index =
            |file: &str, reason: String| ModulesError::BadIndex { path: dir.join(file), reason };
        let text = |file: &str, bytes: Vec<u8>| {
            String::from_utf8(bytes).map_err(|_| bad_index(file, "it is not text".to_owned()))
        };
        // A tree that has no such file has nothing to say there.
        let optional = |file: &str| match read_capped(&dir.join(file), INDEX_LEN_MAX) {
            Ok(bytes) => text(file, bytes),
            Err(ModulesError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(String::new())
            }
            Err(error) => Err(error),
        };

        let mut index = Index::default();
        index
            .add_dep(&text("modules.dep", dep)?)
            .map_err(|reason| bad_index("modules.dep", reason))?;
        index.add_softdep(&optional("modules.softdep")?);
        index.add_alias(&optional("modules.alias")?);
        let builtin = match read_capped(&dir.join("modules.builtin"), INDEX_LEN_MAX) {
            Err(ModulesError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(ModulesError::NoBuiltinList {
                    dir: dir.to_owned(),
                    release: release.to_owned(),
                });
            }
            read => text("modules.builtin", read?)?,
        };
        index.add_builtin(&builtin);
        // Descriptions and author names in it may be in any encoding.
        match read_capped(&dir.join("modules.builtin.modinfo"), INDEX_LEN_MAX) {
            Ok(bytes) => index.add_builtin_modinfo(&String::from_utf8_lossy(&bytes)),
            Err(ModulesError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(index)
    }

    /// The modules that a name stands for: the module of that name, or those with such an alias.
    pub(super) fn resolve(&self, name: &str) -> Vec<&str> {
        match self.modules.get_key_value(name) {
            Some((name, _)) => vec![name],
            None if self.builtin.contains(name) => Vec::new(),
            None => self.aliases.get(name).into_iter().flatten().map(String::as_str).collect(),
        }
    }

    pub(super) fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(name)
    }

    /// Lines like `kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz`,
    /// whose dependencies are to be loaded from the last to the first.
    fn add_dep(&mut self, text: &str) -> Result<(), String> {
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let (path, needs) =
                line.split_once(':').ok_or_else(|| format!("the line {line:?} has no colon"))?;
            let path = Path::new(path.trim());
            if path.components().any(|part| part == Component::ParentDir) {
                return Err(format!("the path {} leaves the tree", path.display()));
            }
            let name = name_of(path)
                .ok_or_else(|| format!("{} is not named like a module", path.display()))?;
            let needs = needs
                .split_ascii_whitespace()
                .rev()
                .map(|path| {
                    name_of(Path::new(path))
                        .ok_or_else(|| format!("{path} is not named like a module"))
                })
                .collect::<Result<_, _>>()?;
            self.modules.entry(name).or_insert(Entry { path: path.to_owned(), needs });
        }
        Ok(())
    }

    /// Lines like `softdep NAME pre: A B post: C`.
    fn add_softdep(&mut self, text: &str) {
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some("softdep"), Some(name)) = (words.next(), words.next()) else { continue };
            let soft = self.soft.entry(normalize(name)).or_default();
            let mut list = None;
            for word in words {
                match (word, &mut list) {
                    ("pre:", _) => list = Some(false),
                    ("post:", _) => list = Some(true),
                    (word, Some(false)) => soft.before.push(normalize(word)),
                    (word, Some(true)) => soft.after.push(normalize(word)),
                    (_, None) => {}
                }
            }
        }
    }

    /// Lines like `alias fs-9p 9p`.
    fn add_alias(&mut self, text: &str) {
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some("alias"), Some(alias), Some(name)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let name = normalize(name);
            if is_exact(alias) && self.modules.contains_key(&name) {
                self.aliases.entry(normalize(alias)).or_default().push(name);
            }
        }
    }

    /// Lines like `kernel/fs/fuse/fuse.ko`.
    fn add_builtin(&mut self, text: &str) {
        self.builtin.extend(text.lines().filter_map(|line| name_of(Path::new(line.trim()))));
    }

    /// NUL-terminated records like `fuse.alias=fs-fuse`.
    fn add_builtin_modinfo(&mut self, text: &str) {
        for record in text.split('\0') {
            let Some((key, alias)) = record.split_once('=') else { continue };
            if key.ends_with(".alias") && is_exact(alias) {
                self.builtin.insert(normalize(alias));
            }
        }
    }
}

fn is_exact(alias: &str) -> bool {
    !alias.contains(['*', '?', '['])
}

/// The normalised name of a module by its file's name, `NAME.ko` with or without the extension of a
/// compression format.
fn name_of(path: &Path) -> Option<String> {
    let (name, extension) = path.file_name()?.to_str()?.split_once(".ko")?;
    let named = !name.is_empty() && (extension.is_empty() || extension.starts_with('.'));
    named.then(|| normalize(name))
}
