//! Network interfaces: loopback, and static addresses.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink};
use vmlab_wire::message::{Failure, Interface, Network};

use super::{Step, failed_io};
use crate::power;
use crate::sys::monotonic_ns;

/// How long an interface may take to pass packets after it was taken up: the kernel may put that off
/// by a second.
const LINK_TIMEOUT_NS: u64 = 5_000_000_000;

/// An empty request for the interface `name`.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zeros is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays the string's end.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as _;
    }
    Ok(request)
}

/// A socket to configure interfaces with.
struct Configurator(OwnedFd);

impl Configurator {
    fn new() -> io::Result<Self> {
        let kind = SocketType::DGRAM;
        let socket =
            rustix::net::socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, None)?;
        Ok(Self(socket))
    }

    fn ioctl<T>(&self, number: libc::Ioctl, argument: &mut T) -> io::Result<()> {
        // SAFETY: every caller in this module passes the structure that the request number takes.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), number, argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn up(&self, name: &str) -> io::Result<()> {
        let mut request = request(name)?;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as _;
        self.ioctl(libc::SIOCSIFFLAGS as _, &mut request)
    }

    /// Whether the interface passes packets.
    fn is_running(&self, name: &str) -> io::Result<bool> {
        let mut request = request(name)?;
        self.ioctl(libc::SIOCGIFFLAGS as _, &mut request)?;
        // SAFETY: SIOCGIFFLAGS has written this member of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        Ok(libc::c_int::from(flags) & libc::IFF_RUNNING != 0)
    }

    fn address(&self, name: &str, number: libc::Ioctl, address: [u8; 4]) -> io::Result<()> {
        let mut request = request(name)?;
        request.ifr_ifru.ifru_addr = socket_address(address);
        self.ioctl(number, &mut request)
    }

    /// Gives an interface its address and takes it up, until it passes packets.
    fn bring_up(
        &self,
        name: &str,
        (address, prefix): ([u8; 4], u8),
        warn: &mut dyn FnMut(String),
    ) -> io::Result<()> {
        let mask = u32::MAX.checked_shl(32u32.saturating_sub(prefix.into())).unwrap_or(0);
        self.address(name, libc::SIOCSIFADDR as _, address)?;
        self.address(name, libc::SIOCSIFNETMASK as _, mask.to_be_bytes())?;
        let events = link_events()?;
        self.up(name)?;
        if !wait_running(self, &events, name)? {
            warn(format!("the network interface {name} does not come up"));
        }
        Ok(())
    }

    fn default_route(&self, gateway: [u8; 4]) -> io::Result<()> {
        // SAFETY: all zeros is a valid rtentry.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = socket_address([0; 4]);
        route.rt_genmask = socket_address([0; 4]);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        self.ioctl(libc::SIOCADDRT as _, &mut route)
    }
}

/// An IPv4 address in the form of `struct sockaddr`.
fn socket_address(address: [u8; 4]) -> libc::sockaddr {
    let mut data = [0; 14];
    // `sin_addr` comes after the two bytes of the port.
    for (to, from) in data[2..6].iter_mut().zip(address) {
        *to = from as _;
    }
    libc::sockaddr { sa_family: libc::AF_INET as _, sa_data: data }
}

/// Takes the loopback interface up.
pub(super) fn loopback(warn: &mut dyn FnMut(String)) {
    if let Err(e) = Configurator::new().and_then(|c| c.up("lo")) {
        warn(format!("the loopback interface could not be taken up: {e}"));
    }
}

/// Opens a socket that becomes readable when the state of an interface changes.
fn link_events() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    // The protocol of number 0 is NETLINK_ROUTE.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, None)?;
    let groups = libc::RTMGRP_LINK as u32;
    rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

/// Waits until an interface that was taken up passes packets: it drops them for the moment before.
fn wait_running(c: &Configurator, events: &OwnedFd, name: &str) -> io::Result<bool> {
    let until = monotonic_ns() + LINK_TIMEOUT_NS;
    while !c.is_running(name)? {
        if !power::wait_until(events, until) {
            return Ok(false);
        }
        let mut event = [0; 4096];
        while matches!(rustix::io::read(events, &mut event), Ok(n) if n > 0) {}
    }
    Ok(true)
}

/// Gives the guest's first interface that is on none of `lans` its address and route.
pub(super) fn configure(
    network: &Network,
    lans: &[Interface],
    warn: &mut dyn FnMut(String),
) -> Step {
    let of_lan = |(_, mac): &(String, String)| lans.iter().any(|lan| *mac == written(lan.mac));
    let name = interfaces().into_iter().find(|found| !of_lan(found));
    let (name, _) = name.ok_or_else(|| missing("the network interface"))?;
    let configured = Configurator::new().and_then(|c| {
        c.bring_up(&name, (network.address, network.prefix), warn)?;
        c.default_route(network.gateway)
    });
    configured.map_err(|e| failed_io(format!("configure the network interface {name}"), &e, ""))
}

/// Gives interfaces on networks of VMs their addresses.
pub(super) fn configure_lans(lans: &[Interface], warn: &mut dyn FnMut(String)) -> Step {
    let found = interfaces();
    for lan in lans {
        let wanted = written(lan.mac);
        let name = found.iter().find(|(_, mac)| *mac == wanted).map(|(name, _)| name);
        let name = name.ok_or_else(|| missing(&format!("the network interface {wanted}")))?;
        let configured =
            Configurator::new().and_then(|c| c.bring_up(name, (lan.address, lan.prefix), warn));
        configured
            .map_err(|e| failed_io(format!("configure the network interface {name}"), &e, ""))?;
    }
    Ok(())
}

fn missing(what: &str) -> Failure {
    Failure {
        step: format!("find {what}"),
        detail: "it is not there (is virtio_net in the kernel or its initramfs?)".to_string(),
        errno: None,
    }
}

/// An interface's address as the kernel writes it.
fn written(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The interfaces that belong to a device, with their addresses, in the order of their names.
fn interfaces() -> Vec<(String, String)> {
    let Ok(entries) = fs::read_dir("/sys/class/net") else { return Vec::new() };
    let with_device = entries.flatten().filter(|entry| entry.path().join("device").exists());
    let mut found: Vec<_> = with_device
        .filter_map(|entry| {
            let mac = fs::read_to_string(entry.path().join("address")).ok()?;
            let name = entry.file_name().to_string_lossy().into_owned();
            Some((name, mac.trim_end().to_string()))
        })
        .collect();
    found.sort();
    found
}
