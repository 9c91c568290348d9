//! The kinds of cache entries that this crate makes.

use std::path::Path;

use crate::cache::Flaw;
use crate::source::{apt, local};
use crate::{image, image_build, module_build, store};

/// What is kept of a kind: that which was used last, and what is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Everything, until somebody deletes it.
    None,
    /// So many entries.
    Entries(usize),
    /// Entries of so many bytes on disk.
    Bytes(u64),
}

/// A kind of cache entries.
#[derive(Clone, Copy)]
pub struct Kind {
    /// The name of its directory.
    pub name: &'static str,
    /// What is kept of it.
    pub bound: Bound,
    /// Looks for damage in all of an entry, as far as that shows.
    pub verify: fn(&Path) -> Result<(), Flaw>,
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kind").field("name", &self.name).field("bound", &self.bound).finish()
    }
}

/// All kinds of this crate.
pub const KINDS: [Kind; 8] = [
    store::KIND,
    store::HEADERS_KIND,
    local::CONFIGS_KIND,
    local::LINKED_MODULES_KIND,
    apt::KIND,
    image::KIND,
    image_build::KIND,
    module_build::KIND,
];
