//! What a test puts into its results beside its outcome.

use std::fs::File;
use std::io;
use std::sync::Mutex;

use serde::Serialize;

use super::output::Told;
use super::records::{self, Record, shortened};
use crate::results::Measurement;
use crate::sync::lock;

/// Takes what a test measures, for its results: in the guest it is a part of [`Ctx`](super::Ctx), on the host a
/// `host` test is given one.
///
/// ```
/// use vmlab::prelude::*;
///
/// #[vmlab::test(host, memory = "512M")]
/// fn commands_are_quick(vm: &mut Vm, recorder: &Recorder) -> Result {
///     let since = std::time::Instant::now();
///     vm.exec(["true"])?;
///     recorder.measure("round trip", since.elapsed().as_secs_f64() * 1000.0, "ms");
///     recorder.detail("memory", vm.config().memory);
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct Recorder(To);

/// Where it goes.
#[derive(Debug)]
enum To {
    /// Nobody takes it.
    Nobody,
    /// To the host, as records told by a word.
    Host(String, Mutex<File>),
    /// It is kept for the results.
    Here(Mutex<Told>),
}

impl Recorder {
    /// Tells the host, by a word and in a file, or nobody.
    pub(super) fn telling(records: Option<(String, File)>) -> Self {
        Self(match records {
            Some((word, file)) => To::Host(word, Mutex::new(file)),
            None => To::Nobody,
        })
    }

    /// Keeps what it is given.
    pub(super) fn keeping() -> Self {
        Self(To::Here(Mutex::default()))
    }

    /// What was kept.
    pub(super) fn into_told(self) -> Told {
        match self.0 {
            To::Here(told) => told.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()),
            To::Nobody | To::Host(..) => Told::default(),
        }
    }

    /// Puts a number that was measured into the test's results, with its unit, such as `ms`.
    ///
    /// A value that is not finite becomes a [`detail`](Self::detail), for JSON has no such numbers. Of one test,
    /// 4 MiB of measurements and details are kept; what is beyond that is lost.
    pub fn measure(&self, name: &str, value: f64, unit: &str) {
        if !value.is_finite() {
            return self.detail(name, format!("{value} {unit}"));
        }
        self.tell(Record::Measured(Measurement {
            name: shortened(name.to_owned()),
            value,
            unit: shortened(unit.to_owned()),
        }));
    }

    /// Puts something else that is worth knowing into the test's results, of any type that serde can serialise.
    /// Of two with one key, the last one counts.
    ///
    /// # Panics
    /// When it cannot be JSON, such as a map whose keys are no strings.
    #[track_caller]
    pub fn detail(&self, key: &str, value: impl Serialize) {
        match serde_json::to_value(value) {
            Ok(value) => self.tell(Record::Detail { key: shortened(key.to_owned()), value }),
            Err(error) => panic!("the detail `{key}` cannot be JSON: {error}"),
        }
    }

    pub(super) fn tell(&self, record: Record) {
        let (word, file) = match &self.0 {
            To::Nobody => return,
            To::Here(told) => return lock(told).record(record),
            To::Host(word, file) => (word, file),
        };
        match records::write(&mut *lock(file), word, &record) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                panic!("this cannot be told to the host: {error}")
            }
            // A host that is gone needs no more; it finds a missing end itself.
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_is_kept_within_bounds() {
        let recorder = Recorder::keeping();
        recorder.measure("depth", 2.5, "m");
        recorder.detail("list", ["a"]);
        recorder.detail("list", ["b"]);
        recorder.measure("ratio", f64::NAN, "%");
        for _ in 0..1000 {
            recorder.detail("long", "x".repeat(10_000));
            recorder.measure(&"n".repeat(10_000), 1.0, "");
        }
        let told = recorder.into_told();
        assert_eq!(
            (told.measurements[0].name.as_str(), told.measurements[0].value),
            ("depth", 2.5)
        );
        assert_eq!(told.details["list"], serde_json::json!(["b"]));
        assert_eq!(told.details["ratio"], "NaN %");
        assert!(told.measurements.len() < 500, "{}", told.measurements.len());
    }

    #[test]
    fn what_nobody_takes_is_no_failure() {
        let recorder = Recorder::telling(None);
        recorder.measure("depth", f64::NAN, "m");
        assert!(recorder.into_told().measurements.is_empty());
    }
}
