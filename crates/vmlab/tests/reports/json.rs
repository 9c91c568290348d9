//! Results as JSON, and shards.

use std::error::Error;

use vmlab::events::EventKind;
use vmlab::results::{Counts, Failure, Outcome, Results, ResultsError};

use crate::samples::{self, BEGAN_MS, passed, suite, target};

#[test]
fn what_is_written_is_read_again_and_says_what_it_is() {
    let mut results = samples::all();
    // JSON has a place for all text.
    assert_eq!(Results::from_json(&results.to_json()).unwrap(), results);
    results = suite(vec![samples::failed()]);
    let json: serde_json::Value = serde_json::from_str(&results.to_json()).unwrap();
    assert_eq!(json["version"], 1);
    assert_eq!(json["targets"][0]["outcome"], "failed");
    assert_eq!(json["targets"][0]["attempts"][0]["failure"]["kind"], "command");
    assert_eq!(json["targets"][0]["attempts"][0]["failure"]["how"], "exit code 3");
}

#[test]
fn another_version_is_named_whatever_else_it_has() {
    for text in [r#"{"version": 2}"#, r#"{"version": 2, "suite": 5, "new": []}"#] {
        let error = Results::from_json(text).unwrap_err();
        assert!(matches!(error, ResultsError::Version { found: 2 }), "{error:?}");
        assert!(error.to_string().contains("version 2, and this vmlab knows version 1"), "{error}");
    }
    for text in ["", "{}", "[]", r#"{"version": "1"}"#, r#"{"version": 1}"#] {
        let error = Results::from_json(text).unwrap_err();
        assert!(matches!(error, ResultsError::Json(_)) && error.source().is_some(), "{error:?}");
    }
}

#[test]
fn what_another_build_of_the_same_version_has_more_or_less_is_no_error() {
    let results = suite(vec![passed("a")]);
    let mut json: serde_json::Value = serde_json::from_str(&results.to_json()).unwrap();
    json["new"] = 1.into();
    json["targets"][0]["new"] = 1.into();
    let target = json["targets"][0].as_object_mut().unwrap();
    assert!(target.remove("index").is_some());
    let attempt = json["targets"][0]["attempts"][0].as_object_mut().unwrap();
    attempt.insert("new".to_owned(), 1.into());
    assert!(attempt.remove("notes").is_some());
    assert_eq!(Results::from_json(&json.to_string()).unwrap(), results);
}

#[test]
fn failures_say_what_happened() {
    for (failure, kind, expected) in [
        (samples::exit_code(3), "command", "the command ended with exit code 3"),
        (
            Failure::UnexpectedSuccess,
            "unexpected-success",
            "the command succeeded, but it should have failed",
        ),
        (Failure::Event { title: "x".to_owned() }, "event", "the kernel said: x"),
        (
            Failure::MissingEvent { expected: EventKind::SoftLockup },
            "missing-event",
            "the kernel should have said something of itself: soft-lockup",
        ),
        (Failure::Timeout { what: "it was slow".to_owned() }, "timeout", "it was slow"),
        (
            Failure::GuestEnded { how: "it reset".to_owned() },
            "guest-ended",
            "the guest ended before the command had: it reset",
        ),
        (Failure::Setup { how: "x".to_owned() }, "setup", "setup failed: x"),
        (Failure::Infrastructure { message: "x\ny".to_owned() }, "infrastructure", "x\ny"),
        (Failure::Cancelled, "cancelled", "it was cancelled"),
    ] {
        assert_eq!(failure.to_string(), expected);
        // Reports call it what JSON does.
        assert_eq!(failure.kind(), kind);
        assert_eq!(serde_json::to_value(&failure).unwrap()["kind"], kind);
    }
    for outcome in
        [Outcome::Passed, Outcome::Flaky, Outcome::Failed, Outcome::Error, Outcome::Cancelled]
    {
        assert_eq!(serde_json::to_value(outcome).unwrap(), outcome.name());
    }
}

#[test]
fn a_lone_surrogate_is_refused() {
    let text = suite(vec![passed("NAME")]).to_json();
    assert!(Results::from_json(&text.replace("NAME", r"\ud83e\udd80")).is_ok());
    let error = Results::from_json(&text.replace("NAME", r"\ud83e")).unwrap_err();
    assert!(matches!(error, ResultsError::Json(_)), "{error:?}");
}

fn shard(names: &[(&str, usize)], began_ms: u64) -> Results {
    let mut part = suite(names.iter().map(|(name, _)| passed(name)).collect());
    for (target, (_, index)) in part.targets.iter_mut().zip(names) {
        target.index = *index;
    }
    Results { began_ms, ..part }
}

#[test]
fn shards_come_together_in_the_order_of_the_file() {
    let parts = [
        ("a.json".to_owned(), shard(&[("one", 0), ("four", 3)], BEGAN_MS + 10_000)),
        ("b.json".to_owned(), shard(&[("three", 2)], BEGAN_MS)),
        ("c.json".to_owned(), shard(&[("two", 1), ("five", 4)], BEGAN_MS + 400)),
    ];
    let merged = Results::merge(parts.to_vec()).unwrap();
    let names: Vec<_> = merged.targets.iter().map(|target| target.name.as_str()).collect();
    assert_eq!(names, ["one", "two", "three", "four", "five"]);
    assert_eq!(merged.began_ms, BEGAN_MS);
    // The first part began last and ended last.
    assert_eq!(merged.took_ms, 13_000.0);
    let starts: Vec<_> = merged.targets.iter().map(|target| target.attempts[0].start_ms).collect();
    assert_eq!(starts, [10_000.0, 400.0, 0.0, 11_500.0, 1900.0]);
    for order in [[2, 1, 0], [1, 2, 0], [0, 2, 1]] {
        let parts = order.map(|index| parts[index].clone()).to_vec();
        assert_eq!(Results::merge(parts).unwrap(), merged);
    }
    // One alone is itself.
    let alone = samples::all();
    assert_eq!(Results::merge(vec![("x".to_owned(), alone.clone())]).unwrap(), alone);
}

#[test]
fn shards_that_do_not_fit_are_named() {
    let part = |from: &str, name, index| (from.to_owned(), shard(&[(name, index)], BEGAN_MS));
    let same = vec![part("a.json", "x", 0), part("b.json", "y", 1), part("c.json", "x", 5)];
    assert_eq!(
        Results::merge(same).unwrap_err().to_string(),
        "target `x` is in a.json and in c.json; each target may be in one part only"
    );
    let mut other = part("b.json", "y", 1);
    other.1.suite = "else".to_owned();
    assert_eq!(
        Results::merge(vec![part("a.json", "x", 0), other]).unwrap_err().to_string(),
        "a.json has results of `demo`, but b.json has results of `else`"
    );
    assert!(matches!(Results::merge(vec![]).unwrap_err(), ResultsError::NothingToMerge));
    // A target that was there twice already is no better.
    let twice = ("a.json".to_owned(), shard(&[("x", 0), ("x", 1)], BEGAN_MS));
    assert!(matches!(Results::merge(vec![twice]).unwrap_err(), ResultsError::SameTarget { .. }));
}

#[test]
fn counts_are_of_targets() {
    let results = samples::all();
    let counts = results.counts();
    assert_eq!(
        counts,
        Counts { passed: 1, flaky: 1, failed: 5, errors: 2, cancelled: 2, skipped: 0 }
    );
    assert_eq!(
        results.counts_line(),
        "1 passed, 1 flaky, 5 failed, 2 errors, 2 cancelled in 48.9 s"
    );
    let error = target("x", Outcome::Error, vec![]);
    let mut few = suite(vec![passed("a"), error]);
    few.took_ms = 3449.0;
    assert_eq!(few.counts_line(), "1 passed, 1 error in 3.4 s");
    assert_eq!(suite(vec![]).counts_line(), "0 passed in 0 ms");
}
