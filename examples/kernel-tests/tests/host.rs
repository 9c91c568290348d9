//! Tests that stay on the host and drive VMs.

use vmlab::disk::PowerCuts;
use vmlab::prelude::*;
use vmlab::units::{Bytes, MIB};
use vmlab::{Disk, Output};

/// Runs a script in the guest.
fn sh(vm: &Vm, script: &str) -> Result<Output, Error> {
    vm.exec(["sh", "-ec", script])
}

fn disk(name: &str) -> Disk {
    Disk::blank(Bytes(64 * MIB)).filesystem("ext4").named(name)
}

#[vmlab::test(host, disk(name = "data", size = "64M", fs = "ext4"), expect_event = "panic")]
fn what_was_synced_survives_a_crash(vm: &mut Vm) -> Result {
    sh(vm, "echo precious > /mnt/data/file && sync")?;
    sh(vm, "echo c > /proc/sysrq-trigger").unwrap_err();
    vm.reset()?;
    assert_eq!(sh(vm, "cat /mnt/data/file")?.stdout, b"precious\n");
    Ok(())
}

#[vmlab::test(host)]
fn one_state_many_ways_on(vm: &mut Vm) -> Result {
    vm.attach(disk("late"))?;
    sh(vm, "echo 1 > /mnt/late/state")?;
    let snapshot = vm.snapshot()?;
    for way in ["rm /mnt/late/state", "echo 2 > /mnt/late/state; sync", "mkfs.ext4 -qF /dev/vda"] {
        sh(vm, way)?;
        vm.restore(&snapshot)?;
        assert_eq!(sh(vm, "cat /mnt/late/state")?.stdout, b"1\n");
    }
    Ok(vm.detach("late")?)
}

#[vmlab::test(host)]
fn a_missing_fsync_is_found(builder: VmBuilder) -> Result {
    // What `commit` vouches for may not be on the disk yet.
    let work = r"cd /mnt/data; yes x | head -c 100000 > data; echo done > commit; sync commit";
    let check = "cd /mnt/data; test ! -s commit || test $(wc -c < data) = 100000";
    let mut cuts = PowerCuts::record(&builder, disk("data"), |vm| sh(vm, work))?;
    cuts.at_random.count = 4;
    let states = cuts.check_by(&builder, |vm| match sh(vm, check) {
        Ok(output) if output.status.success() => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    let lost = states.iter().filter(|state| state.failure.is_some()).count();
    assert!(lost > 0, "of {} states", states.len());
    Ok(())
}
