//! The page's structure. It is well-formed XML but for its style and script, so it is read as that.

use std::collections::BTreeSet;

use roxmltree::{Document, Node, ParsingOptions};
use vmlab::results::{AttemptResult, Outcome, Results, TargetResult, html};

use crate::samples::{self, HOSTILE, attempt, passed, suite, target};

/// The page without what is between the tags of its style and its script.
fn bare(page: &str) -> String {
    let mut page = page.to_owned();
    for name in ["style", "script"] {
        let (begin, end) =
            (page.find(&format!("<{name}>")).unwrap(), page.find(&format!("</{name}>")).unwrap());
        page.replace_range(begin + name.len() + 2..end, "");
    }
    page
}

fn parsed(results: &Results, look: impl FnOnce(&Document<'_>)) {
    let page = bare(&html(results));
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    look(&Document::parse_with_options(&page, options).unwrap());
}

fn with_class<'a>(node: Node<'a, 'a>, class: &'a str) -> Vec<Node<'a, 'a>> {
    let has = move |node: &Node<'_, '_>| {
        node.attribute("class").is_some_and(|classes| classes.split(' ').any(|c| c == class))
    };
    node.descendants().filter(has).collect()
}

fn named<'a>(node: Node<'a, 'a>, name: &'a str) -> Vec<Node<'a, 'a>> {
    node.descendants().filter(|node| node.has_tag_name(name)).collect()
}

fn text(node: Node<'_, '_>) -> String {
    node.descendants().filter(Node::is_text).filter_map(|node| node.text()).collect()
}

fn ids<'a>(document: &'a Document<'_>) -> Vec<&'a str> {
    document.descendants().filter_map(|node| node.attribute("id")).collect()
}

/// A percentage of a style, such as of `left:12.5%`.
fn percent(node: Node<'_, '_>, property: &str) -> f64 {
    let style = node.attribute("style").unwrap();
    let value = style.split(';').find_map(|part| part.strip_prefix(property)?.strip_prefix(':'));
    value.unwrap().trim_end_matches('%').parse().unwrap()
}

#[test]
fn each_target_has_a_row_that_leads_to_its_details() {
    let results = samples::all();
    parsed(&results, |document| {
        let ids = ids(document);
        let unique: BTreeSet<_> = ids.iter().collect();
        assert_eq!(unique.len(), ids.len(), "{ids:?}");
        let body = named(document.root(), "tbody")[0];
        let rows = named(body, "tr");
        assert_eq!(rows.len(), results.targets.len());
        for (row, target) in rows.iter().zip(&results.targets) {
            assert_eq!(row.attribute("data-outcome"), Some(target.outcome.name()));
            let link = named(*row, "a")[0].attribute("href").unwrap();
            assert!(ids.contains(&link.strip_prefix('#').unwrap()), "{link}");
        }
        assert_eq!(named(rows[0], "a")[0].attribute("href"), Some("#boot-debian-6.12"));
        assert_eq!(text(rows[0]), "boot-debian:6.12passed6.12.117+deb12-amd6411.5 s");
        let details = with_class(document.root(), "target");
        let open = |node: &Node<'_, '_>| node.attribute("open").is_some();
        let opened: Vec<_> = details.iter().map(open).collect();
        assert_eq!(
            opened,
            [false, false, true, true, true, true, true, true, false, false, true],
            "what failed is open"
        );
        let header = named(document.root(), "header")[0];
        let words: Vec<_> = with_class(header, "counts")
            .into_iter()
            .flat_map(|n| named(n, "li"))
            .map(text)
            .collect();
        assert_eq!(words, [" 1 passed", " 1 flaky", " 5 failed", " 2 errors", " 2 cancelled"]);
        assert!(text(header).contains("11 targets in 48.9 s"), "{}", text(header));
        let title = text(named(document.root(), "title")[0]);
        assert_eq!(title, "demo: 1 passed, 1 flaky, 5 failed, 2 errors, 2 cancelled");
    });
}

/// The grids of a page: what is in each row's cells, without times.
fn grids(results: &Results) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    parsed(results, |document| {
        let ids = ids(document);
        for grid in with_class(document.root(), "grid") {
            let above = grid.parent().unwrap().prev_sibling_element();
            let heading =
                above.filter(|node| node.has_tag_name("h3")).map(text).unwrap_or_default();
            let rows = named(grid, "tr").into_iter().map(|row| {
                let cells = row.children().filter(Node::is_element).map(|cell| {
                    let Some(link) = named(cell, "a").first().copied() else { return text(cell) };
                    let id = link.attribute("href").unwrap().trim_start_matches('#');
                    assert!(ids.contains(&id), "{id}");
                    let badge = with_class(cell, "badge")[0];
                    assert_eq!(cell.attribute("class"), Some(&*format!("cell {}", text(badge))));
                    format!("{} {id}", text(badge))
                });
                cells.collect::<Vec<_>>().join(" | ")
            });
            found.push((heading, rows.collect()));
        }
    });
    found
}

#[test]
fn a_matrix_is_a_grid_of_its_axes() {
    let of = |name: &str, axes: &[(&str, &str)]| TargetResult {
        axes: samples::axes(axes),
        ..passed(name)
    };
    let bad = |target: TargetResult| TargetResult { outcome: Outcome::Failed, ..target };
    let table = |heading: &str, rows: &[&str]| {
        (heading.to_owned(), rows.iter().map(|row| (*row).to_owned()).collect::<Vec<_>>())
    };
    // The longer axis is the rows, whichever the file has first; what has one value says nothing.
    let results = suite(vec![
        of("a", &[("cpus", "1"), ("memory", "1G"), ("kernel", "x")]),
        bad(of("b", &[("cpus", "1"), ("memory", "1G"), ("kernel", "y")])),
        of("c", &[("cpus", "2"), ("memory", "1G"), ("kernel", "z")]),
        of("d", &[("cpus", "2"), ("memory", "1G"), ("kernel", "x")]),
    ]);
    let rows = [
        "kernel \\ cpus | 1 | 2",
        "x | passed a | passed d",
        "y | failed b | –",
        "z | – | passed c",
    ];
    assert_eq!(grids(&results), [table("", &rows)]);

    // A third axis has a table for each value. Another matrix has its own, if only by its values.
    let mut targets = Vec::new();
    for (fs, row, column) in [("e", "1", "x"), ("e", "2", "y"), ("f", "1", "y"), ("f", "3", "x")] {
        targets
            .push(of(&[fs, row, column].concat(), &[("fs", fs), ("row", row), ("column", column)]));
    }
    targets.push(of("again", &[("fs", "e"), ("row", "1"), ("column", "x")]));
    targets.push(of("more", &[("fs", "e"), ("row", "2"), ("column", "x")]));
    targets.push(passed("none"));
    targets.push(of("alone", &[("kernel", "x")]));
    let expected = [
        table("column: x", &["row \\ fs | e | f", "1 | passed e1x | –", "3 | – | passed f3x"]),
        table("column: y", &["row \\ fs | e | f", "1 | – | passed f1y", "2 | passed e2y | –"]),
        table("", &["row | ", "1 | passed again", "2 | passed more"]),
    ];
    assert_eq!(grids(&suite(targets)), expected);

    // Nothing of the kind, where there is nothing to compare.
    assert!(grids(&suite(vec![passed("a"), samples::hostile()])).is_empty());
    assert!(!html(&suite(vec![passed("a")])).contains("ui-matrix"));
    // Nor does a page of many combinations become one of very many holes.
    let sparse = |n: usize| {
        let value = n.to_string();
        of(&value, &[("a", &value), ("b", &value), ("c", &value)])
    };
    let page = html(&suite((0..1000).map(sparse).collect()));
    assert!(page.len() < 4_000_000, "{}", page.len());
    let sparse = |n: usize| of("x", &[("a", &n.to_string()), ("b", &n.to_string())]);
    let page = html(&suite((0..1000).map(sparse).collect()));
    assert!(page.len() < 4_000_000 && page.contains("Too sparse"), "{}", page.len());
    // What is hostile as an axis is text.
    let mut other = samples::hostile();
    other.axes[1].1 = HOSTILE.to_owned();
    assert_eq!(grids(&suite(vec![samples::hostile(), other])).len(), 1);
}

#[test]
fn bars_are_where_their_times_are() {
    // The second begins 1.5 s later, and has two attempts.
    let results = suite(vec![passed("a"), samples::flaky(), passed("b")]);
    parsed(&results, |document| {
        let tracks = with_class(document.root(), "track");
        let bars = named(tracks[1], "span");
        let found: Vec<_> = bars
            .iter()
            .map(|bar| {
                (bar.attribute("class").unwrap(), percent(*bar, "left"), percent(*bar, "width"))
            })
            .collect();
        assert_eq!(found, [("failed", 25.0, 25.0), ("passed", 50.0, 25.0)]);
        let phases = with_class(document.root(), "phases");
        let parts = named(phases[0], "span");
        let width: f64 = parts.iter().map(|part| percent(*part, "width")).sum();
        assert!((width - 100.0).abs() < 0.01, "{width}");
        // 310 ms of 1500.
        assert!((percent(parts[2], "width") - 20.667).abs() < 0.001);
        assert_eq!(parts[2].attribute("class"), Some("restore"));
        assert_eq!(parts[2].attribute("title"), Some("restore: 310 ms"));
        let legend = text(with_class(document.root(), "legend")[0]);
        assert_eq!(
            legend,
            "kernel 2 msprepare 8 msrestore 310 mssetup 30 msrun 250 msother 900 ms"
        );
    });
    // No number of a file makes one that a browser cannot read.
    let mut odd = suite(vec![passed("a")]);
    odd.targets[0].attempts[0].took_ms = f64::INFINITY;
    odd.targets[0].attempts[0].phases =
        vec![("x".to_owned(), f64::NAN), ("y".to_owned(), f64::MAX), ("z".to_owned(), f64::MAX)];
    odd.took_ms = -1.0;
    for results in [odd, suite(vec![]), suite(vec![samples::hostile()])] {
        let page = bare(&html(&results));
        assert!(!page.contains("NaN") && !page.contains("inf%") && !page.contains(":-"), "{page}");
    }
}

#[test]
fn an_attempt_shows_its_events_and_what_was_written() {
    parsed(
        &suite(vec![samples::event(), samples::infrastructure(), samples::flaky()]),
        |document| {
            let targets = with_class(document.root(), "target");
            let events = with_class(targets[0], "event");
            assert_eq!(events.len(), 2);
            // The one that made it fail is open.
            assert_eq!(events[0].attribute("open"), None);
            assert_eq!(events[1].attribute("open"), Some(""));
            let title = text(named(events[1], "summary")[0]);
            assert_eq!(
                title,
                "kasan KASAN: slab-use-after-free in frob_release 3 times, first at 1.234567 s"
            );
            let report = text(named(events[1], "pre")[0]);
            assert!(
                report.starts_with("\nBUG: KASAN") && report.ends_with("\n </TASK>"),
                "{report}"
            );
            let logs = with_class(targets[0], "log");
            let pres: Vec<_> = logs.iter().map(|log| text(named(*log, "pre")[0])).collect();
            assert_eq!(pres[0], "\nopened\nreleased\n");
            assert!(pres[1].starts_with("\n[    0.000000] Linux version"), "{}", pres[1]);
            let why = text(with_class(targets[1], "why")[0]);
            assert_eq!(why.lines().count(), 3, "{why}");
            let attempts: Vec<_> = named(targets[2], "h3").into_iter().map(text).collect();
            assert_eq!(attempts, ["Attempt 1 of 2 failed", "Attempt 2 of 2 passed"]);
            // All that scrolls can be reached by keys.
            for pre in named(document.root(), "pre") {
                assert_eq!(pre.attribute("tabindex"), Some("0"));
            }
        },
    );
}

#[test]
fn hostile_text_is_text_and_nothing_is_loaded() {
    parsed(&suite(vec![samples::hostile(), passed("\u{1b}[0m")]), |document| {
        let known = [
            "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "h4",
            "p", "time", "div", "span", "ul", "li", "label", "input", "b", "main", "section",
            "button", "table", "thead", "tr", "th", "tbody", "td", "a", "details", "summary", "dl",
            "dt", "dd", "i", "pre", "output", "footer", "script",
        ];
        for node in document.descendants().filter(Node::is_element) {
            assert!(known.contains(&node.tag_name().name()), "{node:?}");
            for attribute in node.attributes() {
                assert!(
                    !attribute.name().starts_with("on") && attribute.name() != "src",
                    "{node:?}"
                );
                if attribute.name() == "href" {
                    assert!(attribute.value().starts_with('#'), "{node:?}");
                }
            }
        }
        assert_eq!(named(document.root(), "script").len(), 1);
        let pre = named(with_class(document.root(), "log")[0], "pre")[0];
        assert!(text(pre).starts_with("\n</pre></script><script>document.title="), "{}", text(pre));
        assert!(text(pre).ends_with("\n\ttab\nend\nof it"), "{}", text(pre));
        assert!(text(document.root()).contains("(no name)"));
    });
    let page = html(&suite(vec![samples::hostile()]));
    let steers = |c: char| c.is_control() && !matches!(c, '\n' | '\t') || c == '\u{202e}';
    assert!(!page.contains(steers) && HOSTILE.contains(steers));
    for loads in ["@import", "url(", "<link", "fetch(", "XMLHttpRequest", "import("] {
        assert!(!page.contains(loads), "{loads}");
    }
}

#[test]
fn no_two_targets_have_one_address() {
    let names = ["a b", "a-b", "a:b", "a-b-2", "ui-filter", "", "é", &"x".repeat(500)];
    parsed(&suite(names.iter().map(|name| passed(name)).collect()), |document| {
        let ids = ids(document);
        let of_targets: Vec<_> = with_class(document.root(), "inside")
            .iter()
            .map(|n| n.attribute("id").unwrap())
            .collect();
        let long = "x".repeat(100);
        assert_eq!(
            of_targets,
            ["a-b", "a-b-2", "a-b-3", "a-b-2-2", "target-ui-filter", "target-", "-", &long]
        );
        assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "{ids:?}");
    });
}

#[test]
fn a_page_grows_with_its_text_alone() {
    let console =
        "[   12.345678] a line of the console that is as long as lines are\n".repeat(50_000);
    let long = AttemptResult { console: console.clone(), ..attempt(None, "") };
    let results = suite(vec![target("a", Outcome::Passed, vec![long])]);
    let page = html(&results);
    let around = html(&suite(vec![target("a", Outcome::Passed, vec![attempt(None, "")])])).len();
    assert!(page.len() < around + console.len() + 1000, "{}", page.len());
    parsed(&results, |document| {
        let pre = named(document.root(), "pre")[0];
        assert_eq!(pre.descendants().count(), 2, "one text, and no element for each line");
    });
}
