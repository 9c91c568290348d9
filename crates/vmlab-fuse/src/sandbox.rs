//! What a thread that serves a directory gives up before it serves anything.
//!
//! Landlock leaves it the files of the share, seccomp the system calls that serving takes ([`syscalls`]). Both
//! hold for the thread alone, as does `no_new_privs`, which both set: the process's other threads and what
//! they start keep their rights. This is a second line, against mistakes in how requests are served. The
//! threads share their memory with the rest of the process, so it is none against foreign code in it.
//!
//! Landlock knows no rights for permissions, owners, times and extended attributes, and before its third version
//! (Linux 6.2) none for truncating. A thread that serves a read-only share has no system call for those but
//! openat2(2), whose flags seccomp does not see; one that may write to its share has them all.

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, make_bitflags,
};
use seccompiler::BpfProgram;

mod syscalls;

/// What is forbidden outside of the share: all that Landlock knew of files at this version, which is the
/// newest that adds something and that the tests have run with. An older kernel forbids what it knows.
const KNOWN: ABI = ABI::V5;

/// What a thread may do to files of a read-only share.
const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});

/// What a thread may do besides to files of a writable one: neither execute them nor talk to devices. The
/// types of files that it may make are those that it may rename.
const WRITE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    WriteFile | Truncate | RemoveDir | RemoveFile | MakeChar | MakeBlock | MakeDir | MakeReg | MakeSock
        | MakeFifo | MakeSym | Refer
});

/// The restrictions of the threads that serve one directory.
#[derive(Debug)]
pub(crate) struct Sandbox {
    landlock: Option<RulesetCreated>,
    seccomp: Option<BpfProgram>,
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
        write!(f, "{} refuses to restrict the threads of a file server", self.what)
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
    /// Restrictions to a directory. What the kernel lacks is left out.
    ///
    /// # Errors
    /// The kernel has something and refuses it.
    pub(crate) fn new(root: impl AsFd, read_only: bool) -> io::Result<Self> {
        let failed = refused("Landlock");
        let landlock = ruleset(root.as_fd(), read_only).map_err(failed)?;
        let seccomp = match seccomp_is_there() {
            true => Some(syscalls::filter(read_only).map_err(refused("seccomp"))?),
            false => None,
        };
        Ok(Self { landlock, seccomp })
    }

    /// Restricts the calling thread for good.
    ///
    /// # Errors
    /// The kernel has something and refuses it.
    pub(crate) fn enter(&self) -> io::Result<Restrictions> {
        let mut landlock = Landlock::Missing;
        if let Some(ruleset) = &self.landlock {
            let ruleset = ruleset.try_clone()?;
            let done = ruleset.restrict_self().map_err(refused("Landlock"))?;
            landlock = done.landlock.into();
        }
        // Last, for it leaves no system call for the other.
        if let Some(filter) = &self.seccomp {
            seccompiler::apply_filter(filter).map_err(refused("seccomp"))?;
        }
        Ok(Restrictions { landlock, seccomp: self.seccomp.is_some() })
    }
}

/// The rules for a directory, or `None` where they would keep it from being served.
fn ruleset(
    root: BorrowedFd<'_>,
    read_only: bool,
) -> Result<Option<RulesetCreated>, landlock::RulesetError> {
    let knows = |access: AccessFs| {
        let strict = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        strict.handle_access(access).is_ok()
    };
    if !read_only && knows(AccessFs::ReadFile) && !knows(AccessFs::Refer) {
        return Ok(None);
    }
    let allowed = if read_only { READ } else { READ | WRITE };
    let ruleset = Ruleset::default().handle_access(AccessFs::from_all(KNOWN))?.create()?;
    ruleset.add_rule(PathBeneath::new(root, allowed)).map(Some)
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
