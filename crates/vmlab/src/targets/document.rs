//! A TOML document as a tree that knows where in the text everything is, in the order of the text.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::Problems;

/// A place in the text, in bytes.
pub(super) type Span = Range<usize>;

/// Something with its place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) span: Span,
}

/// A value.
pub(super) type Node = At<Value>;

/// What a value is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    String(String),
    Integer(i64),
    Boolean(bool),
    Array(Vec<Node>),
    Table(Table),
    /// A kind of value that no key takes, by its name.
    Other(&'static str),
}

impl Value {
    /// What it is called in messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Value::String(_) => "a string",
            Value::Integer(_) => "an integer",
            Value::Boolean(_) => "a boolean",
            Value::Array(_) => "an array",
            Value::Table(_) => "a table",
            Value::Other(kind) => kind,
        }
    }
}

/// Keys and their values, in the order of the text. No key is there twice.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Table {
    pub(super) entries: Vec<Entry>,
}

/// A key and its value.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) key: At<String>,
    pub(super) node: Node,
}

impl Table {
    pub(super) fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key.value == key)
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    pub(super) fn take(&mut self, key: &str) -> Option<Entry> {
        let at = self.entries.iter().position(|entry| entry.key.value == key)?;
        Some(self.entries.remove(at))
    }

    /// Puts an entry in the place of one of the same key.
    pub(super) fn set(&mut self, entry: Entry) {
        match self.entries.iter_mut().find(|other| other.key.value == entry.key.value) {
            Some(other) => *other = entry,
            None => self.entries.push(entry),
        }
    }
}

/// Reads a document. What is no TOML is added to the problems, and the rest may be incomplete.
pub(super) fn parse(text: &str, problems: &mut Problems<'_>) -> Table {
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        problems.add(&error.span().unwrap_or_default(), error.message());
    }
    self::table(table.into_inner(), problems)
}

fn table(table: DeTable<'_>, problems: &mut Problems<'_>) -> Table {
    let mut entries: Vec<Entry> = table
        .into_iter()
        .map(|(key, value)| Entry {
            key: At { span: key.span(), value: key.into_inner().into_owned() },
            node: node(value, problems),
        })
        .collect();
    entries.sort_by_key(|entry| entry.key.span.start);
    Table { entries }
}

fn node(value: Spanned<DeValue<'_>>, problems: &mut Problems<'_>) -> Node {
    let span = value.span();
    let value = match value.into_inner() {
        DeValue::String(text) => {
            if text.contains('\0') {
                problems.add(&span, "no text here can have a NUL character in it");
            }
            Value::String(text.into_owned())
        }
        DeValue::Integer(number) => {
            let value = i64::from_str_radix(number.as_str(), number.radix());
            Value::Integer(value.unwrap_or_else(|_| {
                problems.add(&span, "the number is too large");
                0
            }))
        }
        DeValue::Boolean(value) => Value::Boolean(value),
        DeValue::Array(array) => {
            Value::Array(array.into_iter().map(|value| node(value, problems)).collect())
        }
        DeValue::Table(inner) => Value::Table(table(inner, problems)),
        DeValue::Float(_) => Value::Other("a fraction"),
        DeValue::Datetime(_) => Value::Other("a date or time"),
    };
    At { value, span }
}
