//! Disk images that are built here, and that they boot.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::common::{Outcome, Site, need};

/// How long a mirror may take to deliver a system's packages, and this host to install them.
const BUILD_PATIENCE: Duration = Duration::from_secs(1200);

/// Where the root's partition starts in an image for both firmwares: 1 MiB of tables, 1 of GRUB, 14 of EFI.
const ROOT_OFFSET: u64 = 16 << 20;

const DEBIAN_12: &str = "debian:12";

/// Debian 12's image, built if it was not yet.
fn debian_12(site: &Site) -> PathBuf {
    let built = site.vmlab(["image", "build", DEBIAN_12]).patience(BUILD_PATIENCE).output();
    path_of(&built)
}

fn path_of(built: &Outcome) -> PathBuf {
    built.expect_code(0);
    let text = built.stdout_text();
    let path = text.strip_suffix('\n').unwrap_or_else(|| panic!("no line: {text}"));
    assert!(!path.contains('\n'), "{text}");
    PathBuf::from(path)
}

/// What a program of the host says of an image that it finds no fault with.
fn checked(program: &str, package: &str, args: &[&str]) -> String {
    let output = Command::new(need(program, package)).args(args).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}");
    said
}

fn root_of(image: &Path) -> String {
    format!("{}?offset={ROOT_OFFSET}", image.display())
}

/// What debugfs says of the root's files; it reads the file system itself, and mounts nothing.
fn debugfs(image: &Path, request: &str) -> String {
    checked("debugfs", "e2fsprogs", &["-R", request, &root_of(image)])
}

#[test]
fn an_image_is_whole_and_nobodys() {
    let site = Site::new();
    let image = debian_12(&site);
    let meta = image.metadata().unwrap();
    assert_eq!(meta.len(), 4 << 30);
    assert!(meta.blocks() * 512 < 1 << 30, "not sparse: {} blocks", meta.blocks());
    assert_eq!(meta.permissions().mode() & 0o222, 0, "it can be written to");

    let path = image.to_str().unwrap();
    let said = checked("sfdisk", "fdisk", &["--verify", path]);
    assert!(said.contains("No errors detected"), "{said}");
    let said = checked("sfdisk", "fdisk", &["--json", path]);
    let table: Value = serde_json::from_str(&said).unwrap();
    let parts = table["partitiontable"]["partitions"].as_array().unwrap();
    let of =
        |part: &Value| (part["name"].as_str().unwrap().to_owned(), part["start"].as_u64().unwrap());
    let mut found: Vec<_> = parts.iter().map(of).collect();
    found.sort();
    let wanted = [("bios", 2048), ("esp", 4096), ("root", ROOT_OFFSET / 512)];
    assert_eq!(found, wanted.map(|(name, start)| (name.to_owned(), start)));

    let said = checked("fsck.ext4", "e2fsprogs", &["-f", "-n", &root_of(&image)]);
    assert!(!said.contains("Fix"), "{said}");
    // Root's, the group shadow's, and set-group-id: owners came through.
    let shadow = debugfs(&image, "stat /etc/shadow");
    assert!(shadow.contains("User:     0   Group:    42"), "{shadow}");
    let expiry = debugfs(&image, "stat /usr/bin/chage");
    assert!(expiry.contains("Mode:  02755"), "{expiry}");
    assert!(debugfs(&image, "cat /etc/shadow").contains("root:*:"), "root is not locked");
    assert!(debugfs(&image, "stat /etc/machine-id").contains("Size: 0"));
    let of_the_build =
        ["/etc/resolv.conf", "/usr/sbin/policy-rc.d", "/etc/apt/apt.conf.d/00mmdebstrap"];
    for path in of_the_build {
        let said = debugfs(&image, &format!("stat {path}"));
        assert!(said.contains("not found"), "{said}");
    }
    assert!(debugfs(&image, "cat /etc/hostname").contains("bookworm\n"));
    for empty in ["/tmp", "/mnt", "/proc", "/run", "/var/lib/apt/lists/partial"] {
        let listed = debugfs(&image, &format!("ls -p {empty}"));
        let names = listed.lines().filter_map(|line| line.split('/').nth(5));
        let names: Vec<&str> = names.filter(|name| !name.is_empty()).collect();
        assert_eq!(names, [".", ".."], "{empty}: {listed}");
    }
}

#[test]
fn an_image_is_used_again_without_tools_and_network() {
    let site = Site::new();
    let image = debian_12(&site);
    let again = |args: &[&str]| {
        let args = ["image", "build"].iter().chain(args);
        site.vmlab(args).env("PATH", "/nonexistent").output()
    };
    let bare = again(&["debian:bookworm"]);
    assert_eq!(path_of(&bare), image);
    assert_eq!(bare.stderr_text(), "");
    // Another recipe is another image, and building it needs what is not here.
    let other = again(&[DEBIAN_12, "--package", "hello"]);
    other.expect_code(125);
    let said = other.stderr_text();
    assert!(said.contains("cannot be built without mmdebstrap"), "{said}");
    assert!(said.contains("sudo apt-get install mmdebstrap"), "{said}");
}

#[test]
fn a_copy_is_as_sparse_and_may_be_qcow2() {
    let site = Site::new();
    let image = debian_12(&site);
    need("qemu-img", "qemu-utils");
    let raw = site.vmlab(["image", "build", DEBIAN_12, "-o", "copy.raw"]).output();
    assert_eq!(path_of(&raw), Path::new("copy.raw"));
    let copy = site.cwd().join("copy.raw");
    checked("cmp", "diffutils", &[image.to_str().unwrap(), copy.to_str().unwrap()]);
    let blocks = |path: &Path| path.metadata().unwrap().blocks();
    assert!(blocks(&copy) <= blocks(&image) + 2048, "{} {}", blocks(&copy), blocks(&image));
    assert_eq!(copy.metadata().unwrap().permissions().mode() & 0o600, 0o600);

    let qcow2 = site.vmlab(["image", "build", DEBIAN_12, "-o", "copy.qcow2"]).output();
    assert_eq!(path_of(&qcow2), Path::new("copy.qcow2"));
    let copy = site.cwd().join("copy.qcow2");
    let said = checked(
        "qemu-img",
        "qemu-utils",
        &["compare", image.to_str().unwrap(), copy.to_str().unwrap()],
    );
    assert!(said.contains("identical"), "{said}");
    let names = std::fs::read_dir(site.cwd()).unwrap().count();
    assert_eq!(names, 2, "something else was left");
}

#[test]
fn what_cannot_be_built_is_said_at_once() {
    let site = Site::new();
    for (args, words) in [
        (&["debain:12"][..], "did you mean debian:12?"),
        (&["debian:99"], "there is no release 99"),
        (&[DEBIAN_12, "--size", "10M"], "the disk can have 1024 to"),
        (&[DEBIAN_12, "--package", "a b"], "`a b` is no name of a package"),
        (&[DEBIAN_12, "-o", "no/where.raw"], "there is no directory no"),
        (&[DEBIAN_12, "--uefi", "--bios"], "cannot be used with"),
    ] {
        let outcome = site.vmlab(["image", "build"].iter().chain(args)).output();
        outcome.expect_code(125);
        assert!(outcome.stderr_text().contains(words), "{args:?}: {}", outcome.stderr_text());
    }
}

/// Whichever signal ends it, nothing goes on and nothing stays.
#[test]
fn a_build_that_is_ended_leaves_nothing() {
    for signal in [Signal::INT, Signal::KILL] {
        let site = Site::new();
        let (temporary, cache) = (site.path().join("tmp"), site.path().join("cache"));
        std::fs::create_dir(&temporary).unwrap();
        let running = site
            .vmlab(["image", "build", DEBIAN_12, "--bios"])
            .env("TMPDIR", &temporary)
            .env("VMLAB_CACHE_DIR", &cache)
            .patience(BUILD_PATIENCE)
            .start();
        running.wait_stderr("downloading packages");
        let below = running.process.descendants();
        assert!(!below.is_empty());
        running.signal(signal);
        let deadline = Instant::now() + Duration::from_secs(60);
        for process in &below {
            assert!(process.wait_gone(deadline), "{} goes on after {signal:?}", process.pid);
        }
        drop(running);
        let names = std::fs::read_dir(&temporary).unwrap().map(|entry| entry.unwrap().file_name());
        let mut left: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        // A directory for one key, which mmdebstrap does not remove when a signal ends it.
        left.retain(|name| !name.starts_with("mmdebstrap.gpghome."));
        assert!(left.is_empty(), "{signal:?} left {left:?}");
    }
}
