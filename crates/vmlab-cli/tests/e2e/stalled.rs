//! Readers, writers and programs around vmlab that stall, fail or get in between.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::{Duration, Instant};

use crate::common::{DEBIAN_6_12, Site, kernel};

#[test]
fn a_stalled_reader_does_not_stop_the_time_limit() {
    let site = Site::new();
    let started = Instant::now();
    let script = format!(
        "mkfifo pipe; sleep 300 <pipe & \"$VMLAB\" run -q --timeout 20s -k {DEBIAN_6_12} -- yes >pipe; \
         code=$?; kill $!; exit $code"
    );
    site.host_sh(&script).output().expect_code(124);
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let site = Site::new();
    let script = format!("\"$VMLAB\" run -q -k {DEBIAN_6_12} -- echo lost >/dev/full");
    site.host_sh(&script).output().expect_code(125).expect_stderr(&["standard output", "space"]);
}

#[test]
fn a_hang_up_that_is_ignored_stays_ignored() {
    let site = Site::new();
    let script = format!(
        "trap '' HUP; exec 3< <(exec \"$VMLAB\" run -q -k {DEBIAN_6_12} -- sh -c 'echo up; sleep 2; \
         echo survived'); pid=$!; read -r up <&3; kill -HUP $pid; cat <&3; wait $pid"
    );
    site.host_sh(&script).output().expect_code(0).expect_stdout("survived\n");
}

#[test]
fn a_wrapper_around_qemu_is_ended_with_it() {
    let site = Site::new();
    kernel(DEBIAN_6_12);
    let bin = site.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let wrapper = bin.join("qemu-system-x86_64");
    let real = std::env::split_paths(&std::env::var_os("PATH").unwrap())
        .map(|dir| dir.join("qemu-system-x86_64"))
        .find(|file| file.exists())
        .expect("QEMU is in PATH: apt-get install qemu-system-x86");
    fs::write(&wrapper, format!("#!/bin/sh\n'{}' \"$@\"\n", real.display())).unwrap();
    fs::set_permissions(&wrapper, PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let started = Instant::now();
    let outcome = site.run(&["--timeout", "15s"], ["sleep", "1000"]).env("PATH", path).output();
    outcome.expect_code(124);
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
}

/// A kernel without virtio consoles, made of Debian's by a configuration that denies it.
#[test]
fn without_a_virtio_console_the_serial_port_carries_the_agent() {
    let site = Site::new();
    let inspected = site.vmlab(["kernel", "inspect", kernel(DEBIAN_6_12), "--json"]).output();
    let inspected: serde_json::Value = serde_json::from_slice(&inspected.stdout).unwrap();
    let path = |value: &serde_json::Value| value.as_str().map(std::path::PathBuf::from).unwrap();
    let about = &inspected["kernel"];
    let release = about["release"].as_str().unwrap();
    let unpacked = site.path().join("unpacked");
    fs::create_dir_all(unpacked.join("boot")).unwrap();
    fs::create_dir_all(unpacked.join("lib/modules")).unwrap();
    let image = unpacked.join(format!("boot/vmlinuz-{release}"));
    fs::copy(path(&about["boot_image"]), image).unwrap();
    let config = fs::read_to_string(path(&about["config_source"]["file"])).unwrap();
    let without: String = config
        .lines()
        .filter(|l| !l.starts_with("CONFIG_VIRTIO_CONSOLE="))
        .map(|l| format!("{l}\n"))
        .collect();
    assert!(without.len() < config.len());
    fs::write(unpacked.join(format!("boot/config-{release}")), without).unwrap();
    symlink(path(&about["modules"]), unpacked.join("lib/modules").join(release)).unwrap();
    let args = [
        "run",
        "-q",
        "-k",
        unpacked.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        "echo $(uname -r); exit 7",
    ];
    let outcome = site.vmlab(args).output();
    assert_eq!(outcome.expect_code(7).stdout_text(), format!("{release}\n"));
}
