//! The library as the author of a test uses it, with real VMs.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod common;

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use common::Logs;
use tempfile::TempDir;
use vmlab::config::{Machine, NetworkMode, Topology, VmConfig};
use vmlab::events::{EventReader, KernelEvent, default_kinds};
use vmlab::guest::TerminalSize;
use vmlab::hypervisor::qemu::Qemu;
use vmlab::hypervisor::{
    Capabilities, ExitReason, Hypervisor, HypervisorError, ProbeReport, StartOptions, VmHandle,
    VmState,
};
use vmlab::report::Phase;
use vmlab::units::{Bytes, MIB};
use vmlab::{AccelChoice, Error, GuestUser, Share, SnapshotMode, Stdio, Vm, VmBuilder};

const KERNEL: &str = "debian:6.12";

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn builder() -> VmBuilder {
    Vm::builder().kernel(KERNEL).memory(Bytes(512 * MIB)).accel(common::accel())
}

/// For a VM that boots in any case.
fn that_boots() -> VmBuilder {
    builder().snapshots(SnapshotMode::Never)
}

/// What a console's subscriber gets, until it has this in it.
fn wait_for(receiver: &Receiver<Vec<u8>>, wanted: &str) -> String {
    let until = Instant::now() + PATIENCE;
    let mut text = String::new();
    while !text.contains(wanted) {
        let left = until.saturating_duration_since(Instant::now());
        let bytes = receiver.recv_timeout(left);
        let bytes = bytes.unwrap_or_else(|e| panic!("no {wanted:?} ({e}) in {text}"));
        text.push_str(&String::from_utf8_lossy(&bytes));
    }
    text
}

#[test]
fn commands_are_run_as_with_std_process() {
    let _logs = Logs::new();
    let dir = TempDir::new().unwrap();
    let share = Share::new(dir.path().canonicalize().unwrap()).at("/mnt/share");
    let vm = that_boots().share(share).share_cwd(false).hostname("library").start().unwrap();

    let output = vm.exec(["uname", "-r"]).unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout_text().trim_end(), vm.release());
    assert_eq!(vm.release(), vm.kernel().unwrap().release);
    assert!(output.stderr.is_empty());

    let output = vm.exec(["sh", "-c", "printf 'o\\377'; printf e >&2; exit 3"]).unwrap();
    assert_eq!((output.stdout, output.stderr), (b"o\xff".to_vec(), b"e".to_vec()));
    assert_eq!((output.status.code(), output.status.signal()), (Some(3), None));
    let output = vm.exec(["sh", "-c", "kill -TERM $$"]).unwrap();
    assert_eq!((output.status.code(), output.status.signal()), (None, Some(15)));
    assert_eq!(output.status.shell_code(), 143);

    let output = vm
        .command("sh")
        .args(["-c", "echo $A; pwd; id -u; id -G; echo e >&2; echo $HOME; hostname"])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("A", "b c")
        .current_dir("/usr")
        .user(GuestUser { uid: 12, gid: 34, groups: vec![56] })
        .merge_stderr()
        .output()
        .unwrap();
    assert_eq!(output.stdout_text(), "b c\n/usr\n12\n34 56\ne\n\nlibrary\n");

    // Two at once, each with its own streams; the second ends first.
    let mut cat = vm.command("cat").stdin(Stdio::Piped).spawn().unwrap();
    let mut tr = vm.command("tr").args(["a-z", "A-Z"]).stdin(Stdio::Piped).spawn().unwrap();
    let mut lines = BufReader::new(cat.stdout.take().unwrap());
    for line in ["one\n", "two\n"] {
        cat.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
        let mut back = String::new();
        lines.read_line(&mut back).unwrap();
        assert_eq!(back, line);
    }
    tr.stdin.take().unwrap().write_all(b"three").unwrap();
    let mut upper = String::new();
    tr.stdout.take().unwrap().read_to_string(&mut upper).unwrap();
    assert_eq!(upper, "THREE");
    assert!(tr.wait().unwrap().success());
    assert_eq!(cat.wait_until(Some(Instant::now())).unwrap(), None);
    cat.control().signal(9);
    assert_eq!(cat.wait().unwrap().signal(), Some(9));

    let null =
        vm.command("sh").args(["-c", "cat; readlink /proc/self/fd/0; readlink /proc/$$/fd/2"]);
    let output = null.stderr(Stdio::Null).output().unwrap();
    assert_eq!(output.stdout_text(), "/dev/null\n/dev/null\n");

    assert!(matches!(
        vm.exec(["no-such-program"]),
        Err(Error::CommandNotFound { program }) if program == "no-such-program"
    ));
    assert!(matches!(vm.exec(["/etc/passwd"]), Err(Error::CommandNotExecutable { .. })));
    assert!(matches!(vm.exec([] as [&str; 0]), Err(Error::CommandNotFound { .. })));
    assert!(matches!(
        vm.command("true").current_dir("/nowhere").output(),
        Err(Error::WorkingDirectory { dir, .. }) if dir.as_os_str() == "/nowhere"
    ));
    assert!(matches!(
        vm.command("true").arg("x".repeat(8 << 20)).output(),
        Err(Error::TooManyArguments { .. })
    ));

    assert!(vm.exec(["sh", "-c", "echo shared > /mnt/share/file"]).unwrap().status.success());
    vm.shutdown().unwrap();
    assert_eq!(std::fs::read_to_string(dir.path().join("file")).unwrap(), "shared\n");
    let report = vm.report();
    assert_eq!(report.kernel, KERNEL);
    assert_eq!(report.memory, Bytes(512 * MIB));
    let phases: Vec<Phase> = report.phases.iter().map(|phase| phase.phase).collect();
    use Phase::{Boot, Kernel, Prepare, Run, Setup, Stop};
    assert_eq!(phases, [Kernel, Prepare, Boot, Setup, Run, Stop]);
    assert!(report.phases.iter().all(|phase| phase.ms >= 0.0));
    assert_eq!(report.exit_reason, Some(ExitReason::Shutdown));
    let log = report.console_log.expect("there is a log");
    assert!(log.starts_with(common::logs()) && log.is_file());
    assert!(matches!(vm.exec(["true"]), Err(Error::Ended { .. })));
}

#[test]
fn machines_are_watched_paused_and_killed() {
    let _logs = Logs::new();
    let vm = that_boots().share_cwd(false).start().unwrap();
    let console = vm.console().subscribe();
    vm.exec(["sh", "-c", "echo '<1>the marker' > /dev/kmsg"]).unwrap();
    let text = wait_for(&console, "the marker");
    // Under KVM a guest keeps its boot to itself.
    let whole = common::accel() != AccelChoice::Tcg || text.contains("Linux version");
    assert!(whole, "not from the first byte on: {text}");

    let handle = vm.handle();
    assert_eq!(handle.state(), VmState::Running);
    let mut cat = vm.command("cat").stdin(Stdio::Piped).spawn().unwrap();
    let mut stdout = cat.stdout.take().unwrap();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut byte = [0];
        while let Ok(1) = stdout.read(&mut byte) {
            sender.send(byte[0]).unwrap();
        }
    });
    let mut stdin = cat.stdin.take().unwrap();
    stdin.write_all(b"a").unwrap();
    assert_eq!(receiver.recv_timeout(PATIENCE), Ok(b'a'));
    handle.pause().unwrap();
    assert_eq!(handle.state(), VmState::Paused);
    stdin.write_all(b"b").unwrap();
    let silence = receiver.recv_timeout(Duration::from_millis(300));
    assert_eq!(silence, Err(RecvTimeoutError::Timeout));
    handle.resume().unwrap();
    assert_eq!(receiver.recv_timeout(PATIENCE), Ok(b'b'));
    assert_eq!(handle.state(), VmState::Running);

    assert_eq!(handle.wait(Some(Instant::now())), None);
    handle.kill(ExitReason::Killed);
    assert_eq!(handle.state(), VmState::Ended);
    let Err(Error::Ended { reason, booting, console: evidence }) = cat.wait() else {
        panic!("a command outlived its VM");
    };
    assert_eq!((reason, booting), (ExitReason::Killed, false));
    assert!(evidence.tail.contains("the marker"), "{}", evidence.tail);
    assert_eq!(receiver.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected));
    // Once the VM has ended, it stays that way.
    assert_eq!(handle.wait(None), Some(ExitReason::Killed));
    assert!(handle.pause().is_err());
    assert!(vm.shutdown().is_err());
    assert_eq!(vm.report().exit_reason, Some(ExitReason::Killed));
}

#[test]
fn guests_that_end_tell_why() {
    let _logs = Logs::new();
    let vms: Vec<Vm> = std::thread::scope(|scope| {
        let start = || builder().share_cwd(false).start().unwrap();
        let starting: Vec<_> = (0..2).map(|_| scope.spawn(start)).collect();
        starting.into_iter().map(|vm| vm.join().unwrap()).collect()
    });
    let reason = |vm: &Vm, script: &str| match vm.exec(["sh", "-c", script]) {
        Err(Error::Ended { reason, booting: false, .. }) => reason,
        other => panic!("{script}: {other:?}"),
    };
    let crashed = reason(&vms[0], "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger");
    assert_eq!(crashed, ExitReason::GuestPanic(Some("sysrq triggered crash".to_owned())));
    // The other one does not notice.
    assert!(vms[1].exec(["true"]).unwrap().status.success());
    let off = reason(&vms[1], "echo 1 > /proc/sys/kernel/sysrq; echo o > /proc/sysrq-trigger; cat");
    assert_eq!(off, ExitReason::Shutdown);

    let late = that_boots().share_cwd(false).timeout(Duration::from_millis(300)).start();
    let Err(Error::Ended { reason, booting, .. }) = late else { panic!("{late:?}") };
    assert_eq!((reason, booting), (ExitReason::Timeout, true));
    let slow = that_boots().share_cwd(false).boot_timeout(Duration::from_millis(300)).start();
    assert!(matches!(slow, Err(Error::BootTimeout { .. })), "{slow:?}");
}

#[test]
fn what_a_kernel_says_of_itself_is_read_from_its_console() {
    let _logs = Logs::new();
    let vm = builder().share_cwd(false).start().unwrap();
    let console = vm.console().subscribe();
    // The kernel kills what uses most memory, which may be the one who asked for it.
    let script = "perl -e '$x = \"a\" x 3e7; sleep' & sleep 1; echo 1 > /proc/sys/kernel/sysrq; \
        echo f > /proc/sysrq-trigger; wait; echo 'kernel BUG at my/own.c:1!' > /dev/console";
    vm.exec(["sh", "-c", script]).unwrap();
    let mut reader = EventReader::new(default_kinds());
    reader.feed(wait_for(&console, "kernel BUG at").as_bytes());
    reader.finish();
    // Neither is the one among what makes a run fail, nor are the other one's words the kernel's.
    assert_eq!(reader.events(), []);

    let Err(Error::Ended { .. }) = vm.exec(["sh", "-c", "echo c > /proc/sysrq-trigger"]) else {
        panic!("the guest did not crash");
    };
    let mut all = EventReader::all();
    all.feed(&std::fs::read(vm.console().log_path()).unwrap());
    console.iter().for_each(|bytes| reader.feed(&bytes));
    let panic = "kernel panic: sysrq triggered crash";
    let titles = |events: Vec<KernelEvent>| events.into_iter().map(|e| e.title).collect::<Vec<_>>();
    assert_eq!(titles(all.into_events()), ["OOM kill: perl", panic]);
    let events = reader.into_events();
    let report = events[0].report.join("\n");
    assert!(report.contains("Call Trace:") && report.contains("sysrq_handle_crash"), "{report}");
    assert_eq!(titles(events), [panic]);
}

#[test]
fn a_terminal_gives_its_last_output() {
    let _logs = Logs::new();
    // The kernel hands a terminal's output over in the background, and its end at once. On the only CPU,
    // a command with a real-time priority now and then writes its last and ends while the agent reads.
    let vm = builder().share_cwd(false).start().unwrap();
    let size = TerminalSize { rows: 24, columns: 80 };
    for round in 0..60 {
        let script = format!(
            "$| = 1; print \"begin\\n\"; select undef, undef, undef, 1e-5 * {round}; print \"end {round}\\n\""
        );
        let command = vm.command("chrt").args(["--fifo", "50", "perl", "-e", &script]);
        let output = command.terminal(size).output().unwrap();
        assert_eq!(output.stdout_text(), format!("begin\r\nend {round}\r\n"));
    }
}

/// A hypervisor that can do little, and starts nothing.
#[derive(Debug)]
struct Little(Capabilities);

impl Hypervisor for Little {
    fn name(&self) -> &'static str {
        "little"
    }

    fn find(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    fn probe(&self) -> Result<ProbeReport, HypervisorError> {
        Ok(ProbeReport { program: "/bin/little".into(), version: "little 1".to_owned() })
    }

    fn capabilities(&self) -> Capabilities {
        self.0.clone()
    }

    fn start(
        &self,
        config: &VmConfig,
        options: StartOptions,
    ) -> Result<Arc<dyn VmHandle>, HypervisorError> {
        assert!(options.log_dir.is_dir());
        Err(HypervisorError::Refused { said: format!("no {} today", config.machine.name()) })
    }

    fn command_line(&self, _: &VmConfig) -> Vec<OsString> {
        Vec::new()
    }
}

#[test]
fn another_hypervisor_is_asked_for_what_it_can_do() {
    let _logs = Logs::new();
    let mut little = Qemu::new().capabilities();
    little.machines = vec![Machine::Q35];
    little.networks = vec![NetworkMode::None];
    little.qemu_args = false;
    let on_little = |capabilities: &Capabilities| {
        builder().share_cwd(false).hypervisor(Arc::new(Little(capabilities.clone())))
    };
    let plan = on_little(&little).prepare().unwrap();
    assert_eq!(plan.config().machine, Machine::Q35);
    assert!(plan.command_line().is_empty());
    let refused = plan.start().unwrap_err().to_string();
    assert!(refused.contains("no q35 today"), "{refused}");

    let refused = |builder: VmBuilder| builder.prepare().unwrap_err().to_string();
    let wanted = |what| format!("the hypervisor little cannot have {what}");
    let microvm = on_little(&little).machine(Machine::Microvm);
    assert_eq!(refused(microvm), wanted("this machine"));
    let network = on_little(&little).network(NetworkMode::User);
    assert_eq!(refused(network), wanted("this network"));
    let arguments = on_little(&little).qemu_arg("-S");
    assert_eq!(refused(arguments), wanted("arguments for QEMU"));
    // The board of its own goes before all others, whatever the CPUs are like.
    let mut native = little.clone();
    native.machines = vec![Machine::Native];
    let dies = Topology { nodes: 1, llcs: 2, cores: 1, threads: 1 };
    let plan = on_little(&native).topology(dies).prepare().unwrap();
    assert_eq!(plan.config().machine, Machine::Native);
    little.shares.clear();
    assert_eq!(refused(on_little(&little)), wanted("shares of this kind"));
}

#[test]
fn what_cannot_work_is_an_error_before_anything_starts() {
    let _logs = Logs::new();
    let file = tempfile::NamedTempFile::new().unwrap();
    let prepare = |builder: VmBuilder| builder.prepare().unwrap_err();
    assert!(matches!(prepare(builder().kernel("no such:kernel")), Error::KernelSpec(_)));
    assert!(matches!(prepare(builder().memory(Bytes(MIB))), Error::Config(_)));
    assert!(matches!(prepare(builder().cpus(0)), Error::Config(_)));
    assert!(matches!(prepare(builder().share(Share::new(file.path()))), Error::Share { .. }));
    assert!(matches!(prepare(builder().share(Share::new("/usr").at("x"))), Error::Share { .. }));
    assert!(matches!(prepare(builder().rootfs("/nowhere")), Error::Io { .. }));
    std::fs::write(file.path(), "text").unwrap();
    let kernel = file.path().display().to_string();
    assert!(matches!(prepare(builder().kernel(kernel)), Error::Kernel(_) | Error::BootImage(_)));

    let plan = builder().cpus(3).append("marked").prepare().unwrap();
    assert_eq!(plan.config().topology.cpus(), Some(3));
    assert!(plan.config().boot.kernel().unwrap().command_line.ends_with(" marked"));
    assert!(plan.command_line()[0].to_string_lossy().contains("qemu-system-"));
    assert!(plan.kernel().unwrap().modules.is_some());
}
