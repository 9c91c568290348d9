//! When things go wrong: each failure ends soon, says what happened and has its own code.

use std::time::{Duration, Instant};

use crate::common::{Outcome, Site, Vmlab, has_boot};
use rustix::process::Signal;

/// How long a failure may take to be told, the boot included, on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// Runs it to its end, which has to come soon and with this code.
#[track_caller]
fn fail(run: Vmlab, code: i32, wanted: &[&str]) -> Outcome {
    let since = Instant::now();
    let outcome = run.output();
    outcome.expect_code(code).expect_stderr(wanted);
    assert!(since.elapsed() < SOON, "it took {:?}", since.elapsed());
    assert_eq!(outcome.stdout_text(), "");
    outcome
}

/// The log that the message names has the whole console, and what is shown of it.
#[track_caller]
fn assert_names_the_log(site: &Site, outcome: &Outcome) {
    let log = site.log_dir().join("console.log");
    outcome.expect_stderr(&[&format!("vmlab: the whole console: {}\n", log.display())]);
    let text = std::fs::read_to_string(log).unwrap();
    assert!(has_boot(&text));
    let stderr = outcome.stderr_text();
    let shown = stderr.lines().filter_map(|line| line.strip_prefix("  | "));
    for line in shown.filter(|line| *line != "...") {
        assert!(text.contains(line), "{line:?} is not in the log");
    }
}

#[test]
fn a_kernel_panic() {
    let site = Site::new();
    let run = site.sh(&[], "echo c > /proc/sysrq-trigger; sleep 1000");
    let outcome = fail(
        run,
        123,
        &[
            "vmlab: error: the guest's kernel panicked: sysrq triggered crash\n",
            "from the console:\n",
        ],
    );
    let stderr = outcome.stderr_text();
    let mut shown = stderr.lines().filter_map(|line| line.strip_prefix("  | "));
    // The report from its beginning, and not the boot before it.
    assert!(
        shown.next().is_some_and(|line| line.contains("Kernel panic - not syncing")),
        "{stderr}"
    );
    assert!(shown.any(|line| line.contains("Call Trace")), "{stderr}");
    assert_names_the_log(&site, &outcome);
}

#[test]
fn a_panic_that_is_the_emulators_fault() {
    let site = Site::new();
    // As it was seen; nothing brings it about at will.
    let script = "{ echo 'Oops: double fault: 0000 [#1] PREEMPT SMP NOPTI'
        echo 'RSP: 0018:ffffc9000000f9b0 EFLAGS: 051e2342'; } > /dev/kmsg
        echo c > /proc/sysrq-trigger; sleep 1000";
    let wanted = ["kernel panicked", "had flags that do not exist, a fault of QEMU before 8.0"];
    fail(site.sh(&[], script), 123, &wanted);
}

#[test]
fn a_panic_that_the_guest_stays_in() {
    let site = Site::new();
    let script = "echo 0 > /proc/sys/kernel/panic; echo c > /proc/sysrq-trigger; sleep 1000";
    let message = "vmlab: error: the guest's kernel panicked: sysrq triggered crash\n";
    let outcome = fail(site.sh(&[], script), 123, &[message]);
    assert_names_the_log(&site, &outcome);
    // With the kernel's own word for it on the command line, it may stay: for a debugger.
    let site = Site::new();
    let options = ["--append", "panic=0", "--timeout", "30s"];
    fail(site.sh(&options, script), 123, &[message]);
}

#[test]
fn a_guest_that_cannot_be_made_ready() {
    let site = Site::new();
    let run = site.run(&["--module", "no-such-module"], ["true"]);
    let outcome = fail(run, 125, &["no-such-module", "vmlab: the whole console: "]);
    // What the kernel said while it booted explains nothing; a few lines are of what came then.
    let shown = outcome.stderr_text().lines().filter(|line| line.starts_with("  | ")).count();
    assert!(shown <= 12, "{}", outcome.stderr_text());
}

#[test]
fn a_panic_before_the_agent_is_up() {
    let site = Site::new();
    let run = site.run(&["--append", "rdinit=/nonexistent"], ["true"]);
    let wanted = "the guest's kernel panicked before the agent was up: VFS: Unable to mount root";
    let outcome = fail(run, 123, &[wanted, "  | ", "Kernel panic - not syncing"]);
    assert_names_the_log(&site, &outcome);
}

#[test]
fn a_command_that_hangs() {
    let site = Site::new();
    let since = Instant::now();
    let run = site.sh(&["--timeout", "25s"], "trap '' TERM; sleep 1000");
    let outcome = fail(run, 124, &["vmlab: error: the VM ran into its time limit\n"]);
    assert!(since.elapsed() >= Duration::from_secs(25), "{:?}", since.elapsed());
    assert_names_the_log(&site, &outcome);
}

#[test]
fn a_guest_that_never_runs() {
    let site = Site::new();
    // The CPUs stay stopped.
    let run = site.run(&["--boot-timeout", "2s", "--qemu-arg", "-S"], ["true"]);
    let wanted = [
        "vmlab: error: the guest did not come up within 2 s\n",
        "vmlab: the guest wrote nothing to its console\n",
    ];
    fail(run, 124, &wanted);
}

#[test]
fn a_guest_that_hangs_in_its_boot() {
    let site = Site::new();
    // No agent, and a root device that never comes.
    let arguments = "rdinit=/nonexistent root=/dev/nothing rootwait";
    let run = site.run(&["--boot-timeout", "25s", "--append", arguments], ["true"]);
    let message = "vmlab: error: the guest did not come up within 25 s\n";
    let outcome = fail(run, 124, &[message, "Waiting for root device /dev/nothing"]);
    assert_names_the_log(&site, &outcome);
}

#[test]
fn resets_and_power_off() {
    for (key, wanted) in [
        ('b', "vmlab: error: the guest reset itself before the command had ended\n"),
        ('o', "vmlab: error: the guest powered itself off before the command had ended\n"),
    ] {
        let site = Site::new();
        let run = site.sh(&[], &format!("echo {key} > /proc/sysrq-trigger; sleep 1000"));
        let outcome = fail(run, 122, &[wanted, "  | "]);
        assert_names_the_log(&site, &outcome);
    }
    // By the system call, as reboot(8) does without a daemon to ask.
    let site = Site::new();
    fail(site.sh(&[], REBOOT), 122, &["the guest reset itself before the command had ended\n"]);
}

/// `reboot -f`, which not every userspace has.
const REBOOT: &str = "perl -e 'syscall(169, 0xfee1dead, 672274793, 0x1234567, 0)'; sleep 1000";

#[test]
fn a_triple_fault() {
    let site = Site::new();
    // A CPU without long mode: the kernel faults where it has no handlers yet.
    let run = site.run(&["--qemu-arg", "-cpu", "--qemu-arg", "qemu32"], ["true"]);
    fail(run, 122, &["the guest's CPU reset itself after a triple fault before the agent was up"]);
}

/// Has the guest's kernel go on (kexec_load(2)) with another one, at 16 MiB, whose first instruction is invalid. It is
/// entered without handlers, so that this is a triple fault, which nothing has announced as a restart.
const FAULTY_KERNEL: &str = r#"
    $place = 16 << 20;
    $segment = pack("P4096 Q3", "\x0f\x0b" . "\0" x 4094, 4096, $place, 4096);
    syscall(246, $place, 1, $segment, 62 << 16) == 0 or die "kexec_load: $!";
    syscall(169, 0xfee1dead, 672274793, 0x45584543, 0) == 0 or die "reboot: $!";
"#;

#[test]
fn a_triple_fault_in_the_midst_of_a_command() {
    let site = Site::new();
    let run = site.run(&[], ["perl", "-e", FAULTY_KERNEL]);
    let wanted = "vmlab: error: the guest's CPU reset itself after a triple fault\n";
    fail(run, 122, &[wanted, "vmlab: the whole console: "]);
}

#[test]
fn a_command_that_needs_more_memory_than_there_is() {
    let site = Site::new();
    // Not even -q keeps the cause of a failure back.
    let arguments =
        ["run", "-q", "-k", crate::common::kernel(crate::common::DEBIAN_6_12), "-m", "256M", "--"];
    let command = arguments.iter().chain(&["tail", "/dev/zero"]);
    let wanted = "vmlab: the guest ran out of memory and killed 1 process(es); it has 256 MiB, \
                  --memory gives it more\n";
    fail(site.vmlab(command), 137, &[wanted]);
}

#[test]
fn qemu_is_killed() {
    let site = Site::new();
    let run = site.sh(&[], "echo ready; sleep 1000").start();
    run.wait_stdout("ready\n");
    run.process.qemu().signal(Signal::KILL);
    let killed = Instant::now();
    let outcome = run.finish();
    outcome.expect_code(125).expect_stderr(&["the hypervisor failed: QEMU was killed by signal 9"]);
    assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
    assert_names_the_log(&site, &outcome);
}

#[test]
fn qemu_is_missing_or_refuses() {
    let site = Site::new();
    // Not even the directories that are looked at besides PATH have it on any distribution.
    let outcome = fail(
        site.run(&[], ["true"]).env("PATH", site.path()),
        125,
        &["vmlab: error: qemu-system-x86_64 was not found in PATH; install QEMU"],
    );
    outcome.expect_stderr(&["apt-get install qemu-system-x86"]);
    let site = Site::new();
    fail(
        site.run(&["--qemu-arg", "-bogus"], ["true"]),
        125,
        &["vmlab: error: the VM was not started: QEMU ended", "-bogus: invalid option"],
    );
}

/// Overwrites the code of PID 1 with zeros, then wakes it up. (Signals do nothing to it.)
const KILL_THE_AGENT: &str = r#"
grep r-xp /proc/1/maps | grep -v '\[' | while read -r range _; do
    start=$((0x${range%-*} / 4096)) end=$((0x${range#*-} / 4096))
    dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$start count=$((end - start)) conv=notrunc 2>&1
done > /dev/null
echo >&2
sleep 1000"#;

#[test]
fn the_agent_dies() {
    let site = Site::new();
    let run = site.run(&[], ["bash", "-c", KILL_THE_AGENT]);
    let outcome = fail(run, 123, &["vmlab: error: the agent in the guest died", "kill init"]);
    assert_names_the_log(&site, &outcome);
}

#[test]
fn places_that_cannot_be_written() {
    let site = Site::new();
    let blocked = site.path().join("file");
    std::fs::write(&blocked, "").unwrap();
    let below = blocked.join("dir");
    let image = boot_image(&site);
    let run = |site: &Site| site.vmlab(["run", "-k", &image, "--", "true"]);
    let dir = below.display().to_string();
    fail(run(&site).env("VMLAB_CACHE_DIR", &below), 125, &[&dir, "VMLAB_CACHE_DIR"]);
    fail(run(&site).env("XDG_STATE_HOME", &below), 125, &[&dir, "XDG_STATE_HOME"]);
    if !crate::common::is_root() {
        // Permissions do not stop root.
        let dir = site.path().join("read-only");
        std::fs::create_dir(&dir).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o555);
        std::fs::set_permissions(&dir, mode).unwrap();
        let text = dir.display().to_string();
        let wanted = [&*text, "VMLAB_CACHE_DIR", "Permission denied"];
        fail(run(&site).env("VMLAB_CACHE_DIR", &dir), 125, &wanted);
    }
}

#[test]
fn a_cache_on_a_full_disk() {
    crate::common::need("unshare", "util-linux");
    let site = Site::new();
    let image = boot_image(&site);
    let script = r#"set -e
mkdir ../cache
mount -t tmpfs -o size=4m tmpfs ../cache
export VMLAB_CACHE_DIR=$PWD/../cache
code=0
"$VMLAB" run -q -k "$IMAGE" -- true || code=$?
test -z "$(find ../cache -name 'vmlinux' -o -name '*.cpio')" || echo "something was left"
exit $code"#;
    // A user needs a user namespace to mount anything.
    let namespaces = if crate::common::is_root() { "--mount" } else { "--mount --map-root-user" };
    let run = site
        .host_sh(&format!("unshare {namespaces} bash -c \"$SCRIPT\""))
        .env("SCRIPT", script)
        .env("IMAGE", image);
    fail(run, 125, &["cannot write to the cache", "No space left on device", "VMLAB_CACHE_DIR"]);
}

/// The path of the boot image of Debian's 6.12, in the store.
fn boot_image(site: &Site) -> String {
    let spec = crate::common::kernel(crate::common::DEBIAN_6_12);
    let outcome = site.vmlab(["kernel", "inspect", spec, "--json"]).output();
    outcome.expect_code(0);
    let json: serde_json::Value = serde_json::from_slice(&outcome.stdout).unwrap();
    json["kernel"]["boot_image"].as_str().unwrap().to_owned()
}

#[test]
fn files_that_are_no_kernels() {
    let site = Site::new();
    let image = std::fs::read(boot_image(&site)).unwrap();
    let mut elf32 = b"\x7fELF\x01\x01\x01".to_vec();
    elf32.resize(64, 0);
    elf32[16..20].copy_from_slice(&[2, 0, 3, 0]);
    let mut arm64 = vec![0; 4096];
    arm64[56..60].copy_from_slice(b"ARM\x64");
    arm64[16..24].copy_from_slice(&4096u64.to_le_bytes());
    for (name, content, wanted) in [
        ("text", b"This is not a kernel.\n".as_slice(), &["text file"][..]),
        ("empty", b"", &["empty"]),
        ("cut", &image[..image.len() / 2], &["truncated"]),
        ("elf32", &elf32, &["32-bit"]),
        ("arm64", &arm64, &["aarch64", "x86_64"]),
    ] {
        let path = site.cwd().join(name);
        std::fs::write(&path, content).unwrap();
        let since = Instant::now();
        let kernel = format!("./{name}");
        let outcome = site.vmlab(["run", "-q", "-k", &kernel, "--", "true"]).output();
        outcome.expect_code(125).expect_stderr(wanted).expect_stderr(&[name]);
        assert!(since.elapsed() < Duration::from_secs(5), "{name}: {:?}", since.elapsed());
        assert!(!site.state().join("vmlab").exists(), "{name}: something was started");
    }
}
