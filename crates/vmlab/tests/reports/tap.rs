//! TAP 14.

use std::io::Write;
use std::process::{Command, Stdio};

use vmlab::results::{AttemptResult, Outcome, tap};

use crate::samples::{self, HOSTILE, attempt, exit_code, passed, suite, target};

#[test]
fn a_small_report_is_exactly_this() {
    let mut targets = vec![passed("a"), samples::failed(), samples::flaky(), samples::event()];
    targets.push(samples::infrastructure());
    targets.extend(samples::cancelled());
    let expected = r#"TAP version 14
1..7
ok 1 - a
not ok 2 - exit
  ---
  message: "the command ended with exit code 3"
  severity: fail
  kind: command
  attempts: 1
  duration_ms: 1500.000
  kernel: "6.12.117+deb12-amd64"
  exit_code: 3
  output: |
    checking a
    checking b
    b: expected 1, found 2
  output_log: "/logs/exit/output.log"
  kept_files:
    - "/logs/exit/core.gz"
  ...
ok 3 - network
  ---
  message: "the command ended with exit code 1"
  severity: comment
  kind: command
  attempts: 2
  duration_ms: 3000.000
  kernel: "6.12.117+deb12-amd64"
  exit_code: 1
  output: |
    connection refused
  ...
not ok 4 - module
  ---
  message: "the kernel said: KASAN: slab-use-after-free in frob_release"
  severity: fail
  kind: event
  attempts: 1
  duration_ms: 1500.000
  kernel: "6.12.117+deb12-amd64"
  exit_code: 0
  events:
    - kind: taint
      title: "out-of-tree module"
      count: 1
      report: |
        frob: loading out-of-tree module taints kernel.
    - kind: kasan
      title: "KASAN: slab-use-after-free in frob_release"
      count: 3
      report: |
        BUG: KASAN: slab-use-after-free in frob_release+0x4f/0x90 [frob]
        Write of size 8 at addr ffff888007a31c40 by task test/312
INDENT
        CPU: 1 UID: 0 PID: 312 Comm: test Tainted: G           O       6.12.117 #1
        Call Trace:
         <TASK>
         dump_stack_lvl+0x5d/0x80
         print_report+0xc5/0x610
         kasan_report+0xc6/0x100
         frob_release+0x4f/0x90 [frob]
         __fput+0x1a5/0x4a0
         </TASK>
  output: |
    opened
    released
  ...
not ok 5 - image
  ---
  message: "QEMU ended before the guest was up exit code 1 qemu-system-x86_64: could not open disk image"
  severity: error
  kind: infrastructure
  attempts: 1
  duration_ms: 1500.000
  ...
ok 6 - started # SKIP it was cancelled
ok 7 - waiting # SKIP it was not run
Bail out! The run was ended; cancelled: 2 targets
"#;
    assert_eq!(tap(&suite(targets)), expected.replace("INDENT", "        "));
}

#[test]
fn long_output_is_cut_at_its_beginning() {
    let output: String = (1..=60).map(|number| format!("line {number}\n")).collect();
    let failed = attempt(Some(exit_code(1)), &output);
    let text = tap(&suite(vec![target("a", Outcome::Failed, vec![failed])]));
    assert!(text.contains("  output_lines_left_out: 10\n  output: |\n    line 11\n"), "{text}");
    assert!(text.ends_with("    line 60\n  ...\n"), "{text}");
}

#[test]
fn no_name_is_a_directive_and_no_output_ends_its_block() {
    let names = ["a # TODO later", "b # SKIP", r"c \# d", "e\nok 7 - f"];
    let text = tap(&suite(names.iter().map(|name| passed(name)).collect()));
    let expected =
        "ok 1 - a \\# TODO later\nok 2 - b \\# SKIP\nok 3 - c \\\\\\# d\nok 4 - e ok 7 - f\n";
    assert!(text.ends_with(&format!("1..4\n{expected}")), "{text}");

    let output = format!("    {HOSTILE}");
    let failed = AttemptResult { events: vec![], ..attempt(Some(exit_code(1)), &output) };
    let text = tap(&suite(vec![target("a", Outcome::Failed, vec![failed]), samples::hostile()]));
    // Outside of blocks there is nothing but our own lines.
    let mut inside = false;
    let mut points = Vec::new();
    for line in text.lines() {
        match line {
            "  ---" => inside = true,
            "  ..." => inside = false,
            line if inside => assert!(line.is_empty() || line.starts_with("  "), "{line:?}"),
            line => points.push(line),
        }
    }
    assert_eq!(points.len(), 4, "{points:?}");
    assert_eq!(&points[..3], ["TAP version 14", "1..2", "not ok 1 - a"]);
    assert!(points[3].starts_with("not ok 2 - </pre>"), "{points:?}");
    assert!(points[3].contains("x \\#\\#[error]owned"), "{points:?}");
    // A block that could be read otherwise is a string in quotes.
    assert!(text.contains("  output: \"    </pre>"), "{text}");
    assert!(text.contains(r"\n...\n  ...\nok 1 - owned\nBail out!\n---\n"), "{text}");
    for output in ["\nx", " x", "\tx", "x\n---", "x\n  ...\ny"] {
        let failed = attempt(Some(exit_code(1)), output);
        let text = tap(&suite(vec![target("a", Outcome::Failed, vec![failed])]));
        assert!(text.contains("  output: \"") && !text.contains(": |"), "{text}");
    }
}

/// What Perl's TAP::Parser, the reader of `prove`, finds: how many points, which failed, and errors.
fn perl(text: &str) -> String {
    const PROGRAM: &str = r#"
        my $parser = TAP::Parser->new({ tap => do { local $/; <STDIN> } });
        my $yaml = 0;
        while (my $result = $parser->next) { $yaml++ if $result->is_yaml }
        my @skipped = $parser->skipped;
        printf "%d run, failed %s, skipped %s, %d blocks, errors: %s", $parser->tests_run, join(",", $parser->failed),
            join(",", @skipped), $yaml, join("|", $parser->parse_errors);
    "#;
    // That of Perl 5.36 knows 13 only, which is the same as far as it goes.
    let text = text.replacen("TAP version 14", "TAP version 13", 1);
    let mut child = Command::new("perl")
        .args(["-MTAP::Parser", "-e", PROGRAM])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("perl runs");
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
}

#[test]
fn perl_reads_all_of_it() {
    let mut results = samples::all();
    let text = tap(&results);
    let (points, bail_out) = text.split_at(text.rfind("Bail out!").unwrap());
    assert_eq!(perl(points), "11 run, failed 3,4,5,6,7,8,11, skipped 9,10, 8 blocks, errors: ");
    assert!(bail_out.ends_with("2 targets\n"), "{bail_out}");
    results.targets.truncate(2);
    assert_eq!(perl(&tap(&results)), "2 run, failed , skipped , 1 blocks, errors: ");
}
