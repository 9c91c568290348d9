//! What tests with real VMs have in common.

#![allow(dead_code, unreachable_pub, reason = "a module of several programs")]

use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};

use vmlab::{AccelChoice, Vm};

/// A place for the logs of this program's runs, as long as some test goes on.
pub struct Logs;

static TESTS: Mutex<usize> = Mutex::new(0);
static LOGS: LazyLock<PathBuf> = LazyLock::new(|| {
    let program = std::env::current_exe().unwrap();
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let dir = std::env::temp_dir().join(format!("vmlab-{name}-{}", std::process::id()));
    // SAFETY: every test comes here before it reads the environment; all reads in this program go
    // through the standard library, which locks it.
    unsafe { std::env::set_var("XDG_STATE_HOME", &dir) };
    dir
});

impl Logs {
    pub fn new() -> Self {
        LazyLock::force(&LOGS);
        *TESTS.lock().unwrap() += 1;
        Self
    }
}

/// Where that is.
pub fn logs() -> &'static Path {
    &LOGS
}

impl Drop for Logs {
    fn drop(&mut self) {
        let mut tests = TESTS.lock().unwrap();
        *tests -= 1;
        if *tests == 0 {
            // A test that fails before its first VM has made nothing.
            let _ = std::fs::remove_dir_all(&*LOGS);
        }
    }
}

/// What executes the instructions of guests: QEMU's TCG, the same everywhere, unless the environment asks for
/// vmlab's own monitor, as it does where these tests run in a guest that has KVM.
pub fn accel() -> AccelChoice {
    match std::env::var_os("VMLAB_HYPERVISOR") {
        Some(name) if name == "kvm" => AccelChoice::Auto,
        _ => AccelChoice::Tcg,
    }
}

/// Runs a script, which has to succeed. Returns what it said.
pub fn sh(vm: &Vm, script: &str) -> String {
    let output = vm.exec(["sh", "-ec", script]).unwrap();
    let (said, errors) = (output.stdout_text(), output.stderr_text());
    assert!(output.status.success(), "{script}: {said}\n{errors}");
    said
}
