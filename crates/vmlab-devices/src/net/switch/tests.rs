use std::time::Instant;

use super::super::{MAX_LEARNED, MIN_FRAME};
use super::*;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long nothing has to come, to be sure that nothing will.
const SILENCE: Duration = Duration::from_millis(100);

fn address(number: u8) -> MacAddress {
    MacAddress([0x02, 0, 0, 0, 0, number])
}

/// A guest with a number as its address.
struct Guest {
    port: Port,
    device: OwnedFd,
    address: MacAddress,
}

impl Guest {
    fn new(switch: &Switch, number: u8) -> Self {
        let (port, device) = switch.port(address(number), Some(0)).unwrap();
        Self { port, device, address: address(number) }
    }

    fn send(&self, to: MacAddress, payload: &[u8]) {
        self.send_from(self.address, to, payload);
    }

    fn send_from(&self, from: MacAddress, to: MacAddress, payload: &[u8]) {
        self.raw(&[&to.0[..], &from.0, &[0x88, 0xb5], payload].concat());
    }

    fn raw(&self, frame: &[u8]) {
        send(&self.device, frame, SendFlags::empty()).unwrap();
    }

    /// Whether a frame comes within some time.
    fn comes(&self, within: Duration) -> bool {
        let time = rustix::event::Timespec {
            tv_sec: within.as_secs().try_into().unwrap(),
            tv_nsec: within.subsec_nanos().into(),
        };
        poll(&mut [PollFd::new(&self.device, PollFlags::IN)], Some(&time)).unwrap() > 0
    }

    /// The next frame's source and payload.
    #[track_caller]
    fn gets(&self) -> (MacAddress, Vec<u8>) {
        assert!(self.comes(PATIENCE), "no frame came");
        let mut buffer = vec![0; MAX_FRAME + 1];
        let (length, _) = recv(&self.device, &mut buffer[..], RecvFlags::empty()).unwrap();
        let addresses = Addresses::of(&buffer[..length]).unwrap();
        (addresses.source, buffer[MIN_FRAME..length].to_vec())
    }

    /// How many frames are there until none comes any more.
    fn drained(&self) -> usize {
        let mut count = 0;
        while self.comes(SILENCE) {
            self.gets();
            count += 1;
        }
        count
    }

    #[track_caller]
    fn gets_nothing(&self) {
        assert!(!self.comes(SILENCE), "{:?}", self.gets());
    }

    /// Waits until its counters are as wanted.
    #[track_caller]
    fn counts(&self, wanted: impl Fn(&Counters) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !wanted(&self.port.counters()) {
            assert!(Instant::now() < until, "{:?}", self.port.counters());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A switch with three guests that know nothing of each other.
fn three() -> (Switch, [Guest; 3]) {
    let switch = Switch::new().unwrap();
    let guests = [1, 2, 3].map(|number| Guest::new(&switch, number));
    (switch, guests)
}

#[test]
fn frames_go_to_whom_they_are_for() {
    let (_switch, [one, two, three]) = three();
    one.send(two.address, b"for two");
    assert_eq!(two.gets(), (one.address, b"for two".to_vec()));
    one.send(MacAddress::BROADCAST, b"for all");
    assert_eq!(two.gets().1, b"for all");
    assert_eq!(three.gets().1, b"for all");
    one.send(MacAddress([0x33, 0x33, 0, 0, 0, 1]), b"for many");
    assert_eq!((two.gets().1, three.gets().1), (b"for many".to_vec(), b"for many".to_vec()));
    // To itself, and to nobody that is known.
    one.send(one.address, b"for one");
    one.send(address(9), b"for nine");
    assert_eq!((two.gets().1, three.gets().1), (b"for nine".to_vec(), b"for nine".to_vec()));
    for guest in [&one, &two, &three] {
        guest.gets_nothing();
    }
    assert_eq!(one.port.counters(), Counters { received: 5, ..Counters::default() });
}

#[test]
fn addresses_behind_a_guest_are_learned() {
    let (_switch, [one, two, three]) = three();
    two.send_from(address(20), one.address, b"from a bridge");
    assert_eq!(one.gets().0, address(20));
    one.send(address(20), b"back");
    assert_eq!(two.gets().1, b"back");
    three.gets_nothing();
    // It moves.
    three.send_from(address(20), one.address, b"from another");
    assert_eq!(one.gets().0, address(20));
    one.send(address(20), b"there");
    assert_eq!(three.gets().1, b"there");
    two.gets_nothing();
}

#[test]
fn frames_of_all_lengths_and_no_others_are_carried() {
    let (_switch, [one, two, _]) = three();
    for length in [0, 46, 1500, 9000, MAX_FRAME - MIN_FRAME] {
        one.send(two.address, &vec![7; length]);
        assert_eq!(two.gets().1, vec![7; length]);
    }
    one.send(two.address, &vec![7; MAX_FRAME - MIN_FRAME + 1]);
    one.raw(&[]);
    one.raw(&[2; MIN_FRAME - 1]);
    one.send_from(MacAddress::BROADCAST, two.address, b"");
    one.send_from(MacAddress([0; 6]), two.address, b"");
    one.counts(|counters| counters.refused == 5);
    two.gets_nothing();
    one.send(two.address, b"goes on");
    assert_eq!(two.gets().1, b"goes on");
}

#[test]
fn nobody_gets_anothers_frames_by_lying() {
    let (_switch, [one, two, three]) = three();
    three.send_from(two.address, MacAddress::BROADCAST, b"I am two");
    three.counts(|counters| counters.refused == 1);
    one.send(two.address, b"secret");
    assert_eq!(two.gets().1, b"secret");
    three.gets_nothing();
    // Nor by making up more than can be kept.
    two.send_from(address(20), one.address, b"");
    one.gets();
    for number in 0..4 * MAX_LEARNED as u32 {
        let [.., a, b] = number.to_be_bytes();
        three.send_from(MacAddress([0x06, 0, 0, 0, a, b]), three.address, b"");
    }
    three.counts(|counters| counters.received == 4 * MAX_LEARNED as u64);
    one.send(address(20), b"still there");
    assert_eq!(two.gets().1, b"still there");
    three.gets_nothing();
}

#[test]
fn a_guest_that_reads_nothing_loses_its_own_frames_only() {
    let (_switch, [one, two, three]) = three();
    let payload = vec![1; 60_000];
    let sent = 200;
    for _ in 0..sent {
        one.send(MacAddress::BROADCAST, &payload);
        assert_eq!(three.gets().1.len(), payload.len());
    }
    one.counts(|counters| counters.received == sent);
    let lost = two.port.counters().lost;
    assert!(lost > 0 && three.port.counters().lost == 0, "{lost}");
    // What was kept comes, and the port serves on.
    assert_eq!(two.drained() as u64, sent - lost);
    one.send(two.address, b"more");
    assert_eq!(two.gets().1, b"more");
    two.counts(|counters| counters.sent + counters.lost == sent + 1);
}

#[test]
fn a_flood_does_not_keep_others_from_talking() {
    let (switch, [one, two, three]) = three();
    let silent = Guest::new(&switch, 4);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0_u32;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let [a, b, c, d] = number.to_be_bytes();
                let to = MacAddress([0x02, 0xff, a, b, c, d]);
                // From made-up addresses to nobody, which floods the guest that reads nothing.
                three.send_from(MacAddress([0x06, 0, a, b, c, d]), to, &[0; 1500]);
                number = number.wrapping_add(1);
            }
        });
        let fetch = |guest: &Guest, wanted: &[u8]| while guest.gets().1 != wanted {};
        for round in 0..50_u32 {
            one.send(two.address, &round.to_be_bytes());
            fetch(&two, &round.to_be_bytes());
            two.send(one.address, &round.to_be_bytes());
            fetch(&one, &round.to_be_bytes());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let state = switch.worker.shared.lock();
    assert!(state.ports[&silent.port.id].queued <= MAX_QUEUED);
}

#[test]
fn a_cut_port_is_deaf_and_dumb_until_it_is_mended() {
    let (switch, [one, two, three]) = three();
    switch.arrange([(&two.port, None)]);
    one.send(two.address, b"lost");
    two.send(one.address, b"lost");
    two.send(MacAddress::BROADCAST, b"lost");
    two.counts(|counters| (counters.refused, counters.lost) == (2, 1));
    one.gets_nothing();
    three.gets_nothing();
    one.send(three.address, b"others go on");
    assert_eq!(three.gets().1, b"others go on");
    switch.arrange([(&two.port, Some(0))]);
    two.gets_nothing();
    one.send(two.address, b"again");
    assert_eq!(two.gets().1, b"again");
    two.send(one.address, b"again");
    assert_eq!(one.gets().1, b"again");
}

#[test]
fn nothing_passes_once_a_cut_has_returned() {
    let (switch, [one, two, _]) = three();
    for _ in 0..200 {
        two.send(one.address, b"");
        switch.arrange([(&two.port, None)]);
        // Before the cut, it was sent.
        assert_eq!(one.drained_now(), 1);
        two.send(one.address, b"");
        switch.arrange([(&two.port, Some(0))]);
        assert_eq!(one.drained_now(), 0);
    }
}

#[test]
fn sides_talk_among_themselves_only() {
    let (switch, [one, two, three]) = three();
    let four = Guest::new(&switch, 4);
    let sides = |sides: [Option<u32>; 4]| {
        let ports = [&one, &two, &three, &four].map(|guest| &guest.port);
        switch.arrange(ports.into_iter().zip(sides));
    };
    let hear = |from: &Guest| {
        from.send(MacAddress::BROADCAST, b"");
        std::thread::sleep(SILENCE);
        [&one, &two, &three, &four].map(Guest::drained_now)
    };
    assert_eq!(hear(&one), [0, 1, 1, 1]);
    sides([Some(1), Some(1), Some(2), Some(2)]);
    assert_eq!((hear(&one), hear(&four)), ([0, 1, 0, 0], [0, 0, 1, 0]));
    one.send(three.address, b"across");
    three.gets_nothing();
    sides([Some(1), Some(2), Some(1), None]);
    assert_eq!((hear(&one), hear(&two), hear(&four)), ([0, 0, 1, 0], [0; 4], [0; 4]));
    // Two that are cut off do not reach each other, either.
    sides([None, None, Some(0), Some(0)]);
    assert_eq!((hear(&one), hear(&three)), ([0; 4], [0, 0, 0, 1]));
}

#[test]
fn what_waits_is_lost_with_the_side_that_it_came_from() {
    let (switch, [one, two, three]) = three();
    let silent = Guest::new(&switch, 4);
    let waiting = || switch.worker.shared.lock().ports[&silent.port.id].queue.len();
    let mut sent = 0;
    // More than the kernel holds, so that some wait here.
    while waiting() <= 2 {
        one.send(silent.address, &[1; 60_000]);
        sent += 1;
        one.counts(|counters| counters.received == sent);
    }
    two.send(silent.address, b"kept");
    two.counts(|counters| counters.received == 1);
    switch.arrange([(&one.port, Some(1))]);
    assert_eq!(waiting(), 1);
    let mut last = Vec::new();
    while silent.comes(SILENCE) {
        last = silent.gets().1;
    }
    assert_eq!(last, b"kept");
    assert!(silent.port.counters().lost > 2);
    three.gets_nothing();
}

impl Guest {
    /// How many frames are there now.
    fn drained_now(&self) -> usize {
        let mut buffer = [0; 64];
        (0..)
            .take_while(|_| matches!(take(self.device.as_fd(), &mut buffer), Taken::Frame(_)))
            .count()
    }
}

#[test]
fn a_port_that_is_taken_away_is_forgotten() {
    let (switch, [one, two, three]) = three();
    two.send(one.address, b"");
    one.gets();
    drop(two);
    one.send(address(2), b"to nobody");
    assert_eq!(three.gets().1, b"to nobody");
    // Its place and address can be another's.
    let two = Guest::new(&switch, 2);
    one.send(two.address, b"to the new one");
    assert_eq!(two.gets().1, b"to the new one");
    three.gets_nothing();
}

#[test]
fn a_device_that_is_gone_harms_nobody() {
    let (switch, [one, two, three]) = three();
    let Guest { port, device, .. } = two;
    drop(device);
    for _ in 0..100 {
        one.send(address(2), b"to nobody");
        one.send(MacAddress::BROADCAST, b"to all");
        assert_eq!(three.gets().1, b"to all");
    }
    assert_eq!(port.counters().sent, 0);
    drop((switch, port));
    one.send(MacAddress::BROADCAST, b"to all");
    assert_eq!(three.gets().1, b"to all");
}

/// The threads of this process with the switch's name, and its descriptors.
fn left() -> (usize, usize) {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = threads.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    let switches = names.filter(|name| name.trim_end() == "vmlab-switch").count();
    (switches, std::fs::read_dir("/proc/self/fd").unwrap().count())
}

#[test]
#[ignore = "counts what the whole process has, so it has to run alone"]
fn nothing_is_left_behind() {
    let before = left();
    let (switch, [one, two, three]) = three();
    one.send(MacAddress::BROADCAST, b"");
    two.gets();
    assert_eq!(left(), (before.0 + 1, before.1 + 7));
    drop(switch);
    drop(two);
    one.send(MacAddress::BROADCAST, b"");
    three.gets();
    three.gets();
    drop((one, three));
    assert_eq!(left(), before);
}

#[test]
fn nothing_is_left_behind_by_a_switch_of_its_own_process() {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let name = "net::switch::tests::nothing_is_left_behind";
    let output = command.args([name, "--exact", "--ignored", "--test-threads=1"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "a measurement"]
fn speed() {
    const AMOUNT: usize = 1 << 30;
    let (_switch, [one, two, _]) = three();
    for length in [1500, 9000, 65_000] {
        let count = AMOUNT / length;
        let since = Instant::now();
        let got = std::thread::scope(|scope| {
            let fetch = scope.spawn(|| {
                let mut buffer = vec![0; MAX_FRAME];
                let fetch = || two.comes(SILENCE).then(|| take(two.device.as_fd(), &mut buffer));
                std::iter::from_fn(fetch).count()
            });
            let payload = vec![0; length];
            (0..count).for_each(|_| one.send(two.address, &payload));
            fetch.join().unwrap()
        });
        let seconds = (since.elapsed() - SILENCE).as_secs_f64();
        let gigabits = (got * length * 8) as f64 / seconds / 1e9;
        println!("{length}: {gigabits:.1} Gbit/s, {:.0} frames/s", got as f64 / seconds);
        println!("{:?}", two.port.counters());
    }
}
