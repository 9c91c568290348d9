//! Targets, run in real VMs through the library.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmlab::budget::Slots;
use vmlab::events::EventKind;
use vmlab::results::{Failure, Outcome, Results, TargetResult};
use vmlab::runner::{Observer, Runner, RunnerOptions};
use vmlab::targets::{RunSpec, System, Target, TargetCommand, VerdictSpec, VmSpec};
use vmlab::{Environment, RootMode, SnapshotMode};

const KERNEL: &str = "debian:6.12";

/// What an observer was told, a line each.
#[derive(Debug, Default)]
struct Told {
    lines: Mutex<Vec<String>>,
    on_output: Mutex<Option<Arc<Runner>>>,
}

impl Told {
    fn say(&self, line: String) {
        self.lines.lock().unwrap().push(line);
    }
}

impl Observer for Told {
    fn started(&self, target: usize, attempt: u32) {
        self.say(format!("{target} attempt {attempt}"));
    }

    fn phase(&self, target: usize, phase: &str) {
        self.say(format!("{target} is in {phase}"));
    }

    fn note(&self, target: usize, text: &str) {
        self.say(format!("{target} notes {text}"));
    }

    fn output(&self, target: usize, bytes: &[u8]) {
        self.say(format!("{target} wrote {}", String::from_utf8_lossy(bytes).trim_end()));
        if let Some(runner) = &*self.on_output.lock().unwrap() {
            runner.cancel();
        }
    }

    fn ended(&self, target: usize, result: &TargetResult) {
        self.say(format!("{target} ended {:?}", result.outcome));
    }
}

fn target(name: &str, script: &str) -> Target {
    Target {
        name: name.to_owned(),
        tags: BTreeSet::new(),
        axes: Vec::new(),
        system: System::Kernel {
            spec: Some(KERNEL.to_owned()),
            rootfs: PathBuf::from("/"),
            root_mode: RootMode::Overlay,
        },
        vm: VmSpec::default(),
        run: RunSpec {
            command: TargetCommand::Script(script.to_owned()),
            module: None,
            cwd: None,
            env: [("GIVEN".to_owned(), "a b".to_owned())].into(),
            user: "root".to_owned(),
            setup: Vec::new(),
            teardown: Vec::new(),
            keep_on_failure: Vec::new(),
        },
        verdict: VerdictSpec {
            timeout: Some(Duration::from_secs(60)),
            retries: 0,
            should_fail: false,
            fail_on: Default::default(),
            expect: None,
        },
    }
}

fn options() -> RunnerOptions {
    RunnerOptions {
        suite: "tests".to_owned(),
        slots: Slots::Count(2),
        memory: None,
        fail_fast: false,
        timeout: None,
        environment: Environment::of_caller().unwrap(),
        snapshots: SnapshotMode::Use,
        cache_dir: None,
    }
}

fn run(targets: Vec<Target>, options: RunnerOptions) -> (Results, Vec<String>) {
    let told = Arc::new(Told::default());
    let results = Runner::new(targets, options, told.clone()).run().unwrap();
    let lines = std::mem::take(&mut *told.lines.lock().unwrap());
    (results, lines)
}

fn failure(result: &TargetResult) -> &Failure {
    result.attempts.last().unwrap().failure.as_ref().unwrap()
}

#[test]
fn targets_pass_fail_and_are_tried_again() {
    let shared = tempfile::tempdir().unwrap();
    let mark = shared.path().join("mark");
    let share = vmlab::Share::new(shared.path()).at("/mnt/shared");
    let mut flaky =
        target("flaky", "[ -e /mnt/shared/mark ] || { touch /mnt/shared/mark; exit 7; }");
    flaky.vm.shares.push(share);
    flaky.verdict.retries = 3;
    let mut never = target("never", "echo try $VMLAB_ATTEMPT; kill -9 $$");
    never.verdict.retries = 1;
    let mut should_fail = target("should fail", "false");
    should_fail.verdict.should_fail = true;
    let mut passes = target("should fail, too", "true");
    passes.verdict.should_fail = true;
    let program = ["sh", "-c", "echo \"$0 $GIVEN $VMLAB_TARGET\"; uname -r"];
    let mut words = target("words", "");
    words.run.command = TargetCommand::Program(program.map(Into::into).to_vec());
    let missing = {
        let mut missing = target("missing", "");
        missing.run.command = TargetCommand::Program(vec!["no-such-program".into()]);
        missing
    };
    let targets = vec![flaky, never, should_fail, passes, words, missing];
    let (results, lines) = run(targets, options());
    assert!(mark.exists());
    let outcomes: Vec<_> = results.targets.iter().map(|target| target.outcome).collect();
    use Outcome::{Failed, Flaky, Passed};
    assert_eq!(outcomes, [Flaky, Failed, Passed, Failed, Passed, Failed], "{lines:#?}");
    let [flaky, never, _, passes, words, missing] = &results.targets[..] else { panic!() };
    assert_eq!(flaky.attempts.len(), 2);
    assert_eq!(flaky.attempts[0].exit_code, Some(7));
    assert_eq!(flaky.attempts[0].failure, Some(Failure::Command { how: "exit code 7".into() }));
    assert_eq!(never.attempts.len(), 2);
    let outputs: Vec<_> = never.attempts.iter().map(|attempt| attempt.output.as_str()).collect();
    assert_eq!(outputs, ["try 1\n", "try 2\n"]);
    assert_eq!((never.attempts[1].signal, never.attempts[1].exit_code), (Some(9), Some(137)));
    assert_eq!(*failure(passes), Failure::UnexpectedSuccess);
    let release = words.attempts[0].release.clone().unwrap();
    assert_eq!(words.attempts[0].output, format!("sh a b words\n{release}\n"));
    assert!(words.attempts[0].phases.iter().any(|(phase, _)| phase == "run"));
    assert!(words.attempts[0].console.contains("Linux version"));
    let Failure::Command { how } = failure(missing) else { panic!("{missing:?}") };
    assert_eq!(how, "no-such-program: command not found in the guest");
    for line in ["0 attempt 2", "1 wrote try 2", "5 ended Failed"] {
        assert!(lines.iter().any(|told| told == line), "{line}: {lines:#?}");
    }
}

#[test]
fn what_is_around_a_command_runs_in_its_order() {
    let mut good = target("good", "cat /tmp/made; echo command");
    good.run.setup = vec!["echo one > /tmp/made".into(), "echo two >> /tmp/made".into()];
    good.run.teardown = vec!["echo after".into(), "exit 9".into()];
    let mut bad = target("bad", "echo never");
    bad.run.setup = vec!["echo before".into(), "exit 3\n# no more".into(), "echo never".into()];
    bad.run.teardown = vec!["echo after".into()];
    bad.run.keep_on_failure = vec!["/tmp/nothing*".into(), "/etc/host*name".into()];
    let mut slow = target("slow", "trap '' TERM; echo going; sleep 1000");
    slow.verdict.timeout = Some(Duration::from_secs(5));
    slow.run.teardown = vec!["echo after".into()];
    let began = Instant::now();
    let (results, _) = run(vec![good, bad, slow], options());
    assert!(began.elapsed() < Duration::from_secs(100));
    let [good, bad, slow] = &results.targets[..] else { panic!() };
    assert_eq!(good.outcome, Outcome::Passed);
    assert_eq!(good.attempts[0].output, "one\ntwo\ncommand\nafter\n");
    assert_eq!(good.attempts[0].notes, ["after the command, `exit 9`: exit code 9"]);
    assert_eq!(*failure(bad), Failure::Setup { how: "`exit 3`: exit code 3".into() });
    assert_eq!(bad.attempts[0].output, "before\nafter\n");
    let kept = &bad.attempts[0].kept_files;
    assert_eq!(kept.len(), 1, "{bad:#?}");
    assert!(kept[0].ends_with("files/etc/hostname"));
    assert!(std::fs::read_to_string(&kept[0]).unwrap().starts_with("vmlab-"));
    let what = "the command took longer than 5 s".to_owned();
    assert_eq!(*failure(slow), Failure::Timeout { what });
    assert_eq!(slow.attempts[0].output, "going\nafter\n");
}

#[test]
fn an_event_fails_a_target_while_its_report_is_still_written() {
    // As the kernel would say it, and without an end.
    let line = "WARNING: CPU: 0 PID: 1 at fs/x.c:1 provoked+0x1/0x2";
    let mut warned = target("warned", &format!("echo '{line}' > /dev/kmsg"));
    warned.verdict.fail_on = [EventKind::Warning].into();
    warned.run.keep_on_failure = vec!["/etc/hostname".into()];
    let mut heedless = warned.clone();
    heedless.name = "heedless".into();
    heedless.verdict.fail_on = [EventKind::Panic].into();
    let (results, _) = run(vec![warned, heedless], options());
    let [warned, heedless] = &results.targets[..] else { panic!() };
    assert_eq!(*failure(warned), Failure::Event { title: "WARNING in provoked".into() });
    assert_eq!(warned.attempts[0].exit_code, Some(0));
    assert_eq!(warned.attempts[0].kept_files.len(), 1, "{warned:#?}");
    // It is told all the same.
    assert_eq!(heedless.outcome, Outcome::Passed);
    assert_eq!(heedless.attempts[0].events[0].kind, EventKind::Warning);
    assert!(heedless.attempts[0].kept_files.is_empty());
}

#[test]
fn guests_that_end_and_targets_that_cannot_run() {
    let panic = target("panic", "echo c > /proc/sysrq-trigger; sleep 1000");
    let reset = target("reset", "echo b > /proc/sysrq-trigger; sleep 1000");
    let mut no_kernel = target("no kernel", "true");
    no_kernel.system = System::Kernel {
        spec: Some("./no-such-kernel".into()),
        rootfs: PathBuf::from("/"),
        root_mode: RootMode::Overlay,
    };
    no_kernel.verdict.retries = 5;
    let (results, _) = run(vec![panic, reset, no_kernel], options());
    let [panic, reset, no_kernel] = &results.targets[..] else { panic!() };
    let Failure::GuestEnded { how } = failure(panic) else { panic!("{panic:#?}") };
    assert!(how.contains("sysrq triggered crash"), "{how}");
    assert!(panic.attempts[0].console.contains("Kernel panic"));
    let Failure::GuestEnded { how } = failure(reset) else { panic!("{reset:#?}") };
    assert!(how.contains("reset itself"), "{how}");
    // Nothing is gained by trying that again.
    assert_eq!((no_kernel.outcome, no_kernel.attempts.len()), (Outcome::Error, 1));
    let Failure::Infrastructure { message } = failure(no_kernel) else { panic!("{no_kernel:#?}") };
    assert!(message.contains("no-such-kernel"), "{message}");
}

#[test]
fn everything_can_be_ended_before_it_is_done() {
    let wait = || target("waits", "echo going; sleep 1000");
    let told = Arc::new(Told::default());
    let runner = Arc::new(Runner::new(vec![wait(), wait(), wait()], options(), told.clone()));
    *told.on_output.lock().unwrap() = Some(Arc::clone(&runner));
    let results = runner.run().unwrap();
    told.on_output.lock().unwrap().take();
    assert!(results.targets.iter().all(|target| target.outcome == Outcome::Cancelled));
    assert_eq!(results.targets.len(), 3);
    assert_eq!(results.targets[2].attempts.len(), 0);

    let fails = target("fails", "exit 1");
    let all = RunnerOptions { fail_fast: true, ..options() };
    let (results, _) = run(vec![wait(), fails, wait()], all);
    let outcomes: Vec<_> = results.targets.iter().map(|target| target.outcome).collect();
    assert_eq!(outcomes, [Outcome::Cancelled, Outcome::Failed, Outcome::Cancelled]);

    let all = RunnerOptions { timeout: Some(Duration::from_secs(5)), ..options() };
    let began = Instant::now();
    let (results, _) = run(vec![wait()], all);
    assert!(began.elapsed() < Duration::from_secs(60));
    let what = "all targets together took longer than 5 s".to_owned();
    assert_eq!(*failure(&results.targets[0]), Failure::Timeout { what });
}
