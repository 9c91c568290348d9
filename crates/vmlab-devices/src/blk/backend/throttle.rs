//! A disk that is slower than the one below.

use std::io;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Backend, Buffers, Sectors};
use crate::blk::options::{ParseError, Words, number};
use crate::workers::sleep_until;

/// What a bucket holds without a burst size of its own: what comes in this time. A guest that makes one request
/// after the other gets its rate so far as neither it nor the host stops for longer, and whoever measures for two
/// seconds or more finds the rate within 5 %, though the bucket is full at first.
const DEFAULT_BURST: Duration = Duration::from_millis(100);

const NANOS: u128 = 1_000_000_000;

/// So many of something a second. The burst is what comes at once after a time without any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Limit {
    rate: NonZeroU64,
    #[serde(skip_serializing_if = "Option::is_none")]
    burst: Option<NonZeroU64>,
}

impl Limit {
    /// A limit; `None` where the rate or the burst is zero.
    pub fn new(rate: u64, burst: Option<u64>) -> Option<Self> {
        let burst = match burst {
            Some(burst) => Some(NonZeroU64::new(burst)?),
            None => None,
        };
        Some(Self { rate: NonZeroU64::new(rate)?, burst })
    }

    /// How many a second.
    pub fn rate(self) -> u64 {
        self.rate.get()
    }

    /// How many at once: what was asked for, else what comes in 100 ms, one at least.
    pub fn burst(self) -> u64 {
        let default = u128::from(self.rate()) * DEFAULT_BURST.as_nanos() / NANOS;
        self.burst
            .map_or_else(|| u64::try_from(default).unwrap_or(u64::MAX).max(1), NonZeroU64::get)
    }
}

/// How slow a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Throttle {
    iops: Option<Limit>,
    bytes: Option<Limit>,
}

impl Throttle {
    /// Limits of requests a second, whatever they are, and of bytes a second that are read and written; `None`
    /// where there is neither.
    pub fn new(iops: Option<Limit>, bytes: Option<Limit>) -> Option<Self> {
        (iops.is_some() || bytes.is_some()).then_some(Self { iops, bytes })
    }

    /// The limit of requests a second.
    pub fn iops(&self) -> Option<Limit> {
        self.iops
    }

    /// The limit of bytes a second.
    pub fn bytes(&self) -> Option<Limit> {
        self.bytes
    }
}

const WORDS: &str = "iops=N, bps=BYTES, and iops-burst=N or bps-burst=BYTES beside them, such as \
                     iops=200,bps=10M,bps-burst=64M";

impl FromStr for Throttle {
    type Err = ParseError;

    /// Reads `iops=N[,iops-burst=N][,bps=BYTES[,bps-burst=BYTES]]` in any order, with at least one rate: requests
    /// and bytes a second, and how many of them may come at once after a pause; unless given, what comes in 100 ms.
    /// Numbers may end in `K`, `M` or `G`, which are powers of 1024 for bytes and of 1000 for requests. None may
    /// be zero.
    ///
    /// # Errors
    /// What is wrong, and what would be right.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let words = Words { kind: "throttle", text };
        let [mut iops, mut iops_burst, mut bps, mut bps_burst] = [None; 4];
        for part in text.split(',') {
            let (key, value) = part.split_once('=').ok_or_else(|| words.bad(part, WORDS))?;
            let (place, unit) = match key {
                "iops" => (&mut iops, 1000),
                "iops-burst" => (&mut iops_burst, 1000),
                "bps" => (&mut bps, 1024),
                "bps-burst" => (&mut bps_burst, 1024),
                _ => return Err(words.bad(part, WORDS)),
            };
            if place.is_some() {
                return Err(words.bad(part, "there once"));
            }
            let value = number(value, unit).filter(|value| *value > 0);
            *place =
                Some(value.ok_or_else(|| words.bad(part, "a number above 0, such as 100 or 10M"))?);
        }
        let limit = |rate, burst: Option<u64>, name: &str, wanted| match (rate, burst) {
            (Some(rate), burst) => Ok(Limit::new(rate, burst)),
            (None, None) => Ok(None),
            (None, Some(_)) => Err(words.bad(name, wanted)),
        };
        let iops = limit(iops, iops_burst, "iops-burst", "beside a rate, iops=N")?;
        let bytes = limit(bps, bps_burst, "bps-burst", "beside a rate, bps=BYTES")?;
        Self::new(iops, bytes).ok_or_else(|| words.bad(text, WORDS))
    }
}

/// A token bucket that lends: whoever takes more than there is waits until that has come, and those behind it
/// for longer. So a request larger than the bucket is late, and no rate is ever exceeded in the long run.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    rate: u128,
    /// In tokens, times [`NANOS`], so that nothing is lost in divisions.
    most: i128,
    level: i128,
    /// When the level was that, since some beginning.
    at: Duration,
}

impl Bucket {
    /// A full one.
    fn new(limit: Limit) -> Self {
        let most = i128::from(limit.burst()) * NANOS as i128;
        Self { rate: limit.rate().into(), most, level: most, at: Duration::ZERO }
    }

    /// Takes tokens at a time that is not before the last one. Returns how long to wait before they are there.
    fn take(&mut self, now: Duration, tokens: u64) -> Duration {
        let passed = now.saturating_sub(self.at).as_nanos();
        let come = i128::try_from(passed.saturating_mul(self.rate)).unwrap_or(i128::MAX);
        self.level = self.level.saturating_add(come).min(self.most);
        self.at = self.at.max(now);
        self.level = self.level.saturating_sub(i128::from(tokens) * NANOS as i128);
        let missing = self.level.min(0).unsigned_abs();
        let nanos = missing.div_ceil(self.rate);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Makes requests wait. They are never refused.
pub struct Throttled<B> {
    below: B,
    start: Instant,
    buckets: Mutex<(Option<Bucket>, Option<Bucket>)>,
}

impl<B: Backend> Throttled<B> {
    /// A disk that is as slow as that, with full buckets.
    pub fn new(below: B, throttle: Throttle) -> Self {
        let buckets = (throttle.iops.map(Bucket::new), throttle.bytes.map(Bucket::new));
        Self { below, start: Instant::now(), buckets: Mutex::new(buckets) }
    }

    /// Waits until a request may begin. That is a point in time, so that what one is late by does not add up.
    fn wait(&self, bytes: u64) {
        let (now, wait) = {
            let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
            let now = self.start.elapsed();
            let take = |bucket: &mut Option<Bucket>, tokens| {
                bucket.as_mut().map_or(Duration::ZERO, |bucket| bucket.take(now, tokens))
            };
            (now, take(&mut buckets.0, 1).max(take(&mut buckets.1, bytes)))
        };
        // No more than 2^64 ns, of which clocks have twice as many.
        sleep_until(self.start + now + wait);
    }
}

impl<B: Backend> Backend for Throttled<B> {
    fn capacity(&self) -> u64 {
        self.below.capacity()
    }

    fn read(&self, sectors: Sectors, room: &Buffers<'_>) -> io::Result<()> {
        self.wait(room.len() as u64);
        self.below.read(sectors, room)
    }

    fn write(&self, sectors: Sectors, data: &Buffers<'_>) -> io::Result<()> {
        self.wait(data.len() as u64);
        self.below.write(sectors, data)
    }

    fn flush(&self) -> io::Result<()> {
        self.wait(0);
        self.below.flush()
    }

    fn discard(&self, sectors: Sectors) -> io::Result<()> {
        self.wait(0);
        self.below.discard(sectors)
    }

    fn write_zeroes(&self, sectors: Sectors, unmap: bool) -> io::Result<()> {
        self.wait(0);
        self.below.write_zeroes(sectors, unmap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(rate: u64, burst: u64) -> Bucket {
        Bucket::new(Limit::new(rate, Some(burst)).unwrap())
    }

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn a_burst_comes_at_once_and_then_the_rate() {
        let mut bucket = bucket(100, 5);
        for _ in 0..5 {
            assert_eq!(bucket.take(MS(0), 1), MS(0));
        }
        // All of these ask at once.
        for number in 1..=10 {
            assert_eq!(bucket.take(MS(0), 1), MS(10 * number));
        }
        // By then it has paid back, and a pause fills it to its burst and no more.
        assert_eq!(bucket.take(MS(100), 1), MS(10));
        let pause = Duration::from_secs(1_000_000);
        for _ in 0..5 {
            assert_eq!(bucket.take(pause, 1), MS(0));
        }
        assert_eq!(bucket.take(pause, 1), MS(10));
    }

    #[test]
    fn what_is_larger_than_the_bucket_is_late_and_so_are_those_behind() {
        let mut bucket = bucket(1000, 100);
        assert_eq!(bucket.take(MS(0), 1100), MS(1000));
        assert_eq!(bucket.take(MS(500), 1), MS(501));
        assert_eq!(bucket.take(MS(2000), 1), MS(0));
    }

    #[test]
    fn nothing_overflows() {
        let mut bucket = bucket(u64::MAX, u64::MAX);
        assert_eq!(bucket.take(Duration::MAX, u64::MAX), MS(0));
        let mut bucket = Bucket::new(Limit::new(1, Some(1)).unwrap());
        for _ in 0..3 {
            bucket.take(MS(0), u64::MAX);
        }
        assert!(bucket.take(Duration::MAX, 1) > MS(0), "there is still more to come");
        // A clock that goes back is one that stands still.
        let mut bucket = Bucket::new(Limit::new(1000, Some(1)).unwrap());
        assert_eq!(bucket.take(MS(10), 1), MS(0));
        assert_eq!(bucket.take(MS(0), 1), MS(1));
    }

    /// How many requests of this size are done in a time, one after the other, each done some time after it
    /// may begin.
    fn done_in(mut bucket: Bucket, time: Duration, size: u64, late: fn(u64) -> Duration) -> u64 {
        let (mut now, mut done) = (MS(0), 0);
        while now < time {
            now += bucket.take(now, size) + late(done);
            done += size;
        }
        done
    }

    #[test]
    fn the_rate_is_what_was_asked_for() {
        let time = Duration::from_secs(4);
        for rate in [20, 100, 777, 5000, 20_000] {
            let limit = Limit::new(rate, None).unwrap();
            // Sleeps end late, by a little and now and then by much.
            let late = |n: u64| Duration::from_micros(if n.is_multiple_of(50) { 900 } else { 5 });
            let done = done_in(Bucket::new(limit), time, 1, late);
            assert!((done as f64 / (4 * rate) as f64 - 1.0).abs() < 0.05, "{rate}: {done}");
        }
        let mebibyte = 1 << 20;
        for size in [4096, mebibyte, 2 * mebibyte] {
            let limit = Limit::new(64 * mebibyte, None).unwrap();
            let done = done_in(Bucket::new(limit), time, size, |_| Duration::from_micros(20));
            let part = done as f64 / (256 * mebibyte) as f64;
            assert!((part - 1.0).abs() < 0.05, "{size}: {part}");
        }
    }

    #[test]
    fn throttles_are_read() {
        let read = |text: &str| text.parse::<Throttle>().unwrap();
        let limit = Limit::new;
        assert_eq!(read("iops=100"), Throttle { iops: limit(100, None), bytes: None });
        assert_eq!(read("iops=2k,iops-burst=10").iops, limit(2000, Some(10)));
        let both = Throttle { iops: limit(5, None), bytes: limit(10 << 20, Some(1 << 30)) };
        assert_eq!(read("bps=10M,iops=5,bps-burst=1G"), both);
        assert_eq!(read("iops=100").iops.unwrap().burst(), 10);
        assert_eq!(read("iops=3").iops.unwrap().burst(), 1);
    }

    #[test]
    fn what_is_wrong_with_a_throttle_is_named() {
        for (text, part, wanted) in [
            ("", "``", "iops=N"),
            ("iops", "`iops`", "iops=N"),
            ("iops=0", "`iops=0`", "above 0"),
            ("iops=5,bps=x", "`bps=x`", "above 0"),
            ("iops=5,iops-burst=0", "`iops-burst=0`", "above 0"),
            ("iops-burst=5", "`iops-burst`", "beside a rate, iops=N"),
            ("iops=5,bps-burst=5", "`bps-burst`", "beside a rate, bps=BYTES"),
            ("iops=5,iops=6", "`iops=6`", "once"),
            ("iops=5,speed=6", "`speed=6`", "bps=BYTES"),
            ("bps=99999999999999999999", "`bps=99999999999999999999`", "above 0"),
            ("bps=99999999999999999G", "`bps=99999999999999999G`", "above 0"),
        ] {
            let error = text.parse::<Throttle>().unwrap_err().to_string();
            let whole = format!("`{text}` is not a throttle: {part} should be ");
            assert!(error.starts_with(&whole) && error.contains(wanted), "{error}");
        }
        assert_eq!(Limit::new(0, None), None);
        assert_eq!(Limit::new(1, Some(0)), None);
        assert_eq!(Throttle::new(None, None), None);
    }
}
