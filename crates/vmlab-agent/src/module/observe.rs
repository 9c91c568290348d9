//! What a guest is like. What it does not have is left out: a kernel may lack any of it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use vmlab_wire::observation::{Area, LoadedModule, Observation};

use super::allocations::Tracker;
use crate::boot_log::{self, Record};

/// More names than any guest has; a module that makes them without end does not fill memory.
const MAX_NAMES: usize = 100_000;

/// How long a kernel's log is read that goes on all the time.
const LOG_TIME: Duration = Duration::from_secs(5);

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

/// How old memory has to be that it tells of (`MSECS_MIN_AGE` in mm/kmemleak.c), and a little more.
const KMEMLEAK_AGE: Duration = Duration::from_millis(5500);

/// Directories whose entries modules make, and how deep they are looked at.
const TREES: [(&str, usize); 15] = [
    ("/dev", 4),
    ("/proc/bus", 2),
    ("/proc/driver", 3),
    ("/proc/fs", 2),
    ("/proc/self/net", 1),
    ("/proc/sys", 2),
    ("/sys/block", 1),
    ("/sys/bus", 3),
    ("/sys/class", 2),
    ("/sys/devices/virtual", 2),
    ("/sys/firmware", 1),
    ("/sys/fs", 2),
    ("/sys/kernel", 1),
    ("/sys/kernel/debug", 1),
    ("/sys/module", 1),
];

/// Directories of the guest's own, which change all the time.
const PASSED_OVER: [&str; 5] = ["/dev/fd", "/dev/hugepages", "/dev/mqueue", "/dev/pts", "/dev/shm"];

/// How much is looked at, since some of it takes time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// The log, the taint, and which modules there are.
    Glance,
    /// All that can be had without a search.
    Whole,
    /// The same, and kmemleak's search.
    Removed,
}

/// The kernel's log. It stays open, as it can be read on, but not from a record on.
pub(super) struct Log {
    file: File,
    buffer: Vec<u8>,
    /// The number of the next record that counts.
    next: u64,
}

impl Log {
    /// Passes over all that is there before this number.
    pub(super) fn open(from: u64) -> io::Result<Self> {
        let mut log =
            Self { file: boot_log::open()?, buffer: vec![0; boot_log::MAX_RECORD], next: 0 };
        let early = log.records();
        // Those that count already are for the first answer, and are read again for it.
        if early.iter().any(|record| number_of(record).is_none_or(|number| number >= from)) {
            log.file = boot_log::open()?;
            log.next = from;
        }
        Ok(log)
    }

    /// The records that are new.
    fn records(&mut self) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        let until = Instant::now() + LOG_TIME;
        for _ in 0..boot_log::MAX_RECORDS {
            let read = boot_log::next_record(&mut self.file, &mut self.buffer);
            let Ok(Some(record)) = read else { break };
            let number = number_of(record);
            if number.is_none_or(|number| number >= self.next) {
                records.push(record.to_vec());
                self.next = number.map_or(self.next, |number| number + 1);
            }
            if Instant::now() >= until {
                break;
            }
        }
        records
    }
}

/// Looks.
pub(super) fn look(log: &mut Log, tracker: &mut Tracker, depth: Depth) -> Observation {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let glance = Observation {
        taint: text("/proc/sys/kernel/tainted").trim().parse().unwrap_or(0),
        modules: text("/proc/modules").lines().filter_map(loaded_module).collect(),
        log: log.records(),
        log_next: log.next,
        ..Observation::default()
    };
    if depth == Depth::Glance {
        return glance;
    }
    let mut names = BTreeSet::new();
    for (tree, depth) in TREES {
        walk(Path::new(tree), depth, &mut names);
    }
    of_proc(&mut names);
    registrations(&mut names, &text);
    names.extend(text("/proc/slabinfo").lines().filter_map(slab_cache));
    let (unfreed, untracked) = match tracker.unfreed() {
        Ok(unfreed) => (unfreed, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    Observation {
        names,
        areas: text("/proc/vmallocinfo").lines().filter_map(area).collect(),
        unfreed,
        untracked,
        kmemleak: if depth == Depth::Removed { kmemleak() } else { Vec::new() },
        ..glance
    }
}

fn walk(dir: &Path, depth: usize, names: &mut BTreeSet<String>) {
    let Ok(items) = fs::read_dir(dir) else { return };
    for item in items.flatten() {
        let path = item.path();
        let Some(name) = path.to_str() else { continue };
        if PASSED_OVER.contains(&name) || names.len() >= MAX_NAMES {
            continue;
        }
        names.insert(name.to_owned());
        if depth > 1 && item.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, depth - 1, names);
        }
    }
}

/// The top of `/proc`, but for processes.
fn of_proc(names: &mut BTreeSet<String>) {
    let items = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = items.filter_map(|item| item.file_name().into_string().ok());
    let named = all.filter(|name| !name.starts_with(|c: char| c.is_ascii_digit()));
    names.extend(named.map(|name| format!("/proc/{name}")));
}

/// What is registered with the kernel and may have no node.
fn registrations(names: &mut BTreeSet<String>, text: &dyn Fn(&str) -> String) {
    let last = |line: &str| line.split_whitespace().last().map(str::to_owned);
    names.extend(
        text("/proc/filesystems").lines().filter_map(last).map(|name| format!("filesystem {name}")),
    );
    names.extend(
        text("/proc/misc").lines().filter_map(last).map(|name| format!("misc device {name}")),
    );
    let mut kind = "character";
    for line in text("/proc/devices").lines() {
        match line {
            "Character devices:" => kind = "character",
            "Block devices:" => kind = "block",
            line if line.trim().is_empty() => {}
            line => _ = names.insert(format!("{kind} device {}", line.trim())),
        }
    }
    let ciphers = text("/proc/crypto");
    let driver = |line: &str| line.strip_prefix("driver").and_then(last);
    names.extend(ciphers.lines().filter_map(driver).map(|name| format!("crypto driver {name}")));
}

/// `ext4 1003520 1 - Live 0xffffffffc0a00000 (E)`.
fn loaded_module(line: &str) -> Option<LoadedModule> {
    let mut words = line.split(' ');
    let name = words.next()?.to_owned();
    let users = words.nth(1)?.parse().unwrap_or(-1);
    Some(LoadedModule { name, users })
}

/// `kmalloc-64 1024 1024 64 64 1 : tunables …`, behind two lines of headings.
fn slab_cache(line: &str) -> Option<String> {
    let mut words = line.split_whitespace();
    let name = words.next()?;
    // How many objects are in use.
    words.next()?.parse::<u64>().ok()?;
    Some(format!("slab cache {name}"))
}

/// `0xffffc90000000000-0xffffc90000002000    8192 f+0x12/0x34 [mymod] pages=1 vmalloc`. Only what is for modules:
/// another function's caller is not a module's, and a module that is gone leaves an address.
fn area(line: &str) -> Option<Area> {
    let (range, rest) = line.split_once(' ')?;
    let address =
        u64::from_str_radix(range.split_once('-')?.0.trim_start_matches("0x"), 16).ok()?;
    let mut words = rest.split_whitespace();
    let bytes = words.next()?.parse().ok()?;
    let caller = words.next()?;
    let caller = match words.next() {
        Some(module) if module.starts_with('[') => format!("{caller} {module}"),
        _ if caller.starts_with("0x") => caller.to_owned(),
        _ => return None,
    };
    Some(Area { address, bytes, caller })
}

/// Has kmemleak forget what it has found so far, where the kernel has it.
pub(super) fn clear_kmemleak() {
    let _ = fs::write(KMEMLEAK, "clear");
}

/// Has kmemleak look, which tells only of memory that is not quite new.
fn kmemleak() -> Vec<String> {
    if !Path::new(KMEMLEAK).exists() {
        return Vec::new();
    }
    std::thread::sleep(KMEMLEAK_AGE);
    for _ in 0..2 {
        if fs::write(KMEMLEAK, "scan").is_err() {
            return Vec::new();
        }
    }
    let text = fs::read_to_string(KMEMLEAK).unwrap_or_default();
    let mut reports: Vec<String> = Vec::new();
    for line in text.lines() {
        match reports.last_mut() {
            Some(report) if line.starts_with(' ') => {
                report.push('\n');
                report.push_str(line);
            }
            _ => reports.push(line.to_owned()),
        }
    }
    reports
}

/// The number of a record; `None` for what is none.
fn number_of(record: &[u8]) -> Option<u64> {
    Some(Record::parse(&String::from_utf8_lossy(record))?.number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_are_read() {
        let module = loaded_module("ext4 1003520 2 - Live 0x0000000000000000").unwrap();
        assert_eq!((module.name.as_str(), module.users), ("ext4", 2));
        assert_eq!(loaded_module("x 4096 - - Live 0x0").unwrap().users, -1);
        let line = "kmalloc-64   1000   1024     64   64    1 : tunables    0";
        assert_eq!(slab_cache(line).unwrap(), "slab cache kmalloc-64");
        assert_eq!(slab_cache("slabinfo - version: 2.1"), None);
        assert_eq!(slab_cache("# name            <active_objs> <num_objs> <objsize>"), None);
        let line =
            "0xffffc90000000000-0xffffc90000002000    8192 f+0x1/0x2 [mymod] pages=1 vmalloc N0=1";
        let found = area(line).unwrap();
        assert_eq!((found.bytes, found.caller.as_str()), (8192, "f+0x1/0x2 [mymod]"));
        assert_eq!(found.address, 0xffff_c900_0000_0000);
        let line =
            "0xffffc90000000000-0xffffc90000002000    8192 0xffffffffc0123456 pages=1 vmalloc";
        assert_eq!(area(line).unwrap().caller, "0xffffffffc0123456");
        assert_eq!(
            area("0xffffc90000000000-0xffffc90000002000    8192 hpet_enable+0x1/0x2 phys=x"),
            None
        );
        assert_eq!(area(""), None);
        assert_eq!(number_of(b"6,339,5140900,-;NET: x"), Some(339));
        assert_eq!(number_of(b"garbage"), None);
    }

    #[test]
    fn this_very_system_can_be_looked_at() {
        let mut log = Log::open(u64::MAX).unwrap();
        let now = look(&mut log, &mut Tracker::Idle, Depth::Whole);
        assert!(now.names.contains("/dev/null") && now.names.contains("filesystem proc"));
        assert!(now.names.contains("/proc/meminfo") && now.names.contains("/sys/module/kernel"));
        assert!(!now.names.iter().any(|name| name.starts_with("/proc/1")), "{:?}", now.names);
        assert!(look(&mut log, &mut Tracker::Idle, Depth::Glance).names.is_empty());
    }

    #[test]
    fn the_log_is_read_on() {
        let mut log = Log::open(u64::MAX).unwrap();
        let next = log.next;
        crate::kmsg::debug("a test of vmlab-agent's reads this");
        let new = log.records();
        assert!(new.iter().any(|record| String::from_utf8_lossy(record).contains("reads this")));
        assert!(log.next > next && Log::open(next).unwrap().records().len() >= new.len());
    }
}
