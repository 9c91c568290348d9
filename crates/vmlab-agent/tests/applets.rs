//! What the agent does as a command of its own, through the real agent outside of a VM.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod host;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use host::{Agent, Outcome, command};
use tempfile::TempDir;
use vmlab_copy::CopyError;
use vmlab_wire::message::{Exec, ExitStatus};
use vmlab_wire::{HostMessage, ProcessId};

fn applet(agent: &mut Agent, number: u32, words: &[&str], input: &[u8]) -> Outcome {
    let argv = [&["vmlab-agent", "applet"], words].concat();
    let exec = Exec { process: ProcessId(number), env: Vec::new(), ..command(&argv) };
    agent.host.message(&HostMessage::ExecAgent(Box::new(exec.clone())));
    agent.host.finish(&exec, Some(input))
}

fn code(outcome: &Outcome) -> ExitStatus {
    outcome.exited.unwrap().status
}

#[test]
fn files_come_and_go() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    fs::create_dir(at("from")).unwrap();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| n.wrapping_mul(n) as u8).collect();
    fs::write(at("from/file"), &bytes).unwrap();
    let mut agent = Agent::start();
    let before = agent.peak_kib();

    let sent = applet(&mut agent, 0, &["send", &text(&at("from"))], b"");
    assert_eq!(code(&sent), ExitStatus::Code(0));
    vmlab_copy::receive(&*sent.stdout, &at("to"), None).unwrap();
    assert_eq!(fs::read(at("to/file")).unwrap(), bytes);

    fs::create_dir(at("into")).unwrap();
    let received = applet(&mut agent, 1, &["receive", &text(&at("into")), "named"], &sent.stdout);
    assert_eq!(code(&received), ExitStatus::Code(0));
    vmlab_copy::outcome(&*received.stdout).unwrap();
    assert_eq!(fs::read(at("into/named/file")).unwrap(), bytes);
    // It is not the session that copies.
    assert!(agent.peak_kib() < before + 16 * 1024, "{before} KiB, then {}", agent.peak_kib());

    // What fails is told with its place, and by the exit code.
    let gone = applet(&mut agent, 2, &["send", &text(&at("gone"))], b"");
    assert_eq!(code(&gone), ExitStatus::Code(1));
    let told = vmlab_copy::receive(&*gone.stdout, &at("x"), Some(OsStr::new("gone")));
    assert!(matches!(told, Err(CopyError::There { path, .. }) if path == at("gone")));
    let cut = &sent.stdout[..sent.stdout.len() - 5];
    let received = applet(&mut agent, 3, &["receive", &text(&at("cut"))], cut);
    assert_eq!(code(&received), ExitStatus::Code(1));
    assert!(matches!(vmlab_copy::outcome(&*received.stdout), Err(CopyError::Stream(_))));
    for words in [&["send"][..], &[], &["unknown"], &["receive", "a", "b", "c"]] {
        let outcome = applet(&mut agent, 10 + words.len() as u32, words, b"");
        assert_eq!(code(&outcome), ExitStatus::Code(2), "{words:?}");
    }
}

#[test]
fn a_receiver_stops_a_sender_that_it_needs_no_more() {
    let mut agent = Agent::start();
    let endless = vec![0xff; 20 << 20];
    let outcome = applet(&mut agent, 0, &["receive", "/no/such/place"], &endless);
    assert!(outcome.stdin_stopped);
    let error = vmlab_copy::outcome(&*outcome.stdout).unwrap_err();
    assert!(matches!(error, CopyError::There { path, .. } if path == Path::new("/no/such")));
}
