//! `-t` and `vmlab shell`, seen from a terminal.

use std::time::Instant;

use crate::common::pty::Terminal;
use crate::common::{DEBIAN_6_12, Site, kernel};
use rustix::process::Signal;

/// `vmlab run -t` of a script, in a terminal of 33 lines and 101 columns.
fn terminal(site: &Site, script: &str) -> Terminal {
    let arguments = ["run", "-q", "-t", "-k", kernel(DEBIAN_6_12), "--", "bash", "-c", script];
    Terminal::start(site.vmlab(arguments).into_terminal_command(), 33, 101)
}

#[test]
fn a_terminal_of_the_right_size_that_follows_resizing_and_keys() {
    let site = Site::new();
    let script = r#"
stty size
test -t 0 && test -t 1 && test -t 2 && tty
trap 'stty size' WINCH
trap 'echo interrupted; exit 5' INT
read -r line
echo "got $line"
echo waiting
while :; do sleep 0.1; done"#;
    let mut terminal = terminal(&site, script);
    terminal.wait("33 101\r\n");
    terminal.wait("/dev/pts/");
    assert!(terminal.is_raw(), "the host's terminal would handle the keys itself");
    terminal.type_in("typed\r");
    // The guest's terminal echoes.
    terminal.wait("typed\r\n");
    terminal.wait("got typed\r\n");
    terminal.wait("waiting\r\n");
    terminal.resize(40, 90);
    terminal.wait("40 90\r\n");
    terminal.type_in("\x03");
    terminal.wait("interrupted\r\n");
    assert_eq!(terminal.finish().code(), Some(5), "{}", terminal.text());
    assert!(terminal.is_restored());
}

#[test]
fn the_terminal_is_restored_when_the_vm_is_ended_by_signals() {
    let site = Site::new();
    let mut terminal =
        terminal(&site, "trap 'echo first' TERM; echo ready; while :; do sleep 0.1; done");
    terminal.wait("ready\r\n");
    assert!(terminal.is_raw());
    terminal.signal(Signal::TERM);
    terminal.wait("first\r\n");
    let asked = Instant::now();
    terminal.signal(Signal::TERM);
    assert_eq!(terminal.finish().code(), Some(143), "{}", terminal.text());
    assert!(asked.elapsed() < Terminal::PROMPTLY, "{:?}", asked.elapsed());
    assert!(terminal.is_restored());
}

#[test]
fn three_escapes_end_the_vm() {
    let site = Site::new();
    let mut terminal = terminal(&site, "stty raw -echo; echo ready; exec cat -v");
    terminal.wait("ready");
    // One alone is the command's.
    terminal.type_in("\x1d.");
    terminal.wait("^].");
    let monitor = terminal.process.monitor();
    let asked = Instant::now();
    terminal.type_in("\x1d\x1d\x1d");
    let status = terminal.finish();
    assert!(asked.elapsed() < Terminal::PROMPTLY, "{:?}", asked.elapsed());
    assert_eq!(status.code(), Some(125), "{}", terminal.text());
    assert!(terminal.text().contains("Ctrl-]"), "it does not say why: {}", terminal.text());
    assert!(terminal.is_restored());
    monitor.assert_gone();
}

#[test]
fn an_interactive_shell() {
    let site = Site::new();
    let arguments = ["shell", "-q", "-k", kernel(DEBIAN_6_12)];
    let mut command = site.vmlab(arguments).into_terminal_command();
    // What the person who runs the tests has in their own start-up files is not looked at.
    let shell = site.cwd().join("shell");
    std::fs::write(&shell, "#!/bin/sh\nPS1='prompt> ' exec bash --norc\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&shell, mode).unwrap();
    // A plain terminal, so that the shell draws nothing but what it prints.
    command.env("SHELL", &shell).env("TERM", "dumb");
    let mut terminal = Terminal::start(command, 24, 80);
    terminal.wait("prompt> ");
    terminal.type_in("echo flags: $-.\r");
    terminal.wait("\r\nflags: ");
    terminal.type_in("sleep 1000 & jobs; echo $((6*7)).\r");
    terminal.wait("Running");
    terminal.wait("\r\n42.\r\n");
    // Ctrl-Z stops what is in the foreground, which takes job control.
    terminal.type_in("sh -c 'echo started; exec sleep 2000'\r");
    terminal.wait("\r\nstarted\r\n");
    terminal.type_in("\x1a");
    terminal.wait("Stopped");
    terminal.type_in("pwd; kill -KILL %1 %2; wait; exit 3\r");
    assert_eq!(terminal.finish().code(), Some(3), "{}", terminal.text());
    let text = terminal.text();
    let flags = text.split("\r\nflags: ").nth(1).unwrap().split('.').next().unwrap();
    assert!(flags.contains('m') && flags.contains('i'), "no job control: {flags}");
    assert!(!text.contains("job control"), "{text}");
    assert!(text.contains(&format!("{}\r\n", site.cwd().display())), "{text}");
    assert!(terminal.is_restored());
}

#[test]
fn without_a_terminal_there_is_none_to_give() {
    let site = Site::new();
    let outcome = site.vmlab(["run", "-t", "-k", DEBIAN_6_12, "--", "true"]).output();
    outcome.expect_code(125);
    assert_eq!(
        outcome.stderr_text(),
        "vmlab: error: -t needs a terminal on standard input; without -t, any input will do\n"
    );
    assert!(!site.state().join("vmlab").exists(), "something was started");
}

#[test]
fn a_shell_without_a_terminal_reads_its_input() {
    let site = Site::new();
    let arguments = ["shell", "-q", "-k", kernel(DEBIAN_6_12)];
    let shell = site.vmlab(arguments).env("SHELL", "/bin/sh").input("echo $((6*7))\nexit 9\n");
    let outcome = shell.output();
    outcome.expect_code(9);
    assert_eq!((outcome.stdout_text(), outcome.stderr_text()), ("42\n".into(), String::new()));
}
