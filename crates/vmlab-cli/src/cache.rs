//! `vmlab cache`.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use vmlab::artifacts::Cache;
use vmlab::cache::{self, Removed, Verification};
use vmlab::units::Bytes;

use crate::cli::CacheCommand;
use crate::exit::Code;
use crate::kernel::{print_json, table};
use crate::output;

/// Digits of a key that is a hash which are shown to people.
const SHOWN_DIGITS: usize = 12;

pub(crate) fn run(command: CacheCommand) -> Result<Code> {
    let cache = Cache::open_default()?;
    match command {
        CacheCommand::List { json } => list(&cache, json).map(|()| Code::SUCCESS),
        CacheCommand::Verify { kinds, repair, json } => {
            verify(&cache::verify(&cache, &kinds, repair)?, json)
        }
        CacheCommand::Gc { max } => {
            let max = max.map(|max| max.parse::<Bytes>().context("--max")).transpose()?;
            removed(&cache::collect_garbage(&cache, max.map(|max| max.0))?)
        }
        CacheCommand::Clear { kinds } => removed(&cache::clear(&cache, &kinds)?),
    }
}

fn list(cache: &Cache, json: bool) -> Result<()> {
    let contents = cache::list(cache)?;
    if json {
        return print_json(&contents);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut rows = vec![["KIND", "KEY", "SIZE", "LAST USED", ""].map(str::to_owned)];
    for entry in &contents.entries {
        rows.push([
            entry.kind.clone(),
            shown(&entry.key).to_owned(),
            Bytes(entry.bytes).to_string(),
            ago(now.saturating_sub(entry.last_used)),
            if entry.in_use { "in use".to_owned() } else { String::new() },
        ]);
    }
    let mut text = if contents.entries.is_empty() { String::new() } else { table(&rows) };
    let (count, size) = (contents.entries.len(), Bytes(contents.bytes));
    text.push_str(&format!("{}: {}, {size}\n", contents.root.display(), entries(count)));
    output::stdout(text.as_bytes())
}

pub(crate) fn verify(found: &Verification, json: bool) -> Result<Code> {
    if json {
        print_json(found)?;
    } else {
        let mut text = String::new();
        for damaged in &found.damaged {
            let what = if damaged.removed { "removed" } else { "damaged" };
            text.push_str(&format!("{what}: {}/{}: {}\n", damaged.kind, damaged.key, damaged.flaw));
        }
        let bad = found.damaged.len();
        text.push_str(&format!("{} verified, {bad} damaged\n", entries(found.verified)));
        output::stdout(text.as_bytes())?;
        if found.unknown > 0 {
            let unknown = entries(found.unknown);
            output::note(&format!("{unknown} of unknown kinds cannot be verified"));
        }
    }
    let left = found.damaged.iter().any(|damaged| !damaged.removed);
    Ok(if left { Code(1) } else { Code::SUCCESS })
}

fn removed(all: &[Removed]) -> Result<Code> {
    let mut text = String::new();
    for Removed { kind, entries: count, bytes, in_use } in all {
        let size = match bytes {
            0 => String::new(),
            bytes => format!(", {}", Bytes(*bytes)),
        };
        let kept = match in_use {
            0 => String::new(),
            count => format!("; {} in use kept", entries(*count)),
        };
        text.push_str(&format!("{kind}: {} removed{size}{kept}\n", entries(*count)));
    }
    let bytes: u64 = all.iter().map(|removed| removed.bytes).sum();
    text.push_str(&format!("freed {}\n", Bytes(bytes)));
    output::stdout(text.as_bytes())?;
    Ok(Code::SUCCESS)
}

fn entries(count: usize) -> String {
    match count {
        1 => "1 entry".to_owned(),
        count => format!("{count} entries"),
    }
}

/// A key as people see it: of a hash, the first digits tell it from others.
pub(crate) fn shown(key: &str) -> &str {
    let is_hash = key.len() == 64 && key.bytes().all(|b| b.is_ascii_hexdigit());
    if is_hash { &key[..SHOWN_DIGITS] } else { key }
}

/// How long ago something was, in the largest unit that fits.
fn ago(seconds: u64) -> String {
    let units = [(86400, "d"), (3600, "h"), (60, "min")];
    match units.iter().find(|(length, _)| seconds >= *length) {
        Some((length, unit)) => format!("{} {unit} ago", seconds / length),
        None => "now".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_cut_and_names_are_not() {
        assert_eq!(shown(&"ab".repeat(32)), "abababababab");
        assert_eq!(shown("linux-image-6.12_1"), "linux-image-6.12_1");
        assert_eq!(shown(&"xy".repeat(32)), "xy".repeat(32));
    }

    #[test]
    fn times_are_in_the_largest_unit() {
        assert_eq!(
            [0, 59, 60, 7199, 86400].map(ago),
            ["now", "now", "1 min ago", "1 h ago", "1 d ago"]
        );
    }
}
