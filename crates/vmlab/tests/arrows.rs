//! The workspace's shape: which crate may know of which, and one version of each rust-vmm crate.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

/// What each crate may depend on, from `ARCHITECTURE.md`. The agent is embedded by the library's
/// build script and is no dependency of it.
const ARROWS: &[(&str, &[&str])] = &[
    ("vmlab-wire", &[]),
    ("vmlab-copy", &["vmlab-wire"]),
    ("vmlab-fuse", &[]),
    ("vmlab-macros", &[]),
    ("vmlab-agent", &["vmlab-wire", "vmlab-copy"]),
    ("vmlab-devices", &["vmlab-fuse"]),
    ("vmlab-artifacts", &[]),
    ("vmlab-vmm", &["vmlab-devices"]),
    (
        "vmlab",
        &[
            "vmlab-wire",
            "vmlab-copy",
            "vmlab-artifacts",
            "vmlab-devices",
            "vmlab-vmm",
            "vmlab-macros",
        ],
    ),
    ("vmlab-cli", &["vmlab"]),
    ("kernel-tests", &["vmlab"]),
];

/// Crates whose types are in each other's interfaces: two versions of one do not fit together.
const RUST_VMM: &[&str] = &[
    "kvm-bindings",
    "kvm-ioctls",
    "linux-loader",
    "vfio-bindings",
    "vfio-ioctls",
    "vhost",
    "vhost-user-backend",
    "virtio-bindings",
    "virtio-queue",
    "virtio-vsock",
    "vm-fdt",
    "vm-memory",
    "vm-superio",
    "vmm-sys-util",
];

fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The workspace's crates with those of the workspace that they depend on, in any way: to run, to
/// build or to test.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--locked", "--format-version", "1"])
        .arg("--manifest-path")
        .arg(workspace().join("Cargo.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let name = |value: &serde_json::Value| value["name"].as_str().unwrap().to_owned();
    let packages = metadata["packages"].as_array().unwrap();
    let members: BTreeSet<String> = packages.iter().map(name).collect();
    let depends = |package: &serde_json::Value| {
        let all = package["dependencies"].as_array().unwrap();
        all.iter().map(name).filter(|dependency| members.contains(dependency)).collect()
    };
    packages.iter().map(|package| (name(package), depends(package))).collect()
}

#[test]
fn crates_depend_on_what_the_architecture_allows() {
    let allowed: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let found = dependencies();
    assert!(found.contains_key("vmlab-cli"), "{found:?}");
    for (package, depends) in &found {
        let Some(allowed) = allowed.get(package.as_str()) else {
            panic!("{package} is not in ARCHITECTURE.md's table of crates");
        };
        for dependency in depends {
            assert!(
                allowed.contains(&dependency.as_str()),
                "{package} must not know of {dependency}"
            );
        }
    }
}

#[test]
fn the_lock_file_has_one_version_of_each_rust_vmm_crate() {
    let lock = std::fs::read_to_string(workspace().join("Cargo.lock")).unwrap();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut lines = lock.lines();
    while let Some(line) = lines.next() {
        if let Some(name) = value(line, "name") {
            let version = lines.next().and_then(|line| value(line, "version")).unwrap();
            versions.entry(name).or_default().push(version);
        }
    }
    assert!(versions.contains_key("kvm-ioctls"), "Cargo.lock was not understood");
    for name in RUST_VMM {
        if let Some(found) = versions.get(name) {
            assert_eq!(found.len(), 1, "{name} is there as {found:?}");
        }
    }
}

/// The value of a line such as `name = "vmlab"`.
fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"')
}
