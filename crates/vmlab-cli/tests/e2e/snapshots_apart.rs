//! VMs of one snapshot have nothing of each other: not their random numbers, not their files, not their
//! time; and any number of them can start at once.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::common::snapshots::{Begun, Cold, NONE, Ran};
use crate::common::{DEBIAN_SID, PATIENCE, Process, kernel, need};

/// Prints what two guests have by chance, with its name; the first is drawn before any other program has
/// run. 318 is the system call getrandom, 25 the auxiliary vector's AT_RANDOM.
const BY_CHANCE: &str = r#"
    my $bytes = "x" x 16;
    syscall(318, $bytes, 16, 0) == 16 or die $!;
    sub show { my ($name, $value) = @_; $value =~ s/\s+//g; print "$name $value\n" }
    sub slurp { open my $file, "<:raw", shift or die $!; local $/; <$file> }
    show getrandom => unpack "H*", $bytes;
    open my $urandom, "<:raw", "/dev/urandom" or die $!;
    sysread $urandom, $bytes, 16;
    show urandom => unpack "H*", $bytes;
    my %auxiliary = unpack "Q*", slurp "/proc/self/auxv";
    open my $memory, "<:raw", "/proc/self/mem" or die $!;
    sysseek $memory, $auxiliary{25}, 0;
    sysread $memory, $bytes, 16;
    show at_random => unpack "H*", $bytes;
    my $maps = slurp "/proc/self/maps";
    show stack => $maps =~ /^(\w+)-.*\[stack\]$/m;
    show libc => $maps =~ /^(\w+)-.*\/libc\.so/m;
    show uuid => slurp "/proc/sys/kernel/random/uuid";
    show boot_id => slurp "/proc/sys/kernel/random/boot_id";
    show mktemp => scalar `mktemp -d`;
    show tcp_port => do {
        require IO::Socket::INET;
        my @sockets = map { IO::Socket::INET->new(Listen => 1, LocalAddr => "127.0.0.1") } 1 .. 4;
        join ",", map { $_->sockport } @sockets
    };
"#;

/// The values by name, of many guests, none of which has one of another.
#[track_caller]
fn assert_all_differ(answers: &[String]) {
    let names: Vec<&str> = answers[0].lines().map(|line| line.split_once(' ').unwrap().0).collect();
    assert_eq!(names.len(), 9, "{}", answers[0]);
    for name in names {
        let values: Vec<&str> = answers
            .iter()
            .map(|text| {
                let value = |line| str::strip_prefix(line, name)?.strip_prefix(' ');
                text.lines().find_map(value).unwrap()
            })
            .collect();
        assert!(values.iter().all(|value| value.len() > 5), "{name}: {values:?}");
        let different: BTreeSet<_> = values.iter().collect();
        assert_eq!(different.len(), values.len(), "{name}: {values:#?}");
    }
}

/// Asks the VM that a snapshot is taken of, and many that go on from it.
fn by_chance(options: &[&str], command: &[&str], count: usize) {
    need("perl", "perl");
    let cold = Cold::new();
    let command = [command, &["perl", "-e", BY_CHANCE]].concat();
    let first = cold.run(options, &command);
    let mut answers = vec![first.expect_taken().text()];
    for _ in 0..count {
        answers.push(cold.run(options, &command).expect_restored().text());
    }
    assert_all_differ(&answers);
}

#[test]
fn the_first_random_numbers_of_twenty_vms_differ() {
    by_chance(&[], &[], 20);
}

#[test]
fn each_cpus_first_random_numbers_differ() {
    need("taskset", "util-linux");
    by_chance(&["--cpus", "2"], &["taskset", "-c", "1"], 5);
}

#[test]
fn the_first_random_numbers_of_old_and_new_kernels_differ() {
    by_chance(&["-k", kernel(crate::common::CLOUD[1])], &[], 5);
    by_chance(&["-k", kernel(DEBIAN_SID)], &[], 5);
}

#[test]
fn nothing_of_one_run_is_in_another() {
    let cold = Cold::new();
    let leave = "echo mark.mark > /tmp/mark.mark; echo mark.mark > /opt/mark.mark; \
        touch /run/mark.mark /dev/shm/mark.mark /var/tmp/mark.mark; \
        echo mark.mark >> /etc/motd; rm /etc/passwd; mount -t tmpfs mark.mark /mnt; \
        echo mark.mark > /dev/kmsg; echo mark.mark > /proc/sys/kernel/core_pattern; \
        mkdir /sys/fs/cgroup/mark.mark; modprobe loop; \
        bash -c 'exec -a mark.mark sleep 1000' > /dev/null & echo left; ";
    let look = "ls -A /tmp /opt /run /dev/shm /var/tmp /sys/fs/cgroup; cat /etc/motd /proc/mounts; \
        dmesg; cat /proc/sys/kernel/core_pattern /proc/modules; ps ax -o args; uname -n; \
        test -s /etc/passwd && echo looked";
    let looks_clean = |ran: &Ran| {
        let text = ran.text();
        let lines: Vec<_> = text.lines().collect();
        let foreign = |line: &&&str| line.contains("mark.mark") || line.starts_with("loop ");
        assert_eq!(lines.iter().find(foreign), None, "{text}");
        assert_eq!(lines[lines.len() - 2..], ["here", "looked"], "{text}");
        assert!(text.contains("Linux version"), "{text}");
    };
    // It ends, with all that it left, in the VM that the snapshot was taken of.
    cold.sh(&["--hostname", "mark.mark"], leave).expect_taken().expect_stdout("left\n");
    let ran = cold.sh(&["--hostname", "here"], look);
    looks_clean(ran.expect_restored());
    // It goes on while the other looks.
    let stay = format!("{leave} sleep 1000");
    let staying = cold.start(&["--hostname", "mark.mark"], ["sh", "-c", &stay]);
    staying.running.wait_stdout("left\n");
    let ran = cold.sh(&["--hostname", "here"], look);
    looks_clean(ran.expect_restored());
    staying.running.signal(rustix::process::Signal::TERM);
    staying.finish();
    let ran = cold.sh(&["--hostname", "here"], look);
    looks_clean(ran.expect_restored());
}

#[test]
fn a_run_changes_nothing_of_the_snapshot() {
    let cold = Cold::new();
    let over = |via| {
        let options = ["-k", kernel(crate::common::DEBIAN_6_12), "-m", "192M", "--share-via", via];
        // A good part of its memory has other content after this.
        cold.sh(&options, "head -c 60000000 /dev/urandom > /dev/shm/noise && echo full")
    };
    for via in ["9p", "virtiofs"] {
        let before = cold.entries();
        over(via).expect_taken().expect_stdout("full\n");
        let entry = cold.entries().into_iter().find(|entry| !before.contains(entry)).unwrap();
        let content = |name: &str| std::fs::read(entry.join(name)).unwrap();
        let saved = ["memory0", "state", "manifest.json", "stamp.json"].map(content);
        over(via).expect_restored().expect_stdout("full\n");
        over(via).expect_restored().expect_stdout("full\n");
        let after = ["memory0", "state", "manifest.json", "stamp.json"].map(content);
        // Too long to be shown.
        assert!(saved == after, "over {via}, a run has changed the snapshot");
    }
}

#[test]
fn eight_at_once_have_files_of_their_own() {
    let cold = Cold::new();
    cold.run(&[], ["true"]).expect_taken();
    // Each writes, waits until all have written, and reads.
    let script = |number: usize| {
        format!(
            "for dir in /tmp /opt /run /dev/shm; do echo {number} > $dir/same; done; \
             echo {number} >> /etc/motd; touch {number}.written; \
             while [ $(ls *.written | wc -l) -lt 8 ]; do sleep 0.1; done; \
             cat /tmp/same /opt/same /run/same /dev/shm/same; tail -n 1 /etc/motd"
        )
    };
    let begun: Vec<_> =
        (0..8).map(|number| cold.start(&[], ["sh", "-c", &script(number)])).collect();
    for (number, begun) in begun.into_iter().enumerate() {
        let wanted = format!("{number}\n").repeat(5);
        begun.finish().expect_restored().expect_stdout(&wanted);
    }
}

/// Many on a busy machine, with little memory each.
#[test]
fn fifty_at_once_boot_one_vm() {
    let cold = Cold::new();
    let options = ["-m", "128M", "--no-cwd"];
    let begun: Vec<_> = (0..50).map(|_| cold.start(&options, ["echo", "done"])).collect();
    let ran: Vec<Ran> = begun.into_iter().map(Begun::finish).collect();
    for one in &ran {
        one.expect_stdout("done\n");
    }
    let taken = ran.iter().filter(|one| one.has("boot")).count();
    assert_eq!(taken, 1, "{:?}", ran.iter().map(|one| &one.phases).collect::<Vec<_>>());
    ran.iter().filter(|one| !one.has("boot")).for_each(|one| _ = one.expect_restored());
    cold.entry();
    assert_eq!(cold.litter(), NONE);
}

/// By how much a guest's clock may be wrong.
const CLOCK: Duration = Duration::from_millis(50);

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

/// Asks for the time and checks it, whatever the question and the answer took.
fn check_clock(stdin: &mut ChildStdin, stdout: &mut impl BufRead, when: &str) {
    let before = now();
    stdin.write_all(b"?\n").unwrap();
    let mut answer = String::new();
    stdout.read_line(&mut answer).unwrap();
    let after = now();
    let seconds: f64 = answer.trim().parse().unwrap_or_else(|_| panic!("{answer:?}"));
    let guest = Duration::from_secs_f64(seconds);
    assert!(
        before - CLOCK <= guest && guest <= after + CLOCK,
        "{when}: the guest's clock is {:.4} s after the question, and {:.4} s after the answer",
        seconds - before.as_secs_f64(),
        seconds - after.as_secs_f64()
    );
}

#[test]
fn the_clock_is_right() {
    need("perl", "perl");
    let cold = Cold::new();
    let answer = "$| = 1; printf qq{%.6f\\n}, time";
    let command = ["perl", "-MTime::HiRes=time", "-ne", answer];
    // The VM that the snapshot is taken of, one of the fresh snapshot, and one of an older one.
    for (run, pause) in ["first", "second", "third"].into_iter().zip([0, 0, 3]) {
        std::thread::sleep(Duration::from_secs(pause));
        let mut vmlab = cold.prepare(&["-q"], command).0.into_terminal_command();
        vmlab.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = vmlab.spawn().unwrap();
        let _watchdog = Process::watchdog(&child, PATIENCE);
        let mut stdin = child.stdin.take().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        for moment in ["at once", "then", "again"] {
            check_clock(&mut stdin, &mut stdout, &format!("{run} run, {moment}"));
        }
        // It goes at the right speed, too.
        std::thread::sleep(Duration::from_secs(3));
        check_clock(&mut stdin, &mut stdout, &format!("{run} run, 3 s later"));
        drop(stdin);
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn what_a_restored_guest_makes_is_of_now() {
    let cold = Cold::new();
    cold.run(&[], ["true"]).expect_taken();
    std::thread::sleep(Duration::from_secs(2));
    let before = now();
    let ran = cold.sh(&[], "touch made /tmp/made; stat -c %Y /tmp/made");
    let after = now();
    let text = ran.expect_restored().text();
    let lines: Vec<f64> =
        text.lines().map(|line| line.split(' ').next().unwrap().parse().unwrap()).collect();
    let range = before.as_secs_f64() - 1.1..after.as_secs_f64() + 0.1;
    assert!(range.contains(&lines[0]), "{lines:?} {range:?}");
    let made = cold.site.cwd().join("made").metadata().unwrap().modified().unwrap();
    let made = made.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    assert!(range.contains(&made), "{made} {range:?}");
}

#[test]
fn a_snapshot_in_use_can_be_replaced() {
    let cold = Cold::new();
    cold.run(&[], ["true"]).expect_taken();
    let command = "echo here; cat; sha256sum < /bin/bash > /dev/null && echo there";
    let (vmlab, report) = cold.prepare(&["-q"], ["sh", "-c", command]);
    let mut staying = Begun { running: vmlab.open_stdin().start(), report };
    staying.running.wait_stdout("here\n");
    cold.run(&["--cold"], ["true"]).expect_taken();
    cold.run(&[], ["true"]).expect_restored();
    drop(staying.running.stdin.take());
    staying.finish().expect_restored().expect_stdout("here\nthere\n");
}
