//! Which frames come for a stream, and how often, through the real agent outside of a VM.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod host;

use std::collections::BTreeMap;

use host::{Agent, Event, command, sh};
use vmlab_wire::message::{Exec, ExecStdio, StderrTo, Stdio, TerminalSize};
use vmlab_wire::{FrameKind, GuestMessage, HostMessage, ProcessId, StreamId};

/// A number that no other command of these tests has.
const LAST: ProcessId = ProcessId(1000);

/// Everything that comes until a last command has ended: all that was sent before it is answered.
fn rest(agent: &mut Agent) -> Vec<Event> {
    let stdio = ExecStdio::Pipes { stdin: false, stdout: false, stderr: StderrTo::Null };
    agent.host.start(&Exec { process: LAST, stdio, ..command(&["true"]) });
    let mut events = Vec::new();
    loop {
        match agent.host.next().unwrap() {
            Event::Message(GuestMessage::Exited(LAST, _)) => return events,
            event => events.push(event),
        }
    }
}

fn until(agent: &mut Agent, events: &mut Vec<Event>, found: impl Fn(&Event) -> bool) {
    loop {
        let event = agent.host.next().unwrap();
        let last = found(&event);
        events.push(event);
        if last {
            return;
        }
    }
}

/// How often each stream has ended.
fn ends(events: &[Event]) -> BTreeMap<StreamId, u32> {
    let mut ends = BTreeMap::new();
    for event in events {
        if let Event::Eof(stream) = event {
            *ends.entry(*stream).or_default() += 1;
        }
    }
    ends
}

#[test]
fn a_stream_that_has_ended_is_not_ended_again_by_a_stop() {
    let mut agent = Agent::start();
    let exec = sh("exec >&-; read line");
    let [stdin, stdout, stderr] =
        [Stdio::Stdin, Stdio::Stdout, Stdio::Stderr].map(|s| exec.process.stream(s));
    let mut events = Vec::new();
    agent.host.start(&exec);
    until(&mut agent, &mut events, |event| *event == Event::Eof(stdout));
    // The host may not have known when it sent this. A stdin is not the host's to stop.
    for stream in [stdout, stdout, stdin] {
        agent.host.empty(stream, FrameKind::Stop);
    }
    agent.host.empty(stdin, FrameKind::Eof);
    until(&mut agent, &mut events, |event| *event == Event::Eof(stderr));
    agent.host.empty(stderr, FrameKind::Stop);
    events.extend(rest(&mut agent));
    assert_eq!(ends(&events), BTreeMap::from([(stdout, 1), (stderr, 1)]));
}

#[test]
fn a_stop_that_crosses_the_end_of_a_stream_makes_no_second_one() {
    let mut agent = Agent::start();
    let mut events = Vec::new();
    let mut wanted = BTreeMap::new();
    for number in 0..100 {
        // The child holds stderr, so that the command is still known when its Stop comes, which is
        // about when stdout ends.
        let script = "sleep 60 >/dev/null & echo $! >&2; exit 0";
        let exec = Exec { process: ProcessId(number), ..sh(script) };
        let [stdout, stderr] = [Stdio::Stdout, Stdio::Stderr].map(|s| exec.process.stream(s));
        wanted.extend([(stdout, 1), (stderr, 1)]);
        agent.host.start(&exec);
        let first = events.len();
        let exited = |event: &Event| matches!(event, Event::Message(GuestMessage::Exited(..)));
        until(&mut agent, &mut events, exited);
        for stream in [stdout, stderr, stdout, stderr] {
            agent.host.empty(stream, FrameKind::Stop);
        }
        let said: Vec<u8> = events[first..]
            .iter()
            .filter_map(|event| match event {
                Event::Data(_, data) => Some(data.as_slice()),
                _ => None,
            })
            .collect::<Vec<_>>()
            .concat();
        let sleeper = String::from_utf8(said).unwrap().trim().parse().unwrap();
        let sleeper = rustix::process::Pid::from_raw(sleeper).unwrap();
        rustix::process::kill_process(sleeper, rustix::process::Signal::KILL).unwrap();
    }
    events.extend(rest(&mut agent));
    assert_eq!(ends(&events), wanted);
}

#[test]
fn a_command_that_does_not_start_has_no_streams() {
    let mut agent = Agent::start();
    let pipes = |stderr| ExecStdio::Pipes { stdin: true, stdout: true, stderr };
    let terminal = ExecStdio::Terminal(TerminalSize { rows: 24, columns: 80 });
    let kinds = [pipes(StderrTo::Stream), pipes(StderrTo::Stdout), terminal];
    let mut commands = Vec::new();
    for stdio in kinds {
        for (argv, cwd) in [("/no/such/program", "/"), ("true", "/no/such"), ("/etc/passwd", "/")] {
            let process = ProcessId(commands.len() as u32);
            let cwd = cwd.as_bytes().to_vec();
            commands.push(Exec { process, cwd, stdio: stdio.clone(), ..command(&[argv]) });
        }
    }
    for exec in &commands {
        let process = exec.process;
        agent.host.start(exec);
        // What a host sends that has not been answered yet.
        agent.host.data(process.stream(Stdio::Stdin), b"input");
        agent.host.empty(process.stream(Stdio::Stdin), FrameKind::Eof);
        agent.host.empty(process.stream(Stdio::Stdout), FrameKind::Stop);
        agent.host.empty(process.stream(Stdio::Stderr), FrameKind::Stop);
        agent.host.grant(process.stream(Stdio::Stdout), 1);
        agent.host.message(&HostMessage::Signal(process, libc::SIGTERM));
    }
    let events = rest(&mut agent);
    let failed = |event: &Event| match event {
        Event::Message(GuestMessage::StartFailed(process, _)) => Some(*process),
        Event::Message(GuestMessage::Started(LAST)) => None,
        other => panic!("{other:?} came for a command that did not start"),
    };
    let failed: Vec<_> = events.iter().filter_map(failed).collect();
    assert_eq!(failed, commands.iter().map(|exec| exec.process).collect::<Vec<_>>());
}

/// What a terminal was written comes through a work queue of the kernel, so that it may be on its way
/// still when the command has ended.
#[test]
fn the_last_output_of_a_terminal_comes_before_the_exit() {
    let mut agent = Agent::start();
    let terminal = ExecStdio::Terminal(TerminalSize { rows: 24, columns: 80 });
    for round in 0..300 {
        // A child that stays must not hold the end up, as it holds the terminal.
        let script = "sleep 5 & printf 'some\nlast words\n'";
        let exec = Exec { process: ProcessId(round), stdio: terminal.clone(), ..sh(script) };
        agent.host.start(&exec);
        let mut seen = Vec::new();
        loop {
            match agent.host.next().expect("the agent goes on") {
                Event::Data(_, bytes) => seen.extend(bytes),
                Event::Message(GuestMessage::Exited(process, _)) if process == exec.process => {
                    break;
                }
                _ => {}
            }
        }
        assert_eq!(String::from_utf8_lossy(&seen), "some\r\nlast words\r\n", "round {round}");
    }
}
