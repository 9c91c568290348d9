//! A command many times, each time in a VM of its own.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::common::pty::Terminal;
use crate::common::{DEBIAN_6_1, DEBIAN_6_12, PATIENCE, Site, Vmlab, has_boot, kernel, native};
use rustix::process::Signal;
use serde_json::{Value, json};

/// `vmlab run OPTIONS… -- sh -c SCRIPT` with a small VM, and a report.
fn repeat(site: &Site, options: &[&str], script: &str) -> Vmlab {
    let fixed = ["run", "-k", kernel(DEBIAN_6_12), "-m", "256M", "--json", "report.json"];
    let vmlab = site.vmlab([&fixed, options, &["--", "sh", "-c", script]].concat());
    // These are several boots.
    vmlab.patience(3 * PATIENCE)
}

fn report(site: &Site) -> Value {
    let text = std::fs::read(site.cwd().join("report.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// A value of each run.
fn each(report: &Value, name: &str) -> Vec<Value> {
    report["runs"].as_array().unwrap().iter().map(|run| run[name].clone()).collect()
}

/// Where the runs' logs are, of those that have any.
fn logs(site: &Site) -> Vec<PathBuf> {
    let list = |dir: &Path| {
        let entries = dir.read_dir().into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect::<Vec<_>>()
    };
    let mut all: Vec<PathBuf> =
        list(&site.state().join("vmlab/runs")).iter().flat_map(|dir| list(dir)).collect();
    all.sort();
    all
}

#[test]
fn runs_that_fail_are_reported() {
    let site = Site::new();
    let script = "cat; echo out $VMLAB_RUN; echo err >&2; case $VMLAB_RUN in 2) exit 3;; \
                  3) echo c > /proc/sysrq-trigger; sleep 1000;; esac";
    let outcome = repeat(&site, &["--repeat", "3", "-j", "2"], script).input("given\n").output();
    outcome.expect_code(3);
    let stdout = outcome.stdout_text();
    let kept = logs(&site);
    let names: Vec<_> = kept.iter().map(|dir| dir.file_name().unwrap()).collect();
    assert_eq!(names, ["run-0002", "run-0003"], "logs of runs that passed are of no use");

    // What the second wrote stands below its heading, in the order of writing, and nothing of others.
    let block = stdout.split("=== run 2 of 3: exit code 3 after ").nth(1).unwrap();
    let (_, block) = block.split_once(" ===\n").unwrap();
    let expected = format!(
        "out 2\nerr\nvmlab: the whole console: {0}/console.log\nvmlab: its output: {0}/output.log\n\n",
        kept[0].display()
    );
    assert!(block.starts_with(&expected), "{stdout}");
    assert!(!stdout.contains("out 1") && !stdout.contains("given"), "{stdout}");
    assert_eq!(std::fs::read_to_string(kept[0].join("output.log")).unwrap(), "out 2\nerr\n");
    let console = std::fs::read_to_string(kept[0].join("console.log")).unwrap();
    assert!(has_boot(&console), "{console}");

    let block = stdout.split("=== run 3 of 3: failed after ").nth(1).unwrap();
    let panicked = "vmlab: error: the guest's kernel panicked: sysrq triggered crash\n";
    assert!(block.contains(panicked), "{stdout}");
    assert!(block.contains(" | ") && block.contains("Kernel panic"), "{stdout}");

    let report = report(&site);
    assert_eq!(each(&report, "run"), [1, 2, 3]);
    assert_eq!(each(&report, "exit_code"), [0, 3, 123]);
    assert_eq!(each(&report, "console_log")[0], Value::Null);
    assert_eq!(each(&report, "output_log")[1], json!(kept[0].join("output.log")));
    assert_eq!(each(&report, "exit_reason")[2], json!({"guest_panic": "sysrq triggered crash"}));
    let all = report["summaries"].as_array().unwrap();
    assert_eq!(all.len(), 1);
    let counts = ["wanted", "runs", "passed", "failed", "cancelled", "jobs"].map(|n| &all[0][n]);
    assert_eq!(counts, [3, 3, 1, 2, 0, 2]);
    assert_eq!(all[0]["failed_runs"], json!([2, 3]));
    let release = all[0]["release"].as_str().unwrap();
    assert!(stdout.contains(&format!("\n3 runs under {release}: 1 passed, 2 failed (2, 3)\n")));

    // The distribution is of these times, and no time is counted twice.
    let ms = |value: &Value| value.as_f64().unwrap();
    let mut times: Vec<f64> = each(&report, "run_ms").iter().map(ms).collect();
    times.sort_by(f64::total_cmp);
    let summary = &all[0]["run_ms"];
    assert_eq!(["min", "median", "max"].map(|name| ms(&summary[name])), times[..]);
    assert_eq!(
        ms(&all[0]["command_ms"]["max"]),
        ms(&report["runs"][1]["command_ms"]).max(ms(&report["runs"][0]["command_ms"]))
    );
    let phases = report["runs"][0]["report"]["phases"].as_array().unwrap();
    let of_the_vm: f64 = phases[2..].iter().map(|phase| ms(&phase["ms"])).sum();
    assert!(of_the_vm <= ms(&report["runs"][0]["run_ms"]), "{phases:?}");
}

#[test]
fn it_stops_at_the_first_failure() {
    let site = Site::new();
    // The first would go on for ever, the second passes, the third fails once the first is there.
    let script = "touch $VMLAB_RUN; case $VMLAB_RUN in 1) exec sleep 1000;; \
                  3) until [ -e 1 ]; do sleep 0.1; done; exit 7;; esac";
    let outcome = repeat(&site, &["--until-failure", "-j", "2"], script).output();
    outcome.expect_code(7);
    let report = report(&site);
    assert_eq!(each(&report, "run"), [2, 3]);
    let summary = &report["summaries"][0];
    let counts = ["runs", "passed", "failed", "cancelled"].map(|name| &summary[name]);
    assert_eq!(counts, [2, 1, 1, 1]);
    assert_eq!(summary["wanted"], Value::Null);
    assert!(!site.cwd().join("4").exists(), "it went on");
    let stdout = outcome.stdout_text();
    assert!(stdout.starts_with("=== run 3: exit code 7 after "), "{stdout}");
    assert!(stdout.contains("1 passed, 1 failed (3), 1 ended before they were done\n"), "{stdout}");
    assert_eq!(logs(&site).len(), 1);
    // The second VM's clock began when it did.
    let run = &report["runs"][1];
    let phases = run["report"]["phases"].as_array().unwrap();
    let of_the_vm: f64 = phases[2..].iter().map(|phase| phase["ms"].as_f64().unwrap()).sum();
    assert!(of_the_vm <= run["run_ms"].as_f64().unwrap(), "{run}");
}

#[test]
fn as_many_as_asked_for_run_at_the_same_time() {
    let site = Site::new();
    // The first two wait for each other. Then each is there for some time, which it writes down.
    let script = "begin=$(date +%s%N); touch here.$VMLAB_RUN; \
                  until [ -e here.1 ] && [ -e here.2 ]; do sleep 0.1; done; sleep 3; \
                  echo $begin $(date +%s%N) > times.$VMLAB_RUN";
    repeat(&site, &["--repeat", "4", "--jobs", "2"], script).output().expect_code(0);
    let mut events: Vec<(u64, i32)> = Vec::new();
    for number in 1..=4 {
        let text = std::fs::read_to_string(site.cwd().join(format!("times.{number}"))).unwrap();
        let (begin, end) = text.trim().split_once(' ').unwrap();
        events.extend([(begin.parse().unwrap(), 1), (end.parse().unwrap(), -1)]);
    }
    events.sort_unstable();
    let mut now = 0;
    let most = events.iter().map(|(_, change)| {
        now += change;
        now
    });
    assert_eq!(most.max(), Some(2), "{events:?}");
    assert_eq!(report(&site)["summaries"][0]["jobs"], 2);
    assert_eq!(logs(&site), [] as [PathBuf; 0]);
}

#[test]
fn the_memory_budget_lowers_the_number() {
    let site = Site::new();
    // One VM of 256 MiB and what QEMU itself needs, but not two.
    let tcg = ["--accel", "tcg", "--repeat", "2", "-j", "2"];
    let options = [&tcg[..], &["--until-failure", "--memory-budget", "1500M", "-v"]].concat();
    let outcome = repeat(&site, &options, "echo this is $VMLAB_RUN").output();
    outcome.expect_code(0);
    let said =
        "vmlab: 1 at a time instead of 2: each VM needs 768 MiB, and the memory budget is 1.5 GiB";
    assert_eq!(outcome.stderr_text().matches(said).count(), 1, "{}", outcome.stderr_text());
    assert_eq!(report(&site)["summaries"][0]["jobs"], 1);
    let stdout = outcome.stdout_text();
    // One after the other, and with -v also what passed.
    let (first, rest) =
        stdout.split_once(" ===\nthis is 1\n\n=== run 2 of 2: exit code 0 ").unwrap();
    assert!(first.starts_with("=== run 1 of 2: exit code 0 after "), "{stdout}");
    assert!(rest.contains(" ===\nthis is 2\n\n2 runs under "), "{stdout}");

    let too_small = [&tcg[..], &["--memory-budget", "700M"]].concat();
    let refused = repeat(&site, &too_small, "true").output();
    refused.expect_code(125);
    refused.expect_stderr(&["--memory-budget: a VM needs 768 MiB, which is more than 700 MiB"]);
}

#[test]
fn a_signal_ends_all_and_reports_what_there_is() {
    let site = Site::new();
    let script = "[ $VMLAB_RUN = 1 ] && exit 4; touch $VMLAB_RUN; exec sleep 1000";
    let run = repeat(&site, &["--repeat", "5", "-j", "2"], script).start();
    run.wait_stdout("=== run 1 of 5: exit code 4 after ");
    let deadline = Instant::now() + PATIENCE;
    while !(site.cwd().join("2").exists() && site.cwd().join("3").exists()) {
        assert!(Instant::now() < deadline, "the other runs never begin");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let below = run.process.descendants();
    assert!(native() || below.len() >= 2, "{below:?}");
    run.signal(Signal::INT);
    let outcome = run.finish();
    outcome.expect_code(130);
    assert!(below.iter().all(|process| process.wait_gone(Instant::now())), "{below:?}");
    let stdout = outcome.stdout_text();
    assert!(stdout.contains("\n1 of 5 runs under "), "{stdout}");
    assert!(
        stdout.contains(": 0 passed, 1 failed (1), 2 ended before they were done\n"),
        "{stdout}"
    );
    assert_eq!(each(&report(&site), "run"), [1]);
    assert_eq!(logs(&site).len(), 1);
    assert_eq!(site.runtime().read_dir().unwrap().count(), 0);
}

#[test]
fn a_command_that_is_not_there_is_tried_once() {
    let site = Site::new();
    let options =
        ["run", "-q", "-k", kernel(DEBIAN_6_12), "-m", "256M", "--repeat", "9", "-j", "1"];
    let outcome = site.vmlab([&options[..], &["--", "no-such-program"]].concat()).output();
    outcome.expect_code(127);
    assert_eq!(outcome.stderr_text(), "");
    let stdout = outcome.stdout_text();
    assert_eq!(stdout.matches("===").count(), 2, "{stdout}");
    let said = " ===\nvmlab: error: no-such-program: command not found in the guest\n";
    assert!(
        stdout.starts_with("=== run 1 of 9: failed after ") && stdout.contains(said),
        "{stdout}"
    );
    // -q: no summary.
    assert!(stdout.ends_with("in the guest\n\n"), "{stdout}");
}

#[test]
fn all_runs_of_a_kernel_come_before_those_of_the_next() {
    let site = Site::new();
    let script = "case $(uname -r).$VMLAB_RUN in 6.1.*.2) exit 6;; esac";
    let options = ["-k", kernel(DEBIAN_6_1), "--repeat", "2", "-j", "2"];
    repeat(&site, &options, script).output().expect_code(6);
    let report = report(&site);
    let (new, old) = (DEBIAN_6_12, DEBIAN_6_1);
    assert_eq!(each(&report, "kernel"), [new, new, old, old]);
    assert_eq!(each(&report, "run"), [1, 2, 1, 2]);
    assert_eq!(each(&report, "exit_code"), [0, 0, 0, 6]);
    let failed: Vec<_> =
        report["summaries"].as_array().unwrap().iter().map(|s| &s["failed"]).collect();
    assert_eq!(failed, [0, 1]);
}

#[test]
fn the_vms_do_not_take_each_others_open_files() {
    let site = Site::new();
    // Below the hard limit there is room for three VMs, if none keeps as many directories open as it would
    // alone; below the soft limit there is not.
    let script = r#"ulimit -Sn 128; ulimit -Hn 320
        exec "$VMLAB" run -q -k debian:6.12 -m 256M --share-via virtiofs \
            --repeat 3 -j 3 --until-failure -- sh -c '
            touch up.$VMLAB_RUN; until [ -e up.1 ] && [ -e up.2 ] && [ -e up.3 ]; do sleep 0.1; done
            find /usr/lib /usr/share -maxdepth 2 > /dev/null && test $(ulimit -n) = 128 || exit 9
            touch done.$VMLAB_RUN
            until [ -e done.1 ] && [ -e done.2 ] && [ -e done.3 ]; do sleep 0.1; done; exec true'"#;
    site.host_sh(script).patience(3 * PATIENCE).output().expect_stdout("");
}

#[test]
fn a_person_sees_how_far_it_is() {
    let site = Site::new();
    let script = "test $VMLAB_RUN = 1 || { echo second; exit 2; }";
    let mut command = repeat(&site, &["--repeat", "2", "-j", "1"], script).into_terminal_command();
    command.env("TERM", "xterm");
    let mut terminal = Terminal::start(command, 33, 101);
    terminal.wait("0/2, 0 failed");
    terminal.wait("1/2, 0 failed");
    assert_eq!(terminal.finish().code(), Some(2), "{}", terminal.text());
    // The live line was taken away before the block, of which every line begins at the left.
    let text = terminal.text();
    let (before, block) = text.split_once("=== run 2 of 2: exit code 2 after ").unwrap();
    assert!(before.ends_with("\r\x1b[2K"), "{before:?}");
    assert!(block.contains(" ===\r\nsecond\r\nvmlab: the whole console: "), "{text}");
}

#[test]
fn no_other_kernel_is_tried_after_the_first_failure() {
    let site = Site::new();
    let options = ["-k", DEBIAN_6_1, "--repeat", "1", "--until-failure"];
    repeat(&site, &options, "exit 5").output().expect_code(5);
    assert_eq!(each(&report(&site), "kernel"), [DEBIAN_6_12]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let site = Site::new();
    let refused = |options: &[&str], said: &str| {
        let outcome = site.vmlab([&["run"], options, &["--", "true"]].concat()).output();
        outcome.expect_code(125);
        outcome.expect_stderr(&[said]);
    };
    refused(&["-t", "--repeat", "2"], "'--tty' cannot be used with '--repeat <N>'");
    refused(&["-t", "--until-failure"], "'--tty' cannot be used with '--until-failure'");
    refused(&["--jobs", "2"], "required arguments were not provided");
    refused(&["--memory-budget", "2G"], "required arguments were not provided");
    refused(&["--repeat", "0"], "invalid value '0' for '--repeat <N>'");
    refused(&["--repeat", "2", "-j", "0"], "invalid value '0' for '--jobs <J>'");
    refused(&["--repeat", "2", "--memory-budget", "much"], "--memory-budget: `much` is not a size");
    let several = ["-k", DEBIAN_6_12, "-k", DEBIAN_6_1, "--until-failure"];
    refused(&several, "--until-failure with several kernels needs --repeat");
    let usage = ["--repeat", "2", "--jobs", "2", "--dry-run", "-k", kernel(DEBIAN_6_12)];
    let dry = site.vmlab([&["run"], &usage[..], &["--", "true"]].concat()).output();
    assert!(dry.expect_code(0).stdout_text().contains("qemu-system-x86_64 "));
}
