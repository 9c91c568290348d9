//! Kernels by every kind of name, and what is made of them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::common::{DEBIAN_6_1, DEBIAN_6_12, DEBIAN_SID, Outcome, PATIENCE, Site, kernel, need};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::process::Signal;
use serde_json::Value;

/// A Debian kernel without 9p.
const DEBIAN_CLOUD: &str = crate::common::CLOUD[0];

fn json(outcome: &Outcome) -> Value {
    outcome.expect_code(0);
    serde_json::from_slice(&outcome.stdout).unwrap()
}

/// What `kernel inspect --json` says.
fn inspect(site: &Site, spec: &str) -> Value {
    json(&site.vmlab(["kernel", "inspect", "--json", spec]).output())
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("{pointer}: {value}"))
}

fn release(site: &Site, spec: &'static str) -> String {
    text(&inspect(site, kernel(spec)), "/kernel/release").to_owned()
}

/// The store's directory of Debian's 6.12.
pub(crate) fn entry(site: &Site) -> PathBuf {
    let found = inspect(site, kernel(DEBIAN_6_12));
    let image = Path::new(text(&found, "/kernel/boot_image"));
    image.parent().unwrap().parent().unwrap().to_owned()
}

/// A cache of the test's own, with Debian's 6.12 in it and nothing made of it yet.
pub(crate) fn own_cache(site: &Site) -> PathBuf {
    let from = entry(site);
    let cache = site.path().join("cache");
    let kernels = cache.join("kernels");
    std::fs::create_dir_all(&kernels).unwrap();
    let copied =
        Command::new("cp").args(["-a", "--reflink=auto"]).arg(&from).arg(&kernels).status();
    assert!(copied.unwrap().success());
    cache
}

#[test]
fn several_kernels_run_one_after_the_other() {
    let site = Site::new();
    let releases = [DEBIAN_SID, DEBIAN_6_12, DEBIAN_6_1].map(|spec| release(&site, spec));
    std::fs::write(site.cwd().join("input"), "the input\n").unwrap();
    let script = format!(
        "uname -r; cat; case $(uname -r) in {}) exit 3;; {}) exit 4;; esac",
        releases[1], releases[2]
    );
    std::fs::write(site.cwd().join("script"), script).unwrap();
    let outcome = site
        .host_sh(
            "exec $VMLAB run -k debian:sid --kernel debian:6.12 -k debian:6.1 --json report \
             -- sh script < input",
        )
        .output();
    // The first failure's.
    outcome.expect_code(3);
    let wanted: String = releases.iter().map(|r| format!("{r}\nthe input\n")).collect();
    assert_eq!(outcome.stdout_text(), wanted);
    let stderr = outcome.stderr_text();
    let headers: Vec<_> = releases.iter().map(|r| stderr.find(&format!("vmlab: {r}:\n"))).collect();
    assert!(headers.iter().all(Option::is_some) && headers.is_sorted(), "{stderr}");

    let report = std::fs::read(site.cwd().join("report")).unwrap();
    let report = serde_json::from_slice::<Value>(&report).unwrap()["runs"].take();
    for (index, (code, spec)) in
        [(0, DEBIAN_SID), (3, DEBIAN_6_12), (4, DEBIAN_6_1)].into_iter().enumerate()
    {
        let one = &report[index];
        assert_eq!(one["exit_code"], code);
        assert_eq!(one["kernel"], spec);
        assert_eq!(text(one, "/report/release"), releases[index]);
    }
    assert_eq!(report.as_array().unwrap().len(), 3);
}

#[test]
fn without_a_choice_there_is_a_kernel_all_the_same() {
    let site = Site::new();
    let newest = kernel(DEBIAN_SID);
    kernel(DEBIAN_6_12);
    let outcome = site.vmlab(["run", "--", "uname", "-r"]).output();
    outcome.expect_code(0);
    let host = rustix::system::uname().release().to_string_lossy().into_owned();
    let installed = Path::new("/boot").join(format!("vmlinuz-{host}"));
    let wanted = match std::fs::File::open(installed) {
        Ok(_) => host,
        Err(_) => release(&site, newest),
    };
    assert_eq!(outcome.stdout_text(), format!("{wanted}\n"), "{}", outcome.stderr_text());
}

#[test]
fn kernels_are_taken_by_path() {
    let site = Site::new();
    let entry = entry(&site);
    let release = release(&site, DEBIAN_6_12);
    let unpacked = entry.to_str().unwrap();
    site.vmlab(["run", "-q", "-k", unpacked, "--", "uname", "-r"])
        .output()
        .expect_stdout(&format!("{release}\n"));

    // An image alone has no modules, and Debian's reach the root only with some.
    let image = entry.join("boot").join(format!("vmlinuz-{release}"));
    std::fs::copy(image, site.cwd().join("bzImage")).unwrap();
    let planned = site.vmlab(["run", "-q", "--dry-run", "-k", "./bzImage", "--", "true"]).output();
    let planned = planned.expect_code(0).stdout_text();
    let mut values = serde_json::Deserializer::from_str(&planned).into_iter::<Value>();
    let config = values.next().unwrap().unwrap();
    // What is booted is the content of the image, uncompressed.
    let vmlinux = text(&config, "/boot/image").to_owned();
    assert_eq!(std::fs::read(&vmlinux).unwrap()[..4], *b"\x7fELF");
    std::fs::copy(vmlinux, site.cwd().join("vmlinux")).unwrap();
    for path in ["./bzImage", "./vmlinux"] {
        let outcome = site.vmlab(["run", "-q", "-k", path, "--", "true"]).output();
        outcome.expect_code(125).expect_stderr(&[
            "could not mount the overlay over the root",
            "CONFIG_OVERLAY_FS",
            "the directory that it was unpacked to",
            "the whole console: ",
        ]);
        let inspected = inspect(&site, path);
        assert_eq!(text(&inspected, "/kernel/release"), release);
        assert_eq!(inspected.pointer("/kernel/modules"), Some(&Value::Null));
    }
}

#[test]
fn a_kernel_that_cannot_reach_the_root_is_refused_before_it_boots() {
    let site = Site::new();
    let release = release(&site, DEBIAN_CLOUD);
    let over_9p = ["run", "--share-via", "9p", "-k", DEBIAN_CLOUD, "--", "true"];
    let outcome = site.vmlab(over_9p).output();
    outcome.expect_code(125).expect_stderr(&[&release, "lacks CONFIG_9P_FS", "generic flavours"]);
    // No run was begun.
    assert!(!site.state().join("vmlab/runs").exists());
    let features = inspect(&site, DEBIAN_CLOUD);
    assert_eq!(text(&features, "/features/9p"), "absent");
    assert_eq!(text(&features, "/features/virtio-pci"), "built_in");
}

#[test]
fn what_is_no_kernel_is_refused_with_a_hint() {
    let site = Site::new();
    std::fs::write(site.cwd().join("text"), "hello\n").unwrap();
    std::fs::write(site.cwd().join("noise"), crate::common::noise(100_000)).unwrap();
    let inspected = inspect(&site, kernel(DEBIAN_6_12));
    let image = text(&inspected, "/kernel/boot_image");
    let bytes = std::fs::read(image).unwrap();
    std::fs::write(site.cwd().join("cut"), &bytes[..bytes.len() / 2]).unwrap();
    for (spec, wanted) in [
        ("debain:6.12", &["did you mean debian:6.12?"][..]),
        ("debian:trixe", &["no suite `trixe`", "did you mean debian:trixie?"]),
        ("6.1.0-999-amd64", &["no kernel 6.1.0-999-amd64 is installed here", "/boot/vmlinuz-"]),
        ("./missing", &["there is no kernel at", "missing"]),
        ("./text", &["text cannot be booted", "it is a text file"]),
        ("./noise", &["noise cannot be booted"]),
        ("./cut", &["cut", "truncated"]),
        ("", &["no kernel"]),
    ] {
        let outcome = site.vmlab(["run", "-q", "-k", spec, "--", "true"]).output();
        outcome.expect_code(125).expect_stderr(wanted);
        assert_eq!(outcome.stderr_text().lines().count(), 1, "{spec}: {}", outcome.stderr_text());
    }
    let host = rustix::system::uname().release().to_string_lossy().into_owned();
    if !Path::new("/boot").join(format!("vmlinuz-{host}")).exists() {
        let outcome = site.vmlab(["run", "-q", "-k", "host", "--", "true"]).output();
        outcome.expect_code(125).expect_stderr(&[&format!("no kernel {host} is installed here")]);
    }
}

#[test]
fn the_store_lists_inspects_and_removes() {
    let site = Site::new();
    let cache = own_cache(&site);
    let release = release(&site, DEBIAN_6_12);
    let vmlab = |args: &[&str]| site.vmlab(args).env("VMLAB_CACHE_DIR", &cache).output();

    let list = json(&vmlab(&["kernel", "list", "--json"]));
    assert_eq!(list.as_array().unwrap().len(), 1);
    assert_eq!(text(&list[0], "/release"), release);
    assert_eq!(list[0]["valid"], true);
    let table = vmlab(&["kernel", "list"]).stdout_text();
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("RELEASE ") && lines[1].starts_with(&release), "{table}");
    assert_eq!(lines.len(), 2);

    let inspected = json(&vmlab(&["kernel", "inspect", "--json", DEBIAN_6_12]));
    for (feature, wanted) in
        [("9p", "module"), ("overlay", "module"), ("sched_ext", "absent"), ("pvh", "built_in")]
    {
        assert_eq!(text(&inspected, &format!("/features/{feature}")), wanted);
    }
    let table = vmlab(&["kernel", "inspect", &release]).stdout_text();
    let by_release = table.lines().next().unwrap_or_default().to_owned();
    let table = vmlab(&["kernel", "inspect", DEBIAN_6_12]).stdout_text();
    let row = |name: &str| {
        let line = table.lines().find(|l| l.split_whitespace().next() == Some(name));
        line.unwrap_or_else(|| panic!("{name}: {table}")).split_once(' ').unwrap().1.trim()
    };
    assert_eq!(row("release"), release);
    assert_eq!(row("9p"), "module");
    assert_eq!(row("architecture"), "x86_64");
    assert!(row("modules").starts_with(cache.to_str().unwrap()), "{table}");
    // A release names an installed kernel; nothing of the store is taken for it.
    assert_eq!(by_release, "");

    let missing = vmlab(&["kernel", "rm", "6.6.6"]);
    missing.expect_code(125).expect_stderr(&["`6.6.6`", "the store has", &release]);
    let removed = vmlab(&["kernel", "rm", &release]);
    removed.expect_code(0);
    assert!(removed.stdout_text().starts_with("removed linux-image-"), "{removed:?}");
    assert_eq!(json(&vmlab(&["kernel", "list", "--json"])), Value::Array(Vec::new()));
    vmlab(&["kernel", "list"]).expect_code(0).expect_stderr(&["vmlab kernel pull"]);
    vmlab(&["kernel", "rm", &release]).expect_code(125);
    assert_eq!(cache.join("kernels").read_dir().unwrap().filter(is_visible).count(), 0);
}

/// A package of Debian's 6.12 with the modules that the root needs, and the kernel's release.
pub(crate) fn small_package(site: &Site, package: &Path) -> String {
    need("dpkg-deb", "dpkg");
    let (entry, release) = (entry(site), release(site, DEBIAN_6_12));
    let tree = site.path().join("tree");
    std::fs::create_dir_all(tree.join("DEBIAN")).unwrap();
    let control = format!(
        "Package: linux-image-{release}\nVersion: 6.12-test\nArchitecture: amd64\n\
         Maintainer: nobody\nDescription: a kernel\n"
    );
    std::fs::write(tree.join("DEBIAN/control"), control).unwrap();
    // The drivers that the root needs, one more, and no list of what depends on what.
    let modules = format!("lib/modules/{release}");
    let kept = ["fs/overlayfs", "drivers/block/loop.ko.xz"];
    let kept = kept.iter().map(|path| format!("{modules}/kernel/{path}"));
    let lists =
        ["builtin", "builtin.modinfo", "order"].map(|name| format!("{modules}/modules.{name}"));
    let mut copy = Command::new("cp");
    copy.current_dir(&entry).args(["-a", "--parents", "boot"]).args(kept).args(lists).arg(&tree);
    assert!(copy.status().unwrap().success());
    let mut build = Command::new("dpkg-deb");
    build.args(["--root-owner-group", "-Znone", "-b"]).arg(&tree).arg(package);
    assert!(build.output().unwrap().status.success());
    std::fs::remove_dir_all(&tree).unwrap();
    release
}

#[test]
fn a_package_is_taken_in_and_run() {
    let site = Site::new();
    let release = small_package(&site, &site.cwd().join("k.deb"));
    let cache = site.path().join("cache");
    let vmlab = |args: &[&str]| site.vmlab(args).env("VMLAB_CACHE_DIR", &cache).output();
    let pulled = vmlab(&["kernel", "pull", "./k.deb"]);
    assert_eq!(pulled.expect_code(0).stdout_text(), format!("./k.deb: {release}\n"));
    let list = json(&vmlab(&["kernel", "list", "--json"]));
    assert_eq!((text(&list[0], "/release"), text(&list[0], "/version")), (&*release, "6.12-test"));
    let run = vmlab(&["run", "-q", "-k", "./k.deb", "--", "sh", "-c", "uname -r; modprobe loop"]);
    run.expect_stdout(&format!("{release}\n"));
    vmlab(&["kernel", "pull", "host"]).expect_code(125).expect_stderr(&["nothing to fetch"]);
}

/// Debian's 6.12 as if it had been built in `top`, with the modules that the root needs and `loop`.
fn lay_out_as_built(site: &Site, top: &Path) {
    let (entry, release) = (entry(site), release(site, DEBIAN_6_12));
    let put = |path: &str, content: &[u8]| {
        let path = top.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    };
    let get = |path: String| std::fs::read(entry.join(path)).unwrap();
    put("arch/x86/boot/bzImage", &get(format!("boot/vmlinuz-{release}")));
    put(".config", &get(format!("boot/config-{release}")));
    put("include/config/kernel.release", format!("{release}\n").as_bytes());
    let from = format!("lib/modules/{release}");
    put("modules.builtin", &get(format!("{from}/modules.builtin")));
    let mut order = String::new();
    for line in String::from_utf8(get(format!("{from}/modules.order"))).unwrap().lines() {
        let place = line.strip_prefix("kernel/").unwrap().strip_suffix(".ko").unwrap();
        let kept = ["fs/overlayfs/", "drivers/block/loop"];
        if kept.iter().any(|kept| place.starts_with(kept)) {
            let packed = entry.join(&from).join(format!("kernel/{place}.ko.xz"));
            let module = vmlab::artifacts::modules::read_module(&packed).unwrap();
            put(&format!("{place}.ko"), &module);
            order.push_str(&format!("{place}.o\n"));
        }
    }
    assert!(order.contains("drivers/block/loop.o\n"), "{order}");
    put("modules.order", order.as_bytes());
}

#[test]
fn a_build_tree_is_run_with_what_was_last_built_in_it() {
    let site = Site::new();
    let release = release(&site, DEBIAN_6_12);
    let top = site.cwd().join("linux");
    lay_out_as_built(&site, &top);
    let cache = site.path().join("cache");
    let run = |spec: &str, script: &str| {
        let args = ["run", "-q", "-k", spec, "--", "sh", "-c", script];
        site.vmlab(args).env("VMLAB_CACHE_DIR", &cache).output()
    };
    // The guest sees the tree, too, because it is below the working directory.
    let load = "uname -r; modprobe loop; cmp \"$(modinfo -n loop)\" linux/drivers/block/loop.ko";
    let wanted = format!("{release}\n");
    run("./linux", load).expect_stdout(&wanted);
    // As after `make drivers/block/loop.ko`: a new module, and no list of all.
    let rebuild = |module: &str| {
        let path = top.join(module);
        let mut content = std::fs::read(&path).unwrap();
        content.extend(b"built anew");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, content).unwrap();
    };
    rebuild("drivers/block/loop.ko");
    let order = std::fs::read_to_string(top.join("modules.order")).unwrap();
    std::fs::remove_file(top.join("modules.order")).unwrap();
    for dir in ["fs", "drivers"] {
        let lines = order.lines().filter(|line| line.starts_with(&format!("{dir}/")));
        let part: String = lines.map(|line| format!("{line}\n")).collect();
        std::fs::write(top.join(dir).join("modules.order"), part).unwrap();
    }
    run("./linux/arch/x86/boot/bzImage", load).expect_stdout(&wanted);
    // One that the initramfs has.
    let initramfs = || {
        let planned = site
            .vmlab(["run", "-q", "--dry-run", "-k", "./linux", "--", "true"])
            .env("VMLAB_CACHE_DIR", &cache)
            .output();
        let planned = planned.expect_code(0).stdout_text();
        let mut values = serde_json::Deserializer::from_str(&planned).into_iter::<Value>();
        text(&values.next().unwrap().unwrap(), "/boot/initramfs").to_owned()
    };
    let before = initramfs();
    rebuild("fs/overlayfs/overlay.ko");
    assert_ne!(initramfs(), before);

    // What is missing is named, with what to do.
    std::fs::remove_file(top.join("fs/overlayfs/overlay.ko")).unwrap();
    run("./linux", "true")
        .expect_code(125)
        .expect_stderr(&["no fs/overlayfs/overlay.ko", "`make modules`"]);
    for dir in ["fs", "drivers"] {
        std::fs::remove_file(top.join(dir).join("modules.order")).unwrap();
    }
    for spec in ["./linux", "./linux/arch/x86/boot/bzImage"] {
        let outcome = run(spec, "true");
        outcome.expect_code(125).expect_stderr(&[
            "CONFIG_OVERLAY_FS",
            "no modules.order",
            "`make modules`",
        ]);
    }
    std::fs::remove_file(top.join("arch/x86/boot/bzImage")).unwrap();
    run("./linux", "true").expect_code(125).expect_stderr(&["is not built", "run `make` there"]);
}

fn is_visible(item: &std::io::Result<std::fs::DirEntry>) -> bool {
    !item.as_ref().unwrap().file_name().to_string_lossy().starts_with('.')
}

/// The files of a kind of cache entry, locks and leftovers of killed processes included.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let Ok(listing) = dir.read_dir() else { return Vec::new() };
    let mut all = Vec::new();
    for path in listing.map(|item| item.unwrap().path()) {
        match path.is_dir() {
            true => all.extend(tree(&path)),
            false => all.push(path),
        }
    }
    all.sort();
    all
}

#[test]
fn ten_processes_share_a_cold_cache_and_damage_is_mended() {
    let site = Site::new();
    let cache = own_cache(&site);
    let release = release(&site, DEBIAN_6_12);
    let sites: Vec<Site> = (0..10).map(|_| Site::new()).collect();
    // Six run, the others only prepare.
    let runs = sites.iter().enumerate().map(|(index, site)| {
        let options: &[&str] = if index < 6 { &[] } else { &["--dry-run"] };
        let echo = format!("uname -r; echo {index}");
        let run = site.run(options, ["sh", "-c", &echo]).env("VMLAB_CACHE_DIR", &cache);
        run.start()
    });
    let runs: Vec<_> = runs.collect();
    for (index, run) in runs.into_iter().enumerate() {
        let outcome = run.finish();
        outcome.expect_code(0);
        assert_eq!(outcome.stderr_text(), "");
        if index < 6 {
            assert_eq!(outcome.stdout_text(), format!("{release}\n{index}\n"));
        }
    }
    let made = |kind: &str| {
        let files = tree(&cache.join(kind));
        files.into_iter().filter(|f| !f.to_string_lossy().contains("/.lock/")).collect::<Vec<_>>()
    };
    let (images, archives) = (made("boot-images"), made("initramfs"));
    // Each was built once, with its length and digest, and nothing is left of the building.
    assert_eq!((images.len(), archives.len()), (3, 3), "{images:?} {archives:?}");

    let path = |files: &[PathBuf], name: &str| {
        files.iter().find(|file| file.ends_with(name)).unwrap().to_owned()
    };
    let (vmlinux, archive) = (path(&images, "vmlinux"), path(&archives, "initramfs.cpio"));
    let before = [std::fs::read(&vmlinux).unwrap(), std::fs::read(&archive).unwrap()];
    let cut = std::fs::OpenOptions::new().write(true).open(&archive).unwrap();
    cut.set_len(before[1].len() as u64 / 2).unwrap();
    std::fs::write(&vmlinux, vec![0; before[0].len()]).unwrap();
    site.run(&[], ["uname", "-r"])
        .env("VMLAB_CACHE_DIR", &cache)
        .output()
        .expect_stdout(&format!("{release}\n"));
    assert!(before == [std::fs::read(&vmlinux).unwrap(), std::fs::read(&archive).unwrap()]);
}

#[test]
fn a_process_killed_while_it_builds_leaves_nothing_valid() {
    let site = Site::new();
    let cache = own_cache(&site);
    let staging = cache.join("boot-images/.staging");
    std::fs::create_dir_all(&staging).unwrap();
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, &staging, inotify::WatchFlags::CREATE).unwrap();
    let prepare = || site.run(&["--dry-run"], ["true"]).env("VMLAB_CACHE_DIR", &cache);
    let building = prepare().start();
    let until = Instant::now() + PATIENCE;
    // The lock comes first; the directory that is being filled is the other entry.
    while !staging.read_dir().unwrap().any(|item| item.unwrap().path().is_dir()) {
        let timeout = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        let count = poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&timeout)).unwrap();
        assert!(count == 1 && Instant::now() < until, "nothing is built");
        rustix::io::read(&watch, &mut [0u8; 4096]).unwrap();
    }
    building.signal(Signal::KILL);
    assert_eq!(building.finish().signal, Some(9));
    let left = tree(&cache.join("boot-images"));
    assert!(!left.iter().any(|f| !f.to_string_lossy().contains("/.")), "{left:?}");

    prepare().output().expect_code(0);
    let left = tree(&cache.join("boot-images"));
    let (hidden, made): (Vec<_>, Vec<_>) =
        left.iter().partition(|f| f.to_string_lossy().contains("/."));
    assert_eq!(made.len(), 3, "{made:?}");
    // The lock file of the key stays; what the killed one was filling does not.
    assert!(hidden.iter().all(|f| f.to_string_lossy().contains("/.lock/")), "{hidden:?}");
}
