//! Results of tests in lines: TAP, as kselftest's programs write it, and KTAP, as KUnit has it in the kernel's log
//! (`Documentation/dev-tools/ktap.rst`).

/// What tests in a text came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tap {
    /// How many of the innermost passed.
    pub(super) passed: usize,
    /// How many of them said that they cannot run here.
    pub(super) skipped: usize,
    /// Those that failed, with the names of what they are in: `suite: test`.
    pub(super) failed: Vec<String>,
}

/// A result, and those within it.
#[derive(Debug)]
struct Result {
    depth: usize,
    tap: Tap,
}

impl Tap {
    /// Reads lines; all that is no result is passed over. Results without an end, of tests that broke off, count by
    /// themselves.
    pub(super) fn read<'a>(lines: impl IntoIterator<Item = &'a str>) -> Self {
        let mut open: Vec<Result> = Vec::new();
        let mut planned = None;
        let mut at_top = 0;
        for line in lines {
            let text = line.trim_start();
            let depth = line.len() - text.len();
            if let Some(count) = plan(text).filter(|_| depth == 0) {
                planned = Some(count);
            }
            let Some((ok, name, skipped)) = result(text) else { continue };
            at_top += usize::from(depth == 0);
            let within =
                open.iter().position(|earlier| earlier.depth > depth).unwrap_or(open.len());
            let mut tap = Self::sum(open.drain(within..).map(|result| result.tap));
            tap.failed.iter_mut().for_each(|failed| *failed = format!("{name}: {failed}"));
            let leaf = tap == Self::default();
            match (ok, skipped) {
                // A suite that says it passed has no failures, and one of skipped tests may say that it was skipped.
                (_, true) if leaf => tap.skipped = 1,
                (true, _) if leaf => tap.passed = 1,
                (false, _) if tap.failed.is_empty() => tap.failed.push(name.to_owned()),
                _ => {}
            }
            open.push(Result { depth, tap });
        }
        let mut all = Self::sum(open.into_iter().map(|result| result.tap));
        if let Some(missing) = planned.and_then(|planned| usize::checked_sub(planned, at_top))
            && missing > 0
        {
            all.failed.push(format!("{missing} of the planned tests did not run"));
        }
        all
    }

    fn sum(parts: impl Iterator<Item = Self>) -> Self {
        parts.fold(Self::default(), |mut sum, part| {
            sum.passed += part.passed;
            sum.skipped += part.skipped;
            sum.failed.extend(part.failed);
            sum
        })
    }
}

/// `1..4`.
fn plan(text: &str) -> Option<usize> {
    text.strip_prefix("1..")?.split(' ').next()?.parse().ok()
}

/// `not ok 2 - name # SKIP why`: whether it passed, its name, whether it was skipped. What is to be done some day (`# TODO`)
/// may fail.
fn result(text: &str) -> Option<(bool, &str, bool)> {
    let (ok, rest) = match text.strip_prefix("not ok") {
        Some(rest) => (false, rest),
        None => (true, text.strip_prefix("ok")?),
    };
    let rest = match rest.strip_prefix(' ') {
        Some(rest) => rest,
        None if rest.is_empty() => "",
        None => return None,
    };
    let (name, directive) = rest.split_once(" # ").unwrap_or((rest, ""));
    let number = name.split(' ').next().filter(|word| word.chars().all(|c| c.is_ascii_digit()));
    let name = number.map_or(name, |number| &name[number.len()..]).trim_start();
    let name = name.strip_prefix("- ").unwrap_or(name).trim();
    let directive = directive.to_ascii_uppercase();
    let ok = ok || directive.starts_with("TODO");
    Some((
        ok,
        if name.is_empty() { "a test without a name" } else { name },
        directive.starts_with("SKIP"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kunit_is_read_as_it_is_in_the_log() {
        let log = "\
KTAP version 1
1..2
    KTAP version 1
    # Subtest: lists
    # module: mymod
    1..3
    ok 1 empty
    # add: EXPECTATION FAILED at mymod.c:12
    not ok 2 add
        KTAP version 1
        # Subtest: parts
        ok 1 a # SKIP no hardware
        not ok 2 b
    not ok 3 parts
# lists: pass:1 fail:2 skip:0 total:3
not ok 1 lists
    ok 1 - other
ok 2 others";
        let tap = Tap::read(log.lines());
        assert_eq!(tap.failed, ["lists: add", "lists: parts: b"]);
        assert_eq!((tap.passed, tap.skipped), (2, 1));
    }

    #[test]
    fn programs_write_it_in_their_ways() {
        let tap = Tap::read(
            "TAP version 13\n1..4\nok 1 - one\nnot ok 2 two # TODO later\nok 3 # SKIP\nhello\nokay"
                .lines(),
        );
        assert_eq!(tap.failed, ["1 of the planned tests did not run"]);
        assert_eq!((tap.passed, tap.skipped), (2, 1));
        let tap = Tap::read(["not ok", "ok", "not okay at all"]);
        assert_eq!((tap.failed, tap.passed), (vec!["a test without a name".to_owned()], 1));
        assert_eq!(Tap::read(["nothing of that kind"]), Tap::default());
    }
}
