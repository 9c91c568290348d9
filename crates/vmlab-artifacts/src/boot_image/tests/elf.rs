use super::*;

const NOTE_AT: usize = 0x1000;
const TEXT_AT: usize = 0x1020;

/// The smallest file that passes for an x86_64 vmlinux: a note with the PVH entry point 0x1000a30,
/// and a segment to load, which holds a version string.
pub(super) fn vmlinux() -> Vec<u8> {
    let text = b"Linux version 6.12.0-test (a@b) (gcc) #1 SMP\n\0";
    let mut elf = vec![0; TEXT_AT + text.len()];
    put(&mut elf, 0, b"\x7fELF\x02\x01\x01");
    put(&mut elf, 16, &2_u16.to_le_bytes()); // e_type: executable
    put(&mut elf, 18, &62_u16.to_le_bytes()); // e_machine: x86_64
    put(&mut elf, 20, &1_u32.to_le_bytes());
    put(&mut elf, 32, &64_u64.to_le_bytes()); // e_phoff
    put(&mut elf, 52, &64_u16.to_le_bytes()); // e_ehsize
    put(&mut elf, 54, &56_u16.to_le_bytes()); // e_phentsize
    put(&mut elf, 56, &2_u16.to_le_bytes()); // e_phnum
    put(&mut elf, 58, &64_u16.to_le_bytes()); // e_shentsize
    segment(&mut elf, 0, 4, NOTE_AT as u64, 0, 24);
    segment(&mut elf, 1, 1, TEXT_AT as u64, 0xffff_ffff_8100_0000, text.len() as u64);
    put(&mut elf, NOTE_AT, &4_u32.to_le_bytes());
    put(&mut elf, NOTE_AT + 4, &8_u32.to_le_bytes());
    put(&mut elf, NOTE_AT + 8, &18_u32.to_le_bytes());
    put(&mut elf, NOTE_AT + 12, b"Xen\0");
    put(&mut elf, NOTE_AT + 16, &0x100_0a30_u64.to_le_bytes());
    put(&mut elf, TEXT_AT, text);
    elf
}

fn segment(elf: &mut [u8], index: usize, p_type: u32, offset: u64, vaddr: u64, len: u64) {
    let at = 64 + index * 56;
    put(elf, at, &p_type.to_le_bytes());
    put(elf, at + 8, &offset.to_le_bytes());
    put(elf, at + 16, &vaddr.to_le_bytes());
    put(elf, at + 32, &len.to_le_bytes());
    put(elf, at + 40, &len.to_le_bytes());
    put(elf, at + 48, &4_u64.to_le_bytes());
}

#[test]
fn a_vmlinux_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let image = open(dir.path(), "vmlinux", &vmlinux()).unwrap();
    assert_eq!(image.arch(), Arch::X86_64);
    assert_eq!(image.format(), BootFormat::Elf);
    assert_eq!(image.version_string(), Some("6.12.0-test (a@b) (gcc) #1 SMP"));
    assert_eq!(image.release(), Some("6.12.0-test"));
    assert_eq!(image.pvh_entry(), Some(0x100_0a30));
    assert_eq!(image.compression(), None);
    assert_eq!(image.extract().unwrap(), None);
    assert_eq!(pvh_entry(&vmlinux()), Some(0x100_0a30));
}

#[test]
fn an_arm64_vmlinux_is_one_too() {
    let mut elf = vmlinux();
    put(&mut elf, 16, &3_u16.to_le_bytes());
    put(&mut elf, 18, &183_u16.to_le_bytes());
    let header = parse(elf.as_slice()).unwrap();
    assert_eq!((header.arch, header.format), (Arch::Aarch64, BootFormat::Elf));
    assert_eq!(header.pvh_entry, None);
}

#[test]
fn every_cut_is_refused() {
    refuses_every_cut(&vmlinux(), 5);
}

#[test]
fn pvh_needs_the_right_note() {
    let with = |at: usize, value: &[u8]| {
        let mut elf = vmlinux();
        put(&mut elf, at, value);
        // It still is a kernel, which can be booted by other ways.
        parse(elf.as_slice()).unwrap().pvh_entry
    };
    assert_eq!(with(NOTE_AT + 4, &4_u32.to_le_bytes()), Some(0x100_0a30));
    for (what, at, value) in [
        ("owner", NOTE_AT + 12, b"GNU\0".as_slice()),
        ("type", NOTE_AT + 8, &17_u32.to_le_bytes()),
        ("length of the name", NOTE_AT, &u32::MAX.to_le_bytes()),
        ("length of the address", NOTE_AT + 4, &u32::MAX.to_le_bytes()),
        ("length of the address", NOTE_AT + 4, &2_u32.to_le_bytes()),
        ("address", NOTE_AT + 20, &1_u32.to_le_bytes()),
        ("segment's type", 64, &0_u32.to_le_bytes()),
        ("segment's offset", 72, &u64::MAX.to_le_bytes()),
        ("segment's length", 96, &u64::MAX.to_le_bytes()),
        ("segment's length", 96, &12_u64.to_le_bytes()),
    ] {
        assert_eq!(with(at, value), None, "{what}");
    }
}

#[test]
fn other_elf_files_are_called_by_their_names() {
    let with = |at: usize, value: &[u8]| {
        let mut elf = vmlinux();
        put(&mut elf, at, value);
        message(&elf)
    };
    let mut i386 = vmlinux();
    put(&mut i386, 4, &[1]);
    put(&mut i386, 18, &3_u16.to_le_bytes());
    for (message, expected) in [
        (message(&i386), "a 32-bit ELF file for 32-bit x86"),
        (with(18, &243_u16.to_le_bytes()), "an ELF file for RISC-V"),
        (with(18, &999_u16.to_le_bytes()), "an ELF file for machine 999"),
        (with(16, &1_u16.to_le_bytes()), "an object file or kernel module"),
        (with(16, &4_u16.to_le_bytes()), "a core dump"),
        (with(64, &3_u32.to_le_bytes()), "an ordinary program"),
    ] {
        assert!(message.contains(&format!("it is {expected}, not a kernel")), "{message}");
    }
    let mut big_endian = vmlinux();
    put(&mut big_endian, 5, &[2, 1]);
    put(&mut big_endian, 18, &21_u16.to_be_bytes());
    assert!(message(&big_endian).contains("an ELF file for big-endian 64-bit PowerPC"));
}

#[test]
fn a_program_without_interpreter_is_no_kernel() {
    let mut elf = vmlinux();
    segment(&mut elf, 0, 0, 0, 0, 0);
    segment(&mut elf, 1, 1, TEXT_AT as u64, 0x40_0000, 8);
    assert!(message(&elf).contains("an ordinary program"));
    let this_test = std::env::current_exe().unwrap();
    let error = BootImage::open(&this_test).unwrap_err().to_string();
    assert!(error.contains("an ordinary program"), "{error}");
}

#[test]
fn hostile_fields_are_refused() {
    let cases: [(&str, usize, &[u8]); 8] = [
        ("EI_CLASS", 4, &[9]),
        ("EI_DATA", 5, &[9]),
        ("e_type", 16, &0xfe00_u16.to_le_bytes()),
        ("e_phoff", 32, &u64::MAX.to_le_bytes()),
        ("e_phentsize", 54, &1_u16.to_le_bytes()),
        ("e_phnum", 56, &0xffff_u16.to_le_bytes()),
        ("p_offset of what is loaded", 64 + 56 + 8, &u64::MAX.to_le_bytes()),
        ("p_filesz of what is loaded", 64 + 56 + 32, &u64::MAX.to_le_bytes()),
    ];
    for (what, at, value) in cases {
        let mut elf = vmlinux();
        put(&mut elf, at, value);
        assert!(parse(elf.as_slice()).is_err(), "{what}");
    }
}
