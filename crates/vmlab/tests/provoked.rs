//! Events of kernels that a module damages, in each way that the distribution's kernel can report.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use vmlab::artifacts::module_build::{self, ModuleBuild, ModuleSource};
use vmlab::artifacts::{Cache, Kernel, KernelStore, Silent};
use vmlab::budget::Slots;
use vmlab::events::EventKind::{
    self, Bug, GeneralProtection, HungTask, Kfence, Oops, Panic, RcuStall, SoftLockup, Taint,
    Warning,
};
use vmlab::events::{EventReader, KernelEvent, decode};
use vmlab::results::TargetResult;
use vmlab::runner::{Observer, Runner, RunnerOptions};
use vmlab::units::{Bytes, MIB};
use vmlab::{AccelChoice, DebugInfo, Environment, Error, Share, SnapshotMode, Vm, VmBuilder};

const KERNEL: &str = "debian:6.12";

/// How long a VM may take on a busy machine, of which the guest itself takes 15 s at most.
const PATIENCE: Duration = Duration::from_secs(240);

/// How many VMs at once.
const JOBS: usize = 2;

/// The module, built for the kernel.
fn module(kernel: &Kernel) -> ModuleBuild {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/provoke");
    let cache = Cache::open_default().unwrap();
    let tree = KernelStore::open(cache.clone()).build_tree(kernel, &Silent).unwrap();
    let source = ModuleSource::open(&sources).unwrap();
    module_build::build(&cache, &source, &tree, &Silent).unwrap()
}

/// What happens in a guest that loads the module with this parameter, after a script.
fn provoke(builder: VmBuilder, what: &str, before: &str) -> Vec<KernelEvent> {
    let vm = builder.start().unwrap();
    let console = vm.console().subscribe();
    let script = format!("{before}\ninsmod /mnt/provoke/provoke.ko what={what} 2>&1");
    match vm.exec(["sh", "-c", &script]) {
        Ok(output) => {
            let said = output.stdout_text();
            assert!(!output.status.success(), "{what}: the module was loaded: {said}");
            // One whose task was killed leaves what it held locked.
            let _ = vm.shutdown();
        }
        Err(Error::Ended { .. }) => {}
        Err(e) => panic!("{what}: {e}"),
    }
    let mut reader = EventReader::all();
    console.iter().for_each(|bytes| reader.feed(&bytes));
    reader.into_events()
}

/// What provokes something, a script before it, the events, and kinds that may come of them.
type Case = (&'static str, &'static str, Vec<(EventKind, String)>, &'static [EventKind]);

fn cases() -> Vec<Case> {
    let one = |kind, title: &str| vec![(kind, title.to_owned())];
    let fatal = (Panic, "kernel panic: Fatal exception in interrupt".to_owned());
    let fatal_after = |title: &str| vec![(Oops, title.to_owned()), fatal.clone()];
    let unable = "BUG: unable to handle kernel";
    let hung = ["provoke_hung", "provoke_sleeper"];
    vec![
        // The two that take long begin first.
        (
            "hung",
            "echo 4 > /proc/sys/kernel/hung_task_timeout_secs",
            hung.map(|name| (HungTask, format!("INFO: task hung in {name}"))).to_vec(),
            &[],
        ),
        (
            "soft",
            "echo 4 > /proc/sys/kernel/watchdog_thresh",
            one(SoftLockup, "BUG: soft lockup in provoke_soft"),
            &[RcuStall],
        ),
        (
            "kfence",
            "echo 1 > /sys/module/kfence/parameters/sample_interval",
            one(Kfence, "KFENCE: use-after-free read in provoke_kfence"),
            &[],
        ),
        ("warn", "", one(Warning, "WARNING in provoke_warn"), &[]),
        ("bug", "", one(Bug, "kernel BUG in provoke_bug"), &[]),
        (
            "null",
            "",
            one(Oops, &format!("{unable} NULL pointer dereference in provoke_write")),
            &[],
        ),
        ("page", "", one(Oops, &format!("{unable} paging request in provoke_write")), &[]),
        (
            "general-protection",
            "",
            one(GeneralProtection, "general protection fault in provoke_write"),
            &[],
        ),
        ("divide", "", one(Oops, "divide error in provoke_divide"), &[]),
        ("int3", "", fatal_after("int3 in provoke_int3"), &[]),
        // The counter of preemption is not what it was.
        ("atomic", "", one(Bug, "BUG: scheduling while atomic in provoke_atomic"), &[Warning]),
        ("list", "", one(Bug, "BUG: corrupted list in provoke_list"), &[]),
        ("stack", "", fatal_after("BUG: stack guard page was hit in provoke_stack"), &[]),
        ("panic", "", one(Panic, "kernel panic: provoked N"), &[]),
    ]
}

/// The function of the module in which something happens, and the line of its source, counted from 1.
fn line_of(what: &str) -> Option<(&'static str, usize)> {
    let (function, code) = match what {
        "warn" => ("provoke_warn", "WARN(n >= 0,"),
        "bug" => ("provoke_bug", "BUG();"),
        "null" => ("provoke_write", "*(volatile int *)address = 1;"),
        "divide" => ("provoke_divide", "asm volatile(\"xor %%ecx"),
        _ => return None,
    };
    let source = include_str!("provoke/provoke.c");
    let line = source.lines().position(|line| line.trim().starts_with(code)).unwrap() + 1;
    Some((function, line))
}

#[test]
fn each_way_to_damage_a_kernel_is_recognised() {
    let logs = TempDir::new().unwrap();
    // SAFETY: this is the only test of this program; all that reads the environment meanwhile goes through the
    // standard library, which locks it.
    unsafe { std::env::set_var("XDG_STATE_HOME", logs.path()) };
    let builder = || {
        let builder = Vm::builder().kernel(KERNEL).memory(Bytes(512 * MIB)).cpus(2);
        builder.accel(AccelChoice::Tcg).share_cwd(false).timeout(PATIENCE)
    };
    let prepared = builder().prepare().unwrap();
    let module = module(prepared.kernel().unwrap());
    let dir = module.dir.canonicalize().unwrap();

    let left = Mutex::new(cases().into_iter());
    let work = || {
        loop {
            let next = left.lock().unwrap().next();
            let Some((what, before, expected, also)) = next else { break };
            let share = Share::new(&dir).at("/mnt/provoke").read_only();
            let found = provoke(builder().share(share), what, before);
            let of_it = |event: &&KernelEvent| event.kind != Taint && !also.contains(&event.kind);
            let titles: Vec<_> =
                found.iter().filter(of_it).map(|event| (event.kind, event.title.clone())).collect();
            assert_eq!(titles, expected, "{what}: {found:#?}");
            if let Some((function, line)) = line_of(what) {
                let info = DebugInfo::of(prepared.kernel().unwrap(), [dir.clone()]);
                let report = &found.iter().find(of_it).unwrap().report;
                let decoded = decode(report, &info.symbols());
                let begin = format!("RIP: 0010:{function}");
                let place = decoded.iter().find(|line| line.starts_with(&begin));
                let place = place.unwrap_or_else(|| panic!("{what}: {decoded:#?}"));
                assert!(place.ends_with(&format!("/provoke.c:{line})")), "{what}: {decoded:#?}");
                // Without debug information of the kernel itself, its functions stay as they are.
                let kernels = report.iter().find(|line| line.contains("do_one_initcall+"));
                let stays = decoded.contains(kernels.unwrap());
                assert_eq!(stays, info.vmlinux().is_err(), "{decoded:#?}");
            }
        }
    };
    std::thread::scope(|scope| (0..JOBS).for_each(|_| drop(scope.spawn(work))));
    reports_of_targets_have_lines(&dir);
}

/// What a target of a file reports: the module is in the directory that the command starts in.
fn reports_of_targets_have_lines(dir: &Path) {
    let file = TempDir::new().unwrap();
    let path = file.path().join("vmlab.toml");
    let text = format!(
        "[[target]]\nname = \"warns\"\nkernel = \"{KERNEL}\"\nmemory = \"512M\"\ncwd = \"{}\"\n\
         command = \"insmod ./provoke.ko what=warn\"\n",
        dir.display()
    );
    std::fs::write(&path, text).unwrap();
    let mut environment = Environment::of_caller().unwrap();
    environment.cwd = dir.to_owned();
    let options = RunnerOptions {
        suite: String::new(),
        slots: Slots::Count(1),
        memory: None,
        fail_fast: false,
        timeout: Some(PATIENCE),
        environment,
        snapshots: SnapshotMode::Use,
        cache_dir: None,
    };
    let targets = vmlab::targets::load(&path).unwrap().targets;
    let results = Runner::new(targets, options, Arc::new(Nobody)).run().unwrap();
    let events = &results.targets[0].attempts[0].events;
    let warning = events.iter().find(|event| event.kind == Warning).unwrap();
    let (function, line) = line_of("warn").unwrap();
    let begin = format!("RIP: 0010:{function}");
    let place = warning.report.iter().find(|line| line.starts_with(&begin)).unwrap();
    assert!(place.ends_with(&format!("/provoke.c:{line})")), "{:#?}", warning.report);
}

/// Whom nothing is told.
#[derive(Debug)]
struct Nobody;

impl Observer for Nobody {
    fn started(&self, _: usize, _: u32) {}
    fn phase(&self, _: usize, _: &str) {}
    fn note(&self, _: usize, _: &str) {}
    fn output(&self, _: usize, _: &[u8]) {}
    fn ended(&self, _: usize, _: &TargetResult) {}
}
