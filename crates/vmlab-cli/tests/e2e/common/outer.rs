//! A guest that has a working KVM, whatever the host has: vmlab's own monitor is tested in it.
//!
//! QEMU's TCG emulates a processor with SVM. What runs in the guest is what was built for the host.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::{Value, json};

use super::{CLOUD, Outcome, Site, kernel, vmlab_bin};

/// Enough for two inner guests, the snapshots of several, and their files.
const MEMORY: &str = "4G";

/// Where the guest has the kernels, beside a cache of its own: locks hold within one machine.
const CACHE: &str = "/mnt/cache";

/// Where it has the program.
const BIN: &str = "/mnt/bin";

/// A guest that has not begun.
#[derive(Debug)]
pub(crate) struct Outer {
    pub(crate) site: Site,
    shares: Vec<String>,
}

impl Outer {
    pub(crate) fn new() -> Self {
        let site = Site::new();
        let spec = kernel(CLOUD[0]);
        let inspected = site.vmlab(["kernel", "inspect", spec, "--json"]).output();
        let inspected: Value = serde_json::from_slice(&inspected.expect_code(0).stdout).unwrap();
        // KERNELS/KEY/boot/vmlinuz-RELEASE
        let image = PathBuf::from(inspected["kernel"]["boot_image"].as_str().unwrap());
        let kernels = image.ancestors().nth(3).unwrap();
        let program = vmlab_bin();
        let mut shares = vec![
            format!("{}:{CACHE}/kernels", kernels.display()),
            format!("{}:{BIN}:ro", program.parent().unwrap().display()),
        ];
        // They may be where the guest has directories of its own, or where its root may not go.
        let here = std::env::current_exe().unwrap();
        let mut same = vec![repository(), here.ancestors().nth(3).unwrap().to_owned()];
        same.dedup();
        shares.extend(same.iter().map(|dir| format!("{0}:{0}:ro", dir.display())));
        Self { site, shares }
    }

    /// Runs a script for bash, in which `$VMLAB_BIN` and all tests use the native monitor.
    pub(crate) fn bash(&self, script: &str, patience: Duration) -> Outcome {
        let environment = format!(
            "set -u
            export VMLAB_BIN={BIN}/{name} VMLAB_CACHE_DIR={CACHE} VMLAB_HYPERVISOR=kvm
            export TMPDIR=/tmp XDG_STATE_HOME=/tmp/state XDG_RUNTIME_DIR=/tmp/runtime HOME=/root
            mkdir -p $XDG_STATE_HOME $XDG_RUNTIME_DIR
            unset RUST_TEST_THREADS NEXTEST
            cd {here}\n",
            name = vmlab_bin().file_name().unwrap().display(),
            here = Path::new(env!("CARGO_MANIFEST_DIR")).display(),
        );
        let seconds = patience.as_secs().to_string();
        // One CPU: QEMU's TCG sometimes ends guests that have more and run guests themselves.
        let mut options = vec!["--hypervisor", "qemu", "--accel", "tcg", "-m", MEMORY];
        // passt wants a network that it can pass on.
        options.extend(["--module", "kvm-amd", "--net", "user", "--timeout", &seconds]);
        options.extend(self.shares.iter().flat_map(|share| ["--share", share]));
        let words = ["bash", "-c", &[&environment, script].concat()];
        let run = self.site.run_with(CLOUD[0], &options, words);
        // The VM's own limit comes first, and says what there is to say.
        run.patience(patience + Duration::from_secs(30)).output()
    }
}

/// Where the sources are.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// The program of a test target of the workspace, as cargo has built it or does so now.
pub(crate) fn test_program(target: &str) -> PathBuf {
    static PROGRAMS: OnceLock<BTreeMap<String, PathBuf>> = OnceLock::new();
    if target == "e2e" {
        return std::env::current_exe().unwrap();
    }
    let programs = PROGRAMS.get_or_init(|| {
        // Just what `cargo test --workspace` builds, so that nothing is left to do after it.
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["test", "--locked", "--workspace", "--no-run", "--message-format=json"]);
        let output = cargo.current_dir(repository()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "the tests cannot be built: {said}");
        let messages = output.stdout.split(|byte| *byte == b'\n');
        let messages = messages.filter_map(|line| serde_json::from_slice::<Value>(line).ok());
        let program = |message: Value| {
            let target = &message["target"];
            // Of a library, what can be executed has its unit tests.
            let is_test = [["test"], ["lib"]].iter().any(|kind| target["kind"] == json!(kind));
            // Those of devices have names that others have too, and run no VMs.
            let manifest = Path::new(message["manifest_path"].as_str()?);
            let is_test = is_test && !manifest.parent()?.ends_with("vmlab-devices");
            let (name, path) = (target["name"].as_str()?, message["executable"].as_str()?);
            is_test.then(|| (name.to_owned(), path.into()))
        };
        messages.filter_map(program).collect()
    });
    let found = programs.get(target);
    found.unwrap_or_else(|| panic!("no test program {target}: {programs:?}")).clone()
}
