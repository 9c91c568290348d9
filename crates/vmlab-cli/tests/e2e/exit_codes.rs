//! How a run ends: the command's own code, a signal's, or what vmlab has for its own failures; and
//! arguments that arrive as they were given.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use crate::common::{DEBIAN_6_12, Site, kernel};

#[test]
fn codes_pass_through() {
    let site = Site::new();
    for code in [1, 122, 128, 255] {
        let outcome = site.sh(&[], &format!("exit {code}")).output();
        outcome.expect_code(code);
        assert_eq!((outcome.stdout_text(), outcome.stderr_text()), Default::default());
    }
}

#[test]
fn death_by_a_signal_is_128_and_its_number() {
    let site = Site::new();
    for (name, number) in [("HUP", 1), ("KILL", 9), ("SEGV", 11), ("RTMAX", 64)] {
        site.sh(&[], &format!("exec bash -c 'kill -{name} $$'")).output().expect_code(128 + number);
    }
}

#[test]
fn commands_that_cannot_be_started() {
    let site = Site::new();
    // A directory of PATH that the user may not search is passed over.
    let closed = site.cwd().join("closed");
    std::fs::create_dir(&closed).unwrap();
    let permit = |mode| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(&closed, mode).unwrap();
    };
    permit(0o000);
    let path = format!("{}:{}", std::env::var("PATH").unwrap(), closed.display());
    for (command, code, wanted) in [
        ("no-such-command", 127, "vmlab: error: no-such-command: command not found in the guest\n"),
        ("./none/at/all", 127, "vmlab: error: ./none/at/all: command not found in the guest\n"),
        (
            "/etc/passwd",
            126,
            "vmlab: error: /etc/passwd cannot be executed in the guest: \
             Permission denied (os error 13)\n",
        ),
    ] {
        let outcome = site.run(&[], [command]).env("PATH", &path).output();
        outcome.expect_code(code);
        assert_eq!((outcome.stdout_text(), outcome.stderr_text()), (String::new(), wanted.into()));
    }
    permit(0o700);
}

#[test]
fn a_working_directory_that_is_gone() {
    let site = Site::new();
    let script = r#"mkdir gone; cd gone; rmdir ../gone
"$VMLAB" run -q -k debian:6.12 -- true"#;
    site.host_sh(script).output().expect_code(125).expect_stderr(&["working directory"]);
}

#[test]
fn arguments_that_make_no_sense_are_refused_at_once() {
    let site = Site::new();
    for (arguments, wanted) in [
        (&["run"][..], "<COMMAND>"),
        (&["run", "--bogus", "true"], "--bogus"),
        (&["run", "-k", DEBIAN_6_12, "--memroy", "1G", "--", "true"], "'--memory'"),
        (&["bogus"], "bogus"),
        (&["run", "--memory", "much", "--", "true"], "--memory"),
        (&["run", "--timeout", "soon", "--", "true"], "--timeout"),
        (&["run", "--cpus", "none", "--", "true"], "--cpus"),
        (&["run", "--env", "NAME", "--", "true"], "NAME=VALUE"),
        (&["run", "--share", "/no/such/dir", "--", "true"], "/no/such/dir"),
        (&["run", "-k", "", "--", "true"], "kernel"),
        (&["run", "-k", "./no-such-file", "--", "true"], "no-such-file"),
        (&["run", "-q", "-v", "--", "true"], "--quiet"),
    ] {
        let outcome = site.vmlab(arguments).output();
        outcome.expect_code(125).expect_stderr(&[wanted]);
        assert_eq!(outcome.stdout_text(), "", "{arguments:?}");
        assert!(!site.state().join("vmlab").exists(), "{arguments:?} started something");
    }
    let help = site.vmlab(["run", "--help"]).output();
    help.expect_code(0);
    assert_eq!(help.stderr_text(), "");
    assert!(help.stdout_text().contains("Exit codes:"), "{}", help.stdout_text());
}

#[test]
fn what_follows_the_command_is_its_own() {
    let site = Site::new();
    let arguments =
        ["run", "-q", "-k", kernel(DEBIAN_6_12), "printf", "%s|", "-k", "--help", "--", "-"];
    site.vmlab(arguments).output().expect_stdout("-k|--help|--|-|");
}

#[test]
fn arguments_and_variables_survive() {
    let site = Site::new();
    let mut words: Vec<Vec<u8>> = [
        &b"two words"[..],
        b"",
        b"'single' \"double\" `tick` $HOME \\ * ?",
        b"a\nnew\nline\n",
        b"\xff\xfe not UTF-8 \x80",
        b"\x01\x1b[31m\x7f",
        b"--",
        b"-x",
        b"",
    ]
    .iter()
    .map(|word| word.to_vec())
    .collect();
    // A mebibyte in all; one argument may have 128 KiB at most, by the kernel's own rule.
    words.extend((0..16u8).map(|n| vec![b'a' + n; 64 * 1024]));

    let mut command: Vec<OsString> =
        ["bash", "-c", r#"printf '%s\0' "$ODD" "${#LONG}" "$@""#, "bash"].map(Into::into).into();
    command.extend(words.iter().cloned().map(OsString::from_vec));
    let odd = b"odd \xff\n=value ".to_vec();
    let outcome = site
        .run(&[], command)
        .env("ODD", OsString::from_vec(odd.clone()))
        .env("LONG", "x".repeat(100_000))
        .output();
    outcome.expect_code(0);
    let mut wanted = [odd, b"100000".to_vec()].join(&0);
    wanted.push(0);
    for word in &words {
        wanted.extend_from_slice(word);
        wanted.push(0);
    }
    assert!(outcome.stdout == wanted, "{} bytes of {}", outcome.stdout.len(), wanted.len());
}
