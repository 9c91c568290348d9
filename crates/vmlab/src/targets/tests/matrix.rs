//! Matrices.

use super::{names, vmlab};
use crate::targets::{System, Target, TargetCommand};
use crate::units::MIB;

fn script(target: &Target) -> &str {
    match &target.run.command {
        TargetCommand::Script(text) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_array_is_an_axis_in_the_order_of_the_file() {
    let targets = vmlab(
        "
        [[target]]
        name = 'before'
        command = 'c'
        [[matrix]]
        name = 'boot'
        kernel = ['debian:6.1', './bzImage']
        cpus = [1, 2]
        memory = '1G'
        command = 'c'
        [[target]]
        name = 'after'
        command = 'c'
    ",
    );
    assert_eq!(
        names(&targets),
        [
            "before",
            "boot[debian:6.1, cpus=1]",
            "boot[debian:6.1, cpus=2]",
            "boot[./bzImage, cpus=1]",
            "boot[./bzImage, cpus=2]",
            "after",
        ]
    );
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(targets[0].axes, []);
    assert_eq!(targets[3].axes, [pair("kernel", "./bzImage"), pair("cpus", "1")]);
    let cpus: Vec<_> = targets.iter().map(|t| t.vm.topology.and_then(|t| t.cpus())).collect();
    assert_eq!(cpus, [None, Some(1), Some(2), Some(1), Some(2), None]);
    assert_eq!(targets[4].vm.memory.map(|memory| memory.0), Some(1024 * MIB));
    let System::Kernel { spec, .. } = &targets[4].system else { panic!("{:?}", targets[4]) };
    assert!(spec.as_ref().is_some_and(|spec| spec.ends_with("/project/bzImage")));
}

#[test]
fn kernels_and_images_are_combined() {
    let targets = vmlab(
        "[[matrix]]\nname = 'x'\nkernel = ['host', 'debian:6.1', 'debian:6.12']\n\
         image = ['a.qcow2', 'b.qcow2']\ncommand = 'c'\n",
    );
    assert_eq!(targets.len(), 6);
    assert_eq!(targets[5].name, "x[debian:6.12, b.qcow2]");
    let System::Image(image) = &targets[5].system else { panic!("{:?}", targets[5]) };
    assert_eq!(image.kernel.as_deref(), Some("debian:6.12"));
    assert!(image.path.ends_with("b.qcow2"));
}

#[test]
fn variables_are_in_texts_and_in_the_environment() {
    let targets = vmlab(
        "
        [defaults]
        setup = 'mkfs.{fs} /dev/vdb'
        [[matrix]]
        name = 'fs'
        vars = { fs = ['ext4', 'xfs'], block-size = 4096 }
        command = 'echo {fs} ${fs} {block-size} {other} {print}'
        append = ['root={fs}', 'x']
        env = { OPTS = '-t {fs}', BLOCK_SIZE = 'mine' }
        image = '{fs}.img'
        kernel = 'host'
        cwd = '{fs}'
        shares = [{ host = 'data/{fs}', guest = '/data' }]
        tags = ['{fs}']
    ",
    );
    assert_eq!(names(&targets), ["fs[fs=ext4]", "fs[fs=xfs]"]);
    let target = &targets[1];
    assert_eq!(script(target), "echo xfs ${fs} 4096 {other} {print}");
    assert_eq!(target.vm.append, ["root=xfs", "x"]);
    assert_eq!(target.run.setup, ["mkfs.xfs /dev/vdb"]);
    let env: Vec<_> = target.run.env.iter().map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!(env, ["BLOCK_SIZE=mine", "FS=xfs", "OPTS=-t xfs"]);
    let System::Image(image) = &target.system else { panic!("{target:?}") };
    assert!(image.path.ends_with("xfs.img"));
    assert!(target.vm.shares[0].host.ends_with("data/xfs"));
    assert!(target.run.cwd.as_ref().is_some_and(|cwd| cwd.ends_with("xfs")));
    assert!(target.tags.contains("xfs"));
}

#[test]
fn a_name_can_be_a_pattern() {
    let targets = vmlab(
        "[[matrix]]\nname = 'on-{kernel}-{share-via}-{v}'\nkernel = ['debian:{v}']\n\
         share-via = ['9p', 'virtiofs']\nvars = { v = ['6.1'] }\ncommand = 'c'\n",
    );
    assert_eq!(names(&targets), ["on-debian:6.1-9p-6.1", "on-debian:6.1-virtiofs-6.1"]);
}

#[test]
fn excluded_combinations_are_left_out() {
    let text = |exclude: &str| {
        let axes = "kernel = ['debian:6.1', 'host']\ncpus = [1, 2]\nvars = { fs = ['a', 'b'] }";
        format!("[[matrix]]\nname = 'x'\n{axes}\ncommand = 'c'\nexclude = {exclude}\n")
    };
    let left = |exclude: &str| vmlab(&text(exclude)).len();
    assert_eq!(left("[]"), 8);
    assert_eq!(left("[{ kernel = 'host' }]"), 4);
    assert_eq!(left("[{ kernel = 'host', cpus = 2 }]"), 6);
    assert_eq!(left("[{ kernel = 'host', cpus = 2, fs = 'b' }]"), 7);
    assert_eq!(left("[{ cpus = 2 }, { fs = 'b' }]"), 2);
    assert_eq!(left("[{ fs = ['a', 'b'], kernel = 'host' }]"), 4);
}

#[test]
fn included_combinations_are_added() {
    let targets = vmlab(
        "
        [[matrix]]
        name = 'x'
        kernel = ['debian:6.1', 'debian:6.12']
        vars = { fs = ['a', 'b'] }
        command = 'c'
        timeout = '1m'
        exclude = [{ kernel = 'debian:6.1', fs = 'b' }]
        include = [
            { kernel = 'debian:6.1', fs = 'b', timeout = '9m', kernel_args = 'slow' },
            { kernel = ['host', 'debian:sid'], cpus = 4 },
        ]
    ",
    );
    assert_eq!(
        names(&targets),
        [
            "x[debian:6.1, fs=a]",
            "x[debian:6.12, fs=a]",
            "x[debian:6.12, fs=b]",
            "x[debian:6.1, fs=b]",
            "x[host, fs=a]",
            "x[host, fs=b]",
            "x[debian:sid, fs=a]",
            "x[debian:sid, fs=b]",
        ]
    );
    let seconds = |target: &Target| target.verdict.timeout.map(|time| time.as_secs());
    assert_eq!((seconds(&targets[0]), seconds(&targets[3])), (Some(60), Some(540)));
    assert_eq!(targets[3].vm.append, ["slow"]);
    assert_eq!(targets[4].vm.topology.and_then(|topology| topology.cpus()), Some(4));
    assert_eq!(targets[3].vm.topology, None);
}

#[test]
fn defaults_are_for_matrices_too() {
    let targets = vmlab(
        "[defaults]\nkernel = 'host'\ncpus = 8\ncommand = 'c {v}'\n\
         [[matrix]]\nname = 'x'\ntopology = ['1,1,1,1', '2,1,1,1']\nvars = { v = 1 }\n",
    );
    assert_eq!(names(&targets), ["x[topology=1,1,1,1]", "x[topology=2,1,1,1]"]);
    assert_eq!(targets[1].vm.topology.and_then(|topology| topology.cpus()), Some(2));
    assert_eq!(script(&targets[0]), "c 1");
}
