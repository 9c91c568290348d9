//! The commands that start no VM: doctor, completions, manual pages, help.

use std::path::Path;
use std::process::Command;

use crate::common::{DEBIAN_6_12, Site, kernel, need};
use serde_json::Value;

#[test]
fn the_doctor_finds_what_is_there() {
    let site = Site::new();
    kernel(DEBIAN_6_12);
    let outcome = site.vmlab(["doctor", "--json"]).output();
    outcome.expect_code(0);
    let checks: Value = serde_json::from_slice(&outcome.stdout).unwrap();
    let checks = checks.as_array().unwrap();
    let names: Vec<&str> = checks.iter().map(|c| c["name"].as_str().unwrap()).collect();
    for wanted in [
        "qemu", "kvm", "passt", "sandbox", "depmod", "apt", "cache", "logs", "kernels", "uefi",
        "images", "memory",
    ] {
        assert!(names.contains(&wanted), "{wanted}: {names:?}");
    }
    for check in checks {
        let good = check["status"] == "good";
        assert_eq!(check["remedy"].is_null(), good, "{check}");
        assert!(!check["detail"].as_str().unwrap().is_empty(), "{check}");
    }
    let table = site.vmlab(["doctor"]).output();
    let table = table.expect_code(0).stdout_text();
    assert!(
        table.lines().any(|l| l.starts_with("ok  qemu ") && l.contains("ran a guest in")),
        "{table}"
    );

    // Without QEMU nothing can be run, and it says what to install.
    let empty = site.path().join("runtime");
    let outcome = site.vmlab(["doctor"]).env("PATH", &empty).output();
    outcome.expect_code(1);
    let table = outcome.stdout_text();
    let bad = table.lines().find(|line| line.starts_with("BAD  qemu "));
    assert!(bad.is_some_and(|line| line.contains("apt-get install qemu-system")), "{table}");
}

#[test]
fn completions_are_scripts_that_shells_read() {
    let site = Site::new();
    let outcome = site.vmlab(["completions", "bash"]).output();
    outcome.expect_code(0);
    let file = site.cwd().join("vmlab.bash");
    std::fs::write(&file, &outcome.stdout).unwrap();
    let check = "bash -n vmlab.bash && . ./vmlab.bash && complete -p vmlab";
    let read = Command::new("bash").args(["-c", check]).current_dir(site.cwd()).output().unwrap();
    assert!(read.status.success(), "{read:?}");
    // What it offers after `vmlab ke` is `kernel`.
    let offer = ". ./vmlab.bash; COMP_WORDS=(vmlab ke); COMP_CWORD=1; _vmlab vmlab ke vmlab; \
                 echo \"${COMPREPLY[*]}\"";
    let offered =
        Command::new("bash").args(["-c", offer]).current_dir(site.cwd()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&offered.stdout), "kernel\n", "{offered:?}");
    for (shell, wanted) in [("zsh", "#compdef vmlab"), ("fish", "complete -c vmlab")] {
        let outcome = site.vmlab(["completions", shell]).output();
        assert!(outcome.expect_code(0).stdout_text().contains(wanted), "{shell}");
    }
    site.vmlab(["completions", "tcsh"]).output().expect_code(125).expect_stderr(&["bash", "zsh"]);
}

#[test]
fn manual_pages_are_rendered() {
    let groff = need("groff", "groff-base");
    let site = Site::new();
    site.vmlab(["man", "pages/man1"]).output().expect_stdout("");
    let dir = site.cwd().join("pages/man1");
    let mut names: Vec<String> = dir
        .read_dir()
        .unwrap()
        .map(|item| item.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    for page in [
        "vmlab.1",
        "vmlab-run.1",
        "vmlab-shell.1",
        "vmlab-kernel.1",
        "vmlab-cache.1",
        "vmlab-doctor.1",
    ] {
        assert!(names.iter().any(|name| name == page), "{page}: {names:?}");
    }
    for name in &names {
        let page = dir.join(name);
        assert!(std::fs::read_to_string(&page).unwrap().contains(".TH vmlab"), "{name}");
        let rendered =
            Command::new(&groff).args(["-man", "-Tutf8", "-ww"]).arg(&page).output().unwrap();
        assert!(rendered.status.success(), "{name}: {rendered:?}");
        assert!(rendered.stdout.len() > 200, "{name}");
    }
    let run = std::fs::read_to_string(dir.join("vmlab-run.1")).unwrap();
    for wanted in ["root\\-mode", "Exit codes", "124"] {
        assert!(run.contains(wanted), "{wanted}: {run}");
    }
    let outcome = site.vmlab([Path::new("man"), Path::new("/dev/null/x")]).output();
    outcome.expect_code(125).expect_stderr(&["manual pages cannot be written to /dev/null/x"]);
}

#[test]
fn help_and_version_go_to_stdout_and_errors_to_stderr() {
    let site = Site::new();
    for args in [&["--help"][..], &["run", "--help"], &["--version"], &["kernel", "pull", "-h"]] {
        let outcome = site.vmlab(args).output();
        outcome.expect_code(0);
        assert!(outcome.stdout_text().contains("vmlab"), "{args:?}");
        assert_eq!(outcome.stderr_text(), "", "{args:?}");
    }
    let help = site.vmlab(["run", "--help"]).output().stdout_text();
    for code in ["122", "123", "124", "125", "126", "127"] {
        assert!(help.contains(code), "{code} is not documented");
    }
    for args in [&[][..], &["run"], &["rum"], &["run", "--unknown", "--", "true"]] {
        let outcome = site.vmlab(args).output();
        outcome.expect_code(125);
        assert_eq!(outcome.stdout_text(), "", "{args:?}");
        assert!(outcome.stderr_text().contains("Usage:"), "{args:?}: {}", outcome.stderr_text());
    }
}
