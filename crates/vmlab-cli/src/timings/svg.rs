//! The drawing: a row a span, one below the other, on an axis of time.

use std::fmt::Write;

use vmlab::timings::{Span, Track};

use super::{Timed, shown, time};

/// Measures in pixels: of a row, of the column of names, of the axis, of the room for a bar's time.
const ROW: f64 = 20.0;
const NAMES: f64 = 330.0;
const AXIS: f64 = 720.0;
const TIMES: f64 = 90.0;

/// Room for a run's title, and for the numbers of the axis.
const TITLE: f64 = 34.0;
const TICKS: f64 = 22.0;

/// Room around everything.
const MARGIN: f64 = 14.0;

/// The narrowest bar that can still be seen.
const THIN: f64 = 1.5;

/// About as many ticks as the axis has.
const TICK_COUNT: f64 = 10.0;

/// Colours for light and dark; each pair of bar and ground can be told apart.
const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#1f2328}\
.title{font-weight:600;font-size:14px}\
.dim{fill:#59636e}\
.ground{fill:#ffffff}\
.line{stroke:#d1d9e0;stroke-width:1}\
.band{fill:#f6f8fa}\
.host{fill:#0969da}.kernel{fill:#bc4c00}.agent{fill:#1a7f37}\
@media(prefers-color-scheme:dark){\
text{fill:#f0f6fc}\
.dim{fill:#9198a1}\
.ground{fill:#0d1117}\
.line{stroke:#3d444d}\
.band{fill:#151b23}\
.host{fill:#4493f8}.kernel{fill:#f0883e}.agent{fill:#3fb950}}";

/// Draws runs, one below the other, as an SVG document.
pub(crate) fn draw(runs: &[Timed]) -> String {
    let width = MARGIN + NAMES + AXIS + TIMES + MARGIN;
    let height: f64 = runs.iter().map(height).sum::<f64>() + MARGIN * 2.0;
    let mut svg = Drawing::default();
    svg.add(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" role=\"img\" aria-label=\"Timeline of a run of vmlab\">\n<style>{STYLE}</style>\n\
         <rect class=\"ground\" width=\"{width}\" height=\"{height}\"/>\n"
    ));
    let mut top = MARGIN;
    for run in runs {
        svg.run(run, top);
        top += height_of_rows(run) + TITLE + TICKS + MARGIN;
    }
    svg.add(format_args!("</svg>\n"));
    svg.text
}

fn height_of_rows(run: &Timed) -> f64 {
    run.rows().count() as f64 * ROW
}

fn height(run: &Timed) -> f64 {
    height_of_rows(run) + TITLE + TICKS + MARGIN
}

#[derive(Default)]
struct Drawing {
    text: String,
}

impl Drawing {
    fn add(&mut self, what: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = self.text.write_fmt(what);
    }

    fn run(&mut self, run: &Timed, top: f64) {
        let total = run.total_ms().max(f64::MIN_POSITIVE);
        let title = escaped(&format!("{}: {}", shown(&run.title), time(run.total_ms())));
        self.label("title", "start", MARGIN, top + 16.0, &title);
        self.legend(top);
        let (rows_top, axis) = (top + TITLE + TICKS, MARGIN + NAMES);
        let bottom = rows_top + height_of_rows(run);
        for (index, (_, _)) in run.rows().enumerate().filter(|(index, _)| index % 2 == 0) {
            let (y, width) = (rows_top + index as f64 * ROW, NAMES + AXIS + TIMES);
            self.add(format_args!(
                "<rect class=\"band\" x=\"{MARGIN}\" y=\"{y}\" width=\"{width}\" height=\"{ROW}\"/>\n"
            ));
        }
        let step = tick(total / TICK_COUNT);
        for index in 0..=(total / step) as usize {
            let ms = index as f64 * step;
            let x = axis + ms / total * AXIS;
            let y = rows_top - 6.0;
            self.add(format_args!(
                "<line class=\"line\" x1=\"{x:.1}\" y1=\"{rows_top}\" x2=\"{x:.1}\" y2=\"{bottom}\"/>\n"
            ));
            self.label("dim", "middle", x, y, &axis_number(ms, step));
        }
        for (index, (depth, span)) in run.rows().enumerate() {
            self.row(depth, span, total, rows_top + index as f64 * ROW);
        }
    }

    fn legend(&mut self, top: f64) {
        let mut x = MARGIN + NAMES + AXIS + TIMES - 70.0 * Track::ALL.len() as f64;
        for track in Track::ALL {
            let (name, y) = (track.name(), top + 6.0);
            self.add(format_args!(
                "<rect class=\"{name}\" x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" rx=\"2\"/>\n"
            ));
            self.label("dim", "start", x + 17.0, y + 10.0, name);
            x += 70.0;
        }
    }

    fn row(&mut self, depth: usize, span: &Span, total: f64, top: f64) {
        let name = escaped(&shown(&span.name));
        let indent = MARGIN + 4.0 + depth as f64 * 14.0;
        let baseline = top + ROW * 0.7;
        let x = MARGIN + NAMES + span.start_ms / total * AXIS;
        let width = (span.ms / total * AXIS).max(THIN);
        let (track, y, height) = (span.track.name(), top + 4.0, ROW - 8.0);
        let (start, took) = (time(span.start_ms), time(span.ms));
        self.add(format_args!("<g><title>{name} ({track}): {took}, from {start} on</title>\n"));
        self.label("", "start", indent, baseline, &cut(&shown(&span.name), depth));
        self.add(format_args!(
            "<rect class=\"{track}\" x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{height}\" rx=\"2\"/>\n"
        ));
        self.label("dim", "start", x + width + 5.0, baseline, &took);
        self.add(format_args!("</g>\n"));
    }

    /// A text that is escaped already.
    fn label(&mut self, class: &str, anchor: &str, x: f64, y: f64, text: &str) {
        self.add(format_args!(
            "<text class=\"{class}\" text-anchor=\"{anchor}\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>\n"
        ));
    }
}

/// A name, escaped, as far as there is room for it in its column, at about seven pixels a character.
fn cut(name: &str, depth: usize) -> String {
    let room = ((NAMES - 4.0 - depth as f64 * 14.0) / 7.0).max(3.0) as usize;
    match name.chars().count() > room {
        true => escaped(&name.chars().take(room - 1).chain(['…']).collect::<String>()),
        false => escaped(name),
    }
}

/// The distance of ticks next to `wanted` that people count in: 1, 2 or 5, and powers of ten.
fn tick(wanted: f64) -> f64 {
    let power = 10f64.powf(wanted.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    steps.into_iter().find(|step| *step >= wanted * 0.999).unwrap_or(10.0 * power)
}

fn axis_number(ms: f64, step: f64) -> String {
    match step {
        1000.0.. => format!("{:.0} s", ms / 1000.0),
        1.0.. => format!("{ms:.0} ms"),
        _ => format!("{ms:.3} ms"),
    }
}

/// Text for XML 1.0, which has no place for most control characters even when they are escaped.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\u{fffe}' | '\u{ffff}' => out.push('?'),
            c if c.is_control() => out.push('?'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::{run, span};
    use super::*;

    fn parsed(text: &str, look: impl FnOnce(&roxmltree::Document<'_>)) {
        look(&roxmltree::Document::parse(text).unwrap_or_else(|e| panic!("{e}: {text}")));
    }

    fn number(node: roxmltree::Node<'_, '_>, name: &str) -> f64 {
        node.attribute(name).unwrap().parse().unwrap()
    }

    #[test]
    fn a_drawing_is_xml_with_a_bar_a_span_in_its_place() {
        let timed = run();
        let total = timed.total_ms();
        parsed(&draw(&[timed]), |document| {
            let groups: Vec<_> = document
                .descendants()
                .filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "g")))
                .collect();
            let timed = run();
            let rows: Vec<_> = timed.rows().collect();
            assert_eq!(groups.len(), rows.len());
            let mut last = 0.0;
            for (group, (_, span)) in groups.iter().zip(rows) {
                let bar = group.children().find(|node| node.tag_name().name() == "rect").unwrap();
                assert_eq!(bar.attribute("class"), Some(span.track.name()));
                let from = (number(bar, "x") - MARGIN - NAMES) / AXIS * total;
                assert!((from - span.start_ms).abs() < 1.0, "{} is at {from}", span.name);
                let ms = number(bar, "width") / AXIS * total;
                assert!((ms - span.ms).abs() < 3.0, "{} took {ms}", span.name);
                // No row covers another one.
                let y = number(bar, "y");
                assert!(y >= last, "{}", span.name);
                last = y + number(bar, "height");
                let title = group.children().find(|node| node.tag_name().name() == "title");
                assert!(title.unwrap().text().unwrap().contains(&time(span.ms)));
            }
            let root = document.root_element();
            assert!(last < number(root, "height"), "{last}");
            let labels: Vec<_> = document.descendants().filter_map(|node| node.text()).collect();
            assert!(labels.contains(&"hypervisor's start"), "{labels:?}");
            assert!(labels.contains(&"500 ms"), "the axis has numbers: {labels:?}");
            assert!(labels.iter().any(|label| label.starts_with("<script>&\"'?")), "{labels:?}");
        });
    }

    #[test]
    fn whatever_a_name_holds_the_drawing_is_xml() {
        let names: Vec<String> = (0..=0xffffu32)
            .filter_map(char::from_u32)
            .collect::<Vec<_>>()
            .chunks(50)
            .map(|chars| chars.iter().collect())
            .collect();
        let spans = names.iter().map(|name| span(Track::Agent, name, 0.0, 1.0, vec![])).collect();
        let title = "]]>\u{1}<!--".to_owned();
        parsed(&draw(&[Timed { title, spans, exits: Vec::new() }]), |_| {});
    }

    #[test]
    fn several_runs_are_below_each_other_and_nothing_is_fine_too() {
        let empty = || Timed { title: String::new(), spans: Vec::new(), exits: Vec::new() };
        let zero = Timed { spans: vec![span(Track::Host, "x", 0.0, 0.0, vec![])], ..empty() };
        let text = draw(&[run(), empty(), zero, run()]);
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        parsed(&text, |document| {
            let titles =
                document.descendants().filter(|node| node.attribute("class") == Some("title"));
            let tops: Vec<f64> = titles.map(|node| number(node, "y")).collect();
            assert!(tops.len() == 4 && tops.is_sorted(), "{tops:?}");
        });
        parsed(&draw(&[]), |_| {});
    }

    #[test]
    fn ticks_are_round() {
        for (wanted, found) in
            [(0.7, 1.0), (1.3, 2.0), (34.0, 50.0), (100.0, 100.0), (101.0, 200.0)]
        {
            assert!((tick(wanted) - found).abs() < 1e-9, "{wanted}: {}", tick(wanted));
        }
    }
}
