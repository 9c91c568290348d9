//! The machine that a guest has, its clock, its random numbers and its network.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::common::{DEBIAN_6_12, Site, native, need};
use crate::facts::{Facts, script};
use serde_json::Value;

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

#[test]
fn memory_cpus_and_arguments_arrive() {
    let site = Site::new();
    let options = [
        "--memory",
        "640M",
        "--cpus",
        "2",
        "--append",
        "vmlab_test=1 loglevel=3",
        "--append",
        "last_word",
        "--json",
        "report.json",
    ];
    let of_qemu = ["--qemu-arg=-device", "--qemu-arg=virtio-rng-pci", "--accel=tcg"];
    let options = if native() { options.to_vec() } else { [&options[..], &of_qemu].concat() };
    let words = script(
        r#"
        fact memory awk '/^MemTotal/ {print $2}' /proc/meminfo
        fact cpus nproc
        fact online cat /sys/devices/system/cpu/online
        fact cmdline cat /proc/cmdline
        fact virtio bash -c 'cat /sys/bus/virtio/devices/*/device'
        "#,
    );
    let facts = Facts::of(&site.run(&options, words).output());
    // The kernel itself takes a part of it.
    let memory = facts.number("memory");
    assert!((560 * 1024..640 * 1024).contains(&memory), "{memory} kB");
    facts.expect("cpus", "2").expect("online", "0-1");
    assert!(facts.text("cmdline").ends_with(" vmlab_test=1 loglevel=3 last_word"), "{facts:?}");
    // Virtio's number for an entropy source.
    assert!(native() || facts.text("virtio").lines().any(|id| id == "0x0004"), "{facts:?}");
    let report = std::fs::read(site.cwd().join("report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    let report = &report["runs"][0]["report"];
    let (accel, machine) = if native() { ("kvm", "native") } else { ("tcg", "microvm") };
    assert_eq!(report["accel"], accel);
    assert_eq!(report["machine"], machine);
    assert_eq!(report["cpus"], 2);
    assert_eq!(report["memory"], 640 << 20);
}

#[test]
fn a_topology_arrives() {
    need("lscpu", "util-linux");
    let site = Site::new();
    let words = script(
        r#"
        fact nodes bash -c 'ls -d /sys/devices/system/node/node* | wc -l'
        fact cpus bash -c 'cat /sys/devices/system/node/node{0,1}/cpulist'
        fact memory bash -c 'awk "/MemTotal/ {print (\$4 > 100000)}" /sys/devices/system/node/node*/meminfo'
        fact shape bash -c 'lscpu -p=socket,core,node | grep -v ^#'
        "#,
    );
    let options = ["--topology", "2,1,2,1", "--memory", "512M"];
    let board: &[&str] = if native() { &[] } else { &["--machine", "q35"] };
    let facts = Facts::of(&site.run(&[board, &options].concat(), words).output());
    facts
        .expect("nodes", "2")
        .expect("cpus", "0-1\n2-3")
        .expect("memory", "1\n1")
        .expect("shape", "0,0,0\n0,1,0\n1,2,1\n1,3,1");
}

#[test]
fn random_numbers_of_the_host_arrive() {
    let site = Site::new();
    let words = script(
        r#"
        fact source cat /sys/class/misc/hw_random/rng_current
        fact values bash -c 'head -c 65536 /dev/hwrng | od -An -tu1 -v -w1 | sort -u | wc -l'
        "#,
    );
    // From a snapshot of a machine that had no such device, too.
    for mode in ["--cold", "--no-cwd"] {
        let facts = Facts::of(&site.run(&["--rng", mode], words.clone()).output());
        facts.expect("source", "virtio_rng.0").expect("values", "256");
    }
    let without = site.sh(&[], "test -e /dev/hwrng && cat /sys/class/misc/hw_random/rng_current");
    let said = without.output().stdout_text().to_owned();
    assert!(!said.contains("virtio"), "{said}");
}

#[test]
fn machines_that_cannot_be_are_refused() {
    let site = Site::new();
    for (options, wanted) in [
        (&["--memory", "10M"][..], "a guest cannot have 10"),
        (&["--memory", "much"], "--memory"),
        (&["--cpus", "0"], "is not 1 to 255 CPUs"),
        (&["--cpus", "256"], "is not 1 to 255 CPUs"),
        (&["--cpus", "two"], "--cpus: `two` is not a number"),
        (&["--topology", "2,1"], "`2,1` is not a topology"),
        (&["--topology", "2,1,1,1", "--machine", "microvm"], "--machine q35"),
        (&["--topology", "1,1,1,1", "--cpus", "2"], "cannot be used with"),
        (&["--append", "two\nlines"], "control character"),
        (&["--boot-timeout", "0"], "--boot-timeout"),
        (&["--net", "bridge"], "possible values: none, user"),
        (&["--machin", "q35"], "--machine"),
    ] {
        let outcome = site.run(options, ["true"]).output();
        outcome.expect_code(125).expect_stderr(&[wanted]);
        assert!(!site.state().join("vmlab/runs").exists(), "{options:?} began a run");
    }
    let outcome = site.run(&["--qemu-arg", "-nonsense"], ["true"]).output();
    outcome.expect_code(125).expect_stderr(&["the VM was not started: QEMU ended", "-nonsense"]);
}

#[test]
fn kvm_is_used_only_where_it_works() {
    let site = Site::new();
    let doctor = site.vmlab(["doctor", "--json"]).output();
    let checks: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let kvm = checks.as_array().unwrap().iter().find(|c| c["name"] == "kvm").unwrap();
    let works = kvm["status"] == "good";
    let asked = site.run(&["--accel", "kvm"], ["echo", "ran"]).output();
    if works {
        asked.expect_stdout("ran\n");
    } else {
        asked.expect_code(125).expect_stderr(&["KVM cannot be used", "without --accel kvm"]);
    }
    let plan = site.run(&["--dry-run"], ["true"]).output();
    let wanted = if works { "\"accel\": \"kvm\"" } else { "\"accel\": \"tcg\"" };
    assert!(plan.expect_code(0).stdout_text().contains(wanted), "{}", plan.stdout_text());
    // It says why, once.
    let site = Site::new();
    crate::common::kernel(DEBIAN_6_12);
    let plain = site.vmlab(["run", "-k", DEBIAN_6_12, "--", "true"]).output();
    plain.expect_code(0);
    let reasons = plain.stderr_text().lines().filter(|l| l.contains("TCG, not KVM: ")).count();
    assert_eq!(reasons, usize::from(!works), "{}", plain.stderr_text());
}

#[test]
fn clocks_are_right_and_random_numbers_are_random() {
    need("perl", "perl");
    let sites = [Site::new(), Site::new()];
    // GRND_NONBLOCK: it fails if there is no entropy yet.
    let script = "date +%s.%N; perl -e 'my $b = \"x\" x 16; \
        my $n = syscall(318, $b, 16, 1); print $n == 16 ? unpack(\"H*\", $b) : \"none: $!\"'; \
        echo; od -An -N16 -tx1 /dev/random; cat /proc/sys/kernel/random/boot_id; \
        date +%s.%N; touch made";
    let before = seconds();
    let running: Vec<_> = sites.iter().map(|site| site.sh(&[], script).start()).collect();
    let outcomes: Vec<_> = running.into_iter().map(|r| r.finish().stdout_text()).collect();
    let after = seconds();
    let answers: Vec<Vec<&str>> = outcomes.iter().map(|text| text.lines().collect()).collect();
    for (lines, site) in answers.iter().zip(&sites) {
        assert_eq!(lines.len(), 5, "{lines:?}");
        let (first, last): (f64, f64) = (lines[0].parse().unwrap(), lines[4].parse().unwrap());
        assert!(before < first && first < last && last < after + 1.0, "{before} {lines:?} {after}");
        // What the guest has just made is not in its future: make(1) and others mind.
        let made = site.cwd().join("made").metadata().unwrap().modified().unwrap();
        let made = made.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((made - last).abs() < 1.0, "{made} {last}");
        assert!(lines[1].len() == 32 && lines[1] != "78".repeat(16), "{lines:?}");
    }
    for (one, other) in answers[0][1..4].iter().zip(&answers[1][1..4]) {
        assert_ne!(one, other);
    }
}

#[test]
fn a_user_network_reaches_the_host() {
    need("ip", "iproute2");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
        stream.write_all(b"from the host\n").unwrap();
        sender.send(line).unwrap();
    });
    let site = Site::new();
    let words = script(&format!(
        r#"
        fact address bash -c "ip -br -4 address show scope global | awk '{{print \$2, \$3}}'"
        fact route bash -c "ip route show default | cut -d' ' -f1-3"
        fact resolver cat /etc/resolv.conf
        fact tcp perl -MIO::Socket::INET -e '
            my $c = IO::Socket::INET->new("10.0.2.2:{port}") or die $@;
            print $c "from the guest\n"; print <$c>'
        "#
    ));
    let facts = Facts::of(&site.run(&["--net", "user"], words).output());
    facts
        .expect("tcp", "from the host")
        .expect("address", "UP 10.0.2.15/24")
        .expect("route", "default via 10.0.2.2")
        .expect("resolver", "nameserver 10.0.2.3");
    let line = receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(line, "from the guest\n");
}
