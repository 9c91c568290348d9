//! What can go wrong with a VM.

use std::io;

/// Why a VM cannot be made, run or saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// KVM refuses something.
    #[error("KVM cannot {what}")]
    Kvm {
        /// What it was to do.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// The host lacks something.
    #[error("the host cannot {what}")]
    Host {
        /// What it was to do.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// The kernel cannot be started.
    #[cfg(target_arch = "x86_64")]
    #[error(transparent)]
    Boot(#[from] crate::x86_64::boot::BootError),
    /// The ACPI tables cannot be made.
    #[error("the VM cannot be described to its kernel: {0}")]
    Tables(String),
    /// A state is none that this VM could go on from.
    #[error("the VM cannot go on from this state: {0}")]
    State(String),
    /// It cannot be done to a VM that runs.
    #[error("the VM runs, and has to be paused for that")]
    Running,
    /// It cannot be done to a VM that goes on elsewhere.
    #[error("the VM was saved, and goes on elsewhere")]
    Saved,
    /// It cannot be done to a VM that has ended.
    #[error("the VM has ended")]
    Ended,
    /// A slot has a device, or none.
    #[error("slot {slot} of the VM {how}")]
    Slot {
        /// Its number.
        slot: usize,
        /// What is wrong with it.
        how: &'static str,
    },
}

/// An error of KVM.
pub(crate) fn kvm<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Kvm { what, source: source.into() }
}

/// An error of the host.
pub(crate) fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Host { what, source: source.into() }
}
