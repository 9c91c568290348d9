//! Snapshots that cannot be used, and runs that end while one is taken or used: the runs that follow
//! succeed all the same.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::snapshots::{Begun, Cold, NONE};
use crate::common::{PATIENCE, Site};
use rustix::process::Signal;
use serde_json::Value;

/// How long what a run has started may outlive it.
const PROMPTLY: Duration = Duration::from_secs(1);

/// How long a run may take to end that was told to.
const SOON: Duration = Duration::from_secs(3);

/// Little, so that it is soon read; the kernels get by with it.
const MEMORY: [&str; 2] = ["-m", "192M"];

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn cut(path: &Path) {
    let file = open(path);
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
}

fn garble(path: &Path) {
    // Where there is something in all files of a snapshot.
    let file = open(path);
    let mut bytes = vec![0; 64];
    let at = file.metadata().unwrap().len() / 2;
    file.read_exact_at(&mut bytes, at).unwrap();
    bytes.iter_mut().for_each(|byte| *byte ^= 0xff);
    file.write_all_at(&bytes, at).unwrap();
}

fn manifest(entry: &Path) -> (String, Value) {
    let text = std::fs::read_to_string(entry.join("manifest.json")).unwrap();
    let value = serde_json::from_str(&text).unwrap();
    (text, value)
}

/// Declares other content to be what was written.
fn forge(entry: &Path, checked: &str, length: u64, checksum: u32) {
    let (mut text, value) = manifest(entry);
    let checked = value["content"].pointer(checked).unwrap();
    for (name, new) in [("length", length), ("checksum", checksum.into())] {
        // The memory's length is that of all nodes, and stays.
        let old = format!("\"{name}\": {}", checked[name]);
        text = text.replace(&old, &format!("\"{name}\": {new}"));
    }
    let content = text.split_once("\"content\":").unwrap().1.trim_end().strip_suffix('}').unwrap();
    let compact: String = content.split_ascii_whitespace().collect();
    let (old, new) = (&value["checksum"], crc32fast::hash(compact.as_bytes()));
    let text = text.replace(&format!("\"checksum\": {old}"), &format!("\"checksum\": {new}"));
    std::fs::write(entry.join("manifest.json"), text).unwrap();
}

/// Puts a state into a snapshot that is what was written, as far as anybody can tell.
fn forge_state(entry: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut state = std::fs::read(entry.join("state")).unwrap();
    change(&mut state);
    std::fs::write(entry.join("state"), &state).unwrap();
    forge(entry, "/state", state.len() as u64, crc32fast::hash(&state));
}

type Damage = fn(&Path);

/// Damages a snapshot in each way; the next run has to take a new one, unseen, and the one after that to
/// use it.
fn recovers(ways: &[(&str, Damage)]) {
    let cold = Cold::new();
    let say = ["echo", "here"];
    cold.run(&MEMORY, say).expect_taken().expect_stdout("here\n");
    for (way, damage) in ways {
        damage(&cold.entry());
        let ran = cold.run(&MEMORY, say);
        ran.expect_stdout("here\n");
        assert!(ran.has("boot") && ran.has("snapshot"), "{way}: {:?}", ran.phases);
        cold.run(&MEMORY, say).expect_restored().expect_stdout("here\n");
        assert_eq!(cold.litter(), NONE);
    }
}

#[test]
fn a_snapshot_that_is_not_what_was_written_is_replaced() {
    recovers(&[
        ("the state is cut", |entry| cut(&entry.join("state"))),
        ("the manifest is garbled", |entry| garble(&entry.join("manifest.json"))),
        ("the memory is gone", |entry| std::fs::remove_file(entry.join("memory0")).unwrap()),
        ("the memory is cut", |entry| cut(&entry.join("memory0"))),
    ]);
}

#[test]
fn a_snapshot_whose_memory_was_changed_is_replaced() {
    /// A page that the kernel is in.
    fn garble_memory(entry: &Path) {
        let file = open(&entry.join("memory0"));
        let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(16 << 20)).unwrap();
        file.write_all_at(&[0xa5; 4096], data).unwrap();
    }
    recovers(&[
        ("with its time", garble_memory),
        ("with its time set back", |entry| {
            let modified = entry.join("memory0").metadata().unwrap().modified().unwrap();
            garble_memory(entry);
            open(&entry.join("memory0")).set_modified(modified).unwrap();
        }),
        ("by the end of the host", |entry| {
            // The times reached the disk, and the content did not.
            garble_memory(entry);
            std::fs::write(entry.join("stamp.json"), stamp(entry, "another boot")).unwrap();
        }),
    ]);
}

/// What a check in that boot of the host would have left.
fn stamp(entry: &Path, boot: &str) -> String {
    use std::os::unix::fs::MetadataExt;
    let meta = entry.join("memory0").metadata().unwrap();
    let (modified, changed) =
        ([meta.mtime(), meta.mtime_nsec()], [meta.ctime(), meta.ctime_nsec()]);
    let known: Value =
        serde_json::from_slice(&std::fs::read(entry.join("stamp.json")).unwrap()).unwrap();
    let mut made = known.clone();
    made["boot"] = boot.into();
    let file = &mut made["files"][0];
    file["modified"] = serde_json::json!(modified);
    file["changed"] = serde_json::json!(changed);
    let names = |value: &Value| value["files"][0].as_object().unwrap().keys().count();
    assert_eq!(names(&made), names(&known));
    made.to_string()
}

#[test]
fn after_a_restart_of_the_host_a_good_snapshot_is_still_used() {
    let cold = Cold::new();
    cold.run(&MEMORY, ["true"]).expect_taken();
    let entry = cold.entry();
    std::fs::write(entry.join("stamp.json"), stamp(&entry, "another boot")).unwrap();
    cold.run(&MEMORY, ["true"]).expect_restored();
    let renewed = std::fs::read_to_string(entry.join("stamp.json")).unwrap();
    assert!(!renewed.contains("another boot"), "{renewed}");
}

#[test]
fn a_state_that_no_vm_can_load_is_replaced() {
    recovers(&[
        ("noise", |entry| {
            forge_state(entry, |state| {
                let noise = crate::common::noise(state.len() - 32);
                state.truncate(32);
                state.extend(noise);
            });
        }),
        ("too short", |entry| forge_state(entry, |state| state.truncate(state.len() / 2))),
        ("nothing", |entry| forge_state(entry, |state| state.truncate(32))),
    ]);
}

#[test]
fn a_guest_that_does_not_wake_is_replaced() {
    recovers(&[
        // Its page tables are gone, so its first instruction faults.
        ("no memory", |entry| {
            let file = open(&entry.join("memory0"));
            let length = file.metadata().unwrap().len();
            file.set_len(0).unwrap();
            file.set_len(length).unwrap();
            forge(entry, "/memory/0", length, 0);
        }),
    ]);
}

#[test]
fn a_cache_that_cannot_be_written_costs_only_time() {
    let cold = Cold::new();
    std::fs::write(cold.snapshots(), "not a directory").unwrap();
    let ran = cold.begin(&MEMORY, ["echo", "here"]).finish();
    ran.expect_booted();
    assert_eq!(ran.text(), "here\n");
    ran.outcome.expect_stderr(&["without a snapshot: ", "snapshots"]);
}

#[test]
fn what_a_command_does_to_its_guest_is_no_fault_of_the_snapshot() {
    let cold = Cold::new();
    cold.run(&MEMORY, ["true"]).expect_taken();
    for (script, code) in [
        ("echo c > /proc/sysrq-trigger", 123),
        ("echo b > /proc/sysrq-trigger", 122),
        ("exit 5", 5),
    ] {
        let ran = cold.sh(&MEMORY, script);
        ran.outcome.expect_code(code);
        assert!(!ran.has("boot"), "{script}: {:?}", ran.phases);
        cold.run(&MEMORY, ["true"]).expect_restored();
    }
    let ran = cold.run(&[&MEMORY[..], &["--module", "no-such-module"]].concat(), ["true"]);
    ran.outcome.expect_code(125).expect_stderr(&["no-such-module"]);
    cold.run(&MEMORY, ["true"]).expect_restored();
}

#[test]
fn a_kernel_that_does_not_boot_leaves_no_snapshot() {
    let cold = Cold::new();
    let ran = cold.run(&["--append", "rdinit=/none init=/none"], ["true"]);
    ran.outcome.expect_code(123).expect_stderr(&["panicked", "the whole console: "]);
    assert_eq!(cold.entries(), NONE);
    assert_eq!(cold.litter(), NONE);
}

/// Processes that a run has started, and which it should have ended.
fn left_running(site: &Site) -> Vec<PathBuf> {
    let mark = format!("VMLAB_CACHE_DIR={}", site.path().join("cache").display());
    let processes = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let has = |process: &PathBuf| {
        let environment = std::fs::read(process.join("environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == mark.as_bytes())
    };
    processes.filter(has).collect()
}

#[track_caller]
fn assert_nothing_runs(site: &Site) {
    let deadline = Instant::now() + PROMPTLY;
    while !left_running(site).is_empty() {
        assert!(Instant::now() < deadline, "{:?}", left_running(site));
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn wait_until(mut there: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !there() {
        assert!(Instant::now() < deadline, "it never comes");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Ends first runs by SIGKILL, each after it was given some time by `wait`.
fn killed(moments: u64, wait: impl Fn(&Cold, u64)) {
    let cold = Cold::new();
    for moment in 0..moments {
        let begun = cold.start(&MEMORY, ["sleep", "1000"]);
        wait(&cold, moment);
        begun.running.signal(Signal::KILL);
        assert_eq!(begun.finish().outcome.signal, Some(9));
        assert_nothing_runs(&cold.site);
        let complete = !cold.entries().is_empty();
        // What is not there is taken by another run over the litter, if not each time by one that goes on.
        if complete || moment % 4 == 3 {
            let ran = cold.run(&MEMORY, ["echo", "here"]);
            let ran = if complete { ran.expect_restored() } else { ran.expect_taken() };
            ran.expect_stdout("here\n");
            assert!(complete || cold.litter().is_empty(), "{:?}", cold.litter());
            std::fs::remove_dir_all(cold.entry()).unwrap();
        }
    }
}

#[test]
fn a_first_run_can_be_killed_at_any_time() {
    killed(17, |_, moment| std::thread::sleep(Duration::from_millis(moment * 150)));
}

/// Whether a run has begun to write its snapshot.
fn writes(cold: &Cold) -> bool {
    !cold.entries().is_empty() || cold.litter().iter().any(|dir| dir.join("state").exists())
}

#[test]
fn a_run_can_be_killed_while_it_writes_the_snapshot() {
    killed(8, |cold, moment| {
        wait_until(|| writes(cold));
        std::thread::sleep(Duration::from_millis(moment * 10));
    });
}

/// Starts a run and waits until it has started a VM.
fn starting(cold: &Cold, options: &[&str]) -> Begun {
    let begun = cold.start(&[&MEMORY, options].concat(), ["sleep", "1000"]);
    wait_until(|| !begun.running.process.descendants().is_empty());
    begun
}

#[test]
fn a_start_can_be_interrupted_at_any_time() {
    let cold = Cold::new();
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        // While the kernel boots.
        let begun = starting(&cold, &[]);
        let asked = Instant::now();
        begun.running.signal(signal);
        begun.finish().outcome.expect_code(code);
        assert!(asked.elapsed() < SOON, "it took {:?}", asked.elapsed());
        assert_nothing_runs(&cold.site);
        assert_eq!(cold.entries(), NONE);
    }
    cold.run(&MEMORY, ["true"]).expect_taken();
    assert_eq!(cold.litter(), NONE);
    for moment in 0..12 {
        let begun = starting(&cold, &[]);
        std::thread::sleep(Duration::from_millis(moment * 25));
        let (signal, code) = if moment % 2 == 0 { (Signal::INT, 130) } else { (Signal::TERM, 143) };
        let asked = Instant::now();
        begun.running.signal(signal);
        let ran = begun.finish();
        ran.outcome.expect_code(code);
        assert_eq!(ran.text(), "");
        assert!(asked.elapsed() < SOON, "it took {:?}", asked.elapsed());
        assert_nothing_runs(&cold.site);
    }
    // None of them took the end for a fault of the snapshot.
    cold.run(&MEMORY, ["true"]).expect_restored();
}

/// The VM that the snapshot was taken of is gone then, and the one that goes on from it is not there yet.
#[test]
fn a_first_run_can_be_interrupted_after_its_boot() {
    let cold = Cold::new();
    let there: [fn(&Cold) -> bool; 2] = [writes, |cold| !cold.entries().is_empty()];
    for there in there {
        let begun = cold.start(&MEMORY, ["sleep", "1000"]);
        wait_until(|| there(&cold));
        let asked = Instant::now();
        begun.running.signal(Signal::INT);
        begun.finish().outcome.expect_code(130);
        assert!(asked.elapsed() < SOON, "it took {:?}", asked.elapsed());
        assert_nothing_runs(&cold.site);
        if !cold.entries().is_empty() {
            cold.run(&MEMORY, ["true"]).expect_restored();
            std::fs::remove_dir_all(cold.entry()).unwrap();
        }
    }
}

#[test]
fn a_time_limit_holds_while_a_vm_starts_and_runs() {
    let cold = Cold::new();
    let limited = |limit: &str| {
        let options = [&MEMORY[..], &["--timeout", limit]].concat();
        let asked = Instant::now();
        let ran = cold.run(&options, ["sleep", "1000"]);
        ran.outcome.expect_code(124);
        assert!(asked.elapsed() < 3 * SOON, "{limit}: it took {:?}", asked.elapsed());
        assert_nothing_runs(&cold.site);
    };
    limited("500ms");
    assert_eq!((cold.entries(), cold.litter()), (vec![], vec![]));
    cold.run(&MEMORY, ["true"]).expect_taken();
    let whole = manifest(&cold.entry()).0;
    for limit in ["1ms", "20ms", "50ms", "80ms", "120ms", "160ms", "200ms", "300ms", "2s"] {
        limited(limit);
        // It was not taken for a fault of the snapshot.
        assert!(manifest(&cold.entry()).0 == whole && !cold.entry().join("condemned").exists());
    }
    cold.run(&MEMORY, ["true"]).expect_restored();
}
