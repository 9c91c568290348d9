//! `vmlab cache`, on a cache of the test's own.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{CLOUD, Outcome, Site, Vmlab, kernel};
use serde_json::Value;

/// The kernel that they boot: the smallest there is.
const KERNEL: &str = CLOUD[0];

/// A place with a copy of the stored kernel as its only cache entry.
struct Cached {
    site: Site,
}

impl Cached {
    fn new() -> Self {
        let site = Site::new();
        let inspected = site.vmlab(["kernel", "inspect", kernel(KERNEL), "--json"]).output();
        let json: Value = serde_json::from_slice(&inspected.expect_code(0).stdout).unwrap();
        let key = json["kernel"]["origin"]["entry"].as_str().unwrap();
        let image = Path::new(json["kernel"]["boot_image"].as_str().unwrap());
        let entry = image.ancestors().find(|dir| dir.ends_with(key)).unwrap();
        let kernels = site.path().join("cache/kernels");
        std::fs::create_dir_all(&kernels).unwrap();
        let copied =
            Command::new("cp").args(["-a", "--reflink=auto"]).arg(entry).arg(&kernels).status();
        assert!(copied.unwrap().success());
        Self { site }
    }

    fn dir(&self) -> PathBuf {
        self.site.path().join("cache")
    }

    fn cache<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Outcome {
        let all = ["cache"].into_iter().chain(args);
        self.site.vmlab(all).env("VMLAB_CACHE_DIR", self.dir()).output()
    }

    fn run(&self, script: &str) -> Vmlab {
        // Snapshots have tests of their own.
        let options = ["--no-snapshot"];
        self.site
            .run_with(KERNEL, &options, ["sh", "-c", script])
            .env("VMLAB_CACHE_DIR", self.dir())
    }

    fn list(&self) -> Vec<Value> {
        let outcome = self.cache(["list", "--json"]);
        let json: Value = serde_json::from_slice(&outcome.expect_code(0).stdout).unwrap();
        let entries = json["entries"].as_array().unwrap().clone();
        let sum: u64 = entries.iter().map(|entry| entry["bytes"].as_u64().unwrap()).sum();
        assert_eq!(json["bytes"].as_u64(), Some(sum));
        entries
    }

    /// The kinds of all entries, sorted.
    fn kinds(&self) -> Vec<String> {
        let kind = |entry: &Value| entry["kind"].as_str().unwrap().to_owned();
        let mut kinds: Vec<String> = self.list().iter().map(kind).collect();
        kinds.sort();
        kinds
    }

    fn path_of(&self, kind: &str) -> PathBuf {
        let entries = self.list();
        let entry = entries.iter().find(|entry| entry["kind"] == kind).unwrap();
        PathBuf::from(entry["path"].as_str().unwrap())
    }
}

const ALL: [&str; 3] = ["boot-images", "initramfs", "kernels"];

#[test]
fn what_a_running_vm_uses_is_listed_and_kept() {
    let cached = Cached::new();
    let mut running = cached.run("echo up; read line; echo $line").open_stdin().start();
    running.wait_stdout("up\n");
    let entries = cached.list();
    assert_eq!(cached.kinds(), ALL);
    for entry in &entries {
        assert_eq!(entry["in_use"], true, "{entry}");
        assert!(entry["bytes"].as_u64().unwrap() > 500_000, "{entry}");
    }
    let cleared = cached.cache(["clear"]).expect_code(0).stdout_text();
    assert!(cleared.contains("kernels: 0 entries removed; 1 entry in use kept"), "{cleared}");
    let collected = cached.cache(["gc", "--max", "1K"]).expect_code(0).stdout_text();
    assert!(collected.contains("0 entries removed; 3 entries in use kept"), "{collected}");
    assert_eq!(cached.kinds(), ALL);

    running.stdin.take().unwrap().write_all(b"still here\n").unwrap();
    running.finish().expect_stdout("up\nstill here\n");
    assert!(cached.list().iter().all(|entry| entry["in_use"] == false));
    let table = cached.cache(["list"]).expect_code(0).stdout_text();
    assert!(table.starts_with("KIND") && table.contains("3 entries, "), "{table}");

    // The kernel stays: it would have to be fetched anew.
    let cleared = cached.cache(["clear", "boot-images", "initramfs"]).expect_code(0).stdout_text();
    assert!(cleared.contains("boot-images: 1 entry removed, "), "{cleared}");
    assert!(cleared.contains("freed ") && !cleared.contains("in use"), "{cleared}");
    assert_eq!(cached.kinds(), ["kernels"]);
    cached.run("echo made anew").output().expect_stdout("made anew\n");
    assert_eq!(cached.kinds(), ALL);

    // The least recently used go first; the kernel was taken into use before the others.
    let others = cached.list().into_iter().filter(|entry| entry["kind"] != "kernels");
    let room: u64 = others.map(|entry| entry["bytes"].as_u64().unwrap()).sum();
    let max = format!("{}K", room / 1024 + 1);
    let cleared = cached.cache(["gc", "--max", &max]).expect_code(0).stdout_text();
    assert!(cleared.contains("all kinds: 1 entry removed, "), "{cleared}");
    assert_eq!(cached.kinds(), ["boot-images", "initramfs"]);
    cached.cache(["clear"]).expect_code(0);
    assert!(cached.list().is_empty());
}

#[test]
fn damage_is_found_and_repaired() {
    let cached = Cached::new();
    cached.run("true").output().expect_code(0);
    let fine = cached.cache(["verify"]);
    fine.expect_code(0).expect_stdout("3 entries verified, 0 damaged\n");

    let archive = cached.path_of("initramfs").join("initramfs.cpio");
    let file = std::fs::OpenOptions::new().write(true).open(&archive).unwrap();
    file.set_len(1000).unwrap();
    let module = walk(&cached.path_of("kernels")).into_iter().find(|path| is_module(path)).unwrap();
    std::fs::remove_file(&module).unwrap();
    let found = cached.cache(["verify"]).expect_code(1).stdout_text();
    assert!(
        found.contains("damaged: initramfs/") && found.contains("1000 bytes instead"),
        "{found}"
    );
    assert!(found.contains("damaged: kernels/linux-image-6.12"), "{found}");
    assert!(found.contains(&*module.file_name().unwrap().to_string_lossy()), "{found}");
    assert!(found.ends_with("3 entries verified, 2 damaged\n"), "{found}");

    // One byte in the middle, which no size tells.
    let image = cached.path_of("boot-images").join("vmlinux");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let (mut byte, at) = ([0], file.metadata().unwrap().len() / 2);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
    let outcome = cached.cache(["verify", "boot-images", "--json"]);
    let json: Value = serde_json::from_slice(&outcome.expect_code(1).stdout).unwrap();
    assert_eq!((&json["verified"], &json["damaged"][0]["removed"]), (&1.into(), &false.into()));
    let flaw = json["damaged"][0]["flaw"].as_str().unwrap();
    assert_eq!(flaw, "the content of vmlinux has changed");
    let repaired = cached.cache(["verify", "--repair", "initramfs"]).expect_code(0).stdout_text();
    assert!(repaired.contains("removed: initramfs/"), "{repaired}");
    assert_eq!(cached.kinds(), ["boot-images", "kernels"]);

    let outcome = cached.cache(["verify", "initrds"]);
    outcome.expect_code(125).expect_stderr(&["no kind `initrds`", "boot-images", "remembered"]);
    cached.cache(["gc", "--max", "much"]).expect_code(125).expect_stderr(&["--max", "not a size"]);
}

#[test]
fn a_kernel_that_is_replaced_is_not_taken_for_the_one_before() {
    let cached = Cached::new();
    let image = walk(&cached.path_of("kernels"))
        .into_iter()
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("vmlinuz-"))
        .unwrap();
    let own = cached.site.cwd().join("bzImage");
    std::fs::copy(&image, &own).unwrap();
    // Long enough ago for its digest to be remembered.
    std::thread::sleep(std::time::Duration::from_millis(2200));
    let shown = || {
        let outcome = cached
            .site
            .vmlab(["run", "-q", "-k", "./bzImage", "--dry-run", "--", "true"])
            .env("VMLAB_CACHE_DIR", cached.dir())
            .output();
        let text = outcome.expect_code(0).stdout_text();
        let line = text.lines().find(|line| line.contains("\"image\"")).unwrap();
        line.to_owned()
    };
    let first = shown();
    assert_eq!(shown(), first);
    // The last byte of the file is in its signature or padding, and no part of the kernel.
    let mut bytes = std::fs::read(&own).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&own, &bytes).unwrap();
    assert_ne!(shown(), first);
}

fn is_module(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains(".ko"))
}

/// All files below a directory.
fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for item in dir.read_dir().unwrap() {
        let item = item.unwrap();
        match item.file_type().unwrap().is_dir() {
            true => files.extend(walk(&item.path())),
            false => files.push(item.path()),
        }
    }
    files
}
