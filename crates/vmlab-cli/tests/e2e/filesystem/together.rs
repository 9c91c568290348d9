//! Several at once in one directory: processes of a guest, the host, and two guests.

#![allow(clippy::print_stdout, reason = "what the other half waits for")]

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

/// What the guest says once it works.
pub(crate) const BEGUN: &str = "half begun";
const ENDED: &str = "1 passed";

/// How long the guest works while the host disturbs it.
const WORKING: Duration = Duration::from_secs(5);

/// How long one guest waits for the other, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(100);

/// Works in a directory with several threads, each on names of its own. None of it may fail, whatever others
/// do to other names.
pub(crate) fn work_among_others(dir: &Path) {
    println!("{BEGUN}");
    let until = Instant::now() + WORKING;
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let mut round = 0;
                while Instant::now() < until {
                    work(dir, &format!("guest-{thread}-{round}"));
                    round += 1;
                }
                assert!(round > 2, "the guest did nothing");
            });
        }
        scope.spawn(move || {
            while Instant::now() < until {
                // Names that are gone when they are looked at are the host's.
                let names = dir.read_dir().unwrap().map(|entry| entry.unwrap().file_name());
                for name in names {
                    let _ = dir.join(name).metadata();
                }
            }
        });
    });
}

fn work(dir: &Path, name: &str) {
    let at = |suffix: &str| dir.join(format!("{name}{suffix}"));
    std::fs::create_dir(at("-d")).unwrap();
    std::fs::write(at(""), name).unwrap();
    assert_eq!(std::fs::read_to_string(at("")).unwrap(), name);
    std::fs::hard_link(at(""), at("-link")).unwrap();
    std::fs::rename(at(""), at("-d/moved")).unwrap();
    let mut log = OpenOptions::new().append(true).open(at("-link")).unwrap();
    log.write_all(b"+more").unwrap();
    let moved = std::fs::read_to_string(at("-d/moved")).unwrap();
    assert_eq!(moved, format!("{name}+more"));
    assert!(!at("").exists());
    let listed: Vec<_> = at("-d").read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(listed, ["moved"]);
    std::fs::remove_file(at("-link")).unwrap();
    log.set_len(4).unwrap();
    assert_eq!(at("-d/moved").metadata().unwrap().len(), 4);
    std::fs::remove_dir_all(at("-d")).unwrap();
    assert_eq!(log.metadata().unwrap().len(), 4);
}

/// Makes, renames and removes names in a directory until the guest has written that it has ended. Says how
/// often.
pub(crate) fn disturb(dir: &Path, written: impl Fn() -> Vec<u8>) -> usize {
    let mut rounds = 0;
    let deadline = Instant::now() + PATIENCE;
    let ended = |text: Vec<u8>| String::from_utf8_lossy(&text).contains(ENDED);
    while !ended(written()) {
        assert!(Instant::now() < deadline, "the guest does not end");
        let names: Vec<_> = (0..20).map(|i| dir.join(format!("host-{i}"))).collect();
        for name in &names {
            std::fs::write(name, "from the host").unwrap();
        }
        for (i, name) in names.iter().enumerate() {
            std::fs::rename(name, dir.join(format!("host-{}", (i + 7) % 20))).unwrap();
            std::fs::create_dir(dir.join("host-d")).unwrap();
            std::fs::rename(dir.join("host-d"), dir.join("host-e")).unwrap();
            std::fs::remove_dir(dir.join("host-e")).unwrap();
            std::fs::write(name, "again").unwrap();
        }
        for name in &names {
            std::fs::remove_file(name).unwrap();
        }
        rounds += 1;
    }
    rounds
}

/// Lines that each guest appends.
const LINES: usize = 300;
const LOG: &str = "log";

fn line(who: &str, number: usize) -> String {
    format!("{who} {number} {}\n", "x".repeat(number % 50))
}

/// Waits for another guest in a directory that both have, and appends lines to one file with it.
pub(crate) fn meet(dir: &Path, me: &str, other: &str) {
    let wait = |name: &str| {
        let deadline = Instant::now() + PATIENCE;
        while !dir.join(name).exists() {
            assert!(Instant::now() < deadline, "{name} never comes");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    std::fs::write(dir.join(me), format!("I am {me}")).unwrap();
    wait(other);
    let mut log = OpenOptions::new().create(true).append(true).open(dir.join(LOG)).unwrap();
    for number in 0..LINES {
        log.write_all(line(me, number).as_bytes()).unwrap();
        // What the other guest did is seen at once; its lines may already be behind this one.
        let content = std::fs::read_to_string(dir.join(LOG)).unwrap();
        assert!(content.contains(&line(me, number)), "{me} does not see its own line {number}");
    }
    std::fs::rename(dir.join(me), dir.join(format!("{me}-done"))).unwrap();
    wait(&format!("{other}-done"));
    assert!(!dir.join(other).exists(), "a name that the other guest has changed is still there");
    let text = std::fs::read_to_string(dir.join(format!("{other}-done"))).unwrap();
    assert_eq!(text, format!("I am {other}"));
    check(dir, &[me, other]);
}

fn check(dir: &Path, guests: &[&str]) {
    let content = std::fs::read_to_string(dir.join(LOG)).unwrap();
    for who in guests {
        let lines = content.split_inclusive('\n').filter(|line| line.starts_with(who));
        let wanted: Vec<String> = (0..LINES).map(|number| line(who, number)).collect();
        assert!(lines.eq(wanted.iter().map(String::as_str)), "lines of {who} are not all there");
    }
    assert_eq!(content.lines().count(), guests.len() * LINES, "there are other lines");
}

/// What the guests have left.
pub(crate) fn all_is_there(dir: &Path, guests: &[&str]) {
    check(dir, guests);
}
