//! Who runs a command, and what the host's user behind the guest can and cannot do.
//!
//! These tests are run as root and as an ordinary user; where the two differ, both sides are said.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use crate::common::{Site, is_root, need};
use crate::facts::{Facts, script};

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn host(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

#[test]
fn commands_run_as_whom_they_should() {
    need("sudo", "sudo");
    let site = Site::new();
    let named = |user: &str| {
        let words = ["sh", "-c", "id -u; id -g; id -G; sudo -n id -u 2>&1"];
        site.run(&["--user", user], words).output()
    };
    let (uid, gid) = (host("id", &["-u"]), host("id", &["-g"]));
    let caller = named("caller");
    caller.expect_code(0);
    assert_eq!(
        caller.stdout_text(),
        format!("{uid}\n{gid}\n{}\n0\n", host("id", &["-G"])),
        "the caller has other groups, or no sudo"
    );
    let daemon = host("id", &["-u", "daemon"]);
    for user in ["daemon", &daemon] {
        let text = named(user).stdout_text();
        let groups = host("id", &["-G", "daemon"]);
        let wanted = format!("{daemon}\n{}\n{groups}\n", host("id", &["-g", "daemon"]));
        assert!(text.starts_with(&wanted), "{user}: {text}");
    }
    let text = named("54321").stdout_text();
    assert!(text.starts_with("54321\n54321\n54321\n"), "{text}");
    let unknown = named("no-such-user");
    unknown.expect_code(125).expect_stderr(&["--user", "no user `no-such-user`"]);
}

#[test]
fn root_has_system_programs_whoever_calls() {
    let site = Site::new();
    // What Debian gives its ordinary users.
    let path = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games";
    let script = "modprobe loop && test -b /dev/loop0 && echo loaded";
    site.sh(&[], script).env("PATH", path).output().expect_code(0).expect_stdout("loaded\n");
}

#[test]
fn a_path_that_cannot_be_searched_has_no_programs() {
    let site = Site::new();
    let run = |program: &str, closed: &str| {
        let path = format!("{closed}:/usr/bin:/bin");
        let options = ["--user", "54321", "--share", "shared:/opt/shared"];
        let run = site.run(&options, [program]).env("PATH", path);
        run.output()
    };
    let closed = site.cwd().join("shared/closed");
    std::fs::create_dir_all(&closed).unwrap();
    std::fs::write(closed.join("program"), "#!/bin/sh\n").unwrap();
    set_mode(&closed, 0o700);
    run("program", "/opt/shared/closed").expect_code(127).expect_stderr(&["command not found"]);
    run("/opt/shared/closed/program", "/nowhere").expect_code(126);
    set_mode(&closed, 0o755);
    run("program", "/opt/shared/closed").expect_code(126).expect_stderr(&["cannot be executed"]);
}

#[test]
fn the_host_gives_no_more_than_its_user_has() {
    for (program, package) in [("sudo", "sudo"), ("git", "git"), ("su", "util-linux")] {
        need(program, package);
    }
    let site = Site::new();
    let repository = site.cwd().join("repository");
    let git = |args: &[&str]| {
        let mut git = Command::new("git");
        git.arg("-C").arg(site.cwd()).args(args);
        assert!(git.output().unwrap().status.success(), "git {args:?}");
    };
    git(&["init", "-q", "repository"]);
    std::fs::write(repository.join("file"), "x").unwrap();
    let words = script(
        r#"
        fact id id -u
        fact made bash -c 'umask 022; mkdir -p made/by && echo x > made/by/root && stat -c %a made/by/root'
        fact git bash -c 'cd repository && git status --porcelain'
        fact commit bash -c 'cd repository && git add file &&
            git -c user.name=n -c user.email=e commit -q -m message && git log --format=%s'
        fact sudo sudo -n id -u
        fact 'sudo to' sudo -n -u daemon id -un
        fact su su -s /bin/sh daemon -c 'id -un'
        fact shadow bash -c 'grep -c ^root: /etc/shadow'
        fact secret bash -c 'cat /etc/shadow- /root/.bashrc /var/lib/private/x'
        fact readable bash -c 'find /etc -maxdepth 1 -type f -perm 600 ! -readable | wc -l'
        fact login passwd -S root
        fact mount bash -c 'mkdir /mnt/x && mount -t tmpfs none /mnt/x && echo mounted'
        fact device bash -c 'mknod /tmp/null c 1 3 && echo made'
        "#,
    );
    let facts = Facts::of(&site.run(&[], words).output());
    facts
        .expect("id", "0")
        .expect("made", "644")
        .expect("git", "?? file")
        .expect("commit", "message")
        .expect("sudo", "0")
        .expect("sudo to", "daemon")
        .expect("su", "daemon")
        .expect("shadow", "1")
        .expect("mount", "mounted")
        .expect("device", "made");
    assert!(facts.text("login").starts_with("root "), "{facts:?}");
    // Whatever the guest's root has made is the caller's.
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    for made in ["made", "made/by", "made/by/root", "repository/.git/HEAD"] {
        let meta = site.cwd().join(made).metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (uid, gid), "{made}");
    }
    let mut on_host = Command::new("git");
    on_host.arg("-C").arg(&repository).args(["log", "--format=%s"]);
    assert_eq!(on_host.output().unwrap().stdout, b"message\n");
    if !is_root() {
        facts.expect_failure("secret", "Permission denied");
    }
}

#[test]
fn what_the_caller_cannot_read_the_guests_root_cannot_either() {
    let site = Site::new();
    // Debian's shadow backup is root's alone, and every Debian has the file that it is a copy of.
    let secret = ["/etc/shadow-", "/etc/gshadow-", "/etc/.pwd.lock", "/root"]
        .into_iter()
        .find(|path| std::path::Path::new(path).exists())
        .unwrap();
    let script = format!(
        "if [ -d {secret} ]; then ls {secret}; else cat {secret}; fi > /dev/null && echo readable"
    );
    let outcome = site.sh(&[], &script).output();
    if is_root() {
        outcome.expect_stdout("readable\n");
    } else {
        assert!(std::fs::File::open(secret).is_err(), "the host lets everybody read {secret}");
        assert_ne!(outcome.code, Some(0));
        outcome.expect_stderr(&[secret, "Permission denied"]);
        assert_eq!(outcome.stdout_text(), "");
        // Nor can it be changed behind the guest's overlay.
        let changed = site.run(&["--share", "/etc:/mnt/etc"], ["touch", "/mnt/etc/vmlab-test"]);
        changed.output().expect_code(1).expect_stderr(&["Permission denied"]);
    }
}
