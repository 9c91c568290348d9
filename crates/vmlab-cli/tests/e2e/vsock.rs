//! Streams between guests and programs of the host, whose Unix sockets are in a directory of each VM.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use crate::common::snapshots::Cold;
use crate::common::{CLOUD, Site, Vmlab, mode, need, noise};

/// What guests do. Each port of theirs is served until the script ends.
const GUEST: &str = r#"
import fcntl, os, socket, threading
HOST, HERE, ANY = 2, 3, 0xffffffff

def cid():
    number = bytearray(4)
    with open('/dev/vsock', 'rb') as device:
        fcntl.ioctl(device, 0x7b9, number)  # IOCTL_VM_SOCKETS_GET_LOCAL_CID
    return int.from_bytes(number, 'little')

def connect(port, cid=HOST):
    stream = socket.socket(socket.AF_VSOCK)
    stream.connect((cid, port))
    return stream

def try_to_connect(port, cid=HOST):
    try:
        connect(port, cid)
        return 'connected'
    except OSError as error:
        return os.strerror(error.errno)

def whole(stream):
    stream.shutdown(socket.SHUT_WR)
    said = bytearray()
    while part := stream.recv(1 << 16):
        said += part
    return bytes(said)

def echo(stream):
    while part := stream.recv(1 << 16):
        stream.sendall(part)
    stream.close()

def serve(port, count=1):
    listener = socket.socket(socket.AF_VSOCK)
    listener.bind((ANY, port))
    listener.listen(128)
    def accept():
        threads = [threading.Thread(target=echo, args=(listener.accept()[0],)) for _ in range(count)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    thread = threading.Thread(target=accept)
    thread.start()
    return thread
"#;

/// The options and the command of a guest that runs a script of Python.
fn guest(dir: &Path, script: &str) -> (Vec<String>, Vec<String>) {
    need("python3", "python3");
    let options = ["-m", "512M", "--vsock", dir.to_str().unwrap()].map(str::to_owned);
    let command = ["/usr/bin/python3", "-SEc", &format!("{GUEST}\n{script}")].map(str::to_owned);
    (options.into(), command.into())
}

/// One of the kernels with a guest.
fn run(site: &Site, kernel: &'static str, dir: &Path, script: &str) -> Vmlab {
    let (options, command) = guest(dir, script);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    site.run_with(kernel, &options, command)
}

fn listen(dir: &Path, port: u32) -> UnixListener {
    std::fs::create_dir_all(dir).unwrap();
    UnixListener::bind(dir.join(format!("vsock_{port}"))).unwrap()
}

/// Asks for a port of the guest; `None` where nobody is there.
fn connect(dir: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(dir.join("vsock")).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut line = String::new();
    // No byte behind the line is there yet: the guest's servers answer only.
    BufReader::new(&stream).read_line(&mut line).unwrap();
    if line.is_empty() {
        return None;
    }
    assert!(line.starts_with("OK ") && line.ends_with('\n'), "{line:?}");
    Some(stream)
}

/// What the other side makes of this.
fn exchange(mut stream: &UnixStream, bytes: &[u8]) -> Vec<u8> {
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut writer = stream;
            writer.write_all(bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        back
    })
}

/// Sends back what comes, in upper case.
fn upper(listener: &UnixListener) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).unwrap();
    stream.write_all(&said.to_ascii_uppercase()).unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn streams_go_both_ways_under_all_kernels() {
    let script = "
print('cid', cid())
stream = connect(1000)
stream.sendall(b'to the host' * 100000)
said = whole(stream)
print(said == b'TO THE HOST' * 100000)
server = serve(2000)
print('ready', flush=True)
server.join()
";
    for kernel in CLOUD {
        let site = Site::new();
        let dir = site.path().join("sockets");
        let listener = listen(&dir, 1000);
        // As a VM leaves it whose process was killed.
        drop(UnixListener::bind(dir.join("vsock")).unwrap());
        let running = run(&site, kernel, &dir, script).start();
        upper(&listener);
        running.wait_stdout("ready\n");
        let bytes = noise(3 << 20);
        let stream = connect(&dir, 2000).unwrap();
        assert!(exchange(&stream, &bytes) == bytes, "{kernel}");
        let outcome = running.finish();
        outcome.expect_code(0).expect_stdout("cid 3\nTrue\nready\n");
        // What was there before is left.
        assert_eq!(names(&dir), ["vsock_1000"], "{kernel}");
    }
}

#[test]
fn many_streams_at_once_are_kept_apart() {
    const COUNT: usize = 60;
    let script = "
server = serve(2000, 60)
print('ready', flush=True)
wrong = []
def one(number):
    word = b'guest %d ' % number * 5000
    stream = connect(1000)
    stream.sendall(word)
    if whole(stream) != word.upper(): wrong.append(number)
threads = [threading.Thread(target=one, args=(number,)) for number in range(60)]
for thread in threads: thread.start()
for thread in threads: thread.join()
server.join()
print(wrong)
";
    let site = Site::new();
    let dir = site.path().join("sockets");
    let listener = listen(&dir, 1000);
    let running = run(&site, CLOUD[0], &dir, script).start();
    running.wait_stdout("ready\n");
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::scope(|scope| {
                for _ in 0..COUNT {
                    scope.spawn(|| upper(&listener));
                }
            });
        });
        for number in 0..COUNT {
            let dir = &dir;
            scope.spawn(move || {
                let word = format!("host {number} ").repeat(5000);
                let stream = connect(dir, 2000).unwrap();
                assert!(exchange(&stream, word.as_bytes()) == word.as_bytes(), "{number}");
            });
        }
    });
    running.finish().expect_code(0).expect_stdout("ready\n[]\n");
}

#[test]
fn nobody_and_other_vms_are_not_reached() {
    let site = Site::new();
    let dirs = ["a", "b"].map(|name| site.path().join(name));
    let server = "
server = serve(2000)
print('ready', flush=True)
server.join()
";
    let one = run(&site, CLOUD[0], &dirs[0], server).start();
    one.wait_stdout("ready\n");
    assert_eq!(mode(&dirs[0]) & 0o777, 0o700);
    // For the first VM only.
    let _listener = listen(&dirs[0], 1000);
    let tries = "
for at in (1000, HOST), (1001, HOST), (2000, HERE), (2000, 4), (2000, 5):
    print(try_to_connect(*at))
";
    let two = run(&site, CLOUD[0], &dirs[1], tries).output();
    let said = two.expect_code(0).stdout_text();
    assert_eq!(said.lines().count(), 5, "{said}");
    assert!(!said.contains("connected"), "{said}");
    assert_eq!(said.lines().next(), Some("Connection reset by peer"), "{said}");
    assert!(names(&dirs[1]).is_empty());
    assert!(connect(&dirs[0], 2001).is_none());

    let same = run(&site, CLOUD[0], &dirs[0], "print('runs')").output();
    same.expect_code(125)
        .expect_stderr(&["cannot be used for the VM's vsock", "another VM has it"]);
    // It was not disturbed.
    assert_eq!(exchange(&connect(&dirs[0], 2000).unwrap(), b"still there"), b"still there");
    one.finish().expect_code(0);
    assert_eq!(names(&dirs[0]), ["vsock_1000"]);
}

#[test]
fn a_guest_that_goes_on_from_a_snapshot_has_it() {
    let cold = Cold::new();
    let dir = cold.site.path().join("sockets");
    let listener = listen(&dir, 1000);
    let script = "
print('cid', cid())
stream = connect(1000)
stream.sendall(b'word')
print(whole(stream))
serve(2000)
print('ready', flush=True)
";
    let (options, command) = guest(&dir, script);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    for taken in [true, false] {
        let begun = cold.start(&options, &command);
        upper(&listener);
        begun.running.wait_stdout("ready\n");
        let stream = connect(&dir, 2000).unwrap();
        assert_eq!(exchange(&stream, b"echo"), b"echo");
        let ran = begun.finish();
        match taken {
            true => ran.expect_taken(),
            false => ran.expect_restored(),
        };
        ran.expect_stdout("cid 3\nb'WORD'\nready\n");
        assert_eq!(names(&dir), ["vsock_1000"]);
    }
}

#[test]
fn what_cannot_be_is_said_before_anything_runs() {
    let site = Site::new();
    let says = |options: &[&str], wanted: &[&str]| {
        let outcome = site.run_with(CLOUD[0], options, ["true"]).output();
        outcome.expect_code(125).expect_stderr(wanted);
    };
    let many = ["--vsock", "d", "--repeat", "2"];
    says(&many, &["--vsock is for one VM at a time", "--jobs 1"]);
    let long: PathBuf = site.cwd().join("x".repeat(90));
    says(&["--vsock", long.to_str().unwrap()], &["90 bytes are possible"]);
    assert!(!long.exists());
    let open = site.path().join("open");
    std::fs::create_dir(&open).unwrap();
    let all = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&open, all).unwrap();
    says(&["--vsock", open.to_str().unwrap()], &["everybody can write to it"]);

    // The working directory is shared, writable.
    says(&["--vsock", "sockets"], &["the guest can write to", "outside of writable shares"]);
    let dir = site.path().join("sockets");
    let twice = ["--vsock", dir.to_str().unwrap(), "--repeat", "2", "--jobs", "1"];
    site.run_with(CLOUD[0], &twice, ["true"]).output().expect_code(0);
    assert!(names(&dir).is_empty());
}
