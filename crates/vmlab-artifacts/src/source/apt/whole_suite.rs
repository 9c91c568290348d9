//! A whole suite as a source: what another program of apt's needs to install from it.

use std::path::Path;

use super::command::{apt, run};
use super::{Offer, Search};
use crate::spec::{Distro, DistroSpec, Select};
use crate::{ContentKey, KernelError, Progress};

/// Settings of the host's apt without which its archives may not be reached, or are refused because
/// they are a copy of the past. What decides whom to trust is not among them.
const KEPT_OPTIONS: [&str; 8] = [
    "Acquire::http::",
    "Acquire::https::",
    "Acquire::ftp::",
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
    "Acquire::ForceIPv4",
    "Acquire::ForceIPv6",
    "Acquire::Retries",
];

/// A suite with its updates, as sources.
#[derive(Debug, Clone)]
pub(crate) struct SuiteSources {
    /// Stanzas of deb822(5), with the host's keys.
    pub(crate) text: String,
    /// The same for a system of the suite itself: it has its keys, and nobody's passwords.
    pub(crate) for_image: String,
    /// The host's settings for reaching them, as lines of apt.conf(5).
    pub(crate) apt_options: Vec<String>,
    /// What the archive had: a digest of the `Release` files.
    pub(crate) state: String,
    /// The date of the suite's own `Release` file.
    pub(crate) date: String,
}

/// Asks for a suite's lists, if they are old or `fresh` says so, and says where they came from.
pub(crate) fn suite_sources(
    cache_root: &Path,
    distro: Distro,
    suite: &str,
    fresh: bool,
    progress: &dyn Progress,
) -> Result<SuiteSources, KernelError> {
    let select = Select::Suite(suite.to_owned());
    let spec = DistroSpec { distro, select, flavour: None, arch: None };
    let search = Search { cache_root, spec: &spec, fresh, progress };
    let host = search.host_sources()?;
    let offers = search.of_suite(&host, suite)?;
    let mut sources = SuiteSources {
        text: String::new(),
        for_image: String::new(),
        apt_options: options(distro)?,
        state: String::new(),
        date: String::new(),
    };
    let mut state = ContentKey::new("apt-state-1");
    for Offer { root, .. } in offers.iter().filter(|offer| offer.index.missing.is_none()) {
        let release = root.release_file()?;
        if sources.date.is_empty() {
            sources.date = date(&release).unwrap_or("1 January 2020 UTC").to_owned();
        }
        state = state.field("release", &release);
        sources.text.push_str(&format!("{}\n", root.deb822()));
        let uri = without_password(&root.source.uri);
        sources.for_image.push_str(&format!(
            "Types: deb\nURIs: {uri}\nSuites: {}\nComponents: main\n\n",
            root.source.suite
        ));
    }
    sources.state = state.finish();
    Ok(sources)
}

fn date(release: &str) -> Option<&str> {
    release.lines().find_map(|line| line.strip_prefix("Date:")).map(str::trim)
}

fn without_password(uri: &str) -> String {
    let Some((scheme, rest)) = uri.split_once("://") else { return uri.to_owned() };
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    format!("{scheme}://{host}/{path}")
}

fn options(distro: Distro) -> Result<Vec<String>, KernelError> {
    let mut command = apt("apt-config");
    command.args(["dump", "--no-empty", "Acquire"]);
    let mut options = Vec::new();
    run(command, distro, |line| {
        if KEPT_OPTIONS.iter().any(|kept| line.starts_with(kept)) {
            options.push(line.to_owned());
        }
    })?
    .map_err(|words| KernelError::Apt { doing: "print its configuration".to_owned(), words })?;
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobodys_password_gets_into_an_image() {
        assert_eq!(without_password("http://u:p@m.example/debian/"), "http://m.example/debian/");
        assert_eq!(without_password("https://m.example/a@b/"), "https://m.example/a@b/");
        assert_eq!(without_password("file:/srv/debian/"), "file:/srv/debian/");
    }

    #[test]
    fn a_release_file_has_its_date() {
        let text = "Origin: Debian\nDate: Sat, 11 Jul 2026 09:00:00 UTC\nSHA256:\n";
        assert_eq!(date(text), Some("Sat, 11 Jul 2026 09:00:00 UTC"));
        assert_eq!(date("Origin: Debian\n"), None);
    }
}
