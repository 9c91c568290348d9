//! What many VMs leave behind, in a program of its own: nothing else makes threads or descriptors here.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod common;

use std::time::{Duration, Instant};

use common::{Logs, accel};
use vmlab::units::{Bytes, MIB};
use vmlab::{AccelChoice, SnapshotMode, Vm};

/// How many VMs, one after the other; every so many boots, and the others go on from a snapshot, which makes as many
/// VMs, threads and devices in less time. QEMU's leave nothing in this process but what looks after them.
const VMS: usize = 50;
const VMS_OF_QEMU: usize = 10;
const BOOTS: usize = 5;

/// How long what a VM had may take to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the allocator may keep for another time, in KiB; a VM's memory is a hundred times more.
const KEPT: usize = 4096;

/// What the process has: descriptors, threads, mappings, and KiB of memory.
fn has() -> [(&'static str, usize); 4] {
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix(" kB"));
    let rss = rss.unwrap().trim().parse().unwrap();
    [("descriptors", count("fd")), ("threads", count("task")), ("mappings", maps), ("KiB", rss)]
}

#[test]
fn many_boots_leave_nothing_behind() {
    let _logs = Logs::new();
    let native = accel() != AccelChoice::Tcg;
    let builder = Vm::builder().kernel("debian:6.12-cloud").memory(Bytes(192 * MIB));
    let builder = builder.accel(accel()).share_cwd(false);
    let run = |number: usize| {
        let mode =
            if number.is_multiple_of(BOOTS) { SnapshotMode::Never } else { SnapshotMode::Use };
        let vm = builder.clone().snapshots(mode).start().unwrap();
        assert!(vm.exec(["true"]).unwrap().status.success());
        vm.shutdown().unwrap();
    };
    // What a process keeps from its first VMs on is no leak.
    (0..3).for_each(run);
    std::thread::sleep(Duration::from_secs(2));
    let before = has();
    (0..if native { VMS } else { VMS_OF_QEMU }).for_each(run);
    let until = Instant::now() + PATIENCE;
    loop {
        let now = has();
        // Mappings of the allocator and of threads' stacks come and go by a few.
        let room = [0, 0, 8, KEPT];
        let more =
            now.iter().zip(&before).zip(room).any(|((now, before), room)| now.1 > before.1 + room);
        if !more {
            println!("{before:?}, and then {now:?}");
            break;
        }
        assert!(Instant::now() < until, "{now:?} instead of {before:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
