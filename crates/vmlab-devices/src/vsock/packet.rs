//! Packets: `struct virtio_vsock_hdr` of `linux/virtio_vsock.h` and what is in it. No crate here has its numbers.

/// The context of the host: `VMADDR_CID_HOST`.
pub(super) const HOST_CID: u64 = libc::VMADDR_CID_HOST as u64;

/// The bytes of a header.
pub(super) const HEADER: usize = 44;

/// The most bytes of data in one packet: as many as Linux's drivers put into one.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// The type of stream sockets, the only ones here.
pub(super) const STREAM: u16 = 1;

/// The event that ends all connections.
pub(super) const TRANSPORT_RESET: u32 = 0;

/// The sender of [`Op::Shutdown`] will not receive any more.
pub(super) const NO_RECEIVE: u32 = 1;
/// The sender of [`Op::Shutdown`] will not send any more.
pub(super) const NO_SEND: u32 = 2;

/// What a packet says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];

    pub(super) fn of(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|op| *op as u16 == number)
    }
}

/// A header, in the order of its fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) source_cid: u64,
    pub(super) destination_cid: u64,
    pub(super) source_port: u32,
    pub(super) destination_port: u32,
    pub(super) length: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// How many bytes the sender of the packet can hold for the connection.
    pub(super) buf_alloc: u32,
    /// How many bytes it has passed on since the connection began, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Self {
        let mut rest = Rest(bytes);
        Self {
            source_cid: u64::from_le_bytes(rest.take()),
            destination_cid: u64::from_le_bytes(rest.take()),
            source_port: u32::from_le_bytes(rest.take()),
            destination_port: u32::from_le_bytes(rest.take()),
            length: u32::from_le_bytes(rest.take()),
            kind: u16::from_le_bytes(rest.take()),
            op: u16::from_le_bytes(rest.take()),
            flags: u32::from_le_bytes(rest.take()),
            buf_alloc: u32::from_le_bytes(rest.take()),
            fwd_cnt: u32::from_le_bytes(rest.take()),
        }
    }

    pub(super) fn bytes(&self) -> [u8; HEADER] {
        let parts = [
            &self.source_cid.to_le_bytes()[..],
            &self.destination_cid.to_le_bytes(),
            &self.source_port.to_le_bytes(),
            &self.destination_port.to_le_bytes(),
            &self.length.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; HEADER];
        for (to, from) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// The answer to a packet that belongs to nothing.
    pub(super) fn reset(&self) -> Self {
        Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

/// What is left of a header.
struct Rest<'h>(&'h [u8]);

impl Rest<'_> {
    /// The next bytes; zeroes behind the end, where no field is.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((bytes, rest)) = self.0.split_first_chunk() else { return [0; N] };
        self.0 = rest;
        *bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_those_of_the_specification() {
        let bytes: [u8; HEADER] = std::array::from_fn(|at| at as u8);
        let header = Header::parse(&bytes);
        assert_eq!(header.source_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.destination_port, 0x1716_1514);
        assert_eq!((header.kind, header.op), (0x1d1c, 0x1f1e));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
        assert_eq!(header.bytes(), bytes);
    }
}
