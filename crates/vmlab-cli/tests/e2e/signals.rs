//! Signals to vmlab: the first is the command's, the second ends the VM, and SIGKILL leaves nothing.

use std::time::{Duration, Instant};

use crate::common::{DEBIAN_6_12, Running, Site, kernel, mode, native};
use rustix::process::Signal;

/// How long QEMU may outlive what should end it.
const PROMPTLY: Duration = Duration::from_secs(1);

/// What is left of a run.
fn logs() -> &'static [&'static str] {
    match native() {
        true => &["console.log", "lock"],
        false => &["console.log", "cpu.log", "lock", "qemu.log"],
    }
}

/// Nothing but logs may be left of a run.
fn assert_nothing_is_left(site: &Site) {
    let left: Vec<_> = site.runtime().read_dir().unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
    let mut files: Vec<_> =
        site.log_dir().read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, logs());
}

#[test]
fn the_first_signal_is_the_commands() {
    for (name, signal) in
        [("INT", Signal::INT), ("TERM", Signal::TERM), ("HUP", Signal::HUP), ("QUIT", Signal::QUIT)]
    {
        let site = Site::new();
        let script = format!(
            "trap 'echo caught {name}; exit 7' {name}; echo ready; while :; do sleep 0.1; done"
        );
        let run = site.sh(&[], &script).start();
        run.wait_stdout("ready\n");
        let monitor = run.process.monitor();
        run.signal(signal);
        let outcome = run.finish();
        outcome.expect_code(7);
        assert_eq!(outcome.stdout_text(), format!("ready\ncaught {name}\n"));
        monitor.assert_gone();
        assert_nothing_is_left(&site);
    }
}

#[test]
fn a_command_that_does_not_handle_a_signal_dies_of_it() {
    let site = Site::new();
    let run = site.sh(&[], "echo ready; exec sleep 1000").start();
    run.wait_stdout("ready\n");
    run.signal(Signal::INT);
    run.finish().expect_code(130);
}

#[test]
fn the_second_signal_ends_the_vm() {
    let site = Site::new();
    let script = "trap 'echo no' TERM INT; echo ready; while :; do sleep 0.1; done";
    let run = site.sh(&[], script).start();
    run.wait_stdout("ready\n");
    let monitor = run.process.monitor();
    run.signal(Signal::INT);
    run.wait_stdout("no\n");
    let asked = Instant::now();
    run.signal(Signal::TERM);
    let outcome = run.finish();
    outcome.expect_code(143);
    assert!(asked.elapsed() < 3 * PROMPTLY, "it took {:?}", asked.elapsed());
    monitor.assert_gone();
    assert_nothing_is_left(&site);
}

/// A run that is somewhere in its boot.
fn booting(site: &Site) -> Running {
    let vm = ["run", "-v", "--no-snapshot", "-k", kernel(DEBIAN_6_12)];
    let run = site.vmlab([&vm[..], &["--", "sleep", "1000"]].concat()).start();
    run.wait_stderr("Linux version ");
    run
}

#[test]
fn during_the_boot_one_signal_is_enough() {
    let site = Site::new();
    let run = booting(&site);
    let monitor = run.process.monitor();
    let asked = Instant::now();
    run.signal(Signal::TERM);
    let outcome = run.finish();
    outcome.expect_code(143);
    assert_eq!(outcome.stdout_text(), "");
    assert!(asked.elapsed() < 3 * PROMPTLY, "it took {:?}", asked.elapsed());
    monitor.assert_gone();
    assert_nothing_is_left(&site);
}

#[test]
fn killing_vmlab_outright_leaves_nothing_running() {
    let running = |site: &Site| {
        let run = site.sh(&[], "echo ready; exec sleep 1000").start();
        run.wait_stdout("ready\n");
        run
    };
    // As soon as there is a process to be left behind, or a VM without one.
    let starting = |site: &Site| {
        let arguments = ["run", "-q", "-k", kernel(DEBIAN_6_12), "--", "sleep", "1000"];
        let run = site.vmlab(arguments).start();
        let deadline = Instant::now() + crate::common::PATIENCE;
        let is_there = || match native() {
            true => site.state().join("vmlab/runs").exists(),
            false => !run.process.descendants().is_empty(),
        };
        while !is_there() {
            assert!(Instant::now() < deadline, "nothing is ever started");
            std::thread::yield_now();
        }
        run
    };
    let moments: [&dyn Fn(&Site) -> Running; 3] = [&starting, &booting, &running];
    for (index, moment) in moments.iter().enumerate() {
        let site = Site::new();
        let run = moment(&site);
        let below = run.process.descendants();
        assert_eq!(below.is_empty(), native());
        run.signal(Signal::KILL);
        let killed = Instant::now();
        for process in &below {
            assert!(process.wait_gone(killed + PROMPTLY), "{process:?} lives on (moment {index})");
        }
        let outcome = run.finish();
        assert_eq!(outcome.signal, Some(9));
        let left = site.runtime().read_dir().unwrap().count();
        assert_eq!(left, 0);
    }
}

#[test]
fn logs_are_private_whatever_the_umask() {
    let site = Site::new();
    let script = r#"umask 0; "$VMLAB" run -q -k debian:6.12 -- true"#;
    site.host_sh(script).output().expect_stdout("");
    let dir = site.log_dir();
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&site.state().join("vmlab")), 0o700);
    let files: Vec<_> = dir.read_dir().unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(files.len(), logs().len(), "{files:?}");
    for file in files {
        assert_eq!(mode(&file), 0o600, "{}", file.display());
    }
}
