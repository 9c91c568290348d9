use std::fs;

use super::*;

/// A host made up for a test.
struct Host {
    dir: tempfile::TempDir,
    variables: Vec<(&'static str, OsString)>,
}

impl Host {
    fn new() -> Host {
        Host { dir: tempfile::tempdir().unwrap(), variables: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    /// A descriptor, and its files `NAME.code` and `NAME.vars`.
    fn descriptor(&self, place: &str, name: &str, features: &[&str]) {
        self.file(&format!("fw/{name}.code"), "");
        self.file(&format!("fw/{name}.vars"), "");
        self.file(place, &json(name, features, "raw", "pc-q35-*").to_string());
    }

    fn find(&self, secure_boot: bool) -> Result<Uefi, FirmwareError> {
        let variable = |name: &str| {
            let found = self.variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.clone())
        };
        Search { root: self.dir.path(), variable: &variable }.find(secure_boot)
    }

    /// The name of what is found, without the directory.
    fn found(&self, secure_boot: bool) -> String {
        let uefi = self.find(secure_boot).unwrap();
        assert_eq!(uefi.secure_boot, secure_boot);
        let code = uefi.code.strip_prefix(self.dir.path()).unwrap().display().to_string();
        format!("{code}{}", if uefi.smm { " smm" } else { "" })
    }

    fn refusal(&self, secure_boot: bool) -> String {
        let text = self.find(secure_boot).unwrap_err().to_string();
        text.replace(&format!("{}/", self.dir.path().display()), "/")
    }
}

fn json(name: &str, features: &[&str], format: &str, machine: &str) -> serde_json::Value {
    let file = |kind: &str| serde_json::json!({"filename": format!("/fw/{name}.{kind}"), "format": format});
    serde_json::json!({
        "description": name, "interface-types": ["uefi"], "tags": [], "features": features,
        "mapping": {"device": "flash", "executable": file("code"), "nvram-template": file("vars")},
        "targets": [{"architecture": "x86_64", "machines": [machine]}],
    })
}

const DIR: &str = "usr/share/qemu/firmware";

#[test]
fn descriptors_are_chosen_by_their_features() {
    let host = Host::new();
    let secure = ["requires-smm", "secure-boot"];
    host.descriptor(
        &format!("{DIR}/40-ms.json"),
        "ms",
        &[&secure[..], &["enrolled-keys"]].concat(),
    );
    host.descriptor(&format!("{DIR}/50-secure.json"), "secure", &secure);
    host.descriptor(&format!("{DIR}/60-plain.json"), "plain", &["acpi-s3"]);
    assert_eq!(host.found(false), "fw/plain.code");
    assert_eq!(host.found(true), "fw/ms.code smm");
    let uefi = host.find(false).unwrap();
    assert_eq!((uefi.vars, uefi.format), (host.path("fw/plain.vars"), ImageFormat::Raw));
    // Without keys it would let everything pass.
    fs::remove_file(host.path(&format!("{DIR}/40-ms.json"))).unwrap();
    assert!(matches!(host.find(true), Err(FirmwareError::NotFound { secure_boot: true, .. })));
}

#[test]
fn the_user_hides_the_host_and_the_host_its_packages() {
    let mut host = Host::new();
    host.descriptor(&format!("{DIR}/60-a.json"), "package", &[]);
    host.descriptor("etc/qemu/firmware/70-b.json", "host", &[]);
    // The number counts, not the directory.
    assert_eq!(host.found(false), "fw/package.code");
    host.descriptor("etc/qemu/firmware/60-a.json", "instead", &[]);
    assert_eq!(host.found(false), "fw/instead.code");
    let home = host.path("home");
    host.variables.push(("HOME", home.into()));
    host.descriptor("home/.config/qemu/firmware/60-a.json", "own", &[]);
    assert_eq!(host.found(false), "fw/own.code");
    let config = host.path("config");
    host.variables.push(("XDG_CONFIG_HOME", config.into()));
    assert_eq!(host.found(false), "fw/instead.code");
    // An empty file hides one without a replacement.
    host.file("config/qemu/firmware/60-a.json", "");
    assert_eq!(host.found(false), "fw/host.code");
}

#[test]
fn what_cannot_be_used_is_passed_over_and_told() {
    let host = Host::new();
    let put = |name: &str, value: serde_json::Value| {
        host.file(&format!("{DIR}/{name}.json"), &value.to_string())
    };
    let file = |name: &str| {
        host.file(&format!("fw/{name}.code"), "");
        host.file(&format!("fw/{name}.vars"), "");
    };
    ["other", "mixed", "stateless", "memory", "bios", "qcow2"].iter().for_each(|name| file(name));
    put("10-gone", json("gone", &[], "raw", "pc-q35-*"));
    put("11-other", json("other", &[], "raw", "pc-i440fx-*"));
    let mut value = json("other", &[], "raw", "pc-q35-*");
    value["targets"][0]["architecture"] = "aarch64".into();
    put("12-aarch64", value);
    let mut value = json("mixed", &[], "raw", "pc-q35-*");
    value["mapping"]["nvram-template"]["format"] = "qcow2".into();
    put("13-mixed", value);
    let mut value = json("stateless", &[], "raw", "pc-q35-*");
    value["mapping"]["mode"] = "stateless".into();
    put("14-stateless", value);
    put(
        "15-memory",
        serde_json::json!({"interface-types": ["uefi"], "features": [],
        "mapping": {"device": "memory", "filename": "/fw/memory.code"}, "targets": []}),
    );
    let mut value = json("bios", &[], "raw", "pc-q35-*");
    value["interface-types"] = serde_json::json!(["bios"]);
    put("16-bios", value);
    host.file(&format!("{DIR}/17-broken.json"), "{");
    host.file(&format!("{DIR}/README"), "");
    let text = host.refusal(false);
    for wanted in [
        "install the package ovmf (Debian, Ubuntu), ",
        "VMLAB_OVMF=CODE:VARS",
        "/etc/qemu/firmware, /usr/share/qemu/firmware/*.json",
        "10-gone.json (names /fw/gone.code, which is not there)",
        "13-mixed.json (has the formats raw and qcow2)",
        "17-broken.json (is no descriptor: ",
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
        "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
    ] {
        assert!(text.contains(wanted), "{wanted} is not in {text}");
    }
    for other in ["11-", "12-", "14-", "15-", "16-", "README", ".ms.fd"] {
        assert!(!text.contains(other), "{other} is in {text}");
    }
    put("90-qcow2", json("qcow2", &[], "qcow2", "q35"));
    let uefi = host.find(false).unwrap();
    assert_eq!((uefi.code, uefi.format), (host.path("fw/qcow2.code"), ImageFormat::Qcow2));
}

#[test]
fn without_descriptors_the_usual_places_are_looked_at() {
    for place in USUAL {
        let host = Host::new();
        host.file(place.code, "");
        assert!(host.refusal(place.secure_boot).contains(&format!("/{}", place.vars)));
        host.file(place.vars, "");
        let smm = if place.smm { " smm" } else { "" };
        assert_eq!(host.found(place.secure_boot), format!("{}{smm}", place.code));
        assert!(host.find(!place.secure_boot).is_err());
    }
    // A descriptor's firmware is preferred.
    let host = Host::new();
    host.file(USUAL[0].code, "");
    host.file(USUAL[0].vars, "");
    host.descriptor(&format!("{DIR}/60-plain.json"), "plain", &[]);
    assert_eq!(host.found(false), "fw/plain.code");
}

#[test]
fn the_variable_comes_before_all() {
    let mut host = Host::new();
    host.descriptor(&format!("{DIR}/60-plain.json"), "plain", &[]);
    let (code, vars) = (host.file("my.code", "code"), host.file("my.vars", ""));
    let mut value = OsString::from(&code);
    value.push(":");
    value.push(&vars);
    host.variables.push((OVMF_ENV, value));
    for secure_boot in [false, true] {
        let uefi = host.find(secure_boot).unwrap();
        let format = ImageFormat::Raw;
        let wanted =
            Uefi { code: code.clone(), vars: vars.clone(), format, secure_boot, smm: secure_boot };
        assert_eq!(uefi, wanted);
    }
    fs::write(&code, b"QFI\xfb\0\0\0\x03").unwrap();
    assert_eq!(host.find(false).unwrap().format, ImageFormat::Qcow2);
    let dir = host.dir.path().display().to_string();
    for (value, why) in [
        (format!("{dir}/my.code"), "which has no colon; give two files as CODE:VARS"),
        (format!("{dir}/gone:{dir}/my.vars"), "/gone cannot be used (No such file"),
        (format!("{dir}/my.code:{dir}/fw"), "/fw is no file"),
        (String::new(), "VMLAB_OVMF is ``, which has no colon"),
    ] {
        host.variables[0].1 = value.into();
        let text = host.refusal(false);
        assert!(text.contains(why), "{text}");
    }
}
