//! `vmlab module`: modules are built, loaded, used and unloaded, and each fault of the examples is told.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::{DEBIAN_6_1, DEBIAN_6_12, Outcome, Site, kernel, need};

/// A copy of an example, since some tests change it, and all need a directory that their guests may see.
fn example(site: &Site, name: &str) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/modules").join(name);
    let to = site.cwd().join(name);
    copy(&from, &to);
    to
}

/// Copies what is a source, and not what builds have left there.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for item in std::fs::read_dir(from).unwrap() {
        let path = item.unwrap().path();
        let place = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true if path.ends_with("target") => {}
            true => copy(&path, &place),
            false if path.ends_with("tests/number") => {}
            false => _ = std::fs::copy(&path, place).unwrap(),
        }
    }
}

fn site() -> Site {
    kernel(DEBIAN_6_1);
    kernel(DEBIAN_6_12);
    for program in ["make", "gcc"] {
        need(program, program);
    }
    Site::new()
}

/// Tests an example under both kernels, with these arguments behind.
fn test(site: &Site, name: &str, more: &[&str]) -> Outcome {
    example(site, name);
    let kernels = ["-k", DEBIAN_6_1, "-k", DEBIAN_6_12, "--json", "out.json"];
    let arguments = ["module", "test", name].into_iter().chain(kernels).chain(more.iter().copied());
    site.vmlab(arguments).output()
}

/// The only attempt under each kernel, the older one first.
fn attempts(site: &Site) -> [Value; 2] {
    let text = std::fs::read(site.cwd().join("out.json")).unwrap();
    let all: Value = serde_json::from_slice(&text).unwrap();
    [0, 1].map(|index| all["targets"][index]["attempts"][0].clone())
}

/// The line of an example that has this in it, from 1 on.
fn line_of(site: &Site, name: &str, text: &str) -> usize {
    let source = std::fs::read_to_string(site.cwd().join(name).join(format!("{name}.c"))).unwrap();
    source.lines().position(|line| line.contains(text)).unwrap() + 1
}

/// How that line is named in reports.
fn place_of(site: &Site, name: &str, text: &str) -> String {
    let dir = site.cwd().canonicalize().unwrap();
    format!("{}/{name}/{name}.c:{})", dir.display(), line_of(site, name, text))
}

#[test]
fn a_module_that_is_as_it_should_be_passes() {
    let site = site();
    let more = ["--param", "start=5", "--junit", "out.xml", "--", "good/tests/proc.sh", "5"];
    let outcome = test(&site, "good", &more);
    outcome.expect_code(0);
    let text = outcome.stdout_text();
    for wanted in ["ok        good[debian:6.1] (", "ok        good[debian:6.12] (", "2 passed in "]
    {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    for attempt in attempts(&site) {
        assert_eq!(attempt["output"], "all as it should be\n");
        assert!(attempt["build_ms"].as_f64().unwrap() > 0.0, "{attempt}");
        assert_eq!(attempt["notes"], Value::Array(vec![]));
        let phases: Vec<&str> = attempt["phases"]
            .as_array()
            .unwrap()
            .iter()
            .map(|phase| phase[0].as_str().unwrap())
            .collect();
        assert!(phases.ends_with(&["load", "use", "unload"]), "{phases:?}");
    }
    let junit = std::fs::read_to_string(site.cwd().join("out.xml")).unwrap();
    assert!(junit.contains("<testcase name=\"good[debian:6.12]\" classname=\"good\""), "{junit}");
    // The sources are alone.
    let mut names: Vec<_> = std::fs::read_dir(site.cwd().join("good"))
        .unwrap()
        .map(|item| item.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["Kbuild", "good.c", "tests"]);
}

#[test]
fn a_modules_own_tests_are_built_and_run() {
    let site = site();
    test(&site, "good", &[]).expect_code(0);
    for attempt in attempts(&site) {
        let output = attempt["output"].as_str().unwrap();
        for wanted in [
            "# good_tests\n",
            "test tests::the_number_is_a_number ... ok\n",
            "# number\nTAP version 13\n1..3\nok 1 - the file is there\n",
            "# proc.sh\nall as it should be\n",
        ] {
            assert!(output.contains(wanted), "{wanted}: {output}");
        }
    }
    let tests = site.cwd().join("good/tests");
    let script =
        |text: &str| std::fs::write(tests.join("proc.sh"), format!("#!/bin/sh\n{text}\n")).unwrap();
    let run = || {
        let arguments = ["module", "test", "good", "-k", DEBIAN_6_12];
        site.vmlab(arguments).output()
    };
    script("echo 'ok 1 - a # SKIP not here'; exit 4");
    run().expect_code(0);
    script("echo 'not ok 1 - the knob'; echo 'ok 2 - other'; exit 1");
    let outcome = run();
    outcome.expect_code(1);
    assert!(
        outcome.stdout_text().contains("  use: test proc.sh failed: the knob\n"),
        "{}",
        outcome.stdout_text()
    );
    script("exit 3");
    let outcome = run();
    outcome.expect_code(1);
    assert!(
        outcome.stdout_text().contains("  use: test proc.sh failed: exit code 3\n"),
        "{}",
        outcome.stdout_text()
    );
    // KUnit writes to the log.
    script("exit 0");
    let source = site.cwd().join("good/good.c");
    let text = std::fs::read_to_string(&source).unwrap();
    let lines = r#"pr_info("    ok 1 first\n"); pr_info("    not ok 2 second\n"); pr_info("not ok 1 suite\n");"#;
    std::fs::write(&source, text.replace(r#"pr_info("good: loaded\n");"#, lines)).unwrap();
    let outcome = run();
    outcome.expect_code(1);
    assert!(
        outcome.stdout_text().contains("  load: test failed: suite: second\n"),
        "{}",
        outcome.stdout_text()
    );
    std::fs::write(tests.join("number.c"), "nonsense").unwrap();
    let outcome = run();
    outcome.expect_code(1);
    let text = outcome.stdout_text();
    assert!(text.contains("the module's tests cannot be built by make:"), "{text}");
}

#[test]
fn modules_are_loaded_and_unloaded_many_times() {
    let site = site();
    let dir = example(&site, "good");
    let stress = |more: &[&str]| {
        let arguments =
            ["module", "stress", "good", "-k", DEBIAN_6_12, "-n", "25", "--json", "out.json"];
        site.vmlab(arguments.into_iter().chain(more.iter().copied())).output()
    };
    // The command runs beside it, whether the module is there or not.
    stress(&["--", "sh", "-c", "echo again; cat /proc/good 2>/dev/null || true"]).expect_code(0);
    let text = std::fs::read_to_string(site.cwd().join("out.json")).unwrap();
    let attempt = &serde_json::from_str::<Value>(&text).unwrap()["targets"][0]["attempts"][0];
    assert!(attempt["output"].as_str().unwrap().matches("again\n").count() > 1, "{attempt}");
    let source = dir.join("good.c");
    let text = std::fs::read_to_string(&source).unwrap();
    // What one cycle loses, each does, wherever it was loaded.
    let (free, last) = ("\tkfree(number);\n}\n\nmodule_init", "}\n\nmodule_init");
    std::fs::write(&source, text.replace(free, last)).unwrap();
    let outcome = stress(&[]);
    outcome.expect_code(1);
    let said = outcome.stdout_text();
    assert!(said.contains("cycles: not freed: "), "{said}");
    assert!(said.contains("in good_init+0x") && said.contains("/good.c:"), "{said}");
    let counts = said.lines().filter_map(|line| line.split("allocated ").nth(1));
    let counts = counts.filter_map(|rest| match rest.split(' ').next()? {
        "once" => Some(1),
        number => number.parse::<u32>().ok(),
    });
    // The first line is that of the one target, and the summary says the same.
    assert!(counts.sum::<u32>() >= 25, "{said}");
    // One that fails at some time says when.
    let third = "static int times; if (++times > 0) return -EPERM; number = kmalloc(";
    std::fs::write(&source, text.replace("number = kmalloc(", third)).unwrap();
    let outcome = stress(&[]);
    outcome.expect_code(1);
    let said = outcome.stdout_text();
    assert!(
        said.contains("the kernel does not load and unload good: Operation not permitted"),
        "{said}"
    );
}

#[test]
fn messages_and_events_are_shown_as_they_come() {
    let site = site();
    let more =
        ["--dyndbg", "+p", "--trace", "sched:sched_process_exit", "--", "good/tests/proc.sh"];
    test(&site, "good", &more).expect_code(0);
    for attempt in attempts(&site) {
        let output = attempt["output"].as_str().unwrap();
        let place = |text: &str| output.find(text).unwrap_or_else(|| panic!("{text}: {output}"));
        assert!(place("] good: loaded\n") < place("] good: the number is 7 now\n"));
        assert!(place("sched_process_exit: comm=proc.sh") > place("] good: loaded\n"));
        place("all as it should be\n");
    }
}

#[test]
fn a_saved_file_is_tested_again() {
    let site = site();
    let dir = example(&site, "good");
    let command = ["good/tests/proc.sh", "42"];
    let arguments = ["module", "watch", "good", "-k", DEBIAN_6_12, "--"];
    let watching = site.vmlab(arguments.into_iter().chain(command)).start();
    watching.wait_stdout("ok        good\n");
    let source = dir.join("good.c");
    let text = std::fs::read_to_string(&source).unwrap();
    std::fs::write(&source, text.replace("*number = start;", "*number = 1;")).unwrap();
    watching.wait_stdout(" s after good.c was saved\n");
    std::fs::write(&source, text).unwrap();
    watching.wait_stdout("\nok        good, ");
    watching.signal(rustix::process::Signal::INT);
    let outcome = watching.finish();
    outcome.expect_code(130);
    assert!(outcome.stdout_text().contains("\nFAILED    good, "), "{}", outcome.stdout_text());
}

#[test]
fn what_is_not_given_back_is_told_with_the_line_that_took_it() {
    let site = site();
    test(&site, "leaks", &[]).expect_code(1);
    let place = place_of(&site, "leaks", "kmalloc(1000");
    for attempt in attempts(&site) {
        assert_eq!(attempt["failure"]["kind"], "module");
        let how: Vec<&str> = attempt["failure"]["how"].as_str().unwrap().lines().collect();
        assert_eq!(how.len(), 2, "{how:?}");
        assert!(
            how[0].starts_with(
                "unload: not freed: 2048 bytes, allocated 2 times in leaks_allocate+0x"
            ),
            "{}",
            how[0]
        );
        assert!(
            how[0].contains("(include/linux/slab.h:") && how[0].ends_with(&place),
            "{}",
            how[0]
        );
        assert_eq!(how[1], "unload: left behind: /proc/leaks");
    }
}

#[test]
fn an_oops_at_loading_is_told_with_its_line() {
    let site = site();
    let outcome = test(&site, "oopses", &[]);
    outcome.expect_code(1);
    let place = format!("[oopses] ({}", place_of(&site, "oopses", "settings->size = 1"));
    for attempt in attempts(&site) {
        assert_eq!(attempt["failure"]["kind"], "event");
        let title = "BUG: unable to handle kernel NULL pointer dereference in oopses_configure";
        assert_eq!(attempt["failure"]["title"], title);
        let report = attempt["events"][0]["report"].as_array().unwrap();
        let rip = report.iter().find_map(|line| {
            line.as_str().filter(|line| line.contains("RIP: 0010:oopses_configure"))
        });
        assert!(rip.unwrap().ends_with(&place), "{report:?}");
    }
    // The beginning of the report is shown, which has the place.
    assert!(outcome.stdout_text().contains(&place), "{}", outcome.stdout_text());
}

#[test]
fn a_module_that_hangs_is_told_with_where_it_does() {
    let site = site();
    test(&site, "hangs", &["--step-timeout", "8s"]).expect_code(1);
    let place = format!("[hangs] ({}", place_of(&site, "hangs", "wait_for_completion("));
    for attempt in attempts(&site) {
        assert_eq!(attempt["failure"]["kind"], "module");
        let how = attempt["failure"]["how"].as_str().unwrap();
        assert!(how.starts_with("unload: it took longer than 8 s, in "), "{how}");
        assert!(how.contains("hangs_wait+0x") && how.contains(&place), "{how}");
    }
}

/// The only processor never comes back, so that nothing in the guest can be asked any more.
#[test]
fn a_module_that_keeps_the_processor_is_told_and_ends_the_vm() {
    let site = site();
    let dir = example(&site, "hangs");
    let source = dir.join("hangs.c");
    let text = std::fs::read_to_string(&source).unwrap();
    let spin = "preempt_disable(); for (;;) cpu_relax();";
    std::fs::write(&source, text.replace("wait_for_completion(&done);", spin)).unwrap();
    let limit = ["--step-timeout", "3s"];
    let arguments = ["module", "test", "hangs", "-k", DEBIAN_6_12].into_iter().chain(limit);
    let outcome = site.vmlab(arguments).output();
    outcome.expect_code(1);
    let wanted = "unload: it took longer than 3 s, and the guest does not answer any more";
    assert!(outcome.stdout_text().contains(wanted), "{}", outcome.stdout_text());
}

/// What is freed after a grace period is freed in bulk, of which there are no events.
#[test]
fn memory_that_cannot_be_followed_is_no_failure() {
    let site = site();
    let dir = example(&site, "good");
    let source = dir.join("good.c");
    let text = std::fs::read_to_string(&source).unwrap();
    let text = text.replace(
        "static int *number;",
        "static int *number;\nstruct old { struct rcu_head head; int value; };",
    );
    let many = "{ int i; for (i = 0; i < 50; i++) { struct old *old = kmalloc(sizeof(*old), GFP_KERNEL); if (old) kfree_rcu(old, head); } }";
    std::fs::write(&source, text.replace("*number = start;", &format!("*number = start; {many}")))
        .unwrap();
    let outcome = site
        .vmlab(["module", "test", "good", "-k", DEBIAN_6_12, "--", "cat", "/proc/good"])
        .output();
    outcome.expect_code(0);
}

/// Kbuild cannot quote, and the sources may be read-only.
#[test]
fn odd_names_and_modes_do_not_matter() {
    let site = site();
    let dir = example(&site, "leaks");
    let odd = site.cwd().join("it is odd");
    std::fs::rename(&dir, &odd).unwrap();
    let source = odd.join("leaks.c");
    let text = std::fs::read_to_string(&source).unwrap();
    for round in 0..2 {
        std::fs::write(&source, text.replace("1000", &format!("{}", 1000 + round))).unwrap();
        std::fs::set_permissions(&source, std::os::unix::fs::PermissionsExt::from_mode(0o444))
            .unwrap();
        let outcome = site.vmlab(["module", "build", "it is odd", "-k", DEBIAN_6_12]).output();
        outcome.expect_code(0).expect_stderr(&["built, "]);
        std::fs::set_permissions(&source, std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .unwrap();
    }
}

#[test]
fn a_corrupted_list_is_told_with_its_line() {
    let site = site();
    let command = "echo 1 > /sys/module/corrupts/parameters/now";
    test(&site, "corrupts", &["--", "sh", "-c", command]).expect_code(1);
    let place = format!("{}/corrupts/corrupts.c:", site.cwd().canonicalize().unwrap().display());
    for attempt in attempts(&site) {
        assert_eq!(attempt["failure"]["title"], "BUG: corrupted list in corrupts_remove_twice");
        let report = attempt["events"][0]["report"].to_string();
        assert!(report.contains(&place), "{report}");
    }
}

#[test]
fn warnings_and_what_does_not_build_are_told() {
    let site = site();
    let dir = example(&site, "good");
    let source = dir.join("good.c");
    let text = std::fs::read_to_string(&source).unwrap();
    std::fs::write(&source, text.replace("*number = start;", "int unused; *number = start;"))
        .unwrap();
    let build = || site.vmlab(["module", "build", "good", "-k", DEBIAN_6_12]).output();
    let outcome = build();
    outcome.expect_code(0).expect_stderr(&["good/good.c:", "warning: unused variable", "built, "]);
    let built = outcome.stdout_text();
    assert!(Path::new(built.trim()).is_file() && built.ends_with("/good.ko\n"), "{built}");
    let again = build();
    again.expect_code(0).expect_stderr(&["warning: unused variable", "was built before, "]);
    assert_eq!(again.stdout_text(), built);
    std::fs::write(&source, text.replace("*number = start;", "*nombre = start;")).unwrap();
    build().expect_code(125).expect_stderr(&["good.c:", "'nombre' undeclared"]);
    let outcome =
        site.vmlab(["module", "test", "good", "-k", DEBIAN_6_12, "--json", "out.json"]).output();
    outcome.expect_code(1);
    assert!(outcome.stdout_text().contains("| "), "{}", outcome.stdout_text());
    let text = std::fs::read_to_string(site.cwd().join("out.json")).unwrap();
    let failure =
        &serde_json::from_str::<Value>(&text).unwrap()["targets"][0]["attempts"][0]["failure"];
    assert_eq!(failure["kind"], "module");
    assert!(failure["how"].as_str().unwrap().contains("'nombre' undeclared"), "{failure}");
}

#[test]
fn what_the_kernel_logs_and_refuses_is_told() {
    let site = site();
    // A parameter that there is not is a warning of the kernel's; one without sense makes it refuse.
    test(&site, "good", &["--param", "stop=1", "--", "good/tests/proc.sh"]).expect_code(1);
    for attempt in attempts(&site) {
        let how = attempt["failure"]["how"].as_str().unwrap();
        assert!(how.starts_with("load: the kernel logged: ["), "{how}");
        assert!(how.ends_with("good: unknown parameter 'stop' ignored"), "{how}");
    }
    let run = |more: &[&str]| {
        let arguments = ["module", "test", "good", "-k", DEBIAN_6_12].into_iter();
        let command = ["--", "good/tests/proc.sh"];
        site.vmlab(arguments.chain(more.iter().copied()).chain(command)).output()
    };
    run(&["--param", "stop=1", "--allow-log", "unknown parameter"]).expect_code(0);
    let outcome = run(&["--param", "start=x"]);
    outcome.expect_code(1);
    let text = outcome.stdout_text();
    assert!(text.contains("load: the kernel does not load good: Invalid argument"), "{text}");
    assert!(text.contains("`x' invalid for parameter `start'"), "{text}");
    let outcome = run(&["--param", "god.start=1", "--trace", "no:such"]);
    outcome.expect_code(1);
    let text = outcome.stdout_text();
    assert!(text.contains("load: no module here takes `god.start=1`"), "{text}");
    assert!(text.contains("there was no trace event no:such"), "{text}");
    run(&["--allow-log", "("]).expect_code(125).expect_stderr(&["`(` is no regular expression"]);
}

#[test]
fn what_others_bring_is_not_put_down_to_the_module() {
    let site = site();
    // ext4 comes with names of its own, and can be unloaded again; loop stays, as it has a device in use.
    let command = "modprobe ext4 && [ -d /sys/module/ext4 ] && good/tests/proc.sh";
    test(&site, "good", &["--", "sh", "-c", command]).expect_code(0);
    for attempt in attempts(&site) {
        assert_eq!(attempt["notes"], Value::Array(vec![]));
    }
}

#[test]
fn a_directory_without_a_module_is_refused() {
    let site = site();
    std::fs::create_dir(site.cwd().join("empty")).unwrap();
    for verb in ["build", "test"] {
        let outcome = site.vmlab(["module", verb, "empty", "-k", DEBIAN_6_12]).output();
        outcome
            .expect_code(125)
            .expect_stderr(&["has no Kbuild and no Makefile", "obj-m := mymod.o"]);
    }
    std::fs::write(site.cwd().join("empty/Makefile"), "all:\n").unwrap();
    let outcome = site.vmlab(["module", "build", "empty", "-k", DEBIAN_6_12]).output();
    outcome.expect_code(125).expect_stderr(&["made no module", "no `obj-m`"]);
}
