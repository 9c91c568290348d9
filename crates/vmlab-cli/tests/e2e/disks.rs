//! `--disk`: disks of the guest by their names, and what becomes of what it writes to them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::snapshots::Cold;
use crate::common::{DEBIAN_6_1, DEBIAN_6_12, DEBIAN_SID, Site, kernel, need};

/// Runs a program of the host.
fn host(program: &str, package: &str, args: &[&str]) -> String {
    let output = Command::new(need(program, package)).args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// A raw file with an ext4 that has `file` in it, saying `text`.
fn ext4(dir: &Path, name: &str, text: &str) -> PathBuf {
    let (content, image) = (dir.join(format!("{name}-content")), dir.join(name));
    std::fs::create_dir(&content).unwrap();
    std::fs::write(content.join("file"), text).unwrap();
    let (from, to) = (content.to_str().unwrap(), image.to_str().unwrap());
    host("mke2fs", "e2fsprogs", &["-q", "-t", "ext4", "-d", from, to, "8M"]);
    image
}

/// What the host finds in a file of an ext4.
fn in_ext4(image: &Path, file: &str) -> String {
    host("debugfs", "e2fsprogs", &["-R", &format!("cat {file}"), image.to_str().unwrap()])
}

fn qcow2_of(raw: &Path) -> PathBuf {
    let image = raw.with_extension("qcow2");
    let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
    host("qemu-img", "qemu-utils", &["convert", "-f", "raw", "-O", "qcow2", from, to]);
    image
}

const MOUNT: &str = "mount /dev/disk/by-id/virtio-disk0 /mnt && cat /mnt/file";

/// Mounts the disk, changes it, and says whether that worked.
const CHANGE: &str = "mount /dev/disk/by-id/virtio-disk0 /mnt && cat /mnt/file; \
    if echo changed > /mnt/file; then cat /mnt/file; else echo refused; fi 2>/dev/null";

#[test]
fn what_is_written_is_discarded_kept_or_refused() {
    let cold = Cold::new();
    let raw = ext4(cold.site.path(), "data.raw", "as it was\n");
    let qcow2 = qcow2_of(&raw);
    let mut runs = 0;
    for image in [raw, qcow2] {
        let path = image.to_str().unwrap();
        let before = std::fs::read(&image).unwrap();
        for (mode, says) in [
            ("", "as it was\nchanged\n"),
            (":discard", "as it was\nchanged\n"),
            (":ro", "as it was\nrefused\n"),
        ] {
            let ran = cold.sh(&["--disk", &format!("{path}{mode}")], CHANGE);
            // The first one takes the snapshot that all others go on from.
            match runs {
                0 => ran.expect_taken(),
                _ => ran.expect_restored(),
            };
            runs += 1;
            let said = ran.text();
            assert_eq!(said, says, "{path}{mode}: {}", ran.outcome.stderr_text());
            assert!(std::fs::read(&image).unwrap() == before, "{path}{mode} was written to");
        }
        let kept = format!("{path}:rw");
        cold.sh(&["--disk", &kept], CHANGE).expect_restored().expect_stdout("as it was\nchanged\n");
        assert!(std::fs::read(&image).unwrap() != before);
        cold.sh(&["--disk", path], MOUNT).expect_restored().expect_stdout("changed\n");
    }
    cold.entry();
}

#[test]
fn a_filesystem_that_is_kept_is_clean_at_the_end() {
    let site = Site::new();
    let image = ext4(site.path(), "data.raw", "as it was\n");
    let disk = format!("{}:rw", image.display());
    // Mounted twice, and in use when the VM ends.
    let script = "d=/dev/disk/by-id/virtio-disk0; mkdir '/tmp/a b' && mount $d /mnt && mount $d '/tmp/a b' &&
        echo changed > /mnt/file && { sleep 1000 > '/tmp/a b/busy' 2>&1 & }";
    site.sh(&["--disk", &disk], script).output().expect_stdout("");
    // An ext4 that would have to be recovered says so, and has what was written in its journal only.
    let head = host("dumpe2fs", "e2fsprogs", &["-h", image.to_str().unwrap()]);
    assert!(head.contains("Filesystem state:         clean"), "{head}");
    assert!(!head.contains("needs_recovery"), "{head}");
    assert_eq!(in_ext4(&image, "/file"), "changed\n");
}

#[test]
fn disks_keep_their_names_with_and_without_a_snapshot() {
    let cold = Cold::new();
    let site = cold.site.path();
    let images =
        [("first", "one\n"), ("second", "two\n")].map(|(name, text)| ext4(site, name, text));
    let [one, two] = images.map(|image| image.to_str().unwrap().to_owned());
    let named = |name: &str, path: &str| format!("{path}:{name}");
    // In either order, whatever the kernel calls them.
    let script = "for name in a-disk Disk_2; do mount -o ro /dev/disk/by-id/virtio-$name /mnt &&
        cat /mnt/file && umount /mnt || exit 1; done; ls /dev/disk/by-id";
    let disks = [named("a-disk", &one), named("Disk_2", &two)];
    for (first, second) in [(0, 1), (1, 0)] {
        let options = ["--disk", &disks[first], "--disk", &disks[second]];
        let wanted = "one\ntwo\nvirtio-Disk_2\nvirtio-a-disk\n";
        for by in ["no snapshot", "snapshot", "snapshot"] {
            let options = match by {
                "no snapshot" => [&options[..], &["--no-snapshot"]].concat(),
                _ => options.to_vec(),
            };
            let ran = cold.sh(&options, script);
            ran.expect_stdout(wanted);
            assert_eq!(ran.has("restore"), by == "snapshot", "{:?}", ran.phases);
        }
    }
    // Without names, they are numbered.
    let ran = cold.sh(&["--disk", &one, "--disk", &two], "ls /dev/disk/by-id");
    ran.expect_restored().expect_stdout("virtio-disk0\nvirtio-disk1\n");
}

#[test]
fn partitions_have_names_too() {
    let site = Site::new();
    // A partition table as the PC's BIOS has it: entries of 16 bytes from byte 446 on, of which byte 4 is the
    // type, 8 to 11 the first sector, and 12 to 15 their number.
    let mut disk = vec![0; 4 << 20];
    for (entry, first, count) in [(0, 2048_u32, 1024_u32), (2, 4096, 2048)] {
        let at = 446 + 16 * entry;
        disk[at + 4] = 0x83;
        disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&count.to_le_bytes());
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let marker = 2 * 1024 * 1024;
    disk[marker..marker + 6].copy_from_slice(b"third\n");
    let image = site.path().join("parts");
    std::fs::write(&image, disk).unwrap();
    let script = "ls /dev/disk/by-id; head -c 6 /dev/disk/by-id/virtio-parts-part3";
    let options = ["--disk", &format!("{}:parts", image.display())];
    let wanted = "virtio-parts\nvirtio-parts-part1\nvirtio-parts-part3\nthird\n";
    site.sh(&options, script).output().expect_stdout(wanted);
}

#[test]
fn vms_at_once_can_have_one_disk() {
    let cold = Cold::new();
    let image = ext4(cold.site.path(), "data.raw", "as it was\n");
    let path = image.to_str().unwrap();
    let before = std::fs::read(&image).unwrap();
    // Each waits until the other has written, too, and finds its own.
    let script = |own: &str, other: &str| {
        format!(
            "mount /dev/disk/by-id/virtio-disk0 /mnt && echo {own} > /mnt/file && sync && touch {own}
            i=0; until [ -e {other} ]; do i=$((i + 1)); [ $i -lt 600 ] || exit 9; sleep 0.1; done
            echo 3 > /proc/sys/vm/drop_caches; cat /mnt/file"
        )
    };
    let options = ["--disk", path];
    let one = cold.start(&options, ["sh", "-c", &script("one", "two")]);
    let two = cold.start(&options, ["sh", "-c", &script("two", "one")]);
    one.finish().expect_stdout("one\n");
    two.finish().expect_stdout("two\n");
    assert!(std::fs::read(&image).unwrap() == before);

    // Two that both keep what they write would damage it.
    let kept = format!("{path}:rw");
    let (first, _) = cold.prepare(&["-q", "--disk", &kept], ["sh", "-c", "echo here; read line"]);
    let first = first.open_stdin().start();
    first.wait_stdout("here\n");
    let second = cold.start(&["--disk", &kept], ["echo", "two"]).finish();
    second.outcome.expect_code(125).expect_stderr(&["a disk cannot be used", "lock", path]);
    first.finish();
    // A file that is no image, though it begins as one.
    std::fs::write(&image, b"QFI\xfb").unwrap();
    let damaged = cold.run(&options, ["true"]);
    damaged.outcome.expect_code(125).expect_stderr(&["not a disk image", path]);
    std::fs::write(&image, before).unwrap();
    cold.run(&options, ["true"]).expect_restored();
}

#[test]
fn every_kernel_has_disks() {
    for (spec, option) in [(DEBIAN_6_1, "--machine=q35"), (DEBIAN_SID, "--machine=microvm")] {
        let site = Site::new();
        let image = ext4(site.path(), "data.raw", "of the disk\n");
        for snapshot in [&[][..], &["--no-snapshot"]] {
            let options = [&["--disk", image.to_str().unwrap(), option], snapshot].concat();
            let ran = site.run_with(spec, &options, ["sh", "-c", MOUNT]).output();
            ran.expect_stdout("of the disk\n");
        }
    }
}

#[test]
fn disks_that_cannot_be_are_refused() {
    let site = Site::new();
    std::fs::write(site.cwd().join("a"), [0; 512]).unwrap();
    let said = |disks: &[&str], wanted: &[&str]| {
        let options: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
        site.run(&options, ["true"]).output().expect_code(125).expect_stderr(wanted);
    };
    said(&["gone"], &["open the disk gone", "No such file"]);
    said(&["."], &["is a directory, not a disk image"]);
    said(&["a:b/c"], &["`a:b/c` is not a disk", "`b/c` cannot be a disk's name"]);
    said(&["a:x:y:rw"], &["too many parts", "FILE[:NAME][:ro|rw|discard|clone]"]);
    said(&["a:x", "a:x"], &["two disks have the name `x`"]);
}

#[test]
fn a_disk_that_does_not_appear_is_named() {
    let site = Site::new();
    std::fs::write(site.cwd().join("a"), [0; 512]).unwrap();
    // The driver cannot begin.
    let blacklist = ["--append", "initcall_blacklist=virtio_blk_init"];
    let options = [&["--disk", "a:lost", "--no-snapshot"][..], &blacklist].concat();
    let ran = site.run(&options, ["true"]).output();
    ran.expect_code(125).expect_stderr(&["find the disk `lost`", "virtio disks"]);
}

#[test]
fn targets_have_disks() {
    kernel(DEBIAN_6_12);
    let site = Site::new();
    let image = ext4(&site.cwd(), "data.raw", "of the disk\n");
    let log = site.cwd().join("log.raw");
    std::fs::write(&log, vec![0; 1 << 20]).unwrap();
    let text = r#"
[disks.data]
path = "data.raw"
[disks.log]
path = "./log.raw"
mode = "rw"

[defaults]
kernel = "debian:6.12"
memory = "512M"
disks = ["data"]

[[matrix]]
name = "reads"
vars = { n = [1, 2] }
command = """
mount /dev/disk/by-id/virtio-data /mnt && grep -x 'of the disk' /mnt/file && echo {n} > /mnt/file"""

[[target]]
name = "writes"
disks = ["log", "data"]
command = "echo from the guest > /dev/disk/by-id/virtio-log && ls /dev/disk/by-id/virtio-data"

[[target]]
name = "none"
disks = []
command = "! ls /dev/disk"
"#;
    std::fs::write(site.cwd().join("vmlab.toml"), text).unwrap();
    let before = std::fs::read(&image).unwrap();
    site.vmlab(["test", "-j", "2"]).output().expect_code(0);
    assert!(std::fs::read(&image).unwrap() == before);
    assert!(std::fs::read(&log).unwrap().starts_with(b"from the guest\n"));
}
