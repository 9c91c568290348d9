//! What many VMs leave behind, in a program of its own: nothing else makes threads or descriptors here.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod common;

use std::time::{Duration, Instant};

use common::{Logs, accel};
use vmlab::units::{Bytes, MIB};
use vmlab::{AccelChoice, SnapshotMode, Vm};

/// How many VMs boot, one after the other, and how many of as many more go on from a snapshot. QEMU's leave nothing in
/// this process but what looks after them.
const BOOTS: usize = 50;
const RESTORES: usize = 10;
const BOOTS_OF_QEMU: usize = 2;
/// One in so many runs a command and powers off.
const ORDERLY: usize = 5;

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
    let run = |mode, number: usize| {
        let vm = builder.clone().snapshots(mode).start().unwrap();
        // The others end as soon as they are up.
        if number.is_multiple_of(ORDERLY) {
            assert!(vm.exec(["true"]).unwrap().status.success());
            vm.shutdown().unwrap();
        }
    };
    // What a process keeps from its first VMs on is no leak.
    for mode in [SnapshotMode::Never, SnapshotMode::Use, SnapshotMode::Use] {
        run(mode, 0);
    }
    std::thread::sleep(Duration::from_secs(2));
    let before = has();
    let boots = if native { BOOTS } else { BOOTS_OF_QEMU };
    for (mode, count) in [(SnapshotMode::Never, boots), (SnapshotMode::Use, RESTORES)] {
        let started = Instant::now();
        (0..count).for_each(|number| run(mode, number));
        println!("{count} with snapshots {mode:?} in {:?}", started.elapsed());
    }
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
