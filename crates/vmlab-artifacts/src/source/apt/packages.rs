//! Kernel packages in apt's lists, and which of them fits a spec.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use crate::Arch;
use crate::source::deb::{depends_on, is_header_part, is_kernel_part};
use crate::spec::{Distro, DistroSpec, Select, has_version_prefix, split_release};
use crate::version;

/// Ends of names of packages that look like kernels and are not to be booted: symbols, the input of
/// the signing service, and images that lack the signature of the package without this end.
const OTHER_ENDS: [&str; 4] = ["-dbg", "-dbgsym", "-unsigned", "-template"];

/// A part of a kernel, or of what modules for one are built against.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    /// Parts of the same that it depends on.
    pub(crate) depends: Vec<String>,
    /// Bytes to download.
    pub(crate) size: u64,
}

impl Package {
    /// The release of the kernel that this package is the main part of.
    fn release(&self) -> Option<&str> {
        let release = self.name.strip_prefix("linux-image-")?;
        let real = is_kernel_part(&self.name)
            && !OTHER_ENDS.iter().any(|end| release.ends_with(end))
            // `linux-image-6.12-amd64` only points to the newest 6.12.
            && !self.depends.iter().any(|name| name.starts_with("linux-image-"));
        real.then_some(release)
    }
}

/// Which names belong to what a package is a part of.
type IsPart = fn(&str) -> bool;

/// Picks the parts of kernels and of their headers out of a `Packages` file, line by line.
#[derive(Debug)]
pub(super) struct PackageFilter {
    arch: &'static str,
    wanted: Option<IsPart>,
    right_arch: bool,
    current: Package,
    found: Vec<Package>,
}

impl PackageFilter {
    pub(super) fn new(arch: Arch) -> PackageFilter {
        PackageFilter {
            arch: arch.debian(),
            wanted: None,
            right_arch: false,
            current: Package::default(),
            found: Vec::new(),
        }
    }

    pub(super) fn line(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix("Package: ") {
            self.end_stanza();
            let parts: [IsPart; 2] = [is_kernel_part, is_header_part];
            let other = OTHER_ENDS.iter().any(|end| name.ends_with(end));
            self.wanted = parts.into_iter().find(|is_part| !other && is_part(name));
            name.clone_into(&mut self.current.name);
            return;
        }
        let Some(is_part) = self.wanted else { return };
        if let Some(version) = line.strip_prefix("Version: ") {
            version.clone_into(&mut self.current.version);
        } else if let Some(arch) = line.strip_prefix("Architecture: ") {
            // Headers that all architectures have in common are in packages for all of them.
            self.right_arch = arch == self.arch || arch == "all";
        } else if let Some(depends) =
            line.strip_prefix("Depends: ").or_else(|| line.strip_prefix("Pre-Depends: "))
        {
            self.current.depends.extend(depends_on(depends, is_part));
        } else if let Some(size) = line.strip_prefix("Size: ") {
            self.current.size = size.trim().parse().unwrap_or(0);
        }
    }

    pub(super) fn finish(mut self) -> Vec<Package> {
        self.end_stanza();
        self.found
    }

    fn end_stanza(&mut self) {
        let package = std::mem::take(&mut self.current);
        if self.wanted.is_some() && self.right_arch && !package.version.is_empty() {
            self.found.push(package);
        }
        self.wanted = None;
        self.right_arch = false;
    }
}

/// A kernel that a suite offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) image: Package,
    pub(crate) release: String,
    pub(crate) flavour: Option<String>,
}

impl Candidate {
    /// The kernels among a suite's packages.
    pub(super) fn all(packages: &[Package], distro: Distro) -> Vec<Candidate> {
        let candidate = |image: &Package| {
            let release = image.release()?.to_owned();
            let flavour = flavour_of(&release, distro);
            Some(Candidate { image: image.clone(), release, flavour })
        };
        packages.iter().filter_map(candidate).collect()
    }

    /// Whether this kernel fits, suites left aside.
    pub(super) fn fits(&self, spec: &DistroSpec) -> bool {
        self.has_version(spec) && self.flavour.as_deref() == wanted_flavour(spec)
    }

    /// Whether this kernel has the wanted version; where a suite is wanted, any is.
    pub(super) fn has_version(&self, spec: &DistroSpec) -> bool {
        match &spec.select {
            Select::Suite(_) => true,
            Select::Version(prefix) => version_fits(&self.release, &self.image.version, prefix),
        }
    }

    /// By version, and by release where one version has several.
    pub(super) fn order(&self, other: &Candidate) -> Ordering {
        version::compare(&self.image.version, &other.image.version)
            .then_with(|| version::compare(&self.release, &other.release))
    }

    /// A short spec that this kernel is the answer to: `debian:6.12-cloud`.
    pub(super) fn short_spec(&self, distro: Distro) -> String {
        let short: Vec<&str> = self.release.splitn(3, ['.', '-']).take(2).collect();
        let flavour = self.flavour.as_ref().map_or(String::new(), |name| format!("-{name}"));
        format!("{distro}:{}{flavour}", short.join("."))
    }

    /// All packages that this kernel consists of, or the name of one that the suite lacks.
    pub(super) fn closure(
        &self,
        packages: &[Package],
        spec: &DistroSpec,
    ) -> Result<Vec<Package>, String> {
        let mut all = closure(&self.image, packages)?;
        // Ubuntu keeps filesystems and other modules in a package that only its `linux-image-generic`
        // depends on; leaving it out is what makes the `virtual` flavour.
        if spec.distro == Distro::Ubuntu && spec.flavour.as_deref() != Some("virtual") {
            let extra = format!("linux-modules-extra-{}", self.release);
            all.extend(newest(packages, &extra, Some(&self.image.version)).cloned());
        }
        Ok(all)
    }
}

/// All packages that one consists of, itself the first, or the name of one that the suite lacks.
fn closure(first: &Package, packages: &[Package]) -> Result<Vec<Package>, String> {
    let mut all = vec![first.clone()];
    let mut next = 0;
    while let Some(package) = all.get(next) {
        let depends = package.depends.clone();
        next += 1;
        for name in depends {
            if all.iter().any(|package| package.name == name) {
                continue;
            }
            // The parts of a kernel depend on each other in one exact version.
            let part = newest(packages, &name, Some(&first.version))
                .or_else(|| newest(packages, &name, None));
            all.push(part.ok_or(name)?.clone());
        }
    }
    Ok(all)
}

/// All packages of the headers for a release, of this version if there is that; none where the suite has none for it.
///
/// # Errors
/// The name of a part that the suite lacks.
pub(super) fn headers(
    release: &str,
    version: &str,
    packages: &[Package],
) -> Result<Vec<Package>, String> {
    let name = format!("linux-headers-{release}");
    match newest(packages, &name, Some(version)).or_else(|| newest(packages, &name, None)) {
        Some(first) => closure(first, packages),
        None => Ok(Vec::new()),
    }
}

fn newest<'a>(packages: &'a [Package], name: &str, exact: Option<&str>) -> Option<&'a Package> {
    packages
        .iter()
        .filter(|package| package.name == name && exact.is_none_or(|v| package.version == v))
        .max_by(|a, b| version::compare(&a.version, &b.version))
}

/// Whether a kernel has the wanted version: by its release, or by its package's upstream version
/// (Debian's 6.1.0-56-amd64 is Linux 6.1.174).
pub(crate) fn version_fits(release: &str, package_version: &str, prefix: &str) -> bool {
    has_version_prefix(&split_release(release).version, prefix)
        || has_version_prefix(release, prefix)
        || has_version_prefix(package_version, prefix)
}

/// The flavour in a release; none for the generic one.
pub(crate) fn flavour_of(release: &str, distro: Distro) -> Option<String> {
    split_release(release).flavour.filter(|name| !(distro == Distro::Ubuntu && name == "generic"))
}

/// The flavour that the packages of a spec have in their names.
pub(crate) fn wanted_flavour(spec: &DistroSpec) -> Option<&str> {
    spec.flavour.as_deref().filter(|name| !(spec.distro == Distro::Ubuntu && *name == "virtual"))
}

#[cfg(test)]
mod tests;
