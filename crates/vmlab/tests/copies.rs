//! Files copied between host and guest, and the log of the guest's kernel, with real VMs.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod common;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Logs, sh};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use vmlab::guest::CopySide;
use vmlab::hypervisor::ExitReason;
use vmlab::units::{Bytes, MIB};
use vmlab::{AccelChoice, Error, GuestUser, LogLevel, Share, Vm, VmBuilder};

fn builder(memory: u64) -> VmBuilder {
    let builder = Vm::builder().kernel("debian:6.12").memory(Bytes(memory * MIB));
    builder.accel(common::accel()).share_cwd(false)
}

fn digest(path: &Path) -> Vec<u8> {
    let (mut file, mut hasher) = (File::open(path).unwrap(), Sha256::new());
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return hasher.finalize().to_vec(),
            count => hasher.update(&buffer[..count]),
        }
    }
}

/// All that is copied of what is at a path, by paths from there: mode, time, content or where it leads.
fn picture(root: &Path) -> BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)> {
    let mut seen = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let stat = path.symlink_metadata().unwrap();
        let content = if stat.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        } else if stat.is_symlink() {
            fs::read_link(&path).unwrap().into_os_string().into_vec()
        } else {
            digest(&path)
        };
        let below = path.strip_prefix(root).unwrap().to_owned();
        seen.insert(below, (stat.mode(), stat.mtime(), stat.mtime_nsec(), content));
    }
    seen
}

/// A directory with everything in it that can be copied.
fn tree(at: &Path) {
    fs::create_dir_all(at.join("a/b/nothing in here")).unwrap();
    fs::write(at.join("empty"), "").unwrap();
    let bytes: Vec<u8> =
        (0..1_000_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(at.join("large"), bytes).unwrap();
    fs::write(at.join("a/b").join(OsStr::from_bytes(b"\xff\n\x01 -rf * ;")), "odd").unwrap();
    fs::write(at.join("x".repeat(255)), "long").unwrap();
    symlink("../outside/nowhere", at.join("a/link")).unwrap();
    symlink("/etc", at.join("to a directory")).unwrap();
    for number in 0..300 {
        fs::write(at.join(format!("a/b/{number}")), number.to_string()).unwrap();
    }
    let mut sparse = File::create(at.join("sparse")).unwrap();
    sparse.seek(SeekFrom::Start(64 << 20)).unwrap();
    sparse.write_all(b"middle").unwrap();
    sparse.set_len(256 << 20).unwrap();
    for (name, mode) in [("empty", 0o440), ("large", 0o751), ("a/b", 0o1777), ("a", 0o710)] {
        fs::set_permissions(at.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    File::open(at.join("large"))
        .unwrap()
        .set_modified(std::time::UNIX_EPOCH + Duration::new(5, 6))
        .unwrap();
}

/// What `find` sees of a tree; the same on both sides.
const FIND: &str = "find . -printf '%P|%y|%m|%T@|%l\\0' | sort -z | sha256sum; \
    find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum; find . | wc -l";

#[test]
fn trees_are_the_same_on_both_sides() {
    let _logs = Logs::new();
    let vm = builder(512).start().unwrap();
    let dir = TempDir::new().unwrap();
    let from = dir.path().join("from");
    tree(&from);
    vm.copy_to(&from, "/root/tree").unwrap();
    let host =
        std::process::Command::new("sh").args(["-ec", FIND]).current_dir(&from).output().unwrap();
    let guest = sh(&vm, &format!("cd /root/tree; {FIND}"));
    assert_eq!(guest, String::from_utf8(host.stdout).unwrap());
    assert!(guest.trim_end().ends_with("\n312"), "{guest}");
    let sparse = sh(&vm, "stat -c '%s %b %U:%G' /root/tree/sparse");
    let fields: Vec<&str> = sparse.split_whitespace().collect();
    assert_eq!((fields[0], fields[2]), ("268435456", "root:root"));
    assert!(fields[1].parse::<u64>().unwrap() < 1024, "{sparse}");

    // And back, where nothing is, and where something is.
    let to = dir.path().join("to");
    vm.copy_from("/root/tree", &to).unwrap();
    assert_eq!(picture(&from), picture(&to));
    assert!(to.join("sparse").metadata().unwrap().blocks() < 1024);
    vm.copy_from("/root/tree/", &to).unwrap();
    assert_eq!(picture(&from), picture(&to.join("tree")));
    let filled = dir.path().join("filled");
    fs::create_dir(&filled).unwrap();
    vm.copy_from("/root/tree/a/.", &filled).unwrap();
    assert_eq!(fs::read_link(filled.join("link")).unwrap(), Path::new("../outside/nowhere"));

    // Paths that are not absolute are from where commands run.
    fs::write(dir.path().join("file"), "content").unwrap();
    vm.copy_to(dir.path().join("file"), "/root").unwrap();
    assert_eq!(sh(&vm, "cat /root/file"), "content");
    let cwd = vm.exec(["pwd"]).unwrap().stdout_text();
    sh(&vm, "echo relative > relative");
    vm.copy_from("relative", &filled).unwrap();
    assert_eq!(fs::read(filled.join("relative")).unwrap(), b"relative\n", "{cwd}");
    // A file that something is mounted on cannot be replaced, but written to.
    sh(&vm, "cd /root; echo below > a; echo of-a-longer-name > b; mount --bind a b");
    vm.copy_to(dir.path().join("file"), "/root/b").unwrap();
    assert_eq!(
        sh(&vm, "cd /root; cat b; ls -A | grep -c vmlab-copy || true; cat a"),
        "content0\ncontent"
    );
    vm.copy_to(dir.path().join("file"), "/etc/hosts").unwrap();
    assert_eq!(sh(&vm, "cat /etc/hosts"), "content");
    // What the kernel makes up has no size, and is there all the same.
    vm.copy_from("/proc/version", dir.path()).unwrap();
    let version = fs::read_to_string(dir.path().join("version")).unwrap();
    assert!(version.contains(vm.release()), "{version}");
    vm.shutdown().unwrap();
}

/// Memory of this process that is its own, in KiB: that of guests is not.
fn own_memory_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn large_files_need_no_more_memory_than_small_ones() {
    let _logs = Logs::new();
    let dir = TempDir::new().unwrap();
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    // A guest with less memory than the file has bytes; what it writes is on the host.
    let share = Share::new(share.canonicalize().unwrap()).at("/mnt/share");
    let vm = builder(224).share(share).start().unwrap();
    let file = dir.path().join("large");
    let mut writer = File::create(&file).unwrap();
    let mut state = 1_u64;
    for _ in 0..256 {
        let chunk: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_le_bytes()
        })
        .take(MIB as usize / 8)
        .flatten()
        .collect();
        writer.write_all(&chunk).unwrap();
    }
    drop(writer);
    let done = AtomicBool::new(false);
    let before = own_memory_kib();
    let most = std::thread::scope(|scope| {
        let most = scope.spawn(|| {
            let mut most = before;
            while !done.load(Ordering::Relaxed) {
                most = most.max(own_memory_kib());
                std::thread::sleep(Duration::from_millis(5));
            }
            most
        });
        // Commands run meanwhile.
        let commands = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                assert!(vm.exec(["true"]).unwrap().status.success());
                count += 1;
            }
            count
        });
        let back = dir.path().join("back");
        let into = vm.copy_to(&file, "/mnt/share");
        let copied = into.and_then(|()| vm.copy_from("/mnt/share/large", back));
        done.store(true, Ordering::Relaxed);
        copied.unwrap();
        assert!(commands.join().unwrap() > 0);
        most.join().unwrap()
    });
    println!("memory: {before} KiB before, at most {most} KiB");
    assert!(most < before + 64 * 1024, "{before} KiB before, then {most}");
    assert_eq!(digest(&file), digest(&dir.path().join("share/large")));
    assert_eq!(digest(&file), digest(&dir.path().join("back")));
    vm.shutdown().unwrap();
}

#[test]
fn a_guest_without_any_program_is_enough() {
    let _logs = Logs::new();
    let root = TempDir::new().unwrap();
    let vm = builder(256).rootfs(root.path()).start().unwrap();
    assert!(matches!(vm.exec(["true"]), Err(Error::CommandNotFound { .. })));
    let dir = TempDir::new().unwrap();
    let from = dir.path().join("from");
    tree(&from);
    vm.copy_to(&from, "/tmp/tree").unwrap();
    vm.copy_from("/tmp/tree", dir.path().join("to")).unwrap();
    assert_eq!(picture(&from), picture(&dir.path().join("to")));
    // Debian's is a static program, which is the only one there then.
    vm.copy_to("/sbin/ldconfig", "/program").unwrap();
    let output = vm.exec(["/program", "--version"]).unwrap();
    assert!(output.stdout_text().starts_with("ldconfig "), "{output:?}");
    let log = vm.kernel_log().unwrap();
    assert!(log.to_string().contains("Linux version "), "{log}");
    vm.shutdown().unwrap();
    // The layer for writes was the guest's own.
    assert!(!root.path().join("program").exists());
}

/// What an error says of itself and its cause.
fn said(error: &Error) -> String {
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    format!("{error}: {cause}")
}

#[track_caller]
fn fails(result: Result<(), Error>, side: CopySide, wanted: &[&str]) {
    let error = result.unwrap_err();
    let said = said(&error);
    assert!(matches!(error, Error::Copy { side: found, .. } if found == side), "{said}");
    for wanted in wanted {
        assert!(said.contains(wanted), "no {wanted:?} in {said}");
    }
}

#[test]
fn what_cannot_be_copied_is_named_with_its_reason() {
    let _logs = Logs::new();
    let vm = builder(512).start().unwrap();
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    use CopySide::{Guest, Host};
    fs::write(at("small"), "small").unwrap();
    fs::write(at("large"), vec![b'x'; 8 << 20]).unwrap();
    fails(
        vm.copy_to(at("gone"), "/root"),
        Host,
        &["cannot open ", "/gone on the host", "No such file"],
    );
    fails(
        vm.copy_from("/root/gone", at("x")),
        Guest,
        &["open /root/gone in the guest", "No such file"],
    );
    fails(vm.copy_to(at("small"), "/no/such/dir"), Guest, &["open /no/such in the guest"]);
    fails(vm.copy_from("/etc/passwd", at("no/such")), Host, &["/no on the host", "No such file"]);
    fails(vm.copy_from("/dev/null", at("x")), Guest, &["copy the character device /dev/null"]);
    sh(&vm, "mkdir -p /root/d/e; mkfifo /root/d/e/pipe");
    fails(
        vm.copy_from("/root/d", at("d")),
        Guest,
        &["copy the named pipe /root/d/e/pipe in the guest"],
    );

    sh(&vm, "mkdir /root/full /root/fixed; mount -t tmpfs -o size=1M none /root/full");
    fails(
        vm.copy_to(at("large"), "/root/full"),
        Guest,
        &["cannot write /root/full/large in the guest", "copying ", "No space left on device"],
    );
    assert_eq!(sh(&vm, "ls -A /root/full"), "", "half a file is left");
    // What is there is only replaced by what is complete.
    vm.copy_to(at("small"), "/root/full/large").unwrap();
    fails(vm.copy_to(at("large"), "/root/full"), Guest, &["No space left on device"]);
    assert_eq!(sh(&vm, "cat /root/full/*; ls -A /root/full"), "smalllarge\n");

    sh(&vm, "mount -t tmpfs -o ro none /root/fixed");
    fails(
        vm.copy_to(at("small"), "/root/fixed"),
        Guest,
        &["create /root/fixed/small in the guest", "Read-only file system"],
    );
    // A guest that ends is told as such, and the host's file is whole or absent.
    let ended = std::thread::scope(|scope| {
        sh(&vm, "truncate -s 1T /root/endless; cat /dev/zero | head -c 200M > /root/zeros");
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            vm.handle().kill(ExitReason::Killed);
        });
        vm.copy_from("/root/zeros", at("zeros"))
    });
    assert!(matches!(ended, Err(Error::Ended { .. })), "{ended:?}");
    assert!(!at("zeros").exists());
}

#[test]
fn copies_are_made_by_the_vms_user() {
    let _logs = Logs::new();
    let nobody = GuestUser { uid: 65534, gid: 65534, groups: Vec::new() };
    let mut environment = vmlab::Environment::of_caller().unwrap();
    environment.user = nobody;
    let vm = builder(512).environment(environment).start().unwrap();
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), "content").unwrap();
    fs::set_permissions(at("file"), fs::Permissions::from_mode(0o6755)).unwrap();
    vm.copy_to(at("file"), "/tmp/there").unwrap();
    assert_eq!(sh(&vm, "stat -c '%u:%g %a' /tmp/there"), "65534:65534 755\n");
    fails(vm.copy_to(at("file"), "/etc"), CopySide::Guest, &["/etc/file in", "Permission denied"]);
    let as_root = |script: &str| {
        let command = vm.command("sh").args(["-ec", script]).user(GuestUser::default());
        assert!(command.output().unwrap().status.success(), "{script}");
    };
    as_root("echo secret > /tmp/secret; chmod 600 /tmp/secret");
    fails(
        vm.copy_from("/tmp/secret", at("x")),
        CopySide::Guest,
        &["/tmp/secret in", "Permission denied"],
    );
    // The kernel's log is the guest's, not the user's.
    as_root("echo 1 > /proc/sys/kernel/dmesg_restrict");
    assert!(!vm.kernel_log().unwrap().is_empty());
    vm.shutdown().unwrap();
}

#[test]
fn the_kernels_log_has_what_the_console_does_not_show() {
    let _logs = Logs::new();
    let vm = builder(512).start().unwrap();
    let before = vm.kernel_log().unwrap();
    assert!(before.records()[0].text.starts_with("Linux version "), "{before}");
    let numbers: Vec<u64> = before.records().iter().map(|record| record.sequence).collect();
    assert!(numbers.len() > 100 && numbers.windows(2).all(|pair| pair[0] < pair[1]));

    sh(
        &vm,
        "echo 1 > /proc/sys/kernel/printk; echo '<7>said in secret: ä' > /dev/kmsg; \
             echo '<4>a warning' > /dev/kmsg",
    );
    let log = vm.kernel_log().unwrap();
    let new = log.since(&before.mark());
    let secret = new.containing("said in secret");
    let [record] = secret.records() else { panic!("{new}") };
    assert_eq!((record.level, record.facility), (LogLevel::Debug, 1));
    assert_eq!(record.text, "said in secret: ä");
    assert!(record.time > before.records().last().unwrap().time);
    assert!(secret.to_string().ends_with("] said in secret: ä\n"), "{secret}");
    let warnings = new.at_least(LogLevel::Warning);
    assert!(warnings.to_string().contains("a warning"), "{new}");
    assert!(warnings.containing("secret").is_empty());
    assert!(vm.kernel_log().unwrap().since(&log.mark()).is_empty());
    let console = fs::read_to_string(vm.console().log_path()).unwrap();
    assert!(!console.contains("in secret"), "{console}");

    // What the kernel reports of itself is found there, too.
    // It may kill who asks for it.
    let script = "echo 1 > /proc/sys/kernel/sysrq; sleep 60 & echo f > /proc/sysrq-trigger";
    vm.exec(["sh", "-c", script]).unwrap();
    let mut events = Vec::new();
    for _ in 0..400 {
        events = vm.kernel_log().unwrap().since(&log.mark()).events();
        if !events.is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(events[0].title.starts_with("OOM kill"), "{events:?}");
    vm.shutdown().unwrap();
}

#[test]
fn a_system_of_an_image_takes_copies_and_gives_its_log() {
    let _logs = Logs::new();
    // There the agent is a service beside the system's own PID 1.
    let vm = Vm::builder().image(vmlab::Image::new("debian:12")).accel(AccelChoice::Tcg);
    let vm = vm.share_cwd(false).user_of_guest("nobody").start().unwrap();
    let dir = TempDir::new().unwrap();
    let from = dir.path().join("from");
    tree(&from);
    vm.copy_to(&from, "/var/tmp/tree").unwrap();
    vm.copy_from("/var/tmp/tree", dir.path().join("to")).unwrap();
    assert_eq!(picture(&from), picture(&dir.path().join("to")));
    let before = vm.kernel_log().unwrap();
    assert!(before.to_string().contains("Linux version "), "{before}");
    assert_eq!(sh(&vm, "stat -c %U /var/tmp/tree"), "nobody\n");
    let write = ["-c", "echo '<7>said in secret' > /dev/kmsg"];
    let written = vm.command("sh").args(write).user(GuestUser::default()).output().unwrap();
    assert!(written.status.success(), "{written:?}");
    assert!(!vm.kernel_log().unwrap().since(&before.mark()).containing("secret").is_empty());
    vm.shutdown().unwrap();
}
