//! Both ends against each other, and the receiving one against streams that no sender makes.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};
use tempfile::TempDir;
use vmlab_wire::tree::{MAX_DATA, MAX_DEPTH, Meta};

use super::*;

const META: Meta = Meta { mode: 0o755, mtime_s: 1_000_000_000, mtime_ns: 123_456_789 };

fn set_time(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// All that is copied of what is at a path, by paths from there.
fn picture(root: &Path) -> BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)> {
    let mut seen = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let stat = path.symlink_metadata().unwrap();
        let content = if stat.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        } else if stat.is_symlink() {
            fs::read_link(&path).unwrap().into_os_string().into_vec()
        } else {
            // Nobody wants to read hundreds of megabytes where two differ.
            let content = fs::read(&path).unwrap();
            let mut hasher = std::hash::DefaultHasher::new();
            content.hash(&mut hasher);
            format!("{} bytes, hash {:x}", content.len(), hasher.finish()).into_bytes()
        };
        let mode = if stat.is_symlink() { 0 } else { stat.mode() };
        let below = path.strip_prefix(root).unwrap().to_owned();
        seen.insert(below, (mode, stat.mtime(), stat.mtime_nsec(), content));
    }
    seen
}

fn copy(source: &Path, target: &Path) -> Result<(), CopyError> {
    let mut stream = Vec::new();
    send(source, &mut stream)?;
    receive(&*stream, target, own_name(source))
}

/// A directory with everything in it that can be copied.
fn tree(at: &Path) {
    fs::create_dir(at).unwrap();
    fs::write(at.join("empty"), "").unwrap();
    let bytes: Vec<u8> = (0..300_000_u32).flat_map(|n| n.to_le_bytes()).collect();
    fs::write(at.join("large"), bytes).unwrap();
    fs::create_dir_all(at.join("a/b/nothing in here")).unwrap();
    fs::write(at.join("a/b").join(OsStr::from_bytes(b"\xff\n\x01 -rf")), "odd").unwrap();
    fs::write(at.join("x".repeat(255)), "long").unwrap();
    symlink("../outside/nowhere", at.join("a/link")).unwrap();
    symlink("a", at.join("to a directory")).unwrap();
    // As long as XFS has them.
    symlink("t".repeat(1023), at.join("a/far")).unwrap();
    let mut sparse = fs::File::create(at.join("sparse")).unwrap();
    sparse.seek(SeekFrom::Start(8 << 20)).unwrap();
    sparse.write_all(b"middle").unwrap();
    sparse.set_len(32 << 20).unwrap();
    for (name, mode) in [("empty", 0o440), ("large", 0o751), ("a/b", 0o1777), ("a", 0o710)] {
        fs::set_permissions(at.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    for (n, name) in
        ["empty", "a/link", "a/b/nothing in here", "a", "sparse", ""].iter().enumerate()
    {
        set_time(&at.join(name), n as i64 * 1000 - 1500, 987_654_321 - n as i64);
    }
}

#[test]
fn trees_are_the_same_on_the_other_side() {
    let dir = TempDir::new().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    tree(&from);
    copy(&from, &to).unwrap();
    assert_eq!(picture(&from), picture(&to));
    let blocks = to.join("sparse").metadata().unwrap().blocks();
    assert!(blocks < 1024, "{blocks} blocks of a file of holes");
    // A second time, it goes inside; and there once more, over what is there, where directories stay.
    copy(&from, &to).unwrap();
    assert_eq!(picture(&from), picture(&to.join("from")));
    copy(&from, &to).unwrap();
    let but_for_times = |root: &Path| {
        let picture = picture(root).into_iter();
        picture.map(|(path, (mode, .., content))| (path, mode, content)).collect::<Vec<_>>()
    };
    assert_eq!(but_for_times(&from), but_for_times(&to.join("from")));
    let within = from.join(".");
    fs::create_dir(dir.path().join("filled")).unwrap();
    copy(&within, &dir.path().join("filled")).unwrap();
    assert_eq!(
        picture(&from).keys().collect::<Vec<_>>(),
        picture(&dir.path().join("filled")).keys().collect::<Vec<_>>()
    );
}

#[test]
fn directories_that_cannot_be_written_to_are_filled_first() {
    let dir = TempDir::new().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::write(from.join("file"), "x").unwrap();
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(&from, 0o555);
    let copied = copy(&from, &to);
    let (left, right) = (picture(&from), picture(&to));
    [from, to].iter().for_each(|path| mode(path, 0o755));
    copied.unwrap();
    assert_eq!(left, right);
}

#[test]
fn files_go_where_cp_would_put_them() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), "new").unwrap();
    fs::set_permissions(at("file"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::create_dir(at("dir")).unwrap();
    symlink("dir", at("to dir")).unwrap();
    symlink("file", at("to file")).unwrap();
    copy(&at("file"), &at("other")).unwrap();
    copy(&at("file"), &at("dir")).unwrap();
    copy(&at("to file"), &at("to dir")).unwrap();
    for name in ["other", "dir/file", "dir/to file"] {
        let stat = at(name).symlink_metadata().unwrap();
        assert!(stat.is_file(), "{name}");
        // Whose rights the set-user-ID bit would give is another one.
        assert_eq!(stat.mode() & 0o7777, 0o755, "{name}");
        assert_eq!(fs::read(at(name)).unwrap(), b"new");
    }
    // What is in its place is replaced, and where a link leads is left alone.
    fs::write(at("kept"), "kept").unwrap();
    fs::remove_file(at("other")).unwrap();
    symlink("kept", at("other")).unwrap();
    copy(&at("file"), &at("other")).unwrap();
    assert_eq!(fs::read(at("kept")).unwrap(), b"kept");
    assert_eq!(fs::read(at("other")).unwrap(), b"new");
    assert!(!at("other").is_symlink());

    let message = |source: &str, target: &str| {
        let error = copy(&at(source), &at(target)).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        (error.to_string(), cause)
    };
    let (error, cause) = message("file", "no/such/place");
    assert!(error.ends_with("/no/such"), "{error}");
    assert!(cause.contains("No such file"), "{cause}");
    let (error, cause) = message("gone", "other");
    assert!(error.starts_with("cannot open ") && error.ends_with("/gone"), "{error}");
    assert!(cause.contains("No such file"), "{cause}");
    // Neither kind takes the other's place.
    fs::create_dir(at("dir2")).unwrap();
    fs::create_dir(at("dir2/file")).unwrap();
    let (error, cause) = message("file", "dir2");
    assert!(error.ends_with("/dir2/file") && cause.contains("Is a directory"), "{error}: {cause}");
    let (error, cause) = message("dir", "kept");
    assert!(error.ends_with("/kept") && cause.contains("Not a directory"), "{error}: {cause}");
}

#[test]
fn names_are_those_of_the_last_part() {
    for (path, name) in [
        ("/a/b", Some("b")),
        ("/a/b//", Some("b")),
        ("b", Some("b")),
        ("/a/.", None),
        ("/a/./", None),
        ("..", None),
        ("/", None),
    ] {
        assert_eq!(own_name(Path::new(path)), name.map(OsStr::new), "{path}");
    }
}

#[test]
fn files_of_the_kernels_are_read_to_their_end() {
    let dir = TempDir::new().unwrap();
    for name in ["/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled"] {
        copy(Path::new(name), &dir.path().join("x")).unwrap();
        assert_eq!(fs::read(dir.path().join("x")).unwrap(), fs::read(name).unwrap(), "{name}");
    }
}

#[test]
fn special_files_are_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let pipe = dir.path().join("from/pipe");
    fs::create_dir(dir.path().join("from")).unwrap();
    rustix::fs::mknodat(CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (source, words) in [
        (&dir.path().join("from"), "cannot copy the named pipe "),
        (&pipe, "cannot copy the named pipe "),
        (&socket, "cannot copy the socket "),
        (&PathBuf::from("/dev/null"), "cannot copy the character device /dev/null"),
    ] {
        let mut stream = Vec::new();
        let error = send(source, &mut stream).unwrap_err();
        assert!(error.to_string().starts_with(words), "{error}");
        // The other end is told the same.
        let told = receive(&*stream, &dir.path().join("to"), None).unwrap_err();
        assert_eq!(told.to_string(), format!("the other end {error}"));
    }
}

fn stream(records: &[Record<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    records.iter().for_each(|record| record.encode(&mut bytes));
    bytes
}

/// Where a receiver may write, beside what it must not touch.
struct Scene {
    dir: TempDir,
}

impl Scene {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("into")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/file"), "untouched").unwrap();
        Self { dir }
    }

    /// Receives, and sees that all but the destination is as it was.
    fn receive(&self, records: &[Record<'_>]) -> Result<(), CopyError> {
        let all = || {
            let mut all = picture(self.dir.path());
            all.retain(|path, _| !path.starts_with("into"));
            all
        };
        let before = all();
        let received = receive(&*stream(records), &self.dir.path().join("into"), None);
        assert_eq!(all(), before, "{records:?}");
        received
    }
}

#[test]
fn nothing_is_written_outside() {
    let dir = Record::Dir(META, b"");
    let file = |name| Record::File(META, name);
    let link = |name, target| Record::Symlink { meta: META, name, target };
    let (data, end) = (Record::Data(b"evil"), Record::End);
    let absolute = Scene::new();
    let outside = absolute.dir.path().join("outside").into_os_string().into_vec();
    let refused: [&[Record<'_>]; 15] = [
        &[dir, file(b"../outside/file"), data, end, end, Record::Done],
        &[dir, file(b".."), data, end, end, Record::Done],
        &[dir, file(b"/etc/vmlab-evil"), data, end, end, Record::Done],
        &[dir, file(b""), data, end, end, Record::Done],
        &[dir, file(b"a\0b"), data, end, end, Record::Done],
        &[dir, Record::Dir(META, b".."), Record::Dir(META, b"outside"), end, end, end],
        &[dir, link(b"l", b"../outside"), Record::Dir(META, b"l"), file(b"file"), data, end],
        &[dir, link(b"l", &outside), Record::Dir(META, b"l"), file(b"file"), data, end],
        &[dir, end, end, file(b"x"), data, end],
        &[dir, link(b"..", b"x"), end, Record::Done],
        &[link(b"", b"../outside"), Record::Done],
        &[dir, data],
        &[file(b""), data, end, Record::Done],
        &[dir, Record::Dir(META, b""), end, end, Record::Done],
        &[Record::Done],
    ];
    for records in refused {
        let error = Scene::new().receive(records).unwrap_err();
        assert!(
            matches!(error, CopyError::Malformed(_) | CopyError::Here { .. }),
            "{records:?}: {error:?}"
        );
    }
    // A file in the place of a link replaces the link.
    let scene = Scene::new();
    let records = [dir, link(b"l", b"../outside/file"), file(b"l"), data, end, end, Record::Done];
    scene.receive(&records).unwrap();
    assert_eq!(fs::read(scene.dir.path().join("into/l")).unwrap(), b"evil");
    // So does one that was there before.
    symlink("../outside", scene.dir.path().join("into/d")).unwrap();
    let records = [dir, Record::Dir(META, b"d"), file(b"file"), data, end, end, end, Record::Done];
    let error = scene.receive(&records).unwrap_err();
    assert!(error.to_string().ends_with("into/d"), "{error}");
}

#[test]
fn what_is_sent_without_end_is_bounded() {
    let scene = Scene::new();
    let endless = vec![Record::Dir(META, b"d"); MAX_DEPTH + 1];
    let records: Vec<_> = [Record::Dir(META, b"")].into_iter().chain(endless).collect();
    let error = scene.receive(&records).unwrap_err();
    assert!(matches!(error, CopyError::Malformed(TreeError::Depth)), "{error:?}");
    let holes = [
        Record::Dir(META, b""),
        Record::File(META, b"f"),
        Record::Hole(i64::MAX as u64 - 5000),
        Record::Hole(u64::MAX),
    ];
    let scene = Scene::new();
    let error = scene.receive(&holes).unwrap_err();
    // The filesystem may refuse the first one already.
    assert!(matches!(error, CopyError::Malformed(_) | CopyError::Here { .. }), "{error:?}");
    assert_eq!(fs::read_dir(scene.dir.path().join("into")).unwrap().count(), 0);
    // A length is refused before there is memory for it.
    let mut huge = stream(&[Record::Dir(META, b""), Record::File(META, b"f")]);
    huge.extend([4, 0xff, 0xff, 0xff, 0x7f]);
    let error = receive((&*huge).chain(io::repeat(0)), &scene.dir.path().join("into"), None);
    assert!(matches!(error, Err(CopyError::Malformed(TreeError::Length(4, _)))), "{error:?}");
}

#[test]
fn streams_that_break_leave_no_half_of_a_file() {
    let scene = Scene::new();
    let into = scene.dir.path().join("into");
    fs::write(into.join("old"), "old").unwrap();
    for (name, left) in [(&b"new"[..], 1), (b"old", 1)] {
        let records =
            [Record::Dir(META, b""), Record::File(META, name), Record::Data(&[1; MAX_DATA])];
        let error = scene.receive(&records).unwrap_err();
        assert!(matches!(error, CopyError::Stream(_)), "{error:?}");
        assert_eq!(fs::read_dir(&into).unwrap().count(), left, "{name:?}");
    }
    assert_eq!(fs::read(into.join("old")).unwrap(), b"old");
}

#[test]
fn receivers_tell_how_it_went() {
    let told = |received: Result<(), CopyError>| {
        let mut bytes = Vec::new();
        answer(&received, &mut bytes).unwrap();
        outcome(&*bytes)
    };
    told(Ok(())).unwrap();
    let full = CopyError::here(Doing::Write, Path::new("/x\n"), rustix::io::Errno::NOSPC);
    match told(Err(full)).unwrap_err() {
        CopyError::There { doing: Doing::Write, path, source } => {
            assert_eq!(path, Path::new("/x\n"));
            assert_eq!(source.raw_os_error(), Some(28));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(told(Err(TreeError::Name.into())), Err(CopyError::There { .. })));
    assert!(matches!(outcome(io::empty()), Err(CopyError::Stream(_))));
}

const NAMES: [&[u8]; 8] = [b"a", b"b", b"..", b"../outside", b"outside", b"/", b"", b"file"];
const TARGETS: [&[u8]; 5] = [b"..", b"../outside", b"/", b"a", b"../../../outside/file"];

fn record() -> impl Strategy<Value = Record<'static>> {
    let name = proptest::sample::select(&NAMES);
    let target = proptest::sample::select(&TARGETS);
    (0..8_u8, name, target).prop_map(|(kind, name, target)| match kind {
        0 | 1 => Record::Dir(META, name),
        2 => Record::File(META, name),
        3 | 4 => Record::Symlink { meta: META, name, target },
        5 => Record::Data(b"evil"),
        6 => Record::Hole(7),
        _ => Record::End,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever a sender does, and whatever earlier ones have left, all else stays as it was.
    #[test]
    fn no_stream_leads_outside(
        streams in proptest::collection::vec(proptest::collection::vec(record(), 0..12), 1..4),
    ) {
        let scene = Scene::new();
        for mut records in streams {
            records.insert(0, Record::Dir(META, b""));
            // How it ends is of no matter.
            let _ = scene.receive(&records);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let dir = TempDir::new().unwrap();
        let _ = receive(&*bytes, &dir.path().join("x"), None);
        let _ = outcome(&*bytes);
    }
}
