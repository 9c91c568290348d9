//! Networks that VMs of this process have to themselves.

mod error;
#[cfg(test)]
mod tests;

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Weak};

use vmlab_devices::net::{Port, Switch};
use vmlab_wire::message::Interface;

use crate::config::LanDevice;
use crate::sync::lock;

pub use error::LanError;
pub use vmlab_devices::net::{Counters, MacAddress};

/// The most members of a network: those that a /24 has addresses for.
pub const MAX_MEMBERS: usize = 254;

/// The most networks that one VM can be on. Its devices share 31 places.
pub const MAX_LANS: usize = 16;

/// The longest name of a member in bytes: what Linux takes as a host name.
pub const MAX_NAME: usize = 64;

/// Length of a network's prefix in bits.
const PREFIX: u8 = 24;

/// Where networks are that are not given a place: `10.77.0.0/16`.
const SUBNETS: [u8; 2] = [10, 77];

/// What interfaces' addresses begin with: a locally administered one, and a `v`. The IP address follows.
const MAC_PREFIX: [u8; 2] = [0x02, 0x76];

/// The third byte of the next network that is not given a place. They come around after 256, which matters
/// only to a VM that is on both.
static NEXT_SUBNET: AtomicU8 = AtomicU8::new(1);

/// A network of its own for two or more VMs of this process.
///
/// Its members are named up front. Each has an address, an interface for it and, unless it is given another one, its
/// name as the host name; and `/etc/hosts` of each has the names of all. Nothing else is on the network: not the
/// host, no name server and no way out. A VM can be on several, and have [`NetworkMode::User`] besides.
///
/// ```no_run
/// use vmlab::{Lan, Vm};
///
/// let net = Lan::of(["server", "client"])?;
/// let vm = Vm::builder().kernel("debian:6.12");
/// let server = vm.clone().lan(&net, "server").start()?;
/// let client = vm.lan(&net, "client").start()?;
/// assert!(client.exec(["ping", "-c1", "server"])?.status.success());
///
/// net.cut("server")?;
/// assert!(!client.exec(["ping", "-c1", "-W1", "server"])?.status.success());
/// net.join("server")?;
/// # drop(server);
/// # Ok::<(), vmlab::Error>(())
/// ```
///
/// Frames are carried by a switch in this process, without any rights. It goes on as long as a clone of this value or
/// a VM on it is there.
///
/// [`NetworkMode::User`]: crate::config::NetworkMode::User
#[derive(Debug, Clone)]
pub struct Lan {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    switch: Switch,
    subnet: [u8; 3],
    names: Vec<String>,
    members: Mutex<Vec<Member>>,
}

#[derive(Debug, Clone, Default)]
struct Member {
    cut: bool,
    /// Where it is while the network is split.
    side: u32,
    /// A VM has this place.
    taken: bool,
    port: Weak<LanPort>,
}

impl Member {
    /// The side of the switch that it belongs to.
    fn side(&self) -> Option<u32> {
        (!self.cut).then_some(self.side)
    }
}

impl Lan {
    /// A network with these members, at a `10.77.x.0/24` that no other of this process has until there are more
    /// than 256 of them. The first member has the address `10.77.x.1`, and so on.
    ///
    /// # Errors
    /// There are none or more than [`MAX_MEMBERS`], a name is no host name or there twice, or the host has no more
    /// threads or descriptors.
    pub fn of(members: impl IntoIterator<Item = impl Into<String>>) -> Result<Self, LanError> {
        let third = NEXT_SUBNET.fetch_add(1, Ordering::Relaxed);
        Self::in_subnet([SUBNETS[0], SUBNETS[1], third], members)
    }

    /// The same at another place: the first three bytes of a /24.
    ///
    /// # Errors
    /// As of [`of`](Self::of); also when hosts can have no addresses there.
    pub fn in_subnet(
        subnet: [u8; 3],
        members: impl IntoIterator<Item = impl Into<String>>,
    ) -> Result<Self, LanError> {
        let names: Vec<String> = members.into_iter().map(Into::into).collect();
        if names.is_empty() || names.len() > MAX_MEMBERS {
            return Err(LanError::Count { count: names.len() });
        }
        for (index, name) in names.iter().enumerate() {
            check_name(name)?;
            if names[..index].iter().any(|other| other.eq_ignore_ascii_case(name)) {
                return Err(LanError::Duplicate { name: name.clone() });
            }
        }
        if matches!(subnet[0], 0 | 127 | 224..) {
            return Err(LanError::Subnet { subnet });
        }
        let switch = Switch::new().map_err(|source| LanError::Switch { source })?;
        let members = Mutex::new(vec![Member::default(); names.len()]);
        Ok(Self { shared: Arc::new(Shared { switch, subnet, names, members }) })
    }

    /// The names of all members, in the order of their addresses.
    pub fn members(&self) -> impl Iterator<Item = &str> {
        self.shared.names.iter().map(String::as_str)
    }

    /// A member's address on this network, whether its VM runs or not.
    ///
    /// # Errors
    /// [`LanError::Unknown`] when there is no such member.
    pub fn address(&self, member: &str) -> Result<Ipv4Addr, LanError> {
        self.index(member).map(|index| self.shared.address(index))
    }

    /// Cuts a member off from all others: until it is [joined](Self::join) again, frames from and to it are lost,
    /// also those that wait for a guest to fetch them. Its interface stays up, as if the cut were further away. A VM
    /// that does not run yet starts cut off.
    ///
    /// # Errors
    /// [`LanError::Unknown`] when there is no such member.
    pub fn cut(&self, member: &str) -> Result<(), LanError> {
        let index = self.index(member)?;
        self.arrange(|members| members[index].cut = true);
        Ok(())
    }

    /// Ends [`cut`](Self::cut). What was lost meanwhile stays lost.
    ///
    /// # Errors
    /// [`LanError::Unknown`] when there is no such member.
    pub fn join(&self, member: &str) -> Result<(), LanError> {
        let index = self.index(member)?;
        self.arrange(|members| members[index].cut = false);
        Ok(())
    }

    /// Splits the network: members reach those of their own side only, until another call of this or of
    /// [`heal`](Self::heal). All members that are not named are on one further side. With
    /// `net.split([["a", "b"]])`, these two do not reach the others.
    ///
    /// # Errors
    /// [`LanError::Unknown`] when there is no such member, [`LanError::TwoSides`] when one is on two sides. All is
    /// as before then.
    pub fn split<S>(&self, sides: impl IntoIterator<Item = S>) -> Result<(), LanError>
    where
        S: IntoIterator<Item: AsRef<str>>,
    {
        let mut found = vec![0; self.shared.names.len()];
        for (side, members) in (1..).zip(sides) {
            for member in members {
                let place = &mut found[self.index(member.as_ref())?];
                if std::mem::replace(place, side) != 0 {
                    return Err(LanError::TwoSides { name: member.as_ref().to_owned() });
                }
            }
        }
        self.arrange(|members| {
            members.iter_mut().zip(found).for_each(|(member, side)| member.side = side);
        });
        Ok(())
    }

    /// Ends [`split`](Self::split) and all [cuts](Self::cut): each reaches all others again.
    pub fn heal(&self) {
        self.arrange(|members| {
            members.iter_mut().for_each(|member| (member.cut, member.side) = (false, 0));
        });
    }

    /// How many frames a member's VM has sent and was sent since it runs; `None` if it does not.
    ///
    /// # Errors
    /// [`LanError::Unknown`] when there is no such member.
    pub fn counters(&self, member: &str) -> Result<Option<Counters>, LanError> {
        let index = self.index(member)?;
        let port = lock(&self.shared.members)[index].port.upgrade();
        Ok(port.map(|port| port.port.counters()))
    }

    /// Changes who is where, for all at once.
    fn arrange(&self, change: impl FnOnce(&mut [Member])) {
        let mut members = lock(&self.shared.members);
        change(&mut members);
        let ports =
            members.iter().filter_map(|member| Some((member.port.upgrade()?, member.side())));
        let ports: Vec<_> = ports.collect();
        self.shared.switch.arrange(ports.iter().map(|(port, side)| (&port.port, *side)));
        drop(members);
        // The last user of a port takes the lock when it goes.
        drop(ports);
    }

    fn index(&self, member: &str) -> Result<usize, LanError> {
        let found = self.shared.names.iter().position(|name| name == member);
        found.ok_or_else(|| LanError::Unknown {
            name: member.to_owned(),
            members: self.shared.names.clone(),
        })
    }
}

impl Shared {
    fn address(&self, index: usize) -> Ipv4Addr {
        let [a, b, c] = self.subnet;
        // There are no more than 254 members.
        let last = u8::try_from(index + 1).unwrap_or(u8::MAX);
        Ipv4Addr::new(a, b, c, last)
    }

    fn mac(&self, index: usize) -> MacAddress {
        let ([a, b], [c, d, e, f]) = (MAC_PREFIX, self.address(index).octets());
        MacAddress([a, b, c, d, e, f])
    }
}

/// Checks that a name can be a host's, and that nothing takes it for an address.
fn check_name(name: &str) -> Result<(), LanError> {
    let bad = |why| Err(LanError::Name { name: name.to_owned(), why });
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let part = |part: &str| {
        (1..=63).contains(&part.len())
            && part.chars().all(plain)
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    match () {
        () if name.len() > MAX_NAME => bad("it has more than 64 bytes"),
        () if !name.split('.').all(part) => {
            bad("host names are of letters, digits and `-`, in parts with `.` between them")
        }
        () if !name.chars().any(|c| c.is_ascii_alphabetic()) => {
            bad("it would be taken for an address")
        }
        () if name.eq_ignore_ascii_case("localhost") => bad("that is every guest itself"),
        () => Ok(()),
    }
}

/// What a VM is on a network.
#[derive(Debug, Clone)]
pub(crate) struct Membership {
    lan: Lan,
    index: usize,
}

/// Looks up what a VM is to be on its networks.
///
/// # Errors
/// There is no such member, or two of the networks cannot be told apart.
pub(crate) fn memberships(wanted: &[(Lan, String)]) -> Result<Vec<Membership>, LanError> {
    if wanted.len() > MAX_LANS {
        return Err(LanError::TooMany { count: wanted.len() });
    }
    let mut found: Vec<Membership> = Vec::new();
    for (lan, name) in wanted {
        let index = lan.index(name)?;
        let same = |other: &&Membership| other.lan.shared.subnet == lan.shared.subnet;
        if let Some(other) = found.iter().find(same) {
            let names = [other.name().to_owned(), name.clone()];
            return Err(LanError::SameSubnet { names, subnet: lan.shared.subnet });
        }
        found.push(Membership { lan: lan.clone(), index });
    }
    Ok(found)
}

impl Membership {
    pub(crate) fn name(&self) -> &str {
        &self.lan.shared.names[self.index]
    }

    pub(crate) fn device(&self) -> LanDevice {
        LanDevice { mac: self.lan.shared.mac(self.index) }
    }

    /// What the guest makes of the device.
    pub(crate) fn interface(&self) -> Interface {
        let shared = &self.lan.shared;
        let (mac, address) = (shared.mac(self.index).0, shared.address(self.index).octets());
        Interface { mac, address, prefix: PREFIX }
    }

    /// The names that the guest is to know.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = (Ipv4Addr, String)> {
        let shared = &self.lan.shared;
        shared.names.iter().enumerate().map(|(index, name)| (shared.address(index), name.clone()))
    }

    /// Takes the place for a VM.
    ///
    /// # Errors
    /// [`LanError::Taken`] when another VM has it.
    pub(crate) fn claim(&self) -> Result<Arc<Claim>, LanError> {
        let mut members = lock(&self.lan.shared.members);
        if std::mem::replace(&mut members[self.index].taken, true) {
            return Err(LanError::Taken { name: self.name().to_owned() });
        }
        Ok(Arc::new(Claim { lan: self.lan.clone(), index: self.index }))
    }
}

/// Takes all places of a VM.
///
/// # Errors
/// [`LanError::Taken`] when another VM has one.
pub(crate) fn claim_all(memberships: &[Membership]) -> Result<Vec<Arc<Claim>>, LanError> {
    memberships.iter().map(Membership::claim).collect()
}

/// A place on a network that a VM has, until this is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    lan: Lan,
    index: usize,
}

impl Claim {
    /// A port for one start of the VM.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub(crate) fn port(self: &Arc<Self>) -> io::Result<Arc<LanPort>> {
        let shared = &self.lan.shared;
        let member = &mut lock(&shared.members)[self.index];
        let (port, device) = shared.switch.port(shared.mac(self.index), member.side())?;
        let port = Arc::new(LanPort { port, device, _claim: Arc::clone(self) });
        member.port = Arc::downgrade(&port);
        Ok(port)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.lan.shared.members)[self.index].taken = false;
    }
}

/// A VM's place on a [`Lan`], for as long as the VM runs. The hypervisor drops it when the VM has ended, and another
/// VM can have the place then.
#[derive(Debug)]
pub struct LanPort {
    port: Port,
    device: OwnedFd,
    _claim: Arc<Claim>,
}

impl LanPort {
    /// The device's end: a connected datagram socket on which each datagram is an Ethernet frame, from the
    /// destination's address to the end of the payload.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}
