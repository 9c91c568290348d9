//! Disks that vmlab itself serves, as guests see them: slow, broken, and at their end.

use std::path::{Path, PathBuf};

use crate::common::{CLOUD, Outcome, Site, Vmlab, need};

/// The bytes of a disk here, and of its blocks.
const DISK: usize = 1 << 20;
const BLOCK: usize = 4096;

/// What a disk is full of at first, and what is written to it.
const OLD: u8 = b'o';
const NEW: u8 = b'n';

/// Functions of the guest's scripts: one request each, past the guest's cache.
const FUNCTIONS: &str = r#"
    at() { echo /dev/disk/by-id/virtio-$1; }
    said() {
        case $1 in
        0) echo ok ;;
        *) grep -o -m 1 'Input/output error' /tmp/said || cat /tmp/said ;;
        esac
    }
    put() { # DISK BLOCK [dd's options]
        dd if=new of=$(at $1) bs=4k count=1 seek=$2 oflag=direct $3 2>/tmp/said
        echo put $1 $2 $(said $?)
    }
    get() { # DISK BLOCK FILE
        dd if=$(at $1) of=$3 bs=4k count=1 skip=$2 iflag=direct 2>/tmp/said
        echo get $1 $2 $(said $?)
    }
    ms() { # COMMAND...
        begin=$(date +%s%N)
        "$@"
        echo took $((($(date +%s%N) - begin) / 1000000))
    }
"#;

/// Disks of one VM, each a file of the site that is written to, with what is wrong with it.
struct Disks {
    site: Site,
    given: Vec<String>,
}

impl Disks {
    fn new(wrong: &[(&str, &str)]) -> Self {
        let site = Site::new();
        std::fs::write(site.cwd().join("new"), [NEW; BLOCK]).unwrap();
        let disk = |(name, how): &(&str, &str)| {
            let path = Self::path_in(&site, name);
            std::fs::write(&path, vec![OLD; DISK]).unwrap();
            format!("path={},name={name},mode=rw,{how}", path.display())
        };
        let given = wrong.iter().map(disk).collect();
        Self { site, given }
    }

    fn path_in(site: &Site, name: &str) -> PathBuf {
        site.path().join(format!("{name}.raw"))
    }

    fn prepare(&self, options: &[&str], script: &str) -> Vmlab {
        let disks = self.given.iter().flat_map(|disk| ["--disk", disk]);
        let options: Vec<&str> = options.iter().copied().chain(disks).collect();
        let script = format!("{FUNCTIONS}\n{script}");
        self.site.run_with(CLOUD[0], &options, ["sh", "-c", &script])
    }

    fn run(&self, script: &str) -> Vec<String> {
        let outcome = self.prepare(&[], script).output();
        lines(&outcome)
    }

    /// A block as it is on the host.
    fn block(&self, name: &str, number: usize) -> Vec<u8> {
        block(&Self::path_in(&self.site, name), number)
    }

    /// What the guest has read.
    fn got(&self, file: &str) -> Vec<u8> {
        block(&self.site.cwd().join(file), 0)
    }
}

fn lines(outcome: &Outcome) -> Vec<String> {
    let said = outcome.expect_code(0).stdout_text();
    said.lines().map(str::to_owned).collect()
}

fn block(path: &Path, number: usize) -> Vec<u8> {
    std::fs::read(path).unwrap()[number * BLOCK..][..BLOCK].to_vec()
}

/// How many bits of each sector are not those of `byte`.
fn wrong_bits(block: &[u8], byte: u8) -> Vec<u32> {
    let of_sector = |sector: &[u8]| sector.iter().map(|b| (b ^ byte).count_ones()).sum();
    block.chunks(512).map(of_sector).collect()
}

#[test]
fn requests_that_fail_are_errors_and_leave_the_disk() {
    let disks = Disks::new(&[
        ("third", "fault=fail:write:nth=3"),
        ("range", "fault=fail:read:sectors=16-23"),
        ("flush", "fault=fail:flush:nth=1"),
        ("trim", "fault=fail:discard:nth=1"),
        ("first", "fault=tear:write:nth=2,fault=fail:write:nth=2"),
    ]);
    let script = "
        for block in 5 6 7 8; do put third $block; done
        for block in 1 2 3; do get range $block of-range; done
        put range 2
        put flush 5 conv=fsync
        put flush 6 conv=fsync
        for block in 5 6; do
            blkdiscard -o $((4096 * block)) -l 4096 $(at trim) 2>/tmp/said
            echo trim $block $(said $?)
        done
        for block in 5 6; do put first $block; done";
    let wanted = "put third 5 ok
put third 6 ok
put third 7 Input/output error
put third 8 ok
get range 1 ok
get range 2 Input/output error
get range 3 ok
put range 2 ok
put flush 5 Input/output error
put flush 6 ok
trim 5 Input/output error
trim 6 ok
put first 5 ok
put first 6 Input/output error";
    assert_eq!(disks.run(script).join("\n"), wanted);
    for (name, block, byte) in [
        ("third", 6, NEW),
        ("third", 7, OLD),
        ("third", 8, NEW),
        ("range", 2, NEW),
        ("flush", 5, NEW),
        ("trim", 5, OLD),
        ("trim", 6, 0),
    ] {
        assert_eq!(disks.block(name, block), [byte; BLOCK], "{name} {block}");
    }
    // The first rule that fits holds.
    let torn = [[NEW; BLOCK / 2], [OLD; BLOCK / 2]].concat();
    assert_eq!(disks.block("first", 6), torn);
}

#[test]
fn what_is_corrupt_or_torn_is_so_in_the_guest_and_on_the_disk() {
    let disks = Disks::new(&[
        ("misread", "fault=corrupt:read:nth=2:sectors=80-87"),
        ("miswrit", "fault=corrupt:write:nth=2"),
        ("torn", "fault=tear:write:nth=2"),
    ]);
    let script = "
        for try in 1 2 3; do get misread 10 misread$try; done
        for block in 5 6 7; do put miswrit $block; done
        get miswrit 6 miswrit6
        for block in 5 6 7; do put torn $block; done
        get torn 6 torn6";
    let wanted = "get misread 10 ok
get misread 10 ok
get misread 10 ok
put miswrit 5 ok
put miswrit 6 ok
put miswrit 7 ok
get miswrit 6 ok
put torn 5 ok
put torn 6 Input/output error
put torn 7 ok
get torn 6 ok";
    assert_eq!(disks.run(script).join("\n"), wanted);
    // What is read so is still right on the disk.
    for (number, bits) in [(1, 0), (2, 1), (3, 0)] {
        let read = disks.got(&format!("misread{number}"));
        assert_eq!(wrong_bits(&read, OLD), [bits; 8], "{number}");
    }
    assert_eq!(disks.block("misread", 10), [OLD; BLOCK]);
    for (number, bits) in [(5, 0), (6, 1), (7, 0)] {
        assert_eq!(wrong_bits(&disks.block("miswrit", number), NEW), [bits; 8], "{number}");
    }
    assert_eq!(disks.got("miswrit6"), disks.block("miswrit", 6));
    let torn = [[NEW; BLOCK / 2], [OLD; BLOCK / 2]].concat();
    assert_eq!(disks.got("torn6"), torn);
    assert_eq!(disks.block("torn", 6), torn);
    for number in [5, 7] {
        assert_eq!(disks.block("torn", number), [NEW; BLOCK], "{number}");
    }
}

#[test]
fn what_is_late_is_right() {
    let disks = Disks::new(&[
        ("read", "fault=delay=3s:read:sectors=80-87"),
        ("write", "fault=delay=3s:write:nth=2"),
        ("flush", "fault=delay=3s:flush"),
    ]);
    let script = "
        for block in 9 10; do ms get read $block read$block; done
        for block in 9 10; do ms put write $block; done
        ms put flush 9 conv=fsync";
    let said = disks.run(script);
    let (done, took): (Vec<_>, Vec<_>) = said.iter().partition(|line| !line.starts_with("took"));
    assert!(done.iter().all(|line| line.ends_with(" ok")), "{said:?}");
    let took: Vec<u64> = took.iter().map(|line| line[5..].parse().unwrap()).collect();
    for (late, took) in [false, true, false, true, true].into_iter().zip(&took) {
        assert_eq!(*took >= 3000, late, "{said:?}");
    }
    assert_eq!((disks.got("read9"), disks.got("read10")), (vec![OLD; BLOCK], vec![OLD; BLOCK]));
    assert_eq!(disks.block("write", 10), [NEW; BLOCK]);
}

#[test]
fn chance_is_the_same_in_every_vm() {
    let script = "
        for disk in one same other; do
            for block in $(seq 0 49); do put $disk $block; done | sed 's/.* ok/+/; s/.* error/-/' | tr -d '\\n'
            echo
        done";
    let run = || {
        Disks::new(&[
            ("one", "fault=fail:write:p=0.4:seed=7"),
            ("same", "fault=fail:write:seed=7:p=0.4"),
            ("other", "fault=fail:write:p=0.4:seed=8"),
        ])
        .run(script)
    };
    let said = run();
    let [one, same, other] = &said[..] else { panic!("{said:?}") };
    assert_eq!(one.len(), 50, "{said:?}");
    assert!(one == same && one != other, "{said:?}");
    // 20 are expected, with a standard deviation of 3.5.
    for disk in [one, other] {
        let failed = disk.bytes().filter(|byte| *byte == b'-').count();
        assert!((8..33).contains(&failed), "{said:?}");
    }
    assert_eq!(run(), said);
}

#[test]
fn the_end_of_a_vm_waits_for_no_request_and_frees_the_disk() {
    let disks = Disks::new(&[("d", "fault=delay=60s:read:sectors=80-87")]);
    let script = "get d 10 late & sleep 1; echo >> begun";
    let begin = std::time::Instant::now();
    let twice = disks.prepare(&["--repeat", "2", "--jobs", "1"], script).output();
    twice.expect_code(0);
    assert!(begin.elapsed().as_secs() < 60, "{:?}", begin.elapsed());
    assert_eq!(std::fs::read(disks.site.cwd().join("begun")).unwrap(), b"\n\n");
}

/// What fio does: all limits at once, each on a disk of its own, and then the other way round.
const RATES: &str = "[global]
direct=1
time_based
runtime=5
ramp_time=2
size=64M

[many-requests]
filename=/dev/disk/by-id/virtio-many-requests
rw=randread
bs=4k
ioengine=libaio
iodepth=32
[one-request]
filename=/dev/disk/by-id/virtio-one-request
rw=randwrite
bs=4k
ioengine=psync
[many-bytes]
filename=/dev/disk/by-id/virtio-many-bytes
rw=write
bs=64k
ioengine=libaio
iodepth=32
[one-bytes]
filename=/dev/disk/by-id/virtio-one-bytes
rw=read
bs=64k
ioengine=psync

[many-requests-]
stonewall
filename=/dev/disk/by-id/virtio-many-requests
rw=randwrite
bs=4k
ioengine=libaio
iodepth=32
[one-request-]
filename=/dev/disk/by-id/virtio-one-request
rw=randread
bs=4k
ioengine=psync
[many-bytes-]
filename=/dev/disk/by-id/virtio-many-bytes
rw=read
bs=64k
ioengine=libaio
iodepth=32
[one-bytes-]
filename=/dev/disk/by-id/virtio-one-bytes
rw=write
bs=64k
ioengine=psync
";

/// Those disks, with their limits, and what these are in bytes a second.
const LIMITS: [(&str, &str, f64); 4] = [
    ("many-requests", "iops=200", 200.0 * 4096.0),
    ("one-request", "iops=40", 40.0 * 4096.0),
    ("many-bytes", "bps=4M", 4.0 * 1024.0 * 1024.0),
    ("one-bytes", "bps=2M", 2.0 * 1024.0 * 1024.0),
];

/// The rates that fio found, by job, each as its ratio to what was asked for.
fn rates(site: &Site) -> Vec<(String, f64)> {
    let disk = |(name, limit, _)| ["--disk".to_owned(), format!("size=64M,name={name},{limit}")];
    let options: Vec<String> = LIMITS.into_iter().flat_map(disk).collect();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let command = ["fio", "--output-format=json", "rates.fio"];
    let outcome = site.run_with(CLOUD[0], &options, command).output();
    let found: serde_json::Value =
        serde_json::from_str(&outcome.expect_code(0).stdout_text()).unwrap();
    let rate = |job: &serde_json::Value| {
        assert_eq!(job["error"], 0, "{job}");
        let name = job["jobname"].as_str().unwrap();
        // One of them is zero.
        let bytes = ["read", "write"].map(|way| job[way]["bw_bytes"].as_f64().unwrap());
        let (.., asked) =
            LIMITS.into_iter().find(|limit| name.trim_end_matches('-') == limit.0).unwrap();
        (name.to_owned(), (bytes[0] + bytes[1]) / asked)
    };
    found["jobs"].as_array().unwrap().iter().map(rate).collect()
}

#[test]
fn rates_are_those_that_were_asked_for() {
    need("fio", "fio");
    let site = Site::new();
    std::fs::write(site.cwd().join("rates.fio"), RATES).unwrap();
    // A host so busy that its guest does nothing for longer than a bucket takes to fill gives it less.
    let mut tries =
        (0..3).map(|_| rates(&site)).inspect(|found| assert_eq!(found.len(), 8, "{found:?}"));
    let mut seen = Vec::new();
    let near = |(_, ratio): &(String, f64)| (0.95..1.05).contains(ratio);
    let found = tries.any(|rates| {
        let all = rates.iter().all(near);
        seen.push(rates);
        all
    });
    assert!(found, "{seen:#?}");
}

#[test]
fn bursts_come_at_once_and_large_requests_late() {
    let disks = Disks::new(&[
        ("burst", "iops=20,iops-burst=60"),
        ("plain", "iops=20"),
        ("large", "bps=1M"),
    ]);
    let script = "
        put50() { dd if=/dev/zero of=$(at $1) bs=4k count=50 oflag=direct 2>/dev/null && echo ok; }
        twice() { put50 $1 && put50 $1; }
        ms twice burst
        ms put50 plain
        ms dd if=/dev/zero of=$(at large) bs=1M count=1 oflag=direct 2>/dev/null && echo ok";
    let said = disks.run(script);
    let took: Vec<u64> =
        said.iter().filter_map(|line| line.strip_prefix("took ")?.parse().ok()).collect();
    assert_eq!(said.iter().filter(|line| *line == "ok").count(), 4, "{said:?}");
    let [burst, plain, large] = took[..] else { panic!("{said:?}") };
    // 60 at once and 40 more, of which all but the default burst of 2 would take 4.9 s.
    assert!((2000..4900).contains(&burst), "{said:?}");
    assert!(plain >= 48 * 1000 / 20, "{said:?}");
    // All but what comes in 100 ms.
    assert!(large >= 900, "{said:?}");
    assert_eq!(disks.block("large", 255), [0; BLOCK]);
}
