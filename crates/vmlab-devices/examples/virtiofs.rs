//! Boots a kernel in QEMU with a share, a random number generator and a shell script as init:
//!
//! `virtiofs DIR KERNEL BUSYBOX SCRIPT [--machine microvm|q35] [--end guest|server|qemu] [--add FILE]...`
//!
//! The script finds the share by the tag `root`. `--end server` drops the device when the script says
//! `ready` on the console, `--end qemu` kills QEMU then. `--add` puts a file into the initramfs. A microvm
//! on a busy host needs `--append tsc_early_khz=…`, which `vmlab` measures.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program to try things with")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use rustix::io::{FdFlags, fcntl_setfd};
use vmlab_devices::fs::Fs;
use vmlab_devices::rng::Rng;
use vmlab_devices::transport::vhost_user::serve;
use vmlab_fuse::{Passthrough, PassthroughConfig, Server};

fn main() {
    let (mut plain, mut add, mut append) = (Vec::new(), Vec::new(), String::new());
    let (mut machine, mut end) = ("microvm".to_owned(), "guest".to_owned());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--machine" => machine = args.next().unwrap(),
            "--end" => end = args.next().unwrap(),
            "--append" => append = args.next().unwrap(),
            "--add" => add.push(args.next().unwrap()),
            _ => plain.push(arg),
        }
    }
    let [dir, kernel, busybox, script] = plain.try_into().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let initramfs = scratch.path().join("initramfs");
    fs::write(&initramfs, archive(&busybox, &script, &add)).unwrap();

    let (fs_here, fs_there) = UnixStream::pair().unwrap();
    let (rng_here, rng_there) = UnixStream::pair().unwrap();
    for fd in [&fs_there, &rng_there] {
        fcntl_setfd(fd, FdFlags::empty()).unwrap();
    }
    let machine = match machine.as_str() {
        "microvm" => "microvm,pcie=on,acpi=on,memory-backend=mem",
        _ => "q35,smbus=off,sata=off,vmport=off,memory-backend=mem",
    };
    let start = Instant::now();
    let share = Passthrough::new(Path::new(&dir), PassthroughConfig::default()).unwrap();
    let fs = serve(Arc::new(Fs::new(Server::new(share), "root", 1)), fs_here);
    let mut fs = Some(fs.unwrap());
    let rng = serve(Arc::new(Rng::new()), rng_here).unwrap();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-machine", machine, "-accel", "tcg,thread=multi"])
        .args(["-cpu", "max,la57=off,erms=off,fsrm=off", "-m", "512M"])
        .args(["-object", "memory-backend-memfd,id=mem,size=512M,share=on"])
        .args(["-kernel", &kernel, "-initrd", initramfs.to_str().unwrap()])
        .args(["-append", &format!("console=ttyS0 panic=-1 quiet {append}"), "-serial", "stdio"])
        .args(["-chardev", &format!("socket,id=fs0,fd={}", fs_there.as_raw_fd())])
        .args(["-device", "vhost-user-fs-pci,chardev=fs0,tag=root,queue-size=1024"])
        .args(["-chardev", &format!("socket,id=rng0,fd={}", rng_there.as_raw_fd())])
        .args(["-device", "vhost-user-rng-pci,chardev=rng0"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // QEMU alone has these now, so its end is seen.
    drop((fs_there, rng_there));
    for line in BufReader::new(qemu.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        println!("{:8.3} {line}", start.elapsed().as_secs_f64());
        if line.trim_end() == "ready" {
            match end.as_str() {
                "server" => println!("-- server dropped: {:?}", fs.take().unwrap().stop()),
                "qemu" => qemu.kill().unwrap(),
                _ => {}
            }
        }
    }
    println!("{:8.3} QEMU: {}", start.elapsed().as_secs_f64(), qemu.wait().unwrap());
    if let Some(fs) = fs {
        println!("{:8.3} fs: {:?}", start.elapsed().as_secs_f64(), fs.wait());
    }
    println!("{:8.3} rng: {:?}", start.elapsed().as_secs_f64(), rng.wait());
}

/// An initramfs in the format of the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.
fn archive(busybox: &str, script: &str, add: &[String]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut entry = |name: &str, mode: u32, data: &[u8]| {
        write!(out, "070701").unwrap();
        let (size, name_size) = (data.len() as u32, name.len() as u32 + 1);
        // The console is character device 5:1.
        let (major, minor) = if name == "dev/console" { (5, 1) } else { (0, 0) };
        for field in [1, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0] {
            write!(out, "{field:08x}").unwrap();
        }
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(4), 0);
    };
    for dir in ["bin", "dev", "proc", "sys", "mnt", "add"] {
        entry(dir, 0o40755, b"");
    }
    entry("dev/console", 0o20600, b"");
    entry("bin/busybox", 0o100_755, &fs::read(busybox).unwrap());
    for applet in ["sh", "mount"] {
        entry(&format!("bin/{applet}"), 0o120_777, b"busybox");
    }
    for path in add {
        let name = path.rsplit('/').next().unwrap();
        entry(&format!("add/{name}"), 0o100_644, &fs::read(path).unwrap());
    }
    entry("init", 0o100_755, &fs::read(script).unwrap());
    entry("TRAILER!!!", 0, b"");
    out
}
