//! Lists of system calls. All others fail with `ENOSYS`, for which C libraries have something else to try; a thread
//! that was led astray gets as little from that as from being killed.
//!
//! Only numbers and plain arguments can be looked at, no paths and no structures.

use std::collections::BTreeMap;

use libc::c_long;
use rustix::ioctl::opcode;
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

/// Events, and the message of a panic.
const EVENTS: &[c_long] = &[libc::SYS_read, libc::SYS_write, libc::SYS_writev];

/// Waiting for requests, and ending the connection by which others are told that a queue is beyond use.
const TRANSPORT: &[c_long] = &[
    libc::SYS_ppoll,
    libc::SYS_shutdown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// The `ioctl` by which a thread of a monitor interrupts its guest: `KVM_IRQ_LINE` of `linux/kvm.h`, whose argument has
/// two numbers of 32 bits.
pub const KVM_IRQ_LINE: u32 = opcode::write::<[u32; 2]>(0xae, 0x61);

/// What an argument has to be. The kernel and the filter look at its lower 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Is {
    /// This number.
    This(u32),
    /// None of these flags.
    Without(u32),
}

/// What arguments, by their numbers from 0 on, have to be together.
pub type Condition = Vec<(u8, Is)>;

/// The system calls that a thread keeps.
#[derive(Debug, Clone)]
pub struct Calls(BTreeMap<c_long, Vec<Condition>>);

impl Calls {
    /// What any code needs, with reading and writing of what is open.
    pub fn runtime() -> Self {
        let looking = [libc::F_GETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC];
        let looking = looking.map(|command| vec![(1, Is::This(command.cast_unsigned()))]);
        let no_code = || vec![(2, Is::Without(libc::PROT_EXEC.cast_unsigned()))];
        let own = getpid().as_raw_pid().cast_unsigned();
        Self(BTreeMap::new())
            .and(RUNTIME)
            .and(EVENTS)
            .and_if(libc::SYS_mmap, [no_code()])
            .and_if(libc::SYS_mprotect, [no_code()])
            // abort(3) and signals between threads, and nobody else's end.
            .and_if(libc::SYS_tgkill, [vec![(0, Is::This(own))]])
            .and_if(libc::SYS_fcntl, looking)
    }

    /// What a thread needs besides to serve a queue.
    pub fn of_worker() -> Self {
        let interrupt = vec![(1, Is::This(KVM_IRQ_LINE))];
        Self::runtime().and(TRANSPORT).and_if(libc::SYS_ioctl, [interrupt])
    }

    /// These as well, with any arguments.
    #[must_use]
    pub fn and(mut self, calls: &[c_long]) -> Self {
        self.0.extend(calls.iter().map(|call| (*call, Vec::new())));
        self
    }

    /// This one as well, where one of the conditions holds. There has to be one.
    #[must_use]
    pub fn and_if(mut self, call: c_long, one_of: impl IntoIterator<Item = Condition>) -> Self {
        self.0.insert(call, one_of.into_iter().collect());
        self
    }

    /// The program for the kernel.
    pub(super) fn filter(&self) -> Result<BpfProgram, BackendError> {
        let rule = |condition: &Condition| {
            let parts = condition.iter().map(|(argument, is)| part(*argument, *is));
            SeccompRule::new(parts.collect::<Result<_, _>>()?)
        };
        let rules = self.0.iter().map(|(call, conditions)| {
            let conditions = conditions.iter().map(rule).collect::<Result<_, _>>()?;
            Ok::<_, BackendError>((*call, conditions))
        });
        let rules = rules.collect::<Result<_, _>>()?;
        let (others, these) = (SeccompAction::Errno(libc::ENOSYS as u32), SeccompAction::Allow);
        SeccompFilter::new(rules, others, these, std::env::consts::ARCH.try_into()?)?.try_into()
    }
}

fn part(argument: u8, is: Is) -> Result<SeccompCondition, BackendError> {
    let (operator, value) = match is {
        Is::This(value) => (SeccompCmpOp::Eq, value.into()),
        Is::Without(flags) => (SeccompCmpOp::MaskedEq(flags.into()), 0),
    };
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
}
