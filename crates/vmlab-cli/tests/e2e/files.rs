//! Which files a guest sees, where it can write, and who sees what it has written.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::common::{Outcome, Site, is_root, mode, need};
use crate::facts::{Facts, script};

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

/// A run that has to be refused, without a console: nothing was started.
#[track_caller]
fn refused(outcome: &Outcome, wanted: &[&str]) {
    outcome.expect_code(125).expect_stderr(wanted);
    assert!(!outcome.stderr_text().contains("console"), "{}", outcome.stderr_text());
    assert_eq!(outcome.stdout_text(), "");
}

#[test]
fn host_and_guest_see_each_others_writes_at_once() {
    let site = Site::new();
    write(&site.cwd().join("from-host"), "first");
    let mut running = site
        .sh(
            &[],
            "cat from-host; umask 022; echo guest > from-guest; mkdir -p d/e; echo x > d/e/f
             ln -s from-guest link; chmod 4750 d/e/f; touch -d @86400 old; echo ' ready'
             read line; cat from-host; ls added; rm from-guest; cat removed; echo ' done'
             read line; cat grown; mv d renamed",
        )
        .open_stdin()
        .start();
    running.wait_stdout("ready");
    let at = |name: &str| site.cwd().join(name);
    assert_eq!(read(&at("from-guest")), "guest\n");
    assert_eq!(mode(&at("from-guest")), 0o644);
    assert_eq!(read(&at("d/e/f")), "x\n");
    assert_eq!(mode(&at("d/e/f")), 0o4750);
    assert_eq!(std::fs::read_link(at("link")).unwrap(), Path::new("from-guest"));
    assert_eq!(at("old").metadata().unwrap().mtime(), 86400);
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    for made in ["from-guest", "d", "d/e/f", "link", "old"] {
        let meta = at(made).symlink_metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (uid, gid), "{made}");
    }
    write(&at("from-host"), "second, longer");
    write(&at("added"), "");
    let mut go = running.stdin.take().unwrap();
    std::io::Write::write_all(&mut go, b"\n").unwrap();
    running.wait_stdout("done");
    assert!(!at("from-guest").exists());
    write(&at("grown"), &"g".repeat(300_000));
    std::io::Write::write_all(&mut go, b"\n").unwrap();
    drop(go);
    let outcome = running.finish();
    // `cat removed` fails: it was never there.
    outcome.expect_code(0).expect_stderr(&["removed: No such file"]);
    let wanted = format!("first ready\nsecond, longeradded\n done\n{}", "g".repeat(300_000));
    assert_eq!(outcome.stdout_text(), wanted);
    assert!(at("renamed/e/f").exists() && !at("d").exists());
}

#[test]
fn shares_are_where_and_how_they_were_asked_for() {
    shares_are_as_asked_for("auto", "-t virtiofs");
}

#[test]
fn shares_over_9p_are_where_and_how_they_were_asked_for() {
    shares_are_as_asked_for("9p", "-t 9p -o trans=virtio,version=9p2000.L");
}

fn shares_are_as_asked_for(via: &str, mount: &str) {
    let site = Site::new();
    let at = |name: &str| site.path().join(name);
    for dir in ["plain", "ro", "inner", "outer", "outer/sub", "other", "odd, näme"] {
        std::fs::create_dir(at(dir)).unwrap();
        write(&at(dir).join("name"), dir);
    }
    let text = |name: &str| at(name).display().to_string();
    let share = [
        text("plain"),
        format!("{}:/mnt/ro:ro", text("ro")),
        // The inner one first: it has to be there all the same.
        format!("{}:/mnt/outer/sub", text("inner")),
        format!("{}:/mnt/outer:rw", text("outer")),
        "../other:/usr/share/other".to_owned(),
        format!("{}:/mnt/odd", text("odd, näme")),
    ];
    let mut options = vec!["--share-via", via];
    options.extend(share.iter().flat_map(|share| ["--share", share]));
    let words = script(&format!(
        r#"
        for dir in {plain} /mnt/ro /mnt/outer /mnt/outer/sub /usr/share/other /mnt/odd; do
            fact "$dir" cat "$dir/name"
            fact "write $dir" touch "$dir/new"
        done
        fact 'remove' rm /mnt/ro/name
        fact 'change' bash -c 'echo changed > /mnt/ro/name'
        fact 'chmod' chmod 777 /mnt/ro/name
        # Whatever a guest does to the mount, the server has the last word.
        fact 'remount' mount -o remount,rw /mnt/ro
        fact 'write after remount' touch /mnt/ro/new
        fact 'tag' bash -c 'findmnt -n -o SOURCE /mnt/ro > /tmp/tag && umount /mnt/ro'
        fact 'mount' bash -c 'mount {mount} -o rw $(cat /tmp/tag) /mnt/ro'
        fact 'options' bash -c 'findmnt -n -o OPTIONS /mnt/ro | cut -d, -f1'
        fact 'read after mount' cat /mnt/ro/name
        fact 'write after mount' touch /mnt/ro/new
        fact 'remove after mount' rm /mnt/ro/name
        "#,
        plain = text("plain"),
    ));
    let facts = Facts::of(&site.run(&options, words).output());
    let plain = text("plain");
    let places = [
        (plain.as_str(), "plain"),
        ("/mnt/outer", "outer"),
        ("/mnt/outer/sub", "inner"),
        ("/usr/share/other", "other"),
        ("/mnt/odd", "odd, näme"),
    ];
    for (guest, host) in places {
        facts.expect(guest, host).expect(&format!("write {guest}"), "");
        assert!(at(host).join("new").exists(), "{host}");
    }
    assert!(!at("outer/sub/new").exists());
    facts.expect("/mnt/ro", "ro").expect("remount", "").expect("mount", "");
    facts.expect("options", "rw").expect("read after mount", "ro");
    for refused in [
        "write /mnt/ro",
        "remove",
        "change",
        "chmod",
        "write after remount",
        "write after mount",
        "remove after mount",
    ] {
        facts.expect_failure(refused, "Read-only file system");
    }
    assert_eq!(read(&at("ro/name")), "ro");
    assert_eq!(at("ro").read_dir().unwrap().count(), 1);
}

#[test]
fn shares_that_cannot_be_are_refused() {
    let site = Site::new();
    write(&site.cwd().join("file"), "");
    std::fs::create_dir(site.cwd().join("dir")).unwrap();
    for (share, wanted) in [
        ("missing:/mnt", "missing cannot be used (No such file"),
        ("file:/mnt", "is not a directory"),
        ("dir:relative", "the guest's path relative is not absolute"),
        ("dir:/a/../b", "is not absolute"),
        ("dir:/", "--rootfs"),
        ("dir:/a:/b", "too many parts"),
        ("", "is empty"),
    ] {
        let outcome = site.run(&["--share", share], ["true"]).output();
        refused(&outcome, &["--share", &format!("`{share}`"), wanted, "HOST[:GUEST][:ro|rw]"]);
    }
    let twice = ["--share", "dir:/mnt/x", "--share", ".:/mnt/x/"];
    refused(&site.run(&twice, ["true"]).output(), &["/mnt/x", "another share has this place"]);
    let outcome = site.run(&["--rootfs", "missing"], ["true"]).output();
    refused(&outcome, &["root filesystem missing", "No such file"]);
    let outcome = site.run(&["--rootfs", "file"], ["true"]).output();
    refused(&outcome, &["file cannot be shared: it is not a directory"]);
}

#[test]
fn any_working_directory_serves() {
    let site = Site::new();
    let odd = site.cwd().join("a b,c=d ü'$x");
    std::fs::create_dir(&odd).unwrap();
    let mut run = site.sh(&[], "pwd; echo written > 'x y'");
    run.command.current_dir(&odd);
    run.output().expect_stdout(&format!("{}\n", odd.display()));
    assert_eq!(read(&odd.join("x y")), "written\n");

    // The host's root is the guest's, with what is written kept in the guest.
    let marker = format!("vmlab-test-{}", std::process::id());
    let mut run = site.sh(&[], &format!("pwd; touch {marker} && ls {marker}"));
    run.command.current_dir("/");
    run.output().expect_stdout(&format!("/\n{marker}\n"));
    assert!(!Path::new("/").join(&marker).exists());

    let bytes = site.cwd().join(OsStr::from_bytes(b"not-\xff-text"));
    std::fs::create_dir(&bytes).unwrap();
    let mut run = site.sh(&[], "pwd > name");
    run.command.current_dir(&bytes);
    run.output().expect_code(0);
    let name = [bytes.as_os_str().as_bytes(), b"\n"].concat();
    assert_eq!(std::fs::read(bytes.join("name")).unwrap(), name);
    let mut run = site.sh(&["--share-via", "9p"], "true");
    run.command.current_dir(&bytes);
    refused(&run.output(), &["cannot be shared over 9p: its name is not UTF-8"]);

    let mut run = site.host_sh(
        "mkdir gone && cd gone && rmdir ../gone && exec \"$VMLAB\" run -q -k debian:6.12 -- true",
    );
    run.command.current_dir(site.cwd());
    refused(&run.output(), &["the working directory cannot be found"]);
}

#[test]
fn the_working_directory_can_stay_out() {
    let site = Site::new();
    // Somewhere that is in the host's root and in no tmpfs of the guest's.
    let mut run = site
        .sh(&["--no-cwd"], "pwd; touch new && ls new; findmnt -n -t 9p,virtiofs /usr/share; true");
    run.command.current_dir("/usr/share");
    run.output().expect_stdout("/usr/share\nnew\n");
    assert!(!Path::new("/usr/share/new").exists());

    // The host's /tmp is not the guest's.
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let mut run = site.sh(&["--no-cwd"], "pwd; ls -A /tmp");
    // The guest makes a directory for temporary files where the variable names one.
    run.command.env_remove("TMPDIR");
    run.command.current_dir(dir.path());
    run.output().expect_stdout("/\n");
}

#[test]
fn a_read_only_root_refuses_writes() {
    let site = Site::new();
    let words = script(
        r#"
        for dir in / /etc /usr/bin /usr/lib /var/lib /root; do
            fact "$dir" touch "$dir/new"
        done
        fact remount mount -o remount,rw /
        fact 'after remount' touch /etc/new
        fact tmp bash -c 'echo t > /tmp/x && echo t > /run/x && echo t > /var/tmp/x && cat /tmp/x'
        fact cwd bash -c 'echo c > made && cat made'
        fact hostname cat /etc/hostname
        fact hosts getent hosts vmlab
        fact modprobe bash -c 'modprobe xfs && grep -w xfs /proc/filesystems'
        "#,
    );
    let facts = Facts::of(&site.run(&["--root-mode", "ro", "--hostname", "vmlab"], words).output());
    for dir in ["/", "/etc", "/usr/bin", "/usr/lib", "/var/lib", "after remount"] {
        facts.expect_failure(dir, "Read-only file system");
    }
    // An ordinary user's guest may not even look into it.
    facts.expect_failure("/root", if is_root() { "Read-only" } else { "" });
    facts.expect("tmp", "t").expect("cwd", "c").expect("hostname", "vmlab");
    assert!(facts.text("modprobe").contains("xfs") && facts.text("hosts").contains("vmlab"));
    assert_eq!(read(&site.cwd().join("made")), "c\n");
}

/// A root with busybox and nothing else.
fn small_root(dir: &Path) {
    let busybox = need("busybox", "busybox-static");
    for name in ["bin", "dev", "etc", "proc", "run", "sys", "tmp", "job"] {
        std::fs::create_dir_all(dir.join(name)).unwrap();
    }
    std::fs::copy(busybox, dir.join("bin/busybox")).unwrap();
    let all = std::process::Command::new("busybox").arg("--list").output().unwrap();
    for name in String::from_utf8(all.stdout).unwrap().lines().filter(|n| *n != "busybox") {
        std::os::unix::fs::symlink("busybox", dir.join("bin").join(name)).unwrap();
    }
    write(&dir.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nsomebody:x:1234:55::/:/bin/sh\n");
    write(&dir.join("etc/group"), "root:x:0:\nsome:x:55:\nmore:x:66:somebody\n");
}

#[test]
fn another_root_is_kept_or_written_as_asked() {
    let site = Site::new();
    let root = site.path().join("root");
    small_root(&root);
    let share = format!("{}:/job", site.cwd().display());
    let root_text = root.display().to_string();
    let script = "cd /; echo kept > new; cat new; cat /job/input; id -u; id -G; \
                  echo output > /job/output; ls /etc";
    for root_mode in ["overlay", "ro", "rw"] {
        write(&site.cwd().join("input"), root_mode);
        let options = [
            "--rootfs",
            &root_text,
            "--root-mode",
            root_mode,
            "--share",
            &share,
            "--user",
            "somebody",
        ];
        // Writable for its users, as the command is not root.
        if root_mode == "rw" {
            use std::os::unix::fs::PermissionsExt;
            for dir in [&root, &site.cwd()] {
                std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o777)).unwrap();
            }
        }
        let mut run = site.run(&options, ["sh", "-c", script]).env("PATH", "/bin");
        run.command.current_dir("/");
        let outcome = run.output();
        outcome.expect_code(0);
        let text = outcome.stdout_text();
        assert!(text.contains(&format!("{root_mode}1234\n55 66\n")), "{root_mode}: {text}");
        let written = root.join("new").exists();
        assert_eq!(written, root_mode == "rw", "{root_mode}: {text}");
    }
    assert_eq!(read(&root.join("new")), "kept\n");
    let owner = root.join("new").metadata().unwrap().uid();
    let caller = rustix::process::geteuid().as_raw();
    assert_eq!(owner, if is_root() { 1234 } else { caller });
}
