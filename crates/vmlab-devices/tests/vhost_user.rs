//! The protocol, with this process as the monitor.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmlab_devices::fs::{Fs, Passthrough, PassthroughConfig, Server};
use vmlab_devices::rng::Rng;
use vmlab_devices::transport::vhost_user::{Error, Served, serve, serve_on};
use vmlab_devices::{Device, Fault, QueueError, QueueKind, Turn, VirtQueue};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[path = "common/driver.rs"]
#[allow(dead_code, reason = "not every test uses all of it")]
mod driver;

use driver::{AVAILABLE, BUFFERS, Driver, SIZE, TABLE, USED, WRITE};

/// Far longer than anything here takes.
const PATIENCE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

struct Monitor {
    driver: Driver,
    frontend: Frontend,
    kick: EventFd,
    call: EventFd,
    served: Served,
}

fn monitor() -> Monitor {
    monitor_of(Arc::new(Rng::new()))
}

fn monitor_of(device: Arc<dyn Device>) -> Monitor {
    monitor_by(|stream| serve(device, stream).unwrap())
}

fn monitor_by(serve: impl FnOnce(UnixStream) -> Served) -> Monitor {
    let (here, there) = UnixStream::pair().unwrap();
    let served = serve(there);
    let driver = Driver::new();
    let mut frontend = Frontend::from_stream(here, 2);
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap();
    frontend.set_features(features).unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
    frontend.set_protocol_features(protocol).unwrap();
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    let call = EventFd::new(EFD_NONBLOCK).unwrap();
    Monitor { driver, frontend, kick, call, served }
}

impl Monitor {
    fn start(&mut self) {
        let region = self.driver.memory.find_region(GuestAddress(0)).unwrap();
        let host = region.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap() as u64;
        let info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        self.frontend.set_mem_table(&[info]).unwrap();
        self.frontend.set_vring_num(0, SIZE).unwrap();
        let config = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: host + TABLE,
            used_ring_addr: host + USED,
            avail_ring_addr: host + AVAILABLE,
            log_addr: None,
        };
        self.frontend.set_vring_addr(0, &config).unwrap();
        self.frontend.set_vring_base(0, 0).unwrap();
        self.frontend.set_vring_call(0, &self.call).unwrap();
        self.frontend.set_vring_kick(0, &self.kick).unwrap();
        self.frontend.set_vring_enable(0, true).unwrap();
    }

    /// Waits for an interrupt.
    fn interrupted(&self) {
        // SAFETY: the descriptor is open for as long as `self` is borrowed.
        let call = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
        let mut fds = [PollFd::from_borrowed_fd(call, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&PATIENCE)).unwrap(), 1, "no interrupt");
        self.call.read().unwrap();
    }

    /// Asks a disk for a sector.
    fn read_sector(&self, number: u64) {
        use vm_memory::Bytes;
        let header = [&0u64.to_le_bytes()[..], &number.to_le_bytes()].concat();
        self.driver.memory.write_slice(&header, GuestAddress(BUFFERS)).unwrap();
        self.driver.describe(0, (BUFFERS, 16, driver::NEXT, 1));
        self.driver.describe(1, (BUFFERS + 512, 513, WRITE, 0));
        self.driver.offer(0);
        self.kick.write(1).unwrap();
    }

    fn ask(&self, interrupts: u64) {
        self.driver.describe(0, (BUFFERS, 32, WRITE, 0));
        // The event index asks for an interrupt with every request.
        self.driver.set(AVAILABLE + 4 + 2 * u64::from(SIZE), interrupts as u16);
        self.driver.offer(0);
        self.kick.write(1).unwrap();
        self.interrupted();
        assert_eq!(self.driver.used().last(), Some(&(0, 32)));
    }
}

#[test]
fn a_device_serves_until_the_monitor_goes() {
    let mut monitor = monitor();
    monitor.start();
    monitor.ask(0);
    monitor.ask(1);
    // A ring that is stopped says where it was, and starts again from there.
    assert_eq!(monitor.frontend.get_vring_base(0).unwrap(), 2);
    drop(monitor.frontend);
    monitor.served.wait().unwrap();
}

#[test]
fn a_broken_ring_ends_the_connection_with_a_reason() {
    let mut monitor = monitor();
    monitor.start();
    monitor.driver.set(AVAILABLE + 2, SIZE + 1);
    monitor.kick.write(1).unwrap();
    let error = monitor.served.wait().unwrap_err();
    assert!(matches!(error, Error::Queue { device: 4, queue: 0, .. }), "{error:?}");
    // The monitor sees it as well.
    assert!(monitor.frontend.get_features().is_err());
}

#[test]
fn rings_have_a_longest_length() {
    let dir = tempfile::tempdir().unwrap();
    let share = Passthrough::new(dir.path(), PassthroughConfig::default()).unwrap();
    let device: Arc<dyn Device> = Arc::new(Fs::new(Server::new(share), "tag", 1));
    assert!(device.queues().iter().all(|queue| queue.max_size == 1024));
    for (size, kept) in [(1, true), (1024, true), (2048, false), (1000, false), (0, false)] {
        let monitor = monitor_of(device.clone());
        // What is refused ends the connection.
        let _ = monitor.frontend.set_vring_num(0, size);
        assert_eq!(monitor.frontend.get_features().is_ok(), kept, "{size}");
    }
}

#[test]
fn a_restricted_thread_ends_the_connection_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let share = Passthrough::new(dir.path(), PassthroughConfig::default()).unwrap();
    let mut monitor = monitor_of(Arc::new(Fs::new(Server::new(share), "share", 1)));
    monitor.start();
    monitor.driver.set(AVAILABLE + 2, SIZE + 1);
    monitor.kick.write(1).unwrap();
    let begin = Instant::now();
    while monitor.frontend.get_features().is_ok() {
        assert!(begin.elapsed().as_secs() < PATIENCE.tv_sec as u64, "the connection goes on");
    }
    let error = monitor.served.wait().unwrap_err();
    assert!(matches!(error, Error::Queue { queue: 0, source: Fault::Queue(_), .. }), "{error:?}");
}

/// A device whose threads cannot be restricted.
struct Unprepared;

impl Device for Unprepared {
    fn id(&self) -> u32 {
        98
    }

    fn queues(&self) -> Vec<QueueKind> {
        vec![QueueKind { max_size: SIZE, workers: 2 }]
    }

    fn prepare_thread(&self) -> std::io::Result<()> {
        Err(std::io::ErrorKind::PermissionDenied.into())
    }

    fn process(&self, _: usize, _: &VirtQueue, _: &mut Turn<'_>) -> Result<(), QueueError> {
        panic!("a request is served")
    }
}

#[test]
fn a_thread_that_cannot_be_restricted_serves_nothing() {
    let mut monitor = monitor_of(Arc::new(Unprepared));
    monitor.start();
    monitor.driver.describe(0, (BUFFERS, 32, WRITE, 0));
    monitor.driver.offer(0);
    monitor.kick.write(1).unwrap();
    let error = monitor.served.wait().unwrap_err();
    assert!(matches!(error, Error::Queue { source: Fault::Prepare(_), .. }), "{error:?}");
    assert!(monitor.driver.used().is_empty());
}

#[test]
fn the_monitor_sees_that_a_device_was_dropped() {
    let mut monitor = monitor();
    monitor.start();
    monitor.ask(0);
    drop(monitor.served);
    assert!(monitor.frontend.get_vring_base(0).is_err());
}

#[test]
fn rings_outside_of_memory_are_refused() {
    let monitor = monitor();
    let region = monitor.driver.memory.find_region(GuestAddress(0)).unwrap();
    assert_eq!(region.len(), driver::MEMORY);
    let config = VringConfigData {
        queue_max_size: SIZE,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: 0x1000,
        used_ring_addr: 0x2000,
        avail_ring_addr: 0x3000,
        log_addr: None,
    };
    let _ = monitor.frontend.set_vring_addr(0, &config);
    let error = monitor.served.wait().unwrap_err();
    assert!(matches!(error, Error::Protocol { device: 4, .. }), "{error:?}");
}

/// A device with a mistake.
struct Faulty;

impl Device for Faulty {
    fn id(&self) -> u32 {
        99
    }

    fn queues(&self) -> Vec<QueueKind> {
        vec![QueueKind { max_size: SIZE, workers: 3 }]
    }

    fn process(&self, _: usize, queue: &VirtQueue, _: &mut Turn<'_>) -> Result<(), QueueError> {
        let memory = queue.memory();
        match queue.pop(&memory)? {
            Some(_) => panic!("not written yet"),
            None => Ok(()),
        }
    }
}

#[test]
fn a_panic_of_a_device_is_told_and_ends_its_threads() {
    let mut monitor = monitor_of(Arc::new(Faulty));
    monitor.start();
    monitor.driver.describe(0, (BUFFERS, 32, WRITE, 0));
    monitor.driver.offer(0);
    monitor.kick.write(1).unwrap();
    match monitor.served.wait().unwrap_err() {
        Error::Queue { device: 99, queue: 0, source: Fault::Panic(message) } => {
            assert_eq!(message, "not written yet");
        }
        error => panic!("{error:?}"),
    }
}

#[test]
fn a_ring_goes_on_where_it_was_stopped() {
    let mut monitor = monitor();
    monitor.start();
    monitor.ask(0);
    let base = monitor.frontend.get_vring_base(0).unwrap();
    // What comes while it is stopped waits, and needs no other kick.
    monitor.driver.set(AVAILABLE + 4 + 2 * u64::from(SIZE), 1);
    monitor.driver.offer(0);
    monitor.frontend.set_vring_base(0, base as u16).unwrap();
    monitor.frontend.set_vring_call(0, &monitor.call).unwrap();
    monitor.frontend.set_vring_kick(0, &monitor.kick).unwrap();
    monitor.interrupted();
    assert_eq!(monitor.driver.used(), [(0, 32), (0, 32)]);
}

#[test]
fn a_device_in_the_place_of_another_goes_on_where_that_one_stopped() {
    let mut first = monitor();
    first.start();
    first.ask(0);
    first.ask(1);
    assert_eq!(first.frontend.get_vring_base(0).unwrap(), 2);
    // A request that came after that.
    first.driver.describe(0, (BUFFERS, 32, WRITE, 0));
    first.driver.offer(0);

    let mut second = monitor_by(|stream| serve_on(Arc::new(Rng::new()), stream).unwrap());
    second.driver = first.driver;
    second.driver.set(AVAILABLE + 4 + 2 * u64::from(SIZE), 2);
    // The monitor knows nothing of the first one.
    second.start();
    second.interrupted();
    assert_eq!(second.driver.used(), [(0, 32); 3]);
    second.ask(3);
    // It is not so a second time: the monitor knows by then.
    assert_eq!(second.frontend.get_vring_base(0).unwrap(), 4);
}

#[test]
fn a_disk_gives_its_configuration_and_serves_each_queue() {
    use vhost::vhost_user::message::VhostUserConfigFlags;
    use vmlab_devices::blk::{Blk, Options, Source};

    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * 512).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 512], 63 * 512).unwrap();
    let options = Options { queues: 2, ..Options::default() };
    let disk = Blk::open(Source::Kept(file), "disk", &options).unwrap();
    let mut monitor = monitor_of(Arc::new(disk));
    assert_eq!(monitor.frontend.get_queue_num().unwrap(), 2);
    let flags = VhostUserConfigFlags::WRITABLE;
    // As QEMU asks: with as much of it as it knows.
    for size in [36, 60, 96] {
        let buffer = vec![0; size];
        let (_, config) = monitor.frontend.get_config(0, size as u32, flags, &buffer).unwrap();
        assert_eq!(config[..8], 64u64.to_le_bytes());
        assert_eq!(config[20..24], 512u32.to_le_bytes());
    }
    let (_, config) = monitor.frontend.get_config(34, 2, flags, &[0; 2]).unwrap();
    assert_eq!(config, [2, 0]);
    monitor.start();
    monitor.read_sector(63);
    monitor.interrupted();
    assert_eq!(monitor.driver.used(), [(0, 513)]);
    assert_eq!(monitor.driver.bytes(BUFFERS + 512, 512), [7; 512]);
    drop(monitor.frontend);
    monitor.served.wait().unwrap();
}

#[test]
fn a_request_that_sleeps_is_woken_by_every_end_of_its_queue() {
    use vmlab_devices::blk::{Blk, Options, Source};

    let faults = vec!["delay=60s:read".parse().unwrap()];
    // Even one sector is 8 minutes of it.
    let throttle = Some("bps=1".parse().unwrap());
    let slow = [
        Options { faults, ..Options::default() },
        Options { throttle, queues: 2, ..Options::default() },
    ];
    let ends: [fn(Monitor) -> Driver; 3] = [
        |monitor| {
            assert_eq!(monitor.frontend.get_vring_base(0).unwrap(), 1);
            monitor.served.stop().unwrap();
            monitor.driver
        },
        |monitor| {
            drop(monitor.frontend);
            monitor.served.wait().unwrap();
            monitor.driver
        },
        |monitor| {
            monitor.served.stop().unwrap();
            monitor.driver
        },
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [9; 1024]).unwrap();
    let open = |options| {
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        Blk::open(Source::Kept(file), "disk", options)
    };
    for options in &slow {
        for end in ends {
            let mut monitor = monitor_of(Arc::new(open(options).unwrap()));
            monitor.start();
            monitor.read_sector(1);
            // The thread that waits for the next request asks for a kick, behind the one that was taken.
            let begin = Instant::now();
            while monitor.driver.number(USED + 4 + 8 * u64::from(SIZE)) != 1 {
                assert!(begin.elapsed().as_secs() < PATIENCE.tv_sec as u64, "it is not taken");
                std::thread::yield_now();
            }
            assert_eq!(monitor.driver.used(), []);
            assert!(open(options).is_err(), "it is in use");
            let begin = Instant::now();
            let driver = end(monitor);
            assert!(begin.elapsed().as_secs() < 5, "{:?}", begin.elapsed());
            // It was done, and nothing is in use any more.
            assert_eq!(driver.used(), [(0, 513)]);
            assert_eq!(driver.bytes(BUFFERS + 512, 513), [&[9; 512][..], &[0]].concat());
            open(options).unwrap();
        }
    }
}

#[test]
fn only_what_has_a_configuration_for_the_monitor_offers_it() {
    let offers = |monitor: &mut Monitor| {
        let protocol = monitor.frontend.get_protocol_features().unwrap();
        protocol.contains(VhostUserProtocolFeatures::CONFIG)
    };
    assert!(!offers(&mut monitor()));
    let dir = tempfile::tempdir().unwrap();
    let share = Passthrough::new(dir.path(), PassthroughConfig::default()).unwrap();
    assert!(!offers(&mut monitor_of(Arc::new(Fs::new(Server::new(share), "tag", 1)))));
}
