//! Interrupting a vCPU from another thread without a signal handler.
//!
//! The thread of a vCPU blocks one signal, and `KVM_SET_SIGNAL_MASK` unblocks it only while the vCPU
//! runs. A signal sent then makes `KVM_RUN` return `EINTR`, and is blocked again before it could be
//! delivered; it stays pending until the thread takes it or ends. So no handler runs, and none is needed.

use rustix::ioctl::{self, opcode};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// The signal of the kick. Its default action is to be ignored, so that a KVM that breaks the
/// rules above cannot make it end the process.
const SIGNAL: libc::c_int = libc::SIGURG;

/// The number of signals in the kernel's mask (`_NSIG` of x86 and arm64).
const SIGNALS: libc::c_int = 64;

/// `KVMIO` of linux/kvm.h.
const KVMIO: u8 = 0xae;

/// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)` of linux/kvm.h.
const KVM_SET_SIGNAL_MASK: ioctl::Opcode =
    opcode::write::<kvm_bindings::kvm_signal_mask>(KVMIO, 0x8b);

/// `struct kvm_signal_mask` with its flexible array in place.
#[repr(C)]
struct SignalMask {
    /// Length of `blocked` in bytes.
    len: u32,
    blocked: [u8; 8],
}

/// Shared between the thread of a vCPU and those that interrupt it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kick {
    sent: Arc<AtomicBool>,
}

impl Kick {
    /// Whether the vCPU has to stop. Looked at when `KVM_RUN` was interrupted, which any other
    /// signal can do as well.
    pub(crate) fn is_sent(&self) -> bool {
        self.sent.load(Ordering::SeqCst)
    }

    /// Makes the vCPU of `thread` stop now, or at once when it is entered next.
    pub(crate) fn send<T>(&self, thread: &JoinHandle<T>) {
        self.sent.store(true, Ordering::SeqCst);
        // SAFETY: `thread` has not been joined, since it is borrowed here, so its pthread_t is
        // valid even if the thread has ended.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGNAL) };
    }

    /// Forgets what was sent to the calling thread, so that its vCPU can run on. The signal may come later than that.
    pub(crate) fn take(&self) {
        self.sent.store(false, Ordering::SeqCst);
        self.drain();
    }

    /// Takes a signal that is pending, with which no vCPU of the calling thread would run. Whether there is a kick is
    /// said by [`is_sent`](Self::is_sent) alone.
    pub(crate) fn drain(&self) {
        let Ok(set) = signal_set() else { return };
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the set is initialised, what was sent is not asked for, and `now` is a valid time.
        unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now) };
    }

    /// Blocks the signal in the calling thread, which must be the vCPU's.
    pub(crate) fn block_signal(&self) -> io::Result<()> {
        let set = signal_set()?;
        // SAFETY: the set was initialised above; no old mask is asked for.
        match unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())
        } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Lets the signal interrupt `KVM_RUN` of this vCPU, on top of whatever can do so now.
    pub(crate) fn unblock_while_running(&self, vcpu: BorrowedFd<'_>) -> io::Result<()> {
        let blocked = blocked_signals()? & !(1 << (SIGNAL - 1));
        let mask = SignalMask { len: 8, blocked: blocked.to_ne_bytes() };
        // SAFETY: the opcode takes a `kvm_signal_mask` with `len` bytes after it, which is what
        // `SignalMask` is, and writes nothing back.
        let request = unsafe { ioctl::Setter::<KVM_SET_SIGNAL_MASK, SignalMask>::new(mask) };
        // SAFETY: `vcpu` is a KVM vCPU, which is what the opcode is for.
        unsafe { ioctl::ioctl(vcpu, request) }.map_err(io::Error::from)
    }
}

/// The signal alone.
fn signal_set() -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset writes the whole set that it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: the set was initialised above, and SIGNAL is a valid number.
    match unsafe { libc::sigaddset(set.as_mut_ptr(), SIGNAL) } {
        // SAFETY: as above.
        0 => Ok(unsafe { set.assume_init() }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The calling thread's mask of blocked signals, bit `n - 1` for signal `n`.
fn blocked_signals() -> io::Result<u64> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: with a null new set the call only writes the present mask to `set`.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), set.as_mut_ptr()) } {
        0 => {}
        error => return Err(io::Error::from_raw_os_error(error)),
    }
    // SAFETY: the successful call above has written the set.
    let set = unsafe { set.assume_init() };
    Ok((1..=SIGNALS)
        // SAFETY: `set` is initialised; an invalid signal number is answered with -1.
        .filter(|&signal| unsafe { libc::sigismember(&set, signal) } == 1)
        .fold(0, |mask, signal| mask | 1 << (signal - 1)))
}
