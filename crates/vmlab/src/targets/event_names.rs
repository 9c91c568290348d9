//! Names of kernel events in files, and what is said of those that are none.

use crate::events::{EventKind, EventKinds, UnknownKind, parse_kinds};

/// The kind of this name.
pub(super) fn kind(text: &str) -> Result<EventKind, String> {
    text.parse().map_err(|unknown| said(&unknown))
}

/// The kind or the group of this name.
pub(super) fn kinds(text: &str) -> Result<EventKinds, String> {
    parse_kinds([text]).map_err(|unknown| said(&unknown))
}

fn said(unknown: &UnknownKind) -> String {
    let UnknownKind { name, nearest, known } = unknown;
    match nearest {
        Some(near) => format!("`{name}` is no kernel event: did you mean `{near}`?"),
        None => format!("`{name}` is no kernel event; there are {}", known.join(", ")),
    }
}
