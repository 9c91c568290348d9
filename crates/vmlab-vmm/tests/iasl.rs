//! The ACPI tables as ACPICA's own compiler reads them. It takes `iasl` of the package `acpica-tools`.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, reason = "it is a test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmlab_vmm::topology::Topology;
use vmlab_vmm::x86_64::acpi::{Machine, tables};
use vmlab_vmm::x86_64::layout;

/// Runs the compiler, and gives what it says.
fn iasl(arguments: &[&str], file: &Path) -> String {
    let output = Command::new("iasl")
        .args(arguments)
        .arg(file)
        .output()
        .expect("iasl cannot be run: install the package acpica-tools");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "iasl {arguments:?} {}: {said}", file.display());
    said.into_owned()
}

/// A directory of a test's own.
fn directory(name: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("iasl").join(name);
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).unwrap();
    directory
}

/// The tables, each with its signature, found by the headers that are in the blob.
fn split(blob: &[u8]) -> Vec<(String, &[u8])> {
    let mut found = Vec::new();
    let mut at = 48;
    while at < blob.len() {
        let length = u32::from_le_bytes(blob[at + 4..at + 8].try_into().unwrap()) as usize;
        let signature = String::from_utf8(blob[at..at + 4].to_vec()).unwrap();
        found.push((signature, &blob[at..at + length]));
        at = (at + length).next_multiple_of(16);
    }
    found
}

/// Takes each table apart and puts it together again, without any complaint.
fn compiles(name: &str, machine: Machine, expected: &[&str]) {
    let directory = directory(name);
    let blob = tables(&machine).unwrap();
    let found = split(&blob);
    let signatures: Vec<_> = found.iter().map(|(signature, _)| signature.as_str()).collect();
    assert_eq!(signatures, expected);
    for (signature, bytes) in found {
        let binary = directory.join(format!("{signature}.dat"));
        fs::write(&binary, bytes).unwrap();
        let said = iasl(&["-d"], &binary);
        for complaint in ["rror", "nknown", "nvalid", "arning"] {
            assert!(!said.contains(complaint), "{signature}: {said}");
        }

        let source = binary.with_extension("dsl");
        let said = iasl(&[], &source);
        assert!(said.contains("0 Errors"), "{signature}: {said}");
        assert!(!said.contains("Warning "), "{signature}: {said}");
        let compiled = fs::read(binary.with_extension("aml")).unwrap();
        // The compiler signs what it makes: the name and the version of who did, and thus the checksum, are its.
        let same = |bytes: &[u8]| [&bytes[..9], &bytes[10..28], &bytes[36..]].concat();
        assert_eq!(same(&compiled), same(bytes), "{signature}");
    }
}

#[test]
fn the_smallest_machine_compiles() {
    let topology = Topology { nodes: 1, llcs: 1, cores: 1, threads: 1 };
    let machine = Machine { topology, memory: 128 << 20, slots: 0, com2: false, vmgenid: false };
    compiles("smallest", machine, &["DSDT", "FACP", "APIC", "XSDT"]);
}

#[test]
fn a_machine_with_everything_compiles() {
    let topology = Topology { nodes: 5, llcs: 3, cores: 5, threads: 4 };
    assert_eq!(topology.cpus(), 300);
    let slots = layout::MAX_SLOTS;
    let machine = Machine { topology, memory: 5 << 30, slots, com2: true, vmgenid: true };
    compiles("everything", machine, &["DSDT", "FACP", "APIC", "SRAT", "SLIT", "XSDT"]);
}
