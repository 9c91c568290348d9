//! The system calls that serving a directory takes. All others fail with `ENOSYS`, for which C libraries have
//! something else to try; a thread that was led astray gets as little from that as from being killed.
//!
//! Only numbers and plain arguments can be looked at, no paths and no structures.

use std::collections::BTreeMap;

use libc::c_long;
use rustix::process::getpid;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

/// Memory, locks, time, and the end of a thread: what Rust's and the C library need for any code.
const RUNTIME: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
];

/// Waiting for requests, interrupting the guest, the message of a panic, and ending the connection by which
/// others are told that a queue is beyond use.
const TRANSPORT: &[c_long] = &[
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_shutdown,
    libc::SYS_write,
    libc::SYS_writev,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// Looking at files and reading them. The rules of Landlock tell what can be opened.
const READING: &[c_long] = &[
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getxattr,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv2,
    libc::SYS_readlinkat,
    libc::SYS_statx,
    libc::SYS_syncfs,
];

/// Changing them.
const WRITING: &[c_long] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_ftruncate,
    libc::SYS_linkat,
    libc::SYS_mkdirat,
    libc::SYS_openat,
    libc::SYS_pwrite64,
    libc::SYS_pwritev2,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// The flags of open(2) that change something.
const CHANGING: libc::c_int =
    libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY);

type Result<T> = std::result::Result<T, BackendError>;

/// The program for the threads of a share.
pub(super) fn filter(read_only: bool) -> Result<BpfProgram> {
    let always = [RUNTIME, TRANSPORT, READING].concat();
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        always.into_iter().map(|call| (call, Vec::new())).collect();

    // No new code.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![rule(2, Is::Without(libc::PROT_EXEC))?]);
    }
    // abort(3), and nobody else's end.
    rules.insert(libc::SYS_tgkill, vec![rule(0, Is::This(getpid().as_raw_pid()))?]);
    let looking = [libc::F_GETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC];
    let looking = looking.into_iter().map(|command| rule(1, Is::This(command)));
    rules.insert(libc::SYS_fcntl, looking.collect::<Result<_>>()?);

    if read_only {
        rules.insert(libc::SYS_openat, vec![rule(2, Is::Without(CHANGING))?]);
    } else {
        rules.extend(WRITING.iter().map(|call| (*call, Vec::new())));
        // No device but that of an overlay's whiteouts, which nothing answers.
        rules.insert(libc::SYS_mknodat, vec![rule(3, Is::This(0))?]);
    }
    let (others, these) = (SeccompAction::Errno(libc::ENOSYS as u32), SeccompAction::Allow);
    SeccompFilter::new(rules, others, these, std::env::consts::ARCH.try_into()?)?.try_into()
}

/// What an argument has to be.
enum Is {
    This(i32),
    Without(i32),
}

fn rule(argument: u8, is: Is) -> Result<SeccompRule> {
    let (operator, value) = match is {
        Is::This(value) => (SeccompCmpOp::Eq, value),
        Is::Without(flags) => (SeccompCmpOp::MaskedEq(u64::from(flags.cast_unsigned())), 0),
    };
    let value = u64::from(value.cast_unsigned());
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    SeccompRule::new(vec![condition])
}
