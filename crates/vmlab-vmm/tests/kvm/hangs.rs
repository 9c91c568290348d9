//! Devices whose host does not answer.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmlab_devices::{Device, QueueError, QueueKind, Turn, VirtQueue};
use vmlab_vmm::x86_64::{Machine, Plug};

use crate::SOON;
use crate::guest::*;

/// How long whoever ends a VM waits for its devices, and more.
const END: Duration = Duration::from_secs(20);

/// A device that serves nothing before it is told to.
struct Hangs {
    begun: Sender<()>,
    answer: Mutex<Receiver<()>>,
}

impl Device for Hangs {
    fn id(&self) -> u32 {
        4
    }

    fn queues(&self) -> Vec<QueueKind> {
        vec![QueueKind { max_size: 4, workers: 1 }]
    }

    fn process(&self, _: usize, _: &VirtQueue, _: &mut Turn<'_>) -> Result<(), QueueError> {
        let _ = self.begun.send(());
        let _ = self.answer.lock().unwrap().recv();
        Ok(())
    }
}

/// Sets up the device, resets it once there is input, and counts.
fn resets() -> Vec<u8> {
    const SLOT: u32 = 0xd000_0000;
    // Registers of virtio-mmio: the status, a feature (VIRTIO_F_VERSION_1), and a queue of four at 2 MiB.
    let setup = [
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 0xb),
        (0x30, 0),
        (0x38, 4),
        (0x80, 0x30_0000),
        (0x90, 0x30_1000),
        (0xa0, 0x30_2000),
        (0x44, 1),
        (0x70, 0xf),
    ];
    let setup = setup.iter().flat_map(|(register, value)| store(SLOT + register, *value));
    let wait = [
        0x66, 0xba, 0xfd, 0x03, // 1: mov dx, COM1 + 5
        0xec, //                      in al, dx
        0xa8, 0x01, //                test al, 1
        0x74, 0xf7, //                jz 1b
    ];
    setup.chain(wait).chain(store(SLOT + 0x70, 0)).chain(count()).collect()
}

/// A guest that has reset the device, which hangs; what has it answer, and the console.
fn stuck() -> (Machine, Sender<()>, UnixStream) {
    let (begun, has_begun) = channel();
    let (answer, answered) = channel();
    let device = Arc::new(Hangs { begun, answer: Mutex::new(answered) });
    let on_fault = Arc::new(|queue, fault| panic!("queue {queue}: {fault}"));
    let (config, mut console) = config(1);
    let machine = boot_with(config, &resets(), vec![Plug { slot: 0, device, on_fault }]);
    machine.resume().unwrap();
    has_begun.recv_timeout(END).unwrap();
    console.write_all(b"x").unwrap();
    // It is a matter of some instructions.
    thread::sleep(Duration::from_millis(200));
    assert_eq!(counted(&machine), 0);
    (machine, answer, console)
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_guest_that_resets_a_device_which_hangs_is_paused_and_goes_on_once_it_is_reset() {
    let (machine, answer, _console) = stuck();
    for _ in 0..3 {
        let started = Instant::now();
        machine.pause().unwrap();
        assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
        machine.resume().unwrap();
        thread::sleep(Duration::from_millis(20));
        assert_eq!(counted(&machine), 0, "it goes on before its device is reset");
    }
    machine.pause().unwrap();
    drop(answer);
    machine.resume().unwrap();
    counts_on_from(&machine, 0);
    machine.pause().unwrap();
    machine.save().unwrap();
}

#[test]
#[ignore = "needs a KVM that works: run by scripts/test.sh in a nested guest"]
fn a_machine_whose_device_hangs_is_ended_in_bounded_time() {
    let (machine, answer, _console) = stuck();
    let (tell, told) = channel();
    thread::spawn(move || {
        drop(machine);
        tell.send(()).unwrap();
    });
    told.recv_timeout(END).expect("whoever ends it waits for its device");
    // What hangs goes on, and is gone then.
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let before = threads();
    drop(answer);
    let deadline = Instant::now() + END;
    while threads() >= before {
        assert!(Instant::now() < deadline, "its threads are left");
        thread::sleep(Duration::from_millis(1));
    }
}
