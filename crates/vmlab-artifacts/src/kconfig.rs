//! Kernel configurations.
use std::collections::BTreeMap;

/// How a kernel has a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tristate {
    /// Not at all.
    Absent,
    /// As a module.
    Module,
    /// Compiled in.
    BuiltIn,
}

/// A parsed kernel configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelConfig {
    values: BTreeMap<String, String>,
}

impl KernelConfig {
    /// Parses a `.config`.
    pub fn parse(text: impl AsRef<[u8]>) -> KernelConfig {
        let text = String::from_utf8_lossy(text.as_ref());
        let values = text
            .lines()
            .filter_map(|l| l.split_once('='))
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect();
        KernelConfig { values }
    }

    /// How an option is set.
    pub fn get(&self, name: &str) -> Tristate {
        match self.values.get(name).map(String::as_str) {
            None | Some("n") => Tristate::Absent,
            Some("m") => Tristate::Module,
            Some(_) => Tristate::BuiltIn,
        }
    }
}
