//! Sizes and rooms.

use super::*;

/// The least room that the reply to a sample needs.
fn least_room(opcode: Opcode) -> usize {
    match opcode {
        Opcode::Lookup | Opcode::Symlink | Opcode::MkNod | Opcode::MkDir | Opcode::Link => 128,
        Opcode::Create | Opcode::TmpFile => 128 + 16,
        Opcode::Open | Opcode::OpenDir => 16,
        Opcode::GetAttr | Opcode::SetAttr => 104,
        Opcode::Statx => 288,
        Opcode::StatFs => 80,
        Opcode::Write | Opcode::CopyFileRange | Opcode::Lseek => 8,
        Opcode::ReadLink => 6,
        Opcode::Read => 512,
        Opcode::GetXattr | Opcode::ListXattr => 5,
        _ => 0,
    }
}

/// Whether a call leaves nothing behind.
fn only_asks(call: &str) -> bool {
    ["getattr", "statx", "statfs", "readlink", "getxattr", "listxattr", "lseek"]
        .iter()
        .any(|word| call.starts_with(word))
}

#[test]
fn a_reply_without_room_is_an_error_and_nothing_is_done() {
    let server = server(Answers::default());
    for sample in &samples()[1..] {
        let opcode = opcode_of(sample);
        if has_no_reply(opcode) || is_the_servers(opcode) || opcode == Opcode::Destroy {
            continue;
        }
        let least = least_room(opcode);
        for room in 0..least {
            let reply = sample.serve(&server, room).unwrap();
            assert_eq!(reply.error, -Errno::INVAL.raw_os_error(), "{sample:?} {room}");
            let calls = server.filesystem().take_calls();
            assert!(calls.iter().all(|call| only_asks(call)), "{calls:?} with {room}");
        }
        assert_eq!(sample.serve(&server, least).unwrap().error, 0, "{sample:?}");
        server.filesystem().take_calls();
    }
}

#[test]
fn without_room_for_a_header_nothing_is_done() {
    let server = server(Answers::default());
    for sample in &samples()[1..] {
        if has_no_reply(opcode_of(sample)) {
            continue;
        }
        for capacity in 0..16 {
            assert_eq!(serve(&server, &sample.to_vec(), capacity, 0), None);
        }
        assert_eq!(server.filesystem().take_calls(), [""; 0], "{sample:?}");
    }
}

#[test]
fn arguments_are_bounded() {
    let server = server(Answers::default());
    let symlink =
        |length: usize| RawRequest::new(Opcode::Symlink).string("a").string(vec![b'x'; length - 3]);
    // Short ones take no allocation.
    for length in [511, 512, 513, MAX_ARGUMENTS] {
        assert_eq!(symlink(length).arguments(), length);
        assert_eq!(asked(&server, &symlink(length)).0, 0, "{length}");
    }
    refused(&server, &symlink(MAX_ARGUMENTS + 1), Errno::INVAL);
    refused(&server, &symlink(1 << 24), Errno::INVAL);
    // The longest extended attribute that there is.
    let longest = RawRequest::new(Opcode::SetXattr)
        .with(&abi::SetxattrIn { size: MAX_XATTR, ..Default::default() })
        .string([b'n'; 255])
        .bytes(&vec![b'v'; MAX_XATTR as usize]);
    assert_eq!(asked(&server, &longest).0, 0);
}

fn write(size: u32, data: &[u8]) -> RawRequest {
    let head = abi::WriteIn { fh: 3, size, ..Default::default() };
    RawRequest::new(Opcode::Write).with(&head).bytes(data)
}

#[test]
fn data_is_as_long_as_it_says() {
    let server = server(Answers::default());
    for size in [0, 4, 6, 7, u32::MAX] {
        refused(&server, &write(size, b"hello"), Errno::INVAL);
    }
    for piece in [0, 1, 6, 40, 80, 81] {
        let reply = serve(&server, &write(5, b"HELLO").to_vec(), 24, piece).unwrap();
        assert_eq!((reply.error, reply.get::<abi::WriteOut>().size), (0, 5));
        assert_eq!(server.filesystem().content().unwrap(), b"HELLOnt of a file");
    }
    let nothing = write(0, b"").serve(&server, 8).unwrap();
    assert_eq!((nothing.error, nothing.get::<abi::WriteOut>().size), (0, 0));
}

#[test]
fn a_page_that_is_written_back_is_written_whole_or_not() {
    let server = server(Answers { written: 2, ..Default::default() });
    let write = |write_flags| {
        let head = abi::WriteIn { fh: 3, offset: 7, size: 5, write_flags, ..Default::default() };
        let request = RawRequest::new(Opcode::Write).with(&head).bytes(b"hello");
        let reply = request.serve(&server, ROOM).unwrap();
        (reply, server.filesystem().take_calls())
    };
    let (reply, calls) = write(0);
    assert_eq!((reply.error, reply.get::<abi::WriteOut>().size), (0, 2));
    assert_eq!(calls, ["write 1 3 7 false"]);
    let (reply, calls) = write(abi::write::CACHE);
    assert_eq!((reply.error, reply.get::<abi::WriteOut>().size), (0, 5));
    assert_eq!(calls, ["write 1 3 7 false", "write 1 3 9 false", "write 1 3 11 false"]);
    // The last part, at the beginning of the fake's file.
    assert!(server.filesystem().content().unwrap().starts_with(b"o"));
    server.filesystem().answer(|answers| answers.written = 0);
    assert_eq!(write(abi::write::CACHE).0.error, -Errno::IO.raw_os_error());
    assert_eq!(write(0).0.error, 0);
}

#[test]
fn data_is_bounded() {
    let server = server(Answers::default());
    let data = vec![b'x'; MAX_WRITE as usize + 1];
    let reply = write(MAX_WRITE, &data[1..]).serve(&server, 8).unwrap();
    assert_eq!((reply.error, reply.get::<abi::WriteOut>().size), (0, MAX_WRITE));
    assert_eq!(server.filesystem().content().unwrap().len(), MAX_WRITE as usize);
    server.filesystem().take_calls();
    refused(&server, &write(MAX_WRITE + 1, &data), Errno::INVAL);
}

#[test]
fn reading_is_bounded_by_size_room_and_limit() {
    let content = vec![b'x'; MAX_WRITE as usize + 100];
    let server = Server::new(Fake::new(Answers::default(), &content).unwrap());
    init_request(u64::MAX).serve(&server, ROOM).unwrap();
    let limit = MAX_WRITE as usize;
    for (size, room, offset, wanted) in [
        (10, 100, 0, Ok(10)),
        (0, 100, 0, Ok(0)),
        (MAX_WRITE, limit, 0, Ok(limit)),
        (MAX_WRITE, 2 * limit, 0, Ok(limit)),
        // At the end of the file and behind it.
        (100, 100, content.len() as u64 - 7, Ok(7)),
        (100, 100, content.len() as u64, Ok(0)),
        (100, 100, 1 << 40, Ok(0)),
        // A kernel takes a reply that is shorter than what it has asked for as the file's end.
        (100, 99, 0, Err(Errno::INVAL)),
        (100, 0, 0, Err(Errno::INVAL)),
        (u32::MAX, limit, 0, Err(Errno::INVAL)),
        (MAX_WRITE + 1, 2 * limit, 0, Err(Errno::INVAL)),
        // 256 pages of 64 KiB.
        (16 * MAX_WRITE, 16 * limit, 0, Err(Errno::INVAL)),
        (u32::MAX, 2 * limit, 0, Err(Errno::INVAL)),
    ] {
        let asked = abi::ReadIn { size, offset, ..Default::default() };
        let request = RawRequest::new(Opcode::Read).with(&asked);
        for piece in [0, 4096, 4099] {
            let reply = serve(&server, &request.to_vec(), 16 + room, piece).unwrap();
            let (error, length) =
                wanted.map_or_else(|error| (-error.raw_os_error(), 0), |n| (0, n));
            assert_eq!((reply.error, reply.body.len()), (error, length), "{size} {room} {offset}");
            assert!(reply.body.iter().all(|byte| *byte == b'x'));
        }
    }
}

#[test]
fn extended_attributes_are_bounded() {
    let server = server(Answers::default());
    let request = |size| {
        let head = abi::GetxattrIn { size, padding: 0 };
        RawRequest::new(Opcode::GetXattr).with(&head).string("a")
    };
    for (size, wanted) in [(100, 100), (MAX_XATTR, MAX_XATTR), (u32::MAX, MAX_XATTR)] {
        let call = format!("getxattr 1 a {wanted}");
        assert_eq!(asked(&server, &request(size)), (0, vec![call]));
    }
    // A filesystem that gives more than was asked for.
    assert_eq!(asked(&server, &request(4)).0, -Errno::RANGE.raw_os_error());
}

#[test]
fn copies_fit_into_their_reply() {
    let server = server(Answers { number: u64::MAX, ..Default::default() });
    for len in [0, 5, 1 << 30, 1 << 32, u64::MAX] {
        let asked = abi::CopyFileRangeIn { len, ..Default::default() };
        let reply = RawRequest::new(Opcode::CopyFileRange).with(&asked).serve(&server, 8).unwrap();
        let copied = u64::from(reply.get::<abi::WriteOut>().size);
        assert_eq!(copied, len.min(1 << 30));
    }
}
