//! `vmlab test`: the targets of a file, in VMs side by side, and what is written of them.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::common::{DEBIAN_6_1, DEBIAN_6_12, Site, kernel};

/// A site with a file of targets, whose kernels are there.
fn site(file: &str, text: &str) -> Site {
    kernel(DEBIAN_6_12);
    let site = Site::new();
    std::fs::write(site.cwd().join(file), text).unwrap();
    site
}

fn results(site: &Site) -> Value {
    serde_json::from_slice(&std::fs::read(site.cwd().join("out.json")).unwrap()).unwrap()
}

const MIXED: &str = r#"
[defaults]
kernel = "debian:6.12"
memory = "512M"
timeout = "60s"

[[target]]
name = "good"
command = "echo fine; test \"$GIVEN\" = 'a b' && pwd"
env = { GIVEN = "a b" }
tags = ["quick"]

[[target]]
name = "bad"
command = ["sh", "-c", "echo broken; exit 3"]

[[target]]
name = "flaky"
command = "[ -e seen ] || { touch seen; exit 1; }"
retries = 1

[[target]]
name = "meant to fail"
command = "false"
should-fail = true
tags = ["quick"]

[[target]]
name = "slow"
command = "echo going; sleep 1000"
timeout = "5s"
"#;

#[test]
fn targets_pass_fail_and_are_reported() {
    let site = site("vmlab.toml", MIXED);
    let outcome = site.vmlab(["test", "--json", "out.json", "--junit", "out.xml"]).output();
    outcome.expect_code(1);
    let text = outcome.stdout_text();
    for wanted in [
        "ok        good (",
        "FAILED    bad (",
        "exit code 3",
        "| broken\n",
        "flaky     flaky (",
        "ok        meant to fail (",
        "the command took longer than 5 s",
        "2 passed, 1 flaky, 2 failed in ",
    ] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    assert!(!text.contains("fine"), "the output of one that passed: {text}");
    let all = results(&site);
    let found: Vec<_> = all["targets"].as_array().unwrap().iter().collect();
    let outcomes: Vec<_> = found.iter().map(|target| target["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["passed", "failed", "flaky", "passed", "failed"]);
    assert_eq!(found[0]["attempts"][0]["output"], format!("fine\n{}\n", site.cwd().display()));
    assert_eq!(found[1]["attempts"][0]["exit_code"], 3);
    assert!(found[4]["attempts"][0]["output"].as_str().unwrap().starts_with("going"));
    let xml = std::fs::read_to_string(site.cwd().join("out.xml")).unwrap();
    let parsed = roxmltree::Document::parse(&xml).unwrap();
    let cases = parsed.descendants().filter(|node| node.has_tag_name("testcase")).count();
    assert_eq!(cases, 5, "{xml}");
}

#[test]
fn targets_are_chosen_by_name_and_tag() {
    let site = site("vmlab.toml", MIXED);
    let listed = |options: &[&str]| {
        let outcome = site.vmlab([&["test", "--list"], options].concat()).output();
        outcome.expect_code(0).stdout_text()
    };
    assert_eq!(listed(&[]), "good\nbad\nflaky\nmeant to fail\nslow\n");
    assert_eq!(listed(&["-f", "^(good|slow)$"]), "good\nslow\n");
    assert_eq!(listed(&["-t", "quick"]), "good\nmeant to fail\n");
    let nothing = site.vmlab(["test", "-f", "no such"]).output();
    nothing.expect_code(125).expect_stderr(&["no target is selected", "`bad`", "meant to fail"]);
}

#[test]
fn mistakes_in_a_file_are_shown_where_they_are() {
    let site = site(
        "vmlab.toml",
        "[[target]]\nname = \"x\"\nkernal = \"debian:6.12\"\ncommand = \"true\"\n",
    );
    let outcome = site.vmlab(["test"]).output();
    outcome.expect_code(125).expect_stderr(&[
        "vmlab.toml:3:1",
        "kernal",
        "did you mean `kernel`?",
        "^",
    ]);
    let empty = Site::new();
    let outcome = empty.vmlab(["test"]).output();
    outcome.expect_code(125).expect_stderr(&["neither vmlab.toml nor vmtest.toml", "--config"]);
}

#[test]
fn commands_have_the_callers_limits() {
    // vmlab itself needs more open files for several VMs, and takes them.
    let text = "[[target]]\nname = \"x\"\nkernel = \"debian:6.12\"\nmemory = \"512M\"\n\
        command = \"test $(ulimit -Sn) = 333\"\n";
    let site = site("vmlab.toml", text);
    site.host_sh("ulimit -Sn 333; exec $VMLAB test -j 4").output().expect_code(0);
}

#[test]
fn a_matrix_runs_under_each_kernel() {
    kernel(DEBIAN_6_1);
    let site = site(
        "vmlab.toml",
        r#"
[[matrix]]
name = "matrix"
kernel = ["debian:6.1", "debian:6.12"]
cpus = [1, 2]
memory = "512M"
command = "echo $(uname -r | cut -d. -f1-2) $(nproc)"
"#,
    );
    site.vmlab(["test", "--json", "out.json", "-o", "all"]).output().expect_code(0);
    let all = results(&site);
    let outputs = all["targets"].as_array().unwrap().iter();
    let outputs: Vec<_> =
        outputs.map(|target| target["attempts"][0]["output"].as_str().unwrap()).collect();
    assert_eq!(outputs, ["6.1 1\n", "6.1 2\n", "6.12 1\n", "6.12 2\n"]);
}

#[test]
fn the_kernels_own_reports_decide() {
    let site = site(
        "vmlab.toml",
        r#"
[defaults]
kernel = "debian:6.12"
memory = "512M"
timeout = "60s"

[[target]]
name = "panic"
command = "echo c > /proc/sysrq-trigger; sleep 100"

[[target]]
name = "expected panic"
command = "echo c > /proc/sysrq-trigger; sleep 100"
expect = "panic"

[[target]]
name = "missing"
command = "true"
expect = "panic"
"#,
    );
    let outcome = site.vmlab(["test", "--json", "out.json"]).output();
    outcome.expect_code(1);
    let all = results(&site);
    let failure = |index: usize| &all["targets"][index]["attempts"][0]["failure"];
    assert_eq!(failure(0)["kind"], "event", "{all:#}");
    assert_eq!(*failure(1), Value::Null, "{all:#}");
    assert_eq!(failure(2)["kind"], "missing-event", "{all:#}");
    let events = all["targets"][0]["attempts"][0]["events"].as_array().unwrap();
    assert!(events.iter().any(|event| event["kind"] == "panic"), "{events:#?}");
}

#[test]
fn a_signal_ends_everything_and_the_reports_are_written() {
    let site = site(
        "vmlab.toml",
        "[[matrix]]\nname = \"waits\"\nkernel = \"debian:6.12\"\nmemory = \"512M\"\n\
         command = \"echo going > begun-$N; sleep 1000\"\nvars = { n = [1, 2, 3, 4] }\n",
    );
    let running = site.vmlab(["test", "-j", "2", "--json", "out.json"]).start();
    let until = Instant::now() + Duration::from_secs(100);
    while !["begun-1", "begun-2"].iter().all(|name| site.cwd().join(name).exists()) {
        assert!(Instant::now() < until, "nothing begins");
        std::thread::sleep(Duration::from_millis(20));
    }
    let sent = Instant::now();
    running.signal(Signal::INT);
    let outcome = running.finish();
    assert!(sent.elapsed() < Duration::from_secs(10));
    outcome.expect_code(130);
    let all = results(&site);
    let targets = all["targets"].as_array().unwrap();
    assert!(targets.iter().all(|target| target["outcome"] == "cancelled"), "{all:#}");
    assert_eq!(targets.len(), 4);
    assert!(!site.cwd().join("begun-3").exists());
}
