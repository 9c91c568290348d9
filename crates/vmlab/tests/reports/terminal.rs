//! The summary at the end of a run.

use vmlab::results::{AttemptResult, Outcome, ShowOutput, terminal};

use crate::samples::{self, attempt, passed, suite, target};

#[test]
fn a_summary_has_what_failed_with_the_end_of_its_output() {
    let mut targets = vec![passed("a"), samples::flaky(), samples::failed(), samples::signalled()];
    targets.extend([samples::timeout(), samples::infrastructure()]);
    targets.extend(samples::cancelled());
    let mut noted = attempt(None, "");
    noted.notes = vec!["it was started once more".to_owned()];
    targets.push(target("noted", Outcome::Passed, vec![noted]));
    let results = suite(targets);
    let waiting: String = (21..=60).map(|number| format!("  | waiting, {number} s\n")).collect();
    let expected = format!(
        "\
FLAKY network (3.0 s)
  attempt 1 of 2: the command ended with exit code 1
  attempt 2 of 2: passed

FAILED exit (1.5 s)
  the command ended with exit code 3
  output:
  | checking a
  | checking b
  | b: expected 1, found 2
  output: /logs/exit/output.log
  kept: /logs/exit/core.gz

FAILED signal (3.0 s)
  attempt 1 of 2: the command ended with signal 11 (SIGSEGV)
  attempt 2 of 2: the command ended with signal 11 (SIGSEGV)

FAILED hang (30.9 s)
  the command took longer than 30 s
  output, without the first 20 lines:
{waiting}
ERROR image (1.5 s)
  QEMU ended before the guest was up
  | exit code 1
  | qemu-system-x86_64: could not open disk image

CANCELLED started (1.5 s)
  it was cancelled
  output:
  | half of

2 passed, 1 flaky, 3 failed, 1 error, 2 cancelled in 44.4 s
"
    );
    assert_eq!(terminal(&results, ShowOutput::Failed), expected);

    let none = terminal(&results, ShowOutput::None);
    assert!(
        !none.contains("| checking") && none.contains("FAILED exit (1.5 s)\n  the command"),
        "{none}"
    );
    assert!(none.contains("  output: /logs/exit/output.log\n"), "{none}");

    let all = terminal(&results, ShowOutput::All);
    assert!(all.starts_with("PASSED a (1.5 s)\n  output:\n  | all 12 tests passed\n\n"), "{all}");
    assert!(all.contains("  | waiting, 1 s\n") && all.contains("  | connected\n"), "{all}");
    assert!(all.contains("PASSED noted (1.5 s)\n  note: it was started once more\n\n"), "{all}");
}

#[test]
fn what_explains_a_failure_is_shown_whatever_it_is() {
    let results = suite(vec![samples::event()]);
    let text = terminal(&results, ShowOutput::Failed);
    let title = "  the kernel said: KASAN: slab-use-after-free in frob_release\n";
    assert!(text.contains(&format!("{title}  report:\n  | BUG: KASAN: slab-use")), "{text}");
    assert!(!text.contains("| opened"), "{text}");
    let all = terminal(&results, ShowOutput::All);
    assert!(
        all.contains("  report:\n  | BUG: KASAN") && all.contains("  output:\n  | opened\n"),
        "{all}"
    );
    // Without output, the console has to do; of a guest that ended, it says more.
    let mut silent = samples::failed();
    silent.attempts[0] = AttemptResult {
        output: " \n".to_owned(),
        console: "Kernel panic".to_owned(),
        ..silent.attempts[0].clone()
    };
    let text = terminal(&suite(vec![silent]), ShowOutput::Failed);
    assert!(text.contains("  console:\n  | Kernel panic\n"), "{text}");
}

#[test]
fn hostile_text_steers_no_terminal() {
    let results = suite(vec![samples::hostile()]);
    for show in [ShowOutput::All, ShowOutput::Failed, ShowOutput::None] {
        let text = terminal(&results, show);
        let steers = |c: char| c.is_control() && !matches!(c, '\n' | '\t') || c == '\u{202e}';
        assert!(!text.contains(steers), "{text:?}");
        // Nor is it a command to GitHub, which takes no notice of spaces before one.
        assert!(!text.lines().any(|line| line.trim_start().starts_with("::")), "{text}");
    }
}
