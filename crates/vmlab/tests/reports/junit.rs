//! JUnit XML against a schema (by xmllint), and element by element.

use std::path::Path;
use std::process::Command;

use roxmltree::{Document, Node};
use vmlab::results::{AttemptResult, Failure, Outcome, junit};

use crate::samples::{self, attempt, exit_code, passed, suite, target};

/// What xmllint finds in a text by `junit.xsd`, which is the order of elements that Surefire's schema has.
fn check(text: &str) -> Result<(), String> {
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reports/junit.xsd");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("junit.xml");
    std::fs::write(&file, text).unwrap();
    let output = Command::new("xmllint")
        .args(["--noout", "--nonet", "--schema"])
        .args([&schema, &file])
        .output()
        .expect("xmllint, of Debian's libxml2-utils, runs");
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn case<'a>(document: &'a Document<'_>, name: &str) -> Node<'a, 'a> {
    document
        .descendants()
        .find(|node| node.has_tag_name("testcase") && node.attribute("name") == Some(name))
        .unwrap_or_else(|| panic!("no case {name}"))
}

/// A node's children, as names.
fn children<'a>(node: Node<'a, 'a>) -> Vec<&'a str> {
    node.children().filter(Node::is_element).map(|child| child.tag_name().name()).collect()
}

fn child<'a>(node: Node<'a, 'a>, name: &str) -> Node<'a, 'a> {
    node.children().find(|child| child.has_tag_name(name)).unwrap()
}

#[test]
fn a_small_report_is_exactly_this() {
    let text = junit(&suite(vec![passed("a"), samples::failed()]));
    let expected = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="demo" tests="2" failures="1" errors="0" time="3.000">
  <testsuite name="demo" tests="2" failures="1" errors="0" skipped="0" time="3.000" timestamp="2026-11-21T20:00:00Z">
    <properties>
      <property name="vmlab.version" value="VERSION"/>
      <property name="a.kernel" value="6.12.117+deb12-amd64"/>
      <property name="a.accel" value="tcg"/>
      <property name="exit.kernel" value="6.12.117+deb12-amd64"/>
      <property name="exit.accel" value="tcg"/>
    </properties>
    <testcase name="a" classname="demo" time="1.500">
      <system-out>all 12 tests passed
</system-out>
    </testcase>
    <testcase name="exit" classname="demo" time="1.500">
      <failure type="command" message="the command ended with exit code 3">the command ended with exit code 3
output: /logs/exit/output.log
kept: /logs/exit/core.gz</failure>
      <system-out>checking a
checking b
b: expected 1, found 2
</system-out>
    </testcase>
  </testsuite>
</testsuites>
"#;
    assert_eq!(text, expected.replace("VERSION", env!("CARGO_PKG_VERSION")));
}

#[test]
fn reports_hold_to_the_schema() {
    check(&junit(&samples::all())).unwrap();
    check(&junit(&suite(vec![]))).unwrap();
    let mut nameless = suite(vec![passed("a")]);
    nameless.suite = "\u{1b}[0m".to_owned();
    check(&junit(&nameless)).unwrap();
    // The schema refuses what is no such report.
    let good = junit(&suite(vec![samples::flaky()]));
    for (from, to) in [
        (" timestamp=\"", " timestamp=\"x"),
        (" time=\"", " time=\"1,"),
        (" name=\"network\"", ""),
        ("flakyFailure", "flakeyFailure"),
        ("<stackTrace>", "<stackTrace>\u{1}"),
        ("<system-out>", "<unknown/><system-out>"),
    ] {
        assert!(good.contains(from), "{from}");
        check(&good.replace(from, to)).expect_err(from);
    }
}

#[test]
fn outcomes_are_what_ci_systems_tell_apart() {
    let text = junit(&samples::all());
    let document = Document::parse(&text).unwrap();
    let root = document.root_element();
    let suite = child(root, "testsuite");
    for (name, value) in [("tests", "11"), ("failures", "5"), ("errors", "2"), ("skipped", "2")] {
        assert_eq!(suite.attribute(name), Some(value), "{name}");
    }
    for (name, expected) in [
        ("boot-debian:6.12", ["system-out"].as_slice()),
        ("network", &["flakyFailure", "system-out"]),
        ("exit", &["failure", "system-out"]),
        ("signal", &["failure", "rerunFailure"]),
        ("module", &["failure", "system-out", "system-err"]),
        ("hang", &["failure", "system-out"]),
        ("xfs", &["error", "system-out"]),
        ("image", &["error"]),
        ("started", &["skipped", "system-out"]),
        ("waiting", &["skipped"]),
    ] {
        assert_eq!(children(case(&document, name)), expected, "{name}");
    }
    let failure = child(case(&document, "module"), "failure");
    assert_eq!(failure.attribute("type"), Some("event"));
    let title = "KASAN: slab-use-after-free in frob_release";
    assert_eq!(failure.attribute("message"), Some(format!("the kernel said: {title}").as_str()));
    let text = failure.text().unwrap();
    assert!(text.contains(&format!("kasan: {title} (3 times)\n    BUG: KASAN")), "{text}");
    assert!(text.contains("\n     </TASK>"), "{text}");
    let error = child(case(&document, "image"), "error");
    assert!(error.text().unwrap().contains("\nexit code 1\n"), "{error:?}");
    let skipped = |name| child(case(&document, name), "skipped").attribute("message");
    assert_eq!(skipped("started"), Some("it was cancelled"));
    assert_eq!(skipped("waiting"), Some("it was not run"));
    let tags = suite.descendants().find(|node| node.attribute("name") == Some("module.tags"));
    assert_eq!(tags.unwrap().attribute("value"), Some("kasan,slow"));
}

#[test]
fn what_tests_measure_is_among_the_properties_with_their_phases() {
    let mut target = passed("a");
    let attempt = &mut target.attempts[0];
    attempt.measurements =
        vec![samples::measurement("depth", 2.5, "m"), samples::measurement("n", 3.0, "")];
    attempt.details = [
        ("list".to_owned(), serde_json::json!(["a", "b"])),
        ("long".to_owned(), "ä".repeat(5000).into()),
    ]
    .into();
    let text = junit(&suite(vec![target, passed("b")]));
    check(&text).unwrap();
    let document = Document::parse(&text).unwrap();
    let property = |name: &str| {
        let found = document.descendants().find(|node| node.attribute("name") == Some(name));
        found.map(|node| node.attribute("value").unwrap().to_owned())
    };
    assert_eq!(property("a.measurement.depth").as_deref(), Some("2.5 m"));
    assert_eq!(property("a.measurement.n").as_deref(), Some("3"));
    assert_eq!(property("a.detail.list").as_deref(), Some("[\"a\",\"b\"]"));
    assert_eq!(property("a.phase.restore").as_deref(), Some("310 ms"));
    assert!(property("a.detail.long").unwrap().len() < 4200);
    // Of those that measure nothing, a report for every run of a CI has no need.
    assert_eq!(property("b.phase.restore"), None);
}

#[test]
fn each_attempt_before_the_last_is_a_retry_with_its_own_streams() {
    let error = Failure::Infrastructure { message: "no memory".to_owned() };
    let attempts = vec![
        AttemptResult { console: "panic".to_owned(), ..attempt(Some(exit_code(1)), "first") },
        attempt(Some(error), "second"),
        attempt(Some(exit_code(2)), "third"),
    ];
    let mut flaky = attempts.clone();
    flaky.push(attempt(None, "fourth"));
    let results = suite(vec![
        target("failed", Outcome::Failed, attempts),
        target("flaky", Outcome::Flaky, flaky),
    ]);
    let text = junit(&results);
    check(&text).unwrap();
    let document = Document::parse(&text).unwrap();
    let failed = case(&document, "failed");
    assert_eq!(children(failed), ["failure", "rerunFailure", "rerunError", "system-out"]);
    assert_eq!(
        child(failed, "failure").attribute("message"),
        Some("the command ended with exit code 2")
    );
    assert_eq!(child(failed, "system-out").text(), Some("third"));
    let rerun = child(failed, "rerunFailure");
    assert_eq!(children(rerun), ["stackTrace", "system-out", "system-err"]);
    assert_eq!(child(rerun, "system-out").text(), Some("first"));
    assert_eq!(child(rerun, "system-err").text(), Some("panic"));
    let flaky = case(&document, "flaky");
    assert_eq!(children(flaky), ["flakyFailure", "flakyFailure", "flakyError", "system-out"]);
    assert_eq!(child(flaky, "system-out").text(), Some("fourth"));
    assert_eq!(flaky.attribute("time"), Some("6.000"));
}

#[test]
fn whatever_a_guest_writes_the_report_is_xml_and_holds_it() {
    // Bytes that are no UTF-8 have become U+FFFD when results hold them.
    let bytes = String::from_utf8_lossy(b"\xff\xed\xa0\x80\xf8ok");
    let mut results = suite(vec![
        samples::hostile(),
        target("bytes", Outcome::Passed, vec![attempt(None, &bytes)]),
    ]);
    let every: String = (0..=0x10ffff).filter_map(char::from_u32).collect();
    results.targets.push(target("every", Outcome::Passed, vec![attempt(None, &every)]));
    let text = junit(&results);
    check(&text).unwrap();
    let document = Document::parse(&text).unwrap();
    let out = |name| child(case(&document, name), "system-out").text().unwrap();
    assert!(out("bytes").ends_with("\u{fffd}ok"), "{}", out("bytes"));
    // 32 lines' ends and tabs, and the others, a few of which stand for several.
    assert!(out("every").chars().count() > 1_100_000);
    let name = document.descendants().filter_map(|node| node.attribute("name"));
    let name = name.filter(|name| name.contains("owned")).collect::<Vec<_>>();
    assert!(
        name.iter().any(|name| name.starts_with("</pre></script><script>document")),
        "{name:?}"
    );
    let hostile = document.descendants().find(|node| node.has_tag_name("system-out")).unwrap();
    let expected = "]]>&amp;\"'\nred ␀␈␡\u{fffd}\u{fffd}\u{fffd}dlo\n::error title=owned::owned\n";
    assert!(hostile.text().unwrap().contains(expected), "{:?}", hostile.text());
    assert!(hostile.text().unwrap().ends_with("\n\ttab\nend\nof it"), "{:?}", hostile.text());
}
