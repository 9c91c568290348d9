//! Commands through the real agent, outside of a VM: it serves them on its standard input.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod host;

use std::time::Duration;

use host::{Agent, Event, Outcome, command, sh};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};
use vmlab_wire::message::{
    Exec, ExecStdio, ExitStatus, GoOn, StartFailure, StartStage, StderrTo, Stdio, TerminalSize,
    User,
};
use vmlab_wire::{FrameKind, GuestMessage, HostMessage, ProcessId, STREAM_WINDOW};

/// How long what has to happen may take on a busy machine.
const PATIENCE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

fn run(exec: &Exec, input: &[u8]) -> Outcome {
    Agent::start().host.run(exec, input)
}

fn stdout(exec: &Exec) -> String {
    let outcome = run(exec, b"");
    assert_eq!(String::from_utf8_lossy(&outcome.stderr), "");
    assert_eq!(outcome.exited.unwrap().status, ExitStatus::Code(0));
    String::from_utf8(outcome.stdout).unwrap()
}

fn start_failure(exec: &Exec) -> StartFailure {
    run(exec, b"").failed.unwrap()
}

#[test]
fn exit_codes_and_signals_come_back() {
    let mut agent = Agent::start();
    for (number, code) in [0u8, 1, 42, 255].into_iter().enumerate() {
        let exec = Exec { process: ProcessId(number as u32), ..sh(&format!("exit {code}")) };
        let outcome = agent.host.run(&exec, b"");
        assert_eq!(outcome.exited.unwrap().status, ExitStatus::Code(code));
    }
    let exec = Exec { process: ProcessId(9), ..sh("kill -SEGV $$") };
    let outcome = agent.host.run(&exec, b"");
    assert_eq!(outcome.exited.unwrap().status, ExitStatus::Signal(libc::SIGSEGV));
}

#[test]
fn what_cannot_be_started_says_why() {
    let failure = |stage, errno| StartFailure { stage, errno };
    let program = StartStage::Program;
    assert_eq!(start_failure(&command(&["no-such-program"])), failure(program, libc::ENOENT));
    assert_eq!(start_failure(&command(&["/no/such"])), failure(program, libc::ENOENT));
    assert_eq!(start_failure(&command(&["/etc/passwd"])), failure(program, libc::EACCES));
    assert_eq!(start_failure(&command(&["/"])), failure(program, libc::EACCES));
    assert_eq!(start_failure(&command(&["a\0b"])), failure(program, libc::EINVAL));
    assert_eq!(start_failure(&command(&[])), failure(program, libc::EINVAL));
    let lost = Exec { cwd: b"/no/such".to_vec(), ..command(&["true"]) };
    assert_eq!(start_failure(&lost), failure(StartStage::Cwd, libc::ENOENT));
}

#[test]
fn the_given_path_is_searched_as_execvp_does() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("no-shebang");
    std::fs::write(&script, "echo script $1").unwrap();
    let mut exec = command(&["no-shebang", "argument"]);
    let path = format!("/no/such:{}:/usr/bin", dir.path().display());
    exec.env = vec![(b"PATH".to_vec(), path.into_bytes())];
    assert_eq!(start_failure(&exec).errno, libc::EACCES);
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(stdout(&exec), "script argument\n");
}

#[test]
fn environment_directory_umask_and_limits_are_exactly_those_given() {
    let mut exec = command(&["env"]);
    exec.env.push((b"NAME".to_vec(), b"a=b c".to_vec()));
    assert_eq!(stdout(&exec), "PATH=/usr/bin:/bin\nNAME=a=b c\n");
    let mut exec = sh("pwd; umask; ulimit -n; ulimit -Hn; ulimit -c");
    exec.cwd = b"/usr".to_vec();
    exec.umask = 0o27;
    exec.rlimits = vec![(libc::RLIMIT_NOFILE, 100, 200), (libc::RLIMIT_CORE, 0, 0)];
    assert_eq!(stdout(&exec), "/usr\n0027\n100\n200\n0\n");
}

#[test]
fn only_the_standard_streams_are_inherited_and_signals_are_default() {
    assert_eq!(stdout(&command(&["ls", "/proc/self/fd"])), "0\n1\n2\n3\n");
    let status = stdout(&command(&["cat", "/proc/self/status"]));
    for set in ["SigBlk", "SigIgn", "SigCgt"] {
        assert!(status.contains(&format!("{set}:\t0000000000000000\n")), "{status}");
    }
}

#[test]
fn bytes_pass_as_they_are() {
    let exec = Exec {
        argv: vec![b"printf".to_vec(), b"%s".to_vec(), vec![0xff, 0x80, b'\n']],
        ..command(&[])
    };
    assert_eq!(run(&exec, b"").stdout, [0xff, 0x80, b'\n']);
    let every: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    assert_eq!(run(&command(&["cat"]), &every).stdout, every);
}

#[test]
fn stdin_of_any_size_and_its_end_arrive() {
    assert_eq!(run(&command(&["wc", "-c"]), b"").stdout, b"0\n");
    let big = vec![b'x'; 20_000_000];
    let mut agent = Agent::start();
    let slow = sh("sleep 0.3; wc -c");
    assert_eq!(agent.host.run(&slow, &big).stdout, b"20000000\n");
    assert!(agent.peak_kib() < 16 * 1024, "the agent used {} KiB", agent.peak_kib());
}

#[test]
fn a_closed_stdin_stops_the_stream() {
    let outcome = run(&sh("exec <&-; sleep 0.2; exit 5"), &vec![0; 4_000_000]);
    assert!(outcome.stdin_stopped);
    assert_eq!(outcome.exited.unwrap().status, ExitStatus::Code(5));
}

#[test]
fn a_flood_waits_for_a_slow_reader() {
    let mut agent = Agent::start();
    let exec = command(&["head", "-c", "50000000", "/dev/zero"]);
    let stdout = exec.process.stream(Stdio::Stdout);
    agent.host.stalled.push(stdout);
    agent.host.start(&exec);
    let mut got = 0;
    while got < STREAM_WINDOW as usize {
        if let Some(Event::Data(s, data)) = agent.host.next() {
            assert_eq!(s, stdout);
            got += data.len();
        }
    }
    assert_eq!(got, STREAM_WINDOW as usize);
    // Another command is not held up, and the flood has not gone on meanwhile.
    let other = Exec { process: ProcessId(1), ..sh("echo hello") };
    assert_eq!(agent.host.run(&other, b"").stdout, b"hello\n");
    agent.host.stalled.clear();
    agent.host.regrant(stdout, STREAM_WINDOW);
    let rest = agent.host.finish(&exec, None);
    assert_eq!(rest.stdout.len() + got, 50_000_000);
    assert_eq!(rest.exited.unwrap().status, ExitStatus::Code(0));
    assert!(agent.peak_kib() < 16 * 1024, "the agent used {} KiB", agent.peak_kib());
}

#[test]
fn a_stopped_stdout_is_a_closed_pipe() {
    let mut agent = Agent::start();
    let exec = command(&["cat", "/dev/zero"]);
    agent.host.start(&exec);
    while !matches!(agent.host.next(), Some(Event::Data(..))) {}
    agent.host.empty(exec.process.stream(Stdio::Stdout), FrameKind::Stop);
    let outcome = agent.host.finish(&exec, None);
    assert_eq!(outcome.exited.unwrap().status, ExitStatus::Signal(libc::SIGPIPE));
}

#[test]
fn a_stream_ends_once() {
    let mut agent = Agent::start();
    let exec = sh("exec >&-; read line; echo $line >&2");
    agent.host.start(&exec);
    let stdout = exec.process.stream(Stdio::Stdout);
    while !matches!(agent.host.next(), Some(Event::Eof(stream)) if stream == stdout) {}
    // The host may not know yet that there is nothing left to stop.
    agent.host.empty(stdout, FrameKind::Stop);
    agent.host.data(exec.process.stream(Stdio::Stdin), b"on\n");
    let mut stderr = Vec::new();
    loop {
        match agent.host.next().unwrap() {
            Event::Data(_, data) => stderr.extend(data),
            Event::Eof(stream) => assert_ne!(stream, stdout, "it ended a second time"),
            Event::Message(GuestMessage::Exited(..)) => break,
            _ => {}
        }
    }
    assert_eq!(stderr, b"on\n");
}

#[test]
fn stderr_is_apart_or_in_order() {
    let mut exec = sh("for i in 1 2 3 4 5; do echo o$i; echo e$i >&2; done");
    let outcome = run(&exec, b"");
    assert_eq!(outcome.stdout, b"o1\no2\no3\no4\no5\n");
    assert_eq!(outcome.stderr, b"e1\ne2\ne3\ne4\ne5\n");
    exec.stdio = ExecStdio::Pipes { stdin: false, stdout: true, stderr: StderrTo::Stdout };
    assert_eq!(run(&exec, b"").stdout, b"o1\ne1\no2\ne2\no3\ne3\no4\ne4\no5\ne5\n");
    exec.stdio = ExecStdio::Pipes { stdin: false, stdout: false, stderr: StderrTo::Null };
    let outcome = run(&exec, b"");
    assert_eq!((outcome.stdout, outcome.stderr), (vec![], vec![]));
}

#[test]
fn the_end_comes_after_all_output_and_before_background_children() {
    let mut agent = Agent::start();
    let exec = sh("head -c 3000000 /dev/zero; sleep 60 & echo $!");
    agent.host.start(&exec);
    let stdout = exec.process.stream(Stdio::Stdout);
    let mut got = Vec::new();
    loop {
        match agent.host.next().unwrap() {
            Event::Data(s, data) if s == stdout => got.extend(data),
            Event::Eof(s) => assert_ne!(s, stdout, "the background child still holds it"),
            Event::Message(GuestMessage::Exited(..)) => break,
            _ => {}
        }
    }
    assert!(got.len() > 3_000_000);
    let pid: i32 = String::from_utf8_lossy(&got[3_000_000..]).trim().parse().unwrap();
    // The streams end with the last of their writers, and the orphan is reaped.
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let mut ends = 0;
    while ends < 2 {
        ends += usize::from(matches!(agent.host.next(), Some(Event::Eof(_))));
    }
    let again = Exec { process: ProcessId(1), ..sh("true") };
    agent.host.run(&again, b"");
    assert!(rustix::process::test_kill_process(pid).is_err(), "the orphan was not reaped");
}

#[test]
fn signals_reach_the_whole_group() {
    let mut agent = Agent::start();
    let exec = sh("trap 'echo got; exit 7' TERM; sh -c 'echo ready; exec sleep 60' & wait; wait");
    agent.host.start(&exec);
    while !matches!(agent.host.next(), Some(Event::Data(..))) {}
    agent.host.message(&HostMessage::Signal(exec.process, libc::SIGTERM));
    let outcome = agent.host.finish(&exec, None);
    assert_eq!(outcome.stdout, b"got\n");
    assert_eq!(outcome.exited.unwrap().status, ExitStatus::Code(7));
}

#[test]
fn a_terminal_is_a_terminal() {
    let mut agent = Agent::start();
    let size = TerminalSize { rows: 33, columns: 77 };
    let script = "tty >/dev/null && stty size; trap 'stty size; echo done; exit 3' WINCH; \
                  echo ready; read a; read b; cat";
    let exec = Exec { stdio: ExecStdio::Terminal(size), ..command(&["bash", "-c", script]) };
    agent.host.start(&exec);
    let mut seen = agent.host.until(&exec, "ready");
    assert!(seen.starts_with("33 77\r\n"), "{seen:?}");
    agent.host.message(&HostMessage::Resize(exec.process, TerminalSize { rows: 10, columns: 20 }));
    agent.host.data(exec.process.stream(Stdio::Stdin), b"\n");
    let outcome = agent.host.finish(&exec, None);
    seen = String::from_utf8(outcome.stdout).unwrap();
    assert!(seen.contains("10 20\r\ndone\r\n"), "{seen:?}");
    assert_eq!(outcome.exited.unwrap().status, ExitStatus::Code(3));
}

#[test]
fn a_terminal_of_unknown_size_has_the_usual_one() {
    let unknown = TerminalSize { rows: 0, columns: 0 };
    let script =
        "stty size; trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep .01; done";
    let mut agent = Agent::start();
    let exec = Exec { stdio: ExecStdio::Terminal(unknown), ..sh(script) };
    agent.host.start(&exec);
    assert_eq!(agent.host.until(&exec, "ready\r\n"), "24 80\r\nready\r\n");
    // Part of it may be known.
    agent.host.message(&HostMessage::Resize(exec.process, TerminalSize { rows: 0, columns: 90 }));
    assert_eq!(agent.host.finish(&exec, None).stdout, b"24 90\r\n");
}

#[test]
fn a_terminal_passes_end_of_file_and_interrupts() {
    let mut agent = Agent::start();
    let terminal = ExecStdio::Terminal(TerminalSize { rows: 24, columns: 80 });
    let exec = Exec { stdio: terminal.clone(), ..command(&["cat"]) };
    let outcome = agent.host.run(&exec, b"line\n");
    assert_eq!(outcome.stdout, b"line\r\nline\r\n");
    assert_eq!(outcome.exited.unwrap().status, ExitStatus::Code(0));
    let exec = Exec {
        process: ProcessId(1),
        stdio: terminal,
        ..command(&["bash", "-c", "echo ready; sleep 60"])
    };
    agent.host.start(&exec);
    agent.host.until(&exec, "ready");
    agent.host.message(&HostMessage::Signal(exec.process, libc::SIGINT));
    let outcome = agent.host.finish(&exec, None);
    assert_eq!(outcome.exited.unwrap().status, ExitStatus::Signal(libc::SIGINT));
}

#[test]
fn another_user_can_open_its_streams() {
    assert!(rustix::process::getuid().is_root(), "this test needs root to become another user");
    let mut exec = sh("id -u; id -g; id -G; echo out >/dev/stdout; echo err >/dev/stderr");
    exec.user = User { uid: 12345, gid: 23456, groups: vec![34567] };
    let outcome = run(&exec, b"");
    assert_eq!(outcome.stdout, b"12345\n23456\n23456 34567\nout\n");
    assert_eq!(outcome.stderr, b"err\n");
}

#[test]
fn nonsense_ends_the_session() {
    let message = [0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0xff, 0xff];
    let empty_data = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    for bytes in [&[0xff; 64][..], &message, &empty_data] {
        let mut agent = Agent::start();
        agent.host.raw(bytes);
        assert_eq!(agent.host.next(), None);
        assert_eq!(agent.child.wait().unwrap().code(), Some(1));
    }
}

#[test]
fn more_data_than_granted_ends_the_session() {
    let mut agent = Agent::start();
    let exec = sh("sleep 60");
    agent.host.start(&exec);
    let mut bytes = Vec::new();
    let stream = exec.process.stream(Stdio::Stdin);
    vmlab_wire::frame::put_data(&mut bytes, stream, &vec![0; 2 * STREAM_WINDOW as usize]);
    agent.host.raw_lossy(&bytes);
    while agent.host.next().is_some() {}
    assert_eq!(agent.child.wait().unwrap().code(), Some(1));
}

#[test]
fn power_off_and_hang_up_end_the_commands() {
    for polite in [true, false] {
        let mut agent = Agent::start();
        let exec = sh("echo $$; sleep 60");
        agent.host.start(&exec);
        let pid = agent.host.until(&exec, "\n").trim().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        let watched = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        if polite {
            agent.host.message(&HostMessage::PowerOff);
            let last = std::iter::from_fn(|| agent.host.next()).last();
            assert_eq!(last, Some(Event::Message(GuestMessage::PoweringOff)));
        } else {
            agent.host.hang_up();
        }
        assert!(agent.child.wait().unwrap().success());
        // The signal was sent; on a busy machine, dying of it takes its time.
        let mut fds = [PollFd::new(&watched, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&PATIENCE)), Ok(1), "the command still runs");
    }
}

#[test]
fn while_it_holds_nothing_is_said_and_commands_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::start();
    let marks = dir.path().join("marks").display().to_string();
    let script = format!("while echo x; do echo x >> {marks}; sleep 0.01; done");
    let exec = sh(&script);
    agent.host.start(&exec);
    agent.host.message(&HostMessage::Hold(Vec::new()));
    // All that was on its way comes before the answer, and nothing behind it.
    while !matches!(agent.host.next(), Some(Event::Message(GuestMessage::Done(Ok(()))))) {}
    let lines = || std::fs::read_to_string(&marks).unwrap_or_default().len();
    let before = lines();
    assert!(!agent.host.speaks_within(Duration::from_millis(300)));
    assert!(lines() > before);
    let go_on = GoOn { revive: false, clock_ns: 0, entropy: Vec::new() };
    agent.host.message(&HostMessage::GoOn(go_on));
    let mut answered = false;
    let mut said = false;
    while !(answered && said) {
        match agent.host.next().unwrap() {
            Event::Message(GuestMessage::Done(done)) => answered = done == Ok(()),
            Event::Data(..) => said = true,
            _ => {}
        }
    }
}

#[test]
fn one_that_does_not_hold_is_not_let_go_on_and_bad_slots_are_told() {
    let mut agent = Agent::start();
    agent.host.message(&HostMessage::Hold(vec![31]));
    let Some(Event::Message(GuestMessage::Done(Err(failure)))) = agent.host.next() else {
        panic!("it holds without the device")
    };
    assert!(failure.step.contains("devices"), "{failure:?}");
    assert_eq!(agent.host.run(&sh("exit 3"), b"").exited.unwrap().status, ExitStatus::Code(3));
    let go_on = GoOn { revive: false, clock_ns: 0, entropy: Vec::new() };
    agent.host.message(&HostMessage::GoOn(go_on));
    // It ends the session.
    assert!(agent.host.next().is_none());
}
