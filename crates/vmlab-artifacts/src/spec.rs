//! Kernel specs: the short names by which a user picks a kernel.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Arch;

#[cfg(test)]
mod tests;

/// What a user may write, for the end of every parse error.
const GRAMMAR: &str = "a kernel is one of: host; an installed release such as 6.1.0-56-amd64; \
    debian:6.12, debian:6.12-cloud, debian:trixie, debian:sid; ubuntu:6.8, ubuntu:noble; \
    or a path such as ./bzImage, ./vmlinux, ./linux-image.deb, ../linux (a build tree)";

/// Two names are taken for a typing slip of each other up to this many edits.
const SLIP: usize = 2;

/// Names that follow a suite's own name and belong to it: `bookworm-backports`.
const SUITE_SUFFIXES: [&str; 4] = ["updates", "security", "backports", "proposed"];

/// A kernel as a user names it; [`KernelStore::resolve`](crate::KernelStore::resolve) finds it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum KernelSpec {
    /// `host`: the release that this host is running.
    Host,
    /// A release installed on this host, as `uname -r` prints it.
    Installed(String),
    /// A distribution's kernel, fetched by apt.
    Distro(DistroSpec),
    /// A boot image, a `.deb`, an unpacked `.deb` or a kernel build tree.
    Path(PathBuf),
}

/// `debian:6.12-cloud` in its parts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DistroSpec {
    /// Whose kernel.
    pub distro: Distro,
    /// Which of its kernels.
    pub select: Select,
    /// `cloud`, `rt`, `kvm`; none for the distribution's generic kernel.
    pub flavour: Option<String>,
    /// The architecture; none for that of this program.
    pub arch: Option<Arch>,
}

impl DistroSpec {
    /// The architecture wanted.
    pub fn arch(&self) -> Arch {
        self.arch.unwrap_or(Arch::HOST)
    }
}

/// A distribution whose kernels can be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Distro {
    /// Debian.
    Debian,
    /// Ubuntu.
    Ubuntu,
}

impl Distro {
    /// All of them.
    pub const ALL: [Distro; 2] = [Distro::Debian, Distro::Ubuntu];

    /// The word before the colon in a spec.
    pub const fn name(self) -> &'static str {
        match self {
            Distro::Debian => "debian",
            Distro::Ubuntu => "ubuntu",
        }
    }

    /// The `Origin:` that the distribution's Release files carry.
    pub const fn origin(self) -> &'static str {
        match self {
            Distro::Debian => "Debian",
            Distro::Ubuntu => "Ubuntu",
        }
    }

    /// The known suite whose name is a typing slip away.
    pub(crate) fn nearest_suite(self, suite: &str) -> Option<String> {
        nearest(suite, self.known_suites()).map(str::to_owned)
    }

    /// Suites that exist today, to tell a typing slip from a suite that is newer than this program.
    fn known_suites(self) -> &'static [&'static str] {
        match self {
            Distro::Debian => &[
                "stable",
                "testing",
                "unstable",
                "experimental",
                "oldstable",
                "oldoldstable",
                "sid",
                "bullseye",
                "bookworm",
                "trixie",
                "forky",
                "duke",
            ],
            Distro::Ubuntu => {
                &["devel", "focal", "jammy", "noble", "plucky", "questing", "resolute"]
            }
        }
    }

    /// Flavours that exist today, for the same purpose.
    fn known_flavours(self) -> &'static [&'static str] {
        match self {
            Distro::Debian => &["cloud", "rt"],
            Distro::Ubuntu => &[
                "generic",
                "virtual",
                "kvm",
                "lowlatency",
                "aws",
                "azure",
                "gcp",
                "oracle",
                "raspi",
                "realtime",
                "nvidia",
            ],
        }
    }
}

impl fmt::Display for Distro {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which of a distribution's kernels.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Select {
    /// The newest whose version starts with these components: `6.12`, `6.12.117+deb12`.
    Version(String),
    /// The newest of a suite: `trixie`, `sid`.
    Suite(String),
}

impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Select::Version(text) | Select::Suite(text) => f.write_str(text),
        }
    }
}

/// A text that is no kernel spec.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{spec}` names no kernel: {reason}; {GRAMMAR}")]
pub struct SpecError {
    /// The text.
    pub spec: String,
    /// What is wrong with it, with the nearest known name where there is one.
    pub reason: String,
}

impl FromStr for KernelSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let fail = |reason: String| Err(SpecError { spec: text.to_owned(), reason });
        if text.is_empty() {
            return fail("it is empty".to_owned());
        }
        if text.contains('\0') {
            return fail("it has a NUL byte in it".to_owned());
        }
        if text == "host" {
            return Ok(KernelSpec::Host);
        }
        if text.contains('/') || text.starts_with('.') || text.ends_with(".deb") {
            return Ok(KernelSpec::Path(PathBuf::from(text)));
        }
        if let Some((scheme, rest)) = text.split_once(':') {
            return match Distro::ALL.iter().find(|distro| distro.name() == scheme) {
                Some(distro) => match parse_selection(*distro, rest) {
                    Ok(spec) => Ok(KernelSpec::Distro(spec)),
                    Err(reason) => fail(reason),
                },
                None if Path::new(text).exists() => Ok(KernelSpec::Path(PathBuf::from(text))),
                None => {
                    let names = Distro::ALL.map(Distro::name);
                    let hint = nearest(scheme, &names)
                        .map_or(String::new(), |name| format!(" (did you mean {name}:{rest}?)"));
                    fail(format!("`{scheme}` is no distribution that kernels come from{hint}"))
                }
            };
        }
        if Path::new(text).exists() {
            return Ok(KernelSpec::Path(PathBuf::from(text)));
        }
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            if let Some(bad) = text.chars().find(|c| !is_release_char(*c)) {
                return fail(format!("a release has no {bad:?} in it"));
            }
            return Ok(KernelSpec::Installed(text.to_owned()));
        }
        fail(explain_word(text))
    }
}

impl fmt::Display for KernelSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KernelSpec::Host => f.write_str("host"),
            KernelSpec::Installed(release) => f.write_str(release),
            KernelSpec::Distro(spec) => spec.fmt(f),
            KernelSpec::Path(path) => {
                let text = path.to_string_lossy();
                // A bare file name would read back as a release or a distribution.
                let bare = !text.contains('/') && !text.starts_with('.') && !text.ends_with(".deb");
                write!(f, "{}{text}", if bare { "./" } else { "" })
            }
        }
    }
}

impl fmt::Display for DistroSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.distro, self.select)?;
        if let Some(flavour) = &self.flavour {
            write!(f, "-{flavour}")?;
        }
        match self.arch {
            Some(arch) => write!(f, "-{}", arch.debian()),
            None => Ok(()),
        }
    }
}

/// Parses what follows the colon.
fn parse_selection(distro: Distro, text: &str) -> Result<DistroSpec, String> {
    if text.is_empty() {
        return Err(format!("{distro}: needs a version or a suite"));
    }
    if let Some(bad) = text.chars().find(|c| !is_release_char(*c)) {
        return Err(format!("a version or a suite has no {bad:?} in it"));
    }
    if text.split('-').any(str::is_empty) {
        return Err("there is nothing before or after a `-`".to_owned());
    }
    let parts = split_release(text);
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        check_flavour(distro, parts.flavour.as_deref())?;
        return Ok(DistroSpec {
            distro,
            select: Select::Version(parts.version),
            flavour: generic_is_none(distro, parts.flavour),
            arch: parts.arch,
        });
    }
    let mut suite = parts.version;
    let mut flavour = parts.flavour;
    check_suite(distro, &suite)?;
    if let Some(rest) = flavour.take() {
        let mut words = rest.split('-').peekable();
        while let Some(word) = words.next_if(|word| SUITE_SUFFIXES.contains(word)) {
            suite = format!("{suite}-{word}");
        }
        let left: Vec<&str> = words.collect();
        flavour = (!left.is_empty()).then(|| left.join("-"));
    }
    check_flavour(distro, flavour.as_deref())?;
    Ok(DistroSpec {
        distro,
        select: Select::Suite(suite),
        flavour: generic_is_none(distro, flavour),
        arch: parts.arch,
    })
}

/// A release or selection in its parts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ReleaseParts {
    /// `6.1.0-56`, `6.12.117+deb12`, `trixie`.
    pub(crate) version: String,
    /// `cloud`, `generic`.
    pub(crate) flavour: Option<String>,
    /// From a trailing `amd64` or `arm64`.
    pub(crate) arch: Option<Arch>,
}

/// Splits `6.1.0-56-cloud-amd64` into version with ABI number, flavour and architecture.
pub(crate) fn split_release(text: &str) -> ReleaseParts {
    let mut words: Vec<&str> = text.split('-').collect();
    let arch = match words.last() {
        Some(&last) if words.len() > 1 => {
            [Arch::X86_64, Arch::Aarch64].into_iter().find(|arch| arch.debian() == last)
        }
        _ => None,
    };
    if arch.is_some() {
        words.pop();
    }
    let abi = words[1..].iter().take_while(|w| w.bytes().all(|b| b.is_ascii_digit())).count();
    let (version, flavour) = words.split_at(1 + abi);
    ReleaseParts {
        version: version.join("-"),
        flavour: (!flavour.is_empty()).then(|| flavour.join("-")),
        arch,
    }
}

/// Whether `version` is `prefix` or continues it with a new component: 6.1 matches 6.1.4, not 6.12.
pub(crate) fn has_version_prefix(version: &str, prefix: &str) -> bool {
    version
        .strip_prefix(prefix)
        .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
}

/// The generic flavour has a name of its own in Ubuntu only.
fn generic_is_none(distro: Distro, flavour: Option<String>) -> Option<String> {
    flavour.filter(|name| !(distro == Distro::Ubuntu && name == "generic"))
}

fn check_suite(distro: Distro, suite: &str) -> Result<(), String> {
    let known = distro.known_suites();
    if known.contains(&suite) {
        return Ok(());
    }
    match nearest(suite, known) {
        Some(name) => {
            Err(format!("{distro} has no suite `{suite}` (did you mean {distro}:{name}?)"))
        }
        None => Ok(()),
    }
}

fn check_flavour(distro: Distro, flavour: Option<&str>) -> Result<(), String> {
    let known = distro.known_flavours();
    match flavour {
        Some(name) if !known.contains(&name) => match nearest(name, known) {
            Some(near) => {
                Err(format!("{distro}'s kernels have no flavour `{name}` (did you mean `{near}`?)"))
            }
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

/// What to say of a bare word that is neither `host` nor a release nor a file.
fn explain_word(text: &str) -> String {
    for distro in Distro::ALL {
        if text == distro.name() {
            return format!("{distro}: needs a version or a suite");
        }
        let word = text.split('-').next().unwrap_or(text);
        if distro.known_suites().contains(&word) {
            return format!("there is no such file (did you mean {distro}:{text}?)");
        }
    }
    let hint = nearest(text, &["host", "debian", "ubuntu"])
        .map_or(String::new(), |name| format!(" (did you mean {name}?)"));
    format!("there is no such file, and a release starts with a digit{hint}")
}

/// The known name that is a typing slip away.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|name| (strsim::damerau_levenshtein(word, name), *name))
        .filter(|(distance, name)| *distance <= SLIP && *distance < name.len().min(word.len()))
        .min()
        .map(|(_, name)| name)
}

fn is_release_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+' | '~' | '_')
}
