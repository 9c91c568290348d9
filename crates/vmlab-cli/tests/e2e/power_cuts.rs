//! `vmlab disk crash-states`: what a power cut could have left, looked at in fresh VMs.

use crate::common::{CLOUD, Outcome, Site, kernel, need};

/// A file that says that another is complete. Each step is on the disk before the next one, if that is asked for.
fn work(synced: bool) -> String {
    let sync = if synced { "sync /mnt/d/data; sync /mnt/d" } else { ":" };
    format!(
        "head -c 100000 /dev/zero | tr '\\0' x > /mnt/d/data; {sync}
         echo done > /mnt/d/commit; sync /mnt/d/commit; sync /mnt/d"
    )
}

/// What says that it is complete has to be right.
const CHECK: &str = "test \"$(cat /mnt/d/commit 2>/dev/null)\" != done ||
    test \"$(tr -d -c x < /mnt/d/data | wc -c)\" = 100000";

fn explored(fs: &str, size: &str, synced: bool) -> Outcome {
    let site = Site::new();
    let disk = format!("size={size},fs={fs},name=d,record=log");
    let options = ["--disk", &disk, "-m", "512M"];
    site.run_with(CLOUD[0], &options, ["sh", "-c", &work(synced)]).output().expect_code(0);
    let args = ["disk", "crash-states", "-k", CLOUD[0], "-m", "512M", "--disk", &disk];
    let cuts = ["--random", "4", "--reorder", "--seed", "7", "--", "sh", "-c", CHECK];
    let outcome = site.vmlab([&args[..], &cuts].concat()).output();
    // The log is all that the run left.
    assert_eq!(site.cwd().read_dir().unwrap().count(), 1);
    outcome
}

#[test]
fn power_cuts_find_a_missing_fsync_and_nothing_else() {
    kernel(CLOUD[0]);
    for (program, package) in
        [("mkfs.ext4", "e2fsprogs"), ("mkfs.xfs", "xfsprogs"), ("mkfs.btrfs", "btrfs-progs")]
    {
        need(program, package);
    }
    for (fs, size) in [("ext4", "64M"), ("xfs", "320M"), ("btrfs", "128M")] {
        let right = explored(fs, size, true);
        let said = right.expect_code(0).stdout_text();
        assert!(said.ends_with(" states, 0 failed\n"), "{fs}: {said}");
        let wrong = explored(fs, size, false);
        let said = wrong.expect_code(1).stdout_text();
        assert!(!said.ends_with(" 0 failed\n"), "{fs}: {said}");
        assert!(wrong.stderr_text().contains("FAIL  "), "{fs}: {}", wrong.stderr_text());
    }
}

#[test]
fn what_was_not_recorded_cannot_be_explored() {
    let site = Site::new();
    let explore = |disk: &[&str]| {
        let args = [&["disk", "crash-states"], disk, &["--", "true"]].concat();
        site.vmlab(args).output()
    };
    explore(&[]).expect_code(125).expect_stderr(&["--disk has to say which disk"]);
    explore(&["--disk", "size=64M"]).expect_code(125).expect_stderr(&["record=FILE"]);
    std::fs::write(site.cwd().join("log"), "no log").unwrap();
    let odd = ["-k", CLOUD[0], "--disk", "size=64M,record=log"];
    explore(&odd).expect_code(125).expect_stderr(&["with the log log"]);
    // It is not written over, either: it may be anything.
    let recorded = site.run_with(CLOUD[0], &odd[2..], ["true"]).output();
    recorded.expect_code(125).expect_stderr(&["not written over"]);
    assert_eq!(std::fs::read_to_string(site.cwd().join("log")).unwrap(), "no log");
    std::fs::write(site.cwd().join("kept.raw"), [0; 512]).unwrap();
    let kept = ["-k", CLOUD[0], "--disk", "path=kept.raw,mode=rw,record=log"];
    explore(&kept).expect_code(125).expect_stderr(&["record it with mode=discard"]);
    let gone = ["-k", CLOUD[0], "--disk", "size=64M,record=gone"];
    explore(&gone).expect_code(125).expect_stderr(&["gone", "No such file"]);
}
