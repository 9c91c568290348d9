//! Streams between a guest and the program that has started it, with real VMs.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod common;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::Logs;
use tempfile::TempDir;
use vmlab::units::{Bytes, MIB};
use vmlab::{AccelChoice, Child, Error, Stdio, Vm, VmBuilder};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Sends back what comes to a port, of one connection after the other.
const SERVER: &str = "
import socket
listener = socket.socket(socket.AF_VSOCK)
listener.bind((0xffffffff, 99))
listener.listen(8)
print('ready', flush=True)
while True:
    stream = listener.accept()[0]
    try:
        while part := stream.recv(1 << 16):
            stream.sendall(part)
    except OSError as error:
        with open('/tmp/error', 'a') as file:
            print(error.strerror, file=file)
    stream.close()
";

/// Says something to a port of the host, and what comes back.
const CLIENT: &str = "
import socket
stream = socket.socket(socket.AF_VSOCK)
stream.connect((2, 1234))
stream.sendall(b'from the guest')
stream.shutdown(socket.SHUT_WR)
print(stream.recv(100).decode())
";

/// Under whatever this host has; QEMU's own emulation where KVM is of no use.
fn builder() -> VmBuilder {
    Vm::builder().kernel("debian:6.12-cloud").memory(Bytes(512 * MIB)).accel(AccelChoice::Auto)
}

fn python<'a>(vm: &'a Vm, script: &str) -> vmlab::Command<'a> {
    vm.command("/usr/bin/python3").args(["-SEc", script])
}

/// A server of the guest that listens.
fn serve(vm: &Vm) -> Child<'_> {
    let mut server = python(vm, SERVER).stdout(Stdio::Piped).spawn().unwrap();
    let mut said = BufReader::new(server.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    server
}

/// Waits until streams hold: the guest ends all that it has when it hears of the snapshot, also a new one.
fn settle(vm: &Vm) {
    let until = Instant::now() + PATIENCE;
    while let Err(error) = vm.vsock_connect(99) {
        assert!(Instant::now() < until, "{error}");
    }
}

fn echo(vm: &Vm) {
    let mut stream = vm.vsock_connect(99).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"there and back").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut back = String::new();
    stream.read_to_string(&mut back).unwrap();
    assert_eq!(back, "there and back");
}

/// A client of the guest, and this program as its server.
fn be_asked(vm: &Vm) {
    let listener = vm.vsock_listen(1234).unwrap();
    let mut client = python(vm, CLIENT).stdout(Stdio::Piped).spawn().unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert_eq!(said, "from the guest");
    stream.write_all(b"from the host").unwrap();
    drop(stream);
    let mut answered = String::new();
    client.stdout.take().unwrap().read_to_string(&mut answered).unwrap();
    assert_eq!(answered, "from the host\n");
}

fn sockets(dir: &TempDir) -> usize {
    std::fs::read_dir(dir.path()).unwrap().count()
}

#[test]
fn host_and_guest_talk_as_long_as_the_vm_is_there() {
    let _logs = Logs::new();
    let dir = TempDir::new().unwrap();
    let mut vm = builder().vsock(dir.path()).start().unwrap();
    let refused = vm.vsock_connect(99).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{refused}");
    be_asked(&vm);
    let server = serve(&vm);
    echo(&vm);
    drop(server);
    // Another VM has the directory as soon as this one has not.
    let other = builder().vsock(dir.path()).start().unwrap_err();
    assert!(matches!(other, Error::Hypervisor(_)), "{other}");

    let mut cut = vm.vsock_connect(99).unwrap();
    vm.reset().unwrap();
    assert_eq!(cut.read(&mut [0]).unwrap_or(0), 0);
    be_asked(&vm);
    let server = serve(&vm);
    echo(&vm);
    drop(server);
    assert_eq!(sockets(&dir), 2);
    vm.shutdown().unwrap();
    assert!(vm.vsock_connect(99).is_err());
    drop(vm);
    assert_eq!(sockets(&dir), 0);
}

#[test]
fn a_vm_without_it_says_so() {
    let _logs = Logs::new();
    let vm = builder().start().unwrap();
    assert_eq!(vm.vsock_connect(99).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(vm.vsock_listen(99).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn a_snapshot_in_the_midst_of_a_run_ends_all_streams_or_is_refused() {
    let _logs = Logs::new();
    let dir = TempDir::new().unwrap();
    let mut vm = builder().vsock(dir.path()).pluggable(true).start().unwrap();
    let server = serve(&vm);
    let open: UnixStream = vm.vsock_connect(99).unwrap();
    // It goes on with the VM, which the borrow does not know.
    std::mem::forget(server);
    let snapshot = match vm.snapshot() {
        Err(Error::NotInSnapshot { why }) => {
            assert!(why.contains("vsock"), "{why}");
            // The server has one at a time.
            drop(open);
            echo(&vm);
            return;
        }
        taken => taken.unwrap(),
    };
    for _ in 0..2 {
        assert_eq!((&open).read(&mut [0]).unwrap_or(0), 0);
        settle(&vm);
        echo(&vm);
        vm.restore(&snapshot).unwrap();
    }
    settle(&vm);
    echo(&vm);
    // One stream was open, and the server has seen its end: while it waited for data, or just before.
    let error = vm.exec(["cat", "/tmp/error"]).unwrap().stdout_text();
    let ends = ["Connection reset by peer\n", "Transport endpoint is not connected\n"];
    assert!(ends.contains(&&*error), "{error:?}");
    be_asked(&vm);
}
