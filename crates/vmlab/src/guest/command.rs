//! Commands in the guest, after the manner of [`std::process`].

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;
use vmlab_wire::message::{
    self, Exec, ExecStdio, Exited, StartFailure, StartStage, StderrTo, TerminalSize, User,
};
use vmlab_wire::{HostMessage, ProcessId};

use super::connection::Connection;
use super::environment::Environment;
use super::environment::GuestUser;
use super::streams::{ChildStderr, ChildStdin, ChildStdout};
use crate::Error;
use crate::vm::Vm;

/// What a standard stream of a command is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdio {
    /// `/dev/null`.
    Null,
    /// A stream that the caller writes or reads.
    Piped,
}

/// A command to be run in a VM.
///
/// ```no_run
/// use std::io::{Read, Write};
/// use vmlab::{Stdio, Vm};
///
/// let vm = Vm::builder().kernel("debian:6.1").start()?;
/// let mut child = vm.command("sort").arg("-r").stdin(Stdio::Piped).spawn()?;
/// let mut stdin = child.stdin.take().expect("it is piped");
/// stdin.write_all(b"a\nb\n")?;
/// drop(stdin); // the end of the input
/// let mut sorted = String::new();
/// child.stdout.take().expect("it is piped").read_to_string(&mut sorted)?;
/// assert_eq!(sorted, "b\na\n");
/// assert!(child.wait()?.success());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Command<'vm> {
    vm: &'vm Vm,
    argv: Vec<OsString>,
    environment: Environment,
    stdin: Stdio,
    stdout: Stdio,
    stderr: Stdio,
    merged: bool,
    terminal: Option<TerminalSize>,
    /// The program is the agent itself.
    of_agent: bool,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus(Exited);

/// What a command wrote and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to stdout.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: Vec<u8>,
}

/// A running command. Dropping it leaves the command running in the VM.
#[derive(Debug)]
pub struct Child<'vm> {
    /// Its stdin, when piped or a terminal.
    pub stdin: Option<ChildStdin>,
    /// Its stdout, when piped or a terminal.
    pub stdout: Option<ChildStdout>,
    /// Its stderr, when piped.
    pub stderr: Option<ChildStderr>,
    vm: &'vm Vm,
    process: ProcessId,
}

impl<'vm> Command<'vm> {
    pub(crate) fn new(vm: &'vm Vm, program: OsString, environment: Environment) -> Self {
        Self {
            vm,
            argv: vec![program],
            environment,
            stdin: Stdio::Null,
            stdout: Stdio::Piped,
            stderr: Stdio::Piped,
            merged: false,
            terminal: None,
            of_agent: false,
        }
    }

    /// A command that is a part of the agent, in whatever root the guest has. Nothing of the guest's
    /// environment applies to it but the user.
    pub(crate) fn of_agent(vm: &'vm Vm, user: GuestUser) -> Self {
        let environment = Environment { user, ..Environment::of_system_in("/".into()) };
        let mut command = Self::new(vm, "vmlab-agent".into(), environment).arg("applet");
        command.of_agent = true;
        command
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.argv.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.argv.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.set(key, value);
        self
    }

    /// Starts from an empty environment.
    pub fn env_clear(mut self) -> Self {
        self.environment.vars.clear();
        self
    }

    /// Sets the working directory.
    pub fn current_dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.environment.cwd = dir.as_ref().to_owned();
        self
    }

    /// Sets who runs it.
    pub fn user(mut self, user: GuestUser) -> Self {
        self.environment.user = user;
        self
    }

    /// Sets what its stdin is; at first, nothing.
    pub fn stdin(mut self, stdin: Stdio) -> Self {
        self.stdin = stdin;
        self
    }

    /// Sets what its stdout is; at first, a pipe.
    pub fn stdout(mut self, stdout: Stdio) -> Self {
        self.stdout = stdout;
        self
    }

    /// Sets what its stderr is; at first, a pipe.
    pub fn stderr(mut self, stderr: Stdio) -> Self {
        self.stderr = stderr;
        self
    }

    /// Sends its stderr wherever its stdout goes, in the order of writing.
    pub fn merge_stderr(mut self) -> Self {
        self.merged = true;
        self
    }

    /// Gives it a terminal of its own. All output then comes on stdout.
    pub fn terminal(mut self, size: TerminalSize) -> Self {
        self.terminal = Some(size);
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// When the program cannot be found or executed, or the VM has ended.
    pub fn spawn(self) -> Result<Child<'vm>, Error> {
        let connection = self.vm.connection();
        let terminal = self.terminal.is_some();
        let stdin = terminal || self.stdin == Stdio::Piped;
        let stdout = terminal || self.stdout == Stdio::Piped;
        let stderr = !terminal && !self.merged && self.stderr == Stdio::Piped;
        let outputs: &[message::Stdio] = match (stdout, stderr) {
            (true, true) => &[message::Stdio::Stdout, message::Stdio::Stderr],
            (true, false) => &[message::Stdio::Stdout],
            (false, true) => &[message::Stdio::Stderr],
            (false, false) => &[],
        };
        let process = connection.new_process(stdin, outputs);
        let exec = self.message(process, stdin, stdout);
        let stream = |stdio| (Arc::clone(connection), process.stream(stdio));
        let child = Child {
            stdin: stdin.then(|| stream(message::Stdio::Stdin)).map(|(c, s)| ChildStdin::new(c, s)),
            stdout: stdout
                .then(|| stream(message::Stdio::Stdout))
                .map(|(c, s)| ChildStdout::new(c, s)),
            stderr: stderr
                .then(|| stream(message::Stdio::Stderr))
                .map(|(c, s)| ChildStderr::new(c, s)),
            vm: self.vm,
            process,
        };
        let program = self.argv[0].clone();
        let cwd = self.environment.cwd;
        let exec = Box::new(exec);
        let message = match self.of_agent {
            true => HostMessage::ExecAgent(exec),
            false => HostMessage::Exec(exec),
        };
        connection
            .send(&message)
            .map_err(|source| Error::TooManyArguments { program: program.clone(), source })?;
        match connection.wait_started(process).map_err(|lost| self.vm.lost(lost))? {
            Ok(()) => Ok(child),
            Err(failure) => Err(start_error(failure, program, cwd)),
        }
    }

    /// Runs it to its end and collects what it writes.
    ///
    /// # Errors
    /// When it cannot be started, or the VM ends before it does.
    pub fn output(self) -> Result<Output, Error> {
        let mut child = self.spawn()?;
        drop(child.stdin.take());
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        // A stream fails only when the VM has ended, which the wait below reports.
        std::thread::scope(|scope| {
            if let Some(mut stderr) = stderr {
                let err = &mut err;
                scope.spawn(move || stderr.read_to_end(err).is_ok());
            }
            if let Some(mut stdout) = stdout {
                let _ = stdout.read_to_end(&mut out);
            }
        });
        Ok(Output { status: child.wait()?, stdout: out, stderr: err })
    }

    fn message(&self, process: ProcessId, stdin: bool, stdout: bool) -> Exec {
        let bytes = |text: &OsStr| text.as_bytes().to_vec();
        let environment = &self.environment;
        let stderr = match self.stderr {
            _ if self.merged => StderrTo::Stdout,
            Stdio::Null => StderrTo::Null,
            Stdio::Piped => StderrTo::Stream,
        };
        Exec {
            process,
            argv: self.argv.iter().map(|arg| bytes(arg)).collect(),
            env: environment.variables(),
            cwd: bytes(environment.cwd.as_os_str()),
            user: User {
                uid: environment.user.uid,
                gid: environment.user.gid,
                groups: environment.user.groups.clone(),
            },
            umask: environment.umask,
            rlimits: environment.rlimits.clone(),
            stdio: match self.terminal {
                Some(size) => ExecStdio::Terminal(size),
                None => ExecStdio::Pipes { stdin, stdout, stderr },
            },
        }
    }
}

fn start_error(failure: StartFailure, program: OsString, cwd: PathBuf) -> Error {
    let source = io::Error::from_raw_os_error(failure.errno);
    match failure.stage {
        StartStage::Program if failure.errno == Errno::NOENT.raw_os_error() => {
            Error::CommandNotFound { program }
        }
        StartStage::Program => Error::CommandNotExecutable { program, source },
        StartStage::Cwd => Error::WorkingDirectory { dir: cwd, source },
        StartStage::Stdio => Error::CommandSetup { program, what: "standard streams", source },
        StartStage::Identity => {
            Error::CommandSetup { program, what: "user, limits and session", source }
        }
    }
}

impl Child<'_> {
    /// Waits for its end.
    ///
    /// # Errors
    /// When the VM ends before it does.
    pub fn wait(&mut self) -> Result<ExitStatus, Error> {
        loop {
            if let Some(status) = self.wait_until(None)? {
                return Ok(status);
            }
        }
    }

    /// Waits for its end, at most until the deadline, when it gives `None`.
    ///
    /// # Errors
    /// When the VM ends before it does.
    pub fn wait_until(&mut self, deadline: Option<Instant>) -> Result<Option<ExitStatus>, Error> {
        let exited = self.connection().wait_exited(self.process, deadline);
        Ok(exited.map_err(|lost| self.vm.lost(lost))?.map(ExitStatus))
    }

    /// A handle that sends it signals and terminal sizes, for other threads.
    pub fn control(&self) -> ChildControl {
        ChildControl { connection: Arc::clone(self.connection()), process: self.process }
    }

    fn connection(&self) -> &Arc<Connection> {
        self.vm.connection()
    }
}

impl Drop for Child<'_> {
    fn drop(&mut self) {
        self.connection().forget(self.process);
    }
}

/// Sends signals and terminal sizes to a command. What comes after its end does nothing.
#[derive(Debug, Clone)]
pub struct ChildControl {
    connection: Arc<Connection>,
    process: ProcessId,
}

impl ChildControl {
    /// Sends a signal, by its Linux number, to the command's process group; with a terminal, to the
    /// group in its foreground.
    pub fn signal(&self, signal: i32) {
        self.send(HostMessage::Signal(self.process, signal));
    }

    /// Tells the command's terminal its new size.
    pub fn resize(&self, size: TerminalSize) {
        self.send(HostMessage::Resize(self.process, size));
    }

    fn send(&self, message: HostMessage) {
        // These messages are short, so the only failure is that the VM has ended.
        let _ = self.connection.send(&message);
    }
}

impl ExitStatus {
    /// That of nothing that was run, which is a success.
    pub(crate) fn of_nothing() -> Self {
        Self(Exited { status: message::ExitStatus::Code(0), oom_kills: 0, cpu_us: (0, 0) })
    }

    /// The exit code, unless it was killed by a signal.
    pub fn code(self) -> Option<u8> {
        match self.0.status {
            message::ExitStatus::Code(code) => Some(code),
            message::ExitStatus::Signal(_) => None,
        }
    }

    /// The signal that killed it.
    pub fn signal(self) -> Option<i32> {
        match self.0.status {
            message::ExitStatus::Code(_) => None,
            message::ExitStatus::Signal(signal) => Some(signal),
        }
    }

    /// Whether it exited with code 0.
    pub fn success(self) -> bool {
        self.code() == Some(0)
    }

    /// The exit code as a shell has it: 128 and the signal's number for a killed command.
    pub fn shell_code(self) -> u8 {
        match self.0.status {
            message::ExitStatus::Code(code) => code,
            message::ExitStatus::Signal(signal) => 128u8.saturating_add(signal as u8 & 0x7f),
        }
    }

    /// How many processes the guest's kernel killed for want of memory while it ran.
    pub fn oom_kills(self) -> u64 {
        self.0.oom_kills
    }

    /// CPU time in microseconds that it and its children used: in user mode and in the kernel.
    pub fn cpu_time_us(self) -> (u64, u64) {
        self.0.cpu_us
    }
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.status {
            message::ExitStatus::Code(code) => write!(f, "exit code {code}"),
            message::ExitStatus::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

impl Output {
    /// Stdout as text, with what is not UTF-8 replaced.
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Stderr as text, with what is not UTF-8 replaced.
    pub fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}
