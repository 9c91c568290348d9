//! What it means how a test ended.

use std::any::Any;

use super::plan::Plan;
use super::{Test, guest};
use crate::events::{EventKinds, KernelEvent};
use crate::results::{Failure, Outcome};

/// How a body ended.
pub(super) enum Body {
    Passed,
    /// It returned a failure.
    Failed(String),
    /// It panicked in the guest.
    Panicked {
        message: Option<String>,
        place: Option<String>,
    },
    /// It panicked on the host.
    Unwound(Box<dyn Any + Send>),
    /// It cannot run here.
    Skipped(String),
    /// It did not come to its end.
    Lost(Failure),
}

/// What a test came to.
pub(super) enum Verdict {
    Passed,
    Skipped(String),
    /// As the body itself has it.
    Body,
    Failed(Failure),
}

/// Whether a test has passed, by how its body ended and what the kernel said of itself meanwhile.
pub(super) fn judge(test: &Test, plan: &Plan, body: &Body, events: &[KernelEvent]) -> Verdict {
    let wanted = plan.expect.and_then(|kind| events.iter().position(|event| event.kind == kind));
    if let Body::Skipped(reason) = body {
        return Verdict::Skipped(reason.clone());
    }
    if let Body::Lost(failure @ Failure::Infrastructure { .. }) = body {
        return Verdict::Failed(failure.clone());
    }
    // What follows from the expected event is expected as well.
    if let Some(event) = unexpected(&events[..wanted.unwrap_or(events.len())], &plan.fail_on) {
        return Verdict::Failed(Failure::Event { title: event.title.clone() });
    }
    match (body, plan.expect, test.settings.expect_err) {
        // The guest or the program may end by what is expected. An assertion that fails is still one.
        (Body::Lost(_), Some(_), _) if wanted.is_some() => Verdict::Passed,
        (Body::Lost(failure), _, _) => Verdict::Failed(failure.clone()),
        (Body::Passed, _, true) => Verdict::Failed(Failure::Test {
            how: "the test passed, and should have failed".to_owned(),
        }),
        (Body::Passed, Some(expected), false) if wanted.is_none() => {
            Verdict::Failed(Failure::MissingEvent { expected })
        }
        (Body::Passed, _, false) => Verdict::Passed,
        (_, Some(expected), true) if wanted.is_none() => {
            Verdict::Failed(Failure::MissingEvent { expected })
        }
        (_, _, true) => Verdict::Passed,
        (_, _, false) => Verdict::Body,
    }
}

fn unexpected<'a>(events: &'a [KernelEvent], fail_on: &EventKinds) -> Option<&'a KernelEvent> {
    events.iter().find(|event| fail_on.contains(&event.kind))
}

/// What goes into the results.
pub(super) fn outcome(test: &Test, body: &Body, verdict: &Verdict) -> (Outcome, Option<Failure>) {
    let failed = |failure: Failure| {
        let outcome = if failure.is_error() { Outcome::Error } else { Outcome::Failed };
        (outcome, Some(failure))
    };
    let passed = (Outcome::Passed, None);
    let expected = test.settings.should_panic;
    let message = match body {
        Body::Panicked { message, .. } => message.as_deref(),
        Body::Unwound(payload) => guest::message(&**payload),
        _ => None,
    };
    match (verdict, expected, body) {
        (Verdict::Skipped(_), _, _) => (Outcome::Skipped, None),
        (Verdict::Failed(failure), _, _) => failed(failure.clone()),
        (Verdict::Passed, Some(_), _) => {
            failed(Failure::Test { how: "the test should have panicked".to_owned() })
        }
        (Verdict::Passed, None, _) => passed,
        (Verdict::Body, Some(expected), Body::Panicked { .. } | Body::Unwound(_))
            if message.unwrap_or_default().contains(expected) =>
        {
            passed
        }
        (Verdict::Body, _, Body::Failed(failure)) => failed(Failure::Test { how: failure.clone() }),
        (Verdict::Body, _, body) => {
            let place = match body {
                Body::Panicked { place: Some(place), .. } => format!(" at {place}"),
                _ => String::new(),
            };
            let message = message.unwrap_or("something that is no text");
            failed(Failure::Test { how: format!("panicked{place}: {message}") })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Vm;
    use crate::events::{EventKind, EventReader};
    use crate::testing::Settings;

    fn test(expect_err: bool, should_panic: Option<&'static str>) -> Test {
        let settings = Settings {
            kernel: None,
            named_by_kernel: false,
            cpus: None,
            topology: None,
            memory: None,
            shares: &[],
            disks: &[],
            network: None,
            timeout: None,
            fail_on: None,
            expect_err,
            expect_event: None,
            should_panic,
            rootfs: None,
            image: None,
            user: None,
            append: &[],
        };
        Test { module: "m", name: "t", package: "p", manifest_dir: "/", settings }
    }

    fn panicked(message: &str) -> Body {
        Body::Panicked { message: Some(message.to_owned()), place: Some("a.rs:1:2".to_owned()) }
    }

    /// What a test comes to: as a word, and as its results have it.
    fn of(
        test: &Test,
        body: &Body,
        expect: Option<EventKind>,
        console: &str,
    ) -> (&'static str, String) {
        let mut reader = EventReader::all();
        reader.feed(console.as_bytes());
        let plan = Plan {
            vm: Vm::builder(),
            program: "/".into(),
            other_kernel: None,
            timeout: Duration::ZERO,
            fail_on: crate::events::default_kinds(),
            expect,
        };
        let verdict = judge(test, &plan, body, &reader.into_events());
        let word = match &verdict {
            Verdict::Passed => "passed",
            Verdict::Skipped(_) => "skipped",
            Verdict::Body => "body",
            Verdict::Failed(_) => "failed",
        };
        let (outcome, failure) = outcome(test, body, &verdict);
        let how = failure.map(|failure| format!(": {failure}")).unwrap_or_default();
        (word, format!("{}{how}", outcome.name()))
    }

    const PANIC: &str = "[    1.500000] Kernel panic - not syncing: no root\r\n";

    fn ended() -> Body {
        Body::Lost(Failure::GuestEnded { how: "panic".to_owned() })
    }

    #[test]
    fn a_body_is_what_counts_where_the_kernel_says_nothing() {
        let usual = test(false, None);
        let plain = |body| of(&usual, &body, None, "");
        assert_eq!(plain(Body::Passed), ("passed", "passed".to_owned()));
        assert_eq!(plain(Body::Failed("Error: x".into())), ("body", "failed: Error: x".to_owned()));
        let how = "failed: panicked at a.rs:1:2: x".to_owned();
        assert_eq!(plain(panicked("x")), ("body", how));
        assert_eq!(plain(Body::Skipped("x".into())), ("skipped", "skipped".to_owned()));
        assert_eq!(plain(ended()).0, "failed");
        let unwound = Body::Unwound(Box::new("x"));
        assert_eq!(plain(unwound), ("body", "failed: panicked: x".to_owned()));
        assert_eq!(of(&usual, &Body::Passed, None, PANIC).0, "failed");
    }

    #[test]
    fn an_expected_event_excuses_no_assertion() {
        let (usual, expect) = (test(false, None), Some(EventKind::Panic));
        for (body, console, word) in [
            (Body::Passed, PANIC, "passed"),
            (ended(), PANIC, "passed"),
            (panicked("x"), PANIC, "body"),
            (Body::Passed, "", "failed"),
            (ended(), "", "failed"),
            (panicked("x"), "", "body"),
        ] {
            assert_eq!(of(&usual, &body, expect, console).0, word);
        }
        let broken = Body::Lost(Failure::Infrastructure { message: "QEMU".to_owned() });
        assert_eq!(of(&usual, &broken, expect, PANIC).0, "failed");
    }

    #[test]
    fn failures_that_should_be_are_the_bodys_own() {
        let should_fail = test(true, None);
        assert_eq!(of(&should_fail, &Body::Passed, None, "").0, "failed");
        assert_eq!(of(&should_fail, &panicked("x"), None, "").0, "passed");
        assert_eq!(of(&should_fail, &panicked("x"), None, PANIC).0, "failed");
        assert_eq!(of(&should_fail, &ended(), None, "").0, "failed");
        let should_panic = test(false, Some("ab"));
        assert_eq!(of(&should_panic, &panicked("xaby"), None, "").1, "passed");
        assert!(of(&should_panic, &panicked("a"), None, "").1.starts_with("failed: panicked"));
        assert!(
            of(&should_panic, &Body::Passed, None, "").1.starts_with("failed: the test should")
        );
        assert_eq!(of(&should_panic, &ended(), None, "").0, "failed");
    }
}
