//! Tests of Rust's in VMs: `vmlab runner` as Cargo calls it, `cargo vmlab`, and the results of tests. What
//! `#[vmlab::test]` does is tested in `crates/vmlab/tests/rust_tests.rs`.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::common::{DEBIAN_6_1, DEBIAN_6_12, Site, kernel};

/// A crate without dependencies, of which one test always fails.
const LIBRARY: &str = r#"
#[cfg(test)]
mod tests {
    fn release() -> String {
        std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap()
    }

    #[test]
    fn passes() {
        println!("under {}", release());
        std::fs::write("written", "in the guest").unwrap();
    }

    #[test]
    #[ignore]
    fn fails() {
        panic!("never under {}", release());
    }
}
"#;

/// A program outside of the working directory, in a place of which guests have their own.
fn program(site: &Site, script: &str) -> PathBuf {
    let dir = site.path().join("target");
    std::fs::create_dir(&dir).unwrap();
    let path = dir.join("program");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path
}

#[test]
fn programs_that_cargo_runs_run_in_a_vm() {
    let site = Site::new();
    let script = "echo \"$*\" in $VMLAB_INSIDE; uname -r; echo to stderr >&2; pwd; exit 7";
    let program = program(&site, script);
    let program = program.to_str().unwrap();
    let outcome = site
        .vmlab(["runner", "-k", kernel(DEBIAN_6_12), program, "--exact", "a::b", "--nocapture"])
        .output();
    outcome.expect_code(7);
    let text = outcome.stdout_text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "--exact a::b --nocapture in *");
    assert!(lines[1].starts_with("6.12."), "{text}");
    assert_eq!(lines[2], site.cwd().to_str().unwrap());
    assert_eq!(outcome.stderr_text(), "to stderr\n");
}

#[test]
fn lists_of_tests_are_made_without_a_vm() {
    let site = Site::new();
    let program = program(&site, "echo \"$*\"");
    let program = program.to_str().unwrap();
    let list = ["--list", "--format", "terse", "--ignored"];
    let outcome = site.vmlab([&["runner", "-k", "./no-such-kernel", program], &list[..]].concat());
    outcome.output().expect_stdout("--list --format terse --ignored\n");
    let run = site.vmlab(["runner", "-k", "./no-such-kernel", program, "a::b"]);
    run.output().expect_code(125).expect_stderr(&["no-such-kernel"]);
    let gone = site.vmlab(["runner", "./no-such-program"]).output();
    gone.expect_code(125).expect_stderr(&["no-such-program cannot be run"]);
}

#[test]
fn cargo_tests_a_crate_under_several_kernels() {
    let site = Site::new();
    let manifest =
        "[package]\nname = \"tested\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[workspace]\n";
    std::fs::write(site.cwd().join("Cargo.toml"), manifest).unwrap();
    std::fs::create_dir(site.cwd().join("src")).unwrap();
    std::fs::write(site.cwd().join("src/lib.rs"), LIBRARY).unwrap();
    let kernels = [kernel(DEBIAN_6_1), kernel(DEBIAN_6_12)];
    let cargo = |options: &[&str]| {
        let words = ["vmlab", "test", "-m", "512M", "-k", kernels[0], "-k", kernels[1], "--lib"];
        let call = site.cargo_vmlab([&words[..], options].concat());
        call.env("CARGO_TARGET_DIR", site.path().join("target"))
            .patience(Duration::from_secs(300))
            .output()
    };
    let outcome = cargo(&["--", "--nocapture"]);
    outcome.expect_code(0);
    let text = outcome.stdout_text();
    for wanted in ["under 6.1.", "under 6.12."] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    assert_eq!(text.matches("test result: ok. 1 passed").count(), 2, "{text}");
    outcome.expect_stderr(&["vmlab: debian:6.1: ok in ", "vmlab: debian:6.12: ok in "]);
    let written = std::fs::read_to_string(site.cwd().join("written")).unwrap();
    assert_eq!(written, "in the guest");

    let outcome = cargo(&["--", "--ignored"]);
    outcome.expect_code(101);
    let text = outcome.stdout_text();
    for wanted in ["never under 6.1.", "never under 6.12.", "src/lib.rs:", "FAILED"] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    outcome.expect_stderr(&["vmlab: debian:6.12: FAILED (exit status: 101) in "]);

    let outcome = site.cargo_vmlab(["vmlab", "build"]).output();
    outcome.expect_code(125).expect_stderr(&["`build` is none of test, nextest, bench"]);
}

#[test]
fn results_of_tests_become_reports() {
    let site = Site::new();
    let empty = site.vmlab(["report", "tests", "."]).output();
    empty.expect_code(125).expect_stderr(&["VMLAB_REPORT_DIR"]);
    let result = |began: u64, name: &str, outcome: &str, attempt: &str| {
        format!(
            r#"{{"version":1,"suite":"a","began_ms":{began},"took_ms":5.0,"targets":[{{"name":"{name}",
            "tags":[],"outcome":"{outcome}","attempts":[{attempt}]}}]}}"#
        )
    };
    let failed = r#"{"failure":{"kind":"test","how":"panicked at a.rs:1:2: no"}}"#;
    let measured = r#"{"measurements":[{"name":"m","value":1.5,"unit":"s"}]}"#;
    let skipped = r#"{"notes":["there is no moon"]}"#;
    for (file, text) in [
        ("1.json", result(1000, "a::bad", "failed", failed)),
        ("2.json", result(1010, "a::good", "passed", measured)),
        ("3.json", result(1020, "a::left_out", "skipped", skipped)),
    ] {
        std::fs::create_dir_all(site.cwd().join("results")).unwrap();
        std::fs::write(site.cwd().join("results").join(file), text).unwrap();
    }
    let words = ["report", "tests", "results", "--junit", "out.xml", "--json", "out.json"];
    let outcome = site.vmlab(words).output();
    let text = outcome.expect_code(0).stdout_text();
    for wanted in ["FAILED a::bad", "panicked at a.rs:1:2: no", "there is no moon", "1 skipped"] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    let xml = std::fs::read_to_string(site.cwd().join("out.xml")).unwrap();
    let document = roxmltree::Document::parse(&xml).unwrap();
    let suite = document.descendants().find(|node| node.has_tag_name("testsuite")).unwrap();
    let counts = ["tests", "failures", "skipped"].map(|name| suite.attribute(name).unwrap());
    assert_eq!(counts, ["3", "1", "1"]);
    let measured = suite
        .descendants()
        .find(|node| node.attribute("name") == Some("a::good.measurement.m"))
        .and_then(|node| node.attribute("value"));
    assert_eq!(measured, Some("1.5 s"));
    let json = std::fs::read(site.cwd().join("out.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["targets"][1]["attempts"][0]["measurements"][0]["value"], 1.5);
}
