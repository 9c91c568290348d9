//! Kernel configurations: `.config` files, and the copy that CONFIG_IKCONFIG embeds in a kernel.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::OnceLock;

use memchr::memmem;
use serde::{Deserialize, Serialize};

use crate::compress::{self, Compression, Limit};

/// What stands before and after the gzip stream of an embedded configuration (`kernel/configs.c`).
const IKCONFIG_START: &[u8] = b"IKCFG_ST";
const IKCONFIG_END: &[u8] = b"IKCFG_ED";

/// The largest configuration text that is believed, in bytes. Distribution kernels have 300 KiB.
const CONFIG_LEN_MAX: usize = 16 << 20;

/// How a kernel has a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tristate {
    /// Not at all.
    Absent,
    /// As a module that has to be loaded.
    Module,
    /// Compiled into the boot image.
    BuiltIn,
}

impl std::fmt::Display for Tristate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Tristate::Absent => "absent",
            Tristate::Module => "module",
            Tristate::BuiltIn => "built-in",
        })
    }
}

/// A kernel configuration, parsed when it is asked for the first time.
#[derive(Debug, Clone)]
pub struct KernelConfig {
    text: String,
    values: OnceLock<BTreeMap<String, String>>,
}

impl PartialEq for KernelConfig {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for KernelConfig {}

impl KernelConfig {
    /// Takes the text of a `.config` file. Lines that are no settings are ignored; of two settings
    /// of one option the later one holds, as in Kconfig itself.
    pub fn parse(text: impl AsRef<[u8]>) -> KernelConfig {
        let text = String::from_utf8_lossy(text.as_ref()).into_owned();
        KernelConfig { text, values: OnceLock::new() }
    }

    fn values(&self) -> &BTreeMap<String, String> {
        self.values.get_or_init(|| settings(&self.text))
    }

    /// Finds the configuration that CONFIG_IKCONFIG embedded, in an uncompressed kernel (or in its
    /// `configs` module). `None` where there is none, or only a damaged one.
    pub fn from_ikconfig(image: &[u8]) -> Option<KernelConfig> {
        memmem::find_iter(image, IKCONFIG_START).find_map(|at| {
            let rest = &image[at + IKCONFIG_START.len()..];
            // The code that prints the marker can hold its bytes, too; only a gzip stream follows
            // the real one.
            if Compression::sniff(rest) != Some(Compression::Gzip) {
                return None;
            }
            let stream = &rest[..memmem::find(rest, IKCONFIG_END)?];
            let text =
                compress::decompress(Compression::Gzip, stream, Limit::max(CONFIG_LEN_MAX)).ok()?;
            let config = KernelConfig::parse(text);
            (!config.values().is_empty()).then_some(config)
        })
    }

    /// Whether anything is to be built as a module.
    pub fn has_modules(&self) -> bool {
        self.values().values().any(|value| value == "m")
    }

    /// How the option is set. `name` goes with or without its prefix `CONFIG_`. An option with a
    /// value other than y or m (a number, a string) counts as built in.
    pub fn get(&self, name: &str) -> Tristate {
        match self.value(name) {
            None | Some("n") => Tristate::Absent,
            Some("m") => Tristate::Module,
            Some(_) => Tristate::BuiltIn,
        }
    }

    /// The option's value as it is in the file, strings without their quotes.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.values().get(name.strip_prefix("CONFIG_").unwrap_or(name)).map(String::as_str)
    }

    /// All options that are set, without their prefix `CONFIG_`, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values().iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The text that was parsed.
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// The settings in the text of a configuration.
fn settings(text: &str) -> BTreeMap<String, String> {
    let mut values = BTreeMap::new();
    for line in text.lines() {
        let line = line.trim();
        if let Some(unset) =
            line.strip_prefix("# CONFIG_").and_then(|l| l.strip_suffix(" is not set"))
        {
            values.remove(unset);
        } else if let Some((name, value)) =
            line.strip_prefix("CONFIG_").and_then(|l| l.split_once('='))
        {
            values.insert(name.to_owned(), unquote(value));
        }
    }
    values
}

/// Removes the quotes of a string value, and the backslashes before quotes and backslashes in it.
fn unquote(value: &str) -> String {
    let Some(inner) = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')) else {
        return value.to_owned();
    };
    let mut out = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or(c) } else { c });
    }
    out
}
