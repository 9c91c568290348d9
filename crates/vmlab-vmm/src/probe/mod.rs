//! A proof that KVM executes guest code at real speed.
//!
//! That `/dev/kvm` opens and answers every capability check says little: there are hosts (nested
//! clouds, broken modules) where it is a slow emulation that ends a real kernel at the first
//! instruction that it does not know. [`prove`] runs a tiny guest instead: some of the
//! instructions that such emulations lack, whose results are compared, and a timed loop.
//!
//! ```no_run
//! match vmlab_vmm::probe::prove() {
//!     Ok(proof) => println!("KVM works: {proof}"),
//!     Err(reason) => println!("KVM is not used: {reason}"),
//! }
//! ```

mod verdict;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use verdict::{GuestStop, KvmProof, KvmUnusable};

use crate::kick::Kick;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// How long the whole proof may take before it counts as hung.
///
/// A working KVM needs less than 10 ms and a slow emulation about 30 ms; the rest is for a host
/// whose processors are busy with other work.
pub const DEADLINE: Duration = Duration::from_millis(500);

/// How long a guest that was told to stop may take to do so before its thread is given up.
const KICK_GRACE: Duration = Duration::from_millis(100);

/// What the probing thread tells the waiting one.
enum Event {
    /// The next step has begun.
    Step(&'static str),
    /// The proof is over, and all that it opened is closed again.
    Done(Result<KvmProof, KvmUnusable>),
}

/// Runs a tiny guest and says whether KVM can be used, and if not, why.
///
/// Takes a few milliseconds, at most [`DEADLINE`] and a little more, and may be called from any
/// thread, any number of times. The guest runs in a thread of its own, which has ended when this
/// returns, with all its file descriptors closed. The one exception is a KVM that hangs and cannot
/// be interrupted: its thread is left behind and ends with the process
/// ([`KvmUnusable::Hung`] says so).
///
/// No signal handler is installed and no signal is delivered to the caller's threads.
///
/// # Errors
/// The reason why KVM cannot be used on this host.
#[cfg(target_arch = "x86_64")]
pub fn prove() -> Result<KvmProof, KvmUnusable> {
    supervise(DEADLINE, |kick, step| x86_64::prove(kick, step))
}

/// Says that KVM is not used: the guest of the proof is written for x86_64 only.
///
/// # Errors
/// Always [`KvmUnusable::NotThisArchitecture`].
#[cfg(not(target_arch = "x86_64"))]
pub fn prove() -> Result<KvmProof, KvmUnusable> {
    Err(KvmUnusable::NotThisArchitecture { arch: std::env::consts::ARCH })
}

/// Opens KVM, and asks for no more than its version.
///
/// # Errors
/// The reason why KVM cannot be used at all.
#[cfg(target_arch = "x86_64")]
pub fn opens() -> Result<(), KvmUnusable> {
    x86_64::open().map(drop)
}

/// Says that KVM is not used, as [`prove`] does.
///
/// # Errors
/// Always [`KvmUnusable::NotThisArchitecture`].
#[cfg(not(target_arch = "x86_64"))]
pub fn opens() -> Result<(), KvmUnusable> {
    prove().map(drop)
}

/// Makes a VM and takes it down: the least that KVM has to do for every guest, in a fraction of a
/// millisecond. For a caller that has proved it before.
///
/// # Errors
/// The reason why KVM cannot be used now.
#[cfg(target_arch = "x86_64")]
pub fn makes_a_vm() -> Result<(), KvmUnusable> {
    x86_64::make_vm().map(drop)
}

/// Says that KVM is not used, as [`prove`] does.
///
/// # Errors
/// Always [`KvmUnusable::NotThisArchitecture`].
#[cfg(not(target_arch = "x86_64"))]
pub fn makes_a_vm() -> Result<(), KvmUnusable> {
    prove().map(drop)
}

/// Runs `probe` in a thread and cuts it off after `deadline`.
///
/// `probe` names each of its steps as it begins it.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
fn supervise<F>(deadline: Duration, probe: F) -> Result<KvmProof, KvmUnusable>
where
    F: FnOnce(&Kick, &dyn Fn(&'static str)) -> Result<KvmProof, KvmUnusable> + Send + 'static,
{
    let started = Instant::now();
    let kick = Kick::default();
    let (sender, events) = mpsc::channel();
    let thread = {
        let kick = kick.clone();
        let body = move || run_probe(&kick, &sender, probe);
        thread::Builder::new().name("vmlab-kvm-probe".into()).spawn(body)
    }
    .map_err(|source| KvmUnusable::CannotRun { step: "start a thread", source })?;

    let mut step = "start a thread";
    let mut end = started + deadline;
    let mut cut = None;
    loop {
        match events.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(Event::Step(name)) => step = name,
            Ok(Event::Done(result)) => {
                // The thread has nothing left to do; a panic in it cannot be behind a result.
                let _ = thread.join();
                return match (cut, result) {
                    // Without the kick the guest would be running still.
                    (Some(after), Err(KvmUnusable::Hung { step, .. })) => {
                        Err(KvmUnusable::Hung { step, after, left_behind: false })
                    }
                    (_, result) => result,
                };
            }
            Err(RecvTimeoutError::Timeout) => match cut {
                None => {
                    cut = Some(started.elapsed());
                    end = Instant::now() + KICK_GRACE;
                    kick.send(&thread);
                }
                Some(after) => return Err(KvmUnusable::Hung { step, after, left_behind: true }),
            },
            // The thread ended without a result, so it panicked: a bug in the probe, which
            // must not be hidden behind a verdict.
            Err(RecvTimeoutError::Disconnected) => match thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => unreachable!("the thread sends its result before it ends"),
            },
        }
    }
}

/// The body of the probing thread.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
fn run_probe<F>(kick: &Kick, events: &Sender<Event>, probe: F)
where
    F: FnOnce(&Kick, &dyn Fn(&'static str)) -> Result<KvmProof, KvmUnusable>,
{
    // Sending fails only when the waiting side has given this thread up.
    let step = |name| drop(events.send(Event::Step(name)));
    let result = match kick.block_signal() {
        Ok(()) => probe(kick, &step),
        Err(source) => Err(KvmUnusable::CannotRun { step: "block a signal", source }),
    };
    let _ = events.send(Event::Done(result));
}

#[cfg(test)]
mod tests;
