//! Which lines of a console are the kernel's.

use super::super::EventKind::{Bug, Lockdep, Oops, Panic, Taint, Warning};
use super::{events, titles};

const GOOD: &str = "[    0.000000] Linux version 6.12.1\n";

#[test]
fn what_stands_before_a_line_is_taken_off() {
    for line in [
        "[    1.234567] kernel BUG at mm/slab.c:1!",
        "[12345.234567] kernel BUG at mm/slab.c:1!",
        "<2>[    1.234567] kernel BUG at mm/slab.c:1!",
        "[    1.234567][  T123] kernel BUG at mm/slab.c:1!",
        "[    1.234567][    C0] kernel BUG at mm/slab.c:1!",
        "\x1b[1;31m[    1.234567] \x1b[0mkernel BUG at mm/slab.c:1!\x1b[K",
        // Behind what a program wrote without a newline.
        "50 %\r[    1.234567] kernel BUG at mm/slab.c:1!",
        "test [3 of 9] ...[    1.234567] kernel BUG at mm/slab.c:1!",
        "\u{fffd}[    1.234567] kernel BUG at mm/slab.c:1!",
    ] {
        for end in ["\n", "\r\n", "\r\r\n", ""] {
            let found = events(format!("{GOOD}{line}{end}"));
            assert_eq!(titles(&found), [(Bug, "kernel BUG", 1)], "{line:?}");
            assert_eq!(found[0].report, ["kernel BUG at mm/slab.c:1!"]);
            assert_eq!(found[0].at_us.unwrap() % 1_000_000, 234_567);
        }
    }
    let invalid = b"\xff\xfe[    1.234567] kernel BUG at \xc3\x28mm/slab.c:1!\n";
    assert_eq!(titles(&events(invalid)), [(Bug, "kernel BUG", 1)]);
}

#[test]
fn what_is_no_time_is_not_taken_for_one() {
    for line in [
        "[1.2] kernel BUG at x:1!",
        "[    1.23456] kernel BUG at x:1!",
        "[    -.234567] kernel BUG at x:1!",
        "[99999999999999999999.234567] kernel BUG at x:1!",
        "[18446744073709551.999999] kernel BUG at x:1!",
    ] {
        assert_eq!(events(format!("{GOOD}{line}\n")), [], "{line}");
    }
}

#[test]
fn a_programs_words_are_not_the_kernels() {
    let program = "kernel BUG at mm/slab.c:1!\nKernel panic - not syncing: no\nBUG: KASAN: x in y\n\
        WARNING: CPU: 0 PID: 1 at a.c:1 f+0x1/0x2\nOops: 0002 [#1]\n";
    assert_eq!(events(format!("{GOOD}{program}")), []);
    // The same kernel without times (printk.time=0) is believed what only it would say.
    let bare = events(format!("Linux version 6.12.1\n{program}"));
    assert_eq!(bare.len(), 5, "{bare:?}");
    // So is one of which nothing is known, but not with words that anybody could use.
    assert_eq!(events("BUG: my program is broken\nOut of memory: Killed by me\n"), []);
    let bare = events("Linux version 6.12.1\nBUG: Bad page state in process sh  pfn:1234\n");
    assert_eq!(titles(&bare), [(Bug, "BUG: Bad page state", 1)]);
    let levels = events("<5>Linux version 6.12.1\n<0>kernel BUG at a.c:1!\n");
    assert_eq!(titles(&levels), [(Bug, "kernel BUG", 1)]);
}

#[test]
fn what_only_looks_like_damage_is_none() {
    let benign = "\
        Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on, data leaks possible via Spectre v2 BHB attacks!
        WARNING: Spectre v2 mitigation leaves CPU vulnerable to RETBleed attacks, data leaks possible!
        kernel BUG at a place that it does not name
        WARNING: at least one CPU is missing
        WARNING: You are running an unsupported configuration
        WARNING: kernel stack regs at 00000000c3a2 in sh:12 has bad 'bp' value 0000000012345678
        INFO: lockdep is turned off.
        INFO: NMI handler (perf_event_nmi_handler) took too long to run: 1.5 msecs
        BUG: MAX_LOCKDEP_ENTRIES too low!
        EXT4-fs (vda): mounted filesystem 01-23 r/w with ordered data mode. Quota mode: none.
        EXT4-fs (vda): warning: mounting fs with errors, running e2fsck is recommended
        EXT4-fs (vda): VFS: Can't find ext4 filesystem
        EXT4-fs (loop0): recovery complete
        EXT4-fs warning (device vda): dx_probe:823: inode #2: comm sh: Directory index full!
        XFS (vda): Invalid superblock magic number
        XFS (vda): Ending clean mount
        XFS (vda): EXPERIMENTAL online scrub feature in use. Use at your own risk!
        squashfs: SQUASHFS error: Can't find a SQUASHFS superblock on vda
        SQUASHFS error: Can't find a SQUASHFS superblock on vda
        F2FS-fs (vda): Magic Mismatch, valid(0xf2f52010) - read(0x0)
        F2FS-fs (vda): Can't find valid F2FS filesystem in 1th superblock
        BTRFS info (device vda): first mount of filesystem 01-23
        BTRFS warning (device vda): failed to read root (objectid=4): -2
        FAT-fs (vda): bogus number of reserved sectors
        FAT-fs (vda): Volume was not properly unmounted. Some data may be corrupt. Please run fsck.
        traps: test[123] general protection fault ip:1234 sp:5678 error:0 in libc.so.6
        test[123]: segfault at 0 ip 0000000000001234 sp 0000000000005678 error 4 in test
        oom_reaper: reaped process 123 (perl), now anon-rss:0kB, file-rss:0kB, shmem-rss:0kB
        watchdog: Delayed init of the lockup detector failed: -19
        rcu: Preemptible hierarchical RCU implementation.
        NMI watchdog: Enabled. Permanently consumes one hw-PMU counter.
        systemd[1]: kernel BUG at this place is a lie!
        sh (12): drop_caches: 3
        kmemleak: Kernel memory leak detector initialized (mem pool available: 15679)
        Kernel command line: panic=-1 oops=panic BUG: x";
    let console: String =
        benign.lines().map(|line| format!("[    1.000000] {}\r\n", line.trim_start())).collect();
    assert_eq!(events(console), []);
}

#[test]
fn taints_count_once_and_only_those_that_are_damage() {
    let line = |taint: &str| {
        format!("[    1.0{:05}] CPU: 0 PID: 1 Comm: sh {taint} 6.12.1 #1\n", taint.len())
    };
    assert_eq!(events(line("Not tainted")), []);
    assert_eq!(events(line("Tainted: P           OE     ")), []);
    let found = events(
        [line("Tainted: G        W  OE     "), line("Tainted: G      D W  OE      ")].concat(),
    );
    let wanted = [(Taint, "tainted: W (warning)", 1), (Taint, "tainted: D (oops or BUG)", 1)];
    assert_eq!(titles(&found), wanted);
    // A program's name is its own choice.
    assert_eq!(events("[    1.000000] CPU: 0 PID: 1 Comm: x Tainted: G Not tainted 6.12.1\n"), []);
}

#[test]
fn reports_that_several_write_at_once_are_told_apart() {
    let console = "\
        [    1.000000][  T100] BUG: kernel NULL pointer dereference, address: 0000000000000000\n\
        [    1.000001][  T200] ------------[ cut here ]------------\n\
        [    1.000002][  T200] WARNING: CPU: 1 PID: 200 at b.c:1 second+0x1/0x2\n\
        [    1.000003][  T100] Oops: 0002 [#1] PREEMPT SMP\n\
        [    1.000004][  T200] RIP: 0010:second+0x1/0x2\n\
        [    1.000005][  T100] RIP: 0010:first+0x1/0x2\n\
        [    1.000006][  T200] ---[ end trace 0000000000000000 ]---\n\
        [    1.000007][    C1] something else\n\
        [    1.000008][  T100] ---[ end trace 0000000000000000 ]---\n\
        [    1.000009][  T100] Kernel panic - not syncing: Fatal exception\n";
    let found = events(console);
    let oops = "BUG: unable to handle kernel NULL pointer dereference in first";
    let panic = "kernel panic: Fatal exception";
    assert_eq!(
        titles(&found),
        [(Oops, oops, 1), (Warning, "WARNING in second", 1), (Panic, panic, 1)]
    );
    let report = found[0].report.join("\n");
    assert!(report.contains("first") && !report.contains("second"), "{report}");
    assert!(report.ends_with("Fatal exception"), "{report}");
    assert_eq!(found[1].report.len(), 4);
}

#[test]
fn a_report_ends_with_silence_and_with_another_one() {
    let console = "\
        [    1.000000] BUG: sleeping function called from invalid context at a.c:1\n\
        [    1.000001] Call Trace:\n\
        [    1.000002]  one+0x1/0x2\n\
        [   20.000000] eth0: link up\n\
        [   20.000001] BUG: scheduling while atomic: sh/1/0x2\n\
        [   20.000002] Call Trace:\n\
        [   20.000003]  two+0x1/0x2\n\
        [   20.000004] Kernel panic - not syncing: three\n\
        [   20.000005] Kernel Offset: disabled\n\
        [   20.000006] ---[ end Kernel panic - not syncing: three ]---\n\
        [   20.000007] eth0: link down\n";
    let found = events(console);
    let sleeping = "BUG: sleeping function called from invalid context in one";
    let atomic = "BUG: scheduling while atomic in two";
    let wanted = [(Lockdep, sleeping, 1), (Bug, atomic, 1), (Panic, "kernel panic: three", 1)];
    assert_eq!(titles(&found), wanted);
    assert!(found.iter().all(|event| !event.report.join("\n").contains("eth0")), "{found:?}");
}

#[test]
fn reports_of_one_kind_follow_each_other() {
    let cut = "------------[ cut here ]------------";
    let console = format!(
        "[    1.000000] {cut}\n[    1.000001] WARNING: CPU: 0 PID: 1 at a.c:1 one+0x1/0x2\n\
         [    1.000002] {cut}\n[    1.000003] WARNING: CPU: 0 PID: 1 at a.c:1 two+0x1/0x2\n\
         [    2.000000] BUG: kernel NULL pointer dereference, address: 0000000000000000\n\
         [    2.000001] Oops: 0002 [#1] SMP\n[    2.000002] Oops: 0002 [#2] SMP\n"
    );
    let found = events(console);
    let null = "BUG: unable to handle kernel NULL pointer dereference";
    let wanted = [
        (Warning, "WARNING in one", 1),
        (Warning, "WARNING in two", 1),
        (Oops, null, 1),
        (Oops, "Oops", 1),
    ];
    assert_eq!(titles(&found), wanted);
    assert_eq!(found[0].report.len(), 2);
    assert_eq!(found[1].report[0], cut);
}

#[test]
fn what_was_long_before_does_not_lead_to_a_report() {
    let rule = "=".repeat(66);
    let console = format!(
        "[    1.000000] {rule}\n[   20.000000] kernel BUG at a.c:1!\n\
         [   40.000000] invalid opcode: 0000 [#1] SMP\n[   60.000000] Kernel panic - not syncing: x\n"
    );
    let found = events(console);
    let wanted =
        [(Bug, "kernel BUG", 1), (Oops, "invalid opcode", 1), (Panic, "kernel panic: x", 1)];
    assert_eq!(titles(&found), wanted);
    assert!(found.iter().all(|event| event.report.len() == 1), "{found:?}");
}

#[test]
fn what_no_trace_goes_with_is_no_report() {
    let others = "[    1.000000] eth0: link up\n".repeat(200);
    let rule = "=".repeat(66);
    let lockup = "BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 31s!";
    let found = events(format!(
        "[    1.000000] {rule}\n{others}[    1.000000] kernel BUG at a.c:1!\n\
         [    1.000000] {lockup}\n{others}"
    ));
    assert_eq!(found[0].report, ["kernel BUG at a.c:1!"]);
    assert!(found[1].report.len() < 100, "{}", found[1].report.len());
}

#[test]
fn the_oldest_report_ends_when_too_many_write_at_once() {
    let line = |task, text: &str| format!("[    1.000000][T{task}] {text}\n");
    let warning =
        |task: u32| line(task, &format!("WARNING: CPU: 0 PID: 1 at a.c:1 f{task}+0x1/0x2"));
    // The first one ends, so that the last one has its place.
    let mut console: String = (0..16).map(warning).collect();
    console += &line(0, "---[ end trace 0000000000000000 ]---");
    console += &line(0, "something else");
    console += &warning(16);
    console += &warning(17);
    console += &(1..18).map(|task| line(task, "RIP: 0010:f+0x1/0x2")).collect::<String>();
    let found = events(console);
    let lengths: Vec<_> = found.iter().map(|event| event.report.len()).collect();
    assert_eq!(lengths, [[2, 1].as_slice(), &[2; 16]].concat());
}
