//! Kernels of a distribution, by way of the host's own apt.
//!
//! Archives and keyrings come from the sources that the host is configured for; other suites of the
//! same archive are reached by changing the suite's name. apt checks every signature.

mod command;
mod packages;
mod root;
mod sources;
mod whole_suite;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use self::command::{apt, run};
pub(crate) use self::packages::{Candidate, Package, version_fits, wanted_flavour};
use self::root::{AptRoot, Index};
use self::sources::HostSource;
pub(crate) use self::whole_suite::{SuiteSources, suite_sources};
use crate::source::deb::stanza_fields;
use crate::spec::{Distro, DistroSpec, Select};
use crate::{Bound, KernelError, Kind, Progress};

/// The cache kind of private apt roots.
const APT: &str = "apt";

/// It, for whoever looks after the cache.
pub(crate) const KIND: Kind = Kind { name: APT, bound: Bound::None, verify: root::verify };

/// How many suites are asked at the same time.
const PARALLEL: usize = 2;

/// Suites that belong to a suite and are searched with it.
const WITH_SUITE: [&str; 2] = ["-updates", "-security"];

/// Where a version is looked for when the host's own suites do not have it. Names that move with
/// each release, so that this list stays right.
const DEBIAN_ELSEWHERE: [&str; 6] =
    ["stable", "stable-updates", "stable-security", "stable-backports", "testing", "unstable"];
const DEBIAN_OLD: [&str; 5] = [
    "oldstable",
    "oldstable-security",
    "oldstable-backports",
    "oldoldstable",
    "oldoldstable-security",
];
const UBUNTU_ELSEWHERE: [&str; 8] = [
    "devel",
    "resolute",
    "resolute-updates",
    "resolute-security",
    "noble",
    "noble-updates",
    "noble-security",
    "jammy-updates",
];

/// How many specs a message offers.
const MAX_OFFERED: usize = 12;

/// A kernel in an archive.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) candidate: Candidate,
    /// The image is the first.
    pub(crate) parts: Parts,
    /// The suite under the names that it has.
    pub(crate) suites: Vec<String>,
}

/// Packages of one suite that belong together, ready to be downloaded.
#[derive(Debug)]
pub(crate) struct Parts {
    root: AptRoot,
    /// At least one, which the others are parts of.
    packages: Vec<Package>,
}

impl Parts {
    /// The one that the others are parts of.
    pub(crate) fn first(&self) -> &Package {
        &self.packages[0]
    }

    /// Downloads all of them into an empty directory.
    pub(crate) fn download(
        &self,
        dest: &Path,
        progress: &dyn Progress,
    ) -> Result<Vec<PathBuf>, KernelError> {
        progress.phase(&format!("download {}", self.first().name));
        self.root.download(&self.packages, dest, progress)
    }
}

/// Finds the newest kernel that fits; `fresh` asks the archive even where its lists are new.
pub(crate) fn find(
    cache_root: &Path,
    spec: &DistroSpec,
    fresh: bool,
    progress: &dyn Progress,
) -> Result<Found, KernelError> {
    let search = Search { cache_root, spec, fresh, progress };
    let host = search.host_sources()?;
    match &spec.select {
        Select::Suite(suite) => search.in_suite(&host, suite),
        Select::Version(_) => search.by_version(&host),
    }
}

/// Finds what modules for a release are built against, in the suite of `spec`, where its kernel came from.
///
/// # Errors
/// [`KernelError::NoHeaders`] when the suite has none for it (any more).
pub(crate) fn find_headers(
    cache_root: &Path,
    spec: &DistroSpec,
    (release, version): (&str, &str),
    progress: &dyn Progress,
) -> Result<Parts, KernelError> {
    // The lists that are there may be from before the kernel was.
    let search = |fresh| Search { cache_root, spec, fresh, progress };
    match search(false).headers(release, version) {
        Err(KernelError::NoHeaders { .. }) => search(true).headers(release, version),
        found => found,
    }
}

/// The suite that this host is built of, as a spec for its newest kernel.
pub(crate) fn host_suite(
    cache_root: &Path,
    progress: &dyn Progress,
) -> Result<DistroSpec, KernelError> {
    let os = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let mut order = Distro::ALL;
    order.sort_by_key(|distro| !os.lines().any(|line| line == format!("ID={}", distro.name())));
    let mut first_error = None;
    for distro in order {
        let select = Select::Suite("stable".to_owned());
        let mut spec = DistroSpec { distro, select, flavour: None, arch: None };
        let search = Search { cache_root, spec: &spec, fresh: false, progress };
        match search.host_sources().map(|host| host[0].stem().to_owned()) {
            Ok(stem) => {
                spec.select = Select::Suite(stem);
                return Ok(spec);
            }
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    Err(first_error.unwrap_or_else(|| no_source(Distro::Debian, PathBuf::from("/etc/apt"))))
}

/// The program that reads apt's compressed lists.
fn helper(distro: Distro) -> Result<PathBuf, KernelError> {
    let methods = config(distro)?.remove("METHODS").unwrap_or_default();
    Ok(Path::new(&methods).parent().unwrap_or(Path::new("/usr/lib/apt")).join("apt-helper"))
}

/// The places that apt is configured with.
fn config(distro: Distro) -> Result<BTreeMap<String, String>, KernelError> {
    let mut command = apt("apt-config");
    command.args(["shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"]);
    command.args(["METHODS", "Dir::Bin::methods/d"]);
    let mut places = BTreeMap::new();
    run(command, distro, |line| {
        if let Some((name, value)) = line.split_once('=') {
            let value = value.trim_matches('\'').trim_end_matches('/');
            places.insert(name.to_owned(), value.to_owned());
        }
    })?
    .map_err(|words| KernelError::Apt { doing: "print its configuration".to_owned(), words })?;
    Ok(places)
}

fn lacking(whole: &str, root: &AptRoot, part: &str) -> KernelError {
    KernelError::Apt {
        doing: format!("find all parts of {whole}"),
        words: format!("nothing, but {} has no package {part}", root.source.suite),
    }
}

fn no_source(distro: Distro, sources: PathBuf) -> KernelError {
    KernelError::NoSource { distro, sources }
}

struct Search<'a> {
    cache_root: &'a Path,
    spec: &'a DistroSpec,
    fresh: bool,
    progress: &'a dyn Progress,
}

/// What one suite offers.
struct Offer {
    root: AptRoot,
    index: Index,
}

impl Search<'_> {
    /// The host's sources that are the distribution's; at least one.
    fn host_sources(&self) -> Result<Vec<HostSource>, KernelError> {
        let distro = self.spec.distro;
        let places = config(distro)?;
        let place = |name: &str| PathBuf::from(places.get(name).cloned().unwrap_or_default());
        let all = sources::read(&place("LIST"), &place("PARTS"), self.spec.arch().debian());
        let known = self.known_origins()?;
        let mut ours = Vec::new();
        let mut failure = None;
        for source in all {
            let origin = match known.get(&(source.uri.clone(), source.suite.clone())) {
                Some(origin) => origin.clone(),
                // The host never fetched its lists; only the Release file tells whose they are.
                None => match self.root(source.clone()).index(false, self.progress) {
                    Ok(index) => index.origin,
                    Err(error) => {
                        failure = failure.or(Some(error));
                        continue;
                    }
                },
            };
            if origin.eq_ignore_ascii_case(distro.origin()) {
                ours.push(source);
            }
        }
        match (ours.is_empty(), failure) {
            (false, _) => Ok(ours),
            (true, Some(error)) => Err(error),
            (true, None) => Err(no_source(distro, place("PARTS"))),
        }
    }

    /// Whose the sources are, as far as the host has lists.
    fn known_origins(&self) -> Result<BTreeMap<(String, String), String>, KernelError> {
        let mut command = apt("apt-get");
        command.args(["indextargets", "Created-By: Packages"]);
        let mut text = String::new();
        run(command, self.spec.distro, |line| {
            text.push_str(line);
            text.push('\n');
        })?
        .map_err(|words| KernelError::Apt { doing: "list its sources".to_owned(), words })?;
        let mut known = BTreeMap::new();
        for stanza in text.split("\n\n") {
            let mut fields = stanza_fields(stanza);
            let mut take = |name: &str| fields.remove(name).filter(|value| !value.is_empty());
            if let (Some(uri), Some(suite), Some(origin)) =
                (take("repo-uri"), take("release"), take("origin"))
            {
                known.insert((format!("{}/", uri.trim_end_matches('/')), suite), origin);
            }
        }
        Ok(known)
    }

    fn root(&self, source: HostSource) -> AptRoot {
        AptRoot::new(self.cache_root, source, self.spec.arch(), self.spec.distro)
    }

    /// The newest kernel of a suite and of its updates.
    fn in_suite(&self, host: &[HostSource], suite: &str) -> Result<Found, KernelError> {
        let offers = self.of_suite(host, suite)?;
        match self.best(&offers)? {
            Some(found) => Ok(found),
            None => Err(self.no_match(&offers, &[])),
        }
    }

    /// A suite and its updates, as far as the host has these of its own.
    fn of_suite(&self, host: &[HostSource], suite: &str) -> Result<Vec<Offer>, KernelError> {
        let distro = self.spec.distro;
        let base = other_suite(host, suite);
        let mut offers = match self.ask(vec![base]).remove(0) {
            Ok(Offer { index: Index { missing: Some(words), .. }, .. }) => {
                let nearest = distro.nearest_suite(suite);
                let suite = suite.to_owned();
                return Err(KernelError::NoSuite { distro, suite, nearest, words });
            }
            outcome => vec![outcome?],
        };
        if !suite.contains('-') {
            let more: Vec<HostSource> = WITH_SUITE
                .iter()
                .filter(|suffix| host.iter().any(|source| source.suffix() == **suffix))
                .map(|suffix| other_suite(host, &format!("{suite}{suffix}")))
                .collect();
            // These may be missing (sid has none), but not fail: an old kernel would be taken for
            // the newest.
            for offer in self.ask(more) {
                offers.push(offer?);
            }
        }
        Ok(offers)
    }

    /// The newest kernel of a version: in the host's suites, else in others of the same archive.
    fn by_version(&self, host: &[HostSource]) -> Result<Found, KernelError> {
        let mut asked = HashSet::new();
        let mut offers = Vec::new();
        let mut failures = Vec::new();
        for tier in self.tiers(host) {
            let tier: Vec<HostSource> = tier
                .into_iter()
                .filter(|source| asked.insert((source.uri.clone(), source.suite.clone())))
                .collect();
            let names: Vec<String> = tier.iter().map(|source| source.suite.clone()).collect();
            for (name, outcome) in names.into_iter().zip(self.ask(tier)) {
                match outcome {
                    Ok(offer) => offers.push(offer),
                    Err(error @ KernelError::Apt { .. }) => failures.push((name, error)),
                    Err(error) => return Err(error),
                }
            }
            // Where no suite answers at all, the others would not, either.
            if offers.is_empty() && !failures.is_empty() {
                return Err(failures.remove(0).1);
            }
            if let Some(found) = self.best(&offers)? {
                for (name, error) in &failures {
                    self.progress.note(&format!("the suite {name} was left out: {error}"));
                }
                return Ok(found);
            }
        }
        let names: Vec<String> = failures.into_iter().map(|(name, _)| name).collect();
        Err(self.no_match(&offers, &names))
    }

    /// The headers for a release in the suite of the spec.
    fn headers(&self, release: &str, version: &str) -> Result<Parts, KernelError> {
        let Select::Suite(suite) = &self.spec.select else { return Err(self.no_headers(release)) };
        for Offer { root, index } in self.of_suite(&self.host_sources()?, suite)? {
            let packages = packages::headers(release, version, &index.packages)
                .map_err(|part| lacking(&format!("the headers for {release}"), &root, &part))?;
            if !packages.is_empty() {
                return Ok(Parts { root, packages });
            }
        }
        Err(self.no_headers(release))
    }

    fn no_headers(&self, release: &str) -> KernelError {
        let (release, from) = (release.to_owned(), self.spec.to_string());
        KernelError::NoHeaders { release, from }
    }

    /// Where to look for a version, group by group.
    fn tiers(&self, host: &[HostSource]) -> [Vec<HostSource>; 3] {
        let suites = |names: &[&str]| -> Vec<HostSource> {
            names.iter().map(|suite| other_suite(host, suite)).collect()
        };
        let stem = host[0].stem();
        match self.spec.distro {
            Distro::Debian => {
                let mut elsewhere = suites(&[&format!("{stem}-backports")]);
                elsewhere.extend(suites(&DEBIAN_ELSEWHERE));
                [host.to_vec(), elsewhere, suites(&DEBIAN_OLD)]
            }
            Distro::Ubuntu => {
                let near: Vec<String> =
                    WITH_SUITE.iter().map(|suffix| format!("{stem}{suffix}")).collect();
                let near: Vec<&str> = near.iter().map(String::as_str).collect();
                [host.to_vec(), suites(&near), suites(&UBUNTU_ELSEWHERE)]
            }
        }
    }

    /// Asks suites for what they have, a few at a time; the answers are in the suites' order.
    fn ask(&self, sources: Vec<HostSource>) -> Vec<Result<Offer, KernelError>> {
        let ask_one = |source: &HostSource| {
            let root = self.root(source.clone());
            let index = root.index(self.fresh, self.progress)?;
            Ok(Offer { root, index })
        };
        let mut answers = Vec::new();
        for group in sources.chunks(PARALLEL) {
            std::thread::scope(|scope| {
                let threads: Vec<_> =
                    group.iter().map(|source| scope.spawn(move || ask_one(source))).collect();
                for thread in threads {
                    answers.push(
                        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                    );
                }
            });
        }
        answers
    }

    /// The newest kernel among the offers that fits, with all its parts.
    fn best(&self, offers: &[Offer]) -> Result<Option<Found>, KernelError> {
        let distro = self.spec.distro;
        let best = offers
            .iter()
            .filter(|offer| offer.index.origin.eq_ignore_ascii_case(distro.origin()))
            .flat_map(|offer| {
                Candidate::all(&offer.index.packages, distro).into_iter().map(move |c| (offer, c))
            })
            .filter(|(_, candidate)| candidate.fits(self.spec))
            .max_by(|(_, a), (_, b)| a.order(b));
        let Some((offer, candidate)) = best else { return Ok(None) };
        let packages = candidate
            .closure(&offer.index.packages, self.spec)
            .map_err(|part| lacking(&candidate.image.name, &offer.root, &part))?;
        let names = [&offer.root.source.suite, &offer.index.codename, &offer.index.suite];
        let mut suites: Vec<String> = Vec::new();
        for name in names {
            if !name.is_empty() && !suites.contains(name) {
                suites.push(name.clone());
            }
        }
        let parts = Parts { root: offer.root.clone(), packages };
        Ok(Some(Found { candidate, parts, suites }))
    }

    /// Says where was looked, and which kernels there are instead.
    fn no_match(&self, offers: &[Offer], failed: &[String]) -> KernelError {
        let distro = self.spec.distro;
        let there: Vec<&str> = offers
            .iter()
            .filter(|offer| offer.index.missing.is_none())
            .map(|offer| offer.root.source.suite.as_str())
            .collect();
        let mut searched = format!(
            "looked for {} kernels in {}",
            self.spec.arch().debian(),
            if there.is_empty() { "no suite".to_owned() } else { there.join(", ") }
        );
        if !failed.is_empty() {
            searched.push_str(&format!(" (could not fetch {})", failed.join(", ")));
        }
        let mut all: Vec<Candidate> =
            offers.iter().flat_map(|o| Candidate::all(&o.index.packages, distro)).collect();
        all.sort_by(|a, b| b.order(a));
        // Best are other versions of this flavour, then other flavours of this version.
        let wanted = wanted_flavour(self.spec);
        if all.iter().any(|candidate| candidate.flavour.as_deref() == wanted) {
            all.retain(|candidate| candidate.flavour.as_deref() == wanted);
        } else if all.iter().any(|candidate| candidate.has_version(self.spec)) {
            all.retain(|candidate| candidate.has_version(self.spec));
        }
        let mut available: Vec<String> = Vec::new();
        for candidate in all {
            let short = candidate.short_spec(distro);
            if available.len() < MAX_OFFERED && !available.contains(&short) {
                available.push(short);
            }
        }
        KernelError::NoMatch { spec: self.spec.to_string(), searched, available }
    }
}

/// The source for a suite: the host's own where it has it, else one like it.
fn other_suite(host: &[HostSource], suite: &str) -> HostSource {
    let suffix = &suite[suite.find('-').unwrap_or(suite.len())..];
    let of_suffix = |wanted: &str| host.iter().find(|source| source.suffix() == wanted);
    host.iter()
        .find(|source| source.suite == suite)
        .or_else(|| of_suffix(suffix))
        .or_else(|| of_suffix(""))
        .unwrap_or(&host[0])
        .with_suite(suite.to_owned())
}
