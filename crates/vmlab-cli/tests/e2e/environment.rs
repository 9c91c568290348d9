//! What a command finds around itself in a guest.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use crate::common::{DEBIAN_6_12, Site, need};
use crate::facts::{Facts, script};

/// What bash on the host prints.
fn on_host(site: &Site, command: &str) -> String {
    let mut host = Command::new("bash");
    host.args(["-c", command]).current_dir(site.cwd()).env("LC_ALL", "C.UTF-8");
    let output = host.output().unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

#[test]
fn the_system_is_complete() {
    need("ip", "iproute2");
    need("perl", "perl");
    need("modprobe", "kmod");
    let site = Site::new();
    let options = ["--hostname", "some-guest", "--module", "loop max_loop=3"];
    let outcome = site.run(
        &options,
        script(
            r#"
            mounted() { findmnt -n -o FSTYPE --mountpoint "$1"; }
            for at in /proc /sys /dev /dev/pts /dev/shm /dev/mqueue /sys/fs/cgroup /sys/fs/bpf \
                      /sys/kernel/tracing /sys/kernel/debug /sys/kernel/security /run /tmp; do
                fact "$at" mounted "$at"
            done
            for node in null zero full random urandom tty; do
                fact "node $node" stat -c '%F %a' "/dev/$node"
            done
            fact 'fd' bash -c 'cat /dev/fd/3 3<<<three'
            fact 'stdin' bash -c 'echo in | cat /dev/stdin'
            fact 'stdout' bash -c 'echo out > /dev/stdout'
            fact 'stderr' bash -c 'echo err > /dev/stderr'
            fact 'process substitution' bash -c 'cat <(echo sub)'
            fact 'shm' bash -c 'echo s > /dev/shm/x && stat -c %a /dev/shm && cat /dev/shm/x'
            fact 'pty' perl -e 'open(my $m, "+<", "/dev/ptmx") or die $!; print -t $m ? "tty" : "no"'
            fact 'controllers' cat /sys/fs/cgroup/cgroup.controllers
            fact 'cgroup' bash -c 'mkdir /sys/fs/cgroup/x && echo $$ > /sys/fs/cgroup/x/cgroup.procs &&
                cat /proc/self/cgroup'
            fact 'tmp' bash -c 'ls -A /tmp; stat -c %a /tmp'
            fact 'run' bash -c 'ls -A /run | grep -vx -e lock -e vmlab'
            fact 'hostname' hostname
            fact 'etc hostname' cat /etc/hostname
            fact 'own address' getent hosts some-guest
            fact 'interfaces' ls /sys/class/net
            fact 'lo' ip -br -4 address show dev lo
            fact 'routes' ip route
            fact 'tcp' perl -MIO::Socket::INET -e '
                my $s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", Listen => 1) or die $@;
                my $c = IO::Socket::INET->new("127.0.0.1:" . $s->sockport) or die $@;
                print {$s->accept} "over tcp\n"; print <$c>'
            fact 'release' uname -r
            fact 'tree' bash -c 'test -d /lib/modules/$(uname -r)/kernel && echo there'
            fact 'modinfo' modinfo -n xfs
            fact 'modprobe' modprobe xfs
            fact 'depends' bash -c 'lsmod | grep -o "^libcrc32c.*xfs"'
            fact 'xfs' grep -w xfs /proc/filesystems
            fact 'parameter' cat /sys/module/loop/parameters/max_loop
            fact 'autoload' bash -c 'losetup -f'
            fact 'kmsg' bash -c 'dmesg | grep -c "Linux version"'
            fact 'init' cat /proc/1/comm
            "#,
        ),
    );
    let facts = Facts::of(&outcome.output());
    for (at, kind) in [
        ("/proc", "proc"),
        ("/sys", "sysfs"),
        ("/dev", "devtmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/dev/mqueue", "mqueue"),
        ("/sys/fs/cgroup", "cgroup2"),
        ("/sys/fs/bpf", "bpf"),
        ("/sys/kernel/tracing", "tracefs"),
        ("/sys/kernel/debug", "debugfs"),
        ("/sys/kernel/security", "securityfs"),
        ("/run", "tmpfs"),
        ("/tmp", "tmpfs"),
    ] {
        facts.expect(at, kind);
    }
    for node in ["null", "zero", "full", "random", "urandom", "tty"] {
        facts.expect(&format!("node {node}"), "character special file 666");
    }
    facts
        .expect("fd", "three")
        .expect("stdin", "in")
        .expect("stdout", "out")
        .expect("stderr", "err")
        .expect("process substitution", "sub")
        .expect("shm", "1777\ns")
        .expect("pty", "tty")
        .expect("cgroup", "0::/x")
        .expect("hostname", "some-guest")
        .expect("etc hostname", "some-guest")
        .expect("interfaces", "lo")
        .expect("routes", "")
        .expect("tcp", "over tcp")
        .expect("tree", "there")
        .expect("modprobe", "")
        .expect("parameter", "3")
        .expect("autoload", "/dev/loop0")
        .expect("kmsg", "1");
    for controller in ["cpu", "memory", "io", "pids"] {
        let all = facts.text("controllers");
        assert!(all.split(' ').any(|c| c == controller), "{controller}: {all}");
    }
    // The working directory of this test is in /tmp, and nothing else of the host's is.
    let first = site.cwd().components().nth(2).unwrap().as_os_str().to_str().unwrap().to_owned();
    let tmp: Vec<&str> = facts.text("tmp").lines().collect();
    match site.cwd().starts_with("/tmp") {
        true => assert_eq!(tmp, [first.as_str(), "1777"]),
        false => assert_eq!(tmp, ["1777"]),
    }
    facts.expect_failure("run", "");
    assert!(facts.text("own address").starts_with("127.0."), "{facts:?}");
    assert!(facts.text("lo").contains("127.0.0.1/8"), "{facts:?}");
    let release = facts.text("release");
    assert!(facts.text("modinfo").starts_with(&format!("/lib/modules/{release}/")), "{facts:?}");
    assert!(facts.text("xfs").contains("xfs"));
    assert!(facts.text("depends").contains("xfs"));
}

#[test]
fn commands_inherit_what_the_caller_has() {
    need("sudo", "sudo");
    let site = Site::new();
    let limits = "ulimit -S -a; echo; ulimit -H -a";
    // Limits and mask of a shell's own show that they come from the caller and not from a default.
    let change = "umask 027; ulimit -S -n 321; ulimit -H -c 4096; ulimit -S -c 2048";
    let wanted_limits = on_host(&site, &format!("{change}; {limits}"));
    let words = script(&format!(
        r#"
        fact umask umask
        fact limits bash -c '{limits}'
        fact cwd pwd
        fact physical readlink /proc/self/cwd
        fact locale locale charmap
        fact passwd getent passwd
        fact groups getent group
        fact id id -u
        fact sudo sudo -n id -u
        fact signals grep -E '^Sig(Blk|Ign)' /proc/self/status
        fact descriptors bash -c 'ls /proc/self/fd | tr "\n" " "'
        fact mode bash -c 'touch made && stat -c %a made'
        "#
    ));
    std::fs::write(site.cwd().join("words"), &words[2]).unwrap();
    crate::common::kernel(DEBIAN_6_12);
    let outcome = site
        .host_sh(&format!(r#"{change}; exec "$VMLAB" run -q -k {DEBIAN_6_12} -- bash words"#))
        .output();
    let facts = Facts::of(&outcome);
    facts
        .expect("umask", "0027")
        .expect("limits", &wanted_limits)
        .expect("cwd", site.cwd().to_str().unwrap())
        .expect("physical", site.cwd().to_str().unwrap())
        .expect("locale", "UTF-8")
        .expect("passwd", &on_host(&site, "getent passwd"))
        .expect("groups", &on_host(&site, "getent group"))
        .expect("id", "0")
        .expect("sudo", "0")
        .expect("signals", "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000")
        .expect("descriptors", "0 1 2 3 ")
        .expect("mode", "640");
}

#[test]
fn the_environment_passes_except_for_the_session() {
    let site = Site::new();
    let outcome = site
        .run(&["-e", "ADDED=a b", "-e", "FOO=changed", "--user", "caller"], ["env", "-0"])
        .env("FOO", "of the host")
        .env("KEPT", "line\nbreak = ü")
        .env("DISPLAY", ":0")
        .env("SSH_AUTH_SOCK", "/nowhere")
        .env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nowhere")
        .env("WAYLAND_DISPLAY", "wayland-0")
        .env("TMUX", "x")
        .output();
    outcome.expect_code(0);
    let text = outcome.stdout_text();
    let guest: BTreeMap<&str, &str> =
        text.split_terminator('\0').map(|pair| pair.split_once('=').unwrap()).collect();
    assert_eq!(guest["FOO"], "changed");
    assert_eq!(guest["ADDED"], "a b");
    assert_eq!(guest["KEPT"], "line\nbreak = ü");
    for gone in [
        "DISPLAY",
        "SSH_AUTH_SOCK",
        "DBUS_SESSION_BUS_ADDRESS",
        "WAYLAND_DISPLAY",
        "TMUX",
        "XDG_RUNTIME_DIR",
    ] {
        assert_eq!(guest.get(gone), None, "{gone}");
    }
    for (name, value) in std::env::vars() {
        let own = ["FOO", "LC_ALL", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "TMUX", "DISPLAY"];
        let session = ["DBUS_", "WAYLAND_", "XDG_SESSION_", "SSH_", "TMUX", "GPG_", "STY"];
        if !own.contains(&name.as_str()) && !session.iter().any(|s| name.starts_with(s)) {
            assert_eq!(guest.get(name.as_str()), Some(&value.as_str()), "{name}");
        }
    }
}

#[test]
fn writes_to_the_root_stay_in_the_guest() {
    let site = Site::new();
    let marker = format!("vmlab-test-{}", std::process::id());
    let words = script(&format!(
        r#"
        for dir in / /etc /usr/bin /usr/lib /var/lib /opt; do
            fact "$dir" bash -c 'echo written > "$0/{marker}" && cat "$0/{marker}"' "$dir"
        done
        fact append bash -c 'echo {marker}:x:4242:4242::/:/bin/sh >> /etc/passwd && id -u {marker}'
        fact removed bash -c 'rm /etc/os-release && ls /etc/os-release'
        fact renamed bash -c 'mv /usr/share /usr/share-{marker} && test -d /usr/share-{marker}/doc'
        fact chown bash -c 'chown 1:1 /etc/group && chmod 600 /etc/group && stat -c "%u %g %a" /etc/group'
        fact run bash -c 'cp /bin/true /opt/{marker}-true && /opt/{marker}-true && echo ran'
        "#
    ));
    let before = std::fs::read("/etc/passwd").unwrap();
    let facts = Facts::of(&site.run(&[], words).output());
    for dir in ["/", "/etc", "/usr/bin", "/usr/lib", "/var/lib", "/opt"] {
        facts.expect(dir, "written");
        assert!(!Path::new(dir).join(&marker).exists(), "the host has {dir}/{marker}");
    }
    facts.expect("append", "4242").expect("chown", "1 1 600").expect("run", "ran");
    facts.expect_failure("removed", "No such file");
    assert_eq!(facts.text("renamed"), "");
    assert_eq!(std::fs::read("/etc/passwd").unwrap(), before);
    assert!(Path::new("/etc/os-release").exists() && Path::new("/usr/share/doc").exists());
}

#[test]
fn what_a_command_leaves_behind_is_reaped_and_ends() {
    let site = Site::new();
    // The orphans' parents are gone. A named pipe tells when the last one is about to end; PID 1 is
    // then given the time of a few hundred processes to reap it. What is left running has stdout
    // open, a session of its own, or no ear for signals.
    let script = r#"
        (true & true & sh -c 'exit 3' &)
        mkfifo /tmp/ended
        (sh -c 'sh -c "exit 5" & sh -c "echo gone > /tmp/ended" &' &)
        read line < /tmp/ended
        for i in $(seq 100); do true & done; wait
        for i in $(seq 100); do
            zombies=$(ps -eo ppid=,stat= | awk '$1 == 1 && $2 ~ /^Z/' | wc -l)
            [ "$zombies" = 0 ] && break
        done
        echo "$line, zombies: $zombies"
        sleep 1000 &
        setsid sleep 1000 > /dev/null 2>&1 &
        setsid sh -c 'trap "" TERM HUP INT; while :; do sleep 1000; done' > /dev/null 2>&1 &
        exit 7
    "#;
    let outcome = site.sh(&[], script).output();
    outcome.expect_code(7);
    assert_eq!(outcome.stdout_text(), "gone, zombies: 0\n");
    assert_eq!(outcome.stderr_text(), "");
}
