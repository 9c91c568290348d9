//! Attributes, owners and permissions.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::*;
use crate::filesystem::{Changes, SetTime};

fn set(share: &Share, node: NodeId, changes: Changes) -> Result<abi::Attr> {
    share.fs.setattr(&me(), node, None, &changes).map(|attributes| attributes.attr)
}

fn mode(mode: u32) -> Changes {
    Changes { mode: Some(mode), ..Default::default() }
}

#[test]
fn attributes_are_those_of_the_host() {
    let share = Share::new();
    share.put("file", "content");
    let host = share.path("file").metadata().unwrap();
    let node = share.node("file");
    let attr = share.attr(node).unwrap();
    assert_eq!((attr.ino, attr.size, attr.blocks), (host.ino(), 7, host.blocks()));
    assert_eq!((attr.mode, attr.nlink), (host.mode(), 1));
    assert_eq!((attr.uid, attr.gid), (host.uid(), host.gid()));
    assert_eq!(attr.mtime.cast_signed(), host.mtime());
    assert_eq!(i64::from(attr.mtimensec), host.mtime_nsec());
    let mask = rustix::fs::StatxFlags::BTIME.bits();
    let (statx, _) = share.fs.statx(node, None, mask).unwrap();
    assert_eq!((statx.ino, statx.size, u32::from(statx.mode)), (host.ino(), 7, host.mode()));
    let born = host.created().ok();
    assert_eq!(statx.mask & mask != 0, born.is_some());
    let born = born.map_or(0, |born| born.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs());
    assert_eq!(statx.btime.tv_sec.cast_unsigned(), born);
    let (statx, _) = share.fs.statx(node, None, 0).unwrap();
    assert_eq!(statx.mask & mask, 0, "not asked for");
}

#[test]
fn permissions_and_size_change() {
    let share = Share::new();
    share.put("file", "content");
    let node = share.node("file");
    assert_eq!(set(&share, node, mode(0o4751)).unwrap().mode, 0o104751);
    let size = |size| Changes { size: Some(size), ..Default::default() };
    assert_eq!(set(&share, node, size(3)).unwrap().size, 3);
    assert_eq!(share.get("file"), "con");
    let handle = share.open(node, RDWR).unwrap();
    let by_handle = share.fs.setattr(&me(), node, Some(handle), &size(1 << 33)).unwrap();
    assert_eq!(by_handle.attr.size, 1 << 33);
    let reader = share.open(node, RDONLY).unwrap();
    assert_eq!(share.fs.setattr(&me(), node, Some(reader), &size(0)).unwrap().attr.size, 0);
    assert_eq!(set(&share, node, size(u64::MAX)).unwrap_err(), Errno::INVAL);
    assert!(set(&share, ROOT, size(0)).is_err());
}

#[test]
fn times_change() {
    let share = Share::new();
    share.put("file", "");
    symlink("nowhere", share.path("link")).unwrap();
    for name in ["file", "link"] {
        let node = share.node(name);
        let changes = Changes {
            atime: Some(SetTime::At(-5, 7)),
            mtime: Some(SetTime::At(1_000_000_000, 999_999_999)),
            ..Default::default()
        };
        let attr = set(&share, node, changes).unwrap();
        assert_eq!((attr.atime.cast_signed(), attr.atimensec), (-5, 7), "{name}");
        assert_eq!((attr.mtime, attr.mtimensec), (1_000_000_000, 999_999_999), "{name}");
        let changes = Changes { mtime: Some(SetTime::Now), ..Default::default() };
        let attr = set(&share, node, changes).unwrap();
        assert_eq!(attr.atime.cast_signed(), -5, "the other one stays");
        assert!(attr.mtime > 1_000_000_000);
        // These mean something else to the host.
        for nanos in [1_000_000_000, (1 << 30) - 1, (1 << 30) - 2, u32::MAX] {
            let changes = Changes { mtime: Some(SetTime::At(0, nanos)), ..Default::default() };
            assert_eq!(set(&share, node, changes).unwrap_err(), Errno::INVAL);
        }
    }
}

#[test]
fn a_symbolic_link_has_no_permissions() {
    let share = Share::new();
    share.put("file", "");
    fs::set_permissions(share.path("file"), fs::Permissions::from_mode(0o600)).unwrap();
    symlink("file", share.path("link")).unwrap();
    assert_eq!(set(&share, share.node("link"), mode(0o777)).unwrap_err(), Errno::OPNOTSUPP);
    assert_eq!(share.path("file").metadata().unwrap().mode() & 0o777, 0o600);
}

#[test]
fn owners_change_where_the_process_may() {
    let share = Share::new();
    share.put("file", "");
    symlink("file", share.path("link")).unwrap();
    let changes = Changes { uid: Some(4321), gid: Some(8765), ..Default::default() };
    for name in ["file", "link"] {
        let attr = set(&share, share.node(name), changes).unwrap();
        let wanted = if is_root() { (4321, 8765) } else { (me().uid, me().gid) };
        assert_eq!((attr.uid, attr.gid), wanted, "{name}");
        let nobody = Changes { uid: Some(u32::MAX), ..Default::default() };
        assert_eq!(set(&share, share.node(name), nobody).unwrap_err(), Errno::INVAL);
    }
}

#[test]
fn new_files_belong_to_the_caller() {
    let share = Share::new();
    let owner = if is_root() { (other().uid, other().gid) } else { (me().uid, me().gid) };
    let how = how(0o4755, RDWR);
    let regular = FileType::RegularFile.as_raw_mode();
    let entries = [
        share.fs.create(&other(), ROOT, named(c"file"), &how).unwrap().0,
        share.fs.tmpfile(&other(), ROOT, &how).unwrap().0,
        share.fs.mknod(&other(), ROOT, named(c"node"), regular | 0o4755, 0).unwrap(),
        share.fs.mkdir(&other(), ROOT, named(c"dir"), 0o755).unwrap(),
        share.fs.symlink(&other(), ROOT, named(c"link"), c"x").unwrap(),
    ];
    for (i, entry) in entries.iter().enumerate() {
        let attr = entry.attributes.attr;
        assert_eq!((attr.uid, attr.gid), owner, "{i}");
        if i < 3 {
            // The change of the owner took the bit, and it was set again.
            assert_eq!(attr.mode & 0o7777, 0o4755, "{i}");
        }
    }
    if is_root() {
        let nobody = Caller { uid: u32::MAX, gid: 0, pid: 0 };
        let refused = share.fs.mkdir(&nobody, ROOT, named(c"nobody"), 0o755);
        assert_eq!(refused.unwrap_err(), Errno::INVAL);
        assert!(!share.path("nobody").exists());
    }
}

#[test]
fn a_group_is_inherited() {
    let share = Share::new();
    let dir = share.mkdir(ROOT, "dir").unwrap();
    // A user can give nothing away, and has one group for sure.
    let (owner, groups) =
        if is_root() { (other().uid, vec![0, 777]) } else { (me().uid, vec![me().gid]) };
    for group in groups {
        std::os::unix::fs::chown(share.path("dir"), None, Some(group)).unwrap();
        fs::set_permissions(share.path("dir"), fs::Permissions::from_mode(0o2777)).unwrap();
        let name = text(&format!("file-{group}"));
        let (entry, _) = share.fs.create(&other(), dir, named(&name), &how(0o2755, RDWR)).unwrap();
        let attr = entry.attributes.attr;
        assert_eq!((attr.uid, attr.gid), (owner, group));
        assert_eq!(attr.mode & 0o7777, 0o755, "the caller is not in the group");
        let name = text(&format!("dir-{group}"));
        let entry = share.fs.mkdir(&other(), dir, named(&name), 0o755).unwrap();
        let attr = entry.attributes.attr;
        assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (owner, group, 0o2755));
    }
}

#[test]
fn the_umask_of_the_process_takes_nothing() {
    // Every process of the test has one, typically 022.
    let share = Share::new();
    let (node, _) = share.create(ROOT, "file", 0o666, RDWR).unwrap();
    assert_eq!(share.attr(node).unwrap().mode & 0o7777, 0o666);
    let entry = share.fs.mkdir(&me(), ROOT, named(c"dir"), 0o1777).unwrap();
    assert_eq!(entry.attributes.attr.mode & 0o7777, 0o1777);
    let fifo = FileType::Fifo.as_raw_mode() | 0o622;
    let entry = share.fs.mknod(&me(), ROOT, named(c"fifo"), fifo, 0).unwrap();
    assert_eq!(entry.attributes.attr.mode & 0o7777, 0o622);
}

#[test]
fn a_default_acl_of_the_host_limits_permissions() {
    let share = Share::new();
    let flags = rustix::fs::XattrFlags::empty();
    let name = c"system.posix_acl_default";
    rustix::fs::setxattr(share.path("."), name, &super::xattrs::ACL, flags)
        .expect("this test needs ACLs where temporary files are");
    let (node, _) = share.create(ROOT, "file", 0o4666, RDWR).unwrap();
    assert_eq!(share.attr(node).unwrap().mode & 0o7777, 0o4640);
    let entry = share.fs.mkdir(&me(), ROOT, named(c"dir"), 0o777).unwrap();
    assert_eq!(entry.attributes.attr.mode & 0o7777, 0o750);
}

#[test]
fn set_user_id_goes_when_a_file_changes() {
    let share = Share::new();
    share.put("file", "");
    let node = share.node("file");
    let handle = share.open(node, RDWR).unwrap();
    let permissions = || share.attr(node).unwrap().mode & 0o7777;
    let again = || assert_eq!(set(&share, node, mode(0o6755)).unwrap().mode & 0o7777, 0o6755);
    again();
    share.fs.write(node, handle, WriteAt::Offset(0), &Data(b"x"), true).unwrap();
    assert_eq!(permissions(), 0o755);
    again();
    let kill = Changes { size: Some(0), kill_suidgid: true, ..Default::default() };
    set(&share, node, kill).unwrap();
    assert_eq!(permissions(), 0o755);
    again();
    let flags = OFlags::WRONLY | OFlags::TRUNC;
    share.fs.open(&me(), node, flags.bits(), abi::open::KILL_SUIDGID).unwrap();
    assert_eq!(permissions(), 0o755);
    // Without the group's right to run it the bit has another meaning, and stays.
    set(&share, node, mode(0o2745)).unwrap();
    share.fs.write(node, handle, WriteAt::Offset(0), &Data(b"x"), true).unwrap();
    assert_eq!(permissions(), 0o2745);
    if is_root() {
        again();
        share.write(node, handle, 0, "x").unwrap();
        assert_eq!(permissions(), 0o6755, "not asked for");
    }
}

#[test]
fn an_open_file_without_a_name_has_attributes() {
    let share = Share::new();
    let (node, handle) = share.create(ROOT, "file", 0o644, RDWR).unwrap();
    share.write(node, handle, 0, "content").unwrap();
    share.unlink(ROOT, "file").unwrap();
    for handle in [None, Some(handle)] {
        let attr = share.fs.getattr(node, handle).unwrap().attr;
        assert_eq!((attr.size, attr.nlink), (7, 0));
    }
    assert_eq!(set(&share, node, mode(0o600)).unwrap().mode & 0o777, 0o600);
    let again = share.open(node, RDONLY).unwrap();
    assert_eq!(share.read(node, again, 0).unwrap(), "content");
    share.fs.release(node, handle).unwrap();
    share.fs.release(node, again).unwrap();
    assert_eq!((share.attr(node).unwrap().nlink, share.fs.pins.count()), (0, 1));
    share.fs.forget(node, 1);
    assert_eq!((share.attr(node).unwrap_err(), share.fs.pins.count()), (Errno::STALE, 0));
}

#[test]
fn an_open_file_that_the_host_removes_has_attributes() {
    let share = Share::new();
    share.put("file", "content");
    let node = share.node("file");
    let handle = share.open(node, RDONLY).unwrap();
    fs::remove_file(share.path("file")).unwrap();
    assert_eq!(share.attr(node).unwrap().nlink, 0);
    share.fs.release(node, handle).unwrap();
    assert_eq!(share.attr(node).unwrap_err(), Errno::STALE);
}

#[test]
fn access_asks_whether_there_is_a_way_to_write() {
    let share = Share::new();
    for mask in [0, 1, 2, 4, 7] {
        share.fs.access(&other(), ROOT, mask).unwrap();
    }
    assert_eq!(share.fs.access(&me(), NodeId(99), 0), Err(Errno::STALE));
}
