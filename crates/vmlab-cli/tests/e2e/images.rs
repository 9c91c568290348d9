//! Disk images: their own systems, by BIOS and UEFI, and kernels that have their root on them.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::process::Signal;

use crate::common::pty::Terminal;
use crate::common::{CLOUD, DEBIAN_6_1, DEBIAN_6_12, Site, kernel, need};

/// How long a distribution's system may take to start without KVM on a busy machine, and how long an image
/// may take to be built.
const BOOT_PATIENCE: Duration = Duration::from_secs(400);
const BUILD_PATIENCE: Duration = Duration::from_secs(1200);

/// Systems that `vmlab image build` makes: one has qemu-guest-agent, the other cloud-init as well, and a
/// systemd that takes units by credentials.
const DEBIAN_12: &[&str] = &["debian:12"];
const DEBIAN_13: &[&str] = &["debian:13", "--package", "cloud-init"];

/// The image of a recipe, built once for all tests.
fn image(recipe: &'static [&'static str]) -> PathBuf {
    static BUILT: Mutex<Vec<(&[&str], PathBuf)>> = Mutex::new(Vec::new());
    // Held while one is built, so that one test does it and the others wait.
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, path)) = built.iter().find(|(other, _)| *other == recipe) {
        return path.clone();
    }
    let site = Site::new();
    let args = [&["image", "build"], recipe].concat();
    let outcome = site.vmlab(args).patience(BUILD_PATIENCE).output();
    outcome.expect_code(0);
    let path = PathBuf::from(outcome.stdout_text().trim_end());
    built.push((recipe, path.clone()));
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A copy that a test may write to.
fn copy(site: &Site, image: &Path, name: &str) -> PathBuf {
    let to = site.path().join(name);
    host(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(image).arg(&to));
    // The one in the cache is nobody's to write to.
    std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o644)).unwrap();
    to
}

/// Runs a program of the host that has to succeed.
fn host(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) = (&output.stdout, String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {err}{}", String::from_utf8_lossy(out));
    String::from_utf8_lossy(out).into_owned()
}

/// What would tell that a file was written to.
fn stamp(path: &Path) -> (u64, std::time::SystemTime, String) {
    let meta = path.metadata().unwrap();
    (meta.len(), meta.modified().unwrap(), host(Command::new("sha256sum").arg(path)))
}

/// A disk without partitions with the host's busybox on it, which has no agent, no boot loader, nothing.
fn busybox_disk(site: &Site) -> PathBuf {
    let busybox = need("busybox", "busybox-static");
    let root = site.path().join("busybox-root");
    for dir in ["bin", "dev", "proc", "sys", "run", "tmp", "etc", "root", "lib"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::copy(busybox, root.join("bin/busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", root.join("bin/sh")).unwrap();
    std::fs::write(root.join("etc/os-release"), "ID=tiny\n").unwrap();
    let disk = site.path().join("tiny.raw");
    let mke2fs = need("mke2fs", "e2fsprogs");
    host(Command::new(mke2fs).args(["-q", "-t", "ext4", "-d"]).arg(&root).arg(&disk).arg("64M"));
    disk
}

#[test]
fn a_bios_starts_an_image() {
    let site = Site::new();
    let image = image(DEBIAN_12);
    let before = stamp(&image);
    let script = "
        [ -d /sys/firmware/efi ] && echo efi || echo bios
        . /etc/os-release; echo $ID $VERSION_ID; cat /proc/1/comm
        nice; id -un; pwd; echo $HOME; echo \"$GIVEN $FROM_THE_CALLER.\"; cat
        echo of the guest > made; mount | grep -c \" on $PWD type virtiofs (rw\"
        echo changed > /etc/motd; echo aside >&2; exit 3";
    let args = ["run", "-q", "--image", text(&image), "-u", "daemon", "-e", "GIVEN=a  b", "--"];
    let outcome = site
        .vmlab([&args[..], &["sh", "-c", script]].concat())
        .env("FROM_THE_CALLER", "x")
        .input("typed\n")
        .patience(BOOT_PATIENCE)
        .output();
    outcome.expect_code(3);
    let cwd = site.cwd();
    assert_eq!(
        outcome.stdout_text(),
        format!(
            "bios\ndebian 12\nsystemd\n0\ndaemon\n{}\n/usr/sbin\na  b .\ntyped\n1\n",
            cwd.display()
        ),
        "{}",
        outcome.stderr_text()
    );
    assert!(outcome.stderr_text().contains("aside\n"), "{}", outcome.stderr_text());
    assert!(outcome.stderr_text().contains("Permission denied"), "daemon is not root");
    assert_eq!(stamp(&image), before, "an image is not written to");
}

#[test]
fn uefi_starts_an_image_and_a_terminal_is_one() {
    let site = Site::new();
    let image = image(DEBIAN_12);
    let script = "[ -d /sys/firmware/efi ] && stty size && test -t 0 && read -r line && \
                  echo \"got $line\" && systemctl is-system-running --wait; exit 7";
    let args = ["run", "-q", "-t", "--image", text(&image), "--uefi", "--", "sh", "-c", script];
    let command = site.vmlab(args).into_terminal_command();
    let mut terminal = Terminal::start_patient(command, 33, 101, BOOT_PATIENCE);
    terminal.wait("33 101\r\n");
    terminal.type_in("typed\r");
    terminal.wait("got typed\r\n");
    terminal.wait("running\r\n");
    assert_eq!(terminal.finish().code(), Some(7), "{}", terminal.text());
}

#[test]
fn secure_boot_starts_what_is_signed() {
    let site = Site::new();
    let image = image(DEBIAN_12);
    let script = "od -An -t u1 -j 4 /sys/firmware/efi/efivars/SecureBoot-*";
    let args = ["run", "-q", "--image", text(&image), "--secure-boot", "--", "sh", "-c", script];
    let outcome = site.vmlab(args).patience(BOOT_PATIENCE).output();
    assert_eq!(outcome.expect_code(0).stdout_text().trim(), "1");
}

/// Has systemd-tmpfiles of a system hear of no credentials.
const NO_FILES_BY_CREDENTIALS: &str = "
    drop_in=/etc/systemd/system/systemd-tmpfiles-setup.service.d; mkdir -p $drop_in
    printf '[Service]\\nLoadCredential=\\nImportCredential=\\n' > $drop_in/none.conf";

/// Changes an image, by a script under another kernel.
fn change(site: &Site, image: &Path, script: &str) {
    let options = ["--image", text(image), "--persist"];
    site.run_with(CLOUD[0], &options, ["sh", "-c", script]).output().expect_code(0);
}

#[test]
fn the_agent_comes_in_by_guest_agent_and_by_files_of_credentials() {
    let site = Site::new();
    let image = copy(&site, &image(DEBIAN_12), "own.raw");
    let who = "systemctl show -P FragmentPath vmlab-agent";
    let run = || {
        let args = ["run", "-q", "--image", text(&image), "--", "sh", "-c", who];
        site.vmlab(args).patience(BOOT_PATIENCE).output().expect_code(0).stdout_text()
    };
    change(&site, &image, NO_FILES_BY_CREDENTIALS);
    assert_eq!(run(), "/run/systemd/transient/vmlab-agent.service\n");
    let etc = "/etc/systemd/system";
    change(
        &site,
        &image,
        &format!(
            "ln -sf /dev/null {etc}/qemu-guest-agent.service
             rm -r {etc}/systemd-tmpfiles-setup.service.d"
        ),
    );
    assert_eq!(run(), "/run/systemd/system/vmlab-agent.service\n");
}

#[test]
fn the_agent_comes_in_by_cloud_init_and_by_credentials() {
    let site = Site::new();
    let image = copy(&site, &image(DEBIAN_13), "own.raw");
    let on_image = |script: &str| change(&site, &image, script);
    let who = "systemctl is-active qemu-guest-agent; \
               systemctl show -P FragmentPath vmlab-agent; test -d /run/cloud-init && echo cloud; true";
    let run = || {
        let args =
            ["run", "-q", "--json", "out.json", "--image", text(&image), "--", "sh", "-c", who];
        let outcome = site.vmlab(args).patience(BOOT_PATIENCE).output();
        let json = std::fs::read(site.cwd().join("out.json")).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&json).unwrap();
        let log = report["runs"][0]["console_log"].as_str().unwrap();
        let console = String::from_utf8_lossy(&std::fs::read(log).unwrap()).into_owned();
        assert!(console.contains("] Linux version 6."), "{console}");
        outcome.expect_code(0).stdout_text()
    };
    let etc = "/etc/systemd/system";
    // systemd looks for credentials by a generator, which is taken out here. The kernel writes nothing to the
    // serial port, which the agent then does.
    on_image(&format!(
        "sed -i 's/console=ttyS0[^ ]*//g' /boot/grub/grub.cfg && ! grep ttyS0 /boot/grub/grub.cfg
         ln -sf /dev/null {etc}/qemu-guest-agent.service
         mkdir -p {etc}-generators && ln -sf /dev/null {etc}-generators/systemd-debug-generator
         {NO_FILES_BY_CREDENTIALS}"
    ));
    let by_cloud_init = run();
    assert!(by_cloud_init.contains("/run/systemd/transient/"), "{by_cloud_init}");
    assert!(by_cloud_init.ends_with("cloud\n"), "{by_cloud_init}");
    on_image(&format!(
        "rm {etc}-generators/systemd-debug-generator; touch /etc/cloud/cloud-init.disabled"
    ));
    let by_credentials = run();
    assert!(by_credentials.contains("inactive\n"), "{by_credentials}");
    assert!(by_credentials.contains("/generator"), "{by_credentials}");
}

#[test]
fn what_a_system_writes_stays_only_if_that_is_asked_for() {
    let site = Site::new();
    let image = copy(&site, &image(DEBIAN_12), "own.raw");
    // As early in a boot, nobody listens to the power button at first.
    let script = "test ! -e /root/made && echo kept > /root/made && systemctl stop systemd-logind && \
        systemd-run --on-active=8 systemctl start systemd-logind";
    let run = |options: &[&str]| {
        let args = [&["run", "-q", "--image", text(&image)], options].concat();
        let outcome = site.vmlab([&args[..], &["--", "sh", "-c", script]].concat());
        outcome.patience(BOOT_PATIENCE).output()
    };
    run(&["--persist"]).expect_code(0);
    // A second one finds it; had the system not unmounted its disk, the kernel would say so.
    let script = "cat /root/made; dmesg | grep -c 'recovery complete'";
    let outcome =
        site.run_with(CLOUD[0], &["--image", text(&image)], ["sh", "-c", script]).output();
    assert_eq!(outcome.stdout_text(), "kept\n0\n", "{}", outcome.stderr_text());
}

#[test]
fn kernels_have_their_root_on_images_of_any_format() {
    let site = Site::new();
    let qemu_img = need("qemu-img", "qemu-utils");
    let raw = busybox_disk(&site);
    let before = stamp(&raw);
    let named = |name: &str| site.path().join(name);
    for format in ["qcow2", "vmdk", "vdi"] {
        let to = named(&format!("disk.{format}"));
        host(Command::new(&qemu_img).args(["convert", "-O", format]).arg(&raw).arg(to));
    }
    for (program, ending) in [("zstd", "zst"), ("xz", "xz"), ("gzip", "gz")] {
        let script = format!("{program} -1 <{} >{}", text(&raw), text(&named(ending)));
        host(Command::new("sh").args(["-c", &script]));
    }
    host(
        Command::new("tar").arg("-C").arg(site.path()).arg("-cf").arg(named("tar")).arg("tiny.raw"),
    );
    let script = "busybox cat /etc/os-release; echo of the guest > /x && busybox cat /x; \
                  busybox grep -o ' / ext4 rw' /proc/mounts; echo here > made";
    let names = ["tiny.raw", "disk.qcow2", "disk.vmdk", "disk.vdi", "zst", "xz", "gz", "tar"];
    for name in names {
        let path = named(name);
        let options = ["--image", text(&path)];
        let outcome = site.run_with(CLOUD[0], &options, ["/bin/sh", "-c", script]).output();
        outcome.expect_code(0);
        assert_eq!(outcome.stdout_text(), "ID=tiny\nof the guest\n / ext4 rw\n", "{name}");
        assert_eq!(std::fs::read_to_string(site.cwd().join("made")).unwrap(), "here\n");
        std::fs::remove_file(site.cwd().join("made")).unwrap();
    }
    assert_eq!(stamp(&raw), before);
    // Really, and as after an unmount.
    let options = ["--image", text(&raw), "--persist"];
    let script = "echo of the guest > /root/made";
    site.run_with(CLOUD[0], &options, ["/bin/sh", "-c", script]).output().expect_code(0);
    let fsck = host(Command::new(need("fsck.ext4", "e2fsprogs")).arg("-n").arg(&raw));
    assert!(!fsck.contains("recover"), "{fsck}");
    let debugfs = need("debugfs", "e2fsprogs");
    let made = host(Command::new(debugfs).args(["-R", "cat /root/made"]).arg(&raw));
    assert_eq!(made, "of the guest\n");
}

#[test]
fn one_file_has_a_matrix_of_three_kernels_and_two_images() {
    let site = Site::new();
    for spec in [DEBIAN_6_1, DEBIAN_6_12, CLOUD[2]] {
        kernel(spec);
    }
    let (debian, tiny) = (image(DEBIAN_12), busybox_disk(&site));
    let file = format!(
        r#"
[[matrix]]
name = "{{kernel}} on {{image}}"
kernel = ["debian:6.1", "debian:6.12", "debian:sid-cloud"]
image = ["{}", "{}"]
command = ["/bin/sh", "-c", "read -r kernel < /proc/sys/kernel/osrelease; echo on $kernel"]
memory = "512M"
"#,
        text(&debian),
        text(&tiny)
    );
    std::fs::write(site.cwd().join("vmlab.toml"), file).unwrap();
    let args = ["test", "-j", "2", "--output", "all", "--json", "out.json"];
    let outcome = site.vmlab(args).patience(BOOT_PATIENCE).output();
    outcome.expect_code(0);
    let json = std::fs::read(site.cwd().join("out.json")).unwrap();
    let results: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let outputs: Vec<String> = results["targets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|target| target["attempts"][0]["output"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(outputs.len(), 6, "{outputs:?}");
    for release in ["on 6.1.", "on 6.12.", "on 7."] {
        let count = outputs.iter().filter(|output| output.starts_with(release)).count();
        assert_eq!(count, 2, "{release}: {outputs:?}");
    }
}

#[test]
fn images_of_a_vmtest_file_run_as_they_are() {
    let site = Site::new();
    let image = image(DEBIAN_12);
    std::os::unix::fs::symlink(&image, site.cwd().join("image.raw")).unwrap();
    std::fs::write(site.cwd().join("data"), "of the host\n").unwrap();
    let file = "
[[target]]
name = \"by uefi\"
image = \"./image.raw\"
uefi = true
command = \"cat /mnt/vmtest/data && echo written > /mnt/vmtest/made && \
           diff <(echo a) <(echo a) && nproc && exit 12\"

[[target]]
name = \"by bios\"
image = \"image.raw\"
command = \"ls /mnt/vmtest/data && test $(nproc) = 1 && ! ls /sys/firmware/efi && touch /opt/rw/x && ! touch /opt/ro/x\"
[target.vm]
num_cpus = 1
memory = \"1G\"
[target.vm.mounts]
\"/opt/ro\" = { host_path = \"./\", writable = false }
\"/opt/rw\" = { host_path = \".\", writable = true }
";
    std::fs::write(site.cwd().join("vmtest.toml"), file).unwrap();
    let outcome = site.vmlab(["vmtest"]).patience(BOOT_PATIENCE).output();
    // So many failed.
    outcome.expect_code(1);
    let said = outcome.stdout_text();
    assert!(said.contains("of the host\n2\n") && said.contains("exit code: 12"), "{said}");
    assert_eq!(said.matches("PASS\n").count(), 1, "{said}");
    assert_eq!(std::fs::read_to_string(site.cwd().join("made")).unwrap(), "written\n");
    assert!(site.cwd().join("x").exists());
    // What is no image is no failure of a test.
    let file = "[[target]]\nname = \"bogus\"\nimage = \"./data\"\ncommand = \"true\"\n";
    std::fs::write(site.cwd().join("bogus.toml"), file).unwrap();
    let outcome = site.vmlab(["vmtest", "-c", "bogus.toml"]).output();
    let said = outcome.expect_code(69).stdout_text() + &outcome.stderr_text();
    assert!(said.contains("data") && said.contains("not a disk image"), "{said}");
}

#[test]
fn images_that_cannot_be_used_say_why() {
    let site = Site::new();
    let tiny = busybox_disk(&site);
    let run = |args: &[&str]| {
        let args = [&["run", "-q"], args, &["--", "true"]].concat();
        site.vmlab(args).patience(BOOT_PATIENCE).output()
    };
    // Nothing of it starts, so that nothing comes in.
    let outcome = run(&["--image", text(&tiny), "--boot-timeout", "4s"]);
    outcome.expect_code(124).expect_stderr(&[
        "let nobody in within 4 s",
        "qemu-guest-agent did not answer",
        "cloud-init",
        "credentials",
        "-k",
    ]);
    run(&["--image", "/no/such/image"]).expect_code(125).expect_stderr(&["/no/such/image"]);
    let empty = site.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    run(&["--image", text(&empty)]).expect_code(125).expect_stderr(&[text(&empty), "empty"]);
    let outcome = run(&["--image", text(&tiny), "--append", "quiet"]);
    outcome.expect_code(125).expect_stderr(&["arguments for the kernel", "-k"]);
    // Its boot loader is one for UEFI alone.
    let uefi_only = copy(&site, &image(DEBIAN_12), "uefi.raw");
    let boot_code = std::fs::File::options().write(true).open(&uefi_only).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&boot_code, &[0; 440], 0).unwrap();
    let outcome = run(&["--image", text(&uefi_only), "--boot-timeout", "6s"]);
    outcome.expect_code(124).expect_stderr(&["let nobody in"]);
    // No system anywhere on it.
    let bare = site.path().join("bare");
    host(Command::new(need("mke2fs", "e2fsprogs")).args(["-q", "-t", "ext4"]).arg(&bare).arg("8M"));
    let outcome = site.run_with(CLOUD[0], &["--image", text(&bare)], ["true"]).output();
    outcome.expect_code(125).expect_stderr(&["root of the image", "vda: ext4, no system"]);
    let outcome =
        site.run_with(CLOUD[0], &["--image", text(&tiny), "-u", "eve"], ["true"]).output();
    outcome.expect_code(125).expect_stderr(&["no user `eve`"]);
}

#[test]
fn a_system_that_starts_can_be_interrupted() {
    let site = Site::new();
    let tiny = busybox_disk(&site);
    let running = site.vmlab(["run", "-q", "--image", text(&tiny), "--", "true"]).start();
    let is_up = || !running.process.descendants().is_empty();
    while !is_up() {
        std::thread::sleep(Duration::from_millis(50));
    }
    // It has only begun to be QEMU.
    std::thread::sleep(Duration::from_secs(1));
    let qemu = running.process.qemu();
    running.process.signal(Signal::TERM);
    running.finish().expect_code(143);
    assert!(qemu.wait_gone(std::time::Instant::now() + Duration::from_secs(5)));
}

#[test]
fn disks_come_to_a_system_of_an_image_and_go() {
    let image = vmlab::Image::new(image(DEBIAN_12));
    let vm = vmlab::Vm::builder().image(image).share_cwd(false).pluggable(true);
    let mut vm = vm.boot_timeout(BOOT_PATIENCE).start().unwrap();
    let sh = |vm: &vmlab::Vm, script: &str| {
        let output = vm.exec(["sh", "-ec", script]).unwrap();
        assert!(output.status.success(), "{script}: {}", output.stderr_text());
        output.stdout_text()
    };
    let disk = |name: &str| {
        let size = vmlab::units::Bytes(64 << 20);
        vmlab::Disk::blank(size).filesystem("ext4").named(name)
    };
    vm.attach(disk("one")).unwrap();
    sh(&vm, "echo 1 > /mnt/one/file; test -b /dev/disk/by-id/virtio-one");
    vm.detach("one").unwrap();
    sh(&vm, "! ls /dev/disk/by-id/virtio-one 2> /dev/null; ! grep -q /mnt/one /proc/mounts");
    vm.attach(disk("two")).unwrap();
    sh(&vm, "echo 2 > /mnt/two/file; sync");
    vm.reset().unwrap();
    assert_eq!(sh(&vm, "cat /mnt/two/file"), "2\n");
    let error = vm.snapshot().unwrap_err().to_string();
    assert!(error.contains("it starts the system of an image"), "{error}");
    vm.shutdown().unwrap();
}
