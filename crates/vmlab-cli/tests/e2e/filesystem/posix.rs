//! What POSIX and Linux say of files: which error comes when, what changes, and who may do it.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::thread::{
    UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};

#[path = "posix/directories.rs"]
mod directories;
#[path = "posix/errors.rs"]
mod errors;
#[path = "posix/files.rs"]
mod files;
#[path = "posix/times.rs"]
mod times;
#[path = "posix/users.rs"]
mod users;

/// A case: it gets an empty directory of its own.
type Case = (&'static str, fn(&Path));

/// Cases by the names of their functions.
macro_rules! cases {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), $name)),*] };
}
use cases;

/// Somebody who is nobody on the host, and in no group but this one.
const OTHER: (u32, u32) = (4321, 8765);

/// Runs all cases below a directory. `ids` says whether files can belong to different users there.
pub(crate) fn run(dir: &Path, ids: bool) {
    let groups: &[&[Case]] = &[directories::CASES, errors::CASES, files::CASES, times::CASES];
    let more: &[&[Case]] = if ids { &[users::CASES] } else { &[users::SQUASHED] };
    let cases: Vec<Case> = [groups, more].concat().concat();
    // A thread, for its ids, its umask and its working directory are changed.
    let failed = std::thread::scope(|scope| {
        let all = scope.spawn(|| {
            // SAFETY: the umask and the directories are this thread's from here on; nothing else is told apart.
            unsafe { unshare_unsafe(UnshareFlags::FS) }.unwrap();
            rustix::process::umask(Mode::empty());
            cases.iter().filter(|(name, case)| !passes(&dir.join(name), *case)).count()
        });
        all.join().unwrap()
    });
    assert!(cases.len() > 30, "there are no cases");
    assert_eq!(failed, 0, "so many of {} cases failed", cases.len());
}

fn passes(dir: &Path, case: fn(&Path)) -> bool {
    rustix::fs::mkdir(dir, Mode::from_raw_mode(0o755)).unwrap();
    // The harness shows what a panic says, with the place of it.
    catch_unwind(AssertUnwindSafe(|| case(dir))).is_ok()
}

/// Does something as [`OTHER`].
fn as_other<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    let act = || {
        let (uid, gid) = (Uid::from_raw(OTHER.0), Gid::from_raw(OTHER.1));
        set_thread_groups(&[]).unwrap();
        set_thread_res_gid(gid, gid, gid).unwrap();
        set_thread_res_uid(uid, uid, uid).unwrap();
        act()
    };
    let result = std::thread::scope(|scope| scope.spawn(act).join());
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Fails unless this was refused with this error.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Errno>, wanted: Errno) {
    assert_eq!(result.map(|done| format!("{done:?}")), Err(wanted));
}

fn mode(bits: u32) -> Mode {
    Mode::from_raw_mode(bits)
}

/// Opens a file, and makes it with all permissions if the flags say so.
fn open(path: impl AsRef<Path>, flags: OFlags) -> Result<File, Errno> {
    rustix::fs::open(path.as_ref(), flags | OFlags::CLOEXEC, mode(0o666)).map(File::from)
}

/// The permissions, owner and group of a file.
fn owned(path: &Path) -> (u32, u32, u32) {
    use std::os::unix::fs::MetadataExt;
    let stat = path.symlink_metadata().unwrap();
    (stat.mode() & 0o7777, stat.uid(), stat.gid())
}

/// The names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let entries = dir.read_dir().unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
