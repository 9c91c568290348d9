//! `vmlab test` that is killed, and `vmlab test` on full disks.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::common::{DEBIAN_6_12, Outcome, PATIENCE, Site, is_root, kernel, vmlab_bin};
use crate::kernels::{entry, own_cache};

/// How long QEMU may outlive what should end it, on a busy machine.
const PROMPTLY: Duration = Duration::from_secs(2);

/// More directories of runs than are kept, and later ones than any run that begins now.
const LATER_RUNS: usize = 60;

/// What is below a directory, however deep, that `is` says.
fn below(dir: &Path, is: &dyn Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in dir.read_dir().into_iter().flatten().flatten() {
        let path = entry.path();
        if is(&path) {
            found.push(path.clone());
        }
        if entry.file_type().unwrap().is_dir() {
            found.extend(below(&path, is));
        }
    }
    found
}

/// What is in the making in a cache, or was when its maker was killed.
fn staged(cache: &Path) -> Vec<PathBuf> {
    below(cache, &|path| path.parent().unwrap().ends_with(".staging"))
}

fn wait_until(what: &str, is: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline, "{what}: that never happens");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const WAITING: &str = "[[matrix]]\nname = \"waits\"\nkernel = \"debian:6.12\"\nmemory = \"512M\"\n\
    command = \"echo going > begun-$N; exec sleep 1000\"\nvars = { n = [1, 2] }\n";

const QUICK: &str = "[[target]]\nname = \"quick\"\nkernel = \"debian:6.12\"\nmemory = \"512M\"\n\
    command = \"true\"\n";

#[test]
fn nothing_is_left_of_a_killed_run() {
    let site = Site::new();
    let cache = own_cache(&site);
    let temp = site.path().join("temp");
    std::fs::create_dir(&temp).unwrap();
    std::fs::write(site.cwd().join("vmlab.toml"), WAITING).unwrap();
    std::fs::write(site.cwd().join("quick.toml"), QUICK).unwrap();
    let vmlab = |args: &[&str]| {
        site.vmlab(args).env("VMLAB_CACHE_DIR", &cache).env("TMPDIR", temp.to_str().unwrap())
    };
    let making = || !staged(&cache).is_empty();
    let taking = || !below(&cache.join("snapshots"), &|path| path.ends_with(".staging")).is_empty();
    let begun = || ["begun-1", "begun-2"].iter().all(|name| site.cwd().join(name).exists());
    // While it makes what it boots from, while it takes a snapshot, and while commands run.
    let moments: [(&str, &dyn Fn() -> bool); 3] =
        [("a cache entry is made", &making), ("a VM boots", &taking), ("commands run", &begun)];
    for (what, moment) in moments {
        let running = vmlab(&["test", "-j", "2", "--json", "out.json"]).start();
        wait_until(what, moment);
        let processes = running.process.descendants();
        running.signal(Signal::KILL);
        let killed = Instant::now();
        for process in &processes {
            assert!(process.wait_gone(killed + PROMPTLY), "{process:?} lives on when {what}");
        }
        assert_eq!(running.finish().signal, Some(9));
        for dir in [&site.runtime(), &temp] {
            assert_eq!(below(dir, &|_| true), Vec::<PathBuf>::new(), "{what}");
        }
    }
    // Logs alone are left in the runs' directories, and they count as those of any other.
    let runs = site.state().join("vmlab/runs");
    let logs = |path: &Path| {
        path.is_dir() || path.ends_with("lock") || path.extension().is_some_and(|ext| ext == "log")
    };
    assert_eq!(below(&runs, &|path| !logs(path)), Vec::<PathBuf>::new());
    let killed: Vec<PathBuf> = runs.read_dir().unwrap().map(|e| e.unwrap().path()).collect();
    // A VM that is started for a snapshot has one of its own.
    assert!(killed.len() >= moments.len(), "{killed:?}");
    for number in 0..LATER_RUNS {
        std::fs::create_dir(runs.join(format!("9999999999999-1-{number:06}"))).unwrap();
    }
    // The next run puts the cache in order.
    vmlab(&["test", "-c", "quick.toml"]).output().expect_code(0);
    assert_eq!(staged(&cache), Vec::<PathBuf>::new());
    vmlab(&["cache", "verify"]).output().expect_code(0);
    for dir in killed {
        assert!(!dir.exists(), "{}", dir.display());
    }
}

const TWO: &str = r#"
[defaults]
memory = "512M"

[[target]]
name = "good"
command = "echo fine"

[[target]]
name = "bad"
command = "echo broken; exit 3"
"#;

/// `vmlab test` with a full filesystem at `full` beside the working directory: it is a tmpfs with no more room
/// than `room`. It is there for this one process and its children alone.
fn with_a_full_disk(site: &Site, room: &str, env: &[(&str, &str)], arguments: &str) -> Outcome {
    std::fs::create_dir_all(site.path().join("full")).unwrap();
    let unshare = if is_root() { "unshare --mount" } else { "unshare --map-root-user --mount" };
    let script = format!(
        "exec {unshare} bash -c 'mount -t tmpfs -o size={room} tmpfs ../full &&
            {{ [ {room} != 64k ] || head -c 1M /dev/zero >../full/fill 2>/dev/null; true; }} &&
            \"$VMLAB\" test {arguments}'"
    );
    let mut run = site.host_sh(&script);
    run.command.env("VMLAB", vmlab_bin()).envs(env.iter().copied());
    run.output()
}

fn site(kernel: &str, text: &str) -> Site {
    let site = Site::new();
    let text = text.replace("[defaults]", &format!("[defaults]\nkernel = \"{kernel}\""));
    std::fs::write(site.cwd().join("vmlab.toml"), text).unwrap();
    site
}

fn targets(site: &Site) -> Vec<Value> {
    let json = std::fs::read(site.cwd().join("out.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    json["targets"].as_array().unwrap().clone()
}

const NO_SPACE: &str = "No space left on device (os error 28)";

#[test]
fn reports_on_a_full_disk_cost_no_other() {
    let site = site(kernel(DEBIAN_6_12), TWO);
    let arguments = "--json ../full/out.json --junit out.xml --html ../full/html --tap out.tap";
    let outcome = with_a_full_disk(&site, "64k", &[], arguments);
    // Which is that of the failed target.
    outcome.expect_code(1);
    outcome.expect_stderr(&[
        &format!("the report cannot be written to ../full/out.json: {NO_SPACE}\n"),
        &format!("the report cannot be written to ../full/html/index.html: {NO_SPACE}\n"),
    ]);
    assert!(outcome.stdout_text().contains("1 passed, 1 failed in "), "{outcome:?}");
    let xml = std::fs::read_to_string(site.cwd().join("out.xml")).unwrap();
    roxmltree::Document::parse(&xml).unwrap();
    let tap = std::fs::read_to_string(site.cwd().join("out.tap")).unwrap();
    assert!(tap.contains("not ok 2 - bad"), "{tap}");

    // What passed is no failure of the tests, but neither is all well.
    let outcome = with_a_full_disk(&site, "64k", &[], "-f good --json ../full/out.json");
    outcome.expect_code(125).expect_stderr(&["the report cannot be written to ../full/out.json"]);
    assert!(outcome.stdout_text().contains("1 passed in "), "{outcome:?}");
}

#[test]
fn half_a_report_is_none() {
    let site = site(kernel(DEBIAN_6_12), &TWO.replace("echo broken", "seq 9000"));
    // Room for a part of it, which has nine thousand lines.
    let arguments =
        "-f bad --junit ../full/out.xml; code=$?; stat -c %s ../full/out.xml; exit $code";
    let outcome = with_a_full_disk(&site, "16k", &[], arguments);
    outcome.expect_code(1).expect_stderr(&[&format!("../full/out.xml: {NO_SPACE}\n")]);
    assert!(outcome.stdout_text().ends_with("\n0\n"), "{outcome:?}");
}

#[test]
fn reports_are_written_though_nothing_can_be_printed() {
    let site = site(kernel(DEBIAN_6_12), TWO);
    let outcome = site.host_sh("exec \"$VMLAB\" test --json out.json >/dev/full").output();
    outcome.expect_code(1).expect_stderr(&["the output cannot be written", NO_SPACE]);
    assert_eq!(targets(&site).len(), 2);
    let outcome = site.host_sh("exec \"$VMLAB\" test -f good >/dev/full").output();
    outcome.expect_code(125);
}

#[test]
fn a_full_disk_for_logs_costs_no_verdict() {
    let site = site(kernel(DEBIAN_6_12), TWO);
    let full = site.path().join("full");
    let env = [("XDG_STATE_HOME", full.to_str().unwrap())];
    let outcome = with_a_full_disk(&site, "64k", &env, "-o all --json out.json");
    outcome.expect_code(1);
    let found = targets(&site);
    let outcomes: Vec<_> = found.iter().map(|target| target["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["passed", "failed"]);
    for (target, output) in found.iter().zip(["fine\n", "broken\n"]) {
        let attempt = &target["attempts"][0];
        assert_eq!(attempt["output"], output);
        let notes = attempt["notes"].to_string();
        for log in
            ["console.log: not all of the console is kept", "output.log: not all output is kept"]
        {
            assert!(notes.contains(&format!("-1/{log}: {NO_SPACE}")), "{notes}");
        }
    }
}

#[test]
fn a_full_disk_for_the_cache_is_named() {
    // A kernel that is not in that cache, whose image would be.
    let elsewhere = entry(&Site::new());
    let site = site(elsewhere.to_str().unwrap(), TWO);
    let full = site.path().join("full");
    let env = [("VMLAB_CACHE_DIR", full.to_str().unwrap())];
    let outcome = with_a_full_disk(&site, "64k", &env, "--json out.json");
    outcome.expect_code(125);
    for target in targets(&site) {
        assert_eq!(target["outcome"], "error");
        let failure = target["attempts"][0]["failure"].to_string();
        assert!(failure.contains(&format!("cannot write to the cache {}/", full.display())));
        assert!(failure.contains("VMLAB_CACHE_DIR") && failure.contains(NO_SPACE), "{failure}");
    }
    // Where what it boots from has room, and a snapshot has none, the run goes on without.
    let outcome = with_a_full_disk(&site, "96M", &env, "--json out.json");
    outcome.expect_code(1);
    let found = targets(&site);
    assert_eq!(found[0]["outcome"], "passed", "{found:?}");
    assert_eq!(found[1]["attempts"][0]["exit_code"], 3, "{found:?}");
    assert!(outcome.stderr_text().contains(NO_SPACE), "{outcome:?}");
}
