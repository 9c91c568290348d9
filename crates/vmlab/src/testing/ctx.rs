//! What a test in the guest has of its VM.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Recorder, Test};

/// A test's view of its VM, in the guest.
#[derive(Debug)]
pub struct Ctx {
    kernel: String,
    disks: Vec<(String, PathBuf)>,
    recorder: Recorder,
}

/// Unwinds from a test that cannot run.
pub(super) struct Skip(pub(super) String);

impl Ctx {
    /// `records` is where they go, with the word that they are told by.
    pub(super) fn new(test: &Test, records: Option<(String, File)>) -> Self {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let disk = |(number, options): (usize, &&[(&str, &str)])| {
            let option =
                |name| options.iter().find(|(key, _)| *key == name).map(|(_, value)| *value);
            let name = option("name").map_or_else(|| format!("disk{number}"), str::to_owned);
            let mount =
                option("mount").map_or_else(|| Path::new("/mnt").join(&name), PathBuf::from);
            (name, mount)
        };
        Self {
            kernel,
            disks: test.settings.disks.iter().enumerate().map(disk).collect(),
            recorder: Recorder::telling(records),
        }
    }

    /// The running kernel's release, as `uname -r` says it.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Where the filesystem of a disk is mounted: what the disk's `mount` says, else `/mnt/NAME`.
    ///
    /// # Panics
    /// When the test has no such disk.
    #[track_caller]
    pub fn disk(&self, name: &str) -> &Path {
        match self.disks.iter().find(|(other, _)| other == name) {
            Some((_, mount)) => mount,
            None => {
                let names: Vec<&str> = self.disks.iter().map(|(name, _)| name.as_str()).collect();
                panic!("this test has no disk `{name}`; it has: {}", names.join(", "))
            }
        }
    }

    /// The block device of a disk.
    ///
    /// # Panics
    /// When the test has no such disk.
    #[track_caller]
    pub fn device(&self, name: &str) -> PathBuf {
        let _ = self.disk(name);
        PathBuf::from(format!("/dev/disk/by-id/virtio-{name}"))
    }

    /// What takes measurements and details, for functions that `host` tests use as well.
    pub fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// Puts a number that was measured into the test's results, with its unit, such as `ms`.
    pub fn measure(&self, name: &str, value: f64, unit: &str) {
        self.recorder.measure(name, value, unit);
    }

    /// Puts something else that is worth knowing into the test's results.
    ///
    /// # Panics
    /// When it cannot be JSON, such as a map whose keys are no strings.
    #[track_caller]
    pub fn detail(&self, key: &str, value: impl Serialize) {
        self.recorder.detail(key, value);
    }

    /// Ends the test, for want of something that it needs. It counts as skipped, and as failed where `CI` is
    /// `true` or `VMLAB_REQUIRE` is `1`.
    pub fn skip(&self, reason: impl Into<String>) -> ! {
        std::panic::resume_unwind(Box::new(Skip(reason.into())))
    }
}
