//! The bytes of replies.

use zerocopy::FromBytes;

use super::*;
use crate::testing::Listed;

fn sample(wanted: Opcode) -> RawRequest {
    samples().into_iter().find(|sample| opcode_of(sample) == wanted).unwrap()
}

#[track_caller]
fn body(server: &Server<Fake>, opcode: Opcode) -> Reply {
    let reply = sample(opcode).unique(0x0123_4567_89ab_cdef).serve(server, ROOM).unwrap();
    assert_eq!((reply.error, reply.unique), (0, 0x0123_4567_89ab_cdef), "{opcode:?}");
    reply
}

#[track_caller]
fn is_the_entry(bytes: &[u8]) {
    let (out, _) = abi::EntryOut::read_from_prefix(bytes).unwrap();
    assert_eq!((out.nodeid, out.generation), (20, 0));
    assert_eq!((out.entry_valid, out.entry_valid_nsec), (1, 250_000_000));
    assert_eq!((out.attr_valid, out.attr_valid_nsec), (2, 500_000_000));
    assert_eq!((out.attr.ino, out.attr.size, out.attr.mode), (30, 31, 0o100_644));
}

#[test]
fn names_get_entries() {
    let server = server(Answers::default());
    for opcode in [Opcode::Lookup, Opcode::Symlink, Opcode::MkNod, Opcode::MkDir, Opcode::Link] {
        let reply = body(&server, opcode);
        assert_eq!(reply.body.len(), 128);
        is_the_entry(&reply.body);
    }
    for opcode in [Opcode::Create, Opcode::TmpFile] {
        let reply = body(&server, opcode);
        assert_eq!(reply.body.len(), 144);
        is_the_entry(&reply.body);
        let (open, _) = abi::OpenOut::read_from_prefix(&reply.body[128..]).unwrap();
        assert_eq!((open.fh, open.open_flags, open.backing_id), (40, 2, 0));
    }
}

#[test]
fn nothing_found_is_node_0() {
    let server = server(Answers::default());
    server.filesystem().answer(|answers| answers.entry.node = None);
    let out: abi::EntryOut = body(&server, Opcode::Lookup).get();
    assert_eq!((out.nodeid, out.entry_valid), (0, 1));
}

#[test]
fn attributes_handles_and_numbers() {
    let server = server(Answers::default());
    for opcode in [Opcode::GetAttr, Opcode::SetAttr] {
        let reply = body(&server, opcode);
        let out: abi::AttrOut = reply.get();
        assert_eq!((reply.body.len(), out.attr_valid, out.attr_valid_nsec), (104, 2, 500_000_000));
        assert_eq!((out.attr.ino, out.dummy), (30, 0));
    }
    let reply = body(&server, Opcode::Statx);
    let out: abi::StatxOut = reply.get();
    assert_eq!((reply.body.len(), out.attr_valid, out.stat.ino, out.flags), (288, 2, 30, 0));
    for opcode in [Opcode::Open, Opcode::OpenDir] {
        let reply = body(&server, opcode);
        let out: abi::OpenOut = reply.get();
        assert_eq!((reply.body.len(), out.fh, out.open_flags), (16, 40, 2));
    }
    let reply = body(&server, Opcode::StatFs);
    let out: abi::Kstatfs = reply.get();
    assert_eq!((reply.body.len(), out.blocks, out.bsize, out.namelen), (80, 50, 4096, 255));
    let reply = body(&server, Opcode::Lseek);
    assert_eq!((reply.body.len(), reply.get::<abi::LseekOut>().offset), (8, 60));
    assert_eq!(body(&server, Opcode::ReadLink).body, b"target");
    assert_eq!(body(&server, Opcode::Read).body, b"ent of a file");
    assert_eq!(body(&server, Opcode::Write).body, [5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(body(&server, Opcode::CopyFileRange).body, [8, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn extended_attributes_are_values_or_sizes() {
    let server = server(Answers::default());
    for opcode in [Opcode::GetXattr, Opcode::ListXattr] {
        server.filesystem().answer(|answers| answers.xattr = XattrReply::Value(b"value".to_vec()));
        assert_eq!(body(&server, opcode).body, b"value");
        server.filesystem().answer(|answers| answers.xattr = XattrReply::Size(0x0102));
        assert_eq!(body(&server, opcode).body, [2, 1, 0, 0, 0, 0, 0, 0]);
    }
}

#[test]
fn what_is_only_done_has_an_empty_reply() {
    let server = server(Answers::default());
    use Opcode::*;
    for opcode in [
        Unlink,
        RmDir,
        Rename,
        Rename2,
        Release,
        Fsync,
        SetXattr,
        RemoveXattr,
        Flush,
        ReleaseDir,
        FsyncDir,
        Access,
        Fallocate,
        SyncFs,
        Destroy,
    ] {
        assert_eq!(body(&server, opcode).body, b"", "{opcode:?}");
    }
}

#[test]
fn errors_are_those_of_the_filesystem() {
    let server = server(Answers { error: Some(Errno::DQUOT), ..Default::default() });
    for sample in &samples()[1..] {
        let opcode = opcode_of(sample);
        if has_no_reply(opcode) || is_the_servers(opcode) || opcode == Opcode::Destroy {
            continue;
        }
        let reply = sample.clone().unique(u64::MAX).serve(&server, ROOM).unwrap();
        let wanted = Reply { error: -122, unique: u64::MAX, body: Vec::new() };
        assert_eq!(reply, wanted, "{sample:?}");
    }
}

#[test]
fn what_a_host_lacks_does_not_end_an_operation_for_good() {
    let server = server(Answers { error: Some(Errno::NOSYS), ..Default::default() });
    for sample in &samples()[1..] {
        let opcode = opcode_of(sample);
        if has_no_reply(opcode) || is_the_servers(opcode) || opcode == Opcode::Destroy {
            continue;
        }
        let wanted = match opcode {
            // The one that a filesystem may do without: the kernel has nothing to tell it at close(2).
            Opcode::Flush => Errno::NOSYS,
            Opcode::Rename2 => Errno::INVAL,
            _ => Errno::OPNOTSUPP,
        };
        let reply = sample.serve(&server, ROOM).unwrap();
        assert_eq!(reply.error, -wanted.raw_os_error(), "{sample:?}");
        assert!(!server.filesystem().take_calls().is_empty(), "{sample:?}");
    }
}

#[test]
fn directories_need_not_be_opened_where_that_was_agreed_on() {
    let server =
        |wanted| server(Answers { wanted, error: Some(Errno::NOSYS), ..Default::default() });
    let open = RawRequest::new(Opcode::OpenDir).with(&abi::OpenIn::default());
    for (wanted, error) in [(0, Errno::OPNOTSUPP), (init::NO_OPENDIR_SUPPORT, Errno::NOSYS)] {
        let reply = open.serve(&server(wanted), ROOM).unwrap();
        assert_eq!(reply.error, -error.raw_os_error());
    }
}

fn listed(name: &str, entry: Option<Entry>) -> Listed {
    Listed { ino: 9, name: name.into(), entry }
}

fn list(server: &Server<Fake>, opcode: Opcode, offset: u64, size: u32, room: usize) -> Reply {
    let asked = abi::ReadIn { fh: 3, offset, size, ..Default::default() };
    RawRequest::new(opcode).with(&asked).serve(server, room).unwrap()
}

#[test]
fn listings_stop_where_the_room_does() {
    let server = server(Answers::default());
    let entry = Answers::default().entry;
    let all = vec![listed(".", None), listed("..", None), listed("name", Some(entry))];
    server.filesystem().answer(|answers| answers.listed = all);
    for (size, room) in [(4096, 64), (64, 4096), (95, 4096), (4096, 95)] {
        let reply = list(&server, Opcode::ReadDir, 0, size, room);
        assert_eq!((reply.error, reply.body.len()), (0, 64));
    }
    let rest = list(&server, Opcode::ReadDir, 2, 4096, 4096);
    let dirent: abi::Dirent = rest.get();
    assert_eq!((rest.body.len(), dirent.off, dirent.namelen), (32, 3, 4));
    assert_eq!(list(&server, Opcode::ReadDir, 3, 4096, 4096).body, b"");

    let plus = list(&server, Opcode::ReadDirPlus, 0, 4096, 4096);
    assert_eq!(plus.body.len(), 3 * 160);
    // The kernel takes no reference for these two.
    assert_eq!(plus.get::<abi::EntryOut>().nodeid, 0);
    is_the_entry(&plus.body[320..]);
    let some = list(&server, Opcode::ReadDirPlus, 0, 479, 4096);
    assert_eq!(some.body.len(), 320);
}

#[test]
fn listings_are_bounded() {
    let server = server(Answers::default());
    let name = "x".repeat(255);
    server.filesystem().answer(|answers| answers.listed = vec![listed(&name, None); 5000]);
    let limit = MAX_WRITE as usize;
    let reply = list(&server, Opcode::ReadDir, 0, u32::MAX, 2 * limit);
    assert!(reply.body.len() <= limit && reply.body.len() > limit - 280);
}

#[test]
fn an_error_does_not_lose_what_was_listed_before_it() {
    let server = server(Answers::default());
    server.filesystem().answer(|answers| {
        answers.listed = vec![listed("a", Some(answers.entry))];
        answers.listing_error = Some(Errno::IO);
    });
    let reply = list(&server, Opcode::ReadDirPlus, 0, 4096, 4096);
    assert_eq!((reply.error, reply.body.len()), (0, 160));
    let reply = list(&server, Opcode::ReadDirPlus, 1, 4096, 4096);
    assert_eq!(reply.error, -Errno::IO.raw_os_error());
}
