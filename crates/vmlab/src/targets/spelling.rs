//! How keys are written: with `-` or `_`, by vmlab's names or by vmtest's.

use vmlab_artifacts::nearest;

use super::document::{At, Entry, Node, Span, Table, Value};
use super::problem::Problems;
use super::table::{TargetTable, VmTable};

/// The keys that vmtest's targets have.
const VMTEST_KEYS: &[&str] = &[
    "name",
    "image",
    "uefi",
    "kernel",
    "kernel_args",
    "rootfs",
    "arch",
    "kvm_cpu_args",
    "qemu_command",
    "command",
    "vm",
];

/// vmtest's names of keys in `[target.vm]`, and what they are called beside `name`.
const VM_KEYS: &[(&str, &str)] =
    &[("num_cpus", "cpus"), ("memory", "memory"), ("bios", "bios"), ("extra_args", "qemu_args")];

/// A key with `_`.
pub(super) fn snake(key: &str) -> String {
    key.replace('-', "_")
}

/// A key with `-`.
pub(super) fn kebab(key: &str) -> String {
    key.replace('_', "-")
}

/// Says that a key is not known, and which one may be meant. `what` is such as `key of a target`.
pub(super) fn unknown(key: &At<String>, what: &str, known: &[&str], problems: &mut Problems<'_>) {
    if problems.is_full() {
        return;
    }
    let written = &key.value;
    let underscore = problems.snake || written.contains('_');
    let style = |name: &str| if underscore { snake(name) } else { kebab(name) };
    let hint = match nearest(&snake(written), known) {
        Some(near) => format!(": did you mean `{}`?", style(near)),
        None => {
            let known: Vec<String> = known.iter().map(|name| style(name)).collect();
            format!("; there are {}", known.join(", "))
        }
    };
    problems.add(&key.span, format!("`{written}` is no {what}{hint}"));
}

/// Says that a key is there twice, under names that mean the same.
pub(super) fn twice(first: &Span, second: &Span, problems: &mut Problems<'_>) {
    let (other, key) = (problems.written(first), problems.written(second));
    let line = problems.line(first.start);
    problems.add(second, format!("`{key}` says the same as `{other}` in line {line}"));
}

/// Removes the keys of a target that vmtest does not have, by the names that vmtest has for them, and adds
/// them to the problems.
pub(super) fn check_vmtest(target: &mut Table, problems: &mut Problems<'_>) {
    target.entries.retain(|Entry { key, .. }| {
        let (name, snake) = (key.value.as_str(), snake(&key.value));
        if VMTEST_KEYS.contains(&name) {
            return true;
        }
        let elsewhere = if VmTable::KEYS.contains(&snake.as_str()) {
            format!("`{name}` is no key of a target: did you mean `{snake}` in [target.vm]?")
        } else if TargetTable::KEYS.contains(&snake.as_str())
            && !VMTEST_KEYS.contains(&snake.as_str())
        {
            format!("`{name}` is a key that only vmlab.toml has")
        } else {
            unknown(key, "key of a target", VMTEST_KEYS, problems);
            return false;
        };
        problems.add(&key.span, elsewhere);
        false
    });
    let vm = target.entries.iter_mut().find(|entry| entry.key.value == "vm");
    let Some(Entry { node: Node { value: Value::Table(vm), .. }, .. }) = vm else { return };
    vm.entries.retain(|Entry { key, .. }| {
        let known = VmTable::KEYS.contains(&key.value.as_str());
        if !known {
            unknown(key, "key of [target.vm]", VmTable::KEYS, problems);
        }
        known
    });
}

/// Gives each key of a target the one name, with `_`, that all that follows goes by. What the target has
/// twice, under two names, is added to the problems.
pub(super) fn unify(table: Table, problems: &mut Problems<'_>) -> Table {
    let mut unified = Table::default();
    for entry in table.entries {
        let name = match snake(&entry.key.value).as_str() {
            "kernel_args" => "append".to_owned(),
            // As `[[target.disk]]`.
            "disk" if matches!(entry.node.value, Value::Array(_) | Value::Table(_)) => {
                "disks".to_owned()
            }
            name if TargetTable::KEYS.contains(&name) => name.to_owned(),
            _ => entry.key.value.clone(),
        };
        match entry {
            Entry { node: Node { value: Value::Table(vm), span }, key } if name == "vm" => {
                let rest = raise(vm, &mut unified, problems);
                if !rest.entries.is_empty() {
                    let node = Node { value: Value::Table(rest), span };
                    put(&mut unified, Entry { key, node }, problems);
                }
            }
            Entry { key, node } => {
                let key = At { value: name, span: key.span };
                put(&mut unified, Entry { key, node }, problems);
            }
        }
    }
    unified
}

/// Moves what `[target.vm]` has under another name into the target; the rest is returned.
fn raise(vm: Table, target: &mut Table, problems: &mut Problems<'_>) -> Table {
    let mut rest = Table::default();
    for mut entry in vm.entries {
        let name = snake(&entry.key.value);
        match VM_KEYS.iter().find(|(vmtests, _)| *vmtests == name) {
            Some((_, ours)) => {
                (*ours).clone_into(&mut entry.key.value);
                put(target, entry, problems);
            }
            None => rest.entries.push(entry),
        }
    }
    rest
}

fn put(table: &mut Table, entry: Entry, problems: &mut Problems<'_>) {
    // Only a key that was given another name can be there twice; of others there may be very many.
    let known = TargetTable::KEYS.contains(&entry.key.value.as_str());
    match known.then(|| table.get(&entry.key.value)).flatten() {
        Some(other) => twice(&other.key.span, &entry.key.span, problems),
        None => table.entries.push(entry),
    }
}
