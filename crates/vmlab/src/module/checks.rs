//! What is wrong with a guest around the life of a module. All of it compares what the agent found.

use std::collections::{BTreeMap, HashMap, HashSet};

use regex::Regex;
use vmlab_wire::observation::{Observation, Unfreed};

use super::code::LoadedCode;
use crate::guest::{LogLevel, LogRecord, events_of};

/// How many names are told of what was left behind, and how many calls of what was not freed.
const MAX_TOLD: usize = 10;

/// Flags of the kernel's taint that stand for damage, by their bits (`Documentation/admin-guide/tainted-kernels.rst`).
/// Others say what was loaded.
const DAMAGE: [(u32, char, &str); 6] = [
    (1, 'F', "a module was forced to be loaded"),
    (4, 'M', "the processor reported an error"),
    (5, 'B', "a page was bad"),
    (DIED, 'D', "the kernel died"),
    (9, 'W', "a warning was given"),
    (14, 'L', "a processor was locked up"),
];

/// What kernels say at warning level of modules that are as they should be, behind the module's name.
const USUAL_OF_MODULES: [&str; 3] = [
    ": loading out-of-tree module taints kernel.",
    ": module verification failed: signature and/or required key missing - tainting kernel",
    "' taints kernel.",
];

/// What they say of a slow host, and of what follows from the above.
const USUAL: [&str; 6] = [
    "Disabling lock debugging due to kernel taint",
    "hrtimer: interrupt took",
    "perf: interrupt took too long",
    "clocksource: ",
    "sched: RT throttling activated",
    "workqueue: ",
];

/// How what was not freed is told.
pub(super) const NOT_FREED: &str = "not freed";

/// The first names of a list, and how many more there are.
pub(super) fn listed(what: &str, mut items: Vec<String>) -> Vec<String> {
    let more = items.len().saturating_sub(MAX_TOLD);
    items.truncate(MAX_TOLD);
    let mut told: Vec<String> = items.into_iter().map(|item| format!("{what}: {item}")).collect();
    if more > 0 {
        told.push(format!("{what}: {more} more"));
    }
    told
}

/// Messages of the kernel's at warning level or worse that nobody expects. What belongs to a report of an oops, a
/// warning and so on is not told here, as that is an event.
pub(super) fn complaints(records: &[LogRecord], allowed: &[Regex]) -> Vec<String> {
    let events = events_of(records);
    let reported: HashSet<&str> =
        events.iter().flat_map(|event| &event.report).map(|line| line.trim()).collect();
    let usual = |text: &str| {
        USUAL.iter().any(|usual| text.starts_with(usual))
            || USUAL_OF_MODULES.iter().any(|usual| text.ends_with(usual))
    };
    let bad = records.iter().filter(|record| {
        record.facility == 0
            && record.level <= LogLevel::Warning
            && !usual(&record.text)
            && !reported.contains(record.text.trim())
            && !allowed.iter().any(|regex| regex.is_match(&record.text))
    });
    listed("the kernel logged", bad.map(LogRecord::to_string).collect())
}

/// Whether some task of the kernel has died: what it held is held for ever.
pub(super) fn has_died(now: &Observation) -> bool {
    now.taint >> DIED & 1 != 0
}

/// The bit of that.
const DIED: u32 = 7;

/// Flags of damage that are there now and are not among those that are known.
pub(super) fn taints(known: u64, now: &Observation) -> Vec<String> {
    let new = now.taint & !known;
    let damage = DAMAGE.iter().filter(|(bit, ..)| new >> bit & 1 != 0);
    damage
        .map(|(_, letter, meaning)| format!("the kernel is tainted: {letter} ({meaning})"))
        .collect()
}

/// Whether a module is loaded.
pub(super) fn is_loaded(now: &Observation, name: &str) -> bool {
    now.modules.iter().any(|module| module.name == name)
}

/// The modules that are there now and were not before.
pub(super) fn newcomers<'a>(before: &Observation, now: &'a Observation) -> Vec<&'a str> {
    let had: HashSet<&str> = before.modules.iter().map(|module| module.name.as_str()).collect();
    let names = now.modules.iter().map(|module| module.name.as_str());
    names.filter(|name| !had.contains(name)).collect()
}

/// Modules that have more users than before.
pub(super) fn users(before: &Observation, now: &Observation) -> Vec<String> {
    let earlier: HashMap<&str, i64> =
        before.modules.iter().map(|module| (module.name.as_str(), module.users)).collect();
    let more = now.modules.iter().filter_map(|module| {
        let had = *earlier.get(module.name.as_str())?;
        let has = module.users;
        (has > had).then(|| format!("module {} has {has} users and had {had}", module.name))
    });
    listed("still in use", more.collect())
}

/// What has a name now and had none before; nothing where other modules have come, as that may be theirs.
pub(super) fn left_behind(before: &Observation, now: &Observation) -> Vec<String> {
    if !newcomers(before, now).is_empty() {
        return Vec::new();
    }
    listed("left behind", outermost(now.names.difference(&before.names)))
}

/// Names, of which each comes before those below it, without those below others.
fn outermost<'a>(names: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut outer: HashSet<&str> = HashSet::new();
    let mut kept = Vec::new();
    for name in names {
        let above = name.match_indices('/').map(|(at, _)| &name[..at]);
        if above.into_iter().any(|above| outer.contains(above)) {
            continue;
        }
        outer.insert(name);
        kept.push(name.clone());
    }
    kept
}

/// Memory that modules have allocated and not freed.
pub(super) fn not_freed(
    before: &Observation,
    now: &Observation,
    code: &[LoadedCode],
) -> Vec<String> {
    let caller = |address: u64| code.iter().find_map(|code| code.caller(address));
    // Calls of one place are one, wherever the module was loaded.
    let mut calls: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for Unfreed { call_site, count, bytes } in &now.unfreed {
        if let Some(caller) = caller(*call_site) {
            let sum = calls.entry(caller).or_default();
            *sum = (sum.0.saturating_add(*count), sum.1.saturating_add(*bytes));
        }
    }
    let slabs = calls.into_iter().map(|(caller, (count, bytes))| {
        let times = if count == 1 { "once".to_owned() } else { format!("{count} times") };
        format!("{bytes} bytes, allocated {times} in {caller}")
    });
    let earlier: HashSet<u64> = before.areas.iter().map(|area| area.address).collect();
    let areas = now.areas.iter().filter(|area| !earlier.contains(&area.address));
    let areas = areas.filter_map(|area| {
        let by_address = || u64::from_str_radix(area.caller.strip_prefix("0x")?, 16).ok();
        let by_module = |code: &LoadedCode| area.caller.ends_with(&format!("[{}]", code.name));
        let caller = match by_address() {
            Some(address) => caller(address)?,
            None => code.iter().any(by_module).then(|| area.caller.clone())?,
        };
        Some(format!("{} bytes of vmalloc, allocated in {caller}", area.bytes))
    });
    listed(NOT_FREED, slabs.chain(areas).collect())
}

/// The functions of the system call that loads or unloads a module, the innermost first, among the stacks in a log.
/// `? f+0x1/0x2` is no caller, only an address that was found on a stack.
pub(super) fn frames_of_module_calls(lines: &[&str]) -> Vec<String> {
    /// What every task that waits is in.
    const WAITING: [&str; 4] =
        ["__schedule+", "schedule+", "schedule_timeout+", "schedule_preempt_disabled+"];
    let stacks = lines.split(|line| line.trim() == "<TASK>").skip(1);
    let stacks = stacks.map(|stack| {
        let end = stack.iter().position(|line| line.contains("</TASK>")).unwrap_or(stack.len());
        let frames = stack[..end].iter().map(|line| line.trim());
        let frames = frames.take_while(|line| !line.starts_with("do_syscall_64+"));
        let called = frames.filter(|line| line.contains("+0x") && !line.starts_with("? "));
        called.filter(|line| !line.starts_with("RIP:")).map(str::to_owned).collect::<Vec<String>>()
    });
    let calls = ["delete_module+", "init_module+"];
    let is_call = |frame: &String| calls.iter().any(|call| frame.contains(call));
    let mut stuck = stacks.into_iter().find(|stack| stack.iter().any(is_call)).unwrap_or_default();
    stuck.retain(|frame| !WAITING.iter().any(|waiting| frame.starts_with(waiting)));
    stuck
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::time::Duration;

    use vmlab_wire::observation::{Area, LoadedModule, Section};

    use super::*;
    use crate::debug_info::ModuleCode;

    fn record(level: LogLevel, facility: u32, text: &str) -> LogRecord {
        LogRecord {
            sequence: 1,
            level,
            facility,
            time: Duration::from_secs(2),
            text: text.to_owned(),
        }
    }

    fn with_modules(modules: &[(&str, i64)]) -> Observation {
        let module =
            |(name, users): &(&str, i64)| LoadedModule { name: (*name).to_owned(), users: *users };
        Observation { modules: modules.iter().map(module).collect(), ..Observation::default() }
    }

    fn named(mut observation: Observation, names: &[&str]) -> Observation {
        observation.names = names.iter().map(|name| (*name).to_owned()).collect();
        observation
    }

    #[test]
    fn complaints_are_what_nobody_expects() {
        let records = [
            record(LogLevel::Warning, 0, "mymod: loading out-of-tree module taints kernel."),
            record(LogLevel::Warning, 0, "mymod: module license 'Proprietary' taints kernel."),
            record(LogLevel::Info, 0, "mymod: hello"),
            record(LogLevel::Error, 1, "a program's own"),
            record(LogLevel::Warning, 0, "mymod: odd"),
            record(LogLevel::Error, 0, "mymod: bad"),
        ];
        let odd = [Regex::new("^mymod: odd$").unwrap()];
        assert_eq!(complaints(&records, &odd), ["the kernel logged: [    2.000000] mymod: bad"]);
        assert_eq!(complaints(&records, &[]).len(), 2);
        let mut with_report = records.to_vec();
        with_report.push(record(
            LogLevel::Warning,
            0,
            "WARNING: CPU: 0 PID: 1 at m.c:1 f+0x1/0x2 [m]",
        ));
        // What is no part of the report is still told.
        assert_eq!(complaints(&with_report, &[]), complaints(&records, &[]));
        let many: Vec<LogRecord> = (0..15).map(|_| records[5].clone()).collect();
        assert_eq!(complaints(&many, &[]).last().unwrap(), "the kernel logged: 5 more");
    }

    #[test]
    fn only_new_damage_counts_as_taint() {
        let tainted = |taint| Observation { taint, ..Observation::default() };
        // O and E, of out-of-tree modules without a signature.
        assert!(taints(0, &tainted(3 << 12)).is_empty());
        assert_eq!(
            taints(1 << 9, &tainted((1 << 9) | (1 << 7) | (1 << 12))),
            ["the kernel is tainted: D (the kernel died)"]
        );
    }

    #[test]
    fn users_that_stay_are_told() {
        let (before, now) =
            (with_modules(&[("a", 1), ("b", 0)]), with_modules(&[("a", 2), ("b", 0), ("c", 1)]));
        assert_eq!(users(&before, &now), ["still in use: module a has 2 users and had 1"]);
        assert_eq!(newcomers(&before, &now), ["c"]);
        assert!(is_loaded(&now, "c") && !is_loaded(&before, "c"));
    }

    #[test]
    fn what_is_left_behind_is_told_from_what_others_bring() {
        let before = named(with_modules(&[]), &["/dev/null"]);
        let after = named(with_modules(&[]), &["/dev/null", "/proc/m", "/proc/m/a", "/proc/mx"]);
        assert_eq!(left_behind(&before, &after), ["left behind: /proc/m", "left behind: /proc/mx"]);
        // ext4 was loaded by what the command did, and cannot be unloaded.
        let after = named(with_modules(&[("ext4", 1)]), &["/dev/null", "/proc/fs/ext4"]);
        assert!(left_behind(&before, &after).is_empty());
        let after = named(with_modules(&[]), &["/dev/null", "slab cache m_cache"]);
        assert_eq!(left_behind(&before, &after), ["left behind: slab cache m_cache"]);
    }

    #[test]
    fn the_stack_of_a_stuck_call_is_found() {
        let log = "task:other state:D\nCall Trace:\n <TASK>\n __schedule+0x1/0x2\n other+0x1/0x2\n </TASK>\n\
            task:init state:D\nCall Trace:\n <TASK>\n __schedule+0x4e0/0xbf0\n schedule+0x27/0xc0\n \
            hangs_wait+0x1/0x2 [hangs]\n ? x+0x1/0x2\n __do_sys_delete_module+0x1b8/0x350\n \
            do_syscall_64+0x87/0x1b0\n entry+0x1/0x2\nRIP: 0033:0x7f\n </TASK>";
        let lines: Vec<&str> = log.lines().collect();
        assert_eq!(
            frames_of_module_calls(&lines),
            ["hangs_wait+0x1/0x2 [hangs]", "__do_sys_delete_module+0x1b8/0x350"]
        );
        assert!(frames_of_module_calls(&lines[..6]).is_empty());
    }

    #[test]
    fn memory_is_told_by_who_allocated_it() {
        // No debug information, and no ELF file at all: then addresses have no names, and there are no sections.
        let code = [LoadedCode::new(
            "m",
            Rc::new(ModuleCode::new(Vec::new())),
            &[Section { name: ".text".to_owned(), address: 0x1000 }],
        )];
        let area = |address, caller: &str| Area { address, bytes: 8192, caller: caller.to_owned() };
        let before =
            Observation { areas: vec![area(1, "f+0x1/0x2 [m]")], ..Observation::default() };
        let now = Observation {
            unfreed: vec![Unfreed { call_site: 0x9000, count: 1, bytes: 64 }],
            areas: vec![
                area(1, "f+0x1/0x2 [m]"),
                area(2, "f+0x1/0x2 [m]"),
                area(3, "g+0x1/0x2 [n]"),
            ],
            ..Observation::default()
        };
        assert_eq!(
            not_freed(&before, &now, &code),
            ["not freed: 8192 bytes of vmalloc, allocated in f+0x1/0x2 [m]"]
        );
    }
}
