//! A disk that fails as rules say.

use std::io;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Backend, Buffers, Sectors};
use crate::blk::config::SECTOR;
use crate::blk::options::{ParseError, Words, number};
use crate::workers::sleep_until;

/// The longest delay. A guest takes a disk for hung after 30 s, and may want to see that once.
const MAX_DELAY: Duration = Duration::from_secs(60);

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultKind {
    /// It fails, and nothing is done.
    Fail,
    /// It is done, so much later, or when its queue is stopped.
    Delay(Duration),
    /// It is done as if all were well, but in each sector one bit is another one.
    Corrupt,
    /// The first half of a write's sectors is written, of an odd number the smaller half, and then it fails.
    Tear,
}

/// Which requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// Those for reading sectors.
    Read,
    /// Those for writing data.
    Write,
    /// Those for making all writes durable.
    Flush,
    /// DISCARD and WRITE_ZEROES, each of its ranges for itself.
    Discard,
}

/// When a rule holds, of all requests that it is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum When {
    /// Each time.
    #[default]
    Always,
    /// For one of them, counted from 1 on.
    Nth(u64),
    /// At random, the same with the same seed.
    Random {
        /// How often, of a million times.
        per_million: u32,
        /// Where the random numbers begin.
        seed: u64,
    },
}

/// What is to go wrong, and when.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize)]
pub struct FaultRule {
    kind: FaultKind,
    operation: Operation,
    /// The first and the last sector.
    sectors: Option<(u64, u64)>,
    when: When,
}

const KIND: &str = "fail, corrupt, tear, or delay=TIME, such as delay=50ms";
const OPERATION: &str = "read, write, flush or discard";
const OPTION: &str = "nth=N, sectors=FIRST-LAST, p=PROBABILITY or seed=N";

impl FromStr for FaultRule {
    type Err = ParseError;

    /// Reads `KIND:OPERATION[:nth=N][:sectors=FIRST-LAST][:p=PROBABILITY[:seed=N]]`:
    ///
    /// - `KIND` is `fail` (an error, and nothing is done), `delay=TIME` (in `us`, `ms` or `s`, at most 60 s),
    ///   `corrupt` (a bit of each sector is changed, of what is read or written, and nobody is told) or `tear` (half of
    ///   a write, and an error).
    /// - `OPERATION` is `read`, `write`, `flush`, or `discard`, which are zeroes as well.
    /// - `nth` makes it happen once, to the request of that number, from 1 on; `p`, from 0 to 1, at random. `seed`, 0
    ///   unless given, says at which random; the same seed gives the same numbers in the same order. Without either,
    ///   it happens each time.
    /// - `sectors`, of 512 bytes, leaves out requests that reach into none of them; they do not count for `nth`.
    ///
    /// Such as `fail:write:nth=3`, `corrupt:read:sectors=0-7:p=0.1:seed=1`, `delay=50ms:flush`.
    ///
    /// # Errors
    /// What is wrong, and what would be right.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let words = Words { kind: "fault", text };
        let mut parts = text.split(':');
        let first = parts.next().unwrap_or_default();
        let kind = match (first, first.split_once('=')) {
            ("fail", _) => FaultKind::Fail,
            ("corrupt", _) => FaultKind::Corrupt,
            ("tear", _) => FaultKind::Tear,
            (_, Some(("delay", time))) => {
                let time = duration(time).filter(|time| *time <= MAX_DELAY);
                let wanted = "delay=TIME of at most 60s, such as delay=50ms";
                FaultKind::Delay(time.ok_or_else(|| words.bad(first, wanted))?)
            }
            _ => return Err(words.bad(first, KIND)),
        };
        let second = parts.next().unwrap_or_default();
        let operation = match second {
            "read" => Operation::Read,
            "write" => Operation::Write,
            "flush" => Operation::Flush,
            "discard" => Operation::Discard,
            _ => return Err(words.bad(second, OPERATION)),
        };
        match (kind, operation) {
            (FaultKind::Corrupt, Operation::Flush | Operation::Discard) => {
                return Err(words.bad(second, "read or write, which have data"));
            }
            (FaultKind::Tear, Operation::Read | Operation::Flush | Operation::Discard) => {
                return Err(words.bad(second, "write"));
            }
            _ => {}
        }
        let (mut nth, mut sectors, mut p, mut seed) = (None, None, None, None);
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| words.bad(part, OPTION))?;
            let plain = number(value, 1000);
            let fresh = match key {
                "nth" => {
                    let value = plain.filter(|nth| *nth > 0);
                    let wanted = "nth=N, from 1 on";
                    nth.replace(value.ok_or_else(|| words.bad(part, wanted))?).is_none()
                }
                "seed" => {
                    let wanted = "seed=N, a whole number";
                    seed.replace(plain.ok_or_else(|| words.bad(part, wanted))?).is_none()
                }
                "p" => {
                    let wanted = "p=PROBABILITY, from 0.000001 to 1";
                    p.replace(per_million(value).ok_or_else(|| words.bad(part, wanted))?).is_none()
                }
                "sectors" if operation == Operation::Flush => {
                    return Err(words.bad(part, "left out: a flush has no sectors"));
                }
                "sectors" => {
                    let wanted = "sectors=FIRST-LAST, such as sectors=0-7";
                    sectors.replace(range(value).ok_or_else(|| words.bad(part, wanted))?).is_none()
                }
                _ => return Err(words.bad(part, OPTION)),
            };
            if !fresh {
                return Err(words.bad(part, "there once"));
            }
        }
        let when = match (nth, p, seed) {
            (Some(_), Some(_), _) => return Err(words.bad(text, "with nth or p, not with both")),
            (_, None, Some(_)) => return Err(words.bad("seed", "beside p=PROBABILITY")),
            (None, None, None) => When::Always,
            (Some(nth), None, None) => When::Nth(nth),
            (None, Some(per_million), seed) => {
                When::Random { per_million, seed: seed.unwrap_or(0) }
            }
        };
        Ok(Self { kind, operation, sectors, when })
    }
}

fn duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let count: u64 = text[..digits].parse().ok()?;
    match &text[digits..] {
        "us" => Some(Duration::from_micros(count)),
        "ms" => Some(Duration::from_millis(count)),
        "s" => Some(Duration::from_secs(count)),
        _ => None,
    }
}

fn range(text: &str) -> Option<(u64, u64)> {
    let (first, last) = text.split_once('-')?;
    let (first, last) = (number(first, 1024)?, number(last, 1024)?);
    (first <= last).then_some((first, last))
}

fn per_million(text: &str) -> Option<u32> {
    let number: f64 = text.parse().ok()?;
    let per_million = (number * 1e6).round();
    (1.0..=1e6).contains(&per_million).then_some(per_million as u32)
}

impl FaultRule {
    /// Whether it is for such a request.
    fn is_for(&self, operation: Operation, sectors: Option<Sectors>) -> bool {
        let reaches = match (self.sectors, sectors) {
            (Some((first, last)), Some(sectors)) => {
                sectors.count() > 0 && sectors.first() <= last && first < sectors.end()
            }
            _ => true,
        };
        self.operation == operation && reaches
    }

    /// Whether it holds for the request of this number, from 1 on, of those that it is for.
    fn holds(&self, number: u64) -> bool {
        match self.when {
            When::Always => true,
            When::Nth(nth) => nth == number,
            When::Random { per_million, seed } => {
                random(seed, number) % 1_000_000 < u64::from(per_million)
            }
        }
    }
}

/// A random number for each number: SplitMix64, which is good enough for tests and the same everywhere.
pub(crate) fn random(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Lets requests fail by rules.
pub struct Faulty<B> {
    below: B,
    /// Each with how many requests it was for.
    rules: Vec<(FaultRule, AtomicU64)>,
}

impl<B: Backend> Faulty<B> {
    /// A disk with these rules. Of several that hold for a request, the first one does.
    pub fn new(below: B, rules: Vec<FaultRule>) -> Self {
        let rules = rules.into_iter().map(|rule| (rule, AtomicU64::new(0))).collect();
        Self { below, rules }
    }

    /// What is to happen to a request. All rules count it.
    fn fault(&self, operation: Operation, sectors: Option<Sectors>) -> Option<FaultKind> {
        let mut fault = None;
        for (rule, count) in &self.rules {
            if rule.is_for(operation, sectors)
                && rule.holds(count.fetch_add(1, Ordering::Relaxed) + 1)
            {
                fault = fault.or(Some(rule.kind));
            }
        }
        if let Some(FaultKind::Delay(time)) = fault {
            sleep_until(Instant::now() + time);
        }
        fault
    }

    /// The same for requests without data.
    fn without_data(&self, operation: Operation, sectors: Option<Sectors>) -> io::Result<()> {
        match self.fault(operation, sectors) {
            Some(FaultKind::Fail) => Err(injected()),
            _ => Ok(()),
        }
    }
}

fn injected() -> io::Error {
    io::Error::other("a rule for faults")
}

/// Changes a bit of each sector.
fn corrupt(bytes: &mut [u8], sectors: Sectors) {
    for (number, sector) in (sectors.first()..).zip(bytes.chunks_mut(SECTOR as usize)) {
        let at = random(1, number) as usize % sector.len();
        sector[at] ^= 1 << (number % 8);
    }
}

impl<B: Backend> Backend for Faulty<B> {
    fn capacity(&self) -> u64 {
        self.below.capacity()
    }

    fn read(&self, sectors: Sectors, room: &Buffers<'_>) -> io::Result<()> {
        match self.fault(Operation::Read, Some(sectors)) {
            Some(FaultKind::Fail) => Err(injected()),
            Some(FaultKind::Corrupt) => {
                self.below.read(sectors, room)?;
                let mut bytes = room.to_vec();
                corrupt(&mut bytes, sectors);
                room.fill(0, &bytes);
                Ok(())
            }
            _ => self.below.read(sectors, room),
        }
    }

    fn write(&self, sectors: Sectors, data: &Buffers<'_>) -> io::Result<()> {
        match self.fault(Operation::Write, Some(sectors)) {
            Some(FaultKind::Fail) => Err(injected()),
            Some(FaultKind::Corrupt) => {
                let mut bytes = data.to_vec();
                corrupt(&mut bytes, sectors);
                self.below.write(sectors, &Buffers::from_bytes(&mut bytes))
            }
            Some(FaultKind::Tear) => {
                let half = sectors.part(0, sectors.count() / 2);
                let len = usize::try_from(half.count() * SECTOR).map_err(io::Error::other)?;
                if len > 0 {
                    self.below.write(half, &data.part(0, len))?;
                }
                Err(injected())
            }
            _ => self.below.write(sectors, data),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.without_data(Operation::Flush, None)?;
        self.below.flush()
    }

    fn discard(&self, sectors: Sectors) -> io::Result<()> {
        self.without_data(Operation::Discard, Some(sectors))?;
        self.below.discard(sectors)
    }

    fn write_zeroes(&self, sectors: Sectors, unmap: bool) -> io::Result<()> {
        self.without_data(Operation::Discard, Some(sectors))?;
        self.below.write_zeroes(sectors, unmap)
    }
}

#[cfg(test)]
mod tests {
    use super::super::RawFile;
    use super::super::raw::tests::{read, sectors};
    use super::*;

    fn faulty(rules: &[&str]) -> Faulty<RawFile> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        Faulty::new(RawFile::new(file).unwrap(), rules)
    }

    fn write(disk: &dyn Backend, at: Sectors, byte: u8) -> bool {
        let mut bytes = vec![byte; at.count() as usize * 512];
        disk.write(at, &Buffers::from_bytes(&mut bytes)).is_ok()
    }

    fn fails(disk: &dyn Backend, times: usize) -> Vec<bool> {
        (0..times).map(|_| !write(disk, sectors(0, 1), 1)).collect()
    }

    #[test]
    fn the_nth_of_those_that_count_fails() {
        let disk = faulty(&["fail:write:nth=3:sectors=8-15"]);
        for (first, count, done) in [
            (8, 1, true),
            (7, 1, true),
            (16, 4, true),
            (0, 9, true),
            (15, 1, false),
            (15, 1, true),
            (0, 100, true),
        ] {
            assert_eq!(write(&disk, sectors(first, count), 5), done, "{first} {count}");
        }
        assert_eq!(read(&disk, sectors(15, 1)), [5; 512]);
        let disk = faulty(&["fail:flush:nth=2"]);
        let flushed = [(); 3].map(|()| disk.flush().is_ok());
        assert_eq!(flushed, [true, false, true]);
        let disk = faulty(&["fail:discard:sectors=4-4"]);
        assert!(disk.discard(sectors(0, 4)).is_ok() && disk.discard(sectors(4, 1)).is_err());
        assert!(disk.write_zeroes(sectors(3, 9), true).is_err());
    }

    #[test]
    fn chance_is_the_same_with_the_same_seed() {
        let runs = |rule: &str| fails(&faulty(&[rule]), 1000);
        let one = runs("fail:write:p=0.1:seed=1");
        assert_eq!(one, runs("fail:write:seed=1:p=0.1"));
        assert_ne!(one, runs("fail:write:p=0.1:seed=2"));
        let count = one.iter().filter(|failed| **failed).count();
        assert!((60..140).contains(&count), "{count}");
        assert!(runs("fail:write:p=1").iter().all(|failed| *failed));
    }

    #[test]
    fn a_bit_of_each_sector_is_another_one() {
        for rule in ["corrupt:read", "corrupt:write"] {
            let disk = faulty(&[rule]);
            assert!(write(&disk, sectors(2, 9), 0xf0));
            for sector in read(&disk, sectors(2, 9)).chunks(512) {
                let bits: u32 = sector.iter().map(|byte| (byte ^ 0xf0).count_ones()).sum();
                assert_eq!(bits, 1, "{rule}");
            }
        }
    }

    #[test]
    fn half_of_what_is_torn_is_written() {
        let disk = faulty(&["tear:write"]);
        assert!(!write(&disk, sectors(0, 5), 3));
        assert!(!write(&disk, sectors(10, 1), 3));
        let mut wanted = vec![0; 11 * 512];
        wanted[..1024].fill(3);
        assert_eq!(read(&disk, sectors(0, 11)), wanted);
    }

    #[test]
    fn the_first_rule_holds_and_all_count() {
        let disk = faulty(&["tear:write:nth=2", "fail:write:nth=2", "fail:write:nth=3"]);
        let done = [0, 2, 4, 6].map(|at| write(&disk, sectors(at, 2), 9));
        assert_eq!(done, [true, false, false, true]);
        let halves: Vec<u8> = read(&disk, sectors(0, 8)).chunks(512).map(|s| s[0]).collect();
        assert_eq!(halves, [9, 9, 9, 0, 0, 0, 9, 9]);
    }

    #[test]
    fn rules_are_read() {
        let read = |text: &str| text.parse::<FaultRule>().unwrap();
        let rule = |kind, operation, sectors, when| FaultRule { kind, operation, sectors, when };
        use {FaultKind::*, Operation::*};
        assert_eq!(read("fail:write:nth=3"), rule(Fail, Write, None, When::Nth(3)));
        let random = When::Random { per_million: 100_000, seed: 1 };
        let corrupt = rule(Corrupt, Read, Some((0, 7)), random);
        assert_eq!(read("corrupt:read:sectors=0-7:p=0.1:seed=1"), corrupt);
        let delay = |time, operation| rule(Delay(time), operation, None, When::Always);
        assert_eq!(read("delay=50ms:flush"), delay(Duration::from_millis(50), Flush));
        assert_eq!(read("delay=7us:discard"), delay(Duration::from_micros(7), Discard));
        assert_eq!(read("tear:write:nth=2"), rule(Tear, Write, None, When::Nth(2)));
    }

    #[test]
    fn what_is_wrong_with_a_rule_is_named() {
        for (text, part, wanted) in [
            ("", "``", "fail, corrupt"),
            ("explode:write", "`explode`", "fail, corrupt"),
            ("fail", "``", "read, write"),
            ("fail:wrte", "`wrte`", "read, write"),
            ("delay:write", "`delay`", "delay=TIME"),
            ("delay=5:write", "`delay=5`", "delay=50ms"),
            ("delay=61s:write", "`delay=61s`", "60s"),
            ("corrupt:flush", "`flush`", "read or write"),
            ("tear:read", "`read`", "write"),
            ("fail:write:nth=0", "`nth=0`", "from 1 on"),
            ("fail:write:third", "`third`", "nth=N"),
            ("fail:write:when=3", "`when=3`", "nth=N"),
            ("fail:write:p=2", "`p=2`", "from 0.000001 to 1"),
            ("fail:write:p=NaN", "`p=NaN`", "from 0.000001 to 1"),
            ("fail:write:sectors=7-0", "`sectors=7-0`", "FIRST-LAST"),
            ("fail:flush:sectors=0-7", "`sectors=0-7`", "no sectors"),
            ("fail:write:nth=1:nth=2", "`nth=2`", "once"),
            ("fail:write:seed=1", "`seed`", "beside p"),
            ("fail:write:nth=1:p=0.5", "`fail:write:nth=1:p=0.5`", "not with both"),
        ] {
            let error = text.parse::<FaultRule>().unwrap_err().to_string();
            let whole = format!("`{text}` is not a fault: {part} should be ");
            assert!(error.starts_with(&whole) && error.contains(wanted), "{error}");
        }
    }
}
