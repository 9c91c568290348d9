//! Reports that Debian's kernels cannot make, for they lack what finds them. The texts are written after the
//! formats in mm/kasan/report.c, mm/kmsan/report.c, kernel/kcsan/report.c, mm/kfence/report.c, lib/ubsan.c,
//! kernel/locking/lockdep.c, kernel/watchdog*.c, mm/kmemleak.c, mm/slub.c and of the filesystems; none was
//! recorded.

use super::super::EventKind::{self, *};
use super::{events, titles};

/// A console with these lines, indented as here.
fn console(lines: &str) -> String {
    let lines = lines.lines().filter(|line| !line.trim().is_empty());
    lines
        .map(|line| format!("[   10.000000] {}\r\n", line.strip_prefix("        ").unwrap_or(line)))
        .collect()
}

fn one(lines: &str) -> (EventKind, String) {
    let found = events(console(lines));
    assert_eq!(found.len(), 1, "{lines}: {:?}", titles(&found));
    (found[0].kind, found[0].title.clone())
}

/// That a report has this kind and title, and ends before a line that is not of it.
fn is(kind: EventKind, title: &str, lines: &str) {
    assert_eq!(one(lines), (kind, title.to_owned()));
    let report = &events(console(&format!("{lines}\nvirtio_net: something else")))[0].report;
    assert!(!report.iter().any(|line| line.contains("something else")), "{report:?}");
}

#[test]
fn kasan() {
    is(
        Kasan,
        "KASAN: slab-use-after-free Read in victim",
        "\
        ==================================================================
        BUG: KASAN: slab-use-after-free in victim+0x1c9/0x2800 fs/a.c:12
        Read of size 8 at addr ffff888012345678 by task sh/123

        CPU: 0 UID: 0 PID: 123 Comm: sh Not tainted 6.12.0 #1
        Call Trace:
         <TASK>
         dump_stack_lvl+0x64/0x80
         print_report+0xcf/0x620
         kasan_report+0xb5/0xe0
         victim+0x1c9/0x2800
         </TASK>

        Allocated by task 123:
         kasan_save_stack+0x33/0x60
         maker+0x1/0x2

        Freed by task 124:
         kfree+0x1/0x2

        The buggy address belongs to the object at ffff888012345600
         which belongs to the cache kmalloc-128 of size 128
        Memory state around the buggy address:
        >ffff888012345600: fa fb fb fb fb fb fb fb fb fb fb fb fb fb fb fb
                                                    ^
        ==================================================================",
    );
    let rule = "=".repeat(66);
    let found = events(console(&format!(
        "{rule}\nBUG: KASAN: use-after-free in f+0x1/0x2\nCall Trace:\n <TASK>\n f+0x1/0x2\n </TASK>\n\n\
         Freed by task 124:\n free+0x1/0x2\n\nAnything of this report\n{rule}\nDisabling lock debugging due to kernel taint\n\
         Kernel panic - not syncing: KASAN: panic_on_warn set ...\nCPU: 0 PID: 1 Comm: sh"
    )));
    // The panic is what came of it, though there is a line between them.
    let [kasan, panic] = &found[..] else { panic!("{found:?}") };
    assert_eq!(kasan.report[kasan.report.len() - 3], rule);
    assert!(kasan.report.ends_with(&panic.report) && panic.report.len() == 2, "{kasan:?}");
    // The function of the first line is only what was told the wrong address.
    is(
        Kasan,
        "KASAN: stack-out-of-bounds Write in caller",
        "\
        ==================================================================
        BUG: KASAN: stack-out-of-bounds in memcpy+0x3c/0x60
        Write of size 16 at addr ffffc90000123456 by task sh/123
        Call Trace:
         dump_stack_lvl+0x64/0x80
         kasan_check_range+0x10/0x20
         memcpy+0x3c/0x60
         caller.constprop.0.isra.0+0x1/0x2 [module]
        ==================================================================",
    );
    is(
        Kasan,
        "KASAN: double-free in twice",
        "\
        ==================================================================
        BUG: KASAN: double-free in kfree+0x8c/0x100
        Free of addr ffff888012345678 by task sh/123
        Call Trace:
         kasan_report_invalid_free+0xaa/0xd0
         kfree+0x8c/0x100
         ? unsure+0x1/0x2
         twice+0x1/0x2
        ==================================================================",
    );
    // What KASAN says within a general protection fault is no report of its own.
    is(GeneralProtection, "general protection fault in victim", "\
        Oops: general protection fault, probably for non-canonical address 0xdffffc0000000000: 0000 [#1] SMP KASAN PTI
        KASAN: null-ptr-deref in range [0x0000000000000000-0x0000000000000007]
        RIP: 0010:victim+0x1c9/0x2800
        ---[ end trace 0000000000000000 ]---");
}

#[test]
fn other_sanitizers() {
    is(
        Kmsan,
        "KMSAN: uninit-value in user",
        "\
        =====================================================
        BUG: KMSAN: uninit-value in user+0x1c9/0x2800 net/a.c:12
         user+0x1c9/0x2800 net/a.c:12
        Uninit was created at:
         slab_post_alloc_hook+0x1/0x2
        Bytes 4-7 of 8 are uninitialized
        =====================================================",
    );
    is(
        Kcsan,
        "KCSAN: data-race in one / two",
        "\
        ==================================================================
        BUG: KCSAN: data-race in one.part.0+0x1/0x2 / two+0x3/0x4
        write to 0xffff888012345678 of 4 bytes by task 1 on cpu 0:
         one+0x1/0x2
        value changed: 0x00000001 -> 0x00000002
        ==================================================================",
    );
    is(
        Kfence,
        "KFENCE: memory corruption in owner",
        "\
        ==================================================================
        BUG: KFENCE: memory corruption in kfree+0x1/0x2
        Corrupted memory at 0x00000000abcdef01 [ ! . . . ] (in kfence-#69):
         kfree+0x1/0x2
         owner+0x1/0x2
        kfence-#69: 0x00000000abcdef00-0x00000000abcdef3f, size=64, cache=kmalloc-64
        ==================================================================",
    );
    let frames = "\
        CPU: 0 PID: 123 Comm: sh Not tainted 6.1.0 #1
        Call Trace:
         <TASK>
         dump_stack_lvl+0x44/0x5c
         ubsan_epilogue+0x5/0x40
         __ubsan_handle_shift_out_of_bounds.cold+0x61/0xef
         shifter+0x1/0x2
         </TASK>";
    let shift = "UBSAN: shift-out-of-bounds in drivers/a.c:12:34\nshift exponent 40 is too large";
    is(
        Ubsan,
        "UBSAN: shift-out-of-bounds in shifter",
        &format!(
            "\
        ================================================================================
        {shift}
{frames}
        ================================================================================"
        ),
    );
    is(
        Ubsan,
        "UBSAN: shift-out-of-bounds in shifter",
        &format!(
            "\
        ------------[ cut here ]------------
        {shift}
{frames}
        ---[ end trace ]---"
        ),
    );
}

#[test]
fn lockdep() {
    is(
        Lockdep,
        "possible deadlock in taker",
        "\
        ======================================================
        WARNING: possible circular locking dependency detected
        6.12.0 #1 Not tainted
        ------------------------------------------------------
        sh/123 is trying to acquire lock:
        ffff888012345678 (&a->lock){+.+.}-{3:3}, at: taker+0x1c9/0x2800

        but task is already holding lock:
        ffff888012345680 (&b->lock){+.+.}-{3:3}, at: holder+0x1/0x2

        -> #0 (&a->lock){+.+.}-{3:3}:
               __lock_acquire+0x1/0x2
        stack backtrace:
        CPU: 0 UID: 0 PID: 123 Comm: sh Not tainted 6.12.0 #1
        Call Trace:
         <TASK>
         dump_stack_lvl+0x64/0x80
         </TASK>",
    );
    is(
        Lockdep,
        "possible deadlock in again",
        "\
        ============================================
        WARNING: possible recursive locking detected
        --------------------------------------------
        sh/123 is trying to acquire lock:
        ffff888012345678 (&a->lock){+.+.}-{2:2}, at: again+0x1/0x2
         </TASK>",
    );
    is(
        Lockdep,
        "inconsistent lock state in taker",
        "\
        ================================
        WARNING: inconsistent lock state
        inconsistent {IN-SOFTIRQ-W} -> {SOFTIRQ-ON-W} usage.
        sh/123 [HC0[0]:SC0[0]:HE1:SE1] takes:
        ffff888012345678 (&a->lock){+.?.}-{2:2}, at: taker+0x1/0x2
         </TASK>",
    );
    is(
        Lockdep,
        "WARNING: suspicious RCU usage in reader",
        "\
        =============================
        WARNING: suspicious RCU usage
        -----------------------------
        net/a.c:12 suspicious rcu_dereference_check() usage!
        Call Trace:
         <TASK>
         lockdep_rcu_suspicious+0x1/0x2
         reader+0x1/0x2
         </TASK>",
    );
    is(
        Lockdep,
        "BUG: sleeping function called from invalid context in sleeper",
        "\
        BUG: sleeping function called from invalid context at kernel/locking/mutex.c:585
        in_atomic(): 1, irqs_disabled(): 0, non_block: 0, pid: 123, name: sh
        Call Trace:
         <TASK>
         dump_stack_lvl+0x64/0x80
         __might_resched+0x1/0x2
         __mutex_lock+0x1/0x2
         sleeper+0x1/0x2
         </TASK>",
    );
    for (head, title) in [
        ("WARNING: SOFTIRQ-safe -> SOFTIRQ-unsafe lock order detected", "possible deadlock"),
        ("WARNING: possible irq lock inversion dependency detected", "possible deadlock"),
        ("[ BUG: Invalid wait context ]", "BUG: invalid wait context"),
        ("WARNING: bad unlock balance detected!", "WARNING: bad unlock balance"),
        ("WARNING: held lock freed!", "WARNING: held lock freed"),
        ("WARNING: sh/123 still has locks held!", "WARNING: still has locks held"),
        ("INFO: trying to register non-static key.", "INFO: trying to register non-static key"),
        // As it was before 4.12.
        ("[ INFO: possible circular locking dependency detected ]", "possible deadlock"),
    ] {
        assert_eq!(one(head), (Lockdep, title.to_owned()));
    }
}

#[test]
fn exceptions_and_lockups() {
    for (head, kind, title) in [
        (
            "BUG: unable to handle kernel NULL pointer dereference at 0000000000000008",
            Oops,
            "BUG: unable to handle kernel NULL pointer dereference",
        ),
        (
            "BUG: unable to handle kernel paging request at ffffc90000000000",
            Oops,
            "BUG: unable to handle kernel paging request",
        ),
        ("Oops: double fault: 0000 [#1] PREEMPT SMP NOPTI", Oops, "double fault"),
        ("double fault: 0000 [#2] SMP", Oops, "double fault"),
        ("traps: PANIC: double fault, error_code: 0x0", Oops, "PANIC: double fault"),
        ("stack segment: 0000 [#1] SMP", Oops, "stack segment fault"),
        ("general protection fault: 0000 [#1] SMP", GeneralProtection, "general protection fault"),
        ("Oops: 0002 [#1] SMP", Oops, "Oops"),
        ("NMI watchdog: Watchdog detected hard LOCKUP on cpu 1", HardLockup, "hard LOCKUP"),
        ("watchdog: CPU0: Watchdog detected hard LOCKUP on cpu 1", HardLockup, "hard LOCKUP"),
    ] {
        is(
            kind,
            &format!("{title} in spinner"),
            &format!(
                "\
        {head}
        RIP: 0010:spinner+0x1/0x2
        Call Trace:
         <TASK>
         caller+0x1/0x2
         </TASK>
        ---[ end trace 0000000000000000 ]---"
            ),
        );
    }
    for head in [
        "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "rcu: INFO: rcu_sched self-detected stall on CPU",
        "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-...D } 21 jiffies s: 1 root: 0x2/.",
        "INFO: rcu_sched self-detected stall on CPU",
    ] {
        // One CPU waits for the other.
        is(
            RcuStall,
            "INFO: rcu detected stall in spinner",
            &format!(
                "\
        {head}
        rcu: \t1-...0: (1 GPs behind) idle=1234/1/0x4 softirq=1/1 fqs=1
        \t(detected by 0, t=21002 jiffies, g=1, q=1 ncpus=2)
        Sending NMI from CPU 0 to CPUs 1:
        NMI backtrace for cpu 0
        RIP: 0010:pv_native_safe_halt+0x1/0x2
        NMI backtrace for cpu 1
        RIP: 0010:spinner+0x1/0x2
        Call Trace:
         <TASK>
         caller+0x1/0x2
         </TASK>"
            ),
        );
    }
    let line = "BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 31s!";
    assert_eq!(one(line), (Bug, "BUG: workqueue lockup".to_owned()));
}

#[test]
fn bugs_without_a_kind_of_their_own() {
    for (head, title) in [
        ("BUG: Bad page map in process sh  pte:8000 pmd:1234", "BUG: Bad page map"),
        (
            "BUG: Bad rss-counter state mm:00000000abcdef01 type:MM_FILEPAGES val:1",
            "BUG: Bad rss-counter state",
        ),
        (
            "BUG: non-zero pgtables_bytes on freeing mm: 4096",
            "BUG: non-zero pgtables_bytes on freeing mm",
        ),
        ("BUG: spinlock bad magic on CPU#0, sh/123", "BUG: spinlock bad magic"),
        (
            "BUG: using smp_processor_id() in preemptible [00000000] code: sh/123",
            "BUG: using smp_processor_id() in preemptible code",
        ),
        (
            "BUG kmalloc-64 (Tainted: G        W        ): Poison overwritten",
            "BUG: slab kmalloc-64: Poison overwritten",
        ),
        ("VFS: Busy inodes after unmount of loop0 (ext4)", "VFS: Busy inodes after unmount"),
        (
            "CFI failure at caller+0x1/0x2 (target: other+0x0/0x3; expected type: 0x12345678)",
            "CFI failure in caller",
        ),
    ] {
        assert_eq!(one(head), (Bug, title.to_owned()));
    }
    is(
        Warning,
        "WARNING: refcount bug in user",
        "\
        ------------[ cut here ]------------
        refcount_t: underflow; use-after-free.
        WARNING: CPU: 0 PID: 123 at lib/refcount.c:28 refcount_warn_saturate+0xba/0x110
        RIP: 0010:refcount_warn_saturate+0xba/0x110
        Call Trace:
         <TASK>
         user+0x1/0x2
         </TASK>
        ---[ end trace 0000000000000000 ]---",
    );
}

#[test]
fn panics() {
    for (message, title) in [
        ("Attempted to kill init! exitcode=0x0000000b", "Attempted to kill init! exitcode=N"),
        (
            "VFS: Unable to mount root fs on unknown-block(0,0)",
            "VFS: Unable to mount root fs on unknown-block(N,N)",
        ),
        (
            "stack-protector: Kernel stack is corrupted in: f+0x12/0x34",
            "stack-protector: Kernel stack is corrupted in: f",
        ),
        (
            "Out of memory: compulsory panic_on_oom is enabled",
            "Out of memory: compulsory panic_on_oom is enabled",
        ),
    ] {
        let line = format!("Kernel panic - not syncing: {message}");
        assert_eq!(one(&line), (Panic, format!("kernel panic: {title}")));
    }
    // One that a warning brings about is in the middle of the warning's report.
    let found = events(console(
        "\
        ------------[ cut here ]------------
        WARNING: CPU: 0 PID: 123 at a.c:12 warner+0x1/0x2
        Modules linked in:
        Kernel panic - not syncing: kernel: panic_on_warn set ...
        CPU: 0 PID: 123 Comm: sh
        Kernel Offset: disabled
        ---[ end Kernel panic - not syncing: kernel: panic_on_warn set ... ]---",
    ));
    let panic = "kernel panic: kernel: panic_on_warn set ...";
    assert_eq!(titles(&found), [(Warning, "WARNING in warner", 1), (Panic, panic, 1)]);
    assert_eq!((found[0].report.len(), found[1].report.len()), (7, 4));
}

#[test]
fn memory() {
    is(
        MemoryLeak,
        "memory leak in maker",
        "\
        unreferenced object 0xffff888012345678 (size 64):
          comm \"sh\", pid 123, jiffies 4294667296
          hex dump (first 32 bytes):
            00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00  ................
          backtrace (crc 0):
            kmem_cache_alloc_noprof+0x1/0x2
            maker+0x1/0x2
            caller+0x1/0x2
         </TASK>",
    );
    let line = "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)";
    is(MemoryLeak, "kmemleak: new suspected memory leaks", line);
    let line = "Out of memory: Killed process 123 (a (b) c) total-vm:1kB, anon-rss:1kB, UID:0";
    assert_eq!(one(line).0, OomKill);
    is(OomKill, "OOM kill: sh", "Out of memory: Kill process 123 (sh) score 1 or sacrifice child");
}

#[test]
fn filesystems() {
    for (line, title) in [
        (
            "EXT4-fs error (device vda): ext4_lookup:1857: inode #2: comm ls: iget: checksum invalid",
            "EXT4-fs error in ext4_lookup",
        ),
        (
            "EXT4-fs (vda): previous I/O error to superblock detected",
            "EXT4-fs error: previous I/O error to superblock detected",
        ),
        ("Aborting journal on device vda-8.", "JBD2: aborting journal"),
        (
            "XFS (vda): Metadata corruption detected at xfs_agf_verify+0x1/0x2, xfs_agf block 0x1",
            "XFS: Metadata corruption detected in xfs_agf_verify",
        ),
        (
            "XFS (dm-0): metadata I/O error in \"xfs_read\" at daddr 0x1 len 1 error 74",
            "XFS: metadata I/O error",
        ),
        (
            "XFS (vda): Corruption of in-memory data (0x8) detected at xfs_defer_finish+0x1/0x2 (fs/xfs/a.c:1).  Shutting down filesystem.",
            "XFS: Corruption of in-memory data in xfs_defer_finish",
        ),
        (
            "BTRFS error (device vda): bdev /dev/vda errs: wr 0, rd 0, flush 0, corrupt 12, gen 0",
            "BTRFS error: bdev /dev/vda errs: wr N, rd N, flush N, corrupt N, gen N",
        ),
        (
            "BTRFS critical (device vda state EA): corrupt leaf: root=5 block=123 slot=1",
            "BTRFS critical: corrupt leaf: root=N block=N slot=N",
        ),
        (
            "BTRFS: error (device vda) in btrfs_commit_transaction:2494: errno=-5 IO failure",
            "BTRFS error in btrfs_commit_transaction",
        ),
        (
            "BTRFS: error (device vda state A) in __btrfs_free_extent:3218: errno=-2 No such entry",
            "BTRFS error in __btrfs_free_extent",
        ),
        (
            "F2FS-fs (vda): inconsistent node block, nid:4, node_footer[nid:0,ino:0,ofs:0,cpver:0,blkaddr:0]",
            "F2FS error: inconsistent node block, nid:N, node_footer[nid:N,ino:N,ofs:N,cpver:N,blkaddr:N]",
        ),
        (
            "FAT-fs (vda): error, invalid FAT chain (i_pos 0, last_block 8)",
            "FAT-fs error: invalid FAT chain (i_pos N, last_block N)",
        ),
        (
            "SQUASHFS error: zlib decompression failed, data probably corrupt",
            "SQUASHFS error: zlib decompression failed, data probably corrupt",
        ),
    ] {
        is(FilesystemError, title, line);
    }
}
