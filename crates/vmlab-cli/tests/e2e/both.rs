//! The tests that both hypervisors have to pass: QEMU where they are tests like any other, and vmlab's own
//! monitor here, in a guest that has KVM. `both.list` has their names.

#![allow(clippy::print_stdout, reason = "how each test went is what these are for")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::common::outer::{Outer, test_program};

/// One list for all.
const LIST: &str = include_str!("both.list");

/// How long one test may take; most need a few seconds, and a disk's template half a minute or more.
const TEST_TIME: u32 = 300;

/// How long a group may take, on a machine that has much else to do. The long ones are run by hand.
const GROUP_TIME: Duration = Duration::from_secs(1800);

/// Runs tests one after the other, each in a process of its own, and says of each how it went. The snapshot that most
/// of them go on from is there before: taking it is a VM with a log of its own, and they look for one.
const RUN: &str = r#"
"$VMLAB_BIN" run -q -k debian:6.12 -- true || exit 1
one() { # LIMIT PROGRAM NAME
    begin=${EPOCHREALTIME/./}
    timeout -k 5 $1 "$2" --exact "$3" --test-threads 1 > /tmp/said 2>&1 < /dev/null
    code=$?
    took=$(((${EPOCHREALTIME/./} - begin) / 100000))
    if [ $code = 0 ] && grep -q '^test result: ok. 1 passed' /tmp/said; then
        echo "passed $3 ${took%?}.${took: -1} s"
    else
        echo "FAILED $3 ${took%?}.${took: -1} s, code $code"
        sed 's/^/    /' /tmp/said
    fi
}
"#;

/// The tests of each group, with their programs.
fn groups() -> BTreeMap<&'static str, Vec<(&'static str, &'static str)>> {
    let mut groups = BTreeMap::<_, Vec<_>>::new();
    let mut group = "";
    for line in LIST.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            group = name;
        } else if let Some((program, test)) = line.split_once(' ') {
            groups.entry(group).or_default().push((program, test.trim()));
        } else {
            assert_eq!(line, "", "neither a group nor a program and a test");
        }
    }
    groups
}

fn run(group: &str) {
    let groups = groups();
    let tests = &groups[group];
    let outer = Outer::new();
    let lines = tests.iter().map(|(program, name)| {
        format!("one {TEST_TIME} {} {name}\n", test_program(program).display())
    });
    let script: String = std::iter::once(RUN.to_owned()).chain(lines).collect();
    let outcome = outer.bash(&script, GROUP_TIME);
    let said = outcome.stdout_text();
    println!("{said}");
    outcome.expect_code(0);
    let passed = said.lines().filter(|line| line.starts_with("passed ")).count();
    assert_eq!(passed, tests.len(), "not all tests passed with vmlab's own monitor:\n{said}");
}

#[test]
fn commands() {
    run("commands");
}

#[test]
fn machines() {
    run("machines");
}

#[test]
fn disks_and_snapshots() {
    run("disks and snapshots");
}

#[test]
fn library() {
    run("library");
}

#[test]
fn vsock() {
    run("vsock");
}

#[test]
fn networks() {
    run("networks");
}

// What follows takes more than an hour where processors are emulated: docs/nested.md has the command.

#[test]
#[ignore = "takes too long for each run: run it by hand"]
fn others_sessions() {
    run("others: sessions and files");
}

#[test]
#[ignore = "takes too long for each run: run it by hand"]
fn others_snapshots() {
    run("others: snapshots");
}

#[test]
#[ignore = "takes too long for each run: run it by hand"]
fn others_disks() {
    run("others: disks, networks and repetition");
}

#[test]
#[ignore = "takes too long for each run: run it by hand"]
fn others_targets() {
    run("others: targets and the library");
}

#[test]
fn all_groups_are_run() {
    let source = include_str!("both.rs");
    for (group, tests) in groups() {
        assert!(source.contains(&format!("    run(\"{group}\");")), "nothing runs {group}");
        for (program, _) in tests {
            assert!(test_program(program).exists() && Path::new(program).is_relative());
        }
    }
}
