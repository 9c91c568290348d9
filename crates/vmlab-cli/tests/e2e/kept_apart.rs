//! What a guest sets up for itself stays in the guest, whatever of the host is shared over it.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::common::{Site, need};
use crate::facts::{Facts, script};

/// Modes of the root that leave the host's alone. `rw` is tested with a root of its own.
const MODES: [&str; 2] = ["overlay", "ro"];

/// Each file and directory below a directory: its inode, its modification time and its content.
type Tree = BTreeMap<PathBuf, (u64, i64, Vec<u8>)>;

fn tree(dir: &Path) -> Tree {
    let mut found = Tree::new();
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let meta = path.symlink_metadata().unwrap();
        let content = match path.read_link() {
            _ if meta.is_file() => std::fs::read(&path).unwrap(),
            Ok(target) => target.into_os_string().into_encoded_bytes(),
            Err(_) => Vec::new(),
        };
        if meta.is_dir() {
            left.extend(path.read_dir().unwrap().map(|entry| entry.unwrap().path()));
        }
        found.insert(path, (meta.ino(), meta.mtime_nsec(), content));
    }
    found
}

/// A directory with the files that a guest has of its own, in content of somebody else's.
fn etc(dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    for name in ["hostname", "hosts", "sudoers", "shadow", "gshadow"] {
        std::fs::write(dir.join(name), format!("my own {name}\n")).unwrap();
    }
    std::os::unix::fs::symlink("hosts", dir.join("resolv.conf")).unwrap();
    for name in ["passwd", "group", "nsswitch.conf"] {
        std::fs::copy(Path::new("/etc").join(name), dir.join(name)).unwrap();
    }
}

/// A root with a shell and the places that every root needs.
fn small_root(dir: &Path) {
    let busybox = need("busybox", "busybox-static");
    for name in ["bin", "dev", "proc", "run", "sys", "tmp", "var/tmp", "lib/modules"] {
        std::fs::create_dir_all(dir.join(name)).unwrap();
    }
    std::fs::copy(busybox, dir.join("bin/busybox")).unwrap();
    for name in ["sh", "cat", "ls", "true"] {
        std::os::unix::fs::symlink("busybox", dir.join("bin").join(name)).unwrap();
    }
    etc(&dir.join("etc"));
}

#[test]
fn a_share_over_etc_keeps_its_files() {
    let site = Site::new();
    let shared = site.path().join("etc");
    etc(&shared);
    let before = tree(&shared);
    for root_mode in MODES {
        for access in ["", ":ro"] {
            let share = format!("{}:/etc{access}", shared.display());
            let name = ["--hostname", "vmlab", "--no-cwd"];
            let options = [&name[..], &["--root-mode", root_mode, "--share", &share]].concat();
            let outcome =
                site.sh(&options, "cat /etc/hostname /etc/resolv.conf; uname -n").output();
            // The share is what is seen; the guest's name is its own all the same.
            outcome.expect_stdout("my own hostname\nmy own hosts\nvmlab\n");
            assert_eq!(tree(&shared), before, "{root_mode}{access}");
        }
    }
}

#[test]
fn a_root_that_is_written_to_keeps_its_own_files() {
    let site = Site::new();
    let root = site.path().join("root");
    small_root(&root);
    let before = tree(&root.join("etc"));
    let shared = site.path().join("etc");
    etc(&shared);
    let shared_before = tree(&shared);
    let rootfs = root.display().to_string();
    let share = format!("{}:/etc", shared.display());
    for options in [&[][..], &["--share", share.as_str()]] {
        for root_mode in ["rw", "overlay", "ro"] {
            let rootfs = ["--no-cwd", "--rootfs", &rootfs, "--root-mode", root_mode];
            let mode = [&rootfs[..], &["--hostname", "vmlab"]].concat();
            let options: Vec<_> = mode.iter().chain(options).copied().collect();
            let script = "cat /etc/hostname; ls -A /run";
            let outcome = site.sh(&options, script).env("PATH", "/bin").output();
            outcome.expect_code(0);
            let name = if options.contains(&"--share") { "my own hostname" } else { "vmlab" };
            // Where the guest's files come from is not to be seen.
            assert_eq!(outcome.stdout_text(), format!("{name}\nlock\n"), "{options:?}");
            assert_eq!(tree(&root.join("etc")), before, "{options:?}");
            assert_eq!(tree(&shared), shared_before, "{options:?}");
        }
    }
    // Not even the mount points were made.
    for name in ["run", "tmp", "dev", "var/tmp", "lib/modules"] {
        assert_eq!(root.join(name).read_dir().unwrap().count(), 0, "{name}");
    }
}

#[test]
fn nothing_is_made_in_a_share_over_the_guests_own_memory() {
    let site = Site::new();
    let shared: Vec<_> = ["run", "tmp", "var-tmp"].map(|name| site.path().join(name)).into();
    shared.iter().for_each(|dir| std::fs::create_dir(dir).unwrap());
    let places = ["/run", "/tmp", "/var/tmp"];
    let share: Vec<_> = shared
        .iter()
        .zip(places)
        .map(|(dir, place)| format!("{}:{place}", dir.display()))
        .collect();
    for root_mode in MODES {
        let shares = share.iter().flat_map(|share| ["--share", share]);
        let options: Vec<_> = ["--no-cwd", "--hostname", "vmlab", "--root-mode", root_mode]
            .into_iter()
            .chain(shares)
            .collect();
        let mut run = site
            .sh(&options, "cat /etc/hostname; ls -A /run /tmp /var/tmp")
            .env("TMPDIR", "/tmp/temporary")
            .env("TMP", "/run/temporary")
            .env("TEMP", "/var/tmp/temporary");
        // Otherwise it would have to be in the share over /tmp.
        run.command.current_dir("/");
        run.output().expect_stdout("vmlab\n/run:\n\n/tmp:\n\n/var/tmp:\n");
        for dir in &shared {
            assert_eq!(dir.read_dir().unwrap().count(), 0, "{root_mode}: {}", dir.display());
        }
    }
}

#[test]
fn directories_for_temporary_files_are_there() {
    let site = Site::new();
    let unshared = site.cwd().join("not-there");
    let words = script(
        r#"
        for dir in "$TMPDIR" "$TMP" "$TEMP"; do
            fact "$dir" stat -c '%a %U' "$dir"
            fact "parent of $dir" stat -c '%a %U' "${dir%/*}"
        done
        fact made bash -c 'mktemp | grep -c "^$TMPDIR/tmp\."'
        fact own bash -c 'cd "$TMPDIR" && touch file && rm file && pwd'
        "#,
    );
    let run = |options: &[&str], tmp: &str| {
        let run = site.run(options, &words).env("TMPDIR", "/tmp/of/host");
        Facts::of(&run.env("TMP", tmp).env("TEMP", "/var/tmp/of/host").output())
    };
    let facts = run(&["--user", "daemon", "--root-mode", "ro"], "/run/user/host");
    for dir in ["/tmp/of/host", "/run/user/host", "/var/tmp/of/host"] {
        facts.expect(dir, "700 daemon").expect(&format!("parent of {dir}"), "755 root");
    }
    facts.expect("made", "1").expect("own", "/tmp/of/host");
    // In the shared working directory, which is below /tmp, only the host makes directories.
    let facts = run(&[], unshared.to_str().unwrap());
    facts.expect_failure(unshared.to_str().unwrap(), "No such file");
    facts.expect("/tmp/of/host", "700 root").expect("/var/tmp/of/host", "700 root");
    facts.expect("made", "1");
    assert!(!unshared.exists());
}
