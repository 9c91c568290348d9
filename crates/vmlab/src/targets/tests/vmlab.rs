//! Files of our own.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::{DIR, names, vmlab};
use crate::config::{DiskWrites, Machine, NetworkMode, ShareTransport, Topology};
use crate::disk::DiskSource;
use crate::events::{EventKind, EventKinds};
use crate::hypervisor::HypervisorChoice;
use crate::targets::table::TargetTable;
use crate::targets::{
    DEFAULT_FILE, FileKind, Firmware, ImageSpec, RunSpec, System, Target, TargetCommand,
    TargetFileError, VerdictSpec, VmSpec, event_names, find, load, load_as,
};
use crate::{AccelChoice, Disk, RootMode, Share, ShareVia};

fn one(text: &str) -> Target {
    let mut targets = vmlab(text);
    assert_eq!(targets.len(), 1);
    targets.remove(0)
}

fn kernel_of(target: &Target) -> Option<&str> {
    match &target.system {
        System::Kernel { spec, .. } => spec.as_deref(),
        System::Image(image) => image.kernel.as_deref(),
    }
}

#[test]
fn little_has_to_be_said() {
    let expected = Target {
        name: "a".to_owned(),
        tags: [].into(),
        axes: Vec::new(),
        system: System::Kernel { spec: None, rootfs: "/".into(), root_mode: RootMode::Overlay },
        vm: VmSpec::default(),
        run: RunSpec {
            command: TargetCommand::Script("true".to_owned()),
            cwd: None,
            module: None,
            env: BTreeMap::new(),
            user: "root".to_owned(),
            setup: vec![],
            teardown: vec![],
            keep_on_failure: vec![],
        },
        verdict: VerdictSpec {
            timeout: None,
            retries: 0,
            should_fail: false,
            fail_on: crate::events::default_kinds(),
            expect: None,
        },
    };
    assert_eq!(one("[[target]]\nname = 'a'\ncommand = 'true'\n"), expected);
}

#[test]
fn each_key_of_a_target_is_read() {
    let target = one(r#"
        [shares.src]
        host = "./src"
        [shares.cache]
        host = "/var/cache/x"
        guest = "/cache"
        writable = true

        [disks.data]
        path = "disks/data.qcow2"
        [disks.log]
        path = "/srv/log.raw"
        mode = "rw"
        [disks.old]
        path = "../old"
        mode = "ro"
        [disks.scratch]
        path = "./scratch"
        mode = "discard"

        [[target]]
        name = "all"
        tags = ["slow", "net"]
        kernel = "debian:6.12"
        append = ["a=1 b", "c"]
        modules = ["kvm-amd nested=1", "loop"]
        rootfs = "root"
        root-mode = "rw"
        memory = 512
        topology = "2,1,2,1"
        machine = "q35"
        hypervisor = "kvm"
        accel = "tcg"
        kvm-cpu-args = "max"
        fast = true
        net = "user"
        vsock = "sockets"
        rng = true
        hostname = "guest"
        shares = ["src", "cache", { host = "x", guest = "/x" }]
        disks = ["log", "data", "old", "scratch"]
        share-via = "9p"
        qemu-args = ["-device", "x"]
        qemu-command = "./qemu"
        arch = "x86_64"
        boot-timeout = "1.5m"
        command = ["./test", "two words"]
        cwd = "sub"
        env = { A = "b", N = 1, T = true }
        user = "caller"
        setup = "one"
        teardown = ["two", "three"]
        keep-on-failure = ["/var/log/*"]
        timeout = 90
        retries = 2
        should-fail = true
        fail-on = ["warning", "sanitizers"]
        expect = "oom-kill"
    "#);
    let here = Path::new(DIR);
    let mut fail_on = event_names::kinds("sanitizers").unwrap();
    fail_on.insert(EventKind::Warning);
    let text = str::to_owned;
    let expected = Target {
        name: "all".to_owned(),
        tags: ["net", "slow"].map(text).into(),
        axes: Vec::new(),
        system: System::Kernel {
            spec: Some("debian:6.12".to_owned()),
            rootfs: here.join("root"),
            root_mode: RootMode::ReadWrite,
        },
        vm: VmSpec {
            memory: "512M".parse().ok(),
            topology: Some(Topology { nodes: 2, llcs: 1, cores: 2, threads: 1 }),
            machine: Some(Machine::Q35),
            hypervisor: Some(HypervisorChoice::Kvm),
            accel: AccelChoice::Tcg,
            kvm_cpu: Some("max".to_owned()),
            fast: true,
            network: NetworkMode::User,
            vsock: Some(here.join("sockets")),
            rng: true,
            hostname: Some("guest".to_owned()),
            append: ["a=1", "b", "c"].map(text).into(),
            modules: ["kvm-amd nested=1", "loop"].map(text).into(),
            shares: vec![
                Share::new(here.join("src")).read_only(),
                Share::new("/var/cache/x").at("/cache"),
                Share::new(here.join("x")).at("/x").read_only(),
                Share::new(here.join("sub")),
            ],
            disks: vec![
                Disk::new("log", "/srv/log.raw").writes(DiskWrites::Kept),
                Disk::new("data", here.join("disks/data.qcow2")),
                Disk::new("old", here.join("../old")).writes(DiskWrites::Refused),
                Disk::new("scratch", here.join("scratch")),
            ],
            share_via: ShareVia::Only(ShareTransport::NineP),
            qemu_args: ["-device", "x"].map(text).into(),
            qemu: Some(here.join("qemu")),
            boot_timeout: Some(Duration::from_secs(90)),
        },
        run: RunSpec {
            command: TargetCommand::Program(vec!["./test".into(), "two words".into()]),
            cwd: Some(here.join("sub")),
            module: None,
            env: [("A", "b"), ("N", "1"), ("T", "true")].map(|(k, v)| (text(k), text(v))).into(),
            user: "caller".to_owned(),
            setup: vec!["one".to_owned()],
            teardown: ["two", "three"].map(text).into(),
            keep_on_failure: vec!["/var/log/*".to_owned()],
        },
        verdict: VerdictSpec {
            timeout: Some(Duration::from_secs(90)),
            retries: 2,
            should_fail: true,
            fail_on,
            expect: Some(EventKind::OomKill),
        },
    };
    assert_eq!(target, expected);
}

#[test]
fn keys_can_be_written_with_either_sign() {
    let with = |key: &str| {
        let text = "[[target]]\nname = 'a'\ncommand = 'b'\nimage = 'i'\nuefi = true\n";
        one(&format!("{text}{key} = true\n"))
    };
    assert_eq!(with("secure-boot"), with("secure_boot"));
    let System::Image(image) = with("secure-boot").system else { panic!("no image") };
    assert_eq!(image.firmware, Firmware::Uefi { secure_boot: true });
}

#[test]
fn an_image_can_be_started_with_another_kernel() {
    let target = one(
        "[[target]]\nname = 'a'\ncommand = 'b'\nimage = 'i'\nkernel = 'debian:6.12'\nappend = 'x'\n\
         persist = true\nfast = true\n",
    );
    let expected = ImageSpec {
        path: Path::new(DIR).join("i"),
        firmware: Firmware::Bios,
        firmware_file: None,
        kernel: Some("debian:6.12".to_owned()),
        persist: true,
    };
    assert_eq!(target.system, System::Image(expected));
    assert_eq!(target.vm.append, ["x"]);
}

#[test]
fn firmware_that_would_not_be_used_is_a_mistake() {
    let said = |keys: &str| {
        let text = format!("[[target]]\nname = 'a'\ncommand = 'b'\nimage = 'i'\n{keys}\n");
        super::message(&text, FileKind::Vmlab)
    };
    let with_kernel = said("kernel = 'debian:6.12'\nuefi = true");
    assert!(
        with_kernel.contains("`uefi` says how an image starts its own kernel"),
        "{with_kernel}"
    );
    let with_file = said("uefi = true\nsecure-boot = true\nbios = 'f'");
    assert!(with_file.contains("`bios` is started without secure boot"), "{with_file}");
    // What is said for all targets is no mistake of those that it says nothing for.
    let target =
        one("[defaults]\nuefi = true\n[[target]]\nname = 'a'\ncommand = 'b'\nimage = 'i'\n\
         kernel = 'debian:6.12'\n");
    let System::Image(spec) = target.system else { panic!("no image") };
    assert_eq!(spec.firmware, Firmware::Bios);
}

#[test]
fn kernels_are_specs_or_paths_from_the_file() {
    let kernel = |text: &str| {
        let target = one(&format!("[[target]]\nname = 'a'\ncommand = 'b'\nkernel = '{text}'\n"));
        kernel_of(&target).unwrap().to_owned()
    };
    for spec in ["debian:6.12", "ubuntu:noble", "host", "6.1.0-50-amd64"] {
        assert_eq!(kernel(spec), spec);
    }
    assert_eq!(kernel("./bzImage"), format!("{DIR}/bzImage"));
    assert_eq!(kernel("../linux"), format!("{DIR}/../linux"));
    assert_eq!(kernel("linux-image.deb"), format!("{DIR}/linux-image.deb"));
    assert_eq!(kernel("/boot/vmlinuz"), "/boot/vmlinuz");
}

#[test]
fn a_kernel_beside_the_file_needs_no_dot() {
    let dir = tempfile::tempdir().unwrap();
    let bz_image = dir.path().canonicalize().unwrap().join("bzImage");
    std::fs::write(&bz_image, "").unwrap();
    let path = dir.path().join("vmlab.toml");
    std::fs::write(&path, "[[target]]\nname = 'a'\ncommand = 'b'\nkernel = 'bzImage'\n").unwrap();
    let file = load(&path).unwrap();
    assert_eq!(kernel_of(&file.targets[0]), bz_image.to_str());
}

#[test]
fn defaults_are_for_targets_that_do_not_say_otherwise() {
    let targets = vmlab(
        "
        [defaults]
        kernel = 'debian:6.12'
        append = 'quiet'
        root-mode = 'ro'
        persist = true
        uefi = true
        secure_boot = true
        cpus = 2
        timeout = '5m'
        env = { A = '1', B = '2' }
        tags = ['all']
        vm = { memory = '2G' }
        [[target]]
        name = 'kernel'
        command = 'c'
        [[target]]
        name = 'own'
        command = 'c'
        kernel = 'debian:6.1'
        topology = '1,1,2,2'
        env = { A = '3', C = '4' }
        memory = '1G'
        timeout = '1m'
        tags = []
        [[target]]
        name = 'image'
        command = 'c'
        image = 'i'
        [[target]]
        name = 'bios'
        command = 'c'
        image = 'i'
        uefi = false
    ",
    );
    let [kernel, own, image, bios] = &targets[..] else { panic!("{targets:?}") };
    let env = |target: &Target| {
        let pairs = target.run.env.iter().map(|(key, value)| format!("{key}{value}"));
        pairs.collect::<Vec<_>>().concat()
    };
    assert_eq!(kernel_of(kernel), Some("debian:6.12"));
    assert_eq!(kernel.vm.append, ["quiet"]);
    assert_eq!(kernel.vm.topology, Some(Topology::flat(2)));
    assert_eq!(kernel.vm.memory, "2G".parse().ok());
    assert_eq!((env(kernel).as_str(), kernel.tags.len()), ("A1B2", 1));

    assert_eq!(kernel_of(own), Some("debian:6.1"));
    assert_eq!(own.vm.topology.and_then(Topology::cpus), Some(4));
    assert_eq!(own.vm.memory, "1G".parse().ok());
    assert_eq!(own.verdict.timeout, Some(Duration::from_secs(60)));
    assert_eq!((env(own).as_str(), own.tags.len()), ("A3B2C4", 0));

    // An image has its own kernel, and what is of other targets is none of its business.
    assert_eq!(kernel_of(image), None);
    assert!(image.vm.append.is_empty());
    let System::Image(spec) = &image.system else { panic!("{image:?}") };
    assert!(spec.persist && spec.firmware == Firmware::Uefi { secure_boot: true });
    let System::Image(spec) = &bios.system else { panic!("{bios:?}") };
    assert_eq!(spec.firmware, Firmware::Bios);
}

#[test]
fn directories_beside_the_file_have_a_place_without_dots() {
    let target = one(
        "[[target]]\nname = 'a'\ncommand = 'b'\ncwd = '../x/.'\nshares = [{ host = '../y' }]\n",
    );
    assert_eq!(target.run.cwd.as_deref(), Some(Path::new("/home/me/x")));
    let here = Path::new(DIR);
    let shares = [
        Share::new(here.join("../y")).at("/home/me/y").read_only(),
        Share::new(here.join("../x")).at("/home/me/x"),
    ];
    assert_eq!(target.vm.shares, shares);
    // One that is shared otherwise is not shared twice.
    let target =
        one("[[target]]\nname = 'a'\ncommand = 'b'\ncwd = '.'\nshares = [{ host = '.' }]\n");
    assert_eq!(target.vm.shares, [Share::new(here).read_only()]);
    let target = one("[[target]]\nname = 'a'\ncommand = 'b'\ncwd = '/srv'\n");
    assert_eq!(target.run.cwd.as_deref(), Some(Path::new("/srv")));
    assert!(target.vm.shares.is_empty());
}

#[test]
fn disks_are_inherited_and_chosen_by_variables() {
    let targets = vmlab(
        "
        [disks.small]
        path = 'small.raw'
        [disks.large]
        path = 'large.raw'
        [defaults]
        disks = 'small'
        [[target]]
        name = 'inherits'
        command = 'c'
        [[target]]
        name = 'image'
        command = 'c'
        image = 'i'
        [[target]]
        name = 'none'
        command = 'c'
        disks = []
        [[matrix]]
        name = 'each'
        command = 'c'
        vars = { disk = ['large', 'small'] }
        disks = ['{disk}']
    ",
    );
    let disks = targets.iter().map(|target| {
        let names = target.vm.disks.iter().map(|disk| disk.name.as_deref().unwrap());
        names.collect::<Vec<_>>().join(" ")
    });
    let disks: Vec<_> = disks.collect();
    assert_eq!(disks, ["small", "small", "", "large", "small"]);
    let path = Path::new(DIR).join("large.raw");
    assert_eq!(targets[3].vm.disks[0].source, DiskSource::File(path));
}

#[test]
fn groups_of_events_can_be_named() {
    let fail_on = |text: &str| {
        let text = format!("[[target]]\nname = 'a'\ncommand = 'b'\nfail-on = {text}\n");
        one(&text).verdict.fail_on
    };
    assert!(fail_on("'none'").is_empty() && fail_on("[]").is_empty());
    assert_eq!(fail_on("['panic']"), EventKinds::from([EventKind::Panic]));
    assert!(fail_on("'all'").contains(&EventKind::Taint));
}

#[test]
fn the_default_file_is_right_with_and_without_its_comments() {
    assert_eq!(names(&vmlab(DEFAULT_FILE)), ["kernel"]);
    // `# text` is prose, `#key` a key that is commented out.
    let uncommented = |line: &str| match line.strip_prefix('#') {
        Some(rest) if !rest.starts_with(' ') && !rest.is_empty() => rest.to_owned(),
        _ => line.to_owned(),
    };
    let text = DEFAULT_FILE.lines().map(uncommented).collect::<Vec<_>>().join("\n");
    let names = vmlab(&text).into_iter().map(|target| target.name).collect::<Vec<_>>();
    assert_eq!(
        names,
        [
            "kernel",
            "image",
            "filesystem[debian:6.1, cpus=1, fs=ext4]",
            "filesystem[debian:6.12, cpus=1, fs=ext4]",
            "filesystem[debian:6.12, cpus=1, fs=btrfs]",
            "filesystem[debian:6.12, cpus=2, fs=btrfs]",
            "filesystem[debian:sid, cpus=1, fs=xfs]",
            "topology",
        ]
    );
    for key in TargetTable::KEYS.iter().filter(|key| !["vm", "kernel_args"].contains(key)) {
        let key = crate::targets::spelling::kebab(key);
        let is_set = text.lines().any(|line| line.starts_with(&format!("{key} =")));
        assert!(is_set, "default.toml does not have `{key}`");
    }
}

#[test]
fn the_documentation_has_each_key() {
    let docs = include_str!("../../../../../docs/targets.md");
    for key in TargetTable::KEYS {
        let key = crate::targets::spelling::kebab(key);
        let row = docs.lines().any(|line| {
            line.starts_with("| ") && line.split('|').nth(1).unwrap().contains(&format!("`{key}`"))
        });
        assert!(row, "docs/targets.md has no row for `{key}`");
    }
}

#[test]
fn files_are_found_and_read() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().canonicalize().unwrap();
    assert_eq!(find(&dir), None);
    let (ours, vmtests) = (dir.join("vmlab.toml"), dir.join("vmtest.toml"));
    std::fs::write(&vmtests, "[[target]]\nname = 'a'\nkernel = 'k'\ncommand = 'b'\n").unwrap();
    assert_eq!(find(&dir).as_ref(), Some(&vmtests));
    std::fs::write(&ours, "[[target]]\nname = 'a'\ncommand = 'b'\ntimeout = 1\n").unwrap();
    assert_eq!(find(&dir).as_ref(), Some(&ours));

    let file = load(&vmtests).unwrap();
    assert_eq!((file.kind, &file.dir, &file.path), (FileKind::Vmtest, &dir, &vmtests));
    // However it is called, the directory has one name, which is where commands start.
    std::fs::create_dir(dir.join("sub")).unwrap();
    let file = load(&dir.join("sub/../vmtest.toml")).unwrap();
    assert_eq!((&file.dir, &file.path), (&dir, &vmtests));
    assert_eq!(file.targets[0].run.cwd.as_ref(), Some(&dir));
    assert_eq!(load(&ours).unwrap().kind, FileKind::Vmlab);
    assert!(matches!(load_as(&ours, FileKind::Vmtest), Err(TargetFileError::Invalid { .. })));

    std::fs::write(&ours, b"# fine\n# \xff\n").unwrap();
    let error = load(&ours).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, "line 2 is not UTF-8");
    assert!(error.to_string().contains("vmlab.toml"));
    assert!(matches!(load(&dir), Err(TargetFileError::Read { .. })));
    std::fs::write(&ours, "#".repeat(5 * 1024 * 1024)).unwrap();
    assert!(matches!(load(&ours), Err(TargetFileError::Read { .. })));
}
