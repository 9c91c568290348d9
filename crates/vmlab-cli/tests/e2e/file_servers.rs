//! The file servers of shares over virtio-fs: what they may do, and what happens when one cannot go on.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::common::{Process, Running, Site, VIRTIO_FS, need};
use rustix::net::Shutdown;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// How long vmlab may go on without a file server, on a busy machine.
const SECONDS: Duration = Duration::from_secs(30);

/// Lines of the status of a thread or a process.
struct Status(String);

impl Status {
    fn of(path: &str) -> Self {
        Self(std::fs::read_to_string(format!("{path}/status")).unwrap())
    }

    fn get(&self, name: &str) -> &str {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name}: {}", self.0)).trim()
    }

    /// Whether a set of signals has one: bit N - 1 of a hexadecimal number.
    fn has(&self, set: &str, signal: i32) -> bool {
        u64::from_str_radix(self.get(set), 16).unwrap() & 1 << (signal - 1) != 0
    }

    fn restricted(&self) -> bool {
        let found = (self.get("NoNewPrivs"), self.get("Seccomp"));
        assert!([("1", "2"), ("0", "0")].contains(&found), "{found:?}");
        found == ("1", "2")
    }
}

/// The threads of a process: their names and their status.
fn threads(process: &Process) -> Vec<(String, Status)> {
    let tasks = format!("/proc/{}/task", process.pid);
    let paths = std::fs::read_dir(tasks).unwrap().map(|entry| entry.unwrap().path());
    paths
        .map(|path| {
            let name = std::fs::read_to_string(path.join("comm")).unwrap();
            (name.trim().to_owned(), Status::of(path.to_str().unwrap()))
        })
        .collect()
}

#[test]
fn threads_that_serve_have_no_rights_but_that() {
    for (options, restricted) in [(&[][..], true), (&["--no-sandbox"][..], false)] {
        let site = Site::new();
        let options = [&VIRTIO_FS[..], options].concat();
        std::fs::write(site.cwd().join("before"), "from the host\n").unwrap();
        let command = "cat before; read line; echo $line > after; rm before; cat after";
        let mut run = site.sh(&options, command).open_stdin().start();
        run.wait_stdout("from the host\n");
        // SIGXFSZ of asm/signal.h.
        let file_size = 25;
        let (serve, others): (Vec<_>, Vec<_>) =
            threads(&run.process).into_iter().partition(|(name, _)| name.starts_with("virtio26-"));
        // Of the root and the working directory, and perhaps of the modules.
        let names: Vec<_> = serve.iter().map(|(name, _)| name).collect();
        assert!([10, 15].contains(&names.len()), "{names:?}");
        for (name, status) in serve {
            assert_eq!(status.restricted(), restricted, "{name}");
            assert!(status.has("SigBlk", file_size), "{name}");
        }
        // In the native monitor, those of other devices and of processors, with what KVM starts for these.
        let of_guest =
            |name: &str| ["virtio", "vcpu", "kvm-"].iter().any(|of| name.starts_with(of));
        for (name, status) in others {
            assert_eq!(status.restricted(), restricted && of_guest(&name), "{name}");
        }
        let qemu = Status::of(&format!("/proc/{}", run.process.qemu().pid));
        assert!(!qemu.restricted());
        assert!(!qemu.has("SigBlk", file_size) && !qemu.has("SigIgn", file_size));
        run.stdin.as_mut().unwrap().write_all(b"typed\n").unwrap();
        run.finish().expect_stdout("from the host\ntyped\n");
        assert_eq!(std::fs::read_to_string(site.cwd().join("after")).unwrap(), "typed\n");
        assert!(!site.cwd().join("before").exists());
    }
}

#[test]
fn what_restricts_them_is_said() {
    let site = Site::new();
    let verbose = |options: &[&str]| {
        let arguments = ["run", "-v", "-k", crate::common::kernel(crate::common::DEBIAN_6_12)];
        let words = [&arguments, options, &["--", "true"]].concat();
        let outcome = site.vmlab(words).output();
        outcome.expect_code(0).stderr_text()
    };
    let served = verbose(&VIRTIO_FS);
    assert!(served.contains("file servers are restricted by Landlock (ABI "), "{served}");
    let free = verbose(&[&VIRTIO_FS[..], &["--no-sandbox"]].concat());
    assert!(free.contains("file servers are not restricted"), "{free}");
    // QEMU's own server is not vmlab's to restrict.
    let qemus = verbose(&["--share-via", "9p"]);
    assert!(!qemus.contains("restricted"), "{qemus}");
}

/// QEMU's end of the connection to the file server of the last share, the working directory's.
fn connection(run: &Running) -> OwnedFd {
    let qemu = run.process.qemu();
    let words = std::fs::read(format!("/proc/{}/cmdline", qemu.pid)).unwrap();
    let words = String::from_utf8_lossy(&words).into_owned();
    let part = |word: &str, key: &str| {
        let found = word.split(',').find_map(|part| part.strip_prefix(key)).map(str::to_owned);
        found.unwrap_or_else(|| panic!("no {key} in {word}"))
    };
    // The root's is before it, and that of the modules where the root does not have them.
    let of_a_share = |word: &&str| word.split(',').any(|part| part.starts_with("id=share"));
    let socket = words.split('\0').rfind(of_a_share);
    let fd: i32 = part(socket.expect("its socket"), "fd=").parse().unwrap();
    let pidfd = pidfd_open(Pid::from_raw(qemu.pid).unwrap(), PidfdFlags::empty()).unwrap();
    let flags = PidfdGetfdFlags::empty();
    pidfd_getfd(pidfd, fd, flags).expect("QEMU's descriptor, as its user or as root")
}

/// Once it is harmed, it ends like a failure of vmlab's own, soon, with nothing left running.
fn ends(site: &Site, mut run: Running, harm: impl FnOnce(&mut Running), wanted: &[&str]) {
    let below = run.process.descendants();
    assert!(!below.is_empty());
    let since = Instant::now();
    harm(&mut run);
    let outcome = run.finish();
    assert!(since.elapsed() < SECONDS, "{:?}", since.elapsed());
    outcome.expect_code(125).expect_stderr(wanted);
    for process in below {
        assert!(process.wait_gone(Instant::now() + Duration::from_secs(1)), "{process:?}");
    }
    assert_eq!(site.runtime().read_dir().unwrap().count(), 0);
}

#[test]
fn a_server_that_loses_its_connection_ends_the_run() {
    // While the guest waits for something else, and while it uses the share all the time.
    for command in ["echo ready; exec sleep 1000", "echo ready; while :; do ls; : > x; done"] {
        let site = Site::new();
        let run = site.sh(&VIRTIO_FS, command).start();
        run.wait_stdout("ready\n");
        let harm = |run: &mut Running| {
            rustix::net::shutdown(connection(run), Shutdown::Both).unwrap();
        };
        let share = format!("the file server of {}", site.cwd().display());
        ends(&site, run, harm, &[&share, "connection"]);
    }
}

/// Sets the device up anew, with rings that are the script's own memory, by writes to its configuration
/// space (virtio 1.2, 4.1.4.9). All indices in them are beyond the rings' ends.
const BREAK: &str = r#"
    my $memory = "\xff" x 16384;
    my $page = (unpack("J", pack("p", $memory)) + 4095) & ~4095;
    open my $map, "<:raw", "/proc/self/pagemap" or die $!;
    sysseek $map, $page / 4096 * 8, 0;
    sysread $map, my $entry, 8 or die $!;
    my $frame = unpack("Q", $entry) & ((1 << 55) - 1) or die "no frame";
    my $ring = $frame * 4096;
    my ($path) = grep {
        readlink("$_/driver") =~ /virtio-pci/ and `cat $_/device` =~ /0x105a/
    } glob "/sys/bus/pci/devices/*";
    open my $config, "+<:raw", "$path/config" or die "$path: $!";
    sub get { my ($at, $size, $kind) = @_; sysseek $config, $at, 0;
        sysread $config, my $bytes, $size; unpack $kind, $bytes }
    sub put { my ($at, $kind, $value) = @_; sysseek $config, $at, 0;
        syswrite $config, pack($kind, $value) or die $! }
    my (%place, $window);
    for (my $at = get(0x34, 1, "C"); $at; $at = get($at + 1, 1, "C")) {
        next unless get($at, 1, "C") == 9;
        my $kind = get($at + 3, 1, "C");
        $place{$kind} //= [get($at + 4, 1, "C"), get($at + 8, 4, "V")];
        $window = $at if $kind == 5;
    }
    sub device { my ($part, $at, $size, $value) = @_; my ($bar, $start) = @{$place{$part}};
        put($window + 4, "C", $bar); put($window + 8, "V", $start + $at);
        put($window + 12, "V", $size); put($window + 16, {1, "C", 2, "v", 4, "V"}->{$size}, $value) }
    $| = 1; print "ready\n";
    <STDIN>;
    device(1, 0x14, 1, 0);
    device(1, 0x14, 1, 3);
    device(1, 8, 4, 1); device(1, 12, 4, 1); device(1, 8, 4, 0); device(1, 12, 4, 0);
    device(1, 0x14, 1, 11);
    for my $queue (0, 1) {
        device(1, 0x16, 2, $queue); device(1, 0x18, 2, 8);
        for my $at (0x20, 0x28, 0x30) {
            device(1, $at, 4, $ring & 0xffffffff); device(1, $at + 4, 4, $ring >> 32);
        }
        device(1, 0x1c, 2, 1);
    }
    device(1, 0x14, 1, 15);
    sleep 1000;
"#;

#[test]
fn a_guest_that_breaks_its_queue_ends_its_run() {
    need("perl", "perl");
    let site = Site::new();
    let run = site.run(&VIRTIO_FS, ["perl", "-e", BREAK]).open_stdin().start();
    run.wait_stdout("ready\n");
    let harm = |run: &mut Running| run.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
    ends(&site, run, harm, &["the file server of /", "the guest's driver has broken a queue"]);
}

#[test]
fn a_file_beyond_the_callers_limit_is_the_guests_error() {
    let site = Site::new();
    // More than the guest's memory, which is a file too. The guest's own limit is taken away.
    let script = r#"ulimit -f $((400 * 1024)); "$VMLAB" run -q -k debian:6.12 -m 256M \
        --share-via virtiofs -- bash -c 'ulimit -f unlimited; truncate -s 500M large
            dd if=/dev/zero of=large bs=1M seek=450 count=1 conv=notrunc status=none
            stat -c %s large; echo on > small; cat small'"#;
    let outcome = site.host_sh(script).output();
    outcome.expect_code(0);
    assert_eq!(outcome.stdout_text(), "0\non\n", "{}", outcome.stderr_text());
    let refused = outcome.stderr_text();
    for wanted in ["truncate: failed to truncate", "dd: error writing", "File too large"] {
        assert!(refused.contains(wanted), "{refused}");
    }
}
