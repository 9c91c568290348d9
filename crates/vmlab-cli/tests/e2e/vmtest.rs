//! Files and command lines of vmtest, as they are.

use std::os::unix::fs::symlink;

use crate::common::pty::Terminal;
use crate::common::{DEBIAN_6_12, Site, kernel, vmlab_bin};

/// The directory of Debian's 6.12, as vmtest could be given one: by path.
fn image(site: &Site) -> String {
    let inspected = site.vmlab(["kernel", "inspect", kernel(DEBIAN_6_12), "--json"]).output();
    let inspected: serde_json::Value = serde_json::from_slice(&inspected.stdout).unwrap();
    // CACHE/kernels/KEY/boot/vmlinuz-RELEASE
    let image = std::path::Path::new(inspected["kernel"]["boot_image"].as_str().unwrap());
    image.ancestors().nth(2).unwrap().to_str().unwrap().to_owned()
}

#[test]
fn a_file_of_vmtest_runs_as_it_is() {
    let site = Site::new();
    let image = image(&site);
    // Relative paths are taken from the file's directory.
    symlink(&image, site.cwd().join("kernel")).unwrap();
    std::fs::write(site.cwd().join("data"), "of the host\n").unwrap();
    let targets = [
        ("reads and writes", "cat /mnt/vmtest/data && echo written > /mnt/vmtest/made"),
        ("is bash", "diff <(echo a) <(echo a) && test $0 = bash -o $0 = /bin/bash"),
        ("has the environment", "test \\\"$FROM_THE_CALLER\\\" = 'a  b'"),
        ("exits with 12", "exit 12"),
        ("is killed", "kill -9 $$"),
        ("keeps quotes", "printf '%s|' 'a b' c"),
    ];
    let read_only = "! touch /usr/x && ! touch /etc/x && touch /mnt/vmtest/made-too";
    let targets = targets.iter().map(|(name, command)| (*name, *command, "rw"));
    let mut text = String::new();
    for (name, command, mode) in targets.chain([("has a read-only root", read_only, "rw ro")]) {
        text.push_str(&format!(
            "[[target]]\nname = \"{name}\"\nkernel = \"./kernel\"\nkernel_args = \"{mode}\"\n\
             command = \"{command}\"\n[target.vm]\nnum_cpus = 2\nmemory = \"512M\"\n\n"
        ));
    }
    std::fs::write(site.cwd().join("vmtest.toml"), text).unwrap();
    let run = |options: &[&str]| {
        let args = [&["vmtest"], options].concat();
        site.vmlab(args).env("FROM_THE_CALLER", "a  b").output()
    };
    // So many failed.
    let all = run(&[]);
    all.expect_code(2);
    let said = all.stdout_text();
    assert_eq!(said.matches("PASS\n").count(), 5, "{said}");
    assert_eq!(said.matches("FAILED\n").count(), 2, "{said}");
    for wanted in ["=> exits with 12\n", "of the host\n", "exit code: 12", "a b|c|"] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    assert_eq!(std::fs::read_to_string(site.cwd().join("made")).unwrap(), "written\n");
    // One target's own.
    run(&["-f", "exits"]).expect_code(12);
    run(&["-f", "is killed"]).expect_code(137);
    run(&["--filter", "nothing like it"]).expect_code(125).expect_stderr(&["`is bash`"]);
    run(&["-c", "other.toml"]).expect_code(125).expect_stderr(&["other.toml"]);
}

#[test]
fn one_command_under_one_kernel() {
    let site = Site::new();
    let image = image(&site);
    symlink(vmlab_bin(), site.path().join("vmtest")).unwrap();
    let vmtest = |words: &[&str]| {
        let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
        let program = site.path().join("vmtest");
        let script = format!("exec {} -k {image} {}", program.display(), quoted.join(" "));
        site.host_sh(&script).output()
    };
    let says = |words: &[&str], code: i32, text: &str| {
        assert_eq!(vmtest(words).expect_code(code).stdout_text(), text);
    };
    says(&["echo one | cat; exit 5"], 5, "one\n");
    says(&["printf", "%s|", "a  b", "$HOME"], 0, "a  b|$HOME|");
    let shared = "grep -c mark.mark /proc/cmdline; ls -d /mnt/vmtest";
    says(&["--kargs", "mark.mark", shared], 0, "1\n/mnt/vmtest\n");
    let none = site.vmlab(["vmtest", "-k", "./no-such-kernel", "true"]).output();
    none.expect_code(69).expect_stderr(&["no-such-kernel"]);
    site.vmlab(["vmtest", "true"]).output().expect_code(125).expect_stderr(&["needs a kernel"]);
    let arch = site.vmlab(["vmtest", "-k", &image, "-a", "aarch64", "true"]).output();
    arch.expect_code(125).expect_stderr(&["aarch64"]);
}

#[test]
fn a_target_can_be_a_shell() {
    let site = Site::new();
    symlink(image(&site), site.cwd().join("kernel")).unwrap();
    let file = "[[target]]\nname = \"looks\"\nkernel = \"./kernel\"\ncommand = \"-\"\n\
                [target.vm]\nmemory = \"512M\"\n\n\
                [[target]]\nname = \"runs\"\nkernel = \"./kernel\"\ncommand = \"true\"\n";
    std::fs::write(site.cwd().join("vmtest.toml"), file).unwrap();
    let mut terminal =
        Terminal::start(site.vmlab(["vmtest", "-f", "looks"]).into_terminal_command(), 33, 101);
    terminal.type_in("stty size; ls -d /mnt/vmtest; nproc; exit 7\r");
    terminal.wait("33 101\r\n");
    terminal.wait("/mnt/vmtest\r\n2\r\n");
    assert_eq!(terminal.finish().code(), Some(7), "{}", terminal.text());
    // It has the terminal for itself.
    let both = site.vmlab(["vmtest"]).output();
    let said = both.expect_code(1).stdout_text();
    assert!(said.contains("`looks` is a shell") && said.contains("PASS\n"), "{said}");
    // Of a file of ours, with what goes before and after. Without a terminal it reads its input.
    let file = "[[target]]\nname = \"looks\"\nkernel = \"debian:6.12\"\ncommand = \"-\"\n\
                setup = [\"echo before >made\"]\nteardown = [\"cat made; echo after\"]\n";
    std::fs::write(site.cwd().join("vmlab.toml"), file).unwrap();
    let ours = site.vmlab(["test"]).input("cat made; echo during >>made; exit 3\n").output();
    assert_eq!(ours.expect_code(3).stdout_text(), "before\nbefore\nduring\nafter\n");
    let report = site.vmlab(["test", "--tap", "out.tap"]).output();
    report.expect_code(125).expect_stderr(&["`looks` is a shell", "no reports"]);
}
