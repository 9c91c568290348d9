//! The frequency of the host's time-stamp counter.
//!
//! Under TCG a guest's counter is the host's. A guest that has no timer to measure it against, or that
//! is interrupted while it does, ends up without a clock; so it is told.

use std::time::{Duration, Instant};

use vmlab_artifacts::cache::Sources;
use vmlab_artifacts::{Cache, ContentKey};

use crate::identity::of_this_boot;

/// The shortest time to measure over: clocks are read to about 50 ns, so this gives 10 ppm.
const SPAN: Duration = Duration::from_millis(5);

/// How far a frequency of before may be from what a shorter measurement gives, as the divisor of a
/// fraction: the clocks are read to about 50 ns, and a run measures over some hundred microseconds.
const TOLERANCE: u64 = 1000;

/// A point in time on both clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TscPoint {
    counter: u64,
    time: Instant,
}

impl TscPoint {
    /// Reads both clocks, as closely together as a few tries give.
    pub(crate) fn now() -> Self {
        const TRIES: usize = 8;
        let read = |()| {
            let before = counter();
            let time = Instant::now();
            let after = counter();
            (after - before, Self { counter: before + (after - before) / 2, time })
        };
        let tries = std::iter::repeat_n((), TRIES).map(read);
        let best = tries.min_by_key(|(gap, _)| *gap);
        best.map_or_else(|| read(()).1, |(_, point)| point)
    }

    /// The counter's frequency in kHz, measured once in a boot of the host. It is measured again when it
    /// does not agree with the time since this point: a host that is a VM can be moved to another processor.
    pub(crate) fn khz(self, cache: &Cache) -> u64 {
        let key = of_this_boot(ContentKey::new("tsc-1")).finish();
        if let Some(known) = cache.recall::<u64>("tsc", &key)
            && agree(known, self.khz_so_far())
        {
            return known;
        }
        let khz = self.khz_since();
        cache.remember("tsc", &key, &Sources::default(), &khz);
        khz
    }

    /// The counter's frequency in kHz, measured from this point until now, or a little later.
    fn khz_since(self) -> u64 {
        while self.time.elapsed() < SPAN {
            std::hint::spin_loop();
        }
        self.khz_so_far()
    }

    fn khz_so_far(self) -> u64 {
        let now = Self::now();
        let nanos = now.time.duration_since(self.time).as_nanos();
        let ticks = u128::from(now.counter.wrapping_sub(self.counter));
        (ticks * 1_000_000 / nanos.max(1)) as u64
    }
}

fn agree(known: u64, measured: u64) -> bool {
    known.abs_diff(measured).saturating_mul(TOLERANCE) <= known
}

#[cfg(target_arch = "x86_64")]
fn counter() -> u64 {
    // SAFETY: every x86-64 processor has this instruction, and it touches nothing but registers.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn measurements_agree() {
        let start = TscPoint::now();
        let short = start.khz_since();
        std::thread::sleep(Duration::from_millis(50));
        let long = start.khz_since();
        assert!(long > 100_000, "{long} kHz");
        assert!(short.abs_diff(long) * 1000 < long, "{short} and {long} kHz");
    }
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_frequency_of_before_is_used_only_if_it_is_still_right() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let start = TscPoint::now();
        let khz = start.khz(&cache);
        let near = |other: u64| khz.abs_diff(other) * 1000 < khz;
        // Told from the one that would be measured, and believed.
        let key = of_this_boot(ContentKey::new("tsc-1")).finish();
        cache.remember("tsc", &key, &Sources::default(), &(khz + khz / 5000));
        assert_eq!(start.khz(&cache), khz + khz / 5000);
        cache.remember("tsc", &key, &Sources::default(), &(khz * 2));
        assert!(near(start.khz(&cache)));
        assert!(near(cache.recall("tsc", &key).unwrap()));
    }
}
