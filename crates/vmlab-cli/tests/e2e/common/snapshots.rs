//! Runs with a cache of snapshots that belongs to one test.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;

use super::{Outcome, Running, Site, Vmlab, kernel};

/// A kernel that boots fast.
pub(crate) const QUICK: &str = super::CLOUD[0];

/// No paths.
pub(crate) const NONE: [PathBuf; 0] = [];

/// A site whose runs find all that was fetched and made before, and no snapshot.
#[derive(Debug)]
pub(crate) struct Cold {
    pub(crate) site: Site,
    reports: AtomicUsize,
}

/// What a run came to, and its phases.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) outcome: Outcome,
    pub(crate) phases: Vec<String>,
    report: Value,
}

/// A run that goes on.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) running: Running,
    pub(crate) report: PathBuf,
}

impl Cold {
    pub(crate) fn new() -> Self {
        let site = Site::new();
        let cache = site.path().join("cache");
        std::fs::create_dir(&cache).unwrap();
        for kind in users_cache().read_dir().unwrap() {
            let kind = kind.unwrap();
            if kind.file_name() != "snapshots" {
                std::os::unix::fs::symlink(kind.path(), cache.join(kind.file_name())).unwrap();
            }
        }
        Self { site, reports: AtomicUsize::new(0) }
    }

    /// Where snapshots are.
    pub(crate) fn snapshots(&self) -> PathBuf {
        self.site.path().join("cache/snapshots")
    }

    /// The snapshots that are there.
    pub(crate) fn entries(&self) -> Vec<PathBuf> {
        let Ok(listing) = self.snapshots().read_dir() else { return Vec::new() };
        let mut all: Vec<_> = listing.map(|entry| entry.unwrap().path()).collect();
        all.retain(|path| !path.file_name().unwrap().to_str().unwrap().starts_with('.'));
        all.sort();
        all
    }

    /// The only snapshot that is there.
    #[track_caller]
    pub(crate) fn entry(&self) -> PathBuf {
        let mut entries = self.entries();
        assert_eq!(entries.len(), 1, "{entries:?}");
        entries.remove(0)
    }

    /// What runs that ended before their time left of snapshots in the making.
    pub(crate) fn litter(&self) -> Vec<PathBuf> {
        let Ok(listing) = self.snapshots().join(".staging").read_dir() else { return Vec::new() };
        listing.map(|entry| entry.unwrap().path()).collect()
    }

    /// A run with a report, under [`QUICK`] unless the options name another kernel.
    pub(crate) fn prepare(
        &self,
        options: &[&str],
        command: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> (Vmlab, PathBuf) {
        let number = self.reports.fetch_add(1, Ordering::Relaxed);
        let report = self.site.path().join(format!("report{number}.json"));
        let mut args = vec!["run".into(), "--json".into(), report.clone().into_os_string()];
        if !options.contains(&"-k") {
            args.extend(["-k".into(), kernel(QUICK).into()]);
        }
        args.extend(options.iter().map(Into::into));
        args.push("--".into());
        args.extend(command.into_iter().map(|word| word.as_ref().to_owned()));
        let cache = self.site.path().join("cache");
        (self.site.vmlab(args).env("VMLAB_CACHE_DIR", cache), report)
    }

    /// Starts a run that says what there is to say.
    pub(crate) fn begin(
        &self,
        options: &[&str],
        command: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Begun {
        let (vmlab, report) = self.prepare(options, command);
        Begun { running: vmlab.start(), report }
    }

    /// Starts a quiet run.
    pub(crate) fn start(
        &self,
        options: &[&str],
        command: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Begun {
        self.begin(&[&["-q"], options].concat(), command)
    }

    /// A quiet run.
    pub(crate) fn run(
        &self,
        options: &[&str],
        command: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Ran {
        self.start(options, command).finish()
    }

    /// A quiet run of a script for the guest's `sh`.
    pub(crate) fn sh(&self, options: &[&str], script: &str) -> Ran {
        self.run(options, ["sh", "-c", script])
    }
}

impl Begun {
    pub(crate) fn finish(self) -> Ran {
        let Self { running, report } = self;
        let outcome = running.finish();
        let report = std::fs::read(report).ok();
        let report = report.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        let report = report.unwrap_or_default();
        let phases = report["runs"][0]["report"]["phases"].as_array().cloned().unwrap_or_default();
        let name = |phase: &Value| phase["phase"].as_str().unwrap().to_owned();
        Ran { outcome, phases: phases.iter().map(name).collect(), report }
    }
}

impl Ran {
    pub(crate) fn has(&self, phase: &str) -> bool {
        self.phases.iter().any(|name| name == phase)
    }

    /// What the report has of the VM.
    pub(crate) fn report(&self) -> &Value {
        &self.report["runs"][0]["report"]
    }

    pub(crate) fn text(&self) -> String {
        self.outcome.stdout_text()
    }

    #[track_caller]
    fn went(&self, by: &[&str]) -> &Self {
        let shown = || format!("{:?}, stderr: {}", self.phases, self.outcome.stderr_text());
        let all: Vec<&str> = self.phases.iter().map(String::as_str).collect();
        let wanted = [&["kernel", "prepare"], by, &["setup", "run", "stop"]].concat();
        assert_eq!(all, wanted, "{}", shown());
        self
    }

    /// Fails unless it succeeded in a VM that booted and of which a snapshot was taken.
    #[track_caller]
    pub(crate) fn expect_taken(&self) -> &Self {
        self.outcome.expect_code(0);
        self.went(&["boot", "snapshot", "restore"])
    }

    /// Fails unless it succeeded in a VM that went on from a snapshot.
    #[track_caller]
    pub(crate) fn expect_restored(&self) -> &Self {
        self.outcome.expect_code(0);
        self.went(&["restore"])
    }

    /// Fails unless it succeeded in a VM that booted, and that is all.
    #[track_caller]
    pub(crate) fn expect_booted(&self) -> &Self {
        self.outcome.expect_code(0);
        self.went(&["boot"])
    }

    /// Fails unless it wrote exactly this, and nothing to stderr.
    #[track_caller]
    pub(crate) fn expect_stdout(&self, stdout: &str) -> &Self {
        self.outcome.expect_stdout(stdout);
        self
    }
}

/// The cache that all other tests use.
fn users_cache() -> PathBuf {
    let inspected = Site::new().vmlab(["kernel", "inspect", kernel(QUICK), "--json"]).output();
    inspected.expect_code(0);
    let found: Value = serde_json::from_slice(&inspected.stdout).unwrap();
    let image = found.pointer("/kernel/boot_image").and_then(Value::as_str).unwrap();
    // CACHE/kernels/KEY/boot/IMAGE
    let cache = Path::new(image).ancestors().nth(4).unwrap();
    assert!(cache.join("kernels").is_dir(), "{}", cache.display());
    cache.to_owned()
}
