//! What the thread of a processor cannot do, by system calls of its own, and that it can do what the run loop does.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kvm_ioctls::Kvm;
use rustix::io::Errno;

use super::*;
use crate::gate::{End, Gate};
use crate::kick::Kick;

/// What is no processor, but has a descriptor.
fn no_processor() -> File {
    File::open("/dev/null").unwrap()
}

/// Has the calling thread be one of a processor and a VM that this is said to be.
fn restrict(file: &File) {
    enter(file.as_fd(), file.as_fd()).unwrap();
}

/// Does something in the thread of a processor.
fn restricted<T: Send>(does: impl FnOnce(&File) -> T + Send) -> T {
    let file = no_processor();
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            restrict(&file);
            does(&file)
        });
        thread.join().unwrap()
    })
}

/// Does something in the thread of a processor, and something else meanwhile.
fn restricted_while(does: impl FnOnce() + Send, meanwhile: impl FnOnce() + Send) {
    thread::scope(|scope| {
        scope.spawn(meanwhile);
        restricted(|_| does());
    });
}

/// How a system call fails, which is made as it is.
fn raw(call: libc::c_long, arguments: [usize; 5]) -> Errno {
    let [a, b, c, d, e] = arguments;
    // SAFETY: no test gives more than numbers, and pointers to live strings that the kernel only reads.
    let result = unsafe { libc::syscall(call, a, b, c, d, e) };
    assert_eq!(result, -1, "the system call {call} was made");
    Errno::from_io_error(&io::Error::last_os_error()).unwrap()
}

#[test]
fn no_file_is_opened_and_nothing_executed_and_nobody_signalled() {
    let here = libc::AT_FDCWD as usize;
    let path = c"/etc/passwd".as_ptr() as usize;
    let mut other = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = other.id() as usize;
    restricted(|_| {
        let none = |call, arguments| {
            assert_eq!(raw(call, arguments), Errno::NOSYS, "system call {call}");
        };
        none(libc::SYS_openat, [here, path, libc::O_RDONLY as usize, 0, 0]);
        none(libc::SYS_openat2, [here, path, 0, 0, 0]);
        none(libc::SYS_unlinkat, [here, path, 0, 0, 0]);
        none(libc::SYS_execve, [0; 5]);
        none(libc::SYS_execveat, [0; 5]);
        none(libc::SYS_clone, [libc::CLONE_SIGHAND as usize, 0, 0, 0, 0]);
        none(libc::SYS_clone3, [0; 5]);
        none(libc::SYS_ptrace, [libc::PTRACE_TRACEME as usize, 0, 0, 0, 0]);
        none(libc::SYS_socket, [libc::AF_UNIX as usize, libc::SOCK_STREAM as usize, 0, 0, 0]);
        none(libc::SYS_socket, [libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0, 0, 0]);
        none(libc::SYS_sendmsg, [usize::MAX, 0, 0, 0, 0]);
        none(libc::SYS_sendto, [usize::MAX, path, 1, 0, path]);
        none(libc::SYS_pwrite64, [usize::MAX, path, 1, 0, 0]);
        none(libc::SYS_kill, [pid, 0, 0, 0, 0]);
        none(libc::SYS_tgkill, [pid, pid, 0, 0, 0]);
        let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
        let code = (libc::PROT_READ | libc::PROT_EXEC) as usize;
        none(libc::SYS_mmap, [0, 4096, code, private, usize::MAX]);
        none(libc::SYS_mprotect, [0, 0, code, 0, 0]);
    });
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn only_its_own_processor_and_vm_are_operated() {
    let other = no_processor();
    restricted(|file| {
        let operate = |file: &File, operation: Opcode| {
            raw(libc::SYS_ioctl, [file.as_raw_fd() as usize, operation as usize, 0, 0, 0])
        };
        for operation in ON_PROCESSOR.into_iter().chain([KVM_IRQ_LINE]) {
            // What is no processor and no VM does not know them.
            assert_eq!(operate(file, operation), Errno::NOTTY);
            assert_eq!(operate(&other, operation), Errno::NOSYS);
        }
        // Of linux/kvm.h: KVM_CREATE_VM, KVM_SET_REGS, KVM_SET_SREGS, KVM_SET_USER_MEMORY_REGION.
        let memory = opcode::write::<kvm_bindings::kvm_userspace_memory_region>(GROUP, 0x46);
        for operation in [
            opcode::none(GROUP, 0x01),
            opcode::write::<kvm_regs>(GROUP, 0x82),
            opcode::write::<kvm_sregs>(GROUP, 0x84),
            memory,
            libc::FIONREAD as Opcode,
        ] {
            assert_eq!(operate(file, operation), Errno::NOSYS, "{operation:#x}");
        }
    });
}

#[test]
fn lines_kicks_and_other_threads_work_as_ever() {
    let (mut line, host) = UnixStream::pair().unwrap();
    let event = vmlab_devices::Event::new().unwrap();
    let (kick, gate) = (Kick::default(), Arc::new(Gate::new(1).unwrap()));
    let control = super::super::control::Control::new(Arc::clone(&gate)).unwrap();
    let theirs = kick.clone();
    let passed = Arc::clone(&gate);
    let (ready, is_ready) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || {
        theirs.block_signal().unwrap();
        restrict(&no_processor());
        line.write_all(b"out").unwrap();
        event.signal();
        event.clear();
        // Threads start, with all their rights, in the one that is there for that.
        let (tell, told) = std::sync::mpsc::channel();
        let job = move || {
            let read = thread::spawn(|| std::fs::read("/etc/passwd").is_ok());
            tell.send(read.join().unwrap()).unwrap();
        };
        control.run(job).unwrap();
        assert!(told.recv().unwrap());
        ready.send(()).unwrap();
        let mut rounds = 0;
        while passed.pass() {
            while !theirs.is_sent() {
                thread::yield_now();
            }
            theirs.take();
            rounds += 1;
        }
        rounds
    });
    is_ready.recv().unwrap();
    for _ in 0..3 {
        gate.open();
        thread::sleep(Duration::from_millis(5));
        gate.close(|| kick.send(&thread));
    }
    gate.end(End::Stopped);
    assert!(thread.join().unwrap() > 0);
    let mut said = [0; 3];
    std::io::Read::read_exact(&mut &host, &mut said).unwrap();
    assert_eq!(&said, b"out");
}

#[test]
fn a_processor_that_is_to_stop_does_not_wait_for_a_host_that_does_not_read() {
    let event = || vmlab_devices::Event::new().unwrap();
    let (_host, socket) = UnixStream::pair().unwrap();
    let awaited = event();
    let theirs = awaited.try_clone().unwrap();
    let line = super::super::serial::Line::new(socket, Arc::new(event()), theirs, None).unwrap();
    let gate = Gate::new(1).unwrap();
    gate.open();
    restricted_while(
        || {
            while gate.pass() {
                line.write(0, b'x');
            }
        },
        || {
            thread::sleep(Duration::from_millis(50));
            gate.close(|| awaited.signal());
            gate.end(End::Stopped);
        },
    );
}

#[test]
fn processors_interrupt_each_other() {
    let kick = Kick::default();
    let theirs = kick.clone();
    let waits = thread::spawn(move || {
        theirs.block_signal().unwrap();
        restrict(&no_processor());
        while !theirs.is_sent() {
            thread::yield_now();
        }
        theirs.take();
    });
    thread::scope(|scope| {
        scope.spawn(|| {
            restrict(&no_processor());
            kick.send(&waits);
        });
    });
    waits.join().unwrap();
}

#[test]
#[ignore = "needs a KVM: run it in a guest that has one"]
fn a_processor_is_run_and_described_and_its_vm_interrupted() {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let done = thread::spawn(move || {
        // SAFETY: the descriptors belong to the processor and the VM, which are open during the borrow.
        let fds =
            [vcpu.as_raw_fd(), vm.as_raw_fd()].map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
        enter(fds[0], fds[1]).unwrap();
        vcpu.set_kvm_immediate_exit(1);
        let ran = vcpu.run().map(drop).map_err(|error| error.errno());
        let known = (vcpu.get_regs().is_ok(), vcpu.get_sregs().is_ok());
        let found = vcpu.translate_gva(0).is_ok();
        // There is no such clock yet, of which the guest has to say where it is.
        let clock = vcpu.kvmclock_ctrl().map_err(|error| error.errno());
        let set = vcpu.set_regs(&kvm_regs::default()).map_err(|error| error.errno());
        let interrupts = (vm.set_irq_line(4, true).is_ok(), vm.create_vcpu(1).is_ok());
        (ran, known, found, clock, set, interrupts)
    });
    let done = done.join().unwrap();
    let (ran, clock, set) = (Err(libc::EINTR), Err(libc::EINVAL), Err(libc::ENOSYS));
    assert_eq!(done, (ran, (true, true), true, clock, set, (true, false)));
}

/// Tells a process of this test that its thread is to panic.
const PANICS: &str = "VMLAB_TEST_PANICS";

#[test]
fn what_a_panic_says_is_seen_and_the_thread_ends() {
    if std::env::var_os(PANICS).is_some() {
        let thread = thread::spawn(|| {
            restrict(&no_processor());
            panic!("on purpose, in the thread of a processor");
        });
        assert!(thread.join().is_err());
        return;
    }
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.env(PANICS, "1").env("RUST_BACKTRACE", "1").args([
        "--exact",
        "--nocapture",
        "x86_64::sandbox::tests::what_a_panic_says_is_seen_and_the_thread_ends",
    ]);
    let output = again.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("on purpose, in the thread of a processor"), "{said}");
}
