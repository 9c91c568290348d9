//! Which address is behind which port.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::MacAddress;

/// Addresses that are learned of one port, beside its own. A guest with containers or guests of its own has a
/// few; one that makes addresses up forgets its own older ones, and nobody else's.
pub const MAX_LEARNED: usize = 256;

/// A port's number, never used again.
pub(super) type PortId = u64;

#[derive(Debug, Clone, Copy)]
enum Place {
    /// It is the port's own address, and no other port's.
    Own(PortId),
    Learned(PortId),
}

/// The addresses that are known.
#[derive(Debug, Default)]
pub(super) struct Table {
    places: HashMap<MacAddress, Place>,
    /// The learned ones of each port, the oldest first.
    learned: BTreeMap<PortId, VecDeque<MacAddress>>,
}

impl Table {
    /// Notes a port's own address.
    pub(super) fn own(&mut self, address: MacAddress, port: PortId) {
        if let Some(Place::Learned(other)) = self.places.insert(address, Place::Own(port)) {
            self.unlearn(address, other);
        }
    }

    /// The port that an address is behind.
    pub(super) fn port(&self, address: MacAddress) -> Option<PortId> {
        self.places.get(&address).map(|&(Place::Own(port) | Place::Learned(port))| port)
    }

    /// Notes that a frame came from an address by a port. False when it is the own address of another one.
    pub(super) fn learn(&mut self, address: MacAddress, port: PortId) -> bool {
        match self.places.get(&address) {
            Some(&(Place::Own(known) | Place::Learned(known))) if known == port => return true,
            Some(Place::Own(_)) => return false,
            Some(&Place::Learned(other)) => self.unlearn(address, other),
            None => {}
        }
        let learned = self.learned.entry(port).or_default();
        if learned.len() >= MAX_LEARNED
            && let Some(oldest) = learned.pop_front()
        {
            self.places.remove(&oldest);
        }
        learned.push_back(address);
        self.places.insert(address, Place::Learned(port));
        true
    }

    /// Forgets all addresses of a port.
    pub(super) fn forget(&mut self, port: PortId) {
        self.learned.remove(&port);
        self.places.retain(|_, place| {
            let (Place::Own(other) | Place::Learned(other)) = *place;
            other != port
        });
    }

    fn unlearn(&mut self, address: MacAddress, port: PortId) {
        if let Some(learned) = self.learned.get_mut(&port) {
            learned.retain(|other| *other != address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> MacAddress {
        let [a, b, c, d] = number.to_be_bytes();
        MacAddress([0x02, 0, a, b, c, d])
    }

    #[test]
    fn a_port_that_makes_addresses_up_loses_its_own_only() {
        let mut table = Table::default();
        table.own(address(1), 1);
        table.own(address(2), 2);
        assert!(table.learn(address(3), 2));
        for number in 100..100_000 {
            assert!(table.learn(address(number), 1));
        }
        assert_eq!(table.places.len(), 2 + 1 + MAX_LEARNED);
        assert_eq!(table.learned[&1].len(), MAX_LEARNED);
        assert_eq!((table.port(address(100)), table.port(address(99_999))), (None, Some(1)));
        assert_eq!(table.port(address(1)), Some(1));
        assert_eq!((table.port(address(2)), table.port(address(3))), (Some(2), Some(2)));
    }

    #[test]
    fn an_own_address_cannot_be_taken_and_a_learned_one_moves() {
        let mut table = Table::default();
        assert!(table.learn(address(1), 2));
        table.own(address(1), 1);
        assert!(!table.learn(address(1), 2));
        assert_eq!(table.port(address(1)), Some(1));
        assert!(table.learn(address(1), 1));
        assert!(table.learn(address(3), 1) && table.learn(address(3), 2));
        assert_eq!(table.port(address(3)), Some(2));
        assert!(!table.learned[&1].contains(&address(3)));
        table.forget(2);
        assert_eq!((table.port(address(1)), table.port(address(3))), (Some(1), None));
        table.forget(1);
        assert!(table.places.is_empty() && table.learned.values().all(VecDeque::is_empty));
    }
}
