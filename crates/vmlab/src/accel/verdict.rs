//! What the proof of KVM found, remembered.
//!
//! A verdict is that of one boot of the host, one kernel, one load of KVM's modules, one device node, one
//! user and one build of this program. It is forgotten after some time all the same, for a host that is
//! a VM can be moved to other hardware. That KVM works is taken from memory only if KVM still makes a
//! VM: a hypervisor that has taken the processor in the meantime would keep it from that.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use vmlab_artifacts::cache::{ContentStamp, Sources};
use vmlab_artifacts::{Cache, ContentKey};
use vmlab_vmm::probe::{self, KvmProof, KvmUnusable};

use crate::identity::{of_this_boot, of_this_program};

/// How long a verdict on what KVM can do is relied on.
const LASTING: Duration = Duration::from_secs(3600);

/// How long one is that a host which was busy with other things may have caused.
const PASSING: Duration = Duration::from_secs(600);

/// What is remembered under.
const SUBJECT: &str = "kvm";

const DEVICE: &str = "/dev/kvm";

/// What is there anew, with another inode number, when KVM's driver was loaded anew.
const DRIVER: [&str; 4] = [
    "/sys/module/kvm",
    "/sys/module/kvm_intel",
    "/sys/module/kvm_amd",
    "/sys/devices/virtual/misc/kvm",
];

/// Whether KVM can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Verdict {
    Works {
        /// As [`KvmProof::xsetbv_lost`].
        xsetbv_lost: bool,
    },
    Unusable {
        /// In words.
        why: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    verdict: Verdict,
    since: SystemTime,
    holds: Duration,
}

impl Verdict {
    /// The verdict of an earlier proof, if it still holds.
    pub(super) fn recall(cache: &Cache) -> Option<Verdict> {
        let verdict = recall_under(cache, &key()?, SystemTime::now())?;
        match &verdict {
            Verdict::Works { .. } => probe::makes_a_vm().is_ok().then_some(verdict),
            Verdict::Unusable { .. } => Some(verdict),
        }
    }

    /// Proves KVM, and remembers what came out.
    pub(super) fn prove(cache: &Cache) -> Result<KvmProof, KvmUnusable> {
        // Made before the proof: what changes after this is under another key.
        let key = key();
        let result = probe::prove();
        let (verdict, holds) = match &result {
            Ok(proof) => (Verdict::Works { xsetbv_lost: proof.xsetbv_lost }, Some(LASTING)),
            Err(unusable) => (Verdict::Unusable { why: unusable.to_string() }, holds(unusable)),
        };
        if let (Some(key), Some(holds)) = (key, holds) {
            remember_under(cache, &key, Remembered { verdict, since: SystemTime::now(), holds });
        }
        result
    }
}

fn recall_under(cache: &Cache, key: &str, now: SystemTime) -> Option<Verdict> {
    let Remembered { verdict, since, holds } = cache.recall(SUBJECT, key)?;
    // A clock that was set back makes it older than it can be.
    now.duration_since(since).is_ok_and(|age| age < holds).then_some(verdict)
}

fn remember_under(cache: &Cache, key: &str, remembered: Remembered) {
    cache.remember(SUBJECT, key, &Sources::default(), &remembered);
}

/// How long a reason against KVM holds; `None` for one that is found without running a guest, and may be
/// gone the next time.
fn holds(unusable: &KvmUnusable) -> Option<Duration> {
    match unusable {
        KvmUnusable::WrongApiVersion(_)
        | KvmUnusable::MissingCapability(_)
        | KvmUnusable::CannotEmulate { .. } => Some(LASTING),
        KvmUnusable::TooSlow { .. } | KvmUnusable::Hung { .. } => Some(PASSING),
        _ => None,
    }
}

/// All that a verdict depends on, as far as it can be told at once; `None` where there is no device.
fn key() -> Option<String> {
    let device = Path::new(DEVICE);
    let node = device.metadata().ok()?;
    let stamp = ContentStamp::of(device).ok()?;
    let uname = rustix::system::uname();
    let key = of_this_boot(of_this_program(ContentKey::new("kvm")))
        .field("release", uname.release().to_bytes())
        .field("version", uname.version().to_bytes())
        .field("user", rustix::process::geteuid().as_raw().to_le_bytes())
        .field("device", format!("{stamp:?} {} {:o}", node.rdev(), node.mode()));
    let inode = |path: &str| Path::new(path).metadata().map_or(0, |meta| meta.ino());
    let key = DRIVER.iter().fold(key, |key, path| key.field(path, inode(path).to_le_bytes()));
    Some(key.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remembered(verdict: &Verdict, since: SystemTime) -> Remembered {
        Remembered { verdict: verdict.clone(), since, holds: PASSING }
    }

    #[test]
    fn a_verdict_holds_for_its_time_and_under_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let verdict = Verdict::Unusable { why: "it is slow".to_owned() };
        let now = SystemTime::now();
        remember_under(&cache, "key", remembered(&verdict, now));
        assert_eq!(recall_under(&cache, "key", now), Some(verdict.clone()));
        assert_eq!(recall_under(&cache, "key", now + PASSING / 2), Some(verdict));
        assert_eq!(recall_under(&cache, "key", now + PASSING), None);
        assert_eq!(recall_under(&cache, "other", now), None);
        // The clock was set back since.
        assert_eq!(recall_under(&cache, "key", now - Duration::from_secs(1)), None);
    }

    #[test]
    fn only_what_a_guest_has_shown_is_remembered() {
        let hung = KvmUnusable::Hung { step: "s", after: PASSING, left_behind: false };
        assert_eq!(holds(&hung), Some(PASSING));
        assert_eq!(holds(&KvmUnusable::MissingCapability("c")), Some(LASTING));
        for momentary in [KvmUnusable::NoPermission, KvmUnusable::Busy, KvmUnusable::NoDevice] {
            assert_eq!(holds(&momentary), None, "{momentary}");
        }
    }

    #[test]
    fn a_host_with_the_device_has_a_key_that_stays() {
        assert_eq!(key().is_some(), Path::new(DEVICE).exists());
        assert_eq!(key(), key());
    }
}
