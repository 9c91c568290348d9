use std::path::Path;

use super::check::check_command_line;
use super::*;

fn dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("kernel"), "k").unwrap();
    std::fs::write(dir.path().join("initrd"), "i").unwrap();
    dir
}

fn builder(dir: &Path) -> VmConfigBuilder {
    VmConfigBuilder::new(KernelBoot {
        image: dir.join("kernel"),
        arch: Arch::HOST,
        initramfs: dir.join("initrd"),
        command_line: "panic=-1".to_owned(),
    })
}

fn share(tag: &str, path: &Path) -> ShareDevice {
    let transport = ShareTransport::NineP;
    let caching = Caching::Fixed;
    ShareDevice { tag: tag.to_owned(), path: path.to_owned(), read_only: true, transport, caching }
}

#[test]
fn a_sound_request_passes() {
    let dir = dir();
    let config = builder(dir.path()).share(share("root", dir.path())).build().unwrap();
    assert_eq!(config.topology.cpus(), Some(1));
}

#[test]
fn another_architecture_is_refused() {
    let dir = dir();
    let mut builder = builder(dir.path());
    builder.config.boot.kernel_mut().unwrap().arch = match Arch::HOST {
        Arch::X86_64 => Arch::Aarch64,
        Arch::Aarch64 => Arch::X86_64,
    };
    assert!(matches!(builder.build(), Err(ConfigError::ArchMismatch { .. })));
}

#[test]
fn bounds_are_checked() {
    let dir = dir();
    let build = |f: fn(VmConfigBuilder) -> VmConfigBuilder| f(builder(dir.path())).build();
    assert!(matches!(build(|b| b.memory(Bytes(MIB))), Err(ConfigError::Memory { .. })));
    assert!(matches!(build(|b| b.memory(Bytes(u64::MAX))), Err(ConfigError::Memory { .. })));
    assert!(matches!(build(|b| b.topology(Topology::flat(0))), Err(ConfigError::Cpus { .. })));
    assert!(matches!(
        build(|b| b.topology(Topology { nodes: 65536, llcs: 65536, cores: 1, threads: 1 })),
        Err(ConfigError::Cpus { .. })
    ));
    let three = Topology { nodes: 3, llcs: 1, cores: 1, threads: 1 };
    let build_three = |machine, mib| {
        builder(dir.path()).machine(machine).topology(three).memory(Bytes(mib * MIB)).build()
    };
    assert!(matches!(build_three(Machine::Q35, 512), Err(ConfigError::NodeMemory { .. })));
    assert!(matches!(build_three(Machine::Microvm, 513), Err(ConfigError::Machine { .. })));
    assert!(build_three(Machine::Q35, 513).is_ok() && build_three(Machine::Native, 513).is_ok());
    let dies = Topology { nodes: 1, llcs: 2, cores: 1, threads: 1 };
    let on_microvm = builder(dir.path()).topology(dies).build();
    assert!(matches!(on_microvm, Err(ConfigError::Machine { .. })));
    let serial = builder(dir.path()).channel(AgentChannel::Serial);
    assert!(matches!(serial.clone().build(), Err(ConfigError::Machine { .. })));
    assert!(serial.machine(Machine::Native).topology(dies).build().is_ok());
    assert!(build(|b| b.memory(Bytes(300 * MIB + 5))).is_ok());
}

#[test]
fn missing_files_are_named() {
    let dir = dir();
    std::fs::remove_file(dir.path().join("initrd")).unwrap();
    let error = builder(dir.path()).build().unwrap_err().to_string();
    assert!(error.contains("initramfs") && error.contains("initrd"), "{error}");
}

#[test]
fn shares_are_checked() {
    let dir = dir();
    let build = |shares: &[ShareDevice]| {
        shares.iter().fold(builder(dir.path()), |b, s| b.share(s.clone())).build()
    };
    let path = dir.path();
    let twice = [share("a", path), share("a", path)];
    assert!(matches!(build(&twice), Err(ConfigError::DuplicateTag { .. })));
    let long = "x".repeat(MAX_TAG + 1);
    assert!(matches!(build(&[share(&long, path)]), Err(ConfigError::Tag { .. })));
    assert!(matches!(build(&[share("", path)]), Err(ConfigError::Tag { .. })));
    assert!(matches!(build(&[share("a,b", path)]), Err(ConfigError::Tag { .. })));
    let file = path.join("kernel");
    assert!(matches!(build(&[share("a", &file)]), Err(ConfigError::NotADirectory { .. })));
    let gone = path.join("gone");
    assert!(matches!(build(&[share("a", &gone)]), Err(ConfigError::File { .. })));
}

#[test]
fn disks_are_checked() {
    let dir = dir();
    let path = dir.path().join("kernel");
    let disk = |serial: &str, writes| DiskDevice {
        serial: serial.to_owned(),
        path: path.clone(),
        format: ImageFormat::Raw,
        writes,
        keep: None,
        serve: None,
    };
    let build = |disks: &[DiskDevice]| {
        disks.iter().fold(builder(dir.path()), |b, d| b.disk(d.clone())).build()
    };
    let (one, two) = (disk("a", DiskWrites::Kept), disk("b", DiskWrites::Refused));
    assert_eq!(build(&[one.clone(), two]).unwrap().disks.len(), 2);
    let twice = build(&[one.clone(), disk("a", DiskWrites::Discarded)]);
    assert!(matches!(twice, Err(ConfigError::DuplicateSerial { .. })));
    let long = "x".repeat(MAX_SERIAL + 1);
    for bad in ["", "a,b", &long] {
        let built = build(&[disk(bad, DiskWrites::Refused)]);
        assert!(matches!(built, Err(ConfigError::Serial { .. })), "{bad}");
    }
    let served = |format| DiskDevice { format, serve: Some(Default::default()), ..one.clone() };
    assert!(build(&[served(ImageFormat::Raw)]).is_ok());
    let error = build(&[served(ImageFormat::Qcow2)]).unwrap_err();
    assert!(matches!(error, ConfigError::ServedFormat { format: "qcow2", .. }), "{error}");
    let queues = |queues| {
        let options = blk::Options { queues, ..Default::default() };
        build(&[DiskDevice { serve: Some(options), ..one.clone() }])
    };
    assert!(queues(1).is_ok() && queues(blk::MAX_QUEUES).is_ok());
    for bad in [0, 17, u16::MAX] {
        let error = queues(bad).unwrap_err();
        assert!(matches!(error, ConfigError::Queues { queues, .. } if queues == bad), "{error}");
    }
    let gone = DiskDevice { path: dir.path().join("gone"), ..one };
    assert!(matches!(build(&[gone]), Err(ConfigError::File { what: "disk", .. })));
}

#[test]
fn firmware_needs_a_pc_and_its_files() {
    let dir = dir();
    let build = |firmware, machine| {
        let boot = FirmwareBoot { firmware, oem_strings: Vec::new() };
        VmConfigBuilder::new(boot).machine(machine).build()
    };
    assert!(build(Firmware::Bios, Machine::Q35).is_ok());
    for machine in [Machine::Microvm, Machine::Native] {
        let lacks = build(Firmware::Bios, machine);
        assert!(
            matches!(lacks, Err(ConfigError::Machine { machine: name, .. }) if name == machine.name())
        );
    }
    let uefi = |vars: &str| Firmware::Uefi {
        code: dir.path().join("kernel"),
        vars: dir.path().join(vars),
        format: ImageFormat::Raw,
        smm: false,
    };
    assert!(build(uefi("initrd"), Machine::Q35).is_ok());
    let error = build(uefi("gone"), Machine::Q35).unwrap_err().to_string();
    assert!(error.contains("variables") && error.contains("gone"), "{error}");
}

#[test]
fn command_lines_are_checked() {
    assert!(check_command_line(&"x".repeat(MAX_COMMAND_LINE)).is_ok());
    let long = "x".repeat(MAX_COMMAND_LINE + 1);
    assert!(matches!(check_command_line(&long), Err(ConfigError::CommandLineLength { .. })));
    assert!(matches!(
        check_command_line("a\nb"),
        Err(ConfigError::CommandLineCharacter { found: '\n' })
    ));
}

#[test]
fn topologies_are_read() {
    let topology: Topology = "2,1,4,2".parse().unwrap();
    assert_eq!(topology.cpus(), Some(16));
    assert_eq!(topology.to_string().parse::<Topology>().unwrap(), topology);
    assert!("2,1,4".parse::<Topology>().is_err());
    assert!("2,1,4,x".parse::<Topology>().is_err());
}
