//! What the values of keys can be.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::config::{DiskWrites, MAX_CPUS, Machine, NetworkMode, ShareTransport, Topology};
use crate::disk::{CloneMode, MODES};
use crate::events::{EventKind, EventKinds};
use crate::hypervisor::HypervisorChoice;
use crate::units::{self, Bytes};
use crate::{AccelChoice, RootMode, ShareVia};

use super::document::{At, Node, Value};
use super::event_names;
use super::problem::Problems;

/// Something that the value of a key can be read as.
pub(super) trait FromNode: Sized {
    /// Whether it is a single string, number or boolean, so that a matrix can have an array of it.
    const SCALAR: bool = false;

    /// Reads it; what is wrong with it is added to the problems.
    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self>;
}

/// Says that a value should have been something else.
pub(super) fn expected<T>(what: &str, node: &Node, problems: &mut Problems<'_>) -> Option<T> {
    problems.add(&node.span, format!("expected {what}, found {}", node.value.kind()));
    None
}

fn or_say<T, E: std::fmt::Display>(
    result: Result<T, E>,
    node: &Node,
    problems: &mut Problems<'_>,
) -> Option<T> {
    result.map_err(|error| problems.add(&node.span, error.to_string())).ok()
}

impl<T: FromNode> FromNode for At<T> {
    const SCALAR: bool = T::SCALAR;

    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        let span = node.span.clone();
        T::from_node(node, problems).map(|value| At { value, span })
    }
}

impl FromNode for String {
    const SCALAR: bool = true;

    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        match &node.value {
            Value::String(text) => Some(text.clone()),
            _ => expected("a string", node, problems),
        }
    }
}

impl FromNode for bool {
    const SCALAR: bool = true;

    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        match node.value {
            Value::Boolean(value) => Some(value),
            _ => expected("true or false", node, problems),
        }
    }
}

impl FromNode for u32 {
    const SCALAR: bool = true;

    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        match node.value {
            Value::Integer(number) => {
                let number =
                    u32::try_from(number).map_err(|_| format!("expected 0 to {}", u32::MAX));
                or_say(number, node, problems)
            }
            _ => expected("a number", node, problems),
        }
    }
}

/// A number of CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cpus(pub(super) u32);

impl FromNode for Cpus {
    const SCALAR: bool = true;

    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        let Value::Integer(number) = node.value else {
            return expected("a number of CPUs", node, problems);
        };
        let number = u32::try_from(number).ok().filter(|number| (1..=MAX_CPUS).contains(number));
        or_say(number.map(Cpus).ok_or(format!("expected 1 to {MAX_CPUS} CPUs")), node, problems)
    }
}

impl FromNode for Topology {
    const SCALAR: bool = true;

    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        match &node.value {
            Value::String(text) => or_say(text.parse(), node, problems),
            _ => expected("a topology such as \"1,2,4,2\"", node, problems),
        }
    }
}

/// The text of a string or an integer: of what has a unit if none is given.
fn quantity(node: &Node) -> Option<String> {
    match &node.value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        _ => None,
    }
}

impl FromNode for Bytes {
    const SCALAR: bool = true;

    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        match quantity(node) {
            Some(text) => or_say(text.parse(), node, problems),
            None => expected("a size such as \"512M\"", node, problems),
        }
    }
}

/// A length of time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Time(pub(super) Duration);

impl FromNode for CloneMode {
    const SCALAR: bool = true;

    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        match &node.value {
            Value::String(text) => or_say(text.parse(), node, problems),
            _ => expected("a way to clone such as \"reflink\"", node, problems),
        }
    }
}

impl FromNode for Time {
    const SCALAR: bool = true;

    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        match quantity(node) {
            Some(text) => or_say(units::duration(&text).map(Time), node, problems),
            None => expected("a time such as \"90s\"", node, problems),
        }
    }
}

/// One of a few words.
pub(super) trait Named: Copy + 'static {
    /// The words, and what they mean.
    const NAMES: &'static [(&'static str, Self)];
}

impl Named for Machine {
    const NAMES: &'static [(&'static str, Self)] =
        &[("microvm", Machine::Microvm), ("q35", Machine::Q35)];
}

impl Named for AccelChoice {
    const NAMES: &'static [(&'static str, Self)] =
        &[("auto", AccelChoice::Auto), ("kvm", AccelChoice::Kvm), ("tcg", AccelChoice::Tcg)];
}

impl Named for HypervisorChoice {
    const NAMES: &'static [(&'static str, Self)] = &HypervisorChoice::NAMES;
}

impl Named for NetworkMode {
    const NAMES: &'static [(&'static str, Self)] =
        &[("none", NetworkMode::None), ("user", NetworkMode::User)];
}

impl Named for RootMode {
    const NAMES: &'static [(&'static str, Self)] =
        &[("ro", RootMode::ReadOnly), ("overlay", RootMode::Overlay), ("rw", RootMode::ReadWrite)];
}

impl Named for DiskWrites {
    const NAMES: &'static [(&'static str, Self)] = &MODES;
}

impl Named for ShareVia {
    const NAMES: &'static [(&'static str, Self)] = &[
        ("auto", ShareVia::Auto),
        ("virtiofs", ShareVia::Only(ShareTransport::VirtioFs)),
        ("9p", ShareVia::Only(ShareTransport::NineP)),
    ];
}

/// A word for one of a few things.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Word<T>(pub(super) T);

impl<T: Named> FromNode for Word<T> {
    const SCALAR: bool = true;

    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        let names: Vec<&str> = T::NAMES.iter().map(|(name, _)| *name).collect();
        let Value::String(text) = &node.value else {
            return expected(&one_of(&names), node, problems);
        };
        let found = T::NAMES.iter().find(|(name, _)| name == text).map(|(_, value)| Word(*value));
        or_say(found.ok_or_else(|| format!("expected {}", one_of(&names))), node, problems)
    }
}

/// A list of words for a message.
pub(super) fn one_of(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    match &quoted[..] {
        [] => "nothing".to_owned(),
        [only] => only.clone(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

/// One string, or any number of them.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Strings(pub(super) Vec<At<String>>);

impl Strings {
    pub(super) fn into_strings(self) -> Vec<String> {
        self.0.into_iter().map(|text| text.value).collect()
    }
}

impl FromNode for Strings {
    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        match &node.value {
            Value::String(_) => At::from_node(node, problems).map(|text| Self(vec![text])),
            Value::Array(nodes) => {
                let read = nodes.iter().map(|node| At::from_node(node, problems));
                // All of them are looked at before one that is wrong ends it.
                read.collect::<Vec<_>>().into_iter().collect::<Option<_>>().map(Self)
            }
            _ => expected("a string or an array of strings", node, problems),
        }
    }
}

/// What a target runs, as it is written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum CommandText {
    Script(String),
    Program(Vec<String>),
}

impl FromNode for CommandText {
    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        let what = "a script, or an array of a program and its arguments";
        match &node.value {
            Value::String(text) => Some(Self::Script(text.clone())),
            Value::Array(_) => {
                Strings::from_node(node, problems).map(|words| Self::Program(words.into_strings()))
            }
            _ => expected(what, node, problems),
        }
    }
}

/// Variables and their values.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Env(pub(super) BTreeMap<String, String>);

impl FromNode for Env {
    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        let Value::Table(table) = &node.value else {
            return expected("a table of variables", node, problems);
        };
        let mut env = BTreeMap::new();
        for entry in &table.entries {
            let name = &entry.key.value;
            if name.is_empty() || name.contains(['=', '\0']) {
                problems.add(&entry.key.span, format!("`{name}` is no name of a variable"));
            }
            match scalar_text(&entry.node) {
                Some(value) => {
                    env.insert(name.clone(), value);
                }
                None => {
                    expected::<()>("a string, a number or a boolean", &entry.node, problems);
                }
            }
        }
        Some(Self(env))
    }
}

/// The text of a single string, number or boolean.
pub(super) fn scalar_text(node: &Node) -> Option<String> {
    match &node.value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Boolean(value) => Some(value.to_string()),
        _ => None,
    }
}

impl FromNode for EventKind {
    const SCALAR: bool = true;

    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        let name = String::from_node(node, problems)?;
        or_say(event_names::kind(&name), node, problems)
    }
}

/// Kinds of kernel events.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Kinds(pub(super) EventKinds);

impl FromNode for Kinds {
    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        let names = Strings::from_node(node, problems)?;
        let mut kinds = EventKinds::new();
        for name in names.0 {
            match event_names::kinds(&name.value) {
                Ok(named) => kinds.extend(named),
                Err(error) => problems.add(&name.span, error),
            }
        }
        Some(Self(kinds))
    }
}
