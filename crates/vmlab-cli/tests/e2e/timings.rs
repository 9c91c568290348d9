//! Where the time of a run went, and boots that are faster at the price of something.

use crate::common::{CLOUD, Outcome, Site, kernel};
use serde_json::Value;

/// A line of the list: where it begins, in milliseconds, who spent the time, and on what.
#[derive(Debug)]
struct Line {
    start_ms: f64,
    track: String,
    depth: usize,
    name: String,
}

/// The lists of a run's stderr: a title, a heading, and lines.
fn lists(outcome: &Outcome) -> Vec<(String, Vec<Line>)> {
    let mut lists: Vec<(String, Vec<Line>)> = Vec::new();
    for text in outcome.stderr_text().lines() {
        if text.ends_with(" in all") {
            lists.push((text.to_owned(), Vec::new()));
        } else if let Some(bar_end) = text.rfind('#') {
            let mut words = text.split_whitespace();
            // A guest's last words have such a character too: the version of its kernel, "#1 SMP".
            let Some(Ok(start)) = words.next().map(str::parse::<f64>) else { continue };
            // From ten seconds on.
            let start_ms = if words.next() == Some("s") { start * 1000.0 } else { start };
            let rest = text[bar_end + 1..].trim_start();
            let (track, name) = rest.split_at(8);
            let depth = (name.len() - name.trim_start().len()) / 2;
            lists.last_mut().unwrap().1.push(Line {
                start_ms,
                track: track.trim().to_owned(),
                depth,
                name: name.trim().to_owned(),
            });
        }
    }
    lists
}

fn svg(site: &Site, look: impl FnOnce(&roxmltree::Document<'_>)) {
    let text = std::fs::read_to_string(site.cwd().join("out.svg")).unwrap();
    look(&roxmltree::Document::parse(&text).unwrap_or_else(|e| panic!("{e}: {text}")));
}

/// Spans of the report, and that each lies in the one that it is a part of.
fn check_nesting(spans: &[Value]) {
    for span in spans {
        let end = |span: &Value| span["start_ms"].as_f64().unwrap() + span["ms"].as_f64().unwrap();
        let inner = span["spans"].as_array().unwrap();
        for part in inner {
            // Guests' times are placed by when messages came, and rounded.
            assert!(part["start_ms"].as_f64() >= span["start_ms"].as_f64(), "{part} in {span}");
            assert!(end(part) <= end(span) + 0.1, "{part} in {span}");
        }
        check_nesting(inner);
    }
}

#[test]
fn a_snapshot_is_taken_and_used_in_phases_of_their_own() {
    let site = Site::new();
    let phases = |options: &[&str]| -> Vec<String> {
        let options = [&["--timings"][..], options].concat();
        let outcome = site.run(&options, ["true"]).output();
        outcome.expect_code(0);
        let of_host = |line: &&Line| line.track == "host" && line.depth == 0;
        let lists = lists(&outcome);
        lists[0].1.iter().filter(of_host).map(|line| line.name.clone()).collect()
    };
    let restored = ["restore", "setup", "run", "stop"];
    assert_eq!(phases(&["--cold"])[2..], [&["boot", "snapshot"][..], &restored].concat());
    assert_eq!(phases(&[])[2..], restored);
}

#[test]
fn the_phases_of_host_kernel_and_agent_are_in_one_list() {
    let site = Site::new();
    let [cloud_6_12, cloud_6_1, cloud_sid] = CLOUD.map(kernel);
    let args = ["run", "-q", "-k", cloud_6_12, "-k", cloud_6_1, "-k", cloud_sid, "-m", "512M"];
    let shown = ["--no-snapshot", "--timings=out.svg", "--json", "report.json"];
    let command = ["--", "sh", "-c", "exit 3"];
    let outcome = site.vmlab(args.iter().chain(&shown).chain(&command)).output();
    outcome.expect_code(3);
    let lists = lists(&outcome);
    assert_eq!(lists.len(), 3, "{}", outcome.stderr_text());
    for (title, lines) in &lists {
        let of = |track: &str, depth: usize| -> Vec<&str> {
            let found = lines.iter().filter(|line| line.track == track && line.depth == depth);
            found.map(|line| line.name.as_str()).collect()
        };
        let phases = ["kernel", "prepare", "boot", "setup", "run", "stop"];
        assert_eq!(of("host", 0), phases, "{title}");
        assert!(of("host", 1).contains(&"hypervisor's start"), "{title}");
        assert_eq!(of("kernel", 1), ["before the kernel's clock", "kernel"], "{title}");
        // Every milestone of the boot was found in this kernel's log.
        let parts = [
            "memory map, firmware tables",
            "allocators, scheduler, interrupts",
            "CPU features",
            "subsystems, ACPI, PCI",
            "drivers",
            "freeing what only the boot needed",
            "start of the agent",
        ];
        assert_eq!(of("kernel", 2), parts, "{title}");
        let agent = of("agent", 1);
        assert_eq!(agent[..2], ["agent", "clock and entropy"], "{title}");
        let steps = ["first mounts", "modules", "channel to the host", "kernel's filesystems"];
        assert_eq!(of("agent", 2), steps, "{title}");
        assert!(of("agent", 3).contains(&"overlay"), "{title}: {lines:?}");
        // Parts begin in order, each kind by itself: modules may be loaded side by side.
        let siblings = |depth: usize| lines.iter().filter(move |line| line.depth == depth);
        for depth in 0..3 {
            assert!(siblings(depth).map(|line| line.start_ms).is_sorted(), "{lines:?}");
        }
    }
    // What 6.1 needs as modules.
    let modules: Vec<_> = lists[1].1.iter().filter(|line| line.depth == 3).collect();
    for module in ["virtio", "virtio_pci", "virtio_console", "fuse", "virtiofs"] {
        assert!(modules.iter().any(|line| line.name == module), "{module}: {modules:?}");
    }

    svg(&site, |document| {
        let labels: Vec<_> = document.descendants().filter_map(|node| node.text()).collect();
        for (_, lines) in &lists {
            for line in lines {
                assert!(labels.contains(&line.name.as_str()), "{}: {labels:?}", line.name);
            }
        }
        let of_class = |class| {
            document
                .descendants()
                .filter(move |node| node.attribute("class") == Some(class))
                .count()
        };
        assert_eq!(of_class("title"), 3);
        for track in ["host", "kernel", "agent"] {
            assert!(of_class(track) > 3, "{track}");
        }
    });

    let text = std::fs::read(site.cwd().join("report.json")).unwrap();
    let json: Value = serde_json::from_slice(&text).unwrap();
    for run in json["runs"].as_array().unwrap() {
        let report = &run["report"];
        let timings = report["timings"].as_array().unwrap();
        check_nesting(timings);
        for (phase, span) in report["phases"].as_array().unwrap().iter().zip(timings) {
            assert_eq!(phase["phase"], span["name"]);
            let differ = phase["ms"].as_f64().unwrap() - span["ms"].as_f64().unwrap();
            assert!(differ.abs() < 0.01, "{phase} {span}");
        }
        let boot = timings[2]["spans"].as_array().unwrap();
        let kernel = boot.iter().find(|span| span["name"] == "kernel").unwrap();
        assert_eq!(kernel["track"], "kernel");
        let ms = |span: &Value| span["ms"].as_f64().unwrap();
        assert!(ms(kernel) > 100.0, "a kernel takes longer: {kernel}");
        let parts: f64 = kernel["spans"].as_array().unwrap().iter().map(ms).sum();
        assert!((parts - ms(kernel)).abs() < ms(kernel) / 10.0, "{parts} of {kernel}");
    }
}

#[test]
fn timings_are_shown_of_failures_too() {
    let site = Site::new();
    let script = "echo c > /proc/sysrq-trigger; sleep 1000";
    let outcome = site.sh(&["--timings"], script).output();
    outcome.expect_code(123);
    let lists = lists(&outcome);
    assert_eq!(lists.len(), 1, "{}", outcome.stderr_text());
    assert!(lists[0].1.iter().any(|line| line.track == "agent"), "{lists:?}");
    let outcome = site.run(&["--timings", "--append", "rdinit=/no-such-init"], ["true"]).output();
    outcome.expect_code(123);
    assert!(outcome.stderr_text().contains("host    boot\n"), "{}", outcome.stderr_text());
}

#[test]
fn a_place_that_cannot_be_drawn_in_costs_no_run() {
    let site = Site::new();
    let outcome = site.run(&["--timings=no/such/dir.svg"], ["touch", "made"]).output();
    outcome.expect_code(125);
    outcome.expect_stderr(&["the timings cannot be drawn in no/such/dir.svg"]);
    assert!(!site.cwd().join("made").exists());
    // The file is not taken to be the command.
    let outcome = site.run(&["--timings"], ["touch", "made"]).output();
    outcome.expect_code(0);
    assert!(site.cwd().join("made").exists());
}

#[test]
fn fast_is_what_it_is_said_to_be_and_nothing_without_it() {
    let site = Site::new();
    let script = "cat /proc/cmdline /sys/devices/system/cpu/vulnerabilities/spectre_v2
        grep -c jitterentropy /proc/crypto; dmesg | grep auto-init";
    let usual = site.sh(&[], script).output().expect_code(0).stdout_text();
    let fast = site.sh(&["--fast", "--append", "last=1"], script).output();
    let fast = fast.expect_code(0).stdout_text();
    for (text, in_fast) in [
        ("mitigations=off", true),
        ("Vulnerable", true),
        ("heap alloc:off", true),
        ("Mitigation:", false),
        ("heap alloc:on", false),
    ] {
        assert_eq!(
            (fast.contains(text), usual.contains(text)),
            (in_fast, !in_fast),
            "{text}: {fast}\n{usual}"
        );
    }
    assert!(fast.lines().any(|line| line == "0"), "{fast}");
    assert!(!usual.lines().any(|line| line == "0"), "{usual}");
    assert!(
        fast.lines().next().unwrap().ends_with(" last=1"),
        "the user has the last word: {fast}"
    );
    // What the kernel says is whole.
    let panics = site.run(&["--fast", "--append", "rdinit=/no-such-init"], ["true"]).output();
    panics.expect_code(123).expect_stderr(&["Kernel panic - not syncing", "Call Trace"]);
    let console = std::fs::read_to_string(newest_console(&site)).unwrap();
    assert!(console.contains("Linux version"), "{console}");
}

/// The console's log of the site's newest run.
fn newest_console(site: &Site) -> std::path::PathBuf {
    let runs = site.state().join("vmlab/runs").read_dir().unwrap();
    let runs = runs.map(|run| run.unwrap().path().join("console.log"));
    runs.max_by_key(|log| log.metadata().unwrap().modified().unwrap()).unwrap()
}

#[test]
fn several_cpus_load_modules_after_what_they_need() {
    let site = Site::new();
    let options = ["--no-snapshot", "-m", "512M", "-c", "2", "--json", "report.json"];
    site.run_with(CLOUD[1], &options, ["true"]).output().expect_code(0);
    let text = std::fs::read(site.cwd().join("report.json")).unwrap();
    let json: Value = serde_json::from_slice(&text).unwrap();
    let boot = json["runs"][0]["report"]["timings"][2]["spans"].as_array().unwrap();
    let named = |spans: &[Value], name: &str| -> Value {
        spans.iter().find(|span| span["name"] == name).unwrap_or_else(|| panic!("{name}")).clone()
    };
    let agent = named(boot, "agent");
    let modules = named(agent["spans"].as_array().unwrap(), "modules");
    let times = |module: &str| {
        let span = named(modules["spans"].as_array().unwrap(), module);
        let start = span["start_ms"].as_f64().unwrap();
        (start, start + span["ms"].as_f64().unwrap())
    };
    for (module, needed) in [
        ("virtio", "virtio_ring"),
        ("virtio_pci", "virtio"),
        ("virtio_pci", "virtio_pci_modern_dev"),
        ("virtiofs", "fuse"),
        ("virtio_console", "virtio"),
    ] {
        assert!(times(module).0 >= times(needed).1 - 0.01, "{module} before {needed}: {modules}");
    }
}
