//! The apt sources that the host has, read from its own files.
//!
//! `apt-get indextargets` would list them, but says nothing where the lists were never fetched, and
//! never says which keyring belongs to a source. The two formats are those of sources.list(5).

use std::fs;
use std::path::Path;

use crate::source::deb::stanza_fields;

/// One archive and suite that the host is configured for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct HostSource {
    /// The archive's base, as written but with one `/` at the end.
    pub(crate) uri: String,
    /// The suite as written: `bookworm`, `stable-security`.
    pub(crate) suite: String,
    /// `Signed-By` as written: a keyring's path, fingerprints, or a whole key.
    pub(crate) signed_by: Option<String>,
    /// Further fields that have to be kept for the source to work, such as `Check-Valid-Until`.
    pub(crate) kept: Vec<(String, String)>,
}

impl HostSource {
    /// The suite's name without `-updates`, `-security` and the like.
    pub(crate) fn stem(&self) -> &str {
        self.suite.split('-').next().unwrap_or(&self.suite)
    }

    /// What follows the stem, with its `-`.
    pub(crate) fn suffix(&self) -> &str {
        &self.suite[self.stem().len()..]
    }

    /// The same archive with another suite.
    pub(crate) fn with_suite(&self, suite: String) -> HostSource {
        HostSource { suite, ..self.clone() }
    }
}

/// Fields that are copied besides `Signed-By`. None of them turns a signature check off.
const KEPT: [&str; 3] = ["Check-Valid-Until", "Check-Date", "By-Hash"];

/// Reads `sources.list` and the directory of further files, in apt's order. Files that cannot be
/// read are passed over, as their sources could not be used either.
pub(crate) fn read(list: &Path, parts: &Path, arch: &str) -> Vec<HostSource> {
    let mut sources = Vec::new();
    if let Ok(text) = fs::read_to_string(list) {
        sources.extend(parse_list(&text, arch));
    }
    let mut files: Vec<_> =
        fs::read_dir(parts).into_iter().flatten().flatten().map(|item| item.path()).collect();
    files.sort();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|ext| ext.to_str()) {
            Some("list") => sources.extend(parse_list(&text, arch)),
            Some("sources") => sources.extend(parse_deb822(&text, arch)),
            _ => {}
        }
    }
    let mut seen = std::collections::HashSet::new();
    sources.retain(|source| seen.insert((source.uri.clone(), source.suite.clone())));
    sources
}

/// The one-line format: `deb [option=value ...] uri suite component ...`.
fn parse_list(text: &str, arch: &str) -> Vec<HostSource> {
    text.lines().filter_map(|line| parse_line(line, arch)).collect()
}

fn parse_line(line: &str, arch: &str) -> Option<HostSource> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb")?;
    let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let option = |name: &str| {
        options
            .split_whitespace()
            .filter_map(|option| option.split_once('='))
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.to_owned())
    };
    if option("arch").is_some_and(|arches| !arches.split(',').any(|one| one == arch)) {
        return None;
    }
    let kept = KEPT.iter().filter_map(|name| Some(((*name).to_owned(), option(name)?))).collect();
    let main = words.any(|component| component == "main");
    main.then(|| HostSource {
        uri: with_slash(uri),
        suite: expand(suite, arch),
        signed_by: option("signed-by").map(|value| value.replace(',', " ")),
        kept,
    })
}

/// The format of stanzas, deb822(5).
fn parse_deb822(text: &str, arch: &str) -> Vec<HostSource> {
    let mut sources = Vec::new();
    for stanza in stanzas(text) {
        let fields = stanza_fields(&stanza);
        let words = |name: &str| {
            fields
                .get(name)
                .map(|value| value.split_whitespace().collect::<Vec<_>>())
                .unwrap_or_default()
        };
        let off = |value: &String| {
            ["no", "false", "off", "0", "disable", "without"]
                .contains(&value.to_ascii_lowercase().as_str())
        };
        let arches = words("architectures");
        if fields.get("enabled").is_some_and(off)
            || !words("types").contains(&"deb")
            || !words("components").contains(&"main")
            || (!arches.is_empty() && !arches.contains(&arch))
        {
            continue;
        }
        let kept: Vec<(String, String)> = KEPT
            .iter()
            .filter_map(|name| {
                Some(((*name).to_owned(), fields.get(&name.to_ascii_lowercase())?.clone()))
            })
            .collect();
        for uri in words("uris") {
            for suite in words("suites") {
                sources.push(HostSource {
                    uri: with_slash(uri),
                    suite: expand(suite, arch),
                    signed_by: fields.get("signed-by").cloned(),
                    kept: kept.clone(),
                });
            }
        }
    }
    sources
}

fn stanzas(text: &str) -> Vec<String> {
    let mut stanzas = vec![String::new()];
    for line in text.lines() {
        if line.trim().is_empty() {
            stanzas.push(String::new());
        } else if let Some(stanza) = stanzas.last_mut() {
            stanza.push_str(line);
            stanza.push('\n');
        }
    }
    stanzas
}

fn with_slash(uri: &str) -> String {
    format!("{}/", uri.trim_end_matches('/'))
}

/// apt's one variable.
fn expand(suite: &str, arch: &str) -> String {
    suite.replace("$(ARCH)", arch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str, suite: &str, signed_by: Option<&str>) -> HostSource {
        HostSource {
            uri: uri.to_owned(),
            suite: suite.to_owned(),
            signed_by: signed_by.map(str::to_owned),
            kept: Vec::new(),
        }
    }

    #[test]
    fn one_line_format() {
        let text = "# deb http://m.example/off stable main\n\
            deb http://m.example/debian bookworm main contrib # comment\n\
            deb-src http://m.example/debian bookworm main\n\
            deb [arch=amd64,i386 signed-by=/k/a.gpg,/k/b.gpg trusted=yes check-valid-until=no] \
            http://m.example/s/ bookworm-security main\n\
            deb [arch=arm64] http://m.example/arm bookworm main\n\
            deb http://m.example/extra bookworm contrib\n\
            deb [broken\n";
        let mut signed =
            source("http://m.example/s/", "bookworm-security", Some("/k/a.gpg /k/b.gpg"));
        signed.kept = vec![("Check-Valid-Until".to_owned(), "no".to_owned())];
        assert_eq!(
            parse_list(text, "amd64"),
            [source("http://m.example/debian/", "bookworm", None), signed]
        );
    }

    #[test]
    fn deb822_format() {
        let text = "Types: deb deb-src\n# remark\nURIs: http://m.example/debian\n\
            Suites: trixie\n trixie-updates\nComponents: main\nSigned-By:\n \
            -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n\n\
            Types: deb\nURIs: http://m.example/off\nSuites: x\nComponents: main\nEnabled: no\n\n\n\
            Types: deb-src\nURIs: http://m.example/src\nSuites: x\nComponents: main\n";
        let key = "\n-----BEGIN PGP PUBLIC KEY BLOCK-----\n.\nabc";
        assert_eq!(
            parse_deb822(text, "amd64"),
            [
                source("http://m.example/debian/", "trixie", Some(key)),
                source("http://m.example/debian/", "trixie-updates", Some(key)),
            ]
        );
    }

    #[test]
    fn suites_fall_apart_at_the_first_dash() {
        let one = source("u/", "bookworm-backports-sloppy", None);
        assert_eq!((one.stem(), one.suffix()), ("bookworm", "-backports-sloppy"));
        let two = source("u/", "sid", None);
        assert_eq!((two.stem(), two.suffix()), ("sid", ""));
    }
}
