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
        (_, Some(_), _) if wanted.is_some() => Verdict::Passed,
        (Body::Lost(failure), _, _) => Verdict::Failed(failure.clone()),
        (Body::Passed, Some(expected), _) => Verdict::Failed(Failure::MissingEvent { expected }),
        (Body::Passed, None, true) => Verdict::Failed(Failure::Test {
            how: "the test passed, and should have failed".to_owned(),
        }),
        (Body::Passed, None, false) | (_, None, true) => Verdict::Passed,
        _ => Verdict::Body,
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
