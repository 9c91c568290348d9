//! How fast a passed-through directory is looked up and listed, in thousands a second, without a guest:
//! `cargo run --release -p vmlab-fuse --example passthrough_bench [DIRECTORY]`.
//!
//! Without a directory it makes one with 1,000 and one with 200,000 files.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a measuring program")]

use std::ffi::CString;
use std::fs;
use std::path::Path;
use std::time::Instant;

use rustix::fs::OFlags;
use vmlab_fuse::abi::{Dirent, EntryOut, init};
use vmlab_fuse::{Caller, DirSink, FileSystem, Name, NodeId, Passthrough, PassthroughConfig};
use zerocopy::FromBytes;

const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1 };

/// The room of a READDIRPLUS of most kernels.
const ROOM: usize = 4096;

/// The entries of a directory: names, nodes and whether they are directories.
fn list(fs: &Passthrough, node: NodeId) -> Vec<(CString, NodeId, bool)> {
    let handle = fs.opendir(node).unwrap().handle;
    let (mut all, mut offset) = (Vec::new(), 0);
    loop {
        let mut sink = DirSink::new(ROOM, true);
        fs.readdir(node, handle, offset, &mut sink).unwrap();
        let mut bytes = sink.bytes();
        if bytes.is_empty() {
            break;
        }
        while !bytes.is_empty() {
            let (entry, rest) = EntryOut::read_from_prefix(bytes).unwrap();
            let (dirent, rest) = Dirent::read_from_prefix(rest).unwrap();
            let length = dirent.namelen as usize;
            let name = CString::new(&rest[..length]).unwrap();
            bytes = &rest[length.next_multiple_of(8)..];
            offset = dirent.off;
            if name.as_bytes() != b"." && name.as_bytes() != b".." {
                let directory = entry.attr.mode & 0o170000 == 0o040000;
                let found = if entry.nodeid == 0 {
                    // It was listed without: as a guest that wants to know of all files does.
                    fs.lookup(&CALLER, node, Name::new(&name).unwrap()).unwrap().node.unwrap()
                } else {
                    NodeId(entry.nodeid)
                };
                all.push((name, found, directory));
            }
        }
    }
    fs.releasedir(node, handle).unwrap();
    all
}

fn measure(root: &Path) {
    let fs = Passthrough::new(root, PassthroughConfig::default()).unwrap();
    fs.init(init::SUBMOUNTS);
    let begin = Instant::now();
    let mut files = Vec::new();
    let mut todo = vec![NodeId::ROOT];
    while let Some(node) = todo.pop() {
        for (name, found, directory) in list(&fs, node) {
            if directory {
                todo.push(found);
            }
            files.push((node, name, found));
        }
    }
    let rate = |begin: Instant, count: usize| count as f64 / begin.elapsed().as_secs_f64() / 1e3;
    print!("| {} | {:.0} ", files.len(), rate(begin, files.len()));
    let begin = Instant::now();
    for (parent, name, _) in &files {
        fs.lookup(&CALLER, *parent, Name::new(name).unwrap()).unwrap();
    }
    print!("| {:.0} ", rate(begin, files.len()));
    let begin = Instant::now();
    for (_, _, node) in &files {
        fs.getattr(*node, None).unwrap();
    }
    print!("| {:.0} ", rate(begin, files.len()));
    let begin = Instant::now();
    let mut opened = 0;
    for (_, _, node) in &files {
        if let Ok(open) = fs.open(&CALLER, *node, OFlags::RDONLY.bits(), 0) {
            fs.release(*node, open.handle).unwrap();
            opened += 1;
        }
    }
    print!("| {:.0} ", rate(begin, opened));
    let memory = resident();
    let begin = Instant::now();
    for (_, _, node) in &files {
        fs.forget(*node, 2);
    }
    println!("| {:.0} | {memory} MiB |", rate(begin, files.len()));
    assert_eq!(fs.known_inodes(), 1, "all but the root were forgotten");
}

/// The process's memory in MiB, with the list of names that this program keeps itself.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() / 1024
}

fn main() {
    println!("| entries | listed | looked up | attributes | opened, closed | forgotten | memory |");
    println!("|---|---|---|---|---|---|---|");
    if let Some(root) = std::env::args_os().nth(1) {
        return measure(root.as_ref());
    }
    for (directories, files) in [(10, 100), (2000, 100), (1, 200_000)] {
        let root = tempfile::tempdir().unwrap();
        for directory in 0..directories {
            let path = root.path().join(format!("dir-{directory}"));
            fs::create_dir(&path).unwrap();
            for file in 0..files {
                fs::File::create(path.join(format!("some-file-{file}"))).unwrap();
            }
        }
        measure(root.path());
    }
}
