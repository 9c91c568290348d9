//! vmtest's files.

use std::path::{Path, PathBuf};

use super::{DIR, names, vmlab, vmtest};
use crate::config::Topology;
use crate::targets::{Firmware, ImageSpec, System, Target, TargetCommand};
use crate::{RootMode, Share};

fn one(text: &str) -> Target {
    let mut targets = vmtest(text);
    assert_eq!(targets.len(), 1);
    targets.remove(0)
}

fn at(path: &str) -> PathBuf {
    Path::new(DIR).join(path)
}

#[test]
fn a_kernel_target_is_as_vmtest_has_it() {
    let target = one("[[target]]\nname = 'k'\nkernel = './bzImage'\ncommand = 'true'\n");
    let System::Kernel { spec, rootfs, root_mode } = &target.system else { panic!("{target:?}") };
    assert_eq!(spec.as_deref(), at("bzImage").to_str());
    assert_eq!((rootfs.as_path(), *root_mode), (Path::new("/"), RootMode::Overlay));
    assert_eq!(target.vm.topology, Some(Topology::flat(2)));
    assert_eq!(target.vm.memory, "4G".parse().ok());
    assert_eq!(target.run.command, TargetCommand::Script("true".to_owned()));
    // The file's directory is where the command starts, and is written to at both of its places.
    assert_eq!(target.run.cwd.as_deref(), Some(Path::new(DIR)));
    assert_eq!(target.vm.shares, [Share::new(DIR).at("/mnt/vmtest"), Share::new(DIR)]);
    assert_eq!(target.run.user, "root");
    assert!(target.vm.append.is_empty() && target.vm.qemu.is_none() && target.vm.kvm_cpu.is_none());
}

#[test]
fn an_image_target_is_as_vmtest_has_it() {
    let target = one("[[target]]\nname = 'i'\nimage = 'a/b.qcow2'\ncommand = 'true'\n");
    let System::Image(image) = &target.system else { panic!("{target:?}") };
    let expected = ImageSpec {
        path: at("a/b.qcow2"),
        firmware: Firmware::Bios,
        firmware_file: None,
        kernel: None,
        persist: false,
    };
    assert_eq!(*image, expected);
    assert_eq!(target.run.cwd.as_deref(), Some(Path::new("/")));
    assert_eq!(target.vm.shares, [Share::new(DIR).at("/mnt/vmtest")]);
}

#[test]
fn each_key_of_a_kernel_target_is_read() {
    let target = one(r#"
        [[target]]
        name = "all"
        kernel = "/boot/vmlinuz"
        kernel_args = "  quiet ro  foo=bar "
        rootfs = "./root"
        arch = "x86_64"
        kvm_cpu_args = "host,pmu=on"
        qemu_command = "qemu-special"
        command = '''back\slash "quoted" 'single' '''
        uefi = false
        [target.vm]
        num_cpus = 3
        memory = "256M"
        extra_args = ["-device", "virtio-rng-pci"]
        [target.vm.mounts]
        "/mnt/data" = { host_path = "./data" }
        "/mnt/out" = { host_path = "/var/out", writable = true }
    "#);
    let System::Kernel { spec, rootfs, root_mode } = &target.system else { panic!("{target:?}") };
    assert_eq!(spec.as_deref(), Some("/boot/vmlinuz"));
    assert_eq!((rootfs.as_path(), *root_mode), (at("root").as_path(), RootMode::Overlay));
    assert_eq!(target.run.setup, ["mount -o remount,ro /"]);
    assert_eq!(target.vm.append, ["quiet", "ro", "foo=bar"]);
    assert_eq!(target.vm.kvm_cpu.as_deref(), Some("host,pmu=on"));
    assert_eq!(target.vm.qemu.as_deref(), Some(Path::new("qemu-special")));
    assert_eq!(target.vm.topology, Some(Topology::flat(3)));
    assert_eq!(target.vm.memory, "256M".parse().ok());
    assert_eq!(target.vm.qemu_args, ["-device", "virtio-rng-pci"]);
    let script = r#"back\slash "quoted" 'single' "#;
    assert_eq!(target.run.command, TargetCommand::Script(script.to_owned()));
    // Another root has no such directory as the file's.
    assert_eq!(target.run.cwd.as_deref(), Some(Path::new("/")));
    let shares = [
        Share::new(DIR).at("/mnt/vmtest"),
        Share::new(at("data")).at("/mnt/data").read_only(),
        Share::new("/var/out").at("/mnt/out"),
    ];
    assert_eq!(target.vm.shares, shares);
}

#[test]
fn each_key_of_an_image_target_is_read() {
    let target = one(r#"
        [[target]]
        name = "uefi"
        image = "/images/x.img"
        uefi = true
        command = "true"
        vm = { bios = "./OVMF.fd", mounts = { "/a" = { host_path = "b" } } }
    "#);
    let System::Image(image) = &target.system else { panic!("{target:?}") };
    assert_eq!(image.path, Path::new("/images/x.img"));
    assert_eq!(image.firmware, Firmware::Uefi { secure_boot: false });
    assert_eq!(image.firmware_file, Some(at("OVMF.fd")));
    assert_eq!(target.vm.shares[1], Share::new(at("b")).at("/a").read_only());
}

#[test]
fn the_last_of_ro_and_rw_says_what_becomes_of_the_root() {
    let made_read_only = |args: &str| {
        let text = format!(
            "[[target]]\nname = 'k'\nkernel = 'k'\ncommand = 'c'\nkernel_args = '{args}'\n"
        );
        !one(&text).run.setup.is_empty()
    };
    assert!(made_read_only("ro"));
    assert!(!made_read_only("ro rw"));
    assert!(!made_read_only("root=x row"));
}

#[test]
fn a_dash_is_a_shell() {
    let target = one("[[target]]\nname = 'k'\nkernel = 'k'\ncommand = '-'\n");
    assert_eq!(target.run.command, TargetCommand::Shell);
}

#[test]
fn names_that_are_there_twice_are_numbered() {
    let target = |name: &str| format!("[[target]]\nname = '{name}'\nkernel = 'k'\ncommand = 'c'\n");
    let text = ["a", "a #2", "a", "a"].map(target).concat();
    assert_eq!(names(&vmtest(&text)), ["a", "a #2", "a #3", "a #4"]);
}

/// `docs/targets.md` says how to go on from a `vmtest.toml`: this is that text.
#[test]
fn the_same_targets_can_be_written_in_vmlab_toml() {
    let targets = "
        [[target]]
        name = 'one'
        kernel = './bzImage'
        kernel_args = 'quiet'
        command = 'make test'
        [target.vm]
        num_cpus = 4
        [[target]]
        name = 'two'
        kernel = './other'
        command = '-'
        vm = { memory = '1G', mounts = { '/data' = { host_path = 'd' } } }
    ";
    let defaults = "
        [defaults]
        cpus = 2
        memory = '4G'
        cwd = '.'
        shares = [{ host = '.', guest = '/mnt/vmtest', writable = true }]
    ";
    let sorted = |mut targets: Vec<Target>| {
        for target in &mut targets {
            target.vm.shares.sort_by(|a, b| a.guest.cmp(&b.guest));
        }
        targets
    };
    assert_eq!(sorted(vmlab(&format!("{defaults}{targets}"))), sorted(vmtest(targets)));
}
