//! Disks that vmlab itself serves, with real VMs.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Logs, sh};
use rustix::net::Shutdown;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tempfile::TempDir;
use vmlab::blk::crash::{Cuts, Log, at_flushes, at_random, rebuild};
use vmlab::blk::{BlockSize, Options};
use vmlab::config::DiskWrites;
use vmlab::hypervisor::ExitReason;
use vmlab::report::Phase;
use vmlab::units::{Bytes, MIB};
use vmlab::{Disk, SnapshotMode, Vm, VmBuilder};

const KERNEL: &str = "debian:6.12";

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn builder(mode: SnapshotMode) -> VmBuilder {
    let builder = Vm::builder().kernel(KERNEL).memory(Bytes(512 * MIB)).accel(common::accel());
    builder.snapshots(mode).share_cwd(false)
}

/// Runs a program of the host, and says with what it ended and what it said.
fn host(program: &str, args: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(program);
    let output = command.args(args).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output();
    let output = output.unwrap_or_else(|e| panic!("{program} of e2fsprogs: {e}"));
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A file of so many MiB, each byte of which is 1.
fn file(dir: &Path, name: &str, mebibytes: usize) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, vec![1; mebibytes << 20]).unwrap();
    path
}

#[test]
fn a_guest_uses_disks_of_our_own() {
    let _logs = Logs::new();
    let dir = TempDir::new().unwrap();
    let disk = |name: &str, writes, options: Options| {
        Disk::new(name, file(dir.path(), name, 8)).writes(writes).served(options)
    };
    let blocks = Options { block_size: BlockSize::B4096, queues: 2, ..Options::default() };
    let faults = |rules: &[&str]| {
        let faults = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        Options { faults, ..Options::default() }
    };
    let throttle = Some("bps=2M,bps-burst=64K".parse().unwrap());
    let mut restored = false;
    // Wherever the second one comes from, the third one goes on from a snapshot.
    for mode in [SnapshotMode::Never, SnapshotMode::Use, SnapshotMode::Use] {
        // A guest has no more queues than CPUs.
        let vm = builder(mode)
            .cpus(2)
            .disk(disk("kept", DiskWrites::Kept, Options::default()))
            .disk(disk("gone", DiskWrites::Discarded, blocks.clone()))
            .disk(disk("fixed", DiskWrites::Refused, Options::default()))
            .disk(disk("slow", DiskWrites::Discarded, Options { throttle, ..Options::default() }))
            .disk(disk(
                "bad",
                DiskWrites::Kept,
                faults(&["fail:write:nth=2", "corrupt:read:nth=2"]),
            ))
            .start()
            .unwrap();
        let phases = vm.report().phases;
        restored = phases.iter().any(|timed| timed.phase == Phase::Restore);
        // Under the names that users give them.
        let names = sh(&vm, "cd /dev/disk/by-id && echo virtio-*");
        assert_eq!(names, "virtio-bad virtio-fixed virtio-gone virtio-kept virtio-slow\n");
        let sizes = |name: &str| {
            let d = format!("/dev/disk/by-id/virtio-{name}");
            sh(&vm, &format!("blockdev --getsize64 --getss --getro {d} | tr '\\n' ' '"))
        };
        assert_eq!(sizes("kept"), "8388608 512 0 ");
        assert_eq!(sizes("gone"), "8388608 4096 0 ");
        assert_eq!(sizes("fixed"), "8388608 512 1 ");

        // Write, read back, flush, discard, write zeroes.
        for name in ["kept", "gone"] {
            let script = format!(
                "d=/dev/disk/by-id/virtio-{name}
                head -c 3M /dev/urandom > /tmp/data
                dd if=/tmp/data of=$d bs=1M seek=1 oflag=direct conv=fsync,notrunc status=none
                dd if=$d bs=1M skip=1 count=3 iflag=direct status=none | cmp - /tmp/data
                blkdiscard -o 2097152 -l 1048576 $d
                blkdiscard -z -o 3145728 -l 4096 $d
                dd if=$d bs=4k skip=512 count=257 iflag=direct status=none | tr -d '\\0' | wc -c
                dd if=$d bs=4k count=1 iflag=direct status=none | tr -d '\\1' | wc -c
                ls /sys/block/$(basename $(readlink $d))/mq | wc -l"
            );
            let queues = if name == "gone" { 2 } else { 1 };
            assert_eq!(sh(&vm, &script), format!("0\n0\n{queues}\n"), "{name}");
        }
        let refused = "! dd if=/dev/zero of=/dev/disk/by-id/virtio-fixed bs=4k count=1 oflag=direct \
            2>&1";
        sh(&vm, refused);

        // 2 MiB less the burst take 0.97 s at 2 MiB/s, and on a busy machine longer.
        let start = Instant::now();
        let write = "dd if=/dev/zero of=/dev/disk/by-id/virtio-slow bs=256k count=8 oflag=direct \
            status=none";
        sh(&vm, write);
        let took = start.elapsed().as_secs_f64();
        assert!((0.9..10.0).contains(&took), "{took} s");

        // The second write fails, and only that one; so is the second read another.
        let script = "d=/dev/disk/by-id/virtio-bad
            dd if=/dev/zero of=$d bs=4k count=1 oflag=direct status=none
            LC_ALL=C dd if=/dev/zero of=$d bs=4k count=1 oflag=direct 2>&1 | grep -o 'Input/output error'
            dd if=/dev/zero of=$d bs=4k count=1 oflag=direct status=none && echo written";
        assert_eq!(sh(&vm, script), "Input/output error\nwritten\n");
        vm.shutdown().unwrap();
        drop(vm);
        let kept = std::fs::read(dir.path().join("kept")).unwrap();
        assert!(kept[..1 << 20].iter().all(|byte| *byte == 1));
        assert!(kept[1 << 20..2 << 20].iter().any(|byte| *byte != 1));
        assert!(kept[2 << 20..3 << 20].iter().all(|byte| *byte == 0));
        for name in ["gone", "fixed", "slow"] {
            let content = std::fs::read(dir.path().join(name)).unwrap();
            assert!(content == vec![1; 8 << 20], "{name} was written to");
        }
    }
    assert!(restored);
}

#[test]
fn who_writes_to_a_disk_is_alone() {
    let _logs = Logs::new();
    let dir = TempDir::new().unwrap();
    let path = file(dir.path(), "disk", 1);
    let served = |writes| Disk::new("data", &path).writes(writes).served(Options::default());
    let by_qemu = |writes| Disk::new("data", &path).writes(writes);
    let start = |disk| builder(SnapshotMode::Never).disk(disk).start();
    let vm = start(served(DiskWrites::Kept)).unwrap();
    for other in [served(DiskWrites::Kept), served(DiskWrites::Discarded)] {
        let error = format!("{:#}", start(other).err().unwrap());
        assert!(error.contains("a disk cannot be used") && error.contains("in use"), "{error}");
    }
    let error = start(by_qemu(DiskWrites::Kept)).err().unwrap().to_string();
    assert!(error.contains("Failed to get \"write\" lock"), "{error}");
    drop(vm);
    let vm = start(by_qemu(DiskWrites::Kept)).unwrap();
    let error = start(served(DiskWrites::Refused)).err().unwrap().to_string();
    assert!(error.contains("in use"), "{error}");
    drop(vm);
    let vms = [served(DiskWrites::Discarded), served(DiskWrites::Refused)].map(start);
    assert!(vms.iter().all(Result::is_ok));
}

/// The program's own QEMU that has this file as a disk, and the words of its command line.
fn qemu_with(path: &Path) -> (Pid, Vec<String>) {
    let path = path.to_str().unwrap();
    let found = std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let words = std::fs::read_to_string(entry.path().join("cmdline")).ok()?;
        let words: Vec<String> = words.split('\0').map(str::to_owned).collect();
        let is_qemu = words[0].contains("qemu-system");
        (is_qemu && words.iter().any(|word| word.contains(path))).then_some((pid, words))
    });
    found.expect("QEMU")
}

#[test]
fn a_vm_that_loses_a_disk_ends_with_its_name() {
    let _logs = Logs::new();
    let dir = TempDir::new().unwrap();
    let (data, other) = (file(dir.path(), "data", 1), file(dir.path(), "other", 1));
    let vm = builder(SnapshotMode::Never)
        .disk(Disk::new("data", &data).served(Options::default()))
        .disk(Disk::new("other", &other))
        .start()
        .unwrap();
    let (pid, words) = qemu_with(&other);
    let fd = words.iter().find_map(|word| word.strip_prefix("socket,id=disk-data,fd=")).unwrap();
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let fd = pidfd_getfd(pidfd, fd.parse().unwrap(), PidfdGetfdFlags::empty());
    rustix::net::shutdown(fd.unwrap(), Shutdown::Both).unwrap();
    let end = vm.handle().wait(Some(Instant::now() + PATIENCE));
    let Some(ExitReason::DeviceFailed(said)) = end else { panic!("{end:?}") };
    let wanted = format!("the server of the disk `data` ({}) has lost", data.display());
    assert!(said.starts_with(&wanted), "{said}");
}

/// What an ext4 has in a file after a power cut and a check, which has to find nothing wrong but its journal.
fn recovered(image: &Path, name: &str) -> String {
    let path = image.to_str().unwrap();
    let (code, said) = host("e2fsck", &["-fp", path]);
    assert!(matches!(code, Some(0 | 1)), "{code:?}: {said}");
    host("debugfs", &["-R", &format!("cat {name}"), path]).1
}

#[test]
fn a_power_cut_loses_what_was_not_synced_alone() {
    let _logs = Logs::new();
    let dir = TempDir::new().unwrap();
    let base = dir.path().join("base");
    let image = base.to_str().unwrap();
    assert_eq!(host("mke2fs", &["-q", "-t", "ext4", image, "16M"]).0, Some(0));
    let log = dir.path().join("log");
    let options = Options { record: Some(log.clone()), ..Options::default() };
    // Discarded writes leave the file as it was, which is where power cuts begin.
    let vm = builder(SnapshotMode::Never)
        .disk(Disk::new("data", &base).served(options))
        .start()
        .unwrap();
    sh(
        &vm,
        "mount /dev/disk/by-id/virtio-data /mnt
        echo synced > /tmp/a; dd if=/tmp/a of=/mnt/synced conv=fsync status=none; sync /mnt",
    );
    let synced = Log::open(&log).unwrap().entries().len();
    sh(
        &vm,
        "echo loose > /mnt/loose; for i in 1 2 3 4 5 6; do cat /mnt/loose; done > /mnt/more; sync",
    );
    let flushed = Log::open(&log).unwrap().entries().len();
    sh(&vm, "echo later > /mnt/later");
    drop(vm);

    let read = Log::open(&log).unwrap();
    assert_eq!(read.capacity(), 16 << 11);
    // A superblock that is torn would not pass: ext4 takes its two sectors for one.
    let cuts = Cuts { count: 60, seed: 1, tear: false, reorder: true };
    let at_random: Vec<_> = at_random(read.entries(), cuts).collect();
    let states = at_flushes(read.entries()).chain(at_random);
    let to = dir.path().join("state");
    let (mut lost, mut kept) = (0, 0);
    for state in states.filter(|state| state.cut >= synced) {
        rebuild(&base, &read, &state, &to).unwrap();
        assert_eq!(recovered(&to, "/synced"), "synced\n", "{state:?}");
        match recovered(&to, "/loose").as_str() {
            "loose\n" => kept += 1,
            "" => {
                assert!(state.cut < flushed, "{state:?}");
                lost += 1;
            }
            other => panic!("{other:?} in {state:?}"),
        }
        std::fs::remove_file(&to).unwrap();
    }
    assert!(lost > 0 && kept > 0, "{lost} lost, {kept} kept");
    // Nothing reached the file itself.
    let mut begin = [0; 1024];
    std::fs::File::open(&base).unwrap().read_exact_at(&mut begin, 0).unwrap();
    assert_eq!(host("e2fsck", &["-fn", image]).0, Some(0));
}
