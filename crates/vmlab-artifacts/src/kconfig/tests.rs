use crate::compress::encode;

use super::*;

const TEXT: &str = "\
#
# Automatically generated file; DO NOT EDIT.
#
CONFIG_VIRTIO=y
CONFIG_VIRTIO_PCI=m
# CONFIG_VIRTIO_MMIO is not set
CONFIG_NR_CPUS=8192
CONFIG_LOCALVERSION=\"-a \\\"b\\\" \\\\c\"
CONFIG_EMPTY=\"\"
CONFIG_NO=n
CONFIG_TWICE=y
# CONFIG_TWICE is not set
CONFIG_AGAIN=m
CONFIG_AGAIN=y
nonsense
CONFIG_WITHOUT_VALUE
";

#[test]
fn settings_are_read_by_name() {
    let config = KernelConfig::parse(TEXT);
    for (name, expected) in [
        ("VIRTIO", Tristate::BuiltIn),
        ("CONFIG_VIRTIO", Tristate::BuiltIn),
        ("VIRTIO_PCI", Tristate::Module),
        ("VIRTIO_MMIO", Tristate::Absent),
        ("NR_CPUS", Tristate::BuiltIn),
        ("NO", Tristate::Absent),
        ("TWICE", Tristate::Absent),
        ("AGAIN", Tristate::BuiltIn),
        ("WITHOUT_VALUE", Tristate::Absent),
        ("NEVER_HEARD_OF", Tristate::Absent),
        ("", Tristate::Absent),
    ] {
        assert_eq!(config.get(name), expected, "{name}");
    }
    assert_eq!(config.value("NR_CPUS"), Some("8192"));
    assert_eq!(config.value("LOCALVERSION"), Some(r#"-a "b" \c"#));
    assert_eq!(config.value("EMPTY"), Some(""));
    assert_eq!(config.text(), TEXT);
    let names: Vec<_> = config.iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["AGAIN", "EMPTY", "LOCALVERSION", "NO", "NR_CPUS", "VIRTIO", "VIRTIO_PCI"]);
}

#[test]
fn bytes_that_are_no_text_do_no_harm() {
    let config = KernelConfig::parse(b"CONFIG_A=y\r\nCONFIG_B=\"\xff\"\n\0\nCONFIG_C=m");
    assert_eq!(config.get("A"), Tristate::BuiltIn);
    assert_eq!(config.get("C"), Tristate::Module);
    assert_eq!(config.value("B"), Some("\u{fffd}"));
}

/// An image with an embedded configuration between other bytes.
fn image(stream: &[u8]) -> Vec<u8> {
    [b"\x7fELF...IKCFG_ST not this one...IKCFG_ST", stream, b"IKCFG_ED and more"].concat()
}

#[test]
fn the_embedded_configuration_is_found() {
    let stream = encode::compress(Compression::Gzip, TEXT.as_bytes());
    let config = KernelConfig::from_ikconfig(&image(&stream)).unwrap();
    assert_eq!(config, KernelConfig::parse(TEXT));
}

#[test]
fn a_damaged_embedded_configuration_is_none() {
    let stream = encode::compress(Compression::Gzip, TEXT.as_bytes());
    let whole = image(&stream);
    let end = whole.len() - b" and more".len();
    for cut in 0..end {
        assert_eq!(KernelConfig::from_ikconfig(&whole[..cut]), None, "cut to {cut}");
    }
    assert!(KernelConfig::from_ikconfig(&whole[..end]).is_some());
    let empty = encode::compress(Compression::Gzip, b"# nothing in here\n");
    assert_eq!(KernelConfig::from_ikconfig(&image(&empty)), None);
}

#[test]
fn an_embedded_configuration_that_explodes_is_none() {
    let bomb = [b"CONFIG_A=y\n".as_slice(), &vec![b'\n'; CONFIG_LEN_MAX]].concat();
    let stream = encode::compress(Compression::Gzip, &bomb);
    assert_eq!(KernelConfig::from_ikconfig(&image(&stream)), None);
}

#[test]
fn tristates_have_stable_names() {
    let names: Vec<_> = [Tristate::Absent, Tristate::Module, Tristate::BuiltIn]
        .iter()
        .map(|value| serde_json::to_string(value).unwrap())
        .collect();
    assert_eq!(names, [r#""absent""#, r#""module""#, r#""built_in""#]);
    assert_eq!(format!("{:>9}", Tristate::BuiltIn), " built-in");
}
