//! Where the time of a run went: named spans in spans, on one clock.

use std::time::{Duration, Instant};

use serde::Serialize;
use vmlab_wire::message::{BootLog, Ready, SetupReport};

use crate::report::{Phase, PhaseTime};

/// How many spans of one kind are taken over from a guest. An agent reports some twenty; a damaged one
/// shall not fill the host's memory.
const MAX_GUEST_SPANS: usize = 500;

/// Who spent the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Track {
    /// vmlab, and what it started.
    Host,
    /// The guest's kernel.
    Kernel,
    /// The agent in the guest.
    Agent,
}

impl Track {
    /// All of them, in the order in which they come into a run.
    pub const ALL: [Track; 3] = [Track::Host, Track::Kernel, Track::Agent];

    /// What a person reads.
    pub const fn name(self) -> &'static str {
        match self {
            Track::Host => "host",
            Track::Kernel => "kernel",
            Track::Agent => "agent",
        }
    }
}

/// Something that took time. All times of a run are on the host's clock and count from the run's beginning;
/// those of a guest are placed by when its messages arrived.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Span {
    /// Who spent it.
    pub track: Track,
    /// On what. Guests have a say in it, so it may hold anything.
    pub name: String,
    /// When it began, in milliseconds.
    pub start_ms: f64,
    /// How long it took, in milliseconds.
    pub ms: f64,
    /// What it consisted of, as far as that is known, in the order of their beginnings.
    pub spans: Vec<Span>,
}

impl Span {
    /// From one time to another, in milliseconds.
    fn new(track: Track, name: impl Into<String>, start_ms: f64, end_ms: f64) -> Self {
        // To a microsecond, so that nobody reads what only arithmetic has made.
        let whole_us = |ms: f64| (ms * 1000.0).round() / 1000.0;
        let ms = whole_us((end_ms - start_ms).max(0.0));
        Self { track, name: name.into(), start_ms: whole_us(start_ms), ms, spans: Vec::new() }
    }

    /// Something without parts that began at `start_ms` and took `ms`.
    pub fn of(track: Track, name: impl Into<String>, start_ms: f64, ms: f64) -> Self {
        Self::new(track, name, start_ms, start_ms + ms)
    }

    /// When it ended, in milliseconds.
    pub fn end_ms(&self) -> f64 {
        self.start_ms + self.ms
    }

    /// This span and all in it, each with how deep it lies, in the order of their beginnings.
    pub fn flat(&self) -> Vec<(usize, &Span)> {
        let mut rows = Vec::new();
        let mut todo = vec![(0, self)];
        while let Some((depth, span)) = todo.pop() {
            rows.push((depth, span));
            todo.extend(span.spans.iter().rev().map(|inner| (depth + 1, inner)));
        }
        rows
    }
}

/// Collects phases that follow each other, and what they consisted of.
#[derive(Debug, Clone)]
pub(crate) struct Timeline {
    origin: Instant,
    since: Instant,
    /// What the time since then goes to.
    current: Phase,
    phases: Vec<PhaseTime>,
    spans: Vec<Span>,
    /// What the phase that lasts consisted of so far.
    inner: Vec<Span>,
    /// When the guest's kernel and its clock started, once that is known.
    guest_zero_ms: Option<f64>,
}

impl Timeline {
    pub(crate) fn start() -> Self {
        let now = Instant::now();
        Self {
            origin: now,
            since: now,
            current: Phase::Kernel,
            phases: Vec::new(),
            spans: Vec::new(),
            inner: Vec::new(),
            guest_zero_ms: None,
        }
    }

    /// The same until now, with what follows counted from now on.
    pub(crate) fn resumed(&self) -> Self {
        let now = Instant::now();
        let so_far = self.since.saturating_duration_since(self.origin);
        let origin = now.checked_sub(so_far).unwrap_or(now);
        Self { origin, since: now, current: Phase::Boot, ..self.clone() }
    }

    /// What happens from now on is this phase, should it end early.
    pub(crate) fn begin(&mut self, phase: Phase) {
        self.current = phase;
    }

    /// The phase that lasts has failed.
    pub(crate) fn fail(&mut self) {
        self.end(self.current);
    }

    /// Everything since the last call was this phase.
    pub(crate) fn end(&mut self, phase: Phase) {
        let now = Instant::now();
        self.phases.push(PhaseTime { phase, ms: millis(now - self.since) });
        let mut span = Span::new(Track::Host, phase.name(), self.at(self.since), self.at(now));
        span.spans = std::mem::take(&mut self.inner);
        span.spans.sort_by(|a, b| a.start_ms.total_cmp(&b.start_ms));
        self.spans.push(span);
        self.since = now;
    }

    /// The host did this from `since` until now, as a part of the phase that lasts.
    pub(crate) fn note(&mut self, name: &str, since: Instant) {
        let span = Span::new(Track::Host, name, self.at(since), self.now());
        self.inner.push(span);
    }

    /// The agent's first message has just come: it places the guest's clock, and tells of the boot.
    pub(crate) fn guest_ready(&mut self, ready: &Ready) {
        let begun = self.at(self.since);
        let clock = GuestClock { now_ms: self.now(), now_ns: ready.ready_ns, begun_ms: begun };
        let zero = clock.at(0);
        self.guest_zero_ms = Some(zero);
        let loaded = self.inner.last().map_or(begun, Span::end_ms).min(zero);
        let (started, up) = (clock.at(ready.started_ns), clock.at(ready.ready_ns));
        self.inner.push(Span::new(Track::Kernel, "before the kernel's clock", loaded, zero));
        self.inner.push(Span::new(Track::Kernel, "kernel", zero, started));
        let mut agent = Span::new(Track::Agent, "agent", started, up);
        agent.spans = clock.spans(&ready.steps);
        match agent.spans.iter_mut().find(|step| step.name == "modules") {
            Some(step) => step.spans = clock.spans(&ready.modules),
            None => agent.spans.extend(clock.spans(&ready.modules)),
        }
        self.inner.push(agent);
    }

    /// The agent has just said that the guest is ready.
    pub(crate) fn guest_set_up(&mut self, setup: &SetupReport) {
        let (since, now) = (self.at(self.since), self.now());
        let us = |us: u64| us as f64 / 1000.0;
        let total: f64 = setup.steps.iter().map(|(_, time)| us(*time)).sum();
        let mut at = (now - total).max(since);
        for (name, time) in setup.steps.iter().take(MAX_GUEST_SPANS) {
            let end = (at + us(*time)).min(now);
            self.inner.push(Span::new(Track::Agent, name, at, end));
            at = end;
        }
    }

    /// What the kernel's log says of its boot. Each part lasts until the next one's first message.
    pub(crate) fn boot_log(&mut self, log: &BootLog) {
        let Some(zero) = self.guest_zero_ms else { return };
        let boot = self.spans.iter_mut().flat_map(|phase| phase.spans.iter_mut());
        let Some(kernel) =
            boot.into_iter().find(|span| span.track == Track::Kernel && span.name == "kernel")
        else {
            return;
        };
        let end = kernel.end_ms();
        let place = |ns: u64| (zero + ns as f64 / 1e6).min(end);
        let mut starts: Vec<(&str, f64)> = log
            .parts
            .iter()
            .take(MAX_GUEST_SPANS)
            .map(|(name, ns)| (name.as_str(), place(*ns)))
            .collect();
        starts.sort_by(|a, b| a.1.total_cmp(&b.1));
        let ends = starts.iter().skip(1).map(|(_, start)| *start).chain([end]);
        let parts = starts.iter().zip(ends);
        kernel.spans = parts
            .map(|((name, start), end)| Span::new(Track::Kernel, *name, *start, end))
            .collect();
    }

    pub(crate) fn phases(&self) -> Vec<PhaseTime> {
        self.phases.clone()
    }

    pub(crate) fn spans(&self) -> Vec<Span> {
        self.spans.clone()
    }

    fn now(&self) -> f64 {
        self.at(Instant::now())
    }

    fn at(&self, time: Instant) -> f64 {
        millis(time.saturating_duration_since(self.origin))
    }
}

/// The guest's clock on the host's.
struct GuestClock {
    /// The same moment on both.
    now_ms: f64,
    now_ns: u64,
    /// Nothing was before this.
    begun_ms: f64,
}

impl GuestClock {
    /// A time of the guest's. What cannot be is moved to what can: guests may say anything.
    fn at(&self, ns: u64) -> f64 {
        let before = self.now_ns.saturating_sub(ns) as f64 / 1e6;
        (self.now_ms - before).clamp(self.begun_ms, self.now_ms.max(self.begun_ms))
    }

    /// What the agent did, in the order of their beginnings.
    fn spans(&self, steps: &[(String, u64, u64)]) -> Vec<Span> {
        let steps = steps.iter().take(MAX_GUEST_SPANS);
        let mut spans: Vec<_> = steps
            .map(|(name, from, to)| Span::new(Track::Agent, name, self.at(*from), self.at(*to)))
            .collect();
        spans.sort_by(|a, b| a.start_ms.total_cmp(&b.start_ms));
        spans
    }
}

/// Milliseconds, to a microsecond.
pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// A timeline whose phase has lasted for 1000 ms.
    fn timeline() -> Timeline {
        let mut timeline = Timeline::start();
        let origin = timeline.origin.checked_sub(Duration::from_millis(1000)).unwrap();
        timeline.origin = origin;
        timeline.since = origin;
        timeline
    }

    fn ready(steps: Vec<(String, u64, u64)>) -> Ready {
        let modules = vec![("overlay".to_owned(), 620 * MS, 630 * MS)];
        Ready {
            release: String::new(),
            started_ns: 600 * MS,
            ready_ns: 700 * MS,
            steps,
            modules,
            revivable: 0,
        }
    }

    fn find<'a>(spans: &'a [Span], name: &str) -> &'a Span {
        let all = spans.iter().flat_map(Span::flat);
        all.map(|(_, span)| span).find(|span| span.name == name).unwrap()
    }

    fn near(found: f64, wanted: f64) -> bool {
        (found - wanted).abs() < 100.0
    }

    #[test]
    fn a_guests_times_are_placed_by_its_message() {
        let mut timeline = timeline();
        timeline.guest_ready(&ready(vec![("modules".to_owned(), 610 * MS, 650 * MS)]));
        timeline.end(Phase::Boot);
        let spans = timeline.spans();
        let kernel = find(&spans, "kernel");
        assert!(near(kernel.start_ms, 300.0) && (kernel.ms - 600.0).abs() < 0.01, "{kernel:?}");
        let step = find(&spans, "modules");
        assert!((step.start_ms - kernel.end_ms() - 10.0).abs() < 0.01, "{step:?}");
        assert!((step.ms - 40.0).abs() < 0.01, "{step:?}");
        let before = find(&spans, "before the kernel's clock");
        assert!(before.start_ms == 0.0 && (before.end_ms() - kernel.start_ms).abs() < 0.01);
        let depths: Vec<_> = spans[0].flat().iter().map(|(d, s)| (*d, s.name.clone())).collect();
        let depths: Vec<_> = depths.iter().map(|(d, name)| (*d, name.as_str())).collect();
        let wanted = [(0, "boot"), (1, before.name.as_str()), (1, "kernel"), (1, "agent")];
        assert_eq!(depths[..4], wanted);
        assert_eq!(depths[4..], [(2, "modules"), (3, "overlay")]);
    }

    #[test]
    fn the_kernels_parts_last_until_the_next_one() {
        let mut timeline = timeline();
        timeline.guest_ready(&ready(Vec::new()));
        timeline.end(Phase::Boot);
        let parts = [("drivers", 200 * MS), ("memory", 0), ("late", 9000 * MS)];
        let parts = parts.iter().map(|(name, ns)| ((*name).to_owned(), *ns)).collect();
        timeline.boot_log(&BootLog { parts });
        let spans = timeline.spans();
        let times: Vec<_> = find(&spans, "kernel").spans.iter().map(|s| s.ms.round()).collect();
        assert_eq!(times, [200.0, 400.0, 0.0]);
    }

    #[test]
    fn the_steps_of_the_set_up_end_with_its_message() {
        let mut timeline = timeline();
        let steps = vec![("root".to_owned(), 30_000), ("files".to_owned(), 20_000)];
        timeline.guest_set_up(&SetupReport { steps, ..SetupReport::default() });
        timeline.end(Phase::Setup);
        let spans = timeline.spans();
        let (root, files) = (find(&spans, "root"), find(&spans, "files"));
        assert!((root.end_ms() - files.start_ms).abs() < 0.01, "{spans:?}");
        assert!(near(files.end_ms(), 1000.0) && (files.ms - 20.0).abs() < 0.01, "{spans:?}");
    }

    #[test]
    fn no_span_leaves_its_phase_whatever_a_guest_says() {
        let steps = vec![("x".to_owned(), u64::MAX, 0), ("y".to_owned(), 0, u64::MAX)];
        let mut timeline = timeline();
        let ready_ns = u64::MAX;
        let modules = steps.clone();
        timeline.guest_ready(&Ready { started_ns: 0, ready_ns, modules, ..ready(steps) });
        timeline.end(Phase::Boot);
        timeline.boot_log(&BootLog { parts: vec![("z".to_owned(), u64::MAX); 3] });
        timeline.guest_set_up(&SetupReport {
            steps: vec![("s".to_owned(), u64::MAX); 9],
            ..Default::default()
        });
        timeline.end(Phase::Setup);
        for phase in timeline.spans() {
            for (_, span) in phase.flat() {
                assert!(span.start_ms >= phase.start_ms && span.ms >= 0.0, "{span:?}");
                assert!(span.end_ms() <= phase.end_ms() + 0.01, "{span:?} of {}", phase.name);
            }
        }
    }

    #[test]
    fn what_a_guest_reports_is_bounded() {
        let mut timeline = timeline();
        timeline.guest_ready(&ready(vec![("x".to_owned(), 0, 1); MAX_GUEST_SPANS * 2]));
        timeline.end(Phase::Boot);
        assert!(timeline.spans()[0].flat().len() < MAX_GUEST_SPANS + 10);
    }
}
