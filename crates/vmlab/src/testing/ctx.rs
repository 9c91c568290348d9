//! What a test in the guest has of its VM.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::Serialize;

use super::Test;
use super::records::{self, Record, shortened};
use crate::results::Measurement;
use crate::sync::lock;

/// A test's view of its VM, in the guest.
#[derive(Debug)]
pub struct Ctx {
    kernel: String,
    disks: Vec<(String, PathBuf)>,
    /// Where records go; `None` where nobody takes them.
    records: Option<(String, Mutex<File>)>,
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
            records: records.map(|(word, file)| (word, Mutex::new(file))),
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

    /// Puts a number that was measured into the test's results, with its unit, such as `ms`.
    pub fn measure(&self, name: &str, value: f64, unit: &str) {
        self.tell(&Record::Measured(Measurement {
            name: shortened(name.to_owned()),
            value,
            unit: shortened(unit.to_owned()),
        }));
    }

    /// Puts something else that is worth knowing into the test's results.
    ///
    /// # Panics
    /// When it cannot be JSON, such as a map whose keys are no strings.
    #[track_caller]
    pub fn detail(&self, key: &str, value: impl Serialize) {
        match serde_json::to_value(value) {
            Ok(value) => self.tell(&Record::Detail { key: shortened(key.to_owned()), value }),
            Err(error) => panic!("the detail `{key}` cannot be JSON: {error}"),
        }
    }

    /// Ends the test, for want of something that it needs. It counts as skipped, and as failed where `CI` is
    /// `true` or `VMLAB_REQUIRE` is `1`.
    pub fn skip(&self, reason: impl Into<String>) -> ! {
        std::panic::resume_unwind(Box::new(Skip(reason.into())))
    }

    /// Tells the host.
    pub(super) fn tell(&self, record: &Record) {
        let Some((channel, file)) = &self.records else { return };
        let mut file = lock(file);
        match records::write(&mut *file, channel, record) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                panic!("this cannot be told to the host: {error}")
            }
            // A host that is gone needs no more; it finds a missing end itself.
            Err(_) => {}
        }
    }
}
