//! Requests become calls.

use rustix::fs::OFlags;

use super::*;

#[test]
fn every_request_is_the_right_call() {
    let server = server(Answers::default());
    let mut seen: Vec<String> = Vec::new();
    for sample in &samples()[1..] {
        let opcode = opcode_of(sample);
        // In pieces of 5 bytes, which no structure is a multiple of.
        let reply = serve(&server, &sample.to_vec(), 16 + ROOM, 5);
        match reply {
            Some(reply) if is_the_servers(opcode) => assert_ne!(reply.error, 0),
            Some(reply) => assert_eq!((reply.error, reply.unique), (0, 7), "{sample:?}"),
            None => assert!(has_no_reply(opcode), "{sample:?}"),
        }
        seen.extend(server.filesystem().take_calls());
    }
    let create = "Creation { mode: 33188, flags: 194, open_flags: 0 }";
    let wanted = [
        "lookup 1000:100:42 1 name",
        "getattr 2 Some(Handle(3))",
        "setattr 1000:100:42 2 None Changes { mode: Some(384), uid: None, gid: None, size: Some(6), \
         atime: Some(At(11, 12)), mtime: Some(Now), kill_suidgid: false }",
        "readlink 2",
        "symlink 1000:100:42 2 name ../target",
        "mknod 1000:100:42 2 name 10644 5",
        "mkdir 1000:100:42 2 name 755",
        "unlink 2 name",
        "rmdir 2 name",
        "rename 1000:100:42 2 from 3 to 0",
        "rename 1000:100:42 2 from 3 to 1",
        "link 5 2 name",
        "open 1000:100:42 2 0x8000 0x0",
        "read 2 3 4",
        "write 2 3 4096 false",
        "statfs 2",
        "release 2 3",
        "fsync 2 3 true",
        "setxattr 2 user.name value 1",
        "getxattr 2 user.name 100",
        "listxattr 2 100",
        "removexattr 2 user.name",
        "flush 2 3",
        "opendir 2",
        "readdir 2 3 4 false",
        "readdir 2 3 4 true",
        "releasedir 2 3",
        "fsyncdir 2 3 true",
        "access 1000:100:42 2 5",
        &format!("create 1000:100:42 2 name {create}"),
        &format!("tmpfile 1000:100:42 2 {create}"),
        "fallocate 2 3 4 5 1",
        "lseek 2 3 4 3",
        "copy_file_range (2, 3, 4) (5, 6, 7) 8",
        "syncfs 2",
        "statx 2 Some(Handle(3)) 0xfff",
        "forget 2 4",
        "forget 8 9",
        "forget 10 11",
        "destroy",
    ];
    assert_eq!(seen, wanted);
}

#[test]
fn samples_are_of_every_opcode() {
    let all: Vec<Opcode> = samples().iter().map(opcode_of).collect();
    for opcode in Opcode::ALL {
        let count = all.iter().filter(|sample| *sample == opcode).count();
        let wanted = !matches!(opcode, Opcode::Interrupt | Opcode::NotifyReply);
        assert_eq!(count, usize::from(wanted), "{opcode:?}");
    }
}

#[test]
fn handles_and_flags_are_of_those_that_have_them() {
    let server = server(Answers::default());
    for (request, call) in [
        (RawRequest::new(Opcode::GetAttr).with(&abi::GetattrIn::default()), "getattr 1 None"),
        (RawRequest::new(Opcode::Statx).with(&abi::StatxIn::default()), "statx 1 None 0x0"),
        (
            RawRequest::new(Opcode::Fsync).with(&abi::FsyncIn { fh: 9, ..Default::default() }),
            "fsync 1 9 false",
        ),
        (
            RawRequest::new(Opcode::Write).with(&abi::WriteIn {
                write_flags: abi::write::KILL_SUIDGID,
                ..Default::default()
            }),
            "write 1 0 0 true",
        ),
        (
            RawRequest::new(Opcode::Write).with(&abi::WriteIn {
                offset: 7,
                flags: OFlags::APPEND.bits(),
                ..Default::default()
            }),
            "write 1 0 end false",
        ),
        (
            RawRequest::new(Opcode::Write).with(&abi::WriteIn {
                offset: 7,
                write_flags: abi::write::CACHE,
                flags: OFlags::APPEND.bits(),
                ..Default::default()
            }),
            "write 1 0 7 false",
        ),
        (
            RawRequest::new(Opcode::Open)
                .by(0, 1)
                .with(&abi::OpenIn { flags: 2, open_flags: abi::open::KILL_SUIDGID }),
            "open 0:1:42 1 0x2 0x1",
        ),
    ] {
        assert_eq!(asked(&server, &request), (0, vec![call.to_owned()]));
    }
}

#[test]
fn changes_are_those_that_are_marked() {
    let asked = abi::SetattrIn {
        fh: 1,
        size: 2,
        atime: u64::MAX,
        mtime: 4,
        atimensec: 999_999_999,
        mtimensec: 6,
        mode: 7,
        uid: 8,
        gid: 9,
        ..Default::default()
    };
    let none = Changes::default();
    let now = Some(SetTime::Now);
    for (valid, wanted) in [
        (0, none),
        (fattr::MODE, Changes { mode: Some(7), ..none }),
        (fattr::UID, Changes { uid: Some(8), ..none }),
        (fattr::GID, Changes { gid: Some(9), ..none }),
        (fattr::SIZE, Changes { size: Some(2), ..none }),
        // Before 1970.
        (fattr::ATIME, Changes { atime: Some(SetTime::At(-1, 999_999_999)), ..none }),
        (fattr::MTIME, Changes { mtime: Some(SetTime::At(4, 6)), ..none }),
        (fattr::ATIME | fattr::ATIME_NOW, Changes { atime: now, ..none }),
        (fattr::MTIME | fattr::MTIME_NOW, Changes { mtime: now, ..none }),
        (fattr::KILL_SUIDGID, Changes { kill_suidgid: true, ..none }),
        (fattr::FH | fattr::LOCKOWNER | fattr::CTIME, none),
    ] {
        let asked = abi::SetattrIn { valid, ..asked };
        assert_eq!(changes(&asked), Ok(wanted), "{valid:#x}");
    }
    // UTIME_OMIT and UTIME_NOW of utimensat(2) are such.
    for nanos in [1_000_000_000, (1 << 30) - 2, (1 << 30) - 1, u32::MAX] {
        let asked = abi::SetattrIn { atimensec: nanos, mtimensec: nanos, ..asked };
        for valid in [fattr::ATIME, fattr::MTIME] {
            assert_eq!(changes(&abi::SetattrIn { valid, ..asked }), Err(Errno::INVAL));
        }
        assert!(changes(&asked).is_ok());
    }
}

#[test]
fn setxattr_has_two_layouts() {
    let server = Server::new(Fake::new(Answers::default(), b"").unwrap());
    init_request(!init::SETXATTR_EXT).serve(&server, ROOM).unwrap();
    server.filesystem().take_calls();
    let request =
        RawRequest::new(Opcode::SetXattr).with(&[3_u32, 2]).string("user.a").bytes(b"a\0c");
    let call = "setxattr 1 user.a a\\x00c 2".to_owned();
    assert_eq!(asked(&server, &request), (0, vec![call]));
    // The value is as long as it says; what follows is none of it.
    let long = RawRequest::new(Opcode::SetXattr).with(&[4_u32, 0]).string("user.a").bytes(b"abc");
    refused(&server, &long, Errno::INVAL);
    let huge = RawRequest::new(Opcode::SetXattr).with(&[u32::MAX, 0]).string("user.a");
    refused(&server, &huge, Errno::INVAL);
}

#[test]
fn an_acl_takes_the_set_group_id_bit_where_the_kernel_says_so() {
    for (mode, flags, left) in [
        (0o102755, abi::setxattr::ACL_KILL_SGID, Some(0o755)),
        (0o100755, abi::setxattr::ACL_KILL_SGID, None),
        (0o102755, 0, None),
    ] {
        let mut answers = Answers::default();
        answers.entry.attributes.attr.mode = mode;
        let server = server(answers);
        let head = abi::SetxattrIn { size: 1, flags: 0, setxattr_flags: flags, padding: 0 };
        let name = "system.posix_acl_access";
        let request = RawRequest::new(Opcode::SetXattr).with(&head).string(name).bytes(b"x");
        let (error, calls) = asked(&server, &request);
        let set = calls.iter().find(|call| call.starts_with("setattr"));
        assert_eq!((error, set.is_some()), (0, left.is_some()), "{calls:?}");
        if let Some(left) = left {
            assert!(set.unwrap().contains(&format!("mode: Some({left})")), "{calls:?}");
        }
    }
}

#[test]
fn a_batch_that_counts_wrong_forgets_what_is_there() {
    let server = server(Answers::default());
    let one = abi::ForgetOne { nodeid: 5, nlookup: 6 };
    let batch = |count| {
        let head = abi::BatchForgetIn { count, dummy: 0 };
        RawRequest::new(Opcode::BatchForget).with(&head).with(&one).with(&one)
    };
    for (request, forgotten) in [
        (batch(2), 2),
        (batch(1), 1),
        (batch(0), 0),
        (batch(3), 2),
        (batch(u32::MAX), 2),
        (batch(2).truncated(8 + 16 + 15), 1),
        (batch(2).truncated(8), 0),
        (batch(2).truncated(7), 0),
    ] {
        assert_eq!(request.serve(&server, ROOM), None);
        assert_eq!(server.filesystem().take_calls(), vec!["forget 5 6"; forgotten], "{request:?}");
    }
}

#[test]
fn what_has_no_reply_gets_none() {
    let server = server(Answers::default());
    for opcode in [Opcode::Interrupt, Opcode::NotifyReply, Opcode::Forget, Opcode::BatchForget] {
        for length in 0..64 {
            let request = RawRequest::new(opcode).bytes(&vec![0; length]);
            assert_eq!(request.serve(&server, ROOM), None);
            assert_eq!(request.claiming(3).serve(&server, ROOM), None);
        }
    }
    let calls = server.filesystem().take_calls();
    assert!(calls.iter().all(|call| call == "forget 1 0"), "{calls:?}");
    // FORGET has no room for a reply.
    let forget = RawRequest::new(Opcode::Forget).node(3).with(&abi::ForgetIn { nlookup: 2 });
    assert_eq!(serve(&server, &forget.to_vec(), 0, 0), None);
    assert_eq!(server.filesystem().take_calls(), ["forget 3 2"]);
}
