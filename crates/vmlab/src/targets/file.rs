//! A whole file: what is at its top, and what targets have from it.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::document::{self, Entry, Node, Table, Value};
use super::lower::{self, Context};
use super::matrix::{self, Expanded, MAX_TARGETS};
use super::problem::{Problems, TargetFileError};
use super::spelling::{check_vmtest, unify, unknown};
use super::table::{DiskTable, ShareTable, TargetTable};
use super::value::{FromNode, expected};
use super::{FileKind, Target};
use crate::Disk;
use crate::share::Share;

/// The keys at the top of vmlab.toml.
pub(super) const KEYS: [&str; 5] = ["defaults", "shares", "disks", "target", "matrix"];

/// Keys of which a target has one or the other: who gives one does not inherit the other.
const ALTERNATIVES: [[&str; 2]; 2] = [["kernel", "image"], ["cpus", "topology"]];

/// Reads a file. `dir` is what relative paths are from.
pub(super) fn read(
    text: &str,
    kind: FileKind,
    path: &Path,
    dir: &Path,
) -> Result<Vec<Target>, TargetFileError> {
    let mut problems = Problems::new(text);
    problems.snake = kind == FileKind::Vmtest;
    let top = document::parse(text, &mut problems);
    if !problems.is_empty() {
        // What comes after a mistake in the syntax may have been meant otherwise.
        return Err(problems.into_error(path));
    }
    let targets = File::new(kind, dir).read(top, &mut problems);
    if problems.is_empty() { Ok(targets) } else { Err(problems.into_error(path)) }
}

struct File<'a> {
    kind: FileKind,
    dir: &'a Path,
    defaults: Table,
    shares: BTreeMap<String, Share>,
    disks: BTreeMap<String, Disk>,
}

impl<'a> File<'a> {
    fn new(kind: FileKind, dir: &'a Path) -> Self {
        let (defaults, shares, disks) = Default::default();
        Self { kind, dir, defaults, shares, disks }
    }

    fn read(mut self, top: Table, problems: &mut Problems<'_>) -> Vec<Target> {
        let mut tables: Vec<(Node, bool)> = Vec::new();
        for Entry { key, node } in top.entries {
            match (key.value.as_str(), self.kind) {
                ("target", _) => {
                    tables.extend(array("target", node, problems).into_iter().map(|t| (t, false)));
                }
                ("matrix", FileKind::Vmlab) => {
                    tables.extend(array("matrix", node, problems).into_iter().map(|t| (t, true)));
                }
                ("defaults", FileKind::Vmlab) => self.read_defaults(node, problems),
                ("shares", FileKind::Vmlab) => self.read_shares(&node, problems),
                ("disks", FileKind::Vmlab) => self.read_disks(&node, problems),
                (name, FileKind::Vmtest) if KEYS.contains(&name) => {
                    let message = format!("`{name}` is a key that only vmlab.toml has");
                    problems.add(&key.span, message);
                }
                (_, FileKind::Vmtest) => unknown(&key, "key of the file", &["target"], problems),
                (_, FileKind::Vmlab) => unknown(&key, "key of the file", &KEYS, problems),
            }
        }
        if tables.is_empty() && problems.is_empty() {
            problems.add(&(0..0), "the file has no [[target]]");
        }
        tables.sort_by_key(|(node, _)| node.span.start);
        let mut nodes: Vec<Expanded> = Vec::new();
        for (node, is_matrix) in tables {
            let Node { value: Value::Table(mut table), span } = node else {
                expected::<()>("a table", &node, problems);
                continue;
            };
            if self.kind == FileKind::Vmtest {
                check_vmtest(&mut table, problems);
            }
            let mut table = unify(table, problems);
            if is_matrix {
                nodes.extend(matrix::expand(table, &span, |t| self.inherit(t), problems));
            } else {
                self.inherit(&mut table);
                nodes.push((Node { value: Value::Table(table), span }, Vec::new()));
            }
            if nodes.len() > MAX_TARGETS {
                problems.add(&(0..0), format!("the file has more than {MAX_TARGETS} targets"));
                return Vec::new();
            }
        }
        self.targets(nodes, problems)
    }

    fn targets(&self, nodes: Vec<Expanded>, problems: &mut Problems<'_>) -> Vec<Target> {
        let context =
            Context { dir: self.dir, kind: self.kind, shares: &self.shares, disks: &self.disks };
        let mut targets: Vec<Target> = Vec::new();
        // Where the target of a name is.
        let mut names: BTreeMap<String, usize> = BTreeMap::new();
        let mut numbers: BTreeMap<String, usize> = BTreeMap::new();
        for (node, axes) in nodes {
            let Some(mut target) = lower::target(&node, &context, problems) else { continue };
            target.axes = axes;
            if self.kind == FileKind::Vmtest {
                // There, names need not be different.
                let name = target.name.clone();
                let number = numbers.entry(name.clone()).or_insert(1);
                while names.contains_key(&target.name) {
                    *number += 1;
                    target.name = format!("{name} #{number}");
                }
            }
            if let Some(other) = names.get(&target.name) {
                let name = &target.name;
                let message = match *other == node.span.start {
                    true => format!(
                        "this matrix makes two targets `{name}`: its `name` has to have each axis in it"
                    ),
                    false => {
                        let line = problems.line(*other);
                        format!(
                            "two targets are called `{name}`: this one, and that of line {line}"
                        )
                    }
                };
                problems.add(&node.span, message);
            }
            names.entry(target.name.clone()).or_insert(node.span.start);
            targets.push(target);
        }
        targets
    }

    fn read_defaults(&mut self, node: Node, problems: &mut Problems<'_>) {
        let Node { value: Value::Table(table), span } = node else {
            expected::<()>("a table", &node, problems);
            return;
        };
        if let Some(name) = table.get("name") {
            problems.add(&name.key.span, "each target has a name of its own");
        }
        self.defaults = unify(table, problems);
        // What is wrong with them is wrong even if no target inherits it.
        let node = Node { value: Value::Table(self.defaults.clone()), span };
        let _ = TargetTable::from_node(&node, problems);
        // That was said; each target would only have it again, and there may be many of both.
        self.defaults.entries.retain(|entry| TargetTable::KEYS.contains(&entry.key.value.as_str()));
    }

    fn read_shares(&mut self, node: &Node, problems: &mut Problems<'_>) {
        let Value::Table(table) = &node.value else {
            expected::<()>("a table of shares", node, problems);
            return;
        };
        for Entry { key, node } in &table.entries {
            if let Some(table) = ShareTable::from_node(node, problems)
                && let Some(share) = lower::named_share(table, &key.span, self.dir, problems)
            {
                self.shares.insert(key.value.clone(), share);
            }
        }
    }

    fn read_disks(&mut self, node: &Node, problems: &mut Problems<'_>) {
        let Value::Table(table) = &node.value else {
            expected::<()>("a table of disks", node, problems);
            return;
        };
        for Entry { key, node } in &table.entries {
            if let Some(table) = DiskTable::from_node(node, problems)
                && let Some(disk) = lower::named_disk(table, key, self.dir, problems)
            {
                self.disks.insert(key.value.clone(), disk);
            }
        }
    }

    /// Adds the defaults that apply to a target and that it does not say otherwise.
    fn inherit(&self, target: &mut Table) {
        let own = target.clone();
        let is_settled = |key: &str| {
            let alternatives = ALTERNATIVES.iter().find(|keys| keys.contains(&key));
            own.has(key) || alternatives.is_some_and(|keys| keys.iter().any(|key| own.has(key)))
        };
        for entry in &self.defaults.entries {
            match entry.key.value.as_str() {
                "env" if own.has("env") => inherit_env(target, entry),
                key if !is_settled(key) => target.set(entry.clone()),
                _ => {}
            }
        }
        let (kernel, image) = (target.has("kernel"), target.has("image"));
        let is_true = |key: &str| {
            target.get(key).is_some_and(|entry| entry.node.value == Value::Boolean(true))
        };
        let uefi = is_true("uefi");
        target.entries.retain(|entry| {
            let key = entry.key.value.as_str();
            let applies = match key {
                "rootfs" | "root_mode" => !image,
                "append" | "fast" => kernel || !image,
                "persist" => image,
                "uefi" => image && !kernel,
                "secure_boot" | "bios" => image && !kernel && uefi,
                _ => true,
            };
            applies || own.has(key)
        });
    }
}

/// Adds the variables of the defaults that a target does not set itself.
fn inherit_env(target: &mut Table, defaults: &Entry) {
    let env = target.entries.iter_mut().find(|entry| entry.key.value == "env");
    let (Some(Entry { node: Node { value: Value::Table(env), .. }, .. }), Value::Table(more)) =
        (env, &defaults.node.value)
    else {
        return;
    };
    let own: HashSet<String> = env.entries.iter().map(|entry| entry.key.value.clone()).collect();
    let inherited = more.entries.iter().filter(|entry| !own.contains(&entry.key.value));
    env.entries.extend(inherited.cloned());
}

/// The elements of an array of tables.
fn array(name: &str, node: Node, problems: &mut Problems<'_>) -> Vec<Node> {
    match node.value {
        Value::Array(nodes) => nodes,
        _ => {
            let what = format!("an array of tables, each begun by [[{name}]]");
            expected::<()>(&what, &node, problems);
            Vec::new()
        }
    }
}
