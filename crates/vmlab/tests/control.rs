//! VMs that are driven from outside, with real ones.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod common;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::Logs;
use tempfile::TempDir;
use vmlab::hypervisor::ExitReason;
use vmlab::units::{Bytes, MIB};
use vmlab::{Disk, Error, Share, SnapshotMode, Vm, VmBuilder};

const KERNEL: &str = "debian:6.12";

fn builder() -> VmBuilder {
    let builder = Vm::builder().kernel(KERNEL).memory(Bytes(512 * MIB)).accel(common::accel());
    builder.share_cwd(false).pluggable(true)
}

/// Runs a script, which has to succeed. Returns what it said, without the end of the line.
fn sh(vm: &Vm, script: &str) -> String {
    common::sh(vm, script).trim_end().to_owned()
}

/// A new image that is not raw.
fn qcow2(dir: &Path) -> PathBuf {
    let path = dir.join("disk.qcow2");
    let make = ["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "64M"];
    assert!(std::process::Command::new("qemu-img").args(make).status().unwrap().success());
    path
}

/// What the kernel has found worth a warning.
const WARNINGS: &str = "dmesg --level=emerg,alert,crit,err,warn";

#[test]
fn a_paused_guest_does_nothing() {
    let _logs = Logs::new();
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
    let _logs = Logs::new();
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
    let _logs = Logs::new();
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
    let _logs = Logs::new();
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
        let warnings = sh(&vm, WARNINGS);
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
            let count: u64 = sh(&vm, "cat /tmp/count").parse().unwrap();
            assert_eq!(sh(&vm, "cat /tmp/memory /mnt/data/disk /root-file | tr -d '\\n'"), "111");
            // What is the host's is no part of it.
            assert_eq!(sh(&vm, "cat /shared/made"), "x");
            assert!(count < at_snapshot + 100, "round {round}: {count}, {at_snapshot}");
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
        assert_eq!(sh(&vm, WARNINGS), warnings);
        vm.shutdown().unwrap();
    }
}

#[test]
fn a_guest_that_goes_back_knows_nothing_of_what_came_after() {
    let _logs = Logs::new();
    let disk = Disk::blank(Bytes(32 * MIB)).filesystem("ext4").named("data");
    let mut vm = builder().disk(disk).start().unwrap();
    let write = |vm: &Vm, what: &str| {
        sh(vm, &format!("for f in /tmp/f /mnt/data/f /f; do echo {what} > $f; done; sync"));
    };
    write(&vm, "then");
    let snapshot = vm.snapshot().unwrap();
    for _ in 0..2 {
        write(&vm, "later");
        vm.restore(&snapshot).unwrap();
        assert_eq!(sh(&vm, "cat /tmp/f /mnt/data/f /f"), "then\nthen\nthen");
    }
    vm.shutdown().unwrap();
}

#[test]
fn a_guest_that_goes_back_has_random_numbers_still_or_is_refused() {
    let _logs = Logs::new();
    let mut vm = builder().rng(true).start().unwrap();
    let read = |vm: &Vm| sh(vm, "head -c 1000 /dev/hwrng | md5sum");
    let before = read(&vm);
    let snapshot = match vm.snapshot() {
        Err(Error::NotInSnapshot { why }) => {
            assert!(why.contains("random"), "{why}");
            assert_ne!(read(&vm), before);
            return;
        }
        taken => taken.unwrap(),
    };
    let later = read(&vm);
    vm.restore(&snapshot).unwrap();
    let again = read(&vm);
    assert!(before != later && later != again, "{before} {later} {again}");
    vm.shutdown().unwrap();
}

/// Reads and writes without end, and says so where something is not as it was written.
const BUSY: &str = r#"
    cd /mnt/data
    big=$(find /usr/bin /usr/lib -size +1M -size -3M -type f 2> /dev/null | head -n 1)
    sum=$(md5sum < "$big")
    (while :; do
        [ "$(md5sum < "$big")" = "$sum" ] || echo share >> /tmp/bad
        echo 3 > /proc/sys/vm/drop_caches
        echo x >> /tmp/rounds-share
    done) > /dev/null 2>&1 &
    (i=0; while :; do
        i=$((i + 1))
        yes $i | head -c 1000000 > file.$((i % 4)); sync
        [ "$(yes $i | head -c 1000000 | md5sum)" = "$(md5sum < file.$((i % 4)))" ] || echo disk >> /tmp/bad
        echo x >> /tmp/rounds-disk
    done) > /dev/null 2>&1 &
    (i=0; while :; do
        i=$((i + 1))
        yes $i | head -c 300000 > /shared/$$.$((i % 4))
        rm -f /shared/$$.$((i % 4 + 1))
        find /usr/share/doc -maxdepth 1 > /dev/null || echo list >> /tmp/bad
        echo x >> /tmp/rounds-list
    done) > /dev/null 2>&1 &
"#;

#[test]
fn nothing_under_way_is_lost_in_a_snapshot() {
    let _logs = Logs::new();
    let shared = TempDir::new().unwrap();
    let share: Share = format!("{}:/shared:rw", shared.path().display()).parse().unwrap();
    let disk = Disk::blank(Bytes(128 * MIB)).filesystem("ext4").named("data");
    let builder = builder().topology(vmlab::config::Topology::flat(2)).share(share).disk(disk);
    let mut vm = builder.network(vmlab::config::NetworkMode::User).start().unwrap();
    sh(&vm, BUSY);
    // What a command that is nobody's any more still has to say.
    drop(vm.command("sh").args(["-c", "sleep 1; echo end; echo end >&2"]).spawn().unwrap());
    std::thread::sleep(Duration::from_millis(500));
    let rounds = |vm: &Vm| -> Vec<u64> {
        let counts = sh(
            vm,
            "cd /tmp; touch rounds-share rounds-disk rounds-list; for i in share disk list; do wc -l < /tmp/rounds-$i; done",
        );
        counts.split_whitespace().map(|count| count.parse().unwrap()).collect()
    };
    while rounds(&vm).contains(&0) {
        std::thread::sleep(Duration::from_millis(100));
    }
    let mut snapshot = vm.snapshot().unwrap();
    for round in 0..4 {
        let before = rounds(&vm);
        std::thread::sleep(Duration::from_millis(700 * (round % 3)));
        // Each time at another moment.
        if round % 2 == 0 {
            snapshot = vm.snapshot().unwrap();
        } else {
            vm.restore(&snapshot).unwrap();
        }
        let until = Instant::now() + Duration::from_secs(60);
        while rounds(&vm).iter().zip(&before).any(|(now, before)| now <= before) {
            assert!(Instant::now() < until, "round {round}: {before:?}, {:?}", rounds(&vm));
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(sh(&vm, "cat /tmp/bad 2> /dev/null || true"), "", "round {round}");
        assert_eq!(sh(&vm, "ip -4 -o addr show scope global | wc -l"), "1");
    }
    vm.shutdown().unwrap();
}

#[test]
fn what_cannot_be_is_refused_and_said() {
    let _logs = Logs::new();
    let mut vm = builder().pluggable(false).start().unwrap();
    let plain = "nothing can be plugged into this VM";
    let disk = || Disk::blank(Bytes(64 * MIB)).named("data");
    for error in [vm.snapshot().err(), vm.attach(disk()).err(), vm.detach("data").err()] {
        let error = error.unwrap().to_string();
        assert!(error.contains(plain), "{error}");
    }
    vm.shutdown().unwrap();
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, vec![0; 1 << 20]).unwrap();
    let writes = vmlab::config::DiskWrites::Kept;
    let mut vm = builder().disk(Disk::new("file", &file).writes(writes)).start().unwrap();
    let error = vm.snapshot().unwrap_err().to_string();
    assert!(error.contains("its disk `file` is a file of the host that is written to"), "{error}");
    vm.detach("file").unwrap();
    vm.snapshot().unwrap();
    // A guest that cannot use a disk goes on without.
    let broken =
        Disk::new("broken", &file).mounted(vmlab::disk::MountPoint::At("/mnt/broken".into()));
    let error = vm.attach(broken).unwrap_err().to_string();
    assert!(error.contains("no filesystem that is known is on it"), "{error}");
    vm.attach(disk()).unwrap();
    assert_eq!(sh(&vm, "ls /dev/disk/by-id"), "virtio-data");
    vm.pause().unwrap();
    for error in [vm.snapshot().err(), vm.attach(disk().named("more")).err()] {
        assert!(matches!(error, Some(Error::Paused)), "{error:?}");
    }
    vm.resume().unwrap();
    // Neither of the host's view nor of the agent's is what another driver or namespace has.
    let hidden = "mkfs.ext4 -q /dev/disk/by-id/virtio-data; mkdir -p /tmp/place; \
                  unshare -m sh -c 'mount /dev/disk/by-id/virtio-data /tmp/place && exec sleep 1000' \
                  > /dev/null 2>&1 & until grep -q /tmp/place /proc/$!/mounts; do sleep 0.1; done; echo $!";
    let holder = sh(&vm, hidden);
    let busy = vm.detach("data").unwrap_err().to_string();
    assert!(busy.contains("is in use"), "{busy}");
    sh(&vm, &format!("kill -9 {holder}; while ls /proc/{holder}/exe; do sleep 0.1; done"));
    let snapshot = vm.snapshot().unwrap();
    let mut other = builder().start().unwrap();
    assert!(matches!(other.restore(&snapshot), Err(Error::OthersSnapshot)));
    other.shutdown().unwrap();
    let log = dir.path().join("log");
    let options = vmlab::blk::Options { record: Some(log), ..Default::default() };
    vm.attach(disk().named("recorded").served(options)).unwrap();
    let recorded = vm.snapshot().unwrap_err().to_string();
    assert!(recorded.contains("its disk `recorded` is recorded"), "{recorded}");
    assert!(matches!(vm.reset(), Err(Error::RecordedDisk { .. })));
    vm.detach("recorded").unwrap();
    let qcow2 = qcow2(dir.path());
    let raw = vm.attach(Disk::new("qcow2", &qcow2)).unwrap_err().to_string();
    assert!(raw.contains("has to be raw"), "{raw}");
    // One that is left paused ends well all the same.
    vm.pause().unwrap();
    vm.shutdown().unwrap();
    let ended = vm.snapshot().unwrap_err();
    assert!(matches!(ended, Error::Ended { .. }), "{ended}");
}

#[test]
fn a_guest_keeps_its_network_over_reset_and_restore() {
    let _logs = Logs::new();
    let net = vmlab::Lan::of(["server", "client"]).unwrap();
    let server = builder().lan(&net, "server").start().unwrap();
    let serve = "mkdir /tmp/www; echo here > /tmp/www/file; \
                 (cd /tmp/www && exec python3 -m http.server 8000) > /dev/null 2>&1 &";
    sh(&server, serve);
    let mut client = builder().lan(&net, "client").start().unwrap();
    let fetch = |client: &Vm| {
        let script = "for i in $(seq 100); do python3 -c 'import urllib.request as r; \
                      print(r.urlopen(\"http://server:8000/file\", timeout=20).read().decode())' \
                      && exit 0; sleep 0.2; done; exit 1";
        assert_eq!(sh(client, script), "here");
    };
    fetch(&client);
    let snapshot = client.snapshot().unwrap();
    fetch(&client);
    client.restore(&snapshot).unwrap();
    fetch(&client);
    client.reset().unwrap();
    fetch(&client);
    client.shutdown().unwrap();
    server.shutdown().unwrap();
}

#[test]
fn a_disk_that_is_not_raw_stays_as_it_is() {
    let dir = TempDir::new().unwrap();
    let _logs = Logs::new();
    let qcow2 = qcow2(dir.path());
    let mut vm = builder().disk(Disk::new("old", &qcow2)).start().unwrap();
    let stays = vm.detach("old").unwrap_err().to_string();
    assert!(stays.contains("no disk `old` is plugged in that could be taken out"), "{stays}");
    sh(&vm, "mkfs.ext4 -q /dev/disk/by-id/virtio-old");
    let why = vm.snapshot().unwrap_err().to_string();
    assert!(why.contains("its disk `old` is not served by vmlab itself"), "{why}");
    vm.shutdown().unwrap();
}

#[test]
fn shares_by_9p_are_in_no_snapshot() {
    let _logs = Logs::new();
    let via = vmlab::ShareVia::Only(vmlab::config::ShareTransport::NineP);
    let mut vm = builder().share_via(via).start().unwrap();
    let why = vm.snapshot().unwrap_err().to_string();
    assert!(why.contains("its shares are carried by 9p"), "{why}");
    vm.attach(Disk::blank(Bytes(64 * MIB)).filesystem("ext4").named("late")).unwrap();
    sh(&vm, "echo 1 > /mnt/late/file");
    vm.shutdown().unwrap();
}

#[test]
fn power_cuts_are_of_the_disk_that_was_recorded() {
    use vmlab::disk::PowerCuts;
    let _logs = Logs::new();
    // Alike, and without names: they differ by their UUIDs and places.
    let disk = || Disk::blank(Bytes(64 * MIB)).filesystem("ext4");
    let builder = builder().disk(disk());
    let mut cuts = PowerCuts::record(&builder, disk(), |vm| {
        sh(vm, "echo 1 > /mnt/disk0/file; sync");
        Ok::<_, Error>(())
    })
    .unwrap();
    cuts.at_random.count = 0;
    let mut found = 0;
    let states = cuts.check_by(&builder, |vm| {
        let file = sh(vm, "test ! -e /mnt/disk1/file; cat /mnt/disk0/file 2> /dev/null || true");
        found += usize::from(file == "1");
        Ok(())
    });
    let states = states.unwrap();
    assert!(states.iter().all(|state| state.failure.is_none()), "{states:?}");
    assert!(found > 0, "in {} states", states.len());
}
