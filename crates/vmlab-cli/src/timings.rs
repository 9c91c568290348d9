//! `--timings`: where the time of a run went, as a list and as a drawing.

mod svg;

use vmlab::hypervisor::ExitCount;
use vmlab::timings::Span;

pub(crate) use svg::draw;

/// The list's longest bar, in characters.
const BAR: usize = 30;

/// The longest name that is shown, in characters. Names may come from the guest.
const NAME_MAX: usize = 60;

/// A run whose times are shown.
#[derive(Debug)]
pub(crate) struct Timed {
    /// What it ran under.
    pub(crate) title: String,
    pub(crate) spans: Vec<Span>,
    /// How often its CPUs left the guest, where that is known.
    pub(crate) exits: Vec<ExitCount>,
}

impl Timed {
    /// Its length in milliseconds.
    fn total_ms(&self) -> f64 {
        self.spans.iter().map(Span::end_ms).fold(0.0, f64::max)
    }

    /// All spans, each with how deep it lies.
    fn rows(&self) -> impl Iterator<Item = (usize, &Span)> {
        self.spans.iter().flat_map(Span::flat)
    }
}

/// The list: a line a span, with a bar where it lies in the run.
pub(crate) fn list(timed: &Timed) -> String {
    let total = timed.total_ms();
    let mut text = format!("{}: {} in all\n", shown(&timed.title), time(total));
    text.push_str(&format!("  {:>9}  {:>9}  {:<BAR$}\n", "start", "time", ""));
    for (depth, span) in timed.rows() {
        text.push_str(&format!(
            "  {:>9}  {:>9}  {}  {:<6}  {:indent$}{}\n",
            time(span.start_ms),
            time(span.ms),
            bar(span, total),
            span.track.name(),
            "",
            shown(&span.name),
            indent = depth * 2
        ));
    }
    if !timed.exits.is_empty() {
        let total: u64 = timed.exits.iter().map(|exit| exit.count).sum();
        let exit = |exit: &ExitCount| format!("{} {}", exit.exit, exit.count);
        let exits: Vec<String> = timed.exits.iter().map(exit).collect();
        text.push_str(&format!("  {total} exits of the guest: {}\n", exits.join(", ")));
    }
    text
}

fn bar(span: &Span, total: f64) -> String {
    let place = |ms: f64| if total > 0.0 { (ms / total * BAR as f64) as usize } else { 0 };
    let from = place(span.start_ms).min(BAR - 1);
    let to = place(span.end_ms()).clamp(from + 1, BAR);
    format!("{}{}{}", " ".repeat(from), "#".repeat(to - from), " ".repeat(BAR - to))
}

/// A time as people read it.
fn time(ms: f64) -> String {
    if ms < 9999.95 { format!("{ms:.1} ms") } else { format!("{:.2} s", ms / 1000.0) }
}

/// A name without anything that drives a terminal or makes lines of its own.
fn shown(name: &str) -> String {
    let clean = |c: char| if c.is_control() || is_directional(c) { '?' } else { c };
    let mut text: String = name.chars().take(NAME_MAX).map(clean).collect();
    if name.chars().nth(NAME_MAX).is_some() {
        text.push('…');
    }
    text
}

/// Whether a character changes the direction in which text is shown.
fn is_directional(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmlab::timings::Track;

    /// A span for tests.
    pub(super) fn span(track: Track, name: &str, from: f64, ms: f64, spans: Vec<Span>) -> Span {
        let mut made = Span::of(track, name, from, ms);
        made.spans = spans;
        made
    }

    /// A run with something of each track, and names that a guest may have made up.
    pub(super) fn run() -> Timed {
        let inner = vec![
            span(Track::Host, "hypervisor's start", 20.0, 40.0, vec![]),
            span(
                Track::Kernel,
                "kernel",
                60.0,
                900.0,
                vec![span(Track::Kernel, "<script>&\"'\x1b[2J\u{202e}\0", 100.0, 1.5, vec![])],
            ),
            span(Track::Agent, &"long ".repeat(100), 960.0, 40.0, vec![]),
        ];
        let spans = vec![
            span(Track::Host, "prepare", 0.0, 20.0, vec![]),
            span(Track::Host, "boot", 20.0, 980.0, inner),
        ];
        Timed { title: "6.12 & <more>".to_owned(), spans, exits: Vec::new() }
    }

    #[test]
    fn the_list_has_a_line_a_span() {
        let text = list(&run());
        assert_eq!(text.lines().count(), 2 + 6, "{text}");
        assert!(text.starts_with("6.12 & <more>: 1000.0 ms in all\n"), "{text}");
        let boot = text.lines().find(|line| line.ends_with("  boot")).unwrap();
        assert_eq!(boot, "    20.0 ms   980.0 ms  ##############################  host    boot");
        let kernel = text.lines().find(|line| line.ends_with("kernel    kernel")).unwrap();
        assert!(kernel.contains("  900.0 ms   ######"), "{text}");
        assert!(!text.contains('\x1b') && !text.contains('\0') && !text.contains('\u{202e}'));
        assert!(text.lines().all(|line| line.chars().count() < 140), "{text}");
    }

    #[test]
    fn exits_are_counted_below_the_list() {
        let exits = vec![
            ExitCount { exit: "port", count: 17 },
            ExitCount { exit: "register", count: 1200 },
        ];
        let text = list(&Timed { exits, ..run() });
        assert!(text.ends_with("\n  1217 exits of the guest: port 17, register 1200\n"), "{text}");
    }

    #[test]
    fn bars_are_always_there_and_never_too_long() {
        for (from, ms) in [(0.0, 0.0), (1000.0, 0.0), (0.0, 1000.0), (999.9, 0.1), (500.0, 900.0)] {
            let bar = bar(&span(Track::Host, "x", from, ms, vec![]), 1000.0);
            assert_eq!(bar.len(), BAR, "{from} {ms}");
            assert!(bar.contains('#'), "{from} {ms}");
        }
        assert_eq!(bar(&span(Track::Host, "x", 0.0, 0.0, vec![]), 0.0).len(), BAR);
    }
}
