//! What the proof found, in words for the user.

use std::fmt;
use std::io;
use std::time::Duration;

/// A KVM that ran the guest of the proof correctly and fast.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvmProof {
    /// Iterations of the two-instruction loop that was timed.
    pub iterations: u32,
    /// The shortest time that the loop took, entry to the guest and exit included.
    pub took: Duration,
    /// The instructions that were executed and gave the right results. One that the host's
    /// processor does not have is left out.
    pub instructions: Vec<&'static str>,
    /// Whether KVM does not notice the guest's `xsetbv`. Its value is then gone after the next
    /// exit, and `xsave` leaves the SSE and AVX registers out, which a guest kernel relies on when
    /// it switches threads; `noxsave` keeps Linux from using it. A KVM inside a VM of QEMU 7.2's
    /// TCG is one of these.
    pub xsetbv_lost: bool,
    /// Time for the whole guest: to set it up, run it and take it down.
    pub total: Duration,
}

impl KvmProof {
    /// Guest instructions per second in the timed loop, in millions.
    pub fn mips(&self) -> f64 {
        mips(self.iterations, self.took)
    }
}

/// One line: the speed, what was executed, and what the proof cost.
impl fmt::Display for KvmProof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.0} million instructions a second ({} iterations in {:?}), correct: {}{}; proved in {:.1} ms",
            self.mips(),
            self.iterations,
            self.took,
            self.instructions.join(", "),
            if self.xsetbv_lost { ", but the guest's xsetbv is lost" } else { "" },
            self.total.as_secs_f64() * 1e3,
        )
    }
}

/// Millions of instructions per second for a loop of two instructions.
fn mips(iterations: u32, took: Duration) -> f64 {
    f64::from(iterations) * 2.0 / took.as_secs_f64().max(1e-9) / 1e6
}

/// Why KVM is not used.
///
/// Each message is one line that makes sense after "KVM is not used: ".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmUnusable {
    /// There is no device node.
    #[error(
        "/dev/kvm does not exist (load the module kvm_intel or kvm_amd, and enable virtualization \
         in the firmware, or nested virtualization if this host is a VM)"
    )]
    NoDevice,
    /// The node is there, and nothing behind it.
    #[error(
        "/dev/kvm exists, but no driver answers (load the module kvm_intel or kvm_amd, and enable \
         virtualization in the firmware, or nested virtualization if this host is a VM)"
    )]
    NoDriver,
    /// The node may not be opened by this user.
    #[error(
        "no permission to open /dev/kvm (join its group: `sudo usermod -aG kvm $USER`, then log in \
         again)"
    )]
    NoPermission,
    /// Another hypervisor has taken the processor's virtualization.
    #[error("another hypervisor, such as VirtualBox, holds the processor (stop its VMs)")]
    Busy,
    /// The node cannot be opened for another reason.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// The kernel speaks another KVM API than the stable one.
    #[error("/dev/kvm has API version {0}, and only version 12 is stable (update the kernel)")]
    WrongApiVersion(i32),
    /// The kernel's KVM lacks something that every guest needs.
    #[error("/dev/kvm lacks the capability {0} (update the kernel)")]
    MissingCapability(&'static str),
    /// A system call failed.
    #[error("KVM failed to {step}")]
    CannotRun {
        /// What was to be done.
        step: &'static str,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// The guest's code was not executed as a processor would do it.
    #[error("/dev/kvm cannot execute {instruction}: the guest {stop}")]
    CannotEmulate {
        /// The instruction under test.
        instruction: &'static str,
        /// How the guest ended.
        stop: GuestStop,
    },
    /// The guest's code was executed by something slower than a processor.
    #[error(
        "/dev/kvm is a slow emulation: {:.1} million instructions a second ({iterations} \
         iterations took {:.1} ms, more than {:.1} ms)",
        mips(*.iterations, *.took), .took.as_secs_f64() * 1e3, .limit.as_secs_f64() * 1e3
    )]
    TooSlow {
        /// Iterations of the two-instruction loop that was timed.
        iterations: u32,
        /// The shortest time that the loop took.
        took: Duration,
        /// The time that it may take.
        limit: Duration,
    },
    /// The proof did not end in time.
    #[error(
        "/dev/kvm hangs: \"{step}\" did not end within {:.0} ms{}",
        .after.as_secs_f64() * 1e3,
        if *.left_behind { ", and cannot be interrupted" } else { "" }
    )]
    Hung {
        /// What was being done.
        step: &'static str,
        /// How long the proof had been running.
        after: Duration,
        /// Whether the thread could not be stopped: it lasts until the process ends, with its
        /// file descriptors.
        left_behind: bool,
    },
    /// The proof has no guest for this processor.
    #[error("KVM can be proved on x86_64 only so far, and this is {arch}")]
    NotThisArchitecture {
        /// The architecture that this program was built for.
        arch: &'static str,
    },
}

impl KvmUnusable {
    /// The verdict on an error of opening `/dev/kvm`.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) fn from_open(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT) => Self::NoDevice,
            Some(libc::ENODEV | libc::ENXIO) => Self::NoDriver,
            Some(libc::EACCES | libc::EPERM) => Self::NoPermission,
            Some(libc::EBUSY) => Self::Busy,
            _ => Self::Open(error),
        }
    }

    /// The verdict on an error of `KVM_CREATE_VM`.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) fn from_create_vm(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EBUSY) => Self::Busy,
            _ => Self::CannotRun { step: "create a VM", source: error },
        }
    }
}

/// How a guest ended that should have halted with the right result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestStop {
    /// It halted with other values than a processor computes.
    #[error("computed {found:x?} instead of {expected:x?}")]
    WrongResult {
        /// What a processor computes.
        expected: Vec<u64>,
        /// What was found in the guest's memory.
        found: Vec<u64>,
    },
    /// It took an exception that the code cannot raise.
    #[error("took the exception {vector}")]
    Exception {
        /// The vector: 6 is an invalid opcode, 13 general protection, 14 a page fault.
        vector: u8,
    },
    /// It halted at a place where it has no code.
    #[error("halted at the stray address {rip:#x}")]
    StrayHalt {
        /// The instruction pointer.
        rip: u64,
    },
    /// `KVM_EXIT_SHUTDOWN`.
    #[error("triple-faulted (KVM_EXIT_SHUTDOWN)")]
    TripleFault,
    /// `KVM_EXIT_INTERNAL_ERROR`.
    #[error("ended with KVM_EXIT_INTERNAL_ERROR, suberror {suberror}")]
    InternalError {
        /// `KVM_INTERNAL_ERROR_EMULATION`, 1, says that KVM tried to emulate an instruction and
        /// could not, where a processor executes it.
        suberror: u32,
    },
    /// `KVM_EXIT_FAIL_ENTRY`.
    #[error("could not be entered (KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x})")]
    FailEntry {
        /// The processor's own reason.
        reason: u64,
    },
    /// Any other exit, which nothing in the guest asks for.
    #[error("stopped with the unexpected exit {exit}")]
    OtherExit {
        /// The exit as `kvm-ioctls` names it.
        exit: String,
    },
}
