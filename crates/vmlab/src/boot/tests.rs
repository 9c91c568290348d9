use super::*;
use vmlab_artifacts::features::ModuleNames;
use vmlab_artifacts::kconfig::KernelConfig;

const NEEDS: Needs = Needs { overlay: true, network: false, modules_place: false };
const ALL_BUILT_IN: &str = "CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_CONSOLE=y\nCONFIG_9P_FS=y\n\
    CONFIG_NET_9P_VIRTIO=y\nCONFIG_OVERLAY_FS=y\n";

fn features(config: &str) -> Features {
    Features::of(Some(&KernelConfig::parse(config)), None)
}

#[test]
fn built_in_drivers_need_no_modules() {
    let Ok((modules, channel)) = way_to_root(&features(ALL_BUILT_IN), NEEDS) else {
        panic!("refused");
    };
    assert!(modules.is_empty());
    assert_eq!(channel, AgentChannel::Virtio);
}

#[test]
fn without_a_virtio_console_the_serial_port_serves() {
    let config = ALL_BUILT_IN.replace("CONFIG_VIRTIO_CONSOLE=y", "");
    let Ok((_, channel)) = way_to_root(&features(&config), NEEDS) else { panic!("refused") };
    assert_eq!(channel, AgentChannel::Serial);
}

#[test]
fn what_is_missing_is_named() {
    for (option, needs) in [
        ("CONFIG_9P_FS", NEEDS),
        ("CONFIG_NET_9P_VIRTIO", NEEDS),
        ("CONFIG_VIRTIO_PCI", NEEDS),
        ("CONFIG_OVERLAY_FS", NEEDS),
        ("CONFIG_VIRTIO_NET", Needs { network: true, ..NEEDS }),
    ] {
        let config = ALL_BUILT_IN.replace(&format!("{option}=y"), "");
        let Err(lack) = way_to_root(&features(&config), needs) else { panic!("{option}") };
        assert!(lack.missing.iter().any(|missing| missing == option), "{option}");
    }
    let config = ALL_BUILT_IN.replace("CONFIG_OVERLAY_FS=y", "");
    let without = Needs { overlay: false, ..NEEDS };
    assert!(way_to_root(&features(&config), without).is_ok());
}

#[test]
fn a_place_for_modules_needs_the_overlay_where_there_is_one() {
    let place = Needs { overlay: false, modules_place: true, ..NEEDS };
    let modular = ALL_BUILT_IN.replace("OVERLAY_FS=y", "OVERLAY_FS=m");
    let tree = ModuleNames::parse("kernel/fs/overlayfs/overlay.ko:\n", "");
    let modular = Features::of(Some(&KernelConfig::parse(&modular)), Some(&tree));
    let Ok((modules, _)) = way_to_root(&modular, place) else { panic!("refused") };
    assert_eq!(modules, ["overlay"]);
    let absent = ALL_BUILT_IN.replace("CONFIG_OVERLAY_FS=y", "");
    assert!(way_to_root(&features(&absent), place).is_ok());
}

#[test]
fn a_kernel_that_says_nothing_is_tried() {
    let unknown = Features::of(None, None);
    assert!(way_to_root(&unknown, NEEDS).is_ok());
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
