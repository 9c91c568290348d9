//! What vmlab says of itself: reports, dry runs, and nothing where the command's output goes.

use crate::common::snapshots::Cold;
use crate::common::{DEBIAN_6_12, Site, has_boot, kernel};
use serde_json::{Value, json};

fn report(site: &Site) -> Value {
    let text = std::fs::read(site.cwd().join("report.json")).unwrap();
    let mut report: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(report["version"], 1);
    report["runs"].take()
}

#[test]
fn a_report_of_a_run() {
    let site = Site::new();
    let command = ["sh", "-c", "uname -r; exit 3"];
    let options = ["--no-snapshot", "--json", "report.json", "-m", "512M", "-c", "2"];
    let outcome = site.run(&options, command).output();
    outcome.expect_code(3);
    assert_eq!(outcome.stderr_text(), "");
    let all = report(&site);
    let one = &all[0];
    assert_eq!(all.as_array().unwrap().len(), 1);
    assert_eq!(one["kernel"], DEBIAN_6_12);
    assert_eq!(one["command"], json!(command));
    assert_eq!(one["exit_code"], 3);
    assert_eq!(one["signal"], Value::Null);
    assert_eq!(one["error"], Value::Null);
    assert_eq!(one["exit_reason"], "shutdown");
    let report = &one["report"];
    assert_eq!(report["release"].as_str().unwrap(), outcome.stdout_text().trim());
    assert!(["tcg", "kvm"].contains(&report["accel"].as_str().unwrap()));
    assert_eq!(report["accel"] == "tcg", report["accel_reason"].is_string());
    assert_eq!((&report["memory"], &report["cpus"]), (&json!(512 << 20), &json!(2)));
    let phases = report["phases"].as_array().unwrap();
    let names: Vec<_> = phases.iter().map(|phase| phase["phase"].as_str().unwrap()).collect();
    assert_eq!(names, ["kernel", "prepare", "boot", "setup", "run", "stop"]);
    assert!(phases.iter().all(|phase| phase["ms"].as_f64().unwrap() > 0.0), "{phases:?}");
    assert!(phases[2]["ms"].as_f64().unwrap() > 100.0, "a boot takes longer: {phases:?}");
    let log = one["console_log"].as_str().unwrap();
    assert_eq!(std::path::Path::new(log), site.log_dir().join("console.log"));
    assert!(has_boot(&std::fs::read_to_string(log).unwrap()));
}

#[test]
fn a_report_of_a_failure() {
    let site = Site::new();
    let script = "echo c > /proc/sysrq-trigger; sleep 1000";
    site.sh(&["--json", "report.json"], script).output().expect_code(123);
    let all = report(&site);
    let one = &all[0];
    assert_eq!(one["exit_code"], 123);
    assert_eq!(one["exit_reason"], json!({"guest_panic": "sysrq triggered crash"}));
    assert!(one["error"].as_str().unwrap().contains("panicked"), "{one}");
    assert!(std::path::Path::new(one["console_log"].as_str().unwrap()).exists(), "{one}");
}

#[test]
fn a_start_that_failed_ends_with_the_phase_that_did() {
    let cold = Cold::new();
    for phases in [
        &["kernel", "prepare", "boot", "snapshot", "restore", "setup"][..],
        &["kernel", "prepare", "restore", "setup"],
    ] {
        let ran = cold.run(&["--module", "no-such-module"], ["true"]);
        ran.outcome.expect_code(125).expect_stderr(&["no-such-module not found"]);
        assert_eq!(ran.phases, phases);
    }
}

#[test]
fn a_dry_run_says_what_would_be_done() {
    let site = Site::new();
    let other = site.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let share = format!("{}:/mnt:ro", other.display());
    let options = ["--dry-run", "--share", &share, "--append", "some.thing=1", "-m", "300M"];
    let outcome = site.run(&options, ["touch", "made"]).output();
    outcome.expect_code(0);
    assert_eq!(outcome.stderr_text(), "");
    assert!(!site.state().join("vmlab").exists(), "something was started");
    assert!(!site.cwd().join("made").exists());

    let text = outcome.stdout_text();
    let (config, line) = text.trim_end().rsplit_once('\n').unwrap();
    let config: Value = serde_json::from_str(config).unwrap();
    assert_eq!(config["memory"], 300 << 20);
    let shares = config["shares"].as_array().unwrap();
    let share_of = |path: &std::path::Path| {
        shares.iter().find(|share| share["path"] == path.to_str().unwrap()).unwrap()
    };
    assert_eq!(share_of("/".as_ref())["read_only"], true);
    assert_eq!(share_of(&site.cwd())["read_only"], false);
    assert_eq!(share_of(&other)["read_only"], true);
    for path in [&config["boot"]["image"], &config["boot"]["initramfs"]] {
        let path = path.as_str().unwrap();
        assert!(std::path::Path::new(path).is_file() && line.contains(path), "{path}: {line}");
    }
    assert!(line.contains("qemu-system-x86_64 ") && line.contains("some.thing=1"), "{line}");
    assert!(line.contains("vhost-user-fs-pci,") && line.contains(" 300M "), "{line}");
    let over_9p = [&["--share-via", "9p"][..], &options].concat();
    let line = site.run(&over_9p, ["true"]).output().expect_code(0).stdout_text();
    assert!(line.contains(&format!("path={},", other.display())), "{line}");
}

#[test]
fn nothing_but_the_commands_output_is_on_stdout() {
    let site = Site::new();
    let vm = ["run", "-v", "--no-snapshot", "-k", kernel(DEBIAN_6_12)];
    let arguments = [&vm[..], &["--", "echo", "only this"]].concat();
    let outcome = site.vmlab(arguments).output();
    outcome.expect_code(0);
    assert_eq!(outcome.stdout_text(), "only this\n");
    // Phases, the guest's console and a summary.
    let wanted = ["vmlab: boot\n", "Linux version", "exit code 0: kernel ", "stop "];
    outcome.expect_stderr(&wanted);
    // No terminal: no live line.
    assert!(!outcome.stderr_text().contains('\r') || !outcome.stderr_text().contains("\r⠋"));
}
