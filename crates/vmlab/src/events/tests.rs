//! Events of real consoles. Those in tests/*.txt are of guests of vmlab with Debian's kernels 6.1.192, 6.12.117 and
//! 7.2.13, in which a module built for the purpose, SysRq or a damaged filesystem provoked them; registers and
//! lists of memory are left out.

mod bounds;
mod formats;
mod sources;

use super::{
    EventKind, EventKinds, EventReader, KernelEvent, Location, Place, Symbols, decode, parse_kinds,
};

fn events(console: impl AsRef<[u8]>) -> Vec<KernelEvent> {
    let mut reader = EventReader::all();
    reader.feed(console.as_ref());
    reader.into_events()
}

fn titles(events: &[KernelEvent]) -> Vec<(EventKind, &str, u32)> {
    events.iter().map(|event| (event.kind, event.title.as_str(), event.count)).collect()
}

macro_rules! recorded {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!("tests/", $name, ".txt")).as_slice())),*]
    };
}

const RECORDED: [(&str, &[u8]); 33] = recorded![
    "6.1-bug",
    "6.1-divide",
    "6.1-gp",
    "6.1-hung",
    "6.1-irqs",
    "6.1-page",
    "6.1-soft",
    "6.1-stack",
    "6.1-ud",
    "6.1-warn-text",
    "6.12-atomic",
    "6.12-bug",
    "6.12-ext4",
    "6.12-gp",
    "6.12-hung",
    "6.12-int3",
    "6.12-jump",
    "6.12-kfence-uaf",
    "6.12-list",
    "6.12-memcg",
    "6.12-null",
    "6.12-panic",
    "6.12-soft",
    "6.12-stack",
    "6.12-sysrq-f",
    "6.12-sysrq-l",
    "6.12-warn-text",
    "7.2-bounds",
    "7.2-bug",
    "7.2-kfence-oob",
    "7.2-null",
    "7.2-shift",
    "7.2-warn-text",
];

fn recorded(name: &str) -> &'static [u8] {
    RECORDED.iter().find(|(known, _)| *known == name).unwrap().1
}

#[test]
fn real_reports_have_their_kind_and_title() {
    use EventKind::*;
    const NULL: &str = "BUG: unable to handle kernel NULL pointer dereference in";
    let null = format!("{NULL} provoke_null");
    let jump = format!("{NULL} provoke_init");
    let fatal = (Panic, "kernel panic: Fatal exception in interrupt", 1);
    let page = "BUG: unable to handle kernel paging request in provoke_page";
    let gp = (GeneralProtection, "general protection fault in provoke_gp", 1);
    let stack = (Oops, "BUG: stack guard page was hit in provoke_stack", 1);
    let hung = |count| {
        [
            (HungTask, "INFO: task hung in provoke_hung", count),
            (HungTask, "INFO: task hung in provoke_sleeper", count),
        ]
    };
    let warn = (Warning, "WARNING in provoke_warn_text", 1);
    let without_objtool = (Warning, "WARNING in provoke_init", 1);
    let tainted = |letter| match letter {
        'W' => (Taint, "tainted: W (warning)", 1),
        'L' => (Taint, "tainted: L (soft lockup)", 1),
        _ => (Taint, "tainted: B (bad page)", 1),
    };
    type Expected<'a> = Vec<(EventKind, &'a str, u32)>;
    let expected: [(&str, Expected<'_>); 33] = [
        ("6.1-bug", vec![(Bug, "kernel BUG in provoke_bug", 1)]),
        ("6.1-divide", vec![(Oops, "divide error in provoke_divide", 1)]),
        ("6.1-gp", vec![gp]),
        ("6.1-hung", hung(3).to_vec()),
        ("6.1-irqs", vec![(RcuStall, "INFO: rcu detected stall in provoke_irqs", 4)]),
        ("6.1-page", vec![(Oops, page, 1)]),
        (
            "6.1-soft",
            vec![
                (SoftLockup, "BUG: soft lockup in provoke_soft", 2),
                (RcuStall, "INFO: rcu detected stall in provoke_soft", 2),
                tainted('L'),
            ],
        ),
        ("6.1-stack", vec![stack, fatal]),
        ("6.1-ud", vec![(Oops, "invalid opcode in provoke_ud", 1)]),
        ("6.1-warn-text", vec![warn]),
        (
            "6.12-atomic",
            vec![
                (Bug, "BUG: scheduling while atomic in provoke_atomic", 1),
                (Warning, "WARNING in do_one_initcall", 1),
                tainted('W'),
            ],
        ),
        ("6.12-bug", vec![(Bug, "kernel BUG in provoke_bug", 1)]),
        ("6.12-ext4", vec![(FilesystemError, "EXT4-fs error in __ext4_fill_super", 1)]),
        ("6.12-gp", vec![gp]),
        ("6.12-hung", hung(2).to_vec()),
        ("6.12-int3", vec![(Oops, "int3 in provoke_int3", 1), fatal]),
        ("6.12-jump", vec![(Oops, &jump, 1)]),
        (
            "6.12-kfence-uaf",
            vec![(Kfence, "KFENCE: use-after-free read in provoke_kfence", 3), tainted('B')],
        ),
        ("6.12-list", vec![(Bug, "BUG: corrupted list in provoke_list", 1)]),
        ("6.12-memcg", vec![(OomKill, "OOM kill in memory cgroup: perl", 1)]),
        ("6.12-null", vec![(Oops, &null, 1)]),
        ("6.12-panic", vec![(Panic, "kernel panic: provoked N", 1)]),
        ("6.12-soft", vec![(SoftLockup, "BUG: soft lockup in provoke_soft", 3), tainted('L')]),
        ("6.12-stack", vec![stack, fatal]),
        ("6.12-sysrq-f", vec![(OomKill, "OOM kill: bash", 1)]),
        // All CPUs' traces, because somebody asked for them.
        ("6.12-sysrq-l", vec![]),
        ("6.12-warn-text", vec![warn]),
        // That module was built without objtool, which the kernel warns of, too.
        (
            "7.2-bounds",
            vec![(Ubsan, "UBSAN: array-index-out-of-bounds in provoke_bounds", 1), without_objtool],
        ),
        ("7.2-bug", vec![(Bug, "kernel BUG in provoke_bug", 1)]),
        (
            "7.2-kfence-oob",
            vec![
                (Kfence, "KFENCE: memory corruption in provoke_kfence", 3),
                (Kfence, "KFENCE: out-of-bounds write in provoke_kfence", 1),
                tainted('B'),
            ],
        ),
        ("7.2-null", vec![(Oops, &null, 1)]),
        (
            "7.2-shift",
            vec![(Ubsan, "UBSAN: shift-out-of-bounds in provoke_shift", 1), without_objtool],
        ),
        ("7.2-warn-text", vec![warn, without_objtool, tainted('W')]),
    ];
    for (name, expected) in expected {
        assert_eq!(titles(&events(recorded(name))), expected, "{name}");
    }
}

#[test]
fn it_does_not_matter_how_the_bytes_are_cut() {
    for (name, console) in RECORDED {
        let whole = events(console);
        for size in [1, 7, 100, 1021] {
            let mut reader = EventReader::all();
            console.chunks(size).for_each(|piece| reader.feed(piece));
            assert_eq!(reader.into_events(), whole, "{name} in pieces of {size}");
        }
    }
}

/// The first and the last line of a recorded console's first report.
fn ends_of(name: &str) -> (String, String) {
    let event = events(recorded(name)).remove(0);
    (event.report.first().unwrap().clone(), event.report.last().unwrap().clone())
}

#[test]
fn reports_are_whole_and_end() {
    let is = |name, first: &str, last: &str| {
        let ends = ends_of(name);
        assert!(ends.0.starts_with(first) && ends.1.starts_with(last), "{name}: {ends:?}");
    };
    is("6.12-null", "BUG: kernel NULL pointer", "note: insmod[124] exited with irqs disabled");
    is("6.1-bug", "------------[ cut here ]", "CR2: ");
    is("6.12-warn-text", "------------[ cut here ]", "---[ end trace 0000000000000000 ]---");
    is("6.12-list", "list_del corruption.", "CR2: ");
    is("6.12-kfence-uaf", "======", "======");
    is("6.12-memcg", "perl invoked oom-killer:", "Memory cgroup out of memory: Killed process 126");
    is("6.12-hung", "INFO: task insmod:126 blocked", " </TASK>");
    is("6.12-ext4", "EXT4-fs error (device loop0)", "EXT4-fs error (device loop0)");
    let warning = events(recorded("6.12-warn-text")).remove(0);
    assert_eq!(
        (warning.report[1].as_str(), warning.at_us),
        ("provoked number 7", Some(12_911_684))
    );
}

#[test]
fn a_panic_is_of_the_report_before_it_and_an_event_too() {
    let events = events(recorded("6.12-int3"));
    let [oops, panic] = &events[..] else { panic!("{events:?}") };
    let said = "Kernel panic - not syncing: Fatal exception in interrupt";
    assert_eq!(oops.report[0], "Oops: int3: 0000 [#1] PREEMPT SMP NOPTI");
    assert_eq!(panic.report[0], said);
    assert!(oops.report.ends_with(&panic.report), "{oops:?}");
}

#[test]
fn reading_goes_on_and_repeats_are_counted() {
    let mut reader = EventReader::all();
    reader.feed(recorded("6.12-kfence-uaf"));
    let first = reader.events()[0].clone();
    // Of 6.1, so that the clock does not go on: a kernel starts first.
    reader.feed(recorded("6.1-gp"));
    reader.feed(recorded("6.12-kfence-uaf"));
    reader.finish();
    let count = 2 * events(recorded("6.12-kfence-uaf"))[0].count;
    assert_eq!(reader.events()[0], KernelEvent { count, ..first });
    assert!(reader.events().iter().any(|e| e.kind == EventKind::GeneralProtection));
}

#[test]
fn a_log_that_is_shown_again_counts_once() {
    let console = recorded("6.12-kfence-uaf");
    let once = events(console);
    let first_line = console.iter().position(|b| *b == b'\n').unwrap() + 1;
    assert_eq!(events([console, &console[first_line..]].concat()), once);
}

#[test]
fn a_report_that_goes_on_is_seen_before_it_ends() {
    let mut reader = EventReader::all();
    reader.feed(b"[    1.000000] Kernel panic - not syncing: x\n[    1.100000] CPU: 0 PID: 1");
    assert_eq!(reader.unfinished(), EventKinds::from([EventKind::Panic]));
    assert!(reader.events().is_empty());
    reader.finish();
    assert_eq!(reader.events()[0].report.last().unwrap(), "CPU: 0 PID: 1");
    reader.feed(b"\n[    1.200000] Kernel panic - not syncing: x\n");
    reader.finish();
    assert_eq!(reader.events()[0].count, 2);
}

#[test]
fn only_kinds_that_were_asked_for_are_kept() {
    let mut reader = EventReader::new(EventKinds::from([EventKind::Panic]));
    reader.feed(recorded("6.12-int3"));
    reader.finish();
    let fatal = "kernel panic: Fatal exception in interrupt";
    assert_eq!(titles(reader.events()), [(EventKind::Panic, fatal, 1)]);
}

#[test]
fn kinds_have_the_same_names_everywhere() {
    for kind in EventKind::ALL {
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        assert_eq!(kind.name().parse(), Ok(kind));
        assert_eq!(format!("{kind:>20}"), format!("{:>20}", kind.name()));
    }
    let all = EventKinds::from(EventKind::ALL);
    assert_eq!(all.len(), EventKind::ALL.len(), "one is there twice");
    assert_eq!(parse_kinds(["all"]), Ok(all));
    assert_eq!(parse_kinds(["default"]), Ok(super::default_kinds()));
    assert_eq!(parse_kinds(["none"]), Ok(EventKinds::new()));
    assert_eq!(parse_kinds([] as [&str; 0]), Ok(EventKinds::new()));
    use EventKind::*;
    let some = EventKinds::from([Warning, HungTask, SoftLockup, HardLockup, RcuStall]);
    assert_eq!(parse_kinds(["warning", "lockups"]), Ok(some));
    let sanitizers = parse_kinds(["sanitizers"]).unwrap();
    assert!(sanitizers.contains(&Kasan) && !sanitizers.contains(&Oops));
    assert!(sanitizers.is_subset(&super::default_kinds()));
}

#[test]
fn a_wrong_name_gets_the_nearest() {
    let wrong = parse_kinds(["panic", "sanitizer"]).unwrap_err();
    assert_eq!(wrong.nearest, Some("sanitizers"));
    let said = wrong.to_string();
    assert!(
        said.starts_with("there is no kind of event \"sanitizer\", did you mean \"sanitizers\"?")
    );
    assert!(said.contains("hung-task") && said.contains("lockups"), "{said}");
    let wrong = "lockups".parse::<EventKind>().unwrap_err();
    assert!(!wrong.known.contains(&"lockups"), "one kind is wanted");
    assert_eq!(parse_kinds(["Panik!!"]).unwrap_err().nearest, None);
}

/// Knows one function, as debug information would.
struct One;

impl Symbols for One {
    fn locate(&self, place: &Place<'_>) -> Vec<Location> {
        let known =
            Place { function: "provoke_null", offset: 5, size: 0x20, module: Some("provoke") };
        let line = |line, inlined: Option<&str>| Location {
            file: "provoke.c".to_owned(),
            line,
            inlined: inlined.map(str::to_owned),
        };
        match *place {
            place if place == known => vec![line(25, None)],
            // What comes behind the call is another line.
            Place { function: "do_one_initcall", offset: 0x5a, .. } => {
                vec![line(3, Some("inner")), line(7, None)]
            }
            _ => Vec::new(),
        }
    }
}

#[test]
fn reports_are_decoded_as_far_as_symbols_are_known() {
    let event = events(recorded("6.12-null")).remove(0);
    let decoded = decode(&event.report, &One);
    let changed: Vec<_> = decoded.iter().filter(|line| !event.report.contains(line)).collect();
    let wanted = "RIP: 0010:provoke_null+0x5/0x20 [provoke] (provoke.c:25)";
    let inlined = " do_one_initcall+0x5b/0x320 (provoke.c:3 in inner, inlined at provoke.c:7)";
    assert_eq!(changed, [wanted, inlined, wanted]);
    assert_eq!(decoded.len(), event.report.len());
}
