//! Standard streams of a command behave as those of a local one.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use crate::common::{DEBIAN_6_12, PATIENCE, Process, Site, kernel, noise};

const MIB: usize = 1024 * 1024;

/// What may be under way in one direction: the window of the stream in the agent, the same on the
/// host, and pipes on both sides, rounded up.
const UNDER_WAY: usize = 4 * MIB;

#[test]
fn every_byte_passes_unchanged_and_the_streams_stay_apart() {
    let site = Site::new();
    // All byte values, and no newline at the end.
    let mut bytes: Vec<u8> = (0..4).flat_map(|_| 0..=255).collect();
    bytes.extend_from_slice(b"the end without a newline");
    let outcome = site.sh(&[], "tee /dev/stderr").input(bytes.clone()).output();
    outcome.expect_code(0);
    assert!(outcome.stdout == bytes, "stdout: {:?}", outcome.stdout_text());
    assert!(outcome.stderr == bytes, "stderr: {:?}", outcome.stderr_text());
}

#[test]
fn a_partial_line_is_there_while_the_command_runs() {
    let site = Site::new();
    let mut run =
        site.sh(&[], "printf part; printf E >&2; read x; printf \"|$x\"").open_stdin().start();
    run.wait_stdout("part");
    run.wait_stderr("E");
    run.stdin.as_mut().unwrap().write_all(b"answer\n").unwrap();
    let outcome = run.finish();
    outcome.expect_code(0);
    assert_eq!(outcome.stdout_text(), "part|answer");
}

#[test]
fn one_file_for_both_streams_keeps_the_order_and_appends() {
    let site = Site::new();
    let script = r#"echo before > log
"$VMLAB" run -q -k debian:6.12 -- sh -c '
    i=0
    while [ $i -lt 200 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done' >> log 2>&1
echo "after $?" >> log"#;
    site.host_sh(script).output().expect_code(0);
    let mut wanted = String::from("before\n");
    for i in 0..200 {
        wanted += &format!("out {i}\nerr {i}\n");
    }
    wanted += "after 0\n";
    let log = std::fs::read_to_string(site.cwd().join("log")).unwrap();
    assert!(log == wanted, "{log}");
}

#[test]
fn pipes_on_both_sides() {
    let site = Site::new();
    let script = r#"printf 'b\na\nc' | "$VMLAB" run -q -k debian:6.12 -- sort | tr a-c A-C"#;
    site.host_sh(script).output().expect_stdout("A\nB\nC\n");
}

#[test]
fn no_terminal_and_null_devices() {
    let site = Site::new();
    let script = r#"setsid --wait "$VMLAB" run -q -k debian:6.12 -- sh -c '
    for i in 0 1; do test /proc/$$/fd/$i -ef /dev/null && echo null $i >&2; done
    cat; echo lost
    (: < /dev/tty) 2>/dev/null && echo terminal >&2; echo end >&2' </dev/null >/dev/null"#;
    let outcome = site.host_sh(script).output();
    outcome.expect_code(0);
    assert_eq!(outcome.stderr_text(), "null 0\nnull 1\nend\n");
}

#[test]
fn closed_streams_are_empty_ones() {
    let site = Site::new();
    let script = r#""$VMLAB" run -q -k debian:6.12 -- sh -c '
    cat; echo "in $?" >&2; echo lost; echo lost >&3' <&- >&- 3>&-"#;
    let outcome = site.host_sh(script).output();
    // The guest's shell has no descriptor 3 to write to.
    outcome.expect_code(2).expect_stderr(&["in 0\n", "3: Bad file descriptor"]);
    assert_eq!(outcome.stdout_text(), "");
}

#[test]
fn all_output_closed_does_not_stop_the_command() {
    let site = Site::new();
    let script = r#""$VMLAB" run -q -k debian:6.12 -- sh -c '
    echo lost; echo lost >&2; echo done > file; exit 4' <&- >&- 2>&-"#;
    site.host_sh(script).output().expect_code(4);
    assert_eq!(std::fs::read_to_string(site.cwd().join("file")).unwrap(), "done\n");
}

#[test]
fn a_large_input_arrives_whole_and_ends() {
    let site = Site::new();
    let input = noise(64 * MIB);
    std::fs::write(site.path().join("input"), &input).unwrap();
    let local = site.host_sh("sha256sum < ../input").output();
    local.expect_code(0);
    // Once as a pipe that is closed at its end.
    let run = site.run(&[], ["sha256sum"]).input(input).output();
    run.expect_stdout(&local.stdout_text());
}

#[test]
fn a_reader_that_stops_early_takes_no_more_than_it_has_room_for() {
    let site = Site::new();
    // An endless input, of which one byte is wanted.
    let outcome =
        site.host_sh(r#""$VMLAB" run -q -k debian:6.12 -- head -c1 < /dev/zero"#).output();
    outcome.expect_stdout("\0");

    // A command that reads nothing until it is told to, by a file in the shared directory.
    let script = "echo ready; until [ -e go ]; do sleep 0.1; done; wc -c";
    let mut run = site.sh(&[], script).open_stdin().start();
    run.wait_stdout("ready");
    let mut stdin = run.stdin.take().unwrap();
    rustix::io::ioctl_fionbio(&stdin, true).unwrap();
    let chunk = vec![0; 64 * 1024];
    let mut taken = 0;
    // What is accepted within a second of the last success is all that there is room for.
    loop {
        match stdin.write(&chunk) {
            Ok(count) => taken += count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if !writable_within(&stdin, Duration::from_secs(1)) {
                    break;
                }
            }
            Err(error) => panic!("{error}"),
        }
        assert!(taken < 4 * UNDER_WAY, "the input of a command that reads nothing is taken in");
    }
    assert!(taken <= UNDER_WAY, "{taken} bytes were taken in advance");
    drop(stdin);
    std::fs::write(site.cwd().join("go"), "").unwrap();
    run.finish().expect_stdout(&format!("ready\n{taken}\n"));
}

fn writable_within(pipe: &impl std::os::fd::AsFd, time: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let timeout = Timespec { tv_sec: time.as_secs().try_into().unwrap(), tv_nsec: 0 };
    poll(&mut [PollFd::new(pipe, PollFlags::OUT)], Some(&timeout)).unwrap() > 0
}

/// Writes a flood, and says on stderr how much of it got anywhere while nobody read it. Then, when
/// all is written, how much memory the agent has needed, and waits to be let go.
const FLOOD: &str = r#"
head -c 268435456 /dev/zero &
flood=$!
written() { sed -n 's/^wchar: //p' /proc/$flood/io; }
last=none
until now=$(written); [ "$now" != 0 ] && [ "$now" = "$last" ]; do last=$now; sleep 0.5; done
echo "stalled $now" >&2
wait $flood
echo "wrote $?" >&2
sed -n 's/^VmHWM:[^0-9]*\([0-9]*\) kB/agent \1/p' /proc/1/status >&2
echo "end" >&2
read x
"#;

#[test]
fn a_flood_into_a_slow_reader_stays_in_bounded_memory() {
    let site = Site::new();
    kernel(DEBIAN_6_12);
    let mut command = site.sh(&[], FLOOD).open_stdin().command;
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let watchdog = Process::watchdog(&child, PATIENCE);
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut stderr, &mut line).unwrap();
        line
    };
    let number = |line: &str, name: &str| -> usize {
        let number = line.trim().strip_prefix(name).and_then(|n| n.trim().parse().ok());
        number.unwrap_or_else(|| panic!("{line:?} instead of {name}"))
    };
    let stalled = number(&line(), "stalled");
    assert!(stalled <= UNDER_WAY, "{stalled} bytes were taken in with nobody to read them");

    let mut buffer = vec![0; MIB];
    let mut count = 0;
    while count < 256 * MIB {
        let got = stdout.read(&mut buffer).unwrap();
        assert!(got > 0, "the flood ended after {count} bytes");
        assert!(buffer[..got].iter().all(|b| *b == 0));
        count += got;
    }
    assert_eq!(count, 256 * MIB);
    assert_eq!(line(), "wrote 0\n");
    let agent = number(&line(), "agent");
    assert!(agent < 16 * 1024, "the agent needed {agent} kB");
    assert_eq!(line(), "end\n");
    let vmlab = watchdog.status_kb("VmHWM");
    assert!(vmlab < 64 * 1024, "vmlab needed {vmlab} kB");
    stdin.write_all(b"\n").unwrap();
    assert_eq!(stdout.read(&mut buffer).unwrap(), 0);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_reader_that_goes_away_gives_the_command_sigpipe() {
    let site = Site::new();
    let script = r#""$VMLAB" run -q -k debian:6.12 -- yes | head -1; echo "${PIPESTATUS[0]}""#;
    site.host_sh(script).output().expect_stdout("y\n141\n");
}
