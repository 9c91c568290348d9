use super::*;

mod remembered;

const NEEDS: Needs = Needs {
    bus: VirtioBus::Pci,
    disk: false,
    disk_later: false,
    disk_root: false,
    overlay: true,
    network: false,
    vsock: false,
    rng: false,
    share_via: ShareVia::Only(ShareTransport::NineP),
    modules_place: false,
};

/// A kernel of which at most its configuration is known.
fn known(config: Option<&KernelConfig>) -> Known<'_> {
    Known { config, modules: None, no_modules: None, only_9p_in_image: false }
}

/// What is wanted of any kernel.
const BASE_BUILT_IN: &str = "CONFIG_BLK_DEV_INITRD=y\nCONFIG_BINFMT_ELF=y\nCONFIG_DEVTMPFS=y\n\
    CONFIG_TMPFS=y\nCONFIG_PROC_FS=y\nCONFIG_SYSFS=y\nCONFIG_PCI=y\n";
const DRIVERS_BUILT_IN: &str = "CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_CONSOLE=y\nCONFIG_9P_FS=y\n\
    CONFIG_NET_9P_VIRTIO=y\nCONFIG_OVERLAY_FS=y\n";

/// The way of a kernel with this configuration and these modules.
fn way(
    config: &str,
    dep: Option<&str>,
    needs: Needs,
) -> Result<(Vec<&'static str>, AgentChannel), Lacking> {
    let config = KernelConfig::parse(config);
    let modules = dep.map(|dep| ModuleNames::parse(dep, ""));
    way_to_root(&Known { modules, ..known(Some(&config)) }, needs)
        .map(|Way { modules, channel, .. }| (modules, channel))
}

fn all_built_in() -> String {
    [BASE_BUILT_IN, DRIVERS_BUILT_IN].concat()
}

#[test]
fn built_in_drivers_need_no_modules() {
    let (modules, channel) = way(&all_built_in(), None, NEEDS).unwrap();
    assert!(modules.is_empty());
    assert_eq!(channel, AgentChannel::Virtio);
}

#[test]
fn without_a_virtio_console_the_serial_port_serves() {
    let config = all_built_in().replace("CONFIG_VIRTIO_CONSOLE=y", "");
    let serial = format!("{config}CONFIG_SERIAL_8250=y\n");
    assert_eq!(way(&serial, None, NEEDS).unwrap().1, AgentChannel::Serial);
    // Nor has this one a port.
    let lacking = way(&config, None, NEEDS).unwrap_err();
    assert_eq!(lacking.missing, ["CONFIG_VIRTIO_CONSOLE"]);
    assert_eq!(lacking.purpose, "talk to the host");
}

#[test]
fn exactly_what_is_missing_is_named() {
    for (options, needs, purpose) in [
        (&["CONFIG_9P_FS"] as &[_], NEEDS, "mount the host's files"),
        (&["CONFIG_NET_9P_VIRTIO"], NEEDS, "mount the host's files"),
        (&["CONFIG_9P_FS", "CONFIG_NET_9P_VIRTIO"], NEEDS, "mount the host's files"),
        (&["CONFIG_VIRTIO_PCI"], NEEDS, "reach the host's files"),
        (&["CONFIG_OVERLAY_FS"], NEEDS, "lay a writable layer over its root"),
        (&["CONFIG_VIRTIO_NET"], Needs { network: true, ..NEEDS }, "reach the network"),
        (
            &["CONFIG_VIRTIO_VSOCKETS"],
            Needs { vsock: true, ..NEEDS },
            "reach programs of the host over vsock",
        ),
        (
            &["CONFIG_HW_RANDOM_VIRTIO"],
            Needs { rng: true, ..NEEDS },
            "have random numbers of the host",
        ),
        (&["CONFIG_VIRTIO_BLK"], Needs { disk: true, ..NEEDS }, "reach its disks"),
        (&["CONFIG_BLK_DEV_INITRD"], NEEDS, "run the agent"),
        (&["CONFIG_BINFMT_ELF"], NEEDS, "run the agent"),
        (&["CONFIG_DEVTMPFS", "CONFIG_TMPFS"], NEEDS, "run the agent"),
        (&["CONFIG_PROC_FS", "CONFIG_SYSFS"], NEEDS, "run the agent"),
        (&["CONFIG_PCI", "CONFIG_VIRTIO_PCI", "CONFIG_9P_FS"], NEEDS, "do what this run needs"),
    ] {
        let mut config = all_built_in();
        for option in options {
            config = config.replace(&format!("{option}=y"), &format!("# {option} is not set"));
        }
        let lacking = way(&config, None, needs).unwrap_err();
        assert_eq!(lacking.missing, options);
        assert_eq!(lacking.purpose, purpose, "{options:?}");
    }
    let config = all_built_in().replace("CONFIG_OVERLAY_FS=y", "");
    assert!(way(&config, None, Needs { overlay: false, ..NEEDS }).is_ok());
    // A kernel with nothing set lacks everything, and is told all at once.
    let lacking = way("", None, NEEDS).unwrap_err();
    let drivers = [
        "CONFIG_VIRTIO_PCI",
        "CONFIG_9P_FS",
        "CONFIG_NET_9P_VIRTIO",
        "CONFIG_OVERLAY_FS",
        "CONFIG_VIRTIO_CONSOLE",
    ];
    assert_eq!(lacking.missing, [BASE.as_slice(), &["CONFIG_PCI"], &drivers].concat());
}

#[test]
fn devices_at_fixed_addresses_need_their_own_driver_and_no_pci() {
    let needs = Needs { bus: VirtioBus::Mmio, ..NEEDS };
    let lists: &[&str] = if Arch::HOST == Arch::X86_64 { &["CONFIG_ACPI"] } else { &[] };
    let lacking = way(&all_built_in(), None, needs).unwrap_err();
    assert_eq!(lacking.missing, [lists, &["CONFIG_VIRTIO_MMIO"]].concat());
    let without_pci = all_built_in().replace("PCI=y", "PCI=n");
    let config = format!("{without_pci}CONFIG_ACPI=y\nCONFIG_VIRTIO_MMIO=y\n");
    assert_eq!(way(&config, None, needs).unwrap(), (Vec::new(), AgentChannel::Virtio));
    let config = config.replace("VIRTIO_MMIO=y", "VIRTIO_MMIO=m");
    let dep = "kernel/drivers/virtio/virtio_mmio.ko:\n";
    assert_eq!(way(&config, Some(dep), needs).unwrap().0, ["virtio_mmio"]);
}

#[test]
fn a_module_without_a_tree_is_told_from_an_option_that_is_not_set() {
    let config = all_built_in().replace("9P_FS=y", "9P_FS=m");
    let lacking = way(&config, None, NEEDS).unwrap_err();
    assert_eq!(lacking.missing, ["CONFIG_9P_FS (a module, and no modules are known)"]);
    assert!(lacking.hint.contains("give its package"), "{}", lacking.hint);
    // What is known of the reason is more of a help.
    let parsed = KernelConfig::parse(&config);
    let why = "the modules are not built";
    let known = Known { no_modules: Some(why), ..known(Some(&parsed)) };
    assert_eq!(way_to_root(&known, NEEDS).unwrap_err().hint, why);
    let lacking = way(&config, Some("kernel/net/9p/9pnet.ko:\n"), NEEDS).unwrap_err();
    assert_eq!(lacking.missing, ["CONFIG_9P_FS (a module that the module tree does not have)"]);
    assert!(lacking.hint.contains("`make modules`"), "{}", lacking.hint);
    let (modules, _) = way(&config, Some("kernel/fs/9p/9p.ko:\n"), NEEDS).unwrap();
    assert!(modules.contains(&"9p"), "{modules:?}");
}

#[test]
fn a_kernel_that_will_be_silent_is_noted() {
    let config = KernelConfig::parse(all_built_in());
    let silence = |config| known(config).silence();
    assert!(silence(Some(&config)).unwrap().contains("CONFIG_SERIAL_8250_CONSOLE"));
    let config = KernelConfig::parse("CONFIG_SERIAL_8250_CONSOLE=y\n");
    assert_eq!(silence(Some(&config)), None);
    assert_eq!(silence(None), None);
}

#[test]
fn a_kernel_that_cannot_see_a_microvms_devices_is_known() {
    let sees = |config: Option<&str>| {
        let config = config.map(KernelConfig::parse);
        known(config.as_ref()).sees_ecam()
    };
    assert!(sees(Some("CONFIG_ACPI=y\nCONFIG_PCI_MMCONFIG=y\n")) && sees(None));
    assert!(!sees(Some("CONFIG_ACPI=y\n# CONFIG_PCI_MMCONFIG is not set\n")));
    assert!(!sees(Some("CONFIG_PCI_MMCONFIG=y\n")));
}

#[test]
fn modules_of_another_release_are_noted() {
    let noted = |release: &str, modules: Option<&str>| {
        other_release(&Kernel {
            spec: "linux".into(),
            release: release.into(),
            arch: Arch::HOST,
            version_string: None,
            boot_image: "bzImage".into(),
            config: None,
            config_source: None,
            modules: modules.map(PathBuf::from),
            no_modules: None,
            origin: vmlab_artifacts::Origin::Installed,
            leases: Leases::default(),
        })
    };
    let note = noted("6.12.0-a", Some("lib/modules/6.12.0-b")).unwrap();
    assert!(note.contains("is 6.12.0-a") && note.contains("as 6.12.0-b"), "{note}");
    assert_eq!(noted("6.12.0-a", Some("lib/modules/6.12.0-a")), None);
    assert_eq!(noted("", Some("lib/modules/6.12.0-a")), None);
    assert_eq!(noted("6.12.0-a", None), None);
}

#[test]
fn a_place_for_modules_needs_the_overlay_where_there_is_one() {
    let place = Needs { overlay: false, modules_place: true, ..NEEDS };
    let modular = all_built_in().replace("OVERLAY_FS=y", "OVERLAY_FS=m");
    let dep = "kernel/fs/overlayfs/overlay.ko:\n";
    let (modules, _) = way(&modular, Some(dep), place).unwrap();
    assert_eq!(modules, ["overlay"]);
    let absent = all_built_in().replace("CONFIG_OVERLAY_FS=y", "");
    assert!(way(&absent, None, place).is_ok());
}

#[test]
fn a_kernel_that_says_nothing_is_tried() {
    assert!(way_to_root(&known(None), NEEDS).is_ok());
}

#[test]
fn the_users_arguments_come_last() {
    let line = command_line(AgentChannel::Serial, &["panic=5".into(), "a b".into()]);
    assert!(line.ends_with("vmlab.channel=ttyS1 panic=5 a b"), "{line}");
}

/// A bzImage with this payload, which is followed by `declared`, the length of the kernel in it.
fn bzimage(dir: &Path, payload: &[u8], declared: usize) -> PathBuf {
    let payload = [payload, &u32::try_from(declared).unwrap().to_le_bytes()].concat();
    let blocks = payload.len().div_ceil(16);
    let mut image = vec![0; 1024 + blocks * 16];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &(blocks as u32).to_le_bytes()); // syssize
    put(0x1fe, b"\x55\xaa");
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes()); // version of the protocol
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x236, &1_u16.to_le_bytes()); // xloadflags: XLF_KERNEL_64
    put(0x24c, &(payload.len() as u32).to_le_bytes()); // payload_length
    put(1024, &payload);
    let path = dir.join("bzImage");
    std::fs::write(&path, image).unwrap();
    path
}

/// The smallest x86_64 vmlinux, without a PVH entry.
fn vmlinux() -> Vec<u8> {
    let mut elf = vec![0; 200];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2_u16.to_le_bytes()); // e_type: executable
    put(18, &62_u16.to_le_bytes()); // e_machine: x86_64
    put(20, &1_u32.to_le_bytes());
    put(32, &64_u64.to_le_bytes()); // e_phoff
    put(52, &64_u16.to_le_bytes()); // e_ehsize
    put(54, &56_u16.to_le_bytes()); // e_phentsize
    put(56, &1_u16.to_le_bytes()); // e_phnum
    put(58, &64_u16.to_le_bytes()); // e_shentsize
    put(64, &1_u32.to_le_bytes()); // p_type: load
    put(72, &128_u64.to_le_bytes()); // p_offset
    put(80, &0xffff_ffff_8100_0000_u64.to_le_bytes()); // p_vaddr
    put(96, &72_u64.to_le_bytes()); // p_filesz
    elf
}

/// An LZ4 frame in the legacy format, of literals only.
fn lz4(content: &[u8]) -> Vec<u8> {
    let mut block = vec![0xf0];
    let rest = content.len() - 15;
    block.extend(std::iter::repeat_n(255, rest / 255));
    block.push((rest % 255) as u8);
    block.extend(content);
    let mut frame = 0x184c_2102_u32.to_le_bytes().to_vec();
    frame.extend((block.len() as u32).to_le_bytes());
    frame.extend(block);
    frame
}

fn image_for(dir: &Path, payload: &[u8], declared: usize) -> (PathBuf, Result<PathBuf, Error>) {
    let path = bzimage(dir, payload, declared);
    let image = BootImage::open(&path).unwrap();
    let direct = direct_image(&Cache::at(dir.join("cache")), &image, &Leases::default());
    (path, direct)
}

#[test]
fn an_image_that_only_extracts_itself_is_booted_as_it_is() {
    let kernel = vmlinux();
    for (payload, declared) in [(lz4(&kernel), kernel.len()), (vec![0x77; 64], 1000)] {
        let dir = tempfile::tempdir().unwrap();
        let (path, direct) = image_for(dir.path(), &payload, declared);
        assert_eq!(direct.unwrap(), path);
        assert_eq!(Cache::at(dir.path().join("cache")).entries(IMAGES).unwrap().len(), 1);
    }
}

#[test]
fn a_damaged_payload_is_an_error_and_never_cached() {
    let kernel = vmlinux();
    let mut damaged = lz4(&kernel);
    damaged[4] ^= 0x40;
    let mut foreign = kernel.clone();
    foreign[18] = 183;
    let cases = [
        (damaged, kernel.len(), "the file is damaged"),
        (
            lz4(&kernel),
            kernel.len() + 1,
            "its kernel decompresses to 200 bytes, and 201 are declared",
        ),
        (lz4(&[7; 200]), 200, "not a kernel"),
        (lz4(&foreign), 200, "it is a kernel for aarch64"),
    ];
    for (payload, declared, defect) in cases {
        let dir = tempfile::tempdir().unwrap();
        let (path, direct) = image_for(dir.path(), &payload, declared);
        let error = direct.unwrap_err().to_string();
        assert!(error.contains(defect), "{error}");
        assert!(error.contains(&path.display().to_string()), "{error}");
        assert!(Cache::at(dir.path().join("cache")).entries(IMAGES).unwrap().is_empty());
    }
}

#[test]
fn a_failure_that_passes_is_not_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = vmlinux();
    let path = bzimage(dir.path(), &lz4(&kernel), kernel.len());
    let image = BootImage::open(&path).unwrap();
    let cache = Cache::at(dir.path().join("cache"));
    // Cut short after it was opened: reading the payload fails.
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..1024]).unwrap();
    assert!(direct_image(&cache, &image, &Leases::default()).is_err());
    assert!(cache.entries(IMAGES).unwrap().is_empty());
    std::fs::write(&path, &whole).unwrap();
    assert_eq!(direct_image(&cache, &image, &Leases::default()).unwrap(), path);
}

#[test]
fn the_extracted_kernels_that_are_kept_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path().join("cache"));
    let in_use = Leases::default();
    for n in 0..IMAGES_KEPT + 3 {
        let mut kernel = vmlinux();
        kernel[150] = n as u8;
        let path = bzimage(dir.path(), &lz4(&kernel), kernel.len());
        let none = Leases::default();
        let leases = if n < 2 { &in_use } else { &none };
        direct_image(&cache, &BootImage::open(&path).unwrap(), leases).unwrap();
    }
    // The first two are in use and stay beside the newest.
    assert_eq!(cache.entries(IMAGES).unwrap().len(), IMAGES_KEPT + 2);
}

#[test]
fn the_root_comes_over_what_the_kernel_has() {
    let auto = Needs { share_via: ShareVia::Auto, ..NEEDS };
    let transport = |config: &str| {
        let config = KernelConfig::parse(config);
        way_to_root(&known(Some(&config)), auto).map(|way| way.transport)
    };
    let nine_p = all_built_in();
    let both = format!("{nine_p}CONFIG_VIRTIO_FS=y\n");
    let virtio_fs = both.replace("CONFIG_9P_FS=y", "");
    let neither = nine_p.replace("CONFIG_9P_FS=y", "");
    assert_eq!(transport(&nine_p).unwrap(), ShareTransport::NineP);
    assert_eq!(transport(&both).unwrap(), ShareTransport::VirtioFs);
    assert_eq!(transport(&virtio_fs).unwrap(), ShareTransport::VirtioFs);
    let lacking = transport(&neither).unwrap_err();
    assert_eq!(lacking.missing, ["CONFIG_VIRTIO_FS"]);
    assert!(lacking.hint.contains("CONFIG_9P_FS"), "{}", lacking.hint);
}

#[test]
fn an_image_alone_tells_what_it_can_mount() {
    let auto = Needs { share_via: ShareVia::Auto, ..NEEDS };
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("vmlinux");
    let transport = |content: &[u8]| {
        std::fs::write(&image, content).unwrap();
        let mut known = known(None);
        known.find_drivers(&image).unwrap();
        way_to_root(&known, auto).unwrap().transport
    };
    assert_eq!(transport(b"..9pnet_virtio\0.."), ShareTransport::NineP);
    assert_eq!(transport(b"..9pnet_virtio\0..fs-virtiofs\0"), ShareTransport::VirtioFs);
    assert_eq!(transport(b"..virtiofs\0"), ShareTransport::VirtioFs);
    assert_eq!(transport(b"compressed, perhaps"), ShareTransport::VirtioFs);
}
