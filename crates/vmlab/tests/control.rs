//! VMs that are driven from outside, with real ones.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmlab::hypervisor::ExitReason;
use vmlab::units::{Bytes, MIB};
use vmlab::{AccelChoice, Disk, Error, Share, SnapshotMode, Vm, VmBuilder};

const KERNEL: &str = "debian:6.12";

/// The logs of this program's runs are in a directory of their own.
static LOGS: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = TempDir::new().unwrap();
    // SAFETY: every test comes here before it reads the environment; all reads in this program go
    // through the standard library, which locks it.
    unsafe { std::env::set_var("XDG_STATE_HOME", dir.path()) };
    dir
});

fn builder() -> VmBuilder {
    LazyLock::force(&LOGS);
    let builder = Vm::builder().kernel(KERNEL).memory(Bytes(512 * MIB)).accel(AccelChoice::Tcg);
    builder.share_cwd(false).pluggable(true)
}

/// Runs a script, which has to succeed. Returns what it said.
fn sh(vm: &Vm, script: &str) -> String {
    let output = vm.exec(["sh", "-ec", script]).unwrap();
    let (said, errors) = (output.stdout_text(), output.stderr_text());
    assert!(output.status.success(), "{script}: {said}\n{errors}");
    said.trim_end().to_owned()
}

#[test]
fn a_paused_guest_does_nothing() {
    let vm = builder().start().unwrap();
    let count =
        "(while :; do echo; done | head -c 100000000 > /tmp/count) >/dev/null 2>&1 & sleep 0.2";
    sh(&vm, count);
    vm.pause().unwrap();
    let paused = Instant::now();
    let vm = &vm;
    std::thread::scope(|scope| {
        let asked = scope.spawn(move || (sh(vm, "date +%s%N"), Instant::now()));
        std::thread::sleep(Duration::from_millis(500));
        vm.resume().unwrap();
        let (_, answered) = asked.join().unwrap();
        assert!(answered - paused >= Duration::from_millis(500));
    });
}

#[test]
fn a_reset_guest_has_its_disks_and_nothing_else() {
    for mode in [SnapshotMode::Use, SnapshotMode::Never] {
        let disk = Disk::blank(Bytes(64 * MIB)).filesystem("ext4").named("data");
        let mut vm = builder().snapshots(mode).disk(disk).start().unwrap();
        let boot = sh(&vm, "cat /proc/sys/kernel/random/boot_id");
        sh(&vm, "echo kept > /mnt/data/file; echo lost > /root-file; sync /mnt/data/file");
        let crash = vm.exec(["sh", "-c", "echo c > /proc/sysrq-trigger"]);
        let Err(Error::Ended { reason: ExitReason::GuestPanic(_), .. }) = crash else {
            panic!("{crash:?}")
        };
        vm.reset().unwrap();
        assert_eq!(sh(&vm, "cat /mnt/data/file"), "kept");
        assert_eq!(sh(&vm, "test -e /root-file || echo gone"), "gone");
        let fresh = sh(&vm, "cat /proc/sys/kernel/random/boot_id");
        assert_ne!(fresh, boot);
        sh(&vm, "echo more >> /mnt/data/file");
        vm.restart().unwrap();
        assert_eq!(sh(&vm, "cat /mnt/data/file"), "kept\nmore");
        vm.shutdown().unwrap();
    }
}

#[test]
fn disks_come_and_go() {
    for mode in [SnapshotMode::Use, SnapshotMode::Never] {
        let kept = TempDir::new().unwrap();
        let first = Disk::blank(Bytes(64 * MIB)).filesystem("ext4").named("first");
        let mut vm = builder().snapshots(mode).disk(first).start().unwrap();
        let second = Disk::blank(Bytes(64 * MIB)).filesystem("ext4").named("second");
        let file = kept.path().join("second.raw");
        vm.attach(second.clone().keep(&file)).unwrap();
        sh(&vm, "echo a > /mnt/second/a; test -b /dev/disk/by-id/virtio-second");
        let uuids =
            "for d in first second; do blkid -o value -s UUID /dev/disk/by-id/virtio-$d; done";
        assert_eq!(sh(&vm, &format!("({uuids}) | sort -u | wc -l")), "2");
        let twice = vm.attach(second.clone()).unwrap_err().to_string();
        assert!(twice.contains("second"), "{twice}");
        // It stays as long as it is in use.
        let mut user = vm.command("sleep").arg("1000").current_dir("/mnt/second").spawn().unwrap();
        let control = user.control();
        drop(user.stdout.take());
        drop(user);
        let busy = vm.detach("second").unwrap_err().to_string();
        assert!(busy.contains("/mnt/second"), "{busy}");
        sh(&vm, "test -e /mnt/second/a");
        control.signal(9);
        let until = Instant::now() + Duration::from_secs(20);
        while let Err(error) = vm.detach("second") {
            assert!(Instant::now() < until, "{error}");
        }
        assert_eq!(
            sh(&vm, "ls /dev/disk/by-id /mnt/second"),
            "/dev/disk/by-id:\nvirtio-first\n\n/mnt/second:"
        );
        let none = vm.detach("second").unwrap_err().to_string();
        assert!(none.contains("no disk `second`"), "{none}");
        // What it wrote is there, and nobody holds the file.
        let check =
            std::process::Command::new("/usr/sbin/e2fsck").arg("-fn").arg(&file).output().unwrap();
        assert!(check.status.success(), "{check:?}");
        vm.attach(Disk::new("second", &file).writes(vmlab::config::DiskWrites::Kept)).unwrap();
        sh(&vm, "mount /dev/disk/by-id/virtio-second /mnt/second; cat /mnt/second/a");
        vm.detach("first").unwrap();
        sh(&vm, "echo b > /mnt/second/b");
        // A reset VM has what is plugged in now.
        vm.reset().unwrap();
        assert_eq!(sh(&vm, "ls /dev/disk/by-id"), "virtio-second");
        vm.shutdown().unwrap();
    }
}

#[test]
fn a_guest_goes_back_to_a_snapshot() {
    for mode in [SnapshotMode::Use, SnapshotMode::Never] {
        let shared = TempDir::new().unwrap();
        std::fs::write(shared.path().join("host"), "1").unwrap();
        let share: Share = format!("{}:/shared:rw", shared.path().display()).parse().unwrap();
        let disk = Disk::blank(Bytes(64 * MIB)).filesystem("ext4").named("data");
        let mut vm = builder().snapshots(mode).share(share).disk(disk).start().unwrap();
        sh(&vm, "echo 1 > /tmp/memory; echo 1 > /mnt/data/disk; echo 1 > /root-file");
        // Goes on in all that follows, with a file and a directory of shares open.
        let background = "exec 3< /shared/host; cd /usr/share; i=0; \
                          while :; do i=$((i + 1)); echo $i > /tmp/count; sleep 0.05; done";
        sh(&vm, &format!("({background}) > /dev/null 2>&1 & sleep 0.3"));
        let since = Instant::now();
        let snapshot = vm.snapshot().unwrap();
        println!("snapshot: {:?}", since.elapsed());
        let at_snapshot: u64 = sh(&vm, "cat /tmp/count").parse().unwrap();
        sh(&vm, "test \"$(cat /tmp/memory /mnt/data/disk /root-file | tr -d '\\n')\" = 111");
        for round in 0..3 {
            sh(&vm, "echo 2 > /tmp/memory; echo 2 > /mnt/data/disk; echo 2 > /root-file; sync");
            sh(
                &vm,
                "rm /shared/made; ls -R /usr/share/doc | wc -l; sleep 0.5"
                    .replace("rm", "rm -f")
                    .as_str(),
            );
            sh(&vm, "echo x > /shared/made");
            let since = Instant::now();
            vm.restore(&snapshot).unwrap();
            println!("restore: {:?}", since.elapsed());
            assert_eq!(sh(&vm, "cat /tmp/memory /mnt/data/disk /root-file | tr -d '\\n'"), "111");
            // What is the host's is no part of it.
            assert_eq!(sh(&vm, "cat /shared/made"), "x");
            let count: u64 = sh(&vm, "cat /tmp/count").parse().unwrap();
            assert!(count < at_snapshot + 40, "round {round}: {count}, {at_snapshot}");
            sh(&vm, "sleep 0.3");
            let later: u64 = sh(&vm, "cat /tmp/count").parse().unwrap();
            assert!(later > count, "round {round}: the background has ended at {count}");
            let drift = sh(&vm, "date +%s").parse::<u64>().unwrap().abs_diff(
                std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)
                    .unwrap()
                    .as_secs(),
            );
            assert!(drift <= 1, "{drift} s");
        }
        // Also after it has ended.
        let crash = vm.exec(["sh", "-c", "echo c > /proc/sysrq-trigger"]);
        assert!(crash.is_err());
        vm.restore(&snapshot).unwrap();
        assert_eq!(sh(&vm, "cat /tmp/memory"), "1");
        let random = |vm: &Vm| sh(vm, "head -c 16 /dev/urandom | md5sum");
        let first = random(&vm);
        vm.restore(&snapshot).unwrap();
        assert_ne!(random(&vm), first);
        assert_eq!(sh(&vm, "dmesg | grep -iE 'error|warn|blocked|stall' || true"), "");
        vm.shutdown().unwrap();
        let _ = Path::new("/");
    }
}
