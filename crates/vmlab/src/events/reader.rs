//! Reads events from a console as it comes.

use super::extent::{Closed, MAX_REPORT_BYTES, MAX_REPORT_LINES, Open, Taken};
use super::head::{Head, head};
use super::line::{Caller, Evidence, FIRST_LINE, Line, Lines};
use super::{EventKind, EventKinds, KernelEvent};

/// How many events of different titles are kept. A guest that shows more has long failed.
pub(super) const MAX_EVENTS: usize = 128;

/// How many reports may be unfinished at once: as many CPUs and tasks can be told apart.
pub(super) const MAX_OPEN: usize = 16;

/// Reads what a kernel says of itself from its console, byte by byte.
///
/// Reports that several CPUs or tasks write at once are told apart where the kernel says who writes
/// (`CONFIG_PRINTK_CALLER`). However much a guest writes, no more is kept than some MiB.
#[derive(Debug)]
pub struct EventReader {
    kinds: EventKinds,
    lines: Lines,
    state: State,
}

#[derive(Debug, Default)]
struct State {
    evidence: Evidence,
    open: Vec<(Option<Caller>, Open)>,
    begun: u64,
    events: Vec<KernelEvent>,
    /// Of each event, in the same order.
    kept: Vec<Kept>,
    lost: u64,
    /// The letters of taints that were reported.
    taints: Vec<char>,
    /// The last report that ended, for a panic that follows it.
    last: Option<u64>,
}

#[derive(Debug)]
struct Kept {
    order: u64,
    bytes: usize,
    /// When it last happened. A report with this time or an earlier one was written again, by a program that
    /// shows the kernel's log.
    last_us: Option<u64>,
}

impl EventReader {
    /// A reader that keeps events of these kinds.
    pub fn new(kinds: EventKinds) -> Self {
        Self { kinds, lines: Lines::default(), state: State::default() }
    }

    /// A reader that keeps all events.
    pub fn all() -> Self {
        Self::new(EventKinds::from(EventKind::ALL))
    }

    /// Takes what came from the console, in pieces of any size.
    pub fn feed(&mut self, bytes: &[u8]) {
        let Self { kinds, lines, state } = self;
        lines.feed(bytes, |line| state.line(kinds, line));
    }

    /// Ends the reports that are being read, for nothing follows, or nothing has for a while. Reading may go on.
    pub fn finish(&mut self) {
        let Self { kinds, lines, state } = self;
        lines.flush(|line| state.line(kinds, line));
        for (_, open) in std::mem::take(&mut state.open) {
            state.close(kinds, open);
        }
    }

    /// The events whose reports have ended, in the order of their beginnings. One that is still being written is
    /// not among them: see [`finish`](Self::finish).
    pub fn events(&self) -> &[KernelEvent] {
        &self.state.events
    }

    /// The same, of a reader that is not needed any more.
    pub fn into_events(mut self) -> Vec<KernelEvent> {
        self.finish();
        self.state.events
    }

    /// The kinds whose reports are being read.
    pub fn unfinished(&self) -> EventKinds {
        self.state.open.iter().filter_map(|(_, open)| open.kind()).collect()
    }

    /// How many events were not kept, because there were too many different ones.
    pub fn lost(&self) -> u64 {
        self.state.lost
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> (usize, usize, usize) {
        let open: usize = self.state.open.iter().map(|(_, open)| open.lines.len()).sum();
        (self.lines.held(), self.state.open.len(), open)
    }
}

impl State {
    fn line(&mut self, kinds: &EventKinds, line: &str) {
        let line = Line::parse(line);
        let Some(sure) = self.evidence.weigh(&line) else { return };
        if line.text.starts_with(FIRST_LINE) {
            self.booted(kinds);
        }
        self.taint(kinds, line.text, line.at_us);
        match head(line.text, sure) {
            Some(head) => self.head(kinds, head, &line),
            None => self.other(kinds, &line),
        }
    }

    /// A kernel started: what the one before it said has ended, and its clock begins anew.
    fn booted(&mut self, kinds: &EventKinds) {
        for (_, open) in std::mem::take(&mut self.open) {
            self.close(kinds, open);
        }
        self.taints.clear();
        self.last = None;
        self.kept.iter_mut().for_each(|kept| kept.last_us = None);
    }

    fn head(&mut self, kinds: &EventKinds, head: Head, line: &Line<'_>) {
        let mut ends = None;
        if let Some(at) = self.open.iter().position(|(caller, _)| *caller == line.caller) {
            let (_, open) = &mut self.open[at];
            let silent = open.silent_before(line);
            if !silent && open.goes_on_with(&head) {
                open.take(line);
                return;
            }
            if !silent && open.kind().is_none() && head.kind != EventKind::Panic {
                open.behead(head, line);
                self.end_if_single(kinds, at);
                return;
            }
            let (_, open) = self.open.swap_remove(at);
            // A panic in the middle of a report is what comes of what it reports.
            ends = self.close(kinds, open).filter(|_| !silent);
        }
        if ends.is_none() && of_earlier(line.text) {
            ends = self.last;
        }
        let mut open = Open::begin(self.next(), head, line);
        open.ends = ends.filter(|_| open.kind() == Some(EventKind::Panic));
        self.keep_open(kinds, line.caller, open);
        self.end_if_single(kinds, self.open.len() - 1);
    }

    fn end_if_single(&mut self, kinds: &EventKinds, at: usize) {
        if self.open[at].1.head.as_ref().is_some_and(|head| !head.may_go_on()) {
            let (_, open) = self.open.swap_remove(at);
            self.close(kinds, open);
        }
    }

    fn other(&mut self, kinds: &EventKinds, line: &Line<'_>) {
        if let Some(at) = self.open.iter().position(|(caller, _)| *caller == line.caller) {
            match self.open[at].1.take(line) {
                Taken::Yes => return,
                taken => {
                    let (_, open) = self.open.swap_remove(at);
                    self.close(kinds, open);
                    if taken == Taken::Last {
                        return;
                    }
                }
            }
        }
        let order = self.begun + 1;
        if let Some(open) = Open::prelude(order, line) {
            self.begun = order;
            self.keep_open(kinds, line.caller, open);
        }
    }

    fn keep_open(&mut self, kinds: &EventKinds, caller: Option<Caller>, open: Open) {
        if self.open.len() >= MAX_OPEN {
            let oldest = (0..self.open.len()).min_by_key(|at| self.open[*at].1.order).unwrap_or(0);
            let (_, oldest) = self.open.swap_remove(oldest);
            self.close(kinds, oldest);
        }
        self.open.push((caller, open));
    }

    fn next(&mut self) -> u64 {
        self.begun += 1;
        self.begun
    }

    /// New letters of `CPU: 0 PID: 1 Comm: sh Tainted: G        W   6.12.1`.
    fn taint(&mut self, kinds: &EventKinds, text: &str, at_us: Option<u64>) {
        let taint = text.strip_prefix("CPU: ").and_then(|rest| rest.split_once(" Tainted: "));
        let Some((_, taint)) = taint else { return };
        for letter in taint.chars().take_while(|c| c.is_ascii_uppercase() || *c == ' ') {
            let meaning = DAMAGE.iter().find(|(damage, _)| *damage == letter);
            let Some((_, meaning)) = meaning.filter(|_| !self.taints.contains(&letter)) else {
                continue;
            };
            self.taints.push(letter);
            let order = self.next();
            let title = format!("tainted: {letter} ({meaning})");
            let lines = vec![text.to_owned()];
            self.record(
                kinds,
                Closed { order, kind: EventKind::Taint, title, at_us, ends: None, lines },
            );
        }
    }

    /// Ends a report; gives what it is known by, if it was one.
    fn close(&mut self, kinds: &EventKinds, open: Open) -> Option<u64> {
        let closed = open.close()?;
        if let Some(order) = closed.ends {
            self.extend(order, &closed.lines);
        }
        let id = self.record(kinds, closed);
        self.last = id;
        id
    }

    fn record(&mut self, kinds: &EventKinds, closed: Closed) -> Option<u64> {
        let Closed { order, kind, title, at_us, lines, .. } = closed;
        if !kinds.contains(&kind) {
            return None;
        }
        if let Some(at) = self.events.iter().position(|event| event.title == title) {
            let kept = &mut self.kept[at];
            if at_us.is_none() || kept.last_us < at_us {
                kept.last_us = at_us;
                self.events[at].count = self.events[at].count.saturating_add(1);
            }
            // The first one's report stays as it is.
            return None;
        }
        if self.events.len() >= MAX_EVENTS {
            self.lost = self.lost.saturating_add(1);
            return None;
        }
        let at = self.kept.partition_point(|kept| kept.order < order);
        let bytes = lines.iter().map(String::len).sum();
        self.kept.insert(at, Kept { order, bytes, last_us: at_us });
        self.events.insert(at, KernelEvent { kind, title, at_us, report: lines, count: 1 });
        Some(order)
    }

    /// Adds what came of an event to its report.
    fn extend(&mut self, order: u64, lines: &[String]) {
        let Some(at) = self.kept.iter().position(|kept| kept.order == order) else { return };
        for line in lines {
            let (kept, report) = (&mut self.kept[at], &mut self.events[at].report);
            if report.len() >= MAX_REPORT_LINES || kept.bytes + line.len() > MAX_REPORT_BYTES {
                return;
            }
            kept.bytes += line.len();
            report.push(line.clone());
        }
    }
}

/// The letters that say that something went wrong (`taint_flags` in kernel/panic.c). The others say what was
/// loaded, patched or configured.
const DAMAGE: [(char, &str); 5] = [
    ('M', "machine check"),
    ('B', "bad page"),
    ('D', "oops or BUG"),
    ('W', "warning"),
    ('L', "soft lockup"),
];

/// Whether a panic says itself that it comes of what was reported before.
fn of_earlier(text: &str) -> bool {
    [
        "Fatal exception",
        "panic_on_warn",
        "Attempted to kill",
        "hung_task: blocked",
        "softlockup: hung",
    ]
    .iter()
    .any(|words| text.contains(words))
}
