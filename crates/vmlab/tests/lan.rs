//! Networks of VMs, with real ones. What runs in the guests is this program with one of its `guest` tests.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail anywhere")]

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::process::Command;

use std::time::{Duration, Instant};

use common::Logs;
use vmlab::config::NetworkMode;
use vmlab::lan::MAX_LANS;
use vmlab::units::{Bytes, MIB};
use vmlab::{Error, GuestUser, Image, Lan, LanError, Output, SnapshotMode, Vm, VmBuilder};

const KERNEL: &str = "debian:6.12";

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// How much is carried over TCP.
const AMOUNT: usize = 16 << 20;

const PORT: u16 = 7000;

fn builder() -> VmBuilder {
    let exe = std::env::current_exe().unwrap();
    let vm = Vm::builder().kernel(KERNEL).memory(Bytes(256 * MIB)).accel(common::accel());
    vm.share_cwd(false).program(&exe)
}

/// The test `guest::NAME` of this program, in a guest.
fn in_guest<'a>(vm: &'a Vm, name: &str, argument: &str) -> vmlab::Command<'a> {
    let test = format!("guest::{name}");
    let arguments = [&test, "--exact", "--ignored", "--nocapture", "--test-threads=1"];
    let exe = std::env::current_exe().unwrap();
    vm.command(exe).args(arguments).env("LAN_TEST", argument).user(GuestUser::default())
}

fn ping(vm: &Vm, to: &str) -> Output {
    in_guest(vm, "ping", to).output().unwrap()
}

#[track_caller]
fn reaches(vm: &Vm, to: &str) {
    let output = ping(vm, to);
    assert!(output.status.success(), "{}{}", output.stdout_text(), output.stderr_text());
}

#[track_caller]
fn reaches_not(vm: &Vm, to: &str) {
    let output = ping(vm, to);
    let said = format!("{}{}", output.stdout_text(), output.stderr_text());
    assert!(!output.status.success() && said.contains("no answer"), "{said}");
}

/// What a test in a guest says of what it is asked for.
#[track_caller]
fn said(output: &Output, what: &str) -> String {
    let text = output.stdout_text();
    // The harness begins the first line.
    let value = text.lines().find_map(|line| Some(line.split_once(&format!("{what}: "))?.1));
    value.unwrap_or_else(|| panic!("no {what} in {text}{}", output.stderr_text())).to_owned()
}

/// Carries data from one guest to another, by its name, and returns what both say of it.
fn carry(from: &Vm, to: &Vm, name: &str) -> (Output, Output) {
    std::thread::scope(|scope| {
        let receives = scope.spawn(|| in_guest(to, "receives", "").output().unwrap());
        let sent = in_guest(from, "sends", name).output().unwrap();
        (sent, receives.join().unwrap())
    })
}

/// Runs in guests.
mod guest {
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, recv, sendto};

    use super::*;

    /// How often and how long an answer is waited for.
    const TRIES: u16 = 4;
    const ANSWER: Duration = Duration::from_millis(700);

    fn argument() -> String {
        std::env::var("LAN_TEST").unwrap()
    }

    fn checksum(bytes: &[u8]) -> u16 {
        let words = bytes.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let sum: u32 = words.sum();
        !((sum & 0xffff) + (sum >> 16)) as u16
    }

    #[test]
    #[ignore = "it runs in guests"]
    fn ping() {
        let name = argument();
        let found: Vec<SocketAddr> = (name.as_str(), 0).to_socket_addrs().unwrap().collect();
        println!("addresses: {found:?}");
        let socket =
            rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).unwrap();
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER)).unwrap();
        let id = std::process::id() as u16;
        for number in 0..TRIES {
            let mut request = [8, 0, 0, 0, 0, 0, 0, 0];
            request[4..6].copy_from_slice(&id.to_be_bytes());
            request[6..].copy_from_slice(&number.to_be_bytes());
            let sum = checksum(&request);
            request[2..4].copy_from_slice(&sum.to_be_bytes());
            // Nobody may know the way.
            let _ = sendto(&socket, &request, SendFlags::empty(), &found[0]);
            let until = Instant::now() + ANSWER;
            let mut answer = [0; 128];
            while Instant::now() < until {
                let Ok((length, _)) = recv(&socket, &mut answer[..], RecvFlags::empty()) else {
                    break;
                };
                // Behind an IP header without options, an answer with this number.
                if length >= 28 && answer[20] == 0 && answer[24..26] == request[4..6] {
                    return;
                }
            }
        }
        panic!("no answer");
    }

    /// Bytes that no fault leaves as they are.
    fn data() -> Vec<u8> {
        let mut state = 1_u64;
        let words = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_le_bytes()
        });
        words.take(AMOUNT / 8).flatten().collect()
    }

    fn sum(bytes: &[u8]) -> u64 {
        let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        words.fold(bytes.len() as u64, |sum, word| (sum ^ word).wrapping_mul(0x0100_0000_01b3))
    }

    #[test]
    #[ignore = "it runs in guests"]
    fn receives() {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
        let (mut stream, peer) = listener.accept().unwrap();
        let mut data = Vec::with_capacity(AMOUNT);
        stream.read_to_end(&mut data).unwrap();
        stream.write_all(&[1]).unwrap();
        println!("peer: {}", peer.ip());
        println!("sum: {:016x}", sum(&data));
    }

    fn connect() -> TcpStream {
        let to = (argument(), PORT);
        let until = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect(&to) {
                Ok(stream) => return stream,
                Err(error) if Instant::now() > until => panic!("{error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    #[test]
    #[ignore = "it runs in guests"]
    fn sends() {
        let data = data();
        let mut stream = connect();
        let since = Instant::now();
        stream.write_all(&data).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // Its answer says that it has all.
        stream.read_exact(&mut [0]).unwrap();
        let megabits = AMOUNT as f64 * 8.0 / since.elapsed().as_secs_f64() / 1e6;
        println!("megabits a second: {megabits:.0}");
        println!("sum: {:016x}", sum(&data));
    }

    #[test]
    #[ignore = "it runs in guests"]
    fn echoes() {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        let mut byte = [0];
        while let Ok(1) = stream.read(&mut byte) {
            stream.write_all(&byte).unwrap();
        }
    }

    #[test]
    #[ignore = "it runs in guests"]
    fn asks() {
        const ROUNDS: u32 = 500;
        let mut stream = connect();
        stream.set_nodelay(true).unwrap();
        let since = Instant::now();
        for _ in 0..ROUNDS {
            stream.write_all(&[1]).unwrap();
            stream.read_exact(&mut [0]).unwrap();
        }
        println!("microseconds a round: {}", since.elapsed().as_micros() / u128::from(ROUNDS));
    }
}

#[test]
fn two_vms_know_and_reach_each_other() {
    let _logs = Logs::new();
    let net = Lan::of(["server", "client"]).unwrap();
    let server = builder().lan(&net, "server").start().unwrap();
    let client = builder().lan(&net, "client").hostname("other").start().unwrap();
    assert_eq!(
        server.exec(["cat", "/proc/sys/kernel/hostname"]).unwrap().stdout_text(),
        "server\n"
    );
    assert_eq!(client.exec(["cat", "/proc/sys/kernel/hostname"]).unwrap().stdout_text(), "other\n");
    for (vm, other) in [(&client, "server"), (&server, "client"), (&server, "server")] {
        let output = ping(vm, other);
        assert!(output.status.success(), "{}", output.stdout_text());
        let address = net.address(other).unwrap();
        assert_eq!(said(&output, "addresses"), format!("[{address}:0]"));
    }
    let (sent, received) = carry(&client, &server, "server");
    assert_eq!(said(&sent, "sum"), said(&received, "sum"));
    assert_eq!(said(&received, "peer"), net.address("client").unwrap().to_string());
    let counters = net.counters("client").unwrap().unwrap();
    assert!(counters.received as usize > AMOUNT / 1500, "{counters:?}");
    // Nothing else is there: no way out.
    let routes = client.exec(["cat", "/proc/net/route"]).unwrap();
    assert_eq!(routes.stdout_text().lines().count(), 2, "{}", routes.stdout_text());
    server.shutdown().unwrap();
    // The place is free, although the value is still there.
    let server = builder().lan(&net, "server").start().unwrap();
    reaches(&client, "server");
    drop(server);
}

#[vmlab::test(host, kernel = "debian:6.12", memory = "256M")]
fn a_test_with_the_attribute_starts_several(vm: VmBuilder) -> vmlab::prelude::Result {
    let _logs = Logs::new();
    let net = Lan::of(["server", "client"])?;
    let server = vm.clone().lan(&net, "server").start()?;
    let client = vm.lan(&net, "client").start()?;
    for vm in [&server, &client] {
        let found = vm.exec(["getent", "hosts", "server"])?.stdout_text().to_string();
        assert!(found.starts_with(&net.address("server")?.to_string()), "{found}");
    }
    Ok(())
}

#[test]
fn a_member_is_cut_off_and_comes_back() {
    let _logs = Logs::new();
    let net = Lan::of(["a", "b", "c"]).unwrap();
    let vms = ["a", "b", "c"].map(|name| builder().lan(&net, name).start().unwrap());
    let [a, b, c] = &vms;
    for vm in &vms {
        net.members().for_each(|name| reaches(vm, name));
    }
    net.cut("b").unwrap();
    reaches_not(a, "b");
    reaches_not(b, "c");
    reaches(a, "c");
    reaches(b, "b");
    net.join("b").unwrap();
    reaches(a, "b");
    reaches(b, "c");
    net.split([["a", "b"]]).unwrap();
    reaches(a, "b");
    reaches_not(a, "c");
    net.heal();
    reaches(c, "b");
    // A transfer outlives a cut.
    let (sent, received) = std::thread::scope(|scope| {
        let carried = scope.spawn(|| carry(a, c, "c"));
        let before = net.counters("c").unwrap().unwrap().sent;
        let until = Instant::now() + PATIENCE;
        while net.counters("c").unwrap().unwrap().sent < before + 2000 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        net.cut("c").unwrap();
        let frozen = net.counters("c").unwrap().unwrap().sent;
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(net.counters("c").unwrap().unwrap().sent, frozen);
        assert!(!carried.is_finished());
        net.join("c").unwrap();
        carried.join().unwrap()
    });
    assert_eq!(said(&sent, "sum"), said(&received, "sum"));
}

#[test]
fn a_vm_is_on_several_networks_and_the_users() {
    let _logs = Logs::new();
    let left = Lan::of(["router", "left"]).unwrap();
    let right = Lan::of(["router", "right"]).unwrap();
    // Some boot, and some go on from a snapshot.
    let router = builder().lan(&left, "router").lan(&right, "router").network(NetworkMode::User);
    let router = router.snapshots(SnapshotMode::Never).start().unwrap();
    let outside = builder().lan(&right, "right").network(NetworkMode::User).start().unwrap();
    let inside = builder().lan(&left, "left").snapshots(SnapshotMode::Never).start().unwrap();
    reaches(&inside, "router");
    reaches(&router, "left");
    reaches(&router, "right");
    for vm in [&router, &outside] {
        // The user's network has its own address and the default route.
        reaches(vm, "10.0.2.2");
        let routes = vm.exec(["cat", "/proc/net/route"]).unwrap().stdout_text().to_string();
        assert!(routes.lines().any(|line| line.contains("\t00000000\t0202000A\t")), "{routes}");
    }
    // Through the router.
    reaches_not(&inside, &right.address("right").unwrap().to_string());
    let forward = ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"];
    let forward = router.command(forward[0]).args(&forward[1..]).user(GuestUser::default());
    assert!(forward.output().unwrap().status.success());
    let route = |vm: &Vm, to: &Lan, via: &Lan| {
        let [a, b, c, _] = to.address("router").unwrap().octets();
        let (to, via) = (format!("{a}.{b}.{c}.0/24"), via.address("router").unwrap().to_string());
        let ip = ["ip", "route", "add", &to, "via", &via];
        let output = vm.command(ip[0]).args(&ip[1..]).user(GuestUser::default()).output().unwrap();
        assert!(output.status.success(), "{}", output.stderr_text());
    };
    route(&inside, &right, &left);
    route(&outside, &left, &right);
    reaches(&inside, &right.address("right").unwrap().to_string());
}

#[test]
fn a_vm_can_be_on_as_many_networks_as_it_says() {
    let _logs = Logs::new();
    let nets: Vec<Lan> = (0..MAX_LANS).map(|_| Lan::of(["hub", "spoke"]).unwrap()).collect();
    let hub = || nets.iter().fold(builder(), |vm, net| vm.lan(net, "hub"));
    let last = nets.last().unwrap();
    let spoke = builder().lan(last, "spoke").start().unwrap();
    for mode in [SnapshotMode::Use, SnapshotMode::Never] {
        let hub = hub().snapshots(mode).start().unwrap();
        reaches(&spoke, "hub");
        reaches(&hub, &last.address("spoke").unwrap().to_string());
    }
}

#[test]
fn networks_that_cannot_be_are_found_before_anything_boots() {
    let _logs = Logs::new();
    let net = Lan::of(["a", "b"]).unwrap();
    let unknown = builder().lan(&net, "c").prepare().unwrap_err();
    assert!(matches!(unknown, Error::Lan(LanError::Unknown { .. })), "{unknown}");
    let twice = builder().lan(&net, "a").lan(&net, "b").prepare().unwrap_err();
    assert!(matches!(twice, Error::Lan(LanError::SameSubnet { .. })), "{twice}");
    let image = Vm::builder().image(Image::new("/no/such/image")).lan(&net, "a");
    let image = image.prepare().unwrap_err();
    assert!(image.to_string().contains("a place on a network of VMs"), "{image}");
    let first = builder().lan(&net, "a").start().unwrap();
    let second = builder().lan(&net, "a").start().unwrap_err();
    assert!(matches!(second, Error::Lan(LanError::Taken { .. })), "{second}");
    drop(first);
    // A guest that ended by itself is no member any more, either.
    let first = builder().lan(&net, "a").start().unwrap();
    let died = first.command("sh").args(["-c", "echo b > /proc/sysrq-trigger"]);
    assert!(died.user(GuestUser::default()).output().is_err());
    drop(builder().lan(&net, "a").start().unwrap());
    drop(first);
}

/// This process's threads and descriptors.
fn has() -> (usize, usize) {
    let count = |dir: &str| std::fs::read_dir(dir).unwrap().count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

#[test]
#[ignore = "counts what the whole process has, so it has to run alone"]
fn nothing_is_left_behind_alone() {
    let _logs = Logs::new();
    let round = || {
        let net = Lan::of(["a", "b"]).unwrap();
        let a = builder().lan(&net, "a").start().unwrap();
        let b = builder().lan(&net, "b").start().unwrap();
        reaches(&a, "b");
        drop(net);
        drop(a);
        b.shutdown().unwrap();
    };
    // Whatever is made once and kept is there then.
    round();
    std::thread::sleep(Duration::from_secs(1));
    let before = has();
    round();
    let until = Instant::now() + Duration::from_secs(10);
    while has() != before {
        assert!(Instant::now() < until, "{:?} instead of {before:?}", has());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn nothing_is_left_behind() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let name = "nothing_is_left_behind_alone";
    let output = command.args([name, "--exact", "--ignored", "--test-threads=1"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "a measurement"]
fn speed() {
    let _logs = Logs::new();
    let net = Lan::of(["server", "client"]).unwrap();
    let server = builder().lan(&net, "server").start().unwrap();
    let client = builder().lan(&net, "client").start().unwrap();
    for mtu in [1500, 9000, 65535, 1500] {
        let larger = format!("ip link set dev $(basename /sys/class/net/e*) mtu {mtu}");
        for vm in [&server, &client] {
            let output = vm.command("sh").args(["-c", &larger]).user(GuestUser::default());
            assert!(output.output().unwrap().status.success());
        }
        for _ in 0..3 {
            let (sent, received) = carry(&client, &server, "server");
            assert_eq!(said(&sent, "sum"), said(&received, "sum"));
            println!("MTU {mtu}: {} Mbit/s", said(&sent, "megabits a second"));
        }
    }
    println!("{:?}", net.counters("server").unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| in_guest(&server, "echoes", "").output().unwrap());
        let asked = in_guest(&client, "asks", "server").output().unwrap();
        println!("{} us a round trip", said(&asked, "microseconds a round"));
    });
}
