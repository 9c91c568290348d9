//! Shares over virtio-fs, by vmlab's own server.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use crate::common::{CLOUD, DEBIAN_6_12, Site};
use crate::facts::{Facts, script};

#[test]
fn kernels_without_9p_have_the_hosts_files() {
    for kernel in CLOUD {
        let site = Site::new();
        std::fs::write(site.cwd().join("before"), "from the host\n").unwrap();
        let command = "cat before; echo from the guest > after; \
            grep -c virtiofs /proc/filesystems; touch /usr/in-the-overlay && echo overlay";
        let run = site.run_with(kernel, &[], ["sh", "-c", command]);
        run.output().expect_code(0).expect_stdout("from the host\n1\noverlay\n");
        let after = site.cwd().join("after");
        assert_eq!(std::fs::read_to_string(&after).unwrap(), "from the guest\n", "{kernel}");
        assert_eq!(after.metadata().unwrap().uid(), rustix::process::geteuid().as_raw());
        assert!(!std::path::Path::new("/usr/in-the-overlay").exists());
    }
}

#[test]
fn a_share_is_a_filesystem_like_any_other() {
    let site = Site::new();
    let words = script(
        r#"
        fact 'fifo' bash -c 'mkfifo f && (echo through > f &) && cat f && rm f'
        fact 'socket' perl -MIO::Socket::UNIX -e 'IO::Socket::UNIX->new(Local => "s", Listen => 1)
            or die $!; print "bound"'
        fact 'unlinked' bash -c 'exec 3<> gone; rm gone; echo still >&3; stat -L -c %h /proc/self/fd/3'
        fact 'append' bash -c 'echo a >> log; echo b >> log; cat log | tr -d "\n"'
        fact 'exclusive' bash -c 'set -C; : > once; : > once'
        fact 'exchange' perl -e 'open A, ">", "a"; print A "A"; close A; open B, ">", "b"; print B "B";
            close B; my ($a, $b) = ("a", "b");
            syscall(316, -100, $a, -100, $b, 2) == 0 or die $!; print `cat a b`'
        fact 'sparse' bash -c 'truncate -s 10M sparse && stat -c "%s %b" sparse'
        fact 'hard link' bash -c 'ln log other && stat -c %h log'
        fact 'symlink' bash -c 'ln -s /etc/hostname link && readlink link'
        fact 'mapped' perl -e 'open F, "+>", "m"; truncate F, 4096; close F; print -s "m"'
        fact 'mapped, to append' perl -e 'open F, ">", "p"; print F "a" x 8192; close F;
            open A, "+>>", "p" or die $!; pipe R, W; syswrite W, "X";
            my $at = syscall(9, 0, 8192, 3, 1, fileno A, 0);
            syscall(0, fileno R, $at, 1) == 1 or die $!; syscall(26, $at, 8192, 4) == 0 or die $!;
            open G, "<", "p"; read G, my $all, 99999; print length $all, substr $all, 0, 2'
        fact 'many' bash -c 'mkdir many && cd many && touch $(seq 3000) && ls | wc -l && rm -r ../many'
        fact 'xattr' perl -e 'my ($path, $name, $value) = ("log", "user.x", "value");
            syscall(188, $path, $name, $value, 5, 0) == 0 or die $!; print "set"'
        "#,
    );
    let facts = Facts::of(&site.run(&[], words).output());
    facts
        .expect("fifo", "through")
        .expect("socket", "bound")
        .expect("unlinked", "0")
        .expect("append", "ab")
        .expect("exchange", "BA")
        .expect("sparse", "10485760 0")
        .expect("hard link", "2")
        .expect("symlink", "/etc/hostname")
        .expect("mapped", "4096")
        .expect("mapped, to append", "8192Xa")
        .expect("many", "3000")
        .expect("xattr", "set");
    facts.expect_failure("exclusive", "cannot overwrite existing file");
    assert_eq!(std::fs::read(site.cwd().join("a")).unwrap(), b"B");
}

#[test]
fn what_is_read_only_stays_so_whatever_the_guests_root_does() {
    let site = Site::new();
    let shared = site.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("file"), "content\n").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", shared.join("out")).unwrap();
    let share = format!("{}:/mnt/ro:ro", shared.display());
    let command = "cat /mnt/ro/file; mount -o remount,rw /mnt/ro; \
        for change in 'touch /mnt/ro/new' 'rm /mnt/ro/file' 'chmod 777 /mnt/ro/file' \
            'mv /mnt/ro/file /mnt/ro/other' 'mkdir /mnt/ro/dir' 'ln /mnt/ro/file /mnt/ro/two'; do \
            $change 2> /dev/null && echo \"$change was done\"; done; \
        echo x 2> /dev/null >> /mnt/ro/file && echo written; readlink /mnt/ro/out";
    let options = ["--share", &share];
    let outcome = site.run(&options, ["sh", "-c", command]).output();
    outcome.expect_code(0).expect_stdout("content\n/etc/passwd\n");
    let left: Vec<_> = shared.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    assert_eq!(std::fs::read_to_string(shared.join("file")).unwrap(), "content\n");
}

#[test]
fn host_and_guest_see_each_others_writes_at_once() {
    let site = Site::new();
    let command = "echo one > file; echo ready; read x; cat file; ls; echo done";
    let run = site.sh(&[], command).open_stdin();
    let mut run = run.start();
    run.wait_stdout("ready\n");
    assert_eq!(std::fs::read_to_string(site.cwd().join("file")).unwrap(), "one\n");
    std::fs::write(site.cwd().join("file"), "two, and longer\n").unwrap();
    std::fs::write(site.cwd().join("another"), "").unwrap();
    let name = std::ffi::OsStr::from_bytes(b"not-\xff-text");
    std::fs::write(site.cwd().join(name), "").unwrap();
    std::io::Write::write_all(run.stdin.as_mut().unwrap(), b"\n").unwrap();
    let outcome = run.finish();
    outcome.expect_code(0);
    let wanted = b"ready\ntwo, and longer\nanother\nfile\nnot-\xff-text\ndone\n";
    assert_eq!(outcome.stdout, wanted, "{}", outcome.stdout_text());
}

#[test]
fn the_default_is_said() {
    let site = Site::new();
    for kernel in [DEBIAN_6_12, CLOUD[0]] {
        let planned = site.run_with(kernel, &["--dry-run"], ["true"]).output().stdout_text();
        let devices = ["vhost-user-fs-pci", "virtio-9p-pci"].map(|name| planned.contains(name));
        assert_eq!(devices, [true, false], "{planned}");
    }
}
