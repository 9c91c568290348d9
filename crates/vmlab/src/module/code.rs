//! The code of a loaded module: which addresses it has, and what is there in the sources.

use std::rc::Rc;

use vmlab_wire::observation::Section;

use crate::debug_info::ModuleCode;

/// A module that was loaded, and may be gone by now.
pub(super) struct LoadedCode {
    /// Its name.
    pub(super) name: String,
    code: Rc<ModuleCode>,
    /// The start of each section with code, its name and its length in bytes.
    sections: Vec<(u64, String, u64)>,
}

impl LoadedCode {
    /// The code of a module's file, where the kernel has put it.
    pub(super) fn new(name: &str, code: Rc<ModuleCode>, places: &[Section]) -> Self {
        let place = |name: &str| places.iter().find(|place| place.name == name);
        let sections = code.sections().filter_map(|(section, length)| {
            Some((place(section)?.address, section.to_owned(), length))
        });
        Self { name: name.to_owned(), sections: sections.collect(), code }
    }

    /// What called and is returned to at an address: `f+0x12 (f.c:34)`; `None` for what is not in it.
    pub(super) fn caller(&self, address: u64) -> Option<String> {
        let (section, offset) = self.place_of(address)?;
        // The place is behind the call.
        let found = self.code.function_at(section, offset.saturating_sub(1));
        Some(found.unwrap_or_else(|| format!("{section}+{offset:#x} of {}", self.name)))
    }

    fn place_of(&self, address: u64) -> Option<(&str, u64)> {
        self.sections.iter().find_map(|(start, name, length)| {
            // The place behind a call that does not return may be the end.
            let offset = address.checked_sub(*start).filter(|offset| offset <= length)?;
            Some((name.as_str(), offset))
        })
    }
}
