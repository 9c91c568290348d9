use super::*;

fn parse(text: &str) -> KernelSpec {
    text.parse().unwrap_or_else(|error| panic!("{error}"))
}

fn reason(text: &str) -> String {
    match text.parse::<KernelSpec>() {
        Ok(spec) => panic!("{text:?} was read as {spec:?}"),
        Err(error) => error.to_string(),
    }
}

fn distro(distro: Distro, select: Select, flavour: Option<&str>, arch: Option<Arch>) -> KernelSpec {
    KernelSpec::Distro(DistroSpec { distro, select, flavour: flavour.map(str::to_owned), arch })
}

#[test]
fn reads_every_form() {
    let version = |text: &str| Select::Version(text.to_owned());
    let suite = |text: &str| Select::Suite(text.to_owned());
    use Distro::{Debian, Ubuntu};
    for (text, wanted) in [
        ("host", KernelSpec::Host),
        ("6.1.0-56-amd64", KernelSpec::Installed("6.1.0-56-amd64".to_owned())),
        ("debian:6.12", distro(Debian, version("6.12"), None, None)),
        ("debian:6.12.117", distro(Debian, version("6.12.117"), None, None)),
        ("debian:6.12-cloud", distro(Debian, version("6.12"), Some("cloud"), None)),
        ("debian:6.12-rt", distro(Debian, version("6.12"), Some("rt"), None)),
        (
            "debian:6.12.117+deb12-amd64",
            distro(Debian, version("6.12.117+deb12"), None, Some(Arch::X86_64)),
        ),
        (
            "debian:6.1.0-56-cloud-amd64",
            distro(Debian, version("6.1.0-56"), Some("cloud"), Some(Arch::X86_64)),
        ),
        ("debian:6.12-arm64", distro(Debian, version("6.12"), None, Some(Arch::Aarch64))),
        ("debian:7.3~rc2", distro(Debian, version("7.3~rc2"), None, None)),
        ("debian:trixie", distro(Debian, suite("trixie"), None, None)),
        ("debian:sid-cloud", distro(Debian, suite("sid"), Some("cloud"), None)),
        ("debian:bookworm-backports", distro(Debian, suite("bookworm-backports"), None, None)),
        (
            "debian:bookworm-backports-rt",
            distro(Debian, suite("bookworm-backports"), Some("rt"), None),
        ),
        ("ubuntu:noble", distro(Ubuntu, suite("noble"), None, None)),
        ("ubuntu:6.8.0-31", distro(Ubuntu, version("6.8.0-31"), None, None)),
        ("ubuntu:noble-kvm", distro(Ubuntu, suite("noble"), Some("kvm"), None)),
        ("./bzImage", KernelSpec::Path("./bzImage".into())),
        ("linux.deb", KernelSpec::Path("linux.deb".into())),
        ("/boot/vmlinuz", KernelSpec::Path("/boot/vmlinuz".into())),
    ] {
        assert_eq!(parse(text), wanted, "{text}");
        assert_eq!(wanted.to_string(), text);
    }
}

#[test]
fn the_generic_flavour_may_be_named() {
    assert_eq!(parse("ubuntu:6.8.0-31-generic"), parse("ubuntu:6.8.0-31"));
}

#[test]
fn a_suite_that_is_newer_than_this_program_is_left_to_apt() {
    assert_eq!(
        parse("debian:quux"),
        distro(Distro::Debian, Select::Suite("quux".to_owned()), None, None)
    );
}

#[test]
fn says_what_is_wrong_and_what_is_near() {
    for (text, wanted) in [
        ("", "it is empty"),
        ("debain:6.12", "did you mean debian:6.12?"),
        ("fedora:40", "`fedora` is no distribution"),
        ("debian:", "needs a version or a suite"),
        ("debian", "needs a version or a suite"),
        ("debian:trixe", "did you mean debian:trixie?"),
        ("debian:6.12-clod", "did you mean `cloud`?"),
        ("debian:6.12-", "nothing before or after a `-`"),
        ("debian:6.12 cloud", "no ' ' in it"),
        ("sid", "did you mean debian:sid?"),
        ("noble", "did you mean ubuntu:noble?"),
        ("hots", "did you mean host?"),
        ("6.1;rm", "no ';' in it"),
        ("no-such-file", "there is no such file"),
    ] {
        let message = reason(text);
        assert!(message.contains(wanted), "{text:?}: {message}");
        assert!(message.contains("debian:6.12-cloud"), "{text:?} lacks the grammar: {message}");
    }
}

#[test]
fn prefixes_end_at_components() {
    assert!(has_version_prefix("6.1.0-56", "6.1"));
    assert!(has_version_prefix("6.12.117+deb12", "6.12.117"));
    assert!(!has_version_prefix("6.12.117", "6.1"));
    assert!(!has_version_prefix("6.12.117", "6.12.11"));
    assert!(has_version_prefix("6.12", "6.12"));
}

proptest::proptest! {
    #[test]
    fn any_text_parses_or_fails(text in "\\PC{0,40}") {
        let _ = text.parse::<KernelSpec>();
    }

    #[test]
    fn what_parses_reads_back(text in "(debian|ubuntu):[0-9a-z.+~-]{1,20}") {
        if let Ok(spec) = text.parse::<KernelSpec>() {
            proptest::prop_assert_eq!(spec.to_string().parse::<KernelSpec>(), Ok(spec));
        }
    }
}
