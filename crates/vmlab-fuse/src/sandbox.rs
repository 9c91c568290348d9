//! What a thread gives up before it does what a guest asks.
//!
//! Landlock leaves it the files that it serves (`share`, or none), seccomp the system calls that its work takes
//! ([`Calls`]). Both hold for the thread alone, as does `no_new_privs`, which both set: the process's other threads and
//! what they start keep their rights. This is a second line, against mistakes in how requests are served. The
//! threads share their memory with the rest of the process, so it is none against foreign code in it.
//!
//! Landlock knows no rights for permissions, owners, times and extended attributes, and before its third version
//! (Linux 6.2) none for truncating. A thread that serves a read-only share has no system call for those but
//! openat2(2), whose flags seccomp does not see; one that may write to its share has them all.

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io;
use std::sync::{Arc, OnceLock};
use std::thread;

use landlock::{
    ABI, Access, AccessFs, LandlockStatus, Ruleset, RulesetAttr, RulesetCreated, RulesetError,
};
use seccompiler::BpfProgram;

mod calls;
mod share;

pub use calls::{Calls, Condition, Is, KVM_IRQ_LINE};

/// What is forbidden: all that Landlock knew of files at this version, which is the newest that adds something and that
/// the tests have run with. An older kernel forbids what it knows.
const KNOWN: ABI = ABI::V5;

/// The restrictions of a thread.
#[derive(Debug)]
pub struct Sandbox {
    landlock: Option<RulesetCreated>,
    seccomp: Filter,
}

/// A list of system calls as the kernel takes it, or nothing where it takes none. It is of use in the process that has
/// made it.
#[derive(Debug, Clone)]
pub struct Filter(Option<Arc<BpfProgram>>);

impl Filter {
    /// For threads with these system calls.
    ///
    /// # Errors
    /// They are no list.
    pub fn new(calls: &Calls) -> io::Result<Self> {
        let make = || calls.filter().map(Arc::new).map_err(refused("seccomp"));
        seccomp_is_there().then(make).transpose().map(Self)
    }
}

/// A filter for all threads of a kind, which is made by the first of them.
#[derive(Debug, Default)]
pub struct FilterOfAll(OnceLock<Filter>);

impl FilterOfAll {
    /// One that is not made yet.
    pub const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// The filter for these system calls, which are always the same.
    ///
    /// # Errors
    /// As of [`Filter::new`].
    pub fn get(&self, calls: impl FnOnce() -> Calls) -> io::Result<&Filter> {
        if let Some(filter) = self.0.get() {
            return Ok(filter);
        }
        let filter = Filter::new(&calls())?;
        Ok(self.0.get_or_init(|| filter))
    }
}

/// What restricts a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restrictions {
    /// What the kernel says of Landlock.
    pub landlock: Landlock,
    /// Whether it filters system calls.
    pub seccomp: bool,
}

/// What a kernel has of Landlock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landlock {
    /// This version of it.
    Version(u32),
    /// It is built in, but not among the security modules that were chosen at boot.
    Disabled,
    /// Nothing.
    Missing,
}

impl Landlock {
    /// Whether it restricts what may be written to: before its second version (Linux 5.19) it refuses all
    /// renames from one directory to another.
    pub fn bears_writing(self) -> bool {
        matches!(self, Self::Version(2..))
    }
}

impl Restrictions {
    /// Finds out what this host can do, by doing it to a thread.
    ///
    /// # Errors
    /// The kernel has something and refuses it.
    pub fn of_host() -> io::Result<Self> {
        let prove = || Sandbox::new(File::open("/")?, true)?.enter();
        match thread::spawn(prove).join() {
            Ok(result) => result,
            Err(_) => Err(io::Error::other("a thread panicked while it was being restricted")),
        }
    }
}

/// A restriction that the kernel has and refuses.
#[derive(Debug)]
struct Refused {
    what: &'static str,
    source: Box<dyn Error + Send + Sync>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} refuses to restrict a thread", self.what)
    }
}

impl Error for Refused {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.source)
    }
}

fn refused<E: Into<Box<dyn Error + Send + Sync>>>(what: &'static str) -> impl Fn(E) -> io::Error {
    move |source| io::Error::other(Refused { what, source: source.into() })
}

impl Sandbox {
    /// For a thread that opens no file, with these system calls. What the kernel lacks is left out.
    ///
    /// # Errors
    /// The kernel has something and refuses it.
    pub fn without_files(filter: &Filter) -> io::Result<Self> {
        let landlock = ruleset_of_nothing().map_err(refused("Landlock"))?;
        Ok(Self { landlock: Some(landlock), seccomp: filter.clone() })
    }

    /// Restricts the calling thread for good.
    ///
    /// # Errors
    /// The kernel has something and refuses it.
    pub fn enter(&self) -> io::Result<Restrictions> {
        let mut landlock = Landlock::Missing;
        if let Some(ruleset) = &self.landlock {
            let ruleset = ruleset.try_clone()?;
            let done = ruleset.restrict_self().map_err(refused("Landlock"))?;
            landlock = done.landlock.into();
        }
        // Last, for it leaves no system call for the other.
        if let Some(filter) = &self.seccomp.0 {
            seccompiler::apply_filter(filter).map_err(refused("seccomp"))?;
        }
        Ok(Restrictions { landlock, seccomp: self.seccomp.0.is_some() })
    }
}

/// Rules that allow nothing yet.
fn ruleset_of_nothing() -> Result<RulesetCreated, RulesetError> {
    Ruleset::default().handle_access(AccessFs::from_all(KNOWN))?.create()
}

impl From<LandlockStatus> for Landlock {
    fn from(status: LandlockStatus) -> Self {
        match status {
            LandlockStatus::Available { effective_abi, kernel_abi } => {
                let known = effective_abi as u32;
                Self::Version(kernel_abi.and_then(|abi| abi.try_into().ok()).unwrap_or(known))
            }
            LandlockStatus::NotEnabled => Self::Disabled,
            LandlockStatus::NotImplemented => Self::Missing,
        }
    }
}

/// Whether the kernel filters system calls, and can make them fail with an error.
fn seccomp_is_there() -> bool {
    let action = libc::SECCOMP_RET_ERRNO;
    // SAFETY: the kernel reads one number from the pointer, which is to a live one, and keeps nothing.
    let answer = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action)
    };
    answer == 0
}

#[cfg(test)]
mod tests;
