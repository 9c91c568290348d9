//! Matrices: one table that stands for many targets.

use super::document::{At, Entry, Node, Span, Table, Value};
use super::problem::Problems;
use super::spelling::{kebab, snake, unify, unknown};
use super::table::TargetTable;
use super::value::{expected, scalar_text};

/// The most targets of a file. More than any host runs in a day; without a limit, a line of a few arrays
/// would fill the memory.
pub(super) const MAX_TARGETS: usize = 10_000;

/// The keys of a matrix that a target has not.
pub(super) const KEYS: [&str; 3] = ["vars", "include", "exclude"];

/// What a matrix goes through: a key of a target, or a variable.
struct Axis {
    /// A key with `_`, or the variable's name as it is written.
    name: String,
    at: Span,
    variable: bool,
    /// Whether it is in names: one that is no array has a single value, which tells no target from another.
    listed: bool,
    values: Vec<Node>,
}

impl Axis {
    /// What it is called in names and messages.
    fn label(&self) -> String {
        if self.variable { self.name.clone() } else { kebab(&self.name) }
    }

    fn is_called(&self, name: &str) -> bool {
        if self.variable { self.name == name } else { self.name == snake(name) }
    }
}

/// A value for each axis, in the order of the axes, and what it says besides.
struct Combination {
    values: Vec<Node>,
    more: Vec<Entry>,
    at: Span,
}

/// A target as a table, and its values on the axes of its matrix.
pub(super) type Expanded = (Node, Vec<(String, String)>);

/// The targets that a matrix stands for, each as a table. `inherit` adds what the file has for all targets.
pub(super) fn expand(
    mut matrix: Table,
    at: &Span,
    inherit: impl Fn(&mut Table),
    problems: &mut Problems<'_>,
) -> Vec<Expanded> {
    let before = problems.count();
    let [vars, include, exclude] = KEYS.map(|key| matrix.take(key));
    let name = matrix.take("name");
    let mut axes = axes_of_keys(&mut matrix);
    axes.extend(vars.map(|vars| axes_of_vars(vars, problems)).unwrap_or_default());
    axes.sort_by_key(|axis| axis.at.start);
    check_axes(&axes, problems);
    if problems.count() > before {
        return Vec::new();
    }
    if !axes.iter().any(|axis| axis.listed) && include.is_none() {
        problems
            .add(at, "this matrix has no array to go through; for one target, write [[target]]");
        return Vec::new();
    }
    let mut combinations = product(&axes, |axis| axis.values.clone(), at, problems);
    for table in tables(exclude, problems) {
        exclude_from(&mut combinations, &axes, table, problems);
    }
    for table in tables(include, problems) {
        combinations.extend(included(&axes, table, problems));
        if combinations.len() > MAX_TARGETS {
            problems.add(at, format!("this matrix stands for more than {MAX_TARGETS} targets"));
            return Vec::new();
        }
    }
    if problems.count() > before {
        // What is made of axes that are wrong would be wrong in other ways besides.
        return Vec::new();
    }
    let targets = combinations.into_iter().map(|combination| {
        let at = combination.at.clone();
        let mut table = matrix.clone();
        for entry in combination.more {
            table.set(entry);
        }
        for (axis, node) in axes.iter().zip(&combination.values).filter(|(axis, _)| !axis.variable)
        {
            let key = At { value: axis.name.clone(), span: axis.at.clone() };
            table.set(Entry { key, node: node.clone() });
        }
        inherit(&mut table);
        let variables = Variables::new(&axes, &combination.values);
        variables.export(&mut table);
        for entry in &mut table.entries {
            variables.put_into(&mut entry.node);
        }
        if let Some(mut name) = name.clone() {
            if let Value::String(pattern) = &name.node.value {
                let span = &name.node.span;
                name.node.value =
                    Value::String(variables.name(pattern, span, &combination.values, problems));
            }
            table.set(name);
        }
        let values = variables.labelled(&combination.values);
        (Node { value: Value::Table(table), span: at }, values)
    });
    targets.collect()
}

/// Keys that have an array where a target has a single value.
fn axes_of_keys(matrix: &mut Table) -> Vec<Axis> {
    let mut axes = Vec::new();
    matrix.entries.retain(|Entry { key, node }| match &node.value {
        Value::Array(values) if TargetTable::is_scalar(&key.value) => {
            let (name, at) = (key.value.clone(), key.span.clone());
            axes.push(Axis { name, at, variable: false, listed: true, values: values.clone() });
            false
        }
        _ => true,
    });
    axes
}

fn axes_of_vars(vars: Entry, problems: &mut Problems<'_>) -> Vec<Axis> {
    let Value::Table(table) = vars.node.value else {
        expected::<()>("a table of variables", &vars.node, problems);
        return Vec::new();
    };
    let mut axes = Vec::new();
    for Entry { key, node } in table.entries {
        let name = &key.value;
        let letters = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if !name.starts_with(|c: char| c.is_ascii_alphabetic()) || !name.chars().all(letters) {
            problems
                .add(&key.span, "a variable has a letter, and then letters, digits, `-` or `_`");
        }
        let keys = TargetTable::KEYS.iter().chain(&KEYS);
        if keys.into_iter().any(|key| *key == snake(name)) {
            problems
                .add(&key.span, format!("`{name}` is a key of targets, and no name of a variable"));
        }
        let (listed, values) = match node.value {
            Value::Array(values) => (true, values),
            _ => (false, vec![node]),
        };
        axes.push(Axis { name: key.value, at: key.span, variable: true, listed, values });
    }
    axes
}

fn check_axes(axes: &[Axis], problems: &mut Problems<'_>) {
    for axis in axes {
        if axis.values.is_empty() {
            problems.add(&axis.at, format!("`{}` has no values", axis.label()));
        }
        for (number, node) in axis.values.iter().enumerate() {
            if scalar_text(node).is_none() {
                expected::<()>("a string, a number or a boolean", node, problems);
            }
            if axis.values[..number].iter().any(|other| other.value == node.value) {
                problems.add(&node.span, format!("`{}` has this value twice", axis.label()));
            }
        }
    }
}

/// All combinations; the last axis changes fastest.
fn product(
    axes: &[Axis],
    values: impl Fn(&Axis) -> Vec<Node>,
    at: &Span,
    problems: &mut Problems<'_>,
) -> Vec<Combination> {
    let mut all: Vec<Vec<Node>> = vec![Vec::new()];
    for axis in axes {
        let values = values(axis);
        if all.len().saturating_mul(values.len()) > MAX_TARGETS {
            problems.add(at, format!("this matrix stands for more than {MAX_TARGETS} targets"));
            return Vec::new();
        }
        let longer = all.iter().flat_map(|combination| {
            values.iter().map(move |value| {
                combination.iter().cloned().chain([value.clone()]).collect::<Vec<_>>()
            })
        });
        all = longer.collect();
    }
    let combination = |values| Combination { values, more: Vec::new(), at: at.clone() };
    all.into_iter().map(combination).collect()
}

/// The tables of `include` or `exclude`.
fn tables(entry: Option<Entry>, problems: &mut Problems<'_>) -> Vec<At<Table>> {
    let Some(Entry { node, .. }) = entry else { return Vec::new() };
    let Value::Array(nodes) = node.value else {
        expected::<()>("an array of tables", &node, problems);
        return Vec::new();
    };
    let mut tables = Vec::new();
    for Node { value, span } in nodes {
        match value {
            Value::Table(table) if table.entries.is_empty() => {
                problems.add(&span, "this table says nothing");
            }
            Value::Table(value) => tables.push(At { value, span }),
            value => {
                expected::<()>("a table", &Node { value, span }, problems);
            }
        }
    }
    tables
}

/// One value, or all of an array.
fn values(node: &Node) -> Vec<Node> {
    match &node.value {
        Value::Array(nodes) => nodes.clone(),
        _ => vec![node.clone()],
    }
}

/// Removes the combinations that have one of the given values on each axis that is given.
fn exclude_from(
    combinations: &mut Vec<Combination>,
    axes: &[Axis],
    table: At<Table>,
    problems: &mut Problems<'_>,
) {
    let mut wanted: Vec<(usize, Vec<Node>)> = Vec::new();
    for Entry { key, node } in &table.value.entries {
        let Some(index) = axes.iter().position(|axis| axis.is_called(&key.value)) else {
            let labels: Vec<&str> = axes.iter().map(|axis| axis.name.as_str()).collect();
            unknown(key, "axis of this matrix", &labels, problems);
            return;
        };
        let values = values(node);
        for value in &values {
            if !axes[index].values.iter().any(|other| other.value == value.value) {
                let label = axes[index].label();
                problems.add(&value.span, format!("`{label}` does not have this value"));
            }
        }
        wanted.push((index, values));
    }
    combinations.retain(|combination| {
        !wanted.iter().all(|(index, values)| {
            values.iter().any(|value| value.value == combination.values[*index].value)
        })
    });
}

/// The combinations that a table of `include` stands for: of its own values, and of all on other axes.
fn included(axes: &[Axis], table: At<Table>, problems: &mut Problems<'_>) -> Vec<Combination> {
    let mut own: Vec<(&str, Vec<Node>)> = Vec::new();
    let mut more = Vec::new();
    for Entry { key, node } in table.value.entries {
        if let Some(axis) = axes.iter().find(|axis| axis.is_called(&key.value)) {
            let values = values(&node);
            for value in values.iter().filter(|value| scalar_text(value).is_none()) {
                expected::<()>("a string, a number or a boolean", value, problems);
            }
            own.push((&axis.name, values));
        } else if key.value == "name" {
            problems.add(&key.span, "all targets of a matrix have their names from its `name`");
        } else if TargetTable::KEYS.contains(&snake(&key.value).as_str()) {
            more.push(Entry { key, node });
        } else {
            let axes = axes.iter().map(|axis| axis.name.as_str());
            let known: Vec<&str> = axes.chain(TargetTable::KEYS.iter().copied()).collect();
            unknown(&key, "axis of this matrix, or key of a target", &known, problems);
        }
    }
    let of_axis = |axis: &Axis| {
        let found = own.iter().find(|(name, _)| *name == axis.name);
        found.map_or_else(|| axis.values.clone(), |(_, values)| values.clone())
    };
    let mut combinations = product(axes, of_axis, &table.span, problems);
    let more = unify(Table { entries: more }, problems).entries;
    for combination in &mut combinations {
        combination.more.clone_from(&more);
    }
    combinations
}

/// What stands for what in the texts of one combination.
struct Variables<'a> {
    axes: &'a [Axis],
    /// Names and values of variables.
    texts: Vec<(&'a str, String)>,
}

impl<'a> Variables<'a> {
    fn new(axes: &'a [Axis], values: &[Node]) -> Self {
        let variables = axes.iter().zip(values).filter(|(axis, _)| axis.variable);
        let texts = variables
            .map(|(axis, node)| (axis.name.as_str(), scalar_text(node).unwrap_or_default()));
        Self { axes, texts: texts.collect() }
    }

    fn get(&self, name: &str) -> Option<&str> {
        let found = self.texts.iter().find(|(other, _)| *other == name);
        found.map(|(_, value)| value.as_str())
    }

    /// Adds the variables to the command's environment, where it does not have them from the file.
    fn export(&self, table: &mut Table) {
        if self.texts.is_empty() {
            return;
        }
        let span = self.axes.first().map(|axis| axis.at.clone()).unwrap_or_default();
        if !table.has("env") {
            let key = At { value: "env".to_owned(), span: span.clone() };
            let node = Node { value: Value::Table(Table::default()), span: span.clone() };
            table.set(Entry { key, node });
        }
        let env = table.entries.iter_mut().find(|entry| entry.key.value == "env");
        let Some(Entry { node: Node { value: Value::Table(env), .. }, .. }) = env else { return };
        for (name, value) in &self.texts {
            let name = snake(name).to_uppercase();
            if !env.has(&name) {
                let node = Node { value: Value::String(value.clone()), span: span.clone() };
                env.set(Entry { key: At { value: name, span: span.clone() }, node });
            }
        }
    }

    /// The values of one combination, each with its axis.
    fn labelled(&self, values: &[Node]) -> Vec<(String, String)> {
        let text = |node| self.text(&scalar_text(node).unwrap_or_default());
        self.axes.iter().zip(values).map(|(axis, node)| (axis.label(), text(node))).collect()
    }

    /// Puts values in the place of `{name}` in all strings.
    fn put_into(&self, node: &mut Node) {
        match &mut node.value {
            Value::String(text) => *text = self.text(text),
            Value::Array(nodes) => nodes.iter_mut().for_each(|node| self.put_into(node)),
            Value::Table(table) => {
                table.entries.iter_mut().for_each(|entry| self.put_into(&mut entry.node));
            }
            Value::Integer(_) | Value::Boolean(_) | Value::Other(_) => {}
        }
    }

    fn text(&self, text: &str) -> String {
        replace(text, |name| self.get(name).map(str::to_owned))
    }

    /// The name of the target: the pattern with its values, or with all values behind it.
    fn name(
        &self,
        pattern: &str,
        at: &Span,
        values: &[Node],
        problems: &mut Problems<'_>,
    ) -> String {
        let axes = || self.axes.iter().zip(values);
        let shown = |node: &Node| self.text(&scalar_text(node).unwrap_or_default());
        let mut is_pattern = false;
        let name = replace(pattern, |name| {
            is_pattern = true;
            let found = axes().find(|(axis, _)| axis.is_called(name));
            if found.is_none() {
                let known: Vec<&str> = self.axes.iter().map(|axis| axis.name.as_str()).collect();
                let key = At { value: name.to_owned(), span: at.clone() };
                unknown(&key, "axis of this matrix", &known, problems);
            }
            found.map(|(_, node)| shown(node))
        });
        if is_pattern {
            return name;
        }
        let parts = axes().filter(|(axis, _)| axis.listed).map(|(axis, node)| {
            match ["kernel", "image"].contains(&axis.name.as_str()) {
                true => shown(node),
                false => format!("{}={}", axis.label(), shown(node)),
            }
        });
        let parts: Vec<String> = parts.collect();
        if parts.is_empty() { name } else { format!("{name}[{}]", parts.join(", ")) }
    }
}

/// Replaces each `{name}` that has a value. A shell's `${name}` stays what it is.
fn replace(text: &str, mut value: impl FnMut(&str) -> Option<String>) -> String {
    let mut replaced = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find('{') {
        let (before, from) = rest.split_at(open);
        replaced.push_str(before);
        let name_end = from[1..].find(|c: char| !c.is_ascii_alphanumeric() && !"_-".contains(c));
        let name = name_end.map(|end| &from[1..=end]).filter(|name| {
            !name.is_empty() && from[1 + name.len()..].starts_with('}') && !replaced.ends_with('$')
        });
        match name.and_then(|name| value(name).map(|value| (name, value))) {
            Some((name, value)) => {
                replaced.push_str(&value);
                rest = &from[name.len() + 2..];
            }
            None => {
                replaced.push('{');
                rest = &from[1..];
            }
        }
    }
    replaced.push_str(rest);
    replaced
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_names_in_braces_are_replaced() {
        let known = |name: &str| (name == "fs").then(|| "ext4".to_owned());
        for (text, expected) in [
            ("{fs}", "ext4"),
            ("a {fs} b {fs}", "a ext4 b ext4"),
            ("${fs}", "${fs}"),
            ("{other} {fs", "{other} {fs"),
            ("{{fs}}", "{ext4}"),
            ("{} {", "{} {"),
            ("{\u{e4}}{fs}", "{\u{e4}}ext4"),
            ("awk '{print $1}'", "awk '{print $1}'"),
        ] {
            assert_eq!(replace(text, known), expected, "{text}");
        }
    }
}
