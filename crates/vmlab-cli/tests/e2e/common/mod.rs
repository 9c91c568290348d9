//! What the end-to-end tests share: running the real `vmlab` in a place of its own, watching it, and
//! making sure that nothing is left behind.
//!
//! Nothing here skips: what is missing fails the test, with what to install.

pub(crate) mod outer;
pub(crate) mod pty;
pub(crate) mod snapshots;

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

/// The kernels that the tests boot.
pub(crate) const DEBIAN_6_12: &str = "debian:6.12";
pub(crate) const DEBIAN_6_1: &str = "debian:6.1";
pub(crate) const DEBIAN_SID: &str = "debian:sid";

/// The flavours that have no 9p: they share over virtio-fs without being asked.
pub(crate) const CLOUD: [&str; 3] = ["debian:6.12-cloud", "debian:6.1-cloud", "debian:sid-cloud"];

/// What has all shares carried by vmlab's own file servers.
pub(crate) const VIRTIO_FS: [&str; 2] = ["--share-via", "virtiofs"];

/// How long one run of vmlab may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// How long a package mirror may take to deliver a kernel.
const FETCH_PATIENCE: Duration = Duration::from_secs(600);

/// The program under test: `VMLAB_BIN`, or the one that cargo has built for these tests.
pub(crate) fn vmlab_bin() -> PathBuf {
    std::env::var_os("VMLAB_BIN").map_or_else(|| env!("CARGO_BIN_EXE_vmlab").into(), PathBuf::from)
}

/// Whether the tests run as root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether vmlab's own monitor runs the VMs of these tests, as the environment says.
pub(crate) fn native() -> bool {
    std::env::var_os("VMLAB_HYPERVISOR").is_some_and(|name| name == "kvm")
}

/// Whether a console's log is of a boot from its beginning. Under KVM a guest keeps that to itself unless it
/// is asked to.
pub(crate) fn has_boot(log: &str) -> bool {
    native() || log.contains("Linux version")
}

/// Fails unless a program is there.
pub(crate) fn need(program: &str, package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.map(|dir| dir.join(program)).find(|file| file.is_file()).unwrap_or_else(|| {
        panic!("{program} is missing, which this test needs: apt-get install {package}")
    })
}

/// Makes sure that a kernel is in the store, and gives its spec back.
pub(crate) fn kernel(spec: &'static str) -> &'static str {
    static READY: Mutex<Vec<&str>> = Mutex::new(Vec::new());
    static QEMU: OnceLock<PathBuf> = OnceLock::new();
    QEMU.get_or_init(|| need("qemu-system-x86_64", "qemu-system-x86"));
    // Held while a kernel is fetched, so that one test does it and the others wait.
    let mut ready = READY.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !ready.contains(&spec) {
        let site = Site::new();
        let inspected = site.vmlab(["kernel", "inspect", spec, "--json"]).output();
        if inspected.code != Some(0) {
            let pulled = site.vmlab(["kernel", "pull", spec]).patience(FETCH_PATIENCE).output();
            assert_eq!(
                pulled.code,
                Some(0),
                "the kernel {spec} is not in the store and cannot be fetched: {}",
                pulled.stderr_text()
            );
        }
        ready.push(spec);
    }
    spec
}

/// Directories that belong to one test: the working directory, and where vmlab keeps state and sockets.
#[derive(Debug)]
pub(crate) struct Site {
    dir: TempDir,
}

impl Site {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("vmlab-e2e-").tempdir().unwrap();
        for name in ["cwd", "state", "runtime"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    /// The directory that holds everything of this test; it is not the working directory.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The working directory, which guests share.
    pub(crate) fn cwd(&self) -> PathBuf {
        self.path().join("cwd")
    }

    /// `XDG_STATE_HOME`.
    pub(crate) fn state(&self) -> PathBuf {
        self.path().join("state")
    }

    /// `XDG_RUNTIME_DIR`.
    pub(crate) fn runtime(&self) -> PathBuf {
        self.path().join("runtime")
    }

    /// vmlab with arguments.
    pub(crate) fn vmlab(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Vmlab {
        let mut command = hearing_signals(vmlab_bin());
        command.args(args);
        Vmlab::new(self, command)
    }

    /// `cargo-vmlab`, as cargo calls it.
    pub(crate) fn cargo_vmlab(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Vmlab {
        let mut command = hearing_signals(env!("CARGO_BIN_EXE_cargo-vmlab"));
        // What the cargo of these tests sets is not for another one.
        command.args(args).env("CARGO", env!("CARGO")).env_remove("CARGO_MANIFEST_DIR");
        Vmlab::new(self, command)
    }

    /// `vmlab run -q -k KERNEL OPTIONS… -- COMMAND…`, with Debian's 6.12.
    pub(crate) fn run(
        &self,
        options: &[&str],
        command: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Vmlab {
        self.run_with(DEBIAN_6_12, options, command)
    }

    /// The same with a kernel of the caller's choice.
    pub(crate) fn run_with(
        &self,
        spec: &'static str,
        options: &[&str],
        command: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Vmlab {
        let mut args: Vec<OsString> =
            ["run", "-q", "-k", kernel(spec)].iter().map(OsString::from).collect();
        args.extend(options.iter().map(OsString::from));
        args.push("--".into());
        args.extend(command.into_iter().map(|word| word.as_ref().to_owned()));
        self.vmlab(args)
    }

    /// A script for the guest's `sh`.
    pub(crate) fn sh(&self, options: &[&str], script: &str) -> Vmlab {
        self.run(options, ["sh", "-c", script])
    }

    /// A shell on the *host*, in which `$VMLAB` is the program, for redirections and pipes as users
    /// write them.
    pub(crate) fn host_sh(&self, script: &str) -> Vmlab {
        kernel(DEBIAN_6_12);
        let mut command = hearing_signals("bash");
        command.arg("-c").arg(script).env("VMLAB", vmlab_bin());
        Vmlab::new(self, command)
    }

    /// The only run's log directory.
    pub(crate) fn log_dir(&self) -> PathBuf {
        let runs = self.state().join("vmlab/runs");
        let mut dirs: Vec<_> = runs.read_dir().unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(dirs.len(), 1, "{dirs:?}");
        dirs.remove(0)
    }
}

/// A program that gets all signals, whichever the tests were started to ignore (by `nohup`, or in the
/// background of a script).
fn hearing_signals(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("/usr/bin/env");
    command.arg("--default-signal").arg(program);
    command
}

/// A call of vmlab that has not begun.
#[derive(Debug)]
pub(crate) struct Vmlab {
    pub(crate) command: Command,
    input: Option<Vec<u8>>,
    patience: Duration,
}

impl Vmlab {
    fn new(site: &Site, mut command: Command) -> Self {
        command
            .current_dir(site.cwd())
            .env("XDG_STATE_HOME", site.state())
            .env("XDG_RUNTIME_DIR", site.runtime())
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Self { command, input: None, patience: PATIENCE }
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Writes this to its stdin, then closes it.
    pub(crate) fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self.command.stdin(Stdio::piped());
        self
    }

    /// A stdin that is neither written nor closed until the caller does.
    pub(crate) fn open_stdin(mut self) -> Self {
        self.command.stdin(Stdio::piped());
        self
    }

    pub(crate) fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Starts it.
    pub(crate) fn start(self) -> Running {
        let Self { mut command, input, patience } = self;
        let deadline = Instant::now() + patience;
        // Signals that a test sends to a terminal's or its own group are not for the test itself.
        command.process_group(0);
        let mut child =
            command.spawn().unwrap_or_else(|e| panic!("{:?}: {e}", command.get_program()));
        let process = Process::of_child(&child);
        let mut stdin = child.stdin.take();
        if let Some(input) = input {
            let mut stdin = stdin.take().unwrap();
            // A command that reads no more is no failure here; what it read is checked elsewhere.
            std::thread::spawn(move || stdin.write_all(&input).is_ok());
        }
        let stdout = child.stdout.take().map(Capture::of).unwrap_or_default();
        let stderr = child.stderr.take().map(Capture::of).unwrap_or_default();
        Running { child, process, stdin, stdout, stderr, deadline }
    }

    /// The command, for a terminal of the test's.
    pub(crate) fn into_terminal_command(self) -> Command {
        self.command
    }

    /// Runs it to its end.
    pub(crate) fn output(self) -> Outcome {
        self.start().finish()
    }
}

/// A process that is watched; its number cannot become another's unnoticed.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pidfd: std::os::fd::OwnedFd,
}

impl Process {
    fn of_child(child: &Child) -> Self {
        Self::of_pid(Pid::from_child(child)).unwrap()
    }

    fn of_pid(pid: Pid) -> Option<Self> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        Some(Self { pid: pid.as_raw_nonzero().get(), pidfd })
    }

    /// Watches a child of the test itself, and kills it when it is still there after some time.
    pub(crate) fn watchdog(child: &Child, patience: Duration) -> Self {
        let process = Self::of_child(child);
        let pidfd = process.pidfd.try_clone().unwrap();
        let watched = Self { pid: process.pid, pidfd };
        std::thread::spawn(move || {
            if !watched.wait_gone(Instant::now() + patience) {
                watched.signal(Signal::KILL);
            }
        });
        process
    }

    /// Waits for its end. False when the deadline came first.
    pub(crate) fn wait_gone(&self, deadline: Instant) -> bool {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: left.as_secs().try_into().unwrap(),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => panic!("poll: {e}"),
            }
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.pidfd, signal).unwrap();
    }

    /// A line of `/proc/PID/status`, in kB.
    pub(crate) fn status_kb(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap().trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// All processes below this one.
    pub(crate) fn descendants(&self) -> Vec<Process> {
        let parent_of = |pid: i32| -> Option<i32> {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The name may hold anything; what follows its last parenthesis is numbers.
            stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
        };
        let pids = std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
        let pairs: Vec<(i32, i32)> = pids.filter_map(|pid| Some((pid, parent_of(pid)?))).collect();
        let mut found = vec![self.pid];
        let mut at = 0;
        while let Some(&parent) = found.get(at) {
            found.extend(pairs.iter().filter(|(_, p)| *p == parent).map(|(pid, _)| *pid));
            at += 1;
        }
        found[1..].iter().filter_map(|&pid| Self::of_pid(Pid::from_raw(pid)?)).collect()
    }

    /// Whether the QEMU below this process, if its VM has one, is gone when it is. Ask before that.
    pub(crate) fn monitor(&self) -> Monitor {
        Monitor((!native()).then(|| self.qemu()))
    }

    /// The QEMU below this process. There has to be exactly one.
    pub(crate) fn qemu(&self) -> Process {
        let mut all = self.descendants();
        all.retain(|process| {
            std::fs::read_to_string(format!("/proc/{}/comm", process.pid))
                .is_ok_and(|comm| comm.starts_with("qemu-system"))
        });
        assert_eq!(all.len(), 1, "vmlab has not exactly one QEMU: {all:?}");
        all.remove(0)
    }
}

/// The process that a VM has for itself, if any.
pub(crate) struct Monitor(Option<Process>);

impl Monitor {
    /// It is no more, now that vmlab has ended.
    pub(crate) fn assert_gone(&self) {
        let gone = self.0.as_ref().is_none_or(|qemu| qemu.wait_gone(Instant::now()));
        assert!(gone, "QEMU outlives vmlab");
    }
}

/// The bytes, and whether these are all.
type Captured = Mutex<(Vec<u8>, bool)>;

/// What has been written to a pipe so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Capture(Arc<(Captured, Condvar)>);

impl Capture {
    fn of(mut pipe: impl Read + Send + 'static) -> Self {
        let capture = Self::default();
        let writer = capture.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            loop {
                let count = pipe.read(&mut buffer).unwrap_or(0);
                let mut state = writer.0.0.lock().unwrap();
                state.0.extend_from_slice(&buffer[..count]);
                state.1 = count == 0;
                writer.0.1.notify_all();
                if state.1 {
                    return;
                }
            }
        });
        capture
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.0.lock().unwrap().0.clone()
    }

    /// Waits until it contains some bytes. False when it ends or the deadline comes first.
    fn wait_for(&self, wanted: &[u8], deadline: Instant) -> bool {
        let mut state = self.0.0.lock().unwrap();
        loop {
            if state.0.windows(wanted.len()).any(|window| window == wanted) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.1 || left.is_zero() {
                return false;
            }
            state = self.0.1.wait_timeout(state, left).unwrap().0;
        }
    }

    fn wait_end(&self, deadline: Instant) -> bool {
        let mut state = self.0.0.lock().unwrap();
        while !state.1 && Arc::strong_count(&self.0) > 1 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.0.1.wait_timeout(state, left).unwrap().0;
        }
        true
    }
}

/// A call of vmlab that goes on. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    pub(crate) process: Process,
    pub(crate) stdin: Option<ChildStdin>,
    pub(crate) stdout: Capture,
    pub(crate) stderr: Capture,
    deadline: Instant,
}

impl Running {
    /// Waits until stdout contains this.
    pub(crate) fn wait_stdout(&self, wanted: &str) {
        if !self.stdout.wait_for(wanted.as_bytes(), self.deadline) {
            panic!("stdout never had {wanted:?}: {}", self.so_far());
        }
    }

    /// Waits until stderr contains this.
    pub(crate) fn wait_stderr(&self, wanted: &str) {
        if !self.stderr.wait_for(wanted.as_bytes(), self.deadline) {
            panic!("stderr never had {wanted:?}: {}", self.so_far());
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    fn so_far(&self) -> String {
        let text = |capture: &Capture| String::from_utf8_lossy(&capture.bytes()).into_owned();
        format!("stdout: {:?}\nstderr: {}", text(&self.stdout), text(&self.stderr))
    }

    /// Waits for its end and collects what it wrote.
    pub(crate) fn finish(mut self) -> Outcome {
        drop(self.stdin.take());
        if !self.process.wait_gone(self.deadline) {
            panic!("vmlab did not end in time: {}", self.so_far());
        }
        let status = self.child.wait().unwrap();
        // Whoever still holds these pipes was left running.
        let drained = Instant::now() + Duration::from_secs(5);
        if !self.stdout.wait_end(drained) || !self.stderr.wait_end(drained) {
            panic!("something holds vmlab's output open after its end: {}", self.so_far());
        }
        Outcome::new(status, self.stdout.bytes(), self.stderr.bytes())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // The whole group, for shells that have started vmlab.
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

/// What a call of vmlab came to.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The exit code, unless a signal killed it.
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

impl Outcome {
    fn new(status: ExitStatus, stdout: Vec<u8>, stderr: Vec<u8>) -> Self {
        Self { code: status.code(), signal: status.signal(), stdout, stderr }
    }

    pub(crate) fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub(crate) fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Fails unless it ended with this code.
    #[track_caller]
    pub(crate) fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(
            self.code,
            Some(code),
            "signal {:?}\nstdout: {}\nstderr: {}",
            self.signal,
            self.stdout_text(),
            self.stderr_text()
        );
        self
    }

    /// Fails unless it ended with code 0, wrote exactly this to stdout and nothing to stderr.
    #[track_caller]
    pub(crate) fn expect_stdout(&self, stdout: &str) -> &Self {
        self.expect_code(0);
        assert_eq!(self.stdout_text(), stdout, "stderr: {}", self.stderr_text());
        assert_eq!(self.stderr_text(), "");
        self
    }

    /// Fails unless stderr has all of these.
    #[track_caller]
    pub(crate) fn expect_stderr(&self, wanted: &[&str]) -> &Self {
        let stderr = self.stderr_text();
        for wanted in wanted {
            assert!(stderr.contains(wanted), "no {wanted:?} in stderr: {stderr}");
        }
        self
    }
}

/// Bytes that no compression or luck reproduces, the same at every run.
pub(crate) fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

/// A file's permission bits.
pub(crate) fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    path.symlink_metadata().unwrap().permissions().mode() & 0o7777
}
