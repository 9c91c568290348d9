//! How often guests are left, and why.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a guest is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exit {
    /// It reads or writes a port.
    Port,
    /// It reads or writes a device's registers.
    Register,
    /// Another thread interrupts it.
    Kick,
    /// It ends, or is about to.
    End,
    /// Anything else.
    Other,
}

impl Exit {
    const ALL: [(Exit, &'static str); 5] = [
        (Exit::Port, "port"),
        (Exit::Register, "register"),
        (Exit::Kick, "kick"),
        (Exit::End, "end"),
        (Exit::Other, "other"),
    ];
}

/// The counts of one VM.
#[derive(Debug, Default)]
pub(super) struct Exits([AtomicU64; Exit::ALL.len()]);

impl Exits {
    pub(super) fn count(&self, exit: Exit) {
        self.0[exit as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// By name, those that there were.
    pub(super) fn counts(&self) -> Vec<(&'static str, u64)> {
        let count = |(exit, name): (Exit, _)| (name, self.0[exit as usize].load(Ordering::Relaxed));
        Exit::ALL.into_iter().map(count).filter(|(_, count)| *count > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_counted_by_their_names() {
        let exits = Exits::default();
        exits.count(Exit::Port);
        exits.count(Exit::Other);
        exits.count(Exit::Port);
        assert_eq!(exits.counts(), [("port", 2), ("other", 1)]);
    }
}
