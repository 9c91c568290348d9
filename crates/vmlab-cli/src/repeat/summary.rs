//! What all runs under a kernel came to.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::times::{Distribution, Times, millis, written};

/// How many failed runs are listed by number.
const LISTED: usize = 20;

/// The runs under a kernel, counted.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// The kernel's release, once a guest has said it.
    pub(super) release: Option<String>,
    pub(super) passed: u64,
    /// Numbers of the runs that failed, in the order in which they ended.
    pub(super) failed: Vec<u64>,
    pub(super) cancelled: u64,
    pub(super) run_times: Times,
    pub(super) command_times: Times,
}

/// What is written for `--json`.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    kernel: Option<String>,
    release: Option<String>,
    /// How many runs there were to be, if that was said.
    wanted: Option<u64>,
    /// How many came to an end of their own.
    runs: u64,
    passed: u64,
    failed: u64,
    failed_runs: Vec<u64>,
    /// How many were ended before that.
    cancelled: u64,
    jobs: usize,
    wall_ms: f64,
    runs_per_second: f64,
    command_ms: Option<Distribution>,
    run_ms: Option<Distribution>,
    /// Where the logs of failed runs are.
    log_dir: Option<PathBuf>,
    #[serde(skip)]
    histogram: String,
}

impl Tally {
    /// Runs that are done.
    pub(super) fn runs(&self) -> u64 {
        self.passed + self.failed.len() as u64
    }

    pub(super) fn summary(
        mut self,
        kernel: Option<String>,
        wanted: Option<u64>,
        jobs: usize,
        wall: Duration,
        log_dir: Option<PathBuf>,
    ) -> Summary {
        self.failed.sort_unstable();
        Summary {
            kernel,
            wanted,
            runs: self.runs(),
            release: self.release,
            passed: self.passed,
            failed: self.failed.len() as u64,
            failed_runs: self.failed,
            cancelled: self.cancelled,
            jobs,
            wall_ms: millis(wall),
            runs_per_second: 0.0,
            command_ms: self.command_times.distribution(),
            run_ms: self.run_times.distribution(),
            log_dir,
            histogram: self.command_times.histogram(),
        }
        .with_rate(wall)
    }
}

impl Summary {
    fn with_rate(mut self, wall: Duration) -> Self {
        self.runs_per_second = self.runs as f64 / wall.as_secs_f64().max(f64::EPSILON);
        self
    }

    /// The same, for a person.
    pub(super) fn text(&self) -> String {
        let kernel = self.release.as_deref().or(self.kernel.as_deref());
        let kernel = kernel.map(|kernel| format!(" under {kernel}")).unwrap_or_default();
        let of = match self.wanted {
            Some(wanted) if wanted != self.runs => format!("{} of {wanted} runs", self.runs),
            _ if self.runs == 1 => "1 run".to_owned(),
            _ => format!("{} runs", self.runs),
        };
        let mut text = format!("{of}{kernel}: {} passed, {} failed", self.passed, self.failed);
        if !self.failed_runs.is_empty() {
            let listed: Vec<_> =
                self.failed_runs.iter().take(LISTED).map(ToString::to_string).collect();
            let more = match self.failed_runs.len().saturating_sub(LISTED) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            text.push_str(&format!(" ({}{more})", listed.join(", ")));
        }
        if self.cancelled > 0 {
            text.push_str(&format!(", {} ended before they were done", self.cancelled));
        }
        let wall = written(Duration::from_secs_f64(self.wall_ms / 1000.0));
        text.push_str(&format!(
            "\n{wall}, {:.2} runs/s, {} at a time\n",
            self.runs_per_second, self.jobs
        ));
        if self.run_ms.is_some() {
            text.push_str(&Distribution::heading());
        }
        for (name, times) in [("command", &self.command_ms), ("whole run", &self.run_ms)] {
            text.push_str(&times.as_ref().map(|times| times.line(name)).unwrap_or_default());
        }
        if !self.histogram.is_empty() {
            text.push_str("times of the command:\n");
            text.push_str(&self.histogram);
        }
        if let Some(dir) = &self.log_dir {
            text.push_str(&format!("logs of what failed: {}\n", dir.display()));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(failed: impl IntoIterator<Item = u64>) -> Tally {
        let mut tally =
            Tally { passed: 40, failed: failed.into_iter().collect(), ..Tally::default() };
        for ms in 1..=40 {
            tally.run_times.add(Duration::from_millis(1000 + ms));
            tally.command_times.add(Duration::from_millis(10));
        }
        tally
    }

    #[test]
    fn a_summary_for_a_person() {
        let wall = Duration::from_secs(21);
        let mut some = tally([7, 3]);
        some.release = Some("6.12".to_owned());
        some.cancelled = 1;
        let summary = some.summary(None, Some(50), 2, wall, Some("/logs".into()));
        let expected = "\
42 of 50 runs under 6.12: 40 passed, 2 failed (3, 7), 1 ended before they were done
21.00 s, 2.00 runs/s, 2 at a time
                 min    median       p90       p99       max
command        10 ms     10 ms     10 ms     10 ms     10 ms
whole run     1.00 s    1.02 s    1.04 s    1.04 s    1.04 s
logs of what failed: /logs
";
        assert_eq!(summary.text(), expected);
    }

    #[test]
    fn many_failures_are_not_all_listed() {
        let text = tally(1..=60).summary(None, None, 1, Duration::from_secs(1), None).text();
        assert!(text.starts_with("100 runs: 40 passed, 60 failed (1, 2, "), "{text}");
        assert!(text.contains(", 20 and 40 more)\n"), "{text}");
        let text = Tally::default().summary(None, Some(5), 1, Duration::ZERO, None).text();
        assert_eq!(text, "0 of 5 runs: 0 passed, 0 failed\n0.0 ms, 0.00 runs/s, 1 at a time\n");
    }
}
