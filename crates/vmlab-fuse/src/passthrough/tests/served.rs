//! The filesystem as the tests call it: directly, or each operation by a thread that is restricted as those
//! are that serve.

use std::ops::Deref;
use std::process::Command;
use std::time::Duration;

use super::*;
use crate::filesystem::{Changes, XattrReply};
use crate::sandbox::{Landlock, Restrictions};

/// Tells a process of these tests to restrict the threads.
const RESTRICT: &str = "VMLAB_TEST_RESTRICT";

/// What a test calls.
pub(super) struct Served {
    fs: Passthrough,
    restrict: bool,
}

impl From<Passthrough> for Served {
    fn from(fs: Passthrough) -> Self {
        Self { fs, restrict: std::env::var_os(RESTRICT).is_some() }
    }
}

impl Deref for Served {
    type Target = Passthrough;

    fn deref(&self) -> &Passthrough {
        &self.fs
    }
}

struct Sent<T>(T);

// SAFETY: what is sent goes to a thread that has ended before `Served::by` returns, and which alone uses
// it until then.
unsafe impl<T> Send for Sent<T> {}

impl<T> Sent<T> {
    fn take(self) -> T {
        self.0
    }
}

impl Served {
    fn by<T>(&self, call: impl FnOnce(&Passthrough) -> T) -> T {
        if !self.restrict {
            return call(&self.fs);
        }
        let call = Sent(call);
        let done = std::thread::scope(|scope| {
            let served = scope.spawn(move || {
                let call = call.take();
                self.fs.prepare_thread().unwrap();
                Sent(call(&self.fs))
            });
            served.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        done.take()
    }
}

macro_rules! operations {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        impl FileSystem for Served {
            $(fn $name(&self, $($argument: $type),*) -> $result {
                self.by(|fs| fs.$name($($argument),*))
            })*
        }
    };
}

operations! {
    init(flags: u64) -> ();
    destroy() -> ();
    wanted() -> u64;
    read_only() -> bool;
    lookup(caller: &Caller, parent: NodeId, name: Name<'_>) -> Result<Entry>;
    forget(node: NodeId, count: u64) -> ();
    getattr(node: NodeId, handle: Option<Handle>) -> Result<Attributes>;
    statx(node: NodeId, handle: Option<Handle>, mask: u32) -> Result<(abi::Statx, Duration)>;
    setattr(caller: &Caller, node: NodeId, handle: Option<Handle>, changes: &Changes) -> Result<Attributes>;
    readlink(node: NodeId) -> Result<Vec<u8>>;
    symlink(caller: &Caller, parent: NodeId, name: Name<'_>, target: &CStr) -> Result<Entry>;
    mknod(caller: &Caller, parent: NodeId, name: Name<'_>, mode: u32, rdev: u32) -> Result<Entry>;
    mkdir(caller: &Caller, parent: NodeId, name: Name<'_>, mode: u32) -> Result<Entry>;
    unlink(parent: NodeId, name: Name<'_>) -> Result<()>;
    rmdir(parent: NodeId, name: Name<'_>) -> Result<()>;
    rename(
        caller: &Caller, from: (NodeId, Name<'_>), to: (NodeId, Name<'_>), flags: rustix::fs::RenameFlags
    ) -> Result<()>;
    link(node: NodeId, parent: NodeId, name: Name<'_>) -> Result<Entry>;
    open(caller: &Caller, node: NodeId, flags: u32, open_flags: u32) -> Result<Opened>;
    create(caller: &Caller, parent: NodeId, name: Name<'_>, how: &Creation) -> Result<(Entry, Opened)>;
    tmpfile(caller: &Caller, parent: NodeId, how: &Creation) -> Result<(Entry, Opened)>;
    read(node: NodeId, handle: Handle, offset: u64, out: &mut dyn DataOut) -> Result<usize>;
    write(
        node: NodeId, handle: Handle, to: WriteAt, data: &dyn DataIn, kill_suidgid: bool
    ) -> Result<usize>;
    flush(node: NodeId, handle: Handle) -> Result<()>;
    fsync(node: NodeId, handle: Handle, data_only: bool) -> Result<()>;
    release(node: NodeId, handle: Handle) -> Result<()>;
    opendir(node: NodeId) -> Result<Opened>;
    readdir(node: NodeId, handle: Handle, offset: u64, sink: &mut DirSink) -> Result<()>;
    fsyncdir(node: NodeId, handle: Handle, data_only: bool) -> Result<()>;
    releasedir(node: NodeId, handle: Handle) -> Result<()>;
    statfs(node: NodeId) -> Result<abi::Kstatfs>;
    syncfs(node: NodeId) -> Result<()>;
    access(caller: &Caller, node: NodeId, mask: u32) -> Result<()>;
    getxattr(node: NodeId, name: &CStr, size: u32) -> Result<XattrReply>;
    listxattr(node: NodeId, size: u32) -> Result<XattrReply>;
    setxattr(node: NodeId, name: &CStr, value: &[u8], flags: u32) -> Result<()>;
    removexattr(node: NodeId, name: &CStr) -> Result<()>;
    fallocate(node: NodeId, handle: Handle, offset: u64, length: u64, mode: u32) -> Result<()>;
    lseek(node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64>;
    copy_file_range(
        from: (NodeId, Handle, u64), to: (NodeId, Handle, u64), length: u64
    ) -> Result<usize>;
}

/// The other tests of the filesystem again, with restricted threads, in a process of its own. Those of its
/// table have nothing that the others have not, and make tens of thousands of threads.
#[test]
fn everything_works_with_restricted_threads() {
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["passthrough::tests::", "--skip", "everything_works_with", "--skip", "::table::"])
        .env(RESTRICT, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{said}\n{}", String::from_utf8_lossy(&run.stderr));
    let passed = said.lines().filter(|line| line.ends_with("... ok")).count();
    assert!(passed >= 50, "{said}");
}

/// The host of the tests has both, so that they test something.
#[test]
fn threads_are_restricted_at_all() {
    let restrictions = Restrictions::of_host().unwrap();
    assert!(restrictions.seccomp, "this host does not filter system calls");
    assert!(
        matches!(restrictions.landlock, Landlock::Version(2..)),
        "this host has no Landlock that the tests could use: {restrictions:?}"
    );
}
