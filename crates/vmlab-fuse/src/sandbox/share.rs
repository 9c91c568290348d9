//! What serving a directory takes: its files, and the system calls for them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use landlock::{
    AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, make_bitflags,
};
use libc::c_long;

use super::{Calls, FilterOfAll, Is, Sandbox, refused, ruleset_of_nothing};

/// What a thread may do to files of a read-only share.
const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});

/// What a thread may do besides to files of a writable one: neither execute them nor talk to devices. The
/// types of files that it may make are those that it may rename.
const WRITE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    WriteFile | Truncate | RemoveDir | RemoveFile | MakeChar | MakeBlock | MakeDir | MakeReg | MakeSock
        | MakeFifo | MakeSym | Refer
});

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

impl Sandbox {
    /// Restrictions to a directory. What the kernel lacks is left out.
    ///
    /// # Errors
    /// The kernel has something and refuses it.
    pub(crate) fn new(root: impl AsFd, read_only: bool) -> io::Result<Self> {
        let landlock = ruleset(root.as_fd(), read_only).map_err(refused("Landlock"))?;
        static FILTERS: [FilterOfAll; 2] = [const { FilterOfAll::new() }; 2];
        let filter = FILTERS[usize::from(read_only)].get(|| calls(read_only))?;
        Ok(Self { landlock, seccomp: filter.clone() })
    }
}

fn calls(read_only: bool) -> Calls {
    let calls = Calls::of_worker().and(READING);
    match read_only {
        true => calls.and_if(libc::SYS_openat, [vec![(2, Is::Without(CHANGING.cast_unsigned()))]]),
        false => calls
            .and(WRITING)
            // No device but that of an overlay's whiteouts, which nothing answers.
            .and_if(libc::SYS_mknodat, [vec![(3, Is::This(0))]]),
    }
}

/// The rules for a directory, or `None` where they would keep it from being served.
fn ruleset(root: BorrowedFd<'_>, read_only: bool) -> Result<Option<RulesetCreated>, RulesetError> {
    let knows = |access: AccessFs| {
        let strict = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        strict.handle_access(access).is_ok()
    };
    if !read_only && knows(AccessFs::ReadFile) && !knows(AccessFs::Refer) {
        return Ok(None);
    }
    let allowed = if read_only { READ } else { READ | WRITE };
    ruleset_of_nothing()?.add_rule(PathBeneath::new(root, allowed)).map(Some)
}
