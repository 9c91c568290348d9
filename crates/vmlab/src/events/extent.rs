//! A report that is being read: which lines are of it, and where it ends.

use super::EventKind;
use super::head::{Head, Site};
use super::line::Line;
use super::title::{self, Frame};

/// How many lines of a report are kept. Those of KASAN and of lockdep have some hundred.
pub(super) const MAX_REPORT_LINES: usize = 512;

/// How many bytes of a report are kept, for its lines may be long.
pub(super) const MAX_REPORT_BYTES: usize = 32 * 1024;

/// How many lines may pass without a function of a call trace: no report has as many registers, locks and
/// memory around a bad address.
const LINES_WITHOUT_FRAME: usize = 64;

/// How many lines may come between the mark that a report begins with and the one that says what happened.
const LINES_BEFORE_HEAD: usize = 16;

/// The same for a process that is killed: the kernel lists its memory and every process before.
const LINES_BEFORE_KILL: usize = 8192;

/// A report whose lines are this far apart has ended, in microseconds of the guest's clock. A slow console
/// on a busy host makes tenths of a second.
const SILENCE_US: u64 = 10_000_000;

/// What of a report has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// What led to it, before the line that says what happened.
    Prelude,
    /// From that line on.
    Body,
    /// What may follow the call trace.
    AfterTrace,
}

/// A report that is being read.
#[derive(Debug)]
pub(super) struct Open {
    /// Its place among the reports, by their beginnings.
    pub(super) order: u64,
    pub(super) head: Option<Head>,
    pub(super) at_us: Option<u64>,
    /// A report that this one is the end of.
    pub(super) ends: Option<u64>,
    pub(super) lines: Vec<String>,
    bytes: usize,
    /// Where in the lines that with the head is.
    head_at: usize,
    part: Part,
    /// Whether a line of `=` comes at the end, as one came at the beginning.
    ruled: bool,
    /// Whether an exception was announced.
    banner: bool,
    /// How many lines may pass without a function of a call trace.
    patience: usize,
    since_frame: usize,
    last_us: Option<u64>,
}

impl Open {
    /// Begins with what comes before some reports, if `text` is that.
    pub(super) fn prelude(order: u64, line: &Line<'_>) -> Option<Self> {
        let ruled = is_rule(line.text);
        let kill = line.text.contains(" invoked oom-killer: ");
        let begins = ruled
            || kill
            || is_cut(line.text)
            || line.text.starts_with("list_del corruption")
            || line.text.starts_with("list_add corruption");
        begins.then(|| {
            let mut open = Self { ruled, ..Self::new(order) };
            open.patience = if kill { LINES_BEFORE_KILL } else { LINES_BEFORE_HEAD };
            open.push(line);
            open
        })
    }

    /// Begins with its head.
    pub(super) fn begin(order: u64, head: Head, line: &Line<'_>) -> Self {
        let mut open = Self::new(order);
        open.behead(head, line);
        open
    }

    fn new(order: u64) -> Self {
        Self {
            order,
            head: None,
            at_us: None,
            ends: None,
            lines: Vec::new(),
            bytes: 0,
            head_at: 0,
            part: Part::Prelude,
            ruled: false,
            banner: false,
            patience: LINES_WITHOUT_FRAME,
            since_frame: 0,
            last_us: None,
        }
    }

    /// The line that says what happened, after a prelude.
    pub(super) fn behead(&mut self, head: Head, line: &Line<'_>) {
        // The end of a long prelude makes room.
        while self.lines.len() >= MAX_REPORT_LINES
            || self.bytes + line.text.len() > MAX_REPORT_BYTES
        {
            let Some(line) = self.lines.pop() else { break };
            self.bytes -= line.len();
        }
        self.banner = head.banner;
        self.head_at = self.lines.len();
        self.part = Part::Body;
        self.at_us = line.at_us;
        self.patience = LINES_WITHOUT_FRAME;
        self.head = Some(head);
        self.since_frame = 0;
        self.push(line);
    }

    pub(super) fn kind(&self) -> Option<EventKind> {
        self.head.as_ref().map(|head| head.kind)
    }

    /// Whether this head is but a further line of this report.
    pub(super) fn goes_on_with(&mut self, head: &Head) -> bool {
        let announced = head.banner && !self.banner && self.part == Part::Body;
        let mine = matches!(self.kind(), Some(EventKind::Oops | EventKind::Bug));
        if announced && mine {
            self.banner = true;
        }
        announced && mine
    }

    /// Whether the last line was so long before this one that the report must have ended.
    pub(super) fn silent_before(&self, line: &Line<'_>) -> bool {
        let (Some(last), Some(now)) = (self.last_us, line.at_us) else { return false };
        now.saturating_sub(last) > SILENCE_US
    }

    /// Takes a line that is no head, if it is of this report.
    pub(super) fn take(&mut self, line: &Line<'_>) -> Taken {
        if self.silent_before(line) {
            return Taken::Not;
        }
        if is_rule(line.text) && self.part != Part::Prelude {
            let mine = self.ruled && self.sanitizer();
            if mine {
                self.push(line);
            }
            return if mine { Taken::Last } else { Taken::Not };
        }
        if is_cut(line.text) && self.part != Part::Prelude {
            return Taken::Not;
        }
        if Frame::of_trace(line.text).is_some() {
            self.since_frame = 0;
        } else {
            self.since_frame += 1;
        }
        if self.since_frame > self.patience
            || (self.part == Part::AfterTrace && !follows(line.text))
        {
            return Taken::Not;
        }
        self.push(line);
        if line.text.starts_with("---[ end Kernel panic") || line.text.starts_with("Rebooting in ")
        {
            return Taken::Last;
        }
        let ended = line.text.starts_with("---[ end trace");
        // A sanitizer's report has several traces, and a rule behind them.
        if self.part == Part::Body && (ended || (ends_trace(line.text) && !self.sanitizer())) {
            self.part = Part::AfterTrace;
        }
        Taken::Yes
    }

    fn sanitizer(&self) -> bool {
        use EventKind::{Kasan, Kcsan, Kfence, Kmsan, Ubsan};
        matches!(self.kind(), Some(Kasan | Kcsan | Kfence | Kmsan | Ubsan))
    }

    /// Keeps a line, as far as there is room.
    fn push(&mut self, line: &Line<'_>) {
        self.last_us = line.at_us.or(self.last_us);
        let room =
            self.lines.len() < MAX_REPORT_LINES && self.bytes + line.text.len() <= MAX_REPORT_BYTES;
        if room {
            self.bytes += line.text.len();
            self.lines.push(line.text.to_owned());
        }
    }

    /// Its head, title and lines; nothing if it never said what happened.
    pub(super) fn close(self) -> Option<Closed> {
        let head = self.head?;
        let title = title::title(&head, &self.lines, self.head_at);
        let Self { order, at_us, ends, lines, .. } = self;
        Some(Closed { order, kind: head.kind, title, at_us, ends, lines })
    }
}

/// What became of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// It is of the report.
    Yes,
    /// It is the report's last.
    Last,
    /// The report has ended before it.
    Not,
}

/// A report that has ended.
#[derive(Debug)]
pub(super) struct Closed {
    pub(super) order: u64,
    pub(super) kind: EventKind,
    pub(super) title: String,
    pub(super) at_us: Option<u64>,
    pub(super) ends: Option<u64>,
    pub(super) lines: Vec<String>,
}

/// A line of `=`, with which sanitizers and lockdep set off their reports.
fn is_rule(text: &str) -> bool {
    text.len() >= 20 && text.bytes().all(|b| b == b'=')
}

/// What bugs and warnings begin with.
fn is_cut(text: &str) -> bool {
    text.starts_with("------------[ cut here ]")
}

fn ends_trace(text: &str) -> bool {
    text.trim_start() == "</TASK>"
}

/// Whether a line is of what follows a call trace: registers again, modules, other CPUs' traces.
fn follows(text: &str) -> bool {
    const BEGINNINGS: [&str; 34] = [
        "Modules linked in:",
        "CPU: ",
        "Tainted: ",
        "Hardware name:",
        "Workqueue: ",
        "Call Trace:",
        "Code: ",
        "FS: ",
        "CS: ",
        "GS: ",
        "PKRU: ",
        "EFLAGS: ",
        "---[ ",
        "note: ",
        "Kernel Offset: ",
        "Rebooting in ",
        "Dumping ftrace",
        "Sending NMI ",
        "NMI backtrace ",
        "irq event stamp: ",
        "hardirqs last ",
        "softirqs last ",
        "Showing ",
        "INFO: lockdep is turned off",
        "rcu: ",
        "task:",
        "stack backtrace:",
        "Kernel panic",
        "Mem-Info:",
        "ORIG_RAX: ",
        "Future hung task reports",
        "last function: ",
        "locks held by ",
        "[last unloaded",
    ];
    // "RAX: 0000", "R10: 0000", "CR2: 0000", "DR0: 0000"
    let register = text.split_once(": ").is_some_and(|(name, _)| {
        (2..=3).contains(&name.len())
            && name.starts_with(['R', 'C', 'D', 'E'])
            && name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
    });
    text.is_empty()
        || text.starts_with(' ')
        || register
        || BEGINNINGS.iter().any(|beginning| text.starts_with(beginning))
}

impl Head {
    /// Whether lines behind the first may be of the report.
    pub(super) fn may_go_on(&self) -> bool {
        !self.single || self.site != Site::None
    }
}
