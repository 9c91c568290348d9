//! Requests as bytes, from a guest that leaves nothing untried. A kernel would filter most of them.

use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, RenameFlags, mkfifoat, mknodat, renameat_with};
use zerocopy::{Immutable, IntoBytes};

use super::mounts::{Mounted, with_own_mounts};
use super::*;
use crate::abi::{Opcode, fattr};
use crate::server::Server;
use crate::testing::{RawRequest, Reply, init as init_request};

/// How long a race goes on, and how long it may take to become one where the machine is busy.
const RACE: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(120);

/// How many requests of a race are to be done, and to be refused.
const WANTED: usize = 100;

const SECRET: &str = "outside";

/// A shared directory, next to which something lies.
struct Guest {
    dir: TempDir,
    server: Server<Passthrough>,
    /// How many requests of a race were done, and how many were refused.
    done: [AtomicUsize; 2],
}

impl Guest {
    fn new(config: PassthroughConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["share", "share/dir", "canary", "canary/sub"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("canary/secret"), SECRET).unwrap();
        fs::write(dir.path().join("canary/file"), SECRET).unwrap();
        fs::write(dir.path().join("share/dir/file"), "inside").unwrap();
        let server = Self::serve(&dir.path().join("share"), config);
        Self { dir, server, done: Default::default() }
    }

    fn serve(root: &Path, config: PassthroughConfig) -> Server<Passthrough> {
        let server = Server::new(Passthrough::new(root, config).unwrap());
        assert_eq!(init_request(u64::MAX).serve(&server, 64).unwrap().error, 0);
        server
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn ask(&self, request: RawRequest) -> Result<Reply> {
        ask(&self.server, request)
    }

    fn lookup(&self, parent: u64, name: &str) -> Result<u64> {
        lookup(&self.server, parent, name)
    }

    fn node(&self, path: &str) -> u64 {
        path.split('/').fold(1, |parent, name| self.lookup(parent, name).unwrap())
    }

    fn is_untouched(&self) {
        let mut names: Vec<_> = fs::read_dir(self.path("canary"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["file", "secret", "sub"]);
        assert_eq!(fs::read_dir(self.path("canary/sub")).unwrap().count(), 0);
        for file in ["canary/file", "canary/secret"] {
            let metadata = self.path(file).metadata().unwrap();
            assert_eq!((metadata.mode() & 0o7777, metadata.nlink()), (0o644, 1), "{file}");
            assert_eq!(metadata.uid(), me().uid);
            assert_eq!(fs::read_to_string(self.path(file)).unwrap(), SECRET);
            assert_eq!(rustix::fs::listxattr(self.path(file), &mut [0_u8; 0][..]), Ok(0));
        }
    }

    /// Everything that can be done to what is in a directory; whatever comes of it.
    fn try_everything(&self, dir: u64, known: &str, round: usize) {
        let name = |what: &str| format!("{what}-{}", round % 8);
        for request in changes_in(dir, known, &name("new")) {
            let reply = self.ask(request);
            self.done[usize::from(reply.is_err())].fetch_add(1, Ordering::Relaxed);
            assert!(!reply.is_ok_and(|reply| contains(&reply, SECRET.as_bytes())));
        }
        for name in ["file", "secret", &name("new")] {
            let Ok(file) = self.lookup(dir, name) else { continue };
            assert_ne!(name, "secret", "found what is outside");
            for request in changes_of(file) {
                let _ = self.ask(request);
            }
            for flags in [OFlags::RDONLY, OFlags::RDWR | OFlags::TRUNC] {
                let Ok(handle) = self.open(file, flags) else { continue };
                let read = self.read(file, handle).unwrap();
                assert!(!contains(&read, SECRET.as_bytes()), "read what is outside");
                self.ask(of(Opcode::Release, file, &release(handle))).unwrap();
            }
        }
        let _ = self.ask(of(Opcode::GetXattr, dir, &abi::GetxattrIn::default()).string("user.a"));
        if let Ok(reply) = self.ask(of(Opcode::OpenDir, dir, &abi::OpenIn::default())) {
            let fh = reply.get::<abi::OpenOut>().fh;
            for opcode in [Opcode::ReadDir, Opcode::ReadDirPlus] {
                let asked = abi::ReadIn { fh, size: 4096, ..Default::default() };
                let listed = self.ask(of(opcode, dir, &asked));
                assert!(!listed.is_ok_and(|listed| contains(&listed, b"secret")), "listed it");
            }
            self.ask(of(Opcode::ReleaseDir, dir, &release(fh))).unwrap();
        }
    }

    fn open(&self, node: u64, flags: OFlags) -> Result<u64> {
        let asked = abi::OpenIn { flags: flags.bits(), open_flags: 0 };
        Ok(self.ask(of(Opcode::Open, node, &asked))?.get::<abi::OpenOut>().fh)
    }

    fn read(&self, node: u64, fh: u64) -> Result<Reply> {
        self.ask(of(Opcode::Read, node, &abi::ReadIn { fh, size: 4096, ..Default::default() }))
    }
}

fn ask(server: &Server<Passthrough>, request: RawRequest) -> Result<Reply> {
    let reply = request.by(me().uid, me().gid).serve(server, 8192).unwrap();
    if reply.error == 0 { Ok(reply) } else { Err(Errno::from_raw_os_error(-reply.error)) }
}

fn lookup(server: &Server<Passthrough>, parent: u64, name: &str) -> Result<u64> {
    let reply = ask(server, RawRequest::new(Opcode::Lookup).node(parent).string(name))?;
    match reply.get::<abi::EntryOut>().nodeid {
        0 => Err(Errno::NOENT),
        node => Ok(node),
    }
}

fn of(opcode: Opcode, node: u64, arguments: &(impl IntoBytes + Immutable)) -> RawRequest {
    RawRequest::new(opcode).node(node).with(arguments)
}

fn release(fh: u64) -> abi::ReleaseIn {
    abi::ReleaseIn { fh, ..Default::default() }
}

fn contains(reply: &Reply, bytes: &[u8]) -> bool {
    reply.body.windows(bytes.len()).any(|window| window == bytes)
}

/// Everything that takes a directory. `known` is a name that may be in it, `new` one that may be made.
fn changes_in(dir: u64, known: &str, new: &str) -> Vec<RawRequest> {
    let flags = (OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC).bits();
    let create = abi::CreateIn { flags, mode: 0o100_666, ..Default::default() };
    let mode = FileType::RegularFile.as_raw_mode() | 0o666;
    let file = abi::MknodIn { mode, ..Default::default() };
    let rename = |newdir| abi::Rename2In { newdir, flags: 0, padding: 0 };
    let at = |opcode| RawRequest::new(opcode).node(dir);
    vec![
        at(Opcode::Create).with(&create).string(new),
        at(Opcode::TmpFile).with(&create).string("#1"),
        at(Opcode::MkNod).with(&file).string(format!("node-{new}")),
        at(Opcode::MkDir).with(&abi::MkdirIn { mode: 0o777, umask: 0 }).string(format!("d-{new}")),
        at(Opcode::Symlink).string(format!("link-{new}")).string("/"),
        at(Opcode::Link).with(&abi::LinkIn { oldnodeid: 1 }).string("root"),
        at(Opcode::Rename2).with(&rename(dir)).string(new).string(format!("moved-{new}")),
        at(Opcode::Rename2).with(&rename(1)).string("secret").string("stolen"),
        at(Opcode::Rename2).with(&rename(dir)).string(known).string("other"),
        at(Opcode::Rename2).with(&rename(dir)).string("other").string(known),
        at(Opcode::Unlink).string("secret"),
        at(Opcode::RmDir).string("sub"),
        at(Opcode::RmDir).string(format!("d-{new}")),
    ]
}

/// Everything that changes the file of a node without opening it.
fn changes_of(node: u64) -> Vec<RawRequest> {
    let set = |valid, size| abi::SetattrIn { valid, size, mode: 0o640, ..Default::default() };
    let xattr = abi::SetxattrIn { size: 1, ..Default::default() };
    vec![
        of(Opcode::SetAttr, node, &set(fattr::MODE, 0)),
        of(Opcode::SetAttr, node, &set(fattr::SIZE, 3)),
        of(Opcode::SetAttr, node, &set(fattr::MTIME | fattr::MTIME_NOW, 0)),
        of(Opcode::SetXattr, node, &xattr).string("user.a").bytes(b"1"),
        RawRequest::new(Opcode::RemoveXattr).node(node).string("user.a"),
    ]
}

#[test]
fn a_symbolic_link_is_followed_by_no_request() {
    let guest = Guest::new(PassthroughConfig::default());
    symlink("../canary", guest.path("share/link")).unwrap();
    symlink(guest.path("canary/secret"), guest.path("share/to-file")).unwrap();
    let (link, dir) = (guest.node("link"), guest.node("dir"));
    assert_eq!(guest.lookup(link, "secret"), Err(Errno::NOTDIR));
    for request in changes_in(link, "file", "new") {
        let refused = guest.ask(request.clone()).unwrap_err();
        // A directory gets no other name, wherever.
        assert!(matches!(refused, Errno::NOTDIR | Errno::PERM), "{refused} {request:?}");
    }
    let into = abi::Rename2In { newdir: link, flags: 0, padding: 0 };
    let into = of(Opcode::Rename2, dir, &into).string("file").string("new");
    assert_eq!(guest.ask(into), Err(Errno::NOTDIR));
    let entry = of(Opcode::Link, link, &abi::LinkIn { oldnodeid: guest.node("dir/file") });
    assert_eq!(guest.ask(entry.string("new")), Err(Errno::NOTDIR));
    assert_eq!(guest.ask(of(Opcode::OpenDir, link, &abi::OpenIn::default())), Err(Errno::NOTDIR));
    let to_file = guest.node("to-file");
    for flags in [RDONLY, RDWR, OFlags::WRONLY | OFlags::TRUNC, OFlags::PATH, OFlags::NOFOLLOW] {
        assert_eq!(guest.open(to_file, flags), Err(Errno::LOOP), "{flags:?}");
    }
    for request in changes_of(to_file) {
        let _ = guest.ask(request);
    }
    guest.is_untouched();
    // A link to the link is one to where it leads from, not to.
    let link2 = of(Opcode::Link, 1, &abi::LinkIn { oldnodeid: to_file }).string("link2");
    assert_eq!(guest.ask(link2).unwrap().get::<abi::EntryOut>().nodeid, to_file);
    assert!(guest.path("share/link2").is_symlink());
}

#[test]
fn what_was_swapped_between_look_up_and_use_is_stale() {
    let guest = Guest::new(PassthroughConfig::default());
    let (dir, file) = (guest.node("dir"), guest.node("dir/file"));
    fs::rename(guest.path("share/dir"), guest.path("share/was")).unwrap();
    symlink("../canary", guest.path("share/dir")).unwrap();
    guest.server.filesystem().cache.clear();
    assert_eq!(guest.open(file, RDWR), Err(Errno::STALE));
    assert_eq!(guest.ask(of(Opcode::OpenDir, dir, &abi::OpenIn::default())), Err(Errno::STALE));
    assert_eq!(guest.lookup(dir, "secret"), Err(Errno::STALE));
    for request in changes_in(dir, "file", "new").into_iter().chain(changes_of(file)) {
        let refused = guest.ask(request.clone()).unwrap_err();
        assert!(matches!(refused, Errno::STALE | Errno::PERM), "{refused} {request:?}");
    }
    guest.is_untouched();
}

/// A FIFO, with both ends open: whoever opens it succeeds, and does not wait.
fn fifo(path: &Path) -> OwnedFd {
    mkfifoat(CWD, path, Mode::from(0o666)).unwrap();
    open(path, RDWR | OFlags::NONBLOCK, Mode::empty()).unwrap()
}

#[test]
fn a_file_that_becomes_special_is_not_opened() {
    let guest = Guest::new(PassthroughConfig::default());
    let path = guest.path("share/dir/file");
    let file = guest.node("dir/file");
    fs::remove_file(&path).unwrap();
    let _open = fifo(&path);
    for flags in [RDONLY, OFlags::WRONLY, RDWR] {
        assert_eq!(guest.open(file, flags), Err(Errno::STALE));
    }
    let flags = (OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC).bits();
    let create = abi::CreateIn { flags, mode: 0o100_666, ..Default::default() };
    let create = of(Opcode::Create, guest.node("dir"), &create).string("file");
    assert_eq!(guest.ask(create.clone()), Err(Errno::NXIO));
    if is_root() {
        fs::remove_file(&path).unwrap();
        // /dev/mem, which the host's root could open.
        let device = rustix::fs::makedev(1, 1);
        mknodat(CWD, &path, FileType::CharacterDevice, Mode::from(0o666), device).unwrap();
        assert!(path.metadata().unwrap().file_type().is_char_device());
        assert_eq!(guest.open(file, RDONLY), Err(Errno::STALE));
        let node = guest.node("dir/file");
        for flags in [RDONLY, OFlags::WRONLY, RDWR] {
            assert_eq!(guest.open(node, flags), Err(Errno::NXIO));
        }
        assert_eq!(guest.ask(create), Err(Errno::NXIO));
    }
}

#[test]
fn a_node_is_not_what_came_in_its_place() {
    let guest = Guest::new(PassthroughConfig::default());
    let (dir, old) = (guest.node("dir"), guest.node("dir/file"));
    guest.ask(RawRequest::new(Opcode::Unlink).node(dir).string("file")).unwrap();
    for _ in 0..20 {
        fs::write(guest.path("share/dir/file"), "new").unwrap();
        let new = guest.node("dir/file");
        assert_ne!(new, old);
        let reply = guest.open(old, RDONLY).and_then(|handle| guest.read(old, handle));
        // It is kept, and what was made of it.
        assert!(reply.unwrap().body.starts_with(b"ins"));
        for request in changes_of(old) {
            let _ = guest.ask(request);
        }
        assert_eq!(fs::read_to_string(guest.path("share/dir/file")).unwrap(), "new");
        fs::remove_file(guest.path("share/dir/file")).unwrap();
    }
}

#[test]
fn handles_run_out_and_come_back() {
    let guest = Guest::new(PassthroughConfig { max_handles: 4, ..Default::default() });
    let (dir, file) = (guest.node("dir"), guest.node("dir/file"));
    let open = |_| guest.open(file, RDONLY).unwrap();
    let handles: Vec<u64> = (0..4).map(open).collect();
    let full = Err(Errno::MFILE);
    assert_eq!(guest.open(file, RDWR | OFlags::TRUNC), full);
    assert_eq!(guest.ask(of(Opcode::OpenDir, dir, &abi::OpenIn::default())), Err(Errno::MFILE));
    for request in &changes_in(dir, "file", "new")[..2] {
        assert_eq!(guest.ask(request.clone()), Err(Errno::MFILE), "{request:?}");
    }
    assert_eq!(fs::read_dir(guest.path("share/dir")).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(guest.path("share/dir/file")).unwrap(), "inside");
    guest.ask(of(Opcode::Release, file, &release(handles[2]))).unwrap();
    assert_eq!(guest.ask(of(Opcode::Release, file, &release(handles[2]))), Err(Errno::BADF));
    open(0);
    assert_eq!(guest.open(file, RDONLY), full);
}

#[test]
fn magic_links_of_proc_lead_nowhere() {
    let config = PassthroughConfig { read_only: true, ..Default::default() };
    let server = Guest::serve(Path::new("/proc/self"), config);
    let flags = |flags: OFlags| abi::OpenIn { flags: flags.bits(), open_flags: 0 };
    for name in ["root", "cwd", "exe"] {
        let node = lookup(&server, 1, name).unwrap();
        assert_eq!(lookup(&server, node, "etc"), Err(Errno::NOTDIR), "{name}");
        let opened = ask(&server, of(Opcode::OpenDir, node, &flags(RDONLY)));
        assert_eq!(opened, Err(Errno::NOTDIR), "{name}");
        let opened = ask(&server, of(Opcode::Open, node, &flags(RDONLY)));
        assert_eq!(opened, Err(Errno::LOOP), "{name}");
    }
    // The descriptors of this process, that of the share itself among them.
    let fd = lookup(&server, 1, "fd").unwrap();
    for number in 0..64 {
        let Ok(node) = lookup(&server, fd, &number.to_string()) else { continue };
        assert_eq!(lookup(&server, node, ".cargo"), Err(Errno::NOTDIR), "{number}");
        let opened = ask(&server, of(Opcode::Open, node, &flags(RDONLY)));
        assert!(matches!(opened, Err(Errno::LOOP | Errno::STALE)), "{number}: {opened:?}");
    }
}

#[test]
fn what_is_mounted_over_a_directory_is_not_that_directory() {
    let name = "passthrough::tests::raw::what_is_mounted_over_a_directory_is_not_that_directory";
    with_own_mounts(name, || {
        let guest = Guest::new(PassthroughConfig::default());
        let (dir, file) = (guest.node("dir"), guest.node("dir/file"));
        let mounted = Mounted::bind(&guest.path("canary"), &guest.path("share/dir"));
        guest.server.filesystem().cache.clear();
        assert_eq!(guest.open(file, RDWR), Err(Errno::STALE));
        assert_eq!(guest.lookup(dir, "secret"), Err(Errno::STALE));
        // What the host mounts into a share is a part of it, as another directory.
        let there = guest.node("dir");
        assert_ne!(there, dir);
        assert!(guest.lookup(there, "secret").is_ok());
        drop(mounted);
        guest.server.filesystem().cache.clear();
        assert_eq!(guest.lookup(there, "secret"), Err(Errno::STALE));
        assert_eq!((guest.node("dir"), guest.node("dir/file")), (dir, file));
    });
}

#[test]
fn the_parent_of_the_root_is_not_told() {
    let guest = Guest::new(PassthroughConfig::default());
    let opened = guest.ask(of(Opcode::OpenDir, 1, &abi::OpenIn::default())).unwrap();
    let fh = opened.get::<abi::OpenOut>().fh;
    let outside = guest.dir.path().metadata().unwrap().ino();
    for opcode in [Opcode::ReadDir, Opcode::ReadDirPlus] {
        let asked = abi::ReadIn { fh, size: 4096, ..Default::default() };
        let listed = guest.ask(of(opcode, 1, &asked)).unwrap();
        assert!(!contains(&listed, &outside.to_ne_bytes()), "{opcode:?}");
    }
}

/// Runs the guest's part while the host swaps two names as fast as it can.
fn race(guest: &Guest, names: [&str; 2], part: impl Fn(usize)) {
    let done = AtomicBool::new(false);
    let [one, other] = names.map(|name| guest.path(name));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).unwrap();
            }
        });
        // Also when an assertion fails.
        let _end = End(&done);
        let begin = Instant::now();
        for round in 0.. {
            let counts = || guest.done.iter().map(|count| count.load(Ordering::Relaxed));
            let limit = if counts().all(|count| count > WANTED) { RACE } else { PATIENCE };
            if begin.elapsed() > limit {
                break;
            }
            if round % 2 == 0 {
                guest.server.filesystem().cache.clear();
            }
            part(round);
        }
    });
    let done = guest.done.each_ref().map(|count| count.swap(0, Ordering::Relaxed));
    assert!(done.iter().all(|count| *count > WANTED), "it was no race: {done:?}");
}

struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_directory_that_is_a_link_in_turn_leads_nowhere() {
    let guest = Guest::new(PassthroughConfig::default());
    symlink("../canary", guest.path("share/link")).unwrap();
    race(&guest, ["share/dir", "share/link"], |round| {
        for name in ["dir", "link"] {
            if let Ok(dir) = guest.lookup(1, name) {
                guest.try_everything(dir, "file", round);
            }
        }
    });
    guest.is_untouched();
    assert!(!guest.path("share/stolen").exists());
}

#[test]
fn a_directory_that_is_outside_in_turn_takes_nothing_along() {
    let guest = Guest::new(PassthroughConfig::default());
    // The host moves the directory out of the share and back, and a link in its place.
    symlink("../canary", guest.path("link")).unwrap();
    race(&guest, ["share/dir", "link"], |round| {
        if let Ok(dir) = guest.lookup(1, "dir") {
            guest.try_everything(dir, "file", round);
        }
    });
    guest.is_untouched();
}

#[test]
fn a_file_that_is_a_link_or_special_in_turn_leads_nowhere() {
    let guest = Guest::new(PassthroughConfig::default());
    symlink("../../canary/file", guest.path("share/dir/link")).unwrap();
    let _open = fifo(&guest.path("share/dir/fifo"));
    let dir = guest.node("dir");
    for other in ["share/dir/link", "share/dir/fifo"] {
        race(&guest, ["share/dir/file", other], |round| guest.try_everything(dir, "none", round));
        guest.is_untouched();
    }
}
