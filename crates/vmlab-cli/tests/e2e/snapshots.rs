//! VMs that start from snapshots: when one is taken and used, which runs have the same one, and that a
//! guest is as one that booted.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::time::Duration;

use crate::common::snapshots::{Cold, NONE, QUICK, Ran};
use crate::common::{DEBIAN_6_1, DEBIAN_6_12, DEBIAN_SID, kernel, need};
use crate::facts::{Facts, script};
use serde_json::Value;

/// What only this snapshot has.
fn generation(cold: &Cold) -> String {
    let manifest = std::fs::read(cold.entry().join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    manifest["content"]["generation"].as_str().unwrap().to_owned()
}

#[test]
fn the_first_run_boots_and_the_others_go_on_from_its_snapshot() {
    let cold = Cold::new();
    let say = ["echo", "here"];
    cold.run(&[], say).expect_taken().expect_stdout("here\n");
    let first = generation(&cold);
    for _ in 0..3 {
        cold.run(&[], say).expect_restored().expect_stdout("here\n");
    }
    // It leaves the one that is there as it is, for the next.
    cold.run(&["--no-snapshot"], say).expect_booted().expect_stdout("here\n");
    assert_eq!(generation(&cold), first);
    cold.run(&["--cold"], say).expect_taken().expect_stdout("here\n");
    let second = generation(&cold);
    assert_ne!(second, first);
    cold.run(&[], say).expect_restored().expect_stdout("here\n");
    assert_eq!(generation(&cold), second);
    assert_eq!(cold.litter(), NONE);
}

#[test]
fn a_run_without_snapshots_takes_none() {
    let cold = Cold::new();
    cold.run(&["--no-snapshot"], ["true"]).expect_booted();
    // Nobody knows what they add to the VM.
    cold.run(&["--qemu-arg=-name", "--qemu-arg=guest"], ["true"]).expect_booted();
    assert_eq!(cold.entries(), NONE);
    let both = cold.run(&["--no-snapshot", "--cold"], ["true"]);
    both.outcome.expect_code(125).expect_stderr(&["cannot be used with"]);
}

#[test]
fn a_start_from_a_snapshot_is_nothing_to_speak_of() {
    let cold = Cold::new();
    for expected in [Ran::expect_taken, Ran::expect_restored] {
        let ran = cold.begin(&[], ["true"]).finish();
        expected(&ran);
        let said = ran.outcome.stderr_text();
        let said: Vec<_> = said.lines().filter(|line| !line.contains("TCG, not KVM")).collect();
        assert_eq!(said, [""; 0]);
    }
}

#[test]
fn what_a_run_brings_shares_one_snapshot() {
    let cold = Cold::new();
    let shared = cold.site.path().join("shared");
    std::fs::create_dir_all(shared.join("below")).unwrap();
    std::fs::write(shared.join("file"), "of the share\n").unwrap();
    let host = shared.to_str().unwrap();
    let (one, two) = (format!("{host}:/mnt"), format!("{host}:/opt:ro"));
    let cwd = cold.site.cwd();
    cold.run(&[], ["pwd"]).expect_taken().expect_stdout(&format!("{}\n", cwd.display()));
    let both = ["--share", &one, "--share", &two];
    let cases: [(&[&str], &str, &str); 9] = [
        (&[], "echo another command", "another command\n"),
        (&["--share", &one], "cat /mnt/file", "of the share\n"),
        (&both, "cat /mnt/file; touch /opt/x 2>&1 | grep -c Read-only", "of the share\n1\n"),
        (&["-e", "A=b c"], "echo $A", "b c\n"),
        (&["--hostname", "other"], "uname -n; hostname", "other\nother\n"),
        (&["--no-cwd"], "pwd", "/\n"),
        (&["--user", "12345"], "id -u", "12345\n"),
        (&["--no-sandbox"], "echo unguarded", "unguarded\n"),
        (&["--timeout", "90"], "echo in time", "in time\n"),
    ];
    for (options, command, wanted) in cases {
        cold.sh(options, command).expect_restored().expect_stdout(wanted);
    }
    let (mut vmlab, _) = cold.prepare(&["-q"], ["pwd"]);
    vmlab.command.current_dir(shared.join("below"));
    vmlab.output().expect_stdout(&format!("{host}/below\n"));
    cold.entry();
}

#[test]
fn what_shapes_a_vm_has_a_snapshot_of_its_own() {
    let cold = Cold::new();
    let cases: [(&[&str], &str, &str); 6] = [
        (&[], "nproc", "1\n"),
        (
            &["-m", "640M"],
            "awk '/MemTotal/ {print ($2 > 500000 && $2 < 655360)}' /proc/meminfo",
            "1\n",
        ),
        (&["--cpus", "2"], "nproc", "2\n"),
        (&["--append", "mark.mark"], "grep -c mark.mark /proc/cmdline", "1\n"),
        (
            &["--machine", "q35"],
            "cat /sys/class/dmi/id/product_name",
            "Standard PC (Q35 + ICH9, 2009)\n",
        ),
        (&["-k", crate::common::CLOUD[1]], "uname -r | cut -d. -f1-2", "6.1\n"),
    ];
    kernel(crate::common::CLOUD[1]);
    for (count, (options, command, wanted)) in cases.iter().enumerate() {
        assert_eq!(cold.entries().len(), count);
        cold.sh(options, command).expect_taken().expect_stdout(wanted);
    }
    for (options, command, wanted) in cases {
        cold.sh(options, command).expect_restored().expect_stdout(wanted);
    }
    assert_eq!(cold.entries().len(), cases.len());
}

/// Asks a guest for all that a run has brought it. `SHARED` is the place of the share.
const QUESTIONS: &str = r#"
    fact release uname -r
    fact cpus nproc
    fact nodes echo /sys/devices/system/node/node*
    fact memory awk '/MemTotal/ {print int($2 / 4096)}' /proc/meminfo
    fact command_line cat /proc/cmdline
    fact mounts awk '{print $1, $2, $3}' /proc/mounts
    fact modules awk '{print $1}' /proc/modules
    fact devices ls -I "vcs*" /dev
    fact interfaces ls /sys/class/net
    fact root stat -c "%s %Y" /etc/passwd
    fact cwd cat input
    fact share cat /mnt/shared/file
    fact empty ls -A /tmp /dev/shm
    fact modprobe modprobe loop
    fact user id
    fact random od -An -N8 -tx1 /dev/random
    fact environment env
    echo written > output
    fact read_only eval "! touch /mnt/fixed/new"
"#;

/// Whether a guest without snapshots is asked, too.
#[derive(PartialEq)]
enum Boot {
    Too,
    Not,
}

/// Asks a guest that a snapshot is taken of and one that goes on from it. Both have to say the same.
#[track_caller]
fn alike(spec: &'static str, options: &[&str], boot: Boot) {
    let cold = Cold::new();
    for dir in ["shared", "fixed"] {
        std::fs::create_dir(cold.site.path().join(dir)).unwrap();
    }
    std::fs::write(cold.site.path().join("shared/file"), "of the share\n").unwrap();
    std::fs::write(cold.site.cwd().join("input"), "of the host\n").unwrap();
    let place = |name: &str, end: &str| {
        format!("{}:/mnt/{name}{end}", cold.site.path().join(name).display())
    };
    let (shared, fixed) = (place("shared", ""), place("fixed", ":ro"));
    let shares = ["--share", &shared, "--share", &fixed, "-k", kernel(spec)];
    let options = [&shares, options].concat();
    let questions = script(QUESTIONS);
    let asked = QUESTIONS.lines().filter_map(|line| line.trim_start().strip_prefix("fact "));
    let names: Vec<&str> = asked.filter_map(|line| line.split(' ').next()).collect();
    let ask = |more: &[&str]| {
        let output = cold.site.cwd().join("output");
        let ran = cold.run(&[&options, more].concat(), &questions);
        let facts = Facts::of(&ran.outcome);
        facts.expect("cwd", "of the host").expect("share", "of the share");
        assert!(facts.text("read_only").contains("Read-only file system"), "{facts:?}");
        assert_eq!(std::fs::read_to_string(&output).unwrap(), "written\n");
        std::fs::remove_file(output).unwrap();
        let answers: Vec<String> = names
            .iter()
            .filter(|name| **name != "random")
            .map(|name| format!("{name}: {}", facts.text(name)))
            .collect();
        (ran, answers)
    };
    let mut all = Vec::new();
    if boot == Boot::Too {
        let (booted, answers) = ask(&["--no-snapshot"]);
        booted.expect_booted();
        all.push(answers);
    }
    for expected in [Ran::expect_taken, Ran::expect_restored] {
        let (ran, answers) = ask(&[]);
        expected(&ran);
        all.push(answers);
    }
    cold.entry();
    for other in &all[1..] {
        for (one, other) in all[0].iter().zip(other) {
            assert_eq!(without_boot(one), without_boot(other), "{spec} {options:?}");
        }
    }
}

/// What is told anew at each boot.
fn without_boot(text: &str) -> String {
    let words = text.split(' ').filter(|word| !word.contains("tsc") && *word != "vmlab.snapshot");
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn a_restored_guest_is_as_one_that_booted() {
    alike(DEBIAN_6_12, &[], Boot::Too);
}

#[test]
fn a_restored_guest_is_as_one_that_booted_over_9p() {
    alike(DEBIAN_6_12, &["--share-via", "9p"], Boot::Too);
}

#[test]
fn old_and_new_kernels_are_restored() {
    alike(DEBIAN_6_1, &[], Boot::Not);
    alike(DEBIAN_SID, &[], Boot::Not);
}

#[test]
fn cloud_kernels_are_restored() {
    alike(crate::common::CLOUD[0], &["--cpus", "2"], Boot::Not);
    // It has all drivers as modules.
    alike(crate::common::CLOUD[1], &[], Boot::Not);
}

#[test]
fn a_pc_with_two_nodes_is_restored() {
    let options = ["--machine", "q35", "--topology", "2,1,1,1"];
    alike(DEBIAN_6_12, &options, Boot::Not);
    alike(DEBIAN_6_12, &[&options[..], &["--share-via", "9p"]].concat(), Boot::Not);
}

#[test]
fn another_root_is_kept_or_written_as_asked() {
    let cold = Cold::new();
    let busybox = need("busybox", "busybox-static");
    let root = cold.site.path().join("root");
    for name in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    std::fs::copy(busybox, root.join("bin/sh")).unwrap();
    let made = root.join("made");
    for round in 0..2 {
        for mode in ["ro", "overlay", "rw"] {
            let rootfs = ["--no-cwd", "--rootfs", root.to_str().unwrap(), "--root-mode", mode];
            let (options, seen) = ([&rootfs[..], &["-m", "192M"]].concat(), made.exists());
            let ran = cold.run(&options, ["/bin/sh", "-c", "echo new > /made; echo $?"]);
            match (round, mode) {
                (0, "ro") => _ = ran.expect_taken(),
                // A guest without a layer may have a snapshot of its own: it needs less.
                (0, _) => {}
                _ => _ = ran.expect_restored(),
            }
            let wrote = ran.text().trim() == "0";
            assert_eq!(wrote, mode != "ro", "{mode}: {}", ran.outcome.stderr_text());
            assert_eq!(made.exists(), seen || mode == "rw", "{mode}");
        }
        assert_eq!(std::fs::read_to_string(&made).unwrap(), "new\n");
        std::fs::remove_file(&made).unwrap();
    }
}

#[test]
fn a_restored_guest_reaches_the_network() {
    need("ip", "iproute2");
    for spec in [DEBIAN_6_12, QUICK] {
        let cold = Cold::new();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut line = String::new();
                BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
                stream.write_all(b"from the host\n").unwrap();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let talk = format!(
            "exec 3<>/dev/tcp/10.0.2.2/{port} && echo from the guest >&3 && cat <&3 && \
             ip -br -4 address show scope global | awk '{{print $2, $3}}'"
        );
        let options = ["--net", "user", "-k", kernel(spec)];
        for expected in [Ran::expect_taken, Ran::expect_restored, Ran::expect_restored] {
            let ran = cold.run(&options, ["bash", "-c", &talk]);
            expected(&ran).expect_stdout("from the host\nUP 10.0.2.15/24\n");
            let line = receiver.recv_timeout(Duration::from_secs(10)).unwrap();
            assert_eq!(line, "from the guest\n");
        }
        // One that has none is not connected.
        let talk = "ls /sys/class/net";
        let ran = cold.sh(&["-k", kernel(spec)], talk);
        ran.expect_stdout("lo\n");
        let ran = cold.sh(&["-k", kernel(spec)], talk);
        ran.expect_restored().expect_stdout("lo\n");
    }
}

#[test]
fn the_console_of_a_restored_run_begins_with_the_boot() {
    let cold = Cold::new();
    for expected in [Ran::expect_taken, Ran::expect_restored] {
        let ran = cold.sh(&["--append", "mark.mark"], "echo from this run > /dev/kmsg");
        expected(&ran);
        let log = ran.report()["console_log"].as_str().unwrap();
        let log = std::fs::read_to_string(log).unwrap();
        let wanted = ["Linux version ", "mark.mark", "from this run"];
        let found = wanted.map(|text| log.find(text));
        assert!(found.iter().all(Option::is_some) && found.is_sorted(), "{found:?}: {log}");
        assert_eq!(log.matches("Linux version ").count(), 1);
        assert_eq!(log.matches("from this run").count(), 1);
    }
}

#[test]
fn the_cache_lists_verifies_and_clears_snapshots() {
    let cold = Cold::new();
    cold.run(&[], ["true"]).expect_taken();
    let cache = |args: &[&str]| {
        let dir = cold.site.path().join("cache");
        cold.site.vmlab([&["cache"], args].concat()).env("VMLAB_CACHE_DIR", dir).output()
    };
    let listed = cache(&["list", "--json"]);
    let listed: Value = serde_json::from_slice(&listed.expect_code(0).stdout).unwrap();
    let mut entries = listed["entries"].as_array().unwrap().iter();
    let entry = entries.find(|entry| entry["kind"] == "snapshots").unwrap();
    assert_eq!(entry["path"], cold.entry().to_str().unwrap());
    // Holes take no room.
    let bytes = entry["bytes"].as_u64().unwrap();
    assert!((10 << 20..500 << 20).contains(&bytes), "{entry}");
    cache(&["verify", "snapshots"]).expect_stdout("1 entry verified, 0 damaged\n");
    let memory = cold.entry().join("memory0");
    let memory = std::fs::File::options().write(true).open(memory).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&memory, b"noise", 20 << 20).unwrap();
    let found = cache(&["verify", "snapshots"]).expect_code(1).stdout_text();
    assert!(found.contains("damaged: snapshots/") && found.contains("memory0"), "{found}");
    let cleared = cache(&["clear", "snapshots"]).expect_code(0).stdout_text();
    assert!(cleared.contains("snapshots: 1 entry removed, "), "{cleared}");
    assert_eq!(cold.entries(), NONE);
    cold.run(&[], ["true"]).expect_taken();
}
