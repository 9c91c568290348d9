//! INIT and DESTROY.

use super::*;

fn new_server(answers: Answers) -> Server<Fake> {
    Server::new(Fake::new(answers, b"").unwrap())
}

fn init_of(major: u32, minor: u32, flags: u64) -> abi::InitIn {
    abi::InitIn {
        major,
        minor,
        max_readahead: 4096,
        flags: flags as u32,
        flags2: (flags >> 32) as u32,
        unused: [0; 11],
    }
}

fn request(asked: &abi::InitIn) -> RawRequest {
    RawRequest::new(Opcode::Init).with(asked)
}

fn flags_of(reply: &Reply) -> u64 {
    let out: abi::InitOut = reply.get();
    u64::from(out.flags2) << 32 | u64::from(out.flags)
}

#[track_caller]
fn is_initialised(server: &Server<Fake>, wanted: bool) {
    let (error, _) = asked(server, &RawRequest::new(Opcode::StatFs));
    assert_eq!(error, if wanted { 0 } else { -Errno::IO.raw_os_error() });
}

#[test]
fn a_session_begins_with_limits_and_flags() {
    let server = new_server(Answers::default());
    let reply = request(&init_of(7, 41, u64::MAX)).serve(&server, 64).unwrap();
    assert_eq!((reply.error, reply.body.len()), (0, 64));
    let out: abi::InitOut = reply.get();
    assert_eq!((out.major, out.minor, out.max_readahead), (7, 41, 4096));
    assert_eq!((out.max_write, out.max_pages, out.time_gran), (1 << 20, 256, 1));
    assert_eq!((out.map_alignment, out.max_stack_depth, out.unused), (0, 0, [0; 6]));
    assert!(out.congestion_threshold < out.max_background);
    let flags = flags_of(&reply);
    for absent in [
        // Locks, umasks, names, arguments and pages that the server knows nothing of.
        init::POSIX_LOCKS,
        init::FLOCK_LOCKS,
        init::DONT_MASK,
        init::EXPORT_SUPPORT,
        init::POSIX_ACL,
        init::SECURITY_CTX,
        init::CREATE_SUPP_GROUP,
        init::MAP_ALIGNMENT,
        init::HAS_INODE_DAX,
        init::PASSTHROUGH,
        init::ALLOW_IDMAP,
        init::HAS_RESEND,
        // The first version of what is offered as the second.
        init::HANDLE_KILLPRIV,
        // The guest's page cache alone would know what was written.
        init::WRITEBACK_CACHE,
    ] {
        assert_eq!(flags & absent, 0, "{absent:#x}");
    }
    for present in [
        init::MAX_PAGES,
        init::BIG_WRITES,
        init::INIT_EXT,
        init::SETXATTR_EXT,
        init::HANDLE_KILLPRIV_V2,
        init::DIRECT_IO_ALLOW_MMAP,
    ] {
        assert_ne!(flags & present, 0, "{present:#x}");
    }
    assert_eq!(server.filesystem().take_calls(), [format!("init {flags:#x}")]);
    is_initialised(&server, true);
}

#[test]
fn max_write_is_max_pages() {
    assert_eq!(MAX_WRITE, u32::from(MAX_PAGES) * 4096);
}

#[test]
fn nothing_is_agreed_on_that_was_not_offered() {
    for bit in 0..64 {
        let server = new_server(Answers { wanted: u64::MAX, ..Default::default() });
        // From bit 32 on, only INIT_EXT says that there are any.
        let flags = 1 << bit | init::INIT_EXT;
        let reply = request(&init_of(7, 41, flags)).serve(&server, ROOM).unwrap();
        assert_eq!(flags_of(&reply) & !flags, 0);
        let reply = request(&init_of(7, 41, flags & !init::INIT_EXT)).serve(&server, ROOM).unwrap();
        assert_eq!(flags_of(&reply) & !(flags & !init::INIT_EXT), 0);
        if bit >= 32 {
            assert_eq!(flags_of(&reply), 0, "{bit}");
        }
    }
}

#[test]
fn a_filesystem_gets_what_it_may_want() {
    let wanted = init::WRITEBACK_CACHE | init::CACHE_SYMLINKS | init::NO_OPENDIR_SUPPORT;
    let wanted = wanted | init::POSIX_ACL;
    let answers = Answers { wanted, ..Default::default() };
    let reply = init_request(u64::MAX).serve(&new_server(answers), ROOM).unwrap();
    assert_eq!(flags_of(&reply) & wanted, wanted);
    let beyond = init::SECURITY_CTX | init::DONT_MASK | init::POSIX_LOCKS;
    let answers = Answers { wanted: beyond, ..Default::default() };
    let reply = init_request(u64::MAX).serve(&new_server(answers), ROOM).unwrap();
    assert_eq!(flags_of(&reply) & beyond, 0);
}

#[test]
fn older_kernels_send_less() {
    for length in [16, 17, 20, 63, 64] {
        let server = new_server(Answers::default());
        let flags = init::MAX_PAGES | init::INIT_EXT;
        let old = request(&init_of(7, 31, flags)).truncated(length);
        let reply = old.serve(&server, 64).unwrap();
        assert_eq!((reply.error, flags_of(&reply)), (0, flags), "{length}");
        is_initialised(&server, true);
    }
    for length in 0..16 {
        let server = new_server(Answers::default());
        let short = request(&init_of(7, 31, 0)).truncated(length);
        refused(&server, &short, Errno::INVAL);
        is_initialised(&server, false);
    }
}

#[test]
fn newer_protocols_are_told_of_ours() {
    for major in [8, 9, u32::MAX] {
        let server = new_server(Answers::default());
        let reply = request(&init_of(major, 0, u64::MAX)).serve(&server, 64).unwrap();
        let out: abi::InitOut = reply.get();
        assert_eq!((reply.error, out.major, out.minor, out.flags), (0, 7, 41, 0));
        assert!(server.filesystem().take_calls().is_empty());
        is_initialised(&server, false);
    }
    // A newer minor version is of no matter.
    let server = new_server(Answers::default());
    let reply = request(&init_of(7, u32::MAX, 0)).serve(&server, 64).unwrap();
    assert_eq!((reply.error, reply.get::<abi::InitOut>().minor), (0, 41));
    is_initialised(&server, true);
}

#[test]
fn older_protocols_are_refused() {
    for (major, minor) in [(0, 0), (6, 99), (7, 0), (7, 30)] {
        let server = new_server(Answers::default());
        refused(&server, &request(&init_of(major, minor, u64::MAX)), Errno::PROTO);
        is_initialised(&server, false);
    }
}

#[test]
fn nothing_is_done_before_init() {
    let server = new_server(Answers::default());
    for sample in &samples()[1..] {
        match sample.serve(&server, ROOM) {
            Some(reply) => assert_eq!(reply.error, -Errno::IO.raw_os_error(), "{sample:?}"),
            None => assert!(has_no_reply(opcode_of(sample))),
        }
        assert_eq!(server.filesystem().take_calls(), [""; 0], "{sample:?}");
    }
}

#[test]
fn a_session_ends_and_begins_again() {
    let server = new_server(Answers::default());
    let fs = server.filesystem();
    let (init, destroy) = (init_request(0), RawRequest::new(Opcode::Destroy));
    assert_eq!(asked(&server, &init), (0, vec!["init 0x0".to_owned()]));
    // The guest was started anew without a DESTROY.
    assert_eq!(asked(&server, &init_request(init::MAX_PAGES)).1, ["init 0x400000"]);
    assert_eq!(asked(&server, &destroy), (0, vec!["destroy".to_owned()]));
    is_initialised(&server, false);
    refused(&server, &destroy, Errno::IO);
    let forget = RawRequest::new(Opcode::Forget).with(&abi::ForgetIn { nlookup: 1 });
    assert_eq!(forget.serve(&server, ROOM), None);
    assert!(fs.take_calls().is_empty());
    assert_eq!(asked(&server, &init).0, 0);
    is_initialised(&server, true);
    // What is refused changes nothing.
    refused(&server, &request(&init_of(6, 0, 0)), Errno::PROTO);
    is_initialised(&server, true);
}

#[test]
fn init_without_room_does_nothing() {
    let server = new_server(Answers::default());
    for room in 0..64 {
        for major in [7, 8] {
            let reply = request(&init_of(major, 41, 0)).serve(&server, room).unwrap();
            assert_eq!(reply.error, -Errno::INVAL.raw_os_error());
        }
    }
    assert!(server.filesystem().take_calls().is_empty());
    is_initialised(&server, false);
}
