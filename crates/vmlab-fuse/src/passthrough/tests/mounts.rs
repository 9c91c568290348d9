//! Mounts in a share.

use std::path::Path;
use std::process::Command;

use super::*;

/// Tells a process of these tests that it has mounts of its own.
const OWN_MOUNTS: &str = "VMLAB_TEST_OWN_MOUNTS";

/// Runs a test, which gives its own name, again in a process whose mounts nobody else sees and whose user
/// may mount. Any user may have that, unless the host forbids it.
pub(super) fn with_own_mounts(test: &str, part: impl FnOnce()) {
    if std::env::var_os(OWN_MOUNTS).is_some() {
        return part();
    }
    let mut run = Command::new("unshare");
    run.arg("--mount");
    if !is_root() {
        run.arg("--map-root-user");
    }
    run.arg(std::env::current_exe().unwrap()).args(["--exact", test]).env(OWN_MOUNTS, "1");
    let run = run.output().expect("this test needs unshare(1), of util-linux");
    let said = String::from_utf8_lossy(&run.stdout);
    let ran = run.status.success() && said.contains("test result: ok. 1 passed");
    let errors = String::from_utf8_lossy(&run.stderr);
    assert!(
        ran,
        "this test needs a mount namespace, and has failed in it or got none: {said}\n{errors}"
    );
}

/// Unmounts, also when the test fails and something there is still open.
pub(super) struct Mounted(PathBuf);

impl Mounted {
    pub(super) fn bind(from: &Path, to: &Path) -> Self {
        let done = Command::new("mount").arg("--bind").args([from, to]).output();
        let done = done.expect("this test needs mount(8)");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Self(to.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
