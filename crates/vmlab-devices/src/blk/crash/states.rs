//! Which states a power cut may leave.

use std::ops::Range;

use super::log::{Change, Entry};
use crate::blk::backend::random;

/// What a power cut leaves: all of the first entries, and then some of those that follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrashState {
    /// So many entries were done when the power went.
    pub cut: usize,
    /// All of so many entries are there.
    pub durable: usize,
    /// What is there of others, in the order in which it came to the disk.
    pub survivors: Vec<Survivor>,
}

/// A change that is there after a power cut, though no flush demands it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survivor {
    /// Which entry of the log.
    pub entry: usize,
    /// Which of its sectors, counted from its first one; of a write that was torn, not all.
    pub sectors: Range<u64>,
}

/// How power cuts are chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Cuts {
    /// How many.
    pub count: usize,
    /// Where the random numbers begin. With the same ones, the same log gives the same states.
    pub seed: u64,
    /// Whether of a write some sectors may be there and others not.
    pub tear: bool,
    /// Whether what was done since the last flush may come to the disk in another order.
    pub reorder: bool,
}

/// One in so many of the writes that are kept is torn.
const TORN: u64 = 4;

/// The states of cuts at which a flush has just been done, and nothing is lost.
pub fn at_flushes(entries: &[Entry]) -> impl Iterator<Item = CrashState> + '_ {
    let flush = |entry: &Entry| matches!(entry.change, Change::Flush { .. });
    let places = entries.iter().enumerate().filter(move |(_, entry)| flush(entry));
    places.map(|(place, _)| {
        let cut = place + 1;
        CrashState { cut, durable: cut, survivors: Vec::new() }
    })
}

/// The states of cuts at random places. What the last flush before one covers is there; of each other change it
/// is random whether it is.
pub fn at_random(entries: &[Entry], cuts: Cuts) -> impl Iterator<Item = CrashState> + '_ {
    (0..cuts.count as u64).map(move |number| state(entries, cuts, number))
}

fn state(entries: &[Entry], cuts: Cuts, number: u64) -> CrashState {
    let mut numbers = Numbers { seed: random(cuts.seed, number), next: 0 };
    let cut = numbers.below(entries.len() as u64 + 1) as usize;
    let durable = entries[..cut].iter().filter_map(|entry| match entry.change {
        Change::Flush { covers } => usize::try_from(covers).ok(),
        _ => None,
    });
    let durable = durable.max().unwrap_or(0).min(cut);
    let mut survivors = Vec::new();
    for (entry, Entry { change, .. }) in entries.iter().enumerate().take(cut).skip(durable) {
        let Some(sectors) = change.sectors() else { continue };
        if numbers.below(2) == 0 {
            continue;
        }
        let count = sectors.count();
        let torn = matches!(change, Change::Write(_)) && cuts.tear && count > 1;
        let mut sectors = 0..count;
        if torn && numbers.below(TORN) == 0 {
            let edge = 1 + numbers.below(count - 1);
            sectors = if numbers.below(2) == 0 { 0..edge } else { edge..count };
        }
        survivors.push(Survivor { entry, sectors });
    }
    if cuts.reorder {
        // Fisher-Yates.
        for last in (1..survivors.len()).rev() {
            survivors.swap(last, numbers.below(last as u64 + 1) as usize);
        }
    }
    CrashState { cut, durable, survivors }
}

/// A row of random numbers.
struct Numbers {
    seed: u64,
    next: u64,
}

impl Numbers {
    /// One from 0 up to less than `end`, which is not 0.
    fn below(&mut self, end: u64) -> u64 {
        self.next += 1;
        random(self.seed, self.next) % end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blk::Sectors;
    use std::collections::HashSet;

    fn write(first: u64, count: u64) -> Entry {
        Change::Write(Sectors::within(first, count, 1000).unwrap()).into()
    }

    fn flush(covers: u64) -> Entry {
        Change::Flush { covers }.into()
    }

    /// The write at 2 came while the flush was going on.
    fn entries() -> Vec<Entry> {
        vec![write(0, 1), write(8, 8), write(16, 4), flush(2), write(0, 1), write(24, 2)]
    }

    #[test]
    fn nothing_before_a_flush_is_lost() {
        let states: Vec<CrashState> = at_flushes(&entries()).collect();
        assert_eq!(states, [CrashState { cut: 4, durable: 4, survivors: Vec::new() }]);
        let cuts = Cuts { count: 500, seed: 1, ..Cuts::default() };
        for state in at_random(&entries(), cuts) {
            assert_eq!(state.durable, if state.cut >= 4 { 2 } else { 0 }, "{state:?}");
            let mut last = None;
            for Survivor { entry, sectors } in &state.survivors {
                assert!((state.durable..state.cut).contains(entry), "{state:?}");
                assert!(last < Some(*entry), "{state:?}");
                last = Some(*entry);
                let whole = entries()[*entry].change.sectors().unwrap().count();
                assert_eq!(*sectors, 0..whole, "{state:?}");
            }
        }
    }

    #[test]
    fn all_states_come_up() {
        let cuts = Cuts { count: 1000, seed: 7, ..Cuts::default() };
        let last = |state: &CrashState| state.cut == 6;
        let kept = |state: CrashState| -> Vec<usize> {
            state.survivors.into_iter().map(|survivor| survivor.entry).collect()
        };
        let found: HashSet<_> = at_random(&entries(), cuts).filter(last).map(kept).collect();
        assert_eq!(found.len(), 8, "of the writes 2, 4 and 5: {found:?}");
        let cuts = Cuts { reorder: true, ..cuts };
        let found: HashSet<_> = at_random(&entries(), cuts).filter(last).map(kept).collect();
        assert_eq!(found.len(), 1 + 3 + 6 + 6, "in any order: {found:?}");
    }

    #[test]
    fn torn_writes_have_a_beginning_or_an_end() {
        let cuts = Cuts { count: 2000, seed: 3, tear: true, reorder: false };
        let entries = [write(0, 1), write(8, 4)];
        let found: HashSet<Range<u64>> = at_random(&entries, cuts)
            .flat_map(|state| state.survivors)
            .filter(|survivor| survivor.entry == 1)
            .map(|survivor| survivor.sectors)
            .collect();
        let wanted = [0..4, 0..1, 0..2, 0..3, 1..4, 2..4, 3..4];
        assert_eq!(found, HashSet::from(wanted));
    }

    #[test]
    fn the_same_seed_gives_the_same_states() {
        let states = |seed| -> Vec<CrashState> {
            let cuts = Cuts { count: 50, seed, tear: true, reorder: true };
            at_random(&entries(), cuts).collect()
        };
        assert_eq!(states(1), states(1));
        assert_ne!(states(1), states(2));
        let cuts = Cuts { count: 3, ..Cuts::default() };
        assert_eq!(at_random(&[], cuts).count(), 3);
    }
}
