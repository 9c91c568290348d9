use super::super::KernelError;
use super::*;

/// What is behind the header, and must not be taken for a part of it.
const CODE: u8 = 0xcc;
/// Where images have their code, with two setup sectors.
const SETUP: usize = 3 * 512;
const LOAD: u64 = 16 * MIB;
const INIT_SIZE: u64 = 4 * MIB;

/// Offsets in an image, as in `struct boot_params`.
mod at {
    pub(super) const SETUP_SECTS: usize = 0x1f1;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    pub(super) const JUMP: usize = 0x200;
    pub(super) const MAGIC: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const INITRD_ADDR_MAX: usize = 0x22c;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const RELOCATABLE: usize = 0x234;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const PREF_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
    /// Behind the header of version 2.15.
    pub(super) const END: usize = 0x26c;
}

/// A kernel of version 2.15, whose unused fields have values that can be told from each other.
fn image() -> Vec<u8> {
    let mut image = vec![CODE; SETUP];
    image[at::SETUP_SECTS..at::END].iter_mut().zip(1..).for_each(|(byte, n)| *byte = n);
    put(&mut image, at::SETUP_SECTS, &[2]);
    put(&mut image, at::BOOT_FLAG, &[0x55, 0xaa]);
    put(&mut image, at::JUMP, &[0xeb, (at::END - 0x202) as u8]);
    put(&mut image, at::MAGIC, b"HdrS");
    put(&mut image, at::VERSION, &[0x0f, 0x02]);
    put(&mut image, at::LOADFLAGS, &[1]);
    put(&mut image, at::INITRD_ADDR_MAX, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut image, at::KERNEL_ALIGNMENT, &0x20_0000_u32.to_le_bytes());
    put(&mut image, at::RELOCATABLE, &[1]);
    put(&mut image, at::XLOADFLAGS, &[0x7f, 0]);
    put(&mut image, at::CMDLINE_SIZE, &2047_u32.to_le_bytes());
    put(&mut image, at::PREF_ADDRESS, &LOAD.to_le_bytes());
    put(&mut image, at::INIT_SIZE, &(INIT_SIZE as u32).to_le_bytes());
    image.extend((0..4096_u32).map(|n| n as u8));
    image
}

fn image_with(at: usize, value: &[u8]) -> Vec<u8> {
    let mut image = image();
    put(&mut image, at, value);
    image
}

fn refused(memory: &GuestMemoryMmap, image: &[u8]) -> BootError {
    load(memory, kernel(image)).unwrap_err()
}

#[test]
fn all_that_a_kernel_is_told_is_at_its_documented_place_and_nothing_else() {
    let memory = memory(64 * MIB);
    let boot = Kernel { initrd: Some(file(b"files")), ..kernel(&image()) };
    let boot = Kernel { command_line: "console=ttyS0".to_owned(), ..boot };
    // Whatever is there before.
    memory.write_slice(&[0xaa; 4096], GuestAddress(layout::BOOT_PARAMS)).unwrap();
    memory.write_slice(&[0xaa; 4096], GuestAddress(layout::COMMAND_LINE)).unwrap();
    let entry = load(&memory, boot).unwrap();
    assert_eq!(entry, Entry { instruction: LOAD + 0x200 });

    let initrd_at = (64 * MIB - 4096) as u32;
    let mut expected = vec![0; 4096];
    put(&mut expected, 0x1f1, &image()[0x1f1..at::END]);
    put(&mut expected, 0x70, &0xe_0000_u64.to_le_bytes());
    put(&mut expected, at::TYPE_OF_LOADER, &[0xff]);
    put(&mut expected, at::RAMDISK_IMAGE, &initrd_at.to_le_bytes());
    put(&mut expected, at::RAMDISK_SIZE, &5_u32.to_le_bytes());
    put(&mut expected, at::CMD_LINE_PTR, &(layout::COMMAND_LINE as u32).to_le_bytes());
    put(&mut expected, 0x1e8, &[3]);
    let map = [(0, 0x9_fc00, 1), (0x9_fc00, 0x6_0400, 2), (MIB, 63 * MIB, 1_u32)];
    for (index, (start, size, kind)) in map.into_iter().enumerate() {
        let entry = 0x2d0 + index * 20;
        put(&mut expected, entry, &start.to_le_bytes());
        put(&mut expected, entry + 8, &size.to_le_bytes());
        put(&mut expected, entry + 16, &kind.to_le_bytes());
    }
    let found: [u8; 4096] = bytes(&memory, layout::BOOT_PARAMS);
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_eq!(found, expected, "at {at:#x}");
    }
    // A kernel that finds something else there takes its loader for a broken one.
    assert_eq!(found[0x1ef], 0, "the sentinel");
    assert_eq!(&bytes(&memory, layout::COMMAND_LINE), b"console=ttyS0\0");
    assert_eq!(&bytes(&memory, initrd_at.into()), b"files");
    assert_eq!(bytes::<4096>(&memory, LOAD)[..], image()[SETUP..]);
}

#[test]
fn a_header_is_as_long_as_its_jump_says() {
    let carried = |end: usize| {
        let memory = memory(64 * MIB);
        load(&memory, kernel(&image_with(at::JUMP + 1, &[(end - 0x202) as u8]))).unwrap();
        bytes::<0x290>(&memory, layout::BOOT_PARAMS)
    };
    // One of version 2.12, which ends behind `handover_offset`.
    let short = carried(0x268);
    assert_eq!(short[0x264..0x268], image()[0x264..0x268]);
    assert_eq!(short[0x268..], [0; 0x290 - 0x268]);
    assert_eq!(carried(at::END)[at::END..], [0; 0x290 - at::END]);
    // One of a later version, and the longest.
    let long = carried(0x270);
    assert_eq!(long[at::END..0x270], [CODE; 4]);
    assert_eq!(long[0x270..], [0; 0x20]);
    assert_eq!(carried(0x281)[0x280..0x282], [CODE, 0]);
    // What is more than there is room for does not go over what is behind.
    let memory = memory(64 * MIB);
    load(&memory, kernel(&image_with(at::JUMP + 1, &[0xff]))).unwrap();
    assert_eq!(bytes(&memory, layout::BOOT_PARAMS + 0x290), [0; 0x40]);
}

#[test]
fn a_header_that_ends_early_has_nothing_behind() {
    let memory = memory(64 * MIB);
    // Before the magic number, before the version, before the flags that name the 64-bit entry.
    for end in [0x202, 0x205, 0x207, 0x236] {
        let error = refused(&memory, &image_with(at::JUMP + 1, &[(end - 0x202) as u8]));
        let BootError::Kernel(error) = error else { panic!("{error}") };
        match end {
            0x202 | 0x205 => assert!(matches!(error, KernelError::Unknown), "{error}"),
            0x207 => assert!(matches!(error, KernelError::Version { version: 0xf }), "{error}"),
            _ => assert!(matches!(error, KernelError::No64), "{error}"),
        }
    }
}

#[test]
fn kernels_without_a_64_bit_entry_are_refused() {
    let memory = memory(64 * MIB);
    for version in [0x0000_u16, 0x0200, 0x020b] {
        let error = refused(&memory, &image_with(at::VERSION, &version.to_le_bytes()));
        let BootError::Kernel(KernelError::Version { version: found }) = error else {
            panic!("{error}")
        };
        assert_eq!(found, version);
    }
    load(&memory, kernel(&image_with(at::VERSION, &[0x0c, 0x02]))).unwrap();
    // All flags but XLF_KERNEL_64.
    let error = refused(&memory, &image_with(at::XLOADFLAGS, &[0xfe, 0xff]));
    assert!(matches!(error, BootError::Kernel(KernelError::No64)), "{error}");
    for length in [0x1f1, 0x202, at::END] {
        let error = refused(&memory, &image()[..length]);
        assert!(matches!(error, BootError::Kernel(KernelError::Unknown)), "{error}");
    }
}

#[test]
fn code_begins_behind_the_setup_sectors() {
    let memory = memory(64 * MIB);
    for (setup_sects, sectors) in [(0_u8, 5_usize), (4, 5), (1, 2), (255, 256)] {
        let mut image = image_with(at::SETUP_SECTS, &[setup_sects]);
        image.resize(sectors * 512, CODE);
        image.extend([setup_sects ^ 0x5a; 0x201]);
        load(&memory, kernel(&image)).unwrap();
        assert_eq!(bytes(&memory, LOAD), [setup_sects ^ 0x5a; 0x201]);
        // Without the entry it is none.
        image.truncate(sectors * 512 + 0x200);
        let error = refused(&memory, &image);
        assert!(matches!(error, BootError::Kernel(KernelError::Header(_))), "{error}");
    }
}

#[test]
fn a_kernel_has_all_that_it_needs_before_it_knows_its_memory() {
    let end = LOAD + INIT_SIZE;
    load(&memory(end), kernel(&image())).unwrap();
    let error = refused(&memory(end - 4096), &image());
    assert!(matches!(error, BootError::NoRoom { size: INIT_SIZE, .. }), "{error}");
    let most = image_with(at::INIT_SIZE, &u32::MAX.to_le_bytes());
    assert!(matches!(refused(&memory(5 * GIB), &most), BootError::NoRoom { .. }));
    // An image that says too little needs its own size still.
    let none = image_with(at::INIT_SIZE, &[0; 4]);
    load(&memory(LOAD + 4096), kernel(&none)).unwrap();
    assert!(matches!(refused(&memory(LOAD), &none), BootError::NoRoom { size: 4096, .. }));
    assert!(matches!(refused(&memory(4096), &none), BootError::NoRoom { .. }));
}

#[test]
fn a_kernel_is_where_it_wants_to_be() {
    let memory = memory(64 * MIB);
    for place in [MIB, 2 * MIB, 32 * MIB] {
        let image = image_with(at::PREF_ADDRESS, &place.to_le_bytes());
        let aligned = place % (2 * MIB) == 0;
        match load(&memory, kernel(&image)) {
            Ok(entry) => assert_eq!(entry.instruction, place + 0x200),
            Err(BootError::Kernel(KernelError::Header(_))) => assert!(!aligned),
            Err(error) => panic!("{error}"),
        }
        assert!(!aligned || bytes::<4096>(&memory, place)[..] == image[SETUP..]);
    }
    // Where other things are.
    for place in [0, layout::GDT, layout::BOOT_PARAMS, layout::COMMAND_LINE, MIB - 4096] {
        let mut image = image_with(at::PREF_ADDRESS, &place.to_le_bytes());
        put(&mut image, at::KERNEL_ALIGNMENT, &1_u32.to_le_bytes());
        let error = refused(&memory, &image);
        assert!(matches!(error, BootError::Kernel(KernelError::Header(_))), "{error}");
    }
    for place in [64 * MIB, 3 * GIB, 4 * GIB, 1 << 63, !(2 * MIB - 1)] {
        let error = refused(&memory, &image_with(at::PREF_ADDRESS, &place.to_le_bytes()));
        assert!(matches!(error, BootError::NoRoom { .. }), "{error}");
    }
}

#[test]
fn an_initrd_is_as_high_as_the_kernel_can_reach() {
    let place = |size: u64, highest: u32, length: u64| {
        let memory = memory(size);
        let image = image_with(at::INITRD_ADDR_MAX, &highest.to_le_bytes());
        load(&memory, Kernel { initrd: Some(zeros(length)), ..kernel(&image) })?;
        Ok::<_, BootError>(initrd(&memory))
    };
    assert_eq!(place(64 * MIB, u32::MAX, 4096).unwrap(), 64 * MIB - 4096..64 * MIB);
    assert_eq!(place(64 * MIB, u32::MAX, 4095).unwrap(), 64 * MIB - 4096..64 * MIB - 1);
    // The address is the last that may be used.
    assert_eq!(place(64 * MIB, 0x1ff_ffff, 8192).unwrap(), 32 * MIB - 8192..32 * MIB);
    assert_eq!(place(64 * MIB, 0x1ff_fffe, 8192).unwrap(), 32 * MIB - 12288..32 * MIB - 4096);
    assert_eq!(place(5 * GIB, u32::MAX, 4096).unwrap(), 3 * GIB - 4096..3 * GIB);
    // A kernel that does not say reaches what 32-bit code does.
    assert_eq!(place(5 * GIB, 0, 4096).unwrap(), 2 * GIB - 4096..2 * GIB);
    // All that is free behind the kernel, and a byte more.
    let free = 64 * MIB - LOAD - INIT_SIZE;
    assert_eq!(place(64 * MIB, u32::MAX, free).unwrap(), LOAD + INIT_SIZE..64 * MIB);
    for (size, highest, length) in [
        (64 * MIB, u32::MAX, free + 1),
        (64 * MIB, u32::MAX, 64 * MIB + 1),
        (64 * MIB, u32::MAX, 1 << 40),
        (64 * MIB, (LOAD + INIT_SIZE) as u32, 4096),
        (64 * MIB, LOAD as u32, 4096),
        (64 * MIB, 1, 4096),
    ] {
        let error = place(size, highest, length).unwrap_err();
        assert!(matches!(error, BootError::NoRoom { size, .. } if size == length), "{error}");
    }
}

#[test]
fn no_initrd_is_where_a_kernel_unpacks_itself() {
    let memory = memory(64 * MIB);
    for init_size in (0..48 * MIB).step_by(3 * MIB as usize + 4096) {
        // The image itself has 4096 bytes.
        let needs = init_size.max(4096);
        let image = image_with(at::INIT_SIZE, &(init_size as u32).to_le_bytes());
        for length in [1, 4096, MIB, 20 * MIB, 40 * MIB, 47 * MIB] {
            let boot = Kernel { initrd: Some(zeros(length)), ..kernel(&image) };
            match load(&memory, boot) {
                Ok(_) => {
                    let initrd = initrd(&memory);
                    assert!(initrd.start >= LOAD + needs, "{init_size} {length}");
                    assert!(initrd.end <= 64 * MIB && initrd.end - initrd.start == length);
                }
                // Where a kernel moves to by itself is a multiple of its alignment.
                Err(BootError::NoRoom { .. }) => {
                    assert!(needs.next_multiple_of(2 * MIB) + length > 48 * MIB);
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn without_an_initrd_there_is_none() {
    let memory = memory(64 * MIB);
    // Whatever the image says.
    let image = image_with(at::RAMDISK_IMAGE, &[0x11; 8]);
    load(&memory, kernel(&image)).unwrap();
    assert_eq!(initrd(&memory), 0..0);
}

#[test]
fn a_command_line_is_as_long_as_the_kernel_takes() {
    let memory = memory(64 * MIB);
    let room = layout::LOW_MEMORY_END - layout::COMMAND_LINE - 1;
    for (said, most) in [(100, 100), (2047, 2047), (0, 2047), (u32::MAX, room as usize)] {
        let image = image_with(at::CMDLINE_SIZE, &said.to_le_bytes());
        let at = GuestAddress(layout::COMMAND_LINE);
        memory.write_slice(&vec![b'x'; room as usize + 2], at).unwrap();
        let line = |length| Kernel { command_line: "a".repeat(length), ..kernel(&image) };
        load(&memory, line(most)).unwrap();
        let mut found = vec![0; most + 2];
        memory.read_slice(&mut found, at).unwrap();
        assert_eq!(found, [&vec![b'a'; most][..], b"\0x"].concat(), "{said}");
        // It is what the kernel has said, and not what this one has.
        assert_eq!(param(&memory, at::CMDLINE_SIZE as u64), said);
        let error = load(&memory, line(most + 1)).unwrap_err();
        let expected = (most + 1, most);
        let BootError::CommandLine { length, most } = error else { panic!("{error}") };
        assert_eq!((length, most), expected);
    }
    let nul = Kernel { command_line: "quiet\0init=/bin/sh".to_owned(), ..kernel(&image()) };
    assert!(matches!(load(&memory, nul).unwrap_err(), BootError::Nul));
}

#[test]
fn nothing_of_a_random_header_ends_the_monitor() {
    let memory = memory(64 * MIB);
    let mut random = 1_u64;
    for _ in 0..500 {
        let mut image = image();
        for _ in 0..4 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = 0x1f1 + (random >> 33) as usize % (at::END - 0x1f1);
            image[at] = (random >> 24) as u8;
        }
        let _ = load(&memory, Kernel { initrd: Some(zeros(MIB)), ..kernel(&image) });
    }
}
