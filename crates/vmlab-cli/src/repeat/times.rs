//! The distribution of times.

use std::time::Duration;

use serde::Serialize;

/// Rows of a histogram, and how many times one should have at least.
const ROWS: u32 = 8;
const ENOUGH: usize = 10;

/// Length of a histogram's longest bar, in characters.
const BAR: usize = 40;

/// Times of runs, in the order in which they ended.
#[derive(Debug, Default)]
pub(super) struct Times(Vec<Duration>);

/// What times there were, in milliseconds. A percentile is by nearest rank: the shortest time such that
/// so many in a hundred are no longer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Distribution {
    min: f64,
    median: f64,
    p90: f64,
    p95: f64,
    p99: f64,
    max: f64,
    mean: f64,
}

impl Times {
    pub(super) fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// `None` when there are none.
    pub(super) fn distribution(&self) -> Option<Distribution> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let rank = |percent: usize| millis(sorted[(sorted.len() * percent).div_ceil(100) - 1]);
        Some(Distribution {
            min: millis(min),
            median: rank(50),
            p90: rank(90),
            p95: rank(95),
            p99: rank(99),
            max: millis(max),
            mean: sorted.iter().copied().map(millis).sum::<f64>() / sorted.len() as f64,
        })
    }

    /// How many times there are in each of some equal spans between the shortest and the longest: a line
    /// each with a bar. Empty when there are too few, or all are the same.
    pub(super) fn histogram(&self) -> String {
        let (Some(&min), Some(&max)) = (self.0.iter().min(), self.0.iter().max()) else {
            return String::new();
        };
        if min == max || self.0.len() < ENOUGH {
            return String::new();
        }
        let mut counts = [0usize; ROWS as usize];
        for time in &self.0 {
            let at = (*time - min).as_nanos() * u128::from(ROWS) / (max - min).as_nanos();
            counts[(at as usize).min(counts.len() - 1)] += 1;
        }
        let most = counts.iter().copied().max().unwrap_or(1);
        let edge = |row: usize| written(min + (max - min) * row as u32 / ROWS);
        let rows = counts.iter().enumerate().map(|(row, &count)| {
            // What there is at all can be seen.
            let bar = "#".repeat((count * BAR).div_ceil(most));
            let line = format!("  {:>7} to {:>7} |{bar} {count}", edge(row), edge(row + 1));
            line.trim_end_matches(" 0").to_owned() + "\n"
        });
        rows.collect()
    }
}

impl Distribution {
    /// The heading of a table of distributions.
    pub(super) fn heading() -> String {
        row("", ["min", "median", "p90", "p99", "max"].map(str::to_owned))
    }

    /// A line of that table.
    pub(super) fn line(&self, name: &str) -> String {
        let times = [self.min, self.median, self.p90, self.p99, self.max];
        row(name, times.map(|ms| written(Duration::from_secs_f64(ms / 1000.0))))
    }
}

fn row(name: &str, cells: [String; 5]) -> String {
    let cells: String = cells.iter().map(|cell| format!(" {cell:>9}")).collect();
    format!("{name:<10}{cells}\n")
}

/// A time as people read it.
pub(super) fn written(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        ..0.01 => format!("{:.1} ms", seconds * 1000.0),
        ..0.9995 => format!("{:.0} ms", seconds * 1000.0),
        ..100.0 => format!("{seconds:.2} s"),
        _ => format!("{seconds:.0} s"),
    }
}

/// Milliseconds, to a microsecond.
pub(super) fn millis(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(ms: impl IntoIterator<Item = u64>) -> Times {
        Times(ms.into_iter().map(Duration::from_millis).collect())
    }

    #[test]
    fn percentiles_are_times_that_occurred() {
        // 1 to 100, not in order.
        let distribution = times((1..=100).map(|n| n * 37 % 101)).distribution().unwrap();
        let Distribution { min, median, p90, p95, p99, max, mean } = distribution;
        assert_eq!((min, median, p90, p95, p99, max), (1.0, 50.0, 90.0, 95.0, 99.0, 100.0));
        assert!((mean - 50.5).abs() < 1e-9, "{mean}");

        let three = times([30, 10, 20]).distribution().unwrap();
        assert_eq!((three.min, three.median, three.p90, three.max), (10.0, 20.0, 30.0, 30.0));
        let one = times([7]).distribution().unwrap();
        assert_eq!((one.min, one.median, one.p99, one.max, one.mean), (7.0, 7.0, 7.0, 7.0, 7.0));
        assert_eq!(times([]).distribution(), None);
    }

    #[test]
    fn a_histogram_has_every_time_once() {
        let text = times((0..60).map(|_| 100).chain([101, 900])).histogram();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 8, "{text}");
        assert!(lines[0].starts_with("   100 ms to  200 ms |####"), "{text}");
        assert!(lines[0].ends_with("# 61"), "{text}");
        assert_eq!(lines[0].matches('#').count(), BAR);
        assert!(lines[7].ends_with("  800 ms to  900 ms |# 1"), "{text}");
        assert!(lines[1..7].iter().all(|line| line.ends_with('|')), "{text}");
        assert_eq!(times([5; 20]).histogram(), "");
        assert_eq!(times(1..10).histogram(), "");
        assert_ne!(times(1..11).histogram(), "");
        assert_eq!(times([]).histogram(), "");
    }

    #[test]
    fn times_are_written_with_three_digits_or_so() {
        let ms = |ms: f64| written(Duration::from_secs_f64(ms / 1000.0));
        let all = [ms(1.25), ms(45.4), ms(999.4), ms(999.6), ms(2415.0), ms(123_456.0)];
        assert_eq!(all, ["1.2 ms", "45 ms", "999 ms", "1.00 s", "2.42 s", "123 s"]);
    }
}
