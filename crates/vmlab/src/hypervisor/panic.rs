//! How long a guest whose kernel has panicked is waited for.

use std::time::Duration;

/// How long a guest that panicked may say nothing before it is taken to be stuck: it should have reset
/// the machine.
const PANIC_SILENCE: Duration = Duration::from_secs(10);

/// How long a guest with this command line may stay silent after a panic. `panic=N` lets it reset the
/// machine after N seconds, at once if negative; with 0 it stays as it is, for a debugger.
pub(super) fn panic_patience(command_line: &str) -> Option<Duration> {
    let mut values = command_line.split_whitespace().filter_map(|word| word.strip_prefix("panic="));
    match values.next_back().and_then(|value| value.parse::<i64>().ok()) {
        Some(0) => None,
        Some(seconds @ 1..) => Some(PANIC_SILENCE + Duration::from_secs(seconds.unsigned_abs())),
        _ => Some(PANIC_SILENCE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_on_panics_counts() {
        let patience = |line| panic_patience(line).map(|time| time.as_secs());
        assert_eq!(patience("console=ttyS0 panic=-1 quiet"), Some(10));
        assert_eq!(patience("panic=-1 quiet panic=5"), Some(15));
        assert_eq!(patience("panic=-1 panic=0"), None);
        assert_eq!(patience("oops=panic"), Some(10));
    }
}
