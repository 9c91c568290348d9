//! Workflow commands and the step's summary.

use vmlab::results::{
    AttemptResult, Failure, Outcome, Results, github_annotations, github_summary,
};

use crate::samples::{self, HOSTILE, attempt, exit_code, passed, suite, target};

#[test]
fn a_small_log_is_exactly_this() {
    let mut targets = vec![passed("a"), samples::failed(), samples::flaky()];
    targets.push(samples::infrastructure());
    targets.extend(samples::cancelled());
    let expected = "\
::group::exit: the command ended with exit code 3
output:
| checking a
| checking b
| b: expected 1, found 2
output: /logs/exit/output.log
kept: /logs/exit/core.gz
::endgroup::
::group::image: QEMU ended before the guest was up exit code 1 qemu-system-x86_64: could not open disk image
::endgroup::
::group::started: it was cancelled
output:
| half of
::endgroup::
::error title=exit::the command ended with exit code 3
::error title=image::QEMU ended before the guest was up%0Aexit code 1%0Aqemu-system-x86_64: could not open disk image
::warning title=network::passed at attempt 2; before: the command ended with exit code 1
";
    assert_eq!(github_annotations(&suite(targets)), expected);
}

fn failing(count: usize) -> Results {
    let failing = |number| {
        let failed = attempt(Some(exit_code(1)), "");
        target(&format!("t{number}"), Outcome::Failed, vec![failed])
    };
    suite((1..=count).map(failing).collect())
}

#[test]
fn what_github_would_not_show_is_counted() {
    let errors = |count| {
        let text = github_annotations(&failing(count));
        text.lines()
            .filter(|line| line.starts_with("::error"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let ten = errors(10);
    assert_eq!(
        (ten.len(), ten[9].as_str()),
        (10, "::error title=t10::the command ended with exit code 1")
    );
    let many = errors(12);
    assert_eq!(
        (many.len(), many[9].as_str()),
        (10, "::error title=3 more targets::t10%0At11%0At12")
    );
}

#[test]
fn names_are_escaped_and_a_guest_gives_no_commands() {
    let message = "50%, a:b\nc".to_owned();
    let failed = attempt(Some(Failure::Infrastructure { message }), HOSTILE);
    let results =
        suite(vec![target("a:b,c%\n::d", Outcome::Error, vec![failed]), samples::hostile()]);
    let text = github_annotations(&results);
    assert!(text.contains("::error title=a%3Ab%2Cc%25 %3A%3Ad::50%25, a:b%0Ac\n"), "{text}");
    let commands: Vec<_> = text
        .lines()
        .filter(|line| line.trim_start().starts_with("::"))
        .filter_map(|line| line.trim_start().split([' ', ':']).nth(2))
        .collect();
    assert_eq!(commands, ["group", "endgroup", "group", "endgroup", "error", "error"]);
    let inside = text.lines().filter(|line| !line.starts_with("::"));
    let inside: Vec<_> = inside.filter(|line| line.contains("##[")).collect();
    assert!(inside.is_empty(), "{inside:?}");
    assert!(
        text.contains("\n| x ## [error]owned\n") && text.contains("\n| ::error title=owned"),
        "{text}"
    );
}

#[test]
fn a_small_summary_is_exactly_this() {
    let mut targets = vec![passed("debian:6.1_x|y"), samples::failed(), samples::flaky()];
    targets.extend(samples::cancelled());
    let expected = "\
## demo

1 passed, 1 flaky, 1 failed, 2 cancelled in 7.5 s

| | Target | Outcome | Time | Attempts | Kernel |
|---|---|---|--:|--:|---|
| ❌ | exit | failed | 1.5 s | 1 | 6\\.12\\.117+deb12-amd64 |
| ⚠️ | network | flaky | 3.0 s | 2 | 6\\.12\\.117+deb12-amd64 |
| ⏹️ | started | cancelled | 1.5 s | 1 | 6\\.12\\.117+deb12-amd64 |
| ⏹️ | waiting | cancelled | 0 ms | 0 |  |
| ✅ | debian\\:6\\.1\\_x\\|y | passed | 1.5 s | 1 | 6\\.12\\.117+deb12-amd64 |

<details><summary><b>exit</b>: the command ended with exit code 3</summary>

output:

<pre>
checking a
checking b
b: expected 1, found 2
</pre>

</details>

<details><summary><b>started</b>: it was cancelled</summary>

output:

<pre>
half of
</pre>

</details>

<details><summary><b>waiting</b>: it was not run</summary>

</details>
";
    assert_eq!(github_summary(&suite(targets)), expected);
}

#[test]
fn a_summary_is_below_githubs_limit_and_says_what_is_left_out() {
    const LIMIT: usize = 1024 * 1024;
    // Escaping makes it five times as long.
    let output = "&".repeat(3000) + "\n" + &"&&&&&&&&&\n".repeat(3000);
    let mut results = failing(600);
    for target in &mut results.targets {
        target.attempts[0] = AttemptResult { output: output.clone(), ..target.attempts[0].clone() };
    }
    let text = github_summary(&results);
    assert!(text.len() < LIMIT, "{}", text.len());
    let rows = text.lines().filter(|line| line.starts_with("| ❌")).count();
    assert_eq!(rows, 600);
    let details = text.matches("<details>").count();
    let left_out = format!("Details of {} targets left out", 600 - details);
    assert!(details > 10 && text.contains(&left_out), "{details}");
    // No line fills it alone, and the rows have the same limit.
    let long = attempt(Some(exit_code(1)), &"x".repeat(5000));
    let text = github_summary(&suite(vec![target("a", Outcome::Failed, vec![long])]));
    assert!(text.contains(&format!("\n{}…\n</pre>", "x".repeat(1000))), "{text}");
    let text = github_summary(&failing(30_000));
    let rows = text.lines().filter(|line| line.starts_with("| ❌")).count();
    assert!(text.len() < LIMIT && text.contains(&format!("{} targets left out", 30_000 - rows)));
}

#[test]
fn hostile_text_in_a_summary_is_text() {
    let text = github_summary(&suite(vec![samples::hostile()]));
    let row = text.lines().find(|line| line.starts_with("| ❌")).unwrap();
    // Seven bars make six cells: none of the name's own counts.
    assert_eq!(row.matches('|').count() - row.matches("\\|").count(), 7, "{row}");
    assert!(!row.contains('<') && !row.contains('@') && row.contains("\\[c\\]\\(http\\:"), "{row}");
    for tag in ["<script", "<img"] {
        assert!(!text.contains(tag), "{text}");
    }
    assert_eq!(text.matches("</pre>").count(), 1, "{text}");
}
