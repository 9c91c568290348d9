//! Disks with filesystems: made once in a VM, copied for each run.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use crate::common::{CLOUD, Outcome, Site, Vmlab, kernel, need};

/// What is said when a disk is made, and only then.
const MADE: &str = "making a disk";

/// A place with a cache of its own for disks; kernels and snapshots are everybody's.
struct Place {
    site: Site,
    cache: PathBuf,
}

impl Place {
    fn new() -> Self {
        let site = Site::new();
        let cache = site.path().join("cache");
        Self::at(site, cache)
    }

    fn at(site: Site, cache: PathBuf) -> Self {
        kernel(CLOUD[0]);
        let shared = site.vmlab(["cache", "list", "--json"]).output();
        let shared: serde_json::Value = serde_json::from_slice(&shared.stdout).unwrap();
        let shared = PathBuf::from(shared["root"].as_str().unwrap());
        std::fs::create_dir_all(&cache).unwrap();
        for kind in ["kernels", "boot-images", "initramfs", "snapshots", "configs"] {
            std::fs::create_dir_all(shared.join(kind)).unwrap();
            std::os::unix::fs::symlink(shared.join(kind), cache.join(kind)).unwrap();
        }
        Self { site, cache }
    }

    fn prepare(&self, disks: &[&str], script: &str) -> Vmlab {
        let mut args = vec!["run", "-k", CLOUD[0]];
        for disk in disks {
            args.extend(["--disk", disk]);
        }
        args.extend(["--", "sh", "-c", script]);
        self.site.vmlab(args).env("VMLAB_CACHE_DIR", &self.cache)
    }

    fn run(&self, disks: &[&str], script: &str) -> Outcome {
        self.prepare(disks, script).output()
    }

    /// The file of the only template.
    fn template(&self) -> PathBuf {
        let entries =
            self.cache.join("disks").read_dir().unwrap().map(|entry| entry.unwrap().path());
        let mut entries: Vec<_> = entries.filter(|path| path.join("disk.raw").exists()).collect();
        assert_eq!(entries.len(), 1, "{entries:?}");
        entries.remove(0).join("disk.raw")
    }
}

fn made(outcome: &Outcome) -> bool {
    outcome.stderr_text().contains(MADE)
}

#[test]
fn a_filesystem_is_made_once_and_each_run_has_its_own() {
    for program in ["mkfs.btrfs", "mkfs.xfs", "mkfs.ext4"] {
        need(program, "btrfs-progs xfsprogs e2fsprogs");
    }
    let place = Place::new();
    let disks =
        ["size=256M,fs=btrfs,name=data", "size=320M,fs=xfs", "size=64M,fs=ext4,mount=/srv/e"];
    // BTRFS_SUPER_MAGIC, XFS_SUPER_MAGIC, EXT4_SUPER_MAGIC of linux/magic.h.
    let script = "stat -f -c %t /mnt/data /mnt/disk1 /srv/e
        for dir in /mnt/data /mnt/disk1 /srv/e; do
            test ! -e $dir/sentinel && echo of this run > $dir/sentinel && sync && cat $dir/sentinel
        done; ls /dev/disk/by-id";
    let wanted = "9123683e\n58465342\nef53\nof this run\nof this run\nof this run\n\
                  virtio-data\nvirtio-disk1\nvirtio-disk2\n";
    let cold = place.run(&disks, script);
    assert_eq!(cold.expect_code(0).stdout_text(), wanted, "{}", cold.stderr_text());
    assert!(made(&cold));
    let warm = place.run(&disks, script);
    assert_eq!(warm.expect_code(0).stdout_text(), wanted, "{}", warm.stderr_text());
    assert!(!made(&warm), "{}", warm.stderr_text());
    // What made them is known.
    let listed = place.site.vmlab(["disk", "ls"]).env("VMLAB_CACHE_DIR", &place.cache).output();
    let listed = listed.expect_code(0).stdout_text();
    for wanted in ["256 MiB", "btrfs-progs", "320 MiB", "mkfs.xfs version", "64 MiB", "mke2fs"] {
        assert!(listed.contains(wanted), "{listed}");
    }
}

#[test]
fn all_that_can_be_said_of_a_disk_is_so_in_the_guest() {
    let place = Place::new();
    let content = place.site.path().join("content");
    std::fs::create_dir_all(content.join("dir")).unwrap();
    std::fs::write(content.join("dir/file"), "of the host\n").unwrap();
    std::os::unix::fs::symlink("dir/file", content.join("link")).unwrap();
    let uuid = "01234567-89ab-cdef-0123-456789abcdef";
    let of_dir = format!(
        "size=64M,fs=ext4,name=a,label=lab,uuid={uuid},mkfs-option=-m,mkfs-option=0,\
         mount-option=noatime,content={}",
        content.display()
    );
    let tar = place.site.path().join("content.tar.gz");
    let packed =
        Command::new("tar").arg("-C").arg(&content).arg("-czf").arg(&tar).arg(".").status();
    assert!(packed.unwrap().success());
    let of_tar = format!("size=128M,fs=btrfs,name=b,read-only,content={}", tar.display());
    let disks =
        [&of_dir, &of_tar, "size=32M,fs=swap", "size=1M,name=raw", "size=64M,fs=vfat,name=v"];
    let script = "for at in /mnt/a /mnt/b; do cat $at/link; done
        grep -c ' /mnt/a ext4 rw,noatime' /proc/mounts; touch /mnt/b/x || echo read-only
        dumpe2fs -h /dev/disk/by-id/virtio-a 2>/dev/null | grep -e name: -e UUID -e 'Reserved block count'
        grep -c partition /proc/swaps; blockdev --getsize64 /dev/disk/by-id/virtio-raw
        tr -d '\\0' < /dev/disk/by-id/virtio-raw | wc -c; grep -o '/mnt/v vfat rw' /proc/mounts";
    let outcome = place.run(&disks, script);
    let said = outcome.expect_code(0).stdout_text();
    let said: Vec<&str> = said.lines().map(|line| line.rsplit("  ").next().unwrap()).collect();
    let wanted = [
        "of the host",
        "of the host",
        "1",
        "read-only",
        "lab",
        uuid,
        "0",
        "1",
        "1048576",
        "0",
        "/mnt/v vfat rw",
    ];
    assert_eq!(said, wanted, "{}", outcome.stderr_text());
    // What is in the directory is part of what it is.
    std::fs::write(content.join("dir/file"), "another\n").unwrap();
    let changed = place.run(&[&of_dir], "cat /mnt/a/link");
    assert_eq!(changed.expect_code(0).stdout_text(), "another\n");
    assert!(made(&changed));
}

#[test]
fn what_fails_with_a_disk_fails_the_run() {
    let place = Place::new();
    place.run(&["size=64M,fs=nosuch"], "true").expect_code(125).expect_stderr(&["mkfs.nosuch"]);
    let small = place.run(&["size=1M,fs=btrfs"], "true");
    small.expect_code(125).expect_stderr(&[
        "a disk cannot be made",
        "mkfs.btrfs -q -f",
        "too small",
    ]);
    let option = place.run(&["size=64M,fs=ext4,mkfs-option=--nonsense"], "true");
    option.expect_code(125).expect_stderr(&["mkfs.ext4 -q -F --nonsense", "invalid option"]);
    // No failure left anything that looks like a disk.
    let entries = place.cache.join("disks").read_dir().unwrap();
    let left = entries
        .filter(|entry| !entry.as_ref().unwrap().file_name().to_str().unwrap().starts_with('.'));
    assert_eq!(left.count(), 0);
    let mount = place.run(&["size=64M,fs=ext4,mount-option=no_such_option"], "true");
    mount
        .expect_code(125)
        .expect_stderr(&["mount the disk `disk0` at /mnt/disk0", "Invalid argument"]);
    let two = ["size=64M,fs=ext4,name=a", "size=64M,name=a"];
    place.run(&two, "true").expect_code(125).expect_stderr(&["`a`"]);
    let odd = place.run(&["size=64M,fz=ext4"], "true");
    odd.expect_code(125).expect_stderr(&["--disk", "`fz` is no key: did you mean `fs`?"]);
}

#[test]
fn two_alike_get_on_with_each_other_and_a_copy_can_be_kept() {
    let place = Place::new();
    let kept = place.site.path().join("kept");
    let keep = format!("size=128M,fs=btrfs,name=a,keep={}", kept.join("mine.raw").display());
    let script = "echo one > /mnt/a/x; echo two > /mnt/b/x; cat /mnt/*/x";
    let outcome = place.run(&[&keep, "size=128M,fs=btrfs,name=b"], script);
    assert_eq!(outcome.expect_code(0).stdout_text(), "one\ntwo\n", "{}", outcome.stderr_text());
    let again = format!("path={},mount=/mnt/again", kept.join("mine.raw").display());
    let outcome = place.run(&[&again], "cat /mnt/again/x");
    assert_eq!(outcome.expect_code(0).stdout_text(), "one\n", "{}", outcome.stderr_text());
    // All of a run, in a directory; what is there is not written over.
    let args = ["run", "-q", "-k", CLOUD[0], "--keep", kept.to_str().unwrap()];
    let disk = ["--disk", "size=128M,fs=btrfs,name=b", "--", "sh", "-c", "echo kept > /mnt/b/x"];
    let run = || {
        let vmlab = place.site.vmlab([&args[..], &disk].concat());
        vmlab.env("VMLAB_CACHE_DIR", &place.cache).output()
    };
    run().expect_code(0);
    let kept_too = format!("path={},mount=/mnt/again", kept.join("b.raw").display());
    assert_eq!(place.run(&[&kept_too], "cat /mnt/again/x").stdout_text(), "kept\n");
    run().expect_code(125).expect_stderr(&["b.raw", "File exists"]);
}

#[test]
fn damage_is_found_and_mended() {
    let place = Place::new();
    let disk = ["size=64M,fs=ext4"];
    place.run(&disk, "true").expect_code(0);
    let harm = |at: u64, bytes: &[u8]| {
        let path = place.template();
        let mut permissions = path.metadata().unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
        std::fs::set_permissions(&path, permissions).unwrap();
        std::fs::File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
    };
    let verify = |code| {
        let vmlab = place.site.vmlab(["disk", "verify"]).env("VMLAB_CACHE_DIR", &place.cache);
        vmlab.output().expect_code(code).stdout_text()
    };
    // Its superblock, and something that only a look at all of it shows.
    for (at, bytes) in [(1080, &b"xx"[..]), (40 << 20, b"flipped")] {
        verify(0);
        harm(at, bytes);
        let said = verify(1);
        assert!(said.contains("damaged: disks/"), "{said}");
        let mended = place.run(&disk, "touch /mnt/disk0/x");
        mended.expect_code(0);
        assert!(made(&mended), "{at}");
    }
    let key = place.template().parent().unwrap().file_name().unwrap().to_owned();
    let key = &key.to_str().unwrap()[..8];
    let remove = place.site.vmlab(["disk", "rm", key]).env("VMLAB_CACHE_DIR", &place.cache);
    assert!(remove.output().expect_code(0).stdout_text().starts_with(&format!("removed {key}")));
    assert!(
        !place
            .cache
            .join("disks")
            .read_dir()
            .unwrap()
            .any(|entry| { entry.unwrap().path().join("disk.raw").exists() })
    );
}

#[test]
fn many_at_once_make_one_and_a_killed_one_leaves_nothing() {
    let place = Place::new();
    let disk = ["size=64M,fs=ext4,name=a"];
    // One is killed in the middle.
    let running = place.prepare(&disk, "true").start();
    let staging = place.cache.join("disks/.staging");
    let begun = || staging.read_dir().is_ok_and(|mut dir| dir.next().is_some());
    while !begun() {
        std::thread::sleep(Duration::from_millis(5));
    }
    running.process.signal(Signal::KILL);
    let _ = running.finish();
    let running: Vec<_> = (0..6)
        .map(|_| place.prepare(&disk, "echo ok > /mnt/a/x && cat /mnt/a/x").start())
        .collect();
    let outcomes: Vec<_> = running.into_iter().map(|running| running.finish()).collect();
    for outcome in &outcomes {
        assert_eq!(outcome.expect_code(0).stdout_text(), "ok\n", "{}", outcome.stderr_text());
    }
    assert_eq!(outcomes.iter().filter(|outcome| made(outcome)).count(), 1);
    assert!(staging.read_dir().unwrap().next().is_none(), "nothing is left in the making");
}

/// A filesystem on a loop device, mounted; taken away when this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(site: &Site, mkfs: &str, size: &str) -> Self {
        let (file, dir) = (site.path().join("loop.raw"), site.path().join("loop"));
        std::fs::create_dir(&dir).unwrap();
        let script = format!(
            "truncate -s {size} {0} && {mkfs} {0} && mount -o loop {0} {1}",
            file.display(),
            dir.display()
        );
        let made = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Self(dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A run whose copy of a disk is made in this way, and kept.
fn keeping(place: &Place, how: &str, keep: &Path) -> Outcome {
    let disk = format!("size=64M,fs=ext4,name=a,clone={how},keep={}", keep.display());
    place.run(&[&disk], "echo x > /mnt/a/x")
}

#[test]
fn disks_are_copied_or_overlaid_where_blocks_cannot_be_shared() {
    let place = Place::new();
    // The temporary directory's: whether it can is not known, so both ways are asked for by name.
    let copy = place.site.path().join("copy.raw");
    keeping(&place, "copy", &copy).expect_code(0);
    let elsewhere = tempfile::Builder::new().prefix("vmlab-e2e-").tempdir_in("/dev/shm").unwrap();
    let refused = keeping(&place, "reflink", &elsewhere.path().join("a.raw"));
    refused.expect_code(125).expect_stderr(&["share the blocks of", "clone=auto does without"]);
    let overlay = place.run(&["size=64M,fs=ext4,name=a,clone=overlay"], "touch /mnt/a/x");
    overlay.expect_code(0);
}

/// Needs root, to mount a file system that can.
#[test]
fn blocks_are_shared_where_the_file_system_can() {
    let filefrag = need("filefrag", "e2fsprogs");
    let site = Site::new();
    let mounted = Mounted::new(&site, "mkfs.btrfs -q", "1G");
    let cache = mounted.0.join("cache");
    let place = Place::at(site, cache);
    let clone = mounted.0.join("clone.raw");
    keeping(&place, "reflink", &clone).expect_code(0);
    // FIEMAP_EXTENT_SHARED, of the guest's copy that has been written to meanwhile.
    let extents = Command::new(filefrag).arg("-v").arg(&clone).output().unwrap();
    let extents = String::from_utf8_lossy(&extents.stdout).into_owned();
    assert!(extents.contains("shared"), "{extents}");
    // Where nothing is said of it, the same.
    let auto = mounted.0.join("auto.raw");
    keeping(&place, "auto", &auto).expect_code(0);
    let extents = Command::new("filefrag").arg("-v").arg(&auto).output().unwrap();
    assert!(String::from_utf8_lossy(&extents.stdout).contains("shared"));
}

/// Needs root, to mount a file system that is full.
#[test]
fn a_full_disk_costs_the_copy_and_not_the_run() {
    let site = Site::new();
    let mounted = Mounted::new(&site, "mkfs.ext4 -q -m 0", "24M");
    let cache = mounted.0.join("cache");
    let place = Place::at(site, cache);
    let disk = ["size=256M,fs=ext4,name=a,mkfs-option=-E,mkfs-option=lazy_itable_init=0"];
    place.run(&disk, "true").expect_code(0);
    // All that is left.
    let fill = mounted.0.join("fill");
    let _ =
        Command::new("sh").args(["-c", &format!("cat /dev/zero > {}", fill.display())]).status();
    let full = place.run(&disk, "echo x > /mnt/a/x && cat /mnt/a/x");
    assert_eq!(full.expect_code(0).stdout_text(), "x\n");
    let forced = place.run(
        &["size=256M,fs=ext4,name=a,mkfs-option=-E,mkfs-option=lazy_itable_init=0,clone=copy"],
        "true",
    );
    forced.expect_code(125).expect_stderr(&["clone=overlay takes no space", "No space left"]);
    let other = place.run(&["size=128M,fs=ext4,name=b"], "true");
    other.expect_code(125).expect_stderr(&["No space left"]);
}

#[test]
fn targets_have_disks() {
    let site = Site::new();
    kernel(CLOUD[0]);
    let file = r#"
[defaults]
kernel = "debian:6.12-cloud"
[disks.data]
size = "64M"
fs = "ext4"
[[target]]
name = "named"
disks = ["data"]
command = "stat -f -c %t /mnt/data"
[[target]]
name = "its own"
command = "stat -f -c %t /mnt/own && ! touch /mnt/own/x"
[[target.disk]]
name = "own"
size = "128M"
fs = "btrfs"
read-only = true
[[matrix]]
name = "each"
vars = { fs = ["ext4", "btrfs"] }
disks = [{ name = "m", size = "128M", fs = "{fs}" }]
command = "grep -c \" /mnt/m {fs} \" /proc/mounts"
"#;
    std::fs::write(site.cwd().join("vmlab.toml"), file).unwrap();
    let outcome = site.vmlab(["test", "--output", "all"]).output();
    let said = outcome.expect_code(0).stdout_text();
    assert!(said.contains("ef53\n") && said.contains("9123683e\n"), "{said}");
}
