//! The kinds of cache entries that this crate makes.

use std::path::Path;

use crate::cache::Flaw;
use crate::source::{apt, local};
use crate::store;

/// A kind of cache entries.
#[derive(Clone, Copy)]
pub struct Kind {
    /// The name of its directory.
    pub name: &'static str,
    /// How many entries are kept; `None` where they stay until somebody deletes them.
    pub kept: Option<usize>,
    /// Looks for damage in all of an entry, as far as that shows.
    pub verify: fn(&Path) -> Result<(), Flaw>,
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kind").field("name", &self.name).field("kept", &self.kept).finish()
    }
}

/// All kinds of this crate.
pub const KINDS: [Kind; 4] =
    [store::KIND, local::CONFIGS_KIND, local::LINKED_MODULES_KIND, apt::KIND];
