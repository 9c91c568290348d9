//! One request of every kind, as a kernel sends it.

use crate::abi::{self, Opcode, fattr, getattr};
use crate::testing::{RawRequest, init};

/// The flags of a file that is made: `O_RDWR | O_CREAT | O_EXCL`.
const CREATE_FLAGS: u32 = {
    use rustix::fs::OFlags;
    OFlags::RDWR.union(OFlags::CREATE).union(OFlags::EXCL).bits()
};

/// A request of every opcode but INTERRUPT and NOTIFY_REPLY, INIT first and DESTROY last. SETXATTR has the
/// layout of `SETXATTR_EXT`.
pub fn samples() -> Vec<RawRequest> {
    let of = |opcode| RawRequest::new(opcode).node(2);
    let open = abi::OpenIn { flags: 0x8000, open_flags: 0 };
    let create = abi::CreateIn { flags: CREATE_FLAGS, mode: 0o100_644, umask: 0o22, open_flags: 0 };
    let read = abi::ReadIn { fh: 3, offset: 4, size: 512, ..Default::default() };
    let write = abi::WriteIn { fh: 3, offset: 4096, size: 5, ..Default::default() };
    let fsync = abi::FsyncIn { fh: 3, fsync_flags: abi::fsync::FDATASYNC, padding: 0 };
    let release = abi::ReleaseIn { fh: 3, ..Default::default() };
    let xattr = abi::GetxattrIn { size: 100, padding: 0 };
    let forget = abi::ForgetOne { nodeid: 8, nlookup: 9 };
    let setattr = abi::SetattrIn {
        valid: fattr::MODE | fattr::SIZE | fattr::ATIME | fattr::MTIME | fattr::MTIME_NOW,
        size: 6,
        atime: 11,
        atimensec: 12,
        mode: 0o600,
        ..Default::default()
    };
    let copy = abi::CopyFileRangeIn {
        fh_in: 3,
        off_in: 4,
        nodeid_out: 5,
        fh_out: 6,
        off_out: 7,
        len: 8,
        flags: 0,
    };
    vec![
        init(u64::MAX),
        RawRequest::new(Opcode::Lookup).string("name"),
        of(Opcode::GetAttr).with(&abi::GetattrIn { getattr_flags: getattr::FH, dummy: 0, fh: 3 }),
        of(Opcode::SetAttr).with(&setattr),
        of(Opcode::ReadLink),
        of(Opcode::Symlink).string("name").string("../target"),
        of(Opcode::MkNod)
            .with(&abi::MknodIn { mode: 0o10_644, rdev: 5, ..Default::default() })
            .string("name"),
        of(Opcode::MkDir).with(&abi::MkdirIn { mode: 0o755, umask: 0o22 }).string("name"),
        of(Opcode::Unlink).string("name"),
        of(Opcode::RmDir).string("name"),
        of(Opcode::Rename).with(&abi::RenameIn { newdir: 3 }).string("from").string("to"),
        of(Opcode::Rename2)
            .with(&abi::Rename2In { newdir: 3, flags: 1, padding: 0 })
            .string("from")
            .string("to"),
        of(Opcode::Link).with(&abi::LinkIn { oldnodeid: 5 }).string("name"),
        of(Opcode::Open).with(&open),
        of(Opcode::Read).with(&read),
        of(Opcode::Write).with(&write).bytes(b"hello"),
        of(Opcode::StatFs),
        of(Opcode::Release).with(&release),
        of(Opcode::Fsync).with(&fsync),
        of(Opcode::SetXattr)
            .with(&abi::SetxattrIn { size: 5, flags: 1, ..Default::default() })
            .string("user.name")
            .bytes(b"value"),
        of(Opcode::GetXattr).with(&xattr).string("user.name"),
        of(Opcode::ListXattr).with(&xattr),
        of(Opcode::RemoveXattr).string("user.name"),
        of(Opcode::Flush).with(&abi::FlushIn { fh: 3, ..Default::default() }),
        of(Opcode::OpenDir).with(&open),
        of(Opcode::ReadDir).with(&read),
        of(Opcode::ReadDirPlus).with(&read),
        of(Opcode::ReleaseDir).with(&release),
        of(Opcode::FsyncDir).with(&fsync),
        of(Opcode::GetLk).with(&abi::LkIn::default()),
        of(Opcode::SetLk).with(&abi::LkIn::default()),
        of(Opcode::SetLkW).with(&abi::LkIn::default()),
        of(Opcode::Access).with(&abi::AccessIn { mask: 5, padding: 0 }),
        of(Opcode::Create).with(&create).string("name"),
        of(Opcode::TmpFile).with(&create).string("#1"),
        of(Opcode::Bmap).bytes(&[0; 16]),
        of(Opcode::Ioctl).bytes(&[0; 32]),
        of(Opcode::Poll).bytes(&[0; 24]),
        of(Opcode::Fallocate).with(&abi::FallocateIn {
            fh: 3,
            offset: 4,
            length: 5,
            mode: 1,
            padding: 0,
        }),
        of(Opcode::Lseek).with(&abi::LseekIn { fh: 3, offset: 4, whence: 3, padding: 0 }),
        of(Opcode::CopyFileRange).with(&copy),
        of(Opcode::SyncFs).with(&abi::SyncfsIn { padding: 0 }),
        of(Opcode::Statx).with(&abi::StatxIn {
            getattr_flags: getattr::FH,
            fh: 3,
            sx_mask: 0xfff,
            ..Default::default()
        }),
        of(Opcode::SetupMapping).bytes(&[0; 40]),
        of(Opcode::RemoveMapping).bytes(&[0; 24]),
        of(Opcode::Forget).with(&abi::ForgetIn { nlookup: 4 }),
        RawRequest::new(Opcode::BatchForget)
            .node(0)
            .with(&abi::BatchForgetIn { count: 2, dummy: 0 })
            .with(&forget)
            .with(&abi::ForgetOne { nodeid: 10, nlookup: 11 }),
        RawRequest::new(Opcode::Destroy).node(0),
    ]
}
