//! What becomes of a VM: whoever ends it says why, and all who wait for its end are told.

use std::sync::{Condvar, Mutex};
use std::time::Instant;

use super::ExitReason;
use crate::sync::{lock, wait_until};

/// The end of a VM.
#[derive(Debug, Default)]
pub(super) struct Fate {
    state: Mutex<State>,
    decided: Condvar,
}

#[derive(Debug, Default)]
struct State {
    asked: Option<ExitReason>,
    reason: Option<ExitReason>,
}

impl Fate {
    /// Takes note of why it is to end. The first reason counts.
    pub(super) fn ask(&self, reason: ExitReason) {
        lock(&self.state).asked.get_or_insert(reason);
    }

    /// Whether somebody has asked for its end.
    pub(super) fn is_asked(&self) -> bool {
        lock(&self.state).asked.is_some()
    }

    /// Whether it has ended.
    pub(super) fn is_decided(&self) -> bool {
        lock(&self.state).reason.is_some()
    }

    /// It has ended, for the reason that follows from what was asked for.
    pub(super) fn decide(&self, reason: impl FnOnce(Option<&ExitReason>) -> ExitReason) {
        let mut state = lock(&self.state);
        state.reason = Some(reason(state.asked.as_ref()));
        drop(state);
        self.decided.notify_all();
    }

    /// Waits until it has ended, or until the deadline.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> Option<ExitReason> {
        let mut state = lock(&self.state);
        loop {
            if let Some(reason) = &state.reason {
                return Some(reason.clone());
            }
            state = wait_until(&self.decided, state, deadline)?;
        }
    }
}
