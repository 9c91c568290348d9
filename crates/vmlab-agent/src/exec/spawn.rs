//! Starting a command: everything is prepared before there is a child, which only makes system calls.

use std::ffi::{CStr, CString, c_char};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use vmlab_wire::message::{Exec, StartFailure, StartStage};

/// Where execvp(3) looks when the environment has no `PATH`.
const DEFAULT_PATH: &[u8] = b"/bin:/usr/bin";

/// The highest signal number of Linux.
const LAST_SIGNAL: i32 = 64;

/// The descriptors that become a command's standard streams. All are above 2.
pub(crate) struct ChildStdio {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
    /// Whether they are a terminal, which the command is to control.
    pub(crate) terminal: bool,
}

/// Strings in the form that execve(2) takes them: the array ends with a null pointer and points into
/// the strings beside it.
struct StringArray {
    _strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

impl StringArray {
    fn new(strings: Vec<CString>) -> Self {
        let mut pointers: Vec<_> = strings.iter().map(|s| s.as_ptr()).collect();
        pointers.push(std::ptr::null());
        Self { _strings: strings, pointers }
    }

    fn as_ptr(&self) -> *const *const c_char {
        self.pointers.as_ptr()
    }
}

/// All that the child needs, in the form in which the system calls take it.
struct Plan {
    /// Paths to try, in order.
    candidates: Vec<CString>,
    /// They come from `PATH`.
    searched: bool,
    /// The program to execute in their place.
    opened: Option<RawFd>,
    argv: StringArray,
    /// `/bin/sh`, room for the script's path, and the arguments after the first.
    shell_argv: Vec<*const c_char>,
    env: StringArray,
    cwd: CString,
    groups: Vec<libc::gid_t>,
    identity: Option<(libc::uid_t, libc::gid_t)>,
    umask: libc::mode_t,
    rlimits: Vec<(u32, libc::rlimit)>,
    stdio: [RawFd; 3],
    terminal: bool,
    reset_oom_score: bool,
    errors: RawFd,
}

fn c_string(bytes: &[u8]) -> Result<CString, StartFailure> {
    CString::new(bytes).map_err(|_| failure(StartStage::Program, libc::EINVAL))
}

fn failure(stage: StartStage, errno: i32) -> StartFailure {
    StartFailure { stage, errno }
}

/// The paths that execvp(3) would try.
fn candidates(program: &[u8], env: &[(Vec<u8>, Vec<u8>)]) -> Result<Vec<CString>, StartFailure> {
    if program.contains(&b'/') {
        return Ok(vec![c_string(program)?]);
    }
    if program.is_empty() {
        return Err(failure(StartStage::Program, libc::ENOENT));
    }
    let path = env.iter().find(|(name, _)| name == b"PATH").map_or(DEFAULT_PATH, |(_, v)| v);
    path.split(|&b| b == b':')
        .map(|dir| match dir {
            // An empty element is the working directory.
            b"" => c_string(program),
            dir => c_string(&[dir, b"/", program].concat()),
        })
        .collect()
}

/// Clamps a limit on open files to what the kernel lets anyone have.
fn clamp(resource: u32, limit: libc::rlimit) -> libc::rlimit {
    if resource != libc::RLIMIT_NOFILE {
        return limit;
    }
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open");
    match most.ok().and_then(|s| s.trim().parse::<u64>().ok()) {
        Some(most) => {
            libc::rlimit { rlim_cur: limit.rlim_cur.min(most), rlim_max: limit.rlim_max.min(most) }
        }
        None => limit,
    }
}

impl Plan {
    fn new(
        exec: &Exec,
        opened: Option<&OwnedFd>,
        stdio: &ChildStdio,
        errors: &OwnedFd,
    ) -> Result<Self, StartFailure> {
        let program = exec.argv.first().ok_or(failure(StartStage::Program, libc::EINVAL))?;
        let candidates = candidates(program, &exec.env)?;
        let argv = exec.argv.iter().map(|a| c_string(a)).collect::<Result<Vec<_>, _>>()?;
        let argv = StringArray::new(argv);
        let mut shell_argv = vec![c"/bin/sh".as_ptr(), std::ptr::null()];
        shell_argv.extend_from_slice(&argv.pointers[1..]);
        let env = exec
            .env
            .iter()
            .map(|(name, value)| c_string(&[name.as_slice(), b"=", value].concat()))
            .collect::<Result<Vec<_>, _>>()?;
        let is_root = rustix::process::geteuid().is_root();
        let rlimits = exec.rlimits.iter().map(|&(resource, soft, hard)| {
            let limit = libc::rlimit { rlim_cur: soft.min(hard), rlim_max: hard };
            (resource, clamp(resource, limit))
        });
        Ok(Self {
            candidates,
            searched: !program.contains(&b'/'),
            opened: opened.map(AsRawFd::as_raw_fd),
            argv,
            shell_argv,
            env: StringArray::new(env),
            cwd: CString::new(exec.cwd.as_slice())
                .map_err(|_| failure(StartStage::Cwd, libc::EINVAL))?,
            groups: exec.user.groups.clone(),
            // Only root can change identity; anybody can stay who they are.
            identity: (is_root || rustix::process::getuid().as_raw() != exec.user.uid)
                .then_some((exec.user.uid, exec.user.gid)),
            umask: exec.umask & 0o777,
            rlimits: rlimits.collect(),
            stdio: [&stdio.stdin, &stdio.stdout, &stdio.stderr].map(AsRawFd::as_raw_fd),
            terminal: stdio.terminal,
            reset_oom_score: rustix::process::getpid().is_init(),
            errors: errors.as_raw_fd(),
        })
    }

    /// The child's part. Returns only when something failed.
    ///
    /// The child has the parent's memory, so this only makes system calls, and changes nothing there but
    /// its own plan.
    fn run(&mut self) -> (StartStage, i32) {
        let errno = || io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        if let Err(stage) = self.become_leader().and_then(|()| self.become_user()) {
            return (stage, errno());
        }
        // SAFETY: `cwd` is a C string.
        if unsafe { libc::chdir(self.cwd.as_ptr()) } != 0 {
            return (StartStage::Cwd, errno());
        }
        (StartStage::Program, self.exec())
    }

    /// Own session, standard streams, default signals.
    fn become_leader(&self) -> Result<(), StartStage> {
        // SAFETY: setsid touches no memory.
        unsafe { libc::setsid() };
        for (target, &fd) in self.stdio.iter().enumerate() {
            // SAFETY: dup2 touches no memory. The sources are above 2, so none is overwritten.
            if unsafe { libc::dup2(fd, target as RawFd) } < 0 {
                return Err(StartStage::Stdio);
            }
        }
        if self.terminal {
            // SAFETY: TIOCSCTTY takes a number, no pointer.
            if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } != 0 {
                return Err(StartStage::Stdio);
            }
        }
        default_signals();
        // All descriptors of the agent's are close-on-exec; those that a service inherited may not be.
        // SAFETY: close_range takes numbers only.
        unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        // SAFETY: all zeros is the empty set on Linux.
        let none: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `none` is a valid set, and a null old set is allowed.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) };
        Ok(())
    }

    /// Limits, mask and identity.
    fn become_user(&self) -> Result<(), StartStage> {
        if self.reset_oom_score {
            self.reset_oom_score();
        }
        // SAFETY: umask touches no memory.
        unsafe { libc::umask(self.umask) };
        for (resource, limit) in &self.rlimits {
            // A limit that the kernel refuses stays what it was: it is not worth failing for.
            // SAFETY: `limit` is a valid rlimit.
            unsafe { libc::setrlimit(*resource as _, limit) };
        }
        let Some((uid, gid)) = self.identity else { return Ok(()) };
        // SAFETY: the pointer and the length are of one vector.
        if unsafe { libc::setgroups(self.groups.len(), self.groups.as_ptr()) } != 0 {
            return Err(StartStage::Identity);
        }
        // SAFETY: setresgid touches no memory.
        if unsafe { libc::setresgid(gid, gid, gid) } != 0 {
            return Err(StartStage::Identity);
        }
        // SAFETY: setresuid touches no memory.
        if unsafe { libc::setresuid(uid, uid, uid) } != 0 {
            return Err(StartStage::Identity);
        }
        Ok(())
    }

    /// The agent is exempt from the OOM killer; commands are not.
    fn reset_oom_score(&self) {
        let path = c"/proc/self/oom_score_adj";
        // SAFETY: `path` is a C string.
        let fd = unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
        if fd >= 0 {
            // SAFETY: one byte is readable there.
            unsafe { libc::write(fd, b"0".as_ptr().cast(), 1) };
        }
    }

    /// Executes the first candidate that can be, as execvp(3) does. Returns an error number.
    fn exec(&mut self) -> i32 {
        if let Some(opened) = self.opened {
            let (argv, env) = (self.argv.as_ptr(), self.env.as_ptr());
            let flags = libc::AT_EMPTY_PATH;
            // SAFETY: the path is a C string; the arrays end with null and point to C strings that live in
            // `self`.
            unsafe { libc::syscall(libc::SYS_execveat, opened, c"".as_ptr(), argv, env, flags) };
            return io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        }
        let mut denied = false;
        let mut last = libc::ENOENT;
        for candidate in &self.candidates {
            // SAFETY: the arrays end with null and point to C strings that live in `self`.
            unsafe { libc::execve(candidate.as_ptr(), self.argv.as_ptr(), self.env.as_ptr()) };
            last = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
            match last {
                libc::ENOEXEC => {
                    // A script without `#!`.
                    self.shell_argv[1] = candidate.as_ptr();
                    let argv = self.shell_argv.as_ptr();
                    // SAFETY: as above.
                    unsafe { libc::execve(c"/bin/sh".as_ptr(), argv, self.env.as_ptr()) };
                    return libc::ENOEXEC;
                }
                // As in a shell, a directory of `PATH` that may not be searched is passed over.
                libc::EACCES if self.searched && !visible(candidate) => last = libc::ENOENT,
                libc::EACCES => denied = true,
                libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ENODEV | libc::ETIMEDOUT => {}
                _ => return last,
            }
        }
        if denied { libc::EACCES } else { last }
    }
}

/// Whether the directories that lead to a path may be searched, and it exists.
fn visible(path: &CStr) -> bool {
    // SAFETY: `path` is a C string.
    unsafe { libc::access(path.as_ptr(), libc::F_OK) == 0 }
}

/// Gives every signal its default action.
fn default_signals() {
    // The kernel's own sigaction in four words, all zero: SIG_DFL, no flags, an empty mask. The
    // library's call leaves out the two signals that it uses itself, which may be inherited ignored.
    let default = [0u64; 4];
    let old = std::ptr::null_mut::<u64>();
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: the kernel reads its structure of four words; the mask has 8 bytes.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), old, 8) };
    }
}

/// The byte that stands for a stage in the child's report.
fn stage_byte(stage: StartStage) -> u8 {
    match stage {
        StartStage::Stdio => 0,
        StartStage::Cwd => 1,
        StartStage::Identity => 2,
        StartStage::Program => 3,
    }
}

/// Makes the child, which shares this process's memory as in vfork(2): the parent stands still until the
/// child has executed its command or is gone. Copying the memory of an agent of a megabyte would take a
/// guest without KVM longer than all the rest.
fn start(plan: &mut Plan) -> i32 {
    // The stack grows down from the end, which the psABI wants aligned.
    let mut stack = vec![0u128; CHILD_STACK / size_of::<u128>()];
    let top = stack.as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the stack has room for what `child` calls and outlives it, as does `plan`: the parent goes on
    // only when the child uses neither any more.
    unsafe { libc::clone(child, top.cast(), flags, std::ptr::from_mut(plan).cast()) }
}

/// Room for the child's calls, none of which is deep.
const CHILD_STACK: usize = 64 * 1024;

/// The child's life. `plan` points to its [`Plan`].
extern "C" fn child(plan: *mut libc::c_void) -> i32 {
    // SAFETY: `start` gave a pointer to a plan that nobody else uses while this runs.
    let plan = unsafe { &mut *plan.cast::<Plan>() };
    let (stage, errno) = plan.run();
    let [e0, e1, e2, e3] = errno.to_le_bytes();
    let bytes = [stage_byte(stage), e0, e1, e2, e3];
    // SAFETY: the pointer and the length are of one array.
    unsafe { libc::write(plan.errors, bytes.as_ptr().cast(), bytes.len()) };
    // SAFETY: _exit runs nothing of the parent's.
    unsafe { libc::_exit(127) }
}

/// This program, to be executed whatever the root is by then.
pub(crate) fn this_program() -> rustix::io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::open("/proc/self/exe", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Starts a command and returns its process id, once it has been executed.
///
/// It executes `opened`, if that is given, and else what its first argument names.
pub(crate) fn spawn(
    exec: &Exec,
    opened: Option<&OwnedFd>,
    stdio: ChildStdio,
) -> Result<i32, StartFailure> {
    let stdio_failure = |e: rustix::io::Errno| failure(StartStage::Stdio, e.raw_os_error());
    let (report, errors) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(stdio_failure)?;
    let mut plan = Plan::new(exec, opened, &stdio, &errors)?;
    let pid = start(&mut plan);
    if pid < 0 {
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EAGAIN);
        return Err(failure(StartStage::Program, errno));
    }
    drop((errors, stdio, plan));
    let mut bytes = [0; 5];
    let count = loop {
        match rustix::io::read(&report, &mut bytes) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other.map_err(stdio_failure)?,
        }
    };
    if count < bytes.len() {
        // The pipe was closed by a successful exec.
        return Ok(pid);
    }
    // The child that could not become the command is gone at once, and is nobody's exit status.
    // SAFETY: a null status is allowed.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    let [stage, errno @ ..] = bytes;
    let stage = match stage {
        0 => StartStage::Stdio,
        1 => StartStage::Cwd,
        2 => StartStage::Identity,
        _ => StartStage::Program,
    };
    Err(failure(stage, i32::from_le_bytes(errno)))
}
