//! Tests that stay on the host and drive VMs.

use vmlab::disk::PowerCuts;
use vmlab::prelude::*;

/// Runs a script that has to succeed, and gives what it said.
fn sh(vm: &Vm, script: &str) -> Result<String> {
    let output = vm.exec(["sh", "-ec", script])?;
    let said = output.stdout_text();
    if output.status.success() { Ok(said) } else { Err(said + &output.stderr_text())? }
}

#[vmlab::test(host, disk(name = "data", size = "64M", fs = "ext4"), expect_event = "panic")]
fn what_was_synced_survives_a_crash(vm: &mut Vm, recorder: &Recorder) -> Result {
    vm.copy_to("src", "/mnt/data")?;
    sh(vm, "sync; echo about to crash > /dev/kmsg")?;
    assert!(!vm.kernel_log()?.containing("about to crash").is_empty());
    sh(vm, "echo c > /proc/sysrq-trigger").unwrap_err();
    let since = std::time::Instant::now();
    vm.reset()?;
    recorder.measure("recovery", since.elapsed().as_secs_f64(), "s");
    sh(vm, "grep release /mnt/data/src/lib.rs").map(drop)
}

#[vmlab::test(host)]
fn one_state_and_many_ways_on(vm: &mut Vm) -> Result {
    vm.attach("size=320M,fs=xfs,name=late".parse()?)?;
    sh(vm, "echo 1 > /mnt/late/state")?;
    let snapshot = vm.snapshot()?;
    for way in ["rm /mnt/late/state", "echo 2 > /mnt/late/state; sync", "umount /mnt/late"] {
        sh(vm, way)?;
        vm.restore(&snapshot)?;
        assert_eq!(sh(vm, "cat /mnt/late/state")?, "1\n");
    }
    vm.detach("late").map_err(Into::into)
}

#[vmlab::test(host)]
fn vms_see_each_other(vm: VmBuilder) -> Result {
    let net = Lan::of(["server", "client"])?;
    let server = vm.clone().lan(&net, "server").start()?;
    sh(&server, "python3 -m http.server --directory /etc > /dev/null 2>&1 &")?;
    let client = vm.lan(&net, "client").start()?;
    let fetch = "until curl -s http://server:8000/hostname; do sleep 0.1; done";
    assert_eq!(sh(&client, fetch)?, "server\n");
    Ok(())
}

#[vmlab::test(host)]
fn a_missing_fsync_is_found(vm: VmBuilder) -> Result {
    // What `commit` vouches for may not be on the disk yet.
    let work = "cd /mnt/data; yes x | head -c 100000 > data; echo done > commit; sync commit";
    let check = "cd /mnt/data; test ! -s commit || test $(wc -c < data) = 100000";
    let disk = "size=64M,fs=ext4,name=data".parse()?;
    let mut cuts = PowerCuts::record(&vm, disk, |vm| sh(vm, work))?;
    cuts.at_random.count = 4;
    let states = cuts.check_by(&vm, |vm| sh(vm, check).map(drop).map_err(|e| e.to_string()))?;
    assert!(states.iter().any(|state| state.failure.is_some()), "{states:?}");
    Ok(())
}
