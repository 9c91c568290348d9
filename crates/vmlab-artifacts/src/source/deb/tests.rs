use std::io::Cursor;

use super::*;
use crate::Silent;
use crate::test_support::{DebBuilder, Packing};

#[test]
fn control_fields_are_read_from_every_packing() {
    let dir = tempfile::tempdir().unwrap();
    for packing in [Packing::None, Packing::Gzip, Packing::Xz, Packing::Zstd] {
        let deb = DebBuilder::new("linux-image-6.1-amd64", "6.1-1")
            .depends("kmod, linux-modules-6.1-amd64 (= 6.1-1) | x, linux-base (>= 4.3)")
            .file("./boot/vmlinuz-6.1-amd64", b"kernel")
            .packing(packing)
            .write(dir.path());
        assert_eq!(
            control(&deb).unwrap(),
            Control {
                package: "linux-image-6.1-amd64".to_owned(),
                version: "6.1-1".to_owned(),
                architecture: "amd64".to_owned(),
                depends: vec!["linux-modules-6.1-amd64".to_owned()],
            }
        );
        let out = tempfile::tempdir().unwrap();
        unpack(&deb, out.path(), &Silent).unwrap();
        assert_eq!(fs::read(out.path().join("boot/vmlinuz-6.1-amd64")).unwrap(), b"kernel");
    }
}

#[test]
fn all_layouts_become_one() {
    for (from, to) in [
        ("boot/vmlinuz-6.1", Some("boot/vmlinuz-6.1")),
        ("boot/config-6.1", Some("boot/config-6.1")),
        ("boot/System.map-6.1", None),
        ("lib/modules/6.1/kernel/fs/9p.ko", Some("lib/modules/6.1/kernel/fs/9p.ko")),
        ("usr/lib/modules/7.2/kernel/fs/9p.ko", Some("lib/modules/7.2/kernel/fs/9p.ko")),
        ("usr/lib/modules/7.2/modules.order", Some("lib/modules/7.2/modules.order")),
        ("usr/lib/modules/7.2/vmlinuz", Some("boot/vmlinuz-7.2")),
        ("usr/lib/modules/7.2/config", Some("boot/config-7.2")),
        ("usr/lib/modules/7.2/System.map", None),
        ("usr/share/doc/linux/changelog.gz", None),
        ("lib/firmware/x", None),
    ] {
        assert_eq!(placed(Path::new(from)), to.map(PathBuf::from), "{from}");
    }
}

#[test]
fn names_of_kernel_parts() {
    assert!(is_kernel_part("linux-image-6.1.0-56-amd64"));
    assert!(is_kernel_part("linux-modules-extra-6.8.0-31-generic"));
    assert!(is_kernel_part("linux-base-7.2.13+deb14-amd64"));
    assert!(!is_kernel_part("linux-base"));
    assert!(!is_kernel_part("linux-image-amd64"));
    assert!(!is_kernel_part("linux-binary-unsigned-7.2.13"));
    assert!(!is_kernel_part("linux-headers-6.1"));
}

#[test]
fn a_file_that_leads_out_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let deb = DebBuilder::new("bad", "1").file("./boot/../../vmlinuz-6.1", b"x").write(dir.path());
    let out = dir.path().join("out");
    let error = unpack(&deb, &out, &Silent).unwrap_err();
    assert!(crate::test_support::chain(&error).contains("leads out"), "{error}");
    assert!(!dir.path().join("vmlinuz-6.1").exists());
}

#[test]
fn links_are_not_followed_or_made() {
    let dir = tempfile::tempdir().unwrap();
    let deb = DebBuilder::new("links", "1")
        .symlink("./boot", "/etc")
        .file("./boot/config-6.1", b"x")
        .write(dir.path());
    let out = dir.path().join("out");
    unpack(&deb, &out, &Silent).unwrap();
    assert!(fs::symlink_metadata(out.join("boot")).unwrap().is_dir());
}

#[test]
fn damage_is_reported_with_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let good = DebBuilder::new("linux-image-6.1", "1")
        .file("./boot/vmlinuz-6.1", &[7; 5000])
        .packing(Packing::Xz)
        .write(dir.path());
    let bytes = fs::read(&good).unwrap();
    for (name, content) in [
        ("empty.deb", &b""[..]),
        ("text.deb", b"not a package"),
        ("cut.deb", &bytes[..bytes.len() - 100]),
        ("head.deb", &bytes[..8]),
    ] {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        let out = dir.path().join(format!("{name}.out"));
        let error = unpack(&path, &out, &Silent).unwrap_err();
        assert!(matches!(error, KernelError::BadDeb { .. }), "{name}: {error}");
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn an_unknown_packing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.deb");
    let mut archive = ar::Builder::new(Vec::new());
    let header = ar::Header::new(b"data.tar.br".to_vec(), 1);
    archive.append(&header, Cursor::new(b"x")).unwrap();
    fs::write(&path, archive.into_inner().unwrap()).unwrap();
    let error = unpack(&path, dir.path(), &Silent).unwrap_err();
    assert!(crate::test_support::chain(&error).contains("packed as `.br`"), "{error}");
}

#[test]
fn stanzas_with_continued_lines() {
    let fields = stanza_fields("Package: a\nDepends: b,\n c\n# no\nEmpty:\n");
    assert_eq!(fields["package"], "a");
    assert_eq!(fields["depends"], "b,\nc");
    assert_eq!(fields["empty"], "");
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.deb");
        let mut content = b"!<arch>\n".to_vec();
        content.extend(&bytes);
        fs::write(&path, content).unwrap();
        let _ = control(&path);
        let _ = unpack(&path, &dir.path().join("out"), &Silent);
    }
}
