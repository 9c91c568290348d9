use super::*;
use crate::KernelSpec;

/// Shortened from the lists of Debian's sid and bookworm-security, and of Ubuntu's noble.
const PACKAGES: &str = "\
Package: linux-image-7.2.13+deb14-amd64
Version: 7.2.13-1
Architecture: amd64
Depends: dracut | initramfs-tools (>= 0.120+deb8u2), linux-base-7.2.13+deb14-amd64 (= 7.2.13-1), linux-binary-7.2.13+deb14-amd64 (= 7.2.13-1), linux-modules-7.2.13+deb14-amd64 (= 7.2.13-1)
Pre-Depends: linux-base (>= 4.17~)
Size: 1892

Package: linux-binary-7.2.13+deb14-amd64
Version: 7.2.13-1
Architecture: amd64
Depends: linux-base-7.2.13+deb14-amd64 (= 7.2.13-1)
Size: 14252084

Package: linux-modules-7.2.13+deb14-amd64
Version: 7.2.13-1
Architecture: amd64
Depends: kmod, linux-base-7.2.13+deb14-amd64 (= 7.2.13-1)
Size: 110095088

Package: linux-base-7.2.13+deb14-amd64
Version: 7.2.13-1
Architecture: amd64
Size: 469412

Package: linux-image-7.2.13+deb14-amd64-dbg
Version: 7.2.13-1
Architecture: amd64

Package: linux-image-6.12-amd64
Version: 6.12.117-1~deb12u1
Architecture: amd64
Depends: linux-image-6.12.117+deb12-amd64 (= 6.12.117-1~deb12u1)

Package: linux-image-6.12.117+deb12-amd64
Version: 6.12.117-1~deb12u1
Architecture: amd64
Size: 100

Package: linux-image-6.12.99+deb12-amd64
Version: 6.12.99-1~deb12u1
Architecture: amd64

Package: linux-image-6.12.117+deb12-cloud-amd64
Version: 6.12.117-1~deb12u1
Architecture: amd64

Package: linux-image-6.12.117+deb12-amd64-unsigned
Version: 6.12.117-1~deb12u1
Architecture: amd64

Package: linux-image-6.1.0-56-amd64
Version: 6.1.174-1
Architecture: amd64

Package: linux-image-6.1.0-56-arm64
Version: 6.1.174-1
Architecture: arm64

Package: linux-image-amd64
Version: 6.1.174-1
Architecture: amd64
Depends: linux-image-6.1.0-56-amd64 (= 6.1.174-1)

Package: linux-image-6.8.0-31-generic
Version: 6.8.0-31.31
Architecture: amd64
Depends: kmod, linux-base (>= 4.5ubuntu1~16.04.1), linux-modules-6.8.0-31-generic

Package: linux-modules-6.8.0-31-generic
Version: 6.8.0-31.31
Architecture: amd64

Package: linux-modules-extra-6.8.0-31-generic
Version: 6.8.0-31.31
Architecture: amd64
";

fn packages() -> Vec<Package> {
    let mut filter = PackageFilter::new(Arch::X86_64);
    PACKAGES.lines().for_each(|line| filter.line(line));
    filter.finish()
}

fn spec(text: &str) -> DistroSpec {
    match text.parse() {
        Ok(KernelSpec::Distro(spec)) => spec,
        other => panic!("{other:?}"),
    }
}

fn best(text: &str) -> Option<String> {
    let spec = spec(text);
    Candidate::all(&packages(), spec.distro)
        .into_iter()
        .filter(|candidate| candidate.fits(&spec))
        .max_by(Candidate::order)
        .map(|candidate| candidate.release)
}

fn parts(text: &str) -> Vec<String> {
    let (packages, spec) = (packages(), spec(text));
    let candidate = Candidate::all(&packages, spec.distro)
        .into_iter()
        .find(|candidate| candidate.fits(&spec))
        .unwrap();
    candidate.closure(&packages, &spec).unwrap().into_iter().map(|p| p.name).collect()
}

#[test]
fn picks_the_newest_that_fits() {
    for (text, release) in [
        ("debian:6.12", Some("6.12.117+deb12-amd64")),
        ("debian:6.12.99", Some("6.12.99+deb12-amd64")),
        ("debian:6.12-cloud", Some("6.12.117+deb12-cloud-amd64")),
        ("debian:6.12.117+deb12-amd64", Some("6.12.117+deb12-amd64")),
        ("debian:6.1", Some("6.1.0-56-amd64")),
        ("debian:6.1.174", Some("6.1.0-56-amd64")),
        ("debian:6.1.0-56", Some("6.1.0-56-amd64")),
        ("debian:sid", Some("7.2.13+deb14-amd64")),
        ("debian:7", Some("7.2.13+deb14-amd64")),
        ("debian:6.12.11", None),
        ("debian:6.12-rt", None),
        ("ubuntu:6.8", Some("6.8.0-31-generic")),
        ("ubuntu:6.8-virtual", Some("6.8.0-31-generic")),
    ] {
        assert_eq!(best(text).as_deref(), release, "{text}");
    }
}

#[test]
fn follows_the_parts_of_a_split_kernel() {
    assert_eq!(
        parts("debian:7.2"),
        [
            "linux-image-7.2.13+deb14-amd64",
            "linux-base-7.2.13+deb14-amd64",
            "linux-binary-7.2.13+deb14-amd64",
            "linux-modules-7.2.13+deb14-amd64",
        ]
    );
    assert_eq!(parts("debian:6.1"), ["linux-image-6.1.0-56-amd64"]);
}

#[test]
fn ubuntu_has_extra_modules_unless_virtual() {
    let all = parts("ubuntu:6.8");
    assert_eq!(all.len(), 3);
    assert_eq!(all[2], "linux-modules-extra-6.8.0-31-generic");
    assert_eq!(parts("ubuntu:6.8-virtual").len(), 2);
}

#[test]
fn a_part_that_is_not_there_is_named() {
    let mut packages = packages();
    packages.retain(|package| !package.name.starts_with("linux-modules-7"));
    let spec = spec("debian:7.2");
    let candidate = Candidate::all(&packages, Distro::Debian)
        .into_iter()
        .find(|candidate| candidate.fits(&spec))
        .unwrap();
    assert_eq!(
        candidate.closure(&packages, &spec),
        Err("linux-modules-7.2.13+deb14-amd64".to_owned())
    );
}

#[test]
fn short_specs() {
    let all = Candidate::all(&packages(), Distro::Debian);
    let short: Vec<String> = all.iter().map(|c| c.short_spec(Distro::Debian)).collect();
    assert!(short.contains(&"debian:6.12-cloud".to_owned()), "{short:?}");
    assert!(short.contains(&"debian:6.1".to_owned()), "{short:?}");
}
