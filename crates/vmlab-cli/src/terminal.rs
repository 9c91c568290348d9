//! The user's terminal while a guest's terminal is shown in it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// How the terminal was before.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// The byte that Ctrl-] sends.
const ESCAPE: u8 = 0x1d;

/// How often the escape byte ends the VM, and within which time.
const ESCAPE_COUNT: u32 = 3;
const ESCAPE_TIME: Duration = Duration::from_secs(1);

/// Raw mode of the terminal on stdin, until it is dropped.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    pub(crate) fn enter() -> Result<Self> {
        let context = "the terminal's mode cannot be changed";
        let stdin = std::io::stdin();
        let old = tcgetattr(&stdin).context(context)?;
        let mut raw = old.clone();
        raw.make_raw();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(old);
        tcsetattr(&stdin, OptionalActions::Drain, &raw).context(context)?;
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal its old mode back, if it was changed.
pub(crate) fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(saved) = saved {
        // A terminal that is gone needs no mode.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &saved);
    }
}

/// Recognises the keys that end the VM.
#[derive(Debug, Default)]
pub(crate) struct EscapeKeys {
    count: u32,
    first: Option<Instant>,
}

impl EscapeKeys {
    /// Whether the VM is to be ended after these bytes.
    pub(crate) fn pressed(&mut self, bytes: &[u8], now: Instant) -> bool {
        for &byte in bytes {
            if byte != ESCAPE {
                self.count = 0;
                continue;
            }
            let late = self.first.is_none_or(|first| now - first > ESCAPE_TIME);
            if self.count == 0 || late {
                (self.count, self.first) = (0, Some(now));
            }
            self.count += 1;
            if self.count == ESCAPE_COUNT {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_escapes_in_a_second_end_it() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut keys = EscapeKeys::default();
        assert!(!keys.pressed(b"\x1d", at(0)));
        assert!(!keys.pressed(b"\x1d", at(100)));
        assert!(keys.pressed(b"\x1d", at(200)));

        let mut keys = EscapeKeys::default();
        assert!(keys.pressed(b"ab\x1d\x1d\x1d", at(0)));

        let mut keys = EscapeKeys::default();
        assert!(!keys.pressed(b"\x1d\x1dx\x1d\x1d", at(0)));

        let mut keys = EscapeKeys::default();
        assert!(!keys.pressed(b"\x1d\x1d", at(0)));
        assert!(!keys.pressed(b"\x1d", at(1500)));
    }
}
