//! Frames and the addresses in them.

use std::fmt;

use serde::{Serialize, Serializer};

/// The shortest frame in bytes: two addresses and a type. Padding to 60 bytes is for wires.
pub const MIN_FRAME: usize = 14;

/// The longest frame in bytes: the largest MTU of Linux's drivers behind a header with a VLAN tag.
pub const MAX_FRAME: usize = 65535 + 18;

/// The address of a network interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// All stations of a network.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it stands for several stations: a multicast address, or all of them.
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// From whom a frame is and to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) destination: MacAddress,
    pub(super) source: MacAddress,
}

impl Addresses {
    /// Reads the beginning of a frame. `None` if it is none: too short or too long, or from nobody or from
    /// several.
    pub(super) fn of(frame: &[u8]) -> Option<Self> {
        if frame.len() < MIN_FRAME || frame.len() > MAX_FRAME {
            return None;
        }
        let (destination, rest) = frame.split_first_chunk()?;
        let (source, _) = rest.split_first_chunk()?;
        let (destination, source) = (MacAddress(*destination), MacAddress(*source));
        let valid = !source.is_group() && source.0 != [0; 6];
        valid.then_some(Self { destination, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(source: [u8; 6], length: usize) -> Vec<u8> {
        let mut frame = [&[2; 6][..], &source].concat();
        frame.resize(length, 0);
        frame
    }

    #[test]
    fn only_frames_of_one_station_are_frames() {
        let one = [0x02, 0, 0, 0, 0, 1];
        let addresses = Addresses::of(&frame(one, MIN_FRAME)).unwrap();
        assert_eq!((addresses.destination.0, addresses.source.0), ([2; 6], one));
        assert!(Addresses::of(&frame(one, MAX_FRAME)).is_some());
        assert!(Addresses::of(&frame(one, MAX_FRAME + 1)).is_none());
        assert!(Addresses::of(&frame(one, MIN_FRAME - 1)).is_none());
        assert!(Addresses::of(&[]).is_none());
        assert!(Addresses::of(&frame([0; 6], 60)).is_none());
        assert!(Addresses::of(&frame([0x03, 0, 0, 0, 0, 1], 60)).is_none());
        assert!(Addresses::of(&frame([0xff; 6], 60)).is_none());
    }

    #[test]
    fn addresses_are_written_as_everywhere() {
        let address = MacAddress([0x02, 0x76, 0x0a, 0x4d, 0, 0xff]);
        assert_eq!(address.to_string(), "02:76:0a:4d:00:ff");
        assert!(!address.is_group() && MacAddress::BROADCAST.is_group());
    }
}
