//! KVM where it really works: in a guest, whose emulated processor has SVM.

use crate::common::{DEBIAN_6_12, Site, kernel, vmlab_bin};
use std::path::PathBuf;
use std::time::Duration;

/// Two boots, the inner one under an emulated hypervisor.
const PATIENCE: Duration = Duration::from_secs(400);

#[test]
fn a_real_kvm_is_found_and_used() {
    let site = Site::new();
    let kernel = kernel(DEBIAN_6_12);
    let inspected = site.vmlab(["kernel", "inspect", kernel, "--json"]).output();
    let inspected: serde_json::Value =
        serde_json::from_slice(&inspected.expect_code(0).stdout).expect("JSON");
    // KERNELS/KEY/boot/vmlinuz-RELEASE
    let image = PathBuf::from(inspected["kernel"]["boot_image"].as_str().expect("a path"));
    let kernels = image.ancestors().nth(3).expect("the kernels").display();
    // The program and the kernels may be where the guest has directories of its own, or where the
    // guest's root may not go. All else that is cached is the guest's own: locks hold within one machine.
    let program = vmlab_bin();
    let bin = program.parent().expect("it is in a directory").display();
    let cache = site.path().join("cache");
    std::fs::create_dir(&cache).expect("a cache");
    let shares = [
        format!("{bin}:/mnt/bin:ro"),
        format!("{}:/mnt/cache", cache.display()),
        format!("{kernels}:/mnt/cache/kernels"),
    ];
    let script = format!(
        "export VMLAB_CACHE_DIR=/mnt/cache
         vmlab() {{ /mnt/bin/vmlab run -m 512 -k {kernel} \"$@\"; }}
         vmlab --cold --json report.json -- uname -r &&
            vmlab --json again.json -- sh -c 'touch written' >&2 &&
            /mnt/bin/vmlab doctor --json"
    );
    let mut options = vec!["--accel", "tcg", "-m", "3G", "--module", "kvm-amd"];
    options.extend(shares.iter().flat_map(|share| ["--share", share]));
    let outcome = site.sh(&options, &script).patience(PATIENCE).output();
    outcome.expect_code(0);
    let (release, doctor) = outcome
        .stdout_text()
        .split_once('\n')
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .expect("two parts");
    assert!(release.starts_with("6.12."), "{release}");
    let report = |name: &str| -> serde_json::Value {
        let text = std::fs::read(site.cwd().join(name)).expect("an inner report");
        let mut report: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        report["runs"][0]["report"].take()
    };
    let phases = |run: &serde_json::Value| -> Vec<String> {
        let phases = run["phases"].as_array().expect("phases");
        phases.iter().map(|phase| phase["phase"].as_str().expect("a name").to_owned()).collect()
    };
    let (run, again) = (&report("report.json"), &report("again.json"));
    // Snapshots are of use with KVM, too.
    let said = outcome.stderr_text();
    assert_eq!(phases(run)[2..5], ["boot", "snapshot", "restore"], "{said}");
    assert_eq!(phases(again)[2..4], ["restore", "setup"], "{said}");
    assert_eq!(again["accel"], "kvm", "{again}");
    assert!(site.cwd().join("written").exists());
    assert_eq!(run["accel"], "kvm", "{run}");
    assert_eq!(run["accel_reason"], serde_json::Value::Null);
    assert_eq!(run["exit_reason"], "shutdown");
    let checks: serde_json::Value = serde_json::from_str(&doctor).expect("JSON");
    let kvm = checks.as_array().and_then(|all| all.iter().find(|check| check["name"] == "kvm"));
    let kvm = kvm.expect("doctor looks at KVM");
    assert_eq!(kvm["status"], "good", "{kvm}");
    assert!(
        kvm["detail"].as_str().is_some_and(|detail| detail.contains("instructions a second")),
        "{kvm}"
    );
}

/// An emulated processor can forget an interrupt of its timer when it leaves a guest of its own, and would sleep for ever
/// where nothing else comes. That takes minutes to provoke, if at all; the nudges that end such a sleep can be counted.
#[test]
fn a_guest_under_tcg_is_interrupted_now_and_then() {
    let site = Site::new();
    let script = "interrupts() { awk '/virtio.-virtqueues/ { sum += $2 } END { print sum }' /proc/interrupts; }
         before=$(interrupts); sleep 3; echo $(($(interrupts) - before))";
    let options = ["--accel", "tcg", "-c", "1"];
    let outcome = site.sh(&options, script).output();
    let count: u32 = outcome.expect_code(0).stdout_text().trim().parse().expect("a number");
    // Every half second, and the guest's clock may run on before the host's.
    assert!((3..=30).contains(&count), "{count}");
}
