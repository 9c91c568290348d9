//! What a module's file says of it.

use std::collections::BTreeSet;

use object::{Object, ObjectSection, ObjectSymbol};

use super::BuiltModule;
use crate::modules::normalize;

/// What is wanted of a module's file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ModuleInfo {
    pub(super) name: String,
    pub(super) depends: Vec<String>,
    pub(super) imports: Vec<String>,
}

impl ModuleInfo {
    /// That of an ELF file; `None` for one that is no module.
    pub(super) fn read(content: &[u8]) -> Option<Self> {
        let file = object::File::parse(content).ok()?;
        let section = file.section_by_name(".modinfo")?;
        let (name, depends) = of_modinfo(section.data().ok()?)?;
        let imports = file.symbols().filter(|symbol| symbol.is_undefined());
        let imports: BTreeSet<String> =
            imports.filter_map(|symbol| symbol.name().ok().map(str::to_owned)).collect();
        let imports = imports.into_iter().filter(|name| !name.is_empty()).collect();
        Some(Self { name, depends, imports })
    }
}

/// The name and dependencies among the strings of a `.modinfo` section, `key=value` with a NUL behind each.
fn of_modinfo(section: &[u8]) -> Option<(String, Vec<String>)> {
    let (mut name, mut depends) = (None, Vec::new());
    for entry in section.split(|byte| *byte == 0) {
        match std::str::from_utf8(entry).ok().and_then(|text| text.split_once('=')) {
            Some(("name", value)) => name = Some(value.to_owned()),
            Some(("depends", value)) => {
                let names = value.split(',').filter(|name| !name.is_empty());
                depends = names.map(normalize).collect();
            }
            _ => {}
        }
    }
    Some((name?, depends))
}

/// Those first that others need; modules that need each other, which no build makes, in the order that they had.
pub(super) fn in_order(mut modules: Vec<BuiltModule>) -> Vec<BuiltModule> {
    let mut ordered: Vec<BuiltModule> = Vec::new();
    while !modules.is_empty() {
        let waits = |module: &BuiltModule| {
            modules
                .iter()
                .any(|other| other.name != module.name && module.depends.contains(&other.name))
        };
        let next = modules.iter().position(|module| !waits(module)).unwrap_or(0);
        ordered.push(modules.remove(next));
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_dependencies_are_read() {
        let section = b"license=GPL\0depends=libcrc32c,i2c-core\0\0name=my_mod\0vermagic=6.1\0";
        let expected = ("my_mod".to_owned(), vec!["libcrc32c".to_owned(), "i2c_core".to_owned()]);
        assert_eq!(of_modinfo(section), Some(expected));
        assert_eq!(of_modinfo(b"depends=\0name=x\0"), Some(("x".to_owned(), vec![])));
        assert_eq!(of_modinfo(b"license=GPL\0"), None);
        assert_eq!(ModuleInfo::read(b"no ELF file"), None);
    }

    #[test]
    fn what_others_need_comes_first() {
        let module = |name: &str, depends: &[&str]| BuiltModule {
            name: name.to_owned(),
            path: name.into(),
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
            imports: Vec::new(),
        };
        let order = |modules: Vec<BuiltModule>| -> Vec<String> {
            in_order(modules).into_iter().map(|module| module.name).collect()
        };
        let all = vec![module("a", &["b", "crc"]), module("b", &["c"]), module("c", &[])];
        assert_eq!(order(all), ["c", "b", "a"]);
        assert_eq!(order(vec![module("a", &["b"]), module("b", &["a"])]), ["a", "b"]);
    }
}
