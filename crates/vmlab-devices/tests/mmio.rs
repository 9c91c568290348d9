//! The registers of virtio-mmio, with this process as the guest.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vm_memory::{MmapRegion, VolatileMemory};
use vmlab_devices::blk::{Blk, Options, Source};
use vmlab_devices::rng::Rng;
use vmlab_devices::transport::mmio::{MmioState, Page, QueueState, StateError, register};
use vmlab_devices::{Device, QueueError, QueueKind, Turn, VirtQueue};

#[path = "common/guest.rs"]
#[allow(dead_code, reason = "not every test uses all of it")]
mod guest;

use guest::{
    ACKNOWLEDGE, BUFFERS, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, Guest, MEMORY, NEEDS_RESET, SIZE,
    WRITE, available, table, used,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Asks for random numbers, and has them.
fn ask(guest: &Guest) {
    guest.put(BUFFERS, &[0; 64]);
    let head = guest.offer(0, &[(BUFFERS, 64, WRITE)]);
    guest.kick(0);
    assert_eq!(guest.wait(0), (head, 64));
    assert_ne!(guest.bytes(BUFFERS, 64), [0; 64]);
}

#[test]
fn a_driver_finds_a_device_and_uses_it() {
    let guest = Guest::new(Arc::new(Rng::new()));
    assert_eq!(guest.get(register::MAGIC_VALUE), 0x7472_6976);
    assert_eq!(guest.get(register::VERSION), 2);
    assert_eq!(guest.get(register::DEVICE_ID), 4);
    assert_eq!(guest.get(register::STATUS), 0);
    assert_eq!(guest.offered(), 1 << 32 | 1 << 29 | 1 << 28);
    guest.set(register::DEVICE_FEATURES_SEL, 2);
    assert_eq!(guest.get(register::DEVICE_FEATURES), 0);
    guest.negotiate();
    assert_eq!(guest.get(register::QUEUE_NUM_MAX), 256);
    guest.place(0);
    assert_eq!(guest.get(register::QUEUE_READY), 0);
    assert!(guest.ready());
    assert_eq!(guest.add_status(DRIVER_OK), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    for _ in 0..u32::from(SIZE) * 3 {
        ask(&guest);
    }
    assert!(guest.faults.lock().unwrap().is_empty());
}

#[test]
fn an_interrupt_has_its_reason_until_that_is_acknowledged() {
    let guest = Guest::new(Arc::new(Rng::new()));
    guest.start();
    guest.offer(0, &[(BUFFERS, 8, WRITE)]);
    guest.kick(0);
    assert_eq!(guest.interrupted(), VIRTIO_MMIO_INT_VRING);
    assert_eq!(guest.get(register::INTERRUPT_STATUS), 0);
    let generation = guest.get(register::CONFIG_GENERATION);
    guest.mmio.config_changed();
    assert_ne!(guest.get(register::CONFIG_GENERATION), generation);
    guest.set(register::INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    assert_eq!(guest.interrupted(), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(guest.interrupts(), 0);
    guest.set(register::STATUS, 0);
    guest.mmio.config_changed();
    assert_eq!((guest.interrupts(), guest.get(register::INTERRUPT_STATUS)), (0, 0));
}

#[test]
fn interrupts_come_whether_they_are_acknowledged_or_not() {
    let guest = Guest::new(Arc::new(Rng::new()));
    guest.start();
    // A monitor need not tell the device of acknowledgments.
    for seen in 0..3_u16 {
        guest.set_number(available(0) + 4 + 2 * u64::from(SIZE), seen);
        guest.offer(0, &[(BUFFERS, 8, WRITE)]);
        guest.kick(0);
        while guest.interrupts() == 0 {
            std::thread::yield_now();
        }
        assert_eq!(guest.get(register::INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
        assert!(guest.take(0).is_some());
    }
    guest.mmio.quiesce();
    let second = guest.moved_to(Arc::new(Rng::new()));
    second.mmio.restore(&guest.mmio.state()).unwrap();
    assert_eq!(second.interrupts(), 1);
    // An acknowledgment of another reason, which it is told of, takes away what it names.
    second.mmio.config_changed();
    assert_eq!(second.interrupted(), VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(second.get(register::INTERRUPT_STATUS), 0);
    ask(&second);
}

#[test]
fn the_page_shows_what_is_read() {
    let region = Arc::new(MmapRegion::new(3 * Page::SIZE).unwrap());
    let page = |index| Page::of(&region, index);
    assert!(page(3).is_none() && page(usize::MAX).is_none());
    let (before, behind) = (page(0).unwrap(), page(2).unwrap());
    let shown = |index: usize, offset: u32| -> u32 {
        let at = index * Page::SIZE + offset as usize;
        region.get_atomic_ref::<AtomicU32>(at).unwrap().load(Ordering::SeqCst)
    };
    let mut guest = Guest::on(page(1).unwrap(), disk());
    let same = |guest: &Guest| {
        for offset in (0..0x1000).step_by(4) {
            assert_eq!(shown(1, offset), guest.get(offset), "{offset:x}");
        }
    };
    same(&guest);
    assert_eq!(shown(1, register::DEVICE_ID), 2);
    guest.negotiate();
    guest.place(1);
    guest.ready();
    same(&guest);
    assert_eq!((shown(1, register::QUEUE_READY), shown(1, register::STATUS)), (1, 11));
    guest.start();
    read_sector(&guest, 1);
    guest.kick(1);
    guest.wait(1);
    guest.mmio.config_changed();
    same(&guest);
    assert_eq!(shown(1, register::INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    guest.mmio.quiesce();
    let (state, memory) = (guest.mmio.state(), guest.memory.clone());
    drop(guest);
    // As a device that is new there, nothing of the old one is left, until it goes on with its state.
    guest = Guest::with_page(memory, page(1).unwrap(), disk());
    same(&guest);
    assert_eq!((shown(1, register::STATUS), shown(1, register::CONFIG_GENERATION)), (0, 0));
    guest.mmio.restore(&state).unwrap();
    same(&guest);
    assert_eq!(shown(1, register::INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    page(1).unwrap().clear();
    for (index, _) in [(0, before), (1, page(1).unwrap()), (2, behind)] {
        // MagicValue and Version of virtio 1.2, 4.2.2, and no device.
        assert_eq!((shown(index, 0), shown(index, 4)), (0x7472_6976, 2));
        assert!((8..0x1000).step_by(4).all(|offset| shown(index, offset) == 0));
    }
}

#[test]
fn features_are_agreed_once() {
    let guest = Guest::new(Arc::new(Rng::new()));
    let modern = 1 << VIRTIO_F_VERSION_1;
    guest.add_status(ACKNOWLEDGE | DRIVER);
    let refused = [0, 1 << 28, modern | 1, modern | 1 << 63, modern | 1 << 34];
    for features in refused {
        guest.accept(features);
        assert_eq!(guest.add_status(FEATURES_OK), ACKNOWLEDGE | DRIVER, "{features:x}");
        // Nor is a driver that goes on all the same.
        assert_eq!(guest.add_status(DRIVER_OK), ACKNOWLEDGE | DRIVER);
    }
    guest.accept(modern);
    // There are no such words.
    for select in [2, 3, u32::MAX] {
        guest.set(register::DRIVER_FEATURES_SEL, select);
        guest.set(register::DRIVER_FEATURES, 1);
    }
    assert_eq!(guest.add_status(FEATURES_OK), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    guest.accept(modern | 1);
    assert_eq!(guest.mmio.state().driver_features, modern);
    assert_eq!(guest.add_status(FEATURES_OK), ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

#[test]
fn a_status_grows_until_a_reset() {
    let guest = Guest::new(Arc::new(Rng::new()));
    guest.accept(guest.offered());
    // Not before the device was seen and its driver is there.
    for early in [FEATURES_OK, DRIVER_OK, FEATURES_OK | DRIVER_OK] {
        assert_eq!(guest.add_status(early), 0);
    }
    guest.set(register::STATUS, !FAILED & !DRIVER_OK);
    let agreed = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    assert_eq!(guest.get(register::STATUS), agreed, "other bits are not the driver's");
    guest.set(register::STATUS, ACKNOWLEDGE);
    assert_eq!(guest.get(register::STATUS), agreed);
    guest.set(register::STATUS, FAILED);
    assert_eq!(guest.add_status(DRIVER_OK), agreed | FAILED, "it has given up");
    guest.set(register::STATUS, 0);
    assert_eq!(guest.mmio.state(), Guest::new(Arc::new(Rng::new())).mmio.state());
}

#[test]
fn registers_have_one_width() {
    let guest = Guest::new(Arc::new(Rng::new()));
    guest.negotiate();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 2), (2, 4), (0xfc, 8), (0xff, 4)] {
        let mut bytes = vec![0xee; len];
        guest.mmio.read(offset, &mut bytes);
        assert_eq!(bytes, vec![0; len], "{offset} {len}");
    }
    let before = guest.mmio.state();
    for offset in 0..0x100 {
        for len in [0, 1, 2, 3, 5, 8] {
            guest.mmio.write(offset, &vec![0; len]);
        }
        if offset % 4 != 0 {
            guest.mmio.write(offset, &[0; 4]);
        }
    }
    assert_eq!(guest.mmio.state(), before);
    // Nor are there any beyond.
    for offset in [0x100, 0x1000, u64::from(u32::MAX) + 0x71, u64::MAX] {
        guest.mmio.write(offset, &[0; 4]);
        let mut bytes = [0xee; 4];
        guest.mmio.read(offset, &mut bytes);
        assert_eq!(bytes, [0; 4]);
    }
    assert_eq!(guest.mmio.state(), before);
    // There is no shared memory: its length is -1.
    assert_eq!(guest.get(register::SHM_LEN_LOW), u32::MAX);
    assert_eq!(guest.get(register::SHM_LEN_HIGH), u32::MAX);
}

fn disk() -> Arc<dyn Device> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * 512).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 512], 63 * 512).unwrap();
    let options = Options { queues: 2, ..Options::default() };
    Arc::new(Blk::open(Source::Kept(file), "disk", &options).unwrap())
}

#[test]
fn the_configuration_space_is_read_in_any_width() {
    let device = disk();
    let config = device.config();
    let guest = Guest::new(device);
    for len in [1, 2, 3, 4, 8, 16] {
        for at in 0..config.len() + 8 {
            let mut bytes = vec![0xee; len];
            guest.mmio.read(0x100 + at as u64, &mut bytes);
            let wanted = config.iter().skip(at).copied().chain(std::iter::repeat(0));
            assert_eq!(bytes, wanted.take(len).collect::<Vec<u8>>(), "{at} {len}");
        }
    }
    guest.mmio.write(0x100, &[0xff; 8]);
    assert_eq!(guest.mmio.device().config(), config);
}

#[test]
fn queues_are_set_up_between_features_and_the_start() {
    let guest = Guest::new(disk());
    let of = |queue: usize| guest.mmio.state().queues[queue];
    let fresh = of(0);
    guest.add_status(ACKNOWLEDGE | DRIVER);
    guest.place(0);
    assert!(!guest.ready());
    assert_eq!(of(0), fresh);

    guest.negotiate();
    guest.place(0);
    let max = guest.get(register::QUEUE_NUM_MAX);
    for size in [0, 3, 2 * max, max + 1, 0x1_0010, u32::MAX] {
        guest.set(register::QUEUE_NUM, size);
        assert_eq!(of(0).size, SIZE);
    }
    // Outside of memory, wholly or with its last byte, past the end of addresses, at nothing, and not aligned.
    let low = [register::QUEUE_DESC_LOW, register::QUEUE_AVAIL_LOW, register::QUEUE_USED_LOW];
    for (register, right) in low.into_iter().zip([table(0), available(0), used(0)]) {
        for wrong in [MEMORY as u32, MEMORY as u32 - 16, right as u32 + 1] {
            guest.set(register, wrong);
            assert!(!guest.ready(), "{register:x} {wrong:x}");
            guest.set(register, right as u32);
        }
        guest.set(register + 4, u32::MAX);
        assert!(!guest.ready());
        guest.set(register, !15);
        assert!(!guest.ready());
        guest.set(register, right as u32);
        guest.set(register + 4, 0);
    }
    guest.set(register::QUEUE_AVAIL_LOW, 0);
    assert!(!guest.ready());
    guest.set(register::QUEUE_AVAIL_LOW, available(0) as u32);
    guest.set(register::QUEUE_READY, 2);
    assert_eq!(guest.get(register::QUEUE_READY), 0);
    assert!(guest.ready());

    let before = of(0);
    for register in low.into_iter().chain(low.map(|low| low + 4)) {
        guest.set(register, 0x4000);
    }
    guest.set(register::QUEUE_NUM, 2);
    assert_eq!(of(0), before, "it is ready");
    // There is no such queue.
    for queue in [2, 0x1_0000, u32::MAX] {
        guest.set(register::QUEUE_SEL, queue);
        assert_eq!(guest.get(register::QUEUE_NUM_MAX), 0);
        guest.set(register::QUEUE_NUM, 2);
        assert!(!guest.ready());
        guest.kick(queue);
    }
    guest.add_status(DRIVER_OK);
    let fresh = of(1);
    guest.place(1);
    assert!(!guest.ready(), "it is too late");
    assert_eq!(of(1), fresh);
}

#[test]
fn a_queue_can_be_taken_out_of_use() {
    let guest = Guest::new(Arc::new(Rng::new()));
    guest.start();
    ask(&guest);
    guest.set(register::QUEUE_READY, 0);
    assert_eq!(guest.get(register::QUEUE_READY), 0);
    guest.offer(0, &[(BUFFERS, 64, WRITE)]);
    guest.kick(0);
    assert!(!guest.ready(), "not without a reset");
    assert_eq!(guest.take(0), None);
    guest.start();
    ask(&guest);
}

/// Asks a disk for its last sector.
fn read_sector(guest: &Guest, queue: u32) -> u16 {
    guest.put(BUFFERS, &[&[0; 8][..], &63u64.to_le_bytes()].concat());
    guest.offer(queue, &[(BUFFERS, 16, 0), (BUFFERS + 512, 513, WRITE)])
}

#[test]
fn every_queue_of_a_disk_is_served() {
    let guest = Guest::new(disk());
    guest.start();
    for queue in [0, 1, 1, 0] {
        let head = read_sector(&guest, queue);
        guest.kick(queue);
        assert_eq!(guest.wait(queue), (head, 513));
        assert_eq!(guest.bytes(BUFFERS + 512, 513), [&[7; 512][..], &[0]].concat());
        guest.put(BUFFERS + 512, &[0xee; 513]);
    }
}

#[test]
fn a_kick_may_come_by_its_eventfd() {
    let guest = Guest::new(disk());
    guest.start();
    assert_eq!(guest.mmio.kicks().count(), 2);
    for (queue, kick) in guest.mmio.kicks().enumerate() {
        let head = read_sector(&guest, queue as u32);
        rustix::io::write(kick, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(guest.wait(queue as u32), (head, 513));
    }
}

#[test]
fn a_broken_queue_needs_a_reset() {
    let guest = Guest::new(disk());
    guest.start();
    guest.set_number(available(0) + 2, SIZE + 1);
    guest.kick(0);
    assert_eq!(guest.interrupted(), VIRTIO_MMIO_INT_CONFIG);
    assert_ne!(guest.get(register::STATUS) & NEEDS_RESET, 0);
    assert_eq!(guest.mmio.broken(), 1);
    // The other one is served for as long as the driver likes.
    read_sector(&guest, 1);
    guest.kick(1);
    guest.wait(1);
    // A driver that writes the status back does not make it worse.
    guest.add_status(0);
    guest.set(register::STATUS, 0);
    // All its threads have ended by then.
    let (queue, fault) = guest.faults.lock().unwrap().pop_front().unwrap();
    assert_eq!((queue, &fault[..]), (0, "the guest's driver has broken a queue"));
    assert_eq!(guest.get(register::STATUS), 0);
    guest.start();
    read_sector(&guest, 0);
    guest.kick(0);
    guest.wait(0);
    assert_eq!(guest.get(register::STATUS) & NEEDS_RESET, 0);
    assert_eq!(guest.mmio.broken(), 1);
}

/// A device that gives requests back when a test says so.
struct Slow {
    begun: Sender<()>,
    go: Mutex<Receiver<()>>,
    resets: Sender<()>,
}

impl Device for Slow {
    fn id(&self) -> u32 {
        99
    }

    fn queues(&self) -> Vec<QueueKind> {
        vec![QueueKind { max_size: SIZE, workers: 1 }]
    }

    fn reset(&self) {
        self.resets.send(()).unwrap();
    }

    fn process(&self, _: usize, queue: &VirtQueue, _: &mut Turn<'_>) -> Result<(), QueueError> {
        let memory = queue.memory();
        while let Some(chain) = queue.pop(&memory)? {
            self.begun.send(()).unwrap();
            let go = self.go.lock().unwrap_or_else(PoisonError::into_inner);
            go.recv_timeout(PATIENCE).expect("the test goes on");
            queue.complete(&memory, chain.head(), 1)?;
        }
        Ok(())
    }
}

struct Hold {
    begun: Receiver<()>,
    go: Sender<()>,
    resets: Receiver<()>,
}

fn slow() -> (Arc<Slow>, Hold) {
    let ((begun, saw_begun), (go, may_go), (resets, saw_resets)) =
        (channel(), channel(), channel());
    let device = Slow { begun, go: Mutex::new(may_go), resets };
    (Arc::new(device), Hold { begun: saw_begun, go, resets: saw_resets })
}

#[test]
fn a_reset_waits_for_requests_in_progress_and_takes_no_more() {
    let (device, hold) = slow();
    let guest = Guest::new(device);
    guest.start();
    hold.resets.recv_timeout(PATIENCE).unwrap();
    guest.offer(0, &[(BUFFERS, 8, WRITE)]);
    guest.offer(0, &[(BUFFERS, 8, WRITE)]);
    guest.kick(0);
    hold.begun.recv_timeout(PATIENCE).unwrap();
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| guest.mmio.write(register::STATUS.into(), &[0; 4]));
        // Whoever has an interrupt in the meantime need not wait for it.
        guest.mmio.read(register::INTERRUPT_STATUS.into(), &mut [0; 4]);
        std::thread::sleep(Duration::from_millis(50));
        assert!(!reset.is_finished());
        assert!(hold.resets.try_recv().is_err());
        hold.go.send(()).unwrap();
        reset.join().unwrap();
    });
    hold.resets.try_recv().unwrap();
    assert_eq!(guest.number(used(0) + 2), 1, "the second one was not taken");
    assert_eq!((guest.get(register::STATUS), guest.get(register::INTERRUPT_STATUS)), (0, 0));
    assert!(hold.begun.try_recv().is_err());
    // The guest begins anew.
    guest.interrupts();
    guest.start();
    let head = guest.offer(0, &[(BUFFERS, 8, WRITE)]);
    guest.kick(0);
    hold.go.send(()).unwrap();
    assert_eq!(guest.wait(0), (head, 1));
}

#[test]
fn a_quiet_device_takes_no_requests_until_it_goes_on() {
    let (device, hold) = slow();
    let guest = Guest::new(device);
    guest.start();
    guest.offer(0, &[(BUFFERS, 8, WRITE)]);
    guest.kick(0);
    hold.begun.recv_timeout(PATIENCE).unwrap();
    hold.go.send(()).unwrap();
    guest.mmio.quiesce();
    let state = guest.mmio.state();
    assert_eq!((state.queues[0].next_available, state.queues[0].next_used), (1, 1));
    guest.wait(0);
    let head = guest.offer(0, &[(BUFFERS, 8, WRITE)]);
    guest.kick(0);
    // Not even for a driver that begins now.
    assert!(hold.begun.recv_timeout(Duration::from_millis(50)).is_err());
    hold.go.send(()).unwrap();
    guest.mmio.resume().unwrap();
    assert_eq!(guest.wait(0), (head, 1));
    guest.mmio.quiesce();
    guest.start();
    let head = guest.offer(0, &[(BUFFERS, 8, WRITE)]);
    guest.kick(0);
    hold.begun.recv_timeout(PATIENCE).unwrap();
    assert!(hold.begun.recv_timeout(Duration::from_millis(50)).is_err());
    hold.go.send(()).unwrap();
    guest.mmio.resume().unwrap();
    assert_eq!(guest.wait(0), (head, 1));
}

#[test]
fn another_device_goes_on_with_a_state() {
    let first = Guest::new(Arc::new(Rng::new()));
    first.start();
    for _ in 0..SIZE + 3 {
        ask(&first);
    }
    first.mmio.quiesce();
    let state = first.mmio.state();
    assert_eq!(state.queues[0].next_available, SIZE + 3);
    assert_eq!(state.queues[0].next_used, SIZE + 3);
    // What comes later, and without another kick.
    let head = first.offer(0, &[(BUFFERS, 32, WRITE)]);

    let second = first.moved_to(Arc::new(Rng::new()));
    second.mmio.check(&state).unwrap();
    assert_eq!(second.get(register::STATUS), 0, "nothing has changed");
    second.mmio.restore(&state).unwrap();
    assert_eq!(second.wait(0), (head, 32));
    for _ in 0..SIZE {
        ask(&second);
    }
    // It was stopped as well as begun in the middle.
    second.mmio.quiesce();
    let third = second.moved_to(Arc::new(Rng::new()));
    third.mmio.restore(&second.mmio.state()).unwrap();
    ask(&third);
}

#[test]
fn a_state_keeps_a_set_up_that_is_half_done_and_an_interrupt() {
    let first = Guest::new(disk());
    first.negotiate();
    first.place(1);
    first.set(register::DRIVER_FEATURES_SEL, 7);
    first.set(register::DEVICE_FEATURES_SEL, 9);
    first.mmio.config_changed();
    first.mmio.quiesce();
    let second = first.moved_to(disk());
    second.mmio.restore(&first.mmio.state()).unwrap();
    assert_eq!(second.mmio.state(), first.mmio.state());
    assert_eq!(second.interrupts(), 0);
    assert!(second.ready());
    second.add_status(DRIVER_OK);
    second.mmio.config_changed();
    let third = second.moved_to(disk());
    let _ = second.interrupts();
    third.mmio.restore(&second.mmio.state()).unwrap();
    assert_eq!(third.interrupted(), VIRTIO_MMIO_INT_CONFIG);
    let head = read_sector(&third, 1);
    third.kick(1);
    assert_eq!(third.wait(1), (head, 513));
}

#[test]
fn states_that_cannot_be_are_refused() {
    let first = Guest::new(disk());
    first.start();
    first.mmio.quiesce();
    let good = first.mmio.state();
    let second = first.moved_to(disk());
    let fresh = second.mmio.state();
    let refuse = |change: &dyn Fn(&mut MmioState)| {
        let mut state = good.clone();
        change(&mut state);
        let error = second.mmio.check(&state).unwrap_err();
        let again = second.mmio.restore(&state).unwrap_err();
        assert_eq!(error.to_string(), again.to_string());
        assert_eq!(second.mmio.state(), fresh);
        error
    };
    assert!(matches!(refuse(&|state| state.device_id = 4), StateError::Kind { .. }));
    assert!(matches!(refuse(&|state| state.queues.truncate(1)), StateError::Queues { .. }));
    for bits in [1 << 32 | 1 << 63, 1 << 28] {
        let error = refuse(&|state| state.driver_features = bits);
        assert!(matches!(error, StateError::Features { .. }));
    }
    for status in [16, 32, 256, 1 << 31, DRIVER_OK] {
        let error = refuse(&|state| state.status = status);
        assert!(matches!(error, StateError::Register { register: "status", .. }));
    }
    let error = refuse(&|state| state.interrupt_status = 4);
    assert!(matches!(error, StateError::Register { register: "interrupt", .. }));
    let changes: [fn(&mut QueueState); 8] = [
        |queue| queue.size = 0,
        |queue| queue.size = 3,
        |queue| queue.size = 0x8000,
        |queue| queue.descriptors = MEMORY,
        |queue| queue.descriptors = u64::MAX - 15,
        |queue| queue.available = MEMORY - 2,
        |queue| queue.available = 0,
        |queue| queue.used += 2,
    ];
    for change in changes {
        let error = refuse(&|state| change(&mut state.queues[1]));
        assert!(matches!(error, StateError::Queue(1)));
    }
    // Without features there is no queue.
    let error = refuse(&|state| state.status = ACKNOWLEDGE | DRIVER);
    assert!(matches!(error, StateError::Queue(0)));
    assert!(matches!(refuse(&|state| state.device.push(0)), StateError::Device(_)));
    second.mmio.restore(&good).unwrap();
}

#[test]
fn indices_of_a_state_can_be_any() {
    let first = Guest::new(Arc::new(Rng::new()));
    first.start();
    first.mmio.quiesce();
    let mut state = first.mmio.state();
    state.queues[0].next_available = 1000;
    let second = first.moved_to(Arc::new(Rng::new()));
    second.mmio.restore(&state).unwrap();
    assert_eq!(second.interrupted(), VIRTIO_MMIO_INT_CONFIG);
    assert_ne!(second.get(register::STATUS) & NEEDS_RESET, 0);
    second.start();
    ask(&second);
}

#[test]
fn a_driver_that_writes_at_random_gets_a_device_that_works_after_a_reset() {
    let guest = Guest::new(disk());
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut below = |end: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % end
    };
    let begin = Instant::now();
    for round in 0..20_000u32 {
        if begin.elapsed() > PATIENCE {
            break;
        }
        let value = match below(4) {
            0 => below(16) as u32,
            1 => 1 << below(32),
            2 => 0x1000 * below(2048) as u32,
            _ => below(1 << 32) as u32,
        };
        match below(3) {
            0 => guest.mmio.read(below(0x140), &mut [0; 8][..below(9) as usize]),
            1 => guest.set(4 * below(0x40) as u32, value),
            _ if round % 64 == 0 => guest.start(),
            _ => guest.kick(below(3) as u32),
        }
    }
    guest.start();
    let head = read_sector(&guest, 0);
    guest.kick(0);
    assert_eq!(guest.wait(0), (head, 513));
}
