use super::*;

/// An entry as the kernel would see it.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    name: String,
    fields: [u32; 13],
    content: Vec<u8>,
}

/// Reads an archive back, by the kernel's description of the format: 110 bytes of header in
/// hexadecimal, the name with its NUL, padding to 4, the content, padding to 4.
fn read(archive: &[u8]) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut at = 0;
    loop {
        let header = std::str::from_utf8(&archive[at..at + 110]).unwrap();
        assert_eq!(&header[..6], "070701");
        let fields = std::array::from_fn(|index| {
            let digits = &header[6 + index * 8..][..8];
            u32::from_str_radix(digits, 16).unwrap()
        });
        let (content_len, name_len) = (fields[6] as usize, fields[11] as usize);
        let name = &archive[at + 110..][..name_len];
        let (nul, name) = name.split_last().unwrap();
        assert_eq!(*nul, 0);
        let name = String::from_utf8(name.to_vec()).unwrap();

        let content_at = (at + 110 + name_len).next_multiple_of(4);
        let padding = &archive[at + 110 + name_len..content_at];
        assert!(padding.iter().all(|&byte| byte == 0));
        let content = archive[content_at..content_at + content_len].to_vec();
        at = (content_at + content_len).next_multiple_of(4);
        assert!(archive[content_at + content_len..at].iter().all(|&byte| byte == 0));

        if name == "TRAILER!!!" {
            assert!(archive[at..].iter().all(|&byte| byte == 0));
            assert_eq!(archive.len() % 512, 0);
            return entries;
        }
        entries.push(Entry { name, fields, content });
    }
}

fn entry(
    name: &str,
    inode: u32,
    mode: u32,
    links: u32,
    device: (u32, u32),
    content: &[u8],
) -> Entry {
    let (len, name_len) = (content.len() as u32, name.len() as u32 + 1);
    let fields = [inode, mode, 0, 0, links, 0, len, 0, 0, device.0, device.1, name_len, 0];
    Entry { name: name.to_owned(), fields, content: content.to_vec() }
}

#[test]
fn entries_of_every_kind_are_read_back() {
    let mut builder = InitramfsBuilder::new();
    builder.directory("dev", 0o755).unwrap().char_device("dev/tty", 0o620, 5, 0).unwrap();
    builder.file("init", 0o4755, b"#!/bin/sh\n").unwrap().file("empty", 0o600, b"").unwrap();
    builder.symlink("bin", "usr/bin").unwrap();
    let archive = builder.finish().unwrap();
    assert_eq!(
        read(&archive),
        [
            entry("dev", 1, 0o040755, 2, (0, 0), b""),
            entry("dev/tty", 2, 0o020620, 1, (5, 0), b""),
            entry("init", 3, 0o104755, 1, (0, 0), b"#!/bin/sh\n"),
            entry("empty", 4, 0o100600, 1, (0, 0), b""),
            entry("bin", 5, 0o120777, 1, (0, 0), b"usr/bin"),
        ]
    );
}

#[test]
fn names_and_contents_of_any_length_are_aligned() {
    for len in 0..9 {
        let name = "n".repeat(len + 1);
        let mut builder = InitramfsBuilder::new();
        builder.file(&name, 0o644, &vec![0xff; len]).unwrap();
        builder.file("after", 0o644, b"x").unwrap();
        let entries = read(&builder.finish().unwrap());
        assert_eq!(entries[0], entry(&name, 1, 0o100644, 1, (0, 0), &vec![0xff; len]));
        assert_eq!(entries[1].name, "after");
    }
}

#[test]
fn an_empty_archive_has_its_trailer() {
    let archive = InitramfsBuilder::new().finish().unwrap();
    assert_eq!(read(&archive), []);
    let start = "0707010000000000000000000000000000000000000001000000000000000000000000\
                 000000000000000000000000000000\
                 0B00000000TRAILER!!!\0";
    assert!(archive.starts_with(start.as_bytes()));
}

#[test]
fn unusable_names_are_refused() {
    let long = "a".repeat(4096);
    for name in
        ["", "/init", "dev/", "a//b", "..", "a/../../b", "./a", "a/.", "a\0b", "TRAILER!!!", &long]
    {
        let result = InitramfsBuilder::new().file(name, 0o644, b"").map(|_| ());
        assert!(matches!(result, Err(InitramfsError::BadName { .. })), "{name:?}: {result:?}");
    }
    let mut builder = InitramfsBuilder::new();
    builder.directory("a", 0o755).unwrap();
    let result = builder.symlink("a", "b").map(|_| ());
    assert!(matches!(result, Err(InitramfsError::Duplicate { .. })), "{result:?}");
}

#[test]
fn a_writer_that_fails_is_reported() {
    let mut room = [0; 300];
    let mut builder = InitramfsBuilder::to_writer(&mut room[..]);
    builder.file("a", 0o644, &[1; 100]).unwrap();
    let result = builder.file("b", 0o644, &[1; 100]).map(|_| ());
    assert!(matches!(result, Err(InitramfsError::Write(_))), "{result:?}");
}

#[test]
fn the_boot_archive_has_its_layout() {
    let module = |name, params, wave| BootModule { name, content: b"\x7fELF", params, wave };
    let modules =
        [module("virtio", "", 0), module("9pnet", " ", 0), module("virtio_console", "foo=1", 1)];
    let archive = build_initramfs(b"agent", &modules, &[]).unwrap();
    let entries = read(&archive);
    let find = |name: &str| entries.iter().find(|entry| entry.name == name).unwrap();

    for directory in ["dev", "proc", "sys", "run", "newroot", "modules"] {
        assert_eq!(find(directory).fields[1], 0o040755, "{directory}");
    }
    assert_eq!((find("init").fields[1], &find("init").content[..]), (0o100755, &b"agent"[..]));
    assert_eq!(find("dev/console").fields[1], 0o020600);
    assert_eq!(find("dev/console").fields[9..11], [5, 1]);
    assert_eq!(find("dev/null").fields[1], 0o020666);
    assert_eq!(find("dev/null").fields[9..11], [1, 3]);
    assert_eq!(
        std::str::from_utf8(&find("modules/list").content).unwrap(),
        "00-virtio.ko\n01-9pnet.ko\n\n02-virtio_console.ko foo=1\n"
    );
    for line in ["00-virtio.ko", "01-9pnet.ko", "02-virtio_console.ko"] {
        assert_eq!(find(&format!("modules/{line}")).content, b"\x7fELF");
    }
    // The kernel creates no directories by itself.
    for (index, entry) in entries.iter().enumerate() {
        if let Some((parent, _)) = entry.name.rsplit_once('/') {
            assert!(entries[..index].iter().any(|e| e.name == parent), "{}", entry.name);
        }
    }
    assert_eq!(build_initramfs(b"agent", &modules, &[]).unwrap(), archive);
}

#[test]
fn modules_that_would_break_the_list_are_refused() {
    for (name, params) in [("a b", ""), ("a\n", ""), ("a/b", ""), ("a", "x=1\ny"), ("a", "x\0")] {
        let modules = [BootModule { name, content: b"", params, wave: 0 }];
        assert!(build_initramfs(b"", &modules, &[]).is_err(), "{name:?} {params:?}");
    }
}
