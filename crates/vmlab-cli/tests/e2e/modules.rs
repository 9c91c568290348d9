//! `vmlab module`: modules are built, loaded, used and unloaded, and each fault of the examples is told.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::{DEBIAN_6_1, DEBIAN_6_12, Outcome, Site, kernel, need};

/// A copy of an example, since some tests change it, and all need a directory that their guests may see.
fn example(site: &Site, name: &str) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/modules").join(name);
    let to = site.cwd().join(name);
    std::fs::create_dir(&to).unwrap();
    for item in std::fs::read_dir(&from).unwrap() {
        let path = item.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
    to
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

#[test]
fn a_module_that_is_as_it_should_be_passes() {
    let site = site();
    let more = ["--param", "start=5", "--junit", "out.xml", "--", "good/test.sh", "5"];
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
    assert_eq!(names, ["Kbuild", "good.c", "test.sh"]);
}

#[test]
fn what_is_not_given_back_is_told_with_the_line_that_took_it() {
    let site = site();
    test(&site, "leaks", &[]).expect_code(1);
    let line = line_of(&site, "leaks", "kmalloc(1000");
    let place = format!("{}/leaks/leaks.c:{line})", site.cwd().canonicalize().unwrap().display());
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
    let line = line_of(&site, "oopses", "settings->size = 1");
    let place = format!(
        "[oopses] ({}/oopses/oopses.c:{line})",
        site.cwd().canonicalize().unwrap().display()
    );
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
    let line = line_of(&site, "hangs", "wait_for_completion(");
    let place =
        format!("[hangs] ({}/hangs/hangs.c:{line})", site.cwd().canonicalize().unwrap().display());
    for attempt in attempts(&site) {
        assert_eq!(attempt["failure"]["kind"], "module");
        let how = attempt["failure"]["how"].as_str().unwrap();
        assert!(how.starts_with("unload: it took longer than 8 s, in "), "{how}");
        assert!(how.contains("hangs_wait+0x") && how.contains(&place), "{how}");
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
    test(&site, "good", &["--param", "stop=1"]).expect_code(1);
    for attempt in attempts(&site) {
        let how = attempt["failure"]["how"].as_str().unwrap();
        assert!(how.starts_with("load: the kernel logged: ["), "{how}");
        assert!(how.ends_with("good: unknown parameter 'stop' ignored"), "{how}");
    }
    let run = |more: &[&str]| {
        let arguments =
            ["module", "test", "good", "-k", DEBIAN_6_12].into_iter().chain(more.iter().copied());
        site.vmlab(arguments).output()
    };
    run(&["--param", "stop=1", "--allow-log", "unknown parameter"]).expect_code(0);
    let outcome = run(&["--param", "start=x"]);
    outcome.expect_code(1);
    let text = outcome.stdout_text();
    assert!(text.contains("load: the kernel does not load good: Invalid argument"), "{text}");
    assert!(text.contains("`x' invalid for parameter `start'"), "{text}");
    run(&["--allow-log", "("]).expect_code(125).expect_stderr(&["`(` is no regular expression"]);
}

#[test]
fn what_others_bring_is_not_put_down_to_the_module() {
    let site = site();
    // ext4 comes with names of its own, and can be unloaded again; loop stays, as it has a device in use.
    let command = "modprobe ext4 && [ -d /sys/module/ext4 ] && good/test.sh";
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
