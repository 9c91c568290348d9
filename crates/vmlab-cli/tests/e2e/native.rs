//! vmlab's own monitor: what is special about it. `both.rs` has what it shares with QEMU.

#![allow(clippy::print_stdout, reason = "how each test went is what these are for")]

use std::time::Duration;

use crate::common::outer::{Outer, repository, test_program};
use crate::common::{CLOUD, Site, kernel};
use serde_json::Value;

/// How long one of these guests may take, on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(900);

#[test]
fn a_kvm_that_is_no_good_is_no_surprise() {
    let site = Site::new();
    let doctor = site.vmlab(["doctor", "--json"]).output();
    let checks: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let kvm = checks.as_array().unwrap().iter().find(|c| c["name"] == "kvm").unwrap();
    let run = site.run_with(CLOUD[0], &["--hypervisor", "kvm"], ["echo", "ran"]).output();
    if kvm["status"] == "good" {
        run.expect_stdout("ran\n");
        return;
    }
    run.expect_code(125).expect_stderr(&["KVM cannot be used", "--hypervisor kvm"]);
    assert_eq!(run.stdout_text(), "");
    let said = run.stderr_text();
    let why = said.trim_end().rsplit_once("TCG is used instead: ").unwrap().1;
    assert_eq!(said.matches(why).count(), 1, "it says so twice: {said}");
    // By the environment, the same; without either, QEMU.
    let run = site.run_with(CLOUD[0], &[], ["true"]).env("VMLAB_HYPERVISOR", "kvm").output();
    run.expect_code(125).expect_stderr(&["KVM cannot be used"]);
    let run = site.run_with(CLOUD[0], &[], ["true"]).env("VMLAB_HYPERVISOR", "odd").output();
    run.expect_code(125).expect_stderr(&["VMLAB_HYPERVISOR is `odd`"]);
    site.run_with(CLOUD[0], &["--hypervisor", "auto"], ["true"]).output().expect_code(0);
}

/// `ask NAME OPTIONS…`: what a run comes to that has to be refused. `plan NAME OPTIONS…`: who would run it.
const ASK: &str = r#"
ask() {
    name=$1; shift
    echo "$name: $("$VMLAB_BIN" run -q "$@" -- true 2>&1 | head -n 1) $?"
}
plan() {
    name=$1; shift
    "$VMLAB_BIN" run --hypervisor auto --dry-run "$@" -- true > /tmp/plan 2>&1
    echo "$name: $(grep -o '"machine": "[a-z0-9]*"' /tmp/plan) $(grep -o '"accel": "[a-z]*"' /tmp/plan)"
}
set -o pipefail
"#;

#[test]
fn what_it_cannot_have_is_refused_or_left_to_qemu() {
    let outer = Outer::new();
    let (cloud, plain) = (kernel(CLOUD[0]), kernel(crate::common::DEBIAN_6_12));
    let script = format!(
        "{ASK}
        ask args -k {cloud} --qemu-arg=-S
        ask tcg -k {cloud} --accel tcg
        ask 9p -k {plain} --share-via 9p
        ask board -k {cloud} --machine q35
        ask image --image debian:12
        plan nothing -k {cloud}
        plan args -k {cloud} --qemu-arg=-S
        plan tcg -k {cloud} --accel tcg
        plan 9p -k {plain} --share-via 9p
        plan board -k {cloud} --machine q35
        \"$VMLAB_BIN\" run -q --hypervisor auto -k {cloud} -m 512 --qemu-arg=-name --qemu-arg=a -- \
            echo by QEMU"
    );
    let outcome = outer.bash(&script, PATIENCE);
    let said = outcome.expect_code(0).stdout_text();
    let wanted = [
        "args: vmlab: error: the hypervisor kvm cannot have arguments for QEMU 125",
        "tcg: vmlab: error: the hypervisor kvm cannot have TCG 125",
        "9p: vmlab: error: the hypervisor kvm cannot have shares of this kind 125",
        "board: vmlab: error: the hypervisor kvm cannot have this machine 125",
        "image: vmlab: error: the hypervisor kvm cannot have systems of images 125",
        "nothing: \"machine\": \"native\" \"accel\": \"kvm\"",
        "args: \"machine\": \"microvm\" \"accel\": \"kvm\"",
        "tcg: \"machine\": \"microvm\" \"accel\": \"tcg\"",
        "9p: \"machine\": \"microvm\" \"accel\": \"kvm\"",
        "board: \"machine\": \"q35\" \"accel\": \"kvm\"",
        "by QEMU",
    ];
    assert_eq!(said.lines().collect::<Vec<_>>(), wanted, "{}", outcome.stderr_text());
}

#[test]
fn the_targets_of_the_project_pass_under_qemu() {
    let site = Site::new();
    all_kernels();
    let mut test = site.vmlab(["test", "--hypervisor", "qemu", "-o", "failed"]).patience(PATIENCE);
    test.command.current_dir(repository());
    let outcome = test.output();
    println!("{}", outcome.stdout_text());
    outcome.expect_code(0);
}

#[test]
fn the_targets_of_the_project_pass() {
    all_kernels();
    let outer = Outer::new();
    let root = repository();
    let script =
        format!("cd {} && \"$VMLAB_BIN\" test --hypervisor kvm -j 1 -o failed", root.display());
    let outcome = outer.bash(&script, PATIENCE);
    println!("{}", outcome.stdout_text());
    outcome.expect_code(0);
}

fn all_kernels() {
    let _ = CLOUD.map(kernel);
    // Of its own tests, which the targets run.
    test_program("e2e");
}

#[test]
fn fifty_vms_leave_nothing_behind() {
    let outer = Outer::new();
    let program = test_program("boots");
    let script = format!("{} --nocapture --test-threads 1", program.display());
    let outcome = outer.bash(&script, PATIENCE);
    let said = outcome.expect_code(0).stdout_text();
    println!("{said}");
    assert!(said.contains("test result: ok. 1 passed"), "{said}");
}

/// `run`: a run, and how many pages KVM had to find for its guest.
const COUNT_PAGES: &str = r#"
cd /sys/kernel/tracing || exit 1
run() {
    echo > trace
    echo 1 > events/kvm/kvm_page_fault/enable
    "$VMLAB_BIN" run -q -k $1 -m 512 -- true || exit 1
    echo 0 > events/kvm/kvm_page_fault/enable
    grep -c kvm_page_fault: trace
}
hints=$VMLAB_CACHE_DIR/snapshots/*/hints
"#;

#[test]
fn a_guest_goes_on_with_the_pages_that_another_used() {
    let outer = Outer::new();
    let cloud = kernel(CLOUD[0]);
    let script = format!(
        "{COUNT_PAGES}
        run {cloud} > /dev/null; ls $hints 2> /dev/null
        run {cloud}; run {cloud}
        echo damaged > $hints
        run {cloud}; run {cloud}"
    );
    let outcome = outer.bash(&script, PATIENCE);
    let said = outcome.expect_code(0).stdout_text();
    println!("{said}");
    let counts: Vec<u32> = said.lines().map(|line| line.parse().unwrap()).collect();
    let [learns, uses, learns_again, uses_again] = counts[..] else { panic!("{said}") };
    assert!(uses > 0 && uses < learns / 2, "{said}");
    assert!(uses_again < learns_again / 2, "{said}");
}

/// Those of the monitor itself, which need KVM.
#[test]
fn the_monitors_own_tests_pass() {
    let outer = Outer::new();
    // Those beside its code that need a KVM, too.
    let all = ["kvm", "vmlab_vmm"]
        .map(|tests| format!("{} --ignored --test-threads 1", test_program(tests).display()));
    let script = all.join(" && ");
    let outcome = outer.bash(&script, PATIENCE);
    let said = outcome.stdout_text();
    println!("{said}");
    outcome.expect_code(0);
    assert_eq!(said.matches("test result: ok. ").count(), all.len(), "{said}");
    assert!(!said.contains(" 0 passed"), "{said}");
}
