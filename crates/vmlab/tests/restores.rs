//! What many restores leave behind, in a program of its own: nothing else makes threads or descriptors here.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod common;

use tempfile::TempDir;
use vmlab::units::{Bytes, MIB};
use vmlab::{Disk, Vm};

fn count(what: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{what}")).map_or(0, Iterator::count)
}

/// Threads that have been told to end may take a moment.
fn settled(what: &str, most: usize) -> usize {
    for _ in 0..100 {
        if count(what) <= most {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    count(what)
}

#[test]
fn many_restores_leave_nothing_behind() {
    let logs = TempDir::new().unwrap();
    // SAFETY: no other thread of this program reads the environment meanwhile.
    unsafe { std::env::set_var("XDG_STATE_HOME", logs.path()) };
    let disk = Disk::blank(Bytes(64 * MIB)).filesystem("ext4").named("data");
    let builder = Vm::builder().kernel("debian:6.12").memory(Bytes(512 * MIB));
    let builder = builder.accel(common::accel()).share_cwd(false).pluggable(true).disk(disk);
    // What a process keeps from its first VM on is no leak.
    builder.clone().start().unwrap().shutdown().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(2));
    let before = (count("fd"), count("task"));
    let mut vm = builder.start().unwrap();
    let snapshot = vm.snapshot().unwrap();
    vm.restore(&snapshot).unwrap();
    let (fds, threads) = (count("fd"), count("task"));
    for _ in 0..40 {
        vm.restore(&snapshot).unwrap();
    }
    assert!(settled("fd", fds) <= fds, "{} descriptors, {fds} at first", count("fd"));
    assert!(settled("task", threads) <= threads, "{} threads, {threads} at first", count("task"));
    assert!(vm.exec(["true"]).unwrap().status.success());
    let log = vm.console().log_path().to_owned();
    let starts = std::fs::read_dir(log.ancestors().nth(2).unwrap()).unwrap().flatten();
    let starts = starts.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"start-"));
    assert_eq!(starts.count(), 32);
    vm.shutdown().unwrap();
    drop((vm, snapshot));
    assert!(settled("fd", before.0) <= before.0, "{} descriptors", count("fd"));
    assert!(settled("task", before.1) <= before.1, "{} threads", count("task"));
}
