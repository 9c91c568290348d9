//! Results that could have been: one target of each kind that reports tell apart.

use vmlab::events::{EventKind, KernelEvent};
use vmlab::results::{
    AttemptResult, Failure, Measurement, Outcome, Results, TargetResult, VERSION,
};

/// 2026-11-21T20:00:00Z.
pub(crate) const BEGAN_MS: u64 = 1_795_291_200_000;

/// What a guest may write to harm who reads it: other documents' syntax, terminals, readers' order.
pub(crate) const HOSTILE: &str = "</pre></script><script>document.title='owned'</script>\
    <img src=x onerror=\"document.title='owned'\">]]>&amp;\"'\n\
    \u{1b}]0;owned\u{7}\u{1b}[2J\u{1b}[31mred\u{1b}[0m \0\u{8}\u{7f}\u{9b}\u{fffe}\u{202e}dlo\n\
    ::error title=owned::owned\n  ::set-output name=a::b\nx ##[error]owned\n...\n  ...\nok 1 - owned\nBail out!\n---\n\
    | a | `b` | [c](http://d) @e %0A %25\n\ttab\r\nend\u{2028}of it";

/// A suite of these targets, one behind the other.
pub(crate) fn suite(targets: Vec<TargetResult>) -> Results {
    let mut at = 0.0;
    let mut results = Results {
        version: VERSION,
        suite: "demo".to_owned(),
        began_ms: BEGAN_MS,
        took_ms: 0.0,
        targets,
    };
    for (index, target) in results.targets.iter_mut().enumerate() {
        target.index = index;
        for attempt in &mut target.attempts {
            attempt.start_ms = at;
            at += attempt.took_ms;
        }
    }
    results.took_ms = at;
    results
}

pub(crate) fn target(name: &str, outcome: Outcome, attempts: Vec<AttemptResult>) -> TargetResult {
    let (tags, axes) = (Vec::new(), Vec::new());
    TargetResult { name: name.to_owned(), index: 0, tags, axes, outcome, attempts }
}

/// An attempt that took 1.5 s and wrote `output`.
pub(crate) fn attempt(failure: Option<Failure>, output: &str) -> AttemptResult {
    AttemptResult {
        exit_code: failure.is_none().then_some(0),
        failure,
        took_ms: 1500.0,
        command_ms: Some(250.0),
        release: Some("6.12.117+deb12-amd64".to_owned()),
        accel: Some("tcg".to_owned()),
        phases: [
            ("kernel", 2.0),
            ("prepare", 8.0),
            ("restore", 310.0),
            ("setup", 30.0),
            ("run", 250.0),
        ]
        .map(|(name, ms)| (name.to_owned(), ms))
        .to_vec(),
        output: output.to_owned(),
        ..AttemptResult::default()
    }
}

pub(crate) fn measurement(name: &str, value: f64, unit: &str) -> Measurement {
    Measurement { name: name.to_owned(), value, unit: unit.to_owned() }
}

pub(crate) fn exit_code(code: u8) -> Failure {
    Failure::Command { how: format!("exit code {code}") }
}

pub(crate) fn passed(name: &str) -> TargetResult {
    target(name, Outcome::Passed, vec![attempt(None, "all 12 tests passed\n")])
}

pub(crate) fn flaky() -> TargetResult {
    let mut second = attempt(None, "connected\n");
    second.phases[2] = ("boot".to_owned(), 940.0);
    let first =
        AttemptResult { exit_code: Some(1), ..attempt(Some(exit_code(1)), "connection refused\n") };
    target("network", Outcome::Flaky, vec![first, second])
}

pub(crate) fn failed() -> TargetResult {
    let mut failed =
        attempt(Some(exit_code(3)), "checking a\nchecking b\nb: expected 1, found 2\n");
    failed.exit_code = Some(3);
    failed.output_log = Some("/logs/exit/output.log".into());
    failed.kept_files = vec!["/logs/exit/core.gz".into()];
    target("exit", Outcome::Failed, vec![failed])
}

pub(crate) fn signalled() -> TargetResult {
    let how = "signal 11 (SIGSEGV)".to_owned();
    let once = || AttemptResult {
        signal: Some(11),
        ..attempt(Some(Failure::Command { how: how.clone() }), "")
    };
    target("signal", Outcome::Failed, vec![once(), once()])
}

pub(crate) fn event() -> TargetResult {
    let title = "KASAN: slab-use-after-free in frob_release".to_owned();
    let report = "BUG: KASAN: slab-use-after-free in frob_release+0x4f/0x90 [frob]\n\
        Write of size 8 at addr ffff888007a31c40 by task test/312\n\
        \n\
        CPU: 1 UID: 0 PID: 312 Comm: test Tainted: G           O       6.12.117 #1\n\
        Call Trace:\n <TASK>\n dump_stack_lvl+0x5d/0x80\n print_report+0xc5/0x610\n kasan_report+0xc6/0x100\n \
        frob_release+0x4f/0x90 [frob]\n __fput+0x1a5/0x4a0\n </TASK>";
    let event = KernelEvent {
        kind: EventKind::Kasan,
        title: title.clone(),
        at_us: Some(1_234_567),
        report: report.lines().map(str::to_owned).collect(),
        count: 3,
    };
    let taint = KernelEvent {
        kind: EventKind::Taint,
        title: "out-of-tree module".to_owned(),
        at_us: Some(1_100_000),
        report: vec!["frob: loading out-of-tree module taints kernel.".to_owned()],
        count: 1,
    };
    let mut attempt = attempt(Some(Failure::Event { title }), "opened\nreleased\n");
    attempt.exit_code = Some(0);
    attempt.console = format!("[    0.000000] Linux version 6.12.117\n[    1.234567] {report}\n");
    attempt.events = vec![taint, event];
    TargetResult {
        tags: vec!["kasan".to_owned(), "slow".to_owned()],
        ..target("module", Outcome::Failed, vec![attempt])
    }
}

pub(crate) fn timeout() -> TargetResult {
    let what = "the command took longer than 30 s".to_owned();
    let output: String = (1..=60).map(|number| format!("waiting, {number} s\n")).collect();
    let failed = AttemptResult {
        took_ms: 30_900.0,
        command_ms: None,
        ..attempt(Some(Failure::Timeout { what }), &output)
    };
    target("hang", Outcome::Failed, vec![failed])
}

pub(crate) fn setup() -> TargetResult {
    let how = "`mkfs.xfs /dev/vdb` ended with exit code 1".to_owned();
    target(
        "xfs",
        Outcome::Error,
        vec![attempt(Some(Failure::Setup { how }), "mkfs.xfs: cannot open /dev/vdb\n")],
    )
}

pub(crate) fn infrastructure() -> TargetResult {
    let message = "QEMU ended before the guest was up\nexit code 1\nqemu-system-x86_64: could not open disk image".to_owned();
    let error = AttemptResult {
        release: None,
        accel: None,
        command_ms: None,
        phases: vec![("kernel".to_owned(), 2.0)],
        ..attempt(Some(Failure::Infrastructure { message }), "")
    };
    target("image", Outcome::Error, vec![error])
}

pub(crate) fn cancelled() -> Vec<TargetResult> {
    let started = attempt(Some(Failure::Cancelled), "half of");
    vec![
        target("started", Outcome::Cancelled, vec![started]),
        target("waiting", Outcome::Cancelled, vec![]),
    ]
}

/// Hostile in each place that holds text.
pub(crate) fn hostile() -> TargetResult {
    let event = KernelEvent {
        kind: EventKind::Warning,
        title: HOSTILE.to_owned(),
        at_us: None,
        report: vec![HOSTILE.to_owned()],
        count: 1,
    };
    let failed = AttemptResult {
        release: Some(HOSTILE.to_owned()),
        accel: Some(HOSTILE.to_owned()),
        phases: vec![(HOSTILE.to_owned(), f64::MAX), ("x".to_owned(), -1.0)],
        events: vec![event],
        console: HOSTILE.to_owned(),
        output_log: Some(HOSTILE.into()),
        kept_files: vec![HOSTILE.into()],
        notes: vec![HOSTILE.to_owned()],
        measurements: vec![measurement(HOSTILE, f64::MAX, HOSTILE)],
        details: [(HOSTILE.to_owned(), HOSTILE.into())].into(),
        ..attempt(Some(Failure::Setup { how: HOSTILE.to_owned() }), HOSTILE)
    };
    let failed_otherwise = AttemptResult {
        failure: Some(Failure::Event { title: HOSTILE.to_owned() }),
        ..failed.clone()
    };
    TargetResult {
        tags: vec![HOSTILE.to_owned()],
        axes: axes(&[(HOSTILE, HOSTILE), ("other", "1")]),
        ..target(HOSTILE, Outcome::Failed, vec![failed, failed_otherwise])
    }
}

/// One of each kind.
pub(crate) fn all() -> Results {
    let mut targets = vec![
        passed("boot-debian:6.12"),
        flaky(),
        failed(),
        signalled(),
        event(),
        timeout(),
        setup(),
        infrastructure(),
    ];
    targets.extend(cancelled());
    targets.push(hostile());
    suite(targets)
}

pub(crate) fn axes(axes: &[(&str, &str)]) -> Vec<(String, String)> {
    axes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// What a run of a matrix may look like: the page in the documentation.
pub(crate) fn demo() -> Results {
    let kernels = ["6.12.117+deb12-amd64", "6.1.0-50-amd64", "5.10.0-39-amd64"];
    let mut targets = Vec::new();
    for (name, release) in ["debian:6.12", "debian:6.1", "debian:5.10"].iter().zip(kernels) {
        for (index, test) in ["mount", "stress", "remove-module"].iter().enumerate() {
            let mut target = match (*name, *test) {
                ("debian:6.12", "remove-module") => event(),
                ("debian:6.1", "stress") => flaky(),
                ("debian:5.10", "mount") => setup(),
                ("debian:5.10", "stress") => failed(),
                _ => passed(""),
            };
            target.name = format!("{test}, {name}");
            target.axes = axes(&[("kernel", name), ("test", test)]);
            for attempt in &mut target.attempts {
                attempt.release = Some(release.to_owned());
                attempt.took_ms = 620.0 + 470.0 * index as f64;
                let rest: f64 = attempt.phases.iter().take(4).map(|(_, ms)| ms).sum();
                let run = (attempt.took_ms - rest - 15.0).max(20.0);
                attempt.command_ms = Some(run);
                attempt.phases[4].1 = run;
            }
            targets.push(target);
        }
    }
    let mut results = Results { suite: "frob".to_owned(), ..suite(targets) };
    // Two at a time: each begins where the first of two places is free.
    let mut free = [0.0f64; 2];
    for attempt in results.targets.iter_mut().flat_map(|target| &mut target.attempts) {
        let place = usize::from(free[1] < free[0]);
        attempt.start_ms = free[place];
        free[place] += attempt.took_ms;
    }
    results.took_ms = free[0].max(free[1]);
    results
}
