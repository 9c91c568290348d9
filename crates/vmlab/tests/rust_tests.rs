//! `#[vmlab::test]` as its users see it: what comes back of tests that fail, and how they can be run. The tests
//! that are `ignore`d here are run by their neighbours, which look at what the harness says of them.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;
use vmlab::prelude::*;
use vmlab::results::junit;
use vmlab::testing::read_reports;

/// Tests that measure something, looked at by their neighbours.
mod measuring {
    use super::*;

    #[vmlab::test(host, kernel = "debian:6.12", memory = "512M")]
    #[ignore = "its results are looked at"]
    fn of_a_vm(vm: &mut Vm, recorder: &Recorder) {
        recorder.measure("depth", 2.5, "m");
        recorder.detail("release", vm.release());
        recorder.measure("ratio", f64::NAN, "%");
        panic!("what was measured before is kept");
    }

    #[vmlab::test(host, kernel = "debian:6.12", memory = "512M")]
    #[ignore = "its results are looked at"]
    fn of_several_vms(builder: VmBuilder, recorder: &Recorder) -> Result {
        let first = builder.clone().hostname("one").start()?;
        let second = builder.start()?;
        recorder.measure("VMs", 2.0, "");
        first.shutdown()?;
        // That this one ends by a panic is what the test wants.
        let crashed = second.exec(["sh", "-c", "echo c > /proc/sysrq-trigger"]);
        assert!(matches!(crashed, Err(vmlab::Error::Ended { .. })), "{crashed:?}");
        Ok(())
    }

    #[vmlab::test(host, kernel = "debian:6.12", memory = "512M")]
    #[ignore = "its results are looked at"]
    fn of_one_vm_of_a_builder(builder: VmBuilder) -> Result {
        assert!(builder.start()?.exec(["true"])?.status.success());
        Ok(())
    }
}

/// Tests that do not pass, each with a VM of its own.
mod failing {
    use std::fs;
    use std::time::Duration;

    use super::*;

    #[vmlab::test(kernel = "debian:6.12", memory = "512M")]
    #[ignore = "it fails"]
    fn by_an_assertion(ctx: &Ctx) {
        println!("said before");
        ctx.measure("depth", 2.5, "m");
        ctx.detail("list", ["a", "b"]);
        assert_eq!(1 + 1, 3, "sums of {}", ctx.kernel());
    }

    #[vmlab::test(kernel = "debian:6.12", memory = "512M")]
    #[ignore = "it fails"]
    fn by_an_error() -> std::io::Result<()> {
        fs::read("/nowhere").map(drop)
    }

    #[vmlab::test(kernel = "debian:6.12", memory = "512M")]
    #[ignore = "it fails"]
    #[should_panic(expected = "another message")]
    fn by_another_panic() {
        panic!("this message");
    }

    #[vmlab::test(kernel = "debian:6.12", memory = "512M")]
    #[ignore = "it fails"]
    #[should_panic]
    fn by_a_kernel_that_panics() {
        fs::write("/proc/sysrq-trigger", "c").unwrap();
        std::thread::sleep(Duration::from_secs(60));
    }

    #[vmlab::test(kernel = "debian:6.12", memory = "512M", timeout = "1s")]
    #[ignore = "it fails"]
    fn by_taking_too_long() {
        println!("going");
        std::thread::sleep(Duration::from_secs(600));
    }

    #[vmlab::test(kernel = "debian:6.12", memory = "512M")]
    #[ignore = "it fails"]
    fn by_leaving_early() {
        std::process::exit(0);
    }

    #[vmlab::test(kernel = "debian:6.12", memory = "128M")]
    #[ignore = "it fails"]
    fn by_taking_too_much() {
        let mut taken = Vec::new();
        loop {
            taken.push(vec![1_u8; 1 << 20]);
        }
    }

    #[vmlab::test(kernel = "debian:6.12", memory = "512M", expect_event = "oops")]
    #[ignore = "it fails"]
    fn by_an_event_that_does_not_come() {}

    #[vmlab::test(host, kernel = "debian:6.12", memory = "512M")]
    #[ignore = "it fails"]
    fn on_the_host(vm: &mut Vm) {
        let said = vm.exec(["echo", "hello"]).unwrap();
        assert_eq!(said.stdout_text(), "bye\n");
    }

    #[vmlab::test(kernel = "debian:6.12", memory = "512M", fail_on = ["ops"])]
    #[ignore = "it fails"]
    fn by_what_it_is_told() {}
}

mod skipped {
    use super::*;

    #[vmlab::test(kernel = "debian:6.12", memory = "512M")]
    #[ignore = "it is skipped"]
    fn by_itself(ctx: &Ctx) {
        ctx.skip("there is no moon");
    }

    #[vmlab::test(kernel = "./no/such/kernel")]
    #[ignore = "it is skipped"]
    #[should_panic(expected = "nothing of it runs")]
    fn for_want_of_a_kernel() {}
}

/// A test of this program that is run by another one.
struct Run {
    command: Command,
    reports: TempDir,
}

impl Run {
    fn new(name: &str) -> Self {
        let reports = tempfile::tempdir().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([name, "--exact", "--ignored"]);
        command.env("VMLAB_REPORT_DIR", reports.path()).env_remove("CI");
        command.env("XDG_STATE_HOME", reports.path().join("state"));
        Self { command, reports }
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// What the harness said, and the test's record.
    fn output(self) -> (Output, String, Value) {
        let (output, said, record, ()) = self.output_and(|| ());
        (output, said, record)
    }

    /// The same, and what else can be made of it while the results are there.
    fn output_and<T>(mut self, then: impl FnOnce() -> T) -> (Output, String, Value, T) {
        let output = self.command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
        let record = read_reports(self.reports.path()).map(|results| results.to_json());
        let record = record.map_or(Value::Null, |json| serde_json::from_str(&json).unwrap());
        (output, said, record["targets"][0].clone(), then())
    }

    /// Fails unless the test does, with all of this in what is said of it.
    #[track_caller]
    fn fails(self, wanted: &[&str]) -> Value {
        let (output, said, record) = self.output();
        assert_eq!(output.status.code(), Some(101), "{said}");
        for wanted in wanted {
            assert!(said.contains(wanted), "no {wanted:?} in {said}");
        }
        record
    }
}

#[test]
fn assertions_come_back_with_their_message_and_place() {
    let run = Run::new("failing::by_an_assertion").env("RUST_BACKTRACE", "1");
    let record = run.fails(&[
        "said before\n",
        "thread 'failing::by_an_assertion'",
        "panicked at crates/vmlab/tests/rust_tests.rs:",
        "assertion `left == right` failed: sums of 6.12.",
        "  left: 2\n right: 3",
        "stack backtrace:",
        "rust_tests::failing::by_an_assertion",
        "test result: FAILED. 0 passed; 1 failed",
    ]);
    assert_eq!(record["name"], "rust_tests::failing::by_an_assertion");
    assert_eq!(record["outcome"], "failed");
    let attempt = &record["attempts"][0];
    assert!(attempt["release"].as_str().unwrap().starts_with("6.12."), "{attempt}");
    let depth = json!([{ "name": "depth", "value": 2.5, "unit": "m" }]);
    assert_eq!(attempt["measurements"], depth);
    assert_eq!(attempt["details"], json!({ "list": ["a", "b"] }));
    let how = attempt["failure"]["how"].as_str().unwrap();
    assert!(how.starts_with("panicked at crates/vmlab/tests/rust_tests.rs:"), "{how}");
    assert!(attempt["output"].as_str().unwrap().contains("said before"), "{attempt}");
    assert!(attempt["phases"].as_array().unwrap().len() > 3, "{attempt}");
}

#[test]
fn errors_are_shown_as_the_standard_library_shows_them() {
    let record = Run::new("failing::by_an_error").fails(&["Error: Os { code: 2,"]);
    assert_eq!(record["attempts"][0]["failure"]["kind"], "test");
}

#[test]
fn another_panic_than_the_expected_one_is_a_failure() {
    Run::new("failing::by_another_panic").fails(&[
        "panic did not contain expected string",
        "this message",
        "another message",
    ]);
}

#[test]
fn a_kernels_panic_is_not_the_tests() {
    let record = Run::new("failing::by_a_kernel_that_panics").fails(&[
        "the kernel said: kernel panic: sysrq triggered crash",
        "Call Trace:",
        "sysrq_handle_crash",
        "test did not panic as expected",
    ]);
    assert_eq!(record["attempts"][0]["failure"]["kind"], "event");
}

#[test]
fn tests_that_do_not_end_or_end_too_early_fail() {
    let record = Run::new("failing::by_taking_too_long")
        .fails(&["going\n", "the test took longer than 1 s"]);
    assert_eq!(record["attempts"][0]["failure"]["kind"], "timeout");
    Run::new("failing::by_leaving_early")
        .fails(&["the test's program ended before the test did: exit code 0"]);
    Run::new("failing::by_taking_too_much").fails(&[
        "ended before the test did: signal 9",
        "ran out of memory",
        "it has 128 MiB",
    ]);
    Run::new("failing::by_an_event_that_does_not_come")
        .fails(&["the kernel should have said something of itself: oops"]);
}

#[test]
fn tests_on_the_host_fail_as_usual() {
    let record = Run::new("failing::on_the_host")
        .fails(&["rust_tests.rs:", "left: \"hello\\n\"\n right: \"bye\\n\""]);
    assert_eq!(record["outcome"], "failed");
    Run::new("failing::by_what_it_is_told")
        .fails(&["fail_on of the test", "did you mean \"oops\"?"]);
}

#[test]
fn what_cannot_run_is_skipped_in_words_or_fails() {
    for (name, reason) in [
        ("skipped::by_itself", "there is no moon"),
        ("skipped::for_want_of_a_kernel", "no/such/kernel"),
    ] {
        let (output, said, record) = Run::new(name).output();
        assert!(output.status.success(), "{said}");
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.contains(&format!("vmlab: SKIPPED {name}: ")), "{line}");
        assert!(line.contains(reason), "{line}");
        assert_eq!(record["outcome"], "skipped");
        assert!(record["attempts"][0]["notes"][0].as_str().unwrap().contains(reason));
        for (variable, value) in [("CI", "true"), ("VMLAB_REQUIRE", "1")] {
            let record = Run::new(name).env(variable, value).fails(&[reason]);
            assert_eq!(record["outcome"], "error");
        }
    }
}

#[test]
fn the_callers_environment_is_above_the_attribute() {
    let run = Run::new("failing::by_an_assertion").env("VMLAB_KERNEL", "debian:6.1");
    let record = run.fails(&["sums of 6.1."]);
    assert_eq!(record["name"], "rust_tests::failing::by_an_assertion [debian:6.1]");
    let record = Run::new("failing::by_an_assertion").env("VMLAB_MEMORY", "many");
    record.fails(&["memory of the test: `many` is not a size"]);
}

#[test]
fn a_program_that_the_runner_has_brought_into_a_vm_needs_no_other() {
    let inside = |name| Run::new(name).env("VMLAB_INSIDE", "*");
    let record = inside("failing::by_an_assertion").fails(&["said before", "sums of "]);
    assert_eq!(record, Value::Null);
    inside("failing::by_an_error").fails(&["Error: Os { code: 2,"]);
    for name in ["failing::on_the_host", "failing::by_an_event_that_does_not_come"] {
        let (output, said, _) = inside(name).env("CI", "true").output();
        assert!(output.status.success(), "{said}");
        assert!(said.contains(&format!("vmlab: SKIPPED {name}: it ")), "{said}");
    }
    let wanted = "there is no moon";
    inside("skipped::by_itself").env("CI", "true").fails(&[wanted]);
}

#[test]
fn programs_in_a_directory_of_which_guests_have_their_own_are_brought_along() {
    // The guest's /tmp is its own.
    let dir = tempfile::Builder::new().prefix("vmlab-rust-tests-").tempdir_in("/tmp").unwrap();
    let copied = dir.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &copied).unwrap();
    let mut run = Run::new("failing::by_an_assertion");
    let (args, envs): (Vec<_>, Vec<_>) = (
        run.command.get_args().map(ToOwned::to_owned).collect(),
        run.command.get_envs().map(|(k, v)| (k.to_owned(), v.map(ToOwned::to_owned))).collect(),
    );
    let mut command = Command::new(copied);
    command.args(args);
    for (name, value) in envs {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    run.command = command;
    run.fails(&["sums of 6.12.", "said before"]);
}

#[test]
fn tests_are_listed_as_their_runners_expect() {
    let program = std::env::current_exe().unwrap();
    let listed = |options: &[&str]| {
        let output = Command::new(&program).args(options).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let all = listed(&["--list", "--format", "terse"]);
    assert!(all.contains("failing::by_an_assertion: test\n"), "{all}");
    let ignored = listed(&["--list", "--format", "terse", "--ignored"]);
    assert!(ignored.contains("skipped::by_itself: test\n"), "{ignored}");
    assert!(!ignored.contains("tests_are_listed"), "{ignored}");
}

#[vmlab::test(kernel = "debian:6.12", memory = "512M", share(host = "src", guest = "/mnt/src"))]
fn shares_are_read_only_unless_said_otherwise() {
    assert!(Path::new("/mnt/src/lib.rs").is_file());
    assert!(std::fs::write("/mnt/src/new", "").is_err());
}

/// The names of an attempt's phases.
fn phases(attempt: &Value) -> Vec<&str> {
    attempt["phases"].as_array().unwrap().iter().map(|phase| phase[0].as_str().unwrap()).collect()
}

#[test]
fn tests_on_the_host_record_what_they_measure() {
    let run = Run::new("measuring::of_a_vm");
    let reports = run.reports.path().to_owned();
    let (output, said, record, text) = run.output_and(|| junit(&read_reports(&reports).unwrap()));
    assert_eq!(output.status.code(), Some(101), "{said}");
    let attempt = &record["attempts"][0];
    let depth = json!([{ "name": "depth", "value": 2.5, "unit": "m" }]);
    assert_eq!(attempt["measurements"], depth);
    let release = attempt["release"].as_str().unwrap();
    assert_eq!(attempt["details"], json!({ "release": release, "ratio": "NaN %" }));
    assert!(phases(attempt).contains(&"run") && phases(attempt).contains(&"stop"), "{attempt}");
    let document = roxmltree::Document::parse(&text).unwrap();
    let property = |name: &str| {
        let name = format!("rust_tests::measuring::of_a_vm.{name}");
        let found = document.descendants().find(|node| node.attribute("name") == Some(&*name));
        found
            .unwrap_or_else(|| panic!("no {name} in {text}"))
            .attribute("value")
            .unwrap()
            .to_owned()
    };
    assert_eq!(property("measurement.depth"), "2.5 m");
    assert_eq!(property("detail.release"), format!("\"{release}\""));
    assert!(property("phase.run").ends_with(" ms"));
}

#[test]
fn vms_that_a_test_starts_are_recorded_with_their_events() {
    let (output, said, record) = Run::new("measuring::of_several_vms").output();
    assert!(output.status.success(), "{said}");
    assert_eq!(record["outcome"], "passed");
    let attempt = &record["attempts"][0];
    assert_eq!(attempt["measurements"][0]["name"], "VMs");
    assert_eq!(attempt["events"][0]["title"], "kernel panic: sysrq triggered crash", "{attempt}");
    let phases = phases(attempt);
    for wanted in ["VM 1: setup", "VM 1: run", "VM 1: stop", "VM 2: setup", "VM 2: run"] {
        assert!(phases.contains(&wanted), "no {wanted} in {phases:?}");
    }
    assert!(!phases.contains(&"VM 2: stop"), "{phases:?}");
    assert!(attempt["release"].as_str().unwrap().starts_with("6.12."), "{attempt}");
    assert!(attempt["notes"][0].as_str().unwrap().starts_with("console of VM 2: "), "{attempt}");

    let (output, said, record) = Run::new("measuring::of_one_vm_of_a_builder").output();
    assert!(output.status.success(), "{said}");
    let attempt = &record["attempts"][0];
    assert!(self::phases(attempt).contains(&"run"), "{attempt}");
}
