//! What tests can be: each of these has a VM of its own.

use std::fs;
use std::process::Command;

use vmlab::prelude::*;

#[vmlab::test]
fn what_a_test_may_do_to_a_kernel() {
    // Writes to the root go to a layer of the guest's own, and its processes are root.
    fs::write("/etc/hostname", "changed").unwrap();
    fs::write("/proc/sys/kernel/hostname", "changed").unwrap();
}

#[vmlab::test(cpus = 2)]
fn errors_are_passed_on(ctx: &Ctx) -> Result {
    let cpus = fs::read_to_string("/sys/devices/system/cpu/online")?;
    assert_eq!(cpus.trim(), "0-1");
    let uptime = fs::read_to_string("/proc/uptime")?;
    let seconds: f64 = uptime.split(' ').next().unwrap_or_default().parse()?;
    ctx.measure("uptime", seconds, "s");
    ctx.detail("cpus", cpus.trim());
    Ok(())
}

#[vmlab::test(kernel = ["debian:6.1", "debian:6.12"])]
fn under_several_kernels(ctx: &Ctx) -> Result {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    assert_eq!(release.trim(), ctx.kernel());
    Ok(())
}

#[vmlab::test]
#[should_panic(expected = "No such file")]
fn panics_come_back() {
    fs::read("/nowhere").unwrap();
}

#[vmlab::test(expect_err)]
async fn errors_may_be_expected() -> Result {
    Ok(fs::create_dir("/proc/new")?)
}

#[vmlab::test(expect_event = "panic")]
fn kernels_may_be_brought_down() {
    fs::write("/proc/sysrq-trigger", "c").unwrap();
}

#[vmlab::test(disk(name = "data", size = "256M", fs = "btrfs"))]
fn writes_survive_a_remount(ctx: &Ctx) -> Result {
    let file = ctx.disk("data").join("file");
    fs::write(&file, "written")?;
    let (place, device) = (ctx.disk("data"), ctx.device("data"));
    let remount = format!("umount {0} && mount {1} {0}", place.display(), device.display());
    assert!(Command::new("sh").args(["-c", &remount]).status()?.success());
    assert_eq!(fs::read_to_string(&file)?, "written");
    Ok(())
}

#[vmlab::test(disk(name = "bad", size = "64M", fault = "fail:write:nth=1"))]
fn faults_of_a_disk_are_seen(ctx: &Ctx) -> Result {
    let disk = fs::File::options().write(true).open(ctx.device("bad"))?;
    std::os::unix::fs::FileExt::write_all_at(&disk, b"lost", 0)?;
    assert_eq!(disk.sync_all().unwrap_err().raw_os_error(), Some(5), "EIO");
    Ok(())
}
