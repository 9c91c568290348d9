//! What is refused, and with which error.

use super::*;

#[test]
fn unknown_requests_are_unknown() {
    let server = server(Answers::default());
    for number in [0, 7, 19, 53, 54, 100, 4096, 26 << 24, u32::MAX] {
        refused(&server, &RawRequest::numbered(number).bytes(&[0; 64]), Errno::NOSYS);
    }
    for sample in samples() {
        let opcode = opcode_of(&sample);
        if is_the_servers(opcode) {
            let ioctl = opcode == Opcode::Ioctl;
            refused(&server, &sample, if ioctl { Errno::NOTTY } else { Errno::NOSYS });
        }
    }
}

#[test]
fn names_that_are_none_are_refused() {
    let server = server(Answers::default());
    let named: &[(Opcode, usize, usize)] = &[
        (Opcode::Lookup, 0, 1),
        (Opcode::Symlink, 0, 2),
        (Opcode::MkNod, size_of::<abi::MknodIn>(), 1),
        (Opcode::MkDir, size_of::<abi::MkdirIn>(), 1),
        (Opcode::Unlink, 0, 1),
        (Opcode::RmDir, 0, 1),
        (Opcode::Link, size_of::<abi::LinkIn>(), 1),
        (Opcode::Create, size_of::<abi::CreateIn>(), 1),
        (Opcode::Rename, size_of::<abi::RenameIn>(), 2),
        (Opcode::Rename2, size_of::<abi::Rename2In>(), 2),
    ];
    let (longest, longer) = ([b'x'; 255], [b'x'; 256]);
    let names: &[(&[u8], Option<Errno>)] = &[
        (b"", Some(Errno::INVAL)),
        (b".", Some(Errno::INVAL)),
        (b"..", Some(Errno::INVAL)),
        (b"/", Some(Errno::INVAL)),
        (b"/etc", Some(Errno::INVAL)),
        (b"a/b", Some(Errno::INVAL)),
        (b"../a", Some(Errno::INVAL)),
        (b"a/", Some(Errno::INVAL)),
        (&longer, Some(Errno::NAMETOOLONG)),
        (&longest, None),
        (b"...", None),
        (b"\xff\xfe\x80", None),
        (b"..\n", None),
    ];
    for (opcode, head, count) in named {
        for (name, error) in names {
            for place in 0..*count {
                // The target of a symbolic link is no name, but any text.
                if (*opcode, place) == (Opcode::Symlink, 1) {
                    continue;
                }
                let mut request = RawRequest::new(*opcode).bytes(&vec![0; *head]);
                for at in 0..*count {
                    request = request.string(if at == place { name } else { &b"good"[..] });
                }
                match error {
                    Some(error) => refused(&server, &request, *error),
                    None => assert_eq!(asked(&server, &request).0, 0, "{opcode:?} {name:?}"),
                }
            }
        }
        // Without the zero that ends it.
        let open = RawRequest::new(*opcode).bytes(&vec![0; *head]).bytes(b"good");
        refused(&server, &open, Errno::INVAL);
    }
}

#[test]
fn a_name_ends_at_the_first_zero() {
    let server = server(Answers::default());
    let request = RawRequest::new(Opcode::Lookup).bytes(b"a\0/../b\0");
    assert_eq!(asked(&server, &request).1, ["lookup 1000:100:42 1 a"]);
    let request = RawRequest::new(Opcode::Lookup).bytes(b"\0a\0");
    refused(&server, &request, Errno::INVAL);
    let request = RawRequest::new(Opcode::Lookup).bytes(b"\xff\xfe\n\0");
    assert_eq!(asked(&server, &request).1, ["lookup 1000:100:42 1 \\xff\\xfe\\n"]);
}

/// How many bytes of a sample's arguments the server needs.
fn needed(request: &RawRequest) -> usize {
    match opcode_of(request) {
        opcode if is_the_servers(opcode) => 0,
        // The name of a file that has none is not read.
        Opcode::TmpFile => size_of::<abi::CreateIn>(),
        _ => request.arguments(),
    }
}

#[test]
fn truncated_requests_are_refused_at_every_length() {
    let server = server(Answers::default());
    for sample in &samples()[1..] {
        let opcode = opcode_of(sample);
        for length in 0..needed(sample) {
            let request = sample.clone().truncated(length);
            if has_no_reply(opcode) {
                assert_eq!(request.serve(&server, ROOM), None);
                // Of a batch, the first may be whole.
                let calls = server.filesystem().take_calls();
                assert!(calls.len() <= usize::from(length >= 24), "{request:?} {calls:?}");
            } else {
                refused(&server, &request, Errno::INVAL);
            }
        }
    }
}

#[test]
fn headers_that_lie_about_the_length_are_refused() {
    let server = server(Answers::default());
    for sample in samples() {
        let truth = sample.to_vec().len() as u32;
        for len in [0, 1, 39, 40, truth - 1, truth + 1, truth + 4096, u32::MAX] {
            let lie = sample.clone().claiming(len);
            if len == truth {
                continue;
            }
            if has_no_reply(opcode_of(&sample)) {
                assert_eq!(lie.serve(&server, ROOM), None);
                assert!(server.filesystem().take_calls().is_empty());
            } else {
                refused(&server, &lie, Errno::INVAL);
            }
        }
    }
}

#[test]
fn without_a_header_there_is_no_reply() {
    let server = server(Answers::default());
    let request = RawRequest::new(Opcode::StatFs).to_vec();
    for length in 0..request.len() {
        for piece in [0, 1, 7] {
            assert_eq!(serve(&server, &request[..length], ROOM, piece), None);
        }
    }
    assert!(server.filesystem().take_calls().is_empty());
}

#[test]
fn read_only_refuses_every_change() {
    let server = server(Answers { read_only: true, ..Default::default() });
    let mut refusals = Vec::new();
    for sample in &samples()[1..] {
        let Some(reply) = sample.serve(&server, ROOM) else { continue };
        let calls = server.filesystem().take_calls();
        if reply.error == -Errno::ROFS.raw_os_error() {
            assert_eq!(calls, [""; 0]);
            refusals.push(opcode_of(sample));
        } else {
            assert_eq!(calls.is_empty(), is_the_servers(opcode_of(sample)), "{sample:?}");
        }
    }
    use Opcode::*;
    let wanted = [
        SetAttr,
        Symlink,
        MkNod,
        MkDir,
        Unlink,
        RmDir,
        Rename,
        Rename2,
        Link,
        Write,
        SetXattr,
        RemoveXattr,
        Create,
        TmpFile,
        Fallocate,
        CopyFileRange,
    ];
    assert_eq!(refusals, wanted);
}

#[test]
fn read_only_refuses_to_open_for_writing() {
    use rustix::fs::OFlags;
    let read_only = server(Answers { read_only: true, ..Default::default() });
    let writable = server(Answers::default());
    let open = |flags: OFlags| {
        RawRequest::new(Opcode::Open).with(&abi::OpenIn { flags: flags.bits(), open_flags: 0 })
    };
    for flags in [
        OFlags::WRONLY,
        OFlags::RDWR,
        OFlags::WRONLY | OFlags::RDWR,
        OFlags::RDONLY | OFlags::TRUNC,
        OFlags::RDONLY | OFlags::CREATE,
        OFlags::RDWR | OFlags::TMPFILE,
        OFlags::WRONLY | OFlags::APPEND,
    ] {
        let request = open(flags);
        assert_eq!(asked(&writable, &request).0, 0);
        refused(&read_only, &request, Errno::ROFS);
    }
    for flags in [OFlags::RDONLY, OFlags::NONBLOCK, OFlags::DIRECT, OFlags::APPEND] {
        assert_eq!(asked(&read_only, &open(flags)).0, 0, "{flags:?}");
    }
}

#[test]
fn flags_that_are_unknown_are_refused() {
    let server = server(Answers::default());
    for (flags, known) in
        [(0, true), (1, true), (2, true), (4, true), (3, true), (8, false), (1 << 31, false)]
    {
        let request = RawRequest::new(Opcode::Rename2)
            .with(&abi::Rename2In { newdir: 1, flags, padding: 0 })
            .string("a")
            .string("b");
        let call = format!("rename 1000:100:42 1 a 1 b {flags}");
        match known {
            true => assert_eq!(asked(&server, &request), (0, vec![call])),
            false => refused(&server, &request, Errno::INVAL),
        }
    }
    for flags in [1, 1 << 63] {
        let copy = abi::CopyFileRangeIn { flags, ..Default::default() };
        let request = RawRequest::new(Opcode::CopyFileRange).with(&copy);
        refused(&server, &request, Errno::INVAL);
    }
}

#[test]
fn no_directory_is_made_as_a_node() {
    let server = server(Answers::default());
    for (mode, made) in [(0o40_755, false), (0o100_644, true), (0o644, true), (0o60_600, true)] {
        let request = RawRequest::new(Opcode::MkNod)
            .with(&abi::MknodIn { mode, ..Default::default() })
            .string("a");
        match made {
            true => assert_eq!(asked(&server, &request).0, 0),
            false => refused(&server, &request, Errno::PERM),
        }
    }
}

#[test]
fn offsets_are_those_of_off_t() {
    let server = server(Answers::default());
    let requests = |at: u64| {
        let of = RawRequest::new;
        [
            of(Opcode::Read).with(&abi::ReadIn { offset: at, ..Default::default() }),
            of(Opcode::Write).with(&abi::WriteIn { offset: at, ..Default::default() }),
            of(Opcode::Lseek).with(&abi::LseekIn { offset: at, ..Default::default() }),
            of(Opcode::Fallocate).with(&abi::FallocateIn { offset: at, ..Default::default() }),
            of(Opcode::Fallocate).with(&abi::FallocateIn { length: at, ..Default::default() }),
            of(Opcode::CopyFileRange)
                .with(&abi::CopyFileRangeIn { off_in: at, ..Default::default() }),
            of(Opcode::CopyFileRange)
                .with(&abi::CopyFileRangeIn { off_out: at, ..Default::default() }),
        ]
    };
    for at in [1 << 63, u64::MAX - 1, u64::MAX] {
        for request in requests(at) {
            refused(&server, &request, Errno::INVAL);
        }
    }
    for request in requests(i64::MAX as u64) {
        assert_eq!(asked(&server, &request).1.len(), 1);
    }
}
