//! What tests can be: each of these has a VM of its own.

use std::fs;
use std::process::Command;

use vmlab::prelude::*;

#[vmlab::test]
fn what_a_test_may_do_to_a_kernel() {
    // The guest's root has its own layer for writes, and the guest's processes are root.
    fs::write("/etc/kernel-tests", "only in the guest").unwrap();
    fs::write("/proc/sys/kernel/hostname", "changed").unwrap();
    assert_eq!(fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), "changed\n");
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
fn under_several_kernels(ctx: &Ctx) {
    let release = Command::new("uname").arg("-r").output().unwrap();
    assert_eq!(String::from_utf8(release.stdout).unwrap().trim(), ctx.kernel());
    let series = std::thread::current().name().map(|name| name.contains("debian_6_12"));
    assert_eq!(series, Some(ctx.kernel().starts_with("6.12.")));
}

#[vmlab::test]
#[should_panic(expected = "No such file")]
fn panics_come_back() {
    fs::read("/nowhere").unwrap();
}

#[vmlab::test(expect_err)]
fn errors_may_be_expected() -> Result {
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
    let script = format!(
        "umount {0} && mount {1} {0}",
        ctx.disk("data").display(),
        ctx.device("data").display()
    );
    assert!(Command::new("sh").args(["-c", &script]).status()?.success());
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

#[vmlab::test]
async fn futures_are_waited_for() {
    let answer = async { 42 }.await;
    assert_eq!(answer, 42);
}

#[vmlab::test(host)]
fn from_the_outside(vm: &mut Vm) -> Result {
    let output = vm.exec(["uname", "-r"])?;
    assert_eq!(output.stdout_text().trim(), vm.release());
    assert!(vm.exec(["sh", "-c", "exit 3"])?.status.code() == Some(3));
    Ok(())
}

#[vmlab::test(host)]
fn files_and_the_kernels_log(vm: &mut Vm, recorder: &Recorder) -> Result {
    vm.copy_to("src", "/root")?;
    let before = vm.kernel_log()?.mark();
    let since = std::time::Instant::now();
    let script = "echo '<4>a warning' > /dev/kmsg; wc -l /root/src/*.rs > /root/lines";
    assert!(vm.exec(["sh", "-c", script])?.status.success());
    recorder.measure("script", since.elapsed().as_secs_f64() * 1000.0, "ms");
    let warnings = vm.kernel_log()?.since(&before).at_least(vmlab::LogLevel::Warning);
    assert!(!warnings.containing("a warning").is_empty(), "{warnings}");
    let dir = tempfile::tempdir()?;
    vm.copy_from("/root/lines", dir.path())?;
    assert!(fs::read_to_string(dir.path().join("lines"))?.contains("lib.rs"));
    Ok(())
}

#[vmlab::test(host)]
fn several_vms(builder: VmBuilder) -> Result {
    let [one, other] = [builder.clone().start()?, builder.start()?];
    let hostname = |vm: &Vm| Ok::<_, Error>(vm.exec(["uname", "-n"])?.stdout_text());
    assert_ne!(hostname(&one)?, hostname(&other)?);
    Ok(())
}
