//! What a person sees while they wait.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmlab::artifacts::Progress;

use crate::output;
use crate::request::Verbosity;
use crate::stdio::stderr_is_watched;

/// How often the live line is drawn anew.
const TICK: Duration = Duration::from_millis(100);

/// Phases that every run has and that are over soon.
const USUAL: &[&str] = &["boot", "snapshot", "restore", "setup"];

/// A live line on a terminal; plain lines elsewhere.
#[derive(Debug)]
pub(crate) struct Display {
    verbosity: Verbosity,
    bar: ProgressBar,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    phase: String,
    shown: bool,
    /// What is done is counted, and no phases are named.
    counting: bool,
}

impl Display {
    pub(crate) fn new(verbosity: Verbosity) -> Self {
        let live = stderr_is_watched() && verbosity == Verbosity::Normal;
        let target = match live {
            true => ProgressDrawTarget::stderr_with_hz(10),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(None, target);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        Self { verbosity, bar, state: Mutex::default() }
    }

    /// Whether a person watches.
    pub(crate) fn is_live(&self) -> bool {
        !self.bar.is_hidden()
    }

    /// From now on, shows this instead of phases, as there are several at a time.
    pub(crate) fn count(&self, text: String) {
        self.lock().counting = true;
        self.show(text);
    }

    /// Does something that writes to the terminal, without the live line in its way.
    pub(crate) fn aside<T>(&self, write: impl FnOnce() -> T) -> T {
        self.bar.suspend(write)
    }

    /// Takes the live line away, before anything else is written.
    pub(crate) fn clear(&self) {
        self.bar.disable_steady_tick();
        self.bar.finish_and_clear();
    }

    fn show(&self, text: String) {
        if self.bar.is_hidden() {
            return;
        }
        self.bar.set_message(text);
        if !std::mem::replace(&mut self.lock().shown, true) {
            self.bar.enable_steady_tick(TICK);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress for Display {
    fn phase(&self, name: &str) {
        let known = {
            let mut state = self.lock();
            if state.counting {
                return;
            }
            std::mem::replace(&mut state.phase, name.to_owned()) == name
        };
        // Where no line can live, what may take long is said once.
        let said = match self.verbosity {
            Verbosity::Quiet => false,
            Verbosity::Normal => !self.is_live() && !USUAL.contains(&name),
            Verbosity::Verbose => true,
        };
        if said && !known {
            output::note(name);
        }
        self.show(name.to_owned());
    }

    fn note(&self, text: &str) {
        if self.verbosity > Verbosity::Quiet {
            self.bar.suspend(|| output::note(text));
        }
    }

    fn download(&self, done: u64, total: Option<u64>) {
        let phase = self.lock().phase.clone();
        let of = total.map(|total| format!(" of {}", HumanBytes(total))).unwrap_or_default();
        self.show(format!("{phase}: {}{of}", HumanBytes(done)));
    }
}
