//! The FUSE protocol as the kernel speaks it: `include/uapi/linux/fuse.h`, version 7.41.
//!
//! Names and order are the kernel's. A test compares every offset, size and number with the header that
//! is installed.
#![allow(missing_docs, reason = "the fields are those of the kernel's header")]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol's version: only the major number can make two sides incompatible.
pub const KERNEL_VERSION: u32 = 7;
pub const KERNEL_MINOR_VERSION: u32 = 41;

/// The node id of the root.
pub const ROOT_ID: u64 = 1;

/// The size of [`SetxattrIn`] where SETXATTR_EXT was not negotiated.
pub const COMPAT_SETXATTR_IN_SIZE: usize = 8;

/// The size of [`InitIn`] up to 7.35, and the part of it that every kernel sends.
pub const COMPAT_INIT_IN_SIZE: usize = 16;

macro_rules! structs {
    ($($(#[$doc:meta])* $name:ident = $c:literal { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct $name { $(pub $field: $type,)* }
        )*

        /// Every structure: its name in C, its size, and its fields with their offsets.
        #[cfg(test)]
        pub(crate) const LAYOUTS: &[(&str, usize, &[(&str, usize)])] = &[$(
            ($c, size_of::<$name>(), &[$((stringify!($field), core::mem::offset_of!($name, $field)),)*]),
        )*];
    };
}

structs! {
    /// A file's attributes.
    Attr = "fuse_attr" {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        rdev: u32,
        blksize: u32,
        flags: u32,
    }
    /// A time of [`Statx`].
    SxTime = "fuse_sx_time" {
        tv_sec: i64,
        tv_nsec: u32,
        __reserved: i32,
    }
    /// Attributes as of statx(2).
    Statx = "fuse_statx" {
        mask: u32,
        blksize: u32,
        attributes: u64,
        nlink: u32,
        uid: u32,
        gid: u32,
        mode: u16,
        __spare0: [u16; 1],
        ino: u64,
        size: u64,
        blocks: u64,
        attributes_mask: u64,
        atime: SxTime,
        btime: SxTime,
        ctime: SxTime,
        mtime: SxTime,
        rdev_major: u32,
        rdev_minor: u32,
        dev_major: u32,
        dev_minor: u32,
        __spare2: [u64; 14],
    }
    /// Numbers of a filesystem.
    Kstatfs = "fuse_kstatfs" {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }
    /// A lock on a range of a file.
    FileLock = "fuse_file_lock" {
        start: u64,
        end: u64,
        type_: u32,
        pid: u32,
    }
    /// Reply to LOOKUP and whatever makes a name.
    EntryOut = "fuse_entry_out" {
        nodeid: u64,
        generation: u64,
        entry_valid: u64,
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr,
    }
    /// FORGET.
    ForgetIn = "fuse_forget_in" {
        nlookup: u64,
    }
    /// One entry of BATCH_FORGET.
    ForgetOne = "fuse_forget_one" {
        nodeid: u64,
        nlookup: u64,
    }
    /// BATCH_FORGET; entries follow.
    BatchForgetIn = "fuse_batch_forget_in" {
        count: u32,
        dummy: u32,
    }
    /// GETATTR.
    GetattrIn = "fuse_getattr_in" {
        getattr_flags: u32,
        dummy: u32,
        fh: u64,
    }
    /// Reply to GETATTR and SETATTR.
    AttrOut = "fuse_attr_out" {
        attr_valid: u64,
        attr_valid_nsec: u32,
        dummy: u32,
        attr: Attr,
    }
    /// STATX.
    StatxIn = "fuse_statx_in" {
        getattr_flags: u32,
        reserved: u32,
        fh: u64,
        sx_flags: u32,
        sx_mask: u32,
    }
    /// Reply to STATX.
    StatxOut = "fuse_statx_out" {
        attr_valid: u64,
        attr_valid_nsec: u32,
        flags: u32,
        spare: [u64; 2],
        stat: Statx,
    }
    /// MKNOD; the name follows.
    MknodIn = "fuse_mknod_in" {
        mode: u32,
        rdev: u32,
        umask: u32,
        padding: u32,
    }
    /// MKDIR; the name follows.
    MkdirIn = "fuse_mkdir_in" {
        mode: u32,
        umask: u32,
    }
    /// RENAME; both names follow.
    RenameIn = "fuse_rename_in" {
        newdir: u64,
    }
    /// RENAME2; both names follow.
    Rename2In = "fuse_rename2_in" {
        newdir: u64,
        flags: u32,
        padding: u32,
    }
    /// LINK; the new name follows.
    LinkIn = "fuse_link_in" {
        oldnodeid: u64,
    }
    /// SETATTR.
    SetattrIn = "fuse_setattr_in" {
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }
    /// OPEN and OPENDIR.
    OpenIn = "fuse_open_in" {
        flags: u32,
        open_flags: u32,
    }
    /// CREATE and TMPFILE; the name follows.
    CreateIn = "fuse_create_in" {
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32,
    }
    /// Reply to OPEN, OPENDIR and, after an [`EntryOut`], CREATE.
    OpenOut = "fuse_open_out" {
        fh: u64,
        open_flags: u32,
        backing_id: i32,
    }
    /// RELEASE and RELEASEDIR.
    ReleaseIn = "fuse_release_in" {
        fh: u64,
        flags: u32,
        release_flags: u32,
        lock_owner: u64,
    }
    /// FLUSH.
    FlushIn = "fuse_flush_in" {
        fh: u64,
        unused: u32,
        padding: u32,
        lock_owner: u64,
    }
    /// READ, READDIR and READDIRPLUS.
    ReadIn = "fuse_read_in" {
        fh: u64,
        offset: u64,
        size: u32,
        read_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }
    /// WRITE; the data follows.
    WriteIn = "fuse_write_in" {
        fh: u64,
        offset: u64,
        size: u32,
        write_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }
    /// Reply to WRITE and COPY_FILE_RANGE.
    WriteOut = "fuse_write_out" {
        size: u32,
        padding: u32,
    }
    /// FSYNC and FSYNCDIR.
    FsyncIn = "fuse_fsync_in" {
        fh: u64,
        fsync_flags: u32,
        padding: u32,
    }
    /// SETXATTR with SETXATTR_EXT; name and value follow.
    SetxattrIn = "fuse_setxattr_in" {
        size: u32,
        flags: u32,
        setxattr_flags: u32,
        padding: u32,
    }
    /// GETXATTR, where the name follows, and LISTXATTR.
    GetxattrIn = "fuse_getxattr_in" {
        size: u32,
        padding: u32,
    }
    /// Reply to GETXATTR and LISTXATTR with size 0.
    GetxattrOut = "fuse_getxattr_out" {
        size: u32,
        padding: u32,
    }
    /// GETLK, SETLK and SETLKW.
    LkIn = "fuse_lk_in" {
        fh: u64,
        owner: u64,
        lk: FileLock,
        lk_flags: u32,
        padding: u32,
    }
    /// Reply to GETLK.
    LkOut = "fuse_lk_out" {
        lk: FileLock,
    }
    /// ACCESS.
    AccessIn = "fuse_access_in" {
        mask: u32,
        padding: u32,
    }
    /// INIT.
    InitIn = "fuse_init_in" {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        flags2: u32,
        unused: [u32; 11],
    }
    /// Reply to INIT.
    InitOut = "fuse_init_out" {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        max_background: u16,
        congestion_threshold: u16,
        max_write: u32,
        time_gran: u32,
        max_pages: u16,
        map_alignment: u16,
        flags2: u32,
        max_stack_depth: u32,
        unused: [u32; 6],
    }
    /// INTERRUPT.
    InterruptIn = "fuse_interrupt_in" {
        unique: u64,
    }
    /// FALLOCATE.
    FallocateIn = "fuse_fallocate_in" {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
        padding: u32,
    }
    /// Before every request.
    InHeader = "fuse_in_header" {
        len: u32,
        opcode: u32,
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        total_extlen: u16,
        padding: u16,
    }
    /// Before every reply.
    OutHeader = "fuse_out_header" {
        len: u32,
        error: i32,
        unique: u64,
    }
    /// An entry of READDIR; the name follows, then zeros to a multiple of eight bytes.
    Dirent = "fuse_dirent" {
        ino: u64,
        off: u64,
        namelen: u32,
        type_: u32,
    }
    /// LSEEK.
    LseekIn = "fuse_lseek_in" {
        fh: u64,
        offset: u64,
        whence: u32,
        padding: u32,
    }
    /// Reply to LSEEK.
    LseekOut = "fuse_lseek_out" {
        offset: u64,
    }
    /// COPY_FILE_RANGE.
    CopyFileRangeIn = "fuse_copy_file_range_in" {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
        flags: u64,
    }
    /// SYNCFS.
    SyncfsIn = "fuse_syncfs_in" {
        padding: u64,
    }
}

macro_rules! opcodes {
    ($($name:ident = $number:literal,)*) => {
        /// What a request asks for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Opcode { $($name = $number,)* }

        impl Opcode {
            pub fn of(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];
        }
    };
}

opcodes! {
    Lookup = 1,
    Forget = 2,
    GetAttr = 3,
    SetAttr = 4,
    ReadLink = 5,
    Symlink = 6,
    MkNod = 8,
    MkDir = 9,
    Unlink = 10,
    RmDir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    StatFs = 17,
    Release = 18,
    Fsync = 20,
    SetXattr = 21,
    GetXattr = 22,
    ListXattr = 23,
    RemoveXattr = 24,
    Flush = 25,
    Init = 26,
    OpenDir = 27,
    ReadDir = 28,
    ReleaseDir = 29,
    FsyncDir = 30,
    GetLk = 31,
    SetLk = 32,
    SetLkW = 33,
    Access = 34,
    Create = 35,
    Interrupt = 36,
    Bmap = 37,
    Destroy = 38,
    Ioctl = 39,
    Poll = 40,
    NotifyReply = 41,
    BatchForget = 42,
    Fallocate = 43,
    ReadDirPlus = 44,
    Rename2 = 45,
    Lseek = 46,
    CopyFileRange = 47,
    SetupMapping = 48,
    RemoveMapping = 49,
    SyncFs = 50,
    TmpFile = 51,
    Statx = 52,
}

macro_rules! flags {
    ($($(#[$doc:meta])* $module:ident: $type:ty { $($name:ident = $bit:literal,)* })*) => {
        $(
            $(#[$doc])*
            pub mod $module { $(pub const $name: $type = 1 << $bit;)* }
        )*
        /// Every flag: its name in C without the prefix, and its value.
        #[cfg(test)]
        pub(crate) const FLAGS: &[(&str, &str, u64)] =
            &[$($((stringify!($module), stringify!($name), $module::$name as u64),)*)*];
    };
}

flags! {
    /// `FATTR_…`: what SETATTR changes.
    fattr: u32 {
        MODE = 0,
        UID = 1,
        GID = 2,
        SIZE = 3,
        ATIME = 4,
        MTIME = 5,
        FH = 6,
        ATIME_NOW = 7,
        MTIME_NOW = 8,
        LOCKOWNER = 9,
        CTIME = 10,
        KILL_SUIDGID = 11,
    }
    /// `FOPEN_…`: what the reply to OPEN allows the kernel.
    fopen: u32 {
        DIRECT_IO = 0,
        KEEP_CACHE = 1,
        NONSEEKABLE = 2,
        CACHE_DIR = 3,
        STREAM = 4,
        NOFLUSH = 5,
        PARALLEL_DIRECT_WRITES = 6,
        PASSTHROUGH = 7,
    }
    /// `FUSE_…`: what is negotiated by INIT; from bit 32 on in `flags2`.
    init: u64 {
        ASYNC_READ = 0,
        POSIX_LOCKS = 1,
        FILE_OPS = 2,
        ATOMIC_O_TRUNC = 3,
        EXPORT_SUPPORT = 4,
        BIG_WRITES = 5,
        DONT_MASK = 6,
        SPLICE_WRITE = 7,
        SPLICE_MOVE = 8,
        SPLICE_READ = 9,
        FLOCK_LOCKS = 10,
        HAS_IOCTL_DIR = 11,
        AUTO_INVAL_DATA = 12,
        DO_READDIRPLUS = 13,
        READDIRPLUS_AUTO = 14,
        ASYNC_DIO = 15,
        WRITEBACK_CACHE = 16,
        NO_OPEN_SUPPORT = 17,
        PARALLEL_DIROPS = 18,
        HANDLE_KILLPRIV = 19,
        POSIX_ACL = 20,
        ABORT_ERROR = 21,
        MAX_PAGES = 22,
        CACHE_SYMLINKS = 23,
        NO_OPENDIR_SUPPORT = 24,
        EXPLICIT_INVAL_DATA = 25,
        MAP_ALIGNMENT = 26,
        SUBMOUNTS = 27,
        HANDLE_KILLPRIV_V2 = 28,
        SETXATTR_EXT = 29,
        INIT_EXT = 30,
        SECURITY_CTX = 32,
        HAS_INODE_DAX = 33,
        CREATE_SUPP_GROUP = 34,
        HAS_EXPIRE_ONLY = 35,
        DIRECT_IO_ALLOW_MMAP = 36,
        PASSTHROUGH = 37,
        NO_EXPORT_SUPPORT = 38,
        HAS_RESEND = 39,
        ALLOW_IDMAP = 40,
    }
    /// `FUSE_RELEASE_…`.
    release: u32 {
        FLUSH = 0,
        FLOCK_UNLOCK = 1,
    }
    /// `FUSE_GETATTR_…`.
    getattr: u32 {
        FH = 0,
    }
    /// `FUSE_LK_…`.
    lk: u32 {
        FLOCK = 0,
    }
    /// `FUSE_WRITE_…`.
    write: u32 {
        CACHE = 0,
        LOCKOWNER = 1,
        KILL_SUIDGID = 2,
    }
    /// `FUSE_SETXATTR_…`.
    setxattr: u32 {
        ACL_KILL_SGID = 0,
    }
    /// `FUSE_FSYNC_…`.
    fsync: u32 {
        FDATASYNC = 0,
    }
    /// `FUSE_ATTR_…`.
    attr: u32 {
        SUBMOUNT = 0,
        DAX = 1,
    }
    /// `FUSE_OPEN_…`.
    open: u32 {
        KILL_SUIDGID = 0,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    /// The protocol in which something came, where that is later than what every header has.
    fn since(name: &str) -> u32 {
        let of = name.split('.').next().unwrap_or(name);
        match name {
            "fuse_open_out.backing_id" | "fuse_init_out.max_stack_depth" => 40,
            // It was longer.
            "fuse_init_out.unused" => 40,
            "FOPEN_PASSTHROUGH" | "FUSE_PASSTHROUGH" | "FUSE_NO_EXPORT_SUPPORT" => 40,
            "FUSE_HAS_RESEND" | "FUSE_ALLOW_IDMAP" => 41,
            "FUSE_CREATE_SUPP_GROUP" | "FUSE_DIRECT_IO_ALLOW_MMAP" | "FUSE_STATX" => 39,
            _ if matches!(
                of,
                "fuse_sx_time" | "fuse_statx" | "fuse_statx_in" | "fuse_statx_out"
            ) =>
            {
                39
            }
            _ => 0,
        }
    }

    /// C code that prints a line, where the header has the name.
    fn print(name: &str, line: &str) -> String {
        format!("#if FUSE_KERNEL_MINOR_VERSION >= {}\n{line}\n#endif\n", since(name))
    }

    /// Runs a C program that includes the kernel's header.
    fn run_c(body: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        let mut compiler = Command::new("cc")
            .args(["-x", "c", "-", "-o"])
            .arg(&program)
            .stdin(Stdio::piped())
            .spawn()
            .expect("cc is there: apt-get install gcc libc6-dev");
        let source = format!(
            "#include <stdio.h>\n#include <stddef.h>\n#include <linux/fuse.h>\n\
             int main(void) {{\n{body}return 0;\n}}\n"
        );
        compiler.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
        assert!(compiler.wait().unwrap().success(), "{source}");
        String::from_utf8(Command::new(program).output().unwrap().stdout).unwrap()
    }

    #[test]
    fn everything_is_as_in_the_kernels_header() {
        let c = |field: &str| field.trim_end_matches('_').replace("type_", "type").to_owned();
        let mut code = String::new();
        let mut wanted = Vec::new();
        let mut expect =
            |code: &mut String, name: &str, what: String, expression: String, value: u64| {
                let line =
                    format!("printf(\"{what} %llu\\n\", (unsigned long long)({expression}));");
                code.push_str(&print(name, &line));
                wanted.push((name.to_owned(), format!("{what} {value}")));
            };
        for (name, size, fields) in LAYOUTS {
            let what = format!("sizeof_{name}");
            expect(&mut code, name, what, format!("sizeof(struct {name})"), *size as u64);
            for (field, offset) in *fields {
                let field = if field.starts_with("__") { (*field).to_owned() } else { c(field) };
                let expression = format!("offsetof(struct {name}, {field})");
                let name = format!("{name}.{field}");
                expect(&mut code, &name, name.clone(), expression, *offset as u64);
            }
        }
        for (module, flag, value) in FLAGS {
            let prefix = match *module {
                "fattr" => "FATTR_".to_owned(),
                "fopen" => "FOPEN_".to_owned(),
                "init" => "FUSE_".to_owned(),
                module => format!("FUSE_{}_", module.to_uppercase()),
            };
            let name = format!("{prefix}{flag}");
            expect(&mut code, &name, name.clone(), name.clone(), *value);
        }
        for opcode in Opcode::ALL {
            let name = format!("FUSE_{}", format!("{opcode:?}").to_uppercase());
            // Rust's names of some have more capitals than words.
            let name = match name.as_str() {
                "FUSE_BATCHFORGET" => "FUSE_BATCH_FORGET".to_owned(),
                "FUSE_NOTIFYREPLY" => "FUSE_NOTIFY_REPLY".to_owned(),
                "FUSE_COPYFILERANGE" => "FUSE_COPY_FILE_RANGE".to_owned(),
                _ => name,
            };
            expect(&mut code, &name, name.clone(), name.clone(), *opcode as u64);
            assert_eq!(Opcode::of(*opcode as u32), Some(*opcode));
        }
        code.push_str("printf(\"minor %d\\n\", FUSE_KERNEL_MINOR_VERSION);\n");
        let printed = run_c(&code);
        let printed: Vec<&str> = printed.lines().collect();
        let minor: u32 = printed.last().unwrap().trim_start_matches("minor ").parse().unwrap();
        let (mut checked, mut newer) = (0, 0);
        for (name, line) in &wanted {
            if since(name) > minor {
                newer += 1;
            } else {
                assert!(printed.contains(&line.as_str()), "not `{line}` in the header: {name}");
                checked += 1;
            }
        }
        assert!(checked > 300, "{checked} were compared, {newer} are newer than the header");
    }
}
