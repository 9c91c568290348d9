//! Extended attributes.

use std::os::unix::fs::symlink;

use rustix::fs::XattrFlags;

use super::*;
use crate::filesystem::XattrReply;

fn value(bytes: &[u8]) -> Result<XattrReply> {
    Ok(XattrReply::Value(bytes.to_vec()))
}

#[test]
fn an_attribute_is_set_read_listed_and_removed() {
    let share = Share::new();
    share.put("file", "");
    share.mkdir(ROOT, "dir").unwrap();
    for node in [share.node("file"), share.node("dir"), ROOT] {
        let fs = &share.fs;
        assert_eq!(fs.getxattr(node, c"user.a", 10), Err(Errno::NODATA));
        fs.setxattr(node, c"user.a", b"\0value\xff", 0).unwrap();
        assert_eq!(fs.getxattr(node, c"user.a", 7), value(b"\0value\xff"));
        assert_eq!(fs.getxattr(node, c"user.a", u32::MAX), value(b"\0value\xff"));
        assert_eq!(fs.getxattr(node, c"user.a", 0), Ok(XattrReply::Size(7)));
        assert_eq!(fs.getxattr(node, c"user.a", 6), Err(Errno::RANGE));
        assert_eq!(fs.listxattr(node, 100), value(b"user.a\0"));
        assert_eq!(fs.listxattr(node, 0), Ok(XattrReply::Size(7)));
        assert_eq!(fs.listxattr(node, 6), Err(Errno::RANGE));
        fs.removexattr(node, c"user.a").unwrap();
        assert_eq!(fs.removexattr(node, c"user.a"), Err(Errno::NODATA));
        assert_eq!(fs.listxattr(node, 100), value(b""));
    }
}

#[test]
fn flags_and_limits_are_those_of_the_host() {
    let share = Share::new();
    share.put("file", "");
    let node = share.node("file");
    let set = |name: &CStr, value: &[u8], flags: u32| share.fs.setxattr(node, name, value, flags);
    let (create, replace) = (XattrFlags::CREATE.bits(), XattrFlags::REPLACE.bits());
    assert_eq!(set(c"user.a", b"1", replace), Err(Errno::NODATA));
    assert_eq!(set(c"user.a", b"1", create), Ok(()));
    assert_eq!(set(c"user.a", b"2", create), Err(Errno::EXIST));
    assert_eq!(set(c"user.a", b"", replace), Ok(()));
    assert_eq!(share.fs.getxattr(node, c"user.a", 10), value(b""));
    assert_eq!(set(c"user.a", b"", 4), Err(Errno::INVAL));
    assert_eq!(set(c"user.a", &[0; 65537], 0), Err(Errno::TOOBIG));
    let long = text(&format!("user.{}", "x".repeat(251)));
    assert_eq!(set(&long, b"", 0), Err(Errno::RANGE));
    assert_eq!(set(c"nonsense", b"", 0), Err(Errno::OPNOTSUPP));
    assert_eq!(set(c"", b"", 0), Err(Errno::RANGE));
}

#[test]
fn acls_are_not_passed_on() {
    let share = Share::new();
    let name = c"system.posix_acl_access";
    let fs = &share.fs;
    assert_eq!(fs.getxattr(ROOT, name, 0), Err(Errno::OPNOTSUPP));
    assert_eq!(fs.setxattr(ROOT, name, b"\x02\0\0\0", 0), Err(Errno::OPNOTSUPP));
    assert_eq!(fs.removexattr(ROOT, name), Err(Errno::OPNOTSUPP));
}

/// Version 2: the owner rwx, the group r-x, others nothing.
pub(super) const ACL: [u8; 28] = [
    2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 5, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255,
    255, 255, 255,
];

#[test]
fn acls_are_passed_on_where_that_was_agreed_on() {
    let share = Share::with(PassthroughConfig { posix_acl: true, ..Default::default() });
    assert_ne!(share.fs.wanted() & init::POSIX_ACL, 0);
    let name = c"system.posix_acl_default";
    // The kernel may not know of it.
    assert_eq!(share.fs.setxattr(ROOT, name, &ACL, 0), Err(Errno::OPNOTSUPP));
    share.fs.init(init::POSIX_ACL);
    share.fs.setxattr(ROOT, name, &ACL, 0).expect("ACLs on the host's filesystem");
    assert_eq!(share.fs.getxattr(ROOT, name, 100), value(&ACL));
    // XFS shows root how it stores them, too.
    let Ok(XattrReply::Value(names)) = share.fs.listxattr(ROOT, 100) else { panic!() };
    let mut names = names.split(|byte| *byte == 0);
    let first = names.next();
    assert_eq!(first, Some(&b"system.posix_acl_default"[..]));
    assert!(names.all(|name| name.is_empty() || name == b"trusted.SGI_ACL_DEFAULT"));
    let (file, _) = share.create(ROOT, "file", 0o666, RDWR).unwrap();
    assert_eq!(share.attr(file).unwrap().mode & 0o777, 0o640);
    // Nothing else of that kind.
    assert_eq!(share.fs.getxattr(ROOT, c"system.nfs4_acl", 0), Err(Errno::OPNOTSUPP));
    share.fs.removexattr(ROOT, name).unwrap();
    assert_eq!(share.fs.listxattr(ROOT, 100), value(b""));
}

/// `VFS_CAP_REVISION_2` with `CAP_NET_RAW`, permitted and effective.
const CAPABILITIES: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn no_guest_gives_a_file_rights_on_the_host() {
    let share = Share::new();
    share.put("file", "");
    let (node, fs) = (share.node("file"), &share.fs);
    for name in [c"security.capability", c"security.selinux", c"security.ima", c"security.a"] {
        assert_eq!(fs.setxattr(node, name, &CAPABILITIES, 0), Err(Errno::OPNOTSUPP), "{name:?}");
    }
    for name in [c"security.selinux", c"security.ima", c"security.a"] {
        assert_eq!(fs.removexattr(node, name), Err(Errno::OPNOTSUPP), "{name:?}");
    }
    // Those that the host has given are the guest's to see and to take.
    let name = c"security.capability";
    if !is_root() {
        assert_eq!(fs.getxattr(node, name, 100), Err(Errno::NODATA));
        return;
    }
    rustix::fs::setxattr(share.path("file"), name, &CAPABILITIES, XattrFlags::empty()).unwrap();
    assert_eq!(fs.getxattr(node, name, 100), value(&CAPABILITIES));
    assert_eq!(fs.listxattr(node, 100), value(b"security.capability\0"));
    fs.removexattr(node, name).unwrap();
    assert_eq!(fs.getxattr(node, name, 100), Err(Errno::NODATA));
    // The host takes them when a file is written to.
    rustix::fs::setxattr(share.path("file"), name, &CAPABILITIES, XattrFlags::empty()).unwrap();
    let handle = share.open(node, RDWR).unwrap();
    share.write(node, handle, 0, "other").unwrap();
    assert_eq!(fs.getxattr(node, name, 100), Err(Errno::NODATA));
}

#[test]
fn a_link_is_not_followed() {
    let share = Share::new();
    share.put("file", "");
    symlink("file", share.path("link")).unwrap();
    let link = share.node("link");
    // The host has no attributes of this kind on links.
    assert_eq!(share.fs.setxattr(link, c"user.a", b"1", 0), Err(Errno::PERM));
    assert_eq!(share.fs.listxattr(share.node("file"), 100), value(b""));
    if is_root() {
        share.fs.setxattr(link, c"trusted.a", b"1", 0).unwrap();
        assert_eq!(share.fs.getxattr(link, c"trusted.a", 10), value(b"1"));
        assert_eq!(share.fs.listxattr(share.node("file"), 100), value(b""));
    }
}

#[test]
fn an_open_file_without_a_name_has_them() {
    let share = Share::new();
    let (node, _) = share.create(ROOT, "file", 0o644, RDWR).unwrap();
    share.unlink(ROOT, "file").unwrap();
    share.fs.setxattr(node, c"user.a", b"1", 0).unwrap();
    assert_eq!(share.fs.getxattr(node, c"user.a", 10), value(b"1"));
}
