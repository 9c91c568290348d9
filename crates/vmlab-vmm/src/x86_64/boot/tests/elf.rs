use super::super::KernelError;
use super::*;

/// Sizes and offsets of the ELF specification's 64-bit headers.
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const E_MACHINE: usize = 18;
const E_ENTRY: usize = 24;
const E_PHOFF: usize = 32;
const E_PHENTSIZE: usize = 54;
const E_PHNUM: usize = 56;

/// What a segment has: an instruction and something to know it by.
const CODE: &[u8] = b"\xf4code";

#[derive(Clone, Copy)]
struct Segment<'a> {
    kind: u32,
    at: u64,
    bytes: &'a [u8],
    more: u64,
}

const LOADED: Segment<'static> = Segment { kind: 1, at: 16 * MIB, bytes: CODE, more: 0 };

/// An ELF file with these segments, whose bytes are behind the headers in their order.
fn image(entry: u64, segments: &[Segment]) -> Vec<u8> {
    let mut image = vec![0; HEADER + segments.len() * PROGRAM_HEADER];
    // 64 bits, little-endian, version 1; an executable for x86_64.
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0, 1]);
    put(&mut image, E_ENTRY, &entry.to_le_bytes());
    put(&mut image, E_PHOFF, &(HEADER as u64).to_le_bytes());
    put(&mut image, E_PHENTSIZE, &[PROGRAM_HEADER as u8, 0, segments.len() as u8, 0]);
    for (index, segment) in segments.iter().enumerate() {
        let header = HEADER + index * PROGRAM_HEADER;
        let (offset, length) = (image.len() as u64, segment.bytes.len() as u64);
        put(&mut image, header, &segment.kind.to_le_bytes());
        // The virtual address is not looked at.
        let numbers = [offset, !0, segment.at, length, length + segment.more];
        for (number, at) in numbers.into_iter().zip((8..).step_by(8)) {
            put(&mut image, header + at, &number.to_le_bytes());
        }
        image.extend_from_slice(segment.bytes);
    }
    image
}

/// Offsets in the header of a segment.
const P_OFFSET: usize = 8;
const P_PADDR: usize = 24;
const P_FILESZ: usize = 32;
const P_MEMSZ: usize = 40;

/// A file with one segment, of which something is different.
fn image_with(at: usize, value: &[u8]) -> Vec<u8> {
    let mut image = image(LOADED.at, &[LOADED]);
    put(&mut image, at, value);
    image
}

fn refused(image: &[u8]) -> BootError {
    load(&memory(64 * MIB), kernel(image)).unwrap_err()
}

/// Refused for what the file says.
fn wrong(image: &[u8], what: &str) {
    let error = refused(image);
    assert!(matches!(error, BootError::Kernel(KernelError::Elf(_))), "{error}");
    assert!(error.to_string().contains(what), "{error}");
}

#[test]
fn segments_are_at_their_physical_addresses() {
    let memory = memory(64 * MIB);
    let segments = [
        Segment { at: 32 * MIB, bytes: b"second", more: 100, ..LOADED },
        LOADED,
        // Only memory, a note, and nothing at all.
        Segment { at: 24 * MIB, bytes: b"", more: MIB, ..LOADED },
        Segment { kind: 4, at: 0, bytes: b"a note", more: 0 },
        Segment { at: 0, bytes: b"", more: 0, ..LOADED },
    ];
    let boot = Kernel { initrd: Some(zeros(MIB)), ..kernel(&image(16 * MIB + 1, &segments)) };
    let entry = load(&memory, boot).unwrap();
    assert_eq!(entry, Entry { instruction: 16 * MIB + 1 });
    assert_eq!(&bytes(&memory, 16 * MIB), b"\xf4code\0\0\0");
    assert_eq!(&bytes(&memory, 32 * MIB), b"second\0\0\0");
    assert_eq!(bytes(&memory, 24 * MIB), [0; 8]);
    assert_eq!(initrd(&memory), 63 * MIB..64 * MIB);
}

#[test]
fn a_kernel_without_a_setup_header_gets_one() {
    let memory = memory(64 * MIB);
    load(&memory, kernel(&image(LOADED.at, &[LOADED]))).unwrap();
    let mut expected = [0; 0x290 - 0x1f1];
    for (at, value) in [
        (0x1fe, &[0x55, 0xaa][..]),
        (0x202, b"HdrS\x0f\x02"),
        (0x210, &[0xff]),
        (0x228, &(layout::COMMAND_LINE as u32).to_le_bytes()),
        (0x230, &0x100_0000_u32.to_le_bytes()),
        (0x238, &2047_u32.to_le_bytes()),
    ] {
        put(&mut expected, at - 0x1f1, value);
    }
    assert_eq!(bytes(&memory, layout::BOOT_PARAMS + 0x1f1), expected);
    assert_eq!(bytes(&memory, layout::BOOT_PARAMS + 0x70), 0xe_0000_u64.to_le_bytes());
    assert_eq!(bytes(&memory, layout::BOOT_PARAMS + 0x1ef), [0]);
    assert_eq!(bytes(&memory, layout::COMMAND_LINE), [0]);
}

#[test]
fn a_file_that_is_cut_off_is_refused() {
    let whole = image(LOADED.at, &[LOADED]);
    for length in 0..whole.len() {
        let error = refused(&whole[..length]);
        match length {
            0..4 => assert!(matches!(error, BootError::Kernel(KernelError::Unknown)), "{error}"),
            _ => assert!(error.to_string().contains("cut off"), "{length}: {error}"),
        }
    }
    for offset in [1000, u64::MAX, u64::MAX - 4, 1 << 63, i64::MAX as u64] {
        wrong(&image_with(HEADER + P_OFFSET, &offset.to_le_bytes()), "cut off");
        wrong(&image_with(E_PHOFF, &offset.to_le_bytes()), "cut off");
    }
}

#[test]
fn files_of_others_are_refused() {
    wrong(&image_with(4, &[1]), "64-bit");
    wrong(&image_with(5, &[2]), "64-bit");
    // Of 32-bit and of 64-bit ARM.
    for machine in [40, 183] {
        wrong(&image_with(E_MACHINE, &[machine, 0]), "architecture");
    }
    wrong(&image_with(E_PHENTSIZE, &[32, 0]), "program headers");
    wrong(&image_with(E_PHENTSIZE, &[0, 0]), "program headers");
    wrong(&image_with(E_PHNUM, &[0xff, 0xff]), "program headers");
    wrong(&image_with(E_PHNUM, &[0, 0]), "entered");
}

#[test]
fn a_kernel_is_entered_where_something_of_it_is() {
    let end = LOADED.at + CODE.len() as u64;
    for entry in [0, layout::COMMAND_LINE, LOADED.at - 1, end, end + 10, 1 << 63, u64::MAX] {
        // What the file does not have is no code.
        wrong(&image(entry, &[Segment { more: 100, ..LOADED }]), "entered");
    }
    load(&memory(64 * MIB), kernel(&image(end - 1, &[LOADED]))).unwrap();
}

#[test]
fn no_segment_is_where_something_else_is() {
    let low = [0, layout::GDT, layout::BOOT_PARAMS, layout::PAGE_TABLES, layout::COMMAND_LINE];
    for at in low.into_iter().chain([layout::ACPI.start, layout::VMGENID, MIB - 1]) {
        wrong(&image(LOADED.at, &[LOADED, Segment { at, ..LOADED }]), "told");
        wrong(&image(at, &[Segment { at, ..LOADED }]), "told");
        // One that the file has nothing of is one all the same.
        let empty = Segment { at, bytes: b"", more: 1, ..LOADED };
        wrong(&image(LOADED.at, &[LOADED, empty]), "told");
    }
    load(&memory(64 * MIB), kernel(&image(MIB, &[Segment { at: MIB, ..LOADED }]))).unwrap();
    for at in [LOADED.at, LOADED.at + 4, LOADED.at - 4] {
        wrong(&image(LOADED.at, &[LOADED, Segment { at, ..LOADED }]), "the same place");
    }
    let beside = Segment { at: LOADED.at + CODE.len() as u64, ..LOADED };
    load(&memory(64 * MIB), kernel(&image(LOADED.at, &[LOADED, beside]))).unwrap();
    let covering = Segment { at: LOADED.at - 1, bytes: b"", more: MIB, ..LOADED };
    wrong(&image(LOADED.at, &[covering, LOADED]), "the same place");
}

#[test]
fn no_segment_is_outside_of_memory() {
    let at_end = Segment { at: 64 * MIB - CODE.len() as u64, ..LOADED };
    load(&memory(64 * MIB), kernel(&image(at_end.at, &[at_end]))).unwrap();
    for place in [at_end.at + 1, 64 * MIB, 3 * GIB, 4 * GIB, 1 << 63, u64::MAX, u64::MAX - 4] {
        let error = refused(&image_with(HEADER + P_PADDR, &place.to_le_bytes()));
        assert!(matches!(error, BootError::NoRoom { .. }), "{place:#x}: {error}");
    }
    for size in [48 * MIB + 1, 1 << 40, u64::MAX, u64::MAX - LOADED.at] {
        let error = refused(&image_with(HEADER + P_MEMSZ, &size.to_le_bytes()));
        assert!(matches!(error, BootError::NoRoom { .. }), "{size:#x}: {error}");
        // More in the file than in memory, or than in the file.
        wrong(&image_with(HEADER + P_FILESZ, &size.to_le_bytes()), "more of a segment");
        let mut both = image_with(HEADER + P_FILESZ, &size.to_le_bytes());
        put(&mut both, HEADER + P_MEMSZ, &size.to_le_bytes());
        wrong(&both, "cut off");
    }
    // Above the hole there is memory, but none that kernels are loaded to.
    let high = image(4 * GIB, &[Segment { at: 4 * GIB, ..LOADED }]);
    let error = load(&memory(5 * GIB), kernel(&high)).unwrap_err();
    assert!(matches!(error, BootError::NoRoom { .. }), "{error}");
}

#[test]
fn no_initrd_is_where_a_kernel_has_its_memory() {
    let memory = memory(64 * MIB);
    let segment = Segment { more: 8 * MIB, ..LOADED };
    let boot = |length| Kernel {
        initrd: Some(zeros(length)),
        ..kernel(&image(LOADED.at, &[segment, Segment { at: 2 * MIB, ..LOADED }]))
    };
    // The segment ends just behind 24 MiB, and so there are 38 MiB behind the next multiple of 2 MiB.
    load(&memory, boot(38 * MIB)).unwrap();
    assert_eq!(initrd(&memory), 26 * MIB..64 * MIB);
    for length in [38 * MIB + 1, 60 * MIB, 64 * MIB, 1 << 40] {
        let error = load(&memory, boot(length)).unwrap_err();
        assert!(matches!(error, BootError::NoRoom { size, .. } if size == length), "{error}");
    }
}
